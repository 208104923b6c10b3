"""Runs that something stops: signals, full disks, folders that cannot be written, and what killed processes leave."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import FULL, PARAMS, Toy, assert_same_run, mini

import jbilevel as jb
from jbilevel._core import files, io
from jbilevel._training.interruption import JAX
from jbilevel.training import FitStatus, fit

SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}
each_signal = pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, the handlers are as they were; a shell may have started us with SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in SIGNALS.values()}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def after(step, number):
    """A callback during which a signal comes."""
    return lambda at, state, info: signal.raise_signal(number) if at == step else None


# Signals


@each_signal
def test_a_signal_leaves_the_last_finished_step(number, tmp_path):
    result = fit(Toy(), PARAMS, mini, steps=9, checkpoint=tmp_path, checkpoint_every=100, callback=after(3, number))
    assert result.status is FitStatus.INTERRUPTED and result.steps == 4
    assert f"Interrupted by {number.name}; the state is the one after 4 finished steps." in result.message
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert_same_run(result, fit(Toy(), PARAMS, mini, steps=4))
    assert_same_run(fit(Toy(), PARAMS, mini, steps=9, checkpoint=tmp_path), fit(Toy(), PARAMS, mini, steps=9))


@each_signal
def test_before_the_first_step_it_gives_the_params_back(number, tmp_path):
    @dataclass(frozen=True)
    class Slow(Toy):
        def init(self, params, batch):
            signal.raise_signal(number)  # while it compiles
            return super().init(params, batch)

    result = fit(Slow(), PARAMS, FULL, steps=9, checkpoint=tmp_path)
    assert result.status is FitStatus.INTERRUPTED and result.steps == 0 and result.state is None
    assert "before the first step" in result.message and result.history["value"].shape == (0,)
    np.testing.assert_array_equal(result.params["w"], PARAMS["w"])
    assert result.best is result.params and os.listdir(tmp_path) == []


@each_signal
def test_before_a_resumed_run_goes_on_its_file_stays(number, tmp_path):
    fit(Toy(), PARAMS, FULL, steps=2, checkpoint=tmp_path)

    def batches():
        signal.raise_signal(number)
        yield FULL

    content = (tmp_path / "checkpoint.npz").read_bytes()
    assert fit(Toy(), PARAMS, batches(), steps=9, checkpoint=tmp_path).status is FitStatus.INTERRUPTED
    assert (tmp_path / "checkpoint.npz").read_bytes() == content


@each_signal
@pytest.mark.parametrize("every", [1, 100])
def test_a_signal_while_the_file_is_written(number, every, tmp_path, monkeypatch):
    """It is finished, in the loop and at the end."""
    sync, seen = os.fsync, []

    def spy(file):
        if not seen:
            seen.append(file)
            signal.raise_signal(number)
        sync(file)

    monkeypatch.setattr(os, "fsync", spy)
    result = fit(Toy(), PARAMS, mini, steps=3, checkpoint=tmp_path, checkpoint_every=every)
    assert seen and result.status is FitStatus.INTERRUPTED and result.steps == (1 if every == 1 else 3)
    assert os.listdir(tmp_path) == ["checkpoint.npz"]
    assert_same_run(fit(Toy(), PARAMS, mini, steps=5, checkpoint=tmp_path), fit(Toy(), PARAMS, mini, steps=5))


@each_signal
def test_inside_jax_it_waits_for_the_step_and_a_second_one_does_not(number):
    """An exception out of JAX's compiler ends the process with a fault at its exit."""
    space = {"come": partial(signal.raise_signal, number)}  # in C: the frame is that of the function below
    exec(compile("def compiler(times):\n    for _ in range(times):\n        come()", JAX + "x.py", "exec"), space)
    finished = []

    def callback(step, state, info, times):
        space["compiler"](times)
        finished.append(times)

    for times in (1, 2):
        result = fit(Toy(), PARAMS, FULL, steps=9, callback=partial(callback, times=times))
        assert result.status is FitStatus.INTERRUPTED and result.steps == 1
    assert finished == [1]


@each_signal
def test_what_a_library_makes_of_it_is_it(number):
    def callback(step, state, info):
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise RuntimeError("the callback failed") from error

    assert fit(Toy(), PARAMS, FULL, steps=9, callback=callback).status is FitStatus.INTERRUPTED


def test_a_handler_of_the_user_is_called_and_stays():
    seen = []

    def own(number, frame):
        seen.append(number)

    signal.signal(signal.SIGTERM, own)
    result = fit(Toy(), PARAMS, FULL, steps=9, callback=after(2, signal.SIGTERM))
    assert result.status is FitStatus.INTERRUPTED and result.steps == 3 and seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is own
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a user's too
    assert fit(Toy(), PARAMS, FULL, steps=4, callback=after(2, signal.SIGTERM)).status is FitStatus.FINISHED
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGINT, own)
    assert fit(Toy(), PARAMS, FULL, steps=4, callback=after(2, signal.SIGINT)).status is FitStatus.FINISHED
    assert seen == [signal.SIGTERM, signal.SIGINT]


