"""run.generator: a run keeps the random number generator that it started with."""

import pytest
import yaml

from fm_core.config import RunConfig, dump_yaml, load_config, parse_config
from fm_core.errors import UserError
from fm_core.reproduce.toy2d.experiment_2d import generator_in_2d
from fm_core.run.directory import RunDirectory, identity, load_run_config, recorded_config
from fm_core.stages.resolve import resolve, resolve_data
from fm_core.storage.atomic_files import write_json
from fm_core.training.loggers import _identity


def asked(root, **keys):
    return RunConfig.model_validate(
        {"run": {"root": str(root), "name": "r", **keys}, "data": {"root": str(root)}}
    )


@pytest.fixture
def bound(tmp_path):
    """Binds a run, as its first step does; with `earlier`, as a version that had no run.generator."""

    def bind(earlier=False, **keys):
        directory = RunDirectory(asked(tmp_path, **keys))
        directory.bind()
        if earlier:
            tree = yaml.safe_load((directory.path / "config.yaml").read_text())
            del tree["run"]["generator"]
            (directory.path / "config.yaml").write_text(yaml.safe_dump(tree))
        return directory.path

    return bind


def test_a_new_run_gets_the_new_generator(tmp_path, bound):
    assert resolve(asked(tmp_path)).run.generator == "philox-v1"
    recorded = yaml.safe_load((bound() / "config.yaml").read_text())
    assert recorded["run"]["generator"] == "philox-v1"


@pytest.mark.parametrize("resolved", [resolve, resolve_data])
def test_a_run_whose_record_names_none_keeps_the_earlier_one(tmp_path, bound, resolved):
    folder = bound(earlier=True)
    for config in (asked(tmp_path), load_run_config(folder / "config.yaml"), recorded_config(folder)):
        assert resolved(config).run.generator == "numpy-v1"
        RunDirectory(resolved(config)).check()
    RunDirectory(resolve(asked(tmp_path))).bind()
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["generator"] == "numpy-v1"


def test_a_configuration_that_was_written_out_in_full_keeps_it_too(tmp_path, bound):
    """As reproduce makes those of its runs: every key is named, the generator with null."""
    bound(earlier=True)
    config = parse_config(asked(tmp_path).model_dump(mode="json"), "everything")
    assert resolve(config).run.generator == "numpy-v1"
    RunDirectory(config).check()


def test_a_run_that_chose_the_earlier_one_keeps_it(tmp_path, bound):
    bound(generator="numpy-v1")
    assert resolve(asked(tmp_path)).run.generator == "numpy-v1"


@pytest.mark.parametrize(
    ("earlier", "generator", "message"),
    [
        (True, "philox-v1", "run.generator was 'numpy-v1' and is now 'philox-v1'"),
        (False, "numpy-v1", "run.generator was 'philox-v1' and is now 'numpy-v1'"),
    ],
)
def test_another_generator_is_another_run(tmp_path, bound, earlier, generator, message):
    bound(earlier=earlier)
    with pytest.raises(UserError, match="is another run") as caught:
        RunDirectory(resolve(asked(tmp_path, generator=generator))).check()
    assert message in str(caught.value)


def test_a_generator_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.generator: .*'philox-v1' or 'numpy-v1'"):
        parse_config({"run": {"generator": "mersenne"}}, "x")


def test_the_configuration_of_a_job_means_the_same_on_its_ranks(tmp_path):
    """A rank reads the file that the stage has written; one of an earlier version names no generator."""
    file = tmp_path / "train.yaml"
    file.write_text(dump_yaml(resolve(asked(tmp_path))))
    assert load_config(file, recorded=True).run.generator == "philox-v1"
    tree = yaml.safe_load(file.read_text())
    del tree["run"]["generator"]
    file.write_text(yaml.safe_dump(tree))
    assert load_config(file, recorded=True).run.generator == "numpy-v1"
    assert load_config(file).run.generator is None


def test_the_name_of_an_earlier_run_at_weights_and_biases_stays(tmp_path):
    assert "generator" not in _identity(asked(tmp_path, generator="numpy-v1"))["run"]
    assert _identity(asked(tmp_path)) == identity(asked(tmp_path))
    assert identity(asked(tmp_path))["run"]["generator"] == "philox-v1"


def test_a_comparison_in_2d_keeps_the_generator_with_which_it_began(tmp_path):
    assert generator_in_2d(asked(tmp_path)) == "philox-v1"
    record = tmp_path / "r" / "reproduce" / "fm-ot" / "training.json"
    record.parent.mkdir(parents=True)
    for recipe, expected in (({"seed": 0}, "numpy-v1"), ({"seed": 0, "generator": "philox-v1"}, "philox-v1")):
        write_json(record, {"recipe": recipe})
        assert generator_in_2d(asked(tmp_path)) == expected
    assert generator_in_2d(asked(tmp_path, generator="numpy-v1")) == "numpy-v1"
