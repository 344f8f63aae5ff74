"""The network: its size, any grid with the same weights, live weights, and attention as in equation 3.1."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gridreg import fast, metrics
from gridreg.attention import (
    CHANNELS,
    HEAD_CHANNELS,
    HEADS,
    CrossAttention,
    encoding,
    grid_encoding,
    neighbourhoods,
    readers,
    token_basis,
    token_positions,
    tokens_a_spacing,
)
from gridreg.network import GridReg, level_grid
from gridreg.spatial import control_point_coordinates
from gridreg.upsampling import apply_channels_last
from study.methods.table import parameter_count as count

SHAPE = (24, 27, 31)  # odd sizes, no multiples of 16
WIDTHS = {4: [16, 32, 32, 64], 5: [16, 32, 32, 64, 64], 6: [16, 32, 32, 64, 64, 128], 7: [16, 32, 32, 64, 64, 128, 128]}
WIDTHS |= {8: [*WIDTHS[7], 256], 9: [*WIDTHS[7], 256, 256]}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(shape=SHAPE, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, 1, *shape), torch.rand(batch, 1, *shape)


def test_parameter_count_is_the_papers():
    network = GridReg()
    assert count(network.encoder) == 208_432  # what the paper's 252 960 leave to it
    assert 240_000 <= count(network) <= 252_960 * 1.01
    assert count(network) <= 252_960  # design goal
    assert count(GridReg(projector=False)) < count(network) < count(GridReg(bayesian=True)) <= 252_960


@pytest.mark.parametrize("layers", range(4, 10))
def test_widths_and_strides(layers):
    """Four layers halve the resolution, later ones keep it; the widths give the parameter count of the paper."""
    network = GridReg(num_layers=layers)
    x = torch.rand(1, 2, 33, 20, 24)
    for number, encode in enumerate(network.encoder, start=1):
        x = encode(x)
        halvings = 2 ** min(number, 4)
        assert x.shape[1:] == (WIDTHS[layers][number - 1], *(-(-n // halvings) for n in (33, 20, 24)))
    assert network(*pair((33, 20, 24)), 4).displacement.shape == (1, 3, 33, 20, 24)


@pytest.mark.parametrize("upsampling", ["trilinear", "bspline", "deconv"])
def test_one_set_of_weights_serves_every_grid(upsampling):
    network = GridReg(upsampling=upsampling, bayesian=True).eval()
    images = pair()
    for grid in [(5, 5, 5), (6, 9, 12), (2, 2, 2), (8, 8, 8), 10, (15, 15, 15), (24, 2, 3)]:
        with torch.no_grad():
            registration = network(*images, grid)
        triple = (grid,) * 3 if isinstance(grid, int) else grid
        assert registration.control_points.shape == registration.sigma.shape == (1, 3, *triple)
        assert registration.displacement.shape == (1, 3, *SHAPE)
        assert registration.displacement.isfinite().all() and (registration.sigma > 0).all()
        assert 0 < registration.displacement.abs().max() < 1  # starts near the identity, not at a dead zero


@pytest.mark.parametrize(
    "config",
    [{}, {"bayesian": True}, {"projector": False}, {"base_channels": 8}, {"base_channels": 32}, {"num_layers": 9}],
    ids=str,
)
def test_every_weight_is_trained(config):
    network = GridReg(**config)
    registration = network(*pair(), (5, 6, 7))
    sigma = 0 if registration.sigma is None else registration.sigma.sum()
    (registration.displacement.square().sum() + sigma).backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


@pytest.mark.parametrize(("windows", "channels"), [(1, CHANNELS), (12, 2 * CHANNELS)])
def test_attention_is_equation_3_1(windows, channels):
    """Q = ψ(R) W_Q, K = Ŷ W_K, V = Ŷ W_V; A = softmax(Q Kᵀ / √d); Y = Concat(A V) W_O, each written out."""
    attention = CrossAttention(channels).double()
    queries = torch.randn(12, CHANNELS, dtype=torch.float64)
    tokens = torch.randn(2, windows, 9, channels, dtype=torch.float64)
    q = queries @ attention.query.weight.T
    k, v = tokens @ attention.key.weight.T, tokens @ attention.value.weight.T
    expected = torch.empty(2, 12, CHANNELS, dtype=torch.float64)
    for b, g in itertools.product(range(2), range(12)):
        window, heads = 0 if windows == 1 else g, []
        for part in torch.arange(HEADS * HEAD_CHANNELS).split(HEAD_CHANNELS):
            weights = torch.softmax(k[b, window][:, part] @ q[g, part] / HEAD_CHANNELS**0.5, dim=0)
            heads.append(weights @ v[b, window][:, part])
        expected[b, g] = attention.out(torch.cat(heads))
    torch.testing.assert_close(attention.by_equation(queries, tokens), expected)
    torch.testing.assert_close(attention(queries, tokens), expected)


def test_encodings_follow_the_order_of_the_grid():
    grid = (3, 4, 5)
    coordinates = 2 * control_point_coordinates(grid, (2, 2, 2)) - 1  # in [-1, 1]
    found = grid_encoding(grid, CPU).unflatten(0, grid)
    torch.testing.assert_close(found, encoding(coordinates.permute(1, 2, 3, 0)))
    assert len(torch.unique(grid_encoding((15, 15, 15), CPU).round(decimals=4), dim=0)) == 15**3  # all distinct


@pytest.mark.parametrize(("n", "g"), [(7, 5), (13, 9), (8, 10), (4, 5)])
def test_tokens_are_linear_interpolation_where_they_are_dense(n, g):
    p = tokens_a_spacing(n, g)
    assert (n - 1) / (g - 1) / p <= 1  # tokens at most one feature voxel apart: nothing to smooth
    values = torch.randn(n)
    at = token_positions(g, p) * (n - 1) / (g - 1)
    low = at.floor().long().clamp(max=n - 2)
    expected = values[low] + (at - low).float() * (values[low + 1] - values[low])
    torch.testing.assert_close(token_basis(n, g, p, CPU) @ values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("g", [2, 5, 8, 10, 15])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 32])
def test_tokens_are_averages_of_near_features(n, g):
    p = tokens_a_spacing(n, g)
    weights = token_basis(n, g, p, CPU)
    assert weights.shape == (p * (g + 1), n) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(p * (g + 1)), rtol=0, atol=1e-5)
    windows = token_positions(g, p).unfold(0, 2 * p, p)
    assert windows.shape == (g, 2 * p)
    assert ((windows - torch.arange(g)[:, None]).abs() < 1).all()  # in control-point spacings
    if n >= g:  # a feature voxel is no wider than a spacing: none goes unseen
        assert (weights.sum(0) > 0).all()


@pytest.mark.parametrize("grid", [(5, 7, 9), (7, 3, 15), (9, 5, 7), (5, 5, 25)])
def test_a_control_point_sees_the_tokens_around_it(grid, monkeypatch):
    """Tokens that hold their own coordinates: the mean of those seen is then where the control point is."""
    shape = tuple(3 * (g - 1) // 2 + 1 for g in grid)  # 1.5 feature voxels a spacing
    coordinates = control_point_coordinates(shape, shape)
    volumes = torch.stack([coordinates, 2 * coordinates]).permute(0, 2, 3, 4, 1)
    read = readers(shape, grid, CPU)
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))  # windows at the border are cut off
    expected = control_point_coordinates(grid, shape)
    tokens = neighbourhoods(apply_channels_last(volumes, read), grid)
    assert tokens.shape == (2, math.prod(grid), 4**3, 3)
    means = tokens.mean(2).transpose(1, 2).unflatten(2, grid)
    for factor in (1, 2):
        torch.testing.assert_close(means[factor - 1][inner], factor * expected[inner])

    tokens = apply_channels_last(volumes, [*read[:2], fast.by_window(read[2], grid[2])])
    for numbers in (1, fast.WINDOW_NUMBERS):  # one plane of control points after the other, and all at once
        monkeypatch.setattr(fast, "WINDOW_NUMBERS", numbers)
        blocks = list(fast.windows(tokens, grid, HEADS))
        assert len(blocks) == (grid[0] if numbers == 1 else 1)
        points = np.concatenate([np.arange(math.prod(grid))[some] for some, _, _ in blocks])
        assert (points == np.arange(math.prod(grid))).all()
        near, mask = torch.cat([seen for _, seen, _ in blocks], dim=1), blocks[0][2]
        q = fast.points_a_window(grid[2])
        seen = mask.unflatten(0, (q, HEADS))[:, 0].exp()  # (q, N): 1 or 0
        assert near.shape == (2, math.prod(grid) // q, seen.shape[1], 3) and (seen.sum(1) == 4**3).all()
        shared = torch.einsum("bwnk,qn->bkwq", near, seen / seen.sum(1, keepdim=True)).reshape(2, 3, *grid)
        torch.testing.assert_close(shared, means)


@pytest.mark.parametrize("variant", [{}, {"bayesian": True}, {"projector": False}], ids=str)
@pytest.mark.parametrize("grid", [(4, 3, 5), (7, 8, 6)])
def test_the_fast_attention_is_the_plain_one(variant, grid):
    """The network and its gradient, in double precision, where nothing is left to rounding."""
    network, images = GridReg(**variant).double(), [image.double() for image in pair((18, 22, 26), batch=2)]
    torch.nn.init.normal_(network.mean.weight, std=0.05)
    for level in network.decoder:  # attention far from uniform
        torch.nn.init.normal_(level.attention.query.weight, std=1.0)
    found = []
    for plain in ((), ("attention",)):
        with fast.without(*plain):
            control_points = network(*images, grid).control_points
        gradients = torch.autograd.grad(control_points.square().sum(), network.decoder.parameters())
        found.append([control_points, *gradients])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_columns_is_that_of_their_copies():
    tokens = torch.randn(2, 4, 9, 2, 3, 1, dtype=torch.float64, requires_grad=True)  # 2 and 3 tokens to a spacing
    assert torch.autograd.gradcheck(lambda t: fast._Columns.apply(t, 2, 3), tokens)


def test_windows_of_equal_size_hold_about_as_many_control_points_as_wanted():
    assert [fast.points_a_window(g) for g in (2, 5, 7, 8, 10, 15, 31)] == [2, 5, 7, 4, 5, 5, 31]


def test_a_fast_path_is_switched_off_by_name_and_only_inside_the_block():
    with fast.without("warp"):
        with fast.without("attention"):
            assert not fast.used("warp") and not fast.used("attention")
        assert not fast.used("warp") and fast.used("attention")
    assert all(map(fast.used, fast.PATHS))
    with pytest.raises(KeyError, match="no fast path is called wrap"):
        with fast.without("wrap"):
            pass


def test_a_local_level_is_decoded_no_finer_than_it_can_tell():
    assert level_grid((15, 8, 5), (4, 4, 3)) == (7, 7, 5)
    assert level_grid((15, 15, 15), (16, 16, 13)) == (15, 15, 15)
    assert level_grid((5, 5, 5), (1, 2, 3)) == (2, 3, 5)


def test_cases_of_a_batch_do_not_mix():
    network = GridReg().eval()
    fixed, moving = pair(batch=3)
    with torch.no_grad():
        together = network(fixed, moving, (5, 6, 7)).control_points
        alone = torch.cat([network(fixed[i : i + 1], moving[i : i + 1], (5, 6, 7)).control_points for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_evaluating_first_does_not_forbid_training_later():
    """Encodings and bases are cached: those made in inference mode must serve a training at the same sizes."""
    network, images = GridReg(), pair((18, 22, 26))
    with torch.inference_mode():
        network(*images, (3, 4, 6))
    network(*images, (3, 4, 6)).displacement.sum().backward()


@pytest.mark.parametrize("shape", [(17, 17, 17), (20, 20, 16), (16, 17, 16), (17, 2, 2), (8, 8, 64)])
def test_small_images(shape):
    """One axis above 16 leaves the instance norm two voxels to normalise over."""
    registration = GridReg()(*pair(shape), (2, 2, 2))
    assert registration.displacement.shape == (1, 3, *shape) and registration.displacement.isfinite().all()


def test_an_image_that_the_encoder_shrinks_to_one_voxel_is_refused():
    with pytest.raises(ValueError, match=r"\(16, 16, 16\)"):  # in words of the image, not of a hidden layer
        GridReg()(*pair((16, 16, 16)), 5)


def test_impossible_input_is_refused():
    network = GridReg()
    for grid in (1, (5, 5, 1), (25, 5, 5), (5, 28, 5)):
        with pytest.raises(ValueError, match=r"between 2 and the image size \(24, 27, 31\)"):
            network(*pair(), grid)
    fixed, moving = pair()
    with pytest.raises(ValueError, match="they must agree"):
        network(fixed, moving[..., 1:], 5)
    with pytest.raises(ValueError, match=r"moving must have shape \(B, 1, W, H, D\)"):
        network(fixed, moving.repeat(1, 2, 1, 1, 1), 5)
    with pytest.raises(ValueError, match="upsampling must be one of"):
        GridReg(upsampling="tconv")
    for layers in (3, 10):
        with pytest.raises(ValueError, match="num_layers must lie between 4 and 9"):
            GridReg(num_layers=layers)


def test_a_fold_free_network_cannot_fold_however_large_its_answer():
    network = GridReg(upsampling="bspline", fold_free=True)
    torch.nn.init.normal_(network.mean.weight, std=50.0)
    with torch.no_grad():
        free = network(*pair(), (6, 5, 7))
        network.fold_free = False
        folded = network(*pair(), (6, 5, 7))
    everywhere = np.ones(SHAPE, bool)
    percent = [metrics.nondiffeomorphic_percent(r.displacement[0].numpy(), everywhere) for r in (free, folded)]
    assert percent[0] == 0 and percent[1] > 1
    with pytest.raises(ValueError, match="fold_free needs upsampling 'bspline', found 'trilinear'"):
        GridReg(fold_free=True)
