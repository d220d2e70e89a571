"""Chromium without a window, driven through a pipe by the DevTools protocol, as much as tests of pages need."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# As root, or in a container, Chromium cannot set up its sandbox.
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)


@dataclass
class Visit:
    """What happened while a page was open."""

    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # console messages of errors, exceptions
    values: list[Any] = field(default_factory=list)  # of the expressions


class Browser:
    """One process; its pipes are file descriptors 3 (to it) and 4 (from it), messages end with a zero byte."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise EOFError("Chromium has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Result of a command; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Until an event has come."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def visit(self, page: Path | str, width: int, scheme: str, expressions: list[str]) -> Visit:
        """Open a file or an address in a window of `width` px, in the colour scheme "light" or "dark"; promises are
        awaited."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme_feature = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", session, features=scheme_feature)
        self.call("Page.navigate", session, url=page if isinstance(page, str) else page.resolve().as_uri())
        self.wait_for("Page.loadEventFired")
        visit = Visit()
        for expression in expressions:
            options = {"returnByValue": True, "awaitPromise": True}
            result = self.call("Runtime.evaluate", session, expression=expression, **options)
            visit.values.append(result["result"].get("value"))
        for event in self.events:
            params = event.get("params", {})
            match event.get("method"):
                case "Network.requestWillBeSent":
                    visit.requests.append(params["request"]["url"])
                case "Runtime.exceptionThrown":
                    visit.problems.append(str(params["exceptionDetails"]))
                case "Runtime.consoleAPICalled" | "Log.entryAdded":
                    visit.problems.append(str(params.get("entry", params)))
        self.call("Target.closeTarget", targetId=target)
        return visit


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start CHROMIUM with an empty profile."""
    to_it, write = os.pipe()
    read, from_it = os.pipe()
    script = (
        'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'  # of bash: dash knows file descriptors of one digit only
    )
    command = ["bash", "-c", script, "-", str(to_it), str(from_it), str(CHROMIUM), *OPTIONS]
    with open(profile.parent / "chromium.log", "wb") as log:
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}"], pass_fds=(to_it, from_it), stdout=log, stderr=log
        )
    os.close(to_it)
    os.close(from_it)
    browser = Browser(write, read)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        os.close(write)
        os.close(read)
        process.kill()
        process.wait()
