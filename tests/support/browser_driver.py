"""A Chromium without a window and without a network, driven by Playwright, and a JupyterLab for it."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "executed" / "browser"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
# it finds no other host, and draws WebGL without a graphics card
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
             "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false"},  # else Lab asks whether it may, over the pictures
    "docmanager-extension/plugin": {"autosave": False},  # else what a test has run is saved after two minutes
}


class Page:
    """A tab of the browser. Places and sizes are in CSS pixels; a window pixel is one of them."""

    def __init__(self, page):
        self.page, self.requests, self.name = page, [], "page"
        page.set_default_timeout(300_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("websocket", lambda opened: self.requests.append(opened.url))

    def open(self, address: str) -> None:
        self.page.goto(address)

    def js(self, expression: str):
        """The value of an expression in the page; promises are waited for."""
        return self.page.evaluate(expression)

    def until(self, expression: str | Callable[[], Any], seconds: float = 120, say: str = ""):
        """The first true value of an expression in the page, or of a function; looked at five times a second."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = expression() if callable(expression) else self.js(expression)
            if value:
                return value
            self.page.wait_for_timeout(200)
        self.screenshot("failed")
        pytest.fail(f"not within {seconds:g} s: {say or expression}")

    def foreign(self) -> list[str]:
        """Requests that left the machine."""
        self.js("0")  # reads what the browser has reported until now
        return [url for url in self.requests if urlparse(url).scheme in ("http", "https", "ws", "wss")
                and urlparse(url).hostname not in ("127.0.0.1", "localhost")]  # fmt: skip

    # ---- Keys and mouse -------------------------------------------------------------------------------------------

    def press(self, element: str, key: str) -> None:
        """Put an element (an expression) in focus and press a key there, which must not take the focus away."""
        self.js(f"{element}.focus()")
        self.page.keyboard.press("Space" if key == " " else key)
        assert self.js(f"document.activeElement == {element}"), f"Lab took the key {key} from {element}"

    def mouse(self, x: float, y: float, by: float = 0) -> None:
        """Click, or drag ``by`` pixels to the right."""
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        if by:
            self.page.mouse.move(x + by, y, steps=4)
        self.page.mouse.up()

    # ---- What is to be seen ---------------------------------------------------------------------------------------

    def box(self, element: str) -> list[float]:
        """Left, top, width and height of an element."""
        return self.js(f"(b => [b.left, b.top, b.width, b.height])({element}.getBoundingClientRect())")

    def pixels(self, element: str) -> np.ndarray:
        """(height, width, 3) the window where an element is, whatever draws it there."""
        clip = dict(zip(("x", "y", "width", "height"), self.box(element)))
        return opened(self.page.screenshot(clip=clip))

    def picture(self, image: str) -> np.ndarray:
        """(height, width, 3) all pixels of an <img>, also where it reaches out of the window."""
        return decoded(
            self.js(f"""(image => {{
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          canvas.getContext("2d").drawImage(image, 0, 0);
          return canvas.toDataURL("image/png").split(",")[1];
        }})({image})""")
        )

    def resize(self, width: int, height: int) -> None:
        self.page.set_viewport_size({"width": width, "height": height})

    def start_album(self, name: str) -> None:
        """Screenshots from now on begin with this name; those of an earlier run are removed."""
        self.name = name
        for old in [SCREENSHOTS / f"{name}.png", *SCREENSHOTS.glob(f"{name}_*.png")]:
            old.unlink(missing_ok=True)

    def screenshot(self, what: str = "") -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{'_'.join(filter(None, (self.name, what)))}.png")


def decoded(png: str) -> np.ndarray:
    """(height, width, 3) uint8 of a PNG in base 64."""
    return opened(base64.b64decode(png))


def opened(png: bytes) -> np.ndarray:
    """(height, width, 3) uint8 of a PNG."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """The part of the pixels that are another colour, 0 to 1; 1 if the sizes differ."""
    return 1.0 if one.shape != other.shape else float((one != other).any(axis=-1).mean())


def assert_not_blank(pixels: np.ndarray, what: str, spread: float = 20, colours: int = 50) -> None:
    """A picture has light and dark (standard deviation of the grey values, 0 to 255) and many colours."""
    found = float(pixels.mean(axis=-1).std())
    assert found > spread, f"{what} is blank: found a standard deviation of {found:.1f}, expected more than {spread:g}"
    found = len(np.unique(pixels.astype(np.int32) @ (1, 256, 65536)))
    assert found > colours, f"{what} is blank: found {found} colours, expected more than {colours}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str, seconds: float = 180):
    """The JSON at an address of this machine, as soon as someone answers there."""
    end = time.monotonic() + seconds
    while True:
        try:
            return json.load(urllib.request.urlopen(url, timeout=5))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextmanager
def browser() -> Iterator[Page]:
    """An empty tab of a new browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS) as chromium:
        yield Page(chromium.new_page())


@contextmanager
def jupyterlab(folder: Path) -> Iterator[tuple[str, Path]]:
    """JupyterLab on a copy of the repository, so that what Lab saves stays there: its address, and the copy."""
    copy, port = folder / "repository", free_port()
    copy.mkdir()
    for name in ("gridreg", "study", "notebooks", "profiles"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("params.yaml", "in_use.yaml"):
        shutil.copy(ROOT / name, copy)
    for name in ("data", "checkpoints"):
        (copy / name).symlink_to((ROOT / name).resolve())
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    environment = os.environ | {"PYTHONPATH": str(copy), "HOME": str(folder / "home"), "JUPYTER_PLATFORM_DIRS": "1",
                                "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}  # fmt: skip
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={copy}",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, cwd=copy, stdout=log,
                                  stderr=log)  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        get(f"{address}/api")
        yield address, copy
    finally:
        server.terminate()
        server.wait(60)
