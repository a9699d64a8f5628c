"""Vocabulary of folder and file names: words for splits, and generic words."""

import re

SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
"""Words for each split, in any case; "set" may follow, as in testset."""
IMAGE_WORDS = frozenset(
    [
        *("frames", "image", "images", "img", "imgs", "jpeg", "jpegs", "jpg", "jpgs", "photo", "photos"),
        *("picture", "pictures", "png", "pngs", "rgb"),
    ]
)
"""Words for images without a class."""
FILLERS = IMAGE_WORDS | frozenset(
    [
        *("blurred", "data", "dataset", "files", "full", "ilsvrc", "partial", "px", "raw", "sample"),
        *("samples", "set", "split", "x"),
    ]
)
"""Generic words, next to a split word in a folder's name or as the name of a folder of images."""
FILE_FILLERS = FILLERS | frozenset(
    [
        *("archive", "chunk", "default", "gz", "of", "parquet", "part", "parts", "shard", "shards"),
        *("snappy", "tar", "zip", "zstd"),
    ]
)
"""Generic words in the path of a data file."""
KINDS = {
    word + suffix: kind for kind, words in SPLIT_WORDS.items() for word in words for suffix in ("", "set")
}
_ARCHIVE = re.compile(r"\.(tar|zip)$", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{8,}")
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: maximal runs of letters."""
    return re.findall(r"[^\W\d_]+", name.lower())


def humps_of(name: str) -> list[str]:
    """The words of a name in lower case, split at capital letters as well, as in gtFine."""
    return words_of(_HUMPS.sub(" ", _ARCHIVE.sub("", name)))


def split_of_folder(name: str) -> str | None:
    """train, val or test for a folder or archive named after a split, e.g. "Validation" or "train_64x64"."""
    words = words_of(_ARCHIVE.sub("", name))
    kinds = {KINDS[word] for word in words if word in KINDS}
    rest = [word for word in words if word not in KINDS and word not in FILLERS]
    return kinds.pop() if len(kinds) == 1 and not rest else None


def split_and_rest(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The only split word anywhere in a name, e.g. in trainA, and the other words."""
    words = humps_of(name)
    kinds = {KINDS[word] for word in words if word in KINDS}
    rest = tuple(word for word in words if word not in KINDS and word not in FILLERS)
    return (kinds.pop() if len(kinds) == 1 else None), rest


def is_bare(name: str) -> bool:
    """Whether a folder's name is only a split word, optionally with "set"."""
    return _ARCHIVE.sub("", name).lower().replace("_set", "set") in KINDS


def split_of_data_file(path: str) -> str | None:
    """train, val or test, by the first split word in the name of a data file or its nearest folder."""
    for name in reversed(path.split("/")):
        kind = next((KINDS[word] for word in words_of(name) if word in KINDS), None)
        if kind:
            return kind
    return None


def variant_of_data_file(path: str) -> tuple[str, tuple[str, ...]]:
    """The folder of the name with the split word of a data file, and the other words of that name.

    "" and clean for train_clean-0.parquet, large for large/train/0.parquet. Numbers, single letters and
    hashes are ignored.
    """
    names = path.split("/")
    depth = next((n for n in reversed(range(len(names))) if KINDS.keys() & set(words_of(names[n]))), 0)
    tokens = [token.lower() for token in re.split(r"[\W_]+", names[depth])]
    words = [token.strip("0123456789") for token in tokens if not _HASH.fullmatch(token)]
    rest = (word for word in words if len(word) > 1 and word.isalpha() and word not in FILE_FILLERS)
    return "/".join(names[:depth]), tuple(word for word in rest if word not in KINDS)


def is_filler(name: str) -> bool:
    """Whether a folder's name is generic, e.g. "images"."""
    words = humps_of(name)
    return bool(words) and all(word in FILLERS for word in words)
