"""Exported models in repositories of the Hugging Face hub: upload by `fm export`, download by `fm_core.load`.

huggingface_hub does both; HF_ENDPOINT names another hub, HF_HOME the cache. The token is read from the
environment alone (HF_TOKEN), and is written nowhere.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fm_core.config.location import holds_secret
from fm_core.errors import UserError
from fm_core.models.published_weights import PICKLES
from fm_core.sampling.checkpoint_source import EXPORTED
from fm_core.storage.hashing import sha256_file
from fm_core.storage.retries import one_line, with_retries

T = TypeVar("T")

PROTOCOL = "hf://"
URL = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")
CARD, CONFIG, SCORES = "README.md", "config.yaml", "scores.json"
SUMS = "SHA256SUMS"
"""File with hashes of the others, as sha256sum writes it. The card is not among them: its owner edits it."""
HASHED = (EXPORTED, CONFIG, SCORES)
FILES = (*HASHED, CARD, SUMS)
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
INSTALL = (
    "huggingface_hub is not installed; pip install --constraint infra/constraints.txt --editable '.[hf]'"
)


def is_hub_url(where: str | Path) -> bool:
    """Whether this names a repository of the hub and not a local path."""
    return str(where).startswith(PROTOCOL)


def sums_of(folder: Path) -> str:
    """Content of SUMS for the exported folder."""
    return "".join(f"{sha256_file(folder / name)}  {name}\n" for name in HASHED)


def verify_sums(folder: Path, where: str) -> None:
    """Compare the files of a folder with its SUMS. Raises UserError, which names the first that differs."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in HASHED:
        if not (folder / name).exists():
            raise UserError(f"{where}: {name} is missing; export and push it again")
        if sha256_file(folder / name) != sums.get(name):
            raise UserError(f"{where}: {name} differs from its hash in {SUMS}; it was changed or damaged")


def download_export(url: str) -> Path:
    """Folder with the files of an exported model at hf://USER/NAME or hf://USER/NAME@REVISION, verified.

    The files are kept in the cache of huggingface_hub. Only what `fm export` writes is downloaded; pickles
    are not.

    Raises:
        UserError: the URL is invalid or the package is not installed; there is no such repository, or it is
            no export; or a file differs from its hash.
        UnreachableError: the hub does not answer.
    """
    if holds_secret(url):
        raise UserError("hf://: a URL with a token in it; put the token into HF_TOKEN")
    if not (match := URL.fullmatch(url)):
        raise UserError(f"{url}: write hf://USER/NAME or hf://USER/NAME@REVISION")
    repository, revision = match[1], match[2] or "main"
    hub, api = _hub()
    info = _ask(lambda: api.model_info(repository, revision=revision), url)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if missing := [name for name in (EXPORTED, SUMS) if name not in names]:
        pickled = sorted(name for name in names if name.endswith((*PICKLES, ".pkl", ".pickle")))
        also = f"; {pickled[0]} is a pickle and is not loaded" if pickled else ""
        raise UserError(f"{url}: it has no {missing[0]}, so fm export did not write it{also}")
    folder = _ask(
        lambda: hub.snapshot_download(
            repository,
            revision=info.sha,
            allow_patterns=list(FILES),
            token=_token() or False,
            endpoint=api.endpoint,
        ),
        url,
    )
    verify_sums(Path(folder), url)
    return Path(folder)


def push_export(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload an exported folder as one commit, creating the repository if it is missing; the commit's URL.

    `private` applies to a new repository. Raises UserError if the package or the token is missing or the hub
    refuses, and UnreachableError if it does not answer.
    """
    _, api = _hub()
    if not _token():
        raise UserError(f"export.push: set {TOKENS[0]} to a token of the hub that may write to {repository}")
    where = f"{PROTOCOL}{repository}"
    _ask(lambda: api.create_repo(repository, private=private, exist_ok=True), where)
    commit = _ask(
        lambda: api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=message
        ),
        where,
    )
    return str(commit.commit_url)


def check_hub() -> None:
    """Raise UserError unless huggingface_hub is installed and there is a token."""
    _hub()
    if not _token():
        raise UserError(f"export.push: set {TOKENS[0]} to a token of the hub that may write")


def _token() -> str | None:
    return next((token for name in TOKENS if (token := os.environ.get(name, "").strip())), None)


def _hub() -> tuple[ModuleType, Any]:
    """The package huggingface_hub, and its client of the hub that the environment names."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(INSTALL) from None
    # The package reads HF_ENDPOINT when it is imported, which may have been earlier.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return huggingface_hub, huggingface_hub.HfApi(endpoint=endpoint, token=_token() or False)


def _ask(request: Callable[[], T], where: str) -> T:
    """The answer to a request. Raises UserError or UnreachableError, without the token."""
    try:
        return with_retries(request, where)
    except FileNotFoundError as error:
        raise UserError(f"{where}: {one_line(error)}") from None
