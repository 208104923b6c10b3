"""Every lower-level solver on every problem: solutions, statuses, proven errors, exact counts, transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from smooth_cases_for_tests import (
    CASES,
    HESSIAN,
    VALLEY,
    by_jaxopt,
    descend,
    flat,
    gradient_norm,
    in_single,
    logistic_energy,
    solve,
    tv_energy,
    tv_gradient,
    weakly_convex_energy,
)

import jbilevel as jb
from jbilevel._core.results import Status
from jbilevel.solvers import AGD, LBFGS, External, GradientDescent, NewtonCG, NonmonotoneAPG
from jbilevel.solvers.loop import run, solve_jitted

OURS = {
    "GradientDescent": GradientDescent,
    "AGD": AGD(),
    "NewtonCG": NewtonCG(),
    "LBFGS": LBFGS(),
    "NonmonotoneAPG": NonmonotoneAPG(),
}
ALL = OURS | {"External": External(by_jaxopt)}
FAST = {name: solver for name, solver in OURS.items() if name != "GradientDescent"}


def over(solvers):
    return pytest.mark.parametrize("solver", list(solvers.values()), ids=list(solvers))


# not told the constants, the others do what they do on the weakly convex energy; other people's solvers compile slowly
PAIRS = [(c, s) for c in CASES for s in OURS if c != "tv_without_constants" or s in ("AGD", "NewtonCG")]
every_pair = pytest.mark.parametrize("case, solver", [pytest.param(CASES[c], OURS[s], id=f"{c}-{s}") for c, s in PAIRS])


# ---------------------------------------------------------------- solutions


@every_pair
def test_converged_means_a_small_gradient(case, solver):
    tol = 1e-4 if solver is GradientDescent else 1e-8
    x, info = solve(case, solver, tol=tol, max_steps=20_000)
    mu = case.problem.constants(case.params, case.data).strong_convexity
    assert info.status == Status.CONVERGED
    assert gradient_norm(case, x) <= tol * (1.0 if mu is None else float(mu)) * (1 + 1e-6)
    assert float(info.residual) == pytest.approx(gradient_norm(case, x), rel=1e-5)
    assert jax.tree.structure(x) == jax.tree.structure(case.problem.start(case.params, case.data))


@over(ALL)
def test_quadratic_against_a_dense_solve(solver):
    case = CASES["quadratic"]
    x, _ = solve(case, solver, tol=1e-9)
    np.testing.assert_allclose(np.append(x["value"], x["grad"]), np.linalg.solve(2 * HESSIAN, case.data), atol=1e-9)


@over(OURS)
def test_total_variation_against_a_gradient_by_hand(solver):
    case = CASES["tv"]
    x, info = solve(case, solver, tol=1e-6)
    assert np.linalg.norm(tv_gradient(case.params, np.asarray(x), case.data)) <= 1.0001e-6


@over(OURS)
def test_logistic_regression_against_scipy(solver):
    case = CASES["logistic"]
    value_and_gradient = jax.jit(jax.value_and_grad(lambda x: logistic_energy(case.params, x, case.data)))
    reference = scipy.optimize.minimize(value_and_gradient, np.zeros(5), jac=True, method="BFGS", tol=1e-9).x
    x, _ = solve(case, solver, tol=1e-7, max_steps=20_000)
    np.testing.assert_allclose(x, reference, atol=1e-6)


@jax.jit
def smallest_curvature(x):
    flat_energy = lambda flat: weakly_convex_energy(0.1, flat.reshape(12, 12), CASES["weakly_convex"].data)  # noqa: E731
    return jnp.linalg.eigvalsh(jax.hessian(flat_energy)(jnp.ravel(x)))[0]


@over(FAST)
def test_weakly_convex_energy_reaches_a_minimum(solver):
    case = CASES["weakly_convex"]
    assert smallest_curvature(case.data) < -0.5  # far from convex where the solvers start
    x, info = solve(case, solver, tol=1e-8)
    assert info.status == Status.CONVERGED and np.isinf(info.error)
    assert smallest_curvature(x) > 0
    assert weakly_convex_energy(0.1, x, case.data) < 0.9 * weakly_convex_energy(0.1, case.data, case.data)


@pytest.mark.slow
@over(FAST)
def test_curved_valley(solver):
    """Rosenbrock's function: the gradient norm grows for many steps while the energy falls. Not a stagnation."""
    x, info = solve(VALLEY, solver, tol=1e-8, max_steps=20_000)
    assert info.status == Status.CONVERGED and gradient_norm(VALLEY, x) <= 1e-8


# ---------------------------------------------------------------- errors and work


@pytest.mark.parametrize("name", ["quadratic", "tv", "logistic"])
@over(OURS)
def test_the_error_bound_holds(solver, name):
    case = CASES[name]
    exact = flat(solve(case, NewtonCG(), tol=1e-13)[0])
    for tol in (10.0**-k for k in range(10 if solver is not GradientDescent else 4)):
        x, info = solve(case, solver, tol=tol, max_steps=20_000)
        assert info.status == Status.CONVERGED
        assert np.linalg.norm(flat(x) - exact) <= float(info.error) + 1e-12
        assert float(info.error) <= tol * (1 + 1e-12) + 1e-12  # of rounding


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_momentum_divides_the_steps_by_three(tol):
    case = CASES["tv"]
    plain, fast = (int(solve(case, solver, tol=tol)[1].steps) for solver in (GradientDescent, AGD()))
    assert fast <= plain / 3


