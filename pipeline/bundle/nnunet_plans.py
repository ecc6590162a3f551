"""What a spec says about a network of nnU-Net, from its plans.json and dataset.json.

Everything that changes a label is carried over, or refused by its name.

References:
    nnU-Net 2: documentation/explanation_plans_files.md, explanation_normalization.md,
    region_based_training.md and dataset_format.md in https://github.com/MIC-DKFZ/nnUNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import ConfigError

PLANS, DATASET = "plans.json", "dataset.json"

# the reader of a plan → the axes of its arrays: nnU-Net's are those of the file backwards
FILE_ORDER = "kji"
READERS = {
    "SimpleITKIO": FILE_ORDER,
    "NibabelIO": FILE_ORDER,
    "NibabelIOWithReorient": "SAR",
    "SimpleITKIOWithReorient": "SAR",
}
ARCHITECTURES = {
    "PlainConvUNet": "plain_conv_unet",
    "ResidualEncoderUNet": "residual_encoder_unet",
}
NORMS = {"InstanceNorm2d": "instance", "InstanceNorm3d": "instance"} | {
    "BatchNorm2d": "batch",
    "BatchNorm3d": "batch",
}
ACTIVATIONS = {"LeakyReLU": "leakyrelu", "ReLU": "relu"}
TORCH_EPS, TORCH_SLOPE = 1e-5, 0.01  # defaults of torch's norms and of its LeakyReLU
RESAMPLE, KEEP_GRID = "resample_data_or_seg_to_shape", "no_resampling_hack"
MAX_8_BIT = 255.0


def spec_content(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    configuration: str,
    *,
    members: int,
    mirror_axes: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the content of spec.yaml for a network of nnU-Net.

    Args:
        plans: content of plans.json.
        dataset: content of dataset.json.
        configuration: name of the configuration in the plans, such as `3d_fullres`.
        members: number of folds that are averaged.
        mirror_axes: axes of the network's grid along which mirror images are averaged.

    Raises:
        ConfigError: a fact is missing, or something is not supported; the message names it.
    """
    settings = _configuration(plans, configuration)
    patch = [int(size) for size in _get(settings, "patch_size", configuration)]
    orientation = _orientation(plans)
    labels, regions, ignored = _labels(dataset)
    channels = _channels(dataset)
    spec: dict[str, Any] = {"labels": labels}
    if regions:
        spec |= {"output": "regions", "regions": regions}
    if ignored is not None:
        spec["ignore_label"] = ignored
    spec |= {
        "channels": channels,
        "orientation": orientation,
        "spacing": _spacing(settings, configuration),
        "roi_size": patch,
        "overlap": 0.5,
        "resampling": _resampling(settings),
        "crop_to_nonzero": True,
        **_intensities(plans, settings, channels),
        "network": _network(settings, len(patch)),
    }
    if len(patch) == 2:
        spec["slice_axis"] = orientation[0]
    if mirror_axes:
        window_axes = orientation[-len(patch) :]
        spec["tta_mirror"] = [window_axes[axis] for axis in mirror_axes]
    if members > 1:
        spec["network"] |= {"ensemble": members, "ensemble_average": "logits"}
    return spec


def _get(mapping: Mapping[str, Any], key: str, where: str) -> Any:
    """Return a value of a mapping.

    Raises:
        ConfigError: it is missing.
    """
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise ConfigError(f"{where}: {key} is missing; expected plans and dataset of nnU-Net 2")
    return mapping[key]


def _refuse(what: str, found: Any, supported: str) -> ConfigError:
    """Return the error about a part of a plan that is not supported."""
    return ConfigError(
        f"{PLANS}: {what} {found} is not supported, expected {supported}; nothing was written"
    )


def _last(name: Any) -> str:
    """Return the last part of a dotted name, such as `Conv3d`."""
    return str(name).rsplit(".", maxsplit=1)[-1]


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration of the plans, with what it inherits.

    Raises:
        ConfigError: there is none of this name, it inherits from itself, or it is not supported.
    """
    known = _get(plans, "configurations", PLANS)
    found: dict[str, Any] = {}
    visited: list[str] = []
    parent: str | None = name
    while parent is not None:
        if parent in visited:
            raise ConfigError(f"{PLANS}: configurations.{parent} inherits from itself")
        if parent not in known:
            raise ConfigError(
                f"{PLANS}: expected a configuration {parent}, found {', '.join(known)}"
            )
        visited.append(parent)
        found = dict(known[parent]) | found
        parent = known[parent].get("inherits_from")
    if found.get("previous_stage"):
        raise _refuse(
            f"configuration {name}, a cascade after",
            found["previous_stage"],
            "2d, 3d_lowres or 3d_fullres",
        )
    preprocessor = found.get("preprocessor_name", "DefaultPreprocessor")
    if preprocessor != "DefaultPreprocessor":
        raise _refuse("preprocessor_name", preprocessor, "DefaultPreprocessor")
    manager = plans.get("label_manager", "LabelManager")
    if manager != "LabelManager":
        raise _refuse("label_manager", manager, "LabelManager")
    return found


def _orientation(plans: Mapping[str, Any]) -> str:
    """Return the axes of the network's grid: codes of a direction, or i, j and k."""
    reader = _get(plans, "image_reader_writer", PLANS)
    if reader not in READERS:
        raise _refuse("image_reader_writer", reader, ", ".join(READERS))
    axes = READERS[reader]
    return "".join(axes[int(axis)] for axis in _get(plans, "transpose_forward", PLANS))


