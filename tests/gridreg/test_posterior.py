"""The Laplace posterior: against a dense inverse, its samples against its covariance, and what an edge can tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gridreg
from gridreg import laplace, losses
from gridreg.gauss_newton import Objective
from gridreg.laplace import effective_number, fit_temperature
from gridreg.network import Registration
from gridreg.spatial import voxel_coordinates
from gridreg.upsampling import basis, upsample

SHAPE, GRID = (14, 15, 12), (4, 4, 3)
SETTINGS = {"bending_weight": 0.5, "spacing_mm": (1.0, 2.0, 3.0)}


def random_pair(shape=SHAPE, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.rand(2, 1, 1, *shape, generator=torch.Generator().manual_seed(seed)))


def still(shape=SHAPE, grid=GRID) -> Registration:
    return Registration(torch.zeros(1, 3, *shape), torch.zeros(1, 3, *grid))


@pytest.fixture(scope="module")
def exact():
    return gridreg.posterior(still(), *random_pair(), **SETTINGS)


@pytest.fixture(scope="module")
def sampled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laplace, "EXACT_UNKNOWNS", 0)
        return gridreg.posterior(still(), *random_pair(), samples=1500, **SETTINGS)


@pytest.fixture(scope="module")
def dense():
    """(3, 3, W, H, D) covariance in mm², by NumPy with the whole basis."""
    fixed, moving = random_pair()
    objective = Objective(fixed, moving, GRID, "mse", 0.5, "trilinear", at_grid=False)
    point = objective.at(torch.zeros(1, 3, *GRID))
    normal = objective.normal_equations(point)
    tau = laplace._noise_scale("mse", fixed, point.warped, normal)
    x, y, z = (basis(n, g, dtype=torch.float64).numpy() for n, g in zip(SHAPE, GRID))
    b = np.kron(np.kron(x, y), z)
    jacobian = np.concatenate([row[:, None] * b for row in normal.j[0].flatten(1).double().numpy()], axis=1)
    stiff = sum(k * np.kron(np.kron(x, y), z) for k, (x, y, z) in objective.grams)
    weights = [2 * 0.5 * (2 / (n - 1)) ** 2 for n in SHAPE]
    ridge = np.repeat([tau / (losses.LARGEST_SIGMA * (n - 1)) ** 2 for n in SHAPE], len(stiff))
    matrix = 2 / len(b) * jacobian.T @ jacobian + np.kron(np.diag(weights), stiff) + np.diag(ridge)
    covariance = tau * np.linalg.inv(matrix).reshape(3, len(stiff), 3, len(stiff))
    at_voxels = np.einsum("ng,agbh,nh->abn", b, covariance, b, optimize=True).reshape(3, 3, *SHAPE)
    return at_voxels * np.multiply.outer([1, 2, 3], [1, 2, 3]).reshape(3, 3, 1, 1, 1)


def test_the_exact_covariance_is_that_of_a_dense_inverse(exact, dense):
    np.testing.assert_allclose(exact.covariance_mm2(), dense, rtol=0, atol=1e-3 * np.abs(dense).max())
    np.testing.assert_allclose(exact.sigma_mm(), np.sqrt(np.einsum("aa...->a...", dense)), rtol=2e-3)


def test_samples_by_conjugate_gradients_have_that_covariance(sampled, dense):
    """Within the error of 1500 samples: a standard deviation is known to 1.8 %, five times that is allowed."""
    assert sampled.draws is not None and sampled.precision is None
    sigma = np.sqrt(np.einsum("aa...->a...", dense))
    np.testing.assert_allclose(sampled.sigma_mm(), sigma, rtol=0.09)
    scale = sigma[:, None] * sigma[None]
    assert np.abs((sampled.covariance_mm2().numpy() - dense) / scale).max() < 0.18


def test_samples_of_the_exact_posterior_have_its_covariance(exact):
    fields = upsample(exact.sample(3000), SHAPE)
    spacing = exact.spacing_mm.view(3, 1, 1, 1)
    torch.testing.assert_close((fields.std(0) * spacing).float(), exact.sigma_mm(), rtol=0.065, atol=0)
    assert float((fields.mean(0).abs() / fields.std(0)).max()) < 5 / 3000**0.5
    assert torch.equal(exact.sample(3, seed=5), exact.sample(3, seed=5))
    assert not torch.equal(exact.sample(3, seed=5), exact.sample(3, seed=6))


def test_covariance_between_points(exact, sampled):
    """At one voxel it is the covariance there; between two it is that of the samples, and it fades with distance."""
    here, there = (
        torch.tensor([[3.0, 4.0, 5.0]] * 3),
        torch.tensor([[3.0, 4.0, 5.0], [4.5, 4.0, 5.0], [13.0, 14.0, 11.0]]),
    )
    found = exact.covariance_between_mm2(here, there)
    torch.testing.assert_close(found[0].float(), exact.covariance_mm2()[:, :, 3, 4, 5], rtol=1e-3, atol=1e-5)
    scale = float(found[0].abs().max())
    torch.testing.assert_close(sampled.covariance_between_mm2(here, there), found, rtol=0, atol=0.15 * scale)
    assert found[2].abs().max() < 0.2 * min(found[0].trace(), found[1].trace())
    torch.testing.assert_close(exact.covariance_between_mm2(there, here), found.transpose(1, 2))
    fields = upsample(exact.sample(3000), SHAPE).double() * exact.spacing_mm.view(3, 1, 1, 1)
    midway = fields[:, :, 4:6, 4, 5].mean(-1)  # read linearly between two voxels
    by_samples = (fields[:, :, 3, 4, 5, None] * midway[:, None]).mean(0)
    torch.testing.assert_close(by_samples, found[1], rtol=0, atol=0.15 * scale)


def test_principal_axes_are_those_of_the_covariance(exact):
    sigmas, directions = exact.principal_mm()
    assert (sigmas[0] >= sigmas[1]).all() and (sigmas[1] >= sigmas[2]).all()
    rebuilt = torch.einsum("i...,ia...,ib...->ab...", sigmas.square(), directions, directions)
    covariance = exact.covariance_mm2()
    torch.testing.assert_close(rebuilt, covariance, rtol=1e-3, atol=1e-4 * float(covariance.max()))


@pytest.mark.parametrize("similarity", ["mse", "ncc"])
@pytest.mark.parametrize("limit", [laplace.EXACT_UNKNOWNS, 0])
def test_an_edge_tells_of_motion_across_it_and_not_along_it(similarity, limit, monkeypatch):
    """The plane x + y = const: across is (1, 1, 0), along are (1, -1, 0) and (0, 0, 1)."""
    monkeypatch.setattr(laplace, "EXACT_UNKNOWNS", limit)
    shape = (16, 16, 12)
    x = voxel_coordinates(shape)
    edge = torch.sigmoid((x[0] + x[1] - 15) / 1.5)[None, None]
    noise = 0.02 * torch.randn(2, 1, 1, *shape, generator=torch.Generator().manual_seed(0))
    registration = still(shape, (4, 4, 3))
    found = gridreg.posterior(
        registration, edge + noise[0], edge + noise[1], bending_weight=0.05, similarity=similarity, spacing_mm=2.0
    )
    sigmas, directions = found.principal_mm()
    at = (8, 7, 6)  # on the edge
    across = directions[(2, slice(None), *at)]
    assert float((across @ torch.tensor([0.5**0.5, 0.5**0.5, 0.0])).abs()) > 0.95
    assert sigmas[(1, *at)] > 2 * sigmas[(2, *at)]
    assert sigmas[(2, 1, 1, 6)] > 2 * sigmas[(2, *at)]  # away from the edge nothing is known in any direction


def test_more_noise_and_weaker_images_leave_more_uncertain():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, *SHAPE, generator=generator)
    noise = torch.randn(1, 1, *SHAPE, generator=generator)
    sigma = {
        level: float(gridreg.posterior(still(), image, image + level * noise, bending_weight=0.5).sigma_mm().mean())
        for level in (0.05, 0.1)
    }
    assert sigma[0.1] > 1.5 * sigma[0.05]
    flat = torch.full_like(image, 0.5)
    unknown = gridreg.posterior(still(), flat, flat, bending_weight=0.0).sigma_mm()
    widest = torch.tensor([losses.LARGEST_SIGMA * (n - 1) for n in SHAPE])
    torch.testing.assert_close(unknown.amax((1, 2, 3)), widest, rtol=1e-3, atol=0)


def test_correlated_residuals_count_less():
    noise = torch.randn(1, 1, 40, 40, 40, generator=torch.Generator().manual_seed(0))
    assert effective_number(noise) == pytest.approx(noise.numel(), rel=0.1)
    blurred = torch.nn.functional.avg_pool3d(noise, 3, 1, 1)  # 2/3 of neighbouring windows are the same
    assert effective_number(blurred) == pytest.approx(noise.numel() / 5**3, rel=0.3)
    assert effective_number(torch.zeros(1, 1, 4, 4, 4)) == 64


def test_the_temperature_restores_the_scale(exact):
    rng = np.random.default_rng(0)
    sigma = exact.sigma_mm().numpy().reshape(3, -1)
    pairs = [(3 * sigma * rng.standard_normal(sigma.shape), sigma) for _ in range(2)]
    temperature = fit_temperature(pairs)
    assert temperature == pytest.approx(9, rel=0.05)
    hot = gridreg.posterior(still(), *random_pair(), temperature=4.0, **SETTINGS)
    torch.testing.assert_close(hot.sigma_mm(), exact.tempered(4.0).sigma_mm())
    torch.testing.assert_close(exact.tempered(4.0).sigma_mm(), 2 * exact.sigma_mm())
    with pytest.raises(ValueError, match="found no pairs"):
        fit_temperature([])


def test_twice_the_same(monkeypatch):
    monkeypatch.setattr(laplace, "EXACT_UNKNOWNS", 0)
    first, second = (gridreg.posterior(still(), *random_pair(), samples=8, **SETTINGS) for _ in range(2))
    assert torch.equal(first.draws, second.draws)
    assert not torch.equal(first.draws, gridreg.posterior(still(), *random_pair(), samples=8, seed=1, **SETTINGS).draws)
    with pytest.raises(ValueError, match="holds 8 samples, found a request for 9"):
        first.sample(9)
    assert first.tempered(4.0).sigma_mm().allclose(2 * first.sigma_mm())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"similarity": "mi"}, "mse or ncc, found 'mi'"),
        ({"moving": torch.zeros(1, 1, 4, 4, 4)}, "expected one pair of the same shape"),
        ({"registration": Registration(torch.zeros(1, 3, *SHAPE), None)}, "control points of one pair"),
    ],
)
def test_bad_input(change, message):
    fixed, moving = random_pair()
    with pytest.raises(ValueError, match=message):
        gridreg.posterior(**({"registration": still(), "fixed": fixed, "moving": moving} | change))
