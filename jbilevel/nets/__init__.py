"""Networks as functions of a params pytree: adapters, small convolutional ones, learned primal-dual, U-Net, ResNet."""

from importlib import import_module
from typing import TYPE_CHECKING

from jbilevel.nets.adapters import from_equinox as from_equinox
from jbilevel.nets.adapters import from_flax as from_flax
from jbilevel.nets.joint import JointLoss as JointLoss
from jbilevel.nets.torch_files import load_torch as load_torch
from jbilevel.nets.torch_files import read_torch as read_torch

if TYPE_CHECKING:
    from jbilevel.nets.convolutions import ConvNet as ConvNet
    from jbilevel.nets.lpd import LPD as LPD
    from jbilevel.nets.resnet import ResNet as ResNet
    from jbilevel.nets.unet import UNet as UNet

__all__ = ["LPD", "ConvNet", "JointLoss", "ResNet", "UNet", "from_equinox", "from_flax", "load_torch", "read_torch"]

_NEED_FLAX = {"ConvNet": "convolutions", "LPD": "lpd", "ResNet": "resnet", "UNet": "unet"}  # name -> file


def __getattr__(name: str):
    """The networks, which need flax, are imported when they are asked for."""
    if name not in _NEED_FLAX:
        raise AttributeError(f"module 'jbilevel.nets' has no attribute {name!r}")
    return getattr(import_module(f"jbilevel.nets.{_NEED_FLAX[name]}"), name)


def __dir__():
    return __all__
