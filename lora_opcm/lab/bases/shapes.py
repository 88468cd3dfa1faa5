"""Shapes of real models without their weights: configs as published, models on the meta device."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
)


def _llama(width: int, hidden: int, layers: int, heads: int, kv: int | None = None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv or heads, vocab_size=32_000,
    )  # fmt: skip


def _bert(width: int, hidden: int, layers: int) -> BertConfig:
    return BertConfig(hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=12)


# Published config.json files, in the numbers that matter to shapes.
CONFIGS: dict[str, Callable] = {
    "MiniLM": lambda: _bert(384, 1536, 6),
    "BERT": lambda: _bert(768, 3072, 12),
    "ViT-L": lambda: CLIPVisionConfig(  # of openai/clip-vit-large-patch14
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
    ),
    "ViT-B/32": lambda: CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
    ),
    "Llama-2-7B": lambda: _llama(4096, 11008, 32, 32),
    "Llama-2-13B": lambda: _llama(5120, 13824, 40, 40),
    "Llama-2-70B": lambda: _llama(8192, 28672, 80, 64, kv=8),
    "Mixtral-8x7B": lambda: MixtralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, vocab_size=32_000,
    ),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    """The model `name` of `CONFIGS` on the meta device: all shapes, no numbers, no memory."""
    config = CONFIGS[name]()
    decoder = config.model_type in ("llama", "mixtral")
    with torch.device("meta"):
        if decoder:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        pooling = {"add_pooling_layer": False} if config.model_type == "bert" else {}
        return AutoModel.from_config(config, dtype=torch.bfloat16, **pooling)


def experts(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Expert weights that transformers keeps as one tensor a layer: name → (experts, outputs, inputs)."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name}


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module → (outputs, inputs) of all that peft's "all-linear" adapts: linear layers but the output head.

    Of a fused expert tensor every expert counts as a module of its own, "….experts.gate_up_proj.3"; gate and
    up projection stay one matrix of twice the outputs, as transformers stores them.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    for name, (count, m, n) in experts(model).items():
        shapes |= {f"{name}.{i}": (m, n) for i in range(count)}
    return shapes


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers in the model, and how many of them one token meets (all, but for a mixture of experts)."""
    total = sum(p.numel() for p in model.parameters())
    fused = sum(a * m * n for a, m, n in experts(model).values())
    share = getattr(model.config, "num_experts_per_tok", 1) / getattr(model.config, "num_local_experts", 1)
    return total, total - round(fused * (1 - share))
