"""The notebooks in JupyterLab, in a real browser without a network: run whole, sliders moved, pictures changed.

`make test-browser` runs these and says what is missing; without a Chromium `make test` skips them. Screenshots are kept
in executed/browser/.
"""

from __future__ import annotations

import base64
import io
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

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "executed" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
LESSONS = {"teach_1_degrees_of_freedom": [4], "teach_2_grid_to_field": [4, 9, 13, 16], "teach_3_attention": [5, 10]}  # cells
SIZES = {"wide": (1600, 1000), "laptop": (1366, 768)}


@pytest.fixture(scope="module", autouse=True)
def what_is_needed():
    missing = [] if CHROMIUM else [f"browser on the path ({', '.join(BROWSERS)})"]
    missing += [f"folder {name}/ (`make lab` fetches it)" for name in ("data", "checkpoints") if not (ROOT / name).is_dir()]
    if missing:
        say = pytest.fail if os.environ.get("GRIDREG_BROWSER") == "required" else pytest.skip
        say(f"found no {' and no '.join(missing)}; expected it for the tests in a browser, which install nothing")
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)


class Page:
    """A tab of a browser, driven through its DevTools protocol."""

    def __init__(self, url: str):
        from websocket import create_connection  # of JupyterLab's own requirements

        self.socket = create_connection(url, timeout=300, suppress_origin=True)
        self.count, self.requests = 0, []
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)  # Lab's current notebook is the one in focus

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
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, x: float, y: float, by: float) -> None:
        steps = [("mousePressed", x), ("mouseMoved", x + by / 2), ("mouseMoved", x + by), ("mouseReleased", x + by)]
        for kind, at in steps:
            self.send("Input.dispatchMouseEvent", type=kind, x=at, y=y, button="left", buttons=1, clickCount=1)

    def pixels(self, element: str) -> np.ndarray:
        """(height, width, 3) what is seen of an element, whatever draws it."""
        left, top, width, height = self.js(f"(b => [b.left, b.top, b.width, b.height])({element}.getBoundingClientRect())")
        clip = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", clip=clip)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))

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
    """JupyterLab on a copy of the repository, so that what Lab saves stays there: its address, and the copy."""
    copy, port = tmp_path_factory.mktemp("lab") / "repository", free_port()
    copy.mkdir()
    for name in ("gridreg", "notebooks", "profiles"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "params.yaml", copy)
    for name in ("data", "checkpoints"):
        (copy / name).symlink_to((ROOT / name).resolve())
    settings = copy.parent / "settings"
    news = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')  # else Lab asks whether it may, over the pictures
    environment = os.environ | {"PYTHONPATH": str(copy), "HOME": str(copy.parent / "home"), "JUPYTER_PLATFORM_DIRS": "1",
                                "JUPYTERLAB_SETTINGS_DIR": str(settings)}  # fmt: skip
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={copy}",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with open(copy.parent / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, cwd=copy, stdout=log,
                                  stderr=log)  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        get(f"{address}/api")
        yield address, copy
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(tmp_path):
    port = free_port()
    browser = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", f"--remote-debugging-port={port}", f"--user-data-dir={tmp_path}",
         "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking", "--no-first-run",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        yield Page(get(f"http://127.0.0.1:{port}/json/new?about:blank", "PUT")["webSocketDebuggerUrl"])
    finally:
        browser.terminate()
        browser.wait(30)


NOTEBOOK = "jupyterapp.shell.currentWidget"
IDLE = f"{NOTEBOOK}.sessionContext.session.kernel.status == 'idle'"


def open_notebook(page: Page, lab: tuple[str, Path], name: str) -> None:
    """Open a notebook, and wait for its kernel."""
    page.resize(*SIZES["wide"])
    page.send("Page.navigate", url=f"{lab[0]}/lab/tree/notebooks/{name}.ipynb?reset")
    page.until(f"window.jupyterapp && {NOTEBOOK}?.context?.path == 'notebooks/{name}.ipynb'", 120)
    page.until(f"{NOTEBOOK}.sessionContext?.session?.kernel && {IDLE}", 120)


def run_whole(page: Page, lab: tuple[str, Path], name: str) -> None:
    """Open a notebook and run all of it; no cell may end in an error."""
    open_notebook(page, lab, name)
    page.js("jupyterapp.commands.execute('notebook:run-all-cells') && true")
    cells = f"{NOTEBOOK}.content.model.sharedModel.cells.filter(c => c.cell_type == 'code')"
    page.until(f"{cells}.every(c => c.execution_count) && {IDLE}", 180)
    errors = page.js(f"{cells}.flatMap(c => c.toJSON().outputs).filter(o => o.output_type == 'error').map(o => o.evalue)")
    assert errors == []


def show(page: Page, cell: int) -> None:
    """Scroll to a cell: Lab draws only what is near."""
    page.js(f"{NOTEBOOK}.content.scrollToItem({cell}, 'start') && true")
    time.sleep(1)


