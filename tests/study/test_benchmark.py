"""The benchmark: multiply-adds in closed form, memory of known size, and a reason wherever there is no number."""

from __future__ import annotations

import time
from collections import Counter
from itertools import groupby

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gridreg import network
from gridreg.errors import InputError
from gridreg.network import GridReg, Registration
from gridreg.spatial import warp
from study import style
from study.benchmark import cost
from study.benchmark import measure as benchmark
from study.benchmark.published import read_benchmark
from study.methods import table as methods
from study.reporting.benchmark import cost_figure, label, left_out, significant, to_markdown

CPU = torch.device("cpu")
SHAPES = [(20, 18, 17), (24, 20, 18)]


class Dense(nn.Module):
    """A peer: one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1, bias=False)

    def forward(self, fixed, moving, grid_size=None):
        return Registration(self.conv(torch.cat([fixed, moving], dim=1)))


class Raises(Dense):
    def forward(self, fixed, moving, grid_size=None):
        raise RuntimeError("no such kernel\nand a second line")


def not_installed(run):
    raise InputError("method absent: found no package 'absent'")


@pytest.fixture(scope="module")
def costs():
    """A benchmark of the smallest kind, with a peer, one that is not trained, one that raises and one that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, builder in {
            "dense": lambda run: Dense(),
            "raises": lambda run: Raises(),
            "absent": not_installed,
        }.items():
            patch.setitem(methods.BUILDERS, name, builder)
        patch.setattr(cost, "REPEATS", (1, 2))
        patch.setattr(benchmark, "FIRST_SHAPE", SHAPES[0])
        names, grids = ["gridreg", "dense", "identity", "raises", "absent"], [(5, 4, 3), (3, 3, 3)]
        return benchmark.measure(names, SHAPES[::-1], batches=[2], grids=grids)


# ---- One call -----------------------------------------------------------------------------------------------------


def test_multiply_adds_in_closed_form():
    conv, linear = nn.Conv3d(2, 4, 3, padding=1), nn.Linear(8, 16)
    assert cost.count(lambda: conv(torch.rand(1, 2, 5, 6, 7))) == 2 * 4 * 27 * 5 * 6 * 7
    assert cost.count(lambda: linear(torch.rand(3, 8))) == 3 * 8 * 16
    assert cost.count(lambda: torch.einsum("ghd,hdc->ghc", torch.rand(5, 2, 3), torch.rand(2, 3, 4))) == 5 * 2 * 3 * 4
    assert cost.count(lambda: torch.relu(torch.rand(5))) == 0


@pytest.mark.parametrize("gradient", [False, True])
def test_attention_is_counted_on_a_cpu_too(gradient):
    query, key = torch.rand(1, 2, 8, 4, requires_grad=gradient), torch.rand(1, 2, 16, 4, requires_grad=gradient)
    product = 2 * 8 * 4 * 16  # multiply-adds of one of its matrix products, both heads

    def call() -> None:
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
            attended = F.scaled_dot_product_attention(query, key, key)
            if gradient:
                attended.sum().backward()

    assert cost.count(call) == (7 if gradient else 2) * product  # the gradient computes the scores again


def test_every_call_is_warmed_up_and_a_slow_one_measured_once():
    calls = Counter()
    slow, _ = cost.cost(lambda: calls.update(["slow"]), CPU, slow=0)
    quick, _ = cost.cost(lambda: calls.update(["quick"]), CPU)
    assert calls == {"slow": 2, "quick": 1 + cost.REPEATS[1] + cost.MEMORY_REPEATS}
    assert (slow.repeats, quick.repeats) == (1, cost.REPEATS[1])
    assert 0 < quick.seconds_min <= quick.seconds


def test_memory_is_the_median_of_several_calls(monkeypatch):
    found = iter([300.0, 100.0, 110.0, 120.0, 500.0])
    monkeypatch.setattr(cost, "with_memory", lambda call, where: (cost.timed(call, where), next(found), np.nan))
    assert cost.cost(lambda: None, CPU)[0].memory_mb == 120


def test_variants_are_measured_in_their_published_size_beside_their_method(monkeypatch):
    small = {"method": "voxelmorph", "width": 4, "levels": 3}
    dense = {"method": "voxelmorph", "integration_steps": 0}
    runs = {"deep": {"method": "gridreg", "grids": [[4, 4, 4]], "num_layers": 6}, "narrow": small, "voxelmorph": dense}
    monkeypatch.setattr(cost, "REPEATS", (1, 1))
    monkeypatch.setattr(benchmark, "FIRST_SHAPE", SHAPES[0])
    frame = benchmark.measure(["gridreg", "voxelmorph"], SHAPES, [1], [(4, 4, 4)], variants=runs)
    rows = frame[frame["task"] == "variant"].set_index("run")
    assert set(rows["shape"]) == {"20x18x17"} and rows.loc["deep", "grid"] == "4x4x4" and (rows["note"] == "").all()
    assert rows.loc["narrow", "parameters"] == frame.loc[frame["run"] == "voxelmorph", "parameters"].iloc[0]
    assert rows.loc["deep", "parameters"] > frame.loc[frame["run"] == "gridreg-4", "parameters"].iloc[0]
    assert frame["run"].tolist().index("deep") < frame["run"].tolist().index("voxelmorph")
    tasks = [task for task, _ in groupby(frame.loc[frame["method"] == "gridreg", "task"])]
    assert tasks == ["register", "variant", "train"]  # a training leaves memory behind that would show in the others
    text = to_markdown(frame)
    assert "deep" not in text and text.count("VoxelMorph, not integrated") == 1
    whole = frame[(frame["run"] == "voxelmorph") & (frame["task"] == "register")].iloc[0]
    assert rows.loc["voxelmorph", "parameters"] == whole["parameters"]


