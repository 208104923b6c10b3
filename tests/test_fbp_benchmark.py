"""The benchmark of filtered backprojection: its rows name tests that are there, and say what these tests hold."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common, fbp  # noqa: E402


def of_this(rows):
    return [row for row in rows if row["benchmark"] == f"{fbp.PAGE}: {fbp.NAME}"]


def check(rows, size):
    assert [row["case"] for row in rows] == [{"row": name, "size": size} for name in fbp.cases(size)]
    for row in rows:
        path, _, test = row["settings"]["test"].partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")
        assert bool(row["figures"]["said"]) == (test == "test_missing_lines_are_named")
        if not row["figures"]["said"]:
            assert abs(row["figures"]["mean"] - 1) < 0.02 and row["figures"]["std"] < 0.03


def test_committed_rows():
    rows = of_this(common.read_rows(common.RESULTS / f"{fbp.PAGE}.jsonl"))
    check(rows, 128)


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    fbp.main(["--quick", "--out", str(tmp_path / "rows.jsonl")])
    rows = common.read_rows(tmp_path / "rows.jsonl")
    check(rows, 48)
    assert all(row["x64"] is False for row in rows)
    assert "refused" in capsys.readouterr().out
