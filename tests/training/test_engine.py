"""The DeepSpeed engine, the averages and the loop in real processes (lab_rank.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fm_core.run.files import read_json, read_lines

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def launch(folder, ranks):
    variables = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*agent, f"--nproc-per-node={ranks}", "-m", "lab_rank", str(folder)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = read_json(folder / f"found-{ranks}.json")
    assert found, done.stdout[-3000:] + done.stderr[-5000:]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def two(folder):
    return launch(folder, 2)


@pytest.fixture(scope="module")
def one(folder, two):
    return launch(folder, 1)


@pytest.mark.parametrize("kind", ["zero-1", "zero-2", "zero-3", "bf16"])
class TestAverages:
    def test_equal_a_naive_average_of_the_whole_weights(self, two, kind):
        found = two[kind]
        assert found["steps"] == [0, 1, 2, 3, 4, 5]
        assert found["moved"] > 0.01
        assert found["apart"] > 0.01
        assert found["naive"] < 1e-6

    def test_asking_for_them_leaves_the_weights_alone(self, two, kind):
        assert two[kind]["looking_changes_nothing"]

    def test_a_checkpoint_restores_weights_and_averages_exactly(self, two, kind):
        assert two[kind]["state"]
        assert two[kind]["loaded_raw"]
        assert two[kind]["loaded_averages"]

    def test_training_goes_on_from_it_to_the_bit(self, two, kind):
        assert two[kind]["went_on"] > 1e-3
        assert two[kind]["went_on_raw"]
        assert two[kind]["went_on_averages"]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages_have_the_same_losses(folder, two, stage):
    ours = [line["loss"] for line in read_lines(folder / f"zero-{stage}" / "metrics.jsonl")]
    first = [line["loss"] for line in read_lines(folder / "zero-1" / "metrics.jsonl")]
    assert len(first) == 5  # of 8 steps: at 2, 4, 6 by one trainer, at 8 by two
    assert ours == pytest.approx(first, rel=1e-5)


def assert_close(folder, one, other):
    a, b = (load_file(folder / name / "average.safetensors") for name in (one, other))
    for name in a:
        assert (a[name] - b[name]).abs().max() < 2e-5


def test_accumulation_changes_nothing_but_rounding(folder, two):
    assert len(two["whole"]["losses"]) == 6
    assert two["accumulated"]["losses"] == pytest.approx(two["whole"]["losses"], rel=1e-5)
    assert_close(folder, "accumulated", "whole-2")


def test_one_process_trains_as_two_but_for_rounding(folder, one, two):
    assert one["whole"]["losses"] == pytest.approx(two["whole"]["losses"], rel=1e-5)
    assert_close(folder, "whole-1", "whole-2")


def test_a_checkpoint_of_another_network_is_refused_in_one_line(two):
    message = two["stranger"]
    assert "model.channels was 8 and is now 16" in message
    assert "\n" not in message


def test_where_every_checkpoint_is_damaged_it_is_an_error_and_no_fresh_start(one):
    assert "no checkpoint under" in one["damaged"]
    assert "raw.safetensors has" in one["damaged"]
    assert "\n" not in one["damaged"]


def test_a_checkpoint_of_another_number_of_processes_is_refused_in_one_line(one):
    assert "2 processes" in one["processes"]
    assert "launch.processes to 2" in one["processes"]
    assert "\n" not in one["processes"]
