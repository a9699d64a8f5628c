"""How a run ends, in words and as a state: mended by its user, stopped on request, or by an accident."""

from pathlib import Path

import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import TerminationSignal

from flows.cancellation import configuration, how_to_continue
from flows.stage_tasks import ended_because_of
from flows.train import train_digits
from fm_core.checkpoint.upload_record import UploadRecord, write_upload_record
from fm_core.config import RunConfig
from fm_core.errors import StopRequested, UnrecoverableError, UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import write_json


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that stopped at step 1,234, before its next checkpoint was whole."""
    config = RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "a-run"}})
    directory = RunDirectory(config)
    progress = Progress("train", 157_952, 179_200, "images")
    write_status(directory.path, progress, "stopped", step=1234, images_seen=157_952)
    for step in (1000, 1200):
        write_json(directory.path / "train" / "checkpoints" / f"step-{step:08d}" / "COMPLETE", {"files": {}})
    (directory.path / "train" / "checkpoints" / "step-00001234").mkdir()
    return config


def test_the_last_words_name_step_checkpoint_and_commands(config: RunConfig):
    path = RunDirectory(config).path
    assert how_to_continue(config, "an-id") == (
        "stopped at step 1,234 (157,952 images seen), checkpoint step-00001200; to go on: "
        f"prefect flow-run retry an-id, or fm train --config {path}/config.yaml"
    )


def test_an_upload_that_goes_on_is_told_with_its_latest_end(config: RunConfig):
    goes_on = UploadRecord(
        url="s3://bucket/a-run", step=1200, host="another", pid=1, created=0.0, until=4102444800.0
    )
    write_upload_record(RunDirectory(config).path, goes_on)
    assert (
        ", checkpoint step-00001200, its upload to s3://bucket/a-run goes on until 2100-01-01 00:00 UTC at "
        "the latest (logs/train-upload.log); to go on: prefect"
    ) in how_to_continue(config, "an-id")


def test_a_run_that_had_not_begun_is_told_as_well(tmp_path: Path):
    config = RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "new"}})
    assert how_to_continue(config, "an-id").startswith(
        "stopped before the first stage; to go on: prefect flow-run retry"
    )


@pytest.mark.parametrize(
    ("error", "stop", "kind"),
    [
        (UserError("train.images: is wrong"), False, StateType.FAILED),
        (UnrecoverableError("no step could be applied"), False, StateType.FAILED),
        (StopRequested("at step 1234"), True, StateType.CANCELLED),
        (TerminationSignal(15), False, StateType.CANCELLED),
        (StopRequested("its launcher was killed"), False, StateType.CRASHED),
    ],
)
def test_only_accidents_start_a_run_again(config: RunConfig, error, stop: bool, kind: StateType):
    if stop:
        (RunDirectory(config).path / "STOP").touch()
    end = ended_because_of(error, config)
    assert end.outcome.prefect_state == kind.value
    assert "\n" not in end.message
    assert ("to go on: " in end.message) == (kind != StateType.FAILED)


def test_a_flow_run_s_configuration_is_its_parameters_over_the_preset():
    assert configuration(train_digits, {}).run.name == "digits"
    given = configuration(train_digits, {"config": {"run": {"name": "another"}}})
    assert (given.run.name, given.train.images) == ("another", 179_200)
