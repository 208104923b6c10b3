"""Cost of learned primal-dual networks: memory of training, operations, time, and what of it is the projector's.

The network is the thesis' (5 x 5 convolutions, 32 filters). Memory is the compiler's figure for the temporaries of one
gradient, before anything runs. Operations are counted by the compiler on the network with its layers written out, for
it counts the body of a loop once. The projector's share is the time of its 2 K products, run alone, in that of an
inference. A bridge calls a host code for each product: ASTRA where it is installed, and always a matrix in NumPy.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, networks

NAME = "learned_reconstruction"
TITLE = "Learned reconstruction: memory, operations, time"
FORMS = {
    "scanned, rematerialised": {"unroll": False},
    "scanned, products saved": {"unroll": False, "remat": "networks"},
    "scanned": {"unroll": False, "remat": "none"},
    "unrolled": {"unroll": True},
}
PART = 1 / 5  # of the unscanned form's memory
FASTEST = 10.0  # ms per image on a GPU at 512², 90 views, 12 layers


def geometry(size: int, views: int):
    return networks.scans.geometry((size, size), views, networks.scans.WIDTH / size)


def network(A, layers: int, **settings):
    """``(f, parameters)`` of the thesis' network; the operator is normalised, as one in millimetres has to be."""
    settings = {"normalise": True, "step": 1.0, "initial": "zeros", **settings}
    return jb.nets.from_flax(jb.nets.LPD.named("thesis", operator=A, rngs=nnx.Rngs(0), layers=layers, **settings))


def gradient(f) -> Callable:
    def loss(params, data):
        return jnp.mean(jax.vmap(lambda d: networks.LOSS(None, f(params, d["y"]), d))(data))

    return jax.value_and_grad(loss)


def batch_of(A, count: int) -> dict:
    rng = np.random.default_rng(0)
    return {
        "x": jnp.asarray(rng.random((count, *A.in_shape)), jnp.float32),
        "y": jnp.asarray(rng.random((count, *A.out_shape)), jnp.float32),
    }


def operations(function, *arguments) -> float:
    found = jax.jit(function).lower(*arguments).cost_analysis()
    return float(found["flops"]) if found else float("nan")


def memory(args, recorder) -> None:
    A = geometry(args.sizes[0], args.views)
    data = batch_of(A, 1)
    for form in args.forms:
        f, params = network(A, args.layers, **FORMS[form])
        compiled = common.compile_apart(gradient(f), params, data)
        case = {"part": "memory", "size": args.sizes[0], "views": args.views, "layers": args.layers, "form": form}
        temp = float("nan") if compiled.temp_bytes is None else compiled.temp_bytes / 1e6
        recorder.add(case, {"megabytes": temp, "compile_s": compiled.seconds})
        recorder.write()


