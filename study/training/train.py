"""One training function for every learned method (paper, sections 3.3 and 4.3): Adam, best step chosen on validation.

An interrupted training resumes where it stopped and ends with the same weights. On a GPU they are not equal bit for bit,
as its sums have no fixed order. A step depends on (seed, step) alone. The state is kept in a folder that is named by a
hash of data, settings and fingerprint, where the fingerprint stands for what the code computes.

    python -m study.training.train prostate gridreg-8      trains one run of params.yaml; with torchrun on several GPUs
    python -m study.training.train ablation layers-4       trains one of its ablations
    python -m study.training.train --number 7              trains number 7 of --list, as one task of a job array

Without --out, a finished training stays in the scratch folder, where the pipeline finds it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gridreg import losses, metrics
from gridreg.checkpoint import content_hash, read_tensors, save_model, write_tensors, write_text
from gridreg.devices import describe_device, to_tensor
from gridreg.errors import InputError, exit_status
from gridreg.spatial import Shape, warp
from study.cohorts.dataset import Preprocessed
from study.config import params
from study.config.ablation import named_arguments, trainings
from study.config.schema import UNTRAINED
from study.locks import locked, whole_folder
from study.methods.table import build, grid_name, grid_sizes, parameter_count
from study.training.devices import launch
from study.training.kinds import training_kinds
from study.training.objective import loss_terms

SCRATCH = Path(".scratch")  # holds unfinished trainings, and finished ones until the pipeline fetches them
WARM_UP = 0.1  # fraction of the steps in which the learning rate rises; then it falls along a cosine
RECORD_EVERY = 10  # steps between two rows of history.csv


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate at a step: it rises linearly and then falls to zero along a cosine."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw(
    pairs: list, grids: list, batch: int, seed: int, step: int, rank: int, identical: float = 0.0
) -> tuple[list, Shape | None]:
    """The pairs and the grid size of one step: every device has its own pairs, and all have the same grid.

    It also seeds the other random numbers of the step: Monte-Carlo samples and dropped paths. With probability
    ``identical`` the fixed scan of a pair also replaces its moving scan, so that the network learns to predict no motion.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, 1]).generate_state(1)[0]))
    chosen = np.random.default_rng([seed, step, rank]).integers(len(pairs), size=batch)
    twice = np.random.default_rng([seed, step, rank, 2]).random(batch) < identical
    chosen = [(pairs[i][0],) * 2 if same else pairs[i] for i, same in zip(chosen, twice)]
    return chosen, grids[np.random.default_rng([seed, step]).integers(len(grids))]


@torch.no_grad()
def validate(network: nn.Module, data: Preprocessed, grids: list, device) -> dict[str, float]:
    """Mean validation score of each grid size by name; higher is better. Dice, or minus the MSE unless all have labels."""
    scores: dict[str, list[float]] = {grid_name(grid): [] for grid in grids}
    labelled = all(data.index["subjects"][subject]["label"] for pair in data.pairs("val") for subject in pair)
    network.eval()
    for fixed, moving in data.pairs("val"):
        images = [to_tensor([data.image(subject)], device) for subject in (fixed, moving)]
        labels = to_tensor([data.labels(moving)], device) if labelled else None
        for grid in grids:
            displacement = network(*images, grid).displacement
            if labelled:
                warped = warp(labels, displacement, "nearest")[0, 0]
                score = metrics.dice(data.labels(fixed), warped.cpu().numpy().astype(np.int16))
            else:
                score = -float(losses.mse_loss(images[0], warp(images[1], displacement)))
            scores[grid_name(grid)].append(score)
    network.train()
    return {name: float(np.mean(values)) for name, values in scores.items()}


def choose_grid(network: nn.Module, data: Preprocessed, grids: list, device) -> tuple[Shape | None, dict[str, float]]:
    """The grid size with the best validation score (paper, section 3.1), and the score of each of ``grids`` by name.

    ``grids`` may differ from those of the training. Of equal scores the first is chosen.
    """
    scores = validate(network, data, grids, device)
    return max(grids, key=lambda grid: scores[grid_name(grid)]), scores


def total_steps(settings: dict[str, Any], pairs: int, subjects: int, devices: int = 1) -> int:
    """Number of steps: ``steps``, or that of ``epochs``. An epoch has as many pairs as subjects, but at most all pairs."""
    return settings["steps"] or settings["epochs"] * math.ceil(min(pairs, subjects) / (settings["batch"] * devices))


