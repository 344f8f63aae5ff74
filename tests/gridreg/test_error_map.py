"""The error map: what it sees, what it learns from, and that a pair farther off is expected to be farther off."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from gridreg import calibration, error_map
from gridreg.checkpoint import write_tensors
from gridreg.error_map import ErrorMap, coverage_factor, features, make_pairs, train_error_map
from gridreg.errors import InputError
from gridreg.spatial import warp
from gridreg.upsampling import upsample

SHAPE = (24, 16, 16)
HALF = 12  # texture below, none above, along the first axis


PAIRS = [(0, 1), (1, 2)]


def no_motion(fixed, moving, grid):
    return torch.zeros(fixed.shape[0], 3, *fixed.shape[2:])


def half_textured(seed: int) -> np.ndarray:
    """Texture in one half, a constant in the other."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.normal(size=SHAPE), 1.7)
    image = 0.5 + 0.2 * texture / texture.std()
    image[HALF:] = 0.5
    return image.clip(0, 1).astype(np.float32)


def scans(number: int = 6) -> list[np.ndarray]:
    """One anatomy, displaced by some voxels."""
    generator = torch.Generator().manual_seed(0)
    template = torch.from_numpy(half_textured(0))[None, None]
    fields = [upsample(4.0 * torch.randn(1, 3, 4, 4, 4, generator=generator), SHAPE, "bspline") for _ in range(number)]
    return [warp(template, field)[0, 0].numpy() for field in fields]


@pytest.fixture(scope="module")
def trained() -> ErrorMap:
    return train_error_map(no_motion, scans(), 2.0, pairs=PAIRS, steps=200, made=400, learning_rate=5e-3)


def predict(trained: ErrorMap, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return trained(fixed, moving, no_motion(fixed, moving, None))


def test_no_more_than_100000_parameters():
    assert sum(p.numel() for p in ErrorMap(1.0, spread=True).parameters()) <= 100_000


def test_a_pair_that_is_farther_off_is_expected_to_be(trained):
    image = torch.from_numpy(scans()[0])[None, None]
    means = []
    for voxels in (0.0, 1.0, 3.0):
        moved = warp(image, torch.full((1, 3, *SHAPE), voxels / 3**0.5))
        means.append(float(predict(trained, image, moved)[:, :, : HALF - 2].mean()))
    assert means[0] < means[1] and means[0] < 0.7 * means[2]


def test_of_any_size_odd_or_even(trained):
    fixed = torch.rand(2, 1, 17, 20, 13)
    sigma = predict(trained, fixed, fixed)
    assert sigma.shape == (2, 3, 17, 20, 13) and bool((sigma > 0).all())


def test_the_same_numbers_for_the_same_seed_and_the_global_one_untouched():
    torch.manual_seed(5)
    expected = torch.rand(3)
    maps = []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        maps.append(train_error_map(no_motion, scans(3), 1.0, pairs=PAIRS, steps=2, made=4, batch=2, seed=seed))
        assert torch.equal(torch.rand(3), expected)
    first, again, other = (predict(m, *torch.full((2, 1, 1, *SHAPE), 0.4)) for m in maps)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_any_callable_with_its_grids_its_spread_and_in_inference_mode():
    seen = []

    @torch.inference_mode()
    def register(fixed, moving, grid):
        seen.append(grid)
        return 0.1 * torch.ones(fixed.shape[0], 3, *SHAPE), torch.ones(fixed.shape[0], 3, 4, 4, 4)

    grids = [(4, 4, 4), (5, 5, 5)]
    with torch.inference_mode():
        found = train_error_map(
            register, scans(3), (1.0, 1.0, 2.0), pairs=PAIRS, grids=grids, steps=6, made=20, batch=2
        )
    assert set(seen) == set(grids) and len(seen) == 10  # two pairs a call
    image = torch.rand(1, 1, *SHAPE)
    displacement = torch.zeros(1, 3, *SHAPE)
    with torch.no_grad():
        assert found(image, image, displacement, torch.ones(1, 3, 4, 4, 4)).shape == displacement.shape
    with pytest.raises(ValueError, match="spread is missing"):
        found(image, image, displacement)


def test_pairs_are_what_they_are_said_to_be(monkeypatch):
    """Without another appearance, the true displacement makes the fixed image of the moving one."""
    monkeypatch.setattr(error_map, "other_appearance", lambda images, rng: images)
    images, found = scans(3), torch.ones(2, 3, 4, 4, 4)
    known = make_pairs(no_motion, images, found, np.random.default_rng(0), batch=3)
    assert torch.allclose(warp(known.moving, known.true), known.fixed, atol=1e-6)
    assert any(np.array_equal(known.moving[0, 0], image) for image in images)


def test_random_displacements_have_the_size_of_what_was_found():
    found, rng = 2 * torch.randn(10, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0)), np.random.default_rng(0)
    small, large = (
        torch.cat([error_map.random_displacement(scale * found, SHAPE, 4, rng) for _ in range(20)])
        .square()
        .mean()
        .sqrt()
        for scale in (1.0, 3.0)
    )
    assert 0.4 < small < 2.5 and 2 < large / small < 4.5


