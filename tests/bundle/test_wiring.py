"""Bundles of an earlier release, and wiring that its owner edited."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from phantom import dice, oblique, save, smooth

from pipeline.api import Segmentation, segment
from pipeline.bundle.check import check_bundle
from pipeline.bundle.opening import open_bundle
from pipeline.bundle.wiring import WIRING, read_wiring, refresh_bundle, template, wiring_origin
from pipeline.cli.app import main
from pipeline.config.paths import BundlePaths
from pipeline.config.spec import RENAMED_SPEC_KEYS, load_spec
from pipeline.errors import ConfigError
from pipeline.io.tables import read_csv

FIXTURES = Path(__file__).parent / "fixtures"
BUNDLE_0_1_0 = FIXTURES / "bundle_0.1.0"
VOLUME = FIXTURES / "volume.nii.gz"
REFRESH = "volseg bundle refresh"


@pytest.fixture
def earlier_bundle(tmp_path: Path) -> Path:
    """A copy of the bundle of 0.1.0, to write into."""
    return Path(shutil.copytree(BUNDLE_0_1_0, tmp_path / "bundle"))


@pytest.fixture
def edited_bundle(earlier_bundle: Path) -> Path:
    """A refreshed bundle whose owner added a line to inference.yaml."""
    refresh_bundle(earlier_bundle)
    with open(BundlePaths(earlier_bundle).inference, "a", encoding="utf-8") as file:
        file.write("# a comment\nadded: 42\n")
    return earlier_bundle


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log records of volseg at level WARNING and above."""
    caplog.set_level(logging.WARNING, logger="volseg")
    return caplog


def messages(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "volseg"]


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_as_0_1_0(result: Segmentation) -> None:
    """The label map and the volumes are those that 0.1.0 wrote."""
    expected = nib.load(FIXTURES / "volume_seg.nii.gz")
    assert result.labels.dtype == expected.get_data_dtype()
    assert np.array_equal(result.labels, np.asarray(expected.dataobj))
    assert np.allclose(result.affine, expected.affine)
    [row] = read_csv(FIXTURES / "volumes.csv")
    volumes = {name: float(text) for name, text in row.items() if name != "case"}
    assert volumes == pytest.approx(result.volumes_mm3, rel=1e-6)


def test_a_bundle_of_0_1_0_opens_with_one_log_line(log: pytest.LogCaptureFixture) -> None:
    """The line names the release, and the command that rewrites the bundle."""
    open_bundle(BUNDLE_0_1_0, device="cpu")
    [message] = messages(log)
    assert "volseg 0.1.0" in message
    assert f"{REFRESH} {BUNDLE_0_1_0}" in message


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_bundle_of_0_1_0_gives_the_same_voxels(earlier_bundle: Path, runtime: str) -> None:
    """Its files stay as they are."""
    before = file_hashes(earlier_bundle)
    model = open_bundle(earlier_bundle, device="cpu", runtime=runtime)
    assert_as_0_1_0(segment(model, str(VOLUME)))
    assert file_hashes(earlier_bundle) == before


def test_the_check_of_a_bundle_of_0_1_0_names_the_command(log: pytest.LogCaptureFixture) -> None:
    """All other checks pass: they are about the wiring that is used in place of the old one."""
    reasons = check_bundle(BUNDLE_0_1_0).errors
    outdated = reasons.pop("generated files")
    for name in WIRING:
        assert f"configs/{name} is that of an earlier release" in outdated
    assert f"`{REFRESH} {BUNDLE_0_1_0}`" in outdated
    assert "--overwrite" not in outdated
    assert not any(reasons.values()), reasons
    assert not messages(log), "the check says it already"


def test_refresh_rewrites_a_bundle_of_0_1_0(
    earlier_bundle: Path, log: pytest.LogCaptureFixture
) -> None:
    paths = BundlePaths(earlier_bundle)
    before = yaml.safe_load(paths.spec.read_text())
    refreshed = refresh_bundle(earlier_bundle)
    assert set(refreshed.written) == {"spec.yaml", *WIRING, "metadata.json"}
    assert refreshed.kept == ()
    for name in WIRING:
        assert wiring_origin(paths.configs / name) == "current"
    spec = yaml.safe_load(paths.spec.read_text())
    assert list(spec) == [RENAMED_SPEC_KEYS.get(key, key) for key in before]
    assert (spec["foreground_threshold"], spec["tta_mirror"]) == (0.05, ["A"])
    assert spec["warn_at_edge"] is True
    assert load_spec(paths.spec) == load_spec(BundlePaths(BUNDLE_0_1_0).spec)
    assert check_bundle(earlier_bundle).errors == {}
    assert_as_0_1_0(segment(open_bundle(earlier_bundle, device="cpu"), str(VOLUME)))
    assert not messages(log)


def test_refreshing_twice_changes_nothing(earlier_bundle: Path) -> None:
    refresh_bundle(earlier_bundle)
    before = file_hashes(earlier_bundle)
    refreshed = refresh_bundle(earlier_bundle)
    assert "spec.yaml" not in refreshed.written
    assert file_hashes(earlier_bundle) == before


