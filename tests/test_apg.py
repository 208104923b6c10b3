"""Nonmonotone APG: the reference that makes it safe without convexity decreases, though the energy need not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smooth_cases_for_tests import CASES, solve, weakly_convex_energy

from jbilevel._core import trees
from jbilevel.solvers import NonmonotoneAPG


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("name", ["tv", "weakly_convex"])
def test_the_nonmonotone_reference_decreases(name, restart):
    """energy(x_k) <= c_k, and c_k never increases: what makes nmAPG safe without convexity."""
    case = CASES[name]
    solver, view = NonmonotoneAPG(restart=restart), case.problem.view(case.params, jnp.asarray(case.data))
    first = solver.init(view, case.problem.start(case.params, case.data), 0.0)

    @jax.jit
    def follow(state):
        def step(state, _):
            state = solver.step(view, state, 0.0)
            again = view.value_and_gradient(state.x)
            return state, (state.value, state.reference, state.residual, again[0], trees.norm(again[1]))

        return jax.lax.scan(step, state, length=150)[1]

    values, references, residuals, evaluated, norms = map(np.asarray, follow(first))
    assert np.all(values <= references + 1e-12)
    assert np.all(np.diff(references, prepend=first.reference) <= 1e-12)
    assert values[-1] < values[0] < float(first.value)
    np.testing.assert_allclose(values, evaluated, atol=1e-12)
    np.testing.assert_allclose(residuals, norms, atol=1e-12)


def test_the_method_is_nonmonotone():
    case = CASES["weakly_convex"]
    energy = jax.jit(lambda x: weakly_convex_energy(0.1, x, case.data))
    values = [float(energy(solve(case, NonmonotoneAPG(), tol=0.0, max_steps=k)[0])) for k in range(1, 80)]
    assert any(after > before + 1e-9 for before, after in zip(values, values[1:], strict=False))
