"""Two hundred damaged and hostile files of all kinds; the benchmark of that name reads tens of thousands."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import common, damaged_files, hostile_files, reliability, sound_files  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In a process of its own: JAX and threads of this one leave no room for limits."""
    path = tmp_path_factory.mktemp("damaged") / "rows.jsonl"
    command = [sys.executable, "benchmarks/damaged_files.py", "--quick", "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Not seen once" in done.stdout
    return common.read_rows(path)


def test_all_are_read_or_named(rows):
    assert {row["case"]["row"] for row in rows} == {"hostile", *(target.name for target in sound_files.TARGETS)}
    for row in rows:
        figures = row["figures"]
        assert figures["first"] == {} and all(figures[kind] == 0 for kind in damaged_files.WRONG), row["case"]
        assert figures["files"] == figures["read"] + figures["refused"]
        assert figures["slowest"] < damaged_files.SLOW and figures["largest"] < damaged_files.LARGE / 1e9
    assert sum(row["figures"]["files"] for row in rows) >= 190
    assert sum(row["figures"]["refused"] for row in rows) > 100


def test_rows_name_their_script_and_no_machine(rows):
    for row in rows:
        assert row["benchmark"] == "reliability: damaged_files"
        assert row["command"].startswith("python benchmarks/damaged_files.py --quick")
        assert str(ROOT) not in json.dumps(row) and "/tmp" not in json.dumps(row)
    assert "| hostile |" in reliability.render(rows) and "| all |" in reliability.render(rows)


def test_what_goes_wrong_is_counted():
    answers = [
        ("a", ("read", "", 0.1, 0, [])),
        ("b", ("refused", "ValueError: b", 6.0, 2 << 30, [])),
        ("c", ("file not named", "ValueError: x", 0.1, 0, [])),
        ("d", ("died", "exit code -11", 60.0, 0, [])),
        ("e", ("refused", "ValueError: e", 0.1, 0, ["subprocess.Popen"])),
    ]
    figures = damaged_files.count(answers)
    wrong = {kind: figures[kind] for kind in damaged_files.WRONG}
    assert wrong == {
        "file not named": 1,
        "other error": 0,
        "slow": 2,
        "over 1 GB": 1,
        "died": 1,
        "killed": 0,
        "did more than read": 1,
    }
    assert figures["read"] == 1 and figures["refused"] == 2 and figures["first"]["died"] == "d: exit code -11"


@pytest.mark.parametrize("target", [t for t in sound_files.TARGETS if t.opened], ids=lambda target: target.name)
def test_damage_below_the_checksum(target, tmp_path):
    """What lies under a compression comes back as it was, and damage there leaves the checksum right."""
    path = target.make(tmp_path)
    content = path.read_bytes()
    parts = target.opened(content)
    assert target.opened(target.sealed(content, parts)) == parts
    path.write_bytes(target.sealed(content, parts))
    target.read(tmp_path)
    rng = np.random.default_rng(0)
    assert len({damaged_files.variant(target, content, rng) for _ in range(20)}) > 10


def test_hostile_files_take_the_place_of_sound_ones():
    names = [(hostile.label, hostile.target) for hostile in hostile_files.HOSTILE]
    assert len(set(names)) == len(names)
    assert {target for _, target in names} <= {target.name for target in sound_files.TARGETS}
