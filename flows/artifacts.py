"""What a finished stage shows in the Prefect UI: pictures, curves and tables.

Everything is read from the files the stage names; what cannot be shown is logged and never fails a
run. Pictures travel inside their artifacts as data: URIs, which both of Prefect's UIs show; Mermaid
charts are drawn by neither dependably.
"""

import base64
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import fsspec
from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.results import StageResult
from fm_core.storage.atomic_files import read_json, read_lines

if TYPE_CHECKING:
    from fm_core.report.html import PageSection

NEWEST_LINES = 20
PICTURE_BYTES = 150_000
"""The UI prints a picture's address below it, so that it must not be long."""


def create_artifacts(config: RunConfig, result: StageResult) -> None:
    """Show what a stage made."""
    for show in ARTIFACTS.get(result.stage, ()):
        try:
            show(config, result)
        except Exception as error:
            get_run_logger().warning("%s: the %s is not shown: %s", result.stage, show.__name__, error)


def dataset_card(config: RunConfig, result: StageResult) -> None:
    """What is in the data set, from its manifest."""
    from fm_core.data.manifest import load_manifest

    manifest = load_manifest(config.data.root, config.data.name)
    record = manifest.model_dump(mode="json", exclude={"shards"})
    record |= {"shards": len(manifest.shards), "bytes": sum(shard.bytes for shard in manifest.shards)}
    rows = [{"fact": key, "value": value} for key, value in facts(record)]
    create_table_artifact(rows, key="dataset-card", description=f"{manifest.name}: {result.summary}")


def loss_curve(config: RunConfig, result: StageResult) -> None:
    """The training loss against images seen."""
    from fm_core.report import plots

    curve = plots.loss_curve(read_lines(Path(result.paths["metrics"])))
    create_image_artifact(picture(curve), key="loss-curve", description=f"Training loss: {result.summary}")


def train_metrics(config: RunConfig, result: StageResult) -> None:
    """The newest lines of metrics.jsonl."""
    lines = read_lines(Path(result.paths["metrics"]))[-NEWEST_LINES:]
    rows = [dict(facts(line)) for line in reversed(lines)]
    create_table_artifact(rows, key="train-metrics", description=f"The last {len(rows)} measurements")


def sample_grid(config: RunConfig, result: StageResult) -> None:
    """The picture of the first samples."""
    with cast(Any, fsspec.open(result.paths["grid"], "rb")) as file:
        content: bytes = file.read()
    create_image_artifact(picture(content), key="sample-grid", description=f"Samples: {result.summary}")


def scores(config: RunConfig, result: StageResult) -> None:
    """Each score with its error and what it was made of; the protocol below."""
    record = read_json(Path(result.paths["scores"])) or {}
    protocol = record.pop("protocol", {})
    rows: list[dict[str, Any]] = []
    for name, score in record.items():
        entry: dict[str, Any] = dict(score) if isinstance(score, dict) else {"value": score}
        value, error = entry.pop("value", ""), entry.pop("stderr", None)
        details = ", ".join(f"{key} {fact}" for key, fact in facts(entry))
        told = dict(facts({"value": value, "stderr": error}))
        rows.append({"score": name, "value": told["value"], "±": told["stderr"] or "", "of": details})
    rows += [{"score": f"protocol.{key}", "value": value} for key, value in facts(protocol)]
    create_table_artifact(rows, key="scores", description=result.summary)


def run_directory(config: RunConfig, result: StageResult) -> None:
    """Where everything lies and how to go on by hand."""
    path = RunDirectory(config).path
    create_markdown_artifact(
        f"""# {config.run.name}

| | |
|---|---|
| report | `{Path(result.paths["report"]).resolve()}` |
| run directory | `{path.resolve()}` |
| metrics | `{path}/train/metrics.jsonl` |
| full logs | `{path}/logs/` |

Any stage again, by hand, from the project's root:

```
fm train --config {path}/config.yaml
```
""",
        key="run-directory",
        description=f"Where everything lies: {path.resolve()}",
    )


def tables(config: RunConfig, result: StageResult) -> None:
    """The tables of the comparison's page, verdicts on the paper's claims among them."""
    from fm_core.reproduce.reproduce import page_sections

    report = Path(result.paths["report"]).resolve()
    content = tables_as_markdown(page_sections(config), f"# {config.run.name}\n\nThe whole page: `{report}`")
    create_markdown_artifact(content, key="comparison", description=result.summary)


def figures(config: RunConfig, result: StageResult) -> None:
    """The figures of the comparison's page."""
    from fm_core.reproduce.reproduce import page_sections

    for key, uri, caption in figures_as_images(page_sections(config)):
        create_image_artifact(uri, key=key, description=caption)


def tables_as_markdown(sections: Sequence["PageSection"], head: str) -> str:
    """The tables of a page in Markdown, each under its heading and remark."""
    from fm_core.report.html import Table

    parts = [head]
    for section in sections:
        found = [part.markdown() for part in section.parts if isinstance(part, Table)]
        if found:
            parts += [f"## {section.title}", *([section.note] if section.note else []), *found]
    return "\n\n".join(parts) + "\n"


def figures_as_images(sections: Sequence["PageSection"]) -> list[tuple[str, str, str]]:
    """Key, data: URI and caption of each figure of a page; several of one section are numbered."""
    from fm_core.report.html import Figure

    found: list[tuple[str, str, str]] = []
    for section in sections:
        drawn = [part for part in section.parts if isinstance(part, Figure)]
        for number, figure in enumerate(drawn, start=1):
            key = slug(f"comparison {section.title}") + (f"-{number}" if len(drawn) > 1 else "")
            png = base64.b64decode(figure.uri.partition(",")[2])
            found.append((key, picture(png), f"{section.title}: {figure.caption}"))
    return found


ARTIFACTS: Mapping[str, tuple[Callable[[RunConfig, StageResult], None], ...]] = {
    "shard": (dataset_card,),
    "train": (loss_curve, train_metrics),
    "sample": (sample_grid,),
    "evaluate": (scores,),
    "report": (run_directory,),
    "reproduce": (tables, figures),
}


def facts(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a nested record under dotted names; a long list is told by its length."""
    if isinstance(record, Mapping):
        for key, value in cast(Mapping[str, Any], record).items():
            yield from facts(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(record, list):
        entries = cast(list[Any], record)
        plain = len(entries) <= 4 and all(isinstance(entry, str | int | float) for entry in entries)
        yield prefix, ", ".join(map(str, entries)) if plain else f"{len(entries)} entries"
    else:
        yield prefix, f"{record:.6g}" if isinstance(record, float) else record


def picture(png: bytes) -> str:
    """A data: URI of a picture, made smaller until it can travel inside an artifact."""
    from PIL import Image

    from fm_core.report.html import data_uri

    if len(png) <= PICTURE_BYTES:
        return data_uri(png)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    while True:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=85)
        if encoded.tell() <= PICTURE_BYTES:
            return data_uri(encoded.getvalue(), "image/jpeg")
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def slug(name: str) -> str:
    """A name as part of a resource's id."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
