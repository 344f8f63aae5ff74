"""The matching encoder: its two steps against closed forms, and what a network of it does before any training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from gridreg import matching
from gridreg.checkpoint import build, load_model, save_model
from gridreg.matching import MatchingEncoder, diagonal, fit, inverse, normal_equations, product, standardised
from gridreg.network import GridReg
from study.methods.table import parameter_count

SHAPE = (32, 28, 26)
FLOOR = torch.tensor(0.2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shifted(shift, shape=SHAPE, smooth: float = 2.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth texture, and the same texture moved: moving(x + shift) = fixed(x)."""
    margin = 8
    texture = gaussian_filter(np.random.default_rng(1).standard_normal([n + 2 * margin for n in shape]), smooth)
    texture = (texture - texture.min()) / np.ptp(texture)
    at = np.indices(shape).astype(float) + margin
    read = (at, at - np.asarray(shift)[:, None, None, None])
    images = (map_coordinates(texture, where, order=3).astype(np.float32) for where in read)
    return tuple(torch.from_numpy(image)[None, None] for image in images)


def untrained(passes: int = 1, **settings) -> GridReg:
    """Without the decoder's share: what matching and least squares find with random descriptors."""
    network = GridReg(encoder="match", passes=passes, **settings).eval()
    torch.nn.init.zeros_(network.mean.weight)
    return network


def registered(network: GridReg, images, grid=(6, 5, 7)) -> torch.Tensor:
    with torch.no_grad():
        return network(*images, grid).displacement


# ---- The two steps ---------------------------------------------------------------------------------------------------


def test_attention_is_the_equation():
    """Expected position, its variance and the expected similarity, from the softmax written out."""
    encoder, tokens = MatchingEncoder([4, 4, 4, 4, 4], (5, 3, 2)), (4, 3, 5)
    q, k = (torch.nn.functional.normalize(torch.randn(2, math.prod(tokens), 32), dim=-1) for _ in range(2))
    place = torch.cartesian_prod(*[torch.linspace(-8, 8, n) for n in tokens])
    logits = encoder.log_temperature.exp() * q @ k.transpose(1, 2)
    logits = logits - torch.cdist(place, place).square() / (2 * encoder.log_reach.exp() ** 2)
    weights = logits.softmax(-1)
    mean = weights @ place
    expected = [mean, weights @ place**2 - mean**2, (weights * (q @ k.transpose(1, 2))).sum(-1, keepdim=True)]
    for found, wanted in zip(encoder.attend(q, k, tokens), expected):
        torch.testing.assert_close(found, wanted.transpose(1, 2).unflatten(2, tokens), atol=2e-4, rtol=1e-4)


