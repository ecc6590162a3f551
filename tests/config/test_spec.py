from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from phantom import spec_content

from pipeline.config.parser import parse_config
from pipeline.config.spec import RENAMED_SPEC_KEYS, Spec, load_spec
from pipeline.errors import ConfigError

BUNDLES = sorted((Path(__file__).parents[2] / "bundles").glob("*/configs/spec.yaml"))


def parse(dims: int = 3, **changes: Any) -> Spec:
    return parse_config(Spec, spec_content(dims, **changes), "spec")


@pytest.mark.parametrize(
    ("dims", "change", "says"),
    [
        (3, {"spacing": [1.0, 1.0, "1e-3"]}, "expected float, got '1e-3' at spec.spacing[2]"),
        (
            3,
            {"spacing": [1.0, 0.0, 1.0]},
            "spec.spacing[1]: expected mm above 0 and below 100, or null, got 0.0",
        ),
        (3, {"labels": {"background": 1, "a": 2}}, "spec.labels: expected `background: 0` first"),
        (
            3,
            {"labels": {"background": 0}},
            "spec.labels: expected `background: 0` first and at least one structure",
        ),
        (3, {"labels": {"background": 0, "a": 2, "b": 2}}, "spec.labels: expected distinct values"),
        (
            3,
            {"labels": {"background": 0, "a": -2}},
            "spec.labels: expected distinct values from 0 to 2**32 - 1, got [0, -2]",
        ),
        (
            3,
            {"labels": {"background": 0, "a": 2**32}},
            "spec.labels: expected distinct values from 0",
        ),
        (3, {"channels": []}, "spec.channels: expected at least one name, got none"),
        (3, {"channels": ["T1w", "T1w"]}, "spec.channels: expected distinct names, got T1w, T1w"),
        (
            3,
            {"orientation": "RAR"},
            "spec.orientation: expected three axis codes such as RAS, or i, j and k in some "
            "order, got 'RAR'",
        ),
        (
            3,
            {"orientation": "ras"},
            "spec.orientation: expected three axis codes such as RAS, or i, j and k in some "
            "order, got 'ras'",
        ),
        (3, {"overlap": 1.0}, "spec.overlap: expected a fraction, 0 ≤ overlap < 1, got 1.0"),
        (3, {"roi_size": [16]}, "spec.roi_size: expected 2 or 3 numbers, got (16,)"),
        (
            3,
            {"roi_size": [16, 13, 8]},
            "spec.roi_size[1]: expected a multiple of 2 (the product of the strides), got 13",
        ),
        (3, {"roi_size": [16, 12, 0]}, "spec.roi_size[2]: expected a multiple of 2"),
        (
            3,
            {"slice_axis": "R"},
            "spec.slice_axis: expected R, A or S with 2 numbers in roi_size and null with 3, got R",
        ),
        (2, {"slice_axis": None}, "spec.slice_axis: expected R, A or S with 2 numbers in roi_size"),
        (
            2,
            {"slice_axis": "L"},
            "expected one of 'R', 'A', 'S', 'i', 'j', 'k', got 'L' at spec.slice_axis",
        ),
        (
            3,
            {"orientation": "Rjk"},
            "spec.orientation: expected three axis codes such as RAS, or i, j and k in some "
            "order, got 'Rjk'",
        ),
        (
            3,
            {"orientation": "kji", "tta_mirror": ["R"]},
            "spec.tta_mirror: expected i, j or k with these axes in spec.orientation",
        ),
        (2, {"orientation": "kji"}, "spec.slice_axis: expected i, j or k with these axes"),
        (
            3,
            {"orientation": "kji", "tta_rotations": 4},
            "spec.tta_rotations: expected its default with i, j and k in spec.orientation",
        ),
        (
            3,
            {"resampling": {"logits_order": 3}},
            "spec.resampling.logits_order: expected 0 to 1, got 3",
        ),
        (3, {"crop_to_nonzero": True}, "spec.crop_to_nonzero: expected false without spec.res"),
        (
            3,
            {"intensity": {"foreground": True, "nonzero": True}},
            "spec.intensity.foreground: expected the method zscore without nonzero",
        ),
        (
            3,
            {"network": {"features": [4, 6], "architecture": "plain_conv_unet"}},
            "spec.network.encoder_blocks: expected 2 numbers above 0, got None",
        ),
        (
            3,
            {"network": {"features": [4, 6], "encoder_blocks": [1, 1]}},
            "expected their defaults with `architecture: unet`",
        ),
        (
            3,
            {"intensity": {"method": "minmax"}},
            "expected one of 'zscore', 'robust_zscore', 'percentiles', 'percentiles_zscore', "
            "'fixed', 'none', got 'minmax' at "
            "spec.intensity.method",
        ),
        (
            3,
            {"intensity": {"lower": 60, "upper": 40}},
            "spec.intensity: expected percentiles, 0 ≤ lower < upper ≤ 100",
        ),
        (
            3,
            {"network": {"features": [4]}},
            "spec.network.features: expected at least two numbers above 0, got (4,)",
        ),
        (
            3,
            {"network": {"features": [4, 0]}},
            "spec.network.features: expected at least two numbers above 0, got (4, 0)",
        ),
        (
            3,
            {"network": {"features": [4, 6], "strides": [2, 2]}},
            "spec.network.strides: expected 1 entries",
        ),
        (3, {"network": {"features": [4, 6], "strides": [[2, 2]]}}, "each a number or 3 numbers"),
        (
            3,
            {"network": {"features": [4, 6], "strides": [0]}},
            "spec.network.strides: expected numbers above 0",
        ),
        (
            3,
            {"network": {"features": [4, 6], "dropout": 1.5}},
            "spec.network.dropout: expected 0 ≤ dropout < 1, got 1.5",
        ),
        (
            3,
            {"network": {"features": [4, 6], "deep_supervision": 1}},
            "spec.network.deep_supervision: expected 0 to 0, got 1",
        ),
        (3, {"network": {"features": [4, 6], "norm": "layer"}}, "got 'layer' at spec.network.norm"),
        (
            3,
            {"network": {"features": [4, 6], "ensemble": 0}},
            "spec.network.ensemble: expected 1 or more, got 0",
        ),
        (
            3,
            {"network": {"features": [4, 6], "padding": False}},
            "spec.overlap: expected 0 without padding, where outputs abut, got 0.5",
        ),
        (
            3,
            {"localise": True},
            "spec.localise: expected false for a 2D network and without foreground_threshold",
        ),
        (
            3,
            {"tta_mirror": ["R", "R"]},
            "spec.tta_mirror: expected distinct directions within a padded window, got R, R",
        ),
        (2, {"tta_mirror": ["R"]}, "spec.tta_mirror: expected distinct directions"),
        (3, {"tta_rotations": 0}, "spec.tta_rotations: expected 1 (none) or more, got 0"),
        (
            3,
            {"fallback_channel": "T2w"},
            "spec.fallback_channel: expected one of the channels T1w, got 'T2w'",
        ),
        (
            3,
            {"crop_resize": {"floor": 1.0}},
            "spec.crop_resize: expected 0 ≤ floor < 1 and a slice_size of 1 or more, got",
        ),
        (
            3,
            {"refine": [["front"]]},
            "spec.refine[0]: expected two or more structures of a softmax, got front",
        ),
        (3, {"refine": [["nose"]]}, "spec.refine[0]: expected names of labels, got nose"),
        (3, {"sums": {"x": ["nose"]}}, "spec.sums.x: expected names of labels, got nose"),
        (
            3,
            {"sums": {"front": ["back"]}},
            "spec.sums.front: expected a name other than a label's, got front",
        ),
        (3, {"plausible_ml": {"nose": [1, 2]}}, "spec.plausible_ml: expected names of labels"),
        (3, {"netwrok": {}}, "unknown key spec.netwrok; did you mean network?"),
        (3, {"tta_miror": ["R"]}, "unknown key spec.tta_miror; did you mean tta_mirror?"),
        (
            3,
            {"regions": {"front": [7]}},
            "spec.regions: expected nothing without `output: regions`",
        ),
        (
            3,
            {"output": "regions", "regions": {"front": [7]}},
            "spec.regions: expected the values of each structure of spec.labels (front, back)",
        ),
        (
            3,
            {"output": "regions", "regions": {"front": [7, 8], "back": [8, 9]}},
            "spec.regions.back: expected distinct values from 1 to 2**32 - 1, one of them 300",
        ),
        (
            3,
            {"output": "regions", "regions": {"front": [7, 7], "back": [300]}},
            "spec.regions.front: expected distinct values",
        ),
        (
            3,
            {"output": "regions", "regions": {"front": [7, 0], "back": [300]}},
            "spec.regions.front: expected distinct values from 1",
        ),
        (
            3,
            {
                "output": "regions",
                "regions": {"front": [7, 8], "back": [300]},
                "ignore_label": 8,
            },
            "spec.ignore_label: expected a value that no label has (0, 7, 8, 300), got 8",
        ),
        (3, {"ignore_label": 0}, "spec.ignore_label: expected a value that no label has"),
        (
            3,
            {
                "output": "regions",
                "regions": {"front": [7, 300], "back": [300]},
                "sums": {"both": ["all"]},
                "soft_volumes": True,
            },
            "spec.sums: expected none with soft_volumes and `output: regions`, got both",
        ),
        (
            3,
            {
                "output": "regions",
                "regions": {"front": [7, 300], "back": [300]},
                "refine": [["front", "back"]],
            },
            "spec.refine[0]: expected two or more structures of a softmax",
        ),
        (3, {"fill_holes": ["frnt"]}, "spec.fill_holes: expected names of labels, got frnt"),
        (
            3,
            {"min_component_ml": {"front": 0.0}},
            "spec.min_component_ml.front: expected mL above 0, got 0.0",
        ),
    ],
)
def test_an_invalid_spec_is_refused(dims: int, change: dict[str, Any], says: str) -> None:
    """Each value is checked, and the message holds its key."""
    with pytest.raises(ConfigError) as raised:
        parse(dims, **change)
    assert says in str(raised.value)


