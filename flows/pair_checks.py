"""Checks of the pairs that a teacher is sampled for, before it is sampled."""

from fm_core.config import RunConfig
from fm_core.config.data import DataSection
from fm_core.config.derived_defaults import dataset_name, validation_images_for
from fm_core.errors import UserError


def check_sampling(sampled: RunConfig, student: RunConfig) -> None:
    """Refuse samples that the student could not be trained on.

    Args:
        sampled: the teacher's configuration for sampling the pairs.
        student: the student's configuration, with data.pairs.samples.

    Raises:
        UserError: training would refuse the samples; the message states the reason.
    """
    from fm_core.sampling.sample_protocol import solver_of

    solver = solver_of(sampled)
    if solver.stochastic:
        raise UserError(
            f"pairs: the solver {solver.method} adds noise, so its samples are no function of their initial "
            "noise; choose a deterministic one"
        )
    images, held_out = sampled.sample.images, student.data.pairs.validation_images
    if (validation_images_for(images) if held_out is None else held_out) >= images:
        raise UserError(
            f"data.pairs.validation_images: of {images:,} pairs none would be left to train on; sample more"
        )
    _check_data_set(sampled, student)
    # A file of weights may be of another model than the run.
    if not sampled.sample.weights.endswith(".safetensors"):
        _check_model(sampled, student)


def seed_of_pairs(teacher: RunConfig) -> int | None:
    """Seed of the pairs that a teacher was itself trained on; None if it was trained on images.

    Raises UserError if it has no complete checkpoint.
    """
    if not teacher.data.pairs.samples:
        return None
    from fm_core.checkpoint.weights_file import read_recipe
    from fm_core.sampling.checkpoint_source import checkpoint_step, weights_file

    pairs = read_recipe(weights_file(teacher, checkpoint_step(teacher))).get("pairs")
    return int(pairs["protocol"]["seed"]) if pairs else None


def _check_model(sampled: RunConfig, student: RunConfig) -> None:
    from fm_core.training.training_set import generator_of_run

    own, theirs = generator_of_run(student), generator_of_run(sampled)
    if own != theirs:
        raise UserError(
            f"run.generator {own}: the noise of the teacher's samples is of the generator {theirs}; leave "
            "run.generator out"
        )
    if student.model.class_conditional and not sampled.model.class_conditional:
        raise UserError(
            "model.class_conditional: the teacher's samples have no classes; set it to false, or name a "
            "class-conditional teacher"
        )


def _check_data_set(sampled: RunConfig, student: RunConfig) -> None:
    """Compare the data sets, if both are there. Raises UserError."""
    from fm_core.data.manifest import load_manifest

    name = _name_of(student.data)
    try:
        ours = load_manifest(student.data.root, name)
        theirs = load_manifest(sampled.data.root, sampled.data.name)
    except UserError:
        return
    if ours.version != theirs.version:
        raise UserError(
            f"data.name: the teacher was trained on {sampled.data.root}/{sampled.data.name}, not on "
            f"{student.data.root}/{name}; name that data set as data.root and data.name"
        )


def _name_of(data: DataSection) -> str:
    """Name of the data set; if absent, the one that is derived from its URL."""
    return data.name if data.given("name") or not data.source.url else dataset_name(data)
