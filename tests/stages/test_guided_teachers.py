"""Students of a guided teacher: pairs of guided samples, and flow maps that learn guidance."""

import pytest
import torch

import fm_core
from fm_core.config import load_config, merge
from tests.support.page_commands import flags
from tests.support.random_checkpoint import samples_of
from tests.support.tiny_run import DEBUG, TinyRun

SHORT = {
    "train": {"images": 48, "label_dropout": 0.2, "log_images": 16, "checkpoint_images": 48},
    "launch": {"processes": 1},
}
FLOW_MAP = {"objective": "split-meanflow", "objective_options": {"equal_times": 0.5, "guidance": 2.0}}


@pytest.fixture(scope="module")
def teacher(tiny) -> TinyRun:
    """A short class-conditional run with label dropout, on the data set of the tiny run."""
    run = TinyRun(tiny.root, "guided-teacher", SHORT)
    succeed(run, "train")
    return run


def succeed(run: TinyRun, command: str, *arguments: str) -> str:
    done = run.fm(command, *DEBUG, *arguments)
    assert done.code == 0, done.err
    return done.out + done.err


def student_of(teacher: TinyRun, name: str, changes: dict) -> TinyRun:
    """A run that starts from the teacher's weights."""
    start = {"train": {"init_from": str(teacher.path)}}
    return TinyRun(teacher.root, name, merge(merge(SHORT, start), changes))


@pytest.fixture(scope="module")
def pairs(teacher) -> str:
    """Guided samples of the teacher, as pairs."""
    place = str(teacher.root / "guided-pairs")
    changes = {"root": place, "store": "float32", "seed": 3, "guidance": 2.0}
    succeed(teacher, "sample", *flags({"sample": changes}))
    return place


def test_pairs_are_the_guided_samples_of_their_noise(teacher, pairs):
    changes = {"root": pairs, "store": "float32", "seed": 3, "guidance": 2.0}
    samples = samples_of(load_config(teacher.file, {"sample": changes}))
    stored = torch.cat(list(samples.read((1, 8, 8))))
    model = fm_core.load(str(teacher.path))
    guided, plain = (
        model.sample(20, seed=3, solver="euler", steps=4, batch=8, guidance=scale) for scale in (2.0, 1.0)
    )
    assert torch.equal(stored, guided)
    assert not torch.equal(stored, plain)


def test_a_reflow_student_of_guided_samples_needs_no_guidance(teacher, pairs):
    data = {"pairs": {"samples": pairs, "validation_images": 4}, "horizontal_flip": False}
    student = student_of(teacher, "of-guided-pairs", {"method": {"coupling": "reflow"}, "data": data})
    succeed(student, "train")
    model = fm_core.load(str(student.path)).model
    assert (model.pairs["protocol"]["guidance"], model.conditional) == (2.0, True)
    assert "NFE 1" in succeed(student, "sample", "--sample.steps", "1")


def test_a_flow_map_learns_guidance_from_its_teacher(teacher):
    student = student_of(teacher, "guided-map", {"method": FLOW_MAP})
    succeed(student, "train")
    arguments = ("--sample.solver", "flow_map", "--sample.steps", "1")
    assert "NFE 1" in succeed(student, "sample", *arguments)
    refused = student.fm("sample", *DEBUG, *arguments, "--sample.guidance", "2")
    assert refused.code == 2
    assert "guides a velocity, not a displacement" in refused.err
    again = student.fm("sample", *DEBUG, "--sample.guidance", "2")
    assert again.code == 2
    assert "would be applied twice" in again.err