def test_a_handler_that_is_set_meanwhile_stays():
    def callback(step, state, info):
        signal.signal(signal.SIGTERM, own)

    def own(number, frame):
        pass

    fit(Toy(), PARAMS, FULL, steps=2, callback=callback)
    assert signal.getsignal(signal.SIGTERM) is own


def test_a_handler_that_exits_finds_the_checkpoint_written(tmp_path):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        fit(Toy(), PARAMS, FULL, steps=9, checkpoint=tmp_path, checkpoint_every=100, callback=after(4, signal.SIGTERM))
    assert io.read_meta(tmp_path / "checkpoint.npz")["steps"] == 5


def test_a_handler_of_the_user_waits_for_the_last_write(tmp_path, monkeypatch):
    sync, seen = os.fsync, []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(os.path.exists(tmp_path / "checkpoint.npz")))
    monkeypatch.setattr(os, "fsync", lambda file: (signal.raise_signal(signal.SIGTERM), sync(file)))
    assert fit(Toy(), PARAMS, FULL, steps=2, checkpoint=tmp_path, checkpoint_every=9).status is FitStatus.INTERRUPTED
    assert seen and all(seen)


def test_runs_inside_runs_all_end():
    inner = []

    def callback(step, state, info):
        inner.append(fit(Toy(), PARAMS, FULL, steps=9, callback=after(1, signal.SIGTERM)))

    outer = fit(Toy(), PARAMS, FULL, steps=9, callback=callback)
    assert [outer.status, inner[0].status] == [FitStatus.INTERRUPTED] * 2 and (outer.steps, inner[0].steps) == (1, 2)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_leave_signals_alone():
    results, handlers = [], []

    def callback(step, state, info):
        handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=lambda: results.append(fit(Toy(), PARAMS, FULL, steps=2, callback=callback)))
    thread.start()
    thread.join()
    assert results[0].status is FitStatus.FINISHED and handlers == [signal.SIG_DFL] * 2


# Files that cannot be written


def full_disk(monkeypatch, allowed):
    """The disk takes ``allowed`` more files."""
    sync, taken = os.fsync, []

    def refuse(file):
        taken.append(file)
        if len(taken) > 2 * allowed:  # the file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", refuse)


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, allowed=2)
        result = fit(Toy(), PARAMS, mini, steps=9, checkpoint=tmp_path / "run.npz")
    assert result.status is FitStatus.STOPPED and result.steps == 3
    assert f"Stopped after 3 of 9 steps: {tmp_path}/run.npz could not be written: No space left" in result.message
    assert result.message.count("could not be written") == 1
    assert_same_run(result, fit(Toy(), PARAMS, mini, steps=3))
    assert os.listdir(tmp_path) == ["run.npz"] and io.read_meta(tmp_path / "run.npz")["steps"] == 2
    whole = fit(Toy(), PARAMS, mini, steps=9)
    assert_same_run(fit(Toy(), PARAMS, mini, steps=9, checkpoint=tmp_path / "run.npz"), whole)


def test_a_full_disk_at_the_end_does_not_change_how_it_ended(tmp_path, monkeypatch):
    for every in (1, 100):
        with monkeypatch.context() as patch:
            full_disk(patch, allowed=2 if every == 1 else 0)
            result = fit(Toy(), PARAMS, FULL, steps=3, checkpoint=tmp_path / f"{every}.npz", checkpoint_every=every)
        assert result.status is FitStatus.FINISHED and result.steps == 3
        assert result.message.startswith("All 3 steps were taken.") and "could not be written" in result.message


def test_a_full_disk_does_not_hide_another_error(tmp_path, monkeypatch):
    def callback(step, state, info):
        raise RuntimeError("the callback failed")

    full_disk(monkeypatch, allowed=0)
    with pytest.raises(RuntimeError, match="the callback failed") as caught:
        fit(Toy(), PARAMS, FULL, steps=3, checkpoint=tmp_path, checkpoint_every=100, callback=callback)
    assert "checkpoint.npz could not be written" in caught.value.__notes__[0]


def test_a_full_disk_under_the_log_or_a_callback_stops_too(tmp_path, monkeypatch):
    if os.path.exists("/dev/full"):
        result = fit(Toy(), PARAMS, FULL, steps=3, log="/dev/full")
        assert result.status is FitStatus.STOPPED and "/dev/full could not be written: No space" in result.message
    oracle = jb.explicit.Oracle(lambda p, d: jnp.sum((p["w"] - d["y"]) ** 2))
    best = jb.Validation(oracle, FULL, path=tmp_path / "best.npz")
    full_disk(monkeypatch, allowed=0)
    result = fit(jb.FirstOrder(oracle, optax.sgd(0.1)), PARAMS, FULL, steps=3, callback=best)
    assert result.status is FitStatus.STOPPED and "best.npz could not be written" in result.message
    assert result.steps == 1 and best.params is not None


