"""Labelled datasets of phantoms in each folder layout that volseg knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
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


LAYOUTS: dict[str, tuple[Callable[[Path], list[Path]], tuple[str, ...] | None, str]] = {
    "decathlon": (decathlon, ("T1w",), "case_0"),
    "nnunet": (nnunet, ("T1w", "FLAIR"), "case_0"),
    "bids": (bids, ("FLAIR", "T1w"), "sub-00_ses-a"),
    "two folders": (two_folders, None, "case.0"),
}
