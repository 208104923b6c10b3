"""What happens when something goes wrong: damaged files, hostile ones, scans that miss lines.

The page of several scripts, each of which writes its rows to the same file: ``benchmark`` of a row is
"reliability: SCRIPT", and benchmarks/SCRIPT.py renders its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

TITLE = "Reliability"


def render(rows: Sequence[dict]) -> str:
    parts: dict[str, list[dict]] = {}
    for row in rows:
        parts.setdefault(row["benchmark"].partition(": ")[2], []).append(row)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in parts}
    return "\n".join(f"{first_paragraph(modules[name])}\n\n{modules[name].render(own)}" for name, own in parts.items())


def first_paragraph(module) -> str:
    return module.__doc__.strip().split("\n\n")[0]
