"""Which run a checkpoint belongs to: what is refused, by which words, and what is not another run."""

import argparse
import fractions
import functools
import json
import os
import re
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_fit import FULL, IMAGES, PARAMS, Toy, assert_same_run, generator, mini, without_index

import jbilevel as jb
from jbilevel._core import io
from jbilevel._training import fingerprint

SCALE, TABLE, SETTINGS = 0.5, np.arange(20.0), types.ModuleType("settings")
SETTINGS.RATE = 0.5
STATES = []  # written to, so no constant


def scaled(x):
    return SCALE * jnp.sum(x**2)


def energy(p, x, d):
    return 0.5 * jnp.sum((x - d) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(x**2)


def start(p, d):
    return jnp.zeros_like(d)


def squared(p, x, d):
    return jnp.sum((x - 1.0) ** 2)


PROBLEM = jb.SmoothProblem(energy, start, strong_convexity=1.0)
DATA = jnp.asarray(IMAGES)
THETA = jnp.array(0.1)


@dataclass(frozen=True)
class Shrinking(jb.Method):
    """A method as far as resuming needs one: its oracle, never asked, takes no time to compile."""

    rate: float = 0.5

    def init(self, params, batch):
        return jb.MethodState(params=params, warm=None, tol=0.0, adjoint_tol=0.0)

    def step(self, state, batch):
        params = jax.tree.map(lambda p: self.rate * p, state.params)
        info = jb.StepInfo(1.0, 1.0, 0.0, self.rate, 0.0, 0.0, work=1, status=0, done=False)
        return replace(state, params=params), info


def method(loss=squared, problem=PROBLEM, **options):
    return Shrinking(problem.oracle(loss), **options)


def run(chosen, path, *, steps=2, params=THETA, batches=DATA, **settings):
    return jb.fit(chosen, params, batches, steps=steps, checkpoint=path, progress=False, **settings)


@pytest.fixture
def refused(tmp_path):
    """Whether the checkpoint of one run is refused for another one, by a sentence with the given words and a cure."""

    def check(first, second, words):
        path = tmp_path / "run.npz"
        path.unlink(missing_ok=True)
        run(**first, path=path)
        with pytest.raises(ValueError) as caught:
            run(**second, path=path)
        sentence = str(caught.value)
        assert words in sentence and "run.npz" in sentence and 'resume="force"' in sentence, sentence
        assert sentence.count(". ") == 0 and sentence.endswith(".")

    return check


# What is another run


def test_another_method_or_option_is_named(tmp_path):
    def resume(chosen=None, params=PARAMS, batches=FULL):
        return jb.fit(chosen or Toy(), params, batches, steps=4, checkpoint=tmp_path)

    @dataclass(frozen=True)
    class Other(Toy):
        pass

    jb.fit(Toy(), PARAMS, FULL, steps=2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="in the method: Toy before, Other now; give another path"):
        resume(Other())
    with pytest.raises(ValueError, match="in the option `rate` of Toy: 0.1 before, 0.2 now;"):
        resume(Toy(rate=0.2))
    with pytest.raises(ValueError, match="in `batches`: full before, changing now;"):
        resume(batches=mini)
    with pytest.raises(ValueError, match=r"in the data: leaf \['y'\]: float64\[7,3\] before, float64\[4,3\] now;"):
        resume(batches={"y": IMAGES[:4]})
    with pytest.raises(ValueError, match=r"params to start from: leaf \['b'\]: absent before, float64\[2\] now;"):
        resume(params=PARAMS | {"b": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"params to start from: leaf \['w'\]: float64\[3\] 0.3 -0.2 0.1 before"):
        resume(params={"w": jnp.array([0.3, -0.2, 0.2])})
    with pytest.raises(ValueError, match="option `rate` .* `batches`: .* and 1 more; give"):
        resume(Toy(rate=0.2), batches=lambda step: {"y": IMAGES[:1]}, params={"w": jnp.zeros(2)})
    assert resume().steps == 4


def test_what_is_no_checkpoint_of_this_version(tmp_path):
    file = tmp_path / "checkpoint.npz"
    io.save(file, PARAMS)
    with pytest.raises(ValueError, match="no checkpoint of fit"):
        jb.fit(Toy(), PARAMS, FULL, steps=4, checkpoint=tmp_path)
    io.save(file, PARAMS, {"kind": "checkpoint of jbilevel.fit", "steps": 3, "made by": {}})
    with pytest.raises(ValueError, match="is of another version of jbilevel, without"):
        jb.fit(Toy(), PARAMS, FULL, steps=4, checkpoint=tmp_path)
    file.write_bytes(b"PK")
    with pytest.raises(ValueError, match="checkpoint.npz cannot be loaded"):
        jb.fit(Toy(), PARAMS, FULL, steps=4, checkpoint=tmp_path)
    assert jb.fit(Toy(), PARAMS, FULL, steps=4, checkpoint=tmp_path, resume=False).steps == 4  # which replaces it


def closed_over(weight):
    return lambda p, x, d: weight * squared(p, x, d)


def by_default(weight):
    def loss(p, x, d, weight=weight, *, power=weight):
        return weight * squared(p, x, d) + power

    return loss


def weighted(weight, p, x, d):
    return weight * squared(p, x, d)


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, p, x, d):
        return self.weight * squared(p, x, d)

    def loss(self, p, x, d):
        return self(p, x, d)


def through_a_helper(weight):
    def helper(x):
        return weight * jnp.sum(x**2)

    return lambda p, x, d: helper(x - d)


WEIGHTED = {
    "closure": closed_over,
    "default": by_default,
    "partial": lambda weight: functools.partial(weighted, weight),
    "array": lambda weight: closed_over(weight * TABLE[:9]),
    "JAX array": lambda weight: closed_over(jnp.asarray(weight)),
    "dict": lambda weight: (lambda settings: lambda p, x, d: settings["w"] * jnp.sum(x))({"w": weight}),
    "object": Weighted,
    "method": lambda weight: Weighted(weight).loss,
    "helper": through_a_helper,
    "jit": lambda weight: jax.jit(closed_over(weight)),
    "checkpoint": lambda weight: jax.checkpoint(closed_over(weight)),
    "jbilevel": lambda weight: jb.losses.huber(delta=weight),
}


@pytest.mark.parametrize("kind", WEIGHTED)
def test_another_constant_of_a_function_is_seen(kind):
    one, same, other = (fingerprint.describe(WEIGHTED[kind](weight)) for weight in (0.25, 0.25, 0.75))
    assert one == same and list(fingerprint.between(one, same, "the loss", True)) == []
    found = list(fingerprint.between(one, other, "the loss", True))
    assert found and not any(difference.code_only for difference in found)
    words = "other values of float64[9]" if kind == "array" else r"0.25 before, .*0.75 now"
    assert all(re.search(words.replace("[", r"\["), str(difference)) for difference in found)


def test_another_constant_of_the_loss_is_refused(refused):
    refused(
        {"chosen": method(closed_over(1.0))},
        {"chosen": method(closed_over(2.0))},
        "the loss (`weight`): 1.0 before, 2.0 now",
    )
    half, double = (lambda p, x, d: 0.5 * jnp.sum(x)), (lambda p, x, d: 2.0 * jnp.sum(x))
    refused({"chosen": method(half)}, {"chosen": method(double)}, "the loss, by the numbers in its code: 0.5 before")
    refused({"chosen": method(half)}, {"chosen": method(squared)}, "the loss: `<lambda>` before, `squared` now")
    mean = lambda p, x, d: 0.5 * jnp.mean(x)  # noqa: E731
    refused({"chosen": method(half)}, {"chosen": method(mean)}, "in the loss: another function;")


def test_another_global_is_refused(tmp_path, monkeypatch):
    def reads(p, x, d):
        STATES.append(len(STATES))
        return scaled(x) + SETTINGS.RATE * jnp.sum(TABLE)

    chosen = method(reads)
    run(chosen, tmp_path)
    for module, name, value, words in (
        (sys.modules[__name__], "SCALE", 0.75, r"the loss \(`SCALE`\): 0.5 before, 0.75 now"),
        (sys.modules[__name__], "TABLE", TABLE + 1, r"the loss \(`TABLE`\): other values of float64\[20\]"),
        (SETTINGS, "RATE", 0.6, r"the loss \(`SETTINGS.RATE`\): 0.5 before, 0.6 now"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"in {words};"):
            patch.setattr(module, name, value)
            run(chosen, tmp_path)
    assert run(chosen, tmp_path, steps=3).steps == 3


def test_another_problem_oracle_or_data_is_refused(refused):
    stiff = jb.SmoothProblem(energy, start, strong_convexity=0.5)
    refused({"chosen": method()}, {"chosen": method(problem=stiff)}, "`strong_convexity` of SmoothProblem: 1.0 before")
    one = {"chosen": Shrinking(PROBLEM.oracle(squared, correct=True))}
    refused({"chosen": method()}, one, "the option `correct` of implicit.Oracle: False before, True now")
    refused({"chosen": method()}, {"chosen": method(rate=0.2)}, "`rate` of Shrinking: 0.5 before, 0.2 now")
    changed = {"chosen": method(), "batches": DATA.at[3, 1].add(1e-12)}
    refused({"chosen": method()}, changed, "the data: other values of float64[7,3]")
    fewer = {"chosen": method(), "batches": DATA[:5]}
    refused({"chosen": method()}, fewer, "the data: float64[7,3] before, float64[5,3] now")
    noisy, clean = ({"chosen": descent(), "batches": lambda step, k=k: DATA[k : k + 2]} for k in (0, 1))
    refused(noisy, clean, "the data of the first batch: other values of float64[2,3]")


def descent(rate=0.1):
    return jb.FirstOrder(jb.explicit.Oracle(lambda p, d: p * jnp.sum(d)), optax.sgd(rate))


def test_another_optimiser_or_regulariser_is_refused(refused):
    words = "the optimiser (`step_size`): -0.1 before, -0.2 now"
    refused({"chosen": descent()}, {"chosen": descent(0.2)}, words)
    schedules = [descent(optax.cosine_decay_schedule(0.1, steps)) for steps in (20, 30)]
    refused({"chosen": schedules[0]}, {"chosen": schedules[1]}, "the optimiser (`decay_steps`): 20 before, 30 now")
    angles = np.linspace(0, np.pi, 6, endpoint=False)

    def chosen(eps=0.1, angles=angles):
        A = jb.operators.ParallelBeam((4, 4), angles, 6)
        R = jb.regularizers.SmoothedTV(eps=eps)
        return {
            "chosen": method(jb.losses.squared_error(), jb.variational(A, R)),
            "params": R.init(),
            "batches": {"y": jnp.ones((2, 6, 6)), "x": jnp.ones((2, 4, 4))},
        }

    refused(chosen(), chosen(eps=0.2), "the option `eps` of SmoothedTV: 0.1 before, 0.2 now")
    refused(chosen(), chosen(angles=angles + 0.1), "the option `angles` of ParallelBeam: other values of tuple of 6")


def test_another_network_is_seen():
    nnx = pytest.importorskip("flax.nnx")
    A = jb.operators.ParallelBeam((4, 4), np.arange(3.0), 6)

    def describe(activation):
        f, _ = jb.nets.from_flax(jb.nets.LPD(A, layers=1, width=2, depth=2, activation=activation, rngs=nnx.Rngs(0)))
        return fingerprint.describe(f)

    assert describe(jax.nn.relu) == describe(jax.nn.relu) != describe(jax.nn.gelu)


# What is not


def test_forced_and_begun_anew(tmp_path):
    run(method(closed_over(1.0)), tmp_path)
    forced = run(method(closed_over(2.0)), tmp_path, steps=4, resume="force")
    assert forced.steps == 4
    assert run(method(closed_over(2.0)), tmp_path, steps=5).steps == 5  # from now on it is of that run
    anew = run(method(closed_over(3.0)), tmp_path, steps=1, resume=False)
    assert anew.steps == 1 and run(method(closed_over(3.0)), tmp_path, steps=1).steps == 1
    with pytest.raises(ValueError, match="`resume` must be True, False or 'force', got 'yes'"):
        run(method(), tmp_path, resume="yes")


def test_how_long_and_what_is_watched_is_free(tmp_path):
    run(method(), tmp_path, work_budget=100)
    again = run(method(), tmp_path, steps=9, work_budget=1e6, callback=lambda *_: False, log=tmp_path / "log.csv")
    assert_same_run(again, run(method(), None, steps=9))


def test_params_may_be_those_of_the_checkpoint(tmp_path):
    first = run(method(), tmp_path)
    assert_same_run(run(method(), tmp_path, steps=4, params=first.params), run(method(), None, steps=4))


SOURCE = """
import jax.numpy as jnp

def loss(p, x, d):
    return {body}
"""
BODY = "2.0 * jnp.sum((x - d) ** 2)"
DOCUMENTED = '''
import jax.numpy as jnp

# a comment, other lines, other names of what is local


def loss(theta, image, data):
    """What it means."""
    return 2.0 * jnp.sum((image - data) ** 2)  # explained
'''


def compiled(source, file="first.py", **options):
    space = {"__name__": file.removesuffix(".py")}
    exec(compile(source, file, "exec", **options), space)
    return space["loss"]


@pytest.mark.parametrize("options", [{}, {"optimize": 2}])
def test_docstrings_comments_and_names_of_files_are_free(options, tmp_path):
    run(method(compiled(SOURCE.format(body=BODY))), tmp_path)
    with warnings.catch_warnings(action="error"):
        run(method(compiled(DOCUMENTED, "second.py", **options)), tmp_path, steps=3)


def test_other_code_is_a_warning(tmp_path):
    run(method(compiled(SOURCE.format(body=BODY))), tmp_path)
    with pytest.warns(UserWarning, match="the code of the loss has changed: its numbers may no longer be those"):
        run(method(compiled(SOURCE.format(body="jnp.sum((x - d) ** 2) * 2.0"))), tmp_path, steps=3)


def test_another_python_or_library_is_a_warning(tmp_path, monkeypatch):
    versions = fingerprint.versions()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "versions", lambda: versions | {"python": "cpython-310", "jbilevel": "0.0.1"})
        run(method(compiled(SOURCE.format(body="jnp.sum(x)"))), tmp_path)
    with pytest.warns(UserWarning, match="jbilevel was 0.0.1, now is .*; python was cpython-310, now is") as caught:
        run(method(compiled(SOURCE.format(body="jnp.sum(x)"))), tmp_path, steps=3)
    assert not any("code of" in str(warning.message) for warning in caught)


def test_counters_and_caches_are_no_constants():
    calls, count = {"n": 0}, 0

    def loss(p, x, d):
        nonlocal count
        count += 1
        calls["n"] += 1
        STATES.append(count)
        return jnp.sum(x)

    class Counting:
        calls = 0

        def __call__(self, p, x, d):
            self.calls += 1
            return loss(p, x, d)

    counting = Counting()
    before = [fingerprint.describe(thing) for thing in (loss, counting)]
    counting(0.0, 0.0, 0.0)
    assert before == [fingerprint.describe(thing) for thing in (loss, counting)] and calls == {"n": 1}


def test_what_is_read_and_compared_is_no_counter():
    low, table = 0.25, {"high": 0.5}

    def loss(p, x, d):
        return jnp.sum(x) if 0 < low < 1 < table["high"] else x

    node = fingerprint.describe(loss)
    assert node["low"] == "0.25" and node["table['high']"] == "0.5"


def test_of_settings_only_what_is_read_counts():
    """A table of settings holds the number of steps too."""

    def described(steps, weight):
        options = argparse.Namespace(steps=steps, weight=weight, model=types.SimpleNamespace(width=weight, seed=steps))
        table = {"steps": steps, "weight": weight, "nested": {"a": weight, "b": steps}}

        def loss(p, x, d):
            inner = lambda: table["weight"] + table["nested"]["a"]  # noqa: E731
            return options.weight * jnp.sum(x) + options.model.width + inner()

        return fingerprint.describe(loss)

    assert described(10, 0.5) == described(20, 0.5)
    found = {str(d) for d in fingerprint.between(described(10, 0.5), described(10, 0.75), "the loss", True)}
    names = ("options.weight", "options.model.width", "table['weight']", "table['nested']['a']")
    assert found == {f"the loss, `{name}`: 0.5 before, 0.75 now" for name in names}


def test_whole_settings_count_where_they_are_passed_on():
    def described(weight):
        table = {"weight": weight}
        return fingerprint.describe(lambda p, x, d: [table[name] for name in table])

    assert described(0.5)["table"] == {"['weight']": "0.5"}


def test_other_numbers_and_wrapped_functions_count():
    @functools.lru_cache
    def third():
        return one_third

    class Slotted:
        __slots__ = "weight"

    one_third, slotted = fractions.Fraction(1, 3), Slotted()
    slotted.weight = 2.5
    node = fingerprint.describe(lambda p, x, d: third() + slotted.__sizeof__())
    assert node["third"]["__wrapped__"]["one_third"] == "Fraction(1, 3)" and node["slotted"]["weight"] == "2.5"


def test_recursion_and_strange_things_are_described():
    def endless(n):
        return endless(n - 1)

    ring = []
    ring.append(ring)
    chain = None
    for _ in range(5000):
        chain = [chain]
    keys = {"key": jax.random.key(0), 3: {2, 1}, "m": np, "o": object(), "f": len, "c": int, "e": jb.Status.PRECISION}
    for thing in (endless, ring, chain, keys, jnp.bfloat16(1), np.zeros(3, jnp.bfloat16), jnp.exp, jnp.add):
        assert json.dumps(fingerprint.describe(thing)) == json.dumps(fingerprint.describe(thing))


# Other processes

CHILD = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {tests!r})
import test_resume, json
print(json.dumps(test_resume.everything()))
"""


def everything():
    """Fingerprints of all that this file has, and the checkpoint of a run of it."""
    sets = closed_over(frozenset(f"name {i}" for i in range(50)))
    things = [kind(0.5) for kind in WEIGHTED.values()] + [descent(), method(), sets, Toy(), Toy]
    return [fingerprint.describe(thing) for thing in things]


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_finds_the_same(seed):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": seed}
    code = CHILD.format(tests=str(Path(__file__).parent))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    theirs = json.loads(told.stdout)
    ours = json.loads(json.dumps(everything()))
    assert [a == b for a, b in zip(theirs, ours, strict=True)] == [True] * len(ours)


# Files


@pytest.mark.parametrize("batches", [lambda: mini, lambda: without_index, generator, lambda: FULL])
def test_a_damaged_safetensors_checkpoint_is_refused(batches, tmp_path):
    file = tmp_path / "run.safetensors"
    whole = jb.fit(Toy(), PARAMS, batches(), steps=2, checkpoint=file)
    content = bytearray(file.read_bytes())
    for place in np.random.default_rng(0).choice(len(content), 100, replace=False):
        content[place] ^= 0x04
        file.write_bytes(content)
        content[place] ^= 0x04
        try:
            resumed = jb.fit(Toy(), PARAMS, batches(), steps=2, checkpoint=file)
        except ValueError as error:
            assert str(file) in str(error)
        else:
            assert_same_run(resumed, whole)
