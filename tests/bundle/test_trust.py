"""Nothing of a foreign bundle runs unless it is trusted, and what should be data never runs."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from phantom import make_bundle, run_settings

import pipeline
from pipeline.bundle.check import check_bundle
from pipeline.bundle.info import bundle_info
from pipeline.bundle.opening import open_bundle
from pipeline.bundle.trust import check_plain, code_hash
from pipeline.bundle.wiring import literal, read_wiring, refresh_bundle
from pipeline.cli.app import main
from pipeline.config.paths import BundlePaths
from pipeline.errors import ConfigError, PipelineError
from pipeline.networks.weights import read_checkpoint, read_state


@pytest.fixture
def bundle(tiny_bundle_3d: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle of volumes, to write into."""
    return Path(shutil.copytree(tiny_bundle_3d, tmp_path / "bundle"))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that hostile code would make."""
    return tmp_path / "mark"


def code(mark: Path) -> str:
    """Return an expression that makes a file."""
    return f"$__import__('pathlib').Path('{mark}').touch()"


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a YAML file."""
    content = yaml.safe_load(path.read_text())
    edit(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def add_line(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


HOSTILE: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "expression": lambda content, mark: content["initialize"].append(code(mark)),
    "import": lambda content, mark: content["imports"].append("$import scripts"),
    "target": lambda content, mark: content.update(
        spec={"_target_": "pathlib.Path.touch", "self": f"$__import__('pathlib').Path('{mark}')"}
    ),
    "network": lambda content, mark: content.update(network_def=code(mark)),
}


@pytest.fixture(params=HOSTILE)
def hostile(request: pytest.FixtureRequest, bundle: Path, mark: Path) -> Path:
    """A bundle whose wiring makes a file when it is evaluated, and so does its `scripts`."""
    paths = BundlePaths(bundle)
    add = HOSTILE[request.param]
    change(paths.inference, lambda content: add(content, mark))
    change(paths.train, lambda content: content["initialize"].append(code(mark)))
    touch = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "__init__.py").write_text(touch)
    return bundle


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_hostile_bundle_leaves_no_trace(
    hostile: Path, mark: Path, volume_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done with it, also from within its own folder."""
    monkeypatch.chdir(hostile)
    monkeypatch.syspath_prepend(str(hostile))  # worse than any command does
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--trust"):
        pipeline.load(hostile, device="cpu")
    results = [
        run("segment", volume_file, "-o", out, "-b", hostile, "--device", "cpu"),
        run("segment", volume_file, "-o", out, "-b", ".", "--device", "cpu"),
        run("evaluate", hostile, tmp_path, "-o", out, "--device", "cpu"),
        run("bundle", "check", hostile),
        run("bundle", "info", hostile),
        run("bundle", "refresh", hostile),
    ]
    assert [result.exit_code for result in results] == [2, 2, 2, 1, 0, 0], [
        result.output for result in results
    ]
    assert "--trust" in results[0].stderr
    assert not mark.exists()
    assert "scripts" not in sys.modules


def test_training_a_hostile_bundle_leaves_no_trace(
    bundle: Path, mark: Path, tmp_path: Path
) -> None:
    """The overlay for training is code as well."""
    change(BundlePaths(bundle).train, lambda content: content["initialize"].append(code(mark)))
    (tmp_path / "run.yaml").write_text("{}")
    result = run("train", tmp_path / "run.yaml", *run_settings(bundle, tmp_path))
    assert result.exit_code == 2
    assert "configs/train.yaml" in result.stderr
    assert not mark.exists()


def test_a_trusted_bundle_runs_its_code(
    bundle: Path, mark: Path, volume_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line at INFO names the bundle and the hash of its code."""
    change(BundlePaths(bundle).inference, lambda content: content["initialize"].append(code(mark)))
    caplog.set_level(logging.INFO, logger="volseg")
    model = pipeline.load(bundle, device="cpu", trust=True)
    assert mark.exists()
    [message] = [record.getMessage() for record in caplog.records if record.name == "volseg"]
    assert str(bundle.resolve()) in message
    assert code_hash(bundle) in message
    assert pipeline.segment(model, str(volume_file)).labels.any()


def test_the_error_names_origin_files_and_hash(bundle: Path) -> None:
    add_line(BundlePaths(bundle).inference, "added: 1")
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "net.py").write_text("")
    (bundle / "configs" / "other.json").write_text("{}")
    with pytest.raises(ConfigError) as raised:
        open_bundle(bundle, device="cpu")
    for part in (
        str(bundle.resolve()),
        "configs/inference.yaml, configs/other.json, scripts/net.py (",
        code_hash(bundle),
        "--trust",
        "trust=True",
        "volseg bundle refresh --overwrite",
    ):
        assert part in str(raised.value)


