"""What README and docs say is so: the example runs, commands exist with their options, figures are those of the cards."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import yaml
from phantom import save

from pipeline.cli.app import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("bundles/*/docs/README.md")),
]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, on the volume that the demo leaves."""
    datasets = pytest.importorskip("nilearn.datasets")
    save(tmp_path / "demo" / "brain.nii", datasets.load_mni152_template(resolution=1))
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(README, {}, "README", "README.md", 0)
    assert len(example.examples) >= 5
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.parent.name + "/" + path.stem)
def test_commands_exist_with_their_options(page: Path) -> None:
    """Every `volseg …` of a code block names a command, and options that it has."""
    for block in re.findall(
        r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    ):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split()
            if words[:1] != ["volseg"]:
                continue
            command = main.commands[words[1]]
            known = {name for parameter in command.params for name in parameter.opts}
            assert {word for word in words[2:] if re.fullmatch(r"--?[a-z][\w-]*", word)} <= known, (
                line
            )


@pytest.mark.parametrize("name", ["brain_mr_structures", "hippocampus_mr_3d", "hippocampus_mr_2d"])
def test_figures_are_those_of_the_card(name: str) -> None:
    """README, the bundle's page and metadata.json say the same Dice."""
    card = yaml.safe_load(
        (ROOT / "bundles" / name / "configs" / "card.yaml").read_text(encoding="utf-8")
    )
    figures = [f"{value:.4f}" for value in card["eval_metrics"].values()]
    assert " / ".join(figures) in README
    page = (ROOT / "bundles" / name / "docs" / "README.md").read_text(encoding="utf-8")
    assert all(figure in page for figure in figures)
