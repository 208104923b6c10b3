"""Fields of Experts and ridge regularisers in PyTorch: one cold hypergradient by L-BFGS and conjugate gradients.

The problems of `benchmarks.regularizers`, written by it with --export, at batch 1 in float64: the same energy in
PyTorch, torch.optim.LBFGS with strong Wolfe line search on it, and the adjoint system by conjugate gradients on Hessian
products by automatic differentiation, with tolerances tuned to the same error. It imports neither JAX nor jbilevel and
runs in an environment with torch and numpy:

    python benchmarks/regularizers.py --export DIR
    torchenv/bin/python benchmarks/regularizers_torch.py DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import tuning  # noqa: E402

NAME = "regularizers_torch"
TITLE = "Regularisers in PyTorch"
FINEST = 1e-10
MOST_STEPS = 2000
pad, conv2d = torch.nn.functional.pad, torch.nn.functional.conv2d


# ------------------------------------------------------------------------------------------------------------ energies


def symmetric(x, size: int):
    """x (1, 1, H, W) extended by mirroring with the edge repeated, as numpy's "symmetric"."""
    before = (size - 1) // 2
    for axis, n in ((2, x.shape[2]), (3, x.shape[3])):
        index = torch.from_numpy(np.pad(np.arange(n), (before, size - 1 - before), mode="symmetric"))
        x = x.index_select(axis, index)
    return x


def foe(p):
    """x -> energy; what depends on the parameters alone is computed once."""
    weights, smoothing = (p["log_weight"] + p["log_weights"]).exp(), p["log_smoothing"].exp()
    kernels = (p["filters"] / smoothing[:, None, None])[:, None]

    def energy(x):
        responses = conv2d(symmetric(x, kernels.shape[-1]), kernels)
        return (weights * smoothing * (responses**2 + 1).sqrt().sum((0, 2, 3))).sum()

    return energy


def ridge(rho: float):
    knot = 1.5

    def spline(t):
        u = t.clamp(-knot, knot)
        return u**2 * (0.5 - (u / knot) ** 2 / 12) + (t - u) * u * (1 - (u / knot) ** 2 / 3)

    def prepare(p):
        layers = [p[f"kernels.{i}"] for i in range(3)]
        bank = layers[0] - layers[0].mean((1, 2, 3), keepdim=True)
        for layer in layers[1:]:
            around = layer.shape[-1] - 1
            bank = conv2d(pad(bank.transpose(0, 1), [around] * 4), layer.flip(2, 3)).transpose(0, 1)
        bank = bank[:, 0]
        # the bound on the norm that the library divides by
        degree = bank.shape[-1] - 1
        squared = (torch.fft.rfft2(bank, (256, 256)).abs() ** 2).sum(0).max() / np.cos(np.pi * degree / 256) ** 2
        k, s, slope = p["log_scalings"], p["log_scale"], p["log_slope"].exp()
        filters = (bank / squared.sqrt() * (s + k).exp()[:, None, None])[:, None]
        before = degree // 2

        def energy(x):
            responses = conv2d(pad(x, [before, degree - before] * 2), filters)
            ridges = spline(slope * responses) / slope - rho * spline(responses)
            return (p["log_weight"] - 2 * s).exp() * ((-2 * k).exp() * ridges.sum((0, 2, 3))).sum()

        return energy

    return prepare


ENERGIES = {"FoE": foe, "CRR": ridge(0.0), "WCRR": ridge(0.9)}


# ------------------------------------------------------------------------------------------------------- hypergradient


def hypergradient(energy, p, y, clean, tol: float, adjoint_tol: float) -> np.ndarray:
    """Gradient of 1/2 ||x_hat - clean||^2 in all of p, flattened in the order of the keys."""
    with torch.no_grad():
        fixed = energy({key: leaf.detach() for key, leaf in p.items()})
    x = y.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [x], max_iter=MOST_STEPS, tolerance_grad=tol / x.numel() ** 0.5, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        solver.zero_grad()
        value = 0.5 * ((x - y) ** 2).sum() + fixed(x)
        value.backward()
        return value

    solver.step(closure)
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * ((x - y) ** 2).sum() + fixed(x), x, create_graph=True)
    product = lambda v: torch.autograd.grad(gradient, x, v, retain_graph=True)[0]  # noqa: E731
    q = torch.zeros_like(x)
    residual = clean - x.detach()
    direction, squared = residual, (residual**2).sum()
    for _ in range(MOST_STEPS):
        if squared.sqrt() <= adjoint_tol:
            break
        image = product(direction)
        step = squared / (direction * image).sum()
        q, residual = q + step * direction, residual - step * image
        following = (residual**2).sum()
        direction, squared = residual + following / squared * direction, following
    leaves = [p[key] for key in sorted(p)]
    (gradient,) = torch.autograd.grad(energy(p)(x), x, create_graph=True)
    found = torch.autograd.grad(gradient, leaves, q)
    return np.concatenate([g.numpy().ravel() for g in found])


def measure(path: Path, target: float, repeats: int) -> dict:
    arrays = np.load(path, allow_pickle=False)
    kind = path.stem.split("_")[0]
    p = {k[7:]: torch.from_numpy(arrays[k]).requires_grad_() for k in arrays.files if k.startswith("params.")}
    y, clean = (torch.from_numpy(arrays[k])[None, None] for k in ("y", "clean"))
    exact = arrays["gradient"]

    def error(tol, adjoint_tol):
        grad = hypergradient(ENERGIES[kind], p, y, clean, tol, adjoint_tol)
        return float(np.linalg.norm(grad - exact) / np.linalg.norm(exact))

    tuned = tuning.tune(error, target, FINEST)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        hypergradient(ENERGIES[kind], p, y, clean, tuned.tol, tuned.adjoint_tol)
        seconds.append(time.perf_counter() - start)
    return {"regularizer": path.stem, "ms": 1e3 * float(np.median(seconds)), "error": tuned.error,
            "times_ms": [1e3 * t for t in seconds], "threads": torch.get_num_threads(),
            "parameters": int(exact.size)}  # fmt: skip


def main(argv=None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="what `benchmarks/regularizers.py --export` wrote")
    options.add_argument("--target", type=float, default=1e-4, help="relative error that tolerances are tuned for")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--out", type=Path, help="JSON lines")
    args = options.parse_args(argv)
    rows = [
        measure(path, args.target, args.repeats)
        for path in sorted(args.folder.glob("*.npz")) if path.stem.split("_")[0] in ENERGIES
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
