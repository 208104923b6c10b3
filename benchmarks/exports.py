"""Which programs of the library leave a GPU to itself: no call back to the host, no library call, few conditionals.
Each is lowered for CUDA by `jax.export`, without a GPU, on tiny shapes in float32. A callback, and a conditional in a
loop, cost a round trip to the host each time; a custom call is code that XLA neither sees nor fuses.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import common
from benchmarks.programs import CASES, Case

NAME = "exports"
TITLE = "Programs lowered for CUDA"


# ----------------------------------------------------------------------------------------------------------- counting


class Counts(NamedTuple):
    """What one lowered program holds."""

    custom_calls: dict[str, int]  # by target
    conditionals: dict[str, int]  # decided while the program runs, by the file that made them
    in_loops: dict[str, int]  # those of them inside a loop
    settled: int  # conditionals that decide nothing, which XLA removes
    loops: int

    @property
    def callbacks(self) -> int:
        return sum(count for name, count in self.custom_calls.items() if "python" in name)


class Operation(NamedTuple):
    """An operation of a module, the function that it stands in, and whether a loop of that function holds it."""

    op: Any
    function: str
    looped: bool

    @property
    def name(self) -> str:
        return self.op.operation.name

    def symbol(self, attribute: str) -> str:
        return self.op.operation.attributes[attribute].value


def lowered(function: Callable, arguments: tuple, platform: str):
    """The StableHLO module of ``function`` for a platform, which this machine need not have."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")


def operations(module) -> Iterator[Operation]:
    """All operations, each after those that it depends on."""

    def inside(op, function, looped):
        for region in op.operation.regions:
            for block in region:
                for inner in block:
                    yield Operation(inner, function, looped)
                    yield from inside(inner, function, looped or inner.operation.name == "stablehlo.while")

    for function in module.body:
        yield from inside(function, function.operation.attributes["sym_name"].value, False)


def called_in_loops(found: Sequence[Operation]) -> set[str]:
    """Names of the functions that a loop calls, through other functions too."""
    calls = [(call.function, call.symbol("callee"), call.looped) for call in found if call.name == "func.call"]
    reached = {callee for _, callee, looped in calls if looped}
    while more := {callee for caller, callee, _ in calls if caller in reached} - reached:
        reached |= more
    return reached


def count(module) -> Counts:
    found = list(operations(module))
    constants = {each.op.operation.results[0] for each in found if each.name == "stablehlo.constant"}
    in_loops = called_in_loops(found)
    cases = [each for each in found if each.name == "stablehlo.case"]
    open_cases = [each for each in cases if not settled(each.op.operation, constants)]
    return Counts(
        dict(Counter(each.symbol("call_target_name") for each in found if each.name == "stablehlo.custom_call")),
        dict(Counter(map(origin, open_cases))),
        dict(Counter(origin(each) for each in open_cases if each.looped or each.function in in_loops)),
        len(cases) - len(open_cases),
        sum(each.name == "stablehlo.while" for each in found),
    )


def settled(case, constants: set) -> bool:
    """One branch, a predicate known beforehand, or branches without any computation: what a choice by platform
    (`jax.lax.platform_dependent`) leaves behind, whose number loops may carry along."""
    branches = [inner.operation.name for region in case.regions for block in region for inner in block]
    idle = set(branches) <= {"stablehlo.constant", "stablehlo.return"}
    return len(case.regions) == 1 or case.operands[0] in constants or idle


def origin(operation: Operation) -> str:
    """The file whose call made an operation: within the package, or its name."""
    file = re.search(r'"([^"]+\.py)":\d+', str(operation.op.location))
    path = Path(file.group(1)) if file else Path("unknown")
    package = common.ROOT / "jbilevel"
    return path.relative_to(package).as_posix() if path.is_relative_to(package) else path.name


def export(function: Callable, arguments: tuple, platform: str = "cuda") -> bytes:
    """The program as `jax.export` serialises it, which it refuses to do with a callback."""
    return jax.export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module_serialized


def measure(case: Case) -> dict:
    """Counts for both platforms; None for CUDA where a callback forbids the export."""
    with common.precision("float32"):
        program = case.build("float32")
        jitted = jax.jit(program.function)
        cpu = count(lowered(jitted, program.arguments, "cpu"))
        if cpu.callbacks:
            return {"callbacks": cpu.callbacks, "cpu": cpu._asdict(), "cuda": None, "bytes": None}
        size = len(export(jitted, program.arguments))
        cuda = count(lowered(jitted, program.arguments, "cuda"))
    return {"callbacks": cuda.callbacks, "cpu": cpu._asdict(), "cuda": cuda._asdict(), "bytes": size}


# ------------------------------------------------------------------------------------------------------------ the page


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "0"


def conditionals(counts: dict) -> str:
    """How many, of which files, and how many of them in loops."""
    total, looped = (sum(counts[key].values()) for key in ("conditionals", "in_loops"))
    return f"{listed(counts['conditionals'])}; {looped} in loops" if total else "0"


def render(rows: Sequence[dict]) -> str:
    header = ["kind", "program", "custom calls", "callbacks", "conditionals on CUDA", "on a CPU", "loops", "kB"]
    lines = []
    for row in rows:
        figures, cpu = row["figures"], row["figures"]["cpu"]
        cuda = figures["cuda"]
        shown = [listed(cuda["custom_calls"]), figures["callbacks"], conditionals(cuda)] if cuda else None
        lines.append([
            row["case"]["kind"], row["case"]["name"], *(shown or ["–", figures["callbacks"], "–"]),
            sum(cpu["conditionals"].values()), (cuda or cpu)["loops"],
            common.whole(1e-3 * figures["bytes"]) if cuda else "–",
        ])  # fmt: skip
    return "\n".join([common.table(header, lines), summary(rows)])


def summary(rows: Sequence[dict]) -> str:
    """The table in sentences."""

    def names(chosen) -> str:
        return ", ".join(f"`{row['case']['name']}`" for row in chosen) or "none"

    exported = [row for row in rows if row["figures"]["cuda"]]

    def with_some(key: str) -> str:
        return names(row for row in exported if row["figures"]["cuda"][key])

    cpu = sum(bool(row["figures"]["cpu"]["conditionals"]) for row in rows)
    settled = sum(row["figures"]["cuda"]["settled"] for row in exported)
    return (
        f"Of {len(rows)} programs, {len(exported)} export for CUDA. With a callback, which cannot be exported: "
        f"{names(row for row in rows if row['figures']['callbacks'])}. With a custom call: "
        f"{with_some('custom_calls')}. With a conditional: {with_some('conditionals')}; inside a loop: "
        f"{with_some('in_loops')}. On a CPU {cpu} programs have one. Not counted are {settled} conditionals that "
        "decide nothing, which a choice by platform leaves behind and XLA removes. Sizes are those of the serialised "
        "modules.\n"
    )


def main(argv=None) -> None:
    options = common.parser(__doc__, defaults={"dtype": ["float32"]}, quick={})
    options.add_argument("--programs", nargs="+", choices=list(CASES), metavar="NAME", help="some of them only")
    args = common.parse(options, argv)
    chosen = args.programs or [name for name, case in CASES.items() if not args.quick or case.quick]
    recorder = common.Recorder(NAME, args)
    for name in chosen:
        case = CASES[name]
        if case.needs and importlib.util.find_spec(case.needs) is None:
            print(f"{name}: {case.needs} is not installed, left out", flush=True)
            continue
        figures = measure(case)
        with common.precision("float32"):
            recorder.add({"kind": case.kind, "name": name}, figures)
        recorder.write()
        print(f"{case.kind}: {name}", flush=True)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
