"""Command line: exit codes and one-line error messages."""

import json
import signal
import subprocess
import sys

import pytest

from fm_core import cli
from fm_core.command_options import STAGES
from fm_core.config import RunConfig, load_config
from fm_core.errors import StopRequested, UserError
from fm_core.run.directory import RunDirectory


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("run: {name: r}\ntrain: {images: 640, global_batch: 64}\n")
    return tmp_path


@pytest.fixture(autouse=True)
def _keep_signal():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fm(capsys, *arguments):
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys, *arguments) -> str:
    code, out, err = fm(capsys, *arguments)
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("fm")
    assert "Traceback" not in err
    return err


def stage_that(monkeypatch, result):
    """Replace the report stage; the list of configurations that it is called with."""
    import fm_core.stages.report as module

    configs = []

    def stage(config, observe):
        configs.append(config)
        return result() if callable(result) else result

    monkeypatch.setattr(module, "report", stage)
    return configs


def raise_(error):
    raise error


class Result:
    state, seconds, summary, paths = "done", 1.0, "a page", {"report": "x.html"}
    notes = {"protocol": "none"}


def test_exit_status_0_comes_with_the_results(place, capsys, monkeypatch):
    stage_that(monkeypatch, Result)
    code, out, err = fm(capsys, "report", "--config", "run.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["report done in 1.0 s: a page", "  protocol: none", "  report: x.html"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("data.root: nothing there"), 2, "fm: data.root: nothing there"),
        (StopRequested("stopped at step 3"), 3, "fm: stopped at step 3"),
        (KeyboardInterrupt(), 3, "fm: stopped; run it again to continue"),
        (RuntimeError("rank 1 was killed"), 1, "fm: RuntimeError: rank 1 was killed"),
    ],
)
def test_what_a_stage_raises_becomes_a_code_and_a_line(place, capsys, monkeypatch, error, code, line):
    stage_that(monkeypatch, lambda: raise_(error))
    assert fm(capsys, "report", "--config", "run.yaml") == (code, "", line + "\n")


