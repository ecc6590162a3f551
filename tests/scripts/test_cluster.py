"""The scripts for clusters name options and variables that exist, and agree in themselves."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline.batch import parse_shard
from pipeline.cli.app import main

SCRIPTS = Path(__file__).parents[2] / "scripts" / "cluster"
CALL = r"^[^#\n]*volseg(?:\.sif)?\W+(segment|bids)(.*?)(?:\n\n|\benv:|\Z|\n[^\n]*subprocess)"


def options(command: str) -> set[str]:
    return {option for item in main.commands[command].params for option in item.opts}


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda path: path.name)
def test_options_exist(path: Path) -> None:
    """Those that follow the commands `volseg segment` and `volseg bids`."""
    text = path.read_text()
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if path.suffix == ".py":
        ast.parse(text)
    calls = re.findall(CALL, text, re.S | re.M)
    assert calls
    for command, call in calls:
        assert set(re.findall(r"(--[a-z][a-z-]*)", call)) <= options(command)


def test_the_job_of_kubernetes_knows_its_size() -> None:
    """JOB_COMPLETIONS, which Kubernetes does not set, is `completions`; each index has its part."""
    job = yaml.safe_load((SCRIPTS / "kubernetes_job.yaml").read_text())["spec"]
    container = job["template"]["spec"]["containers"][0]
    environment = {item["name"]: item["value"] for item in container["env"]}
    assert job["completionMode"] == "Indexed"
    shards = [
        parse_shard("kubernetes", environment | {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(job["completions"])
    ]
    items = list(range(37))
    assert sorted(item for shard in shards for item in shard.of(items)) == items
    mounts = {item["name"] for item in container["volumeMounts"]}
    assert mounts == {item["name"] for item in job["template"]["spec"]["volumes"]}