def test_errors_of_save_name_the_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"the folder of .*a.npz does not exist; make it first"):
        jb.save(tmp_path / "no" / "a.npz", 0)
    full_disk(monkeypatch, allowed=0)
    with pytest.raises(OSError, match=r"a.npz could not be written: No space left on device; free space") as caught:
        jb.save(tmp_path / "a.npz", 0)
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {tests!r})
from test_fit import PARAMS, Toy, fit, mini
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = {size}
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
result = fit(Toy(), PARAMS, mini, steps=40, checkpoint={file!r})
print(result.status.name, result.steps, result.message)
"""


def test_a_file_that_may_not_grow(tmp_path):
    """The kernel's own refusal, half-way through a file that grows with the history."""
    file, tests = tmp_path / "run.npz", os.path.dirname(__file__)
    fit(Toy(), PARAMS, mini, steps=5, checkpoint=tmp_path / "five.npz")
    code = LIMITED.format(tests=tests, file=str(file), size=os.path.getsize(tmp_path / "five.npz") + 300)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(tests)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    name, steps, message = done.stdout.split(maxsplit=2)
    assert name == "STOPPED" and "run.npz could not be written: File too large" in message
    assert io.read_meta(file)["steps"] == int(steps) - 1 >= 5
    assert sorted(os.listdir(tmp_path)) == ["five.npz", "run.npz"]


COMPILED = []


@dataclass(frozen=True)
class Watched(Toy):
    def init(self, params, batch):
        COMPILED.append("init")
        return super().init(params, batch)


def test_where_nothing_can_be_written_nothing_is_compiled(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    (tmp_path / "folder" / "checkpoint.npz").mkdir(parents=True)
    refuse = OSError(errno.EROFS, os.strerror(errno.EROFS))
    cases = {
        tmp_path / "file": "needs a folder where a file or a loop of symbolic links is",
        tmp_path / "file" / "run.npz": "needs a folder where a file or a loop of symbolic links is",
        tmp_path / "loop": "needs a folder where a file or a loop of symbolic links is",
        tmp_path / "loop.npz": "is no file: Too many levels of symbolic links; give another path",
        tmp_path / "folder": "is no file: it is a folder; give another path",
    }
    COMPILED.clear()
    for path, words in cases.items():
        with pytest.raises((OSError, ValueError), match=words) as caught:
            fit(Watched(), PARAMS, FULL, steps=1, checkpoint=path)
        assert "`checkpoint`=" in str(caught.value)

    def opened(path, mode="r", **settings):
        raise refuse

    monkeypatch.setattr(files, "open", opened, raising=False)
    with pytest.raises(
        OSError, match=r"`checkpoint`=.*run.npz cannot be written: Read-only file system; give a folder"
    ):
        fit(Watched(), PARAMS, FULL, steps=1, checkpoint=tmp_path / "run.npz")
    assert COMPILED == []


def test_a_finished_run_may_lie_where_nothing_can_be_written(tmp_path, monkeypatch):
    whole = fit(Toy(), PARAMS, FULL, steps=2, checkpoint=tmp_path)

    def opened(path, mode="r", **settings):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "open", opened, raising=False)
    assert_same_run(fit(Toy(), PARAMS, FULL, steps=2, checkpoint=tmp_path), whole)
    with pytest.raises(PermissionError, match="checkpoint.npz cannot be written: Permission denied"):
        fit(Toy(), PARAMS, FULL, steps=3, checkpoint=tmp_path)


# What killed processes leave


def dead():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_files_of_dead_processes_are_removed(tmp_path):
    fit(Toy(), PARAMS, FULL, steps=1, checkpoint=tmp_path)
    ours, theirs = f".checkpoint.npz.{dead()}.tmp", f".checkpoint.npz.{os.getppid()}.tmp"
    kept = {theirs, ".checkpoint.npz.tmp", f".other.npz.{dead()}.tmp", f".checkpoint.npz.{dead()}.tmp2"}
    held = tmp_path / f".checkpoint.npz.{dead()}.tmp"  # of a process that is not seen here, such as another host's
    for name in (ours, *kept):
        (tmp_path / name).write_bytes(b"half")
    with open(held, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fit(Toy(), PARAMS, FULL, steps=1, checkpoint=tmp_path)  # a resume that writes nothing
        assert set(os.listdir(tmp_path)) == kept | {"checkpoint.npz", held.name}
    io.save(tmp_path / "checkpoint.npz", 0)  # a write
    assert set(os.listdir(tmp_path)) == kept | {"checkpoint.npz"}
