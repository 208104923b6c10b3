"""Upper-level losses of one sample: images, ``loss(params, x, data)``, as values that hash and compare; segmentations,
``loss(logits, labels)``, which are put behind a task network."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core import brief
from jbilevel._core.validate import native

__all__ = [
    "Adversarial",
    "DenoisingScore",
    "ImageLoss",
    "Segmentation",
    "charbonnier",
    "cross_entropy",
    "dice",
    "huber",
    "iou",
    "log_cosh_dice",
    "squared_error",
]


@dataclass(frozen=True)
class ImageLoss:
    """Sum (or mean) over all elements of ``penalty(x - clean, scale)``, where ``clean = data[target]``.

    Made by :func:`squared_error`, :func:`huber` and :func:`charbonnier`. Two losses with the same fields are equal
    and have the same hash, so a jitted function that takes one as a static argument is compiled once.

    Attributes:
        penalty: elementwise function of (residual, scale) that JAX can trace; a module-level function, for a lambda
            or a partial never equals another one.
        scale: passed on to ``penalty``.
        target: where the clean image is in ``data``: a key where that is a mapping, a position where it is a tuple
            or a list, None where ``data`` itself is the clean image.
        mean: divide by the number of elements.
        part: which part of ``x`` is compared: None for all of it; 0 for the primal part of a saddle problem, whose
            unknown is the pair (x, y); (0, 0) for the first part of that, the image of a regulariser with an auxiliary
            variable, whose primal part is (x, z).

    >>> loss = ImageLoss(lambda d, scale: jnp.abs(d / scale), scale=2.0, part=0)  # of a saddle point (x, y)
    >>> print(loss(None, (jnp.array([1.0, 5.0]), jnp.zeros(4)), {"x": jnp.ones(2)}))
    2.0
    """

    penalty: Callable[[Any, float], Any]
    scale: float = 1.0
    target: Hashable = "x"
    mean: bool = False
    part: Hashable = None

    __repr__ = brief.settings

    def __call__(self, params, x, data):
        """The loss of one sample; ``params`` is not used.

        Args:
            params: ignored; there because every loss of the library takes it.
            x: real array, or pytree of real arrays.
            data: mapping, tuple or list that holds an array of the shape of ``x`` (a pytree of its structure) at
                ``target``; or that array itself if ``target`` is None.

        Returns:
            A scalar of the dtype of ``x``; clean images are cast to it.

        Raises:
            TypeError: ``data`` cannot be indexed with ``target``, or ``x`` is complex.
            KeyError, IndexError: ``data`` has nothing at ``target``.
            ValueError: ``x`` and the clean image differ in structure or shape.
        """
        for part in () if self.part is None else self.part if isinstance(self.part, tuple) else (self.part,):
            x = x[part]
        residuals = _residuals(x, _clean(data, self.target))
        total = sum(jnp.sum(self.penalty(r, self.scale)) for r in residuals)
        return total / sum(r.size for r in residuals) if self.mean else total


def squared_error(target: Hashable = "x", mean: bool = False, *, part: Hashable = None) -> ImageLoss:
    """½ ‖x - clean‖², the sum over the pixels of one sample; with ``mean`` divided by their number, so half the mean
    squared error. Its gradient is 1-Lipschitz in x (1/n with ``mean`` and n pixels).

    Args:
        target, mean, part: see :class:`ImageLoss`.

    >>> loss = squared_error()
    >>> print(loss(None, jnp.array([1.0, 2.0]), {"x": jnp.array([1.0, 4.0]), "y": jnp.zeros(2)}))
    2.0
    >>> print(squared_error(target=1, mean=True)(None, jnp.ones(2), (jnp.zeros(2), jnp.array([1.0, 4.0]))))
    2.25
    >>> loss == squared_error() and hash(loss) == hash(squared_error())
    True
    """
    return ImageLoss(penalty=_half_square, scale=1.0, target=target, mean=bool(mean), part=part)


def huber(target: Hashable = "x", mean: bool = False, *, delta: float = 0.1, part: Hashable = None) -> ImageLoss:
    """Sum over the pixels of h(x - clean), h(d) = ½ d² for |d| <= delta and delta (|d| - ½ delta) beyond: the squared
    error for small residuals, an l1 norm that outliers pull less for large ones. Its gradient is 1-Lipschitz in x.

    Args:
        target, mean, part: see :class:`ImageLoss`.
        delta: where the parabola ends, positive, in units of the image.

    Raises:
        ValueError: ``delta`` is not a positive finite number.

    >>> print(huber(target=None, delta=1.0)(None, jnp.array([0.5, -3.0]), jnp.zeros(2)))
    2.625
    """
    return ImageLoss(penalty=_huber, scale=_positive("delta", delta), target=target, mean=bool(mean), part=part)


def charbonnier(target: Hashable = "x", mean: bool = False, *, eps: float = 1e-3, part: Hashable = None) -> ImageLoss:
    """Sum over the pixels of √(d² + eps²) - eps, d = x - clean: a smooth l1 norm that is 0 at d = 0 and at most eps
    per pixel below |d|. Its gradient is (1/eps)-Lipschitz in x.

    Args:
        target, mean, part: see :class:`ImageLoss`.
        eps: width of the smoothing, positive, in units of the image.

    Raises:
        ValueError: ``eps`` is not a positive finite number.

    >>> print(charbonnier(target=None, eps=3.0)(None, jnp.array([4.0, 0.0]), jnp.zeros(2)))
    2.0
    """
    return ImageLoss(penalty=_charbonnier, scale=_positive("eps", eps), target=target, mean=bool(mean), part=part)


@dataclass(frozen=True)
class DenoisingScore:
    """½ ‖∇R(params, y) - (y - x)‖²: one gradient step of size 1 on R removes the noise of y as well as it can.

    Denoising score matching (Vincent 2011): for y = x + noise of standard deviation s the minimiser over all functions
    has ∇R/s² = -∇ log of the density of y. It needs no lower-level solve, one step costs a few gradients of R, so it
    pre-trains a regulariser for `jbilevel.explicit.Oracle`; the weight that suits a reconstruction is to be found
    afterwards.

    Args:
        regularizer: ``R(params, x) -> scalar`` for one image.
        noisy, target: where y and x are in ``data``, as for :class:`ImageLoss`.

    >>> loss = DenoisingScore(lambda weight, x: 0.5 * weight * jnp.sum(x**2))
    >>> print(loss(0.5, {"x": jnp.array([1.0, 2.0]), "y": jnp.array([2.0, 4.0])}))
    0.0
    """

    regularizer: Callable[[Any, Any], Any]
    _: KW_ONLY
    noisy: Hashable = "y"
    target: Hashable = "x"

    __repr__ = brief.settings

    def __call__(self, params, data):
        y = _clean(data, self.noisy)
        return squared_error(None)(
            params, jax.grad(self.regularizer, argnums=1)(params, y), y - _clean(data, self.target)
        )


@dataclass(frozen=True)
class Adversarial:
    """R(params, x) - R(params, f) + penalty (‖∇R(params, t x + (1 - t) f)‖ - 1)²: small on clean x, large on bad f.

    How adversarial (convex) regularisers are trained (Lunz, Öktem & Schönlieb 2018, lunz_adversarial_2018; Mukherjee et
    al. 2020, mukherjee_acr_2020; the rival of bilevel learning in Bogensperger et al. 2024, with penalty 10): over
    pairs of clean images x and naive reconstructions f, such as filtered backprojections, R estimates the Wasserstein-1
    distance of the two distributions, and the penalty keeps it 1-Lipschitz, ‖·‖ the 2-norm over the pixels. It needs no
    lower-level solve; the weight that suits a reconstruction is to be found afterwards.

    Args:
        regularizer: ``R(params, x) -> scalar`` for one image.
        penalty: nonnegative.
        naive, target, mix: where f, x and t are in ``data``, as for :class:`ImageLoss`. t is a number in [0, 1], to be
            drawn uniformly and anew for each step.

    Raises:
        ValueError: ``penalty`` is negative or not finite.

    >>> loss = Adversarial(lambda weight, x: weight * jnp.sum(x))  # the gradient has the norm 2 weight
    >>> print(loss(1.0, {"x": jnp.zeros(4), "naive": jnp.ones(4), "mix": 0.5}))
    6.0
    """

    regularizer: Callable[[Any, Any], Any]
    _: KW_ONLY
    penalty: float = 10.0
    naive: Hashable = "naive"
    target: Hashable = "x"
    mix: Hashable = "mix"

    __repr__ = brief.settings

    def __post_init__(self):
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise ValueError(f"`penalty` is {self.penalty}: give a finite number that is not negative.")

    def __call__(self, params, data):
        naive, t = jnp.asarray(_clean(data, self.naive)), _clean(data, self.mix)
        clean = naive - _residual(naive, jnp.asarray(_clean(data, self.target)))
        between = naive + t * (clean - naive)
        squared = jnp.sum(jax.grad(self.regularizer, argnums=1)(params, between) ** 2)
        flat = squared == 0  # where the norm has no derivative, 0 is one of its subgradients
        slope = jnp.where(flat, 0.0, jnp.sqrt(jnp.where(flat, 1.0, squared)))
        difference = self.regularizer(params, clean) - self.regularizer(params, naive)
        return difference + self.penalty * (slope - 1) ** 2


# --------------------------------------------------------------------------------------------------------- segmentation


def cross_entropy(logits, labels, *, ignore: int | None = None):
    """Mean over the pixels of -log p(label), for one image or volume.

    Args:
        logits: (C, *shape) for C classes, p = softmax over the first axis; or (*shape) for the two classes 0 and 1,
            p(1) = sigmoid.
        labels: integers or booleans (*shape), 0, ..., C - 1.
        ignore: a label whose pixels do not count (255 in many data sets). Where no pixel counts, the loss is 0.

    Returns:
        A scalar; NaN, which every oracle reports, if a label is neither a class nor ``ignore``.

    Raises:
        ValueError: the shapes do not fit. TypeError: the labels are not integers.

    >>> print(round(float(cross_entropy(jnp.zeros((4, 2, 2)), jnp.array([[0, 1], [2, 3]]))), 4))  # log 4
    1.3863
    """
    logits, labels, valid = _classified(logits, labels, ignore)
    if logits.ndim == labels.ndim:
        each = jax.nn.softplus(jnp.where(labels == 1, -logits, logits))
    else:
        safe = jnp.where(valid, labels, 0)
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=0), safe[None], axis=0)[0]
    return jnp.sum(jnp.where(valid, each, 0.0)) / jnp.maximum(jnp.sum(valid.astype(logits.dtype)), 1.0)


def dice(logits, labels, *, ignore: int | None = None, smoothing: float = 1.0, present_only: bool = False):
    """Soft Dice loss 1 - mean_c (2 sum p_c g_c + s)/(sum p_c + sum g_c + s), sums over the pixels of one image.

    Two classes by one logit: the mean is over the class 1 alone. A class that is absent from the labels has
    s/(sum p_c + s), which is 1 where the network does not see it either, and pulls p_c down elsewhere.

    Args:
        logits, labels, ignore: as for :func:`cross_entropy`.
        smoothing: s, positive; a small one makes an absent class count as a failure whatever the network says.
        present_only: leave classes out that no label of the image has; 0 where none is left.

    Returns, Raises: as :func:`cross_entropy`; ValueError: ``smoothing`` is not positive.

    Reference: Milletari, Navab & Ahmadi, V-Net, 3DV 2016 (there with squares in the denominator).

    >>> labels = jnp.array([0, 1, 1])
    >>> print(round(float(dice(jnp.array([-50.0, 50.0, -50.0]), labels, smoothing=1e-6)), 4))  # 1 - 2/3
    0.3333
    """
    inside, probable, true, present = _overlaps(logits, labels, ignore, present_only)
    s = _positive("smoothing", smoothing)
    return 1 - _mean_over_classes((2 * inside + s) / (probable + true + s), present)


def iou(logits, labels, *, ignore: int | None = None, smoothing: float = 1.0, present_only: bool = False):
    """Soft Jaccard loss 1 - mean_c (sum p_c g_c + s)/(sum p_c + sum g_c - sum p_c g_c + s); see :func:`dice`.

    >>> print(round(float(iou(jnp.array([-50.0, 50.0, -50.0]), jnp.array([0, 1, 1]), smoothing=1e-6)), 4))  # 1 - 1/2
    0.5
    """
    inside, probable, true, present = _overlaps(logits, labels, ignore, present_only)
    s = _positive("smoothing", smoothing)
    return 1 - _mean_over_classes((inside + s) / (probable + true - inside + s), present)


def log_cosh_dice(logits, labels, **settings):
    """log cosh of the :func:`dice` loss (Jadon 2020, arXiv:2006.14822): the same minimisers, flatter near 0.

    >>> logits, labels = jnp.array([-50.0, 50.0, -50.0]), jnp.array([0, 1, 1])
    >>> print(round(float(log_cosh_dice(logits, labels, smoothing=1e-6)), 4))  # log cosh (1/3)
    0.0546
    """
    loss = dice(logits, labels, **settings)
    return loss + jax.nn.softplus(-2 * loss) - math.log(2)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """A weighted sum of :func:`cross_entropy`, :func:`dice`, :func:`iou` and :func:`log_cosh_dice`, by default all of
    weight 1 (the composite loss of Kadagala, kadagala_hoag_report and kadagala_thesis_2025); a value that hashes.

    log cosh is monotone on Dice losses and the Jaccard loss nearly a function of Dice, so that the sum has the
    minimisers of its parts. One label per image is allowed too: logits (C,) and labels ().

    Args:
      cross_entropy, dice, iou, log_cosh_dice: weights, not negative; what has the weight 0 is not computed.
      ignore: of all terms. smoothing, present_only: of all but the cross-entropy.

    Raises:
      ValueError: a weight is negative, or all are 0. Called: what its terms raise.

    >>> loss = Segmentation(iou=0.0, log_cosh_dice=0.0, ignore=255)
    >>> logits, labels = jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.array([1, 255])
    >>> bool(loss(logits, labels) == cross_entropy(logits, labels, ignore=255) + dice(logits, labels, ignore=255))
    True
    """

    cross_entropy: float = 1.0
    dice: float = 1.0
    iou: float = 1.0
    log_cosh_dice: float = 1.0
    ignore: int | None = None
    smoothing: float = 1.0
    present_only: bool = False

    __repr__ = brief.settings

    def __post_init__(self):
        weights = {name: vars(self)[name] for name in ("cross_entropy", "dice", "iou", "log_cosh_dice")}
        if not all(weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"the weights must not be negative, and one must be positive, got {weights}.")

    def __call__(self, logits, labels):
        overlap = {"smoothing": self.smoothing, "present_only": self.present_only}
        terms = (
            (self.cross_entropy, cross_entropy, {}),
            (self.dice, dice, overlap),
            (self.iou, iou, overlap),
            (self.log_cosh_dice, log_cosh_dice, overlap),
        )
        return sum(w * loss(logits, labels, ignore=self.ignore, **more) for w, loss, more in terms if w)


def _classified(logits, labels, ignore):
    """Logits (NaN where a label is out of range), labels as integers, and which pixels count."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    binary = logits.shape == labels.shape
    if not binary and logits.shape[1:] != labels.shape:
        raise ValueError(f"`logits` {logits.shape} must be {labels.shape} or have one axis of classes in front.")
    labels = labels.astype(jnp.int32)
    valid = jnp.ones(labels.shape, bool) if ignore is None else labels != ignore
    known = (labels >= 0) & (labels < (2 if binary else logits.shape[0]))
    return jnp.where(jnp.all(known | ~valid), logits, jnp.nan), labels, valid


