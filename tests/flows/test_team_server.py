"""A team's Prefect server with PostgreSQL and a password, both enabled by settings."""

import os
import pwd
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.demo_project import WORKER, free_port
from tests.support.served_project import ServedProject, served_project

PASSWORD = "operator:a-secret"
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
INITDB = shutil.which("initdb") or (str(INSTALLED[-1]) if INSTALLED else None)


@dataclass
class Postgres:
    """A cluster of our own, which listens on the loopback interface alone."""

    programs: Path
    folder: Path
    port: int

    def run(self, program: str, *arguments: str) -> str:
        """Run a program as whoever may run PostgreSQL: not root."""
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*as_user, str(self.programs / program), *arguments]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, question: str) -> str:
        return self.run(
            "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "-Atc", question, "postgres"
        )


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if not INITDB:
        pytest.skip("no PostgreSQL on this machine (apt-get install postgresql)")
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        database = Postgres(Path(INITDB).resolve().parent, Path(folder), free_port())
        database.run("initdb", "-D", f"{folder}/data", "-U", "prefect", "-A", "trust", "--no-sync")
        options = f"-p {database.port} -h 127.0.0.1 -k {folder} -c fsync=off"
        database.run("pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-o", options, "-w", "start")
        yield database
        database.run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "-w", "stop")


@dataclass
class Team:
    """The project with its server, as those see it who know the password and those who do not."""

    project: ServedProject

    def prefect(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.project.prefect(*arguments, **variables)

    def status(self, path: str, password: str | None = None) -> int:
        """HTTP status of a request."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.project.port}/api{path}")
        if password:
            request.add_header("Authorization", f"Basic {b64encode(password.encode()).decode()}")
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            return opener.open(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def team(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    database = f"postgresql+asyncpg://prefect@127.0.0.1:{postgres.port}/postgres"
    folder, password = tmp_path_factory.mktemp("team"), {"PREFECT_API_AUTH_STRING": PASSWORD}
    with served_project(folder, password, PREFECT_SERVER_DATABASE_CONNECTION_URL=database) as project:
        yield Team(project)


def test_a_request_without_the_password_is_refused(team: Team):
    assert team.status("/flow_runs/00000000-0000-0000-0000-000000000000") == 401
    assert team.status("/admin/version") == 401
    assert team.status("/admin/version", "operator:a-guess") == 401
    assert team.status("/admin/version", PASSWORD) == 200
    refused = team.prefect("work-pool", "ls", PREFECT_API_AUTH_STRING="operator:a-guess")
    assert refused.returncode != 0


def test_the_server_listens_on_the_loopback_interface_by_default(team: Team):
    port = team.project.port
    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port]
    assert set(listening) == {"127.0.0.1"}


def test_a_run_goes_through_worker_password_and_postgresql(team: Team, postgres: Postgres):
    """shard-dataset: a task for each shard, in processes of their own."""
    assert team.prefect("work-pool", "create", "local", "--type", "process").returncode == 0
    arguments = ("--prefect-file", "infra/prefect.yaml", "--name", "flows.stages.shard_dataset/default")
    deployed = team.prefect("--no-prompt", "deploy", *arguments)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    created = team.prefect("deployment", "run", "shard-dataset")
    assert created.returncode == 0, created.stdout + created.stderr
    worked = team.prefect(*WORKER.split()[1:], "--run-once")
    runs = postgres.ask("select name, state_type from flow_run").splitlines()
    assert runs == ["digits-s0|COMPLETED"], worked.stdout + worked.stderr
    bars = postgres.ask("select name, state_type from task_run order by start_time").splitlines()
    assert bars[-1] == "shard|COMPLETED"
    assert set(bars[:-1]) == {"train-000000|COMPLETED", "val-000000|COMPLETED"}
    assert (team.project.root / "datasets" / "digits" / "manifest.json").exists()
