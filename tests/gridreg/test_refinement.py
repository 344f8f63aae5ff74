"""Instance refinement: never worse than what it was given, closer to a known warp, and no trace left behind."""

from __future__ import annotations

import math

import pytest
import torch

from gridreg import losses, metrics
from gridreg.network import GridReg, Registration
from gridreg.refinement import default_bending_weight, refine, unsupervised_loss
from gridreg.spatial import voxel_coordinates, warp
from gridreg.upsampling import displacement_bound, upsample

SHAPE, GRID = (20, 22, 17), (5, 6, 4)
WEIGHT = 20.0


def textured_pair(shape, share: float = 0.05, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fixed, moving and the true displacement: sums of waves, so that fixed(x) = moving(x + u(x)) in closed form.

    The displacement is at most about ``share`` of the image along each axis.
    """
    generator = torch.Generator().manual_seed(seed)
    waves = [6 * math.pi * torch.randn(4, generator=generator) for _ in range(24)]
    width = torch.tensor(shape).view(3, 1, 1, 1) - 1

    def texture(x):
        value = sum(torch.sin((wave[:3].view(3, 1, 1, 1) * x / width).sum(0) + wave[3]) for wave in waves)
        return (0.5 + 0.04 * value).clamp(0, 1)[None, None]

    x = voxel_coordinates(shape)
    a, b, c = math.pi * x / width
    u = share * width * torch.stack([a.sin() * (2 * b).sin(), b.sin() * c.cos(), (2 * c).sin() * a.sin()])
    return texture(x + u), texture(x), u[None]


def registration_of(control: torch.Tensor, shape=SHAPE, upsampling: str = "trilinear") -> Registration:
    return Registration(upsample(control, shape, upsampling), control)


def identity(shape=SHAPE, grid=GRID) -> Registration:
    return registration_of(torch.zeros(1, 3, *grid), shape)


def error(registration: Registration, truth: torch.Tensor) -> float:
    """Mean true error in voxels."""
    return float((registration.displacement.detach() - truth).norm(dim=1).mean())


def loss(registration: Registration, fixed, moving, similarity="mse", upsampling="trilinear") -> list[float]:
    """The loss of each case."""
    cases = zip(registration.control_points.split(1), fixed.split(1), moving.split(1))
    return [float(unsupervised_loss(*case, similarity, WEIGHT, upsampling)) for case in cases]


def test_the_loss_is_that_of_training():
    fixed, moving, truth = textured_pair(SHAPE)
    control = losses.at_control_points(truth, GRID)
    found = unsupervised_loss(control, fixed, moving, "mse", WEIGHT, "bspline")
    displacement = upsample(control, SHAPE, "bspline")
    warped = warp(moving, displacement)
    at_grid = [losses.at_control_points(volume, GRID) for volume in (fixed, warped)]
    expected = losses.mse_loss(fixed, warped) + losses.mse_loss(*at_grid) + WEIGHT * losses.bending_energy(displacement)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("upsampling", ["trilinear", "bspline", "deconv"])
@pytest.mark.parametrize("learning_rate", [1e-4, 5e-3, 0.1, 50.0, 1e30])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_worse_than_what_it_was_given(seed, learning_rate, upsampling):
    """Noise without any correspondence, and steps far too large."""
    generator = torch.Generator().manual_seed(seed)
    fixed, moving = torch.rand(2, 2, 1, *SHAPE, generator=generator)
    start = registration_of(3 * torch.randn(2, 3, *GRID, generator=generator), upsampling=upsampling)
    settings = {"steps": 4, "learning_rate": learning_rate, "bending_weight": WEIGHT, "upsampling": upsampling}
    found = refine(start, fixed, moving, **settings)
    before, after = (loss(r, fixed, moving, upsampling=upsampling) for r in (start, found))
    assert all(a <= b for a, b in zip(after, before))
    assert found.displacement.isfinite().all()
    torch.testing.assert_close(found.displacement, upsample(found.control_points, SHAPE, upsampling))
    if learning_rate == 5e-3:
        assert all(a < b for a, b in zip(after, before))
    if learning_rate == 1e30:
        assert torch.equal(found.control_points, start.control_points)


@pytest.mark.parametrize("grid", [(4, 4, 4), (8, 7, 6)])
@pytest.mark.parametrize("shape", [(20, 22, 17), (36, 30, 33)])
def test_it_finds_a_known_warp(shape, grid):
    """With one learning rate for every image and grid size: half of the error, or more, is gone in 30 steps."""
    fixed, moving, truth = textured_pair(shape)
    weight = 0.02 * default_bending_weight(shape)
    start = identity(shape, grid)
    found = refine(start, fixed, moving, bending_weight=weight)
    assert error(found, truth) < 0.5 * error(start, truth)
    further = refine(found, fixed, moving, bending_weight=weight)
    assert error(further, truth) < error(found, truth)


@pytest.mark.parametrize("similarity", list(losses.SIMILARITIES))
def test_every_similarity(similarity):
    fixed, moving, truth = textured_pair(SHAPE)
    settings = {"similarity": similarity, "bending_weight": WEIGHT}
    with torch.inference_mode():
        found = refine(identity(), fixed, moving, **settings)
    assert error(found, truth) < 0.6 * error(identity(), truth)


def test_no_steps_return_what_was_given():
    fixed, moving, _ = textured_pair(SHAPE)
    start = registration_of(torch.randn(1, 3, *GRID))
    assert refine(start, fixed, moving, steps=0) is start


def test_cases_of_a_batch_are_refined_alone():
    pairs = [textured_pair(SHAPE, seed=seed) for seed in (0, 1)]
    start = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(0))
    fixed, moving = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    together = refine(registration_of(start), fixed, moving, steps=5)
    for number, (f, m, _) in enumerate(pairs):
        alone = refine(registration_of(start[number : number + 1]), f, m, steps=5)
        torch.testing.assert_close(together.control_points[number], alone.control_points[0])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_network_is_refined_inside_any_gradient_mode_and_nothing_leaks(mode):
    torch.manual_seed(0)
    network = GridReg(bayesian=True, base_channels=8).eval()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with mode():
        fixed, moving, truth = textured_pair(SHAPE)  # made in that mode too
        given = network(fixed, moving, GRID)
        before = [tensor.detach().clone() for tensor in (given.control_points, given.displacement, given.sigma)]
        found = refine(given, fixed, moving, bending_weight=WEIGHT)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert error(found, truth) < 0.6 * error(given, truth)
    assert not found.displacement.requires_grad and not found.control_points.requires_grad
    assert found.sigma is given.sigma
    for tensor, kept in zip((given.control_points, given.displacement, given.sigma), before):
        assert torch.equal(tensor, kept)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())
    network(torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE), GRID).displacement.sum().backward()  # caches serve it


def test_the_result_is_reproducible():
    fixed, moving, _ = textured_pair(SHAPE)
    first, second = (refine(identity(), fixed, moving, steps=5).control_points for _ in range(2))
    assert torch.equal(first, second)


def test_what_a_fold_free_network_answers_is_refined_and_what_lies_outside_the_bound_is_refused():
    torch.manual_seed(0)
    network = GridReg(base_channels=8, upsampling="bspline", fold_free=True).eval()
    torch.nn.init.normal_(network.mean.weight, std=1e6)  # far outside: control points lie at the bound
    fixed, moving, _ = textured_pair(SHAPE)
    settings = {"steps": 2, "bending_weight": WEIGHT, "upsampling": "bspline"}
    with torch.no_grad():
        given = network(fixed, moving, GRID)
    assert (given.control_points.abs() > 0.999 * displacement_bound(GRID, SHAPE)).any()
    found = refine(given, fixed, moving, fold_free=True, **settings)
    assert loss(found, fixed, moving, upsampling="bspline") <= loss(given, fixed, moving, upsampling="bspline")
    outside = registration_of(1.01 * given.control_points, upsampling="bspline")
    with pytest.raises(ValueError, match="the control points lie outside the bound of fold_free; expected"):
        refine(outside, fixed, moving, fold_free=True, **settings)
    refine(outside, fixed, moving, **settings)


@pytest.mark.parametrize(
    ("made", "read"), [("bspline", "trilinear"), ("deconv", "trilinear"), ("trilinear", "bspline")]
)
def test_control_points_of_another_upsampling_are_refused(made, read):
    fixed, moving, _ = textured_pair(SHAPE)
    start = registration_of(torch.randn(1, 3, *GRID, generator=torch.Generator().manual_seed(0)), upsampling=made)
    with pytest.raises(
        ValueError, match=f"does not follow from the control points by upsampling '{read}'; expected the network's"
    ):
        refine(start, fixed, moving, upsampling=read)


@pytest.mark.parametrize("learning_rate", [0.005, 0.5])
def test_a_fold_free_registration_stays_fold_free(learning_rate):
    """On noise, which rewards folds: without the bound they appear."""
    generator = torch.Generator().manual_seed(1)
    fixed, moving = torch.rand(2, 1, 1, *SHAPE, generator=generator)
    bound = displacement_bound(GRID, SHAPE)
    start = registration_of((bound * (2 * torch.rand(3, *GRID, generator=generator) - 1))[None], upsampling="bspline")
    settings = {"learning_rate": learning_rate, "bending_weight": 0.0, "upsampling": "bspline"}
    found = refine(start, fixed, moving, fold_free=True, **settings)
    assert (found.control_points.abs() <= bound * (1 + 1e-5)).all()
    everywhere = torch.ones(SHAPE, dtype=torch.bool).numpy()
    assert metrics.nondiffeomorphic_percent(found.displacement[0].numpy(), everywhere) == 0
    assert metrics.folding_percent(metrics.jacobian_determinant(found.displacement[0].numpy()), everywhere) == 0
    before, after = (
        float(unsupervised_loss(r.control_points, fixed, moving, "mse", 0.0, "bspline")) for r in (start, found)
    )
    assert after < before if learning_rate == 0.005 else after <= before
    free = refine(start, fixed, moving, **settings | {"learning_rate": 0.05})
    assert (free.control_points.abs() > bound).any()


def test_the_bending_weight_follows_the_image():
    assert default_bending_weight((128, 128, 102)) == pytest.approx(2e5)
    assert default_bending_weight((64, 64, 51)) == pytest.approx(2e5 / 16)
    fixed, moving, _ = textured_pair(SHAPE)
    settings = {"bending_weight": default_bending_weight(SHAPE), "steps": 3}
    found, same = refine(identity(), fixed, moving, steps=3), refine(identity(), fixed, moving, **settings)
    assert torch.equal(found.control_points, same.control_points)


def test_wrong_arguments_are_refused():
    fixed, moving, _ = textured_pair(SHAPE)
    with pytest.raises(ValueError, match="the registration has no control points to refine"):
        refine(Registration(torch.zeros(1, 3, *SHAPE)), fixed, moving)
    with pytest.raises(ValueError, match="steps must be 0 or more, found -1"):
        refine(identity(), fixed, moving, steps=-1)
    with pytest.raises(ValueError, match="similarity must be one of mse, .*; found 'ssd'"):
        refine(identity(), fixed, moving, similarity="ssd")
    with pytest.raises(ValueError, match="upsampling must be one of"):
        refine(identity(), fixed, moving, upsampling="cubic")
    with pytest.raises(ValueError, match="fold_free needs upsampling 'bspline', found 'trilinear'"):
        refine(identity(), fixed, moving, fold_free=True)
    with pytest.raises(ValueError, match="they must agree"):
        refine(identity(), fixed, moving[..., :-1])
    with pytest.raises(ValueError, match="they must agree"):
        refine(identity(), torch.cat([fixed, fixed]), torch.cat([moving, moving]))
    with pytest.raises(ValueError, match="fixed must have shape"):
        refine(identity(), fixed[0], moving)
