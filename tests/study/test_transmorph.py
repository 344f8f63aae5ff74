"""TransMorph: the published size, any image size, live weights, and MONAI's transformer used as it was meant."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer, WindowAttention

from gridreg.spatial import voxel_coordinates
from study.methods.table import parameter_count
from study.methods.transmorph import DEPTHS, HEADS, PATCH, WINDOW, Encoder, TransMorph, relative_positions

CPU = torch.device("cpu")
ODD = (33, 30, 27)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pair(shape=ODD, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, 1, *shape), torch.rand(batch, 1, *shape)


def lively(embed: int = 8, **settings) -> TransMorph:
    """With a head that moves voxels by voxels, as a trained one does; it starts at 1e-5."""
    model = TransMorph(embed, **settings)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize(("convolutions", "parameters"), [(1, 41_476_659), (2, 46_771_251)])
def test_parameter_counts_are_the_published_ones(convolutions, parameters):
    """41 476 659 is printed in the GridReg paper's Table 1, 46.77 M in TransMorph's own paper."""
    assert parameter_count(TransMorph(convolutions=convolutions)) == parameters


@pytest.mark.parametrize("shape", [ODD, (32, 32, 26), (16, 12, 9)])
def test_any_size_and_a_start_near_the_identity(shape):
    with torch.no_grad():
        registration = TransMorph(8)(*pair(shape, batch=2), (5, 5, 5))
    assert registration.displacement.shape == (2, 3, *shape)
    assert 0 < registration.displacement.abs().max() < 1e-2  # voxels
    assert registration.control_points is None and registration.sigma is None


@pytest.mark.parametrize("convolutions", [1, 2])
def test_every_weight_is_trained(convolutions):
    network = TransMorph(8, convolutions, drop_path=0.0)
    network(*pair(batch=2)).displacement.square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_images_are_padded_at_the_far_end_and_the_field_is_cropped_back():
    model, (fixed, moving) = lively(), pair()
    padded = [torch.zeros(1, 1, 36, 32, 28) for _ in range(2)]
    for whole, part in zip(padded, (fixed, moving)):
        whole[:, :, :33, :30, :27] = part
    with torch.no_grad():
        expected = model(*padded).displacement[:, :, :33, :30, :27]
        torch.testing.assert_close(model(fixed, moving).displacement, expected, rtol=0, atol=1e-5)
    assert expected.abs().mean() > 0.1


def test_the_order_of_the_images_matters():
    model, (fixed, moving) = lively(), pair()
    with torch.no_grad():
        apart = model(fixed, moving).displacement - model(moving, fixed).displacement
    assert apart.abs().mean() > 0.1


def test_blocks_are_skipped_in_training_only():
    model, images = lively(drop_path=0.9), pair()
    with torch.no_grad():
        first, second = model(*images).displacement, model(*images).displacement
        dropped = model.train()(*images).displacement
    assert torch.equal(first, second) and not torch.allclose(first, dropped)


def test_a_checkpoint_serves_every_size():
    """What depends on the size of the image is no part of the weights."""
    model, images = lively(), pair()
    with torch.no_grad():
        expected = model(*images).displacement
        model(*pair((64, 20, 20)))
        copy = TransMorph(8).eval()
        copy.load_state_dict(model.state_dict())
        torch.testing.assert_close(copy(*images).displacement, expected)


def test_relative_positions_of_a_whole_window_are_monais():
    monai = WindowAttention(8, 2, WINDOW).relative_position_index
    torch.testing.assert_close(relative_positions(WINDOW, CPU), monai)


@pytest.mark.parametrize("window", [(4, 4, 4), (5, 2, 7), (1, 1, 1), (3, 6, 5)])
def test_relative_positions_of_a_smaller_window_are_those_of_its_corner_in_a_whole_one(window):
    at = voxel_coordinates(window, dtype=torch.long).flatten(1)
    inside = (at[0] * WINDOW[1] + at[1]) * WINDOW[2] + at[2]
    expected = relative_positions(WINDOW, CPU)[inside][:, inside]
    torch.testing.assert_close(relative_positions(window, CPU), expected)


def test_the_encoder_is_monais_between_the_first_stages():
    """The same weights in MONAI's own transformer, where no window is shrunk: its outputs are our merged patches."""
    ours = Encoder(8, drop_path=0.0).eval()
    theirs = SwinTransformer(
        in_chans=2, embed_dim=8, window_size=WINDOW, patch_size=(PATCH,) * 3, depths=DEPTHS, num_heads=HEADS,
        qkv_bias=False, patch_norm=True, downsample="mergingv2",
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.swin.state_dict(), strict=False)
    for level, stage in enumerate((theirs.layers1, theirs.layers2)):
        stage[0].downsample.load_state_dict(ours.merge[level].state_dict())
    images, merged = torch.rand(1, 2, 64, 64, 64), []
    for merge in ours.merge:
        merge.register_forward_hook(lambda module, arguments, output: merged.append(output.movedim(-1, 1)))
    with torch.no_grad():
        features, expected = ours(images), theirs(images, normalize=False)
    assert [f.shape[1:] for f in features] == [(8, 16, 16, 16), (16, 8, 8, 8), (32, 4, 4, 4), (64, 2, 2, 2)]
    for mine, monai in zip(merged[:2], expected[1:3]):
        torch.testing.assert_close(mine, monai)


def test_embed_must_suit_the_heads():
    with pytest.raises(ValueError, match="embed must be a multiple of 4, found 10"):
        TransMorph(10)
