"""Fixtures for commands that are disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Volseg, commands
from phantom import nifti, save, smooth

SMALL = (9, 11, 8)  # one window of the tiny network
NAMES = "abcdef"


@pytest.fixture
def volseg(tmp_path: Path) -> Iterator[Volseg]:
    """Starts the command `volseg`."""
    with commands(tmp_path / "printed") as volseg:
        yield volseg


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with six small good volumes in `in`."""
    for i, name in enumerate(NAMES):
        save(tmp_path / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    return tmp_path


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_3d: Path) -> Path:
    """The output folder of a run that nobody disturbed, over the six volumes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for i, name in enumerate(NAMES):
        save(folder / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    with commands(folder / "printed") as volseg:
        status, text = volseg(
            "segment", folder / "in", "-o", folder / "out", "-b", tiny_bundle_3d, "--device", "cpu"
        )
    assert status == 0, text
    return folder / "out"
