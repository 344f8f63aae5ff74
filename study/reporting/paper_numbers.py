"""The values printed in the GridReg paper, each with what is known about how far it can be trusted.

The text we have of the paper lost its bold cells (the best value of a row) and, with them, the alignment of some
rows. So every value carries a mark:

- ``""``  printed in the table and read without doubt,
- ``"*"`` lost from the table (it was bold), filled in from the paper's running text or from another of its tables,
- ``"?"`` printed, but which column (or which of two statements) it belongs to is uncertain; ``note`` says why.

A value that cannot be read at all is absent: nothing is guessed. The cohorts behind these numbers are two private
ones (prostate, pelvis) and LUMIR (brain), none of which this repository ships.
"""

from __future__ import annotations

from typing import NamedTuple


class Printed(NamedTuple):
    """One value of the paper: mean, standard deviation (None where not printed), mark and the reason for it."""

    mean: float
    sd: float | None = None
    mark: str = ""
    note: str = ""

    def text(self, metric: str) -> str:
        """As printed in the paper and marked, to stand facing our own value, e.g. ``0.86 ± 0.02?``."""
        number = _FORMATS.get(metric, "{:.2f}")
        spread = "" if self.sd is None else f" ± {number.format(self.sd)}"
        return f"{number.format(self.mean)}{spread}{self.mark}"


_FORMATS = {
    "folding_percent": "{:g}",
    "peak_mb": "{:.0f}",
    "memory_mb": "{:.0f}",
    "parameters": "{:,.0f}",
}  # all others: two decimals
_ROW = "alignment of this row with its columns is uncertain in the text we have"
_BOLD = "bold in the paper, lost from the table; value taken from the running text or another table"
_TABLE4 = "from Table 4, which counts determinants below 0"
_TWICE = "the text gives 0.75 in one place and 0.77 in another"

# Which of our runs faces which column of the paper; the separately trained grids have none in Table 1.
PAPER_COLUMN = {
    "identity": "original",
    "ants-syn": "ants-syn",
    "voxelmorph": "voxelmorph",
    "transmorph": "transmorph",
    "keymorph": "keymorph",
    "gridreg-adaptive": "gridreg",
    "gridreg-bayesian": "gridreg-bayesian",  # in Table 4 alone
}

PAPER_COLUMN_LABELS = {
    "original": "Original",
    "ants-syn": "ANTs SyN",
    "voxelmorph": "VoxelMorph",
    "transmorph": "TransMorph",
    "keymorph": "KeyMorph",
    "gridreg": "GridReg",
    "gridreg-bayesian": "GridReg with the Bayesian head",
}

# The paper's Datasets 1, 2 and 3 by the names used here.
PAPER_DATASETS = {"prostate": "Dataset 1", "pelvis": "Dataset 2", "brain": "Dataset 3"}

