"""Cross-validation: out-of-fold scores, and the ensemble of the folds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from phantom import CARD, nifti, oblique, save, smooth, spec_content

from pipeline.bundle.check import check_bundle
from pipeline.cli.app import main
from pipeline.io.tables import read_csv, sha256

NAMES = [f"case_{i}" for i in range(6)]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three folds of six volumes."""
    root = tmp_path_factory.mktemp("crossval")
    pairs = []
    for i, name in enumerate(NAMES):
        array = smooth((17 + i, 24, 21), seed=i)
        label = np.select([array > 130, array > 110], [300, 7], 0).astype(np.int16)
        pair = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        save(root / "data" / pair["image"], nifti(array))
        save(root / "data" / pair["label"], nib.Nifti1Image(label, oblique()))
        pairs.append(pair)
    (root / "data" / "dataset.json").write_text(json.dumps({"training": pairs}))
    folds = [
        {"train": [n for n in NAMES if n not in NAMES[i::3]], "val": NAMES[i::3]} for i in range(3)
    ]
    (root / "data" / "splits.json").write_text(json.dumps(folds))
    configs = root / "bundle" / "configs"
    configs.mkdir(parents=True)
    for name, content in {"spec": spec_content(3, overlap=0.0), "card": CARD}.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run = {
        "bundle": str(root / "bundle"),
        "dataset": str(root / "data"),
        "splits": "splits.json",
        "epochs": 3,
        "batch_size": 2,
        "learning_rate": 0.05,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    return root / "run.yaml"


def call(*arguments: str) -> Result:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    torch.set_num_threads(threads)
    return result


@pytest.mark.slow
def test_folds_are_scored_on_what_they_never_saw_and_joined(run_file: Path) -> None:
    """One fold, then all: none is trained twice, each case is scored once, the ensemble runs."""
    root = run_file.parent / "bundle"
    first = call("crossval", str(run_file), "--fold", "1")
    assert first.exit_code == 0, first.output
    assert {row["case"] for row in read_csv(root / "crossval" / "scores.csv")} == set(NAMES[1::3])
    before = sha256(root / "folds" / "1" / "models" / "model.pt")
    whole = call("crossval", str(run_file))
    assert whole.exit_code == 0, whole.output
    assert "fold 0, epoch 1 of 3" in whole.stderr
    assert "fold 1," not in whole.stderr
    assert sha256(root / "folds" / "1" / "models" / "model.pt") == before

    rows = read_csv(root / "crossval" / "scores.csv")
    assert sorted((row["case"], row["label"]) for row in rows) == sorted(
        (n, label) for n in NAMES for label in ("front", "back")
    )
    assert {row["case"]: int(row["fold"]) for row in rows} == {
        name: i % 3 for i, name in enumerate(NAMES)
    }
    summary = json.loads((root / "crossval" / "summary.json").read_text())
    assert summary["labels"][0]["dice"] == pytest.approx(
        np.mean([float(r["dice"]) for r in rows if r["label"] == "front"])
    )
    assert set(summary["by_fold"]) == {"0", "1", "2"}
    page = (root / "docs" / "README.md").read_text()
    assert "| all | 6 |" in page
    assert page.count("## Predicted quality") == 1
    nested = {row["label"]: row for row in summary["predicted_quality"]}
    # a structure that no prediction has is not scored
    assert {"mean"} < set(nested) <= {"mean", "front", "back"}
    assert nested["mean"]["cases"] == 6
    assert f"| mean | 6 | {nested['mean']['mae']:.3f} |" in page
    written = {path.name for path in (root / "crossval" / "fold_0").iterdir()}
    assert not written & {"scores.csv", "summary.json", "dice.png", "worst.png"}

    assert check_bundle(root).errors == {}
    spec = yaml.safe_load((root / "configs" / "spec.yaml").read_text())
    assert spec["network"]["ensemble"] == 3
    for key in ("largest_component", "min_component_ml", "fill_holes"):
        chosen = {name for name, rule in summary["postprocessing"].items() if rule[key]}
        assert set(spec.get(key, ())) == chosen
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    for fold in range(3):
        own = torch.load(root / "folds" / str(fold) / "models" / "model.pt", weights_only=True)
        assert all(
            torch.equal(state[f"members.{fold}.{name}"], tensor) for name, tensor in own.items()
        )
    assert (
        json.loads((root / "configs" / "metadata.json").read_text())["eval_metrics"]["dice_front"]
        >= 0
    )
    volume = save(run_file.parent / "in" / "a.nii.gz")
    segmented = call("segment", str(volume), "-o", str(run_file.parent / "out"), "-b", str(root))
    assert segmented.exit_code == 0, segmented.output
    fit = json.loads((root / "models" / "quality.json").read_text())
    assert fit["weights_sha256"] == sha256(root / "models" / "model.pt")
    assert fit["mean"]["cases"] == 6
    (row,) = read_csv(run_file.parent / "out" / "cases.csv")
    low, dice, high = (float(row[f"predicted_dice{end}"]) for end in ("_low", "", "_high"))
    assert 0 <= low <= dice <= high <= 1
    assert ("predicted Dice" in row["warnings"]) == (dice < 0.7)
    (of_label,) = read_csv(run_file.parent / "out" / "quality.csv")
    assert set(of_label) <= {
        "case", *(f"{name}{end}" for name in ("front", "back") for end in ("", "_low", "_high"))
    }  # fmt: skip
    assert of_label["case"] == "a"

    # other weights: no prediction, and a word about it
    (root / "models" / "quality.json").write_text(json.dumps(fit | {"weights_sha256": "of others"}))
    again = call("segment", str(volume), "-o", str(run_file.parent / "other"), "-b", str(root))
    assert again.exit_code == 0, again.output
    (row,) = read_csv(run_file.parent / "other" / "cases.csv")
    assert "predicted_dice" not in row
    assert not (run_file.parent / "other" / "quality.csv").exists()
    maps = [run_file.parent / name / "a_seg.nii.gz" for name in ("out", "other")]
    assert np.array_equal(nib.load(maps[0]).dataobj, nib.load(maps[1]).dataobj)


@pytest.mark.slow
def test_a_fold_has_the_same_weights_in_another_bundle(run_file: Path, tmp_path: Path) -> None:
    """A fold that is trained in another bundle has the same weights; unknown folds are refused."""
    whole = run_file.parent / "bundle"
    assert (whole / "folds" / "0" / "models" / "model.pt").is_file()
    other = tmp_path / "bundle"
    shutil.copytree(whole / "configs", other / "configs")
    assert call("crossval", str(run_file), f"bundle={other}", "--fold", "0").exit_code == 0
    one, two = (sha256(root / "folds" / "0" / "models" / "model.pt") for root in (whole, other))
    assert one == two
    assert call("crossval", str(run_file), "--fold", "7").exit_code == 2
    assert call("crossval", str(run_file), "splits=null").exit_code == 2


@pytest.mark.slow
def test_folds_of_ensembles_join_to_one(run_file: Path, tmp_path: Path) -> None:
    """Two folds of two networks each join to an ensemble of four, in the order of the folds."""
    root = tmp_path / "bundle"
    (root / "configs").mkdir(parents=True)
    network = spec_content(3)["network"] | {"ensemble": 2}
    for name, content in {
        "spec": spec_content(3, network=network, overlap=0.0),
        "card": CARD,
    }.items():
        (root / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    result = call(
        "crossval", str(run_file), f"bundle={root}", "epochs=1", "--fold", "0", "--fold", "2"
    )
    assert result.exit_code == 0, result.output
    assert yaml.safe_load((root / "configs" / "spec.yaml").read_text())["network"]["ensemble"] == 4
    state = torch.load(root / "models" / "model.pt", weights_only=True)
    for i, (fold, member) in enumerate([(0, 0), (0, 1), (2, 0), (2, 1)]):
        own = torch.load(root / "folds" / str(fold) / "models" / "model.pt", weights_only=True)
        names = [name for name in own if name.startswith(f"members.{member}.")]
        assert names
        assert all(
            torch.equal(state[name.replace(f"members.{member}", f"members.{i}", 1)], own[name])
            for name in names
        )
    assert check_bundle(root).errors == {}
