"""Section and figures of `upper_level.py`, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import number, rounded, table
from benchmarks.upper_level_runs import Cell
from benchmarks.upper_level_table import ADAM, OURS, PROBLEMS, Must, Problem

COLOURS = {
    "Adam": "#e69f00", "MAID": "#0072b2", "HOAG": "#d55e00", "NBA": "#cc79a7", "QuasiNewton": "#009e73",
    "Stochastic": "#56b4e9",
}  # fmt: skip
PANELS = 3  # instances that are drawn of a problem


EVERY = (
    "### Every problem\n\nMedians over seeds, with the range. A dash: not reached. CPU seconds are those to the last "
    "column of losses or work. Work to a target is that when it was first seen, even where the loss then rises again.\n"
)
CHOICES = (
    "### What it chose, and its first call\n\nAccuracies of the lower level and of the adjoint against the scales of "
    "the start: median of the steps (first to ninth decile), medians over instances, beside those of Adam's best cell "
    "in the last column of each problem, from grids a factor of 3 or 10 apart. First call: the longest compilation. "
    "Compiled later: programs after the first step, in all runs.\n"
)
DRAWN = (
    "Adam gets batches of 16 crops and the last solution of each as its warm start; methods that compare values "
    "get all of them at once. Losses are looked at whenever the work has grown by 2 and by a twentieth.\n"
)


class Score(NamedTuple):
    """What a row has at a mark (its loss) or a target (the work), with the seconds, and the cell that has it."""

    value: float
    seconds: float
    cell: Mapping | None = None


NONE = Score(math.inf, math.inf)


def cell_name(figures: Mapping) -> str:
    return str(Cell(**figures["cell"]))


def labels(problem: Problem) -> list[str]:
    """Keys of marks and targets, as they are in rows."""
    return [*map(str, problem.marks), *(f"{v:g}" for v in (*problem.gaps, *problem.losses))]


def _score(figures: Mapping, label: str) -> Score:
    kind, seconds = ("marks", "mark_seconds") if label in figures.get("marks", {}) else ("reached", "reached_seconds")
    if label not in figures.get(kind, {}):
        return NONE
    value, spent = number(figures[kind][label]), number(figures[seconds][label])
    return NONE if math.isnan(value) else Score(value, spent, figures.get("cell"))


def of(rows: Sequence[dict], name: str) -> dict[str, dict[str, dict]]:
    """{method: {instance: row}} of a problem, methods in the order of colours."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["case"]["problem"] == name:
            found.setdefault(row["case"]["method"], {})[row["case"]["instance"]] = row
    order = list(PROBLEMS[name].instances)
    place = {method: i for i, method in enumerate(COLOURS)}
    return {
        method: dict(sorted(found[method].items(), key=lambda item: order.index(item[0])))
        for method in sorted(found, key=lambda method: place.get(method, len(place)))
    }


def scores(problem: Problem, rows: Mapping[str, dict], label: str, seconds: bool = False) -> dict[str, Score]:
    """Of a method at ``label`` for each instance. Of several cells the best: that of the least median over the seeds
    of a problem; for starts, which are problems of their own, the best from each.
    """
    what = (lambda score: score.seconds) if seconds else (lambda score: score.value)
    columns = {
        name: {str(figures.get("cell")): _score(figures, label) for figures in row["figures"]["cells"]}
        for name, row in rows.items()
    }
    if not problem.seeds:
        return {name: min(column.values(), key=what) for name, column in columns.items()}
    everywhere = [cell for cell in next(iter(columns.values())) if all(cell in column for column in columns.values())]
    best = min(everywhere, key=lambda cell: median([what(column[cell]) for column in columns.values()]))
    return {name: column[best] for name, column in columns.items()}


def median(values: Sequence[float]) -> float:
    """That of numbers some of which may be inf; NaN has no place here."""
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else (low + high) / 2


