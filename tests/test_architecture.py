"""The rules of the house: one direction of imports, public names, one surface for bundles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import pipeline.parts
from pipeline.bundle.inline_spec import wiring_with_spec
from pipeline.bundle.wiring import WIRING, template
from pipeline.config import BundlePaths

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pipeline"
MODULES = sorted(PACKAGE.rglob("*.py"))
ORDER = (  # each may import those before it
    "defaults",
    "processes",
    "log",
    "errors",
    "types",
    "config",
    "io",
    "networks",
    "transforms",
    "inference",
    "bundle",
    "batch",
    "evaluation",
    "report",
    "training",
    "cli",
)
FACES = ("__init__", "api", "parts")  # may import anything; nothing inside imports them


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """The package, or the top-level module, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Each `from pipeline... import ...` of a file: the module, and the names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
            yield node.module or "", [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pipeline":
                    yield alias.name, []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    """No module imports a package that comes after its own, so that there is no cycle either."""
    room = room_of(path)
    if room in FACES:
        return
    for module, names in imports_of(path):
        targets = module.split(".")[1:2] or names
        for target in targets:
            assert target in ORDER, f"{module} is not for use inside the package"
            assert ORDER.index(target) <= ORDER.index(room), f"{room} imports {target}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_use_each_other_by_their_public_names(path: Path) -> None:
    """Across packages a name is imported from the package, which exports it, and is not private."""
    room = room_of(path)
    for module, names in imports_of(path):
        parts = module.split(".")
        if len(parts) < 2 or parts[1] == room or not (PACKAGE / parts[1]).is_dir():
            continue
        package = import_module(module)
        assert hasattr(package, "__all__"), f"{module} is a module inside a package"
        assert set(names) <= set(package.__all__), module


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.py")), ids=name_of)
def test_scripts_use_public_names(path: Path) -> None:
    for module, names in imports_of(path):
        package = import_module(module)
        assert set(names) <= set(package.__all__), module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=name_of)
def test_packages_have_a_purpose_and_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    package = import_module(".".join(path.parent.relative_to(ROOT).parts))
    assert [name for name in package.__all__ if not hasattr(package, name)] == []


def targets_of(content: object) -> Iterator[str]:
    """Each `_target_` in a wiring."""
    if isinstance(content, dict):
        if isinstance(content.get("_target_"), str):
            yield content["_target_"]
        for value in content.values():
            yield from targets_of(value)
    if isinstance(content, list):
        for value in content:
            yield from targets_of(value)


@pytest.mark.parametrize("path", [template(name) for name in WIRING], ids=name_of)
def test_wiring_targets_the_stable_surface_only(path: Path) -> None:
    """Whatever of ours a bundle's wiring names is in `pipeline.parts`."""
    ours = {name for name in targets_of(yaml.safe_load(path.read_text())) if "pipeline" in name}
    assert ours
    assert ours <= {f"pipeline.parts.{name}" for name in pipeline.parts.__all__}


def test_the_stable_surface_has_nothing_that_no_wiring_names() -> None:
    texts = [path.read_text() for path in map(template, WIRING)]
    wirings = [yaml.safe_load(text) for text in texts]
    wirings.append(wiring_with_spec(BundlePaths(ROOT / "bundles" / "hippocampus_mr_3d")))
    used = {name for wiring in wirings for name in targets_of(wiring)}
    assert {f"pipeline.parts.{name}" for name in pipeline.parts.__all__} <= used


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) != "cli"], ids=name_of)
def test_printing_happens_in_the_command_line_only(path: Path) -> None:
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "echo"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_name_is_documented(path: Path) -> None:
    """Each public function and class has a docstring; overriding methods need none."""
    tree = ast.parse(path.read_text())
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("bundles/*/configs/*.yaml")), ids=name_of)
def test_configurations_are_yaml(path: Path) -> None:
    """They parse, and are mappings."""
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.slow
def test_training_needs_no_simpleitk() -> None:
    """Training imports without the reader of formats that training data rarely comes in."""
    code = (
        "import sys; sys.modules['SimpleITK'] = None; "
        "import pipeline.training, pipeline.transforms, pipeline.bundle"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
