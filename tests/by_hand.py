"""Adapter files and numbers made apart from the package: plain safetensors, JSON and dense numpy matrices.

What the package says is held against these, so nothing here may call it (but for `run`, which calls the command).
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_opcm.command.app import main

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def run(capsys, monkeypatch, folder, *words, code=0):
    """stdout and stderr of the command run in `folder`, in this process; `code` is how it has to end."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    try:
        main([str(word) for word in words])
        ended = 0
    except SystemExit as end:
        ended = end.code or 0
    said = capsys.readouterr()
    assert ended == code, said.out + said.err
    return said


# -- files ---------------------------------------------------------------------------------------------------


def write_peft(folder: Path, factors, alpha=None, dtype=torch.float64, full=None, **config):
    """A PEFT folder from module -> (B (m, r), A (r, n)); `alpha` is the module's α, by default its rank (s = 1).

    `full` are tensors of modules_to_save. Returns module -> ΔW = α/r · BA of the numbers as they are stored.
    """
    folder.mkdir(parents=True)
    alpha = {name: b.shape[1] for name, (b, _) in factors.items()} | (alpha or {})
    tensors, deltas = {f"{PREFIX}{k}": t for k, t in (full or {}).items()}, {}
    for name, (b, a) in factors.items():
        b, a = torch.as_tensor(b).to(dtype), torch.as_tensor(a).to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        deltas[name] = alpha[name] / b.shape[1] * b.double().numpy() @ a.double().numpy()
    said = {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": sorted(factors),
        "rank_pattern": {f"^{re.escape(n)}": b.shape[1] for n, (b, _) in factors.items()},
        "alpha_pattern": {f"^{re.escape(n)}": alpha[n] for n in factors},
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(said | config))
    return deltas


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / WEIGHTS if path.is_dir() else path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_peft(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """module -> (s·B, A) of a PEFT folder, with s = α/r as its config says."""
    config, tensors, found = json.loads((folder / CONFIG).read_text()), tensors_of(folder), {}
    assert not config.get("use_rslora")
    for key, b in tensors.items():
        if key.endswith(".lora_B.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_B.weight")
            alpha = (config.get("alpha_pattern") or {}).get(f"^{re.escape(name)}", config["lora_alpha"])
            a = tensors[key.replace("lora_B", "lora_A")]
            found[name] = alpha / b.shape[1] * b.double().numpy(), a.double().numpy()
    return found


def deltas_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: b @ a for name, (b, a) in read_peft(folder).items()}


def random_factors(rng, shapes, rank):
    return {n: (rng.normal(size=(m, rank)), rng.normal(size=(rank, k))) for n, (m, k) in shapes.items()}


# -- dense numbers -------------------------------------------------------------------------------------------


def norm(deltas) -> float:
    """‖ΔW‖ over all modules."""
    return float(np.sqrt(sum((d**2).sum() for d in deltas.values())))


def gap(deltas, expected) -> float:
    """Relative distance over all modules, of which there must be the same ones."""
    assert deltas.keys() == expected.keys()
    return norm({n: deltas[n] - expected[n] for n in deltas}) / norm(expected)


def svd(d):
    """U, σ, Vᵀ without the directions that are zero to rounding."""
    u, s, vh = np.linalg.svd(d)
    k = int((s > 1e-9 * s[0]).sum()) if s[0] else 0
    return u[:, :k], s[:k], vh[:k]


def cut(d, rank):
    """The best approximation of a rank (None: of any), and the squared norm it leaves out."""
    u, s, vh = svd(d)
    rank = len(s) if rank is None else rank
    return (u[:, :rank] * s[:rank]) @ vh[:rank], float((s[rank:] ** 2).sum())


def opcm_stream(adapters, alpha, cap=None):
    """(S, rows): the sum of projected updates, and what the history says of each adapter, on dense matrices.

    As the paper writes it: k leading directions hold α of the nuclear norm of S; P(Δ) has neither their rows nor
    their columns nor the diagonal, in the singular basis of S.
    """
    total, rows, norms = {}, [], []
    for deltas in adapters:
        let_in = cut_off = 0.0
        for name, d in deltas.items():
            if name in total:
                u, s, vh = svd(total[name])
                k = 0 if alpha == 0 else int(np.searchsorted(s.cumsum() / s.sum(), alpha - 1e-12)) + 1
                d = d - u[:, :k] @ u[:, :k].T @ d
                d = d - d @ vh[:k].T @ vh[:k]
                d = d - (u * np.diag(u.T @ d @ vh.T)) @ vh
            let_in += (d**2).sum()
            total[name], lost = cut(total.get(name, 0) + d, cap)
            cut_off += lost
        norms.append(norm(deltas))
        size = norm(total)
        rows.append({
            "norm": norms[-1], "lambda": size / np.mean(norms), "cleared": 1 - let_in / norms[-1] ** 2,
            "dropped": cut_off / (size**2 + cut_off), "rank": max(len(svd(d)[1]) for d in total.values()),
        })  # fmt: skip
    return total, rows


def opcm(adapters, alpha=0.5):
    """The published merge: S with the mean norm of the adapters."""
    total, rows = opcm_stream(adapters, alpha)
    return {n: d / rows[-1]["lambda"] for n, d in total.items()}


def whitened_sum(adapters, power):
    """L^{-1/2} (Σ ΔW) R^{-1/2} with L = Σ U (σ/‖σ‖)^power Uᵀ and R likewise, on dense matrices."""

    def root(x):
        values, vectors = np.linalg.eigh(x)
        keep = values > 1e-9 * values[-1]
        return vectors[:, keep] / np.sqrt(values[keep]) @ vectors[:, keep].T

    found = {}
    for name in adapters[0]:
        parts = [svd(deltas[name]) for deltas in adapters]
        shares = [(s / np.linalg.norm(s)) ** power for _, s, _ in parts]
        left = sum((u * w) @ u.T for (u, _, _), w in zip(parts, shares))
        right = sum((vh.T * w) @ vh for (_, _, vh), w in zip(parts, shares))
        found[name] = root(left) @ sum(deltas[name] for deltas in adapters) @ root(right)
    return found
