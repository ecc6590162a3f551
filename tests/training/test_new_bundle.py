"""A new bundle without weights: what is written, what is refused, and that it can be trained."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from pipeline.bundle import check_bundle
from pipeline.cli.app import main
from pipeline.config import BundlePaths, load_run, load_spec
from pipeline.errors import ConfigError
from pipeline.training.planning import parse_labels

ROOT = Path(__file__).parent.parent.parent


def new(*words: Any) -> Result:
    return CliRunner().invoke(main, ["bundle", "new", *map(str, words)])


@pytest.mark.slow
@pytest.mark.parametrize("like", ["3d", "2d", "brain", "hippocampus_mr_3d"])
def test_it_lacks_nothing_but_its_weights(like: str, tmp_path: Path) -> None:
    folder = tmp_path / "spots_mr"
    result = new(folder, "--like", like, "--labels", "front,back", "--authors", "A. Person")
    assert result.exit_code == 0, result.output
    report = check_bundle(folder)
    assert set(report.errors) == {"weights fit the spec"}
    assert "models/model.pt: missing" in report.errors["weights fit the spec"]
    spec = load_spec(BundlePaths(folder).spec)
    assert spec.labels == {"background": 0, "front": 1, "back": 2}
    assert spec.spatial_dims == (2 if like == "2d" else 3)


def test_labels_of_another_bundle_are_kept(tmp_path: Path) -> None:
    """With what the spec says of them, such as sums and plausible volumes."""
    assert new(tmp_path / "copy", "--like", "brain").exit_code == 0
    spec = load_spec(BundlePaths(tmp_path / "copy").spec)
    shipped = load_spec(ROOT / "bundles" / "brain_mr_structures" / "configs" / "spec.yaml")
    assert (spec.labels, spec.sums) == (shipped.labels, shipped.sums)


def test_card_and_licence_have_what_was_given(tmp_path: Path) -> None:
    words = ("--labels", "left=17,right=53", "--channels", "T1w,FLAIR", "--name", "Two spots")
    assert new(tmp_path / "a", *words, "--licence", "MIT", "--authors", "A. Person").exit_code == 0
    paths = BundlePaths(tmp_path / "a")
    spec, card = load_spec(paths.spec), yaml.safe_load(paths.card.read_text())
    assert spec.labels == {"background": 0, "left": 17, "right": 53}
    assert spec.channels == ("T1w", "FLAIR")
    assert (card["name"], card["authors"]) == ("Two spots", "A. Person")
    assert "A. Person" in paths.licence.read_text().splitlines()[2]
    own = tmp_path / "own.txt"
    own.write_text("Ask me.")
    for licence, beginning in (("Apache-2.0", "\n"), ("none", "No licence"), (own, "Ask me.")):
        folder = tmp_path / f"licence_{Path(licence).stem[:4]}"
        assert new(folder, "--labels", "a", "--license", licence).exit_code == 0
        assert BundlePaths(folder).licence.read_text().startswith(beginning)
    apache = BundlePaths(tmp_path / "licence_Apac").licence.read_text()
    assert apache == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("my model", "--labels", "a"), "'my model' is no name of a bundle"),
        (("m",), "--like 3d has no labels of its own"),
        (("m", "--labels", ""), "expected names separated by commas"),
        (("m", "--labels", "a,a"), "a name is there twice"),
        (("m", "--labels", "a,b=3"), "1 of 2 have a value"),
        (("m", "--labels", "a=0"), "spec.labels: expected distinct values"),
        (("m", "--labels", "$a"), "bundle.labels[1]: '$a' starts with $"),
        (("m", "--labels", "a", "--name", "@x"), "bundle.name: '@x' starts with @"),
        (("m", "--labels", "a", "--name", " "), "is no title"),
        (("m", "--labels", "a", "--channels", "T1w,"), "a name is empty"),
        (("m", "--labels", "a", "--channels", "T1w,T1w"), "spec.channels: expected distinct"),
        (("m", "--labels", "a", "--licence", "GPL"), "none of Apache-2.0, MIT"),
        (("m", "--labels", "a", "--like", "4d"), "4d: no such bundle"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_and_nothing_written(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    folder, *rest = words
    result = new(tmp_path / folder, *rest)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        result = new(folder, "--labels", "a")
        assert result.exit_code == 2
        assert "is not empty" in result.output or "is a file" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert new(tmp_path / "empty", "--labels", "a").exit_code == 0


def test_values_of_labels_are_parsed() -> None:
    assert parse_labels(" left part , right") == {"left part": 1, "right": 2}
    assert parse_labels("a=7, b = 300") == {"a": 7, "b": 300}
    for text in ("background", "a=x", "a,,b", "=3"):
        with pytest.raises(ConfigError, match="expected names"):
            parse_labels(text)


@pytest.mark.slow
def test_the_printed_commands_work(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one epoch every check passes, and the README is that of a trained bundle."""
    monkeypatch.chdir(tmp_path)
    result = new("spots", "--labels", "spot", "--authors", "A. Person")
    paths = BundlePaths("spots")
    spec = yaml.safe_load(paths.spec.read_text())
    spec |= {"roi_size": [16, 24, 8], "network": {"features": [4, 4, 4], "norm": "instance"}}
    paths.spec.write_text(yaml.safe_dump(spec, sort_keys=False))
    train, check = [shlex.split(line)[1:] for line in result.stdout.splitlines()[-2:]]
    threads = torch.get_num_threads()
    words = [word.replace("FOLDER", str(dataset)) for word in train]
    done = CliRunner().invoke(main, [*words, "epochs=1"])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    assert load_run(paths.run).epochs == 1
    done = CliRunner().invoke(main, check)
    assert done.exit_code == 0, done.output
    assert "no weights yet" not in paths.readme.read_text()
