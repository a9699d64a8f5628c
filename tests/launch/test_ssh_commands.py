"""The ssh launcher with pdsh and a fake ssh: login shells, logins, size of the environment."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fm_core.config import RunConfig, dump_yaml
from fm_core.launch import ssh
from fm_core.launch.dispatch import submit
from fm_core.launch.hostfile import read_hostfile, read_logins
from fm_core.launch.job import end_processes, tunnel_mark
from fm_core.run.stop_file import pending_request

pytestmark = pytest.mark.skipif(
    not shutil.which("pdsh"), reason="no pdsh on this machine (apt-get install pdsh)"
)

SSH = f"""#!{sys.executable}
import os, shlex, sys
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    arguments = arguments[2:]
destination, command = arguments
with open(os.environ["RECORD"], "a") as record:
    print(destination, file=record)
# A login shell that knows words and quotes, and nothing else of sh.
words = shlex.split(command)
shell = shlex.shlex(command, posix=True, punctuation_chars=True)
shell.whitespace_split = True
assert not set("(){{}}<>|&;") & {{word for word in shell if len(word) == 1}}, command
os.execvp(words[0], words)
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch) -> Path:
    """The file that lists the destinations of ssh."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ssh"
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def test_a_login_shell_gets_words_and_quotes_only(record: Path):
    assert ssh.unreached(["node-a", "node-b"]) == {}
    assert sorted(record.read_text().split()) == ["node-a", "node-b"]
    assert set(ssh.unreached(["node-a"], (), "echo 'not this'; false")) == {"node-a"}
    assert "not this" in ssh.unreached(["node-a"], (), "echo 'not this'; false")["node-a"]


def test_the_user_of_a_hostfile_logs_in(record: Path, tmp_path: Path):
    hosts = tmp_path / "hosts"
    hosts.write_text("alice@node-a slots=1\nnode-b slots=1\n")
    assert read_hostfile(str(hosts), None) == {"node-a": 1, "node-b": 1}
    assert ssh.unreached(["node-a", "node-b"], tuple(read_logins(str(hosts)).values())) == {}
    assert sorted(record.read_text().split()) == ["alice@node-a", "node-b"]


def test_ranks_that_stopped_on_one_host_leave_no_request_for_the_next_start(record: Path, tmp_path: Path):
    """The connection may end after the supervisor has removed STOP."""
    (tmp_path / "job.json").write_text('{"id": "a1"}')
    command = shlex.join([sys.executable, "-c", "raise SystemExit(3)"])
    done = subprocess.run(
        ["sh", str(ssh._TUNNEL), "node-a", str(tmp_path), "a1", command],
        stdin=subprocess.DEVNULL,
        env={**os.environ, ssh.NODE_SPEC_VARIABLE: str(os.open(os.devnull, os.O_RDONLY))},
        timeout=60,
    )
    assert done.returncode == 3
    assert (tmp_path / "a1.stopped").exists()
    assert pending_request(tmp_path) is None


def test_an_environment_larger_than_a_variable_reaches_every_host(record: Path, tmp_path: Path, monkeypatch):
    """Its hosts copy what comes over the connection to a file."""
    for name in ("TABLE_A", "TABLE_B"):
        monkeypatch.setenv(name, "a" * 100_000)
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nbob@node-b slots=1\n")
    launch = {"kind": "ssh", "hostfile": str(hosts)}
    config = RunConfig.model_validate({"run": {"root": str(tmp_path)}, "launch": launch})
    (tmp_path / "preflight.yaml").write_text(dump_yaml(config))
    (tmp_path / "logs").mkdir()
    command = "import sys; open(sys.argv[1], 'w').write(sys.stdin.readline())"
    monkeypatch.setattr(
        ssh,
        "node_command",
        lambda job, *arguments: f'{sys.executable} -c "{command}" {tmp_path}/{arguments[0]}.json',
    )
    job = submit(
        tmp_path, tmp_path / "logs", "preflight", "module", tmp_path / "preflight.yaml", config.launch
    )
    received = [tmp_path / f"{host}.json" for host in job.hosts]
    try:
        deadline = time.monotonic() + 60
        while not all(path.exists() and path.stat().st_size > 200_000 for path in received):
            assert time.monotonic() < deadline, (tmp_path / "logs" / "preflight.log").read_text()
            time.sleep(0.05)
    finally:
        (tmp_path / "STOP").touch()
        end_processes(tunnel_mark(job.id), 5.0)
    for path in received:
        spec = json.loads(path.read_text())
        assert spec["environment"]["TABLE_B"] == "a" * 100_000
        assert spec["job"]["logins"] == ["bob@node-b"]
    assert "bob@node-b" in record.read_text().split()
