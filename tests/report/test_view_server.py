"""The server of `volseg view`: this machine only, these files only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from phantom import save
from report_batch import head

from pipeline.cli import main
from pipeline.errors import ReadError
from pipeline.report import ViewServer, view_files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ViewServer]:
    """A server that serves one scan with its labels."""
    scan, labels = head()
    files = save(tmp_path / "<b>scan.nii.gz", scan), save(tmp_path / "labels.nii.gz", labels)
    found = view_files(*files)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@dataclass(frozen=True)
class Answer:
    """What a server answers."""

    status: int
    headers: dict[str, str]
    content: bytes


def ask(server: ViewServer, path: str, method: str = "GET", host: str = "") -> Answer:
    """Return the answer to a request."""
    with closing(HTTPConnection("127.0.0.1", server.server_port, timeout=10)) as connection:
        connection.request(method, path, headers={"Host": host} if host else {})
        with connection.getresponse() as answer:
            return Answer(answer.status, dict(answer.getheaders()), answer.read())


def test_it_serves_the_page_and_its_files(server: ViewServer) -> None:
    path = urlsplit(server.url).path
    page = ask(server, path)
    assert page.status == 200
    assert "connect-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["Server"] == "volseg"
    assert b"Research use only" in page.content
    data = ask(server, f"{path}data.js").content
    assert data.startswith(b"volseg.receive(")
    assert b"<" not in data
    assert ask(server, f"{path}niivue.js").headers["Content-Type"].startswith("text/javascript")


def test_it_listens_on_the_loopback_interface_only(server: ViewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert urlsplit(server.url).hostname == "127.0.0.1"


@pytest.mark.parametrize(
    "path", ["/", "/data.js", "/{token}/../data.js", "/{token}//etc/passwd", "/{token}/report.js"]
)
def test_it_serves_nothing_else(server: ViewServer, path: str) -> None:
    assert ask(server, path.replace("{token}", server.token)).status == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil:80"])
def test_another_host_is_refused(server: ViewServer, host: str) -> None:
    """The site of an attacker can have its name resolve to 127.0.0.1."""
    assert ask(server, urlsplit(server.url).path, host=host).status == 403


def test_it_is_read_only(server: ViewServer) -> None:
    path = urlsplit(server.url).path
    assert ask(server, path, "POST").status == 501
    assert ask(server, path, "HEAD").status == 200


def test_tokens_differ(tmp_path: Path) -> None:
    scan = save(tmp_path / "scan.nii.gz", head()[0])
    servers = [view_files(scan), view_files(scan)]
    for item in servers:
        item.server_close()
    assert len({item.token for item in servers}) == 2
    assert len(servers[0].token) >= 20


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="no such file"):
        view_files(tmp_path / "none.nii.gz")
    wrong = CliRunner().invoke(main, ["view", str(tmp_path / "none.nii.gz")])
    assert wrong.exit_code == 2
    assert "no such file" in wrong.output
