"""Which method for the upper level? Methods without tuning against the best of a grid of Adam, problem by problem.
Every method starts at the same params and is judged by exact losses, from tight solves that are not counted. Work
counts gradient-equivalents of the lower level per sample (values, gradients and Hessian products count one each);
seconds are those of the processor, without compilation. Adam's best cell of rate and accuracy is picked for each mark
by itself, with the figures that are compared: nobody can do that beforehand, so every comparison favours Adam.

    python benchmarks/upper_level.py --keep --methods MAID --problems tv foe   # one method's rows again
    python benchmarks/upper_level.py --keep --skip                             # what has no row yet
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common, upper_level_page
from benchmarks.upper_level_problems import Setting
from benchmarks.upper_level_runs import Aim, adam, run, sampled_adam
from benchmarks.upper_level_table import ADAM, DRAWING, METHODS, ONLY, PROBLEMS, Problem

NAME = "upper_level"
TITLE = "Upper level: methods against the best of a grid of Adam"
render, figures = upper_level_page.render, upper_level_page.figures


def aim(problem: Problem, setting: Setting, quick: bool) -> Aim:
    """What runs on ``setting`` are to tell; quick ones go to the first mark or target only."""
    targets = {f"{gap:g}": (1 + gap) * setting.goal for gap in problem.gaps}
    targets |= {f"{loss:g}": loss for loss in problem.losses}
    if quick:
        return Aim(problem.marks[:1], dict(list(targets.items())[:1]), budget=200, seconds=5)
    every, least = (1.05, 2.0) if problem.sampled else (1.015, 0.0)  # a look at 400 samples costs as much as its steps
    return Aim(problem.marks, targets, problem.budget, every, least, problem.seconds)


def cells(method: str, problem: Problem, setting: Setting, judge, quick: bool) -> list[dict[str, Any]]:
    """The figures of every run of ``method``: one, or one for each cell of Adam's grid."""
    asked = aim(problem, setting, quick)
    if method != ADAM:
        made = METHODS[method](setting.oracle, projection=setting.projection)
        return [run(setting, made, judge, asked).figures()]
    tried = problem.cells[:2] if quick else problem.cells
    found = (sampled_adam if problem.sampled else adam)(setting, judge, asked, tried)
    return [{"cell": cell._asdict()} | done.figures() for cell, done in found]


def measure(args, recorder: common.Recorder) -> None:
    for name in args.problems:
        problem = PROBLEMS[name]
        instances = list(problem.instances.items())[: args.instances]
        for place, (instance, make) in enumerate(instances):
            again = problem.sampled and place > 0
            methods = [m for m in args.methods if name in ONLY.get(m, (name,)) and not (again and m not in DRAWING)]
            case = {"problem": name, "instance": instance, "held out": problem.held_out}
            left = [m for m in methods if not (args.skip and recorder.kept(case | {"method": m}))]
            if not left:
                continue
            setting = make()
            judge = setting.judge()
            for method in left:
                began = time.process_time()
                found = cells(method, problem, setting, judge, args.quick)
                start = common.number(judge(setting.start))
                recorder.add(case | {"method": method}, {"start": start, "goal": setting.goal, "cells": found})
                recorder.write()
                print(
                    f"{name}, {instance}, {method}: {summary(found)}; {time.process_time() - began:.0f} s", flush=True
                )


def summary(found: list[Mapping[str, Any]]) -> str:
    """The best at each mark or target."""
    parts = []
    for kind in ("marks", "reached"):
        for label in dict.fromkeys(label for cell in found for label in cell.get(kind, {})):
            values = {i: cell[kind][label] for i, cell in enumerate(found) if label in cell.get(kind, {})}
            i = min(values, key=values.__getitem__)
            which = f" ({upper_level_page.cell_name(found[i])})" if "cell" in found[i] else ""
            parts.append(f"{label}: {values[i]:.6g}{which}")
    return "; ".join(parts) or "; ".join(f"{cell['status']} at {cell['work']}: {cell['value']}" for cell in found)


def main(argv=None) -> None:
    names = (*METHODS, ADAM)
    quick = [name for name, problem in PROBLEMS.items() if problem.quick]
    options = common.parser(
        __doc__,
        defaults={"problems": list(PROBLEMS), "methods": list(names), "instances": 100},
        quick={"problems": quick, "methods": ["HOAG", ADAM], "instances": 1},
    )
    options.add_argument("--problems", nargs="+", choices=list(PROBLEMS), metavar="P", help=", ".join(PROBLEMS))
    options.add_argument("--methods", nargs="+", choices=names, metavar="M", help=", ".join(names))
    options.add_argument("--instances", type=int, help="how many starts, seeds or orders of each problem")
    options.add_argument("--skip", action="store_true", help="with --keep: do not measure what is there already")
    common.run(NAME, options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