def test_own_wiring_needs_no_trust_and_imports_nothing_of_the_bundle(
    bundle: Path, mark: Path, volume_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripts, further configurations, compiled files and a logging.conf stay unread."""
    monkeypatch.chdir(bundle)
    touch = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("scripts/__init__.py", "jsonschema.py", "onnx.py", "configs/__init__.py"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text(touch)
    for name in ("evaluate.yaml", "inference.json", "multi_gpu_train.yaml"):
        (bundle / "configs" / name).write_text(json.dumps({"initialize": [code(mark)]}))
    (bundle / "configs" / "logging.conf").write_text(
        f"[loggers]\nkeys=root\n[handlers]\nkeys=h\n[formatters]\nkeys=\n[logger_root]\nhandlers=h\n"
        f"[handler_h]\nclass=FileHandler\nargs=({str(mark)!r},)\n"
    )
    before = list(sys.path)
    out = tmp_path / "out"
    assert run("segment", volume_file, "-o", out, "-b", bundle, "--device", "cpu").exit_code == 0
    assert check_bundle(bundle).errors == {}
    assert bundle_info(bundle).needs_trust is False
    assert "scripts/__init__.py" in bundle_info(bundle).foreign_files
    assert not mark.exists()
    assert sys.path == before


ACTIVE = ("$", "@", "%")


@pytest.mark.parametrize("key", ["channels", "labels"])
def test_names_in_the_spec_are_never_evaluated(
    key: str, mark: Path, volume_file: Path, tmp_path: Path
) -> None:
    """metadata.json is not written with them, because MONAI would evaluate it."""
    root = make_bundle(tmp_path / "bundle")
    names: Any = [code(mark)] if key == "channels" else {"background": 0, code(mark): 7, "b": 300}
    change(BundlePaths(root).spec, lambda content: content.update({key: names}))
    labels = pipeline.segment(open_bundle(root, device="cpu"), str(volume_file)).labels
    assert labels.any()
    reasons = check_bundle(root).errors
    if key == "channels":
        assert "starts with $" in reasons["generated files"]
        with pytest.raises(ConfigError, match=r"metadata\..*starts with \$"):
            refresh_bundle(root)
    assert not mark.exists()


def test_a_spec_is_plain_yaml(bundle: Path, mark: Path) -> None:
    """Python objects, targets and expressions are values of the wrong type there."""
    spec = BundlePaths(bundle).spec
    before = spec.read_text()
    lines = (
        f"orientation: !!python/object/apply:os.system ['touch {mark}']",
        f"orientation: {{_target_: os.system, command: touch {mark}}}",
        f'orientation: "{code(mark)}"',
    )
    for line in lines:
        spec.write_text(f"{before}\n{line}\n")
        with pytest.raises(ConfigError, match=r"spec\.yaml"):
            open_bundle(bundle, device="cpu")
        assert "spec.yaml" in check_bundle(bundle).errors["spec"]
    assert not mark.exists()


@pytest.mark.parametrize(
    "poison",
    [
        lambda mark: {"version": code(mark)},
        lambda mark: {"description": "$import scripts"},
        lambda mark: {"authors": {"_target_": "os.system", "command": f"touch {mark}"}},
        lambda mark: {"authors": "%configs/evil.yaml::initialize"},
        lambda mark: {"network_data_format": {"inputs": {"image": {"channel_def": code(mark)}}}},
    ],
)
def test_metadata_is_never_evaluated(
    poison: Callable[[Path], dict[str, Any]], bundle: Path, mark: Path
) -> None:
    path = BundlePaths(bundle).metadata
    path.write_text(json.dumps(json.loads(path.read_text()) | poison(mark)))
    open_bundle(bundle, device="cpu")
    reasons = check_bundle(bundle).errors
    for name in ("inference properties", "training properties", "network input and output"):
        assert "metadata.json" in reasons[name]
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["start", "dataset", "splits"])
def test_run_settings_are_never_evaluated(
    key: str, bundle: Path, mark: Path, tmp_path: Path
) -> None:
    """They reach the parser as values of an object."""
    settings = [*run_settings(bundle, tmp_path / "data"), f'{key}="{code(mark)}"']
    (tmp_path / "run.yaml").write_text("{}")
    result = run("train", tmp_path / "run.yaml", *settings)
    assert result.exit_code == 2, result.output
    change(BundlePaths(bundle).run, lambda content: content.update({key: code(mark)}))
    check_bundle(bundle)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["$__import__('os').mkdir('mark')", "@spec", "%a#b", "a#b::c"])
def test_a_folder_may_have_any_name(
    name: str, bundle: Path, volume_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MONAI would evaluate it, or take it for a reference."""
    monkeypatch.chdir(tmp_path)
    bundle.rename(name)
    assert pipeline.segment(open_bundle(name, device="cpu"), str(volume_file)).labels.any()
    assert check_bundle(name).errors == {}
    assert not (tmp_path / "mark").exists()
    parser = read_wiring(name)
    assert parser.get_parsed_content("bundle_root") == name


def test_a_literal_keeps_every_character() -> None:
    for text in ("", "$1 + 1", "@a", "%b.yaml::c", "a#b'c\"d\\é\udc80"):
        expression = literal(text)
        assert eval(expression[1:]) == text
        assert not set("@#%") & set(expression)


class _Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_in_place_of_weights_does_not_run(
    write: Callable[[Any, Path], object],
    bundle: Path,
    mark: Path,
    volume_file: Path,
    tmp_path: Path,
) -> None:
    """One error names the file, and does not recommend to load it without protection."""
    weights = BundlePaths(bundle).weights
    write({"output.weight": _Pickled(mark)}, weights)
    for runtime in ("torch", "openvino"):
        with pytest.raises(ConfigError, match=r"model\.pt: is not a plain checkpoint") as raised:
            open_bundle(bundle, device="cpu", runtime=runtime)
        assert "weights_only" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert "not a plain checkpoint" in check_bundle(bundle).errors["weights fit the spec"]
    result = run("segment", volume_file, "-o", tmp_path / "out", "-b", bundle, "--device", "cpu")
    assert result.exit_code == 2
    for command in (
        ["export", bundle, "--to", "torchscript"],
        ["import", weights, "-o", mark / "x"],
    ):
        assert run(*command).exit_code == 2
    for read in (read_state, read_checkpoint):
        with pytest.raises(PipelineError):
            read(weights)
    assert not mark.exists()


def test_the_hash_covers_code_and_no_weights(bundle: Path, tmp_path: Path) -> None:
    """Contents and names of configurations and scripts, behind links as well."""
    found = {code_hash(bundle)}
    assert code_hash(shutil.copytree(bundle, tmp_path / "moved")) in found

    def changes_the_hash() -> bool:
        before = len(found)
        found.add(code_hash(bundle))
        return len(found) > before

    add_line(BundlePaths(bundle).card, "# a comment")
    assert changes_the_hash()
    for name in ("a.py", "b.json", "c.yml", "d.so", "e.PY", "__pycache__/a.cpython-311.pyc"):
        path = bundle / "scripts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1")
        assert changes_the_hash(), name
    (bundle / "scripts" / "a.py").rename(bundle / "scripts" / "f.py")
    assert changes_the_hash()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "g.py").write_text("1")
    (bundle / "linked").symlink_to(tmp_path / "elsewhere")
    (bundle / "linked" / "loop").symlink_to(bundle)
    assert changes_the_hash()
    (tmp_path / "elsewhere" / "g.py").write_text("2")
    assert changes_the_hash()
    BundlePaths(bundle).weights.write_bytes(b"others")
    (bundle / "docs").mkdir(exist_ok=True)
    (bundle / "docs" / "README.md").write_text("words")
    assert not changes_the_hash()


