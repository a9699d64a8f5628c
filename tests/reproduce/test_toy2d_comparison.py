"""The 2-D comparison on tiny networks: results, resuming, damage, refusals and third-party components."""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

import fm_core.reproduce.toy2d.comparison_2d as comparison_module
import fm_core.reproduce.toy2d.run_2d as run_module
from fm_core.commands import stage_function
from fm_core.errors import UserError
from fm_core.method.objectives import FlowMatching
from fm_core.method.paths import OptimalTransport
from fm_core.reproduce.toy2d.page import over_seeds_section
from fm_core.storage.atomic_files import read_json
from tests.support.tiny_toy2d import CELLS, PLANE, configured, place

reproduce = stage_function("reproduce")


@dataclass(frozen=True)
class Slower(OptimalTransport):
    """A path from another package."""

    name: ClassVar[str] = "slower"
    sigma_min: float = 0.25


class FailsOnRequest(FlowMatching):
    """An objective from another package, which fails while `broken` is set."""

    broken: ClassVar[bool] = False

    def loss(self, network, sample, label=None):
        if self.broken:
            raise ArithmeticError("the loss of step 7 is nan")
        return super().loss(network, sample, label)


THIRD_PARTY = {"name": "outside", "objective": f"{__name__}:FailsOnRequest", "path": f"{__name__}:Slower"}


def stamps(root):
    return {path: path.stat().st_mtime_ns for path in place(root).rglob("*") if path.name != ".lock.guard"}


