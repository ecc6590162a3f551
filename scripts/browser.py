"""Chromium without a window, driven by the Chrome DevTools protocol; for tests and screenshots."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # root has none
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    # WebGL 2 on the processor
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)
LOCAL = ("file:", "data:", "blob:", "about:", "http://127.0.0.1:")


def find_chromium() -> str | None:
    """Return the path of Chromium, None where it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a browser.

    Attributes:
        problems: errors of scripts and of the console, and blocked or failed requests.
        requests: addresses that the page asked for.
    """

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._number = connection, 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv(timeout=120))
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, facts = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif method == "Network.loadingFailed" and not facts.get("canceled"):
            self.problems.append(f"request failed: {facts.get('errorText')}")
        elif method == "Runtime.exceptionThrown":
            details = facts["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description", details)))
        elif method == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.problems.append(f"{facts['entry']['text']} {facts['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "assert"):
            self.problems.append(str([item.get("value") for item in facts["args"]]))

    def open(self, url: str) -> None:
        """Go to an address and wait until the page is loaded."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of a script, of which a promise is awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until a script is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {condition}; {self.problems}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key, such as `p` or `ArrowDown`."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def click(self, selector: str) -> None:
        """Click on the middle of an element."""
        box = self.run(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({ block: 'nearest', inline: 'nearest' });"
            "const box = found.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.click_at(*box)

    def click_at(self, x: float, y: float) -> None:
        """Click on a place of the window."""
        place = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def type(self, text: str) -> None:
        """Type a text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window and the scheme of colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, *, image_format: str = "png", **options: Any) -> bytes:
        """Return a picture of the window."""
        shot = self.call("Page.captureScreenshot", format=image_format, **options)
        return base64.b64decode(shot["data"])

    def foreign_requests(self) -> list[str]:
        """Return the requests that left this machine or its files."""
        return [url for url in self.requests if not url.startswith(LOCAL)]


@contextmanager
def open_page(*, downloads: Path | None = None) -> Iterator[Page]:
    """Yield an empty page of a browser with a profile of its own.

    Args:
        downloads: folder for files that the page saves; none are saved by default.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    path = find_chromium()
    if path is None:
        raise FileNotFoundError("chromium is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(profile), process), max_size=None) as browser:
                yield _new_page(browser, downloads)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the address of the browser's protocol, once it has written it."""
    file = profile / "DevToolsActivePort"
    for _ in range(600):
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if process.poll() is not None:
            raise RuntimeError(f"chromium ended with status {process.returncode}")
        time.sleep(0.05)
    raise TimeoutError("chromium has not started")


class _Session:
    """A connection to the browser that speaks to one of its pages."""

    def __init__(self, browser: ClientConnection, session: str) -> None:
        self.browser, self.session = browser, session

    def send(self, text: str) -> None:
        """Send a command to the page."""
        self.browser.send(json.dumps({**json.loads(text), "sessionId": self.session}))

    def recv(self, timeout: float) -> str | bytes:
        """Return the next message."""
        return self.browser.recv(timeout=timeout)


def _new_page(browser: ClientConnection, downloads: Path | None) -> Page:
    def ask(number: int, method: str, **parameters: Any) -> dict[str, Any]:
        browser.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(browser.recv(timeout=60))
            if answer.get("id") == number:
                return dict(answer["result"])

    if downloads is not None:
        ask(
            900001,
            "Browser.setDownloadBehavior",
            behavior="allow",
            downloadPath=str(downloads),
        )
    target = ask(900002, "Target.createTarget", url="about:blank")["targetId"]
    session = ask(900003, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    return Page(_Session(browser, session))  # type: ignore[arg-type]