def test_an_untrained_method_is_measured_with_the_settings_that_every_dataset_shares():
    runs = {"identity": {"method": "identity"}, "voxelmorph": {"method": "voxelmorph", "width": 4},
            "ants-syn": {"method": "syn", "iterations": [1, 0], "affine_stage": {"pelvis": False}, "metric": "meansquares"}}  # fmt: skip
    settings = benchmark.untrained_settings(runs)
    assert (
        settings["syn"] == {"method": "syn", "iterations": [1, 0], "metric": "meansquares"}
        and "voxelmorph" not in settings
    )
    row = benchmark.measure(["syn"], [SHAPES[0]], settings=settings).iloc[1]
    assert row["run"] == "ants-syn" and row["seconds"] > 0 and np.isnan(row["memory_mb"])
    assert row["note"] == "1, 0 iterations, in a separate process, on one thread; its memory is not measured"


def test_every_part_gets_its_own_time(monkeypatch):
    """With a clock that only the parts move: encoder 1, decoder 2, upsampling 4, warp 8."""
    now, shape = [0.0], SHAPES[0]

    def passes(seconds, function):
        def timed(*args, **kwargs):
            now[0] += seconds(*args) if callable(seconds) else seconds
            return function(*args, **kwargs)

        return timed

    net = GridReg().eval()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cost, "warp", passes(8, warp))
    monkeypatch.setattr(network, "upsample", passes(4, network.upsample))
    monkeypatch.setattr(net.encoder[0], "forward", passes(1, net.encoder[0].forward))
    monkeypatch.setattr(net.decoder[0], "forward", passes(2, net.decoder[0].forward))
    found = cost.parts(net, benchmark.on_device(shape, CPU), (4, 4, 4), CPU, repeats=2)
    assert found == dict(zip(cost.PARTS, (1, 2, 4, 8)))


def test_the_parts_add_up_to_the_total():
    net = GridReg().eval()
    began = time.perf_counter()
    found = cost.parts(net, benchmark.on_device(SHAPES[0], CPU), (4, 4, 4), CPU, repeats=1)
    assert all(seconds > 0 for seconds in found.values())
    assert sum(found.values()) < time.perf_counter() - began
    assert not any(module._forward_hooks for module in net.modules())


def test_state_of_a_training():
    net = nn.Linear(64, 32, bias=False)
    adam = torch.optim.Adam(net.parameters())
    assert cost.state_mb(adam) == 0
    net(torch.rand(1, 64)).sum().backward()
    adam.step()
    numbers = 3 * 64 * 32 + 1  # gradient, two moments, and Adam's count of steps
    assert cost.state_mb(adam) == pytest.approx(4 * numbers / 2**20)


# ---- The whole ----------------------------------------------------------------------------------------------------


def test_a_row_for_everything(costs):
    assert list(costs.columns) == benchmark.COLUMNS
    bending, costs = costs[costs["task"] == "bending"], costs[costs["task"] != "bending"]
    assert bending["run"].tolist() == 2 * ["bending-dense", "bending-grid"] and (bending["seconds"] > 0).all()
    assert set(costs["run"]) == {"gridreg-5x4x3", "gridreg-3", "dense", "identity", "raises", "absent", "floor"}
    assert Counter(costs["run"]) == {"floor": 2} | dict.fromkeys(set(costs["run"]) - {"floor"}, 2 * 2)
    measured = costs[costs["seconds"].notna() & (costs["run"] != "floor")]
    assert set(measured["method"]) == {"gridreg", "dense", "identity"}
    assert (measured["memory_mb"] >= 0).all() and (measured["repeats"] >= 1).all()
    assert measured.loc[measured["method"] == "gridreg", "parameters"].eq(methods.parameter_count(GridReg())).all()
    split = costs.loc[(costs["method"] == "gridreg") & (costs["task"] == "register"), cost.PARTS]
    assert len(split) == 4 and (split > 0).all(axis=None)
    assert costs.loc[costs["method"] != "gridreg", cost.PARTS].isna().all(axis=None)