def on_edge(rows: Mapping[str, dict], found: Mapping[str, Score]) -> str:
    """Which ends of the grid that was tried the best cells are at, beyond which better ones may be."""
    ends = []
    constant = [cell["cell"] for row in rows.values() for cell in row["figures"]["cells"] if not cell["cell"]["cosine"]]
    for what, shown in (("rate", "rates"), ("tol", "accuracies")):
        tried = [cell[what] for cell in constant]
        used = {score.cell[what] for score in found.values() if score.cell and not score.cell["cosine"]}
        ends += [shown] if used & {min(tried), max(tried)} else []
    return " and ".join(ends)


# --------------------------------------------------------------------------------------------------------------- tables


def shown(problem: Problem, value: float, label: str) -> str:
    if math.isinf(value):
        return "–"
    return rounded(value, problem.digits) if label in map(str, problem.marks) else f"{value:,.0f}"


def spread(problem: Problem, found: Mapping[str, Score], label: str) -> str:
    values = [score.value for score in found.values()]
    text = shown(problem, median(values), label)
    if len(values) > 1:
        text += f" ({shown(problem, min(values), label)} to {shown(problem, max(values), label)})"
    return text


def seconds(value: float) -> str:
    return "–" if math.isinf(value) else rounded(value, 2)


def seeds_table(problem: Problem, methods: Mapping[str, Mapping[str, dict]]) -> str:
    """A row for each method: median over seeds and the range, at each mark."""
    header = ["", *(label for label in labels(problem)), "CPU s", "ended"]
    named = {name_of(method): [rows] for method, rows in methods.items()}
    if len(methods.get(ADAM, ())) > 1:
        each = [{instance: row} for instance, row in methods[ADAM].items()]
        named = {name_of(ADAM): [methods[ADAM]], "Adam, best cell of each seed": each} | named
    lines = []
    for name, groups in named.items():  # within each, one cell serves all rows
        found = {label: _merged(scores(problem, rows, label) for rows in groups) for label in labels(problem)}
        spent = seconds(median([score.seconds for score in found[labels(problem)[-1]].values()]))
        values = (spread(problem, found[label], label) for label in found)
        lines.append([name, *values, spent, ends(_merged(groups))])
    return table(header, lines)


def _merged(parts) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def starts_table(problem: Problem, methods: Mapping[str, Mapping[str, dict]]) -> str:
    """A row for each start and method: work to each target, with seconds."""
    header = ["", "", *(f"work to {target(problem, label)}" for label in labels(problem)), "CPU s", "ended"]
    lines = []
    for instance in dict.fromkeys(instance for rows in methods.values() for instance in rows):
        for method, rows in methods.items():
            if instance not in rows:
                continue
            own = {instance: rows[instance]}
            found = [scores(problem, own, label)[instance] for label in labels(problem)]
            values = [shown(problem, score.value, label) for score, label in zip(found, labels(problem), strict=True)]
            lines.append([instance, name_of(method), *values, seconds(found[-1].seconds), ends(own)])
    return table(header, lines)


def target(problem: Problem, label: str) -> str:
    return f"{100 * float(label):g} %" if problem.gaps else label


def name_of(method: str) -> str:
    return "Adam, best cell of each column" if method == ADAM else method


def ends(rows: Mapping[str, dict]) -> str:
    """How runs ended that were not stopped at the last mark or target."""
    found = [cell["status"].lower() for row in rows.values() for cell in row["figures"]["cells"] if "cell" not in cell]
    return ", ".join(dict.fromkeys(status for status in found if status != "stopped")) or "–"


def grid_note(problem: Problem, rows: Mapping[str, dict]) -> str:
    """Which cells are the best, and whether at an end of the grid."""
    parts = []
    for label in labels(problem):
        found = scores(problem, rows, label)
        cells = list(dict.fromkeys(str(Cell(**score.cell)) for score in found.values() if score.cell))
        edge = f", at an end of the {ends} tried" if (ends := on_edge(rows, found)) else ""
        parts.append(f"{target(problem, label)}: {' | '.join(cells) or 'none'}{edge}")
    count = len(next(iter(rows.values()))["figures"]["cells"])
    return f"Adam's best of {count} cells: {'; '.join(parts)}.\n"


