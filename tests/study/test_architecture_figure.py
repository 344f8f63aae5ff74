"""Figure 2 says what a forward pass does, also where attention is computed piece by piece."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from gridreg.network import GridReg
from study import style
from study.reporting.figures.architecture import architecture_figure, sizes

pytestmark = pytest.mark.filterwarnings("error")  # a missing glyph or a failed layout is a warning of matplotlib


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few pixels: what is tested does not depend on them."""
    monkeypatch.setitem(style.RC, "savefig.dpi", 50)


def test_the_architecture_is_drawn_from_a_forward_pass(tmp_path):
    network = GridReg(num_layers=6, base_channels=8, projector=False)
    found = sizes(network, (36, 20, 24), (3, 4, 5))
    assert found["encoder"] == {1: (8, 18, 10, 12), 2: (16, 9, 5, 6), 3: (16, 5, 3, 3), 4: (32, 3, 2, 2), 5: (32, 3, 2, 2),
                                6: (64, 3, 2, 2)}  # fmt: skip
    assert found["decoder"] == {6: (12, 60)}  # all tokens of layer 6, 60 control points
    assert sum(found["parameters"].values()) == sum(p.numel() for p in network.parameters())
    local = sizes(GridReg(), (64, 64, 51), (10, 10, 10))
    assert local["decoder"][5] == (4 * 4 * 4, 1000) and local["decoder"][2][1] == 1000 and local["decoder"][2][0] < 1000
    figure = architecture_figure(tmp_path / "figure2", (36, 20, 24), (3, 4, 5), network)
    shown = " ".join(" ".join(text.get_text() for text in figure.findobj(plt.Text)).split())
    for expected in ("layer 6 64 × 3×2×2", "all 12 tokens", "heads: μ of the", "3 × 36×20×24"):
        assert expected in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure2.pdf", "figure2.png", "figure2.txt"]
    assert f"{sum(p.numel() for p in network.parameters()):,} in total" in (tmp_path / "figure2.txt").read_text()


def test_control_points_are_counted_over_all_pieces():
    """On a CPU, attention is computed for some planes of the grid after the other."""
    network, calls = GridReg(), []
    network.decoder[-1].attention.register_forward_hook(lambda *_: calls.append(1))
    found = sizes(network, (128, 128, 102), (10, 10, 10))["decoder"]
    assert len(calls) > 1
    assert {layer: points for layer, (_, points) in found.items()} == {5: 1000, 3: 1000, 2: 1000}
