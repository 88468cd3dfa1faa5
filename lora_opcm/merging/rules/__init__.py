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
    magmax,
    magnitude_prune,
    ties,
    trim,
)
from .factors import lora_opcm, regmean, sides
from .frames import Sums, inverse_root, pico, polar, tsv, whitened_sum, whitening
from .interference import actmat, dop, wudi
from .projection import cut, opcm, project, projected_sum
from .spectra import iso_c, iso_cts, subspace_boosting, svc
from .subspaces import chordal_mean, ctm, karcher_mean, quotient_mean
from .sums import cat, mean, svd, task_arithmetic

__all__ = [
    "Sums", "actmat", "canonical", "cat", "chordal_mean", "core_dare_ties", "core_ties", "ctm", "cut", "dare",
    "dare_ties", "dop", "drop", "elect", "inverse_root", "iso_c", "iso_cts", "karcher_mean", "knots_ties", "lora_opcm",
    "magmax", "magnitude_prune", "mean", "opcm", "pico", "polar", "project", "projected_sum", "quotient_mean",
    "regmean", "sides", "subspace_boosting", "svc", "svd", "task_arithmetic", "ties", "trim", "tsv", "whitened_sum",
    "whitening", "wudi",
]  # fmt: skip
