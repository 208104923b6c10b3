"""Is the density of filtered backprojection right when lines are measured unequally often, and is it said when not?

A disc (for volumes a ball) of value 1, reconstructed in single precision from its line integrals: mean and standard
deviation inside. *Before*, all measurements had the same weight and the filter no room beside a displaced detector; a
fan or cone beam with a gap that is wide beside the others was refused.

    python benchmarks/fbp.py           # 128 pixels across, a minute
    python benchmarks/fbp.py --quick   # 48

The rows go to the page that benchmarks/reliability.py renders.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common
from jbilevel.operators.fbp import covers, spacings
from jbilevel.operators.redundancy import TURN

NAME, PAGE = Path(__file__).stem, "reliability"
CENTRE, RADIUS = (0.03, -0.06), 0.33  # of the disc or ball, in widths of the image


class Case(NamedTuple):
    """A scan, and the test that holds what is said of it here."""

    operator: Any
    test: str


def cases(n: int) -> dict[str, Case]:
    """Images n pixels across, volumes n/2, and detectors 1.4 times as wide."""
    bins, far = round(1.4 * n), 2.0 * n
    m = n // 2
    disc, ball, told = (
        f"test_{name}" for name in ("a_disc_has_the_value_1", "a_ball_has_the_value_1", "missing_lines_are_named")
    )

    def turn(degrees, views=None, start=0.0, sign=1):
        views = round(degrees * n / 180) if views is None else views
        return sign * np.radians(start + degrees * np.arange(views) / views)

    def parallel(angles, bins=bins, **options):
        return jb.operators.ParallelBeam(n, angles, bins, **options)

    def fan(angles, bins=bins, **options):
        sizes = {"source_origin": far, "origin_detector": far, "detector_size": 2.0, **options}
        return jb.operators.FanBeam(n, angles, bins, **sizes)

    def cone(angles, **options):
        sizes = {"source_origin": far, "origin_detector": far / 2, "detector_size": 1.5}
        return jb.operators.ConeBeam(m, angles, (round(1.4 * m), round(1.4 * m)), **sizes, **options)

    def slices(angles, **options):
        return jb.operators.ParallelBeam3D(m, angles, (m, round(1.4 * m)), **options)

    third, full, rng = bins / 3, turn(360), np.random.default_rng(0)
    return {
        "parallel, 180 degrees": Case(parallel(turn(180)), "test_an_ordinary_scan_has_equal_weights_and_no_padding"),
        "fan, full turn": Case(fan(full), "test_an_ordinary_scan_has_equal_weights_and_no_padding"),
        "parallel, displaced by a third": Case(parallel(full, detector_offset=third), disc),
        "parallel, displaced by a third, other side": Case(parallel(-full, detector_offset=-third), disc),
        "parallel, displaced to the centre": Case(parallel(full, n, detector_offset=n / 2), disc),
        "parallel, displaced, uneven angles": Case(
            parallel(rng.uniform(0, TURN, 4 * n), detector_offset=third), disc
        ),
        "parallel, 2.5 turns": Case(parallel(turn(900, sign=-1)), disc),
        "fan, displaced by a third": Case(fan(full, detector_offset=2 * third), disc),
        "fan, displaced by a third, other side": Case(fan(-full, detector_offset=-2 * third), disc),
        "fan, displaced to 3 bins beyond the centre": Case(fan(full, detector_offset=bins - 6), disc),
        "fan, displaced, 1.4 turns": Case(fan(turn(504), detector_offset=2 * third), disc),
        "fan, 180 degrees and the fan": Case(fan(turn(180 + 29)), disc),
        "fan, 240 degrees, decreasing": Case(fan(turn(240, start=77, sign=-1)), disc),
        "fan, 340 degrees": Case(fan(turn(340)), disc),
        "fan, 1.5 turns": Case(fan(turn(540)), disc),
        "fan, short, every third view": Case(
            fan(turn(240)).subset(1, 3), "test_subsets_are_scans_of_their_own"
        ),
        "cone, displaced by a third": Case(cone(full, detector_offset=0.75 * third), ball),
        "cone, 230 degrees": Case(cone(turn(230)), ball),
        "slices, displaced by a third": Case(slices(full, detector_offset=third / 2), ball),
        "fan, 8 views over 210 degrees": Case(fan(turn(240, 8)), "test_complete_scans_are_taken_without_a_word"),
        "fan, 8 views over 175 degrees": Case(fan(turn(200, 8)), told),
        "fan, 180 degrees": Case(fan(turn(180)), told),
        "parallel, 120 degrees": Case(parallel(turn(120)), told),
        "parallel, displaced, 180 degrees": Case(parallel(turn(180), detector_offset=third), told),
        "fan, displaced, 240 degrees": Case(fan(turn(240), detector_offset=2 * third), told),
        "parallel, detector too narrow": Case(parallel(full, round(0.55 * n)), told),
        "parallel, detector beside the centre": Case(parallel(full, n, detector_offset=n / 2 + 4), told),
        "cone, panel too low": Case(replace(cone(full), n_detectors=(m // 2, round(1.4 * m))), told),
    }  # fmt: skip


def measure(args, recorder) -> None:
    for n in args.sizes:
        for name, (A, test) in cases(n).items():
            y, inside = phantom(A)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                after = np.asarray(A.fbp(y))[inside]
            before = equal_weights(A, y)
            figures = {"mean": after.mean(), "std": after.std(), "said": [str(w.message) for w in caught]}
            if before is not None:
                values = np.asarray(before)[inside]
                figures |= {"mean_before": values.mean(), "std_before": values.std()}
            recorder.add({"row": name, "size": n}, figures, {"test": f"tests/test_redundancy.py::{test}"})
            recorder.write()


def phantom(A):
    """Line integrals of the disc or the ball, 2 sqrt(radius^2 - distance^2), and which pixels are well inside."""
    B = A._whole
    shape, p = B.in_shape, B.pixel_size
    centre, radius = np.array([*CENTRE, 0.0]) * shape[-1] * p, RADIUS * shape[-1] * p
    point, direction = rays(B)
    distance = np.linalg.norm(np.cross(centre - point, direction), axis=-1) / np.linalg.norm(direction, axis=-1)
    y = jnp.asarray(2 * np.sqrt(np.maximum(radius**2 - distance**2, 0)).reshape(B.out_shape), jnp.float32)
    *height, down, across = np.meshgrid(*((np.arange(k) - (k - 1) / 2) * p for k in shape), indexing="ij")
    squares = (across - centre[0]) ** 2 + (down + centre[1]) ** 2 + sum(z**2 for z in height)
    return y if A is B else A.restrict(y), squares < (0.75 * radius) ** 2


def rays(A):
    """A point and the direction of every ray, (rows or 1, views, columns, 3), from the definition of the geometry."""
    t = np.array(A.angles)[None, :, None, None]
    along = np.concatenate([np.cos(t), np.sin(t), 0 * t], -1)
    towards = np.concatenate([-np.sin(t), np.cos(t), 0 * t], -1)
    panel = A.n_detectors if len(A.in_shape) == 3 else (1, A.n_detectors)
    v, u = ((np.arange(k) - (k - 1) / 2) * A.detector_size for k in panel)
    place = (u + A.detector_offset)[:, None] * along + v[:, None, None, None] * np.array([0.0, 0.0, 1.0])
    if isinstance(A, jb.operators.ParallelBeam | jb.operators.ParallelBeam3D):
        return place, towards
    return -A.source_origin * towards, place + (A.source_origin + A.origin_detector) * towards


def equal_weights(A, y):
    """What came out before, None where that was an error: every view counts for its part of the turn, and no more."""
    if A is not A._whole:
        return None
    plane = A._plane if isinstance(A, jb.operators.ConeBeam) else A
    plane = A._slice if isinstance(A, jb.operators.ParallelBeam3D) else plane
    fan = plane._scan.fan_beam

    def apart(gaps):
        return (gaps > math.pi / 6) & (gaps > 5 * np.median(gaps))

    if fan and not covers(A.angles, TURN, apart):
        return None
    before, _ = plane._scan.padding
    parts = plane._reconstruction._replace(
        view=plane._views(False)[0],
        cosine=plane._reconstruction.cosine[:, before : before + plane.n_detectors] if fan else np.ones((1, 1)),
        shares=np.full((1, 1), 0.5 if fan else 1.0),
        angular=spacings(A.angles, TURN if fan else math.pi, apart),
    )

    def bind(kernel, y, *parts, transpose):
        return (replace(kernel, padding=(0, 0)) if parts else kernel).forward(y, *parts)

    return A._invert(y, jax.tree.map(jnp.asarray, parts), "ram-lak", False, bind)


def render(rows: Sequence[dict]) -> str:
    lines = [
        (
            row["case"]["row"],
            f"{row['figures']['mean_before']:.3f} ± {row['figures']['std_before']:.3f}"
            if "mean_before" in row["figures"]
            else "refused",
            f"{row['figures']['mean']:.3f} ± {row['figures']['std']:.3f}",
            "".join(row["figures"]["said"]).partition(": ")[2] or "–",
            f"`{row['settings']['test'].partition('::')[2]}`",
        )
        for row in rows
    ]
    return common.table(["scan", "before", "now", "what is said to be missing", "test"], lines)


def main(argv=None) -> None:
    defaults, quick = {"sizes": [128], "dtype": ["float32"]}, {"sizes": [48]}
    args = common.parse(common.parser(__doc__, defaults=defaults, quick=quick), argv)
    recorder = common.recorder_of(PAGE, NAME, args)
    with common.precision("float32"):
        measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
