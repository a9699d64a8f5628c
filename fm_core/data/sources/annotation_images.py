"""Detection of annotation images, such as segmentation masks, and of paired images."""

from collections import Counter
from collections.abc import Iterable, Sequence

from fm_core.data.sources.file_listing import printable
from fm_core.data.sources.split_words import IMAGE_WORDS, humps_of
from fm_core.errors import UserError

ANNOTATION_WORDS = frozenset(
    [
        *("alpha", "alphas", "annotation", "annotations", "boundaries", "contours", "depth", "depths"),
        *("disparity", "disparities", "groundtruth", "groundtruths", "gt", "gts", "heatmaps", "instances"),
        *("label", "labels", "landmarks", "mask", "masks", "matte", "mattes", "normals", "saliency", "seg"),
        *(
            "segmentation",
            "segmentations",
            "segs",
            "semantic",
            "target",
            "targets",
            "trimap",
            "trimaps",
            "truth",
        ),
    ]
)
"""Words for annotation images."""
PAIRED_WORDS = frozenset(
    [
        *("blur", "blurred", "blurry", "clean", "color", "gray", "grayscale", "grey", "hq", "hr", "input"),
        *("inputs", "lq", "lr", "noise", "noisy", "output", "outputs", "sharp", "source", "sources"),
    ]
)
"""Words for the sides of image pairs, in addition to those for annotations and images."""
_SEPARATORS = " _.-"
LEFT_ALONE = "annotations"
"""Name of the ignored split of annotation images."""


def annotation_images(paths: Sequence[str]) -> set[str]:
    """The paths of annotation images.

    They are in a folder such as masks next to one such as images, or are named after an image in the same
    folder, as 1_mask.png after 1.jpg. A class "mask" next to other classes does not match.
    """
    folders = _annotation_folders(paths)
    in_folders = (
        {path for path in paths if any(above in folders for above in _above(path))} if folders else set[str]()
    )
    return in_folders | _named_after_images([path for path in paths if path not in in_folders])


def _annotation_folders(paths: Iterable[str]) -> set[str]:
    """Folders of annotations that are next to folders of images."""
    children: dict[str, set[str]] = {}
    for folder in {path.rpartition("/")[0] for path in paths}:
        above = folder
        while above:
            parent, _, name = above.rpartition("/")
            children.setdefault(parent, set()).add(name)
            above = parent
    described: set[str] = set()
    for parent, names in children.items():
        annotations = {name for name in names if ANNOTATION_WORDS & set(humps_of(name))}
        images = {name for name in names - annotations if IMAGE_WORDS & set(humps_of(name))}
        if annotations and images:
            described |= {f"{parent}/{name}".lstrip("/") for name in annotations}
    return described


def _above(path: str) -> list[str]:
    """The parent folders of a path."""
    names = path.split("/")[:-1]
    return ["/".join(names[: depth + 1]) for depth in range(len(names))]


def _named_after_images(paths: Sequence[str]) -> set[str]:
    """Images named after an image in the same folder, with a word for annotations appended."""
    described = {path: of for path in paths if (of := _described_by(path))}
    if not described:
        return set()
    stems = {path.rpartition(".")[0] for path in paths}
    return {path for path, of in described.items() if of in stems}


def _described_by(path: str) -> str | None:
    """Path, without extension, of the image an annotation is named after, e.g. a/1 for a/1_mask_2.png."""
    tail = path.rpartition(".")[0].rstrip(f"0123456789{_SEPARATORS}")
    cut = max(map(tail.rfind, _SEPARATORS))
    if cut <= tail.rfind("/") + 1 or tail[cut + 1 :].lower() not in ANNOTATION_WORDS:
        return None
    return tail[:cut].rstrip(_SEPARATORS)


def refuse_pairs(keys: Sequence[str], classes: Sequence[str | None]) -> None:
    """Raise UserError for folders with images of the same names that are not classes.

    These are named like the sides of pairs, or contain the same subfolders, like variants of one set.
    keys: paths of the training images; classes: that of each.
    """
    known = PAIRED_WORDS | ANNOTATION_WORDS | IMAGE_WORDS
    if len(set(Counter(name for name in classes if name is not None).values())) != 1:
        return  # before a set of a million names is built
    stems: dict[str, set[str]] = {name: set() for name in classes if name is not None}
    for key, name in zip(keys, classes, strict=True):
        if name is not None:
            stems[name].add(key.partition(f"{name}/")[2].rpartition(".")[0])
    names = sorted(stems)
    if len(names) < 2 or any(other != stems[names[0]] for other in stems.values()):
        return
    paired = all(humps_of(name) and not set(humps_of(name)) - known for name in names)
    if paired or len({stem.rpartition("/")[0] for stem in stems[names[0]]}) > 1:
        shown = " and ".join(map(printable, names[:3]))
        raise UserError(
            f"data.source.url: {shown} hold images of the same names, as the sides of pairs and variants of "
            "one set do; keep only one of them there, or rename the folders if they are classes"
        )
