"""Segmentation losses and metrics: by hand, against numpy, derivatives, labels that do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel import losses, metrics

LOSSES = (losses.cross_entropy, losses.dice, losses.iou, losses.log_cosh_dice)
RNG = np.random.default_rng(0)
LOGITS, LABELS = np.moveaxis(RNG.standard_normal((5, 6, 4)), -1, 0), RNG.integers(0, 4, (5, 6))
SURE = 60.0


def certain(prediction, classes):
    return np.moveaxis(SURE * (2.0 * np.eye(classes)[prediction] - 1), -1, 0)


def by_hand(logits, labels, s, classes):
    """The sums of each class, pixel by pixel."""
    scores = []
    for c in classes:
        inside = probable = true = 0.0
        for z, label in zip(logits.reshape(len(logits), -1).T, labels.ravel(), strict=True):
            p = np.exp(z[c]) / np.exp(z).sum()
            inside, probable, true = inside + p * (label == c), probable + p, true + (label == c)
        scores.append(((2 * inside + s) / (probable + true + s), (inside + s) / (probable + true - inside + s)))
    return 1 - np.mean(scores, axis=0)


def test_soft_losses_against_sums_by_hand():
    expected_dice, expected_iou = by_hand(LOGITS, LABELS, 0.5, range(4))
    assert float(losses.dice(LOGITS, LABELS, smoothing=0.5)) == pytest.approx(expected_dice, rel=1e-12)
    assert float(losses.iou(LOGITS, LABELS, smoothing=0.5)) == pytest.approx(expected_iou, rel=1e-12)
    found = losses.log_cosh_dice(LOGITS, LABELS, smoothing=0.5)
    assert float(found) == pytest.approx(np.log(np.cosh(expected_dice)), rel=1e-12)
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(0, keepdims=True)
    expected = -np.mean(np.log(np.take_along_axis(p, LABELS[None], 0)))
    assert float(losses.cross_entropy(LOGITS, LABELS)) == pytest.approx(expected, rel=1e-12)


def test_perfect_and_disjoint():
    labels = np.array([[0, 1, 2], [2, 1, 0]])
    tiny = {"smoothing": 1e-12}
    for loss, worst in ((losses.dice, 1.0), (losses.iou, 1.0), (losses.log_cosh_dice, np.log(np.cosh(1.0)))):
        assert float(loss(certain(labels, 3), labels, **tiny)) == pytest.approx(0, abs=1e-10)
        assert float(loss(certain((labels + 1) % 3, 3), labels, **tiny)) == pytest.approx(worst, rel=1e-9)
    assert float(losses.cross_entropy(certain(labels, 3), labels)) == pytest.approx(0, abs=1e-10)


def test_two_classes_by_one_logit():
    logits, labels = LOGITS[0], LABELS == 0
    two = np.stack([np.zeros_like(logits), logits])
    assert float(losses.cross_entropy(logits, labels)) == pytest.approx(
        float(losses.cross_entropy(two, labels)), rel=1e-12
    )
    expected = by_hand(two, labels.astype(int), 1.0, [1])
    assert [float(loss(logits, labels)) for loss in (losses.dice, losses.iou)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_do_not_count(loss):
    labels = LABELS.copy()
    labels[:, 4:] = 255
    expected = loss(LOGITS[..., :4], LABELS[:, :4])
    np.testing.assert_allclose(loss(LOGITS, labels, ignore=255), expected, rtol=1e-12)
    slope = jax.grad(lambda z: loss(z, labels, ignore=255))(jnp.asarray(LOGITS))
    assert np.all(slope[..., 4:] == 0) and np.all(np.isfinite(slope)) and np.any(slope[..., :4] != 0)
    nothing = jax.value_and_grad(lambda z: loss(z, np.full_like(labels, 255), ignore=255))(jnp.asarray(LOGITS))
    assert abs(float(nothing[0])) < 1e-12 and np.all(nothing[1] == 0)
    assert np.isnan(loss(LOGITS, labels))  # 255 is no class


@pytest.mark.parametrize("loss", [losses.dice, losses.iou])
def test_absent_classes(loss):
    labels = np.zeros((3, 4), int)
    labels[0] = 1
    right = certain(labels, 4)  # classes 2 and 3 neither in the labels nor predicted
    assert float(loss(right, labels)) == pytest.approx(0, abs=1e-10)
    seen = np.where(np.arange(4) == 3, 2, labels)  # class 2 predicted in one column
    assert float(loss(certain(seen, 4), labels)) > float(loss(certain(seen, 4), labels, present_only=True)) > 0
    expected = 1 - np.mean([losses_of(loss, seen, labels, c) for c in (0, 1)])
    found = loss(certain(seen, 4), labels, present_only=True, smoothing=1e-12)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def losses_of(loss, prediction, labels, c):
    p, t = prediction == c, labels == c
    return 2 * (p & t).sum() / (p.sum() + t.sum()) if loss is losses.dice else (p & t).sum() / (p | t).sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    rng = np.random.default_rng(1)
    for logits, labels in ((LOGITS, LABELS), (LOGITS[0], LABELS == 1)):
        direction = rng.standard_normal(logits.shape)
        slope = jnp.vdot(jax.grad(loss)(jnp.asarray(logits), labels), direction)
        up, down = (loss(logits + s * direction, labels) for s in (1e-6, -1e-6))
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


def test_extreme_logits_stay_finite():
    labels = jnp.array([0, 1])
    for loss in LOSSES:
        value, slope = jax.value_and_grad(loss)(jnp.array([1e4, -1e4], jnp.float32), labels)
        assert np.isfinite(value) and np.all(np.isfinite(slope))


def test_hard_scores_by_hand():
    labels = np.array([[0, 0, 1, 2], [0, 0, 0, 0]])
    prediction = np.array([[0, 1, 1, 1], [0, 0, 0, 3]])
    per_image = [np.mean([2 / 3, 2 / 4, 0.0]), np.mean([6 / 7, 0.0])]  # class 3 is predicted in the second only
    assert float(metrics.dice(prediction, labels, 4)) == pytest.approx(np.mean(per_image), rel=1e-12)
    pooled = np.mean([8 / 10, 2 / 4, 0, 0])
    assert float(metrics.dice(prediction, labels, 4, pooled=True)) == pytest.approx(pooled, rel=1e-12)
    jaccard = [np.mean([1 / 2, 1 / 3, 0.0]), np.mean([3 / 4, 0.0])]
    assert float(metrics.iou(prediction, labels, 4)) == pytest.approx(np.mean(jaccard), rel=1e-12)
    assert float(metrics.iou(labels, labels, 4)) == 1.0
    assert float(metrics.dice(prediction[1:], labels[1:], 3, background=False)) == 1.0  # nothing there, nothing found
    kept = metrics.dice(prediction, np.where(np.arange(4) == 3, 255, labels), 4, ignore=255)
    assert float(kept) == pytest.approx(float(metrics.dice(prediction[:, :3], labels[:, :3], 4)), rel=1e-12)


def test_scores_agree_with_scikit_learn():
    from sklearn.metrics import f1_score, jaccard_score

    prediction, labels = (RNG.integers(0, 3, (4, 7, 5)) for _ in range(2))
    for ours, theirs in ((metrics.dice, f1_score), (metrics.iou, jaccard_score)):
        pooled = theirs(labels.ravel(), prediction.ravel(), average="macro")
        assert float(jax.jit(lambda p, t, f=ours: f(p, t, 3, pooled=True))(prediction, labels)) == pytest.approx(pooled)
        each = [theirs(t.ravel(), p.ravel(), average="macro") for p, t in zip(prediction, labels, strict=True)]
        assert float(ours(prediction, labels, 3)) == pytest.approx(np.mean(each))


def test_the_composite_is_the_weighted_sum_of_its_parts():
    weights = {"cross_entropy": 0.3, "dice": 2.0, "iou": 0.0, "log_cosh_dice": 1.5}
    labels = np.where(LABELS == 3, 255, LABELS)
    composite = losses.Segmentation(**weights, ignore=255, smoothing=0.5, present_only=True)
    more = {"ignore": 255, "smoothing": 0.5, "present_only": True}
    expected = 0.3 * losses.cross_entropy(LOGITS, labels, ignore=255) + 2 * losses.dice(LOGITS, labels, **more)
    expected += 1.5 * losses.log_cosh_dice(LOGITS, labels, **more)
    assert float(composite(LOGITS, labels)) == pytest.approx(float(expected), rel=1e-12)
    everything = sum(float(loss(LOGITS, LABELS)) for loss in LOSSES)
    assert float(losses.Segmentation()(LOGITS, LABELS)) == pytest.approx(everything, rel=1e-12)
    assert losses.Segmentation() == losses.Segmentation() and hash(composite) != hash(losses.Segmentation())
    one = losses.Segmentation(dice=0.0, iou=0.0, log_cosh_dice=0.0)  # a label per image
    assert float(one(LOGITS[:, 0, 0], LABELS[0, 0])) == pytest.approx(
        float(losses.cross_entropy(LOGITS[:, :1, :1], LABELS[:1, :1]))
    )


def test_share_among_the_best_agrees_with_scikit_learn():
    from sklearn.metrics import top_k_accuracy_score

    logits, labels = RNG.standard_normal((50, 6)), RNG.integers(0, 6, 50)
    for k in (1, 2, 5):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=range(6))
        assert float(metrics.top_k(logits, labels, k)) == pytest.approx(expected)
    assert (
        float(metrics.top_k(jnp.zeros((4, 3)), jnp.zeros(4, int))) == 0.0
    )  # a network that says nothing knows nothing
    assert float(metrics.top_k(jnp.full((2, 3), jnp.nan), jnp.zeros(2, int), 3)) == 0.0
    assert float(metrics.top_k(logits, labels + 100, 6)) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.Segmentation(dice=-1.0), "must not be negative"),
        (lambda: losses.Segmentation(cross_entropy=0.0, dice=0.0, iou=0.0, log_cosh_dice=0.0), "one must be positive"),
        (lambda: metrics.top_k(LOGITS, LABELS), r"must be \(n, C\)"),
        (lambda: metrics.top_k(LOGITS[0].T, LABELS[0], 7), "`k` must lie"),
        (lambda: metrics.top_k(LOGITS[0].T, np.ones(6)), "`labels` must be integers"),
        (lambda: losses.dice(LOGITS, LABELS[:3]), "one axis of classes in front"),
        (lambda: losses.cross_entropy(LOGITS, LABELS.astype(float)), "`labels` must be integers"),
        (lambda: losses.iou(LOGITS, LABELS, smoothing=0.0), "`smoothing`"),
        (lambda: metrics.dice(LABELS, LABELS[:3], 4), "must both be"),
        (lambda: metrics.iou(LOGITS[0], LABELS, 4), "take the argmax"),
        (lambda: metrics.dice(LABELS, LABELS, 1, background=False), "no class to count"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_a_bad_label_is_a_named_status():
    oracle = jb.explicit.Oracle(lambda p, data: losses.dice(p * data["z"], data["labels"]))
    labels = np.stack([LABELS, LABELS])
    labels[1, 0, 0] = 9
    found = oracle.value(jnp.array(1.0), {"z": jnp.stack([LOGITS, LOGITS]), "labels": labels})
    assert np.isnan(found.values[1]) and np.isfinite(found.values[0])
    assert int(found.lower.status[1]) == jb.Status.NONFINITE
