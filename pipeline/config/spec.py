"""The spec: the inputs and outputs that a set of weights was trained for.

Changing a spec makes its weights invalid. How one training run goes is in the run instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from math import prod
from typing import Any, Literal

from pipeline.config.checks import require
from pipeline.config.parser import load_config
from pipeline.config.unet_sizes import margin, nearest_valid_sizes, output_size
from pipeline.errors import ConfigError
from pipeline.types import PathOrStr

Stride = int | tuple[int, ...]
OutputKind = Literal["softmax", "sigmoid", "regions"]
Architecture = Literal["unet", "plain_conv_unet", "residual_encoder_unet"]
ALL, EACH = "all", "each"  # stand for names of structures: all of them together, each on its own
# axis code → axis of the RAS+ world; i, j and k are the axes of the file's array instead
AXES = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2, "i": 0, "j": 1, "k": 2}
FILE_AXES = frozenset("ijk")
Axis = Literal["R", "A", "S", "i", "j", "k"]

RENAMED_SPEC_KEYS = {  # key of version 0.1.0 → present key, so that its bundles still open
    "air": "foreground_threshold",
    "focus": "localise",
    "mirror": "tta_mirror",
    "rotations": "tta_rotations",
    "fit": "crop_resize",
    "stand_in": "fallback_channel",
    "whole": "warn_at_edge",
}

MAX_LABEL = 2**32 - 1  # the largest value that a label map of type uint32 holds
MAX_SPACING_MM = 100.0  # no scanner has voxels of 10 cm: a unit other than mm was meant


@dataclass(frozen=True, kw_only=True, slots=True)
class Intensity:
    """Normalisation of the intensities of each channel, computed over its whole volume.

    Attributes:
        method: `zscore` (mean 0, standard deviation 1), `robust_zscore` (each channel is clipped at
            its own percentiles first, so that single extreme voxels change nothing), `percentiles`
            (`lower` becomes 0, `upper` becomes 1, values beyond are clipped), `percentiles_zscore`
            (clipped at the percentiles of all channels together, then a z-score per channel),
            `fixed` (clipped to `clip`, then `mean` becomes 0 and `std` 1: the same values for every
            volume, for CT), or `none` (values stay as they are).
        nonzero: whether only voxels other than 0 count, and zeros stay 0; for skull-stripped
            images. For `zscore` and `robust_zscore`; each channel has its own zeros.
        foreground: whether only the foreground counts, and all else stays 0: voxels other than 0 in
            any channel, and what they enclose; for skull-stripped images. For `zscore`.
        lower: lower percentile, 0 to 100.
        upper: upper percentile, 0 to 100.
        clip: lowest and highest intensity, for `fixed`.
        mean: intensity that becomes 0, for `fixed`.
        std: intensity range that becomes 1, for `fixed`.
    """

    method: Literal[
        "zscore", "robust_zscore", "percentiles", "percentiles_zscore", "fixed", "none"
    ] = "zscore"
    nonzero: bool = False
    foreground: bool = False
    lower: float = 0.5
    upper: float = 99.5
    clip: tuple[float, float] | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        require(
            0 <= self.lower < self.upper <= 100,
            "spec.intensity",
            "percentiles, 0 ≤ lower < upper ≤ 100",
            f"{self.lower}, {self.upper}",
        )
        require(
            not self.foreground or (self.method == "zscore" and not self.nonzero),
            "spec.intensity.foreground",
            "the method zscore without nonzero",
            f"method {self.method}",
        )
        given = [value is not None for value in (self.clip, self.mean, self.std)]
        require(
            all(given) if self.method == "fixed" else not any(given),
            "spec.intensity",
            "clip, mean and std with the method fixed, and only with it",
            f"method {self.method}",
        )
        if self.clip is not None and self.std is not None:
            require(
                self.clip[0] < self.clip[1] and self.std > 0,
                "spec.intensity",
                "an increasing clip and a std above 0",
                f"clip {self.clip}, std {self.std}",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CropResize:
    """Cropping of a volume to its bright part, and resizing of its slices to one size.

    `pipeline.transforms.crop_resize` implements it.

    Attributes:
        floor: fraction of a channel's largest value, 0 to 1; lower values become 0, and the volume
            is cropped to the bounding box of the others.
        slice_size: pixels along both sides of a slice, after padding it to a square.
        axis: anatomical direction along which the slices are stacked; it is cropped, not resized.
    """

    floor: float = 0.1
    slice_size: int = 256
    axis: Literal["R", "A", "S"] = "S"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplineResampling:
    """Resampling as nnU-Net does it, by splines over the whole volume.

    The outer edges of the volume keep their place, and its size on the network's grid is rounded.
    The image is normalised before it is resampled. Logits are interpolated to the grid of the label
    map, not probabilities. Volumes of thick slices are resampled within the slices first, then
    across them. `pipeline.transforms.spline_resampling` implements it.

    Attributes:
        order: order of the splines for the image, 0 to 5: 0 nearest voxel, 1 linear, 3 cubic.
        order_across: the same across thick slices.
        logits_order: order for logits, 0 or 1.
        logits_order_across: the same across thick slices.
        separate: whether slices are resampled on their own; null decides by the voxels: they are
            where the longest side of a voxel is over 3 times the shortest, in the image or, if not
            there, in the result.
        separate_logits: the same for logits.
    """

    order: int = 3
    order_across: int = 0
    logits_order: int = 1
    logits_order_across: int = 0
    separate: bool | None = None
    separate_logits: bool | None = None

    def __post_init__(self) -> None:
        for name, highest in (
            ("order", 5),
            ("order_across", 5),
            ("logits_order", 1),
            ("logits_order_across", 1),
        ):
            value = getattr(self, name)
            require(0 <= value <= highest, f"spec.resampling.{name}", f"0 to {highest}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """Architecture of the U-Net; see `pipeline.networks.UNet` and `StridedUNet` for details.

    Attributes:
        features: channels of each level, top first.
        architecture: `unet`, or one of nnU-Net's, which downsample by strided convolutions:
            `plain_conv_unet` or `residual_encoder_unet`.
        encoder_blocks: of nnU-Net's architectures: convolutions, or residual blocks, of each level,
            as many numbers as features.
        decoder_convolutions: of nnU-Net's architectures: convolutions of each level of the decoder,
            top first, one number fewer than features.
        conv_bias: of nnU-Net's architectures: whether the convolutions before a norm have a bias.
        strides: of each pooling, top first: a number, or one number per spatial axis; null is 2.
        kernels: kernel sizes of the convolutions of each level, top first, as many as features: 1
            or 3, or one such number per spatial axis; null is 3. 1 along the axis of thick slices
            keeps slices apart until the other axes have voxels as long. Needs padding.
        norm: `batch`, `instance`, or null for none.
        activation: a name of MONAI's `Act`.
        residual: whether each block adds its input to its output.
        dropout: probability of dropping a channel after each block, 0 ≤ dropout < 1.
        contraction_dropout: probability of dropping a voxel at the end of the contracting path.
        deep_supervision: number of lower levels with an output of their own during training.
        padding: whether the convolutions are padded; without padding outputs are smaller.
        ensemble: number of such U-Nets whose outputs are averaged.
        ensemble_average: what is averaged, `probabilities` or `logits`.
    """

    features: tuple[int, ...]
    architecture: Architecture = "unet"
    encoder_blocks: tuple[int, ...] | None = None
    decoder_convolutions: tuple[int, ...] | None = None
    conv_bias: bool = True
    strides: tuple[Stride, ...] | None = None
    kernels: tuple[Stride, ...] | None = None
    norm: Literal["batch", "instance"] | None = None
    activation: str = "relu"
    residual: bool = False
    dropout: float = 0.0
    contraction_dropout: float = 0.0
    deep_supervision: int = 0
    padding: bool = True
    ensemble: int = 1
    ensemble_average: Literal["probabilities", "logits"] = "probabilities"

    def __post_init__(self) -> None:
        levels, path = len(self.features), "spec.network"
        require(
            levels >= 2 and min(self.features) >= 1,
            f"{path}.features",
            "at least two numbers above 0",
            self.features,
        )
        for name in ("dropout", "contraction_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{path}.{name}", f"0 ≤ {name} < 1", value)
        # the top level always has an output, and the bottom one has no decoder block
        require(
            0 <= self.deep_supervision <= levels - 2,
            f"{path}.deep_supervision",
            f"0 to {levels - 2}",
            self.deep_supervision,
        )
        require(self.ensemble >= 1, f"{path}.ensemble", "1 or more", self.ensemble)
        _check_architecture(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cascade:
    """A second network, which segments a box around some of the structures in smaller voxels.

    It has the channels and the labels of the first network. In the box the probabilities of both
    are averaged geometrically; towards the faces of the box those of the first network remain.
    `pipeline.inference.cascade` implements it.

    Attributes:
        structures: names of the structures at whose mean position, by the labels of the first
            network, the box is centred.
        spacing: voxel size in the box along the axes of the spec's `orientation`, mm.
        roi_size: size of the box, voxels: the input of the second network.
        network: architecture of the second network.
        share: weight of the second network in the average, 0 < share ≤ 1.
    """

    structures: tuple[str, ...]
    spacing: tuple[float, float, float]
    roi_size: tuple[int, int, int]
    network: NetworkSpec
    share: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "spec.cascade.share", "0 < share ≤ 1", self.share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Inputs and outputs that a set of weights was trained for.

    Attributes:
        labels: name → output value, in the order of the network's channels; `background: 0` first.
        channels: names of the input channels, one file each.
        spacing: voxel size of the network's grid along the axes of `orientation`, mm; null keeps
            the file's own spacing along that axis.
        roi_size: size of a window, voxels; 2 numbers make a 2D network, 3 numbers a 3D network.
        network: architecture of the U-Net.
        orientation: axis codes of the network's grid, such as RAS; or i, j and k in some order, for
            a network that was trained on the axes of each file's array, whatever they mean.
        intensity: normalisation of each channel.
        channel_intensity: name of a channel → its own normalisation, where channels differ; the
            other channels have `intensity`.
        slice_axis: anatomical direction along which the slices of a 2D network are stacked, or i, j
            or k if `orientation` has these; null for a 3D network.
        overlap: of neighbouring windows, a fraction of roi_size, 0 ≤ overlap < 1; 0 without
            padding, where outputs abut.
        foreground_threshold: intensity below which a voxel is air; the part of a volume that holds
            only air becomes background without running the network on it. It is a fraction of the
            range from the volume's lowest value to its 99.5th percentile; null segments everything.
        localise: whether all structures fit into one window: it is placed over them, and further
            windows are used only where they do not fit. Needs `foreground_threshold` and 3D.
        tta_mirror: anatomical directions along which mirrored images are segmented too, and the
            results averaged; along R the labels of left and right are exchanged. Each direction
            doubles the time of the network. With i, j and k in `orientation`, they are i, j and k
            here too, and no labels are exchanged.
        output: `softmax` has a channel per label. `sigmoid` has a channel per structure, which is
            segmented where its probability is above 0.5 and above that of the others. `regions` has
            a channel per structure too, and structures may overlap: where the probability of a
            structure is above 0.5, its value is painted, in the order of `labels`, later ones over
            earlier ones.
        regions: name of a structure → values in training label maps that make it up, for `output:
            regions`; its value in `labels` is one of them. Such a structure is every voxel with
            one of these values, in training label maps and in predictions.
        ignore_label: value in training label maps of voxels that nobody labelled. They count
            neither in the loss nor in scores; null if there is no such value.
        fallback_channel: channel whose file is also used for channels without a file of their own;
            null requires all files.
        crop_resize: cropping of the volume and resizing of its slices; null keeps the whole field
            of view.
        resampling: resampling by splines as in nnU-Net; null resamples linearly and averages voxels
            where the network's are larger.
        crop_to_nonzero: whether the volume is cropped to the box of voxels that are not 0 in some
            channel, before it is normalised; everything outside is background. Needs `resampling`.
        largest_component: names of structures of which only the largest connected component is kept
            (voxels that share a face are connected), `each` for all of them one by one. `all`
            stands for the union of all structures, is applied first, and also fills holes.
        min_component_ml: name of a structure → volume, mL; its connected components that are
            smaller are removed.
        fill_holes: names of structures, or `each`; background that a structure encloses becomes
            part of it, after all components have been removed.
        refine: groups of structures of different tissue, whose common borders are refined by the
            intensities of the scan at its own resolution.
        cascade: a second network for a box in smaller voxels; null for one network alone.
        warn_at_edge: whether a structure that touches the edge of the scan gives a warning, because
            a scan should hold the whole of each structure.
        sums: name → structures, or `all`, whose total volume gets a column of volumes.csv.
        plausible_ml: name of a structure or sum → lowest and highest plausible volume, mL; a volume
            outside gives a warning.
        soft_volumes: whether volumes are sums of probabilities, in which a voxel that holds a part
            of a structure counts as that part, instead of numbers of voxels in the label map.
        tta_rotations: number of rotated images, 360°/tta_rotations apart, that are segmented and
            averaged; 1 uses the image alone.
    """

    labels: dict[str, int]
    channels: tuple[str, ...]
    spacing: tuple[float | None, float | None, float | None]
    roi_size: tuple[int, ...]
    network: NetworkSpec
    orientation: str = "RAS"
    intensity: Intensity = field(default_factory=Intensity)
    channel_intensity: dict[str, Intensity] = field(default_factory=dict)
    slice_axis: Axis | None = None
    overlap: float = 0.5
    foreground_threshold: float | None = None
    localise: bool = False
    tta_mirror: tuple[Axis, ...] = ()
    output: OutputKind = "softmax"
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_label: int | None = None
    fallback_channel: str | None = None
    crop_resize: CropResize | None = None
    resampling: SplineResampling | None = None
    crop_to_nonzero: bool = False
    largest_component: tuple[str, ...] = ()
    min_component_ml: dict[str, float] = field(default_factory=dict)
    fill_holes: tuple[str, ...] = ()
    refine: tuple[tuple[str, ...], ...] = ()
    cascade: Cascade | None = None
    warn_at_edge: bool = False
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    plausible_ml: dict[str, tuple[float, float]] = field(default_factory=dict)
    soft_volumes: bool = False
    tta_rotations: int = 1

    def __post_init__(self) -> None:
        _check_labels(self.labels)
        _check_regions(self)
        _check_ignore_label(self)
        _check_channels(self)
        _check_preprocessing(self)
        _check_postprocessing(self)
        _check_window(self)
        _check_test_time_augmentation(self)
        _check_strides(self)
        _check_kernels(self)
        _check_roi_size(self)
        _check_cascade(self)

    @property
    def cascade_spec(self) -> Spec | None:
        """The spec of the second network; None without a cascade."""
        if self.cascade is None:
            return None
        return replace(
            self,
            spacing=self.cascade.spacing,
            roi_size=self.cascade.roi_size,
            network=self.cascade.network,
            cascade=None,
            refine=(),
            foreground_threshold=None,
            localise=False,
            tta_mirror=(),
            tta_rotations=1,
        )

    @property
    def needs_scan(self) -> bool:
        """Whether the inversion needs the intensities of the scan at its own resolution."""
        return bool(self.refine) or self.cascade is not None

    @property
    def spatial_dims(self) -> int:
        """2 for a network of slices, 3 for a network of volumes."""
        return len(self.roi_size)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the labels that have a channel in the network's output, in their order."""
        names = tuple(self.labels)
        # a sigmoid has no channel for the background
        return names if self.output == "softmax" else names[1:]

    @property
    def values_of(self) -> dict[str, tuple[int, ...]]:
        """Structure → its values in label maps, without the background: several for a region."""
        structures = list(self.labels.items())[1:]
        return {name: self.regions.get(name, (value,)) for name, value in structures}

    @property
    def target_values(self) -> tuple[int, ...]:
        """Values of training label maps, each once; the loss has their positions as numbers.

        They are those of the labels; with `output: regions`, 0 and the values of all regions.
        """
        if self.output == "regions":
            return (0, *sorted(set().union(*self.regions.values())))
        return tuple(self.labels.values())

    @property
    def slice_dim(self) -> int | None:
        """The array axis on the network's grid that slices are stacked along; None in 3D."""
        if self.slice_axis is None:
            return None
        return [AXES[code] for code in self.orientation].index(AXES[self.slice_axis])

    @property
    def has_file_axes(self) -> bool:
        """Whether the network's grid has the axes of the file's array, not anatomical ones."""
        return set(self.orientation) <= FILE_AXES

    @property
    def contested(self) -> tuple[int, ...]:
        """Class numbers of all structures in `refine`, sorted."""
        class_of = {name: number for number, name in enumerate(self.labels)}
        classes: set[int] = set()
        for group in self.refine:
            classes.update(class_of[name] for name in group)
        return tuple(sorted(classes))

    @property
    def margin(self) -> tuple[int, ...]:
        """Voxels by which a window's output is smaller than roi_size, per axis, both ends together.

        All are 0 with padding.
        """
        return tuple(
            margin(self._strides_along(axis), padding=self.network.padding)
            for axis in range(self.spatial_dims)
        )

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Strides of the poolings: one tuple per pooling with one number per spatial axis."""
        poolings = len(self.network.features) - 1
        given = self.network.strides or (2,) * poolings
        return tuple((s,) * self.spatial_dims if isinstance(s, int) else s for s in given)

    def _strides_along(self, axis: int) -> list[int]:
        return [stride[axis] for stride in self.strides]


def load_spec(path: PathOrStr) -> Spec:
    """Read the spec in a YAML file; keys of version 0.1.0 are accepted under their old names.

    Raises:
        ConfigError: the file cannot be read, or a value is wrong; the message holds its key.
    """
    return load_config(Spec, path, "spec", RENAMED_SPEC_KEYS)


def spec_fingerprint(spec: Spec) -> str:
    """Return the SHA-256 of what a spec says, hexadecimal, however its file is written.

    Comments, the order of the keys, keys that have their default and the names that an earlier
    release gave to keys change nothing, and neither does a field that a later release adds. The
    order of the labels counts: it is that of the network's channels.
    """
    text = json.dumps(_canonical(spec), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """Return a value of a spec as what JSON writes in one way only."""
    if is_dataclass(value):
        found = {}
        for part in fields(value):
            content = getattr(value, part.name)
            if content != _default(part):
                found[part.name] = _canonical(content)
        return found
    if isinstance(value, dict):  # pairs, because sorted keys would lose the order
        return [[key, _canonical(content)] for key, content in value.items()]
    if isinstance(value, list | tuple):
        return [_canonical(content) for content in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are the same spacing
    return value


def _default(part: Field[Any]) -> Any:
    """Return the default of a field, MISSING where it has none."""
    return part.default if part.default_factory is MISSING else part.default_factory()


def _check_labels(labels: dict[str, int]) -> None:
    values = list(labels.values())
    require(
        len(labels) >= 2 and values[0] == 0,
        "spec.labels",
        "`background: 0` first and at least one structure",
        labels,
    )
    distinct = len(set(values)) == len(values)
    require(
        distinct and min(values) >= 0 and max(values) <= MAX_LABEL,
        "spec.labels",
        "distinct values from 0 to 2**32 - 1",
        values,
    )


def _check_regions(spec: Spec) -> None:
    if spec.output != "regions":
        require(not spec.regions, "spec.regions", "nothing without `output: regions`", spec.regions)
        return
    structures = list(spec.labels)[1:]
    require(
        set(spec.regions) == set(structures),
        "spec.regions",
        f"the values of each structure of spec.labels ({', '.join(structures)})",
        ", ".join(spec.regions) or "none",
    )
    for name, values in spec.regions.items():
        valid = all(0 < value <= MAX_LABEL for value in values)
        require(
            valid and len(set(values)) == len(values) and spec.labels[name] in values,
            f"spec.regions.{name}",
            f"distinct values from 1 to 2**32 - 1, one of them {spec.labels[name]}, the value that "
            "is painted for it (spec.labels)",
            list(values),
        )


def _check_ignore_label(spec: Spec) -> None:
    if spec.ignore_label is None:
        return
    used = {0, *spec.labels.values()}.union(*spec.regions.values())
    require(
        spec.ignore_label not in used and abs(spec.ignore_label) <= MAX_LABEL,
        "spec.ignore_label",
        f"a value that no label has ({', '.join(map(str, sorted(used)))})",
        spec.ignore_label,
    )


def _check_channels(spec: Spec) -> None:
    names = ", ".join(spec.channels)
    require(bool(spec.channels), "spec.channels", "at least one name", "none")
    distinct = len(set(spec.channels)) == len(spec.channels)
    require(distinct, "spec.channels", "distinct names", names)
    require(
        spec.fallback_channel is None or spec.fallback_channel in spec.channels,
        "spec.fallback_channel",
        f"one of the channels {names}",
        repr(spec.fallback_channel),
    )


def _check_architecture(network: NetworkSpec) -> None:
    path, levels = "spec.network", len(network.features)
    blocks, convolutions = network.encoder_blocks, network.decoder_convolutions
    if network.architecture == "unet":
        require(
            blocks is None and convolutions is None and network.conv_bias,
            f"{path}.encoder_blocks, decoder_convolutions and conv_bias",
            "their defaults with `architecture: unet`",
            f"{blocks}, {convolutions}, {network.conv_bias}",
        )
        return
    for name, given, count in (
        ("encoder_blocks", blocks, levels),
        ("decoder_convolutions", convolutions, levels - 1),
    ):
        require(
            given is not None and len(given) == count and min(given) >= 1,
            f"{path}.{name}",
            f"{count} numbers above 0",
            given,
        )
    others = (network.residual, network.dropout, network.contraction_dropout, network.padding)
    require(
        others == (False, 0, 0, True),
        f"{path}.residual, dropout, contraction_dropout and padding",
        f"their defaults with `architecture: {network.architecture}`",
        others,
    )


def _check_preprocessing(spec: Spec) -> None:
    codes = set(spec.orientation)
    require(
        sorted(AXES.get(code, -1) for code in spec.orientation) == [0, 1, 2]
        and (codes <= FILE_AXES or not codes & FILE_AXES),
        "spec.orientation",
        "three axis codes such as RAS, or i, j and k in some order",
        repr(spec.orientation),
    )
    _check_file_axes(spec)
    for axis, mm in enumerate(spec.spacing):
        require(
            mm is None or 0 < mm < MAX_SPACING_MM,
            f"spec.spacing[{axis}]",
            f"mm above 0 and below {MAX_SPACING_MM:g}, or null",
            mm,
        )
    _check_names("channel_intensity", spec.channel_intensity, spec.channels, "channels")
    if spec.crop_resize is not None:
        require(
            0 <= spec.crop_resize.floor < 1 and spec.crop_resize.slice_size >= 1,
            "spec.crop_resize",
            "0 ≤ floor < 1 and a slice_size of 1 or more",
            spec.crop_resize,
        )


def _check_file_axes(spec: Spec) -> None:
    """Raise ConfigError if a key needs axes of the other kind than `orientation` has."""
    for key, axes in (("slice_axis", (spec.slice_axis,)), ("tta_mirror", spec.tta_mirror)):
        for axis in axes:
            require(
                axis is None or (axis in FILE_AXES) == spec.has_file_axes,
                f"spec.{key}",
                "i, j or k with these axes in spec.orientation, and R, A or S otherwise",
                axis,
            )
    anatomical = {
        "localise": spec.localise,
        "crop_resize": spec.crop_resize is not None,
        "tta_rotations": spec.tta_rotations > 1,
    }
    for key, is_used in anatomical.items():
        require(
            not (is_used and spec.has_file_axes),
            f"spec.{key}",
            "its default with i, j and k in spec.orientation, which have no anatomical direction",
            "another value",
        )
    require(
        spec.resampling is None or spec.crop_resize is None,
        "spec.crop_resize",
        "null with spec.resampling",
        spec.crop_resize,
    )
    require(
        spec.resampling is not None or not spec.crop_to_nonzero,
        "spec.crop_to_nonzero",
        "false without spec.resampling",
        spec.crop_to_nonzero,
    )


def _check_postprocessing(spec: Spec) -> None:
    structures = list(spec.labels)[1:]
    _check_names("largest_component", spec.largest_component, {*spec.labels, ALL, EACH})
    _check_names("fill_holes", spec.fill_holes, {*structures, EACH})
    _check_names("min_component_ml", spec.min_component_ml, structures)
    for name, smallest in spec.min_component_ml.items():
        require(smallest > 0, f"spec.min_component_ml.{name}", "mL above 0", smallest)
    for i, group in enumerate(spec.refine):
        _check_names(f"refine[{i}]", group, structures)
        distinct = len(set(group)) == len(group) >= 2
        require(
            distinct and spec.output == "softmax",
            f"spec.refine[{i}]",
            "two or more structures of a softmax",
            ", ".join(group),
        )
    # regions overlap, so that their soft volumes have no sum
    require(
        not (spec.sums and spec.soft_volumes and spec.output == "regions"),
        "spec.sums",
        "none with soft_volumes and `output: regions`",
        ", ".join(spec.sums),
    )
    for name, parts in spec.sums.items():
        _check_names(f"sums.{name}", parts, {*spec.labels, ALL})
        require(name not in spec.labels, f"spec.sums.{name}", "a name other than a label's", name)
    _check_names("plausible_ml", spec.plausible_ml, {*spec.labels, *spec.sums})


def _check_names(
    key: str, names: Iterable[str], known: Container[str], kind: str = "labels"
) -> None:
    unknown = sorted({name for name in names if name not in known})
    require(not unknown, f"spec.{key}", f"names of {kind}", ", ".join(unknown))


def _check_window(spec: Spec) -> None:
    require(spec.spatial_dims in (2, 3), "spec.roi_size", "2 or 3 numbers", spec.roi_size)
    require(
        (spec.spatial_dims == 2) == (spec.slice_axis is not None),
        "spec.slice_axis",
        "R, A or S with 2 numbers in roi_size and null with 3",
        spec.slice_axis,
    )
    require(0 <= spec.overlap < 1, "spec.overlap", "a fraction, 0 ≤ overlap < 1", spec.overlap)
    if spec.localise and (spec.foreground_threshold is None or spec.spatial_dims == 2):
        raise ConfigError(
            "spec.localise: expected false for a 2D network and without foreground_threshold, "
            "got true"
        )
    if not spec.network.padding:
        require(
            spec.overlap == 0, "spec.overlap", "0 without padding, where outputs abut", spec.overlap
        )
        # without padding, outputs of different levels cover regions of different size
        require(
            spec.network.deep_supervision == 0,
            "spec.network.deep_supervision",
            "0 without padding",
            spec.network.deep_supervision,
        )


def _check_test_time_augmentation(spec: Spec) -> None:
    directions = spec.tta_mirror
    distinct = len(set(directions)) == len(directions) and spec.slice_axis not in directions
    require(
        distinct and (spec.network.padding or not directions),
        "spec.tta_mirror",
        "distinct directions within a padded window",
        ", ".join(directions),
    )
    require(spec.tta_rotations >= 1, "spec.tta_rotations", "1 (none) or more", spec.tta_rotations)


def _check_cascade(spec: Spec) -> None:
    if spec.cascade is None:
        return
    names = spec.cascade.structures
    require(bool(names), "spec.cascade.structures", "at least one structure", "none")
    _check_names("cascade.structures", names, list(spec.labels)[1:], "structures")
    require(
        spec.spatial_dims == 3 and spec.output == "softmax" and None not in spec.spacing,
        "spec.cascade",
        "a 3D network with a softmax and a spacing along every axis",
        f"{len(spec.roi_size)} numbers in roi_size, {spec.output}, spacing {spec.spacing}",
    )
    require(
        spec.resampling is None and spec.crop_resize is None,
        "spec.cascade",
        "null with resampling or crop_resize",
        spec.cascade.structures,
    )
    try:
        _ = spec.cascade_spec
    except ConfigError as error:
        raise ConfigError(str(error).replace("spec.", "spec.cascade.", 1)) from error


def _check_strides(spec: Spec) -> None:
    poolings = len(spec.network.features) - 1
    complete = all(len(stride) == spec.spatial_dims for stride in spec.strides)
    require(
        complete and len(spec.strides) == poolings,
        "spec.network.strides",
        f"{poolings} entries (one fewer than features), each a number "
        f"or {spec.spatial_dims} numbers",
        spec.network.strides,
    )
    require(
        min(min(stride) for stride in spec.strides) >= 1,
        "spec.network.strides",
        "numbers above 0",
        spec.network.strides,
    )


def _check_kernels(spec: Spec) -> None:
    if spec.network.kernels is None:
        return
    kernels = [(k,) * spec.spatial_dims if isinstance(k, int) else k for k in spec.network.kernels]
    levels = len(spec.network.features)
    complete = all(len(k) == spec.spatial_dims and set(k) <= {1, 3} for k in kernels)
    require(
        complete and len(kernels) == levels and spec.network.padding,
        "spec.network.kernels",
        f"{levels} entries (as many as features), each 1, 3, or {spec.spatial_dims} of these "
        "numbers, in a network with padding",
        spec.network.kernels,
    )


def _check_roi_size(spec: Spec) -> None:
    padding = spec.network.padding
    for axis, size in enumerate(spec.roi_size):
        strides = spec._strides_along(axis)
        if output_size(size, strides, padding=padding) is not None:
            continue
        rule = "a size that fits every pooling"
        if padding:
            rule = f"a multiple of {prod(strides)} (the product of the strides)"
        raise ConfigError(
            f"spec.roi_size[{axis}]: expected {rule}, got {size}; "
            f"try {nearest_valid_sizes(size, strides, padding=padding)}"
        )