def _overlaps(logits, labels, ignore, present_only):
    """Sums over the pixels of p g, p and g, and whether a class counts: (C,), or (1,) for two classes by one logit."""
    logits, labels, valid = _classified(logits, labels, ignore)
    if logits.ndim == labels.ndim:
        p, g = jax.nn.sigmoid(logits)[None], (labels == 1)[None]
    else:
        classes = jnp.arange(logits.shape[0]).reshape((-1,) + (1,) * labels.ndim)
        p, g = jax.nn.softmax(logits, axis=0), labels[None] == classes
    p, g = (jnp.where(valid[None], v.astype(p.dtype), 0.0).reshape(p.shape[0], -1) for v in (p, g))
    true = jnp.sum(g, axis=1)
    return jnp.sum(p * g, axis=1), jnp.sum(p, axis=1), true, (true > 0) | (not present_only)


def _mean_over_classes(score, present):
    """The mean of those that count, 1 where none does."""
    count = jnp.sum(present.astype(score.dtype))
    return jnp.where(count > 0, jnp.sum(jnp.where(present, score, 0.0)) / jnp.maximum(count, 1.0), 1.0)


# ---------------------------------------------------------------------------------------------------------------- parts


def _half_square(d, scale):
    return 0.5 * d**2


def _huber(d, delta):
    inside = jnp.clip(d, -delta, delta)
    return inside * (d - 0.5 * inside)


