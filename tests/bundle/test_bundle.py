"""Shipped and broken bundles under every check, and MONAI's command against volseg's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from golden.make import golden, labels_of
from monai.bundle import run as monai_run
from phantom import dice, nifti, save, smooth

from pipeline.bundle.check import ENVIRONMENT_KEYS, check_bundle
from pipeline.bundle.metadata import bundle_metadata
from pipeline.bundle.opening import open_bundle, shipped_bundles
from pipeline.bundle.wiring import WIRING, refresh_bundle, template
from pipeline.cli.app import main
from pipeline.config.paths import BundlePaths
from pipeline.errors import ConfigError

SHIPPED = sorted(path.parent.parent for path in shipped_bundles().glob("*/configs/spec.yaml"))
each_shipped_bundle = pytest.mark.parametrize("root", SHIPPED, ids=lambda path: path.name)


@pytest.fixture
def bundle(tiny_bundle_3d: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle of volumes, to write into."""
    return Path(shutil.copytree(tiny_bundle_3d, tmp_path / "bundle"))


@pytest.mark.slow
@each_shipped_bundle
def test_shipped_bundles_pass_every_check(root: Path) -> None:
    """Without an error and without advice."""
    assert [found for found in check_bundle(root).findings.values() if found] == []


@each_shipped_bundle
def test_shipped_bundles_are_complete(root: Path) -> None:
    """Their metadata is as this version writes it, and their wiring is the same for all."""
    paths = BundlePaths(root)
    stored = json.loads(paths.metadata.read_text())
    expected = bundle_metadata(root)
    for key in ENVIRONMENT_KEYS:
        del stored[key], expected[key]
    assert stored == expected
    for name in WIRING:
        assert (paths.configs / name).read_text() == template(name).read_text()


Change = Callable[[BundlePaths], object]