INTERRUPTED_IN_A_STRING = """
import os, signal, sys, time, types
from fm_core import cli
from fm_core.command_options import STAGES
from fm_core.config import load_config

def report(config, observe):
    exec(f"os.kill(os.getpid(), {sys.argv[1]}); time.sleep(30)")

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had ignored
module = types.ModuleType("fm_core.stages.report")  # without the libraries that the stage imports
module.report = report
sys.modules[module.__name__] = module
sys.exit(cli.main(["report", "--config", "run.yaml"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_string_is_executed_is_3(place, number):
    # As modules do while they are imported: Python would hide the status behind a death by SIGINT.
    command = [sys.executable, "-c", INTERRUPTED_IN_A_STRING, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "fm: stopped; run it again to continue\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "STAGE"),
        (("trian",), "trian"),
        (("train",), "--config"),
        (("train", "--config", "run.yaml", "--train.imags", "5"), "--train.imags"),
        (("train", "--config", "run.yaml", "--train.images", "many"), "train.images"),
        (("train", "--config", "run.yaml", "--train.images", "0"), "train.images"),
        (("train", "--config", "run.yaml", "--train.images"), "train.images"),
        (("train", "--config", "run.yaml", "--train.images", "1.5"), "train.images"),
        (("train", "--config", "run.yaml", "--train.learning_rate", "inf"), "train.learning_rate"),
        (
            ("train", "--config", "run.yaml", "--model.class_conditional", "perhaps"),
            "model.class_conditional",
        ),
        (("train", "--config", "run.yaml", "--train.schedule", "cosin"), "cosine"),
        (("train", "--config", "run.yaml", "--method.path_options", "{"), "path_options"),
        (("train", "--config", "run.yaml", "extra"), "extra"),
        (("train", "--config", "missing.yaml"), "missing.yaml"),
        (("train", "--config", "."), "."),
        (("status", "--config", "missing.yaml"), "missing.yaml"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_2_and_one_line_that_names_them(place, capsys, arguments, named):
    assert named in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {imags: 5}", "run.yaml: train.imags: unknown key"),
        ("train: {images: many}", "run.yaml: train.images"),
        ("train: [1", "run.yaml: not YAML"),
        ("train: {images: 64, warmup_images: 65}", "train.warmup_images"),
    ],
)
def test_a_wrong_file_is_2_and_one_line(place, capsys, text, named):
    (place / "run.yaml").write_text(text)
    assert named in refused(capsys, "train", "--config", "run.yaml")


@pytest.mark.parametrize("stage", ["train", "evaluate", "report", "sample"])
def test_a_stage_without_its_input_exits_with_2_and_says_what_to_do(place, capsys, stage):
    error = refused(capsys, stage, "--config", "run.yaml")
    assert "fm " in error.removeprefix("fm: ")
    assert not (place / "runs" / "r" / "job.json").exists()


@pytest.mark.parametrize("command", ["shard", "train", "sample"])
def test_a_place_that_cannot_be_written_is_2(place, capsys, command):
    (place / "in-the-way").write_text("")
    error = refused(capsys, command, "--config", "run.yaml", "--run.root", str(place / "in-the-way"))
    assert "run.root" in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--sample.solver", "euler"), "steps"),
        (("--sample.steps", "5"), "steps"),
        (("--sample.solver", "dopri55"), "dopri5"),
        (("--sample.solver", "euler", "--sample.steps", "2", "--sample.rtol", "0.1"), "rtol"),
    ],
)
def test_settings_that_a_solver_would_ignore_are_2_before_anything_else(place, capsys, arguments, named):
    assert named in refused(capsys, "sample", "--config", "run.yaml", *arguments)


def test_sizes_that_do_not_divide_are_2_before_a_process_starts(place, capsys):
    error = refused(capsys, "train", "--config", "run.yaml", "--launch.processes", "3")
    assert "global_batch 64" in error
    assert not (place / "runs" / "r" / "job.json").exists()


def test_another_run_in_the_same_place_is_2_and_names_the_key(place, capsys):
    RunDirectory(load_config("run.yaml")).bind()  # as the first step of training does
    error = refused(capsys, "train", "--config", "run.yaml", "--model.channels", "64")
    assert "model.channels was 32 and is now 64" in error


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("shard", "reproduce")])
def test_a_refused_start_leaves_no_trace(place, capsys, stage):
    refused(capsys, stage, "--config", "run.yaml")
    assert [path.name for path in place.iterdir()] == ["run.yaml"]


class TestOverrides:
    def config(self, capsys, monkeypatch, *arguments):
        configs = stage_that(monkeypatch, Result)
        code, _, err = fm(capsys, "report", "--config", "run.yaml", *arguments)
        assert code == 0, err
        return configs[0]

    def test_every_kind_of_value(self, place, capsys, monkeypatch):
        config = self.config(
            capsys,
            monkeypatch,
            *("--train.images", "6400", "--train.learning_rate", "1e-4"),
            *("--model.class_conditional", "true", "--train.schedule", "cosine"),
            *("--train.ema_decays", "[0.9,0.99]", "--model.channel_multipliers", "1,2,4"),
            *("--method.path_options", '{"sigma_min": 1e-5}', "--sample.step", "30"),
            *("--train.zero_stage", "2", "--evaluate.likelihood.images", "8", "--run.name", "other"),
        )
        assert (config.train.images, config.train.learning_rate) == (6400, 1e-4)
        assert (config.model.class_conditional, config.train.schedule) == (True, "cosine")
        assert config.train.ema_decays == (0.9, 0.99)
        assert config.model.channel_multipliers == (1, 2, 4)
        assert config.method.path_options == {"sigma_min": 1e-5}
        assert (config.sample.step, config.train.zero_stage) == (30, 2)
        assert (config.evaluate.likelihood.images, config.run.name) == (8, "other")

    def test_the_files_other_keys_stay(self, place, capsys, monkeypatch):
        config = self.config(capsys, monkeypatch, "--train.images=6400")
        assert (config.train.images, config.train.global_batch, config.run.name) == (6400, 64, "r")

    def test_environment_variables_are_not_configuration(self, place, capsys, monkeypatch):
        for name in ("RUN", "TRAIN", "run__name", "TRAIN__IMAGES"):
            monkeypatch.setenv(name, json.dumps({"images": 3, "name": "evil"}))
        config = self.config(capsys, monkeypatch)
        assert (config.train.images, config.run.name) == (640, "r")


@pytest.mark.parametrize("command", [*STAGES, "status"])
def test_help_describes_every_key_with_its_default(capsys, command):
    code, out, _ = fm(capsys, command, "--help")
    assert code == 0
    assert "--config" in out
    text = " ".join(out.split())
    for key, meaning, default in (
        ("--train.images", "Total number of training images to see", "128000"),
        ("--evaluate.likelihood.rtol", "Relative tolerance of dopri5", "1e-05"),
        ("--sample.step", "Optimizer step of the checkpoint", "latest"),
    ):
        assert key in text
        assert meaning in text
        assert default in text


def test_help_lists_the_commands(capsys):
    code, out, _ = fm(capsys, "--help")
    assert code == 0
    assert all(stage in out for stage in STAGES)


def test_status_of_a_run_that_does_not_exist(place, capsys):
    code, out, err = fm(capsys, "status", "--config", "run.yaml")
    assert (code, err) == (0, "")
    assert "no stage was run yet" in out
    assert not (place / "runs").exists()


def test_a_micro_batch_that_does_not_divide_into_blocks_is_refused_before_a_job(place, capsys):
    """64 images on two processes: 32 each, which hold no block of 48."""
    options = "--method.coupling", "minibatch-optimal-transport", "--method.coupling_options", '{"block": 48}'
    err = refused(capsys, "train", "--config", "run.yaml", *options, "--launch.processes", "2")
    assert "minibatch-optimal-transport pairs blocks of 48" in err
    assert not [*place.rglob("job.json")]


def test_a_command_on_the_config_yaml_of_a_moved_run_means_the_moved_run(place, capsys):
    run = RunDirectory(RunConfig.model_validate({"run": {"root": "runs", "name": "r"}}))
    run.begin()
    run.bind()
    (place / "elsewhere").mkdir()
    moved = (place / "runs" / "r").rename(place / "elsewhere" / "r")
    (place / "runs").rmdir()
    code, out, err = fm(capsys, "status", "--config", "elsewhere/r/config.yaml")
    assert (code, err) == (0, "")
    assert out.startswith(f"{moved}: ")
    assert {path.name for path in place.iterdir()} == {"run.yaml", "elsewhere"}
