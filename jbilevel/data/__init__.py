"""Images to learn from, as NumPy arrays on the host: bundled photographs, folders of pictures, noise."""

from .folders import ImageFolder, image_folder
from .hounsfield import MU_WATER, attenuation_to_hu, density_to_hu, hu_to_attenuation, hu_to_density
from .noise import gaussian, poisson_transmission
from .photographs import PHOTOGRAPHS, TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, centre_crop, crops, photographs

__all__ = [
    "MU_WATER",
    "PHOTOGRAPHS",
    "TEST_PHOTOGRAPHS",
    "TRAIN_PHOTOGRAPHS",
    "ImageFolder",
    "centre_crop",
    "crops",
    "attenuation_to_hu",
    "density_to_hu",
    "gaussian",
    "hu_to_attenuation",
    "hu_to_density",
    "image_folder",
    "photographs",
    "poisson_transmission",
]
