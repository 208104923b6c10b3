"""ResNet classifiers in torchvision's layout: images to logits, with batch statistics that stay as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jbilevel.nets.convolutions import nnx

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STEMS = ("imagenet", "small")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of RGB in [0, 1]


class ResNet(nnx.Module):
    """(C, H, W), or (H, W) for one channel, -> (classes,): residual networks of 18 to 101 layers.

    Version 1.5: a bottleneck shrinks in its 3 x 3 convolution. Padding is torchvision's, (k - 1)/2 on every side also
    where the stride is 2, so that its weights fit (`nets.load_torch`); parameters have its names. Batch normalisation
    is in evaluation mode from the start: it uses running statistics, and no sample sees another. `calibrate` sets them.

    Args:
      depth: 18 or 34 (basic blocks), 50 or 101 (bottlenecks).
      classes: outputs. channels: C, of the image.
      width: channels after the stem, 64 in the paper.
      stem: "imagenet" (7 x 7 with stride 2, then 3 x 3 maxima with stride 2), or "small" for images of few pixels
        (3 x 3, no stride).
      normalise: (means, standard deviations) per channel to be subtracted and divided by, such as `resnet.IMAGENET`,
        which weights from torchvision expect of images in [0, 1]; None: nothing.
      rngs: ``nnx.Rngs(seed)``. dtype, param_dtype: as in Flax.

    Raises:
      ValueError: unknown ``depth`` or ``stem``, ``normalise`` of another number of channels, x of a wrong shape.

    Reference: He, Zhang, Ren & Sun, CVPR 2016; the initial weights are theirs (normal, fan out, gain of ReLU).

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> from flax import nnx
    >>> def make():
    ...     return ResNet(18, 3, width=4, channels=1, rngs=nnx.Rngs(0))
    >>> jax.eval_shape(lambda x: make()(x), jnp.ones((32, 32))).shape
    (3,)
    >>> net = nnx.eval_shape(make)  # shapes without numbers; make() is the network
    >>> f, params = jb.nets.from_flax(net)
    >>> trained, frozen = jb.partition(params, net.last(1))  # fine-tuning of the last stage and the classifier
    """

    def __init__(
        self,
        depth: int,
        classes: int,
        *,
        rngs: nnx.Rngs,
        channels: int = 3,
        width: int = 64,
        stem: str = "imagenet",
        normalise: tuple | None = None,
        dtype=None,
        param_dtype=jnp.float32,
    ):
        if depth not in BLOCKS:
            raise ValueError(f"`depth` must be one of {sorted(BLOCKS)}, got {depth}.")
        if stem not in STEMS:
            raise ValueError(f"`stem` must be one of {STEMS}, got {stem!r}.")
        if normalise is not None and [len(part) for part in normalise] != [channels, channels]:
            raise ValueError(f"`normalise` must hold {channels} means and {channels} deviations, got {normalise}.")
        self.channels, self.stem, self.normalise = channels, stem, normalise
        settings = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        side, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1, self.bn1 = _convolution(channels, width, side, stride, **settings), _norm(width, **settings)
        block = Basic if depth < 50 else Bottleneck
        features = width
        for n, count in enumerate(BLOCKS[depth]):
            stage = []
            for k in range(count):
                stage.append(block(features, width * 2**n, 2 if n and k == 0 else 1, **settings))
                features = width * 2**n * block.expansion
            setattr(self, f"layer{n + 1}", nnx.List(stage))
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.fc = nnx.Linear(features, classes, kernel_init=uniform, **settings)
        self.eval()

    def __call__(self, x):
        x = jnp.asarray(x)
        if x.ndim != 2 + (self.channels > 1) or (self.channels > 1 and x.shape[0] != self.channels):
            wanted = "(H, W)" if self.channels == 1 else f"({self.channels}, H, W)"
            raise ValueError(f"`x` must be {wanted}, got {x.shape}; use jax.vmap for a batch.")
        return self._logits(x[None])[0]

    def _logits(self, images):
        """Of a batch (n, H, W), or (n, C, H, W) for several channels."""
        v = images[..., None] if self.channels == 1 else jnp.moveaxis(images, 1, -1)  # Flax's layout, inside
        if self.normalise is not None:
            mean, deviation = (jnp.asarray(part, v.dtype).reshape(1, 1, 1, -1) for part in self.normalise)
            v = (v - mean) / deviation
        v = jax.nn.relu(self.bn1(self.conv1(v)))
        if self.stem == "imagenet":
            v = nnx.max_pool(v, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                v = block(v)
        return self.fc(jnp.mean(v, (1, 2)))

    def calibrate(self, images):
        """Set the running statistics to those of a batch (n, H, W), or (n, C, H, W); the module, in evaluation mode.

        For training from the start without statistics of batches in the loss: calibrate once, or now and then.
        """
        images = jnp.asarray(images)
        self.train()
        norms = [module for _, module in nnx.iter_modules(self) if isinstance(module, nnx.BatchNorm)]
        for norm in norms:
            norm.momentum = 0.0
        self._logits(images)
        for norm in norms:
            norm.momentum = 0.9
        self.eval()
        return self

    def last(self, stages: int = 0):
        """What `jb.partition` takes to train the last ``stages`` of the four stages and the classifier only."""
        names = tuple(f"layer{n}/" for n in range(5 - stages, 5))
        return lambda path, leaf: path.startswith((*names, "fc/"))


class Basic(nnx.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a convolution of one pixel where shapes change."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int, **settings):
        self.conv1, self.bn1 = _convolution(before, width, 3, stride, **settings), _norm(width, **settings)
        self.conv2, self.bn2 = _convolution(width, width, 3, 1, **settings), _norm(width, **settings)
        self.downsample = _shortcut(before, width, stride, **settings)

    def __call__(self, v):
        w = jax.nn.relu(self.bn1(self.conv1(v)))
        return jax.nn.relu(self.bn2(self.conv2(w)) + _through(self.downsample, v))


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions, the last to four times the width."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int, **settings):
        after = width * self.expansion
        self.conv1, self.bn1 = _convolution(before, width, 1, 1, **settings), _norm(width, **settings)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride, **settings), _norm(width, **settings)
        self.conv3, self.bn3 = _convolution(width, after, 1, 1, **settings), _norm(after, **settings)
        self.downsample = _shortcut(before, after, stride, **settings)

    def __call__(self, v):
        w = jax.nn.relu(self.bn1(self.conv1(v)))
        w = jax.nn.relu(self.bn2(self.conv2(w)))
        return jax.nn.relu(self.bn3(self.conv3(w)) + _through(self.downsample, v))


def _convolution(before: int, after: int, side: int, stride: int, **settings) -> nnx.Conv:
    half = side // 2
    return nnx.Conv(
        before,
        after,
        (side, side),
        strides=stride,
        padding=((half, half), (half, half)),
        use_bias=False,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        **settings,
    )


def _norm(features: int, **settings) -> nnx.BatchNorm:
    norm = nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, **settings)
    # Flax keeps statistics in float32 whatever the parameters are
    norm.mean = nnx.BatchStat(jnp.zeros((features,), settings["param_dtype"]))
    norm.var = nnx.BatchStat(jnp.ones((features,), settings["param_dtype"]))
    return norm


def _shortcut(before: int, after: int, stride: int, **settings) -> nnx.List:
    """The convolution and normalisation beside a block, none where the identity fits."""
    same = before == after and stride == 1
    return nnx.List([] if same else [_convolution(before, after, 1, stride, **settings), _norm(after, **settings)])


def _through(shortcut: nnx.List, v):
    for module in shortcut:
        v = module(v)
    return v