def test_symmetric_matrices():
    root = torch.randn(5, 3, 3, dtype=torch.float64)
    full = root @ root.transpose(1, 2) + torch.eye(3)
    packed = torch.stack([full[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], dim=1)
    u, inverted = torch.randn(5, 3, dtype=torch.float64), torch.linalg.inv(full)
    torch.testing.assert_close(product(packed, u), (full @ u[..., None])[..., 0])
    torch.testing.assert_close(product(inverse(packed), u), (inverted @ u[..., None])[..., 0])


@pytest.mark.parametrize("shift", [(0.3, 0.0, 0.0), (-0.2, 0.4, 0.1)])
def test_least_squares_find_a_part_of_a_voxel(shift):
    """To a twentieth of a voxel where the window lies inside the image, whatever the gain and the bias."""
    fixed, moving = shifted(shift)
    images = (standardised(MatchingEncoder.reduced(image), FLOOR) for image in (fixed, 0.6 * moving + 0.2))
    matrix, right, _ = normal_equations(*images, matching.lattice(SHAPE, 4))
    found = fit(matrix, right, SHAPE, torch.full((3, 3), 1e-4))[0, :, 2:-2, 2:-2, 2:-2]
    assert np.abs(found.mean((1, 2, 3)).numpy() - shift).max() < 0.05


def test_an_edge_knows_the_motion_across_it_alone():
    """The covariance of an image that varies along one axis: small there, the damping's elsewhere."""
    x = torch.linspace(-3, 3, 24).sigmoid().view(1, 1, -1, 1, 1).expand(1, 1, 24, 20, 22)
    matrix, _, _ = normal_equations(x, x, (6, 5, 6))
    damped = inverse(matrix + 1e-3 * diagonal(torch.ones(1, 3, 1, 1, 1)))[0, :, 2, 2, 2]
    assert damped[0] < 0.5 * damped[3]
    assert damped[3].item() == pytest.approx(1e3, rel=1e-3) and damped[5].item() == pytest.approx(1e3, rel=1e-3)


def test_wide_windows_fill_what_narrow_ones_do_not_see():
    """One token that knows its displacement, among tokens that know nothing, moves all of them."""
    matrix, right = torch.zeros(1, 6, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8)
    matrix[:, [0, 3, 5], 4, 4, 4], right[:, :, 4, 4, 4] = 1.0, torch.tensor([2.0, -1.0, 0.5])
    u = fit(matrix, right, (32, 32, 32), torch.full((40, 3), 1e-3))
    torch.testing.assert_close(u[0, :, 4, 4, 4], torch.tensor([2.0, -1.0, 0.5]), atol=0.05, rtol=0.05)
    assert u[0, 0].min() > 0 and u[0, 1].max() < 0


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_features_are_read_where_they_are(stride):
    """Values at voxels 0, stride, 2 stride … of a linear function, at tokens from corner to corner."""
    shape, tokens = (33, 29, 25), (9, 8, 7)
    place = torch.arange(0, shape[0], stride, dtype=torch.float32).view(1, 1, -1, 1, 1)
    sizes = [-(-n // stride) for n in shape]
    found = matching.read(place.expand(1, 1, *sizes), shape, tokens, stride)[0, 0, 1:-1, 3, 3]
    torch.testing.assert_close(found, torch.linspace(0, shape[0] - 1, tokens[0])[1:-1], atol=1e-4, rtol=1e-4)


def test_lattices_are_bounded():
    for shape in [(32, 32, 26), (128, 128, 102), (160, 192, 224), (500, 20, 17), (2, 3, 40)]:
        tokens = matching.finest(shape, matching.MOST_TOKENS, 4)
        assert math.prod(tokens) <= matching.MOST_TOKENS and min(tokens) >= 2
    assert matching.finest((32, 32, 26), matching.MOST_TOKENS, 4) == (8, 8, 7)


# ---- The network -----------------------------------------------------------------------------------------------------


def test_parameters():
    counts = [parameter_count(GridReg(encoder="match", bayesian=bayesian)) for bayesian in (False, True)]
    assert max(counts) <= 320_000
    assert parameter_count(GridReg(encoder="match", passes=5)) == counts[0]  # the passes share their weights


@pytest.mark.parametrize("settings", [{}, {"upsampling": "bspline", "fold_free": True}, {"bayesian": True}], ids=str)
def test_one_set_of_weights_serves_every_grid_and_shape(settings):
    network = GridReg(encoder="match", passes=2, **settings).eval()
    for shape, grid in [(SHAPE, (5, 5, 5)), (SHAPE, (2, 15, 3)), ((17, 40, 9), (9, 9, 9)), ((24, 3, 18), (3, 2, 18))]:
        with torch.no_grad():
            registration = network(torch.rand(2, 1, *shape), torch.rand(2, 1, *shape), grid)
        assert registration.control_points.shape == (2, 3, *grid)
        assert registration.displacement.shape == (2, 3, *shape)
        assert registration.displacement.isfinite().all()


@pytest.mark.parametrize("passes", [1, 3])
def test_identical_images_stay_where_they_are(passes):
    fixed, _ = shifted((0, 0, 0))
    assert registered(untrained(passes), (fixed, fixed)).abs().max() < 1e-3
    assert registered(untrained(passes), (fixed, 0.6 * fixed + 0.2)).abs().max() < 1e-3
    torch.nn.init.normal_(
        (network := untrained(passes)).mean.weight
    )  # nor does the decoder move them, whatever it learnt
    assert registered(network, (fixed, fixed)).abs().max() < 1e-3
    constant = torch.full((1, 1, *SHAPE), 0.5)
    assert registered(untrained(passes), (constant, constant)).abs().max() < 1e-3
    assert registered(untrained(passes), (constant, torch.zeros_like(constant))).isfinite().all()


@pytest.mark.parametrize("shift", [(2.5, -1.5, 0.5), (-4.0, 0.0, 3.0)])
def test_a_known_shift_is_found_without_training(shift):
    """Random descriptors and least squares: to a tenth of the shift in six passes."""
    images, errors = shifted(shift), []
    for passes in (1, 2, 6):
        found = registered(untrained(passes), images)[0, :, 6:-6, 6:-6, 6:-6]
        errors.append(float((found - torch.tensor(shift).view(3, 1, 1, 1)).square().sum(0).sqrt().mean()))
    assert errors[2] < 0.1 * np.linalg.norm(shift) and errors[1] < errors[0]


def test_passes_may_change_after_training():
    network, images = untrained(1), shifted((1.0, 0.5, -0.5))
    once = registered(network, images)
    network.passes = 3
    torch.testing.assert_close(registered(network, images), registered(untrained_like(network, 3), images))
    assert not torch.equal(once, registered(network, images))


def untrained_like(network: GridReg, passes: int) -> GridReg:
    other = untrained(passes)
    other.load_state_dict(network.state_dict())
    return other


def test_large_images_are_seen_at_a_lower_resolution(monkeypatch):
    """The displacement still comes in voxels of the image."""
    shift = (2.0, -1.0, 1.0)
    images = shifted(shift, (48, 44, 40), smooth=4)
    monkeypatch.setattr(matching, "MOST_VOXELS", 24 * 22 * 20)
    network = untrained(5)
    assert network.encoder.reduced(images[0]).shape[2:] == (24, 22, 20)
    found = registered(network, images)[0, :, 10:-10, 10:-10, 10:-10].mean((1, 2, 3))
    assert np.abs(found.numpy() - shift).max() < 0.25


def test_half_precision_keeps_the_displacement():
    """Convolutions and the decoder may run in bfloat16; positions do not."""
    network, images = untrained(2), shifted((1.0, 0.5, -0.5))
    exact = registered(network, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (registered(network, images) - exact).abs().max() < 0.05


def test_every_weight_learns():
    network, images = GridReg(encoder="match", bayesian=True), shifted((1.0, 0.5, -0.5))
    registration = network(*images, (5, 5, 5))
    (registration.displacement.square().sum() + registration.sigma.square().sum()).backward()
    for name, parameter in network.named_parameters():
        if name == "mean.bias":  # what the head says of nothing to do is subtracted
            continue
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_a_run_is_built_saved_and_loaded(tmp_path):
    run = {"method": "gridreg", "encoder": "match", "passes": 2, "base_channels": 4, "grids": [[5, 5, 5]]}
    network, images = build(run).eval(), shifted((1.0, 0.5, -0.5))
    save_model(tmp_path, network, {"run": run})
    loaded, _ = load_model(tmp_path)
    assert loaded.passes == 2
    assert torch.equal(registered(loaded, images), registered(network, images))


def test_errors():
    with pytest.raises(ValueError, match="encoder must be one of pair, match; found 'siamese'"):
        GridReg(encoder="siamese")
    with pytest.raises(ValueError, match="passes must be at least 1"):
        GridReg(encoder="match", passes=0)
    with pytest.raises(ValueError, match="more need encoder 'match'; found 2"):
        GridReg(passes=2)
