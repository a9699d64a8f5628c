"""Prefect artifacts of a finished stage: images, curves and tables.

All content is read from the files that the stage's result names. A failure to create an artifact is logged
and never fails a run; it is retried while the server is unavailable. Images are embedded in their artifacts
as data: URIs, which both of Prefect's UIs show; neither renders Mermaid charts reliably.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import fsspec
from prefect import get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.last_updates import LastUpdates, last_updates, server_away
from fm_core.config import RunConfig
from fm_core.run.directory import RunDirectory
from fm_core.run.results import StageResult
from fm_core.storage.atomic_files import read_json, read_lines

if TYPE_CHECKING:
    from fm_core.report.html import PageSection

Creator = Callable[[RunConfig, StageResult], None]
METRICS_ROWS = 20
"""Number of the newest lines of metrics.jsonl that `train-metrics` shows."""
MAX_IMAGE_BYTES = 150_000
"""Maximum size of an embedded image in bytes, because the UI also prints its data: URI below it."""


def create_artifacts(config: RunConfig, result: StageResult, updates: LastUpdates = last_updates) -> None:
    """Create the artifacts of a finished stage, in the order of ARTIFACTS."""
    creators = list(ARTIFACTS.get(result.stage, ()))

    def create_the_rest() -> bool:
        while creators:
            if not _created(creators[0], config, result):
                return False
            creators.pop(0)
        return True

    if creators:
        updates.add(create_the_rest)


def _created(create: Creator, config: RunConfig, result: StageResult) -> bool:
    """Create one artifact; False if the server is unavailable."""
    try:
        create(config, result)
    except Exception as error:
        if server_away(error):
            return False
        name = create.__name__
        get_run_logger().warning("%s: could not create the artifact %s: %s", result.stage, name, error)
    return True


def dataset_card(config: RunConfig, result: StageResult) -> None:
    """Table of the manifest's entries."""
    from fm_core.data.manifest import load_manifest

    root, name, _ = result.paths["manifest"].rsplit("/", 2)  # data.name may be derived
    manifest = load_manifest(root, name)
    record = manifest.model_dump(mode="json", exclude={"shards"})
    record |= {"shards": len(manifest.shards), "bytes": sum(shard.bytes for shard in manifest.shards)}
    rows = [{"fact": key, "value": value} for key, value in flatten_record(record)]
    create_table_artifact(rows, key="dataset-card", description=f"{manifest.name}: {result.summary}")


def loss_curve(config: RunConfig, result: StageResult) -> None:
    """Image of the training loss and the validation loss against images seen."""
    from fm_core.report import plots

    metrics = Path(result.paths["metrics"])
    curve = plots.loss_curve(read_lines(metrics), read_lines(metrics.with_name("held_out.jsonl"))).png()
    create_image_artifact(image_uri(curve), key="loss-curve", description=f"Training loss: {result.summary}")


def train_metrics(config: RunConfig, result: StageResult) -> None:
    """Table of the newest lines of metrics.jsonl."""
    lines = read_lines(Path(result.paths["metrics"]))[-METRICS_ROWS:]
    rows = [dict(flatten_record(line)) for line in reversed(lines)]
    create_table_artifact(rows, key="train-metrics", description=f"The last {len(rows)} measurements")


def sample_grid(config: RunConfig, result: StageResult) -> None:
    """Image of the first samples."""
    with cast(Any, fsspec.open(result.paths["grid"], "rb")) as file:
        content: bytes = file.read()
    create_image_artifact(image_uri(content), key="sample-grid", description=f"Samples: {result.summary}")


def scores(config: RunConfig, result: StageResult) -> None:
    """Table of the scores with standard errors and details, followed by the protocol."""
    record = read_json(Path(result.paths["scores"])) or {}
    protocol = record.pop("protocol", {})
    rows: list[dict[str, Any]] = []
    for name, score in record.items():
        if isinstance(score, dict) and "alias_of" in score:
            continue
        entry: dict[str, Any] = dict(score) if isinstance(score, dict) else {"value": score}
        value, error = entry.pop("value", ""), entry.pop("stderr", None)
        details = ", ".join(f"{key} {detail}" for key, detail in flatten_record(entry))
        shown = dict(flatten_record({"value": value, "stderr": error}))
        rows.append({"score": name, "value": shown["value"], "±": shown["stderr"] or "", "of": details})
    rows += [{"score": f"protocol.{key}", "value": value} for key, value in flatten_record(protocol)]
    create_table_artifact(rows, key="scores", description=result.summary)


