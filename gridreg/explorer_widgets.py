"""The uncertainty explorer in JupyterLab: sliders and a picture that can be clicked, around ``explorer_view``.

Everything is drawn in Python and sent as PNG, so it needs neither WebGL nor the network. Every control can be reached by
keyboard; a click in the picture does what the three sliders of the crosshair do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import pandas as pd
import traitlets

from gridreg.errors import InputError
from gridreg.explorer import AXES, Registered, load_network, measure, read_out, register_case
from gridreg.explorer_view import COMPARISONS, VECTORS, Look, View, error_figure, first_look, png
from gridreg.pair import Case, demo_case, demo_pairs, own_case, save
from gridreg.widget_keys import WidgetKeys

GRIDS = (3, 20)  # control points per axis that the slider offers
FRAMES = 40  # of flicker and samples
PAUSE = 0.1  # seconds without a new wish, after which the slower numbers follow


class Picture(anywidget.AnyWidget):
    """A PNG that says where it was clicked: ``clicked`` holds (x, y, count) in pixels of the PNG from its top left."""

    _esm = """
    function render({ model, el }) {
      const image = document.createElement("img");
      image.alt = "axial, coronal and sagittal views of the registered pair";
      image.style.cssText = "max-width: 100%; cursor: crosshair";
      const show = () => {
        const old = image.src;
        image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
        if (old) URL.revokeObjectURL(old);
      };
      model.on("change:png", show);
      show();
      image.addEventListener("click", (event) => {
        const box = image.getBoundingClientRect();
        const scale = image.naturalWidth / box.width;
        const count = (model.get("clicked")[2] || 0) + 1;
        model.set("clicked", [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale, count]);
        model.save_changes();
      });
      el.appendChild(image);
    }
    export default { render };
    """
    png = traitlets.Bytes().tag(sync=True)
    clicked = traitlets.List().tag(sync=True)


class Explorer(widgets.VBox):
    """The explorer as one widget.

    values          params.yaml, as ``params.load`` reads it
    dataset         the cohort to begin with, or whose model registers a pair of one's own
    fixed, moving   two NIfTI files of one's own; None: the test pairs of the cohorts
    checkpoints     a folder of trained models, one folder a dataset
    out             where "Save" writes
    """

    def __init__(
        self,
        values: dict[str, Any],
        dataset: str = "prostate",
        fixed: Path | str | None = None,
        moving: Path | str | None = None,
        checkpoints: Path | str = "checkpoints",
        out: Path | str = "explored",
    ):
        if bool(fixed) != bool(moving):
            raise InputError("found only one of the fixed and the moving file, expected both or neither.")
        self.values, self.checkpoints, self.out = values, Path(checkpoints), Path(out)
        self.files = (fixed, moving) if fixed else None
        self._waiting: asyncio.TimerHandle | None = None
        known = [name for name in values["datasets"] if (self.checkpoints / name / "model.json").is_file()]
        if dataset not in known:
            raise InputError(f"{self.checkpoints}: found no model for '{dataset}', expected one of {', '.join(known) or 'none'}.")
        self.dataset = widgets.Dropdown(options=known, value=dataset, description="model" if self.files else "dataset")
        self.pair = widgets.Dropdown(description="pair")
        self.grid = widgets.IntSlider(10, *GRIDS, description="grid size", continuous_update=False)
        self.crosshair = [widgets.IntSlider(description=axis) for axis in AXES]
        self.comparison = widgets.Dropdown(options=COMPARISONS, description="third column")
        self.overlay = widgets.Dropdown(description="map")
        self.opacity = widgets.FloatSlider(0.0, min=0, max=1, step=0.05, description="overlay")
        self.vectors = widgets.Dropdown(options=VECTORS, description="motion")
        self.frame = widgets.IntSlider(0, 0, FRAMES - 1, description="frame")
        self.play = widgets.Play(min=0, max=FRAMES - 1, interval=500, description="play")
        self.errors = widgets.Checkbox(False, description="error against σ")
        self.button = widgets.Button(description="Save as NIfTI", icon="save")
        self.said, self.found, self.picture = widgets.HTML(), widgets.HTML(), Picture()
        self.reliability = widgets.Image(format="png", layout={"display": "none", "max_width": "100%"})
        controls = (self.dataset, self.pair, self.grid, *self.crosshair, self.comparison, self.overlay, self.opacity, self.vectors)
        for control in controls:
            control.layout.width, control.style.description_width = "340px", "88px"
        self.frame.style.description_width, self.pair.layout.display = "50px", "none" if self.files else None
        left = widgets.VBox([self.dataset, self.pair, self.grid, *self.crosshair, self.comparison,
                             widgets.HBox([self.play, self.frame]), self.overlay, self.opacity, self.vectors, self.errors,
                             self.button, self.found], layout={"width": "350px", "flex": "0 0 auto"})  # fmt: skip
        right = widgets.VBox([self.picture, self.reliability], layout={"flex": "1 1 420px", "min_width": "0"})
        super().__init__([widgets.HBox([left, right], layout={"flex_flow": "row wrap"}), self.said, WidgetKeys()])
        self._quiet = False
        self._open_dataset()
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.dataset.observe(lambda _: self._guarded(self._open_dataset), "value")
        self.pair.observe(lambda _: self._guarded(self._open_pair), "value")
        self.grid.observe(lambda _: self._guarded(self._register), "value")
        for control in (*self.crosshair, self.comparison, self.overlay, self.opacity, self.vectors, self.frame):
            control.observe(lambda _: self._guarded(self._draw), "value")
        self.errors.observe(lambda _: self._guarded(self._show_errors), "value")
        self.picture.observe(lambda change: self._guarded(self._click, change["new"]), "clicked")
        self.button.on_click(lambda _: self._guarded(self._save))

    def _guarded(self, call, *arguments) -> None:
        """Do what a control asks for; an error becomes a sentence below the picture."""
        if self._quiet:
            return
        self.said.value = ""
        try:
            call(*arguments)
        except OSError as error:
            self.said.value = f"<b>{error.filename}: {error.strerror}; expected to be able to read and write it.</b>"
        except ValueError as error:
            self.said.value = f"<b>{error}</b>"

    def _later(self, call: Callable[[], None]) -> None:
        """Do it when no control waits for an answer; another such call takes its place."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook: nothing else is waiting
            return call()
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = loop.call_later(PAUSE, call)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Controls that are changed meanwhile are not answered one by one."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _open_dataset(self) -> None:
        self.network, config = load_network(self.checkpoints / self.dataset.value)
        with self._quietly():
            self.grid.value = config["grid"][0]
            if not self.files:
                name = self.dataset.value
                pairs = [[side.removeprefix(f"{name}_") for side in pair] for pair in demo_pairs(self.values, name)]
                self.pair.options = [(" ← ".join(pair), n) for n, pair in enumerate(pairs)]
                self.pair.value = 0
        self._open_pair()

    def _open_pair(self) -> None:
        name = self.dataset.value
        case: Case = own_case(self.values, *self.files, name) if self.files else demo_case(self.values, name, self.pair.value)
        registered = register_case(self.network, case, self.grid.value)
        self.view, look = View(registered), first_look(registered)
        with self._quietly():
            for slider, size, at in zip(self.crosshair, case.shape, look.voxel):
                slider.max, slider.value = size - 1, at
            names, kept = registered.maps(), self.overlay.value
            self.overlay.options = names
            self.overlay.value = kept if kept in names else names[0]
        self.said.value = "<br>".join(case.notes)
        self._show(registered)

    def _register(self) -> None:
        registered = register_case(self.network, self.view.case, self.grid.value)
        self.view.show(registered)
        self._show(registered)

    def _show(self, registered: Registered) -> None:
        """The picture first, which is what the eye waits for; then the numbers."""
        self.registered, self.measured = registered, None
        self._draw()
        self._later(lambda: self._guarded(self._measure))

    def _measure(self) -> None:
        self.measured = measure(self.registered)
        self._tell()
        self._show_errors()

    def look(self) -> Look:
        """What the controls ask for."""
        voxel = tuple(slider.value for slider in self.crosshair)
        return Look(voxel, self.comparison.value, self.overlay.value, self.opacity.value, self.vectors.value, self.frame.value)

    def _draw(self) -> None:
        self.picture.png = self.view.draw(self.look())
        self._tell()

    def _tell(self) -> None:
        measured = "" if self.measured is None else measured_table(self.measured)
        self.found.value = read_out_table(read_out(self.registered, self.look().voxel)) + measured

    def _click(self, clicked: list[float]) -> None:
        voxel = self.view.voxel_at(*clicked[:2], self.look().voxel)
        if voxel is not None:
            with self._quietly():
                for slider, value in zip(self.crosshair, voxel):
                    slider.value = value
            self._draw()

    def _show_errors(self) -> None:
        figure = error_figure(self.registered) if self.errors.value else None
        if figure is not None:
            self.reliability.value = png(figure)
        elif self.errors.value:
            self.said.value = "The true displacement of this pair is not known: there is no error to show."
        self.reliability.layout.display = None if figure is not None else "none"

    def _save(self) -> None:
        files = save(self.view.case, self.registered.displacement, self.out, self.registered.sigma_mm)
        self.said.value = "written: " + ", ".join(map(str, files))