# ---------------------------------------------------------------------------------------------------------------- musts


class Verdict(NamedTuple):
    value: float
    limit: float
    met: bool


def verdict(problem: Problem, must: Must, methods: Mapping[str, Mapping[str, dict]], method: str) -> Verdict | None:
    """The figure of ``method`` and its limit; None where one of both was not measured."""
    if method not in methods or (must.limit is None and ADAM not in methods):
        return None

    if must.limit is not None:
        value, limit = _figure(problem, must, methods[method], must.over), must.limit
    else:  # each as a median, of seeds or of orders
        value, limit = (_figure(problem, must, methods[of], "median") for of in (method, ADAM))
    return Verdict(value, limit, value <= limit and math.isfinite(value))


def _figure(problem: Problem, must: Must, rows: Mapping[str, dict], over: str) -> float:
    """What is demanded of rows of one method: their median, or the worst."""
    if not rows:
        return math.inf
    found = scores(problem, rows, must.at, must.seconds).values()
    values = [score.seconds if must.seconds else score.value for score in found]
    return median(values) if over == "median" else max(values)


def must_table(rows: Sequence[dict]) -> str:
    """What every problem demands beside what was measured."""
    present = [m for m in dict.fromkeys((*OURS, "HOAG", "MAID")) if any(row["case"]["method"] == m for row in rows)]
    lines, missed, count = [], 0, 0
    for name, problem in PROBLEMS.items():
        methods = of(rows, name)
        if not methods:
            continue
        for must in problem.musts:
            concerned = must.methods or tuple(m for m in OURS if m in methods)
            found = {m: verdict(problem, must, methods, m) for m in present}
            limit = must.limit if must.limit is not None else _figure(problem, must, methods.get(ADAM, {}), "median")
            cells = []
            for method in present:
                v = found[method]
                text = "–" if v is None else figure_of(problem, must, v.value)
                if v is not None and method in concerned:
                    text += ": met" if v.met else ": **missed**"
                    missed, count = missed + (not v.met), count + 1
                cells.append(text)
            lines.append([name, demand(problem, must), figure_of(problem, must, limit), *cells])
    if not lines:
        return ""
    text = table(["problem", "must", "limit", *present], lines)
    if count:
        text += f"\n{count - missed} of {count} demands are met, **{missed} missed**.\n"
    else:
        text += "\nThe methods that these demands are made of were not measured.\n"
    return text


def figure_of(problem: Problem, must: Must, value: float) -> str:
    return seconds(value) if must.seconds else ("–" if math.isinf(value) else shown(problem, value, must.at))


def demand(problem: Problem, must: Must) -> str:
    what = "CPU s to" if must.seconds else ("loss at" if problem.marks else "work to")
    who = f" ({', '.join(must.methods)})" if must.methods else ""
    over = "median" if must.over == "median" or must.limit is None else "worst"
    return f"{what} {target(problem, must.at)}, {over}{', at most Adam' if must.limit is None else ''}{who}"


# -------------------------------------------------------------------------------------------------------- what it costs


