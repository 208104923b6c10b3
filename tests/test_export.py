"""What a GPU would get: every program of the library lowers for CUDA, and stays on the device."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import jbilevel as jb  # noqa: E402
from benchmarks import exports, programs  # noqa: E402
from benchmarks.programs import CASES  # noqa: E402
from jbilevel.operators import LinearOperator  # noqa: E402
from jbilevel.regularizers import RidgeSum, RidgeTerm, SaddleBlocks  # noqa: E402

LOOP = "solvers/forward_backward.py"  # of one sample: a Newton step where the support has settled
# a trial of a line search is a whole solve: what it costs to ask the host which comes next does not count
SEARCHES = {"MAID": {"maid.py": 1}, "NBA": {"nba.py": 2}}
IN_LOOPS = SEARCHES | {
    name: {LOOP: 1}
    for name in (
        "nonsmooth, one sample",
        "value of nonsmooth, one sample",
        "jb.solve, weighted l1",
        "nonsmooth.argmin, gradient",
    )
}
# a second pass, where a sample failed that does not count
ONCE = {"unroll, weighted samples": {"_oracle/kinds.py": 1}, "explicit, weighted samples": {"_oracle/kinds.py": 1}}

every_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if case.quick else pytest.mark.slow) for name, case in CASES.items()]
)


@every_case
def test_program_stays_on_the_device(name):
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    figures = exports.measure(case)
    assert bool(figures["callbacks"]) == case.bridge
    if case.bridge:
        return
    cuda = figures["cuda"]
    assert tuple(cuda["custom_calls"]) == case.custom_calls
    assert cuda["in_loops"] == IN_LOOPS.get(name, {})
    assert cuda["conditionals"] == (IN_LOOPS | ONCE).get(name, {})
    assert figures["bytes"] > 0


def test_every_kind_of_oracle_is_among_the_quick_cases():
    quick = [programs.ORACLES[name] for name, case in CASES.items() if name in programs.ORACLES and case.quick]
    made = {type(case.make(*case.setting("float32")[:2])).__module__ for case in quick}
    assert made == {f"jbilevel.{name}" for name in ("implicit", "piggyback", "nonsmooth", "unroll", "explicit")}


def test_every_public_operator_regulariser_and_network_has_a_case():
    operators = {A for A in vars(jb.operators).values() if isinstance(A, type) and issubclass(A, LinearOperator)}
    assert operators - {LinearOperator, jb.operators.Astra} <= {type(make()) for make in programs.OPERATORS.values()}
    regularisers = {R for R in vars(jb.regularizers).values() if isinstance(R, type)}
    cases = [*programs.SMOOTH.values(), *programs.SADDLES.values()]
    assert regularisers - {SaddleBlocks, RidgeSum, RidgeTerm} == {type(regularizer) for regularizer in cases}
    networks = {case.split(",")[0].replace("-", "") for case in programs.NETWORKS}
    assert set(jb.nets._NEED_FLAX) <= networks


# what is counted


def counts(function, *arguments, platform="cuda"):
    return exports.count(exports.lowered(function, arguments, platform))


def looped(body):
    """``body`` in a loop whose number of rounds is not known."""
    return lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 3.0, body, x)


def choice(x):
    return jax.lax.cond(jnp.sum(x) > 1, jnp.sin, jnp.cos, x)


X = jnp.zeros(3)


def test_a_conditional_is_counted_where_it_stands():
    here = Path(__file__).name
    outside, inside = counts(choice, X), counts(looped(choice), X)
    assert outside.conditionals == inside.conditionals == inside.in_loops == {here: 1}
    assert outside.in_loops == {} and (outside.loops, inside.loops) == (0, 1)
    # in a function that the loop calls, and in the condition of the loop
    assert counts(looped(jax.jit(lambda x: jax.jit(choice)(x))), X).in_loops == {here: 1}
    condition = lambda x: jax.lax.while_loop(lambda x: jnp.sum(choice(x)) < 3, jnp.cos, x)  # noqa: E731
    assert counts(condition, X).in_loops == {here: 1}
    # a batch computes both branches
    assert counts(jax.vmap(choice), jnp.zeros((2, 3))).conditionals == {}


def test_the_exported_text_holds_what_is_counted():
    function = looped(lambda x: choice(jax.jit(choice)(x)))
    text = jax.export.export(jax.jit(function), platforms=["cuda"])(X).mlir_module()
    assert sum(counts(function, X).conditionals.values()) == text.count('"stablehlo.case"') == 2
    assert counts(function, X).loops == text.count("stablehlo.while(") == 1


def test_a_callback_is_counted_and_cannot_be_exported():
    def shown(x):
        jax.debug.callback(lambda x: None, x)
        return x + 1

    for function in (shown, looped(shown)):
        assert counts(function, X, platform="cpu").callbacks == 1
        with pytest.raises((ValueError, NotImplementedError)):
            exports.export(function, (X,))


def test_a_bridge_is_counted_and_cannot_be_exported():
    program = CASES["from_callbacks"].build("float32")
    assert exports.count(exports.lowered(*program, "cpu")).callbacks > 0
    with pytest.raises((ValueError, NotImplementedError)):
        exports.export(*program)


def test_a_custom_call_is_counted():
    assert counts(jnp.linalg.svd, jnp.eye(3)).custom_calls == {"cusolver_gesvdj_ffi": 1}
    assert counts(jnp.fft.fft, X).custom_calls == {}


def by_platform(x):
    return jax.lax.platform_dependent(x, cpu=choice, default=jnp.sin)


def elsewhere(x):
    return jax.lax.platform_dependent(x, tpu=choice, default=jnp.sin)


def differentiated_through_a_scan(function):
    """Where the number of the platform is a residual of the loop."""
    return jax.grad(lambda x: jnp.sum(jax.lax.scan(lambda x, _: (jnp.cos(function(x)), None), x, length=4)[0]))


def test_a_choice_by_platform_is_none_on_the_platform():
    assert counts(by_platform, X).conditionals == {} and counts(by_platform, X).settled > 0
    assert counts(by_platform, X, platform="cpu").conditionals == {Path(__file__).name: 1}
    assert counts(differentiated_through_a_scan(by_platform), X).conditionals == {}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about what XLA makes of it on a CPU")
def test_what_counts_as_settled_is_removed_by_xla():
    for function in (elsewhere, looped(elsewhere), differentiated_through_a_scan(elsewhere)):
        assert counts(function, X, platform="cpu").settled > 0
        assert " conditional(" not in jax.jit(function).lower(X).compile().as_text()
    assert " conditional(" in jax.jit(looped(choice)).lower(X).compile().as_text()
