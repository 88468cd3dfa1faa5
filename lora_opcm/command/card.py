"""The model card of a merged adapter."""

import json
from collections.abc import Mapping, Sequence

from ..files import Adapter

RECIPE, CARD = "merge_recipe.json", "README.md"  # in the folder of a merged PEFT adapter


def card(adapter: Adapter, inputs: Sequence[str], call: Mapping) -> str:
    """A model card with the metadata the Hugging Face hub reads, for the folder of a merged PEFT adapter."""
    base = f"base_model: {json.dumps(adapter.base_model)}\n" if adapter.base_model else ""
    options = "\n".join(f"- {k}: {v}" for k, v in call.items() if v is not None)
    names = "\n".join(f"- `{name}`" for name in inputs)
    return (
        f"---\n{base}library_name: peft\ntags: [lora, merge, lora-opcm]\n---\n\n# Merged LoRA adapter\n\nOne adapter out of\n\n"
        f"{names}\n\nmerged by `lora-opcm` with\n\n{options}\n\n`{RECIPE}` names the inputs by hash and says what truncation "
        "dropped; `lora-opcm verify` repeats the merge and compares.\n"
    )  # fmt: skip
