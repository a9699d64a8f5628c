"""Classes of the ILSVRC2012 validation images, from any of the files that list them."""

import csv
import io
import tarfile
from collections.abc import Sequence
from typing import Any, cast

from fm_core.data.sources.file_listing import list_files
from fm_core.data.sources.npz_members import damage_message
from fm_core.errors import UserError
from fm_core.storage.store import Store

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
LABEL_FILES = f"{DEVKIT}, LOC_val_solution.csv or imagenet_2012_validation_synset_labels.txt next to them"


def validation_classes(store: Store, stems: Sequence[str]) -> dict[str, str]:
    """WordNet id of each image, by the stem of its name; `stems` are sorted.

    Read from Kaggle's LOC_val_solution.csv, from a list of WordNet ids, or from the devkit's numbers and
    meta.mat, extracted or not. Raises UserError if there is none of these files.
    """
    files = {path.rsplit("/", 1)[-1]: path for path in list_files(store, depth=3, skip_image_folders=True)}
    if "LOC_val_solution.csv" in files:
        text = store.read_bytes(files["LOC_val_solution.csv"]).decode()
        return {
            row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(io.StringIO(text))
        }
    lists = [path for name, path in files.items() if name.endswith("synset_labels.txt")]
    if lists:
        return _by_order(store, lists[0], store.read_bytes(lists[0]).decode().split(), stems)
    if GROUND_TRUTH in files and "meta.mat" in files:
        truth, meta = store.read_bytes(files[GROUND_TRUTH]), store.read_bytes(files["meta.mat"])
    elif DEVKIT in files:
        truth, meta = _from_devkit(store, files[DEVKIT])
    else:
        raise UserError(
            f"data.source.url: no classes of the validation images: put {LABEL_FILES} ({store.url})"
        )
    names = _names_of_numbers(meta)
    return _by_order(store, GROUND_TRUTH, [names[int(number)] for number in truth.split()], stems)


def _by_order(store: Store, path: str, names: list[str], stems: Sequence[str]) -> dict[str, str]:
    """Names by the 1-based image number at the end of each stem."""
    try:
        return {stem: names[int(stem.rsplit("_", 1)[-1]) - 1] for stem in stems}
    except (ValueError, IndexError):
        raise UserError(
            f"{store.url}/{path}: {len(names)} lines do not match images such as {stems[-1]}"
        ) from None


def _from_devkit(store: Store, path: str) -> tuple[bytes, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with store.open(path) as file, tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                stream = archive.extractfile(member) if name in (GROUND_TRUTH, "meta.mat") else None
                if stream is not None:
                    contents[name] = stream.read()
        return contents[GROUND_TRUTH], contents["meta.mat"]
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        raise UserError(damage_message(store, path, error)) from None


def _names_of_numbers(meta: bytes) -> dict[int, str]:
    """WordNet id by ILSVRC2012_ID."""
    from scipy.io import loadmat  # imported here, because it takes half a second

    synsets = cast(Any, loadmat(io.BytesIO(meta), squeeze_me=True))["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
