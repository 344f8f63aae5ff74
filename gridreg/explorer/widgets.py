"""The explorer in JupyterLab: sliders beside a picture that can be clicked, and a view in 3-D.

The picture is drawn in Python and sent as PNG, so it needs neither WebGL nor the network; only the view in 3-D needs
WebGL. Every control can be reached by keyboard. A click in the picture does what the three sliders of the crosshair do.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import nibabel
import numpy as np
import pandas as pd
import traitlets
from ipyniivue import NiiVue, ShowRender, Volume

from gridreg.errors import InputError, sentence
from gridreg.explorer.keys import WidgetKeys
from gridreg.explorer.picture import COMPARISONS, VECTORS, Look, NotebookFigure, View, caption, first_look
from gridreg.explorer.registered import AXES, Registered, load_network, measure, read_out, register_pair
from gridreg.scans.export import save
from gridreg.scans.pair import Pair

GRIDS = (3, 20)  # control points per axis that the slider offers
FRAMES = 40  # of flicker and samples
SMALL = "line-height: 1.4; font-size: 90%"
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


@dataclass(frozen=True)
class Source:
    """A trained model, and pairs to look at with it.

    model    folder of a trained GridReg
    pairs    what each pair is called
    open     the pair of a number, read when it is chosen
    """

    model: Path
    pairs: tuple[str, ...]
    open: Callable[[int], Pair]


class Explorer(widgets.VBox):
    """The explorer as one widget.

    sources       what can be opened, by name
    start         the name to begin with; None: the first
    out           where "Save" writes
    error_figure  draws a registered pair for "error against σ", None where its error is not known; without it, no such box
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        start: str | None = None,
        out: Path | str = "explored",
        error_figure: Callable[[Registered], NotebookFigure | None] | None = None,
    ):
        start = next(iter(sources), None) if start is None else start
        if start not in sources:
            raise InputError(f"found no model '{start}', expected one of {', '.join(sources) or 'a trained GridReg'}.")
        self.sources, self.out, self.error_figure = sources, Path(out), error_figure
        self._waiting: asyncio.TimerHandle | None = None
        self.dataset = widgets.Dropdown(options=list(sources), value=start, description="model")
        self.pair = widgets.Dropdown(description="pair")
        self.grid = widgets.IntSlider(10, *GRIDS, description="grid size", continuous_update=False)
        self.crosshair = [widgets.IntSlider(description=axis) for axis in AXES]
        self.comparison = widgets.Dropdown(options=COMPARISONS, description="third column")
        self.overlay = widgets.Dropdown(description="map")
        self.opacity = widgets.FloatSlider(0.0, min=0, max=1, step=0.05, description="overlay")
        self.vectors = widgets.Dropdown(options=VECTORS, description="motion")
        self.frame = widgets.IntSlider(0, 0, FRAMES - 1, description="frame", style={"description_width": "50px"})
        self.play = widgets.Play(min=0, max=FRAMES - 1, interval=500, description="play")
        hidden = {} if error_figure else {"display": "none"}
        self.errors = widgets.Checkbox(False, description="error against σ", layout=hidden)
        self.button = widgets.Button(description="Save as NIfTI", icon="save")
        self.said, self.found, self.caption, self.picture = widgets.HTML(), widgets.HTML(), widgets.HTML(), Picture()
        self.reliability = widgets.Image(format="png", layout={"display": "none", "max_width": "100%"})
        upper = [self.dataset, self.pair, self.grid, *self.crosshair, self.comparison]
        lower = [self.overlay, self.opacity, self.vectors]
        for control in upper + lower:
            control.layout.width, control.style.description_width = "340px", "88px"
        left = [*upper, widgets.HBox([self.play, self.frame]), *lower, self.errors, self.button, self.found]
        right = [self.picture, self.caption, self.reliability]
        columns = [widgets.VBox(left, layout={"width": "350px", "flex": "0 0 auto"}),
                   widgets.VBox(right, layout={"flex": "1 1 420px", "min_width": "0"})]  # fmt: skip
        super().__init__([widgets.HBox(columns, layout={"flex_flow": "row wrap"}), self.said, WidgetKeys()])
        self._quiet = False
        self._open_dataset()
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        drawn = (*self.crosshair, self.comparison, self.overlay, self.opacity, self.vectors, self.frame)
        for control, answer in ((self.dataset, self._open_dataset), (self.pair, self._open_pair), (self.grid, self._register),
                                (self.errors, self._show_errors), *((control, self._draw) for control in drawn)):  # fmt: skip
            control.observe(lambda _, answer=answer: self._guarded(answer), "value")
        self.picture.observe(lambda change: self._guarded(self._click, change["new"]), "clicked")
        self.button.on_click(lambda _: self._guarded(self._save))

    def _guarded(self, call, *arguments) -> None:
        """Do what a control asks for; an error becomes a sentence below the picture."""
        if self._quiet:
            return
        self.said.value = ""
        try:
            call(*arguments)
        except (OSError, ValueError) as error:
            self.said.value = f"<b>{html.escape(sentence(error))}</b>"

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
        source = self.sources[self.dataset.value]
        self.network, config = load_network(source.model)
        with self._quietly():
            self.grid.value = config["grid"][0]
            self.pair.options = [(title, number) for number, title in enumerate(source.pairs)]
            self.pair.value = 0
        self._open_pair()

    def _open_pair(self) -> None:
        pair = self.sources[self.dataset.value].open(self.pair.value)
        registered = register_pair(self.network, pair, self.grid.value)
        self.view, look = View(registered), first_look(registered)
        with self._quietly():
            for slider, size, at in zip(self.crosshair, pair.shape, look.voxel):
                slider.max, slider.value = size - 1, at
            names, kept = registered.maps(), self.overlay.value
            self.overlay.options = names
            self.overlay.value = kept if kept in names else names[0]
        self.said.value = "<br>".join(map(html.escape, pair.notes))
        self._show(registered)

    def _register(self) -> None:
        registered = register_pair(self.network, self.view.pair, self.grid.value)
        self.view.show(registered)
        self._show(registered)

    def _show(self, registered: Registered) -> None:
        """The picture first, which is what the eye waits for; then the numbers."""
        self.registered, self.measured = registered, None
        self.caption.value = f"<div style='{SMALL}'>{html.escape(caption(registered))}</div>"
        self._draw()
        self._later(lambda: self._guarded(self._measure))

    def _measure(self) -> None:
        self.measured = measure(self.registered)
        self._tell()
        self._show_errors()

    def look(self) -> Look:
        """What the controls ask for."""
        voxel = tuple(slider.value for slider in self.crosshair)
        controls = (self.comparison, self.overlay, self.opacity, self.vectors, self.frame)
        return Look(voxel, *(control.value for control in controls))

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
        figure = self.error_figure(self.registered) if self.errors.value and self.error_figure else None
        if figure is not None:
            self.reliability.value = figure.png()
        elif self.errors.value:
            self.said.value = "The true displacement of this pair is not known: there is no error to show."
        self.reliability.layout.display = None if figure is not None else "none"

    def _save(self) -> None:
        files = save(self.view.pair, self.registered.displacement, self.out, self.registered.sigma_mm)
        notes = "".join(f"<br>{html.escape(note)}" for note in self.view.pair.notes)
        self.said.value = "written: " + html.escape(", ".join(map(str, files))) + notes


