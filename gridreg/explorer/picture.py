"""How the uncertainty explorer looks: one picture of three linked views, and the error against σ.

The picture is drawn by Agg into a PNG, its artists kept and only their data changed: that is what makes a slider answer
at once. Rows are the axial, coronal and sagittal views, columns the fixed image, the moving one, the two compared, and a
map in millimetres.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

from gridreg.calibration import LEVELS, coverage, scale, spread_bins
from gridreg.explorer.registered import Registered, draw_sample, error_and_sigma
from gridreg.explorer.slices import VIEWS, central_voxel, grid_lines, show_slice, slice_of
from gridreg.explorer.style import COLOURS, FIXED_COLOUR, IMAGE, MAGNITUDE, SIGNED, styled

COMPARISONS = ("warped", "checkerboard", "flicker", "difference", "sample")
VECTORS = ("none", "arrows", "deformed grid")
PANEL, DPI = 2.0, 120  # inches across a panel; pixels an inch
LEFT, RIGHT, TOP, BOTTOM, GAP = 0.25, 0.62, 0.28, 0.42, 0.06  # inches
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


class NotebookFigure(Figure):
    """A figure that a notebook shows by itself, as one of pyplot would be shown."""

    def _repr_png_(self) -> bytes:
        return png(self)


class View:
    """The picture of one registered pair. ``draw(look)`` gives a PNG; ``voxel_at`` says what a click in it means."""

    def __init__(self, registered: Registered):
        self.registered, self.pair = registered, registered.pair
        self._sample: tuple[int, np.ndarray] | None = None
        self._map: tuple[str, np.ndarray, float] | None = None
        with styled():
            self._build()

    def show(self, registered: Registered) -> None:
        """Another registration of the same pair, on another grid: the next drawing is of it."""
        self.registered, self._sample, self._map = registered, None, None

    def draw(self, look: Look) -> bytes:
        """The picture as PNG bytes."""
        self.update(look)
        self.canvas.draw()
        return encoded(self.canvas)

    def voxel_at(self, x: float, y: float, voxel: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """The voxel under pixel (x, y), counted from the top left; the axis cut keeps its ``voxel``. None between panels."""
        point = (x, self.figure.bbox.height - y)
        for (view, _), panel in self.panels.items():
            if panel["ax"].bbox.contains(*point):
                _, across, up, _ = VIEWS[view]
                found = list(voxel)
                for axis, value in zip((across, up), panel["ax"].transData.inverted().transform(point)):
                    found[axis] = int(np.clip(round(value), 0, self.pair.shape[axis] - 1))
                return tuple(found)
        return None

    # ---- Building, once -------------------------------------------------------------------------------------------

    def _build(self) -> None:
        pair, mm = self.pair, np.array(self.pair.shape) * self.pair.spacing
        inch = PANEL / max(mm[across] for _, across, _, _ in VIEWS.values())  # a millimetre
        heights = [mm[up] * inch for _, _, up, _ in VIEWS.values()]
        width = LEFT + 4 * PANEL + 3 * GAP + RIGHT
        height = TOP + sum(heights) + 2 * GAP + BOTTOM
        self.figure = NotebookFigure((width, height), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self.panels, self.heads = {}, []
        top = height - TOP
        for view, high in zip(VIEWS, heights):
            top -= high
            for column in range(4):
                left = LEFT + column * (PANEL + GAP)
                ax = self.figure.add_axes((left / width, top / height, PANEL / width, high / height))
                self.panels[view, column] = self._panel(ax, view, column)
            self.figure.text(
                0.08 / width, (top + high / 2) / height, view, rotation=90, va="center", ha="center", fontsize=8
            )
            top -= GAP
        for column, head in enumerate(("fixed", "moving", "", "")):
            left = LEFT + column * (PANEL + GAP) + PANEL / 2
            self.heads.append(self.figure.text(left / width, 1 - 0.2 / height, head, ha="center", fontsize=8.5))
        bar = self.figure.add_axes(
            ((width - RIGHT + 0.08) / width, BOTTOM / height, 0.1 / width, 1 - (TOP + BOTTOM) / height)
        )
        self.figure.colorbar(self.panels["axial", 3]["image"], cax=bar)
        bar.set_title("mm", fontsize=7, pad=3)
        source = "A simulated pair, not a patient. " if pair.simulated else ""
        text = (f"{source}{pair.title}. R, L, A, P, S, I: the patient's right, left, front, back, head, feet.\n"
                "White lines cross at the chosen voxel. Orange: its place in the moving image"
                + (", mean and one σ." if self.registered.sigma_mm is not None else "."))  # fmt: skip
        self.figure.text(0.1 / width, 0.07 / height, text, fontsize=7, color="#333333", va="bottom", linespacing=1.3)

    def _panel(self, ax, view: str, column: int) -> dict:
        """The artists of one panel; ``update`` gives them their data."""
        volume = self.pair.moving if column == 1 else self.pair.fixed
        blank = slice_of(np.zeros(self.pair.shape, np.float32), view, 0)
        panel = {"ax": ax, "overlay": ax.imshow(blank, origin="lower", cmap=MAGNITUDE, zorder=1, visible=False,
                                                interpolation="nearest")}  # fmt: skip
        show_slice(ax, volume, view, 0, self.pair.spacing, letters=column == 0)
        panel["image"] = ax.images[-1]
        panel["image"].set_cmap(MAGNITUDE if column == 3 else IMAGE)
        ax.patch.set_facecolor("#DDDDDD")  # where a map is not known
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_visible(False)  # without ticks it shows nothing, but is laid out at every drawing
        panel["lines"] = [
            ax.axvline(0, color="white", lw=0.6, alpha=0.8),
            ax.axhline(0, color="white", lw=0.6, alpha=0.8),
        ]
        panel["vectors"] = None
        if column == 1:
            panel["place"] = ax.plot([0], [0], ".", color=FIXED_COLOUR, ms=4, zorder=4)[0]
            panel["spread"] = ax.add_patch(Ellipse((0, 0), 0, 0, fill=False, ec=FIXED_COLOUR, lw=1, zorder=4))
        return panel

    # ---- Data, at every change ------------------------------------------------------------------------------------

    def update(self, look: Look) -> None:
        """Give every artist the data of ``look``."""
        if self._map is None or self._map[0] != look.overlay:
            values = self.registered.map_mm(look.overlay)
            self._map = look.overlay, values, float(np.nanpercentile(values, 99.5)) or 1.0
        _, values, top = self._map
        compared, colours, limits, head = self._compared(look)
        for (view, column), panel in self.panels.items():
            cut, across, up, _ = VIEWS[view]
            index = look.voxel[cut]
            if column == 2:
                plane = compared(view, index)
                panel["image"].set_cmap(colours)
                panel["image"].set_clim(*limits)
            else:
                plane = slice_of((self.pair.fixed, self.pair.moving, None, values)[column], view, index)
            if column == 3:
                panel["image"].set_clim(0, top)
            panel["image"].set_data(plane)
            if column in (0, 2):
                panel["overlay"].set(data=slice_of(values, view, index), clim=(0, top), alpha=look.opacity,
                                     visible=look.opacity > 0)  # fmt: skip
            panel["lines"][0].set_xdata([look.voxel[across]] * 2)
            panel["lines"][1].set_ydata([look.voxel[up]] * 2)
            if column == 1:
                self._place(panel, look.voxel, across, up)
            self._vectors(panel, view, column, look)
        self.heads[2].set_text(head)
        self.heads[3].set_text(f"{look.overlay} (mm)")

    def _compared(self, look: Look):
        """(slice of a view and index, colour map, limits, head) of the third column."""
        fixed, warped = self.pair.fixed, self.registered.warped
        if look.comparison == "checkerboard":
            tile = max(1, max(self.pair.shape) // TILES)

            def mixed(view: str, index: int) -> np.ndarray:
                planes = [slice_of(volume, view, index) for volume in (fixed, warped)]
                rows, columns = np.ogrid[: planes[0].shape[0], : planes[0].shape[1]]
                return np.where((rows // tile + columns // tile + index // tile) % 2 == 0, *planes)

            return mixed, IMAGE, (0, 1), "fixed and warped, in squares"
        if look.comparison == "difference":
            return (lambda view, index: slice_of(fixed, view, index) - slice_of(warped, view, index),
                    SIGNED, (-1, 1), "fixed minus warped")  # fmt: skip
        volume, head = warped, "warped"
        if look.comparison == "flicker" and look.frame % 2 == 0:
            volume, head = fixed, "fixed"
        if look.comparison == "sample" and self.registered.sigma is not None:
            if self._sample is None or self._sample[0] != look.frame:
                self._sample = (look.frame, draw_sample(self.registered, look.frame)[1])
            volume, head = self._sample[1], f"warped with sample {look.frame}"
        return lambda view, index: slice_of(volume, view, index), IMAGE, (0, 1), head

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
        _, across, up, _ = VIEWS[view]
        u, index = self.registered.displacement, look.voxel[VIEWS[view][0]]
        if look.vectors == "arrows" and column == 0:
            step = max(1, round(max(self.pair.shape) / ARROWS))
            x, y = np.meshgrid(*(np.arange(step // 2, self.pair.shape[a], step) for a in (across, up)))
            dx, dy = (slice_of(u[a], view, index)[y, x] for a in (across, up))
            panel["vectors"] = panel["ax"].quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=1, color=FIXED_COLOUR,
                                                  width=0.008, zorder=3)  # fmt: skip
        if look.vectors == "deformed grid" and column == 1:
            lines = LineCollection(grid_lines(u, view, index), colors=COLOURS["keymorph"], linewidths=0.7, zorder=3)
            panel["vectors"] = panel["ax"].add_collection(lines, autolim=False)


def picture(registered: Registered, look: Look | None = None) -> Figure:
    """The explorer's picture as a figure, for a notebook without widgets."""
    view = View(registered)
    view.update(look or first_look(registered))
    return view.figure


