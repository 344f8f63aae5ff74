"""The files that belong to an image lie in the folders beside its own: ``imagesTr/x.nii.gz`` has ``labelsTr/x.nii.gz``.

Releases name them in more ways than one: with another ending, and with or without Learn2Reg's ``_0000`` for the first
modality. What is found is counted against what the folders hold, so that no label map is missing unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gridreg.scans.landmarks import SUFFIXES
from study.cohorts.splits import Subject

VOLUMES = (".nii.gz", ".nii")
FOLDERS = {"label": ("labels", "masks"), "landmarks": ("landmarks",), "truth": ("truth",)}  # in the place of "images"
ENDINGS = {"label": VOLUMES, "landmarks": SUFFIXES, "truth": VOLUMES}
BESIDE_THE_POINT = (".txt", ".md", ".pdf", ".json")  # files of a folder that are no data
FIRST_MODALITY = "_0000"


def id_of(path: str | Path) -> str:
    """File name without folder and without the ending of a volume or a landmark file."""
    name = Path(path).name
    ending = next((e for e in (*VOLUMES, ".gz", *SUFFIXES) if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


class Neighbours:
    """The files in the folders beside those of the images; each folder is listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, list[Path]] = {}
        self._by_id: dict[tuple[Path, str], dict[str, list[Path]]] = {}

    def beside(self, image: Path, kind: str) -> Path | None:
        """The file of a ``kind`` ("label", "landmarks", "truth") that belongs to an image, or None."""
        for folder in _folders(image.parent, kind):
            held = self._files(folder, kind)
            for found in (held[name] for name in _names(image) if name in held):
                return min(found, key=lambda path: not image.name.endswith(path.name.removeprefix(id_of(path))))
        return None

    def notes(self, subjects: Iterable[Subject]) -> list[str]:
        """Sentences on files that no image claims, images that no entry lists, and images that lack labels others have."""
        subjects = list(subjects)
        used = {
            path.resolve() for s in subjects for path in (s.image, s.label, s.landmarks, s.truth) if path is not None
        }
        names = {name for s in subjects for name in _names(s.image)}
        notes = []
        for images in dict.fromkeys(s.image.parent for s in subjects):
            if not images.name.startswith("images"):
                continue
            notes += self._left(images, used, set(), "are not listed")
            mine = [s for s in subjects if s.image.parent == images]
            without = [s.image.name for s in mine if s.label is None]
            if without and (len(without) < len(mine) or any(self._list(f) for f in _folders(images, "label"))):
                notes.append(
                    f"{images.name}: {len(without)} of {len(mine)} listed images have no label map ({some(without)})"
                )
            for kind in FOLDERS:
                for folder in _folders(images, kind):
                    notes += self._left(folder, used, names, "belong to no listed image")
        return notes

    def _left(self, folder: Path, used: set[Path], names: set[str], words: str) -> list[str]:
        """A sentence on the files of a folder that are neither used nor named like one of ``names``."""
        held = self._list(folder)
        left = [path.name for path in held if path.resolve() not in used and id_of(path) not in names]
        return [f"{folder.name}: {len(left)} of {len(held)} files {words} ({some(left)})"] if left else []

    def _files(self, folder: Path, kind: str) -> dict[str, list[Path]]:
        if (folder, kind) not in self._by_id:
            found: dict[str, list[Path]] = {}
            for path in self._list(folder):
                if path.name.lower().endswith(ENDINGS[kind]):
                    found.setdefault(id_of(path), []).append(path)
            self._by_id[folder, kind] = found
        return self._by_id[folder, kind]

    def _list(self, folder: Path) -> list[Path]:
        if folder not in self._listed:
            held = sorted(folder.iterdir()) if folder.is_dir() else []
            self._listed[folder] = [p for p in held if _is_data(p)]
        return self._listed[folder]


def _names(image: Path) -> tuple[str, str, str]:
    """What the files of an image may be called, without their endings."""
    name = id_of(image)
    return name, name.removesuffix(FIRST_MODALITY), name + FIRST_MODALITY


def _folders(images: Path, kind: str) -> list[Path]:
    """The folders that may hold files of a kind for the images of a folder."""
    names = [images.name.replace("images", word, 1) for word in FOLDERS[kind]]
    return [images.parent / name for name in names if name != images.name]


def _is_data(path: Path) -> bool:
    name = path.name.lower()
    return (
        path.is_file() and not name.startswith(".") and (name.endswith(SUFFIXES) or not name.endswith(BESIDE_THE_POINT))
    )


def some(names: list[str], most: int = 3) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