def weights_of(root, name):
    return read_json(place(root, name, "result.json"))["weights_sha256"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison, not to be modified: (root, its StageResult, observed progress)."""
    root, seen = tmp_path_factory.mktemp("finished"), []
    return root, reproduce(configured(root), seen.append), seen


@pytest.fixture(autouse=True)
def _plain_page(monkeypatch):
    """Omit the figures, which take most of the time; only `finished`, created earlier, has them."""
    monkeypatch.setattr(comparison_module, "page_2d", lambda results, *_: json.dumps(results))


def test_every_experiment_leaves_weights_and_scores(finished):
    root, result, _ = finished
    assert (result.stage, result.state) == ("reproduce", "done")
    for record in CELLS:
        names = {path.name for path in place(root, record["name"]).iterdir()}
        assert names == {"weights.safetensors", "training.json", "pictures.safetensors", "result.json"}
        assert result.hashes[record["name"]] == weights_of(root, record["name"])
    assert not place(root, "lock").exists()


def test_results_hold_protocol_bound_and_every_number(finished):
    results = read_json(place(finished[0], "results.json"))
    assert results["kind"] == "plane"
    assert results["entropy"] == {"nats": pytest.approx(3.4657359), "bits": pytest.approx(5)}
    protocol = results["protocol"]
    assert {key: protocol[key] for key in PLANE} == PLANE
    assert protocol["seed"] == 0
    assert list(results["cells"]) == ["ddpm", "fm-ot", "cnf"]
    for record in results["cells"].values():
        nll = record["nll"]
        assert nll["excess_over_entropy_nats"] == pytest.approx(nll["nats"] - results["entropy"]["nats"])
        assert set(record["on_squares"]) == {"2", "4", "dopri5"}
        assert record["nfe"]["dopri5"] > 0
        assert record["training_seconds"] > 0
        assert record["made_with"]["threads"] == 1
        assert record["made_with"]["torch"]
    assert results["failed"] == {}


def test_a_smaller_budget_is_stated_wherever_its_numbers_are(finished):
    results = read_json(place(finished[0], "results.json"))
    labels = [record["label"] for record in results["cells"].values()]
    assert labels == ["DDPM", "FM-OT", "CNF (2 of 12 steps)"]
    html = place(finished[0], "report.html").read_text()
    assert html.count("<td>CNF") == html.count("<td>CNF (2 of 12 steps)") == 2


def test_the_page_needs_no_other_file(finished):
    html = place(finished[0], "report.html").read_text()
    # Pixels of plots are embedded; the other references are to parts of the page and to files beside it.
    for uri in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert uri.startswith(("data:image/png;base64,", "#", "./"))
    assert html.count('<svg class="plot"') == 5
    assert "./results.json" in html
    assert len(html) < 3_000_000


def test_progress_only_grows_and_ends(finished):
    seen = finished[2]
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert all(p.done < p.total for p in seen[:-1])
    assert seen[-1].done == seen[-1].total
    assert any("CNF (2 of 12 steps): step 2 of 2, loss" in p.message for p in seen)


def test_called_again_it_verifies_and_changes_nothing(finished):
    root, first, _ = finished
    before = stamps(root)
    again = reproduce(configured(root))
    assert again.state == "verified"
    assert (again.counts, again.hashes, again.paths) == (first.counts, first.hashes, first.paths)
    assert stamps(root) == before


def test_an_experiment_does_not_depend_on_the_others(finished, tmp_path):
    single = reproduce(configured(tmp_path, CELLS[1:2]))
    assert single.hashes["fm-ot"] == finished[1].hashes["fm-ot"]
    before = stamps(tmp_path)
    more = reproduce(configured(tmp_path, [CELLS[0], CELLS[1]]))
    assert more.state == "done"
    assert more.hashes["ddpm"] == finished[1].hashes["ddpm"]
    existing = place(tmp_path, "fm-ot", "result.json")
    assert stamps(tmp_path)[existing] == before[existing]


def test_experiments_that_existed_do_not_count_into_the_rate(finished, tmp_path):
    reproduce(configured(tmp_path, CELLS[:1]))
    seen = []
    reproduce(configured(tmp_path, CELLS[:2]), seen.append)
    begun = next(p for p in seen if p.message == "FM-OT")
    assert begun.rate is None
    assert any(p.rate for p in seen if p.done > begun.done)


def test_another_seed_gives_other_weights(finished, tmp_path):
    config = configured(tmp_path, CELLS[1:2])
    config = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    assert reproduce(config).hashes["fm-ot"] != finished[1].hashes["fm-ot"]


def test_a_path_and_an_objective_of_another_package_need_nothing_here(tmp_path):
    cells = [{**THIRD_PARTY, "path_options": {"sigma_min": 0.5}}]
    result = reproduce(configured(tmp_path, cells))
    assert result.state == "done"
    label = read_json(place(tmp_path, "results.json"))["cells"]["outside"]["label"]
    assert label == f"{__name__}:FailsOnRequest, {__name__}:Slower"


def test_a_failed_experiment_is_reported_and_does_not_lose_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(FailsOnRequest, "broken", True)
    config = configured(tmp_path, [THIRD_PARTY, CELLS[1]])
    with pytest.raises(
        RuntimeError, match=r"1 of 2 experiments failed \(outside: ArithmeticError: the loss of"
    ):
        reproduce(config)
    results = read_json(place(tmp_path, "results.json"))
    assert list(results["cells"]) == ["fm-ot"]
    assert "ArithmeticError: the loss of step 7 is nan" in results["failed"]["outside"]
    assert "step 7 is nan" in place(tmp_path, "report.html").read_text()
    assert "Traceback" in (tmp_path / "tiny" / "logs" / "reproduce-outside.log").read_text()
    modified = stamps(tmp_path)[place(tmp_path, "fm-ot", "result.json")]

    monkeypatch.setattr(FailsOnRequest, "broken", False)
    assert reproduce(config).state == "done"
    assert stamps(tmp_path)[place(tmp_path, "fm-ot", "result.json")] == modified
    assert not place(tmp_path, "outside", "failure.json").exists()
    assert "step 7 is nan" not in place(tmp_path, "report.html").read_text()
    assert reproduce(config).state == "verified"


def test_stopped_while_it_scores_it_does_not_train_again(tmp_path, monkeypatch):
    config = configured(tmp_path, CELLS[1:2])
    stopped = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "score_model", stopped)
        with pytest.raises(KeyboardInterrupt):
            reproduce(config)
    assert not place(tmp_path, "lock").exists()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "fit", stopped)
        assert reproduce(config).state == "done"


@pytest.mark.parametrize("file", ["pictures.safetensors", "weights.safetensors"])
def test_damage_is_noticed_and_repaired(finished, tmp_path, file):
    config = configured(tmp_path, CELLS[1:2])
    first = reproduce(config)
    target = place(tmp_path, "fm-ot", file)
    content = target.read_bytes()
    target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = reproduce(config)
    assert again.state == "done"
    assert target.read_bytes() == content
    assert (again.hashes, again.counts) == (first.hashes, first.counts)


@pytest.mark.parametrize("file", ["report.html", "results.json"])
def test_a_lost_page_is_written_again_without_work(tmp_path, monkeypatch, file):
    config = configured(tmp_path, CELLS[1:2])
    reproduce(config)
    content = place(tmp_path, file).read_bytes()
    place(tmp_path, file).unlink()
    monkeypatch.setattr(run_module, "score_model", None)
    assert reproduce(config).state == "done"
    assert place(tmp_path, file).read_bytes() == content


def test_other_scoring_scores_the_same_weights_anew(tmp_path, monkeypatch):
    reproduce(configured(tmp_path, CELLS[1:2]))
    monkeypatch.setattr(run_module, "fit", None)
    result = reproduce(configured(tmp_path, CELLS[1:2], held_out=16))
    assert result.state == "done"
    assert read_json(place(tmp_path, "fm-ot", "result.json"))["nll"]["points"] == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": []}, "reproduce.cells is empty"),
        ({"cells": [{**CELLS[1], "objective": "flow"}]}, "fm-ot: unknown objective 'flow'"),
        ({"cells": [{**CELLS[1], "path": "nowhere:Path"}]}, "fm-ot: cannot import"),
        ({"cells": [{**CELLS[1], "path_options": {"sigma": 1}}]}, "fm-ot: unknown option 'sigma'"),
        ({"cells": [{**CELLS[0], "path": "optimal-transport"}]}, "ddpm: noise-prediction cannot be used"),
        ({"steps": 13}, "steps was 12 and is now 13"),
        ({"cells": [{**CELLS[1], "path": "cosine"}]}, "path was 'optimal-transport' and is now 'cosine'"),
        ({"width": 9}, "width was 8 and is now 9"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_spent(tmp_path, monkeypatch, change, message):
    reproduce(configured(tmp_path, CELLS[1:2]))
    before = stamps(tmp_path)
    monkeypatch.setattr(run_module, "fit", None)
    with pytest.raises(UserError) as caught:
        reproduce(configured(tmp_path, **{"cells": [CELLS[2], CELLS[1]], **change}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert stamps(tmp_path) == before


def test_several_seeds_have_directories_and_a_table_over_seeds(tmp_path):
    """An existing comparison with one seed is reused as the results of run.seed."""
    reproduce(configured(tmp_path, cells=CELLS[:2]))
    before = place(tmp_path, "ddpm", "training.json").stat().st_mtime_ns
    reproduce(configured(tmp_path, cells=CELLS[:2], seeds=[0, 1]))
    assert place(tmp_path, "ddpm", "training.json").stat().st_mtime_ns == before
    assert weights_of(tmp_path, "ddpm") != weights_of(tmp_path, "ddpm-s1")
    results = read_json(place(tmp_path, "results.json"))
    assert list(results["cells"]) == ["ddpm", "fm-ot", "ddpm-s1", "fm-ot-s1"]
    over_seeds = results["over_seeds"]
    assert over_seeds["ddpm"]["seeds"] == [0, 1]
    values = [results["cells"][name]["nll"]["nats"] for name in ("ddpm", "ddpm-s1")]
    assert over_seeds["ddpm"]["nll_nats"]["value"] == pytest.approx(sum(values) / 2)
    assert over_seeds["ddpm"]["verdict"]["covers"] == "training seeds"
    assert "verdict" not in over_seeds["fm-ot"]
    assert results["cells"]["ddpm-s1"]["label"] == "DDPM, seed 1"
    (section,) = over_seeds_section(results)
    assert "deviation over seeds" in section.html()
