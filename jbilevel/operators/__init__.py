"""Linear operators with exact transposes under every JAX transformation."""

from jbilevel.operators.base import LinearOperator as LinearOperator
from jbilevel.operators.base import stack as stack
from jbilevel.operators.cone import ConeBeam as ConeBeam
from jbilevel.operators.differences import forward_difference as forward_difference
from jbilevel.operators.fan import FanBeam as FanBeam
from jbilevel.operators.functions import from_callbacks as from_callbacks
from jbilevel.operators.functions import from_functions as from_functions
from jbilevel.operators.norms import DotTest as DotTest
from jbilevel.operators.norms import dot_test as dot_test
from jbilevel.operators.volume import ParallelBeam3D as ParallelBeam3D
from jbilevel.operators.xray import ParallelBeam as ParallelBeam
