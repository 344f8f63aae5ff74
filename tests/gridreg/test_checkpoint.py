"""Weights on disk: a round trip, whole or not at all, and one sentence for what cannot be used."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from gridreg.checkpoint import content_hash, load_model, read_tensors, save_model, write_tensors, write_text
from gridreg.errors import InputError, exit_status
from study.methods.table import build

RUN = {"method": "gridreg", "base_channels": 8, "num_layers": 4, "bayesian": True}
RUN |= {"upsampling": "bspline", "projector": True}
CONFIG = {"run": RUN, "grid": [5, 5, 5], "val_dice": 0.5}


@pytest.fixture
def saved(tmp_path):
    """A folder with a trained model."""
    torch.manual_seed(0)
    save_model(tmp_path / "run", build(RUN), CONFIG)
    return tmp_path / "run"


def edit(folder, **changes) -> None:
    config = json.loads((folder / "model.json").read_text())
    config["run"] |= changes
    (folder / "model.json").write_text(json.dumps(config))


def test_round_trip(saved):
    torch.manual_seed(0)
    expected = build(RUN).eval()
    network, config = load_model(saved)
    assert config == CONFIG
    assert not network.training and network.upsampling == "bspline"
    images = torch.rand(2, 1, 1, 20, 22, 24)
    with torch.no_grad():
        found, wanted = network(*images, (3, 4, 5)), expected(*images, (3, 4, 5))
    assert torch.equal(found.displacement, wanted.displacement) and torch.equal(found.sigma, wanted.sigma)


def test_files_are_these_two(saved):
    """No temporary file stays, and nothing is a pickle or a zip of pickles."""
    assert sorted(p.name for p in saved.iterdir()) == ["model.json", "model.safetensors"]
    head = (saved / "model.safetensors").read_bytes()
    length = int.from_bytes(head[:8], "little")
    assert json.loads(head[8 : 8 + length])["__metadata__"]["note"] == json.dumps({"run": RUN})


def test_loading_does_not_unpickle(saved, monkeypatch):
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, None)
    load_model(saved)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"base_channels": 16}, "has shape .*; expected .*, as model.json describes it"),
        ({"num_layers": 5}, "has shape .*; expected .*, as model.json describes it"),
        ({"bayesian": False}, "log_variance.bias has shape .*; expected None"),
        ({"projector": False}, "decoder.* has shape"),
        ({"method": "voxelmorph", "width": 8, "levels": 4}, "has shape"),
    ],
)
def test_weights_of_another_configuration_are_refused(saved, changes, named):
    edit(saved, **changes)
    with pytest.raises(InputError, match=named) as refusal:
        load_model(saved, build)
    assert str(refusal.value).startswith(f"{saved / 'model.safetensors'}: ")


def test_weights_trained_with_another_upsampling_are_refused(saved):
    """Every shape is the same, but the field would not be: the weights carry the run they were trained for."""
    edit(saved, upsampling="trilinear")
    with pytest.raises(InputError, match="upsampling"):
        load_model(saved)


@pytest.mark.parametrize("changes", [{"method": "demons"}, {"upsampling": "tconv"}, {"num_layers": 3}])
def test_impossible_configurations_are_refused(saved, changes):
    edit(saved, **changes)
    with pytest.raises(InputError, match=str(next(iter(changes.values())))) as refusal:
        load_model(saved)
    assert str(refusal.value).startswith(f"{saved / 'model.json'}: ")


def test_a_configuration_without_its_settings_is_refused(saved):
    """Those left out are the defaults, which are not what the weights were trained with."""
    (saved / "model.json").write_text('{"run": {"method": "gridreg"}}')
    with pytest.raises(InputError, match="model.safetensors: .* expected .*model.json"):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": {}}'])
def test_broken_configurations_are_refused(saved, text):
    (saved / "model.json").write_text(text)
    with pytest.raises(InputError, match="model.json: cannot be used .* expected the configuration"):
        load_model(saved)


@pytest.mark.parametrize("length", [0, 5, 100, -100])
def test_truncated_weights_are_refused(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="model.safetensors: cannot be read .* expected weights in safetensors"):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        load_model(saved)


def test_weights_of_someone_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "plain.safetensors")  # no note
    with pytest.raises(InputError, match="plain.safetensors: cannot be read"):
        read_tensors(tmp_path / "plain.safetensors")


def test_tensors_and_note_come_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "step": torch.tensor(3), "half": torch.ones(2).half()}
    note = {"step": 3, "history": [{"loss": 0.25}], "best": -1.5}
    write_tensors(tmp_path / "state.safetensors", tensors, note)
    found, again = read_tensors(tmp_path / "state.safetensors")
    assert again == note and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def write_note(path, text: str) -> None:
    write_tensors(path, {"a": torch.zeros(2)}, {"text": text})


@pytest.mark.parametrize("write", [write_text, write_note])
def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    write(path, "old")
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new")
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]
    write(path, "new")
    assert path.read_bytes() != before and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [write_text, write_note])
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, monkeypatch, write):
    """Many file systems notice only when the bytes are sent to the disk; the error then names no file."""
    path = tmp_path / "file"
    write(path, "old")
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match=r"file: cannot be written \(No space left on device\); expected enough space"
    ) as error:
        write(path, "new")
    assert str(error.value).startswith(f"{path}: ")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_one_sentence_that_names_the_file(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for write in (write_text, write_note):
        with pytest.raises(
            InputError, match="file/weights: cannot be written .*expected enough space and permission to write"
        ):
            write(tmp_path / "file" / "weights", "new")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; expected"),
        (OSError(errno.ENOSPC, "No space left on device", "a.csv"), "error: a.csv: No space left on device; expected"),
        (shutil.Error([("a", "b", "why")]), "error: [('a', 'b', 'why')]; expected"),
        (InputError("a sentence"), "error: a sentence"),
    ],
)
def test_a_command_ends_with_one_line_for_every_error_of_files(capsys, error, line):
    def call():
        raise error

    assert exit_status(call) == 1
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1 and "None" not in said


def test_the_hash_follows_values_and_files(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("a = 1")
    first = content_hash({"a": 1, "b": 2}, 3, files=[code])
    assert first == content_hash({"b": 2, "a": 1}, 3, files=[code])
    assert first != content_hash({"a": 1, "b": 2}, 4, files=[code])
    code.write_text("a = 2")
    assert first != content_hash({"a": 1, "b": 2}, 3, files=[code])


@pytest.mark.parametrize("name", ["prostate", "pelvis", "brain"])
def test_the_checkpoints_of_the_clone_are_bayesian_and_serve_any_grid(name):
    network, config = load_model(Path(__file__).parents[2] / "checkpoints" / name)
    assert config["run"]["bayesian"] and len(config["run"]["grids"]) == 4
    with torch.no_grad():
        registration = network(*torch.rand(2, 1, 1, 24, 28, 20), (6, 9, 7))
    assert registration.sigma.shape == (1, 3, 6, 9, 7) and (registration.sigma > 0).all()
    assert registration.displacement.isfinite().all()
