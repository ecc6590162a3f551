"""Models of nnU-Net as bundles, against nnU-Net's steps written out with SciPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_modules import nnunet_network, nnunet_plans, write_nnunet_model
from scipy import ndimage

from pipeline.bundle import check_bundle, import_nnunet, open_bundle
from pipeline.config import load_spec
from pipeline.errors import ConfigError, PipelineError, ReadError
from pipeline.inference import predict_case

FILE_SHAPE, FILE_SPACING = (11, 14, 18), (0.8, 1.4, 1.2)  # i, j, k
CROP = (slice(1, 10), slice(2, 14), slice(0, 15))  # what is not 0
AXES = (1, 2, 0)  # of the network: j, k, i, from transpose_forward


def write_scans(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Write two channels that are 0 outside of a box, in an oblique, flipped orientation."""
    random = np.random.default_rng(3)
    arrays = np.zeros((2, *FILE_SHAPE), dtype=np.float32)
    for array, mean in zip(arrays, (60, 100), strict=True):
        smooth = ndimage.gaussian_filter(random.normal(size=FILE_SHAPE), 1.2)
        array[CROP] = (mean + 200 * smooth)[CROP]
    turn = np.array([[0.0, -0.96, 0.28], [-1, 0, 0], [0, 0.28, 0.96]])
    affine = np.eye(4)
    affine[:3, :3] = turn * FILE_SPACING
    folder.mkdir()
    paths = [folder / f"case_{number:04d}.nii.gz" for number in range(2)]
    for path, array in zip(paths, arrays, strict=True):
        nib.save(nib.Nifti1Image(array, affine), path)
    return paths, arrays


def expected_labels(arrays: np.ndarray, dims: int, networks: list[Any]) -> np.ndarray:
    """Return the label map by nnU-Net's steps, for volumes of a single window."""
    data = arrays[(slice(None), *CROP)].transpose(0, *(axis + 1 for axis in AXES))
    mask = ndimage.binary_fill_holes((data != 0).any(axis=0))
    mr, ct = data.astype(np.float64)
    normalised = np.where(mask, (mr - mr[mask].mean()) / mr[mask].std(), mr)
    stack = np.stack([normalised, (ct.clip(10, 180) - 90) / 40])
    own = [FILE_SPACING[axis] for axis in AXES]
    wanted = [1.5, 1.1, 0.9] if dims == 3 else [own[0], 1.1, 0.9]
    size = [round(a / b * n) for a, b, n in zip(own, wanted, data.shape[1:], strict=True)]
    resampled = np.stack([resize(channel, size, 3) for channel in stack])
    patch = (16, 24, 12) if dims == 3 else (size[0], 16, 24)
    before = [(p - n) // 2 for p, n in zip(patch, size, strict=True)]
    after = [p - n - b for p, n, b in zip(patch, size, before, strict=True)]
    padded = np.pad(resampled, [(0, 0), *zip(before, after, strict=True)])
    window = torch.from_numpy(padded).float()
    batch = window[None] if dims == 3 else window.movedim(1, 0)
    with torch.no_grad():
        mean = torch.stack([network(batch) for network in networks]).mean(dim=0)
    logits = (mean[0] if dims == 3 else mean.movedim(0, 1)).numpy()
    inner = [slice(b, b + n) for b, n in zip(before, size, strict=True)]
    logits = logits[(slice(None), *inner)]
    finer = np.stack([resize(channel, data.shape[1:], 1) for channel in logits])
    labels = np.zeros(FILE_SHAPE, dtype=np.uint8)
    labels[CROP] = finer.argmax(axis=0).transpose(np.argsort(AXES))
    return labels


def resize(values: np.ndarray, size: Any, order: int) -> np.ndarray:
    """Return values resized as scikit-image does: edges stay, values keep their range."""
    zoom = np.array(size) / values.shape
    exact = ndimage.zoom(
        values.astype(np.float64), zoom, order=order, mode="nearest", grid_mode=True
    )
    clipped: np.ndarray = exact.clip(values.min(), values.max())
    return clipped


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "residual", "folds"), [(3, False, 1), (2, True, 1), (3, True, 2)])
def test_the_labels_are_those_of_nnunet(
    tmp_path: Path, dims: int, residual: bool, folds: int
) -> None:
    folder = write_nnunet_model(tmp_path / "model", dims, residual=residual, folds=folds)
    scans, arrays = write_scans(tmp_path / "scans")
    import_nnunet(folder, tmp_path / "bundle")
    model = open_bundle(tmp_path / "bundle", device="cpu", runtime="torch")
    found = predict_case(model, scans).labels
    networks = [nnunet_network(dims, residual=residual, seed=i).eval() for i in range(folds)]
    expected = expected_labels(arrays, dims, networks)
    assert np.sort(np.bincount(expected[CROP].ravel(), minlength=3))[-2] > 50  # two labels
    # values that are equal but for rounding may fall on either side
    assert (found != expected).mean() < 1e-3
    outside = np.ones(FILE_SHAPE, dtype=bool)
    outside[CROP] = False
    assert not found[outside].any()


