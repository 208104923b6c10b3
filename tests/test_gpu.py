"""On a GPU: every kind of oracle and every operator computes what the CPU does."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import relative

import jbilevel as jb

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common, programs  # noqa: E402
from benchmarks.programs import CASES  # noqa: E402

pytestmark = pytest.mark.gpu

ORACLES = [name for name in programs.ORACLES if CASES[name].quick]
OPERATORS = programs.OPERATORS | programs.BRIDGES
PRODUCTS = [name for name, case in CASES.items() if case.kind == "operator"]
# between devices: solves to their tolerances, and sums in another order
OF_ORACLES = {"float64": 1e-6, "float32": 1e-3}
OF_OPERATORS = {"float64": 1e-12, "float32": 3e-5}
IN_SINGLE = 1e-6  # what functions of the host compute in


def run(name, dtype, device):
    """The result of a case on a device, as numpy arrays."""
    with common.precision(dtype), jax.default_device(device):
        program = CASES[name].build(dtype)
        return jax.device_get(jax.jit(program.function)(*program.arguments))


def on_both(name, dtype):
    needed = CASES[name].needs
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    return (run(name, dtype, device) for device in (jax.devices()[0], jax.devices("cpu")[0]))


@pytest.mark.parametrize("dtype", OF_ORACLES)
@pytest.mark.parametrize("name", ORACLES)
def test_hypergradients(name, dtype):
    found, expected = on_both(name, dtype)
    for hg in (found, expected):
        assert max(np.max(hg.lower.status), np.max(hg.adjoint.status)) < jb.Status.INDEFINITE
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(hg.grad))
    assert relative(found.grad, expected.grad) <= OF_ORACLES[dtype]
    assert relative(found.values, expected.values) <= OF_ORACLES[dtype]


@pytest.mark.parametrize("dtype", OF_OPERATORS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_operators(name, dtype):
    """A x, A^T y and a gradient."""
    tolerance = IN_SINGLE if CASES[name].bridge else OF_OPERATORS[dtype]
    for found, expected in zip(*on_both(name, dtype), strict=True):
        assert jax.tree.leaves(found)[0].dtype in (dtype, jnp.result_type(dtype, jnp.complex64))
        assert relative(found, expected) <= tolerance


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoints(name):
    if CASES[name].needs and importlib.util.find_spec(CASES[name].needs) is None:
        pytest.skip(f"needs {CASES[name].needs}")
    measured = jb.operators.dot_test(OPERATORS[name]())
    tolerance = IN_SINGLE if CASES[name].bridge else 1e-12
    assert measured.adjoint <= tolerance
    assert measured.transpose <= 10 * tolerance or np.isnan(measured.transpose)
