"""A converted network from the cache is right, whatever happened to its files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom import parse_spec

from pipeline.api import segment
from pipeline.bundle.opening import open_bundle
from pipeline.config.spec import Spec
from pipeline.inference.openvino_models import (
    CACHE_VARIABLE,
    OpenVinoNetwork,
    cached_model,
    noise_window,
    weights_hash,
)
from pipeline.networks import build_network

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
posix = pytest.mark.skipif(os.name != "posix", reason="there are no such permissions")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """A function that returns the warnings of the logger `volseg` so far."""
    caplog.set_level(logging.WARNING, logger="volseg")
    return lambda: [one.getMessage() for one in caplog.records if one.name == "volseg"]


def made(seed: int = 0) -> tuple[torch.nn.Module, Spec]:
    torch.manual_seed(seed)
    spec = parse_spec()
    return build_network(spec).eval(), spec


def entry_of(cache: Path) -> Path:
    """Return the only entry of a cache; nothing else is left in the folder."""
    [entry] = cache.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == [
        "model.bin",
        "model.xml",
        "report.json",
    ]
    return entry


def edit_report(entry: Path, **changes: object) -> None:
    path = entry / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def overwrite(path: Path, content: bytes) -> None:
    """Put another file in the place of one, which a network may have mapped into memory."""
    path.unlink()
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def cut(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-50])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zeros": lambda entry: overwrite(
        entry / "model.bin", bytes((entry / "model.bin").stat().st_size)
    ),
    "short weights": lambda entry: cut(entry / "model.bin"),
    "no weights": lambda entry: (entry / "model.bin").unlink(),
    "weights are a folder": lambda entry: replace_by_folder(entry / "model.bin"),
    "short model": lambda entry: cut(entry / "model.xml"),
    "no model": lambda entry: (entry / "model.xml").unlink(),
    "another model": lambda entry: (entry / "model.xml").write_text("<net/>"),
    "short report": lambda entry: cut(entry / "report.json"),
    "no report": lambda entry: (entry / "report.json").unlink(),
    "report of a list": lambda entry: (entry / "report.json").write_text("[]"),
    "report without hashes": lambda entry: edit_report(entry, sha256={}),
    "report of text": lambda entry: edit_report(entry, sha256="none"),
    "report without numbers": lambda entry: edit_report(entry, logit_difference=None),
    "another network": lambda entry: edit_report(entry, key="0" * 32),
    "empty": lambda entry: empty(entry),
    "open to others": lambda entry: entry.chmod(0o777),
}


@posix
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(
    damage: Callable[[Path], object], cache: Path, log: Callable[[], list[str]]
) -> None:
    """One warning names it, and the network that comes back is right."""
    net, spec = made()
    cached_model(net, spec, "float32")
    entry = entry_of(cache)
    damage(entry)
    assert not log()
    found = cached_model(net, spec, "float32")
    [message] = log()
    assert str(entry) in message
    window = noise_window(spec)
    with torch.no_grad():
        expected = net(window)
    logits = OpenVinoNetwork(found.model, "float32")(window)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert found.agreement["label_agreement"] > 0.999
    assert entry_of(cache) == entry
    cached_model(net, spec, "float32")
    assert len(log()) == 1


@pytest.mark.parametrize("damage", ["zeros", "short weights"])
def test_labels_are_right_after_damage(
    damage: str, cache: Path, tiny_bundle_3d: Path, volume_file: Path
) -> None:
    before = segment(open_bundle(tiny_bundle_3d, device="cpu"), str(volume_file)).labels
    DAMAGE[damage](entry_of(cache))
    after = segment(open_bundle(tiny_bundle_3d, device="cpu"), str(volume_file)).labels
    np.testing.assert_array_equal(after, before)
    assert len(np.unique(after)) > 1


@pytest.mark.slow
def test_threads_repair_one_entry_at_once(cache: Path) -> None:
    """Each gets a right network, while others read, move and replace the entry."""
    net, spec = made()
    cached_model(net, spec, "float32")
    window = noise_window(spec)
    with torch.no_grad():
        expected = net(window)

    def use(number: int) -> None:
        if number % 4 == 0:
            for path in cache.glob("*/model.bin"):
                (cache.parent / "broken").write_bytes(b"x")
                with contextlib.suppress(OSError):  # another thread moved the entry
                    os.replace(cache.parent / "broken", path)
        found = cached_model(net, spec, "float32")
        assert found.agreement["label_agreement"] > 0.999

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(16)))
    found = cached_model(net, spec, "float32")
    logits = OpenVinoNetwork(found.model, "float32")(window)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    entry_of(cache)


@posix
def test_the_cache_is_the_users_own(cache: Path) -> None:
    cached_model(*made(), "float32")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry_of(cache).stat().st_mode) == 0o700


@posix
def test_a_cache_open_to_others_is_closed(cache: Path, log: Callable[[], list[str]]) -> None:
    """Earlier releases made it with the user's umask."""
    cache.mkdir()
    cache.chmod(0o775)
    cached_model(*made(), "float32")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755
    assert len(log()) == 1
    cached_model(*made(), "float32")
    assert len(log()) == 1


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give away")
def test_a_cache_of_another_user_is_not_used(cache: Path) -> None:
    """Neither its entries nor the folder; the network runs nevertheless."""
    net, spec = made()
    cached_model(net, spec, "float32")
    entry = entry_of(cache)
    os.chown(cache, 12345, -1)
    edit_report(entry, label_agreement=0.125)
    with pytest.warns(UserWarning, match="belongs to another user"):
        found = cached_model(net, spec, "float32")
    assert found.agreement["label_agreement"] > 0.999


