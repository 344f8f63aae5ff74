"""Sliders above a picture, for the teaching notebooks.

The picture is an ordinary PNG output of the cell, and is replaced when a slider moves. Without a browser (Papermill, a
saved notebook) the PNG of the first values remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import ipywidgets
from IPython.display import Image, display
from matplotlib.figure import Figure

from gridreg.explorer.keys import WidgetKeys
from study.style import styled

INCH = 100  # pixels on the screen; the PNG has a quarter more, for sharper text
SHARPER = 1.25


def slider(label: str, options: Sequence[Any], value: Any) -> ipywidgets.SelectionSlider:
    """A slider over the given values, or (text, value) pairs. It reports when it is released, as a figure takes a moment."""
    return ipywidgets.SelectionSlider(
        options=options, value=value, description=label, continuous_update=False,
        style={"description_width": "13.5em"}, layout={"width": "35em"},
    )  # fmt: skip


def menu(label: str, options: Sequence[Any], value: Any) -> ipywidgets.Dropdown:
    """A menu of the given values, or (text, value) pairs."""
    return ipywidgets.Dropdown(
        options=options, value=value, description=label, style={"description_width": "13.5em"}, layout={"width": "35em"}
    )


def picture(figure: Figure) -> Image:
    """A figure as PNG; its label (``Figure(label=…)``) is the text read out where the picture cannot be seen."""
    png = BytesIO()
    with styled():
        figure.savefig(png, format="png", dpi=SHARPER * INCH)
    return Image(png.getvalue(), format="png", width=round(INCH * figure.get_figwidth()), alt=str(figure.get_label()))


def explore(draw: Callable[..., Figure], **controls: ipywidgets.ValueWidget) -> dict[str, ipywidgets.ValueWidget]:
    """Show the controls and, under them, ``draw(**values)``, drawn anew after every change.

    Returns the controls by name: setting ``controls["noise"].value`` from code moves the slider and the picture.
    """

    def values() -> dict[str, Any]:
        return {name: control.value for name, control in controls.items()}

    display(ipywidgets.Box([*controls.values(), WidgetKeys()], layout={"flex_flow": "row wrap"}))
    handle = display(picture(draw(**values())), display_id=True)
    for control in controls.values():
        control.observe(lambda change: handle.update(picture(draw(**values()))), names="value")
    return controls
