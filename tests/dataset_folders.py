"""Labelled datasets of phantoms in each folder layout that volseg knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from phantom import nifti, oblique, save, smooth

LABELS = {"background": 0, "front": 1, "back": 2}


def image(seed: int = 0) -> nib.Nifti1Image:
    return nifti(smooth(seed=seed))


def label(seed: int = 0) -> nib.Nifti1Image:
    array = smooth(seed=seed)
    return nib.Nifti1Image(
        np.select([array > 130, array > 110], [2, 1], 0).astype(np.uint8), oblique()
    )


def decathlon(root: Path, count: int = 3) -> list[Path]:
    names = [f"case_{i}" for i in range(count)]
    for i, name in enumerate(names):
        save(root / "imagesTr" / f"{name}.nii.gz", image(i))
        save(root / "labelsTr" / f"{name}.nii.gz", label(i))
    pairs = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]
    content = {
        "modality": {"0": "T1w"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": pairs,
    }
    (root / "dataset.json").write_text(json.dumps(content | {"licence": "CC0"}))
    return [root]


def nnunet(root: Path, count: int = 3) -> list[Path]:
    for i in range(count):
        for channel in range(2):
            save(root / "imagesTr" / f"case_{i}_{channel:04}.nii.gz", image(i + 10 * channel))
        save(root / "labelsTr" / f"case_{i}.nii.gz", label(i))
    content = {
        "channel_names": {"0": "T1w", "1": "FLAIR"},
        "labels": {"background": 0, "front": 1, "back": 2},
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return [root]


def bids(root: Path, count: int = 3) -> list[Path]:
    for i in range(count):
        place = Path(f"sub-{i:02}", "ses-a", "anat")
        for contrast in ("T1w", "FLAIR"):
            save(root / place / f"sub-{i:02}_ses-a_{contrast}.nii.gz", image(i))
        save(
            root / "derivatives" / "manual" / place / f"sub-{i:02}_ses-a_space-T1w_dseg.nii.gz",
            label(i),
        )
    save(root / "sub-00" / "ses-a" / "anat" / "sub-00_ses-a_T2w.nii.gz", image(7))
    return [root]


def two_folders(root: Path, count: int = 3) -> list[Path]:
    for i in range(count):
        save(root / "scans" / f"case.{i}.nii.gz", image(i))
        save(root / "drawn" / f"case.{i}_seg.nii.gz", label(i))
    return [root / "scans", root / "drawn"]


def decathlon_4d(root: Path, count: int = 3) -> list[Path]:
    """Two channels as the volumes of one file, as the Decathlon's brain tumours have four."""
    decathlon(root, count)
    for i in range(count):
        both = [np.asarray(image(i + 10 * channel).dataobj) for channel in range(2)]
        stacked = nib.Nifti1Image(np.stack(both, axis=-1), oblique())
        save(root / "imagesTr" / f"case_{i}.nii.gz", stacked)
    return [_with_json(root, modality={"0": "T1w", "1": "FLAIR"})]


def nnunet_v1(root: Path, count: int = 3) -> list[Path]:
    """Files with the number of their channel, listed without it."""
    decathlon(root, count)
    for i in range(count):
        (root / "imagesTr" / f"case_{i}.nii.gz").rename(root / "imagesTr" / f"case_{i}_0000.nii.gz")
        save(root / "imagesTr" / f"case_{i}_0001.nii.gz", image(i + 10))
    return [_with_json(root, modality={"0": "T1w", "1": "FLAIR"})]


def nnunet_regions(root: Path, count: int = 3) -> list[Path]:
    """Two regions, one within the other, and a corner that nobody labelled."""
    nnunet(root, count)
    for i in range(count):
        values = np.asarray(label(i).dataobj).copy()
        values[:4] = 3
        save(root / "labelsTr" / f"case_{i}.nii.gz", nib.Nifti1Image(values, oblique()))
    regions = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    return [_with_json(root, labels=regions, regions_class_order=[1, 2], file_ending=".nii.gz")]


def slicer(root: Path, count: int = 3) -> list[Path]:
    """3D Slicer's names, label maps next to their images."""
    endings = (".seg", "-label", "_label", "-seg")
    for i in range(count):
        for name, made in ((f"c{i}", image(i)), (f"c{i}{endings[i % 4]}", label(i))):
            write_nrrd(root / f"{name}.nrrd", made)
    return [root]


def table(root: Path, count: int = 3) -> list[Path]:
    """A table of two channels, whose folds are given."""
    rows = ["case,T1w,FLAIR,label,fold,subject"]
    for i in range(count):
        save(root / "t1" / f"{i}.nii.gz", image(i))
        save(root / "flair" / f"{i}.nii.gz", image(i + 10))
        save(root / "drawn" / f"{i}.nii.gz", label(i))
        rows.append(f"p{i},t1/{i}.nii.gz,flair/{i}.nii.gz,drawn/{i}.nii.gz,{i % 3},s{i}")
    (root / "cases.csv").write_text("\n".join(rows))
    return [root / "cases.csv"]


def write_nrrd(path: Path, volume: nib.Nifti1Image) -> None:
    """Write a volume by SimpleITK, whose world axes are LPS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    to_lps = np.diag([-1.0, -1.0, 1.0])
    written = sitk.GetImageFromArray(np.asarray(volume.dataobj).T)
    written.SetSpacing(spacing.tolist())
    written.SetDirection((to_lps @ volume.affine[:3, :3] / spacing).ravel().tolist())
    written.SetOrigin((to_lps @ volume.affine[:3, 3]).tolist())
    sitk.WriteImage(written, str(path))


def _with_json(root: Path, **changes: Any) -> Path:
    """Change entries of a folder's dataset.json."""
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], list[Path]], tuple[str, ...] | None, str]] = {
    "decathlon": (decathlon, ("T1w",), "case_0"),
    "nnunet": (nnunet, ("T1w", "FLAIR"), "case_0"),
    "bids": (bids, ("FLAIR", "T1w"), "sub-00_ses-a"),
    "two folders": (two_folders, None, "case.0"),
}

MORE_LAYOUTS: dict[str, Callable[[Path], list[Path]]] = {
    "4D": decathlon_4d,
    "nnunet 1": nnunet_v1,
    "regions": nnunet_regions,
    "slicer": slicer,
    "table": table,
}
