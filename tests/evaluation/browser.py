"""Chromium without a window, driven through a pipe by the DevTools protocol, as much as tests of pages need."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
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


KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}  # virtual key codes
MOST_KEYS = 40  # that lead to something
# axe-core: what is wrong with a page, but for trifles.
AUDIT = (
    (resources.files("axe_core_python") / "axe.min.js").read_text()
    + """;
(async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
  .filter((each) => each.impact != "minor")
  .map((each) => `${each.impact} ${each.id}: ${each.nodes.map((node) => node.target.join(" ")).join(", ")}`))()"""
)


@dataclass(frozen=True)
class Typed:
    """A key of KEYS, or a text, that is typed once, or until an expression of the page is true."""

    key: str
    until: str = "true"


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

    def evaluate(self, session: str, expression: str) -> Any:
        """Value of an expression of the page; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", session, expression=expression, **options)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def type(self, session: str, typed: Typed) -> None:
        """Press and release a key, or insert a text."""
        for _ in range(MOST_KEYS):
            if typed.key in KEYS:
                names = {"key": typed.key, "code": typed.key, "windowsVirtualKeyCode": KEYS[typed.key]}
                text = {"text": "\r"} if typed.key == "Enter" else {}
                self.call("Input.dispatchKeyEvent", session, type="keyDown", **names, **text)
                self.call("Input.dispatchKeyEvent", session, type="keyUp", **names)
            else:
                self.call("Input.insertText", session, text=typed.key)
            if self.evaluate(session, typed.until):
                return
        raise AssertionError(f"{typed.key} was pressed {MOST_KEYS} times, and not {typed.until}")

    def visit(self, page: Path | str, width: int, scheme: str, steps: list[str | Typed]) -> Visit:
        """Open a file or an address in a window of `width` px, in the colour scheme "light" or "dark"; type, and
        evaluate expressions, whose promises are awaited."""
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
        for step in steps:
            if isinstance(step, Typed):
                self.type(session, step)
            else:
                visit.values.append(self.evaluate(session, step))
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