def fits(page: Page, name: str, cell: int) -> None:
    """A cell at both window sizes: a screenshot of each, and nothing wider than the window."""
    for size, (width, height) in SIZES.items():
        page.resize(width, height)
        show(page, cell)
        page.screenshot(f"{name}_{cell}_{size}")
        assert page.js("document.documentElement.scrollWidth <= window.innerWidth"), f"wider than {width}×{height}"
    page.resize(*SIZES["wide"])
    show(page, cell)


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
    fits(page, "explore_uncertainty", 4)

    def changes(act) -> None:
        before = page.js(f"{IMAGE}.src")
        act()
        page.until(f"{IMAGE}.src != '{before}' && {IMAGE}.complete && {IMAGE}.naturalWidth > 600", 60)
        assert page.js(f"{CONTRAST}({IMAGE})") > 200, "the picture is blank"

    def press(selector: str, number: int, key: str, code: int) -> None:
        page.js(f"document.querySelectorAll('{selector}')[{number}].focus()")
        page.key(key, code)
        assert page.js(f"document.activeElement == document.querySelectorAll('{selector}')[{number}]"), "Lab took the key"

    handles, menus = ".widget-slider .noUi-handle", ".widget-dropdown select"
    changes(lambda: press(menus, 0, "ArrowDown", 40))  # another dataset
    changes(lambda: press(menus, 1, "ArrowDown", 40))  # another pair
    changes(lambda: press(handles, 0, "ArrowRight", 39))  # another grid: registered anew
    for axis in (1, 2, 3):
        changes(lambda axis=axis: press(handles, axis, "ArrowRight", 39))  # the crosshair
    changes(lambda: press(handles, 5, "ArrowRight", 39))  # the map over the images
    changes(lambda: press(menus, 2, "ArrowDown", 40))  # the third column: a checkerboard
    changes(lambda: press(menus, 3, "ArrowDown", 40))  # another map
    changes(lambda: press(menus, 4, "ArrowDown", 40))  # arrows
    changes(lambda: press(menus, 2, "End", 35))  # posterior samples,
    changes(lambda: press(handles, 4, "ArrowRight", 39))  # the next of them,
    changes(lambda: page.js("document.querySelector('.jupyter-widgets .fa-play').closest('button').click()"))  # played
    page.js("document.querySelector('.jupyter-widgets .fa-stop').closest('button').click()")
    page.screenshot("explore_uncertainty_sample")
    # a click in the first panel moves the crosshair
    numbers = "[...document.querySelectorAll('.widget-slider .widget-readout')].slice(1, 4).map(e => e.textContent).join()"
    values = page.js(numbers)
    left, top, width, height = page.js(f"(b => [b.left, b.top, b.width, b.height])({IMAGE}.getBoundingClientRect())")
    changes(lambda: page.click(left + 0.08 * width, top + 0.12 * height))
    assert page.js(numbers) != values
    page.js("document.querySelector('.widget-checkbox input').click()")  # error against σ
    page.until("document.querySelector('.widget-image')?.naturalWidth > 600", 20)
    page.screenshot("explore_uncertainty_errors")
    page.js("document.querySelector('.jupyter-button .fa-save').closest('button').click()")
    page.until("document.body.innerText.includes('written: explored/warped.nii.gz')", 60)
    assert (lab[1] / "explored" / "displacement.nii.gz").is_file()
    show(page, 8)
    page.until("document.querySelector('canvas')?.width > 100")
    time.sleep(3)
    before = page.pixels("document.querySelector('canvas')")
    assert before.std() > 20 and len(np.unique(before.reshape(-1, 3), axis=0)) > 100, "the view in 3-D is blank"
    left, top, width, height = page.js("(b => [b.left, b.top, b.width, b.height])(document.querySelector('canvas').getBoundingClientRect())")
    page.drag(left + 0.15 * width, top + 0.3 * height, 0.06 * width)
    time.sleep(2)
    assert np.abs(page.pixels("document.querySelector('canvas')").astype(float) - before).mean() > 1, "it does not answer"
    page.screenshot("explore_uncertainty_3d")
    assert foreign(page) == []


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_every_picture_with_sliders_answers(page, lab, name):
    run_whole(page, lab, name)
    for cell in LESSONS[name]:
        show(page, cell)
        node = f"{NOTEBOOK}.content.widgets[{cell}].node"
        image = f"{node}.querySelector('.jp-OutputArea-output img')"
        page.until(f"{image}?.naturalWidth > 400")
        assert page.js(f"{CONTRAST}({image})") > 150, f"cell {cell}: the picture is blank"
        before = page.js(f"{image}.src")
        page.js(f"{node}.querySelector('.widget-slider .noUi-handle').focus()")
        page.key("ArrowRight", 39)
        assert page.js("document.activeElement.classList.contains('noUi-handle')"), "Lab took the key"
        page.until(f"{image}.src != {json.dumps(before)} && {image}.naturalWidth > 400", 60)
        assert page.js(f"{CONTRAST}({image})") > 150, f"cell {cell}: the picture is blank after a change"
        fits(page, name, cell)
    assert foreign(page) == []


def test_a_notebook_that_is_opened_and_left_unsaved_has_not_changed(page, lab):
    for path in sorted((lab[1] / "notebooks").glob("*.ipynb")):
        open_notebook(page, lab, path.stem)
        assert not page.js(f"{NOTEBOOK}.context.model.dirty"), f"{path.name}: opening it changed it"
        assert path.read_bytes() == (ROOT / "notebooks" / path.name).read_bytes()
