"""Subspace geometry as identities: two formulas for one number, round trips, invariances, known answers."""

import inspect
import math
import os
import warnings
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_opcm import geometry as gr
from lora_opcm.lowrank import LowRank

PI = math.pi
DISTANCES = ("geodesic", "chordal", "projection", "procrustes", "binet_cauchy", "fubini_study")

shapes = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small spend more time in handing work over than in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def dims(draw, equal=False, max_n=12):
    """(n, k, l, generator) with 1 <= k, l <= n, k + l > n included."""
    n = draw(st.integers(1, max_n))
    k = draw(st.integers(1, n))
    l = k if equal else draw(st.integers(1, n))
    return n, k, l, torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))


def tol(dtype, factor=1.0):
    return factor * (2e-6 if dtype == torch.float32 else 1e-13)


def close(a, b, atol, rtol=0.0):
    torch.testing.assert_close(a.double(), torch.as_tensor(b, dtype=torch.float64), atol=atol, rtol=rtol)


def pair(n, k, l, gen, dtype=torch.float64):
    U = gr.random_frame(n, k, generator=gen, dtype=dtype)
    return U, gr.random_frame(n, l, generator=gen, dtype=dtype)


def same_span(U, V, atol):
    assert gr.principal_angles(U, V).max().item() < atol


def at_angles(theta, dtype=torch.float64):
    """Frames in coordinates, [2k, k], whose principal angles are theta."""
    theta = torch.as_tensor(theta, dtype=torch.float64)
    U = torch.cat([torch.eye(len(theta)), torch.zeros(len(theta), len(theta))]).double()
    V = torch.cat([theta.cos().diag(), theta.sin().diag()])
    return U.to(dtype), V.to(dtype)


def cluster(n, k, count, gen, radius, dtype=torch.float64):
    """A centre and `count` frames within geodesic distance `radius` of it."""
    centre = gr.random_frame(n, k, generator=gen)
    frames = []
    for _ in range(count):
        H = gr.tangent(centre, torch.randn(n, k, generator=gen, dtype=torch.float64))
        frames.append(gr.exp(centre.double(), radius * H / H.norm()).to(dtype))
    return centre, frames


# --- frames ---------------------------------------------------------------------------------------------


@shapes
@given(d=dims())
def test_orthonormalise_gives_a_frame_of_every_leading_span(d, dtype):
    n, k, _, gen = d
    x = torch.randn(n, k, generator=gen, dtype=torch.float64)
    U = gr.orthonormalise(x.to(dtype))
    assert U.dtype == dtype
    close(U.mT @ U, torch.eye(k), tol(dtype))
    # UᵀX is upper triangular with positive diagonal: column j lies in the span of the first j frame columns.
    R = U.double().mT @ x.to(dtype).double()
    close(R.tril(-1), torch.zeros(k, k), tol(dtype, 5))
    assert (R.diagonal() > 0).all()
    close(U @ (U.mT @ x.to(dtype)), x, tol(dtype, 10))


@shapes
@given(d=dims())
def test_orthonormalise_returns_a_frame_unchanged(d, dtype):
    n, k, _, gen = d
    U = gr.random_frame(n, k, generator=gen, dtype=dtype)
    close(gr.orthonormalise(U), U, tol(dtype))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_orthonormalise_refuses_dependent_columns_at_any_scale(scale):
    x = torch.tensor([[1.0, 3.0], [2.0, 6.0], [3.0, 9.0]], dtype=torch.float64)
    x[:, 1] *= scale
    with pytest.raises(ValueError, match="linearly dependent"):
        gr.orthonormalise(x)
    x[0, 1] = 0
    gr.orthonormalise(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_orthonormalise_takes_rounding_of_its_input_for_no_direction(dtype):
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="linearly dependent"):
        gr.orthonormalise(torch.cat([x, x / 3], 1).to(dtype))


@pytest.mark.parametrize("rows, dtype", [(2, torch.float32), (2, torch.float64), (9, torch.float64)])
def test_orthonormalise_draws_the_line_at_ten_times_the_rounding(rows, dtype):
    """Of float64 the QR rounds more than the input was: n times its unit."""
    unit = torch.finfo(dtype).eps * (rows if dtype == torch.float64 else 1)
    x = torch.eye(rows, 2, dtype=dtype)
    x[0, 1] = 1  # so long is the column, of which this much is new
    x[1, 1] = 9.9 * unit
    with pytest.raises(ValueError, match="linearly dependent"):
        gr.orthonormalise(x)
    x[1, 1] = 10.1 * unit
    close(gr.orthonormalise(x), torch.eye(rows, 2), 0)


@pytest.mark.parametrize(
    "inside, outside, dtype",
    [(0.00049, 0.00051, torch.float64), (0.00049, 0.00051, torch.float32), (3 / 128, 4 / 128, torch.bfloat16)],
)
def test_a_frame_is_one_to_a_thousandth_or_eight_roundings(inside, outside, dtype):
    """UᵀU − I of a column (1 + x)e is 2x + x²."""
    U = torch.eye(3, 2, dtype=dtype)
    U[0, 0] = 1 + inside
    close(gr.projector(U), torch.eye(3).double() * torch.tensor([1, 1, 0]), tol(dtype))
    U[0, 0] = 1 + outside
    with pytest.raises(ValueError, match="not orthonormal"):
        gr.projector(U)


def test_random_frame_is_haar():
    gen = torch.Generator().manual_seed(1)
    U = gr.random_frame(5, 2, batch=(40_000,), generator=gen, dtype=torch.float64)
    assert U.shape == (40_000, 5, 2)
    # QR without the sign fix would give E U₁₁ ≈ −0.4.
    close(U.mean(0), torch.zeros(5, 2), 0.01)
    close(gr.projector(U).mean(0), 0.4 * torch.eye(5), 0.01)
    close(U[:, 0, 0].pow(4).mean(), 3 / (5 * 7), 0.003)


