"""Specs from the plans of nnU-Net: old plans, plans that inherit, other readers."""

from __future__ import annotations

from typing import Any

import pytest
from nnunet_modules import nnunet_plans

from pipeline.bundle.nnunet_plans import spec_content
from pipeline.config import Spec, parse_config
from pipeline.errors import ConfigError

DATASET = {"channel_names": {"0": "T1w", "1": "CT"}, "labels": {"background": 0, "part": 1}}


def content(plans: dict[str, Any], configuration: str = "3d_fullres") -> dict[str, Any]:
    found = spec_content(plans, DATASET, configuration, members=1)
    parse_config(Spec, found, "spec")
    return found


def test_plans_before_version_2_4_describe_the_network_otherwise() -> None:
    new, old = nnunet_plans(3, residual=False), nnunet_plans(3, residual=False)
    arguments = new["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4, 8, 10]
    settings = old["configurations"]["3d_fullres"]
    del settings["architecture"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 4,
        "unet_max_num_features": 10,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
        "pool_op_kernel_sizes": arguments["strides"],
    }
    assert content(old) == content(new)


def test_configurations_inherit() -> None:
    plans = nnunet_plans(3, residual=True)
    assert content(plans, "bigger") == content(plans)
    plans["configurations"]["3d_fullres"]["inherits_from"] = "bigger"
    with pytest.raises(ConfigError, match="3d_fullres inherits from itself"):
        content(plans)


def test_readers_that_reorient_have_anatomical_axes() -> None:
    plans = nnunet_plans(2, residual=False) | {"image_reader_writer": "NibabelIOWithReorient"}
    found = content(plans, "2d")
    assert (found["orientation"], found["slice_axis"]) == ("ASR", "A")
    assert found["spacing"] == [None, 1.1, 0.9]


def test_several_members_average_logits() -> None:
    found = spec_content(nnunet_plans(3, residual=False), DATASET, "3d_fullres", members=5)
    assert found["network"]["ensemble"] == 5
    assert found["network"]["ensemble_average"] == "logits"


def test_labels_have_to_be_consecutive() -> None:
    dataset = DATASET | {"labels": {"background": 0, "part": 2}}
    with pytest.raises(ConfigError, match="labels: expected the values 0 to 1, got"):
        spec_content(nnunet_plans(3, residual=False), dataset, "3d_fullres", members=1)
