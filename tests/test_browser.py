"""The notebooks in JupyterLab, in a real browser without a network: run whole, sliders moved, pictures changed.

`make test-browser` runs these and says what is missing; without a Chromium `make test` skips them. Screenshots are kept
in executed/browser/.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from browser_driver import BROWSERS, CHROMIUM, ROOT, Page, assert_not_blank, browser, decoded, differ, jupyterlab

pytestmark = pytest.mark.slow

EXPLORE = "explore/where_not_to_trust"
LESSONS = ("lesson_1_degrees_of_freedom", "lesson_2_grid_to_field", "lesson_3_attention")
SIZES = {"laptop": (1366, 768), "wide": (1600, 1000)}  # of the window; notebooks are opened and run in the first
PATIENCE = 600  # seconds for a notebook, on a machine that has other things to do

NOTEBOOK = "jupyterapp.shell.currentWidget"
CODE = f"{NOTEBOOK}.content.model.sharedModel.cells.filter(c => c.cell_type == 'code')"
OUTPUTS = f"{CODE}.flatMap(c => c.toJSON().outputs)"
IDLE = f"{NOTEBOOK}.sessionContext?.session?.kernel?.status == 'idle'"
CLIPPED = """(node => {
  const outputs = [...node.querySelectorAll(".jp-OutputArea-output")], found = [];
  for (const output of outputs) {
    const right = output.getBoundingClientRect().right + 1;
    if (output.scrollWidth > output.clientWidth + 1) found.push("an output is wider than its cell");
    for (const part of output.querySelectorAll("img, canvas, .widget-slider, .widget-dropdown, .widget-readout, button"))
      if (part.getBoundingClientRect().right > right) found.push("outside its cell: " + (part.className || part.tagName));
    for (const label of output.querySelectorAll(".widget-label, .widget-readout, button"))
      if (label.scrollWidth > label.clientWidth + 1) found.push("cut: " + label.textContent);
    if (output.innerText.includes("Error displaying widget")) found.push(output.innerText);
  }
  return found;
})"""


@pytest.fixture(scope="module", autouse=True)
def what_is_needed():
    missing = [] if CHROMIUM else [f"browser on the path ({', '.join(BROWSERS)})"]
    missing += [
        f"folder {name}/ (`make lab` fetches it)" for name in ("data", "checkpoints") if not (ROOT / name).is_dir()
    ]
    if missing:
        say = pytest.fail if os.environ.get("GRIDREG_BROWSER") == "required" else pytest.skip
        say(f"found no {' and no '.join(missing)}; expected it for the tests in a browser, which install nothing")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab")) as opened:
        yield opened


@pytest.fixture
def page(lab):
    with browser() as opened:
        yield opened
        if opened.js("Boolean(window.jupyterapp)"):  # kernels of one test would slow down the next
            opened.js("jupyterapp.serviceManager.sessions.shutdownAll()")


# ---- A notebook -----------------------------------------------------------------------------------------------------


def open_notebook(page: Page, lab: tuple[str, Path], name: str) -> None:
    """Open a notebook, and wait for its kernel."""
    page.resize(*SIZES["laptop"])
    page.open(f"{lab[0]}/lab/tree/notebooks/{name}.ipynb?reset")
    page.until(f"window.jupyterapp && {NOTEBOOK}?.context?.path == 'notebooks/{name}.ipynb'", PATIENCE)
    page.until(IDLE, PATIENCE)


def run_whole(page: Page, lab: tuple[str, Path], name: str) -> None:
    """Open a notebook and run all of it: no cell may end in an error, and no picture may be blank."""
    open_notebook(page, lab, name)
    page.js("jupyterapp.commands.execute('notebook:run-all-cells') && true")
    failed = f"{OUTPUTS}.some(o => o.output_type == 'error')"  # the cells after it do not run
    page.until(f"{failed} || {CODE}.every(c => c.execution_count) && {IDLE}", PATIENCE)
    assert page.js(f"{OUTPUTS}.filter(o => o.output_type == 'error').map(o => o.evalue)") == []
    for number, png in enumerate(page.js(f"{OUTPUTS}.map(o => o.data?.['image/png']).filter(Boolean)")):
        assert_not_blank(decoded("".join(png)), f"picture {number} of {name}")


def cells(name: str, text: str) -> list[int]:
    """The numbers of the code cells that hold a text; counted from 0."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    return [number for number, cell in enumerate(notebook["cells"])
            if cell["cell_type"] == "code" and text in "".join(cell["source"])]  # fmt: skip


