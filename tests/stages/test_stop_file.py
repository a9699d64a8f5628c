"""The STOP file during an evaluation that runs in the calling process."""

from types import SimpleNamespace

import pytest

from fm_core.config import RunConfig
from fm_core.errors import StopRequested
from fm_core.run.directory import RunDirectory
from fm_core.run.progress import ProgressPhases
from fm_core.stages.evaluate import _run_parts


def test_an_evaluation_in_this_process_ends_after_the_part_that_it_is_at(tmp_path):
    tree = {"run": {"root": str(tmp_path)}, "evaluate": {"processes": 1}}
    config = RunConfig.model_validate(tree)
    run, made = RunDirectory(config), []
    run.path.mkdir()

    def make(number):
        made.append(number)
        if number == 1:
            run.stop.touch()

    ranges = [range(0, 4), range(4, 8), range(8, 12)]
    task = SimpleNamespace(
        phase="features",
        ranges=ranges,
        images=12,
        missing=lambda: [number for number in range(3) if number not in made],
        run=make,
    )
    evaluation = SimpleNamespace(tasks={"features": task}, folder="step", key="ema")
    phases = ProgressPhases("evaluate", lambda progress: None, {"features": 1.0})
    with pytest.raises(StopRequested, match="finished parts are kept"):
        _run_parts(config, run, evaluation, phases, lambda progress: None)
    assert made == [0, 1]
