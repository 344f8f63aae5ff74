"""Weights and interrupted trainings on disk: safetensors with JSON beside or inside them, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gridreg.errors import InputError, reason
from gridreg.network import GridReg
from gridreg.scans.files import renamed


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file, renamed to ``path`` on success. InputError that names ``path`` where it cannot be written."""
    try:
        with renamed(path) as temporary:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # some file systems report a full disk only here
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({reason(error)}); expected enough space and permission to write"
        ) from error


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, whole or not at all. InputError where it cannot be written."""
    with _whole(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path | str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write named tensors and a JSON-able note into one safetensors file, whole or not at all.

    InputError where it cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _whole(Path(path)) as temporary:
        save_file(on_cpu, temporary, metadata={"note": json.dumps(note)})


def read_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the note of a file that ``write_tensors`` wrote. InputError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["note"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected weights in safetensors") from error


def save_model(folder: Path | str, network: nn.Module, config: dict[str, Any]) -> None:
    """Write ``model.safetensors`` (the weights) and ``model.json`` (how the network is built and was trained).

    InputError where a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", network.state_dict(), {"run": config["run"]})
    write_text(folder / "model.json", json.dumps(config, indent=2) + "\n")


# Arguments of GridReg
NETWORK = ("base_channels", "num_layers", "bayesian", "upsampling", "projector", "fold_free", "encoder", "passes")


def build(run: dict[str, Any]) -> GridReg:
    """The network that a run's settings describe; settings of its training are ignored. InputError on another method."""
    if run["method"] != "gridreg":
        raise InputError(f"method is {run['method']!r}; expected gridreg")
    return GridReg(**{name: run[name] for name in NETWORK if name in run})


def load_model(
    folder: Path | str, build: Callable[[dict[str, Any]], nn.Module] = build
) -> tuple[nn.Module, dict[str, Any]]:
    """The network that ``save_model`` wrote into a folder, in evaluation mode, and its configuration.

    InputError where a file is missing or unreadable, or where the weights do not belong to the configuration.
    """
    file = Path(folder) / "model.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        network = build(config["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be used ({error}); expected the configuration of a trained model") from error
    weights_file = Path(folder) / "model.safetensors"
    weights, note = read_tensors(weights_file)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != wanted:
        odd = next(name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
        raise InputError(
            f"{weights_file}: {odd} has shape {found.get(odd)}; expected {wanted.get(odd)}, as model.json describes it"
        )
    for name in config["run"].keys() | note["run"].keys():
        if config["run"].get(name) != note["run"].get(name):
            raise InputError(
                f"{weights_file}: trained with {name} {note['run'].get(name)!r}; "
                f"expected {config['run'].get(name)!r}, as {file} says"
            )
    network.load_state_dict(weights)
    return network.eval(), config


def content_hash(*values: Any, files: list[Path] = ()) -> str:
    """A hash of JSON-able values, of the contents of files and of PyTorch's version; it names a scratch folder."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    digest.update(torch.__version__.encode())
    for path in files:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
