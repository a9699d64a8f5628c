"""The command line from images to a report, run once, and checks of everything that it produced."""

import json
import re

import pytest
import torch

from fm_core import cli
from fm_core.checkpoint.format import verify
from fm_core.config import load_config, merge, read_yaml
from fm_core.errors import UserError
from fm_core.evaluation.evaluation_run import EvaluationRun
from fm_core.sampling.checkpoint_source import checkpoint_step, load_model, weights_file
from fm_core.sampling.sample_protocol import protocol_of
from fm_core.sampling.sample_store import SampleSet
from fm_core.stages import evaluate, report, report_sections, sample, shard, train
from fm_core.storage.atomic_files import read_json, read_lines
from fm_core.storage.store import Store
from tests.support.tiny_run import STAGES, is_progress

MODULES = {"shard": shard, "train": train, "sample": sample, "evaluate": evaluate, "report": report}


def files_of(tiny):
    """Content and time of every file except those that each call of a stage rewrites."""
    rewritten = {"stages.jsonl", "status.json", ".lock.guard"}
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for place in ("runs/tiny", "data")
        for path in (tiny.root / place).rglob("*")
        if path.is_file() and path.name not in rewritten
    }


def samples_of(config):
    model = load_model(weights_file(config, checkpoint_step(config)), torch.device("cpu"))
    protocol = protocol_of(config, model.weights_sha256, model.generator)
    return SampleSet(config, checkpoint_step(config), protocol), model


@pytest.fixture
def scores(tiny):
    (file,) = (tiny.path / "evaluation" / "step-00000020").glob("*.json")
    return read_json(file)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_prints_its_result_and_paths(tiny, stage):
    called = tiny.first[stage]
    head, *paths = called.out.splitlines()
    if stage == "evaluate":
        statement, note, *paths = paths
        assert statement.startswith("  protocol: ")
        assert note.startswith("  BibTeX: note = {")
    assert re.match(rf"{stage} done in [\d.]+ s: \S", head)
    for line in paths:
        _, _, path = line.strip().partition(": ")
        assert (tiny.root / path).exists(), line
    assert [line for line in called.err.splitlines() if not is_progress(line)] == []
    assert is_progress(called.err.splitlines()[-1])


