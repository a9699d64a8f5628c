"""`fm_core.load` of published weights: velocities, their conversion to a file, and what cannot be sampled."""

import argparse

import pytest
import torch

import fm_core
from fm_core.errors import UserError
from fm_core.sampling.checkpoint_source import checkpoint_step
from fm_core.sampling.published_models import METHODS
from fm_core.stages.sample import sample as sample_stage
from fm_core.training.pretrained import pretrained_weights
from tests.support.public_layouts import PublicTransformer, PublicUNet, randomized
from tests.support.random_checkpoint import config_at

CLASSES = 5
UNET = {
    "channels": 128,
    "channel_multipliers": [1, 1],
    "residual_blocks": 1,
    "attention_resolutions": [2],
    "head_channels": 32,
}


def public(channels=4):
    return randomized(PublicTransformer(8, channels, 2, 32, 2, 2, CLASSES, True))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    stored = {"ema": public().state_dict(), "model": {}, "args": argparse.Namespace()}
    torch.save(stored, folder / "latent.pt")
    torch.save(public(3).state_dict(), folder / "pixels.pt")
    return folder


def load(file, source, **changes):
    heads = {} if source == "adm" else {"heads": 2}
    return fm_core.load(file, device="cpu", published=fm_core.PublishedModel(source, **{**heads, **changes}))


def batch(channels=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, channels, 8, 8, generator=generator, dtype=dtype)
    return x, torch.tensor([0, 4, CLASSES])


def test_the_velocity_of_sit_is_what_its_network_predicts_from_noise_at_0_to_data_at_1(files):
    model = load(files / "latent.pt", "sit")
    path = model.objective.path
    x0, x1 = torch.randn(2, 3), torch.randn(2, 3)
    # SiT's code: x_t = t x1 + (1 - t) x0 with noise x0, and the network predicts x1 - x0.
    t = torch.tensor([0.0, 0.75])
    point = path.sample(x0, x1, t)
    torch.testing.assert_close(point.x_t, t[:, None] * x1 + (1 - t[:, None]) * x0)
    torch.testing.assert_close(point.velocity, x1 - x0)
    x, label = batch()
    for time in (0.0, 0.3, 1.0):
        velocity = model.objective.velocity(model.network, label)(torch.tensor(time), x)
        with torch.no_grad():
            expected = public()(x, torch.full((3,), time), label)[:, :4]
        torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)
    assert (model.model.image_shape, model.model.classes, model.model.conditional) == (
        (4, 8, 8),
        CLASSES,
        True,
    )


def test_the_velocity_of_dit_is_that_of_ddims_limit(files):
    """dx/dt from the noise e that the network predicts at step i: x/alpha changes by e d(sigma/alpha)."""
    model = load(files / "latent.pt", "dit")
    path, (x, label) = model.objective.path, batch()
    for step in (0, 500, 999):
        t = torch.tensor([1 - (step + 1) / 1000], dtype=torch.float64)
        alpha, sigma = path.alpha(t), path.sigma(t)
        d_alpha, d_sigma = path.d_alpha(t), path.d_sigma(t)
        with torch.no_grad():
            noise = public()(x, torch.full((3,), float(step)), label)[:, :4]
        slope = (d_sigma * alpha - sigma * d_alpha) / alpha**2
        expected = d_alpha / alpha * x + alpha * slope * noise
        velocity = model.objective.velocity(model.network, label)(t[0], x)
        torch.testing.assert_close(velocity, expected.float(), rtol=1e-3, atol=2e-3)


def test_a_latent_model_is_refused_where_images_are_asked_for(files, tmp_path):
    model = load(files / "latent.pt", "sit")
    message = r"^the model is of latents \(4 x 8 x 8\), and there is no decoder [^\n]*velocity[^\n]*$"
    with pytest.raises(UserError, match=message):
        model.sample(2, solver="euler", steps=2)
    model.save(tmp_path / "sit.safetensors")
    config = config_at(tmp_path, weights=str(tmp_path / "sit.safetensors"))
    with pytest.raises(UserError, match=message):
        sample_stage(config)


