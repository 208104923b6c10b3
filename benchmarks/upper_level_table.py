"""Which problems `upper_level.py` poses, how each is judged, which cells of Adam it tries, and what it must show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jbilevel as jb
from benchmarks import upper_level_problems as problems
from benchmarks.upper_level_runs import Cell, grid

ADAM = "Adam"
# name: class, made as class(oracle, projection=...); one line for each further method
METHODS: dict[str, Callable] = {
    "QuasiNewton": jb.QuasiNewton,
    "Stochastic": jb.Stochastic,
    "MAID": jb.MAID,
    "HOAG": jb.HOAG,
    "NBA": jb.NBA,
}
OURS = ("QuasiNewton", "Stochastic")  # without tuning: what `Must` is about
DRAWING = (ADAM, "Stochastic")  # what draws samples; for all others the order of samples makes no difference
ONLY = {"Stochastic": ("foe crops", "crr crops"), "NBA": ("wavelets",)}  # the problems of methods that are for some


class Must(NamedTuple):
    """What a method is to reach: a loss at a mark or the work to a target; ``limit`` None: what Adam's best cell has.

    over: "each" instance, or their "median". seconds: of the processor, in place of work. methods: whom it concerns,
    (): `OURS`.
    """

    at: str
    limit: float | None = None
    over: str = "each"
    seconds: bool = False
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """instances: {name: setting}. marks: of work; or gaps, shares above the least loss, or losses, to be reached.

    seeds: whether instances are alike, so that one cell of Adam serves them all; else they are starts.
    sampled: whether Adam gets batches of 16, and instances differ by the order of samples alone.
    """

    title: str
    instances: Mapping[str, Callable[[], problems.Setting]]
    cells: tuple[Cell, ...]
    marks: tuple[int, ...] = ()
    gaps: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    budget: float = float("inf")
    seconds: float = 300.0
    seeds: bool = True
    sampled: bool = False
    held_out: bool = False
    musts: tuple[Must, ...] = ()
    digits: int = 4
    quick: bool = field(default=False)  # small enough to be part of a quick run


def _seeds(make: Callable, seeds) -> dict:
    return {f"seed {seed}": partial(make, seed=seed) for seed in seeds}


def _starts(make: Callable, starts) -> dict:
    shown = lambda start: f"{start:g}" if isinstance(start, float) else ", ".join(f"{v:g}" for v in start)  # noqa: E731
    return {f"from {shown(start)}": partial(make, start=start) for start in starts}


RATES = (0.01, 0.03, 0.1, 0.3)
FILTER_MARKS = (2000, 5000, 15_000, 48_000)
LEARNED_TV = {
    "exact": grid((0.003, 0.01, 0.03, 0.1), ((2.4, 0.3), (0.8, 0.1), (0.27, 0.03))),
    "curved": grid(RATES, ((3e-2, 0.3), (1e-2, 0.1), (3.5e-3, 0.033), (1e-3, 0.01))),
}
TV = grid((0.03, 0.1, 0.3, 1.0), (0.3, 0.1, 0.03, 0.01))
FOE = grid((0.03, 0.01, 0.1), (0.1, 0.3, 0.03))
LOGISTIC = grid((0.03, 0.1, 0.3, 1.0), (0.1, 0.01, 0.001))
DECAYING = Cell(0.1, 0.3, 0.3, power=0.5, cosine=250)
CROPS = (DECAYING, *grid((0.1, 0.03, 0.3), (0.1,)), Cell(0.1, 0.01, 0.01))

PROBLEMS: dict[str, Problem] = {
    "tv": Problem(
        "Two parameters of total variation, one photograph of 64 x 64 (Ehrhardt 2025): work to a gap",
        _starts(problems.tv, problems.TV_STARTS),
        TV,
        gaps=(0.01, 0.001),
        seeds=False,
        budget=4000,
        musts=(Must("0.001", 800), Must("0.001", 500, "median")),
    ),
    "foe": Problem(
        "Fields of Experts, 16 filters of 5 x 5, 8 crops of 64 x 64: loss at marks of work",
        _seeds(problems.foe, range(3)),
        FOE,
        marks=(300, 1000, 2000, 5000),
        musts=(Must("1000", 4.33), Must("5000", 4.26)),
    ),
    "foe large": Problem(
        "Fields of Experts, 48 filters of 7 x 7, the same crops: loss at marks of work",
        _seeds(partial(problems.foe, 48, 7), range(1)),
        grid((0.03, 0.01, 0.1), (0.1, 0.3)),
        marks=(300, 1000, 2000),
        musts=(Must("1000", 4.37),),
    ),
    **{
        f"learned TV {kind}": Problem(
            f"Learned discretisation of TV, {kind}, 2 crops of 16 x 16 (Bogensperger et al. 2024): loss at marks",
            _seeds(partial(problems.learned_tv, kind), range(5)),
            cells,
            marks=FILTER_MARKS,
            musts=tuple(Must(str(mark), None, "median") for mark in FILTER_MARKS),
        )
        for kind, cells in LEARNED_TV.items()
    },
    "logistic": Problem(
        "Weight of l2-regularised logistic regression (Pedregosa 2016): work to a gap",
        _starts(problems.logistic, problems.LOGISTIC_STARTS),
        LOGISTIC,
        gaps=(0.01, 0.001),
        seeds=False,
        budget=3000,
        quick=True,
        musts=(Must("0.001", 120), Must("0.001", 400, methods=("HOAG",))),
    ),
    "foe crops": Problem(
        "Fields of Experts, 8 filters of 3 x 3, 400 crops of 40 x 40 in several orders: work to a loss",
        {f"order {order}": partial(problems.foe_crops, order=order) for order in range(3)},
        CROPS,
        losses=(1.55, 1.48, 1.45, 1.43, 1.42),
        budget=300,
        sampled=True,
        musts=(
            Must("1.48", 20),
            Must("1.45", 30),
            Must("1.42", 150),
            *(Must(label, None, seconds=True) for label in ("1.48", "1.45", "1.42")),
        ),
    ),
    "crr crops": Problem(
        "A convex ridge regulariser on the same crops: loss at marks of work",
        {f"order {order}": partial(problems.crr_crops, order=order) for order in range(3)},
        CROPS,
        marks=(20, 60, 150),
        sampled=True,
        musts=tuple(Must(str(mark)) for mark in (20, 60, 150)),
    ),
    "icnn ct": Problem(
        "An input-convex network for tomography by piggyback, 3 slices of 16 x 16: loss at marks of work",
        _seeds(problems.icnn_ct, range(1)),
        grid((0.01, 0.03, 0.1), (0.1, 0.01)),
        marks=(2000, 6000, 20_000),
        musts=tuple(Must(str(mark)) for mark in (2000, 6000, 20_000)),
    ),
    "task adapted": Problem(
        "Total variation and the last layers of a small U-Net for segmentation: loss at marks of work",
        _seeds(problems.task_adapted, range(3)),
        grid((0.03, 0.1, 0.3, 1.0), (0.3, 0.1, 0.03)),
        marks=(300, 1000, 3000),
        musts=tuple(Must(str(mark)) for mark in (300, 1000, 3000)),
    ),
    "wavelets": Problem(
        "Weights of subbands of wavelet coefficients, 4 photographs of 64 x 64 (Villacis 2025): -PSNR at marks of work",
        _seeds(problems.wavelets, range(3)),
        grid((0.03, 0.1, 0.3, 1.0), (0.1, 0.01, 1e-3)),
        marks=(30, 100, 300),
        musts=tuple(Must(str(mark)) for mark in (30, 100, 300)),
        digits=5,
        quick=True,
    ),
    # ------------------------------------------------------- data that no constant of ours was chosen on
    "tv, other photograph": Problem(
        "Two parameters of total variation, astronaut() with noise 0.05: work to a gap",
        _starts(partial(problems.tv, photograph=1, noise=0.05), problems.TV_STARTS[:2] + problems.TV_STARTS[4:5]),
        TV,
        gaps=(0.01, 0.001),
        seeds=False,
        budget=4000,
        held_out=True,
    ),
    "foe, other crops": Problem(
        "Fields of Experts, 16 filters of 5 x 5, other crops and filters: loss at marks of work",
        _seeds(problems.foe, (1003, 2004)),
        FOE,
        marks=(300, 1000, 2000),
        held_out=True,
    ),
    **{
        f"learned TV {kind}, larger": Problem(
            f"Learned discretisation of TV, {kind}, 4 filters, 3 crops of 24 x 24: loss at marks of work",
            _seeds(partial(problems.learned_tv, kind, size=24, count=3, filters=4), (7, 8, 9)),
            cells,
            marks=FILTER_MARKS[:3],
            held_out=True,
        )
        for kind, cells in LEARNED_TV.items()
    },
    "logistic, wine": Problem(
        "Logistic regression, the table wine: work to a gap",
        _starts(partial(problems.logistic, table="wine"), problems.LOGISTIC_STARTS),
        LOGISTIC,
        gaps=(0.01, 0.001),
        seeds=False,
        budget=3000,
        held_out=True,
    ),
}
