"""The merge rules on dense float64 matrices, written from the papers and definitions and not from the package.

Nothing here may call the package. Where there is another road to the same numbers it is taken: inverse roots of
UUᵀ for polar factors, tangents for Karcher means, projectors for capped sums, positive against negative mass for
elections.
"""

import torch

# -- small dense helpers -------------------------------------------------------------------------------------


def svd(x, k=None, size=None):
    """U, σ and V (not transposed) of the nonzero directions, the k leading ones if given.

    `size` says beside what they are nonzero, where that is not the largest.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    nonzero = int((s > 1e-6 * (s[0] if size is None else size)).sum())
    k = nonzero if k is None else min(k, nonzero)
    return u[:, :k], s[:k], vh[:k].mT


def cut(x, rank=None, energy=None):
    """The nearest matrix of rank `rank`, or of the least rank that holds a share `energy` of the squared norm."""
    u, s, v = svd(x)
    if energy is not None:
        rank = next(k for k in range(1, len(s) + 1) if s[:k].norm() ** 2 >= energy * s.norm() ** 2)
    return u[:, :rank] @ s[:rank].diag() @ v[:, :rank].mT


def inverse_root(gram):
    values, vectors = torch.linalg.eigh(gram)
    powers = torch.where(values > 1e-9 * values[-1], values.clamp_min(1e-300) ** -0.5, 0)
    return vectors @ powers.diag() @ vectors.mT


def polar(x):
    return inverse_root(x @ x.mT) @ x


def span(frame):
    return frame @ frame.mT


def top(x, density):
    """All but the round(density · size) largest entries cleared."""
    keep = x.abs().flatten().topk(max(1, round(density * x.numel()))).indices
    return torch.zeros(x.numel(), dtype=x.dtype).index_copy(0, keep, x.flatten()[keep]).view_as(x)


def elect(parts):
    """Per entry the side of more mass, and the mean of the values on that side."""
    plus, minus = ([(sign * p).clamp_min(0) for p in parts] for sign in (1, -1))
    up, down = sum(plus), sum(minus)
    mean = lambda side: sum(side) / sum((p > 0).double() for p in side).clamp_min(1)  # noqa: E731
    return torch.where(up > down, mean(plus), torch.where(down > up, -mean(minus), 0))


def coordinates(ds):
    """Bases of all outputs and all inputs, by energy, and each ΔW in them."""
    u, v = svd(torch.cat(ds, 1))[0], svd(torch.cat(ds, 0))[2]
    return u, [u.mT @ d @ v for d in ds], v


AUTO = {
    "ties", "dare_ties", "magmax", "core_ties", "core_dare_ties", "knots_ties", "tsv", "whitening", "whitened_sum",
    "pico", "wudi", "actmat", "dop", "iso_c", "iso_cts", "subspace_boosting", "svc", "ctm",
}  # fmt: skip


def auto(merged, found):
    """What was merged, and cut, at √T mean norms of the T updates that are not zero, at most 2."""
    size = lambda xs: float(sum(x.square().sum() for x in xs)) ** 0.5  # noqa: E731
    parts = [size(ds) for ds in zip(*found.values(), strict=True)]
    parts = [p for p in parts if p > 0]
    wanted = (sum(parts) / len(parts)) * (2 if len(parts) >= 4 else len(parts) ** 0.5)
    return {n: x * (wanted / size(merged.values())) for n, x in merged.items()}


# -- the rules, one module at a time -------------------------------------------------------------------------


def mean(ds):
    return sum(ds) / len(ds)


def cat(ds, scale=1.0):
    return scale * sum(ds)


def largest_rank(ds, scale=1.0):
    return scale * sum(ds)


def ties(ds, density=0.2, scale=1.0):
    return scale * elect([top(d, density) for d in ds])


def magnitude_prune(ds, density=0.5, scale=1.0):
    return scale * sum(top(d, density) for d in ds)


def magmax(ds, scale=1.0):
    stack = torch.stack(ds)
    return scale * stack.gather(0, stack.abs().argmax(0, keepdim=True))[0]


def knots_ties(ds, density=0.5, scale=1.0):
    """One output basis UΣ for all; TIES on the Vₜ, n × k, that belong to it."""
    u, s, v = svd(torch.cat(ds, 1))
    return scale * u @ s.diag() @ elect([top(x, density) for x in v.split(ds[0].shape[1])]).mT


def tsv(ds, directions=None, scale=1.0):
    parts = [svd(d, directions) for d in ds]
    u, v = (torch.cat([p[i] for p in parts], 1) for i in (0, 2))
    return scale * polar(u) @ torch.cat([p[1] for p in parts]).diag() @ polar(v).mT


def whitening(ds, scale=1.0):
    u, s, v = svd(ds[0])
    for d in ds[1:]:
        a, b, c = svd(d)
        kept = polar(torch.cat([u, a], 1)) @ torch.cat([s, b]).diag() @ polar(torch.cat([v, c], 1)).mT
        u, s, v = svd(kept)  # the state is the merged matrix
    return scale * u @ s.diag() @ v.mT


def iso_c(ds, scale=1.0, rank=None):
    u, s, v = svd(sum(ds), rank)
    return scale * s.mean() * u @ v.mT


def iso_cts(ds, common=0.8, scale=1.0, rank=None):
    """The share `common` of the directions from the sum, the rest in equal numbers from what it leaves of each task."""
    total = len(svd(sum(ds), rank)[1])
    each = min(round((1 - common) * total / len(ds)), total // len(ds))
    parts = [svd(sum(ds), total - each * len(ds))]
    outside = torch.eye(len(ds[0]), dtype=torch.float64) - span(parts[0][0])
    parts += [svd(outside @ d, each, size=d.norm()) for d in ds]
    u, v = (torch.cat([p[i] for p in parts], 1) for i in (0, 2))
    return scale * torch.cat([p[1] for p in parts]).mean() * polar(u) @ polar(v).mT


def subspace_boosting(ds, beta=0.5, scale=1.0, rank=None, energy=None):
    u, s, v = svd(cut(sum(ds), rank, energy))
    reached = [k for k in range(len(s)) if s[: k + 1].sum() >= beta * s.sum() - 1e-9 * s[0]]
    return scale * u @ torch.stack([max(x, s[reached[0]]) for x in s]).diag() @ v.mT


def svc(ds, alpha=1.0, scale=1.0):
    merged = sum(ds)
    found = torch.zeros_like(merged)
    for u in svd(merged)[0].mT:
        counts = []
        for d in ds:
            response = u @ d
            there = response.norm() > 1e-6 * d.norm()
            counts.append(max(alpha, float(u @ merged @ response / response.norm() ** 2)) if there else alpha)
        found += torch.outer(u, u @ merged) / (sum(counts) / len(counts))
    return scale * found


def pico(ds, scale=1.0):
    """Every update calibrated apart, I − U diag(1 − a) Uᵀ, then their mean as large as they are."""
    u, s, _ = svd(torch.cat(ds, 1))
    there = [d for d in ds if d.any()]
    taken = (1 - 1 / (1 + (len(there) - 1) * s**2 / (s**2).sum())).diag()
    found = sum(d - u @ taken @ u.mT @ d for d in there) / len(there)
    return scale * sum(d.norm() for d in there) / len(there) * found / found.norm()


def least_squares(blocks, outputs, near, ridge):
    """min ‖blocks Wᵀ − outputs‖² + λ‖W − near‖² as one system, λ the share `ridge` of ‖blocks‖₂²."""
    root = (ridge * torch.linalg.matrix_norm(blocks, 2) ** 2) ** 0.5
    system = torch.cat([blocks, root * torch.eye(blocks.shape[1], dtype=torch.float64)])
    return (torch.linalg.pinv(system, rtol=1e-9) @ torch.cat([outputs, root * near.mT])).mT


def wudi(ds, ridge=0.01, scale=1.0):
    there = [d for d in ds if d.any()]
    blocks, outputs = (
        torch.cat([x / d.norm() for x, d in zip(xs, there)]) for xs in (there, [d @ d.mT for d in there])
    )
    return scale * least_squares(blocks, outputs, sum(ds), ridge)


def actmat(ds, ridge=0.0, scale=1.0):
    return scale * least_squares(torch.cat(ds), torch.cat([d @ d.mT for d in ds]), sum(ds) / len(ds), ridge)


def dop(ds, alpha=0.8, scale=1.0):
    """LW + WR = 2 Σ aᵢXᵢXᵢᵀXᵢ for the merged X₀ and the new X₁, as one system for all entries of W."""
    merged = ds[0]
    for d in ds[1:]:
        pair = ((alpha, merged), (1 - alpha, d))
        left, right = sum(a * x @ x.mT for a, x in pair), sum(a * x.mT @ x for a, x in pair)
        eyes = [torch.eye(n, dtype=torch.float64) for n in merged.shape]
        system = torch.kron(left, eyes[1]) + torch.kron(eyes[0], right)
        wanted = 2 * sum(a * x @ x.mT @ x for a, x in pair)
        inverse = torch.linalg.pinv(system, rtol=1e-10, hermitian=True)
        merged = (inverse @ wanted.flatten()).view_as(merged)
    return scale * merged


def core_ties(ds, density=0.5, scale=1.0):
    u, parts, v = coordinates(ds)
    return scale * u @ elect([top(p, density) for p in parts]) @ v.mT


def ctm(ds, k=None, rule="sum", density=0.5, scale=1.0):
    k = k or max(len(svd(d)[1]) for d in ds)
    u, parts, v = coordinates(ds)
    parts = [p[:k, :k] for p in parts]
    merged = sum(parts) if rule == "sum" else elect([top(p, density) for p in parts])
    return scale * u[:, :k] @ merged @ v[:, :k].mT


def whitened_sum(ds, power=0.5, cap=None, sides="both", scale=1.0):
    m, n = ds[0].shape
    whiten = {
        "both": lambda: inverse_root(L) @ S @ inverse_root(R),
        "left": lambda: inverse_root(L) @ S,
        "right": lambda: S @ inverse_root(R),
    }[sides]
    S, L, R = (torch.zeros(a, b, dtype=torch.float64) for a, b in ((m, n), (m, m), (n, n)))
    for d in ds:
        u, s, v = svd(d)
        share = (s / s.norm()) ** power
        S, L, R = S + d, L + u @ share.diag() @ u.mT, R + v @ share.diag() @ v.mT
        p, _, q = svd(whiten())
        if cap is not None and max(torch.linalg.matrix_rank(L), torch.linalg.matrix_rank(R)) > cap:
            p, q = span(p[:, :cap]), span(q[:, :cap])
            S, L, R = p @ S @ q, p @ L @ p, q @ R @ q
    return scale * whiten()


def subspace_mean(ds, mean, k, scale):
    parts = [p for p in map(svd, ds) if len(p[1])]
    return scale * span(mean([u for u, _, _ in parts], k)) @ sum(ds) @ span(mean([v for _, _, v in parts], k))


def chordal_mean(ds, k=None, scale=1.0):
    """Maximises Σφ; φ of subspaces of k and kᵢ dimensions is ‖UᵀUᵢ‖² / min(k, kᵢ)."""

    def mean(frames, k):
        k = k or max(u.shape[1] for u in frames)
        return torch.linalg.eigh(sum(span(u) / min(k, u.shape[1]) for u in frames))[1][:, -k:]

    return subspace_mean(ds, mean, k, scale)


def log(u, v):
    """The tangent at span u towards span v, by the tangents of the angles (the package has cosines)."""
    q, t, w = torch.linalg.svd((v - span(u) @ v) @ torch.linalg.inv(u.mT @ v), full_matrices=False)
    return q @ t.atan().diag() @ w


def karcher_frame(frames, k=None):
    k = min(u.shape[1] for u in frames) if k is None else min(k, *(u.shape[1] for u in frames))
    frames = [u[:, :k] for u in frames]
    mean = frames[0]
    for _ in range(50):
        q, t, w = torch.linalg.svd(sum(log(mean, u) for u in frames) / len(frames), full_matrices=False)
        mean = torch.linalg.qr(mean @ w.mT @ t.cos().diag() + q @ t.sin().diag())[0]
    return mean


def karcher_mean(ds, k=None, scale=1.0):
    return subspace_mean(ds, karcher_frame, k, scale)


def quotient_mean(ds, k=None, scale=1.0, steps=50, start=None):
    """Generalised Procrustes analysis of [U√Σ; V√Σ] from the plain mean on, zero adapters being points at zero."""
    k = min([len(s) for _, s, _ in map(svd, ds) if len(s)] + ([k] if k else []))
    points = [torch.cat([u, v]) * s.sqrt() for u, s, v in (svd(d, k) for d in ds)]
    points = [p for p in points if p.shape[1]]
    u, s, v = svd(sum(ds) / len(ds) if start is None else start, k)
    mean = torch.cat([u, v]) * s.sqrt()
    for _ in range(steps):
        mean = sum(p @ polar(p.mT @ mean) for p in points) / len(ds)
    return scale * mean[: len(ds[0])] @ mean[len(ds[0]) :].mT


def regmean(found, inputs):
    """Least squares on the outputs of every layer, each task with its own inputs, name -> (samples, n)."""
    merged = {}
    for name, ds in found.items():
        inputs_here = [one[name] for one in inputs]
        outputs = torch.cat([x @ d.mT for x, d in zip(inputs_here, ds)])
        merged[name] = torch.linalg.lstsq(torch.cat(inputs_here), outputs).solution.mT
    return merged


def opcm_stream(found, alpha=0.5, variant="paper", rank=None):
    """Σ P_t(Δ_t) per module, and what each step says of itself."""
    total, rows = {name: torch.zeros_like(ds[0]) for name, ds in found.items()}, []
    for t in range(len(next(iter(found.values())))):
        norm, kept, dropped = 0.0, 0.0, 0.0
        for name, ds in found.items():
            u, s, vh = torch.linalg.svd(total[name])
            nonzero = int((s > 1e-6 * s[0]).sum())
            held = [float(s[:k].sum() / s.sum()) for k in range(1, nonzero + 1)]
            k = sum(h <= alpha for h in held)  # as many as do not exceed α
            if variant == "paper":
                k = min(k + 1, nonzero)  # the first that reaches it
            k = {0: 0, 1: nonzero}.get(alpha, k)
            clear = torch.eye(*ds[t].shape, dtype=torch.bool)
            clear[nonzero:] = False
            if variant == "paper":
                clear[:k] = clear[:, :k] = True
            else:
                clear[:k, :k] = True
            let_in = u @ torch.where(clear, 0, u.mT @ ds[t] @ vh.mT) @ vh
            grown = total[name] + let_in
            total[name] = cut(grown, rank) if rank else grown
            norm, kept = norm + ds[t].norm() ** 2, kept + let_in.norm() ** 2
            dropped += (grown - total[name]).norm() ** 2
        size = sum(x.norm() ** 2 for x in total.values())
        row = {"norm": float(norm) ** 0.5, "cleared": float(1 - kept / norm) if norm else 0.0}
        mean = sum([row["norm"], *(r["norm"] for r in rows)]) / (t + 1)
        rows.append(row | {"lambda": float(size) ** 0.5 / mean, "dropped": float(dropped / (size + dropped))})
        rows[-1]["rank"] = max(len(svd(x)[1]) for x in total.values())
    return total, rows


def opcm(found, scale="norm", **options):
    total, rows = opcm_stream(found, **options)
    return {n: (1 / rows[-1]["lambda"] if scale == "norm" else scale) * x for n, x in total.items()}


def each(rule):
    """A rule of one module as one of all of them."""
    return lambda found, **options: {n: rule(ds, **options) for n, ds in found.items()}


ONE_MODULE = [
    mean, cat, ties, magnitude_prune, knots_ties, tsv, whitening, iso_c, iso_cts, core_ties, ctm, whitened_sum,
    chordal_mean, karcher_mean, quotient_mean, magmax, subspace_boosting, svc, pico, wudi, actmat, dop,
]  # fmt: skip
RULES = {rule.__name__: each(rule) for rule in ONE_MODULE} | {"regmean": regmean, "opcm": opcm}
RULES |= {"task_arithmetic": RULES["cat"], "svd": each(largest_rank)}
RULES["core_dare_ties"] = RULES["core_ties"]  # at density 1