def test_gradient_is_that_of_a_plane():
    x = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 1, 8, 6, 6)
    gradient = error_map._gradient(3 * x)
    assert torch.equal(gradient[0, 0, 1:-1], torch.full((6, 6, 6), 3.0)) and not gradient[:, 1:].any()


def test_features_of_the_mirrored_pair():
    fixed, warped, displacement = torch.rand(1, 1, *SHAPE), torch.rand(1, 1, *SHAPE), torch.randn(1, 3, *SHAPE)
    for axis in range(3):
        mirrored = displacement.flip(2 + axis).clone()
        mirrored[:, axis] *= -1
        expected = features(fixed.flip(2 + axis), warped.flip(2 + axis), mirrored)
        assert torch.allclose(error_map._flipped(features(fixed, warped, displacement), axis), expected, atol=1e-5)


def test_the_factor_gives_the_coverage_that_was_asked_for():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(1, 3, (3, 5000))
    error = rng.laplace(size=sigma.shape) * sigma
    for level in (0.5, 0.9):
        factor = coverage_factor(error, sigma, level)
        assert calibration.coverage(error, factor * sigma, (level,))[0] == pytest.approx(level, abs=1e-3)


def test_saved_and_loaded_with_its_factor(trained, tmp_path):
    image = torch.rand(1, 1, *SHAPE)
    before = predict(trained, image, image)
    trained.factor.fill_(1.5)
    trained.save(tmp_path / "map.safetensors")
    trained.factor.fill_(1.0)
    assert torch.allclose(predict(ErrorMap.load(tmp_path / "map.safetensors"), image, image), 1.5 * before)


def test_other_weights_are_refused(tmp_path):
    write_tensors(tmp_path / "other.safetensors", {"a": torch.ones(1)}, {"run": {}})
    with pytest.raises(InputError, match="other.safetensors.*error map"):
        ErrorMap.load(tmp_path / "other.safetensors")
    write_tensors(tmp_path / "part.safetensors", {"a": torch.ones(1)}, {"error_map": {"spread": False}})
    with pytest.raises(InputError, match="part.safetensors"):
        ErrorMap.load(tmp_path / "part.safetensors")


@pytest.mark.parametrize("shapes", [((1, 1, 8, 8, 8), (1, 3, 8, 8, 7)), ((2, 1, 8, 8, 8), (1, 3, 8, 8, 8))])
def test_shapes_that_do_not_agree(trained, shapes):
    image = torch.rand(shapes[0])
    with pytest.raises(ValueError, match="must agree"):
        trained(image, image, torch.zeros(shapes[1]))


def test_one_scan_or_scans_of_two_shapes():
    with pytest.raises(ValueError, match="two or more"):
        train_error_map(no_motion, scans(1), 1.0)
    with pytest.raises(ValueError, match="two or more"):
        train_error_map(no_motion, [scans(1)[0], np.zeros((8, 8, 8), np.float32)], 1.0)
