"""Shards of the optimizer's state: any number of them gives back the same tensors."""

import pytest
import torch
from safetensors.torch import save_file

from fm_core.checkpoint.format import tensors_file
from fm_core.checkpoint.optimizer_shards import opened_shards, problem_of_part, shard_name, shard_tensors
from fm_core.checkpoint.tensor_layout import TensorLayout
from fm_core.checkpoint.weights_file import write_tensors
from fm_core.errors import DamagedRecordError
from tests.checkpoint.test_tensor_layout import SHAPES, TENSORS, flat_partitions, partitions_of_each

PARTS = ("optimizer/exp_avg", "optimizer/exp_avg_sq")


def written(directory, ranks, partition=flat_partitions, without=()):
    """A checkpoint with the weights and the shards of each rank; the second moment is ten times the first."""
    directory.mkdir(exist_ok=True)
    save_file(TENSORS, directory / "raw.safetensors")
    shards, fragments = partition(ranks)
    layout = TensorLayout.of(SHAPES, fragments)
    for rank in range(ranks):
        pieces = [shards[rank][p.shard][p.offset :][: p.count] for p in layout.pieces_of(rank)]
        content = [*pieces, *(10 * piece for piece in pieces)]
        if rank not in without:
            tensors = shard_tensors(PARTS, layout.fragments[rank])
            write_tensors(directory, shard_name(rank, ranks), tensors, {}, content=content)
    return directory


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("partition", [flat_partitions, partitions_of_each])
def test_shards_of_any_number_of_ranks_are_the_tensors(tmp_path, partition, ranks):
    directory = written(tmp_path, ranks, partition)
    for part, factor in zip(PARTS, (1, 10), strict=True):
        assert problem_of_part(directory, part) is None
        with opened_shards(directory, part) as opened:
            for name, tensor in TENSORS.items():
                assert torch.equal(opened.get_tensor(name), factor * tensor)
    assert problem_of_part(directory, "ema-0.9") == "no ema-0.9.safetensors"


def test_the_keys_say_which_elements_a_shard_holds():
    _, fragments = flat_partitions(2)
    assert {key: tuple(tensor.shape) for key, tensor in shard_tensors(PARTS[:1], fragments[1]).items()} == {
        "exp_avg/a[12:15]": (3,),
        "exp_avg/b[0:7]": (7,),
        "exp_avg/c[0:1]": (1,),
    }


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_shard_is_named(tmp_path, rank):
    directory = written(tmp_path, 3, without=[rank])
    with (
        pytest.raises(DamagedRecordError, match="a shard of every rank is expected, not 0000"),
        opened_shards(directory, PARTS[0]),
    ):
        pass
    assert "a shard of every rank is expected" in problem_of_part(directory, PARTS[0])


def test_no_shard_is_not_a_state_of_zeros(tmp_path):
    with (
        pytest.raises(DamagedRecordError, match="a shard of every rank is expected, not none"),
        opened_shards(written(tmp_path, 1, without=[0]), PARTS[0]),
    ):
        pass
    assert problem_of_part(tmp_path, PARTS[0]) == "no optimizer/exp_avg.safetensors"


def test_a_missing_fragment_is_named(tmp_path):
    directory = written(tmp_path, 2)
    save_file({"exp_avg/a[12:15]": torch.zeros(3)}, directory / tensors_file(shard_name(1, 2)))
    with opened_shards(directory, PARTS[0]) as opened:
        assert opened.get_tensor("a").shape == (3, 5)
        with pytest.raises(DamagedRecordError, match="has no element 0 of b"):
            opened.get_tensor("b")
    assert problem_of_part(directory, PARTS[0]).endswith("optimizer has no element 0 of b")
    assert problem_of_part(directory, PARTS[1]).endswith("optimizer has no element 12 of a")