@pytest.mark.parametrize("axes", list(permutations("RAS")))
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("slice_axis", "RAS")
def test_slices_are_stacked_along_the_anatomical_axis(
    axes: tuple[str, ...], mirror: bool, slice_axis: str
) -> None:
    """slice_dim is the array axis of that direction or its opposite."""
    opposite = dict(zip("RAS", "LPI", strict=True))
    orientation = "".join(opposite[axis] if mirror else axis for axis in axes)
    assert parse(2, orientation=orientation, slice_axis=slice_axis).slice_dim == axes.index(
        slice_axis
    )


def test_regions_have_a_channel_each_and_may_share_values() -> None:
    """A region is several values of a label map; other outputs have one value per structure."""
    regions = {"front": [7, 300], "back": [300]}
    spec = parse(output="regions", regions=regions, ignore_label=9)
    assert spec.outputs == ("front", "back")
    assert spec.values_of == {"front": (7, 300), "back": (300,)}
    assert parse().values_of == {"front": (7,), "back": (300,)}


def test_strides_have_one_number_per_axis() -> None:
    """2 by default; a single number is used for all axes."""
    network = {"features": [4, 6, 8]}
    assert parse(roi_size=[16, 12, 8], network=network).strides == ((2, 2, 2), (2, 2, 2))
    assert parse(2, network=network | {"strides": [1, [2, 4]]}).strides == ((1, 1), (2, 4))