def _labels(
    dataset: Mapping[str, Any],
) -> tuple[dict[str, int], dict[str, list[int]], int | None]:
    """Return the labels of a dataset.json.

    Returns:
        Name → value with the background first, name → values of each region (empty if there are no
        regions), and the value of voxels that nobody labelled (None without one).
    """
    given = dict(_get(dataset, "labels", DATASET))
    ignored = given.pop("ignore", None)
    values = {str(name): _values(value) for name, value in given.items()}
    has_regions = any(len(value) > 1 for value in values.values())
    foreground = {name: value for name, value in values.items() if set(value) != {0}}
    if not has_regions:
        flat = {name: value[0] for name, value in values.items()}
        ordered = dict(sorted(flat.items(), key=lambda item: item[1]))
        if list(ordered.values()) != list(range(len(ordered))):
            raise ConfigError(
                f"{DATASET}: labels: expected the values 0 to {len(ordered) - 1}, got {flat}"
            )
        return ordered, {}, ignored
    order = [int(value) for value in _get(dataset, "regions_class_order", DATASET)]
    if len(order) != len(foreground):
        raise ConfigError(
            f"{DATASET}: regions_class_order: expected {len(foreground)} values, one per region, "
            f"got {order}"
        )
    labels = {"background": 0} | dict(zip(foreground, order, strict=True))
    return labels, foreground, ignored


def _values(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]


def _channels(dataset: Mapping[str, Any]) -> list[str]:
    """Return the names of the input channels, made distinct by numbers if need be."""
    given = dataset.get("channel_names") or _get(dataset, "modality", DATASET)
    names = [str(given[key]) for key in sorted(given, key=int)]
    if len(set(names)) == len(names):
        return names
    return [f"{name}_{number}" for number, name in enumerate(names)]


def _spacing(settings: Mapping[str, Any], configuration: str) -> list[float | None]:
    """Return the spacing of the network's grid; slices of a 2D network keep the file's distance."""
    if settings.get("resampling_fn_data") == KEEP_GRID:
        return [None, None, None]
    spacing = [float(mm) for mm in _get(settings, "spacing", configuration)]
    return [None, *spacing] if len(spacing) == 2 else list(spacing)