def choices_table(rows: Sequence[dict]) -> str:
    """The accuracies that a method chose beside those of Adam's best cells, and what its first call took."""
    lines, far = [], []
    for name in PROBLEMS:
        methods = of(rows, name)
        own = [row["figures"]["cells"][0] for method in OURS for row in methods.get(method, {}).values()]
        own = [figures for figures in own if "accuracies" in figures]
        if not own:
            continue
        found = scores(PROBLEMS[name], methods[ADAM], labels(PROBLEMS[name])[-1]) if ADAM in methods else {}
        best = [score.cell for score in found.values() if score.cell]
        line = [name]
        for what in ("tol", "adjoint_tol"):
            chosen = [figures["accuracies"][what] for figures in own if what in figures["accuracies"]]
            tried = sorted({cell[what] for cell in best})
            line += [_deciles(chosen), " to ".join(f"{tol:g}" for tol in dict.fromkeys((tried[0], tried[-1])))
                     if tried else "–"]  # fmt: skip
            if chosen and tried:
                middle = median([deciles[1] for deciles in chosen])
                far += [f"{name} ({what})"] if middle > 10 * tried[-1] or middle < tried[0] / 10 else []
        line += [_first_call(methods, method) for method in ("QuasiNewton", "Stochastic", "MAID")]
        line.append(str(sum(figures.get("recompiled", 0) for figures in own)))
        lines.append(line)
    if not lines:
        return ""
    header = ["problem", "accuracy chosen", "Adam's", "of the adjoint", "Adam's", *("QuasiNewton, s", "Stochastic, s"),
              "MAID, s", "compiled later"]  # fmt: skip
    told = f"Further than a decade from every best cell: {', '.join(far) or 'none'}.\n"
    return CHOICES + "\n" + table(header, lines) + "\n" + told


def _deciles(chosen: Sequence[Sequence[float]]) -> str:
    if not chosen:
        return "–"
    low, middle, high = (median([deciles[i] for deciles in chosen]) for i in range(3))
    return f"{middle:.2g} ({low:.2g} to {high:.2g})"


def _first_call(methods: Mapping[str, Mapping[str, dict]], method: str) -> str:
    spent = [row["figures"]["cells"][0]["compile_seconds"] for row in methods.get(method, {}).values()]
    return seconds(max(spent)) if spent else "–"


def hours(rows: Sequence[dict]) -> str:
    """Of the runs on the page, judges apart."""
    spent: dict[str, float] = {}
    for row in rows:
        whose = "grids of Adam" if row["case"]["method"] == ADAM else "methods"
        for figures in row["figures"]["cells"]:
            spent[whose] = spent.get(whose, 0.0) + number(figures["seconds"]) + number(figures["compile_seconds"])
    parts = [f"{whose} {value / 3600:.2f}" for whose, value in sorted(spent.items())]
    return f"CPU hours of all runs with their compilation, without judging: {', '.join(parts)}.\n"


# ----------------------------------------------------------------------------------------------------------------- page


def section(rows: Sequence[dict], name: str) -> str:
    problem, methods = PROBLEMS[name], of(rows, name)
    if not methods:
        return ""
    parts = [f"**{name}.** {problem.title}.\n"]
    parts.append((seeds_table if problem.seeds and problem.marks else starts_table)(problem, methods))
    parts += [DRAWN] if problem.sampled else []
    if ADAM in methods:
        parts.append(grid_note(problem, methods[ADAM]))
    return "\n".join(parts)


def render(rows: Sequence[dict]) -> str:
    known = [row for row in rows if row["case"]["problem"] in PROBLEMS]
    ours = [name for name, problem in PROBLEMS.items() if not problem.held_out]
    others = [name for name, problem in PROBLEMS.items() if problem.held_out]
    parts = []
    if demands := must_table(known):
        parts += [
            "### What it must show\n\nLimits that were set beforehand, beside what was measured; where a limit is "
            "Adam's, it is that of the best cell at that very mark.\n",
            demands,
        ]
    parts += [part for part in (choices_table(known), hours(known)) if part]
    parts += [EVERY]
    parts += [section(known, name) for name in ours]
    if any(of(known, name) for name in others):
        parts += [
            "### Held out\n\nData that was not used while the constants of our methods were chosen; the grids of Adam "
            "are as large as above.\n"
        ]
        parts += [section(known, name) for name in others]
    parts += [f"![{name}](figures/{picture(name)})\n" for name in PROBLEMS if of(known, name)]
    return "\n".join(part for part in parts if part)


