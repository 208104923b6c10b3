"""Quality of images (PSNR, SSIM, differentiable) and of segmentations (Dice, IoU), as functions of JAX arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core.validate import native

__all__ = ["dice", "iou", "mean_psnr", "psnr", "psnr_of_mean_mse", "ssim", "top_k"]

# Wang et al. 2004: Gaussian of standard deviation 1.5 cut at 3.5 of them (radius 5, 11 taps) and the two stabilisers.
_SIGMA, _RADIUS, _K1, _K2 = 1.5, 5, 0.01, 0.03
_WINDOW = 2 * _RADIUS + 1


def psnr(x, reference, data_range=1.0):
    """Peak signal-to-noise ratio of one image, 10 log10(data_range² / mean |x - reference|²), in dB.

    Args:
        x, reference: real arrays of one and the same shape; integers are converted to floats without rescaling.
        data_range: positive scalar, the distance between the least and the greatest possible value. Papers also use
            ``reference.max() - reference.min()``: pass that to compare with them.

    Returns:
        A scalar of the wider dtype of the two (at least float32); ``inf``, without a gradient, where x == reference.

    Raises:
        ValueError: the shapes differ, the images are empty, or ``data_range`` is not a positive scalar.
        TypeError: an image is complex.

    >>> x = jnp.zeros((4, 4))
    >>> print(round(float(psnr(x + 0.1, x)), 3), round(float(psnr(x + 0.1, x, data_range=10.0)), 3))
    20.0 40.0
    """
    x, reference = _float_pair(x, reference)
    return _decibels(jnp.mean((x - reference) ** 2), _scalar_range(data_range, x.dtype))


def mean_psnr(xs, references, data_range=1.0):
    """Mean over a batch of the PSNR of each image, in dB. It weighs the good images more than
    :func:`psnr_of_mean_mse`, which it never falls below (Jensen); papers report either.

    Args:
        xs, references: arrays of one and the same shape (n, ...).
        data_range: positive, a scalar or one number per image, shape (n,).

    Returns:
        A scalar; ``inf`` as soon as one image equals its reference.

    Raises:
        ValueError: the shapes differ, the batch is empty, or ``data_range`` has a wrong shape or is not positive.
        TypeError: the images are complex.

    >>> references = jnp.zeros((2, 8, 8))
    >>> xs = references + jnp.array([0.1, 0.01]).reshape(2, 1, 1)  # 20 and 40 dB
    >>> print(round(float(mean_psnr(xs, references)), 2))
    30.0
    >>> print(round(float(mean_psnr(xs, references, jnp.array([1.0, 0.1]))), 2))  # a range for each
    20.0
    """
    xs, references = _float_batch(xs, references)
    data_range = _checked_range(data_range, xs.dtype)
    if data_range.shape not in ((), (len(xs),)):
        raise ValueError(
            f"`data_range` has shape {data_range.shape}: give a scalar or one number per image, ({len(xs)},)."
        )
    return jnp.mean(_decibels(_mse_per_image(xs, references), jnp.broadcast_to(data_range, (len(xs),))))


def psnr_of_mean_mse(xs, references, data_range=1.0):
    """PSNR of the mean squared error of a batch, 10 log10(data_range² / mean_i mse_i), in dB: one number that
    decreases exactly when the mean squared error, the usual upper-level loss, increases.

    Args:
        xs, references: arrays of one and the same shape (n, ...).
        data_range: positive scalar.

    Raises:
        ValueError: the shapes differ, the batch is empty, or ``data_range`` is not a positive scalar.
        TypeError: the images are complex.

    >>> references = jnp.zeros((2, 8, 8))
    >>> xs = references + jnp.array([0.1, 0.01]).reshape(2, 1, 1)
    >>> print(round(float(mean_psnr(xs, references)), 2), round(float(psnr_of_mean_mse(xs, references)), 2))
    30.0 22.97
    """
    xs, references = _float_batch(xs, references)
    return _decibels(jnp.mean(_mse_per_image(xs, references)), _scalar_range(data_range, xs.dtype))


def ssim(x, reference, data_range=1.0, *, channels: int | None = None):
    """Structural similarity of one image with the Gaussian window of Wang et al. (2004): the mean over all pixels
    that are 5 or more away from the border of

        (2 μx μr + C1)(2 σxr + C2) / ((μx² + μr² + C1)(σx² + σr² + C2)),   Ci = (Ki data_range)², K = (0.01, 0.03),

    with Gaussian-weighted means and population (co)variances. Equal to scikit-image's ``structural_similarity`` with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``; its default (7x7 uniform window, sample
    covariance) gives other numbers. Differentiable everywhere, also at x == reference, where it is 1.

    Args:
        x, reference: real arrays of one and the same shape, (height, width) or (channels, height, width).
        data_range: positive scalar, the distance between the least and the greatest possible value.
        channels: the number of channels of a colour image, the mean over which is returned. None: the images are grey.

    Returns:
        A scalar in [-1, 1] of the wider dtype of the two (at least float32).

    Raises:
        ValueError: the shapes differ or do not fit ``channels``, a side is shorter than the window of 11 pixels,
            or ``data_range`` is not a positive scalar.
        TypeError: an image is complex.

    >>> image = jnp.arange(256.0).reshape(16, 16) / 255
    >>> print(round(float(ssim(image, image)), 4), round(float(ssim(image, 1 - image)), 2))
    1.0 -0.83
    """
    x, reference = _float_pair(x, reference)
    x, reference = _with_channels(x, channels), _with_channels(reference, channels)
    if min(x.shape[1:]) < _WINDOW:
        raise ValueError(
            f"`x` is {x.shape[1]} x {x.shape[2]} pixels, less than the SSIM window of {_WINDOW} x {_WINDOW}: "
            "use larger images."
        )
    data_range = _scalar_range(data_range, x.dtype)
    # Variances do not see a common shift, means do: moments about a number within the data lose fewer digits.
    shift = jax.lax.stop_gradient(jnp.mean(reference))
    u, v = x - shift, reference - shift
    mean_u, mean_v, mean_uu, mean_vv, mean_uv = _gaussian_means(jnp.stack([u, v, u * u, v * v, u * v]))
    variances = (mean_uu - mean_u**2) + (mean_vv - mean_v**2)
    covariance = mean_uv - mean_u * mean_v
    mean_x, mean_r = mean_u + shift, mean_v + shift
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_r + c1) / (mean_x**2 + mean_r**2 + c1)
    return jnp.mean(luminance * ((2 * covariance + c2) / (variances + c2)))


def dice(
    prediction, labels, n_classes: int, *, ignore: int | None = None, background: bool = True, pooled: bool = False
):
    """Dice coefficient of labels, 2 |P ∩ T| / (|P| + |T|), mean over the classes and over the images.

    Per image, a class that is neither in the labels nor in the prediction is left out, and one that is in one of them
    only counts 0; an image without any class to count has 1. Pooled, the pixels of all images count as one image,
    which is what data sets with a public ranking report; large objects then weigh more.

    Args:
        prediction, labels: integers (n, ...), such as ``jnp.argmax(logits, 1)`` of logits (n, C, ...).
        n_classes: labels are 0, ..., n_classes - 1; others in ``prediction`` agree with nothing.
        ignore: a label whose pixels do not count.
        background: count the class 0 as well; False for "lesion or not".
        pooled: one coefficient for all images.

    Raises:
        ValueError: the shapes differ, or there is no class to count. TypeError: something is not integer.

    >>> labels, prediction = jnp.array([[0, 1, 1], [0, 0, 0]]), jnp.array([[0, 1, 0], [0, 0, 0]])
    >>> print(round(float(dice(prediction, labels, 2)), 4))  # ((2/3 + 2/3)/2 + 1)/2
    0.8333
    """
    inside, total = _label_overlaps(prediction, labels, n_classes, ignore, background, pooled)
    return _mean_score(2 * inside, total)


def iou(
    prediction, labels, n_classes: int, *, ignore: int | None = None, background: bool = True, pooled: bool = False
):
    """Intersection over union |P ∩ T| / |P ∪ T| (Jaccard), with the conventions of :func:`dice`.

    >>> labels, prediction = jnp.array([[0, 1, 1], [0, 0, 0]]), jnp.array([[0, 1, 0], [0, 0, 0]])
    >>> print(iou(prediction, labels, 2), iou(prediction, labels, 2, pooled=True))
    0.75 0.65
    """
    inside, total = _label_overlaps(prediction, labels, n_classes, ignore, background, pooled)
    return _mean_score(inside, total - inside)


def top_k(logits, labels, k: int = 1):
    """The share of samples whose label is among the k classes with the largest logits; ties count against the label.

    Args:
        logits: (n, C). labels: integers (n,), 0, ..., C - 1.
        k: between 1 and C.

    Raises:
        ValueError: the shapes do not fit, or ``k`` is out of range. TypeError: the labels are not integers.

    >>> logits = jnp.array([[0.1, 0.9, 0.5], [0.8, 0.1, 0.7]])
    >>> print(top_k(logits, jnp.array([1, 2])), top_k(logits, jnp.array([1, 2]), 2))
    0.5 1.0
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"`logits` must be (n, C) and `labels` (n,), got {logits.shape} and {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"`k` must lie between 1 and the number of classes {logits.shape[1]}, got {k}.")
    known = (labels >= 0) & (labels < logits.shape[1])
    score = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=1)
    before = jnp.sum(logits >= score, axis=1) - 1
    return jnp.mean((before < k) & known & jnp.isfinite(score[:, 0]))


