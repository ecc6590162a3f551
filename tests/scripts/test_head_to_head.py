"""scripts/head_to_head.py with shell scripts in place of nnU-Net: its input and its scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantom import load_script, make_bundle

CASES = ["001", "003", "004", "006", "007"]
LABELS = {"anterior": 42, "posterior": 7}  # with gaps, which nnU-Net does not take
PLANNER = """#!/usr/bin/env bash
mkdir -p "$nnUNet_preprocessed/Dataset001_Fold"
"""
TRAINER = """#!/usr/bin/env bash
[ "$2 $3 $4 $5" = "1 0 0.03 --configuration" ] || exit 1
out="$nnUNet_results/Dataset001_Fold/ClockedTrainer__nnUNetPlans__$6/fold_$3/validation"
mkdir -p "$out"
if [ "$7" != --only-predict ]; then
  [ ! -e "$out/../checkpoint_final.pth" ] || exit 2  # trained a second time
  touch "$out/../checkpoint_final.pth"
  [ "$6" = 2d ] || exit 3  # cut off before its prediction
fi
for case in 006 007; do
  cp -L "$nnUNet_raw/Dataset001_Fold/labelsTr/hippocampus_$case.nii.gz" "$out"
done
echo '{}' >"$out/summary.json"
"""


@pytest.fixture
def place(hippocampus: list[Path], tmp_path: Path) -> Path:
    """A folder with a run on a few crops, and an environment with the scripts above."""
    data = hippocampus[0].parent.parent
    (tmp_path / "data").mkdir()
    pairs = []
    for case in CASES:
        name = f"hippocampus_{case}.nii.gz"
        label = nib.Nifti1Image.from_filename(data / "labelsTr" / name)
        voxels = np.array([0, *LABELS.values()], np.uint8)[np.asarray(label.dataobj, np.uint8)]
        nib.save(nib.Nifti1Image(voxels, label.affine), tmp_path / "data" / name)
        pairs.append({"image": f"{data}/imagesTr/{name}", "label": name})
    content = json.loads((data / "dataset.json").read_text()) | {"training": pairs}
    content["labels"] = {"0": "background", **{str(LABELS[name]): name for name in LABELS}}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    names = [f"hippocampus_{case}" for case in CASES]
    (tmp_path / "data" / "splits.json").write_text(
        json.dumps([{"train": names[:3], "val": names[3:]}])
    )
    make_bundle(tmp_path / "bundle", 3, labels={"background": 0, **LABELS})
    run = {
        "bundle": str(tmp_path / "bundle"),
        "dataset": str(tmp_path / "data"),
        "splits": "splits.json",
        "fold": 0,
    }
    (tmp_path / "run.yaml").write_text(
        json.dumps(run | {"epochs": 1, "batch_size": 2, "learning_rate": 0.01})
    )
    tools = tmp_path / "out" / "nnunet_venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {
        "nnUNetv2_plan_and_preprocess": PLANNER,
        "python": TRAINER,
        "nnUNetv2_train": "",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_both_are_trained_and_scored_on_the_cases_left_out(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script("head_to_head")
    options = ["--minutes", "0.03", "-o", str(place / "out")]
    options += ["--configurations", "2d", "3d_fullres"]
    monkeypatch.setattr(sys, "argv", ["head_to_head.py", str(place / "run.yaml"), *options])
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        script.main()
    script.main()  # goes on with the weights of the training that was cut off
    found = json.loads((place / "out" / "summary.json").read_text())
    assert {row["cases"] for row in found["tests"]} == {2}
    assert all(row["theirs"] == 1 for row in found["tests"])  # the script copies the reference
    assert all(0 <= row["ours"] < 1 for row in found["tests"])
    nnunet = place / "out" / "nnunet"
    raw = nnunet / "raw" / "Dataset001_Fold"
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "posterior": 1, "anterior": 2}
    for path in (raw / "labelsTr").iterdir():
        assert set(np.unique(nib.Nifti1Image.from_filename(path).dataobj)) == {0, 1, 2}
    ways = {path.name.split("__")[-1] for path in (nnunet / "results").glob("*/*")}
    assert ways == {"2d", "3d_fullres"}
    assert found["nnunet_configuration"] in ways
    raw = nnunet / "raw" / "Dataset001_Fold"
    assert sorted(path.name for path in (raw / "imagesTr").iterdir()) == [
        f"hippocampus_{case}_0000.nii.gz" for case in CASES
    ]
    splits = nnunet / "preprocessed" / "Dataset001_Fold" / "splits_final.json"
    folds = json.loads(splits.read_text())
    assert folds[0]["val"] == ["hippocampus_006", "hippocampus_007"]
    given = json.loads((raw / "dataset.json").read_text())
    assert given["labels"]["background"] == 0
    assert given["numTraining"] == len(CASES)
