"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from phantom import make_bundle, nifti, save

from pipeline.bundle.opening import open_bundle
from pipeline.inference import openvino_child, openvino_trial
from pipeline.inference.model import Model
from pipeline.inference.openvino_models import CACHE_VARIABLE

RUN_CHILD = openvino_trial._run_child


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Run torch on one thread: tiny networks are faster, and sums are always in one order."""
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep converted networks of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_amx() -> Iterator[None]:
    """Compute in float32 on any processor, so that results are comparable to rounding.

    Programs that a test starts inherit the limit.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        yield


@pytest.fixture(scope="session", autouse=True)
def _openvino_here() -> Iterator[None]:
    """Try networks in OpenVINO here: a process for each of the tests' many takes far longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_trial, "_run_child", _compute_here)
        yield


@pytest.fixture
def openvino_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try networks in OpenVINO in a process of their own, as outside of tests."""
    monkeypatch.setattr(openvino_trial, "_run_child", RUN_CHILD)


def _compute_here(request: Mapping[str, Any], folder: Path) -> None:
    """Write the output that the process of its own would write."""
    import openvino

    np.save(request["output"], openvino_child.compute(openvino.Core(), dict(request)))


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Check that no test leaves variables behind that change how other programs run."""
    before = _variables_of_programs()
    yield
    assert _variables_of_programs() == before


def _variables_of_programs() -> dict[str, str]:
    prefixes = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real volumes; skips the test where VOLSEG_DATA is not set."""
    folder = os.environ.get("VOLSEG_DATA")
    if not folder:
        pytest.skip("VOLSEG_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def hippocampus(data: Path) -> list[Path]:
    """Paths of five real crops of a hippocampus."""
    return [
        data / "hippocampus" / "imagesTr" / f"hippocampus_{number}.nii.gz"
        for number in ("001", "003", "004", "006", "007")
    ]


@pytest.fixture(scope="session", params=[3, 2], ids=["3D", "2D"])
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a few hundred random weights, in 3D and in 2D; tests do not change it."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / f"tiny_{request.param}d", request.param)


@pytest.fixture(scope="session")
def tiny_bundle_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 3D bundle alone, where the dimensions do not matter; tests do not change it."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny", 3)


@pytest.fixture(scope="session")
def model(tiny_bundle: Path) -> Model:
    """The model of `tiny_bundle` on the CPU."""
    return open_bundle(tiny_bundle, device="cpu")


@pytest.fixture(scope="session")
def model_3d(tiny_bundle_3d: Path) -> Model:
    """The model of `tiny_bundle_3d` on the CPU."""
    return open_bundle(tiny_bundle_3d, device="cpu")


@pytest.fixture
def image() -> nib.Nifti1Image:
    """An image that is neither cubic nor isotropic nor aligned with the axes."""
    return nifti()


@pytest.fixture
def volume_file(tmp_path: Path, image: nib.Nifti1Image) -> Path:
    """The path of the same image as a NIfTI file."""
    return save(tmp_path / "in" / "sub-01_T1w.nii.gz", image)