# TABLE1[dataset, metric][column]; metrics are named as the columns of cases.csv, dataset "" stands for all three.
TABLE1: dict[tuple[str, str], dict[str, Printed]] = {
    ("prostate", "dice"): {
        "original": Printed(0.70, 0.10, "?", _ROW),
        "voxelmorph": Printed(0.86, 0.02, "?", _ROW),
        "transmorph": Printed(0.84, 0.03, "?", _ROW),
        "keymorph": Printed(0.86, 0.05, "?", _ROW + " (Table 2, nine layers, has the same value)"),
        "gridreg": Printed(0.88, 0.02, "*", _BOLD),
    },
    ("prostate", "landmark_mm"): {
        "original": Printed(9.60, 4.09),
        "ants-syn": Printed(9.09, 8.09),
        "voxelmorph": Printed(8.76, 8.59),
        "transmorph": Printed(7.73, 6.98),
        "keymorph": Printed(3.98, 2.14, "*", _BOLD),
        "gridreg": Printed(4.54, 2.77),
    },
    ("prostate", "mask_mm"): {
        "original": Printed(8.76, 4.04),
        "ants-syn": Printed(3.38, 0.78),
        "voxelmorph": Printed(2.70, 0.54),
        "transmorph": Printed(3.05, 0.84),
        "keymorph": Printed(2.56, 0.66),
    },
    ("prostate", "peak_mb"): {
        "voxelmorph": Printed(208),
        "transmorph": Printed(377),
        "keymorph": Printed(274),
        "gridreg": Printed(146, None, "*", _BOLD),
    },
    ("pelvis", "dice"): {
        "ants-syn": Printed(0.69),
        "voxelmorph": Printed(0.73, 0.16),
        "transmorph": Printed(0.73, 0.09),
        "keymorph": Printed(0.79, None, "*", _BOLD),
        "gridreg": Printed(0.78, 0.09),
    },
    ("pelvis", "mask_mm"): {
        "original": Printed(10.65),
        "ants-syn": Printed(6.03),
        "voxelmorph": Printed(5.99),
        "transmorph": Printed(4.47),
        "keymorph": Printed(4.14, None, "*", _BOLD),
        "gridreg": Printed(4.52, 2.88),
    },
    ("pelvis", "peak_mb"): {"voxelmorph": Printed(168), "transmorph": Printed(333), "keymorph": Printed(225)},
    ("brain", "dice"): {
        "original": Printed(0.70, 0.05),
        "ants-syn": Printed(0.69),
        "transmorph": Printed(0.77, 0.05),
        "keymorph": Printed(0.77, 0.06),
        "gridreg": Printed(0.75, None, "?", _TWICE),
    },
    ("brain", "landmark_mm"): {
        "original": Printed(8.67, 6.58),
        "ants-syn": Printed(8.45, 6.64),
        "voxelmorph": Printed(8.70, 6.64),
        "transmorph": Printed(8.35, 6.85),
    },
    ("brain", "mask_mm"): {
        "original": Printed(4.16, 1.94),
        "ants-syn": Printed(3.98),
        "voxelmorph": Printed(3.11, 1.73),
        "transmorph": Printed(3.80),
        "keymorph": Printed(2.97, None, "*", _BOLD),
        "gridreg": Printed(3.05, 1.47),
    },
    ("brain", "peak_mb"): {"voxelmorph": Printed(317), "transmorph": Printed(486), "keymorph": Printed(378)},
    # Headed "bytes" in the paper; 41 476 659 / 252 960 = 164 is its "163×", so these are counts.
    ("", "parameters"): {
        "voxelmorph": Printed(524_181),
        "transmorph": Printed(41_476_659),
        "keymorph": Printed(1_410_329),
        "gridreg": Printed(252_960),
    },
    ("", "seconds"): {
        "ants-syn": Printed(8.08),
        "voxelmorph": Printed(0.23),
        "transmorph": Printed(0.25),
        "keymorph": Printed(0.24),
        "gridreg": Printed(0.23),
    },
}

# Table 4, folding (% of voxels with a non-positive Jacobian determinant); it faces the folding row of our Table 1.
TABLE4_FOLDING: dict[str, dict[str, Printed]] = {
    "prostate": {
        "gridreg-bayesian": Printed(0, None, "", _TABLE4),
        "gridreg": Printed(0, None, "", _TABLE4),
        "keymorph": Printed(3.8, None, "", _TABLE4),
        "voxelmorph": Printed(0.4, None, "", _TABLE4),
        "transmorph": Printed(0.03, None, "", _TABLE4),
    },
    "brain": {
        "gridreg-bayesian": Printed(0, None, "", _TABLE4),
        "gridreg": Printed(0, None, "", _TABLE4),
        "keymorph": Printed(11.0, None, "", _TABLE4),
        "voxelmorph": Printed(0.2, None, "", _TABLE4),
        "transmorph": Printed(4.5, None, "", _TABLE4),
    },
}

