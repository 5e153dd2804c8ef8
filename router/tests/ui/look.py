"""Looks at the page with Chromium over the DevTools protocol, and fails when it does not show what it should.

python3 look.py URL SIZE ARTIFACTS WORK

Writes screenshots to ARTIFACTS, and WORK/stopSIZE when the router may end; the page must tell that it did.
"""

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time

PATIENCE_S = 30


class Browser:
    """Chromium, spoken to through two pipes: messages end with a zero byte."""

    def __init__(self, work):
        name = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
        if name is None:
            sys.exit("no chromium found")
        to_read, self.to = os.pipe()
        self.back, back_write = os.pipe()

        def arrange():
            # Chromium reads commands from 3 and writes answers to 4.
            first, second = os.dup(to_read), os.dup(back_write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self.process = subprocess.Popen(
            [
                name, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                "--no-first-run", "--disable-extensions", "--disable-background-networking", "--force-color-profile=srgb",
                f"--user-data-dir={work}/profile", "--remote-debugging-pipe", "about:blank",
            ],
            preexec_fn=arrange, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(back_write)
        self.number = 0
        self.buffer = b""
        self.complaints = []
        self.session = None

    def message(self, deadline):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.back, 1 << 20) if ready else b""
            if not data:
                sys.exit("the browser does not answer")
            self.buffer += data
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **parameters):
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.to, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            message = self.message(deadline)
            if message.get("id") == self.number:
                if "error" in message:
                    sys.exit(f"{method}: {message['error']}")
                return message["result"]
            self.event(message)

    def event(self, message):
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(parameters["entry"]))

    def open(self, url, width, height):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        self.call("Page.navigate", url=url)

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            sys.exit(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, what, expression):
        deadline = time.monotonic() + PATIENCE_S
        while not self.value(expression):
            if time.monotonic() > deadline:
                sys.exit(f"the page never showed: {what}\n{self.value('document.body.innerText')}")
            time.sleep(0.1)

    def picture(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        pathlib.Path(path).write_bytes(base64.b64decode(data))

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def end(self):
        self.process.terminate()
        self.process.wait()


def look(browser, url, size, artifacts, work):
    browser.open(f"{url}/ui", 1280, 800)
    rows, columns = size, size + 1
    # One decode worker of the fleet is down.
    browser.until("contact", "document.getElementById('contact')?.textContent === 'live'")
    cells = "document.querySelectorAll('#matrix tbody td')"
    browser.until("the matrix", f"{cells}.length === {rows * columns}")
    browser.until("workers", f"document.querySelectorAll('#prefills tbody tr, #decodes tbody tr').length === {rows + columns}")
    browser.until("a worker that is down", "[...document.querySelectorAll('#decodes .bad')].some((e) => e.textContent === 'not ready')")
    browser.until("requests per second", "parseFloat(document.querySelector('#figures dd').textContent) > 0")
    browser.until("times", "document.querySelectorAll('#histogram rect.now').length > 5 && document.querySelectorAll('#histogram line.mark').length === 3")
    # The state itself, to compare the page with.
    browser.until(
        "the same backlog as the state",
        f"[...{cells}].filter((cell) => !cell.classList.contains('none')).length > {rows // 2}",
    )
    wide = browser.value("document.documentElement.scrollWidth")
    if wide > 1280:
        sys.exit(f"the page is {wide} pixels wide")
    # By keyboard alone: into the matrix, to the right, and down.
    browser.value("document.querySelector('#matrix td[tabindex=\"0\"]').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowDown")
    browser.until("the pair under the keys", "document.activeElement.dataset.p === '1' && document.activeElement.dataset.d === '1'")
    browser.until("all about it", "/queued.*in flight.*requests/.test(document.getElementById('pair').textContent)")
    for measure in ("bandwidth", "requests", "backlog"):
        browser.value(f"document.querySelector('#measures [value={measure}]').click()")
    browser.value("document.activeElement.blur()")
    time.sleep(6)
    name = "ui" if size == 2 else f"ui-{size}"
    browser.picture(f"{artifacts}/{name}.png")
    if size == 2:
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        dark = "getComputedStyle(document.body).backgroundColor"
        browser.until("dark", f"{dark} === 'rgb(16, 20, 24)'")
        browser.picture(f"{artifacts}/{name}-dark.png")
    if browser.complaints:
        sys.exit("the browser complains:\n" + "\n".join(browser.complaints))
    pathlib.Path(f"{work}/stop{size}").touch()
    browser.until("that the router is gone", "/no contact for/.test(document.getElementById('contact').textContent)")
    browser.until("that its numbers are old", "document.body.classList.contains('stale')")


def main():
    url, size, artifacts, work = sys.argv[1:]
    browser = Browser(f"{work}/{size}")
    try:
        look(browser, url, int(size), artifacts, work)
    finally:
        browser.end()


main()
