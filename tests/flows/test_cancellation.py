"""The final state and message of a run that failed, was stopped on request, or crashed."""

from pathlib import Path

import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import TerminationSignal

from flows.cancellation import effective_config, resume_message
from flows.stage_tasks import as_stage_ended
from flows.train import train_digits
from fm_core.checkpoint.upload_record import UploadRecord, write_upload_record
from fm_core.config import RunConfig
from fm_core.errors import DetachedError, StopRequested, UnrecoverableError, UserError
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import Progress
from fm_core.run.status import write_status
from fm_core.storage.atomic_files import write_json


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that stopped at step 1,234, before its next checkpoint was complete."""
    config = RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "a-run"}})
    directory = RunDirectory(config)
    progress = Progress("train", 157_952, 179_200, "images")
    write_status(directory.path, progress, "stopped", step=1234, images_seen=157_952)
    for step in (1000, 1200):
        write_json(directory.path / "train" / "checkpoints" / f"step-{step:08d}" / "COMPLETE", {"files": {}})
    (directory.path / "train" / "checkpoints" / "step-00001234").mkdir()
    return config


def test_the_message_of_a_stopped_run_names_step_checkpoint_and_commands(config: RunConfig):
    path = RunDirectory(config).path
    assert resume_message(config, "an-id") == (
        "stopped at step 1,234 (157,952 images seen), checkpoint step-00001200; to resume: "
        f"prefect flow-run retry an-id, or fm train --config {path}/config.yaml"
    )


def test_the_message_names_an_upload_that_continues_and_its_deadline(config: RunConfig):
    uploading = UploadRecord(
        url="s3://bucket/a-run", step=1200, host="another", pid=1, created=0.0, until=4102444800.0
    )
    write_upload_record(RunDirectory(config).path, uploading)
    assert (
        ", checkpoint step-00001200, its upload to s3://bucket/a-run continues until 2100-01-01 00:00 UTC at "
        "the latest (logs/train-upload.log); to resume: prefect"
    ) in resume_message(config, "an-id")


def test_the_message_says_that_no_stage_had_started(tmp_path: Path):
    config = RunConfig.model_validate({"run": {"root": str(tmp_path), "name": "new"}})
    assert resume_message(config, "an-id").startswith(
        "stopped before the first stage; to resume: prefect flow-run retry"
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
def test_only_an_unrequested_stop_restarts_a_run(config: RunConfig, error, stop: bool, kind: StateType):
    if stop:
        (RunDirectory(config).path / "STOP").touch()
    ended = as_stage_ended(error, config)
    assert ended.outcome.prefect_state == kind.value
    assert "\n" not in ended.message
    assert ("to resume: " in ended.message) == (kind != StateType.FAILED)


@pytest.mark.parametrize(("cancelled", "kind"), [(True, StateType.CANCELLED), (False, StateType.CRASHED)])
def test_a_signal_that_is_not_a_cancellation_leaves_a_run_that_is_started_again(config, cancelled, kind):
    ended = as_stage_ended(TerminationSignal(15), config, cancelled)
    assert ended.outcome.prefect_state == kind.value
    assert ended.message.startswith(
        "stopped at step" if cancelled else "its worker or its host was shut down: "
    )


def test_a_supervisor_that_detached_leaves_a_run_that_is_started_again(config: RunConfig):
    ended = as_stage_ended(DetachedError("its supervisor ended"), config)
    assert (ended.outcome.prefect_state, ended.message) == ("CRASHED", "its supervisor ended")


def test_a_flow_run_s_configuration_is_its_parameters_over_the_preset():
    assert effective_config(train_digits, {}).run.name == "digits"
    given = effective_config(train_digits, {"config": {"run": {"name": "another"}}})
    assert (given.run.name, given.train.images) == ("another", 179_200)
