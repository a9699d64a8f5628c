"""fm reproduce --dry-run: cost estimates against hand calculations and a finished comparison."""

from pathlib import Path

import pytest

from fm_core import cli
from fm_core.commands import estimate
from fm_core.config import load_config, merge, parse_config
from fm_core.errors import UserError
from fm_core.reproduce import cost_estimate as module
from fm_core.reproduce.cost_estimate import HEAD, STORED
from fm_core.reproduce.experiment_cost import Assumptions, image_experiment_cost, toy_experiment_cost
from fm_core.reproduce.experiments import experiments_of, objective_of
from fm_core.training.cost_model import Cluster, training_cost

CONFIGS = Path(__file__).parents[2] / "infra" / "configs"
SHIPPED = sorted(CONFIGS.glob("reproduce-*.yaml"))
IMAGENET64 = CONFIGS / "reproduce-imagenet64.yaml"
DIGITS = CONFIGS / "reproduce-digits.yaml"


def dry_run(capsys, config, *arguments):
    code = cli.main(("reproduce", "--config", str(config), "--dry-run", *arguments))
    out, err = capsys.readouterr()
    return code, out, err


def rows_of(estimated):
    return {row[0]: dict(zip(HEAD + STORED, row, strict=True)) for row in estimated.rows}


@pytest.fixture(autouse=True)
def _no_gpu_is_known(monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("file", [*SHIPPED, CONFIGS / "checkerboard.yaml"], ids=lambda file: file.stem)
def test_every_shipped_comparison_is_estimated_without_its_data_and_nothing_is_written(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code, out, err = dry_run(capsys, file)
    assert (code, err) == (0, "")
    for section in load_config(file).reproduce.cells:
        assert f"\n{section.title}" in out
    assert "\nsum " in out
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_of_imagenet64_are_the_arithmetic():
    config = load_config(IMAGENET64)
    estimated = estimate(config, peak=500e12, mfu=0.4)
    rows = rows_of(estimated)
    cost = training_cost(config, (3, 64, 64), 1000, Cluster(1, 1, 500e12, 0.4, 1.0))
    assert "295,131,267 parameters" in estimated.facts["network"]
    assert (
        f"{cost.images_per_s:,.0f} images/s a device: 40% of 500 TFLOP/s (as stated"
        in estimated.facts["throughput"]
    )
    assert rows["DDPM"]["training FLOPs"] == f"{cost.total_flops:,.3g}"
    assert rows["FM-OT"]["training, h"] == f"{cost.seconds / 3600:,.3g}"
    assert rows["sum"]["training, h"] == f"{5 * cost.seconds / 3600:,.3g}"
    assert rows["sum"]["runs"] == "5"
    assert rows["sum"]["checkpoints"] == f"{5 * 20 * 16 * 295_131_267 / 1e9:.3g} GB"
    # 50,000 samples, 10,000 at each of 20 checkpoints and 10,000 at each of four tolerances; NFE of the paper
    solved = (50_000 + 10_000 * (20 + 4)) * 138
    # euler, midpoint and rk4 at 8, 12, 20, 40, 60 and 100, the exact solution, and 16 images at five budgets
    fixed = 10_000 * (3 * 240 + 1000) + 16 * 230
    hours = (solved + fixed) * cost.forward_flops / (500e12 * 0.4) / 3600
    assert rows["FM-OT"]["samples, h"] == f"{hours:,.3g}"
    # 1,000 images with 10 draws, and 4 checks; one forward pass, and one backward pass for each of two probes
    each = 10_004 * 3 * 100 * cost.forward_flops / (500e12 * 0.4) / 3600
    assert rows["FM-OT"]["bits/dim, h"] == f"{each:,.3g} per 100 NFE"
    assert "16.4 GB: 1,331,167 images" in estimated.facts["data set"]


def test_an_assumed_peak_is_marked_as_assumed_and_a_known_one_as_this_gpus(monkeypatch):
    config = load_config(IMAGENET64)
    assert "989 TFLOP/s (assumed: bf16 on an H100 or H200" in estimate(config).facts["throughput"]
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda number: "NVIDIA A100-SXM4-80GB")
    assert "312 TFLOP/s (bf16 on this NVIDIA A100-SXM4-80GB" in estimate(config).facts["throughput"]
    exact = load_config(IMAGENET64, {"train": {"precision": "fp32"}})
    assert " 67 TFLOP/s (assumed: float32 on an H100 or H200" in estimate(exact).facts["throughput"]


def test_unknown_quantities_are_marked_unknown_and_stated_ones_are_used():
    config = load_config(DIGITS)
    unknown = estimate(config)
    assert {row[HEAD.index("training, h")] for row in unknown.rows} == {"unknown"}
    assert unknown.headline.endswith("hours unknown")
    assert "unknown before training" in unknown.facts["NFE"]
    rows = rows_of(estimate(config, images_per_s=800))
    assert rows["DDPM"]["training, h"] == f"{179_200 / 800 / 3600:.3g}"
    assert rows["DDPM"]["samples, h"].endswith(" per 100 NFE")
    stated = rows_of(estimate(config, images_per_s=800, nfe=200))
    # A forward pass costs a third of training on an image; 3 checkpoints. Few evaluations: six solvers with
    # 1, 2, 3, 4, 6, 8, 10 and 16, and a reference of 100.
    curve, few = 256 * (3 * 72 + 100), 1000 * (6 * 50 + 100)
    solved = (1000 + 256 * 3) * 200 + curve + few + 16 * 230
    assert stated["DDPM"]["samples, h"] == f"{solved / 2400 / 3600:.3g}"
    # Three students, each with 7 evaluations, a reference of 4 and samples of 2; and 2,000 pairs of 40.
    solved += 3 * 1000 * 13 + 2000 * 40
    assert stated["FM-OT"]["samples, h"] == f"{solved / 2400 / 3600:.3g}"
    assert stated["ScoreFlow"]["samples, h"] == f"{(1768 * 200 + curve + 16 * 230) / 2400 / 3600:.3g}"
    assert stated["DDPM"]["bits/dim, h"] == f"{132 * 3 * 200 / 2400 / 3600:.3g}"


def test_students_count_with_their_additional_passes():
    rows = rows_of(estimate(load_config(DIGITS), images_per_s=800))
    # A quarter of the examples of MeanFlow, and half of those of SplitMeanFlow, need two more forward passes;
    # one more of MeanFlow's is for its direction. A training pass is three forward passes.
    passes = 128 * (300 * (3 + 0.25 * 2 + 0.25) + 300 * (3 + 0.5 * 2) + 250 * 3)
    hours = 179_200 / 800 / 3600 + passes / 2400 / 3600
    assert float(rows["FM-OT"]["training, h"]) == pytest.approx(hours, rel=0.01)


def test_seeds_and_fewer_steps_count():
    keys = {"reproduce": {"seeds": [0, 1, 2]}}
    one, three = (rows_of(estimate(load_config(DIGITS, over), images_per_s=100)) for over in ({}, keys))
    assert float(three["sum"]["training, h"]) == pytest.approx(3 * float(one["sum"]["training, h"]), rel=0.01)
    sections = load_config(DIGITS).reproduce.cells
    cells = [{**section.model_dump(mode="json"), "steps": 140} for section in sections]
    short = load_config(DIGITS, {"reproduce": {"cells": cells}, "train": {"warmup_images": 0}})
    estimated = rows_of(estimate(short, images_per_s=100))
    assert estimated["sum"]["steps"] == "700"
    assert float(estimated["DDPM"]["training, h"]) == pytest.approx(
        float(one["DDPM"]["training, h"]) / 10, rel=0.01
    )


def test_a_step_that_solves_an_ode_has_no_cost_before_it_is_solved():
    estimated = rows_of(estimate(load_config(CONFIGS / "checkerboard.yaml"), images_per_s=1000))
    assert estimated["CNF (50 of 6,000 steps)"]["training, h"] == "unknown"
    assert estimated["sum"]["training, h"].endswith(" + 1 unknown")
    assert float(estimated["DDPM"]["training, h"]) == pytest.approx(6000 * 128 / 1000 / 3600, rel=0.01)
    of_runs = [hours for title, hours in estimated.items() if title != "sum"]
    known = [float(row["training, h"]) for row in of_runs if row["training, h"] != "unknown"]
    assert sum(known) == pytest.approx(float(estimated["sum"]["training, h"].split()[0]), rel=0.01)
    # Besides the forward and backward pass of all: a JVP and the network's own velocity for some examples.
    operations = (float(estimated[title]["training FLOPs"]) for title in ("MeanFlow", "DDPM"))
    assert 1 < next(operations) / next(operations) < 2


def test_fixed_steps_are_counted_and_not_guessed():
    adaptive, fixed = (
        image_experiment_cost(experiments_of(config)[0], config.reproduce, (1, 8, 8), 10)
        for config in (
            load_config(DIGITS),
            load_config(DIGITS, {"sample": {"solver": "heun", "steps": 10}}),
        )
    )
    drawn = 1000 + 256 * 3
    assert adaptive.solved_images - fixed.solved_images == drawn
    assert fixed.fixed_evaluations - adaptive.fixed_evaluations == drawn * 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mfu", "2"), "--mfu 2"),
        (("--images-per-s", "0"), "--images-per-s 0"),
        (("--nfe", "-1"), "--nfe -1"),
        (("--train.keep_checkpoints", "2"), "train.keep_checkpoints"),
        (("--train.global_batch", "127"), "global_batch 127"),
        (("--evaluate.features", "inception"), "weights"),
        (("--model.attention_resolutions", "[3]"), "[3]"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_two(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = dry_run(capsys, DIGITS, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_objective_that_is_none_is_named():
    cells = [{"name": "odd", "objective": "score-matching", "path": "no-such-path"}]
    reproduce = {"cells": cells, "few_steps": {"experiments": [], "students": []}}
    tree = merge(load_config(DIGITS).model_dump(mode="json"), {"reproduce": reproduce})
    with pytest.raises(UserError, match=r"reproduce\.cells\.odd: unknown path"):
        estimate(parse_config(tree, where="x"))


def test_throughput_comes_from_what_was_stated():
    assert Assumptions(100.0, 0.5).flops_per_s(3.0) == 50
    assert Assumptions(100.0, 0.5, images_per_s=7).flops_per_s(3.0) == 21
    assert Assumptions(None).flops_per_s(3.0) is None


def test_a_points_network_is_counted():
    config = load_config(CONFIGS / "checkerboard.yaml")
    cost = toy_experiment_cost(config.reproduce.toy2d, objective_of(config.reproduce.cells[0]), 6000)
    assert cost.parameters == 3 * 512 + 512 + 4 * (512 * 512 + 512) + 512 * 2 + 2
    assert cost.forward_flops == 2 * (3 * 512 + 4 * 512 * 512 + 512 * 2)
