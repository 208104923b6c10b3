"""The prepared run for a GPU: it brings all that it needs, keeps what it measured, and reads a profile right."""

import gzip
import json

import numpy as np
import pytest

from benchmarks import common, gpu, gpu_page, gpu_profile, hypergradients

DEFAULTS = ((256, 1), (256, 8), (256, 64))


@pytest.mark.parametrize("size, count", (*DEFAULTS, (16, 2)))
def test_settings_travel_for_every_row(size, count):
    found = gpu.prepared(size, count)
    assert np.all(np.isfinite(found["exact"])) and len(found["exact"]) == 2
    for name in gpu.ROWS:
        wanted = {"steps"} if hypergradients.ROWS[name].tuned == "steps" else {"tol", "adjoint_tol"}
        assert set(found["settings"][name]) == wanted


def test_a_case_without_settings_says_what_to_run():
    with pytest.raises(SystemExit, match="--prepare"):
        gpu.prepared(17, 3)


def run(tmp_path, *arguments):
    out = tmp_path / "gpu.jsonl"
    gpu.main(["--device", "cpu", "--quick", "--out", str(out), *arguments])
    return common.read_rows(out) if out.exists() else []


def test_quick_rows_reach_the_target_and_render(tmp_path):
    rows = run(tmp_path, "--parts", "hypergradients", "pdhg", "projectors", "--rows", "implicit", "one step")
    assert [row["case"]["part"] for row in rows] == ["hypergradients"] * 2 + ["pdhg"] * 2 + ["projectors"] * 2
    assert all(row["x64"] is False for row in rows)
    implicit, one_step = (row["figures"] for row in rows[:2])
    assert implicit["error"] <= 1e-3 < one_step["error"]
    assert rows[2]["figures"]["steps"] == 20  # a tolerance of 0 takes them all
    page = gpu_page.render(rows)
    assert "At the target error: implicit" in page and "copy GB/s" in page and "FP 16² x 6" in page


def test_no_part_begins_after_its_time(tmp_path, capsys):
    assert run(tmp_path, "--seconds", "0", "--parts", "pdhg") == []
    assert "no time left for pdhg" in capsys.readouterr().out


def test_a_missing_peer_costs_its_row_only(monkeypatch, capsys):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert not gpu._present("jaxopt L-BFGS") and gpu._present("implicit")
    assert "jaxopt is missing" in capsys.readouterr().out


def event(pid, tid, name, dur=None, **more):
    return {"pid": pid, "tid": tid, "name": name, **({"ph": "X", "ts": 0, "dur": dur} if dur is not None else more)}


def test_a_profile_counts_the_streams_of_devices_only(tmp_path):
    trace = [
        event(1, 0, "process_name", ph="M", args={"name": "/device:GPU:0"}),
        event(2, 0, "process_name", ph="M", args={"name": "/host:CPU"}),
        event(1, 7, "thread_name", ph="M", args={"name": "Stream #7(Compute)"}),
        event(1, 8, "thread_name", ph="M", args={"name": "XLA Ops"}),
        event(2, 7, "thread_name", ph="M", args={"name": "Stream of the host"}),
        event(1, 7, "fusion_1", 1000.0),
        event(1, 7, "fusion_1", 500.0),
        event(1, 7, "MemcpyD2H", 3.0),
        event(1, 7, "MemcpyH2D", 3.0),
        event(1, 8, "while", 9000.0),
        event(2, 7, "python", 9000.0),
    ]
    path = tmp_path / "perfetto_trace.json.gz"
    with gzip.open(path, "wt") as stream:
        json.dump({"traceEvents": trace}, stream)
    found = gpu_profile.summary(gpu_profile.events(path))
    assert found == {"kernels": 2, "kernel_ms": 1.5, "host_copies": 1, "longest": [["fusion_1", 1.5]]}
    assert gpu_profile.summary(trace[:5]) == {}
