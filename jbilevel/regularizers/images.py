"""What an image is to a regulariser: (H, W), or (C, H, W) where `channels=` says so; nothing is guessed from a rank."""

from __future__ import annotations


def require_image(name: str, shape: tuple[int, ...], *, least: int = 1, channels: int | None = None) -> None:
    """Refuse shapes that are not one image of at least ``least`` x ``least`` pixels, with that number of channels.

    Raises:
      ValueError: says which shape the regulariser called ``name`` takes.
    """
    if channels is None and len(shape) != 2:
        raise ValueError(f"{name} takes one (H, W) image, got shape {tuple(shape)}; batch with vmap.")
    if channels is not None and (len(shape) != 3 or shape[0] != channels):
        raise ValueError(
            f"{name} with `channels={channels}` takes one image of shape ({channels}, H, W), got {tuple(shape)}; batch "
            "with vmap."
        )
    if min(shape[-2:]) < least:
        raise ValueError(f"{name} needs images of at least {least} x {least} pixels for its filters, got {shape}.")
