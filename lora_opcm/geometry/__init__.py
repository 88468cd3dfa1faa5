"""Subspaces: frames, principal angles, φ and its null, geodesics, means.

Sources, by the names the docstrings use:
- Björck, Golub, "Numerical methods for computing angles between linear subspaces", Math. Comp. 1973
- EAS: Edelman, Arias, Smith, "The geometry of algorithms with orthogonality constraints", SIMAX 1998
- Bendokat, Zimmermann, Absil, "A Grassmann manifold handbook", 2020 (arXiv 2011.13699)
- Wedin, "Perturbation bounds in connection with singular value decomposition", BIT 1972
- Ye, Lim, "Schubert varieties and distances between subspaces of different dimensions", SIMAX 2016
"""

from .angles import (
    binet_cauchy_distance,
    binet_cauchy_kernel,
    chordal_distance,
    distance,
    fubini_study_distance,
    geodesic_distance,
    gram,
    principal_angles,
    procrustes_distance,
    projection_distance,
    projection_kernel,
)
from .frames import align_frame, orthonormalise, procrustes, projector, random_frame
from .geodesics import exp, geodesic, log, tangent
from .means import ascend_phi, chordal_mean, karcher_mean
from .overlap import PhiNull, gap, phi, phi_null, phi_pvalue, pooled, similarity

__all__ = [
    "PhiNull", "align_frame", "ascend_phi", "binet_cauchy_distance", "binet_cauchy_kernel", "chordal_distance",
    "chordal_mean", "distance", "exp", "fubini_study_distance", "gap", "geodesic", "geodesic_distance", "gram",
    "karcher_mean", "log", "orthonormalise", "phi", "phi_null", "phi_pvalue", "pooled", "principal_angles",
    "procrustes", "procrustes_distance", "projection_distance", "projection_kernel", "projector", "random_frame",
    "similarity", "tangent",
]  # fmt: skip