def test_random_frame_names_one_subspace_in_every_dtype():
    def draw(dtype):
        return gr.random_frame(9, 3, generator=torch.Generator().manual_seed(7), dtype=dtype)

    same_span(draw(torch.float32), draw(torch.float64), 1e-6)
    assert draw(torch.float32).dtype == torch.float32


@shapes
@given(d=dims())
def test_projector(d, dtype):
    n, k, _, gen = d
    U = gr.random_frame(n, k, generator=gen, dtype=dtype)
    P = gr.projector(U)
    assert P.dtype == dtype
    close(P @ P, P, tol(dtype))
    close(P, P.mT, tol(dtype))
    close(P @ U, U, tol(dtype))
    close(P.trace(), k, tol(dtype, n))


# --- principal angles -----------------------------------------------------------------------------------

TABLE = [0.0, 1e-8, 3e-8, 1e-7, 1e-6, 1e-4, 1e-2, 0.5, PI / 4, PI / 4 + 1e-6, 1.2, PI / 2 - 1e-4, PI / 2]


@pytest.mark.parametrize("angle", TABLE)
def test_one_angle_to_relative_accuracy(angle, dtype):
    U, V = at_angles([angle], dtype)
    close(gr.principal_angles(U, V), [angle], atol=0, rtol=3e-7 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("extra", ["none", "U", "V"])
def test_angle_table_in_coordinates(extra, dtype):
    """All angles at once, and with extra directions on one side, which must not show."""
    theta = torch.tensor(TABLE, dtype=torch.float64)
    U, V = (torch.nn.functional.pad(x, (0, 0, 0, 2)) for x in at_angles(theta, dtype))
    more = torch.eye(len(U), dtype=dtype)[:, -2:]
    U, V = (torch.cat([U, more], -1) if extra == "U" else U, torch.cat([V, more], -1) if extra == "V" else V)
    got = gr.principal_angles(U, V)
    assert got.dtype == dtype and got.shape == theta.shape
    close(got, theta, atol=1e-15, rtol=3e-7 if dtype == torch.float32 else 1e-15)
    close(gr.principal_angles(V, U), got, atol=1e-15, rtol=1e-7)


def test_angle_table_in_general_position(dtype):
    """Rotated by O(n) and mixed by O(k): float32 frames carry rounding of 1e-7, float64 of 1e-16."""
    gen = torch.Generator().manual_seed(0)
    U, V = at_angles(TABLE)
    rotate = gr.random_frame(len(U), len(U), generator=gen, dtype=torch.float64)
    A, B = (gr.random_frame(len(TABLE), len(TABLE), generator=gen, dtype=torch.float64) for _ in "UV")
    got = gr.principal_angles((rotate @ U @ A).to(dtype), (rotate @ V @ B).to(dtype))
    close(got, TABLE, atol=5e-7 if dtype == torch.float32 else 5e-15)


@shapes
@given(d=dims(equal=True, max_n=40))
def test_identical_subspaces_read_zero(d, dtype):
    n, k, _, gen = d
    U = gr.random_frame(n, k, generator=gen, dtype=dtype)
    Q = gr.random_frame(k, k, generator=gen, dtype=dtype)
    assert gr.principal_angles(U, U.clone()).max() < 1e-13
    same_span(U @ Q, U, tol(dtype))  # arccos in float32 would say 6e-4


@shapes
@given(d=dims())
def test_angles_are_symmetric_invariant_and_sorted(d, dtype):
    n, k, l, gen = d
    U, V = pair(n, k, l, gen, dtype)
    theta = gr.principal_angles(U, V)
    assert theta.shape == (min(k, l),)
    assert (theta.diff() >= 0).all() and theta.min() >= 0 and theta.max() <= PI / 2 + 1e-6
    A, B, R = (gr.random_frame(m, m, generator=gen, dtype=dtype) for m in (k, l, n))
    close(gr.principal_angles(V, U), theta, tol(dtype))
    close(gr.principal_angles(U @ A, V), theta, tol(dtype, 5))
    close(gr.principal_angles(U, V @ B), theta, tol(dtype, 5))
    close(gr.principal_angles(R @ U, R @ V), theta, tol(dtype, 5))


@shapes
@given(d=dims())
def test_angles_agree_with_scipy(d):
    from scipy.linalg import subspace_angles

    U, V = pair(*d)
    # scipy 1.17 chooses between sine and cosine by the angle at the other end of the list, so it is not
    # accurate to more than half the digits at either end.
    close(gr.principal_angles(U, V), subspace_angles(U.numpy(), V.numpy())[::-1].copy(), 1e-7)


def test_large_subspaces_must_intersect():
    U, V = pair(7, 5, 6, torch.Generator().manual_seed(0))
    theta = gr.principal_angles(U, V)
    assert theta[:4].max() < 1e-14 and theta[4] > 1e-3


# --- distances ------------------------------------------------------------------------------------------


@shapes
@given(d=dims(equal=True))
def test_two_formulas_for_every_distance(d, dtype):
    n, k, _, gen = d
    U, V = pair(n, k, k, gen, dtype)
    U64, V64 = U.double(), V.double()
    gap = U64 @ U64.mT - V64 @ V64.mT
    det = torch.linalg.det(U64.mT @ V64)
    second = {
        "geodesic": gr.log(U64, V64).norm(),
        "chordal": gap.norm() / 2**0.5,
        "projection": torch.linalg.matrix_norm(gap, 2),
        "procrustes": (U64 - gr.align_frame(V64, U64)).norm(),
        "binet_cauchy": (1 - det**2).clamp(0).sqrt(),
        "fubini_study": det.abs().clamp(max=1).arccos(),
    }
    for kind in DISTANCES:
        got = gr.distance(U, V, kind)
        assert got.dtype == dtype and got.shape == ()
        # The last two second formulas cancel near 0, where they hold half the digits.
        atol = 2e-3 if dtype == torch.float32 else 1e-7
        close(got, second[kind], atol if kind in ("binet_cauchy", "fubini_study") else tol(dtype, 10))


def test_distances_from_known_angles(dtype):
    theta = [0.2, 0.7, 1.1]
    U, V = at_angles(theta, dtype)
    cosines = math.prod(math.cos(t) for t in theta)
    want = {
        "geodesic": math.sqrt(sum(t * t for t in theta)),
        "chordal": math.sqrt(sum(math.sin(t) ** 2 for t in theta)),
        "projection": math.sin(1.1),
        "procrustes": 2 * math.sqrt(sum(math.sin(t / 2) ** 2 for t in theta)),
        "binet_cauchy": math.sqrt(1 - cosines**2),
        "fubini_study": math.acos(cosines),
    }
    for kind in DISTANCES:
        close(gr.distance(U, V, kind), want[kind], tol(dtype))
        close(getattr(gr, f"{kind}_distance")(U, V), want[kind], tol(dtype))


@pytest.mark.parametrize("kind", DISTANCES)
def test_small_distances_do_not_cancel(kind, dtype):
    """Near 0 each distance is ‖θ‖₂ to first order (the 2-norm one: θ_max)."""
    U, V = at_angles([1e-7, 2e-7], dtype)
    want = 2e-7 if kind == "projection" else math.sqrt(5) * 1e-7
    close(gr.distance(U, V, kind), want, atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", DISTANCES)
def test_largest_distances(kind, dtype):
    U, V = at_angles([PI / 2, PI / 2], dtype)
    want = {"geodesic": PI / 2**0.5, "chordal": 2**0.5, "procrustes": 2.0, "fubini_study": PI / 2}
    close(gr.distance(U, V, kind), want.get(kind, 1.0), tol(dtype))


@shapes
@given(d=dims(equal=True))
def test_metric_axioms_and_order(d):
    n, k, _, gen = d
    U, V, W = (gr.random_frame(n, k, generator=gen, dtype=torch.float64) for _ in range(3))
    value = {}
    for kind in DISTANCES:
        value[kind] = uv = gr.distance(U, V, kind)
        close(gr.distance(V, U, kind), uv, 1e-12)
        assert gr.distance(U, U, kind) < 1e-12
        assert uv <= gr.distance(U, W, kind) + gr.distance(W, V, kind) + 1e-12
    order = [value[kind] for kind in ("projection", "binet_cauchy", "chordal", "procrustes", "geodesic")]
    assert (torch.stack(order).diff() >= -1e-12).all()
    assert value["fubini_study"] <= value["geodesic"] + 1e-12


def test_batches_equal_loops(dtype):
    gen = torch.Generator().manual_seed(3)
    U = gr.random_frame(8, 3, batch=(4, 1), generator=gen, dtype=dtype)
    V = gr.random_frame(8, 3, batch=(5,), generator=gen, dtype=dtype)
    distances = [partial(gr.distance, kind=kind) for kind in DISTANCES]
    for f in (gr.principal_angles, gr.phi, gr.projection_kernel, gr.binet_cauchy_kernel, *distances):
        loop = torch.stack([torch.stack([f(u[0], v) for v in V]) for u in U])
        close(f(U, V), loop, tol(dtype))
    for f in (gr.log, gr.procrustes, lambda u, v: gr.align_frame(v, u)):
        loop = torch.stack([torch.stack([f(u[0], v) for v in V]) for u in U])
        close(f(U, V), loop, tol(dtype, 50))


# --- φ --------------------------------------------------------------------------------------------------


@shapes
@given(d=dims())
def test_phi_is_the_mean_squared_cosine(d, dtype):
    n, k, l, gen = d
    U, V = pair(n, k, l, gen, dtype)
    value = gr.phi(U, V)
    assert value.dtype == dtype and value.shape == () and 0 <= value <= 1
    close(value, gr.principal_angles(U, V).double().cos().square().mean(), tol(dtype))
    close(gr.phi(V, U), value, tol(dtype))
    A, B = (gr.random_frame(m, m, generator=gen, dtype=dtype) for m in (k, l))
    close(gr.phi(U @ A, V @ B), value, tol(dtype, 5))
    close(gr.phi(U, U), 1.0, tol(dtype))


@shapes
@given(d=dims(), k=st.integers(1, 12), l=st.integers(1, 12))
def test_phi_takes_leading_columns_and_nested_spans_give_one(d, k, l):
    n, p, q, gen = d
    U, V = pair(n, p, q, gen)
    k, l = min(k, p), min(l, q)
    close(gr.phi(U, V, k, l), gr.phi(U[:, :k], V[:, :l]), 0.0)
    close(gr.phi(U, U, k, p), 1.0, 1e-13)


def updates(dtype, m=14, n=11, r=5):
    gen = torch.Generator().manual_seed(11)
    factors = [torch.randn(*s, generator=gen, dtype=dtype) for s in ((m, r), (r, n), (m, 3), (3, n))]
    return LowRank(*factors[:2]), LowRank(*factors[2:]), gen


@pytest.mark.parametrize("side", ["left", "right"])
def test_phi_of_updates_is_that_of_dense_singular_vectors(side, dtype):
    x, y, _ = updates(dtype)
    frames = []
    for update in (x, y):
        U, _, Vh = torch.linalg.svd(update.left.double() @ update.right.double(), full_matrices=False)
        frames.append(U if side == "left" else Vh.mT)
    for k, l in ((1, 1), (2, 3), (5, 3), (4, 1)):
        value = gr.phi(x, y, k, l, side=side)
        close(value, gr.phi(frames[0][:, :k], frames[1][:, :l]), tol(dtype, 5))
        close(gr.phi(x, frames[1][:, :l].contiguous(), k, side=side), value, tol(dtype, 5))
    close(gr.phi(x, y, side=side), gr.phi(x, y, 5, 3, side=side), 0.0)
    assert gr.phi(x, y, 2, 2).item() != gr.phi(x, y, 2, 2, side="right").item()


def test_phi_does_not_see_the_gauge(dtype):
    x, y, gen = updates(dtype)
    G = torch.randn(5, 5, generator=gen, dtype=torch.float64).to(dtype)
    z = LowRank(x.left @ G, torch.linalg.solve(G.double(), x.right.double()).to(dtype))
    for side in ("left", "right"):
        close(gr.phi(z, y, 2, 3, side=side), gr.phi(x, y, 2, 3, side=side), tol(dtype, 50))


def test_phi_errors():
    x, y, _ = updates(torch.float64)
    U = gr.random_frame(14, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected 1 <= k <= 5, the directions of x, got k=6"):
        gr.phi(x, y, 6, 2)
    with pytest.raises(ValueError, match="expected 1 <= l <= 3, the directions of y, got l=4"):
        gr.phi(x, y, 2, 4)
    with pytest.raises(ValueError, match="got k=0"):
        gr.phi(x, y, 0)
    with pytest.raises(ValueError, match=r"ambient dimensions n differ: shapes \(11, 5\) and \(14, 4\)"):
        gr.phi(x, U, side="right")
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'up'"):
        gr.phi(x, y, side="up")
    with pytest.raises(ValueError, match="y is a zero update"):
        gr.phi(x, LowRank(torch.zeros(14, 2).double(), torch.ones(2, 11).double()))


SIZES = [(6, 1, 1), (6, 1, 4), (6, 2, 3), (6, 5, 3), (9, 6, 7), (12, 4, 4)]


@pytest.mark.parametrize(("n", "k", "l"), SIZES)
def test_null_mean_and_std_against_monte_carlo(n, k, l):
    gen = torch.Generator().manual_seed(n * 100 + k * 10 + l)
    U = gr.random_frame(n, k, generator=gen, dtype=torch.float64)
    V = gr.random_frame(n, l, batch=(30_000,), generator=gen, dtype=torch.float64)
    values = gr.phi(U, V)
    mean, std = gr.phi_null(n, k, l)
    assert mean == pytest.approx(max(k, l) / n, abs=1e-15)
    assert values.mean().item() == pytest.approx(mean, abs=4 * std / 30_000**0.5)
    assert values.std().item() == pytest.approx(std, rel=0.03)
    # The p-value of the upper 5 % point.
    quantile = values.quantile(0.95)
    assert gr.phi_pvalue(quantile, n, k, l).item() == pytest.approx(0.05, rel=0.25)
    if 1 in (k, l, n - k, n - l):
        from scipy.stats import kstest

        assert kstest(gr.phi_pvalue(values, n, k, l).numpy(), "uniform").pvalue > 1e-3


def test_null_is_symmetric_and_degenerate_where_it_must_be():
    assert gr.phi_null(9, 2, 5) == gr.phi_null(9, 5, 2)
    assert gr.phi_null(9, 9, 4) == (1.0, 0.0)
    assert gr.phi_null(1, 1, 1) == (1.0, 0.0)
    assert gr.phi_pvalue(1.0, 9, 9, 4) == 1
    with pytest.raises(ValueError, match="n=4, k=5, l=1"):
        gr.phi_null(4, 5, 1)


@pytest.mark.parametrize("l", [1, 3, 7])
def test_pvalue_is_the_exact_beta_law_for_a_line(l):
    from scipy.stats import beta

    x = torch.linspace(0, 1, 21, dtype=torch.float64)
    for k, other in ((1, l), (l, 1)):
        close(gr.phi_pvalue(x, 8, k, other), beta.sf(x.numpy(), l / 2, (8 - l) / 2), 1e-12)
    assert gr.phi_pvalue(0.9999, 384, 1, 1).item() == pytest.approx(beta.sf(0.9999, 0.5, 191.5), rel=1e-9)


def test_pvalue_is_calibrated_for_adapter_sized_subspaces():
    gen = torch.Generator().manual_seed(5)
    V = gr.random_frame(64, 8, batch=(8_000,), generator=gen, dtype=torch.float64)
    p = gr.phi_pvalue(gr.phi(torch.eye(64, dtype=torch.float64)[:, :8], V), 64, 8, 8)
    for level in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95):
        spread = (level * (1 - level) / 8_000) ** 0.5
        assert (p <= level).double().mean().item() == pytest.approx(level, abs=4 * spread)


def test_pvalue_falls_from_one_to_zero():
    x = torch.linspace(0, 1, 50)
    p = gr.phi_pvalue(x, 10, 7, 6)
    assert p.dtype == torch.float64 and p.shape == x.shape
    assert (p.diff() <= 0).all() and p[-1] == 0
    assert (p[x <= 0.5] == 1).all()  # 7 + 6 − 10 = 3 of 6 angles are zero whatever the subspaces
    assert gr.phi_pvalue(0.21, 384, 8, 8) < 1e-12


# --- tangents and geodesics -----------------------------------------------------------------------------


@shapes
@given(d=dims(equal=True))
def test_tangent_is_the_orthogonal_projection_to_the_horizontal_space(d, dtype):
    n, k, _, gen = d
    U = gr.random_frame(n, k, generator=gen, dtype=dtype)
    Z = torch.randn(n, k, generator=gen, dtype=dtype)
    H = gr.tangent(U, Z)
    assert H.dtype == dtype
    close(U.mT @ H, torch.zeros(k, k), tol(dtype, 5))
    close(gr.tangent(U, H), H, tol(dtype, 5))
    close((H * (Z - H)).sum(), 0.0, tol(dtype, 20))


@shapes
@given(d=dims(equal=True))
def test_exp_of_log_returns_the_subspace(d, dtype):
    n, k, _, gen = d
    U, V = pair(n, k, k, gen, dtype)
    H = gr.log(U, V)
    W = gr.exp(U, H)
    assert H.dtype == W.dtype == dtype
    close(U.mT @ H, torch.zeros(k, k), tol(dtype, 5))
    close(H.norm(), gr.geodesic_distance(U, V), tol(dtype, 5))
    close(W.mT @ W, torch.eye(k), tol(dtype))
    same_span(W, V, tol(dtype, 10))
    # The velocity does not depend on the frame of the target, and turns with that of the base.
    Q = gr.random_frame(k, k, generator=gen, dtype=torch.float64)
    U, V = U.double(), V.double()
    H = gr.log(U, V)
    if k == 1 or gr.principal_angles(U, V).max() < PI / 2 - 1e-3:
        close(gr.log(U, V @ Q), H, 1e-10)
        close(gr.log(gr.orthonormalise(U) @ Q, V), H @ Q, 1e-6)


@shapes
@given(d=dims(equal=True), size=st.sampled_from([1e-9, 1e-6, 1e-3, 0.5, 1.5]))
def test_log_of_exp_returns_the_velocity(d, size):
    n, k, _, gen = d
    U = gr.random_frame(n, k, generator=gen, dtype=torch.float64)
    H = gr.tangent(U, torch.randn(n, k, generator=gen, dtype=torch.float64))
    H = size * H / H.norm().clamp(min=1e-9) if n > k else torch.zeros_like(H)
    close(gr.log(U, gr.exp(U, H)), H, 5e-14)
    close(gr.exp(U, H + U @ torch.ones(k, k).double()), gr.exp(U, H), 1e-13)


@pytest.mark.parametrize(
    "theta",
    [
        [0.0, 0.0],
        [1e-12, 1e-8],
        [1e-8, 1e-8, 1.0],
        [0.7, 0.7, 0.7],
        [1e-9, PI / 2 - 1e-9],
        [PI / 2 - 1e-6, PI / 2 - 2e-8],
    ],
)
def test_log_of_known_angles_is_accurate(theta):
    """In coordinates the velocity is known: θᵢ on row k + i. Tiny, equal and almost right angles together."""
    U, V = at_angles(theta)
    gen = torch.Generator().manual_seed(2)
    want = torch.cat([torch.zeros(len(theta), len(theta)), torch.tensor(theta, dtype=torch.float64).diag()])
    Q = gr.random_frame(len(theta), len(theta), generator=gen, dtype=torch.float64)
    # Near π/2 the direction of shortest travel is itself ill-conditioned, by 1/cos θ.
    atol = 5e-16 / min(1e-1, math.cos(max(theta)))
    close(gr.log(U, V), want, 3e-15)
    close(gr.log(U, V @ Q), want, atol)
    same_span(gr.exp(U, gr.log(U, V @ Q)), V, 5e-15)


def test_log_on_the_cut_locus_returns_one_shortest_geodesic(dtype):
    U, V = at_angles([0.3, PI / 2, PI / 2], dtype)
    H = gr.log(U, V)
    close(H.norm(), math.hypot(0.3, PI / 2, PI / 2), tol(dtype, 2))
    same_span(gr.exp(U, H), V, tol(dtype))


@shapes
@given(d=dims(equal=True))
def test_geodesic_has_its_endpoints_and_constant_speed(d, dtype):
    n, k, _, gen = d
    U, V = pair(n, k, k, gen, dtype)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    path = gr.geodesic(U, V, t)
    assert path.shape == (6, n, k) and path.dtype == dtype
    close(path[0], U, tol(dtype))
    same_span(path[-1], V, tol(dtype, 10))
    length = gr.geodesic_distance(U, V)
    close(gr.geodesic_distance(U, path), length * t, tol(dtype, 10))
    close(gr.geodesic_distance(path[1:], path[:-1]), length.double().expand(5) / 5, tol(dtype, 10))
    close(gr.geodesic(U, V, 0.4), path[2], tol(dtype, 5))


# --- alignment ------------------------------------------------------------------------------------------


@shapes
@given(d=dims())
def test_procrustes_is_the_best_partial_isometry(d, dtype):
    n, k, l, gen = d
    U, V = pair(n, k, l, gen, dtype)
    Q = gr.procrustes(U, V)
    assert Q.shape == (l, k) and Q.dtype == dtype
    close(Q.mT @ Q if l >= k else Q @ Q.mT, torch.eye(min(k, l)), tol(dtype))
    best = (U - V @ Q).norm()
    others = gr.random_frame(max(k, l), min(k, l), batch=(20,), generator=gen, dtype=dtype)
    others = others if l >= k else others.mT
    assert (best <= (U - V @ others).norm(dim=(-2, -1)) + tol(dtype)).all()
    if k == l:
        close(best, gr.procrustes_distance(U, V), tol(dtype, 5))


@shapes
@given(d=dims(equal=True))
def test_align_undoes_a_rotation_or_reflection(d, dtype):
    n, k, _, gen = d
    U = gr.random_frame(n, k, generator=gen, dtype=dtype)
    Q = gr.random_frame(k, k, generator=gen, dtype=dtype)
    close(gr.align_frame(U @ Q, to=U), U, tol(dtype, 5))
    close(gr.procrustes(U, U @ Q), Q.mT, tol(dtype, 5))


def test_geodesic_arrives_aligned():
    U, V = pair(9, 3, 3, torch.Generator().manual_seed(4))
    close(gr.geodesic(U, V, 1.0), gr.align_frame(V, to=U), 1e-13)


# --- means ----------------------------------------------------------------------------------------------


def test_chordal_mean_is_the_leading_eigenspace_and_beats_candidates(dtype):
    gen = torch.Generator().manual_seed(6)
    frames = [gr.random_frame(12, 3, generator=gen, dtype=dtype) for _ in range(5)]
    weights = [0.5, 1.0, 2.0, 0.0, 1.5]

    def objective(U):
        return sum(w * gr.phi(U, V.double()) for w, V in zip(weights, frames, strict=True))

    mean = gr.chordal_mean(frames, weights)
    assert mean.dtype == dtype and mean.shape == (12, 3)
    close(mean.mT @ mean, torch.eye(3), tol(dtype))
    S = sum(w * gr.projector(V.double()) for w, V in zip(weights, frames, strict=True))
    same_span(mean, torch.linalg.eigh(S).eigenvectors[:, -3:].to(dtype), tol(dtype, 10))
    best = objective(mean.double())
    close(best, torch.linalg.eigvalsh(S)[-3:].sum() / 3, tol(dtype))
    assert (objective(gr.random_frame(12, 3, batch=(200,), generator=gen, dtype=torch.float64)) < best).all()
    for radius in (1e-2, 1e-1):
        for U in cluster_around(mean, 20, radius, gen):
            assert objective(U) < best
    same_span(gr.chordal_mean(frames, [7 * w for w in weights]), mean, tol(dtype, 5))
    assert gr.principal_angles(gr.chordal_mean(frames), mean).max() > 0.05


def cluster_around(centre, count, radius, gen):
    centre = gr.orthonormalise(centre.double())
    for _ in range(count):
        H = gr.tangent(centre, torch.randn(centre.shape, generator=gen, dtype=torch.float64))
        yield gr.exp(centre, radius * H / H.norm())


def test_chordal_mean_of_mixed_dimensions_and_small_cases(dtype):
    gen = torch.Generator().manual_seed(8)
    frames = [gr.random_frame(10, k, generator=gen, dtype=dtype) for k in (2, 4, 3)]
    S = sum(gr.projector(V.double()) for V in frames)
    for k in (1, 3, 5):
        same_span(gr.chordal_mean(frames, k=k), torch.linalg.eigh(S).eigenvectors[:, -k:].to(dtype), tol(dtype, 20))
    same_span(gr.chordal_mean(frames[:1]), frames[0], tol(dtype))
    same_span(gr.chordal_mean(frames, [0, 1, 0], k=4), frames[1], tol(dtype))
    stack = torch.stack([frames[0]] * 3)
    same_span(gr.chordal_mean(stack), frames[0], tol(dtype))


def test_mean_errors():
    gen = torch.Generator().manual_seed(0)
    U, V, W = (gr.random_frame(6, k, generator=gen, dtype=torch.float64) for k in (2, 2, 3))
    for mean in (gr.chordal_mean, gr.karcher_mean, gr.ascend_phi):
        with pytest.raises(ValueError, match=r"weights >= 0, not all zero, got \[1.0, -0.5\]"):
            mean([U, V], [1, -0.5])
        with pytest.raises(ValueError, match="expected 2 finite weights"):
            mean([U, V], [1])
        with pytest.raises(ValueError, match="not all zero"):
            mean([U, V], [0, 0])
        with pytest.raises(ValueError, match="finite weights"):
            mean([U, V], [1, float("nan")])
        with pytest.raises(ValueError, match=r"one shape .* \[\(6, 2\), \(6, 3\)\]"):
            mean([U, W])
        with pytest.raises(ValueError, match=r"with one n, got shapes \[\(6, 2\), \(5, 2\)\]"):
            mean([U, gr.random_frame(5, 2)])
        with pytest.raises(ValueError, match="one or more frames"):
            mean([])
    with pytest.raises(ValueError, match="k=5, but the frames with positive weight span 4 directions"):
        gr.chordal_mean([U, V], k=5)
    for k, weights, span in ((3, [1, 0], 2), (0, [1, 1], 4), (-1, [1, 1], 4)):
        with pytest.raises(ValueError, match=f"k={k}, but the frames with positive weight span {span} directions"):
            gr.chordal_mean([U, V], weights, k=k)
    for dtype in (torch.float32, torch.float64):
        same = (U @ gr.random_frame(2, 2, generator=gen, dtype=torch.float64)).to(dtype)
        with pytest.raises(ValueError, match="k=3, but the frames with positive weight span 2 directions"):
            gr.chordal_mean([U.to(dtype), same], k=3)
    with pytest.raises(ValueError, match=r"start of shape \(6, 2\), got \(6, 3\)"):
        gr.ascend_phi([U, V], start=W)


@shapes
@given(d=dims(equal=True, max_n=9), count=st.integers(1, 4))
def test_ascent_lands_on_the_chordal_mean(d, count):
    n, k, _, gen = d
    _, frames = cluster(n, k, count, gen, radius=0.5) if n > k else (None, [gr.random_frame(n, n).double()])
    weights = (torch.rand(len(frames), generator=gen) + 0.1).tolist()
    mean = gr.chordal_mean(frames, weights)
    U, history = gr.ascend_phi(frames, weights, steps=150, generator=gen)
    assert history.shape == (151,)
    assert (history.diff() > -1e-12).all()
    same_span(U, mean, 1e-6)
    for frame, value in ((U, history[-1]), (mean, history[-1])):
        phis = sum(w * gr.phi(frame, V) for w, V in zip(weights, frames, strict=True))
        close(phis, value, 1e-10)


def test_ascent_with_mixed_dimensions_lands_on_the_reweighted_mean(dtype):
    gen = torch.Generator().manual_seed(9)
    frames = [gr.random_frame(9, k, generator=gen, dtype=dtype) for k in (1, 2, 4)]
    weights, k = [1.0, 0.6, 0.4], 2
    start = gr.random_frame(9, 2, generator=gen, dtype=dtype)
    U, history = gr.ascend_phi(frames, weights, k, steps=600, start=start)
    assert U.dtype == history.dtype == dtype
    close(history[0], sum(w * gr.phi(start, V) for w, V in zip(weights, frames, strict=True)), tol(dtype))
    scaled = [w / min(k, V.shape[1]) for w, V in zip(weights, frames, strict=True)]
    same_span(U, gr.chordal_mean(frames, scaled, k), tol(dtype) if dtype == torch.float32 else 1e-8)
    assert gr.principal_angles(U, gr.chordal_mean(frames, weights, k)).max() > 0.01


@shapes
@given(d=dims(equal=True, max_n=9), count=st.integers(1, 5))
def test_karcher_mean_has_zero_gradient_and_the_least_spread(d, count):
    n, k, _, gen = d
    _, frames = cluster(n, k, count, gen, radius=0.7) if n > k else (None, [gr.random_frame(n, n).double()])
    w = torch.rand(len(frames), generator=gen, dtype=torch.float64) + 0.1
    mean = gr.karcher_mean(frames, w.tolist())
    logs = torch.stack([gr.log(mean, V) for V in frames])
    assert (w[:, None, None] * logs).sum(0).norm() / w.sum() < 2e-12

    def spread(U):
        return sum(x * gr.geodesic_distance(U, V) ** 2 for x, V in zip(w, frames, strict=True))

    if n > k:
        for U in cluster_around(mean, 5, 1e-2, gen):
            assert spread(U) > spread(mean)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_karcher_mean_of_two_lies_on_their_geodesic(share, dtype):
    _, (U, V) = cluster(9, 3, 2, torch.Generator().manual_seed(12), 0.7, dtype)
    mean = gr.karcher_mean([U, V], [1 - share, share])
    assert mean.dtype == dtype
    same_span(mean, gr.geodesic(U, V, share), tol(dtype, 10))
    # The chordal mean of two agrees with it at equal weights only.
    gap = gr.principal_angles(gr.chordal_mean([U, V], [1 - share, share]), mean).max()
    assert gap < tol(dtype, 10) if share == 0.5 else gap > 1e-3


def test_karcher_mean_of_lines_in_the_plane_is_the_mean_angle():
    angle = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    frames = torch.stack([angle.cos(), angle.sin()], -1)[..., None]
    mean = gr.karcher_mean(frames, [1, 2, 3])
    want = torch.tensor((0.1 + 0.8 + 2.7) / 6, dtype=torch.float64)
    same_span(mean, torch.stack([want.cos(), want.sin()])[:, None], 1e-13)


def test_iterations_end_where_they_say():
    """Unless told: a gradient of 1e-12 in 1000 steps; 500 steps of the largest size that never falls."""
    _, frames = cluster(9, 2, 4, torch.Generator().manual_seed(2), 0.4)
    assert torch.equal(gr.karcher_mean(frames), gr.karcher_mean(frames, [1.0] * 4, 1e-12, 1000))
    said = {n: p.default for n, p in inspect.signature(gr.karcher_mean).parameters.items()}
    assert (said["tol"], said["max_iter"]) == (1e-12, 1000)
    start = gr.random_frame(9, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    frame, history = gr.ascend_phi(frames, start=start)
    told, rows = gr.ascend_phi(frames, [0.25] * 4, k=2, steps=500, step_size=1.0, start=start)
    assert len(history) == 501 and torch.equal(history, rows) and torch.equal(frame, told)


@pytest.mark.parametrize("times", [1e-6, 9.0, 1e6])
def test_steps_of_the_ascent_do_not_see_the_size_of_the_weights(times):
    _, frames = cluster(9, 2, 3, torch.Generator().manual_seed(2), 0.4)
    start = gr.random_frame(9, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, rows = gr.ascend_phi(frames, [0.2, 0.3, 0.5], steps=2, start=start)
    other, more = gr.ascend_phi(frames, [0.2 * times, 0.3 * times, 0.5 * times], steps=2, start=start)
    close(other, one, 1e-12)
    close(more / times, rows, 1e-12)


def test_karcher_mean_warns_when_it_stops_early():
    _, frames = cluster(8, 2, 3, torch.Generator().manual_seed(1), 0.7)
    with pytest.warns(UserWarning, match="karcher_mean: gradient .* after 1 steps"):
        gr.karcher_mean(frames, [3, 1, 1], max_iter=1)


def test_karcher_mean_with_more_starts_is_never_higher_and_far_frames_warn():
    gen = torch.Generator().manual_seed(10)
    frames = [gr.random_frame(40, 3, generator=gen, dtype=torch.float64) for _ in range(5)]
    costs = []
    for starts in (1, 3, 6):
        with pytest.warns(UserWarning, match="karcher_mean: frames lie further than π/4"):
            mean = gr.karcher_mean(frames, tol=1e-6, starts=starts)
        costs.append(float(sum(gr.geodesic_distance(mean, V) ** 2 for V in frames)))
    assert costs[0] > costs[1] + 0.1 and costs[1] >= costs[2] - 1e-9
    for starts in (0, 7):
        with pytest.raises(ValueError, match=f"1 <= starts <= 6, .* got {starts}"):
            gr.karcher_mean(frames, starts=starts)
    near = cluster(12, 3, 4, gen, 0.7)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_span(gr.karcher_mean(near), gr.karcher_mean(near, starts=5), 1e-10)


# --- kernels --------------------------------------------------------------------------------------------


@shapes
@given(d=dims())
def test_kernels_from_angles_and_projectors(d, dtype):
    n, k, l, gen = d
    U, V = pair(n, k, l, gen, dtype)
    value = gr.projection_kernel(U, V)
    assert value.dtype == dtype
    close(value, (gr.projector(U.double()) * gr.projector(V.double())).sum(), tol(dtype, n))
    close(value, min(k, l) * gr.phi(U, V).double(), tol(dtype, n))
    V = gr.random_frame(n, k, generator=gen, dtype=dtype)
    product = gr.principal_angles(U, V).double().cos().square().prod()
    close(gr.binet_cauchy_kernel(U, V), product, tol(dtype))
    close(gr.binet_cauchy_kernel(U, U), 1.0, tol(dtype, 5))


@pytest.mark.parametrize("kernel", [gr.projection_kernel, gr.binet_cauchy_kernel])
def test_gram_is_symmetric_and_positive_semidefinite(kernel, dtype):
    gen = torch.Generator().manual_seed(13)
    frames = gr.random_frame(4, 2, batch=(30,), generator=gen, dtype=dtype)
    K = gr.gram(frames, kernel)
    assert K.dtype == dtype and K.shape == (30, 30)
    close(K, K.mT, 0.0)
    close(K, kernel(frames[:, None], frames[None]), tol(dtype))
    spectrum = torch.linalg.eigvalsh(K.double())
    assert spectrum[0] > -tol(dtype, 5)
    # The features are symmetric 4 × 4 matrices (10 dimensions), and squares of Plücker vectors: 21 minus
    # the one Plücker relation.
    assert int((spectrum > 1e-5).sum()) == (10 if kernel is gr.projection_kernel else 20)


def test_gram_of_one_frame_is_its_dimension():
    close(gr.gram([torch.eye(5, 3)]), [[3.0]], 0)
    close(gr.gram([torch.eye(5, 3)], gr.binet_cauchy_kernel), [[1.0]], 0)


def test_projection_gram_of_mixed_dimensions():
    frames = [gr.random_frame(7, k, generator=torch.Generator().manual_seed(k)) for k in (1, 2, 5)]
    K = gr.gram(frames)
    close(K.diagonal(), [1.0, 2.0, 5.0], 1e-6)
    assert torch.linalg.eigvalsh(K.double())[0] > 0
    with pytest.raises(ValueError, match=r"subspace dimensions k differ: shapes \(7, 2\) and \(7, 1\)"):
        gr.gram(frames, gr.binet_cauchy_kernel)


# --- geomstats ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grassmannian():
    os.environ.setdefault("GEOMSTATS_BACKEND", "numpy")
    return pytest.importorskip("geomstats.geometry.grassmannian").Grassmannian


@pytest.mark.parametrize(("n", "k"), [(3, 1), (5, 2), (6, 4)])
def test_agreement_with_geomstats(n, k, grassmannian):
    """geomstats takes points as projectors P and vectors as Ṗ = UHᵀ + HUᵀ, of √2 times our length."""
    space = grassmannian(n, k)
    U, frames = cluster(n, k, 2, torch.Generator().manual_seed(n), 0.6)
    U = gr.orthonormalise(U.double())
    P = gr.projector(U)
    for V in frames:
        H, R = gr.log(U, V), gr.projector(V)
        dot = U @ H.mT + H @ U.mT
        close(torch.as_tensor(space.metric.log(R.numpy(), P.numpy())), dot, 1e-10)
        close(torch.as_tensor(space.metric.exp(dot.numpy(), P.numpy())), R, 1e-10)
        close(torch.as_tensor(space.metric.dist(P.numpy(), R.numpy())), 2**0.5 * H.norm(), 1e-10)
        close(2**0.5 * gr.geodesic_distance(U, V), 2**0.5 * H.norm(), 1e-12)
        half = gr.projector(gr.geodesic(U, V, 0.5))
        path = space.metric.geodesic(initial_point=P.numpy(), end_point=R.numpy())
        close(torch.as_tensor(path(0.5)).reshape(n, n), half, 1e-10)


# --- dtypes and errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_frames_work_and_keep_their_dtype(half):
    U, V = pair(40, 4, 4, torch.Generator().manual_seed(0))
    lower = U.to(half), V.to(half)
    for f in (gr.principal_angles, gr.phi, gr.log, gr.procrustes, gr.projection_kernel, gr.distance):
        assert f(*lower).dtype == half
        close(f(*lower), f(U, V), 0.03)
    assert gr.principal_angles(lower[0], V).dtype == torch.float64
    assert gr.chordal_mean(lower).dtype == half


def test_a_float32_frame_stays_a_frame_in_float64():
    U, V = pair(300, 16, 16, torch.Generator().manual_seed(0), torch.float32)
    close(gr.principal_angles(U.double(), V.double()), gr.principal_angles(U, V), 2e-7)
    assert gr.principal_angles(U.double(), U).max() < 1e-12


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, r"columns, shape \[..., n, k\] with 1 <= k <= n, got \(3, 5\)"),
        (torch.ones(5), ValueError, r"got \(5,\)"),
        (torch.ones(5, 0), ValueError, r"got \(5, 0\)"),
        (2 * torch.eye(5)[:, :2], ValueError, r"not orthonormal, .* = 3 for shape \(5, 2\); call orthonorm"),
        (torch.full((5, 2), float("nan")), ValueError, "= nan"),
        (torch.eye(5, dtype=torch.int64)[:, :2], TypeError, "floating-point tensor, got torch.int64"),
        (torch.eye(5, dtype=torch.complex64)[:, :2], TypeError, "got torch.complex64"),
        ([[1.0], [0.0]], TypeError, "got list"),
    ],
)
def test_what_is_not_a_frame_is_refused(bad, error, message):
    good = torch.eye(5)[:, :2]
    for f in (gr.principal_angles, gr.phi, gr.log, gr.procrustes, gr.projection_kernel, gr.distance):
        with pytest.raises(error, match=message):
            f(good, bad)
        with pytest.raises(error, match=message):
            f(bad, good)


def test_shape_and_name_errors():
    U, V, W = torch.eye(5)[:, :2], torch.eye(5)[:, :3], torch.eye(6)[:, :2]
    for f in (gr.principal_angles, gr.distance, gr.phi, gr.log, gr.procrustes, gr.binet_cauchy_kernel):
        with pytest.raises(ValueError, match=r"ambient dimensions n differ: shapes \(5, 2\) and \(6, 2\)"):
            f(U, W)
    for f in (gr.log, gr.binet_cauchy_kernel, lambda a, b: gr.geodesic(a, b, 0.5)):
        with pytest.raises(ValueError, match=r"subspace dimensions k differ: shapes \(5, 2\) and \(5, 3\)"):
            f(U, V)
    with pytest.raises(ValueError, match="unknown distance 'cosine'; expected one of geodesic, chordal"):
        gr.distance(U, V, "cosine")