@pytest.mark.slow
def test_the_bundle_passes_its_checks(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path / "model", 3)
    import_nnunet(folder, tmp_path / "bundle", mirror=True)
    assert check_bundle(tmp_path / "bundle").errors == {}
    spec = load_spec(tmp_path / "bundle" / "configs" / "spec.yaml")
    assert list(spec.labels.items()) == [("background", 0), ("front", 1), ("back", 2)]
    assert spec.orientation == "jki"
    assert spec.tta_mirror == ("j", "k", "i")
    assert spec.intensity.method == "zscore"
    assert spec.channel_intensity["T1w"].foreground
    assert spec.channel_intensity["CT"].clip == (10.0, 180.0)
    assert spec.network.decoder_convolutions == (1, 2)  # top first


def test_a_bundle_of_monai_opens(tmp_path: Path) -> None:
    """`convert_nnunet_to_monai_bundle` splits a checkpoint into weights and all else."""
    folder = write_nnunet_model(tmp_path / "monai" / "models", 2)
    final = folder / "fold_0" / "checkpoint_final.pth"
    numbers = torch.serialization.safe_globals([np.dtype])
    with numbers:
        checkpoint = torch.load(final, weights_only=False)
    weights = {"network_weights": checkpoint.pop("network_weights")}
    torch.save(weights, folder / "fold_0" / "model.pt")
    torch.save(checkpoint, folder / "nnunet_checkpoint.pth")
    final.unlink()
    model = import_nnunet(tmp_path / "monai", tmp_path / "bundle")
    assert model.configuration == "2d"
    assert load_spec(tmp_path / "bundle" / "configs" / "spec.yaml").slice_axis == "j"


def test_regions_and_an_ignored_label(tmp_path: Path) -> None:
    dataset = {
        "channel_names": {"0": "T1w", "1": "CT"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
    }
    folder = write_nnunet_model(tmp_path / "model", 3, dataset=dataset, classes=2)
    import_nnunet(folder, tmp_path / "bundle")
    spec = load_spec(tmp_path / "bundle" / "configs" / "spec.yaml")
    assert spec.output == "regions"
    assert spec.regions == {"whole": (1, 2), "core": (2,)}
    assert spec.ignore_label == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"previous_stage": "3d_lowres"}, "a cascade after 3d_lowres is not supported"),
        ({"preprocessor_name": "Mine"}, "preprocessor_name Mine is not supported"),
        ({"resampling_fn_data": "resample_torch"}, "resampling function resample_torch is not"),
        ({"normalization_schemes": ["Mine", "Mine"]}, "normalization scheme Mine is not supp"),
        ({"normalization_schemes": ["CTNormalization"]}, "for each of the 2 channels"),
        ({"architecture": {"network_class_name": "x.Primus", "arch_kwargs": {}}}, "Primus is not"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    plans = nnunet_plans(3, residual=False)
    plans["configurations"]["3d_fullres"] |= change
    folder = write_nnunet_model(tmp_path / "model", 3, plans=plans)
    with pytest.raises(ConfigError, match=message):
        import_nnunet(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_reader_of_pictures_is_refused(tmp_path: Path) -> None:
    plans = nnunet_plans(2, residual=False) | {"image_reader_writer": "NaturalImage2DIO"}
    folder = write_nnunet_model(tmp_path / "model", 2, plans=plans)
    with pytest.raises(ConfigError, match="image_reader_writer NaturalImage2DIO is not supported"):
        import_nnunet(folder, tmp_path / "bundle")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path / "model", 3, classes=4)
    with pytest.raises(ConfigError, match="the trainer nnUNetTrainer may build another one"):
        import_nnunet(folder, tmp_path / "bundle")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path / "model", 3)
    torch.save({"network_weights": {}, "x": Path("/")}, folder / "fold_0/checkpoint_final.pth")
    with pytest.raises(ReadError, match="is not a plain checkpoint"):
        import_nnunet(folder, tmp_path / "bundle")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    folder = write_nnunet_model(tmp_path / "models" / "a", 3)
    for wrong, message in (
        (tmp_path / "models", "models inside: .*a$"),
        (folder / "fold_0", "is one fold; import its model .* with --fold 0"),
        (tmp_path, "models inside: none"),
    ):
        with pytest.raises(PipelineError, match=message):
            import_nnunet(wrong, tmp_path / "bundle")
    with pytest.raises(ConfigError, match="in fold_7; its folds are fold_0"):
        import_nnunet(folder, tmp_path / "bundle", folds=["7"])
    (folder / "plans.json").write_text("{")
    with pytest.raises(ReadError, match=r"plans\.json: cannot be read"):
        import_nnunet(folder, tmp_path / "bundle")
