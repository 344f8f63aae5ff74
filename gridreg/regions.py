"""Inside and boundary of an organ: where tissue looks the same everywhere, and where its contrast tells the displacement.

An error averaged over a whole organ mixes two questions. At the boundary the image shows what moved; inside a
homogeneous gland it shows next to nothing, and the transformation model fills the gap (paper, section 1 and Figure 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

THICKNESS_MM = 5.0  # of the boundary shell: one to two voxels of the demo cohorts


def region_masks(
    labels: np.ndarray, spacing_mm: float, thickness_mm: float = THICKNESS_MM, values: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """{"interior": mask, "boundary": mask} of an organ, each (W, H, D) bool; together they are the organ.

    labels        (W, H, D) integers
    spacing_mm    isotropic voxel size
    thickness_mm  of the shell: a voxel whose centre lies at most so deep below the surface is boundary, a deeper one
                  interior. The surface runs half a voxel outside the outermost voxel centres.
    values        labels that make up the organ; None: every label but the background, together

    What the field of view cuts off is no surface. Either mask may be empty: with few voxels, all is boundary. ValueError
    on a thickness that is not positive.
    """
    if not thickness_mm > 0:
        raise ValueError(f"thickness_mm must be above 0, found {thickness_mm}")
    organ = labels > 0 if values is None else np.isin(labels, values)
    # distance to the nearest voxel outside; without one, everything is infinitely deep
    to_outside = ndimage.distance_transform_edt(organ) * spacing_mm if not organ.all() else np.full(organ.shape, np.inf)
    deep = to_outside - spacing_mm / 2 > thickness_mm
    return {"interior": organ & deep, "boundary": organ & ~deep}