def test_info_says_what_a_bundle_is(bundle: Path) -> None:
    found = bundle_info(bundle)
    assert (found.needs_trust, found.foreign_files) == (False, ())
    assert found.wiring == {"inference.yaml": "current", "train.yaml": "current"}
    add_line(BundlePaths(bundle).inference, "added: 1")
    BundlePaths(bundle).card.unlink()
    result = run("bundle", "info", bundle, "--json")
    printed = json.loads(result.stdout)
    assert printed["needs_trust"] is True
    assert printed["foreign_files"] == ["configs/inference.yaml"]
    assert printed["wiring"] == {"inference.yaml": "edited", "train.yaml": "current"}
    assert printed["code_sha256"] == code_hash(bundle) != found.code_sha256
    assert printed["weights_sha256"] == found.weights_sha256
    assert "needs --trust       yes" in run("bundle", "info", bundle).stdout


def test_untrusted_checks_say_that_they_did_not_run(bundle: Path) -> None:
    """The others run; with --trust all do."""
    add_line(BundlePaths(bundle).inference, "added: 1")
    reasons = check_bundle(bundle).errors
    not_run = {name for name, reason in reasons.items() if reason.startswith("not run, needs")}
    assert not_run == {"inference properties", "training properties", "network input and output"}
    assert set(reasons) == not_run | {"generated files"}
    assert set(check_bundle(bundle, trust=True).errors) == {"generated files"}
    result = run("bundle", "check", bundle, "--trust", "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["inference properties"]


@pytest.mark.parametrize("content", ["a $", {"a": ["b", 1, None]}, "", {"x_target_": 1}])
def test_plain_content_is_accepted(content: Any) -> None:
    check_plain(content, "here")


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"a": ["b", "$c"]}, r"here\.a\[1\]"),
        ("@b", "here"),
        ([{"b": {"_target_": 1}}], r"\[0\]\.b"),
    ],
)
def test_active_content_is_refused(content: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        check_plain(content, "here")
