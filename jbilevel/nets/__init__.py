"""Networks as functions of a params pytree: adapters of Flax and Equinox, learned primal-dual, U-Net, ResNet."""

from jbilevel.nets.adapters import from_equinox as from_equinox
from jbilevel.nets.adapters import from_flax as from_flax
from jbilevel.nets.joint import JointLoss as JointLoss
from jbilevel.nets.torch_files import load_torch as load_torch
from jbilevel.nets.torch_files import read_torch as read_torch


def __getattr__(name: str):
    """The networks, which need flax, are imported when they are asked for."""
    if name == "LPD":
        from jbilevel.nets.lpd import LPD

        return LPD
    if name == "ResNet":
        from jbilevel.nets.resnet import ResNet

        return ResNet
    if name == "UNet":
        from jbilevel.nets.unet import UNet

        return UNet
    raise AttributeError(f"module 'jbilevel.nets' has no attribute {name!r}")
