"""One layer, one name: the spellings that trainers give the modules of a model, and its base model.

Sources: the renaming tables of diffusers (convert_original_stable_diffusion_to_diffusers, convert_flux_to_diffusers),
of sd-scripts and of transformers (conversion_mapping, ViTModel and Dinov2Model). Only what is one to one is in: Flux's
`img_attn.qkv` is three layers of diffusers in one, and the halves of `final_layer.adaLN_modulation.1` swap there.
"""

import re
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

UNDERSCORED = re.compile(r"lora_(unet|transformer|te[123]?)_|lycoris_")  # kohya's names start so
# What stands around a module's own name, once or more: wrappers of peft and transformers, the component of a pipeline.
WRAPPERS = re.compile(r"((base_model\.model|model|language_model|transformer|diffusion_model|unet)\.)+")
TEXT_ENCODER = re.compile(r"(?:text_encoder(?:_([23]))?\.|lora_te([123])?_|(?=text_model\.))")

_PLACES = {"0": "resnets", "1": "attentions"}
_RESNET = {"in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
           "out_layers_3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
_OUTSIDE = {
    "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
    "middle_block_0": "mid_block_resnets_0",
    "middle_block_1": "mid_block_attentions_0", "middle_block_2": "mid_block_resnets_1",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
}  # fmt: skip
_DOUBLE = {"img_mod_lin": "norm1_linear", "txt_mod_lin": "norm1_context_linear", "img_attn_proj": "attn_to_out_0",
           "txt_attn_proj": "attn_to_add_out", "img_mlp_0": "ff_net_0_proj", "img_mlp_2": "ff_net_2",
           "txt_mlp_0": "ff_context_net_0_proj", "txt_mlp_2": "ff_context_net_2"}  # fmt: skip
_SINGLE = {"modulation_lin": "norm_linear", "linear2": "proj_out"}


def _any(names: Iterable[str]) -> str:
    return f"({'|'.join(names)})(?=_|$)"


# Of the first UNets and of Flux, as their authors named them → as diffusers does. Two resnets (or one and an attention)
# and a sampler make three input blocks, three of the former three output blocks.
BLOCKS: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"^" + _any(_OUTSIDE), lambda m: _OUTSIDE[m[1]]),
    (r"^input_blocks_(\d+)_0_op(?=_|$)", lambda m: f"down_blocks_{int(m[1]) // 3 - 1}_downsamplers_0_conv"),
    (r"^output_blocks_(\d+)_[12]_conv$", lambda m: f"up_blocks_{int(m[1]) // 3}_upsamplers_0_conv"),
    (r"^input_blocks_(\d+)_([01])(?=_)",
     lambda m: f"down_blocks_{(int(m[1]) - 1) // 3}_{_PLACES[m[2]]}_{(int(m[1]) - 1) % 3}"),
    (r"^output_blocks_(\d+)_([01])(?=_)", lambda m: f"up_blocks_{int(m[1]) // 3}_{_PLACES[m[2]]}_{int(m[1]) % 3}"),
    (r"(?<=_resnets_\d_)" + _any(_RESNET), lambda m: _RESNET[m[1]]),
    (r"^double_blocks_(\d+)_" + _any(_DOUBLE), lambda m: f"transformer_blocks_{m[1]}_{_DOUBLE[m[2]]}"),
    (r"^single_blocks_(\d+)_" + _any(_SINGLE), lambda m: f"single_transformer_blocks_{m[1]}_{_SINGLE[m[2]]}"),
    # Vision transformers of transformers 4, in whose files they are called so still, as transformers 5 has them.
    (r"(?<=_attention)_attention_(q|k|v)(uery|ey|alue)$", lambda m: f"_{m[1]}_proj"),
    (r"encoder_layer_(?=\d+_)", lambda m: "layers_"),
    (r"(?<=_attention)_output_dense$", lambda m: "_o_proj"),
    (r"(?<=\d)_intermediate_dense$", lambda m: "_mlp_fc1"),
    (r"(?<=\d)_output_dense$", lambda m: "_mlp_fc2"),
]  # fmt: skip
# One layer there, several here: no spelling of each other, but told of.
FUSED: list[tuple[str, str]] = [
    (r"^double_blocks_(\d+)_img_attn_qkv$", r"transformer_blocks_\1_attn_to_q"),
    (r"^double_blocks_(\d+)_txt_attn_qkv$", r"transformer_blocks_\1_attn_add_q_proj"),
    (r"^single_blocks_(\d+)_linear1$", r"single_transformer_blocks_\1_attn_to_q"),
]


@lru_cache(2**16)
def canonical(name: str) -> str:
    """One spelling for every known spelling of a module's name; what tells layers apart, not a name to write.

    Wrappers and the component of a pipeline are left out (a text encoder is `te1_…`), dots are underscores, and blocks
    are those of diffusers: `base_model.model.model.language_model.layers.0.mlp.up_proj` → `layers_0_mlp_up_proj`,
    `lora_unet_input_blocks_4_1_proj_in` → `down_blocks_1_attentions_0_proj_in`.
    """
    rest = name[wrapped.end() :] if (wrapped := WRAPPERS.match(name)) else name
    if found := TEXT_ENCODER.match(rest):
        return f"te{found[1] or found[2] or 1}_{rest[found.end() :].replace('.', '_')}"
    if found := UNDERSCORED.match(rest):
        rest = rest[found.end() :]
    rest = rest.replace(".", "_").replace("block_sparse_moe", "mlp")  # as Mixtral's authors called it
    for pattern, new in BLOCKS:
        rest = re.sub(pattern, new, rest)
    return rest


