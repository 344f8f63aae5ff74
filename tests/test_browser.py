"""The interactive notebooks in JupyterLab, in a real browser: run whole, sliders moved, nothing fetched from elsewhere.

`make test-browser` runs these and says what is missing; without a Chromium `make test` skips them. Screenshots are kept
in executed/browser/.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "executed" / "browser"
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
LESSONS = {"teach_1_degrees_of_freedom": 4, "teach_2_grid_to_field": 4, "teach_3_attention": 5}  # and a cell with sliders
SIZES = {"wide": (1600, 1000), "laptop": (1100, 720)}


@pytest.fixture(scope="module", autouse=True)
def what_is_needed():
    missing = [] if CHROMIUM else ["chromium or google-chrome on the path"]
    missing += [f"the folder {name}/ (make lab fetches it)" for name in ("data", "checkpoints") if not (ROOT / name).is_dir()]
    if missing:
        say = pytest.fail if os.environ.get("GRIDREG_BROWSER") == "required" else pytest.skip
        say(f"for the tests in a browser there is no {' and no '.join(missing)}; this installs nothing by itself")


class Page:
    """A tab of a browser, driven through its DevTools protocol."""

    def __init__(self, url: str):
        from websocket import create_connection  # of JupyterLab's own requirements

        self.socket = create_connection(url, timeout=300, suppress_origin=True)
        self.count, self.requests = 0, []
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **arguments):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": arguments}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression: str):
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 60):
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.js(expression)
            if value:
                return value
            time.sleep(0.2)
        self.screenshot("failed")
        pytest.fail(f"not within {seconds:g} s: {expression}")

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        image = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        (SCREENSHOTS / f"{name}.png").write_bytes(image)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str, method: str = "GET", seconds: float = 60):
    end = time.monotonic() + seconds
    while True:
        try:
            return json.load(urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the repository, so that what Lab saves stays there; its address."""
    copy, port = tmp_path_factory.mktemp("lab") / "repository", free_port()
    copy.mkdir()
    for name in ("gridreg", "notebooks", "profiles"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "params.yaml", copy)
    for name in ("data", "checkpoints"):
        (copy / name).symlink_to((ROOT / name).resolve())
    home = copy.parent / "home"
    environment = os.environ | {"PYTHONPATH": str(copy), "HOME": str(home), "JUPYTER_PLATFORM_DIRS": "1"}
    options = [f"--port={port}", "--no-browser", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
               "--allow-root", f"--ServerApp.root_dir={copy}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, cwd=copy,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        get(f"{address}/api")
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(tmp_path):
    port = free_port()
    browser = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", f"--remote-debugging-port={port}", f"--user-data-dir={tmp_path}",
         "--disable-gpu-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking",
         "--no-first-run", "--window-size=1600,1000", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        yield Page(get(f"http://127.0.0.1:{port}/json/new?about:blank", "PUT")["webSocketDebuggerUrl"])
    finally:
        browser.terminate()
        browser.wait(30)


def run_whole(page: Page, lab: str, name: str) -> None:
    """Open a notebook and run all of it; no cell may end in an error."""
    page.resize(*SIZES["wide"])
    page.send("Page.navigate", url=f"{lab}/lab/tree/notebooks/{name}.ipynb?reset")
    page.until("Boolean(window.jupyterapp && jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel)", 120)
    page.until("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'", 120)
    page.js("jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = "jupyterapp.shell.currentWidget.content.model.sharedModel.cells.filter(c => c.cell_type == 'code')"
    page.until(f"{cells}.every(c => c.execution_count) && "
               "jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'", 180)  # fmt: skip
    errors = page.js(f"{cells}.flatMap(c => c.toJSON().outputs).filter(o => o.output_type == 'error').map(o => o.evalue)")
    assert errors == []


def show(page: Page, cell: int) -> None:
    """Scroll to a cell: Lab draws only what is near."""
    page.js(f"jupyterapp.shell.currentWidget.content.scrollToItem({cell}, 'start')")
    time.sleep(1)


def foreign(page: Page) -> list[str]:
    """Requests that left the machine."""
    local = ("127.0.0.1", "localhost", "")
    return [url for url in page.requests if urlparse(url).scheme in ("http", "https", "ws", "wss")
            and urlparse(url).hostname not in local]  # fmt: skip


IMAGE = "document.querySelector('img[alt^=\"axial\"]')"
CONTRAST = """(image => {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let low = 255, high = 0;
  for (let i = 0; i < pixels.length; i += 4) { low = Math.min(low, pixels[i]); high = Math.max(high, pixels[i]); }
  return high - low;
})"""


def test_the_quick_start_runs_and_shows_a_picture(page, lab):
    run_whole(page, lab, "quick_start")
    show(page, 6)
    assert page.until("document.querySelector('.jp-RenderedImage img')?.naturalWidth > 300")
    page.screenshot("quick_start")
    assert foreign(page) == []


def test_the_explorer_answers_to_sliders_keys_and_clicks(page, lab):
    run_whole(page, lab, "explore_uncertainty")
    show(page, 4)
    page.until(f"{IMAGE}?.naturalWidth > 600")
    assert page.js(f"{CONTRAST}({IMAGE})") > 200, "the picture is blank"
    for size, (width, height) in SIZES.items():
        page.resize(width, height)
        time.sleep(1)
        page.screenshot(f"explore_uncertainty_{size}")
        wide = page.js("document.documentElement.scrollWidth <= window.innerWidth")
        assert wide, f"the page is wider than the window at {width}×{height}"
    page.resize(*SIZES["wide"])
    show(page, 4)
    # by keyboard: the second slider is the first of the crosshair
    before = page.js(f"{IMAGE}.src")
    page.js("document.querySelectorAll('.widget-slider .noUi-handle')[1].focus()")
    page.key("ArrowRight", 39)
    page.until(f"{IMAGE}.src != '{before}' && {IMAGE}.complete && {IMAGE}.naturalWidth > 600", 10)
    # by mouse: a click in the first panel moves the crosshair
    numbers = "[...document.querySelectorAll('.widget-slider .widget-readout')].map(e => e.textContent).join()"
    values, before = page.js(numbers), page.js(f"{IMAGE}.src")
    box = page.js(f"(({{left, top, width, height}}) => [left, top, width, height])({IMAGE}.getBoundingClientRect())")
    page.click(box[0] + 0.08 * box[2], box[1] + 0.12 * box[3])
    page.until(f"{numbers} != '{values}' && {IMAGE}.src != '{before}'", 10)
    # another grid size registers anew
    before = page.js(f"{IMAGE}.src")
    page.js("document.querySelectorAll('.widget-slider .noUi-handle')[0].focus()")
    page.key("ArrowRight", 39)
    page.until(f"{IMAGE}.src != '{before}'", 10)
    page.screenshot("explore_uncertainty_moved")
    show(page, 8)
    page.until("document.querySelector('canvas')?.width > 100")
    page.screenshot("explore_uncertainty_3d")
    assert foreign(page) == []


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_its_first_slider_changes_the_picture(page, lab, name):
    run_whole(page, lab, name)
    show(page, LESSONS[name])
    pictures = "[...document.querySelectorAll('.jp-OutputArea-output img')].map(e => e.src).join()"
    page.until(f"{pictures}.length > 1000")
    before = page.js(f"({pictures}).length + ({pictures}).slice(-4000)")
    page.js("document.querySelector('.widget-slider .noUi-handle').focus()")
    page.key("ArrowRight", 39)
    page.until(f"({pictures}).length + ({pictures}).slice(-4000) != {json.dumps(before)}", 20)
    page.screenshot(name)
    assert foreign(page) == []
