"""What every lower-level problem, and its view, must do. A new kind of problem is one line in `KINDS`."""

import inspect
from functools import cache

import image_kinds_for_tests as images
import jax
import jax.numpy as jnp
import kinds_for_tests as kinds
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import central_differences, compilations, distance, relative

import jbilevel as jb

KINDS = {
    "smooth": kinds.SMOOTH,
    "smooth, nothing told": kinds.NOTHING_TOLD,
    "saddle": kinds.SADDLE,
    "weighted l1": kinds.WEIGHTED_L1,
    "variational": images.DENOISING,
    "variational, operator": images.DEBLURRING,
    "variational, plain function": images.FUNCTION,
    "variational saddle, complex operator": images.COMPLEX_SADDLE,
    "variational saddle, constraint": images.CONSTRAINED_SADDLE,
    "variational saddle, auxiliary unknown": images.AUXILIARY_SADDLE,
    "third party": kinds.THIRD_PARTY,
    "third party, own view": kinds.OWN_VIEW,
}
EACH = pytest.mark.parametrize("name", KINDS)
# one of each class is enough where compiling is long
QUICK = ("smooth", "saddle", "weighted l1", "variational", "third party", "third party, own view")
QUICK_OR_SLOW = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]
EACH_COMPILED = pytest.mark.parametrize("name", QUICK_OR_SLOW)
TIGHT = 1e-10


@cache
def made(name):
    """(kind, problem, batch) of a name; equal problems of other tests compile nothing again."""
    kind = KINDS[name]
    return kind, kind.make(), kind.batch


def sample(batch, i=0):
    return jax.tree.map(lambda leaf: leaf[i], batch)


def single(tree):
    narrow = lambda v: jnp.asarray(v, jnp.complex64 if jnp.iscomplexobj(v) else jnp.float32)  # noqa: E731
    return jax.tree.map(narrow, tree)


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def picture(problem, x):
    return ravel_pytree(problem.image(x))[0]


def loss(params, x, data):
    """Reads the picture, and params too."""
    z = ravel_pytree(jb.image_of(x))[0]
    return 0.5 * jnp.sum((z - data["x"]) ** 2) + 0.05 * jnp.sum(ravel_pytree(params)[0] ** 2)


def solution(kind, params, batch, i=0):
    """The picture that solves sample i, by NumPy alone."""
    return kind.minimiser(*jax.tree.map(np.asarray, (params, batch["y"][i])))


def exact_value(kind, params, batch):
    """The mean of the loss at these pictures."""
    away = [np.sum((solution(kind, params, batch, i) - batch["x"][i]) ** 2) for i in range(kinds.COUNT)]
    return 0.5 * np.mean(away) + 0.05 * sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(params))


