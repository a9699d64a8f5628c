"""The Slurm launcher with fake sbatch, squeue and scancel on PATH."""

import logging
import os
from pathlib import Path

import pytest

from fm_core.config import RunConfig, dump_yaml, load_config
from fm_core.errors import UserError
from fm_core.launch import slurm
from fm_core.launch.dispatch import submit
from fm_core.launch.job import Job

FACTS = {
    "id": "00a1",
    "stage": "train",
    "host": "h1",
    "processes": 1,
    "threads": 1,
    "log": "x",
    "kind": "slurm",
}
JOB = Job.model_validate({**FACTS, "slurm": 4711})


class Programs:
    """Fake programs, each a shell script that may also record its arguments."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setattr(slurm, "EMPTY_SECONDS", 0.0)

    def write(self, name: str, script: str, mode: int = 0o755) -> None:
        program = self.folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(mode)

    def submit(self, options: str = "{}") -> Job:
        """Submit a job whose options are given as YAML."""
        text = f"launch: {{kind: slurm, processes: 1, threads: 1, slurm: {{options: {options}}}}}\n"
        asked = self.folder / "asked.yaml"
        asked.write_text(f"run: {{root: {self.folder}}}\n{text}")
        config = load_config(asked)
        (self.folder / "train.yaml").write_text(dump_yaml(config))
        assert load_config(self.folder / "train.yaml").launch == config.launch, "it is the same when written"
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        return submit(self.folder, logs, "train", "module", self.folder / "train.yaml", config.launch)

    def arguments(self) -> list[str]:
        return (self.folder / "arguments").read_text().splitlines()


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Programs:
    programs = Programs(tmp_path, monkeypatch)
    programs.write("sbatch", f'printf "%s\\n" "$@" >{tmp_path}/arguments; echo 7')
    return programs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("{exclusive: true}", ["--exclusive"]),
        ('{exclusive: ""}', ["--exclusive"]),
        ("{overcommit: True, exclusive: false, hold: null, contiguous: }", ["--overcommit"]),
        ("{account: 0123, partition: on, qos: yes}", ["--account=0123", "--partition=on", "--qos=yes"]),
        ("{begin: 16:00:00, time: 24:00:00, time-min: 12:00:00}", ["--begin=16:00:00", "--time=24:00:00"]),
        ("{gpus-per-node: 8, mem: 1_000, licenses: 0x1F}", ["--gpus-per-node=8", "--mem=1_000"]),
        ('{time: "24:00:00", constraint: "a&b"}', ["--time=24:00:00", "--constraint=a&b"]),
        ("{begin: 2026-12-01}", ["--begin=2026-12-01"]),
        ("{nice: 0, priority: 1.5}", ["--nice=0", "--priority=1.5"]),
    ],
)
def test_options_reach_sbatch_as_they_are_written(programs: Programs, options: str, expected: list[str]):
    programs.submit(options)
    arguments = programs.arguments()
    assert set(expected) <= set(arguments)
    assert not any(argument.startswith(("--hold", "--contiguous", "--exclusive=")) for argument in arguments)


def test_a_time_that_another_reader_took_for_a_number_is_refused():
    options = {"time-min": 43_200}
    with pytest.raises(ValueError, match=r'options.time-min: write it in quotes, e.g. "24:00:00"'):
        RunConfig.model_validate({"launch": {"kind": "slurm", "processes": 1, "slurm": {"options": options}}})


@pytest.mark.parametrize(
    "output",
    [
        "4711",
        "4711;cluster",
        "Project X: 10% used\n4711\n",
        "Submitted batch job 4711",
        "4711\nSee https://x/y 1\n",
    ],
)
def test_the_number_is_found_among_the_lines_of_a_site(programs: Programs, output: str):
    programs.write("sbatch", f"printf '%s\\n' '{output}'")
    assert programs.submit().slurm == 4711


def test_an_output_without_a_number_is_quoted_with_the_name_of_the_job(programs: Programs):
    programs.write("sbatch", "echo 'Your project is out of hours, 12 left'")
    with pytest.raises(
        UserError,
        match=r"'Your project is out of hours, 12 left' instead of a job id; .* scancel --name=train-",
    ) as caught:
        programs.submit()
    assert "\n" not in str(caught.value)
    assert not (programs.folder / "job.json").exists()


def test_an_environment_that_is_too_large_is_refused_with_its_size(programs: Programs, monkeypatch):
    def too_large(*_: object, **__: object) -> None:
        raise OSError(7, "Argument list too long")

    monkeypatch.setenv("TABLE", "a" * 70_000)
    monkeypatch.setattr(slurm, "_run", too_large)
    with pytest.raises(UserError, match=r"the environment has .* kB, more than .*: TABLE 70 kB"):
        programs.submit()


@pytest.mark.parametrize(
    ("script", "mode"),
    [
        ("exit 0", 0o644),  # being replaced by a package manager
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", 0o755),
        ("echo 'Socket timed out'; exit 1", 0o755),
    ],
)
def test_a_scheduler_that_does_not_answer_has_not_ended_the_job(programs: Programs, script: str, mode: int):
    programs.write("squeue", script, mode)
    status = slurm.poll(JOB)
    assert status.alive
    assert status.reason.startswith("Slurm does not report the state of job 4711 (")


@pytest.mark.parametrize(
    ("script", "alive"),
    [
        ("echo 'RUNNING|None'", True),
        ("echo 'Site news: maintenance on Monday'; echo 'PENDING|Priority'", True),
        ("echo 'COMPLETED|None'", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("true", False),
    ],
)
def test_the_state_of_a_job_is_what_squeue_says(programs: Programs, script: str, alive: bool):
    programs.write("squeue", script)
    assert slurm.poll(JOB).alive is alive


def test_one_empty_answer_is_not_the_end_of_a_job(programs: Programs):
    count = programs.folder / "count"
    programs.write("squeue", f"echo >>{count}; [ $(wc -l <{count}) -eq 1 ] || echo 'RUNNING|None'")
    assert slurm.poll(JOB).alive
    assert count.read_text() == "\n\n"


def test_a_job_is_cancelled_even_without_scancel(programs: Programs, caplog):
    """Its ranks see the STOP file."""
    programs.write("scancel", "exit 0", 0o644)
    programs.write("squeue", f"[ -e {programs.folder}/STOP ] && echo 'CANCELLED|None' || echo 'RUNNING|None'")
    with caplog.at_level(logging.WARNING, "fm_core"):
        slurm.cancel(JOB, programs.folder)
    assert (programs.folder / "STOP").exists()
    assert "the ranks stop because of the STOP file" in caplog.text
