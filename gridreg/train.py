"""One training function for every learned method (paper, sections 3.3 and 4.3): Adam, the best step chosen on validation.

A training that was interrupted goes on where it stood and ends with the same weights: every step draws its pairs and
its grid from (seed, step) alone, and the state is kept in a scratch folder named by a hash of data, settings and code.
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
from gridreg.devices import describe_device, keep_memory, launch, to_tensor
from gridreg.grid import Shape, warp
from gridreg.interpolation import upsample, upsample_sigma
from gridreg.methods import build, grid_name, grid_sizes, parameter_count
from gridreg.network import Registration

CODE = ["grid", "interpolation", "fold_free", "network", "methods", "losses", "metrics", "dataset", "checkpoint",
        "devices", "transmorph", "keymorph", "train"]  # fmt: skip
WARM_UP = 0.1  # share of the steps over which the learning rate rises; then it falls along a cosine
RECORD_EVERY = 10  # steps between two rows of history.csv


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear rise, then a cosine to zero."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def draw(data: Preprocessed, pairs: list, grids: list, batch: int, seed: int, step: int, rank: int):
    """One step's pairs and grid size: other pairs on every device, the same grid on all."""
    chosen = np.random.default_rng([seed, step, rank]).integers(len(pairs), size=batch)
    return [pairs[i] for i in chosen], grids[np.random.default_rng([seed, step]).integers(len(grids))]


def similarity_loss(
    network: nn.Module,
    registration: Registration,
    fixed: Tensor,
    moving: Tensor,
    similarity: str,
    samples: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Similarity at image level, and at the control points where there are any (paper, section 3.3): a scalar.

    At the control points it is always the MSE: they have no neighbourhood to correlate over.

    For a Bayesian registration the uncertainty-weighted loss (equation 2) is added. It draws ``samples`` displacements
    on the grid, T = μ + σ ε, and teaches σ alone: μ learns from the loss it would have without σ. Were it to learn
    from the samples, a σ beyond the size of the texture would hide the image from it, and then have every reason to
    grow. The loss has the weight of one mean squared residual, so that the other weights keep their meaning.
    """
    warped = warp(moving, registration.displacement)
    total = losses.SIMILARITIES[similarity](fixed, warped)
    if registration.control_points is None:
        return total
    mean, sigma = registration.control_points, registration.sigma
    grid, shape = tuple(mean.shape[2:]), tuple(fixed.shape[2:])
    total = total + losses.mse(*(losses.at_control_points(volume, grid) for volume in (fixed, warped)))
    if sigma is None:
        return total
    told, widest = losses.information(fixed), losses.WIDEST * torch.tensor(shape, device=mean.device).view(3, 1, 1, 1)
    dense_variance = upsample_sigma(sigma, shape, network.upsampling).square()
    weight = losses.mse(fixed, warped).detach() / samples
    for _ in range(samples):
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        sample = warp(moving, upsample(mean.detach() + sigma * noise, shape, network.upsampling))
        at_grid = [losses.at_control_points(volume, grid) for volume in (fixed, sample, told)]
        total = total + weight * losses.uncertainty(fixed, sample, told, dense_variance, widest)
        total = total + weight * losses.uncertainty(*at_grid, sigma.square(), widest)
    return total


def loss_terms(
    network: nn.Module,
    data: Preprocessed,
    pairs: list,
    grid: Shape | None,
    device: torch.device,
    *,
    similarity: str,
    dice: bool,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Similarity, Dice and bending losses of one batch (paper, section 3.3), each a scalar."""
    fixed, moving = (to_tensor([data.image(pair[side]) for pair in pairs], device) for side in (0, 1))
    registration: Registration = network(fixed, moving, grid)
    terms = {"similarity": similarity_loss(network, registration, fixed, moving, similarity, samples, generator)}
    if grid is None:
        terms["bending"] = losses.bending_energy(registration.displacement)
    else:
        terms["bending"] = losses.grid_bending_energy(registration.control_points, data.shape, network.upsampling)
    if dice:
        maps = [torch.from_numpy(np.stack([data.labels(p[side]) for p in pairs]))[:, None].to(device) for side in (0, 1)]
        values = sorted(int(value) for value in data.index["labels"])
        terms["dice_loss"] = losses.label_dice(*maps, registration.displacement, values)
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
    settings    steps or epochs, batch, learning_rate (peak), beta2 (of Adam), bending (times bending_weight),
                validate_every (steps)
    similarity  "mse" (the paper's), "ncc" or "mi"
    out         gets model.safetensors, model.json, history.csv and metrics.json

    The weights kept are those with the best validation Dice, mean over the run's grid sizes; the grid size in
    model.json is the best of them on validation (paper, section 3.1). The test set is not touched.
    """
    keep_memory()
    fabric = launch()
    torch.manual_seed(seed)
    network, grids, pairs = build(run), grid_sizes(run), data.pairs("train")
    steps = total_steps(settings, len(pairs), len(data.subjects("train")))
    optimiser = torch.optim.Adam(
        network.parameters(), lr=settings["learning_rate"], betas=(0.9, settings["beta2"])
    )
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
        chosen, grid = draw(data, pairs, grids, settings["batch"], seed, step, fabric.global_rank)
        entropy = np.random.SeedSequence([seed, step, fabric.global_rank, 1])  # of the Monte-Carlo samples
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, settings["learning_rate"])
        terms = loss_terms(
            wrapped, data, chosen, grid, fabric.device, similarity=similarity, dice=dice_weight > 0,
            samples=run.get("samples", 1), generator=generator,
        )
        loss = terms["similarity"] + bending_weight * settings["bending"] * terms["bending"]
        loss = loss + dice_weight * terms.get("dice_loss", 0)
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