def test_multiply_adds_of_a_peer(costs):
    rows = costs[(costs["run"] == "dense") & (costs["task"] == "register")]
    assert rows["multiply_adds"].tolist() == [2 * 3 * 27 * np.prod(shape) for shape in SHAPES]


def test_nothing_is_missing_in_silence(costs):
    assert (costs.loc[costs["seconds"].isna(), "note"] != "").all()
    notes = costs[costs["task"] != "bending"].groupby("run")["note"].agg(set)
    assert notes["raises"] == {"RuntimeError: no such kernel"}
    assert notes["absent"] == {"method absent: found no package 'absent'"}
    assert notes["identity"] == {"", "nothing to train"}
    assert notes["dense"] == notes["gridreg-3"] == {""}


def test_the_floor_is_below_every_method(costs):
    floor = costs[costs["run"] == "floor"].set_index("shape")
    assert (floor["seconds"] > 0).all()
    assert floor.loc["20x18x17", "memory_mb"] == pytest.approx(4 * 20 * 18 * 17 / 2**20)
    others = costs[~costs["task"].eq("bending") & (costs["run"] != "floor") & costs["seconds"].notna()]
    assert (others["seconds"] > others["shape"].map(floor["seconds"])).all()


def test_what_would_take_too_long_or_too_much_is_left_out(monkeypatch):
    job = benchmark.Job("gridreg", "train", (5, 5, 5), (10, 10, 10), 4)
    assert benchmark.refusal((0.01, 0.0), job, 41, CPU) == ""
    assert benchmark.refusal((0.01, 0.0), job, 39, CPU) == "left out: about 40 s expected, the limit is 39 s"
    monkeypatch.setattr(benchmark, "available_mb", lambda: 4096.0)
    assert benchmark.refusal((0.0, 0.8), job, 1, CPU) == ""
    assert benchmark.refusal((0.0, 1.0), job, 1, CPU) == "left out: about 3.9 GB expected, 4.0 GB are free"
    assert benchmark.refusal((0.0, float("nan")), job, 1, CPU) == ""


def test_running_out_of_memory_has_a_reason():
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 5 bytes"),
                  torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):  # fmt: skip
        assert benchmark.reason(error) == "out of memory"


def test_the_images_can_be_registered():
    fixed, moving = benchmark.image_pair((32, 30, 20))
    assert fixed.shape == moving.shape == (32, 30, 20) and fixed.dtype == np.float32
    assert 0 <= min(fixed.min(), moving.min()) and max(fixed.max(), moving.max()) <= 1
    assert np.abs(fixed - moving).max() > 0.1
    assert all(np.array_equal(a, b) for a, b in zip((fixed, moving), benchmark.image_pair((32, 30, 20))))


# ---- Table and figure ---------------------------------------------------------------------------------------------


def test_table(costs, tmp_path):
    costs.to_csv(tmp_path / "benchmark.csv", index=False)
    text = to_markdown(read_benchmark(tmp_path / "benchmark.csv"))
    assert text == to_markdown(costs)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + 7) + (2 + 2) and len({row.count("|") for row in rows[:-4]}) == 1
    assert all(row.count("|") == 6 for row in rows[-4:])
    assert "nan" not in text
    for expected in ("20×18×17", "training step, batch 2 (ms)", "no such kernel", "memory bandwidth"):
        assert expected in text


def test_labels():
    labels = {"gridreg-10": "GridReg-10", "gridreg-5x4x3": "GridReg-5×4×3", "voxelmorph": "VoxelMorph", "mine": "mine"}
    assert {run: label(run) for run in labels} == labels


def test_notes_name_their_rows(costs):
    notes = left_out(costs)
    assert "Original, training with batch 2: nothing to train." in notes
    assert "raises; raises, training with batch 2: RuntimeError: no such kernel." in notes
    one = costs[(costs["run"] != "raises") | (costs["shape"] == "20x18x17") & (costs["task"] == "register")]
    assert "raises, at 20×18×17: RuntimeError: no such kernel." in left_out(one)


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (0.012345, "0.0123"), (1.5, "1.50"), (12.345, "12.3"), (1234.5, "1,234"), (np.nan, "–")]
)
def test_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("trained", [True, False])
def test_figure(costs, tmp_path, monkeypatch, trained):
    monkeypatch.setitem(style.RC, "savefig.dpi", 50)
    frame = costs if trained else costs[costs["task"] == "register"]
    figure = cost_figure(tmp_path / "benchmark", frame)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.pdf", "benchmark.png", "benchmark.txt"]
    assert len(figure.axes) == (8 if trained else 4)
    shown = " ".join(" ".join(text.get_text() for text in figure.findobj(plt.Text)).split())
    for expected in (
        "Floor",
        "dense",
        "GridReg-5×4×3",
        "20×18×17",
        "time per case (s)",
        "(a)",
    ):
        assert expected in shown
    assert "Not measured: absent, raises" in (tmp_path / "benchmark.txt").read_text()
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02, "something is clipped"
    assert all(ax.get_yscale() == "log" for ax in figure.axes)