def _label_overlaps(prediction, labels, n_classes, ignore, background, pooled):
    """|P ∩ T| and |P| + |T|, (images or 1, classes)."""
    prediction, labels = jnp.asarray(native(prediction)), jnp.asarray(native(labels))
    if prediction.shape != labels.shape or labels.ndim < 2:
        raise ValueError(f"`prediction` {prediction.shape} and `labels` {labels.shape} must both be (n, ...).")
    for name, v in (("prediction", prediction), ("labels", labels)):
        if not (jnp.issubdtype(v.dtype, jnp.integer) or v.dtype == bool):
            raise TypeError(f"`{name}` must be integers, got {v.dtype}: take the argmax of logits.")
    classes = range(0 if background else 1, n_classes)
    if not classes:
        raise ValueError(f"`n_classes` {n_classes} leaves no class to count.")
    valid = True if ignore is None else labels != ignore
    axis = None if pooled else tuple(range(1, labels.ndim))
    sums = [
        (jnp.sum(p & t, axis), jnp.sum(p, axis) + jnp.sum(t, axis))
        for p, t in (((prediction == c) & valid, (labels == c) & valid) for c in classes)
    ]
    inside, total = (jnp.atleast_1d(jnp.stack(v, axis=-1)).astype(float) for v in zip(*sums, strict=True))
    return inside.reshape(-1, len(classes)), total.reshape(-1, len(classes))


