"""What each method does to the updates of one module. Weights are multiplied in before, scales after."""

from .entries import (
    canonical,
    core_dare_ties,
    core_ties,
    dare,
    dare_ties,
    drop,
    elect,
    knots_ties,
    magnitude_prune,
    ties,
    trim,
)
from .factors import lora_opcm, regmean, sides
from .frames import Sums, inverse_root, polar, tsv, whitened_sum, whitening
from .projection import cut, opcm, project, projected_sum
from .spectra import iso_c, iso_cts
from .subspaces import chordal_mean, ctm, karcher_mean, quotient_mean
from .sums import cat, mean, svd, task_arithmetic

__all__ = [
    "Sums", "canonical", "cat", "chordal_mean", "core_dare_ties", "core_ties", "ctm", "cut", "dare", "dare_ties",
    "drop", "elect", "inverse_root", "iso_c", "iso_cts", "karcher_mean", "knots_ties", "lora_opcm",
    "magnitude_prune", "mean", "opcm", "polar", "project", "projected_sum", "quotient_mean", "regmean", "sides",
    "svd", "task_arithmetic", "ties", "trim", "tsv", "whitened_sum", "whitening",
]  # fmt: skip
