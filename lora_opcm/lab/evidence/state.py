"""What a method must keep between two adapters, in numbers."""

from collections.abc import Iterable

from ...merging.method import method_of
from .outcomes import Trial

HALF = 2  # bytes of a number in half precision


def state_size(trial: Trial, shapes: Iterable[tuple[int, int]], rank: int = 16) -> tuple[str, float]:
    """In words, and in bytes of half precision for a model of these layers after many adapters.

    A sum is bounded by the layer: it is counted dense. TIES needs four such sums (of the positive and of the negative
    entries, and how many there are); one-sided whitening two, of which one is m × m. For what grows with the number of
    adapters, the bytes are those of each.
    """
    options, shapes = trial.options[0], list(shapes)
    method, cap = method_of(trial.method), trial.cap or options.get("cap")
    thin = sum(m + n for m, n in shapes)
    dense, left, right = (sum(sizes) for sizes in zip(*((m * n, m * m, n * n) for m, n in shapes), strict=True))
    if method.name == "lora_opcm":  # a sum of factors
        return f"{rank} directions", HALF * rank * thin
    if cap:
        return f"{cap} directions", HALF * cap * thin
    if method.keeps == "one sum":
        return "one sum", HALF * dense
    if method.keeps == "three sums":
        sides = {"left": ("two sums", left), "right": ("two sums", right)}
        words, more = sides.get(options.get("sides", ""), ("three sums", left + right))
        return words, HALF * (dense + more)
    if method.keeps == "dense sums":
        count = 4 if "ties" in method.name else 1
        return f"{'four dense sums' if count == 4 else 'one dense sum'}", HALF * count * dense
    return {"all directions": "all directions"}.get(method.keeps, "all adapters"), HALF * rank * thin