def timing(args, recorder) -> None:
    K, m = args.timed_layers, args.subsets
    A = geometry(args.timed_size, args.timed_views)
    coarse = [2] * (2 * K // 3) + [1] * (K - 2 * K // 3)
    models = {"LPD": {}, f"LSPD, m = {m}": {"subsets": m}, f"sketched LSPD, m = {m}": {"subsets": m, "sketch": coarse}}
    for count in args.batch:
        data, calls, flops = batch_of(A, count), {}, {}
        for name, settings in models.items():
            f, params = network(A, K, **settings)
            plain, _ = network(A, K, **settings, unroll=True)
            flops[name, "inference"] = operations(jax.vmap(plain, (None, 0)), params, data["y"]) / count
            flops[name, "training"] = operations(gradient(plain), params, data) / count
            calls |= _calls(name, f, params, data)
        products = jax.jit(lambda data: (A(data["x"]), A.T(data["y"])))
        flops["projector", "inference"] = K * operations(products, data) / count
        # K calls, for equal products in one would be merged
        calls["projector", "inference"] = lambda data=data, products=products: [products(data) for _ in range(K)]
        case = {"part": "time", "size": args.timed_size, "views": args.timed_views, "layers": K, "batch": count}
        _record(args, recorder, case, calls, flops)


def bridge(args, recorder) -> None:
    """The same network around the pure-JAX projector and around host codes."""
    K = args.timed_layers
    for size, views, kind in ((args.bridge[0], args.bridge[1], "matrix"), (args.timed_size, args.timed_views, "ASTRA")):
        if kind == "ASTRA" and not importlib.util.find_spec("astra"):
            print("ASTRA is not installed (pip install 'jbilevel[ct]'): no row for it.")
            continue
        A = geometry(size, views)
        host = _matrix(A) if kind == "matrix" else _astra(A)
        scale = A.norm()
        for count in args.batch:
            data, calls = batch_of(A, count), {}
            settings = {"pure JAX": (A, {}), f"bridge, {kind}": (host, {"remat": "networks"})}
            for name, (operator, more) in settings.items():
                f, params = network(operator, K, normalise=scale, **more)
                calls |= _calls(name, f, params, data)
            case = {"part": "bridge", "size": size, "views": views, "layers": K, "batch": count, "kind": kind}
            _record(args, recorder, case, calls, {})


def _matrix(A):
    size = int(np.prod(A.in_shape))
    columns = np.asarray(A(jnp.eye(size).reshape(size, *A.in_shape))).reshape(size, -1)
    return jb.operators.from_callbacks(
        lambda x: (x.reshape(-1, size) @ columns).reshape(-1, *A.out_shape),
        lambda y: (y.reshape(-1, columns.shape[1]) @ columns.T).reshape(-1, *A.in_shape),
        A.in_shape, A.out_shape, batched=True,
    )  # fmt: skip


def _astra(A):
    sizes = {"pixel_size": A.pixel_size, "detector_size": A.detector_size}
    return jb.operators.Astra(A.in_shape, A.angles, A.n_detectors, **sizes)


def _calls(name, f, params, data) -> dict:
    infer = jax.jit(jax.vmap(f, (None, 0)))
    train = jax.jit(gradient(f))
    return {(name, "inference"): lambda: infer(params, data["y"]), (name, "training"): lambda: train(params, data)}


def _record(args, recorder, case, calls, flops) -> None:
    count = case["batch"]
    times = common.interleave(calls, args.repeats)
    for (name, what), call in calls.items():
        started = time.process_time()
        jax.block_until_ready(call())
        cpu = 1e3 * (time.process_time() - started) / count
        own = {"flops": flops[name, what]} if flops else {}
        per_image = np.array(times[name, what]) / count
        recorder.add(case | {"row": name, "what": what}, common.spread(per_image) | {"cpu_ms": cpu} | own)
    recorder.write()


def render(rows: Sequence[dict]) -> str:
    def of(part):
        return [r for r in rows if r["case"]["part"] == part]

    text = ""
    if found := of("memory"):
        unrolled = next((r for r in found if r["case"]["form"] == "unrolled"), None)
        text += "Temporaries of one gradient, {size}², {views} views, {layers} layers, batch 1:\n\n".format(
            **found[0]["case"]
        )
        lines = [
            [r["case"]["form"], common.whole(r["figures"]["megabytes"]), common.rounded(r["figures"]["compile_s"])]
            for r in found
        ]
        text += common.table(["", "MB", "compilation s"], lines)
        if unrolled:
            share = common.number(found[0]["figures"]["megabytes"]) / common.number(unrolled["figures"]["megabytes"])
            met = "met" if share <= PART else "NOT met"
            text += f"\n- {found[0]['case']['form']}: {share:.3f} of unrolled; criterion <= {PART:g}: {met}.\n"
    for part in ("time", "bridge"):
        for case in dict.fromkeys(tuple(r["case"][k] for k in ("size", "views", "layers", "batch")) for r in of(part)):
            own = [r for r in of(part) if tuple(r["case"][k] for k in ("size", "views", "layers", "batch")) == case]
            text += "\n{}², {} views, {} layers, batch {}; per image:\n\n".format(*case)
            lines = [
                [
                    r["case"]["row"], r["case"]["what"], common.rounded(r["figures"]["ms"]),
                    common.rounded(r["figures"]["cpu_ms"]), common.rounded(r["figures"].get("flops", np.nan) / 1e9),
                ]
                for r in own
            ]  # fmt: skip
            text += common.table(["", "", "ms", "CPU ms", "GFLOP"], lines) + _shares(own)
    return text


def _shares(own: Sequence[dict]) -> str:
    rows = {(r["case"]["row"], r["case"]["what"]): r["figures"] for r in own}
    case, lpd, projector = own[0]["case"], rows.get(("LPD", "inference")), rows.get(("projector", "inference"))
    text = ""
    if projector:
        share, counted = projector["ms"] / lpd["ms"], projector["flops"] / lpd["flops"]
        text += f"\n- Projector in an inference of LPD: {100 * share:.0f} % of the time, "
        text += f"{100 * counted:.1f} % of the operations.\n"
        if own[0]["device"]["platform"] == "gpu" and (case["size"], case["views"], case["layers"]) == (512, 90, 12):
            text += f"- LPD: {lpd['ms']:.2f} ms per image; criterion <= {FASTEST:g}: "
            text += f"{'met' if lpd['ms'] <= FASTEST else 'NOT met'}.\n"
    for (name, what), figures in rows.items():
        if name.startswith("bridge"):
            slower = common.times_faster(rows["pure JAX", what], figures)
            text += f"\n- {name}, {what}: {slower:.2f} times the time of pure JAX.\n"
    return text


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [512], "batch": [1], "dtype": ["float32"], "repeats": 5, "views": 90, "layers": 12, "subsets": 4,
            "timed_size": 128, "timed_views": 30, "timed_layers": 4, "bridge": [32, 24], "forms": list(FORMS),
        },
        quick={
            "sizes": [16], "views": 6, "layers": 2, "subsets": 2, "timed_size": 16, "timed_views": 6, "repeats": 2,
            "timed_layers": 2, "bridge": [8, 4], "forms": ["scanned, rematerialised", "unrolled"],
        },
    )  # fmt: skip
    options.add_argument("--views", type=int, help="angles of the network whose memory is told")
    options.add_argument("--layers", type=int, help="of that network")
    options.add_argument("--forms", nargs="+", choices=tuple(FORMS), help="of its layers")
    options.add_argument("--timed-size", type=int, help="side of the images of the networks that run; 512 for a GPU")
    options.add_argument("--timed-views", type=int, help="their angles; 90 for a GPU")
    options.add_argument("--timed-layers", type=int, help="their layers; 12 for a GPU")
    options.add_argument("--subsets", type=int, help="of the stochastic ones")
    options.add_argument("--bridge", type=int, nargs=2, metavar=("SIZE", "VIEWS"), help="for the matrix on the host")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    for part in (memory, timing, bridge):
        part(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
