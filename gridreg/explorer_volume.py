"""The explorer's 3-D view: the fixed image under a map in mm, as three slices and a body to turn (needs WebGL)."""

from __future__ import annotations

import nibabel
import numpy as np
from ipyniivue import NiiVue, ShowRender, Volume

from gridreg.explorer import Registered


def volume_view(registered: Registered, overlay: str = "", opacity: float = 0.5, height: int = 400) -> NiiVue:
    """An ipyniivue widget of the fixed image and one of ``Registered.maps`` (by default the first), on the case's grid.

    Slices are shown as radiologists do, the patient's right on the left and the face on the left, as everywhere here.
    """
    values = np.nan_to_num(registered.map_mm(overlay or registered.maps()[0]))
    viewer = NiiVue(
        height=height, multiplanar_show_render=ShowRender.ALWAYS, is_radiological_convention=True, sagittal_nose_left=True,
        crosshair_width=0.7, crosshair_width_unit="mm", crosshair_color=(1, 1, 1, 0.8), show_3d_crosshair=True,
        is_colorbar=True,
    )  # fmt: skip
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