def test_a_spec_cannot_be_changed() -> None:
    """Specs are frozen."""
    with pytest.raises(AttributeError):
        parse().overlap = 0.25  # type: ignore[misc]


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.parts[-3])
def test_shipped_specs_are_valid(path: Path) -> None:
    """They use present keys only."""
    assert set(yaml.safe_load(path.read_text())) <= set(Spec.__dataclass_fields__)
    assert load_spec(path).labels["background"] == 0


OLD_VALUES: dict[str, Any] = {
    "air": 0.1,
    "focus": True,
    "mirror": ["A", "S"],
    "rotations": 3,
    "fit": {"floor": 0.2, "slice_size": 64, "axis": "A"},
    "stand_in": "T1w",
    "whole": True,
}


def write_spec(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(spec_content(3, **changes), sort_keys=False))
    return path


@pytest.mark.parametrize("old", OLD_VALUES)
def test_keys_of_an_earlier_version_are_read(tmp_path: Path, old: str) -> None:
    """An old key gives the same spec as the present one."""
    # localise is only valid together with foreground_threshold
    other = {"foreground_threshold": 0.2} if old == "focus" else {}
    new = RENAMED_SPEC_KEYS[old]
    value = OLD_VALUES[old]
    before = load_spec(write_spec(tmp_path / "old.yaml", **{old: value}, **other))
    present = load_spec(write_spec(tmp_path / "new.yaml", **{new: value}, **other))
    assert before == present
    assert getattr(before, new) != getattr(parse(), new)


def test_every_renamed_key_is_tested() -> None:
    """And each leads to a field of the spec."""
    assert set(OLD_VALUES) == set(RENAMED_SPEC_KEYS)
    assert set(RENAMED_SPEC_KEYS.values()) <= set(Spec.__dataclass_fields__)


@pytest.mark.parametrize(("old", "new"), RENAMED_SPEC_KEYS.items())
def test_a_key_under_both_names_is_refused(tmp_path: Path, old: str, new: str) -> None:
    """The message names both keys and the file."""
    path = write_spec(tmp_path / "spec.yaml", **{old: OLD_VALUES[old], new: OLD_VALUES[old]})
    with pytest.raises(ConfigError) as raised:
        load_spec(path)
    assert str(raised.value) == (
        f"{path}: spec.{old} and spec.{new} are the old and the present name of one key: "
        f"keep spec.{new} only"
    )


def test_a_wrong_value_of_an_old_key_is_named_by_the_present_key(tmp_path: Path) -> None:
    """And misspelt keys still get a suggestion."""
    with pytest.raises(ConfigError, match=r"expected int, got 'x' at spec.tta_rotations"):
        load_spec(write_spec(tmp_path / "spec.yaml", rotations="x"))
    with pytest.raises(ConfigError, match=r"unknown key spec.localize; did you mean localise\?"):
        load_spec(write_spec(tmp_path / "spec.yaml", localize=True))
