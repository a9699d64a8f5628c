"""fm doctor: self-tests, configuration rules, sizes and cost; its predictions against measurements."""

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from fm_core import cli
from fm_core.config import load_config
from fm_core.errors import UserError
from fm_core.launch import ssh
from fm_core.run.results import Check
from fm_core.stages import environment_checks
from fm_core.storage.atomic_files import read_lines
from fm_core.training.cost_model import Cluster, network_bytes, training_cost

ROOT = Path(__file__).parents[2]
IMAGENET64 = str(ROOT / "infra" / "configs" / "imagenet64.yaml")
HOPPERS = Cluster(hosts=8, devices=8, peak=989e12, mfu=0.4, store_rate=2e9)


def doctor(capsys, *arguments):
    """Exit status and lines: {name: (mark, detail)}."""
    code = cli.main(("doctor", *arguments))
    out, err = capsys.readouterr()
    # Libraries that an earlier test imported may log to standard output as well.
    matches = [match for line in out.splitlines() if (match := re.match(r"(ok|NO)  (.{18}) (.*)", line))]
    assert bool(err) == (not matches), err  # either checks or what is wrong with the question
    lines = {match[2].strip(): (match[1], match[3]) for match in matches}
    assert len(lines) == len(matches)
    return code, lines, err


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Two processes may take long to meet on a busy machine."""
    monkeypatch.setattr(environment_checks, "RENDEZVOUS_SECONDS", 400)


@pytest.fixture
def machine_report(patience, tmp_path, monkeypatch, capsys):
    """Exit status and checks of `fm doctor` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    code, lines, _ = doctor(capsys)
    return code, lines


def test_without_arguments_it_tests_this_machine(machine_report, tmp_path):
    code, lines = machine_report
    assert code == 0, lines
    assert {"versions", "solver dopri5", "solver euler"} <= {*lines}
    assert [name for name in lines if name.startswith("launcher")] == [
        *("launcher local", "launcher ssh", "launcher slurm")
    ]
    assert {mark for mark, _ in lines.values()} == {"ok"}
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_and_a_wrong_version_are_named(monkeypatch):
    requirements = [
        "no-such-package>=1",
        "torch<1",
        "never; python_version < '3'",
        'extra-one; extra == "test"',
    ]
    monkeypatch.setattr(environment_checks.metadata, "requires", lambda name: requirements)
    check = environment_checks.versions()
    assert not check.ok
    assert "no-such-package is missing" in check.detail
    assert re.search(r"torch 2\.\S+ is not <1", check.detail)
    assert "never" not in check.detail
    assert "extra-one" not in check.detail


@pytest.mark.parametrize(
    ("present", "detail"),
    [
        (
            (),
            "not from here (launch.kind ssh): pdsh (of pdsh), ssh (of openssh-client) missing, none present",
        ),
        (("ssh",), "not from here (launch.kind ssh): pdsh (of pdsh) missing, ssh present"),
        (("ssh", "pdsh"), "from here (launch.kind ssh): pdsh, ssh are present"),
    ],
    ids=str,
)
def test_a_launcher_is_reported_with_its_missing_programs(present, detail, tmp_path, monkeypatch):
    for name in present:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = environment_checks.launcher("ssh", ssh.PROGRAMS)
    assert (check.name, check.ok, check.detail) == ("launcher ssh", True, detail)


@pytest.fixture
def failed_rendezvous(patience, monkeypatch):
    """The check of two processes that count themselves wrongly."""
    script = environment_checks._RENDEZVOUS_SCRIPT.replace("== 3", "== 4")
    monkeypatch.setattr(environment_checks, "_RENDEZVOUS_SCRIPT", script)
    return environment_checks.processes()


def test_processes_that_cannot_connect_fail_the_check_of_the_local_launcher(failed_rendezvous):
    check = failed_rendezvous
    assert (check.name, check.ok) == ("launcher local", False)
    assert check.detail == "two processes cannot connect: AssertionError: tensor([3])"


def test_rules_and_data_of_a_configuration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("train: {images: 640, global_batch: 64}\nlaunch: {processes: 2}\n")
    code, lines, _ = doctor(capsys, "--config", "run.yaml")
    assert code == 0
    assert {name: mark for name, (mark, _) in lines.items()} == dict.fromkeys(
        (
            "data",
            "training",
            "pairs",
            "network",
            "initial weights",
            "online evaluation",
            "feature extractors",
            "samples",
        ),
        "ok",
    )
    code, lines, _ = doctor(
        capsys,
        *("--config", "run.yaml", "--launch.processes", "3", "--sample.weights", "ema-0.5"),
        *("--model.attention_resolutions", "3"),
    )
    assert code == 2
    assert [name for name, (mark, _) in lines.items() if mark == "NO"] == ["training", "network", "samples"]
    assert "global_batch 64" in lines["training"][1]
    assert "[3]" in lines["network"][1]
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_2_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, lines, _ = doctor(capsys, "--config", IMAGENET64)
    assert code == 2
    assert lines["data"][0] == "NO"
    assert "Imagenet64_train_part1_npz.zip" in lines["data"][1]


