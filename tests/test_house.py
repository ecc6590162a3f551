from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pipeline

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "pipeline").glob("*.py"))
MAX_MODULE, MAX_FUNCTION = 300, 40


def test_the_docstring_is_the_table_of_contents() -> None:
    """Each module is named once in the package's docstring."""
    assert pipeline.__doc__ is not None
    words = pipeline.__doc__.replace("`", " ").replace(",", " ").split()
    assert [path.stem for path in MODULES if path.stem != "__init__" and path.stem not in words] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_and_functions_are_small(path: Path) -> None:
    """No module over 300 lines, no function over 40, docstrings included in the first and not in the second."""
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE
    long = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = node.body[0] if ast.get_docstring(node) else None
            prose = (documented.end_lineno or 0) - documented.lineno + 1 if documented else 0
            if (node.end_lineno or 0) - node.lineno + 1 - prose > MAX_FUNCTION:
                long.append(node.name)
    assert not long


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.stem not in ("cli", "cli_train", "progress")], ids=lambda path: path.stem
)
def test_printing_happens_in_the_command_line_only(path: Path) -> None:
    """No print, and no assert on what a user gives, anywhere else."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
    assert not [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "echo"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_name_is_documented(path: Path) -> None:
    """Each public function and class says what comes out; methods that a base class asks for are described with it."""
    tree = ast.parse(path.read_text())
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("bundles/*/configs/*.yaml")), ids=lambda path: f"{path.parts[-3]}/{path.name}"
)
def test_configurations_are_yaml(path: Path) -> None:
    """They parse, and are mappings."""
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_training_needs_no_simpleitk() -> None:
    """What trains imports without the reader of formats that training data does not come in."""
    code = "import sys; sys.modules['SimpleITK'] = None; import pipeline.training, pipeline.augment, pipeline.bundle"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
