"""Checkpoints: a resumed run is the uninterrupted one, whatever ended it, and checkpoints of another are refused."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from toy_for_tests import FULL, KINDS, PARAMS, Toy, assert_same_run, mini

from jbilevel._core import io
from jbilevel.training import FitStatus, fit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["run.npz", "run.safetensors"])
def test_resumed_run_is_the_uninterrupted_run(kind, name, tmp_path):
    whole = fit(Toy(), PARAMS, KINDS[kind](), steps=7)
    file = tmp_path / "new" / name
    for steps in (0, 2, 3, 7):
        part = fit(Toy(), PARAMS, KINDS[kind](), steps=steps, checkpoint=file)
        assert part.steps == steps
    assert_same_run(part, whole)
    assert os.listdir(file.parent) == [name]  # no temporary file stays
    again = fit(Toy(), PARAMS, KINDS[kind](), steps=7, checkpoint=file)  # finished: its last warm start too
    assert_same_run(again, whole)


def test_resume_in_single_precision(tmp_path):
    with jax.enable_x64(False):
        params = {"w": jnp.asarray(PARAMS["w"], jnp.float32)}
        whole = fit(Toy(), params, mini, steps=5)
        fit(Toy(), params, mini, steps=2, checkpoint=tmp_path)
        assert_same_run(fit(Toy(), params, mini, steps=5, checkpoint=tmp_path), whole)
        assert whole.params["w"].dtype == jnp.float32


def test_converged_run_stays_converged(tmp_path):
    first = fit(Toy(done_at=2), PARAMS, FULL, steps=9, checkpoint=tmp_path)
    again = fit(Toy(done_at=2), PARAMS, FULL, steps=9, checkpoint=tmp_path, callback=lambda *_: pytest.fail())
    assert again.status is FitStatus.CONVERGED and again.steps == first.steps == 3


CHILD = """
import signal, sys, time
import jax
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {tests!r})
from toy_for_tests import PARAMS, Toy, mini
from jbilevel.training import fit

def callback(step, state, info):
    print(step, flush=True)
    time.sleep({pause})

result = fit(Toy(), PARAMS, mini, steps=100_000, callback=callback, checkpoint={file!r}, log={file!r} + ".csv")
print(result.status.name, result.steps, result.params["w"].tolist(), flush=True)
"""


def start_child(file, pause):
    code = CHILD.format(tests=str(Path(__file__).parent), file=str(file), pause=pause)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def test_kill_9_loses_at_most_the_step_in_flight(tmp_path):
    file = tmp_path / "run.npz"
    child = start_child(file, pause=0)
    printed = [child.stdout.readline() for _ in range(20)]
    time.sleep(0.0123)  # anywhere, most likely within a write
    child.send_signal(signal.SIGKILL)
    printed += child.stdout.readlines()
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    finished = len([line for line in printed if line.endswith("\n")])
    kept = io.read_meta(file)["steps"]
    assert finished >= 20 and kept >= finished
    resumed = fit(Toy(), PARAMS, mini, steps=kept + 10, checkpoint=file, log=f"{file}.csv")
    assert_same_run(resumed, fit(Toy(), PARAMS, mini, steps=kept + 10))
    with open(f"{file}.csv") as log:
        assert [int(line["iteration"]) for line in csv.DictReader(log)] == list(range(kept + 10))


def test_real_ctrl_c_returns(tmp_path):
    file = tmp_path / "run.npz"
    child = start_child(file, pause=0.02)
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    *_, last = child.stdout.readlines()
    child.stdout.close()
    assert child.wait() == 0
    name, steps, weights = last.split(maxsplit=2)
    assert name == "INTERRUPTED" and io.read_meta(file)["steps"] == int(steps) >= 3
    assert weights.strip() == str(fit(Toy(), PARAMS, mini, steps=int(steps)).params["w"].tolist())
