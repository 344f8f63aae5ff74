"""KeyMorph: the official package's parts, its coordinates against ours, and fits that never fail."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("keymorph", reason="keymorph is not installed: pip install --no-deps -r requirements-no-deps.txt")

from keymorph.keypoint_aligners import TPS as OfficialTPS
from keymorph.keypoint_aligners import AffineKeypointAligner
from keymorph.net import ConvNet

from gridreg.spatial import transform_points, voxel_coordinates
from study.methods import keymorph
from study.methods.keymorph import KeyMorph, flow_field, to_displacement
from study.methods.table import parameter_count

SHAPE, ODD = (14, 9, 11), (33, 30, 27)
ALIGNERS = [("affine", 0.0), ("tps", 0.0), ("tps", 0.1), ("tps", 10.0)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(shape=ODD, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, 1, *shape), torch.rand(batch, 1, *shape)


def small(align: str = "tps", **settings) -> KeyMorph:
    return KeyMorph(**({"keypoints": 16, "layers": 6, "width": 4, "poolings": 2, "align": align} | settings))


def displacement(fixed: torch.Tensor, moving: torch.Tensor, align: str, tps_lambda: float = 0.0, shape=SHAPE):
    return to_displacement(flow_field(fixed, moving, shape, align, tps_lambda))


def to_voxels(points: torch.Tensor, shape=SHAPE) -> torch.Tensor:
    return (points + 1) / 2 * (torch.tensor(shape) - 1)


def to_normalised(voxels: torch.Tensor, shape=SHAPE) -> torch.Tensor:
    return 2 * voxels / (torch.tensor(shape) - 1) - 1


# The network ---------------------------------------------------------------------------------------------------------


def test_nine_layers_of_width_32_are_the_official_network():
    ours, theirs = KeyMorph(keypoints=5, width=32), ConvNet(3, 1, 5, "instance")
    ours.backbone.load_state_dict(dict(zip(ours.backbone.state_dict(), theirs.state_dict().values())))
    image = torch.rand(1, 1, 32, 17, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(image), theirs(image))


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [({}, 1_403_216), ({"width": 32, "keypoints": 128}, 8_794_496), ({"layers": 4}, 75_632), ({"layers": 7}, 449_072)],
    ids=str,
)
def test_parameter_counts(settings, parameters):
    """The default is within 1 % of the paper's 1 410 329 (Table 1), which the package's own width gives at no K."""
    assert parameter_count(KeyMorph(**settings)) == parameters
    assert abs(parameter_count(KeyMorph()) / 1_410_329 - 1) < 0.01


@pytest.mark.parametrize("layers", range(4, 10))
def test_four_to_nine_layers(layers):
    network = small(layers=layers, poolings=4)
    assert len(network.backbone) == layers
    with torch.no_grad():
        heatmaps = network.backbone(torch.rand(1, 1, *ODD))
    cell = 2 ** ((layers - 1) // 2)
    assert heatmaps.shape == (1, 16, *(n // cell for n in ODD))


@pytest.mark.parametrize("align", ["tps", "affine"])
def test_any_size_and_the_identity_for_equal_images(align):
    fixed, moving = pair(batch=2)
    with torch.no_grad():
        registration = small(align)(fixed, moving, (5, 5, 5))
        nothing = small(align)(fixed, fixed).displacement
    assert registration.displacement.shape == (2, 3, *ODD) and registration.displacement.isfinite().all()
    assert 0 < registration.displacement.abs().mean() < 5  # voxels: noise has no common keypoints
    assert registration.control_points is None and registration.sigma is None
    assert (nothing == 0).all()


@pytest.mark.parametrize("align", ["tps", "affine"])
def test_every_weight_is_trained(align):
    """But the convolutions' biases, which the package has before its norms: these cancel them."""
    network = small(align)
    network(*pair(batch=2)).displacement.square().sum().backward()
    weights = [(name, p) for name, p in network.named_parameters() if not name.endswith("bias")]
    assert [name for name, p in weights if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_batch_is_registered_pair_by_pair():
    fixed, moving = pair(batch=3)
    for align in ("tps", "affine"):
        network = small(align)
        with torch.no_grad():
            single = torch.cat([network(f, m).displacement for f, m in zip(fixed.split(1), moving.split(1))])
            torch.testing.assert_close(network(fixed, moving).displacement, single, rtol=0, atol=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"2 poolings need at least 8 voxels on every axis, found \(32, 32, 7\)"):
        small()(*pair((32, 32, 7)))
    with pytest.raises(ValueError, match="layers must be 4 to 9, found 3"):
        small(layers=3)
    with pytest.raises(ValueError, match="align must be tps or affine, found 'rigid'"):
        small("rigid")


# From heatmaps to keypoints ------------------------------------------------------------------------------------------


def test_a_keypoint_lies_in_the_middle_of_the_voxels_that_its_cell_pooled():
    network, shape, cell = small(), (33, 30, 27), (3, 6, 2)
    heatmaps = torch.zeros(1, 1, *(n // 4 for n in shape))
    heatmaps[(0, 0, *cell)] = 2.0
    voxels = to_voxels(network.locate(heatmaps, shape), shape)
    torch.testing.assert_close(voxels[0, 0], torch.tensor([4 * c + 1.5 for c in cell]))


def test_heatmaps_moved_by_a_cell_move_the_image_by_its_voxels():
    network, shape = small(), (32, 28, 24)
    heatmaps = torch.zeros(1, 16, 8, 7, 6)
    heatmaps[:, :, 1:5, 1:5, 1:5] = torch.rand(1, 16, 4, 4, 4)
    moved = network.locate(heatmaps.roll((1, 2, -1), dims=(2, 3, 4)), shape)
    u = displacement(network.locate(heatmaps, shape), moved, "affine", shape=shape)
    torch.testing.assert_close(u, torch.tensor([4.0, 8, -4]).view(1, 3, 1, 1, 1).expand_as(u), rtol=0, atol=1e-2)


# From keypoints to a displacement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("align", "tps_lambda"), ALIGNERS)
def test_equal_keypoints_move_nothing_at_all(align, tps_lambda):
    points = 2 * torch.rand(2, 20, 3) - 1
    assert (displacement(points, points, align, tps_lambda) == 0).all()


@pytest.mark.parametrize(("align", "tps_lambda"), ALIGNERS)
def test_an_affine_map_of_the_keypoints_is_that_displacement(align, tps_lambda):
    """moving = A fixed + t in voxels of a volume that is no cube, a different one for each pair of the batch."""
    fixed = to_voxels(2 * torch.rand(2, 20, 3) - 1)
    matrix = torch.eye(3) + 0.2 * torch.randn(2, 3, 3)
    shift = 3 * torch.randn(2, 3)
    moving = fixed @ matrix.transpose(1, 2) + shift[:, None]
    found = displacement(to_normalised(fixed), to_normalised(moving), align, tps_lambda)
    at = voxel_coordinates(SHAPE)
    expected = torch.einsum("nab,bijk->naijk", matrix - torch.eye(3), at) + shift[..., None, None, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    assert expected.abs().mean() > 1


def test_without_stiffness_the_spline_carries_keypoints_to_keypoints():
    fixed = torch.stack([torch.randperm(n)[:7].float() for n in SHAPE], dim=-1)[None]  # voxels
    moving = fixed + torch.randn(1, 7, 3)
    u = displacement(to_normalised(fixed), to_normalised(moving), "tps", 0.0)
    torch.testing.assert_close(transform_points(fixed, u), moving, rtol=0, atol=1e-2)


def test_a_stiff_spline_is_nearly_affine():
    fixed, moving = 2 * torch.rand(1, 30, 3) - 1, 2 * torch.rand(1, 30, 3) - 1
    affine, stiff, soft = (displacement(fixed, moving, *to) for to in [("affine",), ("tps", 1e5), ("tps", 0.01)])
    torch.testing.assert_close(stiff, affine, rtol=0, atol=1e-2)
    assert (soft - affine).abs().mean() > 0.5


@pytest.mark.parametrize("tps_lambda", [0.01, 1.0])
def test_the_spline_is_the_official_one(tps_lambda):
    fixed, moving = 2 * torch.rand(1, 20, 3) - 1, 2 * torch.rand(1, 20, 3) - 1
    size = (1, 1, *SHAPE)
    official = OfficialTPS(moving, fixed, torch.tensor([tps_lambda])).get_flow_field(size)
    torch.testing.assert_close(flow_field(fixed, moving, SHAPE, "tps", tps_lambda), official, rtol=0, atol=1e-3)


def test_the_affine_map_is_the_official_one():
    fixed, moving = 2 * torch.rand(1, 20, 3) - 1, 2 * torch.rand(1, 20, 3) - 1
    official = AffineKeypointAligner(moving, fixed).get_flow_field((1, 1, *SHAPE))
    torch.testing.assert_close(flow_field(fixed, moving, SHAPE, "affine", 0.0), official, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("align", "tps_lambda"), ALIGNERS)
@pytest.mark.parametrize("where", ["one point", "one line", "one plane", "a corner of the image"])
def test_degenerate_keypoints_neither_raise_nor_give_nan(align, tps_lambda, where):
    spread = 2 * torch.rand(1, 20, 3) - 1
    squeeze = {"one line": [0, 0, 1], "one plane": [0, 1, 1]}.get(where, [0, 0, 0])
    flat = spread * torch.tensor(squeeze) - (1.0 if "corner" in where else 0.0)
    for fixed, moving in [(flat, flat), (flat, spread), (spread, flat)]:
        fixed, moving = fixed.clone().requires_grad_(), moving.clone().requires_grad_()
        u = displacement(fixed, moving, align, tps_lambda)
        u.square().sum().backward()
        assert u.isfinite().all() and fixed.grad.isfinite().all() and moving.grad.isfinite().all()


def test_the_spline_in_slabs_is_the_spline(monkeypatch):
    points = (2 * torch.rand(2, 2, 20, 3) - 1).requires_grad_()
    whole = displacement(*points, "tps", 0.1)
    (expected,) = torch.autograd.grad(whole.square().mean(), points)
    monkeypatch.setattr(keymorph, "DISTANCES_AT_ONCE", 10_000)
    slabs = displacement(*points, "tps", 0.1)
    (found,) = torch.autograd.grad(slabs.square().mean(), points)
    torch.testing.assert_close(slabs, whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
