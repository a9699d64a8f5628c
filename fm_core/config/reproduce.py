"""The reproduce section: the experiments of a comparison, their data, and how they are scored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from fm_core.config.section import Name, Options, Section

Budget = Annotated[int, Field(ge=2, multiple_of=2)]


Kind = Annotated[
    Literal["toy2d", "images"],
    BeforeValidator(
        lambda kind: "toy2d" if kind == "plane" else kind,
        json_schema_input_type=Literal["toy2d", "images", "plane"],
    ),
]
"""Kind of a comparison; "plane" is a former name of toy2d."""


class ExperimentSection(Section):
    """One experiment of the comparison: an objective on a path."""

    name: Name
    """Short name; its directory is <run>/reproduce/<name>."""
    title: str = ""
    """Name in tables and figures; by default the objective and the path."""
    objective: str
    """A built-in objective (flow-matching, score-matching, ...) or package.module:Class."""
    objective_options: Options = {}
    """Options of the objective."""
    path: str
    """A built-in path (optimal-transport, variance-preserving, ...) or package.module:Class."""
    path_options: Options = {}
    """Options of the path."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, if fewer than those of the other experiments; stated wherever its scores appear."""


class Toy2dSection(Section):
    """Training and scoring of the 2-D experiments; the same for all of them."""

    steps: int = Field(default=6_000, ge=1)
    """Optimizer steps of each experiment."""
    batch: int = Field(default=128, ge=1)
    """Points in one optimizer step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Learning rate of Adam at the first step; it decays to zero by a cosine schedule."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Maximum norm of the gradient."""
    width: int = Field(default=512, ge=1)
    """Width of the hidden layers of the network."""
    layers: int = Field(default=5, ge=1)
    """Number of hidden layers of the network."""
    held_out: int = Field(default=2_048, ge=2)
    """Number of validation points whose log-density is computed."""
    samples: int = Field(default=5_000, ge=1)
    """Number of points sampled from each model, in one batch."""
    nfe: tuple[Budget, ...] = (4, 8, 10, 20)
    """NFE per sample, one figure each, by the midpoint rule (2 per step)."""
    rtol: float = Field(default=1e-5, gt=0)
    """Relative tolerance of dopri5 for trajectories and for the log-density of validation points."""
    atol: float = Field(default=1e-5, gt=0)
    """Absolute tolerance of dopri5 for the same."""
    grid: int = Field(default=40, ge=2)
    """Points along each side of the density image, solved at a tolerance of 1e-3."""


class ImagesSection(Section):
    """A comparison on images: each experiment is a normal run with the settings of the other sections."""

    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Former place of reproduce.seeds, which it sets."""
    curve_images: int = Field(default=500, ge=0)
    """Images sampled at every checkpoint, for distance and NFE against images seen; 0: no curves."""
    shown_nfe: tuple[Budget, ...] = (10, 20, 40, 60, 100)
    """NFE per sample, one grid of samples each, by the midpoint rule (2 per step)."""
    shown_images: int = Field(default=16, ge=1)
    """Images in each of those grids, from index 0."""


class StudentSection(Section):
    """A model for few evaluations, trained from the models of an experiment; its network is the same."""

    name: Name
    """Short name; the directory of its run is <run>/reproduce/<teacher>-s<seed>-<name>."""
    title: str = ""
    """Name in tables and figures; by default the short name."""
    objective: str | None = None
    """Objective of a flow map, meanflow or split-meanflow, which is trained on the images of the data set."""
    objective_options: Options = {}
    """Options of the objective."""
    pairs: int = Field(default=0, ge=0)
    """Instead of an objective: number of samples of the teacher to train on, each with its noise (reflow),
    with the objective of the teacher."""
    steps: int = Field(ge=1)
    """Optimizer steps, in addition to those of the teacher."""
    learning_rate: float = Field(gt=0)
    """Largest learning rate; it is reached after a tenth of the steps, in 2-D at the first one."""
    ema_decay: float = Field(default=0.99, gt=0, lt=1)
    """Decay of the average of the weights that is sampled; in 2-D, weights are not averaged."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if bool(self.objective) == bool(self.pairs):
            raise ValueError(
                f"reproduce.few_steps.students: {self.name} needs an objective of flow maps or a number of "
                "pairs, and not both"
            )
        return self


