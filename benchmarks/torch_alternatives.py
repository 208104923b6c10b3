"""What `benchmarks.hypergradients_torch` measures: smoothed TV in PyTorch, its hypergradient by hand and by deepinv.

Imports neither JAX nor jbilevel; torch and deepinv when they are asked for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

THETA = (-2.5, -4.0)
NOISE = 0.1
SMOOTHNESS = 1 + 8 * math.exp(THETA[0] - THETA[1])  # and strong convexity 1
GD_STEP = 2 / (SMOOTHNESS + 1)
ROOT_CONDITION = math.sqrt(SMOOTHNESS)
STEP_LIMIT = 400  # of unrolling, as in benchmarks.hypergradients
MOST_ITERATIONS = 1000  # of everything that stops by a tolerance
ANDERSON = {"history": 10, "beta": 1.0, "eps": 1e-18}

# ----------------------------------------------------------------------------------------------------------- libraries


@cache
def libraries() -> SimpleNamespace:
    """torch and deepinv; ImportError where they are not installed, or too old."""
    import torch

    _declare_vision_operators(torch)
    import deepinv
    import deepinv.optim
    import skimage  # noqa: F401

    if not hasattr(deepinv.optim, "SmoothedTVPrior"):
        raise ImportError(f"deepinv {deepinv.__version__} has no SmoothedTVPrior")
    torch.set_default_dtype(torch.float64)  # deepinv rounds the step of proximal operators to the default type
    return SimpleNamespace(torch=torch, deepinv=deepinv, optim=deepinv.optim)


def _declare_vision_operators(torch) -> None:
    """Let deepinv import a torchvision whose compiled operators do not fit this torch (a CUDA build, say).

    Such a torchvision fails while it describes two operators that torch has not heard of. deepinv imports it for its
    transforms; nothing measured here calls an operator of it, so that declaring the two is enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declare_vision_operators.library = library  # the declarations last as long as this object


# ------------------------------------------------------------------------------------------------------------- problem


class Problem:
    """Image, noisy image, and the energy as its value or with its gradient in closed form; tensors (1, 1, n, n)."""

    def __init__(self, size: int):
        from skimage.data import camera
        from skimage.transform import resize

        self.torch = libraries().torch
        clean = resize(camera() / 255, (size, size), anti_aliasing=True)
        noisy = clean + NOISE * np.random.default_rng(0).standard_normal((size, size))
        self.clean, self.y = (self.torch.from_numpy(image)[None, None] for image in (clean, noisy))
        self.theta = self.torch.tensor(THETA, dtype=self.torch.float64)

    def loss(self, x):
        return 0.5 * ((x - self.clean) ** 2).sum()

    def differences(self, x):
        pad = self.torch.nn.functional.pad
        return pad(x.diff(dim=-2), (0, 0, 0, 1)), pad(x.diff(dim=-1), (0, 1))

    def regulariser(self, theta, x):
        down, right = self.differences(x)
        return theta[0].exp() * self.torch.sqrt(down**2 + right**2 + (2 * theta[1]).exp()).sum(dim=(1, 2, 3))

    def energy(self, theta, x):
        return 0.5 * ((x - self.y) ** 2).sum() + self.regulariser(theta, x).sum()

    def gradient_closed(self, theta, x):
        pad = self.torch.nn.functional.pad
        down, right = self.differences(x)
        root = self.torch.sqrt(down**2 + right**2 + (2 * theta[1]).exp())
        down, right = (down / root)[..., :-1, :], (right / root)[..., :-1]
        adjoint = pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1)) + pad(right, (1, 0)) - pad(right, (0, 1))
        return x - self.y + theta[0].exp() * adjoint

    def gradient_autograd(self, theta, x):
        """Differentiable itself where the caller's graph asks for that, and then also in theta."""
        keep = self.torch.is_grad_enabled()
        with self.torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = self.torch.autograd.grad(self.energy(theta, x), x, create_graph=keep)
        return gradient

    def gradient(self, energy: str) -> Callable:
        return self.gradient_closed if energy == "closed form" else self.gradient_autograd


# -------------------------------------------------------------------------------------------------------- alternatives

Found = tuple[np.ndarray, dict[str, float]]  # hypergradient, and iterations as {"lower": ..., "adjoint": ...}


