"""``fingerprints.yaml`` says what the code computes; another computation is noticed and named, another text is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gridreg import losses, metrics, network
from gridreg.errors import InputError
from study.config import params
from study.evaluation import evaluate
from study.methods.table import BUILDERS
from study.training import fingerprint, kinds, objective, train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def anew():
    """Nothing that was computed before is taken, and nothing that is computed here is kept."""
    fingerprint._trained.cache_clear()
    yield
    fingerprint._trained.cache_clear()


def changed(section: str, kind: str) -> list[str]:
    numbers = fingerprint.training_numbers if section == "train" else fingerprint.evaluation_numbers
    return list(fingerprint.differences({kind: numbers(kind)}, kinds.numbers_of(section, [kind]), section))


def test_the_code_computes_what_the_file_says(anew):
    found = list(fingerprint.differences(fingerprint.compute(), kinds.read()))
    assert not found, f"run `{kinds.COMMAND}`; DVC then runs these kinds again:\n" + "\n".join(found)


def another_initialisation(patch):
    patch.setattr(nn.init, "normal_", lambda tensor, std=1.0, **_: tensor.data.normal_(std=1.1 * std))


def another_weight(patch):
    patch.setattr(objective, "UNCERTAINTY_WEIGHT", 1.02 * objective.UNCERTAINTY_WEIGHT)


def another_norm(patch):
    norm = nn.functional.layer_norm
    patch.setattr(nn.functional, "layer_norm", lambda *given, **named: norm(*given[:4], eps=1e-2))


def another_bending_energy(patch):
    energy = losses.grid_bending_energy
    patch.setattr(losses, "grid_bending_energy", lambda *given: 1.01 * energy(*given))


def no_bending_in_the_sum(patch):
    terms = train.loss_terms
    patch.setattr(train, "loss_terms", lambda *given, **named: terms(*given, **named) | {"bending": torch.zeros(())})


def another_momentum(patch):
    adam = torch.optim.Adam
    patch.setattr(torch.optim, "Adam", lambda weights, lr, betas: adam(weights, lr=lr, betas=(0.8, betas[1])))


def another_learning_rate(patch):
    patch.setattr(train, "WARM_UP", 0.9)


def other_pairs(patch):
    draw = train.draw
    patch.setattr(train, "draw", lambda pairs, grids, batch, seed, *rest: draw(pairs, grids, batch, seed + 1, *rest))


@pytest.mark.parametrize("change", [
    another_initialisation, another_weight, another_norm, another_bending_energy, no_bending_in_the_sum,
    another_momentum, another_learning_rate, other_pairs,
])  # fmt: skip
def test_another_computation_is_noticed_and_the_kind_is_named(anew, monkeypatch, change):
    with monkeypatch.context() as patch:
        change(patch)
        found = changed("train", "gridreg-trilinear-bayesian")
        with pytest.raises(
            InputError, match=rf"train.gridreg-trilinear-bayesian.* in fingerprints.yaml .*`{kinds.COMMAND}`"
        ):
            fingerprint.check(["gridreg-trilinear-bayesian"])
    assert found and all(line.startswith("train.gridreg-trilinear-bayesian.") for line in found)
    fingerprint._trained.cache_clear()
    assert not changed("train", "gridreg-trilinear-bayesian")


def test_a_change_of_one_kind_leaves_the_others_alone(anew, monkeypatch):
    monkeypatch.setattr(objective, "UNCERTAINTY_WEIGHT", 0.5)
    assert not changed("train", "gridreg-trilinear") and changed("train", "gridreg-deconv-bayesian")


def test_another_evaluation_is_noticed(monkeypatch):
    assert not changed("evaluate", "metrics") and not changed("evaluate", "refinement-ncc")
    regions, refine = metrics.region_masks, evaluate.refine
    monkeypatch.setattr(metrics, "region_masks", lambda labels, spacing: regions(labels, spacing, 3.0))
    monkeypatch.setattr(evaluate, "refine", lambda *given, **named: refine(*given, **named | {"bending_weight": 1.0}))
    assert [line.split(" is ")[0] for line in changed("evaluate", "metrics")] == [
        "evaluate.metrics.tre_interior_mm, 1 labels", "evaluate.metrics.tre_boundary_mm, 1 labels"]  # fmt: skip
    assert changed("evaluate", "refinement-ncc") and not changed("evaluate", "gridreg-bspline")


def test_an_edit_of_text_changes_nothing(anew, monkeypatch, tmp_path):
    """A module with other comments, docstrings and names of local variables computes the same."""
    source = Path(network.__file__).read_text(encoding="utf-8")
    edited = source.replace("features, x, y, at = {}", "# another comment\n        features, x, y, at = {}")
    edited = edited.replace('"""fixed, moving (B, 1, W, H, D)', '"""Another docstring. fixed, moving (B, 1, W, H, D)')
    assert edited.count("nother") >= 2
    scope = {"__name__": network.__name__}
    exec(compile(edited, "edited.py", "exec"), scope)
    monkeypatch.setitem(BUILDERS, "gridreg", lambda run: scope["GridReg"](
        **{name: run[name] for name in ("base_channels", "num_layers", "upsampling", "bayesian") if name in run}
    ))  # fmt: skip
    assert not changed("train", "gridreg-bspline-bayesian")


def test_random_numbers_of_others_are_left_alone(anew):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    fingerprint.training_numbers("keymorph-affine")
    assert torch.equal(torch.rand(3), expected)


def test_every_method_and_every_run_of_params_yaml_has_its_kinds(tmp_path):
    stored = kinds.read()
    for method in BUILDERS:
        assert set(kinds.evaluation_kinds({"method": method})) <= set(stored["evaluate"]), method
    values = params.load(ROOT / "params.yaml")
    kinds.write(tmp_path, values)
    for dataset in values["use"]["datasets"]:
        for run in values["use"]["trained"]:
            numbers = json.loads((tmp_path / "train" / dataset / f"{run}.json").read_text())
            assert numbers.keys() <= stored["train"].keys() and len(numbers) >= 2
    bayesian = json.loads((tmp_path / "train" / values["use"]["datasets"][0] / "gridreg-bayesian.json").read_text())
    assert "gridreg-trilinear-bayesian" in bayesian
    assert len(list(tmp_path.glob("evaluate/*/*.json"))) >= 11


def test_kinds_follow_the_settings_that_are_code_of_their_own():
    run = {"method": "gridreg", "grids": [[5, 5, 5]]}
    assert kinds.training_kinds(run, "mse", 0.3) == ["gridreg-trilinear", "labels"]
    assert kinds.training_kinds(run | {"upsampling": "bspline", "fold_free": True, "bayesian": True}, "mse", 0) == [
        "gridreg-bspline-fold-free-bayesian", "no-labels"]  # fmt: skip
    assert kinds.training_kinds(run | {"num_layers": 7, "projector": False}, "ncc", 0.0) == [
        "gridreg-trilinear-no-projector", "gridreg-7-layers", "similarity-ncc", "no-labels"]  # fmt: skip
    assert kinds.network_kinds(run | {"base_channels": 32}) == kinds.network_kinds(run)  # another size, the same code
    assert kinds.evaluation_kinds(run, "mi") == ["metrics", "gridreg-trilinear", "refinement-mi"]


def test_a_kind_that_the_file_lacks_is_one_sentence():
    with pytest.raises(InputError, match=r"fingerprints.yaml: found no train.demons; expected it there, as `python -m"):
        fingerprint.check(["demons"])
