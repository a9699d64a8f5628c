"""What the ranks of a job read at their start."""

import pickle
from types import SimpleNamespace

import pytest

from fm_core.config import RunConfig
from fm_core.errors import UserError
from fm_core.training import train_worker


def manifests(monkeypatch, read, ranks):
    """What each rank gets where rank 0 reads the manifest with `read`, and the number of reads."""
    reads, sent = [], []

    def manifest(*arguments):
        reads.append(arguments)
        return read()

    def broadcast(values, src):
        if values[0] is None:
            values[:] = sent
        else:
            sent[:] = pickle.loads(pickle.dumps(values))

    monkeypatch.setattr(train_worker, "NodeCache", lambda folder: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(train_worker.dist, "broadcast_object_list", broadcast)
    results = []
    for number in range(ranks):
        try:
            rank = SimpleNamespace(first=number == 0, job="a1")
            results.append(train_worker._shared_manifest(RunConfig(), rank))
        except Exception as error:
            results.append(str(error))
    return results, len(reads)


def test_one_of_32_ranks_reads_the_manifest(monkeypatch):
    assert manifests(monkeypatch, lambda: "manifest", 32) == (["manifest"] * 32, 1)


def test_a_manifest_that_is_missing_is_the_same_error_on_all_ranks(monkeypatch):
    def read():
        raise UserError("manifest.json is missing")

    assert manifests(monkeypatch, read, 3) == (["manifest.json is missing"] * 3, 1)


class UnpicklableError(Exception):
    """An error that cannot be created from its message alone."""

    def __init__(self, one, other):
        super().__init__(f"{one}\n{other}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("division"), "division"),
        (UnpicklableError("first", "second"), "UnpicklableError: first second"),
    ],
)
def test_every_error_of_rank_0_reaches_all_ranks(monkeypatch, error, message):
    """Without it the other ranks wait for a broadcast that never comes."""

    def read():
        raise error

    results, reads = manifests(monkeypatch, read, 3)
    assert (results, reads) == ([message] * 3, 1)