def show(page: Page, cell: int, waiting_for: str = ".jp-OutputArea-output") -> str:
    """Scroll the output of a cell to the top (Lab draws only what is near); the cell as an expression."""
    page.js(f"{NOTEBOOK}.content.scrollToItem({cell}, 'start') && true")
    node = f"{NOTEBOOK}.content.widgets[{cell}].node"
    page.until(f"{node}.isConnected && {node}.querySelector({waiting_for!r})?.getBoundingClientRect().height > 0")
    page.js(f"{node}.querySelector('.jp-Cell-outputWrapper').scrollIntoView()")
    time.sleep(0.5)  # Lab lays out what has come into view
    return node


def at_size(page: Page, size: str, cell: int, waiting_for: str = ".jp-OutputArea-output") -> str:
    """A cell at a window size: nothing wider than the window, nothing cut; the cell as an expression."""
    width, height = SIZES[size]
    page.resize(width, height)
    node = show(page, cell, waiting_for)
    assert page.js("document.documentElement.scrollWidth <= window.innerWidth"), f"wider than {width}×{height}"
    assert page.js(f"{CLIPPED}({node})") == [], f"cell {cell} at {width}×{height}"
    return node


def change(page: Page, image: str, act, what: str, least: float = 0.001) -> np.ndarray:
    """Do something; then wait until a picture is another one, in so large a part of its pixels, and not blank."""
    seen, source = page.picture(image), f"{image}.src"
    last = page.js(source)
    act()

    def another() -> np.ndarray | None:
        nonlocal last
        now = page.js(f"{image}?.complete && {image}.naturalWidth > 300 && {source}")
        if not now or now == last:
            return None
        last, found = now, page.picture(image)
        return [found] if differ(found, seen) > least else None

    (found,) = page.until(another, say=f"the picture changes after {what}")
    assert_not_blank(found, f"the picture after {what}")
    return found


# ---- The tests ------------------------------------------------------------------------------------------------------


def test_the_quick_start_runs_and_shows_a_picture(page, lab):
    page.start_album("quick_start")
    run_whole(page, lab, "explore/quick_start")
    (cell,) = cells("explore/quick_start", "picture(registered)")
    for size in SIZES:
        node = at_size(page, size, cell)
        page.until(f"{node}.querySelector('.jp-RenderedImage img')?.naturalWidth > 300")
        page.screenshot(size)
    assert page.foreign() == []


def test_every_control_of_the_explorer_changes_its_picture(page, lab):
    page.start_album("explorer")
    run_whole(page, lab, EXPLORE)
    (cell,) = cells(EXPLORE, "Explorer(")
    for size in SIZES:
        node = at_size(page, size, cell, "img[alt^=axial]")
        page.screenshot(size)
    image = f"{node}.querySelector('img[alt^=axial]')"
    page.until(f"{image}.naturalWidth > 600")
    assert_not_blank(page.picture(image), "the first picture")
    sliders = ("grid", "right–left", "front–back", "head–foot", "frame", "overlay")
    menus = ("model", "pair", "third column", "map", "motion")

    def control(name: str) -> str:
        kind, names = (".noUi-handle", sliders) if name in sliders else ("select", menus)
        return f"{node}.querySelectorAll('{kind}')[{names.index(name)}]"

    def changes(name: str, key: str) -> None:
        change(page, image, lambda: page.press(control(name), key), f"{key} on {name}")

    assert page.js(f"{node}.querySelectorAll('.noUi-handle').length") == len(sliders)
    assert page.js(f"{node}.querySelectorAll('select').length") == len(menus)
    changes("model", "ArrowDown")
    changes("pair", "ArrowDown")
    changes("grid", "ArrowRight")  # registered anew
    for axis in ("right–left", "front–back", "head–foot"):
        changes(axis, "ArrowRight")
    # a click in the first panel moves the crosshair
    numbers = f"[...{node}.querySelectorAll('.widget-readout')].slice(1, 4).map(e => e.textContent).join()"
    values = page.js(numbers)
    left, top, width, height = page.box(image)
    change(page, image, lambda: page.mouse(left + 0.08 * width, top + 0.12 * height), "a click")
    assert page.js(numbers) != values
    changes("overlay", "ArrowRight")
    for name in ("map", "motion", "third column"):  # every choice; the last of the third column: posterior samples,
        for _ in range(page.js(f"{control(name)}.length") - 1):
            changes(name, "ArrowDown")
    changes("frame", "ArrowRight")  # the next of them,
    play, stop, _, save = (f"{node}.querySelectorAll('button')[{number}]" for number in range(4))
    change(page, image, lambda: page.press(play, " "), "play")  # played
    page.press(stop, " ")
    page.screenshot("sample")
    # error against σ, shown and hidden again
    errors, box = f"{node}.querySelector('.widget-image')", f"{node}.querySelector('input[type=checkbox]')"
    page.press(box, " ")
    page.until(f"{errors}?.naturalWidth > 600 && {errors}.offsetHeight > 100")
    assert_not_blank(page.picture(errors), "error against σ")
    page.js(f"{errors}.scrollIntoView()")
    page.screenshot("error_against_sigma")
    page.press(box, " ")
    page.until(f"{errors}.offsetHeight == 0")
    page.press(save, " ")
    page.until(f"{node}.innerText.includes('written: {lab[1]}/explored/warped.nii.gz')")
    for file in ("warped", "displacement"):
        assert nibabel.load(lab[1] / "explored" / f"{file}.nii.gz").get_fdata().std() > 0
    assert page.foreign() == []


