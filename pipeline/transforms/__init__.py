"""Transforms of cases: preprocessing for all purposes, and random patches for training.

preprocess           the deterministic preprocessing of a spec
compose              `Compose` with named parts
loading              files → tensors
tensors              tensors and arrays in place of files
checks               refusal of volumes that cannot be segmented
network_grid         size of a file on the network's grid
resampling           resampling to the spec's spacing
spline_resampling    resampling, cropping and axes as nnU-Net has them
crop_resize          cropping to the bright part, resizing of slices
intensity            normalisation of intensities
patches              random training patches
augmentation         random changes of patches
elastic_deformation  random elastic deformation
border_weights       weights of voxels in the loss
mirror_padding       volumes continued by mirroring
synthesis            training images drawn from label maps
degradation          scans made worse, with known labels
tissue_classes       the tissue table: the meaning of the values in label maps
"""

from pipeline.transforms.border_weights import WEIGHT
from pipeline.transforms.checks import (
    CheckVolumed,
    check_affine,
    check_proportion,
    check_values,
)
from pipeline.transforms.compose import Preprocessing, TrainingTransform
from pipeline.transforms.degradation import Degradation, degrade, draw_degradation
from pipeline.transforms.intensity import normalisation
from pipeline.transforms.loading import LoadVolumed
from pipeline.transforms.mirror_padding import mirror_padded_box
from pipeline.transforms.network_grid import network_grid_shape
from pipeline.transforms.patches import crop_size, training_transform
from pipeline.transforms.preprocess import IMAGE, LABEL, SCAN, preprocessing
from pipeline.transforms.resampling import (
    AxisSampling,
    Resample,
    axis_samplings,
    parallel_axes,
    sample_axes,
)
from pipeline.transforms.spline_resampling import filled_spacing, separate_axis
from pipeline.transforms.synthesis import synthesis_transform

__all__ = [
    "IMAGE",
    "LABEL",
    "SCAN",
    "WEIGHT",
    "AxisSampling",
    "CheckVolumed",
    "Degradation",
    "LoadVolumed",
    "Preprocessing",
    "Resample",
    "TrainingTransform",
    "axis_samplings",
    "check_affine",
    "check_proportion",
    "check_values",
    "crop_size",
    "degrade",
    "draw_degradation",
    "filled_spacing",
    "mirror_padded_box",
    "network_grid_shape",
    "normalisation",
    "parallel_axes",
    "preprocessing",
    "sample_axes",
    "separate_axis",
    "synthesis_transform",
    "training_transform",
]