def test_the_network_is_described(capsys):
    code, lines, _ = doctor(capsys, "--config", IMAGENET64, "--model")
    assert code == 0
    assert lines["parameters"][1] == "295,131,267"
    assert lines["FLOPs per image"][1].startswith("219.31 G forward")
    code, lines, _ = doctor(capsys, "--config", IMAGENET64, "--model", "--model.size", "DiT-B/4")
    assert lines["network"][1] == "DiT-B/4 for images of 3 x 64 x 64"


def test_a_cost_page_follows_from_the_numbers_given(capsys):
    arguments = ("--hosts", "8", "--devices", "8", "--peak", "989e12", "--mfu", "0.4", "--store-rate", "2e9")
    code, lines, _ = doctor(capsys, "--cost", "--config", IMAGENET64, *arguments)
    assert code == 0
    cost = training_cost(load_config(IMAGENET64), (3, 64, 64), 0, HOPPERS)
    assert cost.images_per_s == pytest.approx(64 * 989e12 * 0.4 / (3 * cost.forward_flops))
    assert cost.seconds == pytest.approx(321_536_000 / cost.images_per_s)
    assert cost.steps == 157_000
    assert cost.step_seconds * cost.steps == pytest.approx(cost.seconds)
    assert cost.loader_bytes_per_s == pytest.approx(cost.images_per_s * 12_288 / 8)
    assert cost.checkpoint_bytes == 4 * 4 * 295_131_267
    assert lines["images/s"][1].startswith(f"{cost.images_per_s:,.0f}, ")
    assert lines["time"][1].startswith(f"{cost.seconds / 86_400:,.2f} days")
    assert {f"network, ZeRO {stage}" for stage in (1, 2, 3)} <= lines.keys()


def test_checkpointing_costs_a_forward_pass_and_no_mfu():
    config = load_config(IMAGENET64)
    again = load_config(IMAGENET64, {"train": {"gradient_checkpointing": True}})
    plain, other = (training_cost(each, (3, 64, 64), 0, HOPPERS) for each in (config, again))
    assert other.total_flops == pytest.approx(plain.total_flops * 4 / 3)
    assert other.seconds == pytest.approx(plain.seconds * 4 / 3)


def test_one_process_sends_nothing():
    assert [network_bytes(1000, stage, 1, 1) for stage in (1, 2, 3)] == [0, 0, 0]


def test_float32_training_sends_and_holds_longer_numbers():
    plain, other = (
        training_cost(load_config(IMAGENET64, {"train": {"precision": precision}}), (3, 64, 64), 0, HOPPERS)
        for precision in ("auto", "fp32")
    )
    for stage in (1, 2, 3):
        assert other.network_bytes[stage] == 2 * plain.network_bytes[stage]
        more = {1: 2 + 2, 2: 2, 3: 2 / 64}[stage] * plain.parameters
        assert other.memory_bytes[stage] - plain.memory_bytes[stage] == pytest.approx(more)


def test_predicted_bytes_are_those_of_a_checkpoint(tiny):
    cost = training_cost(tiny.config, (1, 8, 8), 10, HOPPERS)
    directory = tiny.path / "train" / "checkpoints" / "step-00000020"
    with safe_open(directory / "raw.safetensors", framework="pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert cost.parameters == weights
    # All that is there; names and shapes weigh something in a network as small as this.
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert cost.checkpoint_bytes < size < 1.2 * cost.checkpoint_bytes


def test_predicted_speed_is_what_a_run_logged_with_its_operations(tiny):
    """The share of the peak is the one that the run had: operations and images are counted alike."""
    line = read_lines(tiny.path / "train" / "metrics.jsonl")[-1]
    ours = Cluster(1, 2, peak=1e12, mfu=line["tflops_per_device"], store_rate=1e9)
    cost = training_cost(tiny.config, (1, 8, 8), 10, ours)
    assert cost.images_per_s == pytest.approx(line["images_per_s"], rel=1e-6)


@pytest.fixture
def launch_report(tiny):
    """Output of `fm doctor --launch`, which starts the processes of the tiny run."""
    return tiny.fm("doctor", "--launch")


def test_the_hosts_of_a_configuration_meet(launch_report):
    called = launch_report
    assert called.code == 0, called.out + called.err
    assert "\nok  launch" in f"\n{called.out}"
    assert "2 processes met" in called.out
    assert "\nok  space for checkpoints" in called.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--cost",), "--config"),
        (("--model",), "--config"),
        (("--config", IMAGENET64, "--cost", "--mfu", "1.5"), "--mfu"),
        (("--config", IMAGENET64, "--cost", "--hosts", "0"), "--hosts"),
        (("--config", "missing.yaml"), "missing.yaml"),
    ],
    ids=" ".join,
)
def test_unusable_arguments_are_2_and_one_line(capsys, arguments, named):
    code, lines, err = doctor(capsys, *arguments)
    assert (code, lines) == (2, {})
    assert named in err
    assert len(err.splitlines()) == 1


def test_a_failed_check_is_2(monkeypatch, capsys):
    import fm_core.stages.doctor as module

    monkeypatch.setattr(module, "machine_checks", lambda: [Check("x", True, "fine")])
    monkeypatch.setattr(module, "self_tests", lambda: [Check("y", False, "no")])
    code, lines, _ = doctor(capsys)
    assert (code, lines) == (2, {"x": ("ok", "fine"), "y": ("NO", "no")})
    with pytest.raises(UserError, match="--config"):
        module.doctor(None, module.DoctorRequest(model=True))