def read_out_table(found: dict[str, Any]) -> str:
    """What is known at the crosshair, as an HTML table in mm."""
    place = ", ".join(f"{value:.1f}" for value in found["scan_mm"]) + (f"; {found['label']}" if found["label"] else "")
    rows = pd.DataFrame(
        {"mm": AXES, "moves": found["displacement_mm"], "± σ": found["sigma_mm"], "error": found["error_mm"]}
    )
    table = rows.to_html(index=False, float_format="{:.2f}".format, na_rep="–", border=0)
    return f"<div style='{SMALL}'>scan (RAS mm): {html.escape(place)}{table}</div>"


def measured_table(rows: pd.DataFrame) -> str:
    """Before and after registration, as an HTML table."""
    table = rows.to_html(float_format=lambda value: f"{value:#.3g}" if value else "0", border=0)
    return f"<div style='{SMALL}'>{table}</div>"


def volume_view(registered: Registered, overlay: str = "", opacity: float = 0.5, height: int = 400) -> NiiVue:
    """An ipyniivue widget of the fixed image and one of ``Registered.maps`` (by default the first), on the pair's grid.

    Slices are shown as radiologists do, the patient's right on the left and the face on the left, as everywhere here.
    """
    values = np.nan_to_num(registered.map_mm(overlay or registered.maps()[0]))
    viewer = NiiVue(
        height=height, multiplanar_show_render=ShowRender.ALWAYS, is_radiological_convention=True, sagittal_nose_left=True,
        crosshair_width=0.7, crosshair_width_unit="mm", crosshair_color=(1, 1, 1, 0.8), show_3d_crosshair=True,
        is_colorbar=True,
    )  # fmt: skip
    viewer.load_volumes([
        _volume("fixed.nii", registered.pair.fixed, registered, colormap="gray", colorbar_visible=False),
        _volume("map.nii", values, registered, colormap="viridis", opacity=opacity, cal_min=0.0,
                cal_max=float(np.percentile(values, 99.5)) or 1.0),
    ])  # fmt: skip
    return viewer


def _volume(name: str, values: np.ndarray, registered: Registered, **look) -> Volume:
    """NIfTI bytes inside the notebook: no file, no server."""
    image = nibabel.Nifti1Image(values.astype(np.float32), registered.pair.affine)
    return Volume(name=name, data=image.to_bytes(), **look)
