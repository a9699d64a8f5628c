"""The notebook in infra/examples: its cells run, and what they print is the checkerboard."""

import json
import re
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

from tests.support import ROOT

NOTEBOOK = ROOT / "infra" / "examples" / "flow_matching_2d.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def run(steps: int | None = None) -> dict[str, Any]:
    """The names that the cells leave; with `steps`, of a shorter training."""
    names: dict[str, Any] = {}
    backend = mpl.get_backend()
    plt.switch_backend("Agg")
    try:
        with torch.random.fork_rng():
            for source in CODE:
                if steps:
                    source = re.sub(r"STEPS, BATCH = \S+,", f"STEPS, BATCH = {steps},", source)
                exec(compile(source, NOTEBOOK.name, "exec"), names)
    finally:
        plt.close("all")
        plt.switch_backend(backend)
    return names


@pytest.fixture(scope="module")
def trained_notebook() -> dict[str, Any]:
    """Half a minute of training."""
    return run(steps=1_200)


def test_it_is_a_notebook_without_outputs():
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["metadata"]["language_info"]["name"]) == (4, "python")
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert [cell["id"] for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []


def test_it_uses_the_library_alone():
    imported = re.findall(r"^(?:from|import) (\S+)", "\n".join(CODE), re.MULTILINE)
    assert {name.split(".")[0] for name in imported} == {"fm_core", "matplotlib", "torch"}
    assert [name for name in imported if re.match(r"fm_core\.(stages|launch|training|run)", name)] == []


def test_its_cells_run_with_a_few_steps(capsys):
    names = run(steps=5)
    assert len(names["losses"]) == 5
    assert names["solution"].trajectory.shape == (5, 5_000, 2)
    assert "entropy 3.466" in capsys.readouterr().out


def test_it_learns_the_checkerboard(trained_notebook: dict[str, Any]):
    assert trained_notebook["share"] > 0.6
    assert 3.4 < float(trained_notebook["nats"].mean()) < 4.2