def test_every_stage_called_again_verifies_and_changes_nothing(tiny, capsys, monkeypatch):
    monkeypatch.chdir(tiny.root)
    before = files_of(tiny)
    for stage in STAGES:
        assert cli.main([stage, "--config", str(tiny.file)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{stage} verified in "), out
        assert out.splitlines()[1:] == tiny.first[stage].out.splitlines()[1:]
    assert files_of(tiny) == before


def test_the_history_has_every_call(tiny):
    lines = read_lines(tiny.path / "logs" / "stages.jsonl")
    assert [line["stage"] for line in lines[:5]] == list(STAGES)
    for line in lines[:5]:
        assert (line["state"], line["seconds"] > 0) == ("done", True)
        assert line["summary"]


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_a_process_starts(tiny, capsys, monkeypatch):
    monkeypatch.chdir(tiny.root)
    monkeypatch.setattr(Store, "free_bytes", lambda store: 2**10)
    assert cli.main(["train", "--config", str(tiny.file), "--run.name", "no-space"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not is_progress(line)]
    assert "train.keep_checkpoints" in line
    assert "1.02 kB free" in line
    assert not (tiny.path.parent / "no-space" / "job.json").exists()


def test_metrics_hold_one_line_for_each_interval(tiny):
    lines = read_lines(tiny.path / "train" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    asked = {"step", "images_seen", "loss", "lr", "grad_norm", "images_per_s", "seconds"}
    for line in lines:
        assert asked <= line.keys()
        assert line["images_seen"] == 16 * line["step"]
        assert None not in line.values()
        assert line["images_per_s"] > 0
        assert line["skipped_steps"] == 0
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert lines[0]["loss"] > lines[-1]["loss"] > 0


def test_the_status_contains_the_stage_and_its_end(tiny):
    status = read_json(tiny.path / "status.json")
    assert (status["phase"], status["stage"] in STAGES) == ("done", True)
    assert {"done", "total", "unit", "updated", "message"} <= status.keys()
    assert None not in status.values()


def test_done_records_where_training_ended(tiny):
    done = read_json(tiny.path / "train" / "DONE.json")
    assert (done["step"], done["images_seen"], done["processes"]) == (20, 320, 2)
    assert verify(tiny.path / "train" / "checkpoints" / done["checkpoint"]) is None


def no_empty(value, where=""):
    if isinstance(value, dict):
        for key, below in value.items():
            no_empty(below, f"{where}.{key}")
    elif isinstance(value, list):
        for below in value:
            no_empty(below, where)
    else:
        assert value is not None, where


def test_scores_hold_every_promised_field(scores):
    frechet = scores["frechet_distance"]
    assert {"value", "stderr", "features", "images", "reference"} <= frechet.keys()
    assert (frechet["features"], frechet["images"]) == ("classifier", 20)
    assert scores["frechet_distance_of_held_out"]["images"] == frechet["images"]
    assert frechet["value"] > scores["frechet_distance_of_held_out"]["value"]
    assert frechet["fewer_images_than_features"]
    for key in ("kernel_distance", "inception_score", "precision", "recall"):
        assert {"value", "stderr", "features", "images"} <= scores[key].keys()
        assert scores[key]["features"] == "classifier"
    assert (scores["precision"]["images"], scores["precision"]["reference_images"]) == (20, 1737)
    ledger = {"solver": "euler", "steps": 4, "mean": 4, "batch_size": 8, "forwards_per_evaluation": 1}
    assert ledger | {"accepted": 4, "rejected": 0} == scores["nfe"]
    assert {"value", "stderr", "images", "k", "probe_std"} <= scores["bits_per_dim"].keys()
    assert scores["bits_per_dim"]["images"] == 2
    assert 2 < scores["bits_per_dim"]["value"] < 8
    assert scores["classifier"]["held_out_accuracy"] > 0.9
    assert sum(scores["recognised"]["class_shares"]) == pytest.approx(1)
    accuracy = scores["class_accuracy"]
    assert (accuracy["images"], accuracy["held_out"]) == (20, scores["classifier"]["held_out_accuracy"])
    assert not re.search(r"\bfid\b", json.dumps(scores), re.IGNORECASE)
    no_empty(scores)


def test_the_protocol_holds_all_that_moves_the_numbers(scores, tiny):
    protocol = scores["protocol"]
    manifest = read_json_of_data(tiny)
    expected = {
        "images": 20,
        "batch_size": 8,
        "seed": 0,
        "solver": "euler",
        "steps": 4,
        "weights": "ema",
        "dtype": "float32",
        "levels": 17,
        "features": "classifier",
    }
    assert expected.items() <= protocol.items()
    assert manifest["version"] == protocol["data_version"]
    for key in ("weights_sha256", "features_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", protocol[key])
    assert {"torch", "torchdiffeq"} <= protocol["versions"].keys()
    assert not {"rtol", "atol"} & protocol.keys()


def read_json_of_data(tiny):
    return json.loads((tiny.root / "data" / "digits" / "manifest.json").read_text())


def test_a_lost_picture_is_drawn_again_without_new_samples(tiny):
    samples, _ = samples_of(tiny.config)
    picture = samples.store.local / "grid.png"
    before = picture.read_bytes()
    tar = (samples.store.local / "samples-000000.tar").stat().st_mtime_ns
    picture.unlink()
    assert sample.sample(tiny.config).state == "done"
    assert picture.read_bytes() == before
    assert (samples.store.local / "samples-000000.tar").stat().st_mtime_ns == tar


def test_what_was_not_asked_for_is_absent(tiny):
    likelihood = tiny.config.evaluate.likelihood.model_copy(update={"images": 0})
    other = tiny.config.model_copy(
        update={
            "evaluate": tiny.config.evaluate.model_copy(
                update={"likelihood": likelihood, "metrics": ("frechet_distance",)}
            )
        }
    )
    made = evaluate.evaluate(other)
    path = tiny.root / made.paths["scores"]
    scores = read_json(path)
    path.unlink()
    assert made.state == "done"
    asked = {"protocol", "step", "images_seen", "seconds", "schema", "nfe"}
    asked |= {"classifier", "recognised", "class_accuracy"}
    distances = {"frechet_distance", "frechet_distance_of_held_out", "frechet_distance_ratio"}
    assert scores.keys() - asked == distances
    assert "likelihood" not in scores["protocol"]
    assert "bits_per_dim" not in made.counts
    no_empty(scores)


def test_class_accuracy_is_of_the_labels_that_the_samples_are_stored_with(tiny, scores):
    samples, _ = samples_of(tiny.config)
    evaluation = EvaluationRun(tiny.config, torch.device("cpu"))
    evaluation.open(lambda step, steps, loss: None)
    correct = [
        evaluation.extractor(evaluation.source.read(number)[0])[1].argmax(1) == samples.read_labels(number)
        for number in range(len(evaluation.source.ranges))
    ]
    expected = torch.cat(correct).double().mean().item()
    assert scores["class_accuracy"]["value"] == pytest.approx(expected)
    assert len(torch.cat(correct)) == 20


def test_samples_of_another_network_are_refused_in_one_line(tiny, tmp_path):
    """train.checkpoint_root names the checkpoints of a run with another network."""
    tree = merge(read_yaml(tiny.file), {"run": {"name": "other"}, "model": {"dropout": 0.5}})
    tree["train"]["checkpoint_root"] = str(tiny.path / "train" / "checkpoints")
    file = tmp_path / "other.yaml"
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        sample.sample(load_config(file))
    assert "model.dropout was 0.1 and is now 0.5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_samples_to_score_are_refused_in_one_line(tiny, capsys):
    assert cli.main(["evaluate", "--config", str(tiny.file), "--sample.images", "3"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not is_progress(line)]
    assert len(error) == 1
    assert "at least 4" in error[0]


def test_scoring_samples_that_are_not_there_says_what_to_run(tiny, capsys):
    assert cli.main(["evaluate", "--config", str(tiny.file), "--sample.seed", "9"]) == 2
    assert "run fm sample first" in capsys.readouterr().err


def test_what_goes_wrong_inside_leaves_its_traceback_and_its_last_line(tiny, capsys, monkeypatch):
    def broken(*_):
        raise ArithmeticError("dopri5 cannot go on")

    monkeypatch.setattr(report_sections, "loss_curve", broken)
    (tiny.path / "report.html").unlink()
    assert cli.main(["report", "--config", str(tiny.file)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if not is_progress(line)]
    assert error == ["fm: ArithmeticError: dopri5 cannot go on"]
    assert "in broken" in (tiny.path / "logs" / "report-error.log").read_text()
    assert read_json(tiny.path / "status.json")["phase"] == "failed"
    monkeypatch.undo()
    assert cli.main(["report", "--config", str(tiny.file)]) == 0
    assert read_json(tiny.path / "status.json")["phase"] == "done"
