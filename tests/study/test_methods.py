"""One table of methods; and VoxelMorph's own conventions held against ours."""

from __future__ import annotations

import pytest
import torch

from gridreg.errors import InputError
from gridreg.network import GridReg
from gridreg.spatial import warp
from study.methods.table import BUILDERS, build, grid_name, grid_sizes, parameter_count
from study.methods.voxelmorph import VoxelMorph

SHAPE = (32, 40, 26)
GRIDREG = {"method": "gridreg", "base_channels": 16, "num_layers": 5, "bayesian": False}
GRIDREG |= {"upsampling": "trilinear", "projector": True, "grids": [[5, 5, 5], [8, 9, 10]]}
RUNS = {
    "identity": {"method": "identity"},
    "voxelmorph": {"method": "voxelmorph", "width": 8, "levels": 5},
    "gridreg": GRIDREG,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(shape=SHAPE, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, 1, *shape), torch.rand(batch, 1, *shape)


def test_every_method_is_tried_here():
    own_files = {"syn", "transmorph", "keymorph"}  # tests/test_syn.py and so on
    assert set(RUNS) | own_files == set(BUILDERS)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_method_is_called_alike_and_starts_near_the_identity(run):
    fixed, moving = pair(batch=2)
    with torch.no_grad():
        registration = build(run)(fixed, moving, grid_sizes(run)[0])
    assert registration.displacement.shape == (2, 3, *SHAPE)
    assert registration.displacement.abs().max() < 0.5  # voxels
    assert (registration.control_points is None) == (run["method"] != "gridreg")


def test_identity_changes_nothing():
    fixed, moving = pair()
    registration = build(RUNS["identity"])(fixed, moving)
    assert (registration.displacement == 0).all()
    torch.testing.assert_close(warp(moving, registration.displacement), moving, rtol=0, atol=1e-6)


def test_unknown_methods_are_refused():
    with pytest.raises(
        InputError, match="method is 'demons'; expected one of identity, syn, voxelmorph, transmorph, keymorph, gridreg"
    ):
        build({"method": "demons"})


def test_settings_reach_the_network():
    network = build(GRIDREG | {"base_channels": 8, "num_layers": 6, "bayesian": True, "upsampling": "bspline"})
    assert parameter_count(network) == parameter_count(GridReg(8, 6, True, "bspline"))
    assert network.upsampling == "bspline" and network.log_variance is not None
    assert len(build(GRIDREG | {"projector": False}).decoder) == 1


def test_grid_sizes_and_names():
    assert grid_sizes(GRIDREG) == [(5, 5, 5), (8, 9, 10)]
    assert grid_sizes(RUNS["voxelmorph"]) == [None]
    assert grid_name((8, 9, 10)) == "8x9x10" and grid_name(None) == ""


def test_only_trained_parameters_count():
    network = torch.nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    assert parameter_count(network) == 6
    assert parameter_count(build(RUNS["identity"])) == 0


# VoxelMorph ----------------------------------------------------------------------------------------------------------


def lively_voxelmorph() -> VoxelMorph:
    """With a flow layer that moves voxels by several voxels, as a trained one does; it starts at 1e-5."""
    model = VoxelMorph(width=4)
    torch.nn.init.normal_(model.network.flow_layer.layer.conv0.weight, std=3)
    return model.eval()


@pytest.mark.parametrize("shape", [SHAPE, (32, 32, 32), (33, 20, 48)])
def test_voxelmorph_takes_any_size(shape):
    fixed, moving = pair(shape, batch=2)
    with torch.no_grad():
        displacement = VoxelMorph(width=4)(fixed, moving).displacement
    assert displacement.shape == (2, 3, *shape)
    assert 0 < displacement.abs().max() < 1e-2


def test_voxelmorph_pads_at_the_far_end():
    """An image that fills 32×64×32 and one padded to it by hand give the same field."""
    model = lively_voxelmorph()
    fixed, moving = pair()
    padded = [torch.zeros(1, 1, 32, 64, 32) for _ in range(2)]
    for whole, part in zip(padded, (fixed, moving)):
        whole[:, :, :32, :40, :26] = part
    with torch.no_grad():
        expected = model(*padded).displacement[:, :, :32, :40, :26]
        torch.testing.assert_close(model(fixed, moving).displacement, expected, rtol=0, atol=1e-4)


def test_voxelmorph_moves_the_moving_image():
    """Its own call, with its own spatial transformer, against ours: roles, order, sign and unit of the components."""
    model = lively_voxelmorph()
    fixed, moving = pair((32, 64, 32))
    with torch.no_grad():
        flow, theirs = model.network(moving, fixed, return_warped_source=True)
        displacement = model(fixed, moving).displacement
    assert displacement.abs().mean() > 0.5
    torch.testing.assert_close(displacement, flow, rtol=0, atol=1e-5)
    compare_inside(theirs, warp(moving, displacement), displacement)


def test_voxelmorphs_spatial_transformer_agrees_with_warp():
    from voxelmorph.nn.modules import SpatialTransformer

    moving = torch.rand(1, 1, 9, 12, 15)
    displacement = torch.randn(1, 3, 9, 12, 15) * torch.tensor([0.5, 1, 2]).view(1, 3, 1, 1, 1)
    compare_inside(SpatialTransformer()(moving, displacement), warp(moving, displacement), displacement)


def compare_inside(theirs: torch.Tensor, ours: torch.Tensor, displacement: torch.Tensor) -> None:
    """Where the warp reads inside the image: beyond it VoxelMorph reads zero, and we read the border."""
    shape = displacement.shape[2:]
    axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    at = torch.stack(axes) + displacement[0]
    inside = torch.stack([(at[a] >= 0) & (at[a] <= shape[a] - 1) for a in range(3)]).all(0)
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(theirs[0, 0][inside], ours[0, 0][inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize("run", [
    {"method": "gridreg", "grids": [[4, 4, 4]]},
    {"method": "voxelmorph", "width": 4, "levels": 2, "integration_steps": 0},
    {"method": "voxelmorph", "width": 4, "levels": 2, "integration_steps": 2},
    {"method": "transmorph", "embed": 12},
    {"method": "keymorph", "keypoints": 8, "width": 4, "layers": 4, "poolings": 1},
], ids=str)  # fmt: skip
def test_a_displacement_has_all_its_digits_in_mixed_precision(run):
    torch.manual_seed(0)
    network, images = build(run).eval(), torch.rand(2, 1, 1, 32, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = network(*images, (4, 4, 4)).displacement
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
