"""A real headless browser without a library: Chromium's DevTools protocol over two pipes.

Any member of the family will do (Debian: `apt-get install chromium-headless-shell`); the variable
CHROMIUM names one that is not on the PATH. Clicks and keys are given to the browser as input
events, so what is hidden or covered cannot be clicked.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome",
         "microsoft-edge")


def find_browser() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page in one browser. `errors`: uncaught exceptions and console errors; `requests`: URLs.

    Raises RuntimeError when the page throws in `js`, TimeoutError when nothing comes back.
    """

    def __init__(self, binary: str, profile, width: int = 1440, height: int = 1000):
        self.errors, self.requests, self.number, self.buffer = [], [], 0, b""
        orders, self.write = os.pipe()
        self.read, answers = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        command = ('exec "$@" 3<&%d 4>&%d' % (orders, answers))
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", binary, "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(orders, answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(orders)
        os.close(answers)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.write)  # Chromium ends when its pipe does
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.read)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._event(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, seconds: float = 120.0) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(end - time.monotonic(), 0))[0]:
                raise TimeoutError(f"the browser has not answered for {seconds} s")
            data = os.read(self.read, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _event(self, event: dict) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def js(self, expression: str):
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def open(self, path, ready: str, seconds: float = 60.0) -> None:
        """Open a file and wait until the expression `ready` is true."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({ready})"):
            if time.monotonic() > end:
                raise TimeoutError(f"{path}: {ready} has not come true; errors: {self.errors}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Scroll the element into view and click in the middle of it, as a hand would."""
        x, y = self.js(f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "center"}});
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key by its name: ArrowDown, Tab, Enter."""
        code = {"Tab": 9, "Enter": 13, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
                "ArrowRight": 39, "ArrowDown": 40}[key]
        typed = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code, **(typed if kind == "keyDown" else {}))

    def screenshot(self, path, full: bool = False) -> None:
        options = {"captureBeyondViewport": True} if full else {}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {**size, "scale": 1}
        path.write_bytes(base64.b64decode(
            self.call("Page.captureScreenshot", format="png", **options)["data"]))
