"""The benchmark of upper-level methods tells what runs did: marks, targets, grids and demands, on known losses."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb
from jbilevel._method import probing

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common  # noqa: E402
from benchmarks import upper_level_page as page
from benchmarks.upper_level_problems import Setting  # noqa: E402
from benchmarks.upper_level_runs import (  # noqa: E402
    POINTS,
    Aim,
    Cell,
    Sampled,
    Watch,
    adam,
    best,
    grid,
    programs,
    run,
    sampled_adam,
    shuffled,
)
from benchmarks.upper_level_table import ADAM, METHODS, ONLY, PROBLEMS, Must, Problem  # noqa: E402

TRACES = []


def energy(p, x, d):
    return 0.5 * (x - p * d["y"]) ** 2


def loss(p, x, d):
    TRACES.append(None)
    return 0.5 * (x - 3.0) ** 2


def quadratic(y=(1.0, 2.0), start=5.0, **settings) -> Setting:
    """x_hat = p y, so the mean loss is mean (p y - 3)^2/2."""
    problem = jb.SmoothProblem(energy, lambda p, d: 0.0 * d["y"], strong_convexity=1.0)
    oracle = problem.oracle(loss, solver=jb.solvers.AGD())
    return Setting("quadratic", oracle, {"y": jnp.array(y)}, jnp.array(start), tight=1e-10, **settings)


def exact(p, y=(1.0, 2.0)) -> float:
    return float(np.mean((p * np.array(y) - 3.0) ** 2) / 2)


def watched(aim, values, leader=None, work=10.0):
    """A run of scripted steps, of `work` for both samples, after which params are p = 1, 2, ... of loss values[p]."""
    watch = Watch(quadratic(start=0.0), lambda p: float(values[int(p)]), aim, leader)
    for k in range(len(values) - 1):
        state = SimpleNamespace(params=jnp.array(k + 1.0))
        if watch(k, state, SimpleNamespace(work=work, value=values[k], tol=0.1, adjoint_tol=0.2)):
            break
    ended = {"steps": k + 1, "status": "CONVERGED", "message": "", "compile_seconds": 0.0}
    return watch.run(**ended, params=state.params), watch


# ----------------------------------------------------------------------------------------------------------- one run


def test_a_mark_has_the_params_before_the_step_that_passed_it():
    done, _ = watched(Aim(marks=(12, 25)), [100, 90, 80, 70, 60, 50, 40, 30])  # 5 per sample and step
    assert done.marks == {12: 80.0, 25: 50.0}  # 15 > 12 after three steps; exactly 25 after five does not pass
    assert done.work == 30.0 and done.steps == 6


def test_a_run_that_ends_by_itself_stands_still_for_the_marks_that_are_left():
    done, _ = watched(Aim(marks=(12, 1000)), [100, 90, 80, 70])
    assert done.marks == {12: 80.0, 1000: 70.0} and done.value == 70.0


def test_targets_have_the_work_at_which_they_are_first_met():
    done, _ = watched(Aim(targets={"far": 45.0, "near": 80.0}), [100, 90, 85, 80, 81, 40, 20])
    assert done.reached == {"near": 15.0, "far": 25.0}
    assert done.work == 25.0  # nothing is left to see


def test_looks_are_apart_by_the_least_work():
    values = [100, 90, 85, 80, 40, 40, 20, 20]
    done, _ = watched(Aim(targets={"far": 45.0}, least=12.0), values)  # looks at 15 and 30, not at 20
    assert done.reached == {"far": 30.0}


def test_both_targets_may_be_met_at_once():
    done, _ = watched(Aim(targets={"a": 80.0, "b": 60.0}), [100, 50, 40])
    assert done.reached == {"a": 5.0, "b": 5.0}


@pytest.mark.parametrize(
    "aim, values, leader, why",
    [
        (Aim(marks=(12, 1000)), [100, 90, 2000, 70, 60], None, "diverged"),
        (Aim(marks=(12, 1000)), [100, 90, math.nan, 70, 60], None, "diverged"),
        (Aim(marks=(12, 1000)), [100, 90, 80, 70, 60], {12: 50.0}, "far behind"),
        (Aim(targets={"a": 10.0}, budget=14), [100, 90, 80, 70, 60, 5], None, "the budget is spent"),
        (Aim(marks=(1000,), seconds=-1.0), [100, 90, 80], None, "-1 s are over"),
    ],
)
def test_hopeless_runs_end_and_claim_nothing_later(aim, values, leader, why):
    done, watch = watched(aim, values, leader)
    assert watch.why == why
    assert 1000 not in done.marks and "a" not in done.reached


def test_a_cell_that_is_only_somewhat_behind_goes_on():
    done, watch = watched(Aim(marks=(12, 20)), [100, 90, 80, 70, 60, 50], {12: 78.0})  # 2 of 22 lacking
    assert watch.why == "" and 20 in done.marks


def test_negative_losses_diverge_upwards_only():
    _, watch = watched(Aim(marks=(12,)), [-20, -25, -30, -35])
    assert watch.why == ""


def test_curves_are_thinned_and_begin_at_the_start():
    values = np.linspace(100, 1, 400)
    _, watch = watched(Aim(marks=(1900,)), values)
    curve = watch.curve()
    assert curve[0] == [0.0, 0.0, 100.0] and 20 < len(curve) <= POINTS
    for work, _, value in curve[1:]:
        assert value == values[round(work / 5)]


def test_judging_costs_neither_work_nor_time():
    def slow(p):
        return sum(i % 7 for i in range(300_000)) and 1.0

    watch = Watch(quadratic(), slow, Aim(targets={"a": 0.0}, budget=100))
    for k in range(20):
        watch(
            k, SimpleNamespace(params=jnp.array(1.0)), SimpleNamespace(work=10.0, value=1.0, tol=0.1, adjoint_tol=0.1)
        )
    assert watch.apart > 20 * watch.seconds()


def test_judge_is_the_closed_form_also_after_params_that_are_not_finite():
    judge = quadratic().judge()
    for p in (5.0, math.nan, -2.0):
        wanted = exact(p) if math.isfinite(p) else math.inf
        assert judge(jnp.array(p)) == pytest.approx(wanted, rel=1e-5)


def test_fit_to_marks_and_targets():
    setting = quadratic()
    judge = setting.judge()
    method = jb.FirstOrder(setting.oracle, optax.sgd(0.2), tol=1e-8, adjoint_tol=1e-8)
    goal = exact(9 / 5 / 1)  # mean y^2 p = 3 mean y
    done = run(setting, method, judge, Aim(targets={"0.01": 1.01 * goal}, budget=10**4))
    params, reached = 5.0, 0
    while exact(params) > 1.01 * goal:
        params -= 0.2 * np.mean([(params * y - 3) * y for y in (1.0, 2.0)])
        reached += 1
    assert done.steps == reached and done.reached["0.01"] == done.work and done.status == "STOPPED"
    assert done.value == pytest.approx(exact(params), rel=1e-5)
    figures = json.loads(json.dumps(done.figures()))
    assert figures["reached"]["0.01"] == pytest.approx(done.work) and "marks" not in figures


def test_a_run_tells_its_accuracies_and_what_was_compiled_later():
    setting = quadratic()
    done = run(setting, jb.QuasiNewton(setting.oracle), setting.judge(), Aim(marks=(20,)))
    scales = setting.oracle.scales(setting.start, setting.batch)
    first = done.accuracies["tol"][2] * float(scales.solution)
    assert done.recompiled == 0 and first == pytest.approx(probing.FIRST * float(scales.solution), rel=1e-6)
    with programs() as seconds:
        jax.block_until_ready(jax.jit(lambda x: 3 * x + 1)(jnp.arange(3.0)))
    assert seconds


def test_half_a_run_is_no_row(monkeypatch):
    setting = quadratic()
    method, whole = jb.FirstOrder(setting.oracle, optax.sgd(0.2), tol=1e-2, adjoint_tol=1e-2), jb.fit

    def interrupted(*arguments, **options):
        return dataclasses.replace(whole(*arguments, **options), status=jb.FitStatus.INTERRUPTED)

    monkeypatch.setattr(jb, "fit", interrupted)
    with pytest.raises(SystemExit):
        run(setting, method, setting.judge(), Aim(marks=(20,)))


# -------------------------------------------------------------------------------------------------------------- grids


def test_cells_are_what_fit_does_with_the_same_adam_and_compile_once():
    setting, cells = quadratic(), grid((0.1, 0.3), (1e-3, (1e-2, 1e-4)))
    judge, aim = setting.judge(), Aim(marks=(150,))
    adam(setting, judge, aim, cells[:1])
    before = len(TRACES)
    found = adam(setting, judge, aim, cells)
    assert len(TRACES) == before  # traced rates and accuracies
    scales = setting.oracle.scales(setting.start, setting.batch)
    for cell, done in found:
        accuracy = {"tol": cell.tol * float(scales.solution), "adjoint_tol": cell.adjoint_tol * float(scales.adjoint)}
        method = jb.FirstOrder(setting.oracle, optax.adam(cell.rate), **accuracy)
        other = run(setting, method, judge, aim)
        assert done.work == other.work and done.steps == other.steps
        assert done.marks[150] == pytest.approx(other.marks[150], rel=1e-4)
    assert len({done.marks[150] for _, done in found}) > 1


def test_curves_are_kept_of_the_best_cells_alone():
    setting = quadratic()
    found = adam(setting, setting.judge(), Aim(marks=(60, 300)), grid((1e-4, 0.3), (1e-3,)))
    assert [bool(done.curve) for _, done in found] == [False, True]


def test_best_by_mark_and_by_target():
    runs = [SimpleNamespace(marks=m, reached=r) for m, r in (({1: 5.0, 2: 3.0}, {}), ({1: 4.0}, {"a": 7.0}))]
    assert best(runs) == {0, 1}
    assert best([*runs, SimpleNamespace(marks={1: 1.0, 2: 1.0}, reached={"a": 1.0})]) == {2}


def test_names_of_cells():
    assert str(Cell(0.1, 0.01, 0.01)) == "rate 0.1, accuracy 0.01"
    assert str(Cell(0.1, 0.3, 0.2, 0.5, 250)) == "rate 0.1, cosine 250, accuracy 0.3, 0.2 / epoch^0.5"


def test_every_pass_holds_every_sample_once_in_an_order_of_its_own():
    setting = quadratic(np.arange(12.0))
    batches = shuffled(setting, 4)
    passes = [np.concatenate([batches(3 * epoch + k)["index"] for k in range(3)]) for epoch in range(2)]
    assert [sorted(order) for order in passes] == [list(range(12))] * 2 and list(passes[0]) != list(passes[1])
    np.testing.assert_array_equal(batches(4)["y"], batches(4)["index"])
    other = shuffled(quadratic(np.arange(12.0), order=1), 4)
    assert list(other(0)["index"]) != list(batches(0)["index"])


@pytest.mark.parametrize("rate", [0.01, optax.cosine_decay_schedule(0.01, 6)], ids=["constant", "cosine"])
def test_accuracies_fall_with_the_passes(rate):
    setting = quadratic(np.arange(1.0, 9.0), start=0.5)
    method = Sampled(setting.oracle, optax.adam(rate), tol=0.4, adjoint_tol=0.2, epoch=2, power=0.5)
    history = jb.fit(method, setting.start, shuffled(setting, 4), steps=6).history
    passes = np.array([1, 1, 2, 2, 3, 3])
    np.testing.assert_allclose(history["tol"], 0.4 / np.sqrt(passes), rtol=1e-5)
    np.testing.assert_allclose(history["adjoint_tol"], 0.2 / np.sqrt(passes), rtol=1e-5)


def test_work_on_batches_is_per_sample_of_the_whole_set():
    setting = quadratic(np.arange(1.0, 9.0), start=0.5)
    (_, done), *_ = sampled_adam(setting, setting.judge(), Aim(marks=(30,)), [Cell(0.05, 0.1, 0.1)], size=2)
    steps = jb.fit(
        Sampled(setting.oracle, optax.adam(0.05), tol=0.1 * scale(setting)[0], adjoint_tol=0.1 * scale(setting)[1]),
        setting.start, shuffled(setting, 2), steps=done.steps,
    )  # fmt: skip
    assert done.work == pytest.approx(steps.work / 8) and 30 < done.work < 40


def scale(setting):
    return tuple(float(f"{float(v):.6g}") for v in setting.oracle.scales(setting.start, setting.batch))


# --------------------------------------------------------------------------------------------------------------- page


def test_problems_demand_what_is_measured():
    for name, problem in PROBLEMS.items():
        assert {must.at for must in problem.musts} <= set(page.labels(problem)), name
        assert bool(problem.marks) + bool(problem.gaps) + bool(problem.losses) == 1
        assert not (problem.held_out and problem.musts)
        assert len(set(problem.cells)) == len(problem.cells)
    assert set(METHODS) <= set(page.COLOURS)
    assert {name for names in ONLY.values() for name in names} <= set(PROBLEMS)


def row(method, instance, cells, problem="foe", goal=None):
    """cells: of Adam {rate: figures}, else figures."""
    several = [{"cell": Cell(rate, 0.1, 0.1)._asdict()} | figures for rate, figures in cells.items()] if (
        method == ADAM
    ) else [{"status": "STALLED"} | cells]  # fmt: skip
    case = {"problem": problem, "instance": instance, "method": method, "held out": False}
    return {"case": case, "figures": {"start": 7.0, "goal": goal, "cells": several}}


def at(**marks):
    """Figures with losses at marks and seconds that are a hundredth of the mark."""
    values = {key[1:]: value for key, value in marks.items()}
    spent = {"seconds": 50.0, "compile_seconds": 2.0}
    return {"marks": values, "mark_seconds": {key: float(key) / 100 for key in values}} | spent


ADAMS = [
    row(ADAM, "seed 0", {0.03: at(_1000=4.0, _5000=3.9), 0.01: at(_1000=4.4, _5000=3.5)}),
    row(ADAM, "seed 1", {0.03: at(_1000=4.6, _5000=4.5), 0.01: at(_1000=4.5, _5000=3.6)}),
    row(ADAM, "seed 2", {0.03: at(_1000=4.2, _5000=4.1), 0.01: at(_1000=4.8, _5000=3.7)}),
]


def test_one_cell_of_adam_serves_all_seeds_but_each_mark_has_its_own():
    rows = page.of(ADAMS, "foe")[ADAM]
    early = page.scores(PROBLEMS["foe"], rows, "1000")
    assert [score.value for score in early.values()] == [4.0, 4.6, 4.2]
    late = page.scores(PROBLEMS["foe"], rows, "5000")
    assert [(score.value, score.seconds, score.cell["rate"]) for score in late.values()] == [
        (3.5, 50.0, 0.01), (3.6, 50.0, 0.01), (3.7, 50.0, 0.01)
    ]  # fmt: skip
    missing = page.scores(PROBLEMS["foe"], rows, "300")
    assert all(math.isinf(score.value) for score in missing.values())


def test_every_start_has_its_own_cell():
    reached = lambda work: {"reached": {"0.001": work}, "reached_seconds": {"0.001": work / 10}}  # noqa: E731
    rows = [
        row(ADAM, "from 0", {0.1: reached(36.0), 0.3: {}}, "logistic", 18.0),
        row(ADAM, "from 3", {0.1: {}, 0.3: reached(194.0)}, "logistic", 18.0),
    ]
    found = page.scores(PROBLEMS["logistic"], page.of(rows, "logistic")[ADAM], "0.001")
    assert [score.value for score in found.values()] == [36.0, 194.0]
    own = page.of(rows, "logistic")[ADAM]
    assert page.on_edge(own, found) == "rates and accuracies"  # both rates and the one accuracy are ends


def test_ends_of_a_grid_are_those_that_were_tried():
    cells = [{"cell": cell._asdict()} for cell in (*grid((0.1, 0.3, 1.0), (0.1, 0.01, 0.001)), Cell(9, 9, 9, cosine=5))]
    rows = {"seed 0": {"figures": {"cells": cells}}}
    shown = {(0.3, 0.01): "", (0.1, 0.01): "rates", (0.3, 0.001): "accuracies", (1.0, 0.1): "rates and accuracies"}
    for (rate, tol), ends in shown.items():
        assert page.on_edge(rows, {"seed 0": page.Score(1.0, 1.0, Cell(rate, tol, tol)._asdict())}) == ends
    assert page.on_edge(rows, {"seed 0": page.Score(1.0, 1.0, cells[-1]["cell"]), "seed 1": page.NONE}) == ""


def test_verdicts_by_limit_and_by_the_best_cell():
    methods = page.of([*ADAMS, row("HOAG", "seed 0", at(_1000=4.0)), row("HOAG", "seed 1", at(_1000=4.5))], "foe")
    problem = PROBLEMS["foe"]
    assert page.verdict(problem, Must("1000", 4.5), methods, "HOAG") == (4.5, 4.5, True)
    assert page.verdict(problem, Must("1000", 4.3), methods, "HOAG") == (4.5, 4.3, False)
    assert page.verdict(problem, Must("1000", 4.3, "median"), methods, "HOAG") == (4.25, 4.3, True)
    assert page.verdict(problem, Must("1000"), methods, "HOAG") == (4.25, 4.2, False)  # Adam's median, of one cell
    assert page.verdict(problem, Must("5000", 4.0), methods, "HOAG") == (math.inf, 4.0, False)  # never got there
    assert page.verdict(problem, Must("1000", 9.0, seconds=True), methods, "HOAG") == (10.0, 9.0, False)
    assert page.verdict(problem, Must("1000", 4.0), methods, "MAID") is None


def test_the_page_says_what_is_missed(monkeypatch):
    monkeypatch.setattr(page, "OURS", ("HOAG",))
    rows = [
        *ADAMS,
        *(row("HOAG", f"seed {k}", at(_300=5.0, _1000=4.32 + k / 100, _2000=4.3, _5000=4.2)) for k in range(3)),
    ]
    text = page.render(rows)
    assert "| foe | loss at 1000, worst | 4.330 | 4.340: **missed** |" in text
    assert "| foe | loss at 5000, worst | 4.260 | 4.200: met |" in text
    assert "1 of 2 demands are met, **1 missed**." in text
    assert "| HOAG | 5.000 (5.000 to 5.000) | 4.330 (4.320 to 4.340) |" in text and "| stalled |" in text
    assert "5000: rate 0.01, accuracy 0.1, at an end of the rates and accuracies tried" in text
    assert "1000: rate 0.03, accuracy 0.1, at an end" in text
    # 4.0, 4.6 and 4.2 with one cell; 4.0, 4.5 and 4.2 with one for each seed
    one, each = [next(line for line in text.splitlines() if line.startswith(f"| Adam, best cell of each {what} ")) for
                 what in ("column", "seed")]  # fmt: skip
    assert "| 4.200 (4.000 to 4.600) |" in one and "| 4.200 (4.000 to 4.500) |" in each


def test_what_was_not_measured_is_not_missed():
    text = page.render(ADAMS)
    assert "missed" not in text and "were not measured" in text


def test_choices_are_beside_those_of_the_best_cells():
    chosen = {"accuracies": {"tol": [0.05, 0.2, 0.4], "adjoint_tol": [1e-4, 1e-3, 2e-3]}, "recompiled": 0}
    text = page.choices_table([*ADAMS, row("QuasiNewton", "seed 0", at(_1000=4.0) | chosen)])
    assert "| foe | 0.2 (0.05 to 0.4) | 0.1 | 0.001 (0.0001 to 0.002) | 0.1 | 2.0 | – | – | 0 |" in text
    assert "Further than a decade from every best cell: foe (adjoint_tol)." in text
    assert not page.choices_table(ADAMS)
    assert "grids of Adam 0.09" in page.hours(ADAMS)  # 6 cells of 52 s


def test_median_of_what_was_not_always_reached():
    assert page.median([3.0, math.inf, 1.0]) == 3.0
    assert page.median([3.0, 1.0]) == 2.0
    assert math.isinf(page.median([1.0, math.inf])) and math.isinf(page.median([math.inf, math.inf]))


def test_pictures_are_drawn_and_named_on_the_page(tmp_path):
    curve = [[0.0, 0.0, 7.0], [10.0, 0.1, 6.0], [100.0, 1.0, 5.0]]
    rows = [row("HOAG", "seed 0", at(_300=5.0) | {"curve": curve}), *ADAMS]
    page.figures(rows, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["upper_level_foe.png"]
    assert "(figures/upper_level_foe.png)" in page.render(rows)


def test_committed_rows_are_small():
    path = common.RESULTS / "upper_level.jsonl"
    assert path.stat().st_size < 1_500_000
    for found in common.read_rows(path):
        assert all(len(cell.get("curve", ())) <= POINTS for cell in found["figures"]["cells"])


def test_a_problem_may_stand_for_itself():
    problem = Problem("two", {"seed 0": quadratic}, grid((0.1,), (0.1,)), marks=(30,))
    assert page.labels(problem) == ["30"] and page.target(problem, "30") == "30"
