"""What one call does on a device: kernels, their time, and copies to the host, from JAX's profiler."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def profile(call: Callable[[], Any]) -> dict[str, Any]:
    """Kernels, milliseconds in them, copies to the host and the three kernels that took longest, of one call.

    ``call`` was run before. Empty where the profiler shows no device (a CPU).
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(call())
        return summary([e for path in Path(folder).rglob("perfetto_trace.json.gz") for e in events(path)])


def events(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        found = json.load(stream)
    return found["traceEvents"] if isinstance(found, dict) else found


def summary(found: list[dict]) -> dict[str, Any]:
    """From the events of a trace: those of processes that are devices, on their streams."""
    named = [e for e in found if e.get("ph") == "M"]
    devices = {e["pid"] for e in named if e["name"] == "process_name" and "/device:" in e["args"]["name"]}
    streams = {
        (e["pid"], e["tid"])
        for e in named
        if e["name"] == "thread_name" and e["pid"] in devices and "Stream" in e["args"]["name"]
    }
    ran = [e for e in found if e.get("ph") == "X" and (e["pid"], e["tid"]) in streams]
    if not ran:
        return {}
    kernels = [e for e in ran if not e["name"].startswith("Mem")]
    longest = Counter()
    for e in kernels:
        longest[e["name"][:60]] += e.get("dur", 0.0)
    return {
        "kernels": len(kernels),
        "kernel_ms": sum(e.get("dur", 0.0) for e in kernels) / 1e3,
        "host_copies": sum(e["name"].startswith("MemcpyD2H") for e in ran),
        "longest": [[name, round(us / 1e3, 4)] for name, us in longest.most_common(3)],
    }
