from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
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

from pipeline.bundle.check import VERSIONS, check_bundle
from pipeline.bundle.metadata import WIRING, bundle_metadata, refresh_bundle
from pipeline.bundle.opening import CHECKOUT_BUNDLES, open_bundle
from pipeline.cli.app import main
from pipeline.errors import ConfigError

SHIPPED = sorted(path.parent.parent for path in CHECKOUT_BUNDLES.glob("*/configs/spec.yaml"))


@pytest.mark.parametrize("root", SHIPPED, ids=lambda path: path.name)
def test_shipped_bundles_pass_every_check(root: Path) -> None:
    """MONAI's properties for inference and training, its metadata schema, network in and out; our weights and wiring."""
    assert {name: reason for name, reason in check_bundle(root).items() if reason} == {}


@pytest.mark.parametrize("root", SHIPPED, ids=lambda path: path.name)
def test_shipped_bundles_are_complete(root: Path) -> None:
    """Their generated files are those of this version; the wiring says no number and is the same for all."""
    stored = json.loads((root / "configs" / "metadata.json").read_text())
    fresh = bundle_metadata(root)
    assert {key: value for key, value in stored.items() if key not in VERSIONS} == {
        key: value for key, value in fresh.items() if key not in VERSIONS
    }
    for name in WIRING:
        assert (root / "configs" / name).read_text() == (
            files("pipeline.bundle") / "templates" / name
        ).read_text()


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(
        json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content, sort_keys=False)
    )


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        state = torch.load(root / "models" / "model.pt", weights_only=True)
        change(state)
        torch.save(state, root / "models" / "model.pt")

    return edit


def _spec(**changes: Any) -> Callable[[Path], None]:
    return lambda root: _edit(
        root / "configs" / "spec.yaml", lambda content: content.update(changes)
    )


