"""The comparison of objectives: which are compared, on what, and how they are scored."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fm_core.config.section import Name, Options, Section

Budget = Annotated[int, Field(ge=2, multiple_of=2)]


class ExperimentSection(Section):
    """One column of the comparison: an objective on a path."""

    name: Name
    """Short name; its directory is <run>/reproduce/<name>."""
    title: str = ""
    """What tables and figures call it; by default the objective and the path."""
    objective: str
    """A built-in objective (flow-matching, score-matching, ...) or package.module:Class."""
    objective_options: Options = {}
    """The objective's own numbers and words."""
    path: str
    """A built-in path (optimal-transport, variance-preserving, ...) or package.module:Class."""
    path_options: Options = {}
    """The path's own numbers and words."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps where they are fewer than everybody's; shown wherever the cell's numbers are."""


class PlaneSection(Section):
    """Training and scoring in the plane, the same for every cell."""

    steps: int = Field(default=6_000, ge=1)
    """Optimizer steps of each cell."""
    batch: int = Field(default=128, ge=1)
    """Points in one optimizer step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Learning rate of Adam at the first step; it falls to zero along half a cosine."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    width: int = Field(default=512, ge=1)
    """Neurons of a hidden layer of the network."""
    layers: int = Field(default=5, ge=1)
    """Hidden layers of the network."""
    held_out: int = Field(default=2_048, ge=2)
    """Held-out points whose log-density is computed."""
    samples: int = Field(default=5_000, ge=1)
    """Points that are drawn from each model, solved together."""
    nfe: tuple[Budget, ...] = (4, 8, 10, 20)
    """Evaluations of the network a sample, for each picture made with the midpoint rule (2 a step)."""
    rtol: float = Field(default=1e-5, gt=0)
    """Relative tolerance of dopri5, for trajectories and for the log-density of held-out points."""
    atol: float = Field(default=1e-5, gt=0)
    """Absolute tolerance of dopri5, likewise."""
    grid: int = Field(default=40, ge=2)
    """Points along each side of the picture of the density, solved at a tolerance of 1e-3."""


class ImagesSection(Section):
    """A comparison on images: each cell is a plain run with the settings of the other sections."""

    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of the runs; every cell is trained once with each."""
    curve_images: int = Field(default=500, ge=0)
    """Images sampled at every checkpoint, for distance and NFE against images seen; 0 leaves that out."""
    shown_nfe: tuple[Budget, ...] = (10, 20, 40, 60, 100)
    """Evaluations of the network for each picture of samples, by the midpoint rule (2 a step)."""
    shown_images: int = Field(default=16, ge=1)
    """Images in each of those pictures, from number 0 on."""


class ReproduceSection(Section):
    """The comparison of the paper."""

    kind: Literal["plane", "images"] = "plane"
    """plane: the two-dimensional checkerboard, with the multilayer perceptron of the paper; images: the data
    set, network and budget of the other sections."""
    cells: tuple[ExperimentSection, ...] = ()
    """What is compared, in the order of tables and figures."""
    plane: PlaneSection = PlaneSection()
    """Settings of the plane."""
    images: ImagesSection = ImagesSection()
    """Settings of a comparison on images."""
    parallel: int = Field(default=1, ge=1)
    """On images: cells that are made at a time. The GPUs of this host are shared out among them; where there
    are none, its cores; with launch.kind slurm each is a job of its own."""

    @model_validator(mode="after")
    def _cells_are_told_apart(self) -> Self:
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise ValueError(f"reproduce.cells: two cells have one name among {', '.join(names)}")
        if self.kind == "plane" and self.parallel > 1:
            raise ValueError("reproduce.parallel: the cells of the plane are made one after another")
        for cell in self.cells:
            if self.kind == "plane" and cell.steps is not None and cell.steps > self.plane.steps:
                raise ValueError(
                    f"reproduce.cells: {cell.name} asks for {cell.steps} steps, more than the others' "
                    f"reproduce.plane.steps = {self.plane.steps}"
                )
        return self
