"""The rules of MONAI's model zoo: a bundle that breaks one rule, and what is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import CliRunner

from pipeline.bundle import Finding
from pipeline.bundle.check import CheckedBundle, check_bundle
from pipeline.bundle.foreign.network_check import network_findings
from pipeline.bundle.zoo_configs import configuration_findings, id_findings
from pipeline.bundle.zoo_files import file_findings, large_file_findings, weights_findings
from pipeline.bundle.zoo_metadata import metadata_findings, schema_findings
from pipeline.cli.app import main
from pipeline.config import BundlePaths
from pipeline.errors import ConfigError

WEIGHTS = b"stands for weights"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
Change = Callable[[BundlePaths], object]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def zoo_bundle(folder: Path) -> BundlePaths:
    """Write a bundle in MONAI's form in which nothing is to be found, and return its paths."""
    paths = BundlePaths(folder)
    write(paths.licence, "Apache-2.0")
    write(paths.readme, "# A model")
    write(paths.metadata, json.dumps(metadata()))
    write(paths.configs / "inference.json", json.dumps(inference()))
    write(paths.configs / "train.json", json.dumps(train()))
    paths.models.mkdir()
    paths.weights.write_bytes(WEIGHTS)
    return paths


def metadata() -> dict[str, Any]:
    tensor = {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": 1,
        "spatial_shape": ["8*n", "4*n", 24],
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {"0": "T1w"},
    }
    output = {**tensor, "num_channels": 2, "channel_def": {"0": "background", "1": "spot"}}
    texts = ("task", "description", "authors", "copyright", "intended_use", "name", "data_source")
    return {
        **dict.fromkeys(texts, "a text"),
        "schema": "https://github.com/Project-MONAI/schema.json",
        "version": "0.2.0",
        "changelog": {"0.2.0": "better", "0.1.0": "first"},
        "monai_version": "1.4.0",
        "pytorch_version": "2.4.0",
        "numpy_version": "1.24.4",
        "required_packages_version": {"nibabel": "5.2.1"},
        "data_type": "NIfTI",
        "references": [],
        "eval_metrics": {"dice": 0.9},
        "network_data_format": {"inputs": {"image": tensor}, "outputs": {"pred": output}},
    }


def inference() -> dict[str, Any]:
    network = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    return {
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "cpu",
        "network_def": {**network, "channels": [4, 4, 4], "strides": [2, 2]},
        "dataset": {"_target_": "Dataset", "data": []},
        "inferer": {"_target_": "SimpleInferer"},
        "evaluator": {"_target_": "SupervisedEvaluator", "network": "@network_def"},
        "version": "$@_meta_::version",
    }


def train() -> dict[str, Any]:
    part = {"handlers": [], "inferer": {}, "dataset": {"data": []}}
    return {
        **dict.fromkeys(("bundle_root", "dataset_dir", "output_dir", "device"), "."),
        "train": {**part, "trainer": {"max_epochs": 1}},
        "validate": {**part, "evaluator": {}},
    }


def findings(paths: BundlePaths) -> list[tuple[str, Finding]]:
    """Return all that the rules find which evaluate nothing, each with its rule."""
    train_files = CheckedBundle(paths, trust=False).training
    rules = {
        "files": file_findings(paths),
        "weights": weights_findings(paths),
        "large files": large_file_findings(paths),
        "schema": schema_findings(paths),
        "metadata": metadata_findings(paths),
        "configurations": configuration_findings(paths),
        "ids": id_findings(paths, train_files),
    }
    return [(rule, finding) for rule, found in rules.items() for finding in found]


def in_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(paths: BundlePaths) -> None:
        path = paths.configs / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def in_metadata(**keys: Any) -> Change:
    return in_json("metadata.json", lambda content: content.update(keys))


def without(name: str, *place: str) -> Change:
    def edit(content: dict[str, Any]) -> None:
        for key in place[:-1]:
            content = content[key]
        del content[place[-1]]

    return in_json(name, edit)


