"""Bilevel learning for inverse problems in JAX, with hypergradients whose error is known."""

from jbilevel import data as data
from jbilevel import dfols as dfols
from jbilevel import explicit as explicit
from jbilevel import implicit as implicit
from jbilevel import losses as losses
from jbilevel import metrics as metrics
from jbilevel import nets as nets
from jbilevel import nonsmooth as nonsmooth
from jbilevel import operators as operators
from jbilevel import piggyback as piggyback
from jbilevel import prox as prox
from jbilevel import regularizers as regularizers
from jbilevel import solvers as solvers
from jbilevel import task as task
from jbilevel import unroll as unroll
from jbilevel._core.constants import Constants as Constants
from jbilevel._core.constants import SaddleConstants as SaddleConstants
from jbilevel._core.io import load as load
from jbilevel._core.io import save as save
from jbilevel._core.partition import combine as combine
from jbilevel._core.partition import partition as partition
from jbilevel._core.results import ConvergenceError as ConvergenceError
from jbilevel._core.results import Hypergradient as Hypergradient
from jbilevel._core.results import SolveInfo as SolveInfo
from jbilevel._core.results import Status as Status
from jbilevel._core.results import StepInfo as StepInfo
from jbilevel._core.results import Value as Value
from jbilevel._core.results import Warm as Warm
from jbilevel._core.results import Work as Work
from jbilevel._core.results import check as check
from jbilevel._method.base import Method as Method
from jbilevel._method.base import MethodState as MethodState
from jbilevel._oracle.base import Oracle as Oracle
from jbilevel._oracle.kinds import ForwardOracle as ForwardOracle
from jbilevel._oracle.kinds import PullBackOracle as PullBackOracle
from jbilevel._oracle.pipeline import AdjointOracle as AdjointOracle
from jbilevel._oracle.samples import Sample as Sample
from jbilevel._views.base import Problem as Problem
from jbilevel._views.base import View as View
from jbilevel._views.saddle import SaddleView as SaddleView
from jbilevel._views.smooth import SmoothView as SmoothView
from jbilevel._views.weighted_l1 import WeightedL1View as WeightedL1View
from jbilevel.first_order import FirstOrder as FirstOrder
from jbilevel.hoag import HOAG as HOAG
from jbilevel.maid import MAID as MAID
from jbilevel.nba import NBA as NBA
from jbilevel.problems.saddle import SaddleProblem as SaddleProblem
from jbilevel.problems.saddle import image_of as image_of
from jbilevel.problems.smooth import SmoothProblem as SmoothProblem
from jbilevel.problems.variational import variational as variational
from jbilevel.problems.weighted_l1 import WeightedL1Problem as WeightedL1Problem
from jbilevel.quasi_newton import QuasiNewton as QuasiNewton
from jbilevel.regularizers.base import Regularizer as Regularizer
from jbilevel.solvers import solve as solve
from jbilevel.solvers.base import Solver as Solver
from jbilevel.stochastic import Stochastic as Stochastic
from jbilevel.task import TaskAdapted as TaskAdapted
from jbilevel.task import task_adapted as task_adapted
from jbilevel.training import FitResult as FitResult
from jbilevel.training import FitStatus as FitStatus
from jbilevel.training import Validation as Validation
from jbilevel.training import fit as fit

__version__ = "0.1.0"
__all__ = [
    "AdjointOracle",
    "check",
    "combine",
    "Constants",
    "ConvergenceError",
    "data",
    "dfols",
    "explicit",
    "FirstOrder",
    "fit",
    "FitResult",
    "FitStatus",
    "ForwardOracle",
    "HOAG",
    "Hypergradient",
    "image_of",
    "implicit",
    "load",
    "losses",
    "MAID",
    "Method",
    "MethodState",
    "metrics",
    "NBA",
    "nets",
    "nonsmooth",
    "operators",
    "Oracle",
    "partition",
    "piggyback",
    "Problem",
    "prox",
    "PullBackOracle",
    "QuasiNewton",
    "Regularizer",
    "regularizers",
    "SaddleConstants",
    "SaddleProblem",
    "SaddleView",
    "Sample",
    "save",
    "SmoothProblem",
    "SmoothView",
    "solve",
    "SolveInfo",
    "Solver",
    "solvers",
    "Status",
    "StepInfo",
    "Stochastic",
    "task",
    "task_adapted",
    "TaskAdapted",
    "unroll",
    "Validation",
    "Value",
    "variational",
    "View",
    "Warm",
    "WeightedL1Problem",
    "WeightedL1View",
    "Work",
]


def __dir__():
    return [*__all__, "__version__"]