def test_momentum_without_strong_convexity():
    """mu = 0 must not mean momentum 1, which would take ten times the steps."""
    spectrum = np.geomspace(1e-2, 1, 50)
    energy = lambda p, x, d: 0.5 * jnp.sum(spectrum * x**2) - jnp.sum(x)  # noqa: E731
    steps = {}
    for mu in (None, 0.0):
        problem = jb.SmoothProblem(energy, lambda p, d: jnp.zeros(50), strong_convexity=mu, smoothness=1.0)
        x, info = jb.solve(problem, (), (), tol=1e-4, solver=AGD())
        assert info.status == Status.CONVERGED and np.isinf(info.error)
        steps[mu] = int(info.steps)
    assert steps[0.0] == steps[None] < 300


def test_newton_without_strong_convexity():
    """A barely smooth energy with mu = 0 known, where the accelerated phase has no momentum to offer."""
    case = CASES["tv"]
    problem = jb.SmoothProblem(tv_energy, case.problem.init, strong_convexity=0.0, smoothness=801.0)
    _, info = jb.solve(problem, (0.1, 1e-3), case.data, tol=1e-6)
    assert info.status == Status.CONVERGED and np.isinf(info.error)
    assert int(info.steps) < 200


class Counting:
    """A view that counts its evaluations; without jit every call is one."""

    def single(self, x):
        return None

    def __init__(self, view):
        self.view, self.constants, self.tolerance_scale = view, view.constants, view.tolerance_scale
        self.error_bound = view.error_bound
        self.values = self.gradients = self.products = 0

    def value(self, x):
        self.values += 1
        return self.view.value(x)

    def gradient(self, x):
        self.gradients += 1
        return self.view.gradient(x)

    def value_and_gradient(self, x):
        self.gradients += 1
        return self.view.value_and_gradient(x)

    def linearize(self, x):
        self.gradients += 1
        value, gradient, product = self.view.linearize(x)

        def counted(v):
            self.products += 1
            return product(v)

        return value, gradient, counted


def count(case, solver, max_steps):
    view = Counting(case.problem.view(case.params, case.data))
    with jax.disable_jit():
        info = run(solver, view, case.problem.start(case.params, case.data), 1e-3, max_steps).info
    return info, (view.values, view.gradients, view.products)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic", "weakly_convex"])  # with known constants, and without
@over(OURS)
def test_every_evaluation_is_counted(solver, name):
    info, counted = count(CASES[name], solver, 12)
    assert int(info.steps) >= 3
    if isinstance(solver, LBFGS):  # optax differentiates the value itself
        counted = (0, sum(counted), 0)
    assert tuple(map(int, info.evaluations)) == counted
    assert int(info.work) == sum(counted)


@every_pair
def test_converged_warm_start(case, solver):
    """Costs at most two gradients and returns the same bits."""
    x0, _ = solve(case, NewtonCG(), tol=1e-9)
    x, info = solve(case, solver, x0=x0, tol=1e-6)
    assert (int(info.steps), info.status) == (0, Status.CONVERGED)
    assert tuple(map(int, info.evaluations))[1:] in ((1, 0), (2, 0)) and int(info.evaluations.values) == 0
    np.testing.assert_array_equal(flat(x), flat(x0))


# ---------------------------------------------------------------- statuses


@over(OURS)
def test_step_limit(solver):
    _, info = solve(CASES["tv"], solver, tol=1e-9, max_steps=3)
    assert (int(info.steps), info.status) == (3, Status.MAX_STEPS)
    assert "step limit" in Status(int(info.status)).message
    with pytest.raises(jb.ConvergenceError, match="MAX_STEPS"):
        jb.check(info)


@every_pair
def test_nan_in_the_data(case, solver):
    broken = jax.tree.map(lambda v: np.where(np.arange(v.size).reshape(v.shape) == 1, np.nan, v), case.data)
    _, info = solve(case, solver, broken)
    assert info.status == Status.NONFINITE
    assert int(info.steps) == 0


@pytest.mark.parametrize("solver", [GradientDescent, AGD(), AGD(smoothness=0.02)], ids=["plain", "fast", "diverging"])
def test_a_smoothness_far_too_small_is_told(solver):
    """Divergence ends NONFINITE or STAGNATED, never as a success."""
    problem = jb.SmoothProblem(
        lambda p, x, d: 0.5 * jnp.sum(10 * (x - d) ** 2), lambda p, d: 0 * d, strong_convexity=10.0, smoothness=1.0
    )
    _, info = jb.solve(problem, (), np.ones(3), solver=solver)
    assert info.status in (Status.NONFINITE, Status.STAGNATED)


