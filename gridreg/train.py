"""One training function for every learned method (paper, sections 3.3 and 4.3): Adam, the best step chosen on validation.

A training that was interrupted goes on where it stood and ends with the same weights: every step draws its pairs and
its grid from (seed, step) alone, and the state is kept in a scratch folder named by a hash of data, settings and code.
Devices and precision come from the environment: GRIDREG_ACCELERATOR, GRIDREG_DEVICES, GRIDREG_NODES, GRIDREG_PRECISION.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gridreg import losses, metrics
from gridreg.checkpoint import fingerprint, load_model, read_tensors, save_model, write_tensors, write_text
from gridreg.dataset import Preprocessed
from gridreg.grid import Shape, warp
from gridreg.methods import build, grid_name, grid_sizes, parameter_count
from gridreg.network import Registration

CODE = ["grid", "interpolation", "network", "methods", "losses", "metrics", "dataset", "checkpoint", "train"]
WARM_UP = 0.1  # share of the steps over which the learning rate rises; then it falls along a cosine
RECORD_EVERY = 10  # steps between two rows of history.csv
LABELS_PER_STEP = 16  # structures in one step's Dice loss, so that a hundred labels fit into memory


def launch():
    """A ``lightning_fabric.Fabric`` set up from the environment: accelerator, devices, nodes, precision."""
    from lightning_fabric import Fabric  # here, not above: it takes as long to import as PyTorch itself

    accelerator = os.environ.get("GRIDREG_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    fabric = Fabric(
        accelerator=accelerator,
        devices=int(os.environ.get("GRIDREG_DEVICES", 1)),
        num_nodes=int(os.environ.get("GRIDREG_NODES", 1)),
        precision=os.environ.get("GRIDREG_PRECISION", "32-true"),
    )
    fabric.launch()
    return fabric


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear rise, then a cosine to zero."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def to_tensor(arrays: list[np.ndarray], device: torch.device) -> Tensor:
    """Volumes (W, H, D) → (B, 1, W, H, D) float32."""
    return torch.from_numpy(np.stack(arrays)).float()[:, None].to(device)


def one_hot(label_maps: list[np.ndarray], values: list[int], device: torch.device) -> Tensor:
    """Label maps (W, H, D) → (B, K, W, H, D) float32 masks, one channel for each of ``values``."""
    labels = torch.from_numpy(np.stack(label_maps)).to(device)
    return torch.stack([labels == value for value in values], dim=1).float()


def draw(data: Preprocessed, pairs: list, grids: list, batch: int, rng: np.random.Generator):
    """The pairs, the grid size and the labels of one step."""
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=batch)]
    grid = grids[rng.integers(len(grids))]
    values = sorted(int(v) for v in data.index["labels"])
    if len(values) > LABELS_PER_STEP:
        values = sorted(rng.choice(values, LABELS_PER_STEP, replace=False).tolist())
    return chosen, grid, values


def loss_terms(
    network: nn.Module,
    data: Preprocessed,
    pairs: list,
    grid: Shape | None,
    values: list[int],
    similarity: str,
    dice: bool,
    device: torch.device,
) -> dict[str, Tensor]:
    """Similarity, Dice and bending losses of one batch (paper, section 3.3), each a scalar.

    The grid-level similarity is always the MSE: control points have no neighbourhood to correlate over.
    """
    fixed = to_tensor([data.image(f) for f, _ in pairs], device)
    moving = to_tensor([data.image(m) for _, m in pairs], device)
    registration: Registration = network(fixed, moving, grid)
    volumes = [moving]
    if dice:
        fixed_masks, moving_masks = (one_hot([data.labels(p[side]) for p in pairs], values, device) for side in (0, 1))
        volumes.append(moving_masks)
    warped, *warped_masks = warp(torch.cat(volumes, dim=1), registration.displacement).split_with_sizes(
        [volume.shape[1] for volume in volumes], dim=1
    )  # image and masks in one pass
    terms = {"similarity": losses.SIMILARITIES[similarity](fixed, warped)}
    if grid is None:
        terms["bending"] = losses.bending_energy(registration.displacement)
    else:
        at_grid = [losses.at_control_points(volume, grid) for volume in (fixed, warped)]
        terms["similarity"] = terms["similarity"] + losses.mse(*at_grid)
        terms["bending"] = losses.grid_bending_energy(registration.control_points, data.shape, network.upsampling)
    if dice:
        terms["dice_loss"] = losses.dice(fixed_masks, warped_masks[0])
    return terms


@torch.no_grad()
def validate(network: nn.Module, data: Preprocessed, grids: list, device) -> dict[str, float]:
    """Mean validation score of each grid size, higher is better: Dice, or minus the MSE where there are no labels."""
    scores: dict[str, list[float]] = {grid_name(grid): [] for grid in grids}
    network.eval()
    for fixed, moving in data.pairs("val"):
        images = [to_tensor([data.image(subject)], device) for subject in (fixed, moving)]
        labels = [data.labels(subject) for subject in (fixed, moving)]
        for grid in grids:
            displacement = network(*images, grid).displacement
            if any(labelled is None for labelled in labels):
                score = -float(losses.mse(images[0], warp(images[1], displacement)))
            else:
                warped = warp(to_tensor([labels[1]], device), displacement, "nearest")[0, 0]
                score = metrics.dice(labels[0], warped.cpu().numpy().astype(np.int16))
            scores[grid_name(grid)].append(score)
    network.train()
    return {name: float(np.mean(values)) for name, values in scores.items()}


def total_steps(settings: dict[str, Any], pairs: int, subjects: int) -> int:
    """``steps``, or ``epochs`` passes over the training pairs; over all subjects where any two make a pair."""
    if settings["steps"]:
        return settings["steps"]
    return settings["epochs"] * math.ceil(min(pairs, subjects) / settings["batch"])


class State:
    """Everything that a training needs to go on: weights, Adam's moments, the best weights so far, the history."""

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