def by_hand(problem: Problem, energy: str, tol: float, adjoint_tol: float) -> Callable[[], Found]:
    """FISTA until the gradient is ``tol`` of the first, CG with autograd's Hessian until its residual is as small."""
    torch, gradient = problem.torch, problem.gradient(energy)
    beta = (ROOT_CONDITION - 1) / (ROOT_CONDITION + 1)

    def lower(theta):
        x = z = problem.y
        g, steps = gradient(theta, z), 0
        goal = tol * float(g.norm())
        while float(g.norm()) > goal and steps < MOST_ITERATIONS:
            x, before = z - g / SMOOTHNESS, x
            z = x + beta * (x - before)
            g, steps = gradient(theta, z), steps + 1
        return z, steps

    def solve(product, right):
        q, residual = torch.zeros_like(right), right
        direction, square, steps = residual, float((residual**2).sum()), 0
        goal = adjoint_tol**2 * square
        while square > goal and steps < MOST_ITERATIONS:
            image = product(direction)
            step = square / float((direction * image).sum())
            q = q + step * direction
            residual = residual - step * image
            square, before = float((residual**2).sum()), square
            direction, steps = residual + (square / before) * direction, steps + 1
        return q, steps

    def hypergradient() -> Found:
        with torch.no_grad():
            z, steps = lower(problem.theta)
        x, theta = z.detach().requires_grad_(), problem.theta.clone().requires_grad_()
        g = gradient(theta, x)  # one graph serves all products with the Hessian
        product = lambda v: torch.autograd.grad(g, x, v, retain_graph=True)[0]  # noqa: E731
        q, adjoint_steps = solve(product, z - problem.clean)
        (cross,) = torch.autograd.grad(g, theta, q)
        return -cross.numpy(), {"lower": steps, "adjoint": adjoint_steps}

    return hypergradient


def unrolled(problem: Problem, energy: str, steps: int) -> Callable[[], Found]:
    """Backpropagation through FISTA with the same momentum."""
    gradient = problem.gradient(energy)
    beta = (ROOT_CONDITION - 1) / (ROOT_CONDITION + 1)

    def hypergradient() -> Found:
        theta = problem.theta.clone().requires_grad_()
        x = z = problem.y
        for _ in range(steps):
            x, before = z - gradient(theta, z) / SMOOTHNESS, x
            z = x + beta * (x - before)
        (found,) = problem.torch.autograd.grad(problem.loss(x), theta)
        return found.numpy(), {"lower": steps}

    return hypergradient


@cache
def priors() -> dict[str, type]:
    """deepinv priors with trainable theta: one given by its value, one built on deepinv's own closed-form gradient."""
    libs = libraries()
    torch = libs.torch

    class TV(libs.optim.Prior):
        def __init__(self, problem):
            super().__init__()
            self.explicit_prior = True
            self.theta = torch.nn.Parameter(problem.theta.clone())
            self.value = problem.regulariser
            self.gradients = 0

        def fn(self, x, *args, **kwargs):
            return self.value(self.theta, x)

        def grad(self, x, *args, **kwargs):
            self.gradients += 1
            return super().grad(x, *args, **kwargs)

    class ClosedTV(libs.optim.SmoothedTVPrior):
        def __init__(self, problem):
            super().__init__()
            self.theta = torch.nn.Parameter(problem.theta.clone())
            self.gradients = 0

        def fn(self, x, *args, **kwargs):
            self.eps = self.theta[1].exp()
            return self.theta[0].exp() * super().fn(x)

        def grad(self, x, *args, **kwargs):
            self.gradients += 1
            self.eps = self.theta[1].exp()
            return self.theta[0].exp() * super().grad(x)

    return {"autograd": TV, "closed form": ClosedTV}