# Table 2, by number of encoder layers: (Dice, landmark distance in mm, MB).
TABLE2: dict[str, dict[int, tuple[Printed, Printed, Printed]]] = {
    "keymorph": {
        4: (Printed(0.54, 0.14), Printed(14.74, 9.46), Printed(169)),
        5: (Printed(0.56, 0.14), Printed(14.69, 12.40), Printed(171)),
        6: (Printed(0.58, 0.19), Printed(10.97, 7.52), Printed(174)),
        7: (Printed(0.82, 0.18), Printed(4.42, 3.24), Printed(182)),
        8: (Printed(0.84, 0.07), Printed(4.33, 2.84), Printed(195)),
        9: (Printed(0.86, 0.05), Printed(3.98, 2.14), Printed(208)),
    },
    "gridreg": {
        4: (Printed(0.88, 0.03), Printed(6.05, 3.43), Printed(145)),
        5: (Printed(0.88), Printed(4.54, 2.77), Printed(146)),
        6: (Printed(0.89, 0.03), Printed(3.97, 2.38), Printed(147)),
        7: (Printed(0.89, 0.02), Printed(4.59, 3.09), Printed(148)),
        8: (Printed(0.89, 0.04), Printed(4.25, 2.46), Printed(152)),
        9: (Printed(0.90, 0.03), Printed(4.64, 2.82), Printed(157)),
    },
}


class Ablation(NamedTuple):
    """One configuration of Table 3 with its Dice, landmark distance (mm) and GPU memory (MB)."""

    grid: int
    base_channels: int
    upsampling: str
    projector: bool
    bayesian: bool
    dice: Printed
    landmark_mm: Printed
    peak_mb: Printed


# Table 3 by configuration number; 4 is the default.
TABLE3: dict[int, Ablation] = {
    1: Ablation(5, 32, "trilinear", True, False, Printed(0.86, 0.05), Printed(5.29, 2.85), Printed(146)),
    2: Ablation(10, 32, "trilinear", True, False, Printed(0.89, 0.03), Printed(4.89, 3.19), Printed(148)),
    3: Ablation(10, 8, "trilinear", True, False, Printed(0.87, 0.04), Printed(5.88, 3.27), Printed(144)),
    4: Ablation(10, 16, "trilinear", True, False, Printed(0.88, 0.02), Printed(4.54, 2.77), Printed(146)),
    5: Ablation(10, 16, "trilinear", False, False, Printed(0.86, 0.03), Printed(6.06, 3.23), Printed(145)),
    6: Ablation(10, 16, "deconv", True, False, Printed(0.89, 0.04), Printed(4.18, 2.88), Printed(171)),
    7: Ablation(10, 16, "bspline", True, False, Printed(0.89, 0.03), Printed(4.45, 2.95), Printed(290)),
    8: Ablation(10, 16, "trilinear", True, True, Printed(0.88, 0.03), Printed(4.90, 3.65), Printed(146)),
    9: Ablation(15, 16, "trilinear", True, False, Printed(0.90, 0.03), Printed(5.29, 3.09), Printed(148)),
}

# Text on Figure 8.
FIGURE8_TEXT = (
    "The paper reports p > 0.205 at every grid of Dataset 1, except for Dice at grid 5 (adaptive +0.02, p = 0.043)."
)


def facing_text(dataset: str, metric: str, run: str) -> tuple[str, str]:
    """What stands below our cell, and the notes on it: the paper's value, of memory those of Datasets 1 / 2 / 3; "", if none."""
    if metric != "memory_mb":
        value = facing(dataset, metric, run)
        return (value.text(metric), value.note) if value else ("", "")
    values = [facing(name, "peak_mb", run) for name in PAPER_DATASETS]
    if not any(values):
        return "", ""
    return " / ".join(value.text(metric) if value else "–" for value in values), "; ".join(
        v.note for v in values if v and v.note
    )


def facing(dataset: str, metric: str, run: str) -> Printed | None:
    """The paper's value that faces our cell (``dataset`` "" for rows over all datasets), or None where none can be read.

    Only the three datasets of the paper have one; of our GridReg runs only the adaptive and the Bayesian one do.
    """
    column = PAPER_COLUMN.get(run)
    if column is None:
        return None
    rows = TABLE4_FOLDING.get(dataset, {}) if metric == "folding_percent" else TABLE1.get((dataset, metric), {})
    return rows.get(column)