def read_out_table(found: dict[str, Any]) -> str:
    """What is known at the crosshair, as an HTML table in mm."""
    place = ", ".join(f"{value:.1f}" for value in found["scan_mm"])
    rows = [f"<tr><td colspan=4>scan (RAS mm): {place}" + (f"; {found['label']}" if found["label"] else "") + "</td></tr>"]
    rows.append("<tr><th>mm</th><th>moves</th><th>± σ</th><th>error</th></tr>")
    for number, axis in enumerate(AXES):
        cells = [found[name][number] if found[name] is not None else None
                 for name in ("displacement_mm", "sigma_mm", "error_mm")]  # fmt: skip
        rows.append(f"<tr><td>{axis}</td>" + "".join(f"<td>{'–' if c is None else f'{c:.2f}'}</td>" for c in cells) + "</tr>")
    return f"<table style='line-height: 1.4; font-size: 90%'>{''.join(rows)}</table>"


def measured_table(rows: pd.DataFrame) -> str:
    """Before and after registration, as an HTML table."""
    body = "".join(f"<tr><td>{name}</td>" + "".join(f"<td>{f'{value:#.3g}' if value else '0'}</td>" for value in row) + "</tr>"
                   for name, row in rows.iterrows())  # fmt: skip
    head = "".join(f"<th>{when}</th>" for when in rows)
    return f"<table style='line-height: 1.4; font-size: 90%'><tr><th></th>{head}</tr>{body}</table>"
