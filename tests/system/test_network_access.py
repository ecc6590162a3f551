"""Segmentation uses no network: the system calls of a whole run show it."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system
ADDRESS = re.compile(r'sa_family=AF_INET6?,.*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')


@pytest.fixture
def strace() -> str:
    """The path of strace."""
    path = shutil.which("strace")
    if path is None:
        pytest.skip("strace is not installed: scripts/test-system installs it")
    return path


def internet_addresses(trace: str) -> set[str]:
    """Return the addresses other than loopback that strace's output has a connection to."""
    found = set(ADDRESS.findall(trace))
    return {address for address in found if not ipaddress.ip_address(address).is_loopback}


@pytest.mark.parametrize(
    ("call", "addresses"),
    [
        ('connect(3, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0', set()),
        (
            "connect(3, {sa_family=AF_INET, sin_port=htons(80), "
            'sin_addr=inet_addr("127.0.0.1")}, 16) = 0',
            set(),
        ),
        (
            "connect(3, {sa_family=AF_INET, sin_port=htons(53), "
            'sin_addr=inet_addr("192.0.2.7")}, 16) = 0',
            {"192.0.2.7"},
        ),
        (
            "connect(4, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), "
            'inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = 0',
            {"2001:db8::1"},
        ),
    ],
)
def test_addresses_are_found_in_a_trace(call: str, addresses: set[str]) -> None:
    assert internet_addresses(call) == addresses


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_segment_runs_without_a_network(
    tiny_bundle_3d: Path, volume_file: Path, tmp_path: Path
) -> None:
    """In a network namespace of its own there is nothing but loopback, and an empty cache."""
    without_network = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    for program in ("unshare", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    tried = subprocess.run([*without_network, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"unshare -rn is not permitted here: {tried.stderr.strip()}")
    command = [sys.executable, "-m", "pipeline.cli", "segment", str(volume_file)]
    options = ["-o", str(tmp_path / "out"), "-b", str(tiny_bundle_3d), "--device", "cpu"]
    done = subprocess.run(
        [*without_network, *command, *options],
        env=os.environ | {"VOLSEG_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sub-01_T1w_seg.nii.gz").is_file()
    assert any((tmp_path / "cache").iterdir()), "OpenVINO converted nothing"


def test_segment_connects_to_no_internet_address(
    strace: str, tiny_bundle_3d: Path, volume_file: Path, tmp_path: Path
) -> None:
    """Name servers count too: a look-up is a connection."""
    trace = tmp_path / "trace.txt"
    watch = [strace, "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace)]
    segment = ["segment", str(volume_file), "-o", str(tmp_path / "out")]
    options = ["--bundle", str(tiny_bundle_3d), "--device", "cpu"]
    command = [*watch, sys.executable, "-m", "pipeline.cli", *segment, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sub-01_T1w_seg.nii.gz").is_file()
    assert internet_addresses(trace.read_text()) == set()
