import shutil
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from fm_core.config import RunConfig, load_config
from fm_core.config.derived_defaults import with_generator
from fm_core.errors import UserError
from fm_core.run.directory import RunDirectory, identity, load_run_config
from fm_core.run.progress import no_progress
from fm_core.run.results import StageResult
from fm_core.run.stage_runner import run_stage_function
from fm_core.stages.preflight import preflight
from fm_core.storage.atomic_files import read_json
from fm_core.storage.hashing import fingerprint


def config_at(root, **sections):
    sections["run"] = {"root": str(root), "name": "tiny", **sections.get("run", {})}
    return RunConfig.model_validate(sections)


def begin(config) -> RunDirectory:
    """The directory of an accepted start."""
    run = RunDirectory(config)
    run.check()
    run.begin()
    return run


def trained(config) -> RunDirectory:
    """The directory of a run whose first step was applied."""
    run = begin(config)
    run.bind()
    return run


def refused(config) -> str:
    with pytest.raises(UserError) as caught:
        begin(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_asked_and_where_is_written_down(tmp_path):
    config = config_at(tmp_path, train={"learning_rate": 3e-4})
    run = trained(config)
    assert load_config(run.path / "config.yaml") == with_generator(config)
    environment = read_json(run.path / "environment.json")
    assert environment["versions"]["torch"]
    assert {"host", "python", "platform", "git_commit"} <= environment.keys()


def test_opening_again_changes_nothing(tmp_path):
    run = trained(config_at(tmp_path))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    begin(config_at(tmp_path))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("run", {"seed": 1}, "run.seed was 0 and is now 1"),
        ("data", {"name": "other"}, "data.name"),
        ("data", {"validation_images": 499}, "data.validation_images was 500 and is now 499"),
        ("data", {"horizontal_flip": True}, "data.horizontal_flip"),
        ("model", {"channels": 64}, "model.channels was 32 and is now 64"),
        ("method", {"path_options": {"sigma_min": 0.5}}, "method.path_options.sigma_min"),
        ("method", {"coupling": "minibatch-optimal-transport"}, "method.coupling"),
        ("train", {"global_batch": 64}, "train.global_batch was 128 and is now 64"),
        ("train", {"learning_rate": 0.5}, "train.learning_rate"),
        ("train", {"ema_decays": [0.5]}, "train.ema_decays"),
    ],
)
def test_another_run_in_the_same_place_is_refused_by_key(tmp_path, section, change, named):
    run = trained(config_at(tmp_path))
    before = (run.path / "config.yaml").read_bytes()
    assert named in refused(config_at(tmp_path, **{section: change}))
    assert (run.path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"images": 256_000}),
        ("train", {"micro_batch": 16}),
        ("train", {"log_images": 128}),
        ("train", {"checkpoint_images": 128}),
        ("train", {"keep_checkpoints": 1}),
        ("train", {"gradient_checkpointing": True}),
        ("launch", {"processes": 4, "threads": 2}),
        ("sample", {"images": 5, "solver": "euler", "steps": 3}),
        ("evaluate", {"likelihood": {"images": 4}}),
        ("report", {"neighbours": 2}),
        ("data", {"root": "/moved"}),
        ("data", {"cache": "/scratch"}),
        ("data", {"workers": 3}),
    ],
)
def test_settings_that_do_not_affect_the_run_itself_may_change(tmp_path, section, change):
    config = config_at(tmp_path)
    trained(config)
    changed = config_at(tmp_path, **{section: change})
    run = begin(changed)
    assert load_config(run.path / "config.yaml") == with_generator(config)
    run.bind()
    assert load_config(run.path / "config.yaml") == with_generator(changed)


@pytest.mark.parametrize("end", [None, UserError("a file is missing"), KeyboardInterrupt()])
def test_what_a_stage_is_given_for_one_call_is_not_what_was_asked_of_the_run(tmp_path, end):
    trained(config_at(tmp_path))
    recorded_file = RunDirectory(config_at(tmp_path)).path / "config.yaml"
    before = recorded_file.read_bytes(), recorded_file.stat().st_mtime_ns

    def work(run, observe):
        run.begin()
        if end:
            raise end
        return StageResult(stage="sample", state="done", seconds=0, summary="", paths={}, counts={})

    elsewhere = config_at(tmp_path, train={"checkpoint_root": str(tmp_path / "elsewhere")})
    with suppress(UserError, KeyboardInterrupt):
        run_stage_function("sample", elsewhere, no_progress, work)
    assert (recorded_file.read_bytes(), recorded_file.stat().st_mtime_ns) == before


def test_a_pipeline_that_is_refused_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"sample\.step"):
        preflight(config_at(tmp_path, sample={"step": 77777}))
    assert not RunDirectory(config_at(tmp_path)).path.exists()


def test_the_end_of_a_falling_learning_rate_is_part_of_the_run(tmp_path):
    falling = {"schedule": "cosine", "images": 128_000}
    trained(config_at(tmp_path, train=falling))
    longer = config_at(tmp_path, train={**falling, "images": 256_000})
    assert "train.images was 128000 and is now 256000" in refused(longer)


