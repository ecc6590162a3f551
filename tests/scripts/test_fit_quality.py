"""scripts/fit_quality.py on tiny label maps: it draws, segments, fits, scores, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from phantom import load_script, make_bundle, save

from pipeline.io.tables import read_csv

LABELS = {"background": 0, "left box": 2, "right box": 41}
TABLE = """\
value,freesurfer_value,name,target_value,intensity_class,t1_mean,t1_mean_sd,t1_sd,t1_sd_sd
0,0,background,0,0,0,0,0,0
2,2,left box,2,1,160,5,5,1
41,41,right box,41,2,160,5,5,1
7,7,skull,0,3,220,5,5,1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run on four label maps, of which one is held out."""
    for number in range(4):
        labels = np.zeros((31, 37, 29), dtype=np.uint8)
        labels[3:-3, 3:-3, 3:-3] = 7
        labels[6:14, 8 + number : 30, 8:21] = 41
        labels[16:25, 8 + number : 30, 8:21] = 2
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        save(tmp_path / "maps" / f"map_{number}.nii.gz", nib.Nifti1Image(labels, affine))
    (tmp_path / "maps" / "labels.csv").write_text(TABLE)
    bundle = make_bundle(tmp_path / "bundle", labels=LABELS, spacing=[2.0, 2.0, 2.5])
    page = bundle / "docs" / "README.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text("# Tiny\n\n## Predicted quality\n\nOld.\n\n## Last\n\nStays.\n")
    run = {
        "bundle": str(bundle), "dataset": str(tmp_path / "maps"), "hold_out": ["map_3"],
        "epochs": 1, "batch_size": 1, "learning_rate": 0.01,
        "synthesis": {"table": str(tmp_path / "maps" / "labels.csv")},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run.yaml"


@pytest.mark.slow
def test_it_draws_segments_fits_and_goes_on(config: Path) -> None:
    """No map is in both parts; a second call draws and segments nothing and fits the same."""
    script = load_script("fit_quality")
    out = config.parent / "out"
    arguments = [
        str(config), "-o", str(out), "--count", "7", "--test-share", "0.3", "--spacing", "2.5",
        "--field", "60", "75", "55",
    ]  # fmt: skip
    first = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    names = [path.name for path in sorted((out / "images").iterdir())]
    assert len(names) == 7
    assert sum(name.startswith("test_") for name in names) == 2
    for name in names:
        assert ("map_3" in name) == name.startswith("test_")
    fit = json.loads((out / "quality.json").read_text())
    assert fit["mean"]["cases"] <= 5
    assert len(read_csv(out / "cases.csv")) == 7
    bundle = config.parent / "bundle"
    assert not (bundle / "models" / "quality.json").exists()

    (out / "images" / names[-1]).unlink()  # as if it had been interrupted
    (out / "labels" / names[-1]).unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    second = CliRunner().invoke(script.main, [*arguments, "--keep"], catch_exceptions=False)
    assert second.exit_code == 0, second.output
    assert "1 of 7" not in second.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert json.loads((out / "quality.json").read_text())["mean"] == fit["mean"]
    assert json.loads((bundle / "models" / "quality.json").read_text())["mean"] == fit["mean"]
    page = (bundle / "docs" / "README.md").read_text()
    assert page.count("## Predicted quality") == 1
    assert "Old." not in page
    assert page.endswith("## Last\n\nStays.\n")
