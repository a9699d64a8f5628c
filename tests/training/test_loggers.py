"""Copies of the metrics for Prometheus, TensorBoard and Weights & Biases."""

import json
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.training.loggers import GAUGES, MetricLoggers, check_loggers
from fm_core.training.train_log import TrainLog

LINE = {
    "step": 20,
    "images_seen": 2560,
    "loss": 0.25,
    "loss_by_quarter_of_t": [0.1, 0.2, 0.3, 0.4],
    "lr": 1e-3,
    "grad_norm": float("nan"),
    "images_per_s": 812.5,
    "seconds": 3.0,
    "data_seconds": 0.5,
    "skipped_steps": 0,
    "rollbacks": 1,
    "memory_bytes": 2**30,
    "tflops_per_device": 320.0,
    "mfu": 0.32,
}
VALIDATION = {"step": 40, "images_seen": 5120, "loss": 0.75}


def config(tmp_path: Path, **train) -> RunConfig:
    tree = {"run": {"root": str(tmp_path), "name": "a-run"}, "train": {"images": 128_000, **train}}
    return RunConfig.model_validate(tree)


def log(config: RunConfig, tmp_path: Path) -> TrainLog:
    return TrainLog(tmp_path, tmp_path / "metrics.jsonl", "a-job", config.train.images, MetricLoggers(config))


def test_prometheus_reads_the_newest_values(tmp_path: Path):
    from prometheus_client.parser import text_string_to_metric_families

    writer = log(config(tmp_path, prometheus=str(tmp_path)), tmp_path)
    writer.line(LINE)
    writer.line({**LINE, "step": 40, "images_seen": 5120, "loss": 0.125})
    writer.validation_line(VALIDATION)
    writer.validation_line({**VALIDATION, "loss": None})  # it was no number
    text = (tmp_path / "flow-matching-a-run.prom").read_text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {name: sample.value for name, family in families.items() for sample in family.samples}
    assert values["flow_matching_step"] == 40
    assert values["flow_matching_images_seen"] == 5120
    assert values["flow_matching_images_goal"] == 128_000
    assert values["flow_matching_loss"] == 0.125
    assert values["flow_matching_images_per_s"] == 812.5
    assert values["flow_matching_held_out_loss"] == 0.75
    assert [values[f"flow_matching_loss_quarter_{number}"] for number in (1, 2, 3, 4)] == [0.1, 0.2, 0.3, 0.4]
    assert values["flow_matching_mfu"] == 0.32
    # What is not known, as a gradient that is no number, is absent and not zero.
    expected = {f"flow_matching_{key}" for key in (*GAUGES, "images_goal", "written")}
    assert expected - set(values) == {"flow_matching_grad_norm"}
    assert set(families) == expected
    assert all(sample.labels == {"run": "a-run"} for family in families.values() for sample in family.samples)
    assert all(family.documentation for family in families.values())
    assert [path.name for path in tmp_path.glob("*.prom*")] == ["flow-matching-a-run.prom"]


def events(folder: Path) -> list:
    """The records of the event files: length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    records = []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event()
            event.ParseFromString(content[12 : 12 + length])
            records.append(event)
            content = content[16 + length :]
    return records


def test_tensorboard_reads_every_value_against_images_seen(tmp_path: Path):
    pytest.importorskip("tensorboardX", reason="the test extra brings it")
    threads = threading.active_count()
    settings = config(tmp_path, tensorboard=True)
    log(settings, tmp_path).line(LINE)
    again = log(settings, tmp_path)
    again.line({**LINE, "loss": 0.5})  # a session that goes on from before that line
    again.validation_line(VALIDATION)
    folder = tmp_path / "a-run" / "train" / "tensorboard"
    records = events(folder)
    values = [
        (value.tag, event.step, value.simple_value) for event in records for value in event.summary.value
    ]
    assert ("train/loss", 2560, 0.25) in values
    assert ("train/loss", 2560, 0.5) in values
    assert ("train/held_out_loss", 5120, 0.75) in values
    assert len(values) == 2 * (len(GAUGES) - 2) + 3  # no gradient; the validation loss is a line of its own
    assert {tag for tag, _, _ in values} == {f"train/{key}" for key in GAUGES if key != "grad_norm"}
    assert threading.active_count() == threads  # a thread that waits for lines costs a core
    assert any(
        event.session_log.status == event.session_log.START and event.step == 2560 for event in records
    )


def test_nothing_is_written_unless_it_is_asked_for(tmp_path: Path):
    log(config(tmp_path), tmp_path).line(LINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_an_export_that_fails_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "collector"
    folder.mkdir()
    writer = log(config(tmp_path, prometheus=str(folder)), tmp_path)
    folder.rmdir()
    writer.line(LINE)
    writer.line(LINE)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] is None
    assert caplog.text.count("the prometheus logger is disabled") == 1


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"prometheus": "/nowhere"}, "train.prometheus: /nowhere is not a directory"),
        ({"wandb": "a-project"}, "train.wandb: the package wandb is not installed; pip install wandb"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path: Path, train: dict, message: str, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_loggers(config(tmp_path, **train).train)
    assert str(caught.value).startswith(message)


class Service:
    """Stands for the package wandb, which is not installed here."""

    def __init__(self, monkeypatch):
        self.asked, self.lines, self.away = [], [], False
        monkeypatch.setitem(sys.modules, "wandb", self)

    def init(self, **keys):
        if self.away:
            raise ConnectionError("the service is down")
        self.asked.append(keys)
        return SimpleNamespace(define_metric=lambda *names, **keys: None, log=self.lines.append)


def test_a_service_that_is_unavailable_when_training_begins_stops_nothing(
    tmp_path: Path, monkeypatch, caplog
):
    service = Service(monkeypatch)
    service.away = True
    writer = log(config(tmp_path, wandb="a-project", tensorboard=False), tmp_path)
    writer.line(LINE)
    writer.line(LINE)
    assert caplog.messages == ["the wandb logger is disabled: the service is down"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_goes_on_in_its_curve_and_another_of_its_name_does_not(tmp_path: Path, monkeypatch):
    service = Service(monkeypatch)
    for train in ({}, {"images": 256_000, "log_images": 99}, {"learning_rate": 0.5}):
        MetricLoggers(config(tmp_path, wandb="a-project", **train))(LINE)
    first, again, other = (asked["id"] for asked in service.asked)
    assert first == again != other
    assert {asked["name"] for asked in service.asked} == {"a-run"}
    assert [line["images_seen"] for line in service.lines] == [2560] * 3


def test_the_service_gets_what_the_others_get(tmp_path: Path, monkeypatch):
    service = Service(monkeypatch)
    settings = config(tmp_path, wandb="a-project")
    writer = log(settings, tmp_path)
    writer.line(LINE)
    writer.validation_line(VALIDATION)
    line, validation = service.lines
    assert set(line) == set(GAUGES) - {"grad_norm", "held_out_loss"}
    assert (line["loss"], line["loss_quarter_4"], line["rollbacks"]) == (0.25, 0.4, 1)
    assert validation == {"step": 40, "images_seen": 5120, "held_out_loss": 0.75}
    (asked,) = service.asked
    assert (asked["project"], asked["resume"]) == ("a-project", "allow")
    assert asked["config"]["train"]["images"] == 128_000
    assert asked["dir"] == str(tmp_path / "a-run" / "train")