@pytest.mark.slow
def test_an_energy_with_kinks_stagnates():
    kinks = jb.SmoothProblem(lambda p, x, d: jnp.sum(jnp.abs(x - d)), lambda p, d: 0 * d)
    for solver in OURS.values():
        _, info = jb.solve(kinks, (), np.array([0.3, 0.7, -1.1]), solver=solver, max_steps=4000)
        if float(info.residual) > 1e-6:  # a solver may hit the kink exactly, where JAX's gradient is 0
            assert info.status in (Status.STAGNATED, Status.MAX_STEPS)


def test_slow_progress_is_not_stagnation():
    """Each step improves the residual by less than 1 per cent, for thousands of steps."""
    spectrum = np.geomspace(2e-4, 1, 20)
    energy = lambda p, x, d: 0.5 * jnp.sum(spectrum * x**2) - jnp.sum(spectrum * x)  # noqa: E731
    problem = jb.SmoothProblem(energy, lambda p, d: jnp.zeros(20), smoothness=1.0)
    _, info = jb.solve(problem, (), (), tol=1e-7, solver=GradientDescent, max_steps=40_000)
    assert info.status == Status.CONVERGED
    assert int(info.steps) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, solver",
    [(name, solver) for name in ("tv", "weakly_convex") for solver in FAST] + [("tv_without_constants", "AGD")],
)
def test_single_precision_ends_at_its_precision(name, solver):
    """Soon, and near what single precision allows: a residual that only pauses must not pass for it."""
    case = CASES[name]
    x, info = solve(case, ALL[solver], in_single(case.data), tol=0.0)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(x))
    smoothness = 80.0 if name == "weakly_convex" else 81.0
    unit = float(np.finfo(np.float32).eps) * smoothness * np.linalg.norm(flat(x))
    assert info.status == Status.PRECISION or float(info.residual) == 0
    assert float(info.residual) <= 4 * unit
    assert int(info.steps) <= (800 if name == "weakly_convex" else 300)
    jb.check(info)
    with pytest.raises(jb.ConvergenceError, match="precision"):
        jb.check(info._replace(status=jnp.asarray(Status.PRECISION)), strict=True)


@over(FAST)
def test_a_pause_in_single_precision_is_not_its_precision(solver):
    """A barely smooth energy, whose gradient norm pauses at a hundred times what single precision reaches."""
    case = CASES["tv"]._replace(params=(0.1, 1e-3))
    x, info = solve(case, solver, in_single(case.data), tol=1e-3)
    assert info.status == Status.CONVERGED


@over(FAST)
def test_single_precision_warm_started_at_its_precision(solver):
    case = CASES["tv"]
    data = in_single(case.data)
    x0, _ = jb.solve(case.problem, case.params, data, tol=0.0, solver=NewtonCG())
    x, info = jb.solve(case.problem, case.params, data, x0, tol=0.0, solver=solver)
    assert info.status == Status.PRECISION
    assert int(info.steps) <= 60


# ---------------------------------------------------------------- transformations


@over(ALL)
def test_one_compilation_for_all_tolerances_and_limits(solver):
    before = solve_jitted._cache_size()
    for k in range(6):
        solve(CASES["quadratic"], solver, tol=10.0**-k, max_steps=100 + k)
    assert solve_jitted._cache_size() - before <= 1


def test_one_compilation_under_an_outer_jit():
    case = CASES["logistic"]
    function = jax.jit(lambda tol: solve(case, None, tol=tol))
    infos = [function(tol)[1] for tol in (1e-1, 1e-3, 1e-6)]
    assert function._cache_size() == 1
    assert all(info.status == Status.CONVERGED for info in infos)
    assert float(infos[2].residual) < float(infos[1].residual) < float(infos[0].residual)


@over(OURS | {"External": External(descend)})
def test_samples_of_a_batch_do_not_disturb_each_other(solver):
    case = CASES["quadratic" if isinstance(solver, External) else "tv"]
    samples = (case.data, case.other, np.full_like(case.data, np.nan))
    tols = jnp.array([1e-5, 1e-2, 1e-5])
    together = jax.vmap(lambda data, tol: solve(case, solver, data, tol=tol, max_steps=20_000))
    x, info = together(jnp.stack(samples), tols)
    assert list(info.status) == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    assert list(np.isfinite(info.residual)) == [True, True, False]
    for k in range(2):
        alone, single = solve(case, solver, samples[k], tol=float(tols[k]), max_steps=20_000)
        # rounding differs between the batched and the single program, and line searches amplify it
        assert abs(int(single.steps) - int(info.steps[k])) <= 0.1 * int(single.steps) + 3
        assert abs(int(single.work) - int(info.work[k])) <= 0.15 * int(single.work) + 8
        one = jax.tree.map(lambda leaf, k=k: leaf[k], x)
        np.testing.assert_allclose(flat(one), flat(alone), atol=2 * float(tols[k]))


@over(OURS)
def test_refuses_a_negative_tolerance_and_a_wrong_shape(solver):
    with pytest.raises(ValueError, match="tol"):
        solve(CASES["tv"], solver, tol=-1.0)
    with pytest.raises(ValueError, match="shape"):
        solve(CASES["tv"], solver, x0=jnp.zeros((3, 3)))
