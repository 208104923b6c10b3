"""Regularisers R: ``init(key)``, ``R(params, x)``, ``bounds(params, shape)``, ``saddle(params)`` where they exist."""

from jbilevel.regularizers.foe import FoE as FoE
from jbilevel.regularizers.icnn import ICNN as ICNN
from jbilevel.regularizers.learned_tv import LearnedTV as LearnedTV
from jbilevel.regularizers.ridge import CRR as CRR
from jbilevel.regularizers.ridge import WCRR as WCRR
from jbilevel.regularizers.ridge_sum import RidgeSum as RidgeSum
from jbilevel.regularizers.ridge_sum import RidgeTerm as RidgeTerm
from jbilevel.regularizers.saddle_blocks import SaddleBlocks as SaddleBlocks
from jbilevel.regularizers.tgv import TGV as TGV
from jbilevel.regularizers.tv import TV as TV
from jbilevel.regularizers.tv import SmoothedTV as SmoothedTV
from jbilevel.regularizers.weighted_tv import WeightedTV as WeightedTV

__all__ = [
    "CRR", "FoE", "ICNN", "LearnedTV", "RidgeSum", "RidgeTerm", "SaddleBlocks", "SmoothedTV", "TGV", "TV", "WCRR",
    "WeightedTV",
]  # fmt: skip


def __dir__():
    return __all__
