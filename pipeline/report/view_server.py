"""A server for the viewer of one scan, for this machine only."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from pipeline.io import label_table, labels_of_values, printable
from pipeline.report.batch_page import page_files
from pipeline.report.payload import payload
from pipeline.report.shown_volume import shown_volume
from pipeline.report.viewer_volume import viewer_volume

HOST = "127.0.0.1"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
PAGES = ("view.html", "view.js", "viewer.js", "report.css", "niivue.js")
HEADERS = {
    # no connection but to this server, which gives scripts, styles and nothing else
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data: blob:; connect-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ViewServer(ThreadingHTTPServer):
    """Serves one page on the loopback interface, at an address that nobody can guess.

    Other users of the machine can connect to the port; they lack the token in the address. A page
    of another site can send the browser here under a name of its own; the name of the host is
    checked.

    Attributes:
        url: address of the page.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes], port: int = 0) -> None:
        """Listen on a port.

        Args:
            files: name → content, of which `view.html` is the page.
            port: 0 for one that is free.
        """
        super().__init__((HOST, port), _Handler)
        self.token = secrets.token_urlsafe(16)
        self.hosts = {f"{name}:{self.server_address[1]}" for name in (HOST, "localhost")}
        self.files = {f"/{self.token}/{name}": content for name, content in files.items()}
        self.files[f"/{self.token}/"] = files["view.html"]
        self.url = f"http://{HOST}:{self.server_address[1]}/{self.token}/"


def view_files(scan: Path, labels: Path | None = None, *, volume: int | None = None) -> ViewServer:
    """Return a server, not yet serving, for a scan and a label map.

    Args:
        scan: image file.
        labels: label map in the same world space; None for none.
        volume: number of the volume in a 4D file, from 0; None for the first.

    Raises:
        PipelineError: a file cannot be read.
    """
    shown = shown_volume(scan, labels, volume=volume, whole_head=True)
    table = label_table(labels_of_values(np.unique(shown.labels).tolist()))
    # the loopback interface is fast, so that nothing is left out
    content = viewer_volume(shown, table, max_bytes=None)
    return view_server(
        printable(scan.name), printable(labels.name) if labels is not None else "", content
    )


def view_server(title: str, subtitle: str, content: Mapping[str, object]) -> ViewServer:
    """Return a server, not yet serving, for one scan.

    Args:
        title: name of the scan.
        subtitle: name of the label map.
        content: from `viewer_volume`.

    Raises:
        OSError: no port is free.
    """
    data = payload("view", {"title": title, "subtitle": subtitle, **content})
    return ViewServer({**dict(page_files(PAGES)), "data.js": data})


class _Handler(BaseHTTPRequestHandler):
    """Answers requests for the files of a `ViewServer`."""

    server: ViewServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Send a file."""
        content = self.server.files.get(self.path)
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(403, "text/plain", b"another host was asked for\n")
        elif content is None:
            self._answer(404, "text/plain", b"no such file\n")
        else:
            ending = self.path.rsplit(".", 1)[-1]
            self._answer(200, TYPES.get(ending, "text/html"), content)

    def do_HEAD(self) -> None:
        """Send the header of a file."""
        self.do_GET()

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def version_string(self) -> str:
        return "volseg"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: each request is the user's own."""
