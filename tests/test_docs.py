"""README and docs are true: the example runs, and commands, paths, names and figures exist."""

from __future__ import annotations

import doctest
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml
from phantom import save

from pipeline.cli.app import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted(
    page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.relative_to(ROOT).parts
)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *DOCS,
    *sorted(ROOT.glob("bundles/*/docs/README.md")),
]
PACKAGES = sorted(
    ".".join(path.parent.relative_to(ROOT).parts)
    for path in (ROOT / "pipeline").rglob("__init__.py")
)
REFERENCE = ".. click:: pipeline.cli.app:main\n   :prog: volseg\n   :nested: full\n"
BUNDLE = ROOT / "bundles" / "brain_mr_structures"
SPEC_VALUE = r"\| *(\d+) *"


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def lines_of_code(text: str) -> Iterator[str]:
    """Each line of the code blocks for the shell, continued lines joined."""
    fences = re.findall(r"^```(\S*).*?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for language, block in fences:
        if language in ("", "bash"):
            yield from block.replace("\\\n", " ").splitlines()


def volseg_calls(text: str) -> Iterator[list[str]]:
    """The words of each call of volseg: in code blocks, and in code spans that give an argument."""
    spans = re.findall(r"`(volseg [^`]*)`", text)
    for line in (*lines_of_code(text), *spans):
        words = line.split("#")[0].split()
        if words[:1] == ["volseg"]:
            yield words[1:]


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the first words name, through groups, and the words that are left."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the README, on the volume that the demo leaves."""
    datasets = pytest.importorskip("nilearn.datasets")
    save(tmp_path / "demo" / "brain.nii", datasets.load_mni152_template(resolution=1))
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(README, {}, "README", "README.md", 0)
    assert len(example.examples) >= 5
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_exist_with_their_options(page: Path) -> None:
    """Every `volseg …` names a command, in a group or not, and options that it has."""
    for words in volseg_calls(text_of(page)):
        command, rest = command_of(words)
        known = {name for parameter in command.params for name in parameter.opts}
        known.update(command.get_help_option_names(click.Context(command)))
        given = {word for word in rest if re.fullmatch(r"--?[a-z][\w-]*", word)}
        assert given <= known, f"volseg {' '.join(words)}"


def test_the_reference_has_every_command() -> None:
    """The reference is built from the commands themselves, so no command or option is missing."""
    assert REFERENCE in text_of(ROOT / "docs" / "command_line.md")
    assert "sphinx_click" in text_of(ROOT / "docs" / "conf.py")


def every_command(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from every_command(child, f"{path} {name}")


@pytest.mark.parametrize("path, command", list(every_command(main, "volseg")))
def test_the_reference_explains_every_option(path: str, command: click.Command) -> None:
    """Every command has a description, and every option is visible and has a help text."""
    assert command.help, path
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert [one.name for one in options if one.hidden or not one.help] == [], path


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_exist(page: Path) -> None:
    """Every path in a code span is in the repository or in a bundle."""
    folders = r"pipeline|tests|docs|scripts|configs|bundles|models|\.ci"
    for span in re.findall(rf"`((?:{folders})/[^`\s<>$]*)", text_of(page)):
        assert span == "docs/_build" or list(ROOT.glob(span)) or list(BUNDLE.glob(span)), span


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_pages(page: Path) -> None:
    """Relative links and pictures lead to files."""
    for target in re.findall(r"\]\(([^)#:]+)\)", text_of(page)):
        assert (page.parent / target).is_file(), target


def test_readme_has_no_relative_links() -> None:
    """A package index shows the README without the repository; only the picture is a file of it."""
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", README))
    assert [link for link in links if not link.startswith("https://")] == []


def exists(dotted: str) -> bool:
    """Whether a name such as pipeline.inference.predict_case is a module or a name in one."""
    module, _, name = dotted.rpartition(".")
    try:
        return hasattr(import_module(module), name) or bool(import_module(dotted))
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_exist(page: Path) -> None:
    """`package.name` in a code span, and each name that an example imports, exists."""
    text = text_of(page)
    packages = "|".join(name.removeprefix("pipeline.") for name in PACKAGES if "." in name)
    names = re.findall(rf"`(?:pipeline\.)?((?:{packages})\.(?!yaml)\w+)[`(]", text)
    names += re.findall(r"`pipeline\.(\w+)[`(]", text)
    for module, name in re.findall(r"^from pipeline\.(\S+) import (\w+)", text, re.MULTILINE):
        names.append(f"{module}.{name}")
    assert [name for name in names if not exists(f"pipeline.{name}")] == []


def test_every_package_has_a_page_of_the_api() -> None:
    pages = [text_of(page) for page in (ROOT / "docs" / "api").glob("*.md")]
    for package in PACKAGES:
        assert any(f".. automodule:: {package}\n" in page for page in pages), package


@pytest.mark.parametrize("name", ["brain_mr_structures", "hippocampus_mr_3d", "hippocampus_mr_2d"])
def test_figures_are_those_of_the_card(name: str) -> None:
    """README, the bundle's page and metadata.json have the same Dice."""
    card = yaml.safe_load(text_of(ROOT / "bundles" / name / "configs" / "card.yaml"))
    figures = [f"{value:.4f}" for value in card["eval_metrics"].values()]
    assert " / ".join(figures) in README
    page = text_of(ROOT / "bundles" / name / "docs" / "README.md")
    assert all(figure in page for figure in figures)


def test_labels_of_the_readme_are_those_of_the_spec() -> None:
    """The tables of labels have every structure of the brain model with its value."""
    spec = yaml.safe_load(text_of(BUNDLE / "configs" / "spec.yaml"))
    rows: dict[str, int] = {}
    for name, left, right in re.findall(rf"^\| ([^|]+?) {SPEC_VALUE}{SPEC_VALUE}\|$", README, re.M):
        rows |= {f"left {name}": int(left), f"right {name}": int(right)}
    for name, value in re.findall(rf"^\| ([^|]+?) {SPEC_VALUE}\|$", README, re.M):
        rows[name] = int(value)
    assert rows == {name: value for name, value in spec["labels"].items() if value}
