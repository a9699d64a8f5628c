"""Sources that are arrays in pickles and parquet files, and renumbered classes."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fm_core.config.data import DataSection, SourceSection
from fm_core.data.dataset_builder import check_source, write_dataset
from fm_core.data.reader import ImageReader
from fm_core.data.sources.pickles import load_arrays, peek_rows
from fm_core.errors import UserError
from tests.support.photographs import NpzFiles, crops, encoded, labels, tar_of, write_tree


def section(tmp_path, url, kind="auto", size=32, name="set", partial=True, source=None, **data):
    keys = {"format": kind, "url": str(url), "image_size": size, "allow_partial": partial} | (source or {})
    return DataSection(root=str(tmp_path / "out"), name=name, source=SourceSection(**keys), **data)


def read_all(config, manifest, split):
    with ImageReader(config.root, manifest, split) as reader:
        images, labels = reader.read(np.arange(len(reader)))
    return images.numpy(), labels.numpy()


def same_rows(images, labels, expected, expected_labels):
    """Whether two sets of labeled images are equal but for their order."""

    def rows(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    return rows(images, labels) == rows(expected, expected_labels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("packed", ["folder", "zip"])
def test_pickled_batches_make_the_same_data_set_as_npz(tmp_path, packed, protocol):
    files = NpzFiles(size=8)
    batches = {name: files.pickle(name, protocol) for name in files.images}
    if packed == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in batches.items():
                archive.writestr(f"Imagenet8_train/{name}", content)
        batches = {"Imagenet8_train.zip": file.getvalue()}
    first = write_dataset(section(tmp_path, write_tree(tmp_path / "pickled", batches), size=8, name="a"))
    second = write_dataset(section(tmp_path, files.write_folder(tmp_path / "npz"), size=8, name="b"))
    assert first.version == second.version


@pytest.mark.parametrize("protocol", [2, 3, 4])  # in 5 the shape comes after the pixels
def test_the_rows_of_a_pickle_are_known_from_its_beginning(protocol):
    data = crops(500, 32).reshape(500, -1)  # more than is read
    content = pickle.dumps({"data": data, "labels": [1] * 500, "mean": data.mean(axis=0)}, protocol)
    file = io.BytesIO(content)
    assert peek_rows(file, 3072) == 500
    assert file.tell() < 2**20


class Evil:
    def __init__(self, call, *arguments):
        self.made = (call, arguments)

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    "evil",
    [
        Evil(exec, "raise SystemExit('pickled code ran')"),
        Evil(getattr, "", "join"),
        Evil(np.load, "x"),
        Evil(np.ones, 3),
        bytearray,
    ],
)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused_by_name(tmp_path, evil):
    files = NpzFiles(size=8)
    batches = {name: files.pickle(name) for name in files.images}
    batches["train_data_batch_2"] = pickle.dumps({"data": evil}, 4)
    with pytest.raises(UserError, match=r"train_data_batch_2: asks for \S+; only arrays"):
        write_dataset(section(tmp_path, write_tree(tmp_path / "source", batches), size=8))


def test_an_array_of_objects_is_refused():
    with pytest.raises(UserError, match="array of objects"):
        load_arrays(io.BytesIO(pickle.dumps({"data": np.array([{}], dtype=object)})), "x")


def test_a_cut_pickle_is_refused():
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_arrays(io.BytesIO(pickle.dumps({"data": np.arange(9)})[:-5]), "x")


def python2_pickle(images, classes):
    """Protocol 2 as Python 2 wrote CIFAR's: keys and pixels are byte strings under Python 2's opcodes."""
    rows = images.reshape(len(images), -1)
    string = lambda text: b"U" + bytes([len(text)]) + text  # noqa: E731
    number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b")
    array += b"\x87R(" + number(1) + number(rows.shape[0]) + number(rows.shape[1]) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", rows.nbytes) + rows.tobytes() + b"tb"
    listed = b"](" + b"".join(number(int(label)) for label in classes) + b"e"
    body = string(b"data") + array + string(b"labels") + listed + string(b"batch_label") + string(b"batch 1")
    return b"\x80\x02}(" + body + b"u."


@pytest.mark.parametrize("packed", [True, False])
def test_cifar_is_read_from_its_archive_or_folder(tmp_path, packed):
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    images = {name: crops(6, 32, seed=n) for n, name in enumerate(names)}
    classes = {name: labels(6, 10, seed=n) for n, name in enumerate(names)}
    files = {f"cifar-10-batches-py/{name}": python2_pickle(images[name], classes[name]) for name in names}
    if packed:
        files = {"cifar-10-python.tar.gz": tar_of(files, "w:gz")}
    config = section(tmp_path, write_tree(tmp_path / "source", files))
    manifest = write_dataset(config)
    assert manifest.recipe["source"] == "cifar10"
    train, train_labels = read_all(config, manifest, "train")
    assert np.array_equal(train, np.concatenate([images[name] for name in names[:5]]))
    assert np.array_equal(train_labels, np.concatenate([classes[name] for name in names[:5]]))
    assert np.array_equal(read_all(config, manifest, "val")[0], images["test_batch"])
    with pytest.raises(UserError, match=r"30 train images, CIFAR-10 50,000"):
        check_source(section(tmp_path, tmp_path / "source", partial=False, name="whole"))


def parquet(images, classes, kind, names=None):
    """A parquet file as the hub has them, in row groups of seven."""
    if kind == "encoded":
        cells = [{"bytes": encoded(image), "path": f"{n}.png"} for n, image in enumerate(images)]
    elif kind == "bytes":
        cells = [encoded(image) for image in images]
    else:
        cells = [image.transpose(1, 2, 0).tolist() for image in images]
    table = pyarrow.table({"image": cells, "label": classes})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=7)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["encoded", "bytes", "array"])
def test_parquet_files_with_splits(tmp_path, kind):
    images, classes = crops(30, 32), labels(30, 3)
    files = {
        "data/train-00000-of-00002.parquet": parquet(images[:12], classes[:12], kind),
        "data/train-00001-of-00002.parquet": parquet(images[12:25], classes[12:25], kind),
        "data/validation-00000-of-00001.parquet": parquet(images[25:], classes[25:], kind),
    }
    config = section(tmp_path, write_tree(tmp_path / "source", files), block_bytes=3072 * 5, shard_blocks=1)
    manifest = write_dataset(config)
    assert manifest.class_count == 3
    for split, rows in (("train", slice(0, 25)), ("val", slice(25, 30))):
        assert same_rows(*read_all(config, manifest, split), images[rows], classes[rows])


@pytest.mark.parametrize(
    ("bad_label", "names", "message"),
    [
        (-1, None, "label contains -1"),
        (-1, ["x", "y", "z"], "label contains -1"),
        (3, ["x", "y", "z"], "label goes to 3; there are 3"),
        (None, ["x", "y", "z"], "label is of float64 or has missing values"),
    ],
)
@pytest.mark.parametrize("where", ["train-1.parquet", "val-0.parquet"])
def test_a_wrong_label_in_the_last_file_is_detected_before_anything_is_written(
    tmp_path, where, bad_label, names, message
):
    images, classes = crops(6, 32), [0, 1, 2, 0, 1, 2]
    files = dict.fromkeys(("train-0.parquet", "train-1.parquet", "val-0.parquet"), (images, classes))
    files[where] = images, [*classes[:-1], bad_label]
    source = {name: parquet(*content, "bytes", names) for name, content in files.items()}
    with pytest.raises(UserError, match=f"{where}: {message}"):
        write_dataset(section(tmp_path, write_tree(tmp_path / "source", source)))
    assert not (tmp_path / "out").exists()


def test_parquet_without_splits_gets_a_validation_split_and_named_classes(tmp_path):
    images, classes = crops(30, 32), labels(30, 3)
    files = {
        "a.parquet": parquet(images[:12], classes[:12], "encoded", ["x", "y", "z"]),
        "b.parquet": parquet(images[12:], classes[12:], "encoded", ["x", "y", "z"]),
    }
    config = section(tmp_path, write_tree(tmp_path / "source", files), validation_images=7)
    manifest = write_dataset(config)
    assert manifest.class_names == ("x", "y", "z")
    train, val = read_all(config, manifest, "train"), read_all(config, manifest, "val")
    assert len(val[0]) == 7
    got = sorted(
        (image.tobytes(), int(label)) for part in (train, val) for image, label in zip(*part, strict=True)
    )
    assert got == sorted((image.tobytes(), int(label)) for image, label in zip(images, classes, strict=True))


def test_a_column_that_is_not_there_is_named(tmp_path):
    source = write_tree(tmp_path / "source", {"a.parquet": parquet(crops(9, 32), labels(9, 2), "bytes")})
    with pytest.raises(UserError, match=r"data\.source\.label_column: no column fine .* only image, label"):
        check_source(section(tmp_path, source, source={"label_column": "fine"}, validation_images=2))


def test_the_devkits_table_leads_from_clsloc_to_sorted_wnid(tmp_path):
    files = NpzFiles(size=8)
    random = np.random.default_rng(0)
    wnids = [f"n{number:08d}" for number in random.permutation(1000) * 7 + 1_000_000]
    table = "".join(f"{wnid} {number + 1} some_name\n" for number, wnid in enumerate(wnids))
    path = tmp_path / "map_clsloc.txt"
    path.write_text(table)
    source = files.write_folder(tmp_path / "source")
    config = section(tmp_path, source, size=8, label_map=str(path))
    manifest = write_dataset(config)
    assert manifest.label_order == "sorted-wnid"
    expected = [sorted(wnids).index(wnids[label]) for label in files.train()[1]]
    assert read_all(config, manifest, "train")[1].tolist() == expected
    plain = write_dataset(section(tmp_path, source, size=8, name="plain"))
    assert plain.version != manifest.version
    with pytest.raises(UserError, match=r"label_map is .* there, None here"):
        write_dataset(section(tmp_path, source, size=8))


def test_a_users_table_renumbers_and_merges_classes(tmp_path):
    (tmp_path / "map.txt").write_text("".join(f"{digit} {digit % 2}\n" for digit in range(10)))
    config = DataSection(root=str(tmp_path / "out"), label_map=str(tmp_path / "map.txt"))
    manifest = write_dataset(config)
    assert manifest.class_count == 2
    assert len(manifest.splits["train"].class_histogram) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("a b c", "lines must be"),
        ("0 1\n2 0\n", "must be 0 .. 1"),
        ("0 1\n1 0\n", "maps 2 classes"),
    ],
)
def test_a_wrong_label_map_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    with pytest.raises(UserError, match=rf"data\.label_map: .*{message}"):
        check_source(DataSection(root=str(tmp_path / "out"), label_map=str(tmp_path / "map.txt")))
