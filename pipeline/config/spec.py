"""What a set of weights was trained to see and to say.

Changing any of it makes the weights invalid; how one training run goes is told in `run` instead.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from pipeline.config.parser import parse_config, read_yaml
from pipeline.config.unet_sizes import margin, nearest_valid_sizes, output_size
from pipeline.errors import ConfigError
from pipeline.types import PathOrStr

Stride = int | tuple[int, ...]
ALL, EACH = "all", "each"  # of the structures
RENAMED_KEYS = {  # of 0.1.0; bundles that it wrote still open
    "air": "foreground_threshold",
    "focus": "localise",
    "mirror": "tta_mirror",
    "rotations": "tta_rotations",
    "fit": "crop_resize",
    "stand_in": "fallback_channel",
    "whole": "warn_at_edge",
}
AXES = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Intensity:
    """How one channel's values are normalised, over its whole volume.

    Attributes:
        method: `zscore` (mean 0, standard deviation 1), `percentiles` (`lower` to 0, `upper` to 1, clipped), or
            `percentiles_zscore` (clipped at percentiles of all channels together, then a z-score a channel).
        nonzero: whether only voxels other than 0 count (and zeros stay 0): for skull-stripped images.
        lower, upper: percentiles, 0 to 100.
    """

    method: Literal["zscore", "percentiles", "percentiles_zscore"] = "zscore"
    nonzero: bool = False
    lower: float = 0.5
    upper: float = 99.5


@dataclass(frozen=True, kw_only=True, slots=True)
class CropResize:
    """How a volume is cut to what it shows and its slices brought to one size; `pipeline.fit` does it.

    Attributes:
        floor: values below this fraction of a channel's largest become 0; the box of what is left is cut out.
        slice_size: pixels along both sides of a slice, after it was padded to a square.
        axis: the anatomical direction that the slices are stacked along; it is cut and not resized.
    """

    floor: float = 0.1
    slice_size: int = 256
    axis: Literal["R", "A", "S"] = "S"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """The U-Net's shape; `pipeline.network.UNet` documents each value. `ensemble`: how many such U-Nets are averaged."""

    features: tuple[int, ...]
    strides: tuple[Stride, ...] | None = None
    norm: Literal["batch", "instance"] | None = None
    activation: str = "relu"
    residual: bool = False
    dropout: float = 0.0
    contraction_dropout: float = 0.0
    deep_supervision: int = 0
    padding: bool = True
    ensemble: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What a set of weights was trained to see and to say.

    Attributes:
        labels: name → output value; the order is the order of the network's channels, `background: 0` comes first.
        channels: the names of the input channels, one file each.
        spacing: mm along the axes of `orientation`; null keeps the file's own spacing along that axis.
        orientation: axis codes of the network's grid, such as RAS.
        intensity: the normalisation of every channel.
        roi_size: voxels of one window; 2 numbers make a network of slices, 3 one of volumes.
        slice_axis: for a network of slices, the anatomical direction that the slices are stacked along.
        overlap: of neighbouring windows, a fraction of roi_size, 0 ≤ overlap < 1; 0 without padding, where tiles abut.
        foreground_threshold: fraction of the way from a volume's lowest value to its brightest (its quantile .995) below which it is air, and
            background without being looked at; null looks everywhere.
        localise: whether one window holds all structures of a scan: it is placed over them, and windows are spread only where they
            do not fit in; needs `air`.
        tta_mirror: anatomical directions along which mirror images are segmented too, and averaged; along R labels that are named
            left and right change places. Each doubles the time of the network.
        network: the U-Net's shape.
        output: `softmax` has a channel for every label, `sigmoid` one for every structure; a structure is found where its
            probability is above .5, and above that of the others.
        fallback_channel: the channel that is also used for channels without a file of their own; null asks for all files.
        crop_resize: null keeps the whole field of view.
        largest_component: what is one piece, of which only the largest part is kept (voxels that share a face are connected):
            names of structures, `each` for every one, `all` for all of them together, which comes first and leaves no hole;
            none by default.
        refine: groups of structures whose common borders are settled once more by the scan's own grey values; for structures
            of different tissue. None by default.
        warn_at_edge: whether a scan should hold all of the structures: a warning tells where they touch its edge.
        sums: name → structures, or `all`, whose volumes volumes.csv gives together, beside their own.
        plausible_ml: name of a structure or sum → lowest and highest volume, mL, outside of which a warning asks to look.
        soft_volumes: whether volumes.csv sums probabilities, which counts voxels that hold a part of a structure by that part,
            instead of whole voxels of the label map.
        tta_rotations: how many rotated versions of the input, 360°/rotations apart, are segmented and averaged.
    """

    labels: dict[str, int]
    channels: tuple[str, ...]
    spacing: tuple[float | None, float | None, float | None]
    roi_size: tuple[int, ...]
    network: NetworkSpec
    orientation: str = "RAS"
    intensity: Intensity = field(default_factory=Intensity)
    slice_axis: Literal["R", "A", "S"] | None = None
    overlap: float = 0.5
    foreground_threshold: float | None = None
    localise: bool = False
    tta_mirror: tuple[Literal["R", "A", "S"], ...] = ()
    output: Literal["softmax", "sigmoid"] = "softmax"
    fallback_channel: str | None = None
    crop_resize: CropResize | None = None
    largest_component: tuple[str, ...] = ()
    refine: tuple[tuple[str, ...], ...] = ()
    warn_at_edge: bool = False
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    plausible_ml: dict[str, tuple[float, float]] = field(default_factory=dict)
    soft_volumes: bool = False
    tta_rotations: int = 1

    def __post_init__(self) -> None:
        _check_labels(self.labels)
        _check_grid(self)
        _check_network(self)
        _check_way_in(self)
        _check_window(self)

    @property
    def spatial_dims(self) -> int:
        """2 for a network of slices, 3 for one of volumes."""
        return len(self.roi_size)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The labels that the network has a channel for: all, or the structures only where the output is a sigmoid."""
        return tuple(self.labels)[1 if self.output == "sigmoid" else 0 :]

    @property
    def slice_dim(self) -> int | None:
        """The array axis, 0 to 2 on the network's grid, that slices are stacked along; None in 3D."""
        if self.slice_axis is None:
            return None
        return [AXES[code] for code in self.orientation].index(AXES[self.slice_axis])

    @property
    def contested(self) -> tuple[int, ...]:
        """The class numbers of all structures in `refine`."""
        return tuple(
            sorted({list(self.labels).index(name) for group in self.refine for name in group})
        )

    @property
    def margin(self) -> tuple[int, ...]:
        """Voxels that the output of a window is smaller than roi_size, both ends together; 0 with padding."""
        axes = range(self.spatial_dims)
        return tuple(
            margin([s[axis] for s in self.strides], padding=self.network.padding) for axis in axes
        )

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """One tuple a pooling, one number a spatial axis."""
        given = self.network.strides or (2,) * (len(self.network.features) - 1)
        return tuple((s,) * self.spatial_dims if isinstance(s, int) else s for s in given)


