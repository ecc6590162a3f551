"""Transforms of cases: preprocessing for all purposes, and random patches for training.

preprocess           the deterministic preprocessing of a spec
compose              `Compose` with named parts
loading              files → tensors
checks               refusal of volumes that cannot be segmented
resampling           resampling to the spec's spacing
crop_resize          cropping to the bright part, slices of one size
intensity            normalisation of intensities
patches              random training patches
augmentation         random changes of patches
elastic_deformation  random elastic deformation
border_weights       weights of voxels in the loss
mirror_padding       volumes continued by mirroring
synthesis            training images drawn from label maps
tissue_classes       the table of label maps' values
"""

from pipeline.transforms.border_weights import WEIGHT
from pipeline.transforms.checks import check_affine, check_values
from pipeline.transforms.compose import Preprocessing, TrainingTransform
from pipeline.transforms.loading import LoadVolumed
from pipeline.transforms.mirror_padding import mirror_padded_box
from pipeline.transforms.patches import crop_size, training_transform
from pipeline.transforms.preprocess import IMAGE, LABEL, SCAN, preprocessing
from pipeline.transforms.resampling import axis_samplings, parallel_axes, sample_axes
from pipeline.transforms.synthesis import synthesis_transform

__all__ = [
    "IMAGE",
    "LABEL",
    "SCAN",
    "WEIGHT",
    "LoadVolumed",
    "Preprocessing",
    "TrainingTransform",
    "axis_samplings",
    "check_affine",
    "check_values",
    "crop_size",
    "mirror_padded_box",
    "parallel_axes",
    "preprocessing",
    "sample_axes",
    "synthesis_transform",
    "training_transform",
]