def run_directory(config: RunConfig, result: StageResult) -> None:
    """Paths of the run's files, and the command that runs a stage manually."""
    path = RunDirectory(config).path
    create_markdown_artifact(
        f"""# {config.run.name}

| | |
|---|---|
| report | `{Path(result.paths["report"]).resolve()}` |
| run directory | `{path.resolve()}` |
| metrics | `{path}/train/metrics.jsonl` |
| full logs | `{path}/logs/` |

To run a stage by hand, from the project's root:

```
fm train --config {path}/config.yaml
```
""",
        key="run-directory",
        description=f"Files of the run: {path.resolve()}",
    )


def report_pictures(config: RunConfig, result: StageResult) -> None:
    """The pictures of the report: samples, scores, curves, and nearest training images."""
    from fm_core.report.html import page_pictures
    from fm_core.stages.report import report_sections

    for key, (picture, caption) in page_pictures("report", report_sections(config)).items():
        create_image_artifact(image_uri(picture), key=key, description=caption)


def comparison_tables(config: RunConfig, result: StageResult) -> None:
    """The tables of the comparison's report, including the verdicts on the paper's claims."""
    from fm_core.reproduce.reproduce import page_sections

    report = Path(result.paths["report"]).resolve()
    content = tables_as_markdown(
        page_sections(config),
        f"# {config.run.name}\
\
Full report: `{report}`",
    )
    create_markdown_artifact(content, key="comparison", description=result.summary)


def comparison_pictures(config: RunConfig, result: StageResult) -> None:
    """The pictures of the comparison's report."""
    from fm_core.report.html import page_pictures
    from fm_core.reproduce.reproduce import page_sections

    for key, (picture, caption) in page_pictures("comparison", page_sections(config)).items():
        create_image_artifact(image_uri(picture), key=key, description=caption)


def sweep_tables(config: RunConfig, result: StageResult) -> None:
    """The tables of a sweep's page."""
    sections, report = _sweep_sections(result), Path(result.paths["report"]).resolve()
    content = tables_as_markdown(sections, f"# Sweep of {config.run.name}\n\nFull page: `{report}`")
    create_markdown_artifact(content, key="sweep", description=result.summary)


def sweep_pictures(config: RunConfig, result: StageResult) -> None:
    """The figure of a sweep's page."""
    from fm_core.report.html import page_pictures

    for key, (picture, caption) in page_pictures("sweep", _sweep_sections(result)).items():
        create_image_artifact(image_uri(picture), key=key, description=caption)


def _sweep_sections(result: StageResult) -> "list[PageSection]":
    from fm_core.sweep.sweep_page import sweep_sections

    return sweep_sections(read_json(Path(result.paths["results"])) or {})


def tables_as_markdown(sections: Sequence["PageSection"], head: str) -> str:
    """The tables of a report in Markdown, each below the title and note of its section."""
    from fm_core.report.html import Table

    parts = [head]
    for section in sections:
        tables = [part.markdown() for part in section.parts if isinstance(part, Table)]
        if tables:
            parts += [f"## {section.title}", *([section.note] if section.note else []), *tables]
    return "\n\n".join(parts) + "\n"


ARTIFACTS: Mapping[str, tuple[Creator, ...]] = {
    "shard": (dataset_card,),
    "train": (loss_curve, train_metrics),
    "sample": (sample_grid,),
    "evaluate": (scores,),
    "report": (run_directory, report_pictures),
    "reproduce": (comparison_tables, comparison_pictures),
    "sweep": (sweep_tables, sweep_pictures),
}


def flatten_record(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The scalar values of a nested record under dotted names; a long list is replaced by its length."""
    if isinstance(record, Mapping):
        for key, value in cast(Mapping[str, Any], record).items():
            yield from flatten_record(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(record, list):
        entries = cast(list[Any], record)
        short = len(entries) <= 4 and all(isinstance(entry, str | int | float) for entry in entries)
        yield prefix, ", ".join(map(str, entries)) if short else f"{len(entries)} entries"
    else:
        yield prefix, f"{record:.6g}" if isinstance(record, float) else record


def image_uri(png: bytes) -> str:
    """The data: URI of a PNG; an image over MAX_IMAGE_BYTES is recompressed and scaled down until it fits."""
    from PIL import Image

    from fm_core.report.gallery import data_uri

    if len(png) <= MAX_IMAGE_BYTES:
        return data_uri(png)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    while True:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=85)
        if encoded.tell() <= MAX_IMAGE_BYTES:
            return data_uri(encoded.getvalue(), "image/jpeg")
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def slug(name: str) -> str:
    """Convert a name to the characters that artifact keys and resource ids allow."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
