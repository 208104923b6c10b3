"""Limited-memory BFGS with a diagonal start from the sizes of past gradients, and long secants, on flat vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees

DECAY = 0.9  # of the mean of squared gradients
LEAST = 1e-3  # size of a gradient entry, against the root mean square of all, below which none is told from another
DAMPED = 0.2  # least curvature of a pair, against what the model expects (Powell 1978)
SMOOTH = 0.02  # of a pair that met no kink
POINTS = 20  # that secants start from
FORGET = 0.9  # of the length of secants, at each step
FAR = 0.5  # share of it that a secant has


class Memory(NamedTuple):
    """H = inverse Hessian model: pairs (s, y), the newest first, on H0 = gamma D, D = 1/(rms of past gradients)."""

    s: Any  # (pairs, p)
    y: Any
    count: Any  # pairs that are there
    squares: Any  # running mean of squared gradients
    seen: Any  # gradients in it


def empty(like, pairs: int) -> Memory:
    """For flat vectors like ``like``."""
    none = jnp.zeros((pairs, like.size), like.dtype)
    zero = jnp.zeros((), jnp.int32)
    return Memory(s=none, y=none, count=zero, squares=jnp.zeros_like(like), seen=zero)


def saw(memory: Memory, gradient) -> Memory:
    """With one more gradient in the sizes."""
    squares = DECAY * memory.squares + (1 - DECAY) * gradient**2
    return memory._replace(squares=squares, seen=memory.seen + 1)


def learn(memory: Memory, s, y, smooth) -> Memory:
    """With the pair (s, y), damped towards the model where its curvature is too small; the first has to be convex.

    smooth: whether values and slopes at its ends agree. At a kink they do not, and a small curvature may be none; on
    smooth ground a flat valley is as it is, and damping would have to be undone pair by pair.
    """
    diagonal = _diagonal(memory)
    curvature, first = s @ y, memory.count == 0
    model = s / (diagonal * _scale(memory, diagonal))
    expected = s @ model
    least = jnp.where(smooth, SMOOTH, DAMPED)
    short = ~first & (curvature < least * expected)
    theta = jnp.where(short, (1 - least) * expected / jnp.where(short, expected - curvature, 1.0), 1.0)
    y = theta * y + (1 - theta) * jnp.where(short, model, 0.0)
    curvature = s @ y
    fine = (curvature > 0) & jnp.isfinite(curvature) & jnp.all(jnp.isfinite(y))
    count = jnp.minimum(memory.count + 1, memory.s.shape[0])
    return trees.where(fine, memory._replace(s=_before(memory.s, s), y=_before(memory.y, y), count=count), memory)


def direction(memory: Memory, gradient):
    """-H gradient (Nocedal & Wright 2006, Algorithm 7.4)."""
    diagonal, pairs = _diagonal(memory), memory.s.shape[0]
    rho = jnp.sum(memory.s * memory.y, axis=1)
    rho = jnp.where(rho > 0, 1 / jnp.where(rho > 0, rho, 1.0), 0.0)

    def down(i, carry):
        q, alphas = carry
        alpha = jnp.where(i < memory.count, rho[i] * (memory.s[i] @ q), 0.0)
        return q - alpha * memory.y[i], alphas.at[i].set(alpha)

    q, alphas = jax.lax.fori_loop(0, pairs, down, (gradient, jnp.zeros((pairs,), gradient.dtype)))
    q = jnp.where(memory.count > 0, _scale(memory, diagonal), 1.0) * diagonal * q

    def up(k, q):
        i = pairs - 1 - k
        beta = rho[i] * (memory.y[i] @ q)
        return jnp.where(i < memory.count, q + memory.s[i] * (alphas[i] - beta), q)

    return -jax.lax.fori_loop(0, pairs, up, q)


def _diagonal(memory: Memory):
    weight = 1 - DECAY ** memory.seen.astype(memory.squares.dtype)
    size = jnp.sqrt(memory.squares / jnp.where(memory.seen > 0, weight, 1.0))
    least = LEAST * jnp.sqrt(jnp.mean(size**2))
    return 1 / (size + jnp.where(least > 0, least, 1.0))


def _scale(memory: Memory, diagonal):
    """gamma of the newest pair."""
    s, y = memory.s[0], memory.y[0]
    below = y @ (diagonal * y)
    return jnp.where(below > 0, s @ y / jnp.where(below > 0, below, 1.0), 1.0)


def _before(rows, new):
    return jnp.roll(rows, 1, 0).at[0].set(new)


class Trail(NamedTuple):
    """The last points with their gradients, the newest first.

    Secants span about half of the longest of the recent steps: over a short step at a kink, or between inexact
    gradients, the change of the gradient says nothing of the curvature.
    """

    points: Any  # (POINTS, p)
    gradients: Any
    count: Any
    length: Any

    @classmethod
    def at(cls, point, gradient) -> Trail:
        none = jnp.zeros((POINTS, point.size), point.dtype)
        one = jnp.ones((), jnp.int32)
        return cls(none.at[0].set(point), none.at[0].set(gradient), count=one, length=jnp.zeros((), point.dtype))

    def secant(self, point, gradient, step) -> tuple[Trail, Any, Any]:
        """(the trail with one more point, ``step`` away from the last, and the pair (s, y) that ends there)."""
        length = jnp.maximum(step, FORGET * self.length)
        apart = jnp.linalg.norm(self.points - point[None], axis=1)
        far = (jnp.arange(POINTS) < self.count) & (apart >= FAR * length)
        back = jnp.where(jnp.any(far), jnp.argmax(far), self.count - 1)
        count = jnp.minimum(self.count + 1, POINTS)
        longer = Trail(_before(self.points, point), _before(self.gradients, gradient), count, length)
        return longer, point - self.points[back], gradient - self.gradients[back]

    def again(self, gradient) -> Trail:
        """With a better gradient at the newest point."""
        return self._replace(gradients=self.gradients.at[0].set(gradient))
