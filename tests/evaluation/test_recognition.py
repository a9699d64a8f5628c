"""What a classifier of the data set says about samples, against counts by hand."""

import pytest
import torch

from fm_core.evaluation.recognition import class_accuracy_record, recognition_record


def test_recognition_counts_confident_images_and_classes():
    probabilities = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.05, 0.95], [0.9, 0.1]])
    record = recognition_record(probabilities, probabilities[:1])
    assert (record["value"], record["images"]) == (0.5, 4)
    assert (record["held_out"], record["held_out_images"]) == (1.0, 1)
    assert record["class_shares"] == [0.75, 0.25]


def test_class_accuracy_compares_with_the_class_that_was_sampled():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    record = class_accuracy_record(probabilities, torch.tensor([0, 1, 1, 1]), 0.95)
    assert (record["value"], record["images"], record["held_out"]) == (0.75, 4, 0.95)
    assert record["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
