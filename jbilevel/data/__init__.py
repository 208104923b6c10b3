"""Images to learn from, as NumPy arrays on the host: photographs, readers of data sets, phantoms, noise, units."""

from .bsds import Photograph, bsds500
from .cifar import cifar10
from .dicom import CTSeries, CTSlice, dicom_series
from .ellipses import Ellipse, label_mask, line_integrals, parallel_sinogram, raster
from .folders import ImageFolder, image_folder
from .hounsfield import MU_WATER, attenuation_to_hu, density_to_hu, hu_to_attenuation, hu_to_density
from .idx_digits import mnist
from .lodopab_ct import Scan, lodopab
from .medical_decathlon import Volume, decathlon
from .noise import gaussian, poisson_transmission
from .pets import Pet, oxford_pets, stanford_dogs
from .phantoms import ABDOMEN_LABELS, Abdomen, abdomen, random_ellipses, shepp_logan
from .samples import IGNORED, Labelled, LabelledImages, Samples, Segmented, split_by_patient
from .scikit_image import PHOTOGRAPHS, TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS, centre_crop, crops, photographs
from .street_scenes import CAMVID_CLASSES, CITYSCAPES_CLASSES, camvid, cityscapes

__all__ = [
    "ABDOMEN_LABELS",
    "CAMVID_CLASSES",
    "CITYSCAPES_CLASSES",
    "IGNORED",
    "MU_WATER",
    "PHOTOGRAPHS",
    "TEST_PHOTOGRAPHS",
    "TRAIN_PHOTOGRAPHS",
    "Abdomen",
    "CTSeries",
    "CTSlice",
    "Ellipse",
    "ImageFolder",
    "Labelled",
    "LabelledImages",
    "Pet",
    "Photograph",
    "Samples",
    "Scan",
    "Segmented",
    "Volume",
    "abdomen",
    "attenuation_to_hu",
    "bsds500",
    "camvid",
    "centre_crop",
    "cifar10",
    "cityscapes",
    "crops",
    "decathlon",
    "density_to_hu",
    "dicom_series",
    "gaussian",
    "hu_to_attenuation",
    "hu_to_density",
    "image_folder",
    "label_mask",
    "line_integrals",
    "lodopab",
    "mnist",
    "oxford_pets",
    "parallel_sinogram",
    "photographs",
    "poisson_transmission",
    "random_ellipses",
    "raster",
    "shepp_logan",
    "split_by_patient",
    "stanford_dogs",
]


def __dir__():
    return __all__