def twins(names: Iterable[str]) -> list[list[str]]:
    """Names among these that are one layer."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(canonical(name), []).append(name)
    return [same for same in found.values() if len(same) > 1]


def doubled(names: Iterable[str]) -> str:
    """What to say of names that are one layer, with an example and a count; nothing where there are none."""
    if not (same := twins(names)):
        return ""
    count = f"{len(same)} layers are" if len(same) > 1 else "1 layer is"
    return f"{count} there under several names, such as {' and '.join(same[0])}"


def layers(names: Collection[str]) -> dict[str, str]:
    """Name → what tells its layer apart: `canonical`, or the name itself where two of these names would be one."""
    return {name: canonical(name) for name in names} | {name: name for same in twins(names) for name in same}


def respelled(ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Their names → the names in `ours` of the same layers.

    A layer that is not among ours gets a new name after the pattern of those that are, where there is one, and keeps
    its own otherwise. Dots are never guessed.
    """
    if set(theirs) <= set(ours):
        return {name: name for name in theirs}
    known = {key: name for name, key in layers(ours).items()}
    new: dict[str, str] = {}
    heads: dict[str, str] = {}
    for name, key in layers(theirs).items():
        found = name if name in ours else known.get(key)
        if found is not None and (found == name or found not in theirs):
            new[name] = found
            heads |= _heads(name, found)
    taken = set(ours) | set(theirs)
    for name in theirs:
        if name not in new:
            new[name] = next((n for n in _translations(name, heads) if n not in taken), name)
            taken.add(new[name])
    return new


def _heads(name: str, other: str) -> dict[str, str]:
    """What two spellings begin with until their last parts agree."""
    a, b = (re.findall(r"[^._]*[._]?", x)[:-1] for x in (name, other))
    k = 0
    while k < min(len(a), len(b)) and a[-1 - k].rstrip("._") == b[-1 - k].rstrip("._"):
        k += 1
    return {"".join(a[: len(a) - k]): "".join(b[: len(b) - k])} if k else {}


def _translations(name: str, heads: dict[str, str]) -> Iterable[str]:
    for head in sorted(heads, key=len, reverse=True):
        if name.startswith(head):
            new = heads[head] + name[len(head) :]
            new = new.replace(".", "_") if UNDERSCORED.match(new) else new
            if UNDERSCORED.match(new) or not UNDERSCORED.match(name):
                if canonical(new) == canonical(name):
                    yield new


def alike(ours: Collection[str], theirs: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of a name that only `ours` has and one that only `theirs` has, which may be one layer.

    Their last parts, from the number of the layer on, agree, and neither side knows the other's first part; or one of
    them is fused of several (`FUSED`).
    """
    here, there = (
        {name: _split(name) for name in side if name not in other} for side, other in ((ours, theirs), (theirs, ours))
    )
    heads = [{_split(name)[0] for name in side} for side in (theirs, ours)]
    found: list[tuple[str, str]] = []
    ends: dict[str, str] = {}
    for name, (head, end) in here.items():
        if end and head not in heads[0]:
            ends.setdefault(end, name)
    whole = {fused(name): name for name in here}
    for name, (head, end) in there.items():
        if fused(name) in whole:
            found.append((whole[fused(name)], name))
        elif end in ends and head not in heads[1]:
            found.append((ends[end], name))
    return found


def fused(name: str) -> str:
    key = canonical(name)
    return next((re.sub(pattern, new, key) for pattern, new in FUSED if re.match(pattern, key)), key)


def _split(name: str) -> tuple[str, str]:
    """A canonical name before the number of its layer, and from there on; no end without a number."""
    key = canonical(name)
    number = re.search(r"(?<![^_])\d+(?=_)", key)
    return (key[: number.start()], key[number.start() :]) if number else (key, "")


# -- base models -----------------------------------------------------------------------------------------------

# What sd-scripts calls a family, by what others call it.
FAMILIES = {
    "sdxl_1.0": "sdxl_base_v1-0", "stable-diffusion-xl-base-1.0": "sdxl_base_v1-0", "sd_1.5": "sd_v1", "sd1.5": "sd_v1",
    "stable-diffusion-v1-5": "sd_v1", "flux.1-dev": "flux1",
}  # fmt: skip
QUANTISED = re.compile(r"(-unsloth)?-bnb-[48]bit$")


def base_of(base: str) -> str:
    """What tells base models apart: the last part of a hub id or path, in small letters, without marks of quantisation.

    A path into the cache of the hub, …/models--org--name/snapshots/<hash>, is that of org/name.
    """
    path = base.replace("\\", "/").rstrip("/")
    if cached := re.search(r"(?:^|/)models--(?:[^/]*--)?([^/]+)/snapshots/[^/]+$", path):
        path = cached[1]
    name = QUANTISED.sub("", path.rpartition("/")[2].lower())
    return FAMILIES.get(name, name)
