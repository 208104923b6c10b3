"""Images to learn from, as NumPy arrays on the host: bundled photographs, folders of pictures, noise."""

from .ellipses import Ellipse, label_mask, line_integrals, parallel_sinogram, raster
from .folders import ImageFolder, image_folder
from .hounsfield import MU_WATER, attenuation_to_hu, density_to_hu, hu_to_attenuation, hu_to_density
from .noise import gaussian, poisson_transmission
from .phantoms import ABDOMEN_LABELS, Abdomen, abdomen, random_ellipses, shepp_logan
from .photographs import PHOTOGRAPHS, TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, centre_crop, crops, photographs

__all__ = [
    "ABDOMEN_LABELS",
    "MU_WATER",
    "PHOTOGRAPHS",
    "TEST_PHOTOGRAPHS",
    "TRAIN_PHOTOGRAPHS",
    "Abdomen",
    "Ellipse",
    "ImageFolder",
    "centre_crop",
    "crops",
    "abdomen",
    "attenuation_to_hu",
    "density_to_hu",
    "gaussian",
    "hu_to_attenuation",
    "hu_to_density",
    "image_folder",
    "label_mask",
    "line_integrals",
    "parallel_sinogram",
    "photographs",
    "poisson_transmission",
    "random_ellipses",
    "raster",
    "shepp_logan",
]