@EACH
def test_the_start_fixes_the_form_of_the_unknown(name):
    kind, problem, batch = made(name)
    solve = lambda params, data: jb.solve(problem, params, data, tol=1e-3)  # noqa: E731
    for dtype, arguments in (
        (jnp.dtype("float64"), (kind.params, sample(batch))),
        (jnp.dtype("float32"), single((kind.params, sample(batch)))),
    ):
        start = jax.jit(problem.start)(*arguments)
        assert {(leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(start)} == {(dtype, False)}
        assert types(jax.eval_shape(problem.start, *arguments)) == types(start)
        x, info = jax.eval_shape(solve, *arguments)
        assert types(x) == types(start)
        assert info.residual.dtype == info.error.dtype == dtype


@EACH_COMPILED
def test_single_precision(name):
    kind, problem, batch = made(name)
    x, info = jb.solve(problem, *single((kind.params, sample(batch))), tol=1e-3)
    jb.check(info, strict=True)
    away = np.linalg.norm(picture(problem, x) - solution(kind, kind.params, batch))
    assert away <= 2e-3  # a bound on the distance, or on a residual that is not much smaller
    assert problem.lacks() is not None or away <= info.error + 1e-6


@EACH
def test_the_default_solver_finds_the_solution_and_tells_how_far_it_is(name):
    kind, problem, batch = made(name)
    data, exact = sample(batch), solution(kind, kind.params, batch)
    view = problem.view(kind.params, data)
    assert isinstance(problem.default_solver(), jb.Solver)
    for tol in (1e-1, 1e-3, TIGHT):
        x, info = jb.solve(problem, kind.params, data, tol=tol)
        jb.check(info, strict=True)
        away = np.linalg.norm(picture(problem, x) - exact)
        assert info.residual <= tol * view.tolerance_scale
        bound = float(view.error_bound(info.residual))
        if problem.lacks() is None:  # rounding apart, which is far below these tolerances
            assert away <= info.error + 1e-13 and bound <= tol * (1 + 1e-12)
            assert bound <= float(info.error) <= bound + 1e-2 * TIGHT
        else:
            assert np.isposinf(info.error)
        if kind.residual is not None:
            params, at = jax.tree.map(np.asarray, (kind.params, x))
            least = kind.residual(params, at, np.asarray(data["y"]))
            assert least <= info.residual * (1 + 1e-9) + 1e-13
            if issubclass(problem.view_type, jb.SmoothView):
                assert least == pytest.approx(float(info.residual), rel=1e-6, abs=1e-13)
    assert away <= 1e-9
    again, warm = jb.solve(problem, kind.params, data, x, tol=1e-3)
    assert warm.steps == 0 and warm.status == jb.Status.CONVERGED
    unasked, info = jb.solve(problem, kind.params, data)
    jb.check(info, strict=True)
    assert 0 < np.linalg.norm(picture(problem, unasked) - exact) <= 1e-4


@EACH
def test_the_bound_on_the_distance_holds_wherever_a_solve_ends(name):
    kind, problem, batch = made(name)
    shares = []
    for i in range(kinds.COUNT):
        exact = solution(kind, kind.params, batch, i)
        for steps in range(8):
            x, info = jb.solve(problem, kind.params, sample(batch, i), tol=TIGHT, max_steps=steps)
            away = np.linalg.norm(picture(problem, x) - exact)
            assert away <= info.error + 1e-13
            shares.append(away / info.error)
    assert problem.lacks() is not None or max(shares) > 0.1  # nor is it far off


@EACH
def test_the_view_is_of_the_kind_that_the_problem_names(name):
    kind, problem, batch = made(name)
    view = problem.view(kind.params, sample(batch))
    assert isinstance(problem, jb.Problem)
    assert isinstance(view, problem.view_type) and issubclass(problem.view_type, jb.View)
    assert np.shape(view.tolerance_scale) == () and view.tolerance_scale > 0
    bounds = [float(view.error_bound(jnp.asarray(r))) for r in (0.0, 1.0, jnp.nan)]
    assert bounds[2] == np.inf
    if problem.lacks() is None:
        assert bounds[0] == 0 and 0 < bounds[1] < np.inf
    else:
        assert bounds[:2] == [np.inf, np.inf]
    start = problem.start(kind.params, sample(batch))
    reduced = view.single(start)
    assert reduced is None or isinstance(reduced, problem.view_type)
    assert view.single(single(start)) is None


@EACH
def test_the_image_is_the_picture_inside_the_unknown(name):
    kind, problem, batch = made(name)
    start = problem.start(kind.params, sample(batch))
    image = problem.image(start)
    if kind.size:
        assert image.shape == kind.size
    else:
        assert types(image) == types(start)
    assert types(jb.image_of(start)) == types(image)


@EACH_COMPILED
def test_many_samples_at_once(name):
    kind, problem, batch = made(name)
    x, info = jax.jit(jax.vmap(lambda data: jb.solve(problem, kind.params, data, tol=TIGHT)))(batch)
    assert [jnp.shape(leaf) for leaf in jax.tree.leaves(info)] == [(kinds.COUNT,)] * 7
    jb.check(info, strict=True)
    for i in range(kinds.COUNT):
        assert distance(picture(problem, sample(x, i)), solution(kind, kind.params, batch, i)) <= 1e-9


@EACH
def test_one_compilation_for_all_tolerances_and_starts(name):
    kind, problem, batch = made(name)
    x, _ = jb.solve(problem, kind.params, sample(batch), tol=1e-2)
    with compilations() as compiled:
        for tol in (1e-1, np.float64(1e-4), jnp.asarray(1e-5), jnp.float32(1e-6), np.inf):
            jb.solve(problem, kind.params, sample(batch, 1), tol=tol)
            jb.solve(problem, kind.params, sample(batch, 1), x, tol=tol, max_steps=3)
    assert not [message for message in compiled if "solve" in message or "start" in message]


@EACH
def test_equal_problems_are_one_static_argument(name):
    kind, problem, _ = made(name)
    again, other = kind.make(), kind.other()
    traced = []
    program = jax.jit(lambda problem, x: traced.append(problem) or x, static_argnums=0)
    for one in (problem, again, other):
        program(one, 1.0)
    assert again is not problem and again == problem and hash(again) == hash(problem)
    assert other != problem and len(traced) == 2
    assert [key for key in KINDS if made(key)[1] == problem] == [name]
    with pytest.raises((AttributeError, TypeError)):
        problem.view_type = jb.View


@EACH_COMPILED
def test_the_hypergradient_of_its_own_oracle(name):
    kind, problem, batch = made(name)
    if not kind.oracle:
        with pytest.raises(TypeError, match=f"no oracle is known for {type(problem).__name__}; make one"):
            problem.oracle(loss)
        return
    oracle = problem.oracle(loss, on_failure="drop", estimate=False)
    assert isinstance(oracle, jb.Oracle) and oracle.problem == problem and oracle.on_failure == "drop"
    hg = oracle(kind.params, batch, tol=TIGHT)
    jb.check(hg)
    assert float(hg.value) == pytest.approx(exact_value(kind, kind.params, batch), rel=1e-8)
    differences = central_differences(lambda params: exact_value(kind, params, batch), kind.params)
    assert relative(hg.grad, differences) <= 1e-6
    with pytest.raises(TypeError, match="`loss` must be a function"):
        problem.oracle(None)
    with pytest.raises(TypeError, match="unknown"):
        problem.oracle(loss, unknown=1)


@EACH
def test_nothing_fails_silently(name):
    kind, problem, batch = made(name)
    data = sample(batch)
    info = jb.solve(problem, kind.params, data, tol=TIGHT, max_steps=0)[1]
    assert info.status == jb.Status.MAX_STEPS and info.residual > 0
    with pytest.raises(jb.ConvergenceError, match="MAX_STEPS"):
        jb.check(info)
    bad = data | {"y": data["y"].at[(1,) * data["y"].ndim].set(jnp.nan)}
    info = jb.solve(problem, kind.params, bad)[1]
    assert info.status == jb.Status.NONFINITE and np.isposinf(info.error)


@EACH
def test_wrong_arguments_are_named(name):
    kind, problem, batch = made(name)
    params, data = kind.params, sample(batch)
    start = problem.start(params, data)
    longer = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), start)
    cases = [
        ({"params": {"a": "text"}}, TypeError, r"params\['a'\] is a str, not numbers"),
        ({"data": data | {"y": "text"}}, TypeError, r"data\['y'\] is a str, not numbers"),
        ({"x0": [start, start]}, ValueError, "x0 has structure"),
        ({"x0": longer}, ValueError, "x0.* has shape"),
        ({"tol": -1.0}, ValueError, "`tol` must be a nonnegative number, got -1.0"),
    ]
    for arguments, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            jb.solve(problem, **{"params": params, "data": data} | arguments)
    with pytest.raises(TypeError, match="the result of jb.solve has no derivative"):
        jax.grad(lambda params: jnp.sum(picture(problem, jb.solve(problem, params, data)[0])))(params)


