"""Pressing control points into the bound: nothing beyond it, nothing lost within it, and a way back from far outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gridreg import metrics
from gridreg.upsampling import bounded, displacement_bound, upsample


def test_bounded_control_points():
    grid, shape = (4, 5, 6), (15, 16, 17)
    bound = displacement_bound(grid, shape)
    control = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    for scale in (1e-6, 1.0, 30.0, 1e6):
        found = bounded(scale * control, shape)
        assert found.shape == control.shape and (found.abs() <= bound * (1 + 1e-6)).all()
        assert (found.sign() == control.sign()).all()
    torch.testing.assert_close(bounded(1e-3 * control, shape), 1e-3 * control, rtol=1e-4, atol=0)
    torch.testing.assert_close(bounded(bound[None], shape)[0], bound / 2**0.5)
    assert torch.equal(bounded(torch.zeros_like(control), shape), torch.zeros_like(control))
    further = bounded(2 * control, shape).abs() > bounded(control, shape).abs()
    assert further.all()
    field = upsample(bounded(1e6 * control, shape), shape, "bspline").numpy()  # single precision, as networks work
    for displacement in field:
        assert metrics.jacobian_determinant(displacement).min() > 0
        assert metrics.nondiffeomorphic_percent(displacement, np.ones(shape, bool)) == 0


def test_whatever_is_far_outside_ends_at_the_bound():
    grid, shape = (3, 4, 5), (9, 12, 16)
    bound = displacement_bound(grid, shape)
    for far in (1e14, 1e25, torch.finfo(torch.float32).max, torch.inf):
        for sign in (1, -1):
            control = torch.full((1, 3, *grid), sign * far, requires_grad=True)
            found = bounded(control, shape)
            torch.testing.assert_close(found[0], sign * bound)
            found.sum().backward()
            assert control.grad.isfinite().all()


def test_gradients():
    control = torch.randn(1, 3, 2, 3, 4, dtype=torch.float64).mul_(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: bounded(c, (5, 7, 9)), (control,))
    far = torch.full((1, 3, 3, 3, 3), 100.0, requires_grad=True)
    bounded(far, (9, 9, 9)).sum().backward()
    assert (far.grad > 1e-8).all()  # there is a way back from far outside


def test_a_bound_made_in_inference_mode_serves_a_training_and_autocast_does_not_blunt_it():
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = displacement_bound((3, 4, 5), (9, 12, 16))
    control = torch.ones(1, 3, 3, 4, 5, requires_grad=True)
    bounded(control, (9, 12, 16)).sum().backward()
    exact = displacement_bound((3, 4, 5), (9, 12, 16), dtype=torch.float64)
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=0)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="grid_size must lie between 2 and the image size"):
        displacement_bound((5, 5, 5), (4, 9, 9))
    with pytest.raises(ValueError, match="control_points must have shape"):
        bounded(torch.zeros(1, 1, 4, 4, 4), (9, 9, 9))
