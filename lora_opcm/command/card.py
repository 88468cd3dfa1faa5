"""The model card of a merged adapter."""

import json
from collections.abc import Mapping, Sequence

from ..files import Adapter

RECIPE, CARD = "merge_recipe.json", "README.md"  # in the folder of a merged PEFT adapter


def card(adapter: Adapter, inputs: Sequence[str], call: Mapping) -> str:
    """A model card with the metadata the Hugging Face hub reads, for the folder of a merged PEFT adapter."""
    lines = [
        "---",
        *([f"base_model: {json.dumps(adapter.base_model)}"] if adapter.base_model else []),
        "library_name: peft",
        "tags: [lora, merge, lora-opcm]",
        "---",
        "",
        "# Merged LoRA adapter",
        "",
        "One adapter out of",
        "",
        *(f"- `{name}`" for name in inputs),
        "",
        "merged by `lora-opcm` with",
        "",
        *(f"- {option}: {value}" for option, value in call.items() if value is not None),
        f"- factor of the merged update: {adapter.factor:.6g}",
        "",
        f"`{RECIPE}` names the inputs by the hashes of their numbers and says what truncation dropped;",
        "`lora-opcm verify` repeats the merge and compares.",
        "",
    ]
    return "\n".join(lines)
