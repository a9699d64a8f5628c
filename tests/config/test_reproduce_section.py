from pathlib import Path

import pytest

from fm_core.config import ReproduceSection, dump_yaml, load_config, parse_config
from fm_core.errors import UserError

SHIPPED = Path(__file__).parents[2] / "infra" / "configs" / "checkerboard.yaml"
CELL = {"name": "a", "objective": "flow-matching", "path": "cosine"}


@pytest.mark.parametrize(
    ("section", "fragments"),
    [
        ({"cells": [CELL, CELL]}, ["two experiments have the same name"]),
        ({"cells": [{**CELL, "steps": 11}], "toy2d": {"steps": 10}}, ["a has 11 steps", "10"]),
        ({"cells": [{**CELL, "name": "../a"}]}, ["reproduce.cells.0.name"]),
        ({"cells": [{"name": "a", "path": "cosine"}]}, ["reproduce.cells.0.objective"]),
        ({"toy2d": {"nfe": [4, 5]}}, ["reproduce.toy2d.nfe.1", "multiple of 2"]),
        ({"toy2d": {"held_out": 1}}, ["reproduce.toy2d.held_out"]),
        ({"kind": "volumes"}, ["reproduce.kind", "toy2d"]),
        ({"toy2d": {"step": 3}}, ["reproduce.toy2d.step", "unknown key"]),
    ],
)
def test_wrong_settings_are_refused_in_one_line(section, fragments):
    with pytest.raises(UserError) as caught:
        parse_config({"reproduce": section}, where="x")
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_options_keep_their_kinds(tmp_path):
    options = {"sigma_min": 0.1, "steps": 3, "method": "rk4", "flag": True}
    config = parse_config({"reproduce": {"cells": [{**CELL, "path_options": options}]}}, where="x")
    parsed = config.reproduce.cells[0].path_options
    assert parsed == options
    assert [type(value) for value in parsed.values()] == [float, int, str, bool]
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_the_shipped_comparison_is_the_papers_with_flow_maps():
    section = load_config(SHIPPED).reproduce
    vp, ot = "variance-preserving", "optimal-transport"
    assert [(cell.objective, cell.path, bool(cell.steps)) for cell in section.cells] == [
        ("noise-prediction", vp, False),
        ("score-matching", vp, False),
        ("scoreflow", vp, False),
        ("flow-matching", vp, False),
        ("flow-matching", ot, False),
        ("data-prediction", ot, False),
        ("meanflow", ot, False),
        ("split-meanflow", ot, False),
        ("maximum-likelihood", ot, True),
    ]
    assert not any(cell.path_options or cell.objective_options for cell in section.cells)
    assert (section.toy2d.layers, section.toy2d.width, section.toy2d.nfe) == (5, 512, (4, 8, 10, 20))


def test_experiments_is_an_alias_of_cells():
    config = parse_config({"reproduce": {"experiments": [CELL]}}, where="x")
    assert config == parse_config({"reproduce": {"cells": [CELL]}}, where="x")
    assert "experiments" not in config.model_dump()["reproduce"]
    with pytest.raises(UserError, match=r"give one of the two"):
        parse_config({"reproduce": {"experiments": [CELL], "cells": [CELL]}}, where="x")


def test_seeds_have_one_key_and_their_former_place_is_still_read():
    assert ReproduceSection().seeds is None  # run.seed in 2-D, 0 on images
    former = ReproduceSection.model_validate(
        {"kind": "images", "images": {"seeds": [1, 2], "curve_images": 8}}
    )
    assert (former.seeds, former.images.curve_images) == ((1, 2), 8)
    assert ReproduceSection.model_validate(former.model_dump(mode="json")) == former
    for keys, message in (
        ({"kind": "images", "seeds": [0], "images": {"seeds": [1]}}, "keep one of them"),
        ({"kind": "images", "seeds": [1, 1]}, "appears twice"),
    ):
        with pytest.raises(ValueError, match=message):
            ReproduceSection.model_validate(keys)
