"""Static checks of the files for containers, systemd units and the dashboard, which cannot run here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fm_core.training.loggers import GAUGES

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
UNITS = sorted((INFRA / "systemd").glob("*.service"))


def compose() -> dict:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def test_compose_services_wait_for_the_services_they_need():
    services = compose()["services"]
    assert set(services) == {"database", "server", "setup", "worker"}
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            healthy = how["condition"] == "service_healthy"
            assert healthy == (needed != "setup"), name
            assert not healthy or "healthcheck" in services[needed]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose()["volumes"] or source.startswith("${FM_DATA"), volume


def test_the_compose_file_publishes_no_port_to_the_outside_and_contains_no_secret():
    services = compose()["services"]
    assert [port for service in services.values() for port in service.get("ports", [])] == [
        "127.0.0.1:4200:4200"
    ]
    text = (INFRA / "compose.yaml").read_text()
    for secret in ("POSTGRES_PASSWORD", "PREFECT_API_AUTH_STRING"):
        assert re.findall(rf"{secret}: (.*)", text)
        assert all(value.startswith("${" + secret) for value in re.findall(rf"{secret}: (\S+)", text))
    # The containers share the volume in which the server keeps the password that it generates.
    folder, name = services["worker"]["environment"]["FM_API_AUTH_FILE"].rsplit("/", 1)
    assert name == "api-auth-4200"
    assert all(f"prefect:{folder}" in services[name]["volumes"] for name in ("server", "setup", "worker"))
    assert f"PREFECT_HOME={folder}" in (INFRA / "Dockerfile").read_text()
    assert services["server"]["command"] == ["bash", "infra/serve.sh"]


def test_the_setup_commands_of_the_compose_file_are_this_project_s():
    script = compose()["services"]["setup"]["command"][-1]
    assert "--prefect-file infra/prefect.yaml" in script
    assert "python -m flows.automations" in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    # The worker waits for the success of the setup: a command after a failed one must not run.
    assert script.startswith("set -e\n")
    failing = f"prefect() {{ false; }}; python() {{ echo went on; }}\n{script}"
    done = subprocess.run(["bash", "-c", failing], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_the_image_copies_existing_files_and_installs_the_pinned_versions():
    lines = (INFRA / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"fm_core", "flows", "infra", "pyproject.toml"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    (install,) = [line for line in lines if "pip install" in line]
    assert "--constraint infra/constraints.txt" in install
    extras = re.search(r'"\.\[(.*)\]"', install).group(1).split(",")
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras) <= set(known)
    assert any(line.startswith("USER ") and "root" not in line for line in lines)
    assert build_ignores() >= {".git", ".venv", "runs", "datasets"}


def build_ignores() -> set[str]:
    return set((INFRA / "Dockerfile.dockerignore").read_text().split())


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this machine")
    home = tmp_path / "home"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "prefect").symlink_to(Path(sys.prefix) / "bin" / "prefect")
    text = (
        unit.read_text().replace("/opt/flow-matching", str(home)).replace("User=flow-matching", "User=root")
    )
    copy = tmp_path / unit.name.replace("@", "@local")
    copy.write_text(text)
    checked = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    ours = [line for line in checked.stderr.splitlines() if copy.name in line]
    assert (checked.returncode, ours) == (0, []), checked.stderr


def test_units_start_existing_commands_and_do_not_kill_runs():
    server, worker = (unit.read_text() for unit in UNITS)
    assert "ExecStart=/bin/bash infra/serve.sh\n" in server
    assert (INFRA / "serve.sh").exists()
    assert "KillMode=process\n" in worker
    for unit in (server, worker):
        assert "Restart=always\n" in unit
        assert "EnvironmentFile=-/etc/flow-matching/environment\n" in unit
        assert not re.search(r"(PASSWORD|AUTH_STRING|API_KEY)=\S", unit)


def test_the_dashboard_queries_metrics_that_training_writes():
    dashboard = json.loads((INFRA / "grafana" / "training.json").read_text())
    written = {f"flow_matching_{key}" for key in GAUGES} | {
        "flow_matching_images_goal",
        "flow_matching_written",
    }
    queried = set(re.findall(r"flow_matching_\w+", json.dumps(dashboard)))
    assert queried <= written
    assert {"flow_matching_loss", "flow_matching_images_per_s", "flow_matching_written"} <= queried
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers) >= 6


def test_the_pool_s_template_is_prefect_s_own_without_the_command():
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    assert template["job_configuration"].pop("command")
    assert template["variables"]["properties"].pop("command")
    assert json.loads((INFRA / "work-pool.json").read_text()) == template
    texts = [
        path.read_text()
        for path in (INFRA / "docs" / "operations.md", INFRA / "compose.yaml", INFRA / "demo.sh")
    ]
    created = [line for text in texts for line in text.splitlines() if "prefect work-pool create" in line]
    assert len(created) >= 4
    assert all("--base-job-template infra/work-pool.json" in line for line in created)


def test_scripts_are_valid_bash():
    for script in INFRA.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, script
