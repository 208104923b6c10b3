"""Lower-level problems: what is solved, one kind per file, and `variational`, which makes them of parts."""

from jbilevel._views.base import Problem as Problem
from jbilevel.problems.saddle import SaddleProblem as SaddleProblem
from jbilevel.problems.smooth import SmoothProblem as SmoothProblem
from jbilevel.problems.weighted_l1 import WeightedL1Problem as WeightedL1Problem

__all__ = ["Problem", "SaddleProblem", "SmoothProblem", "WeightedL1Problem"]


def __dir__():
    return __all__