def listed(**changes: str | None) -> Change:
    """List the weights in large_files.yml, with changes; None removes a key."""
    entry = {"path": "models/model.pt", "url": "https://a.org/model.pt"}
    entry |= {"hash_val": SHA256, "hash_type": "sha256"}
    kept = {key: value for key, value in (entry | changes).items() if value is not None}
    text = json.dumps({"large_files": [kept]})  # JSON is YAML
    return lambda paths: write(paths.folder / "large_files.yml", text)


def sparse(name: str) -> Change:
    """Write a file of 26 MiB that takes no space."""

    def change(paths: BundlePaths) -> None:
        with open(paths.folder / name, "wb") as file:
            file.truncate(26 * 2**20)

    return change


@dataclass(frozen=True)
class Broken:
    """A change that breaks one rule, and what is found."""

    change: Change
    rule: str
    level: Literal["error", "advice"]
    says: str


BROKEN = {
    "no licence": Broken(
        lambda paths: paths.licence.unlink(), "files", "error", "LICENSE: missing; expected"
    ),
    "licence under another name": Broken(
        lambda paths: paths.licence.rename(paths.folder / "License.txt"),
        "files",
        "error",
        "License.txt is there; expected the licence of the weights; rename it to LICENSE",
    ),
    "empty licence": Broken(
        lambda paths: paths.licence.write_text(" \n"), "files", "error", "LICENSE: empty"
    ),
    "no README": Broken(
        lambda paths: paths.readme.unlink(), "files", "error", "docs/README.md: missing"
    ),
    "empty README": Broken(
        lambda paths: paths.readme.write_text(""), "files", "error", "docs/README.md: empty"
    ),
    "no weights": Broken(
        lambda paths: paths.weights.unlink(), "weights", "error", "models/model.pt: missing"
    ),
    "weights under another name": Broken(
        lambda paths: paths.weights.rename(paths.models / "net.pth"),
        "weights",
        "advice",
        "the weights are models/net.pth",
    ),
    "large file": Broken(sparse("docs/video.avi"), "large files", "advice", "docs/video.avi: 26 M"),
    "list without a list": Broken(
        lambda paths: write(paths.folder / "large_files.yml", "large_files: none"),
        "large files",
        "error",
        "large_files is str",
    ),
    "entry without url": Broken(listed(url=None), "large files", "error", "url is missing"),
    "entry with a bad url": Broken(listed(url="model.pt"), "large files", "error", "url is 'model"),
    "path out of the bundle": Broken(
        listed(path="../model.pt"), "large files", "error", "'../model.pt' leads out"
    ),
    "unknown hash": Broken(
        listed(hash_type="crc32"), "large files", "error", "hash_type is 'crc32'"
    ),
    "wrong hash": Broken(
        listed(hash_val="0" * 64), "large files", "error", f"the sha256 {SHA256}; expected 000"
    ),
    "no hash": Broken(listed(hash_val=None), "large files", "advice", "no SHA-256 for models/mod"),
    "no metadata": Broken(
        lambda paths: paths.metadata.unlink(), "schema", "error", "configs/metadata.json: missing"
    ),
    "no task": Broken(
        without("metadata.json", "task"), "schema", "error", "'task' is a required property"
    ),
    "packages as a list": Broken(
        in_metadata(required_packages_version=["nibabel"]),
        "schema",
        "error",
        "required_packages_version: ['nibabel'] is not of type 'object'",
    ),
    "no packages": Broken(
        without("metadata.json", "required_packages_version"), "schema", "error", "missing"
    ),
    "no format": Broken(
        without("metadata.json", "network_data_format"), "schema", "error", "_data_format: missing"
    ),
    "no outputs": Broken(
        without("metadata.json", "network_data_format", "outputs", "pred"),
        "schema",
        "error",
        "network_data_format.outputs: {} ",
    ),
    "no dtype": Broken(
        without("metadata.json", "network_data_format", "inputs", "image", "dtype"),
        "schema",
        "error",
        "network_data_format.inputs.image: 'dtype' is a required property",
    ),
    "no channel_def": Broken(
        without("metadata.json", "network_data_format", "outputs", "pred", "channel_def"),
        "metadata",
        "advice",
        "outputs.pred: without channel_def",
    ),
    "unnamed channel": Broken(
        without("metadata.json", "network_data_format", "outputs", "pred", "channel_def", "1"),
        "metadata",
        "advice",
        "1 names for 2 channels",
    ),
    "version not in the changelog": Broken(
        in_metadata(version="0.3.0"), "metadata", "error", "an entry for the version 0.3.0"
    ),
    "package that is none": Broken(
        in_metadata(required_packages_version={"nibabel": ">=5"}),
        "metadata",
        "error",
        "nibabel==>=5 is no requirement",
    ),
    "MONAI's version": Broken(
        in_metadata(monai_version="1.4.0rc1"), "metadata", "error", "'1.4.0rc1'; expected numbers"
    ),
    "nothing said": Broken(
        in_metadata(intended_use=""), "metadata", "advice", "nothing in intended_use"
    ),
    "placeholder": Broken(
        in_metadata(authors="to be named"), "metadata", "advice", "nothing in authors"
    ),
    "no inference": Broken(
        lambda paths: (paths.configs / "inference.json").unlink(),
        "configurations",
        "error",
        "configs/inference.json: missing",
    ),
    "two for inference": Broken(
        lambda paths: write(paths.configs / "inference.yaml", json.dumps(inference())),
        "configurations",
        "advice",
        "inference.json and inference.yaml",
    ),
    "no JSON": Broken(
        lambda paths: write(paths.configs / "evaluate.json", "{"),
        "configurations",
        "error",
        "configs/evaluate.json: cannot be read",
    ),
    "key twice": Broken(
        lambda paths: write(paths.configs / "evaluate.json", '{"a": 1, "a": 2}'),
        "configurations",
        "advice",
        "Duplicate key",
    ),
    "own machine": Broken(
        lambda paths: write(paths.configs / "evaluate.yaml", "data: /home/somebody/data"),
        "configurations",
        "advice",
        "the path /home/somebody",
    ),
    "reference to nothing": Broken(
        in_json("inference.json", lambda content: content.update(handlers="@network#x")),
        "configurations",
        "error",
        "inference.json, handlers: refers to @network::x, which is not there",
    ),
    "id of the zoo": Broken(
        without("inference.json", "inferer"), "ids", "error", "inference.json: without inferer"
    ),
    "id of MONAI": Broken(
        without("inference.json", "dataset"), "ids", "advice", "without dataset;"
    ),
    "id of training": Broken(
        without("train.json", "train", "trainer", "max_epochs"),
        "ids",
        "error",
        "train.json: without train::trainer::max_epochs",
    ),
    "id of validation": Broken(
        without("train.json", "validate", "handlers"), "ids", "error", "validate::handlers"
    ),
}  # fmt: skip


