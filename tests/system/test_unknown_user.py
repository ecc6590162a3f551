"""A container's user: a number without a name, no home folder, no cache, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bids_trees import make_dataset
from phantom import save

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="needs namespaces and capabilities"),
]
USER = "54321"
# The environment may lie in a folder that only root may enter, so the user may read everything
READ = "dac_read_search"
BECOME = [
    *("unshare", "--net", "setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"),
    *(f"--inh-caps=+{READ}", f"--ambient-caps=+{READ}", f"--bounding-set=-all,+{READ}"),
]
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "no home": {},
    "unwritable home": {"HOME": "/proc"},
    "unwritable cache": {"HOME": "/nonexistent", "VOLSEG_CACHE": "/proc/nowhere"},
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with `data`, which that user may read only, and `work`, which is the user's own."""
    if os.getuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv"))):
        pytest.skip("needs root, unshare and setpriv")
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("data", "work"):
            (folder / part).mkdir()
        os.chown(folder / "work", int(USER), int(USER))
        yield folder


def run_as_user(place: Path, variables: dict[str, str], *words: str | Path) -> str:
    """Run a command of volseg with nothing in its environment, and return what it prints."""
    command = [*BECOME, sys.executable, "-P", "-m", "pipeline.cli", *map(str, words)]
    done = subprocess.run(
        command,
        cwd=place / "work",
        env={"PATH": os.defpath, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("variables", list(ENVIRONMENTS.values()), ids=list(ENVIRONMENTS))
def test_segment_and_report(variables: dict[str, str], place: Path, tiny_bundle_3d: Path) -> None:
    out = place / "work" / "out"
    bundle = shutil.copytree(tiny_bundle_3d, place / "data" / "bundle")
    scan = save(place / "data" / "scan.nii.gz")
    words = ("segment", scan, "-o", out, "-b", bundle, "--device", "cpu", "--report")
    said = run_as_user(place, variables, *words, "--runtime", "openvino")
    assert "no cache there" in said
    assert (out / "scan_seg.nii.gz").stat().st_uid == int(USER)
    assert (out / "report" / "index.html").is_file()
    assert list((place / "work").iterdir()) == [out]


def test_bids(place: Path, tiny_bundle_3d: Path) -> None:
    out = place / "work" / "out"
    bundle = shutil.copytree(tiny_bundle_3d, place / "data" / "bundle")
    dataset = make_dataset(place / "data" / "bids")
    words = ("bids", dataset, out, "participant", "-b", bundle, "--jobs", "1")
    run_as_user(place, {}, *words, "--report")
    run_as_user(place, {}, "bids", dataset, out, "group")
    assert (out / "group_volumes.tsv").is_file()
    assert list((place / "work").iterdir()) == [out]
