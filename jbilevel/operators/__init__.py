"""Linear operators with exact transposes under every JAX transformation."""

from jbilevel.operators.astra import Astra as Astra
from jbilevel.operators.base import LinearOperator as LinearOperator
from jbilevel.operators.base import stack as stack
from jbilevel.operators.blur import Blur as Blur
from jbilevel.operators.blur import gaussian_blur as gaussian_blur
from jbilevel.operators.cone import ConeBeam as ConeBeam
from jbilevel.operators.differences import Gradient as Gradient
from jbilevel.operators.differences import forward_difference as forward_difference
from jbilevel.operators.fan import FanBeam as FanBeam
from jbilevel.operators.fourier import UndersampledFourier as UndersampledFourier
from jbilevel.operators.fourier import cartesian_mask as cartesian_mask
from jbilevel.operators.functions import from_callbacks as from_callbacks
from jbilevel.operators.functions import from_functions as from_functions
from jbilevel.operators.mask import DownSample as DownSample
from jbilevel.operators.mask import Mask as Mask
from jbilevel.operators.mismatch import adjoint_mismatch as adjoint_mismatch
from jbilevel.operators.norms import DotTest as DotTest
from jbilevel.operators.norms import dot_test as dot_test
from jbilevel.operators.tomosipo import from_tomosipo as from_tomosipo
from jbilevel.operators.volume import ParallelBeam3D as ParallelBeam3D
from jbilevel.operators.wavelets import Wavelet as Wavelet
from jbilevel.operators.xray import ParallelBeam as ParallelBeam

__all__ = [
    "Astra",
    "Blur",
    "ConeBeam",
    "DotTest",
    "DownSample",
    "FanBeam",
    "Gradient",
    "LinearOperator",
    "Mask",
    "ParallelBeam",
    "ParallelBeam3D",
    "UndersampledFourier",
    "Wavelet",
    "adjoint_mismatch",
    "cartesian_mask",
    "dot_test",
    "forward_difference",
    "from_callbacks",
    "from_functions",
    "from_tomosipo",
    "gaussian_blur",
    "stack",
]


def __dir__():
    return __all__
