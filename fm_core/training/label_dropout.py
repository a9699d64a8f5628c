"""Label dropout: a share of the images is trained without labels, which classifier-free guidance needs."""

from collections.abc import Sequence

from torch import Tensor

from fm_core.storage import keyed_random


def drop_labels(labels: Tensor, positions: Sequence[int], seed: int, share: float, null_label: int) -> Tensor:
    """Replace a share of the labels by the null label, chosen by (seed, stream position) alone.

    Args:
        labels: int64 [N].
        positions: stream position of each label.
        seed: seed of the run.
        share: probability of dropping a label, in [0, 1); at 0 the labels are returned as they are.
        null_label: the label that stands for "no label".
    """
    if not share:
        return labels
    dropped = keyed_random.uniform(seed, "label", positions, ()) < share
    return labels.masked_fill(dropped, null_label)
