"""Classifier of the scores with a fraction of its training steps: enough for digits, and seconds less.

Its processes must agree on it where their scores are compared: the tests' own and those of rank_server.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fm_core.evaluation.features import classifier_features

STEPS = 120


@contextmanager
def short_classifier() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_features, "training_steps", lambda images: STEPS)
        yield
