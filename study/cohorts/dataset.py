"""A preprocessed dataset, as training and evaluation read it: arrays by subject, pairs by split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from gridreg.errors import InputError
from gridreg.scans.landmarks import read_points
from gridreg.scans.pair import Pair
from study.benchmark.memory import available_mb
from study.cohorts.truth import pair_truth

SPARED = 0.5  # of the memory that is free at the start: left to other processes, which look at the same memory


def load_index(folder: Path | str) -> dict:
    """The index of a preprocessed dataset; InputError where there is none."""
    file = Path(folder) / "index.json"
    if not file.is_file():
        raise InputError(f"{file}: found no such file, expected the index of a preprocessed dataset.")
    return json.loads(file.read_text(encoding="utf-8"))


class Preprocessed:
    """Access to one preprocessed folder. Images, labels and landmarks are read once and kept in memory.

    They are kept as long as half of the memory that was free at the start is left. What comes later is read anew each
    time: 3384 brains of 160×192×160 take 67 GB. The arrays handed out are the kept ones: copy before writing into them.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.index = load_index(folder)
        self.shape: tuple[int, int, int] = tuple(self.index["shape"])
        self.spacing = float(self.index["spacing_mm"])  # mm, isotropic
        self._kept: dict[tuple[str, str], Any] = {}
        self._spared = SPARED * available_mb()

    @property
    def affine(self) -> np.ndarray:
        """(4, 4) voxel → world RAS mm of the grid, the same for every subject."""
        return nibabel.load(self._file("images", next(iter(self.index["subjects"])))).affine

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """(fixed id, moving id) of a split: "train", "val" or "test"."""
        if split not in self.index["pairs"]:
            raise InputError(
                f"{self.folder}: found the split '{split}', expected one of {', '.join(self.index['pairs'])}."
            )
        return [(fixed, moving) for fixed, moving in self.index["pairs"][split]]

    def subjects(self, split: str) -> list[str]:
        """Ids of a split, in the order of the index."""
        return [i for i, record in self.index["subjects"].items() if record["split"] == split]

    def image(self, subject: str) -> np.ndarray:
        """(W, H, D) float32 in [0, 1]."""
        return self._keep("image", subject, lambda: self._array("images", subject, np.float32))

    def labels(self, subject: str) -> np.ndarray | None:
        """(W, H, D) int16, or None where the subject has no label map."""
        return self._keep("label", subject, lambda: self._array("labels", subject, np.int16))

    def landmarks(self, subject: str) -> dict[str, np.ndarray] | None:
        """{name: position in voxels, (3,)}, or None where the subject has no landmarks."""
        return self._keep("landmarks", subject, lambda: read_points(self.folder / "landmarks" / f"{subject}.csv")[0])

    def truth(self, fixed: str, moving: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(true displacement (3, W, H, D) float32 voxels, where it is known (W, H, D) bool).

        None without truth, or where the two were made from different templates. Solved anew at each call (0.1 to
        0.4 s at 40×48×40): keep the result.
        """
        records = self._record(fixed), self._record(moving)
        if not all(record["truth"] for record in records) or records[0]["template"] != records[1]["template"]:
            return None
        return pair_truth(self.folder, fixed, moving)

    def pair(self, fixed: str, moving: str) -> Pair:
        """All that is known about two subjects, with the notes of preprocessing on either; read once."""
        records = self._record(fixed), self._record(moving)
        return Pair(
            f"{fixed} ← {moving}", self.image(fixed), self.image(moving), self.affine, self.spacing,
            files=(self._file("images", fixed), self._file("images", moving)),
            to_source=(np.eye(4), np.eye(4)),  # these files lie in the world of the grid, whatever the scans' own is
            labels=(self.labels(fixed), self.labels(moving)),
            label_names={int(value): name for value, name in self.index["labels"].items()},
            landmarks=(self.landmarks(fixed), self.landmarks(moving)), truth=self.truth(fixed, moving),
            simulated=self.index["simulated"], notes=tuple(note for r in records for note in r.get("notes", ())),
        )  # fmt: skip

    def _keep(self, kind: str, subject: str, read: Callable[[], Any]) -> Any:
        if not self._record(subject).get(kind, kind == "image"):
            return None
        if (kind, subject) in self._kept:
            return self._kept[kind, subject]
        value = read()
        if available_mb() > self._spared:
            self._kept[kind, subject] = value
        return value

    def _record(self, subject: str) -> dict:
        if subject not in self.index["subjects"]:
            raise InputError(f"{self.folder}: found the subject '{subject}', expected one of its index.")
        return self.index["subjects"][subject]

    def _array(self, folder: str, subject: str, dtype: type) -> np.ndarray:
        return np.asarray(nibabel.load(self._file(folder, subject)).dataobj, dtype)

    def _file(self, folder: str, subject: str) -> Path:
        return self.folder / folder / f"{subject}.nii.gz"
