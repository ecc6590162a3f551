from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml
from phantom import spec_content

from pipeline.config.parser import parse_config
from pipeline.config.spec import Spec, load_spec
from pipeline.errors import ConfigError

BUNDLES = sorted((Path(__file__).parents[2] / "bundles").glob("*/configs/spec.yaml"))


def parse(dims: int = 3, **changes: Any) -> Spec:
    return parse_config(Spec, spec_content(dims, **changes), "spec")


@pytest.mark.parametrize(
    ("dims", "change", "says"),
    [
        (3, {"spacing": [1.0, 1.0, "1e-3"]}, "expected float, got '1e-3' at spec.spacing[2]"),
        (3, {"spacing": [1.0, 0.0, 1.0]}, "spec.spacing[1]: expected mm above 0 or null, got 0.0"),
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
            "spec.orientation: expected three axis codes such as RAS, got 'RAR'",
        ),
        (
            3,
            {"orientation": "ras"},
            "spec.orientation: expected three axis codes such as RAS, got 'ras'",
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
        (2, {"slice_axis": "L"}, "expected one of 'R', 'A', 'S', got 'L' at spec.slice_axis"),
        (
            3,
            {"intensity": {"method": "minmax"}},
            "expected one of 'zscore', 'percentiles', 'percentiles_zscore', got 'minmax' at spec.intensity.method",
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
        (3, {"netwrok": {}}, "unknown key spec.netwrok; did you mean network?"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(dims: int, change: dict[str, Any], says: str) -> None:
    """Each fact is checked on reading, and the message has the path to it."""
    with pytest.raises(ConfigError) as raised:
        parse(dims, **change)
    assert says in str(raised.value)


@pytest.mark.parametrize("axes", list(permutations("RAS")))
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("slice_axis", "RAS")
def test_slices_are_stacked_along_the_anatomical_axis(
    axes: tuple[str, ...], mirror: bool, slice_axis: str
) -> None:
    """slice_dim is where the orientation has that direction, either way round."""
    opposite = dict(zip("RAS", "LPI", strict=True))
    orientation = "".join(opposite[axis] if mirror else axis for axis in axes)
    assert parse(2, orientation=orientation, slice_axis=slice_axis).slice_dim == axes.index(
        slice_axis
    )


def test_strides_are_one_number_an_axis() -> None:
    """2 by default; a single number holds for all axes."""
    network = {"features": [4, 6, 8]}
    assert parse(roi_size=[16, 12, 8], network=network).strides == ((2, 2, 2), (2, 2, 2))
    assert parse(2, network=network | {"strides": [1, [2, 4]]}).strides == ((1, 1), (2, 4))


def test_a_spec_cannot_be_changed() -> None:
    """The facts of weights are frozen."""
    with pytest.raises(AttributeError):
        parse().overlap = 0.25  # type: ignore[misc]


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.parts[-3])
def test_shipped_specs_hold_nothing_but_facts(path: Path) -> None:
    """They read, and all that they say is a field of Spec."""
    assert set(yaml.safe_load(path.read_text())) <= set(Spec.__dataclass_fields__)
    assert load_spec(path).labels["background"] == 0