def error_figure(registered: Registered) -> Figure | None:
    """Error against σ within the pair's region: a reliability diagram and coverage. None where either is not known."""
    known = error_and_sigma(registered)
    if known is None:
        return None
    error, sigma = known
    with styled(), mpl.rc_context({"axes.titlesize": 9}):
        figure = NotebookFigure((7.2, 3.2), dpi=DPI)  # a layout engine would draw everything twice
        left, right = (figure.add_axes((x, 0.225, 0.345, 0.69)) for x in (0.08, 0.6))
        predicted, found = spread_bins(error, sigma)
        most = 1.05 * max(predicted.max(), found.max())
        left.plot([0, most], [0, most], color="#999999", lw=0.8, ls="--", label="ideal")
        left.plot(predicted, found, "o-", color=COLOURS["gridreg-adaptive"], label="this pair, tenths of σ")
        left.set(xlim=(0, most), ylim=(0, most), xlabel="σ, root mean square (mm)", ylabel="error, root mean square (mm)",
                 title="Is the error as large as σ says?")  # fmt: skip
        right.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls="--", label="ideal")
        right.plot(
            LEVELS, coverage(error, sigma, LEVELS), "o-", color=COLOURS["gridreg-adaptive"], ms=3, label="this pair"
        )
        right.set(xlim=(0, 1), ylim=(0, 1), xlabel="central interval of the predicted distribution",
                  ylabel="share of errors within it", title="Coverage")  # fmt: skip
        for ax, free in ((left, "lower right"), (right, "upper left")):
            ax.set_aspect("equal")
            ax.legend(loc=free)
        region = "fixed mask" if registered.pair.labels[0] is not None else "whole image"
        source = "A simulated pair: the" if registered.pair.simulated else "The"
        figure.text(0.01, 0.015, f"{source} true displacement is known at {error.shape[1]} voxels of the {region}. "
                    f"Each axis counts by itself.\nErrors are {scale(error, sigma):.1f} times as large as σ says.",
                    fontsize=7, color="#333333", linespacing=1.3)  # fmt: skip
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return encoded(canvas)


def encoded(canvas: FigureCanvasAgg) -> bytes:
    """What has been drawn on a canvas as PNG bytes: large ones, quickly."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(file, "png", compress_level=1)
    return file.getvalue()
