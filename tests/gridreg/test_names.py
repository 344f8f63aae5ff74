"""The public names mean the same thing whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gridreg


@pytest.mark.parametrize(
    "first", ["gridreg.refinement", "gridreg.laplace", "gridreg.fast", "gridreg.checkpoint", "gridreg.spatial"]
)
def test_functions_are_functions_and_modules_are_modules(first):
    """In a new process, where nothing else has been imported."""
    code = f"""
import importlib, pkgutil, types
importlib.import_module({first!r})
import gridreg
for name in ("refine", "posterior", "warp", "upsample", "upsample_sigma", "transform_points"):
    assert isinstance(getattr(gridreg, name), types.FunctionType), name
for name in ("losses", "metrics", "checkpoint"):
    assert isinstance(getattr(gridreg, name), types.ModuleType), name
assert isinstance(gridreg.GridReg, type) and isinstance(gridreg.Registration, type)
modules = {{module.name for module in pkgutil.iter_modules(gridreg.__path__)}}
assert not modules & (set(gridreg.__all__) - {{"losses", "metrics", "checkpoint"}}), "a module would replace a function"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gridreg' has no attribute 'regsiter'"):
        gridreg.regsiter
