"""The explorer's 3-D view: the fixed image with a map in millimetres laid over it, turned by the mouse (needs WebGL)."""

from __future__ import annotations

import nibabel
import numpy as np
from ipyniivue import NiiVue, Volume

from gridreg.explorer import Registered


def volume_view(registered: Registered, overlay: str = "", opacity: float = 0.5, height: int = 400) -> NiiVue:
    """An ipyniivue widget of the fixed image and one of ``Registered.maps`` (by default the first), on the case's grid."""
    maps = registered.maps()
    values = np.nan_to_num(maps[overlay or next(iter(maps))])
    viewer = NiiVue(height=height)
    viewer.load_volumes([
        _volume("fixed.nii", registered.case.fixed, registered, colormap="gray", colorbar_visible=False),
        _volume("map.nii", values, registered, colormap="viridis", opacity=opacity, cal_min=0.0,
                cal_max=float(np.percentile(values, 99.5)) or 1.0),
    ])  # fmt: skip
    return viewer


def _volume(name: str, values: np.ndarray, registered: Registered, **look) -> Volume:
    """NIfTI bytes inside the notebook: no file, no server."""
    image = nibabel.Nifti1Image(values.astype(np.float32), registered.case.affine)
    return Volume(name=name, data=image.to_bytes(), **look)