def _mean_score(above, below):
    seen = below > 0
    score = jnp.sum(jnp.where(seen, above / jnp.where(seen, below, 1.0), 0.0), axis=1)
    count = jnp.sum(seen, axis=1)
    return jnp.mean(jnp.where(count > 0, score / jnp.maximum(count, 1), 1.0))


def _gaussian_means(images):
    """Gaussian-weighted means of (..., height, width) over all windows that lie inside: 10 fewer rows and columns.

    The reference implementation pads, then drops exactly the pixels that have seen the padding; so nothing is padded.
    """
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    weights = jnp.asarray(weights / weights.sum(), images.dtype)
    means = images.reshape(-1, 1, *images.shape[-2:])
    for kernel in (weights.reshape(1, 1, -1, 1), weights.reshape(1, 1, 1, -1)):
        # Variances are differences of these means: the TF32 default of GPUs would leave nothing of small ones.
        means = jax.lax.conv(means, kernel, (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return means.reshape(*images.shape[:-2], *means.shape[-2:])


def _with_channels(image, channels):
    """(C, height, width), with C = 1 for a grey image."""
    if channels is None and image.ndim != 2:
        raise ValueError(
            f"`x` has shape {image.shape}, not (height, width): say how many `channels` a colour image has, and use "
            "jax.vmap for a batch."
        )
    if channels is not None and (image.ndim != 3 or image.shape[0] != channels):
        raise ValueError(
            f"`x` has shape {image.shape}, not (channels, height, width) with `channels` = {channels}; use jax.vmap "
            "for a batch."
        )
    return image if channels is not None else image[None]


def _float_pair(x, reference):
    x, reference = jnp.asarray(native(x)), jnp.asarray(native(reference))
    if x.shape != reference.shape:
        raise ValueError(f"`x` has shape {x.shape} and `reference` {reference.shape}: they must be equal.")
    if jnp.iscomplexobj(x) or jnp.iscomplexobj(reference):
        raise TypeError("`x` and `reference` must be real: compare magnitudes, jnp.abs, of complex images.")
    if x.size == 0:
        raise ValueError(f"`x` has shape {x.shape}: there is nothing to compare.")
    dtype = jnp.promote_types(x.dtype, reference.dtype)
    # Squares of integers wrap around, and those of half-precision images lose the digits that count.
    dtype = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
    return x.astype(dtype), reference.astype(dtype)


def _float_batch(xs, references):
    xs, references = _float_pair(xs, references)
    if xs.ndim == 0:
        raise ValueError("`xs` is a scalar: a batch has a leading axis.")
    return xs, references


def _checked_range(data_range, dtype):
    if not isinstance(data_range, jax.core.Tracer) and not np.all(np.asarray(data_range) > 0):
        raise ValueError(f"`data_range` is {data_range}: give a positive number, such as 1.0 for images in [0, 1].")
    return jnp.asarray(data_range, dtype)


def _scalar_range(data_range, dtype):
    data_range = _checked_range(data_range, dtype)
    if data_range.shape != ():
        raise ValueError(f"`data_range` has shape {data_range.shape}: give one scalar.")
    return data_range


def _mse_per_image(xs, references):
    return jnp.mean((xs - references) ** 2, axis=tuple(range(1, xs.ndim)))


def _decibels(mse, data_range):
    # A difference of logarithms: the quotient would overflow before the mean squared error vanishes.
    return 20 * jnp.log10(data_range) - 10 * jnp.log10(mse)


def __dir__():
    return __all__