@EACH
def test_params_are_checked_while_their_values_are_known(name):
    kind, problem, batch = made(name)
    assert problem.check(kind.params) is None
    jax.eval_shape(lambda params: problem.check(params), kind.params)
    for params, error, sentence in kind.refused:
        for call in (problem.check, lambda params: jb.solve(problem, params, sample(batch))):
            with pytest.raises(error, match=sentence):
                call(params)
        if kind.oracle:
            with pytest.raises(error, match=sentence):
                problem.oracle(loss)(params, batch)


@EACH
def test_shapes_are_checked_without_computing(name):
    kind, problem, batch = made(name)
    params, data = kind.params, sample(batch)
    start = problem.start(params, data)
    with compilations() as compiled:
        for x0 in (None, start):
            assert jax.eval_shape(problem.validate, params, data, x0) is None
        with pytest.raises(ValueError, match="x0 has structure"):
            jax.eval_shape(problem.validate, params, data, [start])
    assert not [message for message in compiled if "validate" in message]


MISTAKES = [(name, *mistake) for name, kind in KINDS.items() for mistake in kind.mistakes]


@pytest.mark.parametrize("make, error, sentence", [m[1:] for m in MISTAKES], ids=[f"{m[0]}: {m[3]}" for m in MISTAKES])
def test_mistakes_in_the_parts_are_named(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def required(contract):
    return [name for name, member in vars(contract).items() if getattr(member, "__isabstractmethod__", False)]


@pytest.mark.parametrize(
    "contract, missing", [(contract, name) for contract in (jb.Problem, jb.View) for name in required(contract)]
)
def test_a_class_that_forgets_a_method_is_refused_when_it_is_made(contract, missing):
    others = {name: lambda self, *args: None for name in required(contract) if name != missing}
    with pytest.raises(TypeError) as refusal:
        type("Half", (contract,), others)
    method = vars(contract)[missing]
    told = str(refusal.value)
    assert told.startswith(f"Half needs a method `{missing}{inspect.signature(method)}` to be a jb.{contract.__name__}")
    assert told.endswith(inspect.getdoc(method).split("\n")[0])


def test_what_the_contract_requires():
    assert required(jb.Problem) == ["view", "start"] and required(jb.View) == ["error_bound"]