def test_trusted_edited_wiring_is_used_as_it_is(
    edited_bundle: Path, log: pytest.LogCaptureFixture
) -> None:
    path = BundlePaths(edited_bundle).inference
    assert wiring_origin(path) == "edited"
    assert read_wiring(edited_bundle, trust=True)["added"] == 42
    assert_as_0_1_0(segment(open_bundle(edited_bundle, device="cpu", trust=True), str(VOLUME)))
    assert not messages(log)


def test_edited_wiring_is_replaced_only_when_asked(edited_bundle: Path) -> None:
    path = BundlePaths(edited_bundle).inference
    edited = path.read_bytes()
    refreshed = refresh_bundle(edited_bundle)
    assert refreshed.kept == ("inference.yaml",)
    assert set(refreshed.written) == {"train.yaml", "metadata.json"}
    assert path.read_bytes() == edited
    reason = check_bundle(edited_bundle).errors["generated files"]
    assert f"`{REFRESH} {edited_bundle} --overwrite`" in reason
    assert "train.yaml" not in reason

    refreshed = refresh_bundle(edited_bundle, overwrite=True)
    assert refreshed.kept == ()
    assert path.read_bytes() == template("inference.yaml").read_bytes()
    assert check_bundle(edited_bundle).errors == {}


def test_edited_wiring_of_0_1_0_is_not_renewed(earlier_bundle: Path) -> None:
    """It targets modules that no longer exist: an error leads to the command that replaces it."""
    path = BundlePaths(earlier_bundle).inference
    path.write_text(path.read_text() + "# a comment\n")
    with pytest.raises(
        ConfigError, match=f"cannot be opened.*volseg bundle check {earlier_bundle}"
    ):
        open_bundle(earlier_bundle, device="cpu", trust=True)
    reasons = check_bundle(earlier_bundle, trust=True).errors
    assert "pipeline" in reasons["inference properties"]
    assert f"`{REFRESH} {earlier_bundle} --overwrite`" in reasons["generated files"]
    refresh_bundle(earlier_bundle, overwrite=True)
    assert_as_0_1_0(segment(open_bundle(earlier_bundle, device="cpu"), str(VOLUME)))


def test_a_missing_overlay_is_written_by_refresh(earlier_bundle: Path) -> None:
    BundlePaths(earlier_bundle).train.unlink()
    reason = check_bundle(earlier_bundle).errors["generated files"]
    assert "configs/train.yaml is missing" in reason
    assert "train.yaml" in refresh_bundle(earlier_bundle).written
    assert check_bundle(earlier_bundle).errors == {}


def draw_dataset(folder: Path, cases: int) -> None:
    """Write volumes with an ellipsoid of each label into images/ and labels/."""
    for number in range(cases):
        shape = (29 + number, 36, 25)
        axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
        grid = np.stack(axes, axis=-1)
        label = np.zeros(shape, dtype=np.int16)
        label[((grid - (-0.4, 0.1, 0.0)) ** 2 / (0.12, 0.2, 0.25)).sum(-1) < 1] = 7
        label[((grid - (0.4, -0.1, 0.1)) ** 2 / (0.09, 0.16, 0.16)).sum(-1) < 1] = 300
        image = 40 + 60 * (label == 7) + 130 * (label == 300) + 0.1 * smooth(shape, seed=number)
        affine = oblique((1.1, 1.0, 1.4))
        name = f"case_{number}.nii.gz"
        save(folder / "images" / name, nib.Nifti1Image(image.astype(np.float32), affine))
        save(folder / "labels" / name, nib.Nifti1Image(label, affine))


@pytest.mark.slow
def test_training_continues_from_a_bundle_of_0_1_0(earlier_bundle: Path, tmp_path: Path) -> None:
    """The new weights differ, and segment nearly as before: they did not start at random."""
    paths = BundlePaths(earlier_bundle)
    draw_dataset(tmp_path / "data", cases=3)
    start = Path(shutil.copy(paths.weights, tmp_path / "start.pt"))
    run = {
        "bundle": str(earlier_bundle),
        "dataset": [str(tmp_path / "data" / "images"), str(tmp_path / "data" / "labels")],
        "epochs": 1,
        "repeats": 4,  # 6 steps: enough to change the weights, too few to train random ones
        "batch_size": 2,
        "learning_rate": 0.0005,
        "ema_decay": 0.0,
        "start": str(start),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    threads = torch.get_num_threads()
    result = CliRunner().invoke(main, ["train", str(tmp_path / "run.yaml")], catch_exceptions=False)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    before, after = (torch.load(path, weights_only=True) for path in (start, paths.weights))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(wiring_origin(paths.configs / name) == "current" for name in WIRING)
    labels = segment(open_bundle(earlier_bundle, device="cpu"), str(VOLUME)).labels
    expected = np.asarray(nib.load(FIXTURES / "volume_seg.nii.gz").dataobj)
    assert dice(labels, expected) > 0.9