def edit_file(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a YAML or JSON file."""
    content = yaml.safe_load(path.read_text())
    edit(content)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(yaml.safe_dump(content, sort_keys=False))


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(paths: BundlePaths) -> None:
        state = torch.load(paths.weights, weights_only=True)
        edit(state)
        torch.save(state, paths.weights)

    return change


def edit_spec(**keys: Any) -> Change:
    return lambda paths: edit_file(paths.spec, lambda content: content.update(keys))


def edit_metadata(**keys: Any) -> Change:
    return lambda paths: edit_file(paths.metadata, lambda content: content.update(keys))


def edit_inference(edit: Callable[[dict[str, Any]], object]) -> Change:
    return lambda paths: edit_file(paths.inference, edit)


def edit_train(edit: Callable[[dict[str, Any]], object]) -> Change:
    return lambda paths: edit_file(paths.train, edit)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A change that breaks a bundle, and the check that finds it with this message."""

    change: Change
    check: str
    message: str


FAULTS = {
    "no weights": Fault(
        change=lambda paths: paths.weights.unlink(),
        check="weights fit the spec",
        message="model.pt",
    ),
    "no checkpoint": Fault(
        change=lambda paths: paths.weights.write_bytes(b"x"),
        check="weights fit the spec",
        message="",
    ),
    "shape of a weight": Fault(
        change=edit_weights(
            lambda state: state.update({"output.weight": state["output.weight"][:2]})
        ),
        check="weights fit the spec",
        message="output.weight",
    ),
    "key of a weight": Fault(
        change=edit_weights(lambda state: state.pop("output.bias")),
        check="weights fit the spec",
        message="output.bias",
    ),
    "nan": Fault(
        change=edit_weights(lambda state: state["output.bias"].fill_(torch.nan)),
        check="weights fit the spec",
        message="NaN or infinity in output.bias",
    ),
    "labels": Fault(
        change=edit_spec(labels={"background": 0, "front": 7}),
        check="weights fit the spec",
        message="output.weight",
    ),
    "spacing": Fault(
        change=edit_spec(spacing=[1.0, 1.0, "1e-3"]),
        check="spec",
        message="expected float, got '1e-3' at spec.spacing[2]",
    ),
    "channel": Fault(
        change=edit_spec(channels=["T2w"]),
        check="generated files",
        message="configs/metadata.json: image_classes, network_data_format differ",
    ),
    "task": Fault(
        change=edit_metadata(task="another"),
        check="generated files",
        message="configs/metadata.json: task differ from the spec and the card",
    ),
    "version": Fault(
        change=edit_metadata(version="9.9.9"),
        check="generated files",
        message="configs/metadata.json: version differ",
    ),
    "no metadata": Fault(
        change=lambda paths: paths.metadata.unlink(),
        check="generated files",
        message="configs/metadata.json is missing; `volseg bundle refresh",
    ),
    "schema": Fault(
        change=edit_metadata(version=1),
        check="metadata against the schema",
        message="configs/metadata.json, version: 1 is not of type 'string'",
    ),
    "wiring": Fault(
        change=edit_inference(lambda content: content["inferer"].update(overlap=0.1)),
        check="generated files",
        message="configs/inference.yaml differs from the one that volseg",
    ),
    "property": Fault(
        change=edit_inference(lambda content: content.pop("inferer")),
        check="inference properties",
        message="inferer",
    ),
    "training": Fault(
        change=edit_train(lambda content: content["train"].pop("optimizer")),
        check="training properties",
        message="optimizer",
    ),
}
BROKEN = (
    "no weights",
    "no checkpoint",
    "shape of a weight",
    "key of a weight",
    "labels",
    "spacing",
    "property",
)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_found_and_named(fault: Fault, bundle: Path) -> None:
    fault.change(BundlePaths(bundle))
    reasons = check_bundle(bundle, trust=True).errors
    assert reasons[fault.check]
    assert fault.message in reasons[fault.check]


def test_a_sound_bundle_passes(tiny_bundle: Path) -> None:
    """In 2D and 3D."""
    assert check_bundle(tiny_bundle).errors == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_not_opened(name: str, bundle: Path) -> None:
    """An error names the fault; nothing is segmented with weights that do not fit."""
    fault = FAULTS[name]
    fault.change(BundlePaths(bundle))
    with pytest.raises(ConfigError) as raised:
        open_bundle(bundle, device="cpu", trust=True)
    assert fault.message in str(raised.value)


def test_weights_of_another_network_are_refused_in_one_line(bundle: Path) -> None:
    """The list of all keys that do not fit is left to the check."""
    weights = BundlePaths(bundle).weights
    state = torch.load(weights, weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, weights)
    with pytest.raises(ConfigError) as raised:
        open_bundle(bundle, device="cpu")
    assert "Missing key(s)" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300 + 2 * len(str(bundle))
    reason = check_bundle(bundle).errors["weights fit the spec"]
    assert all(name in reason for name in state)


def test_metadata_comes_from_spec_and_card(tiny_bundle_3d: Path) -> None:
    content = bundle_metadata(tiny_bundle_3d)
    formats = content["network_data_format"]
    assert content["label_classes"] == "0: background, 7: front, 300: back"
    assert content["pred_classes"] == "0: background, 1: front, 2: back"
    assert formats["inputs"]["image"]["spatial_shape"] == ["2*n", "2*n", "2*n"]
    assert formats["outputs"]["pred"]["num_channels"] == 3
    assert content["version"] == "0.1.0"


def test_a_bundle_without_a_version_is_refused(bundle: Path) -> None:
    """The last entry of the changelog is the version."""
    edit_file(BundlePaths(bundle).card, lambda content: content.pop("changelog"))
    with pytest.raises(ConfigError, match=r"card\.changelog is missing"):
        refresh_bundle(bundle)


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with two drawn volumes, one in a subfolder, and five real ones if there are any."""
    root = tmp_path_factory.mktemp("volumes")
    save(root / "a.nii.gz")
    save(root / "sub" / "b.nii.gz", nifti(smooth((9, 30, 11), seed=1)))
    if os.environ.get("VOLSEG_DATA"):
        for path in request.getfixturevalue("hippocampus"):
            (root / path.name).symlink_to(path)
    return root


def assert_same_results(ours: Path, theirs: Path) -> None:
    """Two output folders hold the same label maps and volumes, byte by byte."""
    written = sorted(path.relative_to(ours) for path in ours.rglob("*.nii.gz"))
    assert len(written) in (2, 7)
    assert written == sorted(path.relative_to(theirs) for path in theirs.rglob("*.nii.gz"))
    for path in (*written, Path("volumes.csv")):
        assert (ours / path).read_bytes() == (theirs / path).read_bytes()


def volseg_segment(root: Path, volumes: Path, output: Path, *options: str) -> Path:
    """Run `volseg segment` on the CPU and return the output folder."""
    arguments = ["segment", str(volumes), "-o", str(output), "-b", str(root), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    return output


@pytest.mark.slow
def test_monais_command_gives_the_same_bytes(
    tiny_bundle_3d: Path, volumes: Path, tmp_path: Path
) -> None:
    """`python -m monai.bundle run`, from another working directory than the bundle's."""
    options = {
        "config_file": tiny_bundle_3d / "configs" / "inference.yaml",
        "bundle_root": tiny_bundle_3d,
        "dataset_dir": volumes,
        "output_dir": tmp_path / "theirs",
    }
    command = [sys.executable, "-m", "monai.bundle", "run"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ours = volseg_segment(tiny_bundle_3d, volumes, tmp_path / "ours")
    assert_same_results(ours, tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
@pytest.mark.parametrize("overlap", [None, 0.25])
def test_monais_overrides_take_effect(
    overlap: float | None,
    tiny_bundle: Path,
    volumes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--inferer::overlap` of MONAI's command is `--overlap` of volseg's, in 2D and 3D."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    overrides = {} if overlap is None else {"inferer::overlap": overlap}
    monai_run(
        config_file=f"{tiny_bundle}/configs/inference.yaml",
        bundle_root=str(tiny_bundle),
        dataset_dir=str(volumes),
        output_dir=str(tmp_path / "theirs"),
        **overrides,
    )
    options = [] if overlap is None else ["--overlap", str(overlap)]
    ours = volseg_segment(tiny_bundle, volumes, tmp_path / "ours", *options)
    assert_same_results(ours, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        recorded = json.loads((tmp_path / name / "run.json").read_text())
        assert recorded["overlap"] == str(overlap or 0.5)


@pytest.mark.slow
@each_shipped_bundle
def test_golden_label_maps(root: Path) -> None:
    """The shipped weights label a drawn volume as they did when they were trained.

    Processors round differently, which decides the voxels where two classes tie: up to 0.5 % of the
    voxels may differ, and no label by more than a Dice of 0.97. `python tests/golden/make.py`
    writes the label maps after a training.
    """
    expected = nib.load(golden(root.name))
    labels = labels_of(root)
    assert labels.shape == expected.shape
    stored = np.asarray(expected.dataobj)
    assert (labels != stored).mean() < 0.005
    assert dice(labels, stored) > 0.97
