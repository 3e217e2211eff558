"""A headless Chromium, driven through its debugging port: pages as a phone or a desk shows them."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from websocket import create_connection

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One page. width: of the window in CSS pixels; below 600 it is a phone's, which obeys the page's viewport."""

    def __init__(self, address: str):
        self.socket, self.count = create_connection(address, timeout=120, suppress_origin=True), 0

    def __call__(self, method: str, **params) -> dict:
        """A command of the DevTools protocol → its result."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, height: int = 844) -> None:
        phone = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self("Page.navigate", url=page.resolve().as_uri())
        while self.value("document.readyState") != "complete" or self.value("location.protocol") != "file:":
            time.sleep(0.05)

    def value(self, script: str):
        """What a script gives, as JSON; a promise is waited for."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """profile: an empty folder for the browser's files."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen([*command, f"--user-data-dir={profile}"], stderr=subprocess.DEVNULL)
    try:
        yield Tab(_address(profile / "DevToolsActivePort"))
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(port: Path, seconds: float = 60) -> str:
    """Of the first page, once the browser has written its port."""
    for _ in range(round(seconds / 0.1)):
        if port.exists() and (lines := port.read_text().splitlines()):
            pages = json.load(urlopen(f"http://127.0.0.1:{lines[0]}/json/list"))
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise TimeoutError("the browser did not start")