def test_a_sound_bundle_of_the_zoo_has_no_findings(tmp_path: Path) -> None:
    assert findings(zoo_bundle(tmp_path / "sound_bundle")) == []


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_each_rule_finds_what_breaks_it_and_nothing_else(broken: Broken, tmp_path: Path) -> None:
    paths = zoo_bundle(tmp_path / "bundle")
    broken.change(paths)
    try:
        [(rule, finding)] = findings(paths)
    except ConfigError as error:
        assert broken.says in str(error)
        return
    assert (rule, finding.level) == (broken.rule, broken.level)
    assert broken.says in finding.text


def test_a_name_with_spaces_is_advised_against(tmp_path: Path) -> None:
    [(_, finding)] = findings(zoo_bundle(tmp_path / "my model"))
    assert "my model: the name of the folder has other characters" in finding.text


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha512"])
def test_listed_weights_need_not_be_there(kind: str, tmp_path: Path) -> None:
    """Where they are, their hash is compared, whatever its kind."""
    paths = zoo_bundle(tmp_path / "bundle")
    digest = hashlib.new(kind, WEIGHTS).hexdigest().upper()
    listed(hash_val=digest, hash_type=kind)(paths)
    assert all(finding.level == "advice" for _, finding in findings(paths))
    paths.weights.unlink()
    [finding] = weights_findings(paths)
    assert finding.level == "advice"
    assert "download_large_files" in finding.text


