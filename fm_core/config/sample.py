"""The sample section: sampling images from a trained model."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fm_core.config.location import Location
from fm_core.config.section import Section

GRIDS = ("uniform", "log-snr", "edm", "cosine", "shift")
"""Names of time grids."""
Diffusion = Literal["sbdm", "constant", "sigma", "linear", "decreasing", "increasing-decreasing"]


class StochasticSection(Section):
    """Noise that a sampler adds in each step; the marginals are those of the ODE."""

    diffusion: Diffusion = "sbdm"
    """Of solver sde: form of the diffusion coefficient D(t), as in SiT. sbdm: that of the diffusion with the
    path's marginals; constant; sigma: sigma_t; linear: 1 - t; decreasing; increasing-decreasing."""
    scale: float = Field(default=1.0, ge=0)
    """Of solver sde: factor of the diffusion coefficient; 0: no noise is added."""
    churn: float = Field(default=0.0, ge=0)
    """Of solver edm: EDM's S_churn; 0: no noise is added."""
    churn_min: float = Field(default=0.0, ge=0)
    """Of solver edm: EDM's S_tmin, the lowest sigma_t / alpha_t at which noise is added."""
    churn_max: float | None = Field(default=None, gt=0)
    """Of solver edm: EDM's S_tmax, the highest sigma_t / alpha_t at which noise is added; null: no limit."""
    churn_noise: float = Field(default=1.0, gt=0)
    """Of solver edm: EDM's S_noise, the standard deviation of the noise that is added."""


class GuideSection(Section):
    """The weaker model of autoguidance; without any key, guidance is classifier-free."""

    run: Location | None = None
    """Run directory, exported folder or .safetensors file of the weaker model; by default this run."""
    weights: str | None = None
    """Its weights: ema, ema-<decay>, ema-power-<width> or raw; by default those of sample.weights in this
    run, and ema in another."""
    step: int | Literal["latest", "best"] | None = None
    """Optimizer step of its checkpoint; by default that of sample.step in this run, and latest in another."""

    @property
    def named(self) -> bool:
        """Whether a key names a weaker model."""
        return any(key is not None for key in (self.run, self.weights, self.step))


class SampleSection(Section):
    """Sampling images from a trained model."""

    images: int = Field(default=1_000, ge=1)
    """Number of images; image i depends only on (seed, i)."""
    batch: int = Field(default=250, ge=1)
    """Images solved in one batch; adaptive step sizes depend on it, so it is part of the evaluation protocol.
    """
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the noise of the samples."""
    weights: Location = "ema"
    """ema (the first of train.ema_decays), ema-<decay>, raw, or a .safetensors file of weights."""
    step: int | Literal["latest", "best"] = "latest"
    """Optimizer step of the checkpoint to sample from; best: the one with the lowest
    validation loss."""
    solver: str = "dopri5"
    """dopri5, euler, midpoint, heun2, rk4 or another method of torchdiffeq; ddim, dpmpp_2m, dpmpp_3m,
    exp_ab3, unipc or ab2, with one evaluation per step; sde or edm, which add noise (sample.stochastic); or
    flow_map, with one evaluation per step, of a model of meanflow or split-meanflow."""
    rtol: float | None = Field(default=None, gt=0)
    """Relative tolerance of an adaptive solver; by default 1e-5."""
    atol: float | None = Field(default=None, gt=0)
    """Absolute tolerance of an adaptive solver; by default 1e-5."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of a fixed-step solver; by default those of the list sample.grid."""
    grid: str | tuple[float, ...] = "uniform"
    """Times of the steps of a fixed-step solver. uniform: equal steps in t; log-snr: equal steps in log-SNR;
    edm: Karras et al. 2022; cosine: log-SNR of the cosine schedule; shift: uniform, shifted as in SD3; or a
    list of times, from the start of the interval to its end."""
    grid_rho: float | None = Field(default=None, gt=0)
    """Exponent rho of the grid edm; by default 7."""
    grid_shift: float | None = Field(default=None, gt=0)
    """Shift of the grid shift, e.g. 3; above 1, more steps are near the noise."""
    grid_bounds: tuple[float, float] | None = None
    """Smallest and largest sigma_t / alpha_t between the ends of the grids log-snr and edm; by default
    0.001 and 1000, and 0.002 and 80."""
    error_norm: Literal["batch", "worst"] | None = None
    """Norm of the error that an adaptive solver controls. batch: the RMS over all images of a batch; worst:
    the largest RMS of an image."""
    stochastic: StochasticSection = StochasticSection()
    """Noise that the solvers sde and edm add."""
    guidance: float = Field(default=1.0, ge=0)
    """Scale of guidance; 1: none. Other scales run the network twice per evaluation, or this network and that
    of sample.guide."""
    guidance_interval: tuple[float, float] | None = None
    """Interval of t, with both ends, in which to guide; t = 0 is noise and t = 1 data. Outside of it an
    evaluation runs the network once."""
    guide: GuideSection = GuideSection()
    """A weaker model that guides, for autoguidance."""
    classes: tuple[int | str, ...] = ()
    """Classes to sample, by number or by name; by default all."""
    class_mode: Literal["drawn", "balanced", "in-turn"] | None = None
    """How images get these classes. drawn: at random by (seed, number); balanced: every class once among each
    as many images as there are classes, in an order drawn by (seed, block); in-turn: cycled by image number.
    By default in-turn for given classes, and drawn for all."""
    trajectories: int = Field(default=8, ge=0, le=64)
    """Images whose trajectories from noise are saved, from index 0; this costs no evaluations."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the network. bf16: bfloat16 weights; tf32: float32 weights, TF32 matrix products on GPUs
    (several times as fast as fp32); fp32: float32 throughout. The solver's state is always float32."""
    compile: bool = False
    """Compile the network with torch.compile for batches of sample.batch; the first batch takes minutes."""
    cuda_graphs: bool = False
    """With sample.compile: replay the network as one CUDA graph."""
    root: Location | None = None
    """fsspec URL for samples; by default samples in the run directory."""
    store: Literal["uint8", "float16", "float32"] = "uint8"
    """What is stored of a sample. uint8: its intensity levels; float16, float32: beside them also the end of
    its trajectory, as pairs for reflow need it (data.pairs)."""

    trust_code: bool = False
    """Import classes that are named only by the weights file, not by this configuration (also: --trust-code).
    Importing a module runs its code."""

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: str | tuple[float, ...]) -> str | tuple[float, ...]:
        if isinstance(grid, str) and grid not in GRIDS:
            raise ValueError(f"sample.grid {grid}: allowed: {', '.join(GRIDS)}, or a list of times")
        return grid

    @property
    def class_order(self) -> Literal["drawn", "balanced", "in-turn"]:
        """How images get their classes: class_mode or its default."""
        return self.class_mode or ("in-turn" if self.classes else "drawn")

    @model_validator(mode="after")
    def _check_guidance(self) -> Self:
        if self.guidance == 1 and (ignored := self.set_without("guidance", "guidance_interval", "guide")):
            raise ValueError(f"sample.{ignored[0]} does nothing without sample.guidance, e.g. 2")
        interval = self.guidance_interval
        if interval and not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"sample.guidance_interval {list(interval)}: its ends must increase, within 0 .. 1"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if not self.compile and self.set_without("compile", "cuda_graphs"):
            raise ValueError("sample.cuda_graphs does nothing without sample.compile: true")
        return self
