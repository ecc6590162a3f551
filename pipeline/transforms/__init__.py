"""FIXME."""

from pipeline.transforms.augmentation import crop_size, training_transform
from pipeline.transforms.border_weights import WEIGHT
from pipeline.transforms.checks import check_affine, check_values
from pipeline.transforms.mirror_padding import mirror_padded_box
from pipeline.transforms.preprocess import IMAGE, LABEL, SCAN, preprocessing
from pipeline.transforms.resampling import axis_samplings, parallel_axes, sample_axes
from pipeline.transforms.synthesis import synthesis_transform

__all__ = [
    "IMAGE",
    "LABEL",
    "SCAN",
    "WEIGHT",
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