def train(
    data: Preprocessed,
    run: dict[str, Any],
    settings: dict[str, Any],
    out: Path | str,
    *,
    seed: int,
    similarity: str,
    bending_weight: float,
    dice_weight: float,
    scratch: Path | str = ".scratch",
) -> dict[str, Any]:
    """Train one run on the training pairs of ``data`` and write it to ``out``; returns what metrics.json holds.

    run         a run of params.yaml: method and its settings, as ``methods.build`` takes it
    settings    steps or epochs, batch, learning_rate (peak), validate_every (steps)
    similarity  "mse" (the paper's) or "ncc"
    out         gets model.safetensors, model.json, history.csv and metrics.json

    The weights kept are those with the best validation Dice, mean over the run's grid sizes; the grid size in
    model.json is the best of them on validation (paper, section 3.1). The test set is not touched.
    """
    fabric = launch()
    torch.manual_seed(seed)
    network, grids, pairs = build(run), grid_sizes(run), data.pairs("train")
    steps = total_steps(settings, len(pairs), len(data.subjects("train")))
    optimiser = torch.optim.Adam(network.parameters(), lr=settings["learning_rate"])
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    weights = (similarity, bending_weight, dice_weight)
    key = fingerprint(data.index, run, settings, seed, weights, fabric.world_size, files=code)
    folder = Path(scratch) / key
    folder.mkdir(parents=True, exist_ok=True)
    state = State(network, optimiser, folder)
    state.resume()
    start, step_seconds = state.step, []
    wrapped, optimiser = fabric.setup(network, optimiser)
    progress = tqdm(total=steps, initial=start, unit="step", mininterval=2, disable=not fabric.is_global_zero)
    progress.set_description(f"{data.index['name']} {run['method']}")

    for step in range(start, steps):
        began = time.perf_counter()
        rng = np.random.default_rng([seed, step, fabric.global_rank])
        chosen, grid, values = draw(data, pairs, grids, settings["batch"], np.random.default_rng([seed, step, 0]))
        if fabric.world_size > 1:  # other pairs on every device, the same grid on all
            chosen, _, _ = draw(data, pairs, grids, settings["batch"], rng)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, settings["learning_rate"])
        terms = loss_terms(wrapped, data, chosen, grid, values, similarity, dice_weight > 0, fabric.device)
        loss = terms["similarity"] + bending_weight * terms["bending"] + dice_weight * terms.get("dice_loss", 0)
        optimiser.zero_grad()
        fabric.backward(loss)
        optimiser.step()
        step_seconds.append(time.perf_counter() - began)
        progress.update()
        due = (step + 1) % settings["validate_every"] == 0 or step + 1 == steps
        if due or (step + 1) % RECORD_EVERY == 0:
            row = {"step": step + 1, "loss": loss.item()} | {name: term.item() for name, term in terms.items()}
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
        return {}

    network.load_state_dict(state.best)
    scores = validate(network, data, grids, fabric.device)
    best_grid = max(grids, key=lambda grid: scores[grid_name(grid)])
    result = {
        "val_dice": scores[grid_name(best_grid)],
        "grid": grid_name(best_grid),
        "best_step": state.best_step,
        "steps": steps,
        "batch": settings["batch"] * fabric.world_size,
        "parameters": parameter_count(network),
        "step_seconds": float(np.median(step_seconds)) if step_seconds else None,
        "device": describe_device(fabric.device),
        "devices": fabric.world_size,
        "precision": os.environ.get("GRIDREG_PRECISION", "32-true"),
    }
    out = Path(out)
    save_model(out, network.cpu(), {"run": run, "grid": best_grid, "val_dice": scores, "training": result})
    pd.DataFrame(state.history).to_csv(out / "history.csv", index=False)
    write_text(out / "metrics.json", json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder)
    return result


def describe_device(device: torch.device) -> str:
    """"cpu" or "cuda (NVIDIA …)"."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type
