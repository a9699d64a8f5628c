"""Classifier of the scores with a fraction of its training steps: enough for digits, and seconds less.

Its processes must agree on it where their scores are compared: the tests' own and those of rank_server.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from fm_core.evaluation.features import classifier_features
from fm_core.evaluation.features.classifier import train_classifier

STEPS = 120


@contextmanager
def short_classifier() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_features, "train_classifier", partial(train_classifier, steps=STEPS))
        yield