def test_a_listed_large_file_may_be_there(tmp_path: Path) -> None:
    paths = zoo_bundle(tmp_path / "bundle")
    sparse("models/model.pt")(paths)
    assert [rule for rule, _ in findings(paths)] == ["large files"]
    listed(hash_val=hashlib.sha256(paths.weights.read_bytes()).hexdigest())(paths)
    assert findings(paths) == []


def test_in_a_checkout_of_the_zoo_its_own_lists_count(tmp_path: Path) -> None:
    """A version that is published, a unit test that is missing, a file that is too large."""
    paths = zoo_bundle(tmp_path / "models" / "spot_mr")
    write(tmp_path / "models" / "model_info.json", json.dumps({"spot_mr_v0.2.0": {}}))
    (tmp_path / "ci" / "unit_tests").mkdir(parents=True)
    sparse("docs/video.avi")(paths)
    found = {finding.where: finding.level for _, finding in findings(paths)}
    assert found == {
        "ci/unit_tests/test_spot_mr.py": "advice",
        "docs/video.avi": "error",
        "configs/metadata.json, version": "advice",
    }


def test_a_foreign_bundle_is_checked_without_running_it(tmp_path: Path) -> None:
    """Only its network needs trust; a mismatch with the metadata is an error."""
    paths = zoo_bundle(tmp_path / "bundle")
    [untrusted] = network_findings(paths, trust=False)
    assert untrusted.level == "advice"
    assert "--trust" in untrusted.text
    assert list(network_findings(paths, trust=True)) == []
    result = CliRunner().invoke(main, ["bundle", "check", str(paths.folder)])
    assert result.exit_code == 0, result.output
    assert "passed  ids" in result.stdout
    assert "advice  network input and output: configs/inference.json" in result.stdout
    in_json("inference.json", lambda content: content["network_def"].update(out_channels=3))(paths)
    report = check_bundle(paths.folder, trust=True)
    assert set(report.errors) == {"network input and output"}


def test_what_this_machine_lacks_is_no_error(tmp_path: Path) -> None:
    paths = zoo_bundle(tmp_path / "bundle")
    listed(path="models/code.pt")(paths)
    load = "$torch.load(@bundle_root + '/models/code.pt')"
    in_json("inference.json", lambda content: content.update(network_def=load))(paths)
    [finding] = network_findings(paths, trust=True)
    assert (finding.level, "download_large_files" in finding.text) == ("advice", True)
    in_json("inference.json", lambda content: content.update(network_def="$__import__('nix')"))(
        paths
    )
    [finding] = network_findings(paths, trust=True)
    assert "install the packages" in finding.text


def test_a_folder_without_anything_fails_and_does_not_crash(tmp_path: Path) -> None:
    paths = BundlePaths(tmp_path / "bundle")
    paths.configs.mkdir(parents=True)
    report = check_bundle(paths.folder)
    assert {"weights", "files", "metadata against the schema", "configurations"} <= set(
        report.errors
    )
    (paths.configs / "metadata.json").write_bytes(b"\xff\xfe")
    (paths.configs / "inference.yaml").write_text("- a\n- b")
    shutil.rmtree(paths.folder / "docs", ignore_errors=True)
    assert "metadata against the schema" in check_bundle(paths.folder).errors
