"""What an estimated error costs, in Hessian products and time, beside the hypergradient itself and an earlier version.

The same hypergradients with and without ``estimate``, in turns, in fresh processes of the two versions. Products are
those of the adjoint's count: the difference is what the estimate takes.

    python benchmarks/estimate_cost.py --against COMMIT
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

NAME, PAGE = Path(__file__).stem, "certificates"
CASES = (
    "smoothed TV, 64 x 64",
    "fields of experts, 64 x 64",
    "quadratic, n = 300, condition 1e3",
    "Huber TV, saddle, 32 x 32",
)


def case(name: str):
    """(oracle, params, batch, tol)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jbilevel as jb

    rng = np.random.default_rng(0)

    def images(side: int) -> dict:
        clean = np.where(rng.random((4, side, side)).cumsum(2) > side / 8, 0.8, 0.2)
        return {"x": jnp.asarray(clean), "y": jnp.asarray(clean + 0.1 * rng.standard_normal(clean.shape))}

    if name.startswith("quadratic"):
        basis = np.linalg.qr(rng.standard_normal((300, 300)))[0]
        H = jnp.asarray((basis * np.geomspace(1, 1e3, 300)) @ basis.T)
        problem = jb.SmoothProblem(
            lambda p, x, d: 0.5 * jnp.exp(p) * x @ (H @ x) - x @ d, lambda p, d: 0 * d,
            strong_convexity=lambda p, d: 0.99 * jnp.exp(p),
        )  # fmt: skip
        loss = lambda p, x, d: 0.5 * jnp.sum((x - 1) ** 2)  # noqa: E731
        return problem.oracle(loss), jnp.asarray(0.1), jnp.asarray(rng.standard_normal((4, 300))), 1e-2
    if "saddle" in name:
        problem = jb.variational(None, jb.regularizers.TV(width=0.01), form="saddle")
        return problem.oracle(jb.losses.squared_error(part=0)), jnp.log(jnp.array([0.1])), images(32), 1e-2
    R = jb.regularizers.FoE(16, 5) if name.startswith("fields") else jb.regularizers.SmoothedTV()
    params = R.init(jax.random.key(0), dtype=jnp.float64) if name.startswith("fields") else R.init(weight=0.1, eps=1e-2)
    return jb.variational(None, R).oracle(jb.losses.squared_error()), params, images(64), 1e-2


def measured(repeats: int) -> dict[str, dict]:
    """Products and median CPU seconds of each case with the `jbilevel` that is imported."""
    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    found = {}
    for name in CASES:
        oracle, params, batch, tol = case(name)
        both = {"with": oracle, "without": replace(oracle, estimate=False)}
        products = {k: int(np.sum(o(params, batch, tol=tol).adjoint.evaluations.products)) for k, o in both.items()}
        seconds = {k: [] for k in both}
        for _ in range(repeats):
            for k, o in both.items():
                started = time.process_time()
                jax.block_until_ready(o(params, batch, tol=tol))
                seconds[k].append(time.process_time() - started)
        found[name] = {"products": products, "cpu_s": {k: statistics.median(s) for k, s in seconds.items()}}
    return found


def child(library: Path, repeats: int) -> dict:
    environment = os.environ | {"PYTHONPATH": str(library)}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def render(rows) -> str:
    from benchmarks import common

    lines = []
    for row in rows:
        told = row["figures"]
        shares = []
        for version in ("earlier", "present"):
            products, seconds = told[version]["products"], told[version]["cpu_s"]
            shares += [products["with"] - products["without"], f"{seconds['with'] / seconds['without'] - 1:.0%}"]
        lines.append((row["case"]["case"], *shares))
    header = [
        "hypergradients of 4 samples",
        "products of the estimate, earlier",
        "time, earlier",
        "products now",
        "time now",
    ]
    return common.table(header, lines)


def main(argv=None) -> None:
    if argv is None and "--child" in sys.argv:
        print(json.dumps(measured(int(sys.argv[sys.argv.index("--repeats") + 1]))))
        return
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    from benchmarks import common

    options = common.parser(__doc__, defaults={"repeats": 15}, quick={"repeats": 3})
    options.add_argument("--against", metavar="COMMIT", default="HEAD", help="the earlier version (default: HEAD)")
    args = common.parse(options, argv)
    recorder = common.recorder_of(PAGE, NAME, args)
    git = ["git", "-C", str(root), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        subprocess.run([*git, "add", "-q", "--detach", str(earlier), args.against], check=True)
        try:
            found = {"earlier": child(earlier, args.repeats), "present": child(root, args.repeats)}
        finally:
            subprocess.run([*git, "remove", "--force", str(earlier)], check=True)
    for name in CASES:
        recorder.add({"case": name}, {version: told[name] for version, told in found.items()})
    recorder.write()
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
