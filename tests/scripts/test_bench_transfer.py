"""scripts/bench_transfer.py on a few volumes: its runs, its table, and that it resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from phantom import load_script, make_bundle, nifti, oblique, save, smooth

NAMES = [f"case_{i}" for i in range(5)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a run on five volumes, of which two are held out."""
    pairs = []
    for i, name in enumerate(NAMES):
        array = smooth((17 + i, 24, 21), seed=i)
        label = np.where(array > 110, 7, 0).astype(np.uint8)
        pair = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        save(tmp_path / "data" / pair["image"], nifti(array))
        save(tmp_path / "data" / pair["label"], nib.Nifti1Image(label, oblique()))
        pairs.append(pair)
    data = tmp_path / "data"
    (data / "dataset.json").write_text(json.dumps({"training": pairs}))
    (data / "splits.json").write_text(json.dumps([{"train": NAMES[:3], "val": NAMES[3:]}]))
    target = make_bundle(tmp_path / "target", labels={"background": 0, "front": 7})
    run = {
        "bundle": str(target), "dataset": str(data), "splits": "splits.json",
        "epochs": 5, "batch_size": 2, "learning_rate": 0.01,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run.yaml"


@pytest.mark.slow
def test_both_starts_are_trained_and_compared(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same cases, same time, other starts; a second call only reads the scores."""
    script = load_script("bench_transfer")
    source = make_bundle(config.parent / "source", network={"features": [6, 8], "norm": "batch"})
    out = config.parent / "out"
    arguments = [
        "bench_transfer.py", str(config), "--source", str(source), "--cases", "2",
        "--minutes", "0.05", "-o", str(out),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    printed = capsys.readouterr().out
    assert "| 2 | front |" in printed
    assert (out / "transfer.md").read_text() in printed
    runs = {
        start: yaml.safe_load((out / f"2_{start}" / "run.yaml").read_text())
        for start in ("scratch", "transfer")
    }
    assert "start" not in runs["scratch"]
    assert runs["transfer"]["start"] == str(source)
    assert runs["transfer"]["minutes"] == runs["scratch"]["minutes"] == 0.05
    splits = [json.loads(Path(run["splits"]).read_text()) for run in runs.values()]
    assert splits[0] == splits[1]
    assert len(splits[0][0]["train"]) == 2
    assert splits[0][0]["val"] == NAMES[3:]
    spec = yaml.safe_load((out / "2_transfer" / "bundle" / "configs" / "spec.yaml").read_text())
    assert spec["network"]["features"] == [6, 8]
    assert spec["labels"] == {"background": 0, "front": 7}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(script, "train", refuse)
    script.main()
    assert capsys.readouterr().out == printed
