"""The wheel: what it holds, and that an installed volseg segments with a bundle that it ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest
from phantom import save

ROOT = Path(__file__).parent.parent
SOURCES = ("pipeline", "bundles", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUNDLES = sorted(path.parent.parent.name for path in ROOT.glob("bundles/*/configs/spec.yaml"))
FIND = """
import sys
from pathlib import Path

import pipeline
from pipeline.bundle import find_bundle

for path in (pipeline.__file__, find_bundle("hippocampus_mr_3d")):
    assert Path(path).is_relative_to(sys.argv[1]), path
"""
SEGMENT = """
from pipeline.cli import main

main(["segment", "scans", "-o", "out", "--bundle", "hippocampus_mr_3d", "--device", "cpu"])
"""


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Return the standard output of a command that must succeed."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=clean | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_install(wheel: Path, *options: str, python: Path | None = None, **variables: str) -> None:
    """Install the wheel alone, without the network."""
    target = ["--python", str(python)] if python else []
    command = ["install", "--quiet", "--no-deps", "--no-index", *options, str(wheel)]
    run(sys.executable, "-m", "pip", *target, *command, cwd=None, **variables)


def make_environment(folder: Path) -> Path:
    """Make an environment with this one's dependencies but not its volseg; return its Python.

    A path in a .pth file is added without the .pth files in it, so that the finder of an editable
    volseg is not active there.
    """
    venv.create(folder, system_site_packages=True, symlinks=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools would put files of an earlier build/ into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, source / name)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, source)
    return next(folder.glob("volseg-*.whl"))


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A working directory outside the checkout, with one scan."""
    save(tmp_path / "work" / "scans" / "crop.nii.gz")
    return tmp_path / "work"


def test_every_package_is_listed() -> None:
    """setup.cfg lists the packages by name, because `find:` does not go with `package_dir`."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    modules = (ROOT / "pipeline").rglob("__init__.py")
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in modules}
    assert set(setup["options"]["packages"].split()) == packages | {"volseg_bundles"}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_bundles(wheel: Path) -> None:
    """Each bundle comes with its licences and its page."""
    names = set(ZipFile(wheel).namelist())
    templates = {path.name for path in (ROOT / "pipeline/bundle/templates").iterdir()}
    tables = {path.name for path in (ROOT / "pipeline/io").glob("*.csv")}
    assert {"pipeline/py.typed", "pipeline/training/planning/planner.py"} <= names
    assert {f"pipeline/bundle/templates/{name}" for name in templates} <= names
    assert {f"pipeline/io/{name}" for name in tables} <= names
    pages = {path.name for path in (ROOT / "pipeline/report/pages").iterdir()}
    assert {"index.html", "niivue.js", "NIIVUE_LICENSE"} <= pages
    assert {f"pipeline/report/pages/{name}" for name in pages} <= names
    assert len(BUNDLES) >= 3
    for bundle in BUNDLES:
        for name in (
            "LICENSE",
            "docs/README.md",
            "docs/data_license.txt",
            "configs/spec.yaml",
            "configs/inference.yaml",
            "configs/train.yaml",
            "configs/metadata.json",
            "models/model.pt",
        ):
            assert f"volseg_bundles/{bundle}/{name}" in names
    assert not [name for name in names if name.startswith("tests") or "checkpoint.pt" in name]


@pytest.mark.slow
def test_installed_into_a_folder(wheel: Path, workplace: Path, tmp_path: Path) -> None:
    """`pip install --target`, with the folder first on the path: a scan is segmented."""
    target = tmp_path / "target"
    pip_install(wheel, "--target", str(target))
    safe = {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    run(sys.executable, "-c", FIND + SEGMENT, target, cwd=workplace, **safe)
    assert (workplace / "out" / "crop_seg.nii.gz").is_file()


@pytest.mark.slow
def test_installed_into_an_environment(wheel: Path, workplace: Path, tmp_path: Path) -> None:
    """`pip install`: the bundles are found, and the command is there."""
    python = make_environment(tmp_path / "environment")
    pip_install(wheel, python=python)
    run(python, "-c", FIND, tmp_path / "environment", cwd=workplace)
    assert "segment" in run(python.with_name("volseg"), "--help", cwd=workplace)


@pytest.mark.slow
def test_installed_for_a_user(wheel: Path, workplace: Path, tmp_path: Path) -> None:
    """`pip install --user`: the bundles are found."""
    python = make_environment(tmp_path / "environment")
    home = {"PYTHONUSERBASE": str(tmp_path / "user")}
    pip_install(wheel, "--user", python=python, **home)
    run(python, "-c", FIND, tmp_path / "user", cwd=workplace, **home)
