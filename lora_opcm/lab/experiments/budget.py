"""What training and evaluating adapters costs, estimated from parameter counts: operations, hours, bytes.

A matrix of N numbers costs a token 2N operations forward, 2N backward to the activations and 2N backward to
its own numbers. A LoRA leaves the base frozen, so the last 2N fall away: 4N instead of 6N, and the adapter's
own 6N_LoRA on top. Recomputing activations to save memory adds another forward pass, 2N. Attention scores,
4Lsd a token for L layers of width d and s tokens, are left out: below 5 % for Llama-2-7B at 1,024 tokens.
"""

from ..bases.shapes import PreTrainedModel, linear_shapes, parameters

FLOAT32, ADAM = 4, 2  # bytes of a number; moments an optimiser keeps of each
BITS = {"bfloat16": 16.0, "8 bit": 8.0, "4 bit": 4.5}  # 4 bit: a float32 scale for every 64 numbers on top


def adapter_numbers(model: PreTrainedModel, rank: int = 16) -> int:
    """Numbers of a LoRA of `rank` on all linear layers."""
    return sum(rank * (m + n) for m, n in linear_shapes(model).values())


def training_flops(model: PreTrainedModel, tokens: float, rank: int | None = 16, recompute: bool = True) -> float:
    """Operations to train on `tokens`: a LoRA of `rank`, or with None everything."""
    active = parameters(model)[1]
    own = 6 * adapter_numbers(model, rank) if rank else 2 * active
    return tokens * (4 * active + own + (2 * active if recompute else 0))


def evaluation_flops(model: PreTrainedModel, tokens: float) -> float:
    """Operations of a forward pass over `tokens`."""
    return tokens * 2 * parameters(model)[1]


def gpu_hours(flops: float, peak: float = 312e12, used: float = 0.35) -> float:
    """Hours on a device of `peak` operations a second, a share `used` of which is reached.

    The default is the peak of an A100 in bfloat16.
    """
    return flops / (peak * used) / 3600


def base_bytes(model: PreTrainedModel, dtype: str = "bfloat16") -> float:
    """Memory of the frozen base: linear layers in one of `BITS`, embeddings, norms and head in bfloat16."""
    linear = sum(m * n for m, n in linear_shapes(model).values())
    return (linear * BITS[dtype] + (parameters(model)[0] - linear) * 16) / 8


def adapter_training_bytes(model: PreTrainedModel, rank: int = 16) -> int:
    """Memory of the adapter in training: its numbers, their gradients and Adam's moments, in float32."""
    return adapter_numbers(model, rank) * FLOAT32 * (2 + ADAM)