def test_a_run_may_be_moved(tmp_path):
    trained(config_at(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    begin(config_at(tmp_path / "b"))


def test_the_archives_may_be_moved(tmp_path):
    source = {"format": "imagenet-npz", "image_size": 64}
    trained(config_at(tmp_path, data={"source": {**source, "url": "/here"}}))
    begin(config_at(tmp_path, data={"source": {**source, "url": "/there"}}))


def test_a_key_that_an_older_version_did_not_know_has_its_default(tmp_path):
    run = trained(config_at(tmp_path))
    file = run.path / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["train"]["epsilon"], tree["report"]
    file.write_text(yaml.safe_dump(tree))
    begin(config_at(tmp_path))
    assert "train.epsilon" in refused(config_at(tmp_path, train={"epsilon": 0.5}))


def test_a_time_that_an_older_version_recorded_as_a_number_is_read(tmp_path):
    run = trained(config_at(tmp_path))
    (run.path / "environment.json").touch()
    tree = yaml.safe_load((run.path / "config.yaml").read_text())
    tree["launch"] |= {"kind": "slurm", "processes": 1}
    tree["launch"]["slurm"]["options"] = {"time-min": 43_200}
    (run.path / "config.yaml").write_text(yaml.safe_dump(tree))
    begin(config_at(tmp_path))
    assert load_run_config(run.path / "config.yaml").launch.slurm.options == {"time-min": 43_200}
    shutil.copy(run.path / "config.yaml", tmp_path / "given.yaml")
    with pytest.raises(UserError, match="write it in quotes"):
        load_run_config(tmp_path / "given.yaml")


def test_a_configuration_of_a_newer_version_is_refused(tmp_path):
    run = trained(config_at(tmp_path))
    file = run.path / "config.yaml"
    file.write_text(file.read_text() + "distillation: {teacher: x}\n")
    message = refused(config_at(tmp_path))
    assert str(file) in message
    assert "distillation" in message


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "/proc/runs", "/dev/null/runs"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, place):
    (tmp_path / "a-file").write_text("in the way")
    message = refused(config_at(tmp_path / place))
    assert message.startswith("run.root")


def test_a_directory_that_takes_no_new_files_is_refused(tmp_path, monkeypatch):
    begin(config_at(tmp_path))

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    message = refused(config_at(tmp_path))
    assert message.startswith("run.root")
    assert "Permission denied" in message


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    config = config_at(tmp_path)
    message = refused(config)
    assert "1 MiB free" in message
    assert not RunDirectory(config).path.exists()


def test_the_identity_is_plain_and_complete():
    tree = identity(RunConfig())
    assert set(tree) == {"run", "data", "model", "method", "train"}
    assert fingerprint(tree) == fingerprint(identity(RunConfig()))


def test_where_things_lie_follows_the_configuration(tmp_path):
    run = RunDirectory(config_at(tmp_path))
    assert run.checkpoints == str(tmp_path / "tiny" / "train" / "checkpoints")
    assert run.samples == str(tmp_path / "tiny" / "samples")
    elsewhere = RunDirectory(
        config_at(tmp_path, train={"checkpoint_root": "/c"}, sample={"root": "s3://bucket/s"})
    )
    assert (elsewhere.checkpoints, elsewhere.samples) == ("/c", "s3://bucket/s")
    assert elsewhere.path == Path(tmp_path, "tiny")


def bound_run(config) -> None:
    run = RunDirectory(config)
    run.check()
    run.begin()
    run.bind()


def where(config) -> Path:
    return RunDirectory(config).path.resolve()


def test_config_yaml_of_a_run_means_its_directory_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    bound_run(config_at("runs"))
    recorded = load_run_config("runs/tiny/config.yaml")
    assert (recorded.run.root, recorded.run.name) == ("runs", "tiny")  # as it was asked
    monkeypatch.chdir(tmp_path / "there")
    assert where(load_run_config("../runs/tiny/config.yaml")) == tmp_path / "runs" / "tiny"
    shutil.move(tmp_path / "runs" / "tiny", tmp_path / "there" / "renamed")
    moved = load_run_config("renamed/config.yaml", {"sample": {"images": 5}})
    assert where(moved) == tmp_path / "there" / "renamed"
    assert moved.sample.images == 5
    assert load_run_config(tmp_path / "there" / "renamed" / "config.yaml").run == moved.run
    bound_run(moved)


def test_another_run_can_be_made_of_the_recorded_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bound_run(config_at("runs"))
    file = tmp_path / "runs" / "tiny" / "config.yaml"
    monkeypatch.chdir("/")
    assert load_run_config(file, {"run": {"name": "other"}}).run.name == "other"
    assert load_run_config(file, {"run": {"root": "/elsewhere"}}).run.root == "/elsewhere"
    assert where(load_run_config(file, {"run": {"seed": 0}})) == file.parent


def test_a_configuration_outside_of_a_run_directory_means_what_it_says(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("run: {root: runs, name: tiny}")
    assert load_run_config(file) == load_config(file)


def test_a_directory_whose_name_is_not_a_valid_run_name_is_refused(tmp_path):
    bound_run(config_at(tmp_path / "runs"))
    shutil.move(tmp_path / "runs" / "tiny", tmp_path / "my run")
    with pytest.raises(UserError, match=r"config\.yaml: run\.name") as caught:
        load_run_config(tmp_path / "my run" / "config.yaml")
    assert "\n" not in str(caught.value)
