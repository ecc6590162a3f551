"""MONAI Label's server and MONAI Deploy's operator give the voxels of `volseg segment`.

Needs the environments that scripts/peers makes, in the folder VOLSEG_PEERS, and VOLSEG_DATA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import pipeline
from pipeline.bundle import export_bundle, open_bundle, shipped_bundles
from pipeline.inference import LabelInversion

pytestmark = pytest.mark.system
HERE = Path(__file__).parent
VOLUMES = {
    "hippocampus_mr_2d": "hippocampus/imagesTr/hippocampus_004.nii.gz",
    "hippocampus_mr_3d": "hippocampus/imagesTr/hippocampus_004.nii.gz",
    "brain_mr_structures": "real/head18_T1w.nii.gz",
}


@pytest.fixture
def peers() -> Path:
    if "VOLSEG_PEERS" not in os.environ or "VOLSEG_DATA" not in os.environ:
        pytest.skip("needs VOLSEG_PEERS, a folder of scripts/peers, and VOLSEG_DATA")
    return Path(os.environ["VOLSEG_PEERS"]).resolve()


def volume(bundle: str) -> str:
    return str(Path(os.environ["VOLSEG_DATA"]) / VOLUMES[bundle])


def run(python: Path, script: str, *arguments: object, cwd: Path) -> None:
    command = [str(python), "-W", "ignore", str(HERE / script), *map(str, arguments)]
    subprocess.run(command, check=True, cwd=cwd)


def first_labels(bundle: str) -> np.ndarray:
    """Return the labels of the bundle's first network alone, in float32."""
    model = open_bundle(bundle, device="cpu", precision="float32")
    alone = replace(model, inversion=LabelInversion(model.spec))
    return np.asarray(alone.predict_case(volume(bundle)).labels)


def own_labels(bundle: str) -> np.ndarray:
    model = pipeline.load(bundle, device="cpu")
    return np.asarray(pipeline.segment(model, volume(bundle)).labels)


def test_label_server(peers: Path, tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(peers / "label/monailabel/sample-apps/monaibundle", app)
    (app / "model").mkdir()
    for name in VOLUMES:
        shutil.copytree(shipped_bundles() / name, app / "model" / name)
    pairs = [f"{name}={volume(name)}" for name in VOLUMES]
    run(peers / "label/bin/python", "label_server.py", app, tmp_path, *pairs, cwd=tmp_path)
    assert json.loads((tmp_path / "info.json").read_text()).keys() == set(VOLUMES)
    for name in VOLUMES:
        labels = np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj)
        assert np.count_nonzero(labels != own_labels(name)) == 0
        names = json.loads((tmp_path / f"{name}.json").read_text())["label_names"]
        labels_of = pipeline.load(name, device="cpu").labels
        assert names == {x.lower(): value for x, value in labels_of.items() if value}


@pytest.mark.parametrize("name", VOLUMES)
def test_deploy_operator(name: str, peers: Path, tmp_path: Path) -> None:
    bundle = tmp_path / name
    shutil.copytree(shipped_bundles() / name, bundle)
    python = peers / "deploy/bin/python"
    run(python, "deploy_operator.py", bundle, volume(name), tmp_path / "a.npy", cwd=tmp_path)
    assert np.count_nonzero(np.load(tmp_path / "a.npy") != own_labels(name)) == 0
    export_bundle(bundle, "torchscript")
    file = bundle / "models" / "model.ts"
    run(python, "deploy_operator.py", file, volume(name), tmp_path / "b.npy", cwd=tmp_path)
    # a TorchScript file holds the first network; it runs in torch and float32, volseg in OpenVINO:
    # rounding decides at a few borders
    assert np.mean(np.load(tmp_path / "b.npy") != first_labels(name)) < 1e-4
