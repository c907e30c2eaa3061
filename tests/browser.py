"""A browser that tests drive: Chromium over its debugging protocol."""

import base64
import json
import subprocess
import time
from contextlib import contextmanager

from websockets.sync.client import connect

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)  # fmt: skip
TIMEOUT_S = 90.0


class Browser:
    """One page. What it wrote to its console, errors of scripts and of the network included, is in `console`."""

    def __init__(self, link):
        self._link, self._number = link, 0
        self.console = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Send a command and return its result."""
        self._number += 1
        self._link.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._link.recv(timeout=TIMEOUT_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):  # fmt: skip
                self.console.append(json.dumps(message["params"]))

    def run(self, script):
        """Return the value of an expression; a promise is awaited."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition):
        """Wait until an expression is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.05)

    def look(self, width=1280, height=900, scheme="light"):
        """Set the size of the window and the colours that the user prefers."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])  # fmt: skip

    def open(self, url):
        """Go to an address and wait until it is loaded."""
        self.send("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")  # fmt: skip

    def screenshot(self, path):
        """Write a picture of the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browsing(chromium, folder):
    """Give a browser with a profile of its own in `folder`."""
    profile = folder / "profile"
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with (folder / "chromium.log").open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + TIMEOUT_S
        while not port_file.exists() or len(port_file.read_text().split()) < 2:
            assert process.poll() is None, (folder / "chromium.log").read_text()
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        port, path = port_file.read_text().split()[:2]
        address = f"ws://127.0.0.1:{port}"
        with connect(address + path, max_size=None) as link:
            link.send(json.dumps({"id": 0, "method": "Target.getTargets"}))
            while (message := json.loads(link.recv(timeout=TIMEOUT_S))).get("id") != 0:
                pass
        (page,) = [t for t in message["result"]["targetInfos"] if t["type"] == "page"]
        with connect(f"{address}/devtools/page/{page['targetId']}", max_size=None) as link:
            yield Browser(link)
    finally:
        process.terminate()
        process.wait(timeout=30)
