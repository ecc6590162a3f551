"""The fingerprint of a spec: the same for the same meaning, another for any other."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from phantom import parse_spec, spec_content

from pipeline.config import RENAMED_SPEC_KEYS, load_spec, spec_fingerprint
from pipeline.config.spec import Cascade, CropResize, Intensity, NetworkSpec, Spec, SplineResampling


def test_how_the_file_is_written_does_not_count(tmp_path: Path) -> None:
    """Comments, the order of keys, defaults that are written out, whole numbers, old names."""
    content = spec_content(3) | {"foreground_threshold": 0.05, "tta_mirror": ["A"]}
    old = {new: name for name, new in RENAMED_SPEC_KEYS.items()}
    texts = [
        yaml.safe_dump(content, sort_keys=False),
        "# a comment\n" + yaml.safe_dump(dict(reversed(content.items())), sort_keys=False),
        yaml.safe_dump(content | {"overlap": 0.5, "sums": {}}, sort_keys=False),
        yaml.safe_dump(
            {old.get(key, key): value for key, value in content.items()}, sort_keys=False
        ),
    ]
    found = set()
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        found.add(spec_fingerprint(load_spec(path)))
    assert len(found) == 1
    whole = [parse_spec(spacing=[mm, 2.0, 3]) for mm in (1, 1.0)]
    assert spec_fingerprint(whole[0]) == spec_fingerprint(whole[1])


CHANGES: dict[str, Any] = {
    "labels": {"background": 0, "front": 8, "back": 300},
    "channels": ("T2w",),
    "spacing": (1.2, 1.1, 1.5),
    "roi_size": (16, 20, 14),
    "network": NetworkSpec(features=(4, 6), norm="batch"),
    "orientation": "LAS",
    "intensity": Intensity(nonzero=True),
    "channel_intensity": {"T1w": Intensity(nonzero=True)},
    "overlap": 0.25,
    "foreground_threshold": 0.0,
    "tta_mirror": ("A",),
    "output": "sigmoid",
    "fallback_channel": "T1w",
    "crop_resize": CropResize(),
    "resampling": SplineResampling(),
    "largest_component": ("each",),
    "refine": (("front", "back"),),
    "warn_at_edge": True,
    "sums": {"both": ("front", "back")},
    "plausible_ml": {"front": (1.0, 2.0)},
    "soft_volumes": True,
    "tta_rotations": 4,
    "ignore_label": 9,
    "min_component_ml": {"front": 0.5},
    "fill_holes": ("each",),
    "cascade": Cascade(
        structures=("front",),
        spacing=(1.0, 1.0, 1.0),
        roi_size=(16, 12, 20),
        network=NetworkSpec(features=(2, 3)),
    ),
}
TOGETHER: dict[str, dict[str, Any]] = {  # fields that only change together with another
    "localise": {"localise": True, "foreground_threshold": 0.0},
    "regions": {"output": "regions", "regions": {"front": (7,), "back": (300, 301)}},
    "crop_to_nonzero": {"crop_to_nonzero": True, "resampling": SplineResampling()},
    "slice_axis": {"slice_axis": "R", "roi_size": (20, 12)},
}


def test_every_field_counts() -> None:
    spec = parse_spec()
    changes = TOGETHER | {name: {name: value} for name, value in CHANGES.items()}
    changed = [replace(spec, **changes[part.name]) for part in fields(Spec)]
    found = {spec_fingerprint(one) for one in [spec, *changed]}
    assert len(found) == 1 + len(changed)


@pytest.mark.parametrize("key", ["labels", "channels"])
def test_the_order_of_channels_counts(key: str) -> None:
    """Two specs are equal in Python whose labels stand in another order, the networks are not."""
    content = spec_content(3) | {"channels": ["T1w", "T2w"]}
    turned = content | {
        "labels": {"background": 0, "back": 300, "front": 7},
        "channels": ["T2w", "T1w"],
    }
    other = content | {key: turned[key]}
    assert spec_fingerprint(parse_spec(**content)) != spec_fingerprint(parse_spec(**other))


def test_a_new_field_with_a_default_changes_nothing() -> None:
    """Neither at the top nor inside a part of the spec."""
    later_network = make_dataclass(
        "LaterNetwork",
        [("novel", int, field(default=3))],
        bases=(NetworkSpec,),
        frozen=True,
        kw_only=True,
    )

    @dataclass(frozen=True, kw_only=True)
    class LaterSpec(Spec):
        another: tuple[int, ...] = ()

    spec = parse_spec()
    parts = {part.name: getattr(spec, part.name) for part in fields(Spec)}
    parts["network"] = later_network(
        **{part.name: getattr(spec.network, part.name) for part in fields(NetworkSpec)}
    )
    assert spec_fingerprint(LaterSpec(**parts)) == spec_fingerprint(spec)
    assert spec_fingerprint(LaterSpec(**parts, another=(1,))) != spec_fingerprint(spec)


def test_the_fingerprint_of_a_spec_is_fixed() -> None:
    """A change would make all int8 models and results of earlier releases look like others'."""
    expected = "47fe2460b8f2c51a1f73ddf92142798c4e5213927cc99cde6695acb845df9f72"
    assert spec_fingerprint(parse_spec()) == expected
