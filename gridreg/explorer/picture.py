"""How the explorer looks: one picture of three linked views.

The picture is drawn by Agg into a PNG, its artists kept and only their data changed: that is what makes a slider answer
at once. Rows are the axial, coronal and sagittal views, columns the fixed image, the moving one, the two compared, and a
map in millimetres.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

from gridreg.explorer.registered import Registered, draw_sample
from gridreg.explorer.slices import VIEWS, central_voxel, grid_lines, show_slice, slice_of
from gridreg.explorer.style import FIXED_COLOUR, GRID_COLOUR, IMAGE, MAGNITUDE, SIGNED, styled

COMPARISONS = ("warped", "checkerboard", "flicker", "difference", "sample")
VECTORS = ("none", "arrows", "deformed grid")
PANEL, DPI = 2.0, 120  # inches across a panel; pixels an inch
LEFT, RIGHT, TOP, TITLE, BOTTOM, GAP = 0.25, 0.62, 0.28, 0.2, 0.08, 0.06  # inches
ARROWS, TILES = 14, 6  # along the longer side of a slice


@dataclass
class Look:
    """What is shown. voxel: of the crosshair; overlay: a name of ``Registered.maps``; frame: of flicker or samples."""

    voxel: tuple[int, int, int]
    comparison: str = "warped"
    overlay: str = ""
    opacity: float = 0.0
    vectors: str = "none"
    frame: int = 0


def first_look(registered: Registered) -> Look:
    """Crosshair on the centroid of the fixed mask, σ beside the images (the displacement for a model without)."""
    pair = registered.pair
    return Look(central_voxel(pair.labels[0], pair.shape), overlay=registered.maps()[0])


def caption(registered: Registered) -> str:
    """What the picture shows, in words."""
    pair = registered.pair
    source = "This pair is simulated; it is not a patient. " if pair.simulated else ""
    spread = ", and the ellipse around it marks one σ" if registered.sigma_mm is not None else ""
    return (
        f"{pair.title}. {source}The white lines cross at the chosen voxel. The orange point is its place in the moving image"
        f"{spread}. R, L, A, P, S and I mark the patient's right, left, front, back, head and feet."
    )


def picture(registered: Registered, look: Look | None = None) -> NotebookFigure:
    """The explorer's picture as a figure, for a notebook without widgets."""
    view = View(registered, registered.pair.title + (", a simulated pair" if registered.pair.simulated else ""))
    view.update(look or first_look(registered))
    return view.figure


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself, as one of pyplot would be shown."""

    def __init__(self, size: tuple[float, float], dpi: int):
        super().__init__(size, dpi=dpi)
        FigureCanvasAgg(self)

    def png(self) -> bytes:
        """PNG bytes: large ones, quickly."""
        self.canvas.draw()
        file = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(file, "png", compress_level=1)
        return file.getvalue()

    _repr_png_ = png


class View:
    """The picture of one registered pair. ``draw(look)`` gives a PNG; ``voxel_at`` says what a click in it means."""

    def __init__(self, registered: Registered, title: str = ""):
        self.pair = registered.pair
        self.show(registered)
        with styled():
            self._build(title)

    def show(self, registered: Registered) -> None:
        """Another registration of the same pair, on another grid: the next drawing is of it."""
        self.registered = registered
        self._sample = -1, registered.warped  # its number, and the image warped with it
        self._map = "", registered.warped, 1.0  # its name, its values, the end of the scale

    def draw(self, look: Look) -> bytes:
        """The picture as PNG bytes."""
        self.update(look)
        return self.figure.png()

    def voxel_at(self, x: float, y: float, voxel: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """The voxel under pixel (x, y), counted from the top left; the axis cut keeps its ``voxel``. None between panels."""
        point = (x, self.figure.bbox.height - y)
        for (view, _), panel in self.panels.items():
            if panel["ax"].bbox.contains(*point):
                found = list(voxel)
                for axis, value in zip(VIEWS[view][1:3], panel["ax"].transData.inverted().transform(point)):
                    found[axis] = int(np.clip(round(value), 0, self.pair.shape[axis] - 1))
                return tuple(found)
        return None

    # ---- Building, once -------------------------------------------------------------------------------------------

    def _build(self, title: str) -> None:
        mm = np.array(self.pair.shape) * self.pair.spacing
        heights = np.array([mm[up] for _, _, up, _ in VIEWS.values()]) * PANEL / max(mm[:2])
        top = TOP + (TITLE if title else 0)
        width, height = LEFT + 4 * PANEL + 3 * GAP + RIGHT, top + sum(heights) + 2 * GAP + BOTTOM
        self.figure = NotebookFigure((width, height), DPI)
        axes = self.figure.subplots(3, 4, gridspec_kw={
            "left": LEFT / width, "right": 1 - RIGHT / width, "top": 1 - top / height, "bottom": BOTTOM / height,
            "wspace": GAP / PANEL, "hspace": GAP / np.mean(heights), "height_ratios": heights})  # fmt: skip
        self.panels = {(view, column): self._panel(axes[row, column], view, column)
                       for row, view in enumerate(VIEWS) for column in range(4)}  # fmt: skip
        for ax, view in zip(axes[:, 0], VIEWS):
            ax.text(-0.08, 0.5, view, transform=ax.transAxes, rotation=90, va="center", ha="center", fontsize=8)
        self.heads = [ax.set_title(head, fontsize=8.5) for ax, head in zip(axes[0], ("fixed", "moving", "", ""))]
        place = (1 - (RIGHT - 0.08) / width, BOTTOM / height, 0.1 / width, 1 - (top + BOTTOM) / height)
        bar = self.figure.colorbar(self.panels["axial", 3]["image"], cax=self.figure.add_axes(place))
        bar.ax.set_title("mm", fontsize=7, pad=3)
        if title:
            self.figure.text(LEFT / width, 1 - 0.16 / height, title, fontsize=9)

    def _panel(self, ax, view: str, column: int) -> dict:
        """The artists of one panel; ``update`` gives them their data."""
        blank = slice_of(np.zeros(self.pair.shape, np.float32), view, 0)
        panel = {"ax": ax, "vectors": None}
        hidden = {"visible": False, "zorder": 1, "cmap": MAGNITUDE}
        panel["overlay"] = ax.imshow(blank, origin="lower", interpolation="nearest", **hidden)
        colours = MAGNITUDE if column == 3 else IMAGE
        panel["image"] = show_slice(ax, self.pair.fixed, view, 0, self.pair.spacing, letters=column == 0, cmap=colours)
        ax.patch.set_facecolor("#DDDDDD")  # where a map is not known
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_visible(False)  # without ticks it shows nothing, but is laid out at every drawing
        panel["lines"] = [line(0, color="white", lw=0.6, alpha=0.8) for line in (ax.axvline, ax.axhline)]
        if column == 1:
            panel["place"] = ax.plot([0], [0], ".", color=FIXED_COLOUR, ms=4, zorder=4)[0]
            panel["spread"] = ax.add_patch(Ellipse((0, 0), 0, 0, fill=False, ec=FIXED_COLOUR, lw=1, zorder=4))
        return panel

    # ---- Data, at every change ------------------------------------------------------------------------------------

    def update(self, look: Look) -> None:
        """Give every artist the data of ``look``."""
        if self._map[0] != look.overlay:
            values = self.registered.map_mm(look.overlay)
            self._map = look.overlay, values, float(np.nanpercentile(values, 99.5)) or 1.0
        _, values, top = self._map
        compared, colours, limits, head = self._compared(look)
        volumes = (self.pair.fixed, self.pair.moving, compared, values)
        for (view, column), panel in self.panels.items():
            cut, across, up, _ = VIEWS[view]
            index = look.voxel[cut]
            panel["image"].set_data(slice_of(volumes[column], view, index))
            if column == 2:
                panel["image"].set(cmap=colours, clim=limits)
            if column == 3:
                panel["image"].set_clim(0, top)
            if column in (0, 2):
                over = slice_of(values, view, index)
                panel["overlay"].set(data=over, clim=(0, top), alpha=look.opacity, visible=look.opacity > 0)
            panel["lines"][0].set_xdata([look.voxel[across]] * 2)
            panel["lines"][1].set_ydata([look.voxel[up]] * 2)
            if column == 1:
                self._place(panel, look.voxel, across, up)
            self._vectors(panel, view, column, look)
        self.heads[2].set_text(head)
        self.heads[3].set_text(f"{look.overlay} (mm)")

    def _compared(self, look: Look) -> tuple[np.ndarray, str, tuple[float, float], str]:
        """(volume, colour map, limits, head) of the third column."""
        fixed, warped = self.pair.fixed, self.registered.warped
        if look.comparison == "checkerboard":
            tile = max(1, max(self.pair.shape) // TILES)
            squares = sum(n // tile for n in np.ogrid[tuple(map(slice, self.pair.shape))]) % 2 == 0
            return np.where(squares, fixed, warped), IMAGE, (0, 1), "fixed and warped, in squares"
        if look.comparison == "difference":
            return fixed - warped, SIGNED, (-1, 1), "fixed minus warped"
        if look.comparison == "flicker" and look.frame % 2 == 0:
            return fixed, IMAGE, (0, 1), "fixed"
        if look.comparison == "sample" and self.registered.sigma is not None:
            if self._sample[0] != look.frame:
                self._sample = (look.frame, draw_sample(self.registered, look.frame)[1])
            return self._sample[1], IMAGE, (0, 1), f"warped with sample {look.frame}"
        return warped, IMAGE, (0, 1), "warped"

    def _place(self, panel: dict, voxel: tuple[int, int, int], across: int, up: int) -> None:
        """Where the chosen voxel lies in the moving image, and one σ around it."""
        centre = [voxel[a] + self.registered.displacement[(a, *voxel)] for a in (across, up)]
        panel["place"].set_data([centre[0]], [centre[1]])
        if self.registered.sigma_mm is not None:
            wide, high = (2 * self.registered.sigma_mm[(a, *voxel)] / self.pair.spacing[a] for a in (across, up))
            panel["spread"].set(center=centre, width=wide, height=high)

    def _vectors(self, panel: dict, view: str, column: int, look: Look) -> None:
        """Arrows from x to x + u(x) on the fixed image, or the lines of its grid carried to the moving one."""
        if panel["vectors"] is not None:
            panel["vectors"].remove()
            panel["vectors"] = None
        cut, across, up, _ = VIEWS[view]
        u, index = self.registered.displacement, look.voxel[cut]
        if look.vectors == "arrows" and column == 0:
            step = max(1, round(max(self.pair.shape) / ARROWS))
            x, y = np.meshgrid(*(np.arange(step // 2, self.pair.shape[a], step) for a in (across, up)))
            dx, dy = (slice_of(u[a], view, index)[y, x] for a in (across, up))
            panel["vectors"] = panel["ax"].quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, color=FIXED_COLOUR,
                                                  width=0.008, zorder=3)  # fmt: skip
        if look.vectors == "deformed grid" and column == 1:
            lines = LineCollection(grid_lines(u, view, index), colors=GRID_COLOUR, linewidths=0.7, zorder=3)
            panel["vectors"] = panel["ax"].add_collection(lines, autolim=False)
