"""A sequence of episodes within a budget of minutes: state on disk, order of faults, and summary."""

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from infra.chaos_faults import namespaces, preload, process_faults, store_server, world_faults
from infra.chaos_faults.context import EpisodeContext, FaultKind
from infra.chaos_faults.disks import ChaosDisk
from infra.chaos_faults.episode import Episode, EpisodeResult, as_record, keep
from infra.chaos_faults.namespaces import ProcessHost
from infra.chaos_faults.preload import Preload
from infra.chaos_faults.store_server import ObjectStore
from infra.chaos_faults.tiny_training import TinyTraining

SCHEMA = 1
RUN_MEGABYTES, CHECKPOINT_MEGABYTES = 400, 64
"""Size of the run's disk; a start refuses a run directory with less than 256 MiB free."""
STORE_EVERY = 3
"""Every this many episodes, the checkpoints are in a store."""
MISSING = {
    "mounts": "no right to make mount namespaces",
    "network": "no right to make network namespaces, or no iproute2",
    "hosts": "no right to make PID namespaces",
    "compiler": "no C compiler",
    "store": "moto or s3fs is not installed",
}


def capabilities() -> set[str]:
    """What this machine allows."""
    possible: set[str] = set()
    if namespaces.is_isolated():
        possible |= {"mounts", "hosts"} | ({"network"} if shutil.which("ip") else set())
    if preload.compiler():
        possible.add("compiler")
    if store_server.available():
        possible.add("store")
    return possible


