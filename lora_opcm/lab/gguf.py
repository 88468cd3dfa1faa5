"""A GGUF file as a folder that transformers loads: Llama weights in bfloat16, and the tokenizer.

transformers reads such files too, with the package `gguf`, in half a minute, most of it for the tokenizer. What we
need of the format is little: a header of keys and values, and tensors in blocks of 32 numbers with a scale each.
"""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
CONTROL = 3  # the type of a token that is no text
BLOCK = 32
# Number in the file → bytes and numbers of a block, as NumPy reads them.
BLOCKS = {
    0: np.dtype([("x", "<f4")]),
    1: np.dtype([("x", "<f2")]),
    3: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", BLOCK // 2)]),  # Q4_1: two numbers a byte
    8: np.dtype([("d", "<f2"), ("q", "i1", BLOCK)]),  # Q8_0
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What the header says, and the tensors by name, de-quantised to float32.

    Raises
    ------
    ValueError
        If it is no GGUF file of version 3, or a tensor is quantised in another way than Q4_1 or Q8_0.
    """
    data = np.memmap(path, mode="r")
    place = 0

    def take(code: str):
        nonlocal place
        (value,) = struct.unpack_from(f"<{code}", data, place)
        place += struct.calcsize(f"<{code}")
        return value

    def string() -> str:
        return take(f"{take('Q')}s").decode()

    def value(kind: int):
        if kind == ARRAY:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return string() if kind == STRING else take(SCALARS[kind])

    if take("4s") != b"GGUF" or take("I") != 3:
        raise ValueError(f"{path}: not a GGUF file of version 3")
    count, keys = take("Q"), take("Q")
    header = {}
    for _ in range(keys):
        key = string()
        header[key] = value(take("I"))
    infos = []
    for _ in range(count):
        name = string()
        shape = [take("Q") for _ in range(take("I"))][::-1]  # of NumPy: the fastest index last
        infos.append((name, shape, take("I"), take("Q")))
    align = header.get("general.alignment", 32)
    start = -(-place // align) * align
    return header, {name: _numbers(data, shape, kind, start + at, name) for name, shape, kind, at in infos}


def _numbers(data: np.ndarray, shape: list[int], kind: int, at: int, name: str) -> np.ndarray:
    if kind not in BLOCKS:
        raise ValueError(f"tensor {name}: quantised by type {kind}, expected one of {sorted(BLOCKS)}")
    size = int(np.prod(shape))
    blocks = np.frombuffer(data, BLOCKS[kind], size if kind < 2 else size // BLOCK, at)
    if kind < 2:
        return blocks["x"].astype(np.float32).reshape(shape)
    d = blocks["d"].astype(np.float32)[:, None]
    if kind == 8:
        return (d * blocks["q"].astype(np.float32)).reshape(shape)
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], 1).astype(np.float32)
    return (d * q + blocks["m"].astype(np.float32)[:, None]).reshape(shape)


def convert(path: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of a Llama in `path` to `folder`, which exists."""
    header, tensors = read(path)
    write_weights(header, tensors, folder)
    write_tokenizer(header, folder)


def write_weights(header: dict, tensors: dict[str, np.ndarray], folder: Path) -> None:
    """config.json and model.safetensors in bfloat16, whose rounding is far below that of four bits."""
    of = {key.removeprefix("llama."): value for key, value in header.items() if key.startswith("llama.")}
    heads, kv = of["attention.head_count"], of["attention.head_count_kv"]
    state = {}
    for name, x in tensors.items():
        *block, last, kind = name.split(".")
        if last in ("attn_q", "attn_k"):
            # llama.cpp interleaves the two halves of a head that rotary embeddings turn into each other.
            count = heads if last == "attn_q" else kv
            x = x.reshape(count, -1, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{NAMES[last]}.{kind}"] = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": len(header["tokenizer.ggml.tokens"]),
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": of["attention.layer_norm_rms_epsilon"],
        # Both spellings: the first is of transformers 5, the second of 4.
        "rope_parameters": {"rope_type": "default", "rope_theta": of["rope.freq_base"]},
        "rope_theta": of["rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": header["tokenizer.ggml.bos_token_id"],
        "eos_token_id": header["tokenizer.ggml.eos_token_id"],
        "pad_token_id": header["tokenizer.ggml.padding_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(header: dict, folder: Path) -> None:
    """tokenizer.json of a byte-level BPE, and what transformers wants beside it."""
    of = {key.removeprefix("tokenizer."): x for key, x in header.items() if key.startswith("tokenizer.")}
    tokens, merges = of["ggml.tokens"], [tuple(pair.split(" ")) for pair in of["ggml.merges"]]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)  # "smollm" in the header
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    kinds = zip(tokens, of["ggml.token_type"])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == CONTROL])
    core.save(str(folder / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {f"{role}_token": tokens[of[f"ggml.{key}_token_id"]] for role, key in roles.items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": of["chat_template"], **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