class FewStepsSection(Section):
    """A comparison at few evaluations: solvers that need no training, and models trained for it.

    Distances are of as many images as sample.images, from the same noise. In 2-D the distance is the total
    variation on 32 cells of the board, flow maps are among the experiments, and students are reflow students
    (with pairs).
    """

    experiments: tuple[Name, ...] = ()
    """Names of the experiments that are compared; without any, this comparison is left out."""
    solvers: tuple[str, ...] = (
        "euler",
        "ab2",
        "ddim",
        "dpmpp_2m",
        "dpmpp_2m@log-snr",
        "dpmpp_2m@edm",
        "unipc",
        "unipc@log-snr",
        "unipc@edm",
        "exp_ab3",
    )
    """Solvers and time grids, as of evaluate.nfe_curve.solvers. The best one is chosen for each experiment
    and each number of evaluations."""
    nfe: tuple[int, ...] = Field(default=(1, 2, 3, 4, 6, 8, 10, 16), min_length=1)
    """Largest numbers of evaluations of the network per sample."""
    exact_nfe: int = Field(default=200, ge=4, multiple_of=4)
    """NFE of the rk4 reference solution, against which errors are measured."""
    teacher: Name | None = None
    """Experiment from whose models the students are trained, one for each seed."""
    students: tuple[StudentSection, ...] = ()
    """Models for few evaluations."""
    student_nfe: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1)
    """Evaluations per sample of the students."""

    @model_validator(mode="after")
    def _check_students(self) -> Self:
        if any(number < 1 for number in (*self.nfe, *self.student_nfe)):
            raise ValueError("reproduce.few_steps.nfe: numbers of evaluations must be at least 1")
        if self.students and self.teacher not in self.experiments:
            raise ValueError("reproduce.few_steps.students need a teacher that is one of its experiments")
        names = [student.name for student in self.students]
        if len(set(names)) < len(names):
            raise ValueError(f"reproduce.few_steps.students: a name appears twice in {', '.join(names)}")
        return self


class ReproduceSection(Section):
    """Reproduction of the paper's comparison."""

    aliases: ClassVar[Mapping[str, str]] = {"experiments": "cells", "plane": "toy2d"}

    kind: Kind = "toy2d"
    """toy2d: the 2-D checkerboard with the multilayer perceptron of the paper; images: the data set, network
    and budget of the other sections."""
    cells: tuple[ExperimentSection, ...] = ()
    """The experiments, in the order of tables and figures; a file may use the key `experiments` instead."""
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Seeds of the runs: every experiment is trained once with each. By default run.seed in 2-D, 0 on images.
    With one seed there is no verdict about training."""
    toy2d: Toy2dSection = Toy2dSection()
    """Settings of the 2-D experiments."""
    images: ImagesSection = ImagesSection()
    """Settings of a comparison on images."""
    few_steps: FewStepsSection = FewStepsSection()
    """Comparison at few evaluations."""
    parallel: int = Field(default=1, ge=1)
    """On images: number of experiments that run in parallel. They share the GPUs of this host, or its cores
    if it has none; with launch.kind slurm each is a separate job."""

    @model_validator(mode="before")
    @classmethod
    def _take_seeds_of_images(cls, keys: Any) -> Any:
        """Accept `images.seeds`, the former place of the key."""
        if not isinstance(keys, dict):
            return keys
        named = cast(dict[str, Any], keys)
        images = named.get("images")
        seeds = cast(dict[str, Any], images).get("seeds") if isinstance(images, dict) else None
        if seeds is None:
            return named
        if named.get("seeds") is not None:
            raise ValueError(
                "reproduce.images.seeds is the former place of reproduce.seeds: keep one of them"
            )
        return {**named, "images": {**cast(dict[str, Any], images), "seeds": None}, "seeds": seeds}

    @model_validator(mode="after")
    def _check_experiments(self) -> Self:
        seeds = self.seeds or ()
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"reproduce.seeds: a seed appears twice in {', '.join(map(str, seeds))}")
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise ValueError(f"reproduce.cells: two experiments have the same name: {', '.join(names)}")
        if unknown := next((name for name in self.few_steps.experiments if name not in names), None):
            raise ValueError(f"reproduce.few_steps.experiments: {unknown} is none of {', '.join(names)}")
        flow_map = next((student.name for student in self.few_steps.students if student.objective), None)
        if self.kind == "toy2d" and flow_map:
            raise ValueError(
                f"reproduce.few_steps.students: {flow_map} is a flow map; in 2-D, add it to reproduce.cells"
            )
        if self.kind == "toy2d" and self.parallel > 1:
            raise ValueError(
                "reproduce.parallel must be 1 with reproduce.kind toy2d: 2-D experiments run one at a time"
            )
        for section in self.cells:
            if self.kind == "toy2d" and section.steps is not None and section.steps > self.toy2d.steps:
                raise ValueError(
                    f"reproduce.cells: {section.name} has {section.steps} steps, more than "
                    f"reproduce.toy2d.steps = {self.toy2d.steps}"
                )
        return self