class ChaosCampaign:
    """Episodes of one seed in one directory."""

    def __init__(
        self, directory: Path, seed: int, minutes: float, images: int, only: Sequence[str] = ()
    ) -> None:
        """Continue what an earlier call in the directory started.

        `only` names the kinds of faults to inject, in full or up to the colon; by default all of them.
        Raises ValueError for another seed, and for a kind that does not exist.
        """
        self.directory, self.seed, self.minutes, self.images = directory, seed, minutes, images
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "results.json"
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "seed": seed,
            "images": images,
            "seconds": 0.0,
            "faults": {},
            "episodes": [],
        }
        if self.file.exists():
            self.record = json.loads(self.file.read_text(encoding="utf-8"))
            if (self.record["seed"], self.record["images"]) != (seed, images):
                raise ValueError(f"{self.file} is of another seed or size; choose another --directory")
        self.allowed = capabilities()
        self.kinds = (*process_faults.KINDS, *world_faults.KINDS)
        self.only = {
            kind.name for kind in self.kinds if not only or {kind.name, kind.name.partition(":")[0]} & {*only}
        }
        if not self.only:
            raise ValueError(f"--only: none of {', '.join(kind.name for kind in self.kinds)}")
        self._decks: dict[str, list[FaultKind]] = {"folder": [], "store": []}

    @property
    def not_run(self) -> dict[str, str]:
        """The kinds that are impossible or not requested, and why."""
        return {
            kind.name: "; ".join(MISSING[need] for need in sorted(kind.needs - self.allowed)) or "not chosen"
            for kind in self.kinds
            if kind.needs - self.allowed or kind.name not in self.only
        }

    def run(self, episodes: int | None = None) -> None:
        """Run episodes until the minutes are used up, or until there are `episodes`.

        Raises ValueError if another process does so in the same directory.
        """
        with (self.directory / "lock").open("w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another chaos test runs in {self.directory}") from None
            self._run(episodes)

    def _run(self, episodes: int | None) -> None:
        work = self.directory / "work"
        shutil.rmtree(work, ignore_errors=True)  # left by an interrupted episode
        reference = self._reference()
        library = preload.compile_library(self.directory) if "compiler" in self.allowed else None
        while self.record["seconds"] < self.minutes * 60:
            number = len(self.record["episodes"])
            if number == episodes:
                return
            place = (
                "store" if "store" in self.allowed and (number + self.seed) % STORE_EVERY == 1 else "folder"
            )
            began = time.monotonic()
            result = self._episode(number, place, work, reference, library)
            self.record["seconds"] += time.monotonic() - began
            self.record["faults"] = dict(Counter(self.record["faults"]) + Counter(result.faults))
            self.record["episodes"].append(as_record(result))
            self._save()
            print(_line(result, self.record["seconds"]), flush=True)

    def violations(self) -> list[str]:
        """Every violation, with its episode and the folder with its files."""
        return [
            f"seed {self.seed}, episode {episode['number']}: {violation} ({episode['kept']})"
            for episode in self.record["episodes"]
            for violation in episode["violations"]
        ]

    def missing(self, least: int) -> list[str]:
        """Possible kinds that occurred less often than `least`."""
        return [
            f"{kind.name} occurred {self.record['faults'].get(kind.name, 0)} times, not {least}"
            for kind in self.kinds
            if kind.name not in self.not_run and self.record["faults"].get(kind.name, 0) < least
        ]

    def table(self, least: int) -> str:
        """Counts of each fault, and the outcome."""
        rows = [
            f"  {kind.name:<28}"
            + (f"not run: {self.not_run[kind.name]}" if kind.name in self.not_run else f"{count:>5}")
            for kind in self.kinds
            for count in [self.record["faults"].get(kind.name, 0)]
        ]
        episodes = self.record["episodes"]
        codes = Counter(end["code"] for episode in episodes for end in episode["ends"])
        problems = [*self.violations(), *self.missing(least)]
        return "\n".join(
            [
                f"seed {self.seed}: {len(episodes)} episodes in {self.record['seconds'] / 60:.1f} minutes",
                *rows,
                f"  {'all':<28}{sum(self.record['faults'].values()):>5}",
                f"ends of fm train by status: {dict(sorted(codes.items()))}",
                f"checkpoints: {_sum(episodes, 'checkpoints_completed')} completed, "
                f"{_sum(episodes, 'checkpoints_removed')} removed by the retention rule",
                *(f"FAILED: {problem}" for problem in problems),
                "failed" if problems else "every run equals the undisturbed one bit for bit",
            ]
        )

    def _reference(self) -> TinyTraining:
        folder = self.directory / "reference"
        reference = TinyTraining(folder, self.directory / "data", self.images)
        if not (reference.path / "train" / "DONE.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            reference = TinyTraining(folder, self.directory / "data", self.images)
            for stage in ("shard", "train"):
                start = reference.start(stage)
                if start.process.wait():
                    raise RuntimeError(f"the undisturbed run failed: {start.last_line}")
        return reference

    def _episode(
        self, number: int, place: str, work: Path, reference: TinyTraining, library: Path | None
    ) -> EpisodeResult:
        mounted = "mounts" in self.allowed
        store = ObjectStore(work / "store") if place == "store" else None
        result = EpisodeResult(number, self.seed, place)
        run_disk = checkpoint_disk = other = None
        try:
            folder = work / "training"
            folder.mkdir(parents=True)
            run_disk = ChaosDisk(work / "disks" / "run", folder / "runs" / "chaos", RUN_MEGABYTES, mounted)
            if store is None:
                backing, root = work / "disks" / "checkpoints", folder / "checkpoints"
                checkpoint_disk = ChaosDisk(backing, root, CHECKPOINT_MEGABYTES, mounted)
            injected = Preload(library, work / "control", folder) if library else None
            variables = {**(injected.variables if injected else {}), **(store.variables if store else {})}
            root = store_server.URL if store else str(folder / "checkpoints")
            training = TinyTraining(folder, self.directory / "data", self.images, root, variables)
            other = ProcessHost.start() if "hosts" in self.allowed else None
            context = EpisodeContext(training, run_disk, checkpoint_disk, injected, store, other)
            deck = self._deck(place, number)
            deadline = time.monotonic() + self.minutes * 60 - self.record["seconds"]
            Episode(
                result,
                context,
                reference,
                lambda: self._draw(deck, place),
                lambda kind: deck.insert(0, kind),
                deadline,
            ).run()
            kept_folder = self.directory / "episodes" / f"{number:03}"
            result.kept = str(kept_folder)
            keep(context, kept_folder, bool(result.violations))
        finally:
            for disk in (run_disk, checkpoint_disk):
                if disk:
                    disk.close()
            if other:
                other.close()
            if store:
                store.close()
            _reap()
        for disk in (run_disk, checkpoint_disk):
            result.remarks += [f"written while unmounted: {name}" for name in (disk.shadow() if disk else [])]
        shutil.rmtree(work, ignore_errors=True)
        return result

    def _deck(self, place: str, number: int) -> list[FaultKind]:
        deck = self._decks[place]
        if not deck:
            self._draw_new(deck, place, number)
        return deck

    def _draw_new(self, deck: list[FaultKind], place: str, number: int) -> None:
        """Shuffle the possible kinds; the least frequent so far come first, so that none is omitted."""
        kinds = [
            kind for kind in self.kinds if kind.name not in self.not_run and kind.episodes in ("all", place)
        ]
        Random(f"{self.seed}/{number}/{place}").shuffle(kinds)
        deck += sorted(kinds, key=lambda kind: -self.record["faults"].get(kind.name, 0))

    def _draw(self, deck: list[FaultKind], place: str) -> FaultKind:
        if not deck:
            self._draw_new(deck, place, len(self.record["episodes"]))
        return deck.pop()

    def _save(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self.record, "not_run": self.not_run}, indent=1), encoding="utf-8")
        temporary.replace(self.file)


def _reap() -> None:
    """Reap ended orphans of the run, which are children of the first process of the namespace."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _sum(episodes: list[dict[str, Any]], key: str) -> int:
    return sum(episode[key] for episode in episodes)


def _line(result: EpisodeResult, seconds: float) -> str:
    outcome = "; ".join(result.violations) or "equal"
    faults = ", ".join(f"{kind} {count}" for kind, count in sorted(result.faults.items()))
    return f"{seconds / 60:6.1f} min  episode {result.number} ({result.place}): {faults}: {outcome}"
