"""MiniLM and its adapters, for a page that computes with them: `python -m lora_opcm.site.live FOLDER`.

A matrix is whole numbers of 8 bits and a scale a row, and a file is text, for a browser reads only scripts from a disk:
32 MB for the model. A site is built with it, no repository holds it. `data` is what the figure shows before it is read.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import lora_opcm as lo

from ..files import Adapter
from ..lab.attach import applied
from ..lab.bases import load
from ..lab.bases.encoder import SCALE, Encoder, pad, tokenise
from ..lab.tasks import load_task, tasks
from .figures import TASK, colour

MERGE = {"method": "whitening", "rank": 16}  # of all eight, as long as the rule without data says
OPENS, LAYERS = "reuters-r8", 6
ABOUT = "MiniLM (all-MiniLM-L6-v2, Apache License 2.0), in 8 bits; see data/README.md of the repository"
SENTENCES = {  # one for each task, to begin with
    "ng-comp": "My new graphics card shows only 16 colors. Is there a driver for Windows 3.1?",
    "ng-rec": "The goalie stopped forty shots and they still lost in overtime.",
    "ng-sci": "Does anyone know how strong a cipher with such a short key can be?",
    "ng-politics": "The village lies on the border, and both armies shell it at night.",
    "ng-religion": "I do not see why there should be a creator at all.",
    "reuters-r8": "The company said it would buy the remaining shares of the bank for 40 million dollars.",
    "reuters-rare": "Growers expect a small harvest after the frost, and prices of beans rose in London.",
    "tweets": "Thank you Iowa, what a crowd! We will bring the jobs back.",
}


def adapters() -> dict[str, Adapter]:
    """The adapters that the figure asks: each task's own, and `merged`."""
    own = {name: lo.load_adapter(lo.adapter_path(name)) for name in tasks()}
    return own | {"merged": lo.merge(list(own.values()), **MERGE)}


@torch.inference_mode()
def answers(texts: list[str]) -> dict[str, dict[str, list[list[list[float]]]]]:
    """text → task → probabilities of its labels: by the base model, the task's own adapter and the merged one."""
    base, asked = Encoder(), adapters()
    heads = {name: base.head(load_task(name)) for name in tasks()}
    batch = pad(tokenise(texts, base.tokenizer), base.tokenizer.pad_token_id)

    def said(adapter: Adapter | None) -> Tensor:
        with applied(base.model, adapter):
            return base.embed(base.model, batch)

    plain, merged = said(None), said(asked["merged"])
    found: dict = {text: {} for text in texts}
    for name, head in heads.items():
        shares = torch.stack([(SCALE * z @ head.T).softmax(-1) for z in (plain, said(asked[name]), merged)], 1)
        for text, rows in zip(texts, shares.tolist(), strict=True):
            found[text][name] = [[round(p, 4) for p in row] for row in rows]
    return found


def data() -> dict:
    """What the figure shows before a word is typed, computed in float32 here."""
    found = answers(list(SENTENCES.values()))
    return {
        "tasks": [{"name": name, "labels": load_task(name).labels, "colour": colour(name)} for name in TASK],
        "sentences": [{"text": text, "task": task, "answers": found[text]} for task, text in SENTENCES.items()],
        "opens": list(SENTENCES).index(OPENS), "length": min(len(TASK) ** 0.5, 2.0), "layers": LAYERS, "scale": SCALE,
    }  # fmt: skip


def pack(matrices: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> dict:
    """Matrices in 8 bits with a scale a row, the largest entry of a row being 127; vectors as they are."""
    scales = {name: (x.abs().amax(1) / 127).clamp(min=1e-12) for name, x in matrices.items()}
    whole = [(x / scales[name][:, None]).round().to(torch.int8) for name, x in matrices.items()]
    return {
        "matrices": [[name, *x.shape] for name, x in matrices.items()],
        "scales": _text(torch.cat(list(scales.values())).float()),
        "bytes": _text(torch.cat([x.flatten() for x in whole])),
        "vectors": [[name, x.numel()] for name, x in vectors.items()],
        "numbers": _text(torch.cat([x.flatten() for x in vectors.values()]).float()) if vectors else "",
    }


def _text(x: Tensor) -> str:
    return base64.b64encode(x.contiguous().numpy().tobytes()).decode()


def _factors(adapter: Adapter, **vectors: Tensor) -> dict:
    """Both factors with a direction a row."""
    sides = {}
    for name, update in adapter.items():
        sides |= {f"{name}/left": update.left.mT.float(), f"{name}/right": update.right.float()}
    return pack(sides, vectors)


def packs() -> dict[str, dict]:
    """File name → what it holds: `words` (vocabulary and embeddings), `layer0` …, `merged`, and one for each task."""
    base = load()
    weights = {name: x.float() for name, x in base.model.state_dict().items()}
    found, order = {}, sorted(base.tokenizer.get_vocab().items(), key=lambda entry: entry[1])

    def part(prefix: str) -> dict:
        mine = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        mine = {name: x for name, x in mine.items() if x.ndim in (1, 2) and not name.endswith("_ids")}
        return pack(*({n: x for n, x in mine.items() if x.ndim == k} for k in (2, 1)))

    found["words"] = part("embeddings.") | {"vocabulary": "\n".join(word for word, _ in order)}
    for i in range(LAYERS):
        found[f"layer{i}"] = part(f"encoder.layer.{i}.")
    for name, adapter in adapters().items():
        found[name] = _factors(adapter, **({"head": base.head(load_task(name))} if name != "merged" else {}))
    return found


def main(folder: Annotated[Path, typer.Argument(help="of the scripts, live/NAME.js")]):
    """Write what the page reads when it is asked to compute."""
    there = folder / "live"
    there.mkdir(parents=True, exist_ok=True)
    for name, held in packs().items():
        text = json.dumps(held, ensure_ascii=False, separators=(",", ":"))
        (there / f"{name}.js").write_text(f"// {ABOUT}\nexplore.packs['{name}'] = {text};\n", "utf8")


if __name__ == "__main__":
    typer.run(main)
