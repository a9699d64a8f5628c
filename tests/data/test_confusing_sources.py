"""Sources that are easily misread: names, links, damaged metadata, and values of an unusual range."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fm_core.data.shard_plan import make_plan
from fm_core.data.sources.detect import detect
from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.image_decoding import PixelRules, decode
from fm_core.errors import UserError
from tests.support.container_cases import samples
from tests.support.layout_cases import classes
from tests.support.photographs import write_tree
from tests.support.source_cases import Case, parquet, picture, tar, zip_of


def plan_of(folder, files, kind="folder", url="", **source):
    return make_plan(Case("confusing", files, url=url, source={"format": kind, **source}).config(folder))


@pytest.mark.parametrize(
    ("files", "url", "counts"),
    [
        ({"pets.tar": tar(samples(1))}, "pets.tar", [1, 2]),
        (
            {f"{s}/0.tar": tar(samples(n)) for s, n in (("train", 1), ("val", 11))},
            "{train,val}/0.tar",
            [3, 3],
        ),
    ],
)
def test_the_folders_above_a_tar_name_no_split(tmp_path, files, url, counts):
    plan = plan_of(tmp_path / "dev", files, "webdataset", url)
    assert [part.rows for part in plan.source.parts()] == counts


def test_a_damaged_exif_block_leaves_the_picture_readable():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, "png", exif=b"Exif\0\0XX*\0damaged")
    rules = PixelRules(orientation=True)
    assert decode(file.getvalue(), 8, "exact", rules)[:, 0, 0].tolist() == [1, 2, 3]


def test_files_next_to_archives_are_counted(tmp_path):
    files = {"pets.zip": zip_of(classes("")), "notes.pdf": b"x", "more/a.heic": b"x"}
    plan = plan_of(tmp_path, files)
    assert plan.interpretation.not_read == {".heic": 1, ".pdf": 1}


@pytest.mark.parametrize("name", ["test.tar.gz", "val.TGZ", "more/a.7z"])
def test_an_archive_of_another_kind_beside_archives_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is not read, only .zip and .tar are"):
        plan_of(tmp_path, {"train.zip": zip_of(classes("")), name: b"x"})


def images(*values, kind="int64"):
    cells = [np.full((8, 8), value).tolist() for value in values]
    return pyarrow.array(cells, pyarrow.list_(pyarrow.list_(pyarrow.type_for_alias(kind))))


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("kind", ["int64", "int8"])
def test_integers_of_zero_and_one_need_a_range(tmp_path, kind, statistics, monkeypatch):
    if not statistics:
        write = pyarrow.parquet.write_table
        monkeypatch.setattr(
            pyarrow.parquet,
            "write_table",
            lambda *args, **options: write(*args, **options, write_statistics=False),
        )
    column = images(0, 1, 1, 0, 1, kind=kind)
    files = {"train.parquet": parquet([], [0] * 5, column=column)}
    with pytest.raises(UserError, match=f"values are {kind}, .* set data.source.value_range"):
        plan_of(tmp_path / "one", files, "parquet")
    assert plan_of(tmp_path / "two", files, "parquet", value_range=(0, 1)).images == 5


@pytest.mark.parametrize("values", [(1, 1, 1, 1, 255), (0, 0, 0, 0, 0), (1, 1, 1, 0, 2)])
def test_nearly_black_images_in_a_column_are_accepted(tmp_path, values):
    files = {"train.parquet": parquet([], [0] * 5, column=images(*values))}
    assert plan_of(tmp_path, files, "parquet").images == 5


def test_a_link_to_the_folder_of_a_split_is_followed(tmp_path):
    write_tree(tmp_path / "big/train", {"n00000001/a.JPEG": picture(1, "jpeg")})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to(tmp_path / "big/train")
    assert detect(str(tmp_path / "set")) == "imagenet-folder"


def test_a_name_with_a_line_break_stays_in_one_line():
    assert printable("a\nb\x1b[2J\u2028c é 猫.png") == "a\\nb\\x1b[2J\\u2028c é 猫.png"


def test_classes_without_training_images_are_named(tmp_path):
    names = ["cat", "dog", "fox"]
    files = {"train.parquet": parquet([1, 2, 3, 4], [0, 0, 2, 2], names)}
    assert (
        "no training images of class dog" in plan_of(tmp_path / "a", files, "parquet").interpretation.remarks
    )
    files = {"a.tar": tar(samples(1, values=("0", "2", "0", "2")))}
    plan = plan_of(tmp_path / "b", files, "webdataset")
    assert "no training images of class 1" in plan.interpretation.remarks