def test_the_view_in_3d_is_drawn_and_turns(page, lab):
    page.start_album("view_in_3d")
    if not page.js("Boolean(document.createElement('canvas').getContext('webgl2'))"):
        pytest.skip("found no WebGL 2 in this browser, expected it for the view in 3-D")
    run_whole(page, lab, EXPLORE)
    (cell,) = cells(EXPLORE, "volume_view(")
    for size in SIZES:
        canvas = f"{at_size(page, size, cell, 'canvas')}.querySelector('canvas')"

    def settled() -> np.ndarray:
        """The canvas, as soon as it is drawn and stays as it is."""
        before = None

        def still() -> list[np.ndarray] | None:
            nonlocal before
            last, before = before, page.pixels(canvas)
            drawn = before.std() > 5 and last is not None and differ(last, before) == 0
            return [before] if drawn else None

        return page.until(still, say="the view in 3-D is drawn")[0]

    first = settled()
    page.screenshot("before")
    left, top, width, height = page.box(canvas)
    high, wide = round(0.75 * height), round(0.75 * width)  # without the colour bar; the body is the last of four
    slices, body = np.s_[:high, : wide - 10], np.s_[:high, wide + 10 :]
    for part, name in ((slices, "slices"), (body, "body")):
        assert_not_blank(first[part], f"the view in 3-D ({name})", colours=500)
    page.mouse(left + 0.88 * width, top + 0.4 * height, by=0.05 * width)
    page.until(lambda: differ(settled()[body], first[body]) > 0.05, say="the body turns when dragged")
    turned = settled()
    page.screenshot("turned")
    assert_not_blank(turned[body], "the body after a drag", colours=500)
    assert differ(turned[slices], first[slices]) < 0.01, "the slices moved, too"
    page.mouse(left + 0.05 * width, top + 0.3 * height)
    page.until(lambda: differ(settled()[slices], turned[slices]) > 0.05, say="the slices follow a click")
    page.screenshot("clicked")
    assert page.foreign() == []


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_every_picture_with_sliders_answers(page, lab, name):
    page.start_album(name)
    run_whole(page, lab, f"lessons/{name}")
    found = cells(f"lessons/{name}", "explore(")
    assert found
    for cell in found:
        for size in SIZES:
            node = at_size(page, size, cell, "img")
            image, handles = (
                f"{node}.querySelector('.jp-OutputArea-output img')",
                f"{node}.querySelectorAll('.noUi-handle')",
            )
            for number in range(page.js(f"{handles}.length") if size == "wide" else 1):
                what = f"slider {number} of cell {cell} at {size}"
                change(page, image, lambda: page.press(f"{handles}[{number}]", "ArrowRight"), what)
            page.screenshot(f"{cell}_{size}")
    assert page.foreign() == []


def test_a_notebook_that_is_opened_and_left_unsaved_has_not_changed(page, lab):
    page.start_album("opened")
    for path in sorted((lab[1] / "notebooks").glob("*/*.ipynb")):
        name = path.relative_to(lab[1] / "notebooks").with_suffix("").as_posix()
        open_notebook(page, lab, name)
        assert not page.js(f"{NOTEBOOK}.context.model.dirty"), f"{path.name}: opening it changed it"
        assert path.read_bytes() == (ROOT / "notebooks" / f"{name}.ipynb").read_bytes()
