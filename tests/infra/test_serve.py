"""infra/serve.sh generates, keeps and protects the password of Prefect's API; prefect itself is replaced."""

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from tests.support import ROOT

FAKE = """#!/bin/sh
env -0 >"$SEEN"
printf '%s\\n' "$*" >"$SEEN.command"
echo started
"""


class Serve:
    def __init__(self, folder: Path) -> None:
        self.home, self.seen = folder / "home", folder / "seen"
        programs = folder / "bin"
        programs.mkdir()
        (programs / "prefect").write_text(FAKE)
        (programs / "prefect").chmod(0o755)
        (programs / "python").symlink_to(sys.executable)
        self.variables = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "PREFECT_HOME": str(self.home),
            "SEEN": str(self.seen),
        }
        self.file = self.home / "api-auth-4200"

    def __call__(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "infra/serve.sh"],
            cwd=ROOT,
            env=self.variables | variables,
            capture_output=True,
            text=True,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What the server had in its environment."""
        lines = filter(None, self.seen.read_text().split("\0"))
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    return Serve(tmp_path)


def test_a_password_is_generated_kept_and_shown_nowhere(serve: Serve):
    done = serve()
    assert done.returncode == 0, done.stderr
    password = serve.file.read_text().strip()
    assert password.startswith("operator:")
    assert len(password) > 40
    assert serve.file.stat().st_mode & 0o777 == 0o600
    assert serve.environment["PREFECT_SERVER_API_AUTH_STRING"] == password
    assert serve.environment["PREFECT_API_AUTH_STRING"] == password
    command = Path(f"{serve.seen}.command").read_text()
    assert password not in done.stdout + done.stderr + command
    assert "--host 127.0.0.1 --port 4200" in command
    serve()
    assert serve.file.read_text().strip() == password


def test_a_host_on_the_network_has_a_password_too_and_ones_own_replaces_the_generated(serve: Serve):
    assert serve(FM_HOST="0.0.0.0", FM_PORT="4300").returncode == 0
    assert (serve.home / "api-auth-4300").exists()
    assert serve(PREFECT_API_AUTH_STRING="me:mine").returncode == 0
    assert serve.environment["PREFECT_SERVER_API_AUTH_STRING"] == "me:mine"
    refused = serve(PREFECT_API_AUTH_STRING="no-colon")
    assert (refused.returncode, refused.stderr) == (
        2,
        "serve.sh: PREFECT_API_AUTH_STRING must be user:password\n",
    )


def test_a_file_that_is_a_link_or_empty_is_refused(serve: Serve):
    serve.home.mkdir()
    serve.file.symlink_to("/etc/hostname")
    refused = serve()
    assert refused.returncode == 2
    assert "is not a file of this user" in refused.stderr
    serve.file.unlink()
    serve.file.write_text("")
    refused = serve()
    assert refused.returncode == 2
    assert "does not hold user:password" in refused.stderr
    assert not serve.seen.exists()


def test_without_a_place_for_the_password_nothing_is_served(serve: Serve):
    refused = serve(FM_HOST="0.0.0.0", PREFECT_HOME="/proc/nowhere")
    assert refused.returncode == 2
    assert "set PREFECT_HOME or PREFECT_API_AUTH_STRING" in refused.stderr


def test_without_a_home_the_error_says_what_to_set(serve: Serve):
    refused = serve(PREFECT_HOME="")
    assert (refused.returncode, refused.stderr) == (
        2,
        "serve.sh: neither PREFECT_HOME nor HOME is set; set PREFECT_HOME\n",
    )


def test_other_web_pages_may_not_use_the_api(serve: Serve):
    serve()
    assert serve.environment["PREFECT_SERVER_UI_API_URL"] == "/api"
    assert serve.environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == (
        "http://127.0.0.1:4200,http://localhost:4200"
    )


@pytest.mark.parametrize("password", ["plain", "a/b@c:d%e#f?g h&i", "pä$$w'o\"rd\\"])
def test_the_database_s_password_may_have_any_characters(serve: Serve, password: str):
    assert serve(POSTGRES_PASSWORD=password, POSTGRES_HOST="database").returncode == 0
    url = make_url(serve.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"])
    assert (url.username, url.password, url.host, url.database) == (
        "prefect",
        password,
        "database",
        "prefect",
    )
    assert "POSTGRES_PASSWORD" not in serve.environment