def test_a_model_of_pixels_is_sampled_saved_and_trained_further(files, tmp_path):
    model = load(files / "pixels.pt", "sit")
    images = model.sample(2, solver="euler", steps=2, guidance=1.5)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 8, 8))
    model.save(tmp_path / "sit.safetensors")
    again = fm_core.load(tmp_path / "sit.safetensors", device="cpu")
    assert torch.equal(again.sample(2, solver="euler", steps=2, guidance=1.5), images)
    weights = pretrained_weights(str(tmp_path / "sit.safetensors"), again.network)
    assert all(torch.equal(weights[name], weight) for name, weight in again.network.state_dict().items())


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(files, tmp_path, monkeypatch):
    model = load(files / "pixels.pt", "sit")
    with pytest.raises(OSError, match=r"none.*cannot be written"):
        model.save(tmp_path / "none" / "sit.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save("~/sit.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["sit.safetensors"]


def test_a_published_unet_needs_its_sizes_and_has_no_null_label(tmp_path):
    sizes = {"multipliers": (1, 1), "blocks": 1, "head_channels": 32, "classes": CLASSES}
    flags = {"scale_shift": True, "resblock_updown": True, "new_order": True, "variances": True}
    network = randomized(PublicUNet(3, 128, attention_levels=(1,), **sizes, **flags))
    torch.save(network.state_dict(), tmp_path / "adm.pt")
    with pytest.raises(
        UserError, match=r"adm\.pt: the shapes of a U-Net do not determine it: give published"
    ):
        load(tmp_path / "adm.pt", "adm")
    model = load(tmp_path / "adm.pt", "adm", model=UNET, image_size=4, attention="new")
    x, label, t = torch.randn(2, 3, 4, 4), torch.tensor([1, 3]), torch.tensor([0.9, 0.2])
    with torch.no_grad():
        expected = network(x, 999 - 1000 * t, label)[:, :3]
        torch.testing.assert_close(model.network(t, x, label), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="without label dropout"):
        model.sample(1, guidance=2.0)
    assert model.sample(1, solver="ddim", steps=2).shape == (1, 3, 4, 4)


def test_another_schedule_is_named_by_the_user(files):
    method = {"path": "cosine", "objective": "data-prediction"}
    assert load(files / "pixels.pt", "dit", method=method).objective.path.name == "cosine"
    assert set(METHODS) == {"sit", "dit", "adm"}


@pytest.mark.parametrize(
    ("file", "published", "message"),
    [
        ("latent.pt", None, r"it has no recipe of its network; convert published"),
        ("latent.pt", "sit", r"no published network has width 32 and 2 blocks; give its heads"),
        ("latent.pt", "pixart", r"^published 'pixart': allowed: sit, dit, adm$"),
        ("none.pt", "sit", r"none\.pt cannot be read: "),
        ("ours.pt", "sit", r"ours\.pt has no tensors with the names of DiT, SiT or ADM's U-Net$"),
        (
            "latent.pt",
            fm_core.PublishedModel("adm", model=UNET, image_size=4),
            r"latent\.pt: input_blocks\.0\.0\.weight is missing$",
        ),
        *(
            (
                "latent.pt",
                fm_core.PublishedModel(source, **{name: value}),
                rf"^published {source}: {name} is an option of a {kind} \(",
            )
            for source, name, value, kind in (
                ("sit", "model", {"width": 999, "nonsense": 1}, "U-Net"),
                ("dit", "image_size", 512, "U-Net"),
                ("sit", "attention", "new", "U-Net"),
                ("adm", "heads", 2, "transformer"),
            )
        ),
        (
            "latent.pt",
            fm_core.PublishedModel("sit", heads=5),
            r"width 32 must be a multiple of 4 and of heads",
        ),
        (
            "latent.pt",
            fm_core.PublishedModel("sit", heads=2, method={"paths": "x"}),
            r"latent\.pt: published: paths: ",
        ),
    ],
)
def test_mistakes_are_one_line(files, file, published, message):
    torch.save({"weight": torch.zeros(2)}, files / "ours.pt")
    with pytest.raises(UserError, match=message) as refusal:
        fm_core.load(files / file, device="cpu", published=published)
    assert "\n" not in str(refusal.value)


def test_fm_sample_names_the_conversion_of_a_published_file(tmp_path):
    with pytest.raises(
        UserError, match=r"^sample\.weights: SiT\.pt: it has no recipe of its network; convert"
    ):
        checkpoint_step(config_at(tmp_path, weights="SiT.pt"))