class State:
    """Everything that a resumed training needs: weights, Adam's moments, the best weights so far, the history."""

    def __init__(self, network: nn.Module, optimiser: torch.optim.Adam, folder: Path):
        self.network, self.optimiser, self.file = network, optimiser, folder / "state.safetensors"
        self.step, self.history = 0, []
        self.best_score, self.best_step, self.best = -math.inf, 0, {}

    def keep_best(self, score: float, step: int) -> None:
        if score > self.best_score:
            self.best_score, self.best_step = score, step
            self.best = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in moments.items()}
        note = {name: getattr(self, name) for name in ("step", "history", "best_score", "best_step")}
        write_tensors(self.file, tensors, note)

    def resume(self) -> None:
        if not self.file.is_file():
            return
        tensors, note = read_tensors(self.file)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        for name, value in note.items():
            setattr(self, name, value)
        self.best = part("best.")
        self.network.load_state_dict(part("model."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part("adam.").items():
            index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})


def optimise(
    fabric: Any,
    data: Preprocessed,
    run: dict[str, Any],
    settings: dict[str, Any],
    out: Path,
    *,
    seed: int,
    similarity: str,
    bending_weight: float,
    dice_weight: float,
) -> None:
    """The training loop of ``train``. It writes ``out`` whole or not at all, and keeps its state beside it until then."""
    torch.manual_seed(seed)
    network, grids, pairs = build(run), grid_sizes(run), data.pairs("train")
    steps = total_steps(settings, len(pairs), len(data.subjects("train")), fabric.world_size)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings["learning_rate"], betas=(0.9, settings["beta2"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    state = State(network, optimiser, out.parent)
    wrapped, optimiser = fabric.setup(network, optimiser)
    state.resume()  # only now, so that it loads to the device of the weights
    start, step_seconds = state.step, []
    progress = tqdm(total=steps, initial=start, unit="step", mininterval=2, disable=not fabric.is_global_zero)
    progress.set_description(f"{data.index['name']} {run['method']}")

    for step in range(start, steps):
        began = time.perf_counter()
        identical = settings.get("identical") or 0.0
        chosen, grid = draw(pairs, grids, settings["batch"], seed, step, fabric.global_rank, identical)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, settings["learning_rate"])
        terms = loss_terms(
            wrapped,
            data,
            chosen,
            grid,
            fabric.device,
            similarity=similarity,
            dice=dice_weight > 0,
            samples=run.get("samples", 1),
        )
        loss = terms["similarity"] + bending_weight * settings["bending"] * terms["bending"]
        loss = loss + dice_weight * terms.get("dice_loss", 0)
        optimiser.zero_grad()
        fabric.backward(loss)
        if settings.get("clip"):
            fabric.clip_gradients(wrapped, optimiser, max_norm=settings["clip"])
        optimiser.step()
        step_seconds.append(time.perf_counter() - began)
        progress.update()
        due = (step + 1) % settings["validate_every"] == 0 or step + 1 == steps
        if due or (step + 1) % RECORD_EVERY == 0:
            row = {"step": step + 1, "loss": loss.item()} | {name: term.item() for name, term in terms.items()}
            if not math.isfinite(row["loss"]):
                raise InputError(
                    f"{data.index['name']}, step {step + 1}: the loss is {row['loss']}, expected a finite "
                    "number; a lower learning_rate may help"
                )
            state.history.append(row | {"learning_rate": optimiser.param_groups[0]["lr"]})
        if due:
            score = float(np.mean(list(validate(network, data, grids, fabric.device).values())))
            state.history[-1]["val_dice"] = score
            progress.set_postfix(loss=f"{loss.item():.4f}", val_dice=f"{score:.3f}")
            state.step = step + 1
            state.keep_best(score, step + 1)
            if fabric.is_global_zero:
                state.save()
            fabric.barrier()
    progress.close()
    if not fabric.is_global_zero:
        return

    network.load_state_dict(state.best)
    grid, scores = choose_grid(network, data, grids, fabric.device)
    result = {
        "val_dice": scores[grid_name(grid)],
        "grid": grid_name(grid),
        "best_step": state.best_step,
        "steps": steps,
        "batch": settings["batch"] * fabric.world_size,
        "parameters": parameter_count(network),
        "step_seconds": float(np.median(step_seconds)) if step_seconds else None,
        "device": describe_device(fabric.device),
        "devices": fabric.world_size,
        "precision": os.environ.get("GRIDREG_PRECISION", "32-true"),
    }
    unfinished = out.with_name(f"un{out.name}")
    save_model(unfinished, network.cpu(), {"run": run, "grid": grid, "val_dice": scores, "training": result})
    write_text(unfinished / "history.csv", pd.DataFrame(state.history).to_csv(index=False))
    write_text(unfinished / "metrics.json", json.dumps(result, indent=2) + "\n")
    unfinished.rename(out)
    state.file.unlink()


def train(
    data: Preprocessed,
    run: dict[str, Any],
    settings: dict[str, Any],
    out: Path | str | None,
    *,
    seed: int,
    similarity: str,
    bending_weight: float,
    dice_weight: float,
    scratch: Path | str = SCRATCH,
) -> dict[str, Any]:
    """Train one run on the training pairs of ``data`` and write it to ``out``; returns the content of metrics.json.

    run         a run of params.yaml: method and its settings, as for ``methods.table.build``
    settings    steps or epochs, batch, learning_rate (peak), beta2 (of Adam), bending (multiplies bending_weight),
                validate_every (steps), clip (largest norm of the gradient; None: no limit), identical (probability that
                a scan is paired with itself)
    seed        of the initial weights and of every draw
    similarity  "mse" (the paper's), "ncc" or "mi"
    bending_weight, dice_weight  of the losses
    out         folder for model.safetensors, model.json, history.csv and metrics.json. None: they stay in ``scratch``, and
                the next call with the same arguments and an ``out`` moves them there

    The result has the weights with the best validation Dice, as a mean over the run's grid sizes. The grid size in
    model.json is the best one on validation (paper, section 3.1). The test set is not used.

    InputError if ``dice_weight`` is above 0 and labels are missing, if the loss is not finite, if another process trains
    the same run, and if the code computes other numbers than ``fingerprints.yaml`` holds.
    """
    from study.training.fingerprint import check  # imported here because it imports ``optimise`` from this module

    bare = [name for name in data.subjects("train") if not data.index["subjects"][name]["label"]]
    if dice_weight and bare:
        raise InputError(
            f"{data.index['name']}: found no labels of {bare[0]} ({len(bare)} such training scans), expected "
            f"them for a dice_weight of {dice_weight:g}; 0 trains without"
        )
    numbers = check(training_kinds(run, similarity, dice_weight))
    images = [path for kind in ("images", "labels") for path in sorted((data.folder / kind).glob("*.nii.gz"))]
    key = content_hash(data.index, run, settings, seed, similarity, bending_weight, dice_weight, numbers, files=images)
    finished = next(Path(scratch).glob(f"{key}-*/finished"), None)
    if finished is None:
        fabric = launch()
        finished = Path(scratch) / f"{key}-{fabric.world_size}" / "finished"
        weights = {"similarity": similarity, "bending_weight": bending_weight, "dice_weight": dice_weight}
        with locked(finished.parent, wait=False) if fabric.is_global_zero else nullcontext():
            optimise(fabric, data, run, settings, finished, seed=seed, **weights)
        if not fabric.is_global_zero:
            return {}
    result = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    if out is not None:
        with whole_folder(out) as folder:
            shutil.copytree(finished, folder, dirs_exist_ok=True)
        shutil.rmtree(finished.parent)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study.training.train", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", help="a name under use.datasets in params.yaml, or ablation")
    parser.add_argument("run", nargs="?", help="a name under runs, with a method that is trained")
    parser.add_argument("--number", type=int, help="instead of both: a number in --list")
    parser.add_argument("--list", action="store_true", help="list every training in use with its number")
    parser.add_argument("--out", type=Path, help="folder for the result; by default the pipeline fetches it")
    options = parser.parse_args()

    def start() -> None:
        values = params.load()
        every, trained = trainings(values), [n for n, run in values["runs"].items() if run["method"] not in UNTRAINED]
        if options.list:
            print(*(f"{number} {dataset} {run}" for number, (dataset, run) in enumerate(every)), sep="\n")
            return
        number, asked = options.number, (options.dataset, options.run)
        if number is not None and 0 <= number < len(every):
            asked = every[number]
        if asked not in every and (asked[0] not in values["use"]["datasets"] or asked[1] not in trained):
            found = f"number {number}" if number is not None else " ".join(name or "nothing" for name in asked)
            raise InputError(
                f"params.yaml: no training is called {found}; expected one of python -m study.training.train --list"
            )
        dataset, arguments = named_arguments(values, *asked)
        train(Preprocessed(f"results/preprocess/{dataset}"), out=options.out, **arguments)

    return exit_status(start)


if __name__ == "__main__":
    sys.exit(main())
