"""The launch section: the processes, and the hosts they run on."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from fm_core.config.location import Location
from fm_core.config.section import Section

RECORDED = "recorded"
"""Validation context for recorded configurations of earlier starts, which accept more than new ones."""
_OURS = {
    *("nodes", "ntasks", "ntasks-per-node", "array", "job-name", "output", "error", "open-mode", "input"),
    *("requeue", "no-requeue", "signal", "export", "export-file", "chdir", "wrap", "parsable", "wait"),
}


def _sbatch_value(value: object) -> object:
    """Convert an option's value: true for one without a value; quoted true, false and null count as such."""
    constants = {"": True, "true": True, "false": False, "null": None}
    return constants.get(value.strip().lower(), value) if isinstance(value, str) else value


SbatchValue = Annotated[bool | int | str | None, BeforeValidator(_sbatch_value)]


class SlurmSection(Section):
    """Resources and options requested from Slurm."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of a job; launch.processes run on each."""
    options: dict[str, SbatchValue] = {}
    """Other options of sbatch by their long names, e.g. {partition: gpu, gpus-per-node: 8, exclusive: true}.
    true gives an option without a value, false and null leave it out. In a YAML file, other values of this
    table are passed verbatim: 0123, 16:00:00 and on are strings."""
    notice_seconds: int = Field(default=120, ge=1)
    """Seconds before the time limit at which the run saves, exits and is requeued."""

    @model_validator(mode="after")
    def _check_sbatch_options(self, info: ValidationInfo) -> Self:
        for name in self.options:
            if name in _OURS or name.startswith("-"):
                raise ValueError(
                    f"launch.slurm.options.{name} is set by this program, or is not a long option of sbatch"
                )
        # Earlier versions recorded such numbers; their runs must remain readable.
        times = () if info.context == RECORDED else ("time", "time-min", "begin", "deadline")
        for name in times:
            value = self.options.get(name)
            if isinstance(value, int) and (value >= 3600 or isinstance(value, bool)):
                # Other YAML readers parse 24:00:00 as a base-60 number.
                raise ValueError(f'launch.slurm.options.{name}: write it in quotes, e.g. "24:00:00"')
        return self


class LaunchSection(Section):
    """The processes that train and sample, and the hosts they run on."""

    kind: Literal["debug", "local", "ssh", "slurm"] = "local"
    """debug: one process, the command itself, for breakpoint() and profilers; local: ranks on this
    machine; ssh: on the hosts of launch.hostfile; slurm: on nodes of Slurm."""
    processes: int | None = Field(default=None, ge=1)
    """Processes on each host; by default one per GPU, or two without a GPU. Required for Slurm."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; by default each host's cores divided by its processes. Required for Slurm,
    unless launch.slurm.options.cpus-per-task is set."""
    restarts: int = Field(default=3, ge=0)
    """Consecutive automatic restarts of a job that fails (a killed process, a lost host); a new training
    checkpoint resets the count."""
    restart_seconds: float = Field(default=5.0, ge=0)
    """Pause before the first restart, in seconds; it doubles with each restart, up to five minutes."""
    hostfile: Location | None = None
    """For ssh: file with a line `HOST slots=PROCESSES` per host; the first host must be able to access
    run.root."""
    port: int | None = Field(default=None, ge=1024, lt=65536)
    """TCP rendezvous port on the first host; by default chosen per job, from 20000 on."""
    slurm: SlurmSection = SlurmSection()
    """For Slurm: resources and options."""

    @model_validator(mode="after")
    def _check_keys_of_kind(self) -> Self:
        if self.kind == "ssh" and not self.hostfile:
            raise ValueError("launch.kind ssh needs launch.hostfile")
        for key, kind in (("hostfile", "ssh"), ("slurm", "slurm")):
            if self.kind != kind and self.set_without("kind", key):
                raise ValueError(f"launch.{key} does nothing without launch.kind: {kind}")
        if self.kind == "debug":
            self._check_debug()
        if self.kind == "slurm" and not self.processes:
            raise ValueError("launch.kind slurm needs launch.processes, the processes on each node")
        return self

    def _check_debug(self) -> None:
        if self.processes not in (None, 1):
            raise ValueError(
                f"launch.processes {self.processes}: launch.kind debug runs one process; set it to 1"
            )
        given = (
            self.model_dump()
        )  # a flow's sections are subclasses, which never compare equal to these classes
        for key, default in (("hostfile", None), ("slurm", SlurmSection().model_dump())):
            if given[key] != default:
                raise ValueError(
                    f"launch.{key}: launch.kind debug runs one process on this host; remove the key"
                )