def _charbonnier(d, eps):
    # The difference √(d² + eps²) - eps without its cancellation at small d.
    return d**2 / (jnp.sqrt(d**2 + eps**2) + eps)


def _clean(data, target):
    if target is None:
        return data
    if isinstance(data, Mapping):
        if target not in data:
            raise KeyError(f"`data` has no entry {target!r} but {sorted(map(str, data))}: name the one in `target`.")
        return data[target]
    if isinstance(data, (tuple, list)):
        if not isinstance(target, int):
            raise TypeError(f"`data` is a {type(data).__name__}: `target` must be a position, not {target!r}.")
        if not -len(data) <= target < len(data):
            raise IndexError(f"`data` has {len(data)} entries: `target`={target} is not a position in it.")
        return data[target]
    raise TypeError(
        f"`data` is a {type(data).__name__}, not a mapping, tuple or list: with `target=None` it is the clean image."
    )


def _residuals(x, clean):
    values, structure = jax.tree.flatten(x)
    references, expected = jax.tree.flatten(clean)
    if structure != expected:
        raise ValueError(
            f"`x` is {structure} and the clean image {expected}: choose the part of `x` to compare with `part`."
        )
    return [_residual(jnp.asarray(native(v)), jnp.asarray(native(r))) for v, r in zip(values, references, strict=True)]


def _residual(value, reference):
    if value.shape != reference.shape:
        raise ValueError(f"`x` has shape {value.shape} and the clean image {reference.shape}: they must be equal.")
    if jnp.iscomplexobj(value) or jnp.iscomplexobj(reference):
        raise TypeError("`x` and the clean image must be real: split complex images into real and imaginary parts.")
    return value - reference.astype(value.dtype)


def _positive(name, value):
    value = float(value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` is {value}: give a positive finite number.")
    return value


def __dir__():
    return __all__