def _deepinv(problem: Problem, energy: str, build: Callable) -> Callable[[], Found]:
    """A step of deepinv training: reconstruct, evaluate the loss, backpropagate to the prior's parameters."""
    libs = libraries()
    prior, physics = priors()[energy](problem), libs.deepinv.physics.Denoising()
    shared = {"data_fidelity": libs.optim.L2(), "prior": prior, "trainable_params": []}
    model = build(libs.optim, cost_fn=lambda *_: None, **shared)  # otherwise each iteration evaluates the energy too
    backward = _count_checks(model) if model.DEQ else None

    def hypergradient() -> Found:
        prior.theta.grad, prior.gradients = None, 0
        if backward:
            backward.clear()
        problem.loss(model(problem.y, physics)).backward()
        steps = {"lower": prior.gradients}
        if backward is not None:  # two more gradients are taken after the last iteration
            steps = {"lower": prior.gradients - 2, "adjoint": 2 + len(backward)}
        return prior.theta.grad.numpy().copy(), steps

    return hypergradient


def _count_checks(model) -> list:
    """Grows by one with each check of the backward iteration, which deepinv does not count; the first two have none.

    The forward iteration keeps the method that it was given when it was built.
    """
    seen, check = [], model.check_conv_fn

    def counting(*arguments):
        seen.append(None)
        return check(*arguments)

    model.check_conv_fn = counting
    return seen


def unfolded_gd(problem: Problem, energy: str, steps: int) -> Callable[[], Found]:
    build = lambda optim, **shared: optim.GD(stepsize=GD_STEP, max_iter=steps, unfold=True, **shared)  # noqa: E731
    return _deepinv(problem, energy, build)


def unfolded_fista(problem: Problem, energy: str, steps: int, constant: bool = False) -> Callable[[], Found]:
    """Gradient step on the prior, proximal step on the data fidelity; its momentum is 1 - 1 / (k + a)."""
    step = 1 / (SMOOTHNESS - 1)
    ratio = math.sqrt(step / (1 + step))
    momentum = (1 - ratio) / (1 + ratio)
    a = [1 / (1 - momentum) - k for k in range(steps)] if constant else 3
    params = {"stepsize": step, "lambda": 1.0, "g_param": None, "a": a}

    def build(optim, **shared):
        return optim.FISTA(g_first=True, max_iter=steps, unfold=True, params_algo=params, **shared)

    return _deepinv(problem, energy, build)


def equilibrium(problem: Problem, energy: str, tol: float, anderson: bool = False) -> Callable[[], Found]:
    """DEQ=True: gradient descent to a fixed point, and a fixed-point iteration for the adjoint."""

    def build(optim, **shared):
        backward, forward = {"max_iter_backward": MOST_ITERATIONS}, None
        if anderson:
            forward = optim.AndersonAccelerationConfig(ANDERSON["history"], ANDERSON["beta"], ANDERSON["eps"])
            backward |= {f"{name}_backward": ANDERSON[name] for name in ("beta", "eps")}
            backward |= {"anderson_acceleration_backward": True, "history_size_backward": ANDERSON["history"]}
        stop = {"early_stop": True, "thres_conv": tol, "max_iter": MOST_ITERATIONS}
        deq = optim.DEQConfig(**backward)
        return optim.GD(stepsize=GD_STEP, DEQ=deq, anderson_acceleration=forward, **stop, **shared)

    return _deepinv(problem, energy, build)


def equilibrium_defaults(problem: Problem, energy: str) -> Callable[[], Found]:
    """DEQ=True and nothing else: 100 iterations, then at most 50 for the adjoint."""
    return _deepinv(problem, energy, lambda optim, **shared: optim.GD(stepsize=GD_STEP, DEQ=True, **shared))


class Row(NamedTuple):
    make: Callable[..., Callable[[], Found]]  # of problem, energy and what is tuned
    tuned: str  # "tolerances", "tolerance", "steps" or "nothing"
    guess: int = 130  # of steps


ROWS = {
    "torch, FISTA + CG": Row(by_hand, "tolerances"),
    "torch, unrolled FISTA": Row(unrolled, "steps"),
    "deepinv, DEQ": Row(equilibrium, "tolerance"),
    "deepinv, DEQ, Anderson": Row(partial(equilibrium, anderson=True), "tolerance"),
    "deepinv, DEQ, defaults": Row(equilibrium_defaults, "nothing"),
    "deepinv, unfolded GD": Row(unfolded_gd, "steps", 290),
    "deepinv, unfolded FISTA": Row(unfolded_fista, "steps", STEP_LIMIT),
    "deepinv, unfolded FISTA, constant momentum": Row(partial(unfolded_fista, constant=True), "steps"),
}