# -------------------------------------------------------------------------------------------------------------- figures


def picture(name: str) -> str:
    return f"upper_level_{name.replace(',', '').replace(' ', '_').lower()}.png"


def figures(rows: Sequence[dict], folder: Path) -> None:
    folder = Path(folder)
    for name in PROBLEMS:
        methods = of(rows, name)
        if methods:
            folder.mkdir(parents=True, exist_ok=True)
            _curves(PROBLEMS[name], name, methods).savefig(folder / picture(name), dpi=80, metadata={"Software": None})


def _curves(problem: Problem, name: str, methods: Mapping[str, Mapping[str, dict]]) -> Any:
    """Loss (or its distance to the least) against work and against seconds, a column for each instance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    instances = list(dict.fromkeys(instance for rows in methods.values() for instance in rows))[:PANELS]
    figure = Figure(figsize=(max(5.6, 1.2 + 2.6 * len(instances)), 5.0), layout="constrained")
    panels = figure.subplots(2, len(instances), squeeze=False, sharey="col")
    for column, instance in zip(panels.T, instances, strict=True):
        for method, rows in methods.items():
            if instance in rows:
                for axes, place in zip(column, (0, 1), strict=True):
                    _draw(axes, rows[instance], method, place)
        row = next(rows[instance] for rows in methods.values() if instance in rows)
        for axes, what in zip(column, ("gradient-equivalents per sample", "CPU seconds"), strict=True):
            goal = row["figures"].get("goal") is not None
            axes.set(xscale="log", xlabel=what, yscale="log" if goal else "linear")
            axes.grid(alpha=0.25)
            for axis in (axes.xaxis, *((axes.yaxis,) if goal else ())):
                axis.set_minor_formatter(NullFormatter())  # within a decade or two they would overlap
            if goal:
                axes.set_ylim(3e-4, None)
        for mark in problem.marks:
            column[0].axvline(mark, color="0.6", lw=0.6, ls=":")
        for level in (*problem.gaps, *problem.losses):
            column[0].axhline(level, color="0.6", lw=0.6, ls=":")
        column[0].set_title(instance, fontsize=9)
        _zoom(column, rows_of=[rows[instance] for rows in methods.values() if instance in rows])
    for axes in panels[:, 0]:
        axes.set_ylabel("gap, best so far" if row["figures"].get("goal") is not None else "loss")
    handles = {label: h for h, label in zip(*panels[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(name, fontsize=10)
    return figure


def _draw(axes, row: dict, method: str, place: int) -> None:
    """Curves of all cells that have one: those of Adam that are the best somewhere, thin."""
    goal = row["figures"].get("goal")
    for cell in row["figures"]["cells"]:
        if "curve" not in cell:
            continue
        curve = np.array([[number(v) for v in point] for point in cell["curve"]])
        y = curve[:, 2] if goal is None else np.minimum.accumulate(np.maximum(curve[:, 2] / goal - 1, 1e-6))
        label = "Adam, cells that are best somewhere" if method == ADAM else method
        style = {"lw": 0.9, "alpha": 0.8} if method == ADAM else {"lw": 1.6}
        axes.plot(curve[1:, place], y[1:], label=label, color=COLOURS.get(method, "0.3"), **style)


def _zoom(column, rows_of: Sequence[dict]) -> None:
    """Where the loss has no least value that is known: from the lowest curve halfway to the start."""
    if rows_of[0]["figures"].get("goal") is not None:
        return
    curves = [cell["curve"] for row in rows_of for cell in row["figures"]["cells"] if "curve" in cell]
    values = [number(point[2]) for curve in curves for point in curve]
    values = [value for value in values if math.isfinite(value)]
    if values:
        start = number(rows_of[0]["figures"]["start"])
        low = min(values)
        column[0].set_ylim(low - 0.02 * abs(start - low), low + 0.5 * abs(start - low))
