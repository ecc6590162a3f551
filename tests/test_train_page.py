"""All commands of docs/train.md, in their order, on a few real crops."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli.app import main

PAGE = (Path(__file__).parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    # blocks with a script or $VOLSEG_DATA repeat a measurement, which takes minutes to hours
    if "scripts/" not in block and "$VOLSEG_DATA" not in block
    for line in block.splitlines()
    if line.startswith("volseg")
]
SHORT = {
    "plan": ["--minutes", "0.5"],  # the last one counts
    "train": ["epochs=1", "minutes=null"],
    "crossval": ["epochs=1", "minutes=null"],
}


@pytest.fixture
def place(hippocampus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with my_data, a Decathlon dataset of five crops."""
    source, target = hippocampus[0].parent.parent, tmp_path / "my_data"
    pairs = [
        {"image": f"./imagesTr/{path.name}", "label": f"./labelsTr/{path.name}"}
        for path in hippocampus
    ]
    for pair in pairs:
        for name in pair.values():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    content = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps(content | {"training": pairs}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_page_run(place: Path) -> None:
    """They run with shorter settings, and leave the files that the page names."""
    assert [line.split()[1] for line in COMMANDS] == [
        "plan",
        "train",
        "evaluate",
        "train",
        "train",
        "crossval",
        "compare",
    ]
    threads = torch.get_num_threads()
    for line in COMMANDS:
        command, *arguments = line.split()[1:]
        if command == "compare":
            shutil.copytree(place / "scores", place / "other_scores")
        result = CliRunner().invoke(
            main, [command, *arguments, *SHORT.get(command, [])], catch_exceptions=False
        )
        torch.set_num_threads(threads)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    for name in (
        "train/history.csv",
        "train/progress.png",
        "crossval/scores.csv",
        "crossval/dice.png",
        "docs/README.md",
    ):
        assert (place / "my_model" / name).is_file(), name