def _metadata(**changes: Any) -> Callable[[Path], None]:
    return lambda root: _edit(
        root / "configs" / "metadata.json", lambda content: content.update(changes)
    )


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no weights": (
        lambda root: (root / "models" / "model.pt").unlink(),
        "weights fit the spec",
        "model.pt",
    ),
    "no pickle": (
        lambda root: (root / "models" / "model.pt").write_bytes(b"x"),
        "weights fit the spec",
        "",
    ),
    "a shape": (
        _weights(lambda s: s.update({"output.weight": s["output.weight"][:2]})),
        "weights fit the spec",
        "output.weight",
    ),
    "a key": (_weights(lambda s: s.pop("output.bias")), "weights fit the spec", "output.bias"),
    "nan": (
        _weights(lambda s: s["output.bias"].fill_(torch.nan)),
        "weights fit the spec",
        "NaN or infinity in output.bias",
    ),
    "labels": (
        _spec(labels={"background": 0, "front": 7}),
        "weights fit the spec",
        "output.weight",
    ),
    "spacing": (
        _spec(spacing=[1.0, 1.0, "1e-3"]),
        "spec",
        "expected float, got '1e-3' at spec.spacing[2]",
    ),
    "channel": (
        _spec(channels=["T2w"]),
        "generated files",
        "configs/metadata.json: image_classes, network_data_format differ",
    ),
    "task": (
        _metadata(task="another"),
        "generated files",
        "configs/metadata.json: task differ from the spec and the card",
    ),
    "version": (
        _metadata(version="9.9.9"),
        "generated files",
        "configs/metadata.json: version differ",
    ),
    "schema": (_metadata(version=1), "metadata against the schema", "1 is not of type 'string'"),
    "wiring": (
        lambda root: _edit(
            root / "configs" / "inference.yaml",
            lambda content: content["inferer"].update(overlap=0.1),
        ),
        "generated files",
        "configs/inference.yaml differs from the one that volseg",
    ),
    "property": (
        lambda root: _edit(
            root / "configs" / "inference.yaml", lambda content: content.pop("inferer")
        ),
        "inference properties",
        "inferer",
    ),
    "training": (
        lambda root: _edit(
            root / "configs" / "train.yaml", lambda content: content["train"].pop("optimizer")
        ),
        "training properties",
        "optimizer",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_named(name: str, tiny_bundle_3d: Path, tmp_path: Path) -> None:
    """A bundle that was changed after it was made fails the check that is for it, with the thing that is wrong."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_3d, root)
    fault, check, says = FAULTS[name]
    fault(root)
    reasons = check_bundle(root)
    assert reasons[check]
    assert says in reasons[check]


def test_a_sound_bundle_passes(tiny_bundle: Path) -> None:
    """In 2D and 3D."""
    assert not any(check_bundle(tiny_bundle).values())


@pytest.mark.parametrize(
    "name", ["no weights", "no pickle", "a shape", "a key", "labels", "spacing", "property"]
)
def test_a_broken_bundle_is_not_opened(name: str, tiny_bundle_3d: Path, tmp_path: Path) -> None:
    """Nothing is segmented with weights that do not fit: an error that says what is wrong, and never random weights."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_3d, root)
    fault, _, says = FAULTS[name]
    fault(root)
    with pytest.raises(ConfigError) as raised:
        open_bundle(root, device="cpu")
    assert says in str(raised.value)


def test_weights_of_another_network_are_refused_in_one_line(
    tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """Not with a list of all that is missing: `volseg check` has that."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_3d, root)
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    torch.save(
        {f"module.{name}": tensor for name, tensor in state.items()}, root / "models" / "model.pt"
    )
    with pytest.raises(ConfigError) as raised:
        open_bundle(root, device="cpu")
    assert "Missing key(s)" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300 + 2 * len(str(root))
    assert sum(name in check_bundle(root)["weights fit the spec"] for name in state) == len(state)


def test_metadata_comes_from_spec_and_card(tiny_bundle_3d: Path) -> None:
    """Labels, channels and sizes that divide stand there as the spec has them."""
    content = bundle_metadata(tiny_bundle_3d)
    assert content["label_classes"] == "0: background, 7: front, 300: back"
    assert content["pred_classes"] == "0: background, 1: front, 2: back"
    assert content["network_data_format"]["inputs"]["image"]["spatial_shape"] == [
        "2*n",
        "2*n",
        "2*n",
    ]
    assert content["network_data_format"]["outputs"]["pred"]["num_channels"] == 3
    assert content["version"] == "0.1.0"


def test_a_bundle_without_a_version_is_refused(tiny_bundle_3d: Path, tmp_path: Path) -> None:
    """The last entry of the changelog is the version, so there has to be one."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_3d, root)
    _edit(root / "configs" / "card.yaml", lambda content: content.pop("changelog"))
    with pytest.raises(ConfigError, match=r"card\.changelog is missing"):
        refresh_bundle(root)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Two made-up volumes, one in a folder of its own, and five real ones where there are some."""
    root = tmp_path_factory.mktemp("volumes")
    save(root / "in" / "a.nii.gz")
    save(root / "in" / "sub" / "b.nii.gz", nifti(smooth((9, 30, 11), seed=1)))
    if os.environ.get("VOLSEG_DATA"):
        for path in request.getfixturevalue("hippocampus"):
            (root / "in" / path.name).symlink_to(path)
    return root


def _same_results(ours: Path, theirs: Path) -> None:
    written = sorted(path.relative_to(ours) for path in ours.rglob("*.nii.gz"))
    assert len(written) in (2, 7)
    assert written == sorted(path.relative_to(theirs) for path in theirs.rglob("*.nii.gz"))
    for path in written:
        assert (ours / path).read_bytes() == (theirs / path).read_bytes()
    assert (ours / "volumes.csv").read_bytes() == (theirs / "volumes.csv").read_bytes()


def _segment(root: Path, folder: Path, out: Path, *more: str) -> Path:
    arguments = [
        "segment",
        str(folder / "in"),
        "-o",
        str(out),
        "-b",
        str(root),
        "--device",
        "cpu",
        *more,
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return out


def test_monais_command_gives_the_same_bytes(
    tiny_bundle_3d: Path, folder: Path, tmp_path: Path
) -> None:
    """`python -m monai.bundle run` from another current directory, file by file against `volseg segment`."""
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        f"{tiny_bundle_3d}/configs/inference.yaml",
    ]
    command += [
        "--bundle_root",
        str(tiny_bundle_3d),
        "--dataset_dir",
        str(folder / "in"),
        "--output_dir",
        str(tmp_path / "theirs"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _same_results(_segment(tiny_bundle_3d, folder, tmp_path / "ours"), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
@pytest.mark.parametrize("overlap", [None, 0.25])
def test_monais_overrides_take_effect(
    overlap: float | None,
    tiny_bundle: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 2D and 3D; `--inferer::overlap` is the command's `--overlap`, and gives other scores than the bundle's own."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    changes = {} if overlap is None else {"inferer::overlap": overlap}
    monai_run(
        config_file=f"{tiny_bundle}/configs/inference.yaml",
        bundle_root=str(tiny_bundle),
        dataset_dir=str(folder / "in"),
        output_dir=str(tmp_path / "theirs"),
        **changes,
    )
    more = [] if overlap is None else ["--overlap", str(overlap)]
    _same_results(_segment(tiny_bundle, folder, tmp_path / "ours", *more), tmp_path / "theirs")
    told = [
        json.loads((tmp_path / name / "run.json").read_text())["overlap"]
        for name in ("ours", "theirs")
    ]
    assert told == [str(overlap or 0.5)] * 2


@pytest.mark.parametrize("root", SHIPPED, ids=lambda path: path.name)
def test_golden_label_maps(root: Path) -> None:
    """The shipped weights label a made-up volume as they did when they were trained.

    Processors round differently, and where two classes tie that decides a voxel: up to 0.5 % of the
    voxels may differ, and no label by more than a Dice of .97. `python tests/golden/make.py`
    writes the label maps after a training.
    """
    expected = nib.load(golden(root.name))
    labels = labels_of(root)
    assert labels.shape == expected.shape
    stored = np.asarray(expected.dataobj)
    assert (labels != stored).mean() < 0.005
    assert dice(labels, stored) > 0.97
