"""The launch section: the processes, and the hosts they run on."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from fm_core.config.location import Location
from fm_core.config.section import Section

RECORDED = "recorded"
"""Context of the validation of what an earlier start recorded, and nobody gives now."""
_OURS = {
    *("nodes", "ntasks", "ntasks-per-node", "array", "job-name", "output", "error", "open-mode", "input"),
    *("requeue", "no-requeue", "signal", "export", "export-file", "chdir", "wrap", "parsable", "wait"),
}


def _sbatch_value(value: object) -> object:
    """An option without a value is true; the words of YAML and JSON mean the same in quotes."""
    words = {"": True, "true": True, "false": False, "null": None}
    return words.get(value.strip().lower(), value) if isinstance(value, str) else value


SbatchValue = Annotated[bool | int | str | None, BeforeValidator(_sbatch_value)]


class SlurmSection(Section):
    """What is asked of Slurm."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of a job; launch.processes run on each."""
    options: dict[str, SbatchValue] = {}
    """Other options of sbatch by their long names, e.g. {partition: gpu, gpus-per-node: 8, exclusive: true}.
    true gives an option without a value, false and null leave it out. In a YAML file, other values of this
    table are taken as they are written: 0123, 16:00:00 and on are texts."""
    notice_seconds: int = Field(default=120, ge=1)
    """So many seconds before the time limit the run saves, ends and is queued again."""

    @model_validator(mode="after")
    def _check_sbatch_options(self, info: ValidationInfo) -> Self:
        for name in self.options:
            if name in _OURS or name.startswith("-"):
                raise ValueError(
                    f"launch.slurm.options.{name} is set by this program, or is not a long option of sbatch"
                )
        # Earlier versions recorded such numbers; their runs have to be readable.
        times = () if info.context == RECORDED else ("time", "time-min", "begin", "deadline")
        for name in times:
            value = self.options.get(name)
            if isinstance(value, int) and (value >= 3600 or isinstance(value, bool)):
                # Other readers of YAML than ours take 24:00:00 for a number of base 60.
                raise ValueError(f'launch.slurm.options.{name}: write it in quotes, e.g. "24:00:00"')
        return self


class LaunchSection(Section):
    """The processes that train and sample, and the hosts they run on."""

    kind: Literal["debug", "local", "ssh", "slurm"] = "local"
    """debug: one process, the command itself, for breakpoint() and profilers; local: ranks on this
    machine; ssh: on the hosts of launch.hostfile; slurm: on nodes of Slurm."""
    processes: int | None = Field(default=None, ge=1)
    """Processes on each host; by default one per GPU, or two where there is none. Slurm wants a number."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; by default each host's cores over its processes. Slurm must be told, so or
    by launch.slurm.options.cpus-per-task."""
    restarts: int = Field(default=3, ge=0)
    """How often in a row a job that fails (a killed process, a lost host) is started again by itself;
    training that finished a new checkpoint since the last failure counts anew."""
    restart_seconds: float = Field(default=5.0, ge=0)
    """Pause before the first restart, in seconds; it doubles from one to the next, up to five minutes."""
    hostfile: Location | None = None
    """For ssh: file with a line `HOST slots=PROCESSES` for each host; the first must see run.root."""
    port: int | None = Field(default=None, ge=1024, lt=65536)
    """TCP port of the first host where all hosts meet; by default another from 20000 on for each job."""
    slurm: SlurmSection = SlurmSection()
    """For Slurm: nodes and options."""

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
        given = self.model_dump()  # sections of a flow's own class equal none of the classes here
        for key, default in (("hostfile", None), ("slurm", SlurmSection().model_dump())):
            if given[key] != default:
                raise ValueError(
                    f"launch.{key}: launch.kind debug runs one process on this host; take it out"
                )
