"""One setting for all tests: double precision, two CPU devices, no silent broadcasting, no window for figures."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["MPLBACKEND"] = "Agg"
# Nearly all time goes into compiling programs that run once: a third of it is saved by not optimising machine code.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")


class Photograph(NamedTuple):
    """A clean image with grey values in [0, 1] and the same image with white noise."""

    clean: jax.Array
    noisy: jax.Array


@pytest.fixture(scope="session")
def camera64() -> Photograph:
    """The camera man at 64 x 64, and with Gaussian noise of standard deviation 0.1."""
    from skimage.data import camera
    from skimage.transform import resize

    clean = resize(camera() / 255, (64, 64), anti_aliasing=True)
    noisy = clean + 0.1 * np.random.default_rng(0).standard_normal(clean.shape)
    return Photograph(jnp.asarray(clean), jnp.asarray(noisy))


def pytest_runtest_setup(item):
    from jbilevel._core import recompilation

    recompilation.made.clear()  # tests are no loop
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Every compiled program holds memory maps, of which a process has 65,530 at most on Linux: a worker that
    keeps the programs of all test files runs out of them, and the compiler crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()