def _resampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of spec.resampling."""
    functions = [
        settings.get(f"resampling_fn_{kind}", RESAMPLE) for kind in ("data", "probabilities")
    ]
    if functions == [KEEP_GRID, KEEP_GRID]:
        return {}
    for function in functions:
        if function != RESAMPLE:
            raise _refuse("the resampling function", function, RESAMPLE)
    image = settings.get("resampling_fn_data_kwargs", {})
    logits = settings.get("resampling_fn_probabilities_kwargs", {})
    return {
        "order": image.get("order", 3),
        "order_across": image.get("order_z", 0),
        "logits_order": logits.get("order", 1),
        "logits_order_across": logits.get("order_z", 0),
        "separate": image.get("force_separate_z"),
        "separate_logits": logits.get("force_separate_z"),
    }


def _intensities(
    plans: Mapping[str, Any], settings: Mapping[str, Any], channels: Sequence[str]
) -> dict[str, Any]:
    """Return the content of spec.intensity and spec.channel_intensity."""
    schemes = _get(settings, "normalization_schemes", "configuration")
    masked = settings.get("use_mask_for_norm") or [False] * len(schemes)
    if not len(schemes) == len(masked) == len(channels):
        raise ConfigError(
            f"{PLANS}: expected one of normalization_schemes and use_mask_for_norm for each of the "
            f"{len(channels)} channels of {DATASET}, got {len(schemes)} and {len(masked)}"
        )
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    each = [
        _intensity(scheme, bool(mask), properties.get(str(number), {}))
        for number, (scheme, mask) in enumerate(zip(schemes, masked, strict=True))
    ]
    if all(intensity == each[0] for intensity in each):
        return {"intensity": each[0]}
    return {"channel_intensity": dict(zip(channels, each, strict=True))}


def _intensity(scheme: str, mask: bool, properties: Mapping[str, float]) -> dict[str, Any]:
    """Return the normalisation of one channel.

    Args:
        scheme: name of nnU-Net's class.
        mask: whether only nonzero voxels count.
        properties: statistics of the foreground in the training images.
    """
    if scheme == "ZScoreNormalization":
        return {"method": "zscore", "foreground": mask}
    if scheme == "CTNormalization":
        where = f"{PLANS}: foreground_intensity_properties_per_channel"
        clip = [float(_get(properties, f"percentile_{end}_5", where)) for end in ("00", "99")]
        mean, std = (float(_get(properties, name, where)) for name in ("mean", "std"))
        return {"method": "fixed", "clip": clip, "mean": mean, "std": std}
    if scheme == "NoNormalization":
        return {"method": "none"}
    if scheme == "RescaleTo01Normalization":
        return {"method": "percentiles", "lower": 0.0, "upper": 100.0}
    if scheme == "RGBTo01Normalization":
        return {"method": "fixed", "clip": [0.0, MAX_8_BIT], "mean": 0.0, "std": MAX_8_BIT}
    raise _refuse(
        "the normalization scheme",
        scheme,
        "ZScore-, CT-, No-, RescaleTo01- or RGBTo01Normalization",
    )


def _network(settings: Mapping[str, Any], dims: int) -> dict[str, Any]:
    """Return the content of spec.network, without deep supervision."""
    name, arguments = _architecture(settings, dims)
    if name not in ARCHITECTURES:
        raise _refuse("the network", name, ", ".join(ARCHITECTURES))
    levels = int(_get(arguments, "n_stages", "arch_kwargs"))
    blocks = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
    strides = [_per_axis(stride, dims) for stride in _get(arguments, "strides", "arch_kwargs")]
    if strides[0] != [1] * dims:
        raise _refuse("a stride of the first stage of", strides[0], "1")
    features = _per_level(_get(arguments, "features_per_stage", "arch_kwargs"), levels)
    _check_network(arguments, features[0])
    kernels = _per_level(_get(arguments, "kernel_sizes", "arch_kwargs"), levels)
    decoder = _get(arguments, "n_conv_per_stage_decoder", "arch_kwargs")
    return {
        "architecture": ARCHITECTURES[name],
        "features": features,
        "strides": strides[1:],
        "kernels": [_per_axis(kernel, dims) for kernel in kernels],
        "encoder_blocks": _per_level(_get(arguments, blocks, "arch_kwargs"), levels),
        # nnU-Net counts from the bottom
        "decoder_convolutions": _per_level(decoder, levels - 1)[::-1],
        "norm": _norm(arguments),
        "activation": _activation(arguments),
        "conv_bias": bool(arguments.get("conv_bias", False)),
    }


def _architecture(settings: Mapping[str, Any], dims: int) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the network's class and its arguments, of new and of old plans."""
    if "architecture" in settings:
        architecture = settings["architecture"]
        where = "architecture"
        return (
            _last(_get(architecture, "network_class_name", where)),
            _get(architecture, "arch_kwargs", where),
        )
    where = f"{PLANS}: a configuration without architecture"
    name = _get(settings, "UNet_class_name", where)
    blocks = _get(settings, "n_conv_per_stage_encoder", where)
    widest = _get(settings, "unet_max_num_features", where)
    first = _get(settings, "UNet_base_num_features", where)
    features = [min(first * 2**level, widest) for level in range(len(blocks))]
    return name, {
        "n_stages": len(blocks),
        "features_per_stage": features,
        "kernel_sizes": _get(settings, "conv_kernel_sizes", where),
        "strides": _get(settings, "pool_op_kernel_sizes", where),
        "n_conv_per_stage": blocks,
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": _get(settings, "n_conv_per_stage_decoder", where),
        "conv_bias": True,
        "norm_op": f"InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": TORCH_EPS, "affine": True},
        "nonlin": "LeakyReLU",
    }


def _check_network(arguments: Mapping[str, Any], first_features: int) -> None:
    """Raise ConfigError if an argument asks for something that `StridedUNet` does not have."""
    plain = {
        "nonlin_first": (False, None),
        "bottleneck_channels": (None,),
        "stem_channels": (None, first_features),
    }
    for key, supported in plain.items():
        if arguments.get(key) not in supported:
            raise _refuse(f"{key} of", arguments[key], str(supported[0]))
    block = _last(arguments.get("block", "BasicBlockD"))
    if block != "BasicBlockD":
        raise _refuse("the block", block, "BasicBlockD")


def _norm(arguments: Mapping[str, Any]) -> str | None:
    given = arguments.get("norm_op")
    if given is None:
        return None
    name, settings = _last(given), arguments.get("norm_op_kwargs") or {}
    # torch's instance norm has no scale and shift unless it is asked for
    has_scale = settings.get("affine", not name.startswith("Instance"))
    if name not in NORMS or settings.get("eps", TORCH_EPS) != TORCH_EPS or not has_scale:
        raise _refuse(
            "the norm", f"{name} {settings}", f"instance or batch norm, affine, eps {TORCH_EPS}"
        )
    return NORMS[name]


def _activation(arguments: Mapping[str, Any]) -> str:
    name, settings = _last(arguments.get("nonlin")), arguments.get("nonlin_kwargs") or {}
    slope = settings.get("negative_slope", TORCH_SLOPE)
    if name not in ACTIVATIONS or slope != TORCH_SLOPE:
        raise _refuse(
            "the activation", f"{name} {settings}", f"ReLU, or LeakyReLU with slope {TORCH_SLOPE}"
        )
    return ACTIVATIONS[name]


def _per_level(value: Any, levels: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _per_axis(value: Any, dims: int) -> list[int]:
    return [int(n) for n in value] if isinstance(value, list | tuple) else [int(value)] * dims
