from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from phantom import CARD, make_bundle, nifti, oblique, save, smooth, spec_content

import pipeline
from pipeline.bundle.check import check_bundle
from pipeline.bundle.wiring import read_wiring
from pipeline.cli.app import main
from pipeline.config.paths import BundlePaths
from pipeline.io.tables import read_csv
from pipeline.networks import member_states
from pipeline.training.history import EpochRow
from pipeline.training.optimisation import COMPILERS

CASES = 6

EPOCHS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset whose labels follow from intensities, on grids of several sizes."""
    root = tmp_path_factory.mktemp("dataset")
    names = [f"case_{i}" for i in range(CASES)]
    for i, name in enumerate(names):
        array = smooth((17 + i, 24, 21), seed=i)
        label = np.select([array > 130, array > 110], [300, 7], 0).astype(np.int16)
        save(root / "images" / f"{name}.nii.gz", nifti(array))
        save(root / "labels" / f"{name}.nii.gz", nib.Nifti1Image(label, oblique()))
    pairs = [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in names]
    (root / "dataset.json").write_text(json.dumps({"training": pairs}))
    (root / "splits.json").write_text(json.dumps([{"train": names[:-2], "val": names[-2:]}]))
    return root


# instance norm: so few steps do not settle the running statistics of batch norm
NETWORK = {"features": [6, 8], "norm": "instance"}


def train(folder: Path, dataset: Path, dims: int, /, *changes: str, **settings: Any) -> Result:
    """Run `volseg train` on a bundle with a spec and a card only.

    Args:
        folder: gets the bundle and the run's YAML.
        dataset: to train on.
        dims: of the network.
        changes: KEY=VALUE on the command line.
        settings: of the run; `network` is the spec's.
    """
    network = settings.pop("network", NETWORK)
    configs = folder / "bundle" / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "spec": spec_content(dims, network=network, overlap=0.0),
        "card": CARD,
    }.items():
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    run = {
        "bundle": str(folder / "bundle"),
        "dataset": str(dataset),
        "splits": "splits.json",
        "epochs": EPOCHS,
        "batch_size": 4,
        "patches_per_case": 2,
        "learning_rate": 0.1,
        "ema_decay": 0.5,
        "augment": {"mirror": ["R"]},
    } | settings
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    threads = torch.get_num_threads()
    result = CliRunner().invoke(
        main, ["train", str(folder / "run.yaml"), *changes], catch_exceptions=False
    )
    torch.set_num_threads(threads)
    return result


def digest(folder: Path) -> str:
    state = torch.load(folder / "bundle" / "models" / "model.pt", weights_only=True)
    return hashlib.sha256(
        b"".join(tensor.numpy().tobytes() for tensor in state.values())
    ).hexdigest()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.slow
def test_training_leaves_a_complete_bundle_that_segments(
    dims: int, dataset: Path, tmp_path: Path
) -> None:
    """The loss falls, the bundle passes its checks, and held-out cases are segmented well."""
    result = train(tmp_path, dataset, dims)
    assert result.exit_code == 0, result.output
    losses = [
        float(loss) for loss in re.findall(rf"epoch \d+ of {EPOCHS}: loss ([\d.]+)", result.stderr)
    ]
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0]
    root = tmp_path / "bundle"
    assert check_bundle(root).errors == {}
    evaluated = CliRunner().invoke(
        main,
        [
            "evaluate",
            str(root),
            str(dataset),
            "-o",
            str(tmp_path / "out"),
            "--splits",
            "splits.json",
            "--device",
            "cpu",
        ],
    )
    assert evaluated.exit_code == 0, evaluated.output
    assert len(list((tmp_path / "out").glob("*_seg.nii.gz"))) == 2
    for name in ("dice.png", "worst.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    labels = nib.load(tmp_path / "out" / "case_5_seg.nii.gz")
    reference = np.asarray(nib.load(dataset / "labels" / "case_5.nii.gz").dataobj)
    found, there = np.asarray(labels.dataobj) > 0, reference > 0
    assert 2 * (found & there).sum() / (found.sum() + there.sum()) > 2 * there.mean() / (
        1 + there.mean()
    )


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    """They are equal to the bit; another seed gives other weights."""
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        assert train(tmp_path / name, dataset, 3, "epochs=1", f"seed={seed}").exit_code == 0
        weights.append(digest(tmp_path / name))
    assert weights[0] == weights[1] != weights[2]


def test_without_an_average_the_last_weights_are_kept(dataset: Path, tmp_path: Path) -> None:
    """ema_decay 0, the default, trains a complete bundle."""
    assert train(tmp_path, dataset, 2, "epochs=1", "ema_decay=0").exit_code == 0
    assert (tmp_path / "bundle" / "models" / "model.pt").is_file()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.slow
def test_an_ensemble_is_trained_as_one_network(dims: int, dataset: Path, tmp_path: Path) -> None:
    """Each network learns, none is a copy of another, and the bundle is complete."""
    network = {"features": [4, 6, 8], "norm": "instance", "ensemble": 3, "deep_supervision": 1}
    result = train(tmp_path, dataset, dims, "epochs=6", network=network, precision="bfloat16")
    assert result.exit_code == 0, result.output
    losses = [float(loss) for loss in re.findall(r"epoch \d+ of 6: loss ([\d.]+)", result.stderr)]
    assert losses[-1] < losses[0]
    assert check_bundle(tmp_path / "bundle").errors == {}
    state = torch.load(tmp_path / "bundle" / "models" / "model.pt", weights_only=True)
    one, two, three = member_states(state)
    for name in one:
        assert (
            not name.endswith("weight")
            or one[name].ndim < 2
            or not torch.equal(one[name], two[name])
        )
        assert torch.equal(state[f"members.2.{name}"], three[name])


@pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="no C++ compiler")
@pytest.mark.slow
def test_a_compiled_network_leaves_the_same_bundle(dataset: Path, tmp_path: Path) -> None:
    """Its weights have the same names, and nearly the same values."""
    weights = []
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        (tmp_path / name).mkdir()
        result = train(tmp_path / name, dataset, 2, "epochs=1", f"compile={compiled}")
        assert result.exit_code == 0, result.output
        weights.append(
            torch.load(tmp_path / name / "bundle" / "models" / "model.pt", weights_only=True)
        )
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0.05, atol=0.02)


def test_compiling_without_a_compiler_is_refused(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    result = train(tmp_path, dataset, 2, "epochs=1", "compile=true")
    assert result.exit_code == 2
    assert "expected a C++ compiler" in result.stderr


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.slow
def test_validation_is_evaluation(dims: int, dataset: Path, tmp_path: Path) -> None:
    """The last validation agrees with `evaluate` on the kept weights; no row is missing."""
    result = train(tmp_path, dataset, dims, epochs=5, validate_every=2)
    assert result.exit_code == 0, result.output
    root = tmp_path / "bundle"
    rows = read_csv(root / "train" / "history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert [bool(row["dice"]) for row in rows] == [False, True, False, True, True]
    assert "epoch 4 of 5: loss" in result.stderr
    assert float(rows[0]["learning_rate"]) > float(rows[-1]["learning_rate"])
    assert (root / "train" / "progress.png").stat().st_size > 5000
    arguments = [
        str(root),
        str(dataset),
        "-o",
        str(tmp_path / "out"),
        "--splits",
        "splits.json",
        "--json",
        "--device",
        "cpu",
    ]
    summary = {
        row["label"]: row["dice"]
        for row in json.loads(CliRunner().invoke(main, ["evaluate", *arguments]).stdout)
    }
    for label in ("front", "back"):
        assert float(rows[-1][f"dice {label}"]) == pytest.approx(
            summary[label], abs=0.002
        )  # kernels are kept in float16
    assert float(rows[-1]["dice"]) == pytest.approx(
        np.mean([summary["front"], summary["back"]]), abs=0.002
    )


@pytest.mark.slow
def test_the_best_weights_are_kept_and_the_run_ends_when_they_get_no_better(
    dataset: Path, tmp_path: Path
) -> None:
    """A high learning rate spoils the weights soon; those of the best epoch are kept."""
    settings = {"validate_every": 1, "keep": "best", "patience": 2, "learning_rate": 0.05}
    result = train(tmp_path, dataset, 3, epochs=40, **settings)
    assert result.exit_code == 0, result.output
    root = tmp_path / "bundle"
    scores = [float(row["dice"]) for row in read_csv(root / "train" / "history.csv")]
    assert len(scores) < 40
    assert max(scores) == max(scores[:-2]) > max(scores[-2:]) - 1e-12
    arguments = [
        str(root),
        str(dataset),
        "-o",
        str(tmp_path / "out"),
        "--splits",
        "splits.json",
        "--json",
        "--device",
        "cpu",
    ]
    summary = json.loads(CliRunner().invoke(main, ["evaluate", *arguments]).stdout)
    assert np.mean([row["dice"] for row in summary if row["label"] != "mean"]) == pytest.approx(
        max(scores), abs=0.003
    )
    assert not (root / "models" / "best.pt").exists()


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            ["keep=best"],
            {},
            "run.keep and run.patience: expected validate_every of 1 or more and splits",
        ),
        (["epochs=0"], {}, "run.epochs: expected 1 or more, got 0"),
        (["epoch=3"], {}, "unknown key run.epoch; did you mean epochs?"),
        (
            [],
            {"dataset": "$NOT_SET_ANYWHERE/x"},
            "$NOT_SET_ANYWHERE/x: set the environment variable that it names",
        ),
        ([], {"fold": 5}, "fold 5: splits.json holds folds 0 to 0"),
        (
            [],
            {"batch_size": 100},
            "run.batch_size: a step mixes 50 cases, more than the dataset gives; take",
        ),
        (
            [],
            {"bundle": "nowhere"},
            "nowhere/configs/spec.yaml: no such file; write the spec of the weights there",
        ),
    ],
)
def test_a_wrong_run_is_refused(
    changes: list[str], settings: dict[str, Any], message: str, dataset: Path, tmp_path: Path
) -> None:
    """Exit status 2 and a message without a traceback."""
    result = train(tmp_path, dataset, 3, *changes, **settings)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


COLUMNS = (
    "value,freesurfer_value,name,target_value,intensity_class,t1_mean,t1_mean_sd,t1_sd,t1_sd_sd"
)
TABLE = f"""{COLUMNS}
0,0,background,0,0,5,1,3,1
1,1,fluid,0,1,45,5,5,1
2,2,left front,7,2,150,10,5,1
3,3,right front,7,3,150,10,5,1
9,9,back,300,4,100,10,5,1
"""


@pytest.mark.slow
def test_training_on_images_drawn_from_label_maps(tmp_path: Path) -> None:
    """Label maps and their table are enough; the result is repeatable and segments an image."""
    maps = tmp_path / "maps"
    for i in range(3):
        levels = smooth((19 + i, 24, 21), seed=i)
        label = np.select([levels > 140, levels > 110, levels > 90], [9, 2, 1], 0).astype(np.uint8)
        save(maps / f"map_{i}.nii.gz", nib.Nifti1Image(label, oblique()))
    (maps / "labels.csv").write_text(TABLE)
    settings = {
        "splits": None,
        "hold_out": ["map_2"],
        "repeats": 3,
        "epochs": 2,
        "batch_size": 2,
        "patches_per_case": 1,
        "learning_rate": 0.01,
        "synthesis": {"table": str(maps / "labels.csv")},
    }
    for name in ("one", "two"):
        result = train(tmp_path / name, maps, 3, **settings)
        assert result.exit_code == 0, result.output
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    volume = save(tmp_path / "in" / "a.nii.gz")
    segmented = CliRunner().invoke(
        main,
        ["segment", str(volume), "-o", str(tmp_path / "out"), "-b", str(tmp_path / "one/bundle")],
    )
    assert segmented.exit_code == 0, segmented.output


def test_the_wiring_has_the_paths_of_a_bundle(dataset: Path, tmp_path: Path) -> None:
    """Its handlers are parts of their own, in the order that events need."""
    root = make_bundle(tmp_path / "tiny", run={"dataset": str(dataset)})
    parser = read_wiring(root)
    paths = BundlePaths(root)
    parts = {}
    for name in (
        "encoder_freeze",
        "average",
        "budget",
        "validation",
        "history",
        "checkpoint",
        "schedule_handler",
    ):
        parts[name] = parser.get_parsed_content(f"train::{name}")
    assert parser.get_parsed_content("train::handlers") == list(parts.values())
    assert parts["validation"].path == paths.best_weights
    assert parts["history"].folder == paths.training
    assert parts["checkpoint"].path == paths.checkpoint
    assert parts["validation"].model.network is parts["average"].ema_model


def test_the_api_trains_and_reports_each_epoch(dataset: Path, tmp_path: Path) -> None:
    root = make_bundle(tmp_path / "tiny", run={"dataset": str(dataset)})
    rows: list[EpochRow] = []
    config = BundlePaths(root).run
    folder = pipeline.train(config, [f"bundle={root}", "epochs=2"], progress=rows.append)
    assert folder == root
    assert [row.epoch for row in rows] == [1, 2]
    table = read_csv(BundlePaths(root).training / "history.csv")
    assert [float(row["loss"]) for row in table] == [row.loss for row in rows]
    assert EpochRow.from_columns(rows[0].columns()) == rows[0]
