"""Networks as functions of a params pytree: adapters of Flax and Equinox modules, learned primal-dual, U-Net."""

from jbilevel.nets.adapters import from_equinox as from_equinox
from jbilevel.nets.adapters import from_flax as from_flax
from jbilevel.nets.joint import JointLoss as JointLoss


def __getattr__(name: str):
    """The networks, which need flax, are imported when they are asked for."""
    if name == "LPD":
        from jbilevel.nets.lpd import LPD

        return LPD
    if name == "UNet":
        from jbilevel.nets.unet import UNet

        return UNet
    raise AttributeError(f"module 'jbilevel.nets' has no attribute {name!r}")