def test_without_room_it_runs_nevertheless(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing incomplete is left under the entry's name."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr("pipeline.inference.openvino_models._write_entry", full)
    net, spec = made()
    with pytest.warns(UserWarning, match="no space left"):
        found = cached_model(net, spec, "float32")
    assert found.agreement["label_agreement"] > 0.999
    assert list(cache.iterdir()) == []


def test_a_copied_entry_is_accepted(cache: Path, log: Callable[[], list[str]]) -> None:
    """It is its content that counts, not times or inodes."""
    net, spec = made()
    cached_model(net, spec, "float32")
    entry = entry_of(cache)
    shutil.copytree(entry, cache.parent / "copy")
    shutil.rmtree(entry)
    shutil.move(cache.parent / "copy", entry)
    cached_model(net, spec, "float32")
    assert not log()


def test_the_hash_of_weights_is_that_of_weights_and_spec() -> None:
    net, spec = made()
    other, _ = made(seed=1)
    assert weights_hash(net, spec) == weights_hash(made()[0], parse_spec())
    assert weights_hash(net, spec) != weights_hash(other, spec)
    assert weights_hash(net, spec) != weights_hash(net, parse_spec(overlap=0.25))


RELEASED = """
import gc, torch
from pipeline.inference import OpenVinoNetwork, convert_to_openvino, forks_can_compile
from phantom import parse_spec
from pipeline.networks import build_network
spec = parse_spec()
network = OpenVinoNetwork(convert_to_openvino(build_network(spec), spec), "float32")
assert forks_can_compile()
network(torch.zeros(1, 1, *spec.roi_size))
assert forks_can_compile()
del network
gc.collect()
assert not forks_can_compile()
"""


@pytest.mark.slow
def test_a_freed_model_makes_forks_unsafe() -> None:
    """OpenVINO would reuse its threads, which a forked process does not have."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", RELEASED], env=environment, check=True)


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container under a number that no table of users lists; nothing is written."""

    def without_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", without_home)
    network, spec = made()
    with pytest.warns(UserWarning, match=r"no cache there .*: the network is converted each time"):
        assert cached_model(network, spec, "float32").agreement is not None
