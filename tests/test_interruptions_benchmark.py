"""The harness that kills runs, at its smallest: real processes, two kills, the same numbers."""

import random
import sys
from pathlib import Path

import jax
import numpy as np

import jbilevel as jb

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import interruptions  # noqa: E402

NETWORK = "network, optax"


def test_two_kills_change_nothing(tmp_path):
    runner = interruptions.Runner(NETWORK, size=8, steps=40)
    whole = runner.life(tmp_path)
    assert whole.status == "FINISHED" and whole.steps == 40 and whole.code == 0
    told = interruptions.interrupted(runner, "kill -9", 2, whole, random.Random(0), tmp_path / "result.npz")
    assert told["interruptions"] == 2 and told["identical"] == told["runs"] >= 1
    assert told["most_lost"] <= 1 and told["leftovers"] == 0


def test_it_sees_a_difference(tmp_path):
    result = {"state": np.arange(3.0), "history": {"value": np.ones(2)}}
    for name, change in (("a", {}), ("b", {}), ("c", {"state": np.nextafter(np.arange(3.0), 9)}), ("d", {"more": 1})):
        jb.save(tmp_path / f"{name}.npz", result | change)
    files = [tmp_path / f"{name}.npz" for name in "abcd"]
    assert [interruptions.same(files[0], file) for file in files] == [True, True, False, False]


def test_the_runs_depend_on_what_is_resumed():
    """The cases of the harness have state to lose: accuracies, warm starts of samples, moments and averages."""
    with jax.enable_x64(True):
        for name, fields in (("MAID, full batch", {"step", "previous"}), (NETWORK, {"optimizer", "average"})):
            case = interruptions.CASES[name](4)
            batch = case.batches(0) if callable(case.batches) else case.batches
            state = jax.eval_shape(case.method.init, case.params, batch)
            assert fields <= vars(state).keys()
        mini = interruptions.CASES["mini-batches, warm starts by sample"](4)
        assert "index" in mini.batches(0) and jax.tree.leaves(mini.method.init(mini.params, mini.batches(0)).warm)
