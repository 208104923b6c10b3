"""Regularisers R with ``R.init(key)``, ``R(params, x)`` and ``R.bounds(params)``."""

from jbilevel.regularizers.foe import FoE as FoE
from jbilevel.regularizers.icnn import ICNN as ICNN
from jbilevel.regularizers.ridge import CRR as CRR
from jbilevel.regularizers.ridge import WCRR as WCRR
from jbilevel.regularizers.tv import SmoothedTV as SmoothedTV
from jbilevel.regularizers.weighted_tv import WeightedTV as WeightedTV
