"""Figure 2 of the paper, the architecture: drawn from a forward pass, so that every size and count in it is the network's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import nn

from gridreg.attention import CHANNELS
from gridreg.network import GridReg
from gridreg.spatial import Shape
from study.reporting.figures.style import PAGE, save_figure
from study.reporting.results import grid_label
from study.style import styled

IMAGE, ENCODER, PROJECTION, DECODER, FIELD = "#D9D9D9", "#C6DBEF", "#FEE6CE", "#C7E9C0", "#DADAEB"


def _count(module: nn.Module) -> int:
    return sum(weights.numel() for weights in module.parameters())


@torch.inference_mode()
def sizes(network: GridReg, shape: Shape, grid_size: Shape) -> dict[str, Any]:
    """What a forward pass on images of ``shape`` makes: sizes without the batch, and parameters of every part.

    "encoder": layer → (channels, w, h, d); "decoder": layer → (tokens that a control point attends to, control points);
    "parameters": part → number.
    """
    found: dict[str, Any] = {"encoder": {}, "decoder": {}}

    def encoded(number: int):
        return lambda _, __, output: found["encoder"].update({number: tuple(output.shape[1:])})

    def attended(layer: int):
        def note(_, inputs: tuple, output: torch.Tensor) -> None:
            tokens, mask = inputs[1], inputs[2] if len(inputs) > 2 else None
            seen = tokens.shape[2] if mask is None else int(mask[0].isfinite().sum())
            before = found["decoder"].get(layer, (seen, 0))[
                1
            ]  # a level may ask for its control points in several calls
            found["decoder"][layer] = (seen, before + output.shape[1])

        return note

    hooks = [layer.register_forward_hook(encoded(i)) for i, layer in enumerate(network.encoder, start=1)]
    hooks += [level.attention.register_forward_hook(attended(at)) for at, level in zip(network.layers, network.decoder)]
    network.eval()(torch.rand(1, 1, *shape), torch.rand(1, 1, *shape), grid_size)
    for hook in hooks:
        hook.remove()
    heads = [network.mean] + ([] if network.log_variance is None else [network.log_variance])
    found["parameters"] = {
        "encoder": _count(network.encoder),
        "skip-projections": sum(_count(level.project) for level in network.decoder),
        "decoder": sum(_count(level) - _count(level.project) for level in network.decoder),
        "heads": sum(map(_count, heads)),
    }
    return found


def _box(ax: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A box centred on (x, y)."""
    style = "round,pad=0,rounding_size=0.8"
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec="#444444", lw=0.6))
    ax.text(x, y, text, ha="center", va="center", fontsize=6.5, linespacing=1.2)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=6, lw=0.7, color="#444444", **style))


def architecture_figure(
    path: Path | str, shape: Shape = (128, 128, 102), grid_size: Shape = (10, 10, 10), network: GridReg | None = None
) -> Figure:
    """Draw ``network``, by default the paper's with a Bayesian head. Writes ``<path>.png``, ``.pdf`` and ``.txt``."""
    network = network or GridReg(bayesian=True)
    found, layers = sizes(network, shape, grid_size), len(network.encoder)
    points, image = int(np.prod(grid_size)), grid_label("x".join(map(str, shape)))
    xs = np.linspace(25, 93, layers)
    top, middle, bottom, width = 42, 26, 9, min(12.5, 0.84 * (xs[1] - xs[0]))
    with styled():
        figure, ax = plt.subplots(figsize=(PAGE, 3.9), layout="constrained")
        ax.set(xlim=(-1, 101), ylim=(0, 52))
        ax.set_axis_off()
        _box(ax, 7, top, 12, 15, f"fixed and\nmoving image\n2 ×\n{image}", IMAGE)
        before = 13.0
        for number, (channels, *size) in found["encoder"].items():
            x = xs[number - 1]
            height = 3 + 2.1 * np.log2(max(size))  # the finer, the taller
            text = f"layer {number}\n{channels} ×\n{'×'.join(map(str, size))}"
            _box(ax, x, top, width, height, text, ENCODER)
            _arrow(ax, (before, top), (x - width / 2, top))
            before = x + width / 2
        for layer, level in zip(network.layers, network.decoder):
            x, (seen, decoded) = xs[layer - 1], found["decoder"][layer]
            height = 3 + 2.1 * np.log2(max(found["encoder"][layer][1:]))
            who = f"all {seen:,} tokens" if level.coarsest else f"{seen} tokens\naround each"
            each = f"{'all ' if decoded == points else ''}{decoded:,} points\n"
            _box(ax, x, middle, width, 5, f"linear → {CHANNELS}\n+ positions", PROJECTION)
            _box(
                ax, x, bottom, width + 1.5, 11, f"cross-attention\n{each}to {who}\n→ {decoded:,} × {CHANNELS}", DECODER
            )
            _arrow(ax, (x, top - height / 2), (x, middle + 2.5))
            _arrow(ax, (x, middle - 2.5), (x, bottom + 5.5))
        levels = [xs[layer - 1] for layer in network.layers]
        for right, left in zip(levels, levels[1:]):  # coarse to fine runs leftwards
            _arrow(ax, (right - width / 2 - 0.75, bottom), (left + width / 2 + 0.75, bottom))
        head = xs[network.layers[-1] - 1] - width - 5.8
        sigma = ", σ" if network.log_variance is not None else ""
        grid = grid_label("x".join(map(str, grid_size)))
        _box(ax, head, bottom, 10.5, 11, f"heads: μ{sigma}\nof the control\npoints\n3 × {grid}", FIELD)
        _arrow(ax, (levels[-1] - width / 2 - 0.75, bottom), (head + 5.25, bottom))
        _box(ax, 7, bottom, 12, 11, f"{network.upsampling}\nupsampling\n3 ×\n{image}", FIELD)
        _arrow(ax, (head - 5.25, bottom), (13, bottom))
        _box(ax, 7, middle, 12, 5, "warp of the\nmoving image", IMAGE)
        _arrow(ax, (7, bottom + 5.5), (7, middle - 2.5))
        _arrow(ax, (7, top - 7.5), (7, middle + 2.5))
    counts = ", ".join(f"{name} {number:,}" for name, number in found["parameters"].items())
    save_figure(
        figure, path, f"Architecture of GridReg; all sizes come from a forward pass with {grid} control points.",
        "Encoder layer: 3×3×3 convolution, instance normalisation, ReLU. The query of a control point is the encoding of its "
        "position; its features are carried from each level to the next finer one.",
        f"Parameters: {counts}; {_count(network):,} in total. None depends on the grid.",
    )  # fmt: skip
    return figure