def load_spec(path: PathOrStr) -> Spec:
    """The spec in a YAML file. Keys of version 0.1.0 are read under their present names.

    Raises:
        ConfigError: with the path to the key that is wrong.
    """
    content = read_yaml(path, "spec")
    if isinstance(content, dict):
        content = with_present_keys(content)
    try:
        return parse_config(Spec, content, "spec")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def with_present_keys(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a spec with keys of version 0.1.0 under their present names."""
    return {RENAMED_KEYS.get(key, key): value for key, value in content.items()}


def _check_labels(labels: dict[str, int]) -> None:
    values = list(labels.values())
    if len(labels) < 2 or values[0] != 0:
        raise ConfigError(
            f"spec.labels: expected `background: 0` first and at least one structure, got {labels}"
        )
    if len(set(values)) < len(values) or min(values) < 0 or max(values) > 2**32 - 1:
        raise ConfigError(
            f"spec.labels: expected distinct values from 0 to 2**32 - 1, got {values}"
        )


def _check_grid(spec: Spec) -> None:
    if sorted(AXES.get(code, -1) for code in spec.orientation) != [0, 1, 2]:
        raise ConfigError(
            f"spec.orientation: expected three axis codes such as RAS, got {spec.orientation!r}"
        )
    if not spec.channels:
        raise ConfigError("spec.channels: expected at least one name, got none")
    if len(set(spec.channels)) < len(spec.channels):
        raise ConfigError(f"spec.channels: expected distinct names, got {', '.join(spec.channels)}")
    if not 0 <= spec.intensity.lower < spec.intensity.upper <= 100:
        raise ConfigError(
            f"spec.intensity: expected percentiles, 0 ≤ lower < upper ≤ 100, got {spec.intensity.lower}, {spec.intensity.upper}"
        )
    for i, mm in enumerate(spec.spacing):
        if mm is not None and not 0 < mm < 100:
            raise ConfigError(f"spec.spacing[{i}]: expected mm above 0 or null, got {mm}")


def _check_way_in(spec: Spec) -> None:
    if spec.fallback_channel is not None and spec.fallback_channel not in spec.channels:
        raise ConfigError(
            f"spec.fallback_channel: expected one of the channels {', '.join(spec.channels)}, got {spec.fallback_channel!r}"
        )
    if spec.crop_resize is not None and (
        not 0 <= spec.crop_resize.floor < 1 or spec.crop_resize.slice_size < 1
    ):
        raise ConfigError(
            f"spec.crop_resize: expected 0 ≤ floor < 1 and a slice_size of 1 or more, got {spec.crop_resize}"
        )
    _check_names("largest_component", spec.largest_component, {*spec.labels, ALL, EACH})
    for i, group in enumerate(spec.refine):
        _check_names(f"refine[{i}]", group, list(spec.labels)[1:])
        if len(set(group)) < max(2, len(group)) or spec.output != "softmax":
            raise ConfigError(
                f"spec.refine[{i}]: expected two or more structures of a softmax, got {', '.join(group)}"
            )
    for name, parts in spec.sums.items():
        _check_names(f"sums.{name}", parts, {*spec.labels, ALL})
        if name in spec.labels:
            raise ConfigError(f"spec.sums.{name}: expected a name that is no label's")
    _check_names("plausible_ml", spec.plausible_ml, {*spec.labels, *spec.sums})
    if spec.tta_rotations < 1:
        raise ConfigError(
            f"spec.tta_rotations: expected 1 (none) or more, got {spec.tta_rotations}"
        )


def _check_names(where: str, names: Iterable[str], known: Container[str]) -> None:
    unknown = sorted({name for name in names if name not in known})
    if unknown:
        raise ConfigError(f"spec.{where}: expected names of labels, got {', '.join(unknown)}")


def _check_network(spec: Spec) -> None:
    n = spec.network
    if n.ensemble < 1:
        raise ConfigError(f"spec.network.ensemble: expected 1 or more, got {n.ensemble}")
    if len(n.features) < 2 or min(n.features) < 1:
        raise ConfigError(
            f"spec.network.features: expected at least two numbers above 0, got {n.features}"
        )
    for name in ("dropout", "contraction_dropout"):
        if not 0 <= getattr(n, name) < 1:
            raise ConfigError(
                f"spec.network.{name}: expected 0 ≤ {name} < 1, got {getattr(n, name)}"
            )
    most = len(n.features) - 2
    if not 0 <= n.deep_supervision <= most:
        raise ConfigError(
            f"spec.network.deep_supervision: expected 0 to {most}, got {n.deep_supervision}"
        )


def _check_window(spec: Spec) -> None:
    if spec.spatial_dims not in (2, 3):
        raise ConfigError(f"spec.roi_size: expected 2 or 3 numbers, got {spec.roi_size}")
    if (spec.spatial_dims == 2) != (spec.slice_axis is not None):
        raise ConfigError(
            f"spec.slice_axis: expected R, A or S with 2 numbers in roi_size and null with 3, got {spec.slice_axis}"
        )
    if not 0 <= spec.overlap < 1:
        raise ConfigError(f"spec.overlap: expected a fraction, 0 ≤ overlap < 1, got {spec.overlap}")
    if spec.localise and (spec.foreground_threshold is None or spec.spatial_dims == 2):
        raise ConfigError("spec.localise: expected false for a network of slices, and without air")
    odd = len(set(spec.tta_mirror)) < len(spec.tta_mirror) or spec.slice_axis in spec.tta_mirror
    if odd or (spec.tta_mirror and not spec.network.padding):
        raise ConfigError(
            f"spec.tta_mirror: expected distinct directions within a padded window, got {', '.join(spec.tta_mirror)}"
        )
    if spec.overlap and not spec.network.padding:
        raise ConfigError(
            f"spec.overlap: expected 0 without padding, where tiles abut, got {spec.overlap}"
        )
    if spec.network.deep_supervision and not spec.network.padding:
        raise ConfigError(
            "spec.network.deep_supervision: expected 0 without padding, where levels see different regions"
        )
    if len(spec.strides) != len(spec.network.features) - 1 or any(
        len(s) != spec.spatial_dims for s in spec.strides
    ):
        raise ConfigError(
            f"spec.network.strides: expected {len(spec.network.features) - 1} entries (one fewer than features), each a number "
            f"or {spec.spatial_dims} numbers, got {spec.network.strides}"
        )
    if min(min(stride) for stride in spec.strides) < 1:
        raise ConfigError(
            f"spec.network.strides: expected numbers above 0, got {spec.network.strides}"
        )
    padding = spec.network.padding
    for axis, size in enumerate(spec.roi_size):
        strides = [stride[axis] for stride in spec.strides]
        if output_size(size, strides, padding=padding) is None:
            rule = (
                f"a multiple of {prod(strides)} (the product of the strides)"
                if padding
                else "a size that fits every pooling"
            )
            near = nearest_valid_sizes(size, strides, padding=padding)
            raise ConfigError(
                f"spec.roi_size[{axis}]: expected {rule}, got {size}; {near} would do"
            )
