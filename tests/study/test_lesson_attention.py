"""Lesson 3: the attention shown is the attention that the network used."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gridreg import fast
from gridreg.attention import CHANNELS, HEAD_CHANNELS, HEADS
from gridreg.network import GridReg
from gridreg.scans.pair import Pair
from study.lessons.attention import (
    attend,
    attention_figure,
    attention_table,
    cost_figure,
    costs,
    early_exits,
    images_of,
    levels_figure,
    tokens_in_use,
    watching,
)
from study.lessons.sliders import picture

SHAPE = (24, 27, 31)  # odd sizes


@pytest.fixture
def network() -> GridReg:
    torch.manual_seed(0)
    network = GridReg().eval()
    for level in network.decoder:  # attention far from uniform, and a head that moves something
        torch.nn.init.normal_(level.attention.query.weight, std=1.0)
    torch.nn.init.normal_(network.mean.weight, std=0.05)
    return network


@pytest.fixture
def pair() -> Pair:
    rng = np.random.default_rng(0)
    images = [rng.random(SHAPE, np.float32) for _ in range(2)]
    truth = rng.standard_normal((3, *SHAPE)), np.ones(SHAPE, bool)
    return Pair("a ← b", *images, np.eye(4), 2.0, files=(), to_source=(), truth=truth)


@torch.inference_mode()
@pytest.mark.parametrize("cached", [1, 2**21])
@pytest.mark.parametrize("grid", [(3, 3, 3), (5, 6, 7), (9, 9, 9)])
def test_weights_computed_again_reproduce_what_the_layer_returned(network, pair, grid, cached, monkeypatch):
    monkeypatch.setattr(fast, "WINDOW_NUMBERS", cached)
    returned = []
    hooks = [
        level.attention.register_forward_hook(lambda _, given, result: returned.append(result[0]))
        for level in network.decoder
    ]
    with watching(network) as kept:
        network(*images_of(pair), grid)
    for hook in hooks:
        hook.remove()
    calls = [(level, given) for level, several in zip(network.decoder, kept["attention"]) for given in several]
    assert len(calls) == len(returned) and (len(calls) == 3) == (cached > 1)
    for (level, given), result in zip(calls, returned):
        tokens, weights = given[1], level.attention.weights(*given)[0]
        values = level.attention.value(tokens[0]).unflatten(-1, (HEADS, HEAD_CHANNELS))
        pooled = torch.einsum("cphn,cnhd->cphd", weights, values).flatten(0, 1)
        assert weights.std() > 0.01
        torch.testing.assert_close(level.attention.out(pooled.flatten(1)), result, atol=2e-4, rtol=1e-3)
    assert result.shape[-1] == CHANNELS


@pytest.mark.parametrize("grid", [2, 4, (5, 6, 7), 9])
def test_each_control_point_keeps_all_of_its_attention_and_has_its_tokens_around_it(network, pair, grid):
    for level in attend(network, pair, grid):
        torch.testing.assert_close(level.weights.sum(-1), torch.ones(level.weights.shape[:2]))
        assert level.places.shape == (*level.weights.shape[::2], 3)
        assert level.places.min() >= 0 and (level.places.amax((0, 1)) <= torch.tensor(SHAPE) - 1 + 1e-4).all()
        if level.layer == network.layers[0]:
            continue
        axes = [torch.linspace(0, n - 1, g) for n, g in zip(SHAPE, level.grid_size)]
        at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
        spacing = torch.tensor([(n - 1) / (g - 1) for n, g in zip(SHAPE, level.grid_size)])
        assert ((level.places - at[:, None]).abs() <= spacing + 1e-3).all()  # a window is two spacings wide


def test_equal_logits_mean_all_tokens_are_used(network, pair):
    """With queries of zero the attention is uniform over what is seen."""
    for level in network.decoder:
        torch.nn.init.zeros_(level.attention.query.weight)
    for level in attend(network, pair, 5):
        torch.testing.assert_close(
            tokens_in_use(level), torch.full(level.weights.shape[:2], float(level.weights.shape[-1])), rtol=1e-4, atol=0
        )


@torch.inference_mode()
def test_the_last_exit_is_the_networks_own_answer(network, pair):
    exits = early_exits(network, pair, 6)
    assert [layer for layer, *_ in exits] == list(network.layers)
    own = network(*images_of(pair), (6, 6, 6)).displacement[0].numpy()
    np.testing.assert_allclose(exits[-1][1], own, atol=1e-5)
    assert np.abs(exits[0][1] - own).max() > 1e-3


def test_costs_grow_with_the_grid_but_parameters_do_not():
    table = costs(SHAPE, [3, 8])
    for _, rows in table.groupby("projector"):
        assert rows["parameters"].nunique() == 1
        assert rows["multiply-adds (millions)"].is_monotonic_increasing
    assert table.groupby("projector")["parameters"].first().is_monotonic_increasing  # False, then True
    assert picture(cost_figure(table, SHAPE)).data.startswith(b"\x89PNG")


def test_table_and_figures(network, pair):
    assert len(attention_table(network, pair, [3, 5])) == 6
    for figure in (attention_figure(network, pair, 5, 0.0, 0.5, 1.0), levels_figure(network, pair, 4)):
        assert picture(figure).data.startswith(b"\x89PNG")
