import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fm_core.evaluation.features.classifier import (
    Classifier,
    accuracy,
    ood_negatives,
    predict,
    random_shift,
    train_classifier,
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data.images)))
    images = torch.from_numpy(data.images).to(torch.uint8)[:, None][order]
    labels = torch.from_numpy(data.target).to(torch.int64)[order]
    return images[500:], labels[500:], images[:500], labels[:500]


@pytest.fixture(scope="module")
def trained_classifier(digits) -> Classifier:
    images, labels, _, _ = digits
    return train_classifier(images, labels, levels=17, classes=10, seed=0)


def test_it_classifies_validation_digits_and_is_confident_about_digits_only(digits, trained_classifier):
    _, _, validation, validation_labels = digits
    classifier = trained_classifier
    assert not classifier.training
    assert accuracy(classifier, validation, validation_labels, levels=17) >= 0.98

    def confident(pixels):
        _, probabilities = predict(classifier, pixels.to(torch.uint8), levels=17)
        return (probabilities.amax(dim=1) > 0.9).double().mean().item()

    generator = torch.Generator().manual_seed(0)
    assert confident(validation) > 0.93
    assert confident(torch.randint(0, 17, validation.shape, generator=generator)) < 0.05
    assert (
        confident(validation.flatten(2)[:, :, torch.randperm(64, generator=generator)].view_as(validation))
        < 0.05
    )
    # A blend of two digits is not noise, but the classifier is less confident in it than in a single digit.
    assert confident((validation.int() + validation.roll(1, 0).int()) // 2) < 0.6


def test_the_result_depends_only_on_the_seed(digits):
    images, labels, validation, _ = digits
    trained = []
    for seed, ambient in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        classifier = train_classifier(images, labels, levels=17, classes=10, seed=seed, steps=5)
        assert torch.equal(torch.get_rng_state(), before)
        trained.append(predict(classifier, validation, levels=17)[0])
    assert torch.equal(trained[0], trained[1])
    assert not torch.allclose(trained[0], trained[2])


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 64), (1, 28), (3, 9)])
def test_features_and_logits_of_any_square_image(channels, size):
    classifier = Classifier(channels, size, classes=7, features=24)
    features, logits = classifier(torch.randn(3, channels, size, size))
    assert features.shape == (3, 24)
    assert logits.shape == (3, 7)
    assert features.min() >= 0


def test_predictions_do_not_depend_on_the_batch_size(digits):
    images, labels, validation, _ = digits
    classifier = train_classifier(images, labels, levels=17, classes=10, seed=0, steps=5)
    features, probabilities = predict(classifier, validation, levels=17, batch_size=7)
    unbatched, _ = predict(classifier, validation, levels=17)
    assert torch.allclose(features, unbatched, atol=1e-5)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(500), atol=1e-5)


def test_accuracy_is_the_fraction_classified_correctly():
    class Always(Classifier):
        def forward(self, images):
            bright = images.mean(dim=(1, 2, 3)) > 0
            return images.flatten(1), torch.stack([~bright, bright], dim=1).float()

    images = torch.tensor([0, 0, 15, 15], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 8, 8)
    assert accuracy(Always(1, 8, 2), images, torch.tensor([0, 1, 1, 1]), levels=16) == 0.75


def test_each_image_has_its_own_shift_within_bounds():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 2, 8, 8)
    moved = random_shift(image, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[:1].float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)[0]
    expected = {
        (row, column): padded[:, row : row + 8, column : column + 8]
        for row in range(3)
        for column in range(3)
    }
    seen = set()
    for image_moved in moved:
        matches = [place for place, view in expected.items() if torch.equal(image_moved, view)]
        assert len(matches) == 1
        seen.update(matches)
    assert seen == set(expected)
    assert torch.equal(random_shift(image, 0, torch.Generator()), image)


def test_ood_negatives_are_blends_with_the_shuffled_pixels_of_other_images():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(400, 2, 4, 4), torch.arange(1.0, 17).view(4, 4).expand(400, 2, 4, 4)])
    targets = torch.eye(5)[torch.tensor([0] * 400 + [1] * 400)]
    blend, soft_targets = ood_negatives(x, targets, generator)
    assert blend.shape == (400, 2, 4, 4)
    assert torch.allclose(soft_targets.sum(dim=1), torch.ones(400), atol=1e-6)
    share = 1 - blend.flatten(1).mean(dim=1) / 8.5
    assert share.min() >= -1e-6
    assert 0.45 < share.max() <= 0.5
    pixels = blend / (1 - share)[:, None, None, None]
    assert torch.allclose(pixels[:, 0], pixels[:, 1])
    assert torch.allclose(pixels[:, 0].flatten(1).sort(dim=1).values, torch.arange(1.0, 17), atol=1e-3)
    shuffled = (pixels[:, 0] - x[-1, 0]).abs().amax(dim=(1, 2)) > 0.5
    assert shuffled.sum() > 390
    rest = 1 - share
    assert torch.allclose(soft_targets[:, 1], rest / 5, atol=1e-5)
    assert torch.allclose(soft_targets[:, 0], share + rest / 5, atol=1e-5)


def test_progress_is_reported_about_fifty_times_and_at_the_last_step(digits):
    images, labels, _, _ = digits
    seen = []

    def note(step, steps, loss):
        assert loss > 0
        seen.append((step, steps))

    train_classifier(images, labels, 17, 10, seed=0, steps=103, batch_size=2, on_progress=note)
    assert seen == [(step, 103) for step in range(2, 103, 2)] + [(103, 103)]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), "images must be uint8"),
        (
            torch.zeros(4, 1, 8, 9, dtype=torch.uint8),
            torch.zeros(4, dtype=torch.int64),
            "images must be uint8",
        ),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "as many labels"),
        (
            torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
            torch.full((4,), 3),
            "with 3 classes they must lie in 0 .. 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels, levels=17, classes=3, seed=0)
