"""The sections of the configuration tree.

Every key has a unit, a meaning and a default; unknown keys are refused. Counts of images are
images seen by the optimizer, never epochs.
"""

from typing import Literal

from pydantic import Field, model_validator

from fm_core.config.section import Name, Options, Section, Stage


class RunSection(Section):
    """Where a run lives and the seed of everything random in it."""

    name: Name = "run"
    """Name of the run; its directory is <run.root>/<run.name>."""
    root: str = "runs"
    """Directory that holds the run directories; a path of the submitting host."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of data order, noise, times, dequantisation, initial weights and samples."""


class ModelSection(Section):
    """The network."""

    kind: Literal["unet"] = "unet"
    """unet: the U-Net of Dhariwal and Nichol (2021)."""
    channels: int = Field(default=32, ge=8)
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2)
    """Channels at each resolution, in multiples of model.channels."""
    residual_blocks: int = Field(default=1, ge=1)
    """Residual blocks at each resolution."""
    attention_resolutions: tuple[int, ...] = (4,)
    """Image sides, in pixels, at which attention follows each residual block."""
    head_channels: int = Field(default=32, ge=4)
    """Channels of one attention head."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping an activation inside a residual block."""
    scale_shift: bool = True
    """Time and class modulate the normalised activations by scale and shift, not by addition."""
    resample_with_residual_blocks: bool = True
    """Change the resolution inside a residual block instead of by a strided convolution."""
    class_conditional: bool = False
    """Condition on the data set's labels."""


class MethodSection(Section):
    """The probability path, what is regressed, and how training pairs and times are drawn."""

    path: str = "optimal-transport"
    """A built-in path (optimal-transport, variance-preserving, ...) or package.module:Class."""
    path_options: Options = {}
    """The path's own numbers, e.g. {sigma_min: 1e-5}."""
    objective: str = "flow-matching"
    """A built-in objective (flow-matching, score-matching, ...) or package.module:Class."""
    objective_options: Options = {}
    """The objective's own numbers."""
    coupling: str = "independent"
    """How noise and data are paired: independent or minibatch-optimal-transport."""
    coupling_options: Options = {}
    """The coupling's own numbers, e.g. {block: 64}."""
    times: str = "uniform"
    """Distribution of t: uniform, logit-normal or edm."""
    times_options: Options = {}
    """The time distribution's own numbers."""


class TrainSection(Section):
    """Optimisation, checkpoints and what is logged."""

    images: int = Field(default=128_000, ge=1)
    """Train until this many images were seen."""
    global_batch: int = Field(default=128, ge=1)
    """Images in one optimizer step, over all processes; independent of the hardware."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Images in one forward pass of one process; by default the global batch over the processes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up, down to zero at train.images."""
    warmup_images: int = Field(default=0, ge=0)
    """The learning rate rises linearly from zero over this many images."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 leaves it alone."""
    ema_decays: tuple[float, ...] = (0.999,)
    """Decay per optimizer step of each exponential moving average of the weights."""
    ema_warmup: bool = True
    """Use min(decay, (1 + steps) / (10 + steps)) so that early averages forget the initial weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    zero_stage: Stage = 1
    """DeepSpeed's ZeRO stage."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the network with torch.compile."""
    log_images: int = Field(default=12_800, ge=1)
    """Log after every so many images."""
    checkpoint_images: int = Field(default=64_000, ge=1)
    """Save a checkpoint after every so many images."""
    checkpoint_root: str | None = None
    """fsspec URL for checkpoints; by default train/checkpoints in the run directory."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """How many of the newest complete checkpoints stay."""
    init_from: str | None = None
    """Run directory or ema-*.safetensors file whose weights to start from."""

    @model_validator(mode="after")
    def _decays_are_rates(self) -> "TrainSection":
        if not self.ema_decays or any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError("train.ema_decays must hold at least one number between 0 and 1")
        return self


class LaunchSection(Section):
    """The processes that train and sample."""

    kind: Literal["local"] = "local"
    """local: torchrun on this machine."""
    processes: int | None = Field(default=None, ge=1)
    """Processes; by default one per GPU, or two where there is none."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; by default the cores over the processes."""


class SampleSection(Section):
    """Images from a trained model."""

    images: int = Field(default=1_000, ge=1)
    """How many images; image number i depends on (seed, i) alone."""
    batch: int = Field(default=250, ge=1)
    """Images solved together; adaptive step sizes depend on it, so it is part of the protocol."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the noise of the samples."""
    weights: str = "ema"
    """ema (the first of train.ema_decays), ema-<decay>, or raw."""
    step: int | Literal["latest"] = "latest"
    """Optimizer step of the checkpoint to sample from."""
    solver: str = "dopri5"
    """dopri5, euler, midpoint, heun2, rk4 or another of torchdiffeq's methods."""
    rtol: float | None = Field(default=None, gt=0)
    """Relative tolerance of an adaptive solver; by default 1e-5."""
    atol: float | None = Field(default=None, gt=0)
    """Absolute tolerance of an adaptive solver; by default 1e-5."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of a fixed-step solver."""
    root: str | None = None
    """fsspec URL for samples; by default samples in the run directory."""


class LikelihoodSection(Section):
    """Bits per dimension of held-out images."""

    images: int = Field(default=0, ge=0)
    """Held-out images to score, from the first on; 0 leaves the likelihood out."""
    batch: int = Field(default=64, ge=1)
    """Images solved together."""
    draws: int = Field(default=1, ge=1)
    """K, the uniform dequantisation draws of each image; the headline is K = 1."""
    rtol: float = Field(default=1e-5, gt=0)
    """Relative tolerance of dopri5."""
    atol: float = Field(default=1e-5, gt=0)
    """Absolute tolerance of dopri5."""

    @model_validator(mode="after")
    def _error_can_be_told(self) -> "LikelihoodSection":
        if self.images == 1:
            raise ValueError("evaluate.likelihood.images is 1; a standard error needs at least 2")
        return self


class EvaluateSection(Section):
    """Scores of samples and of the model."""

    features: Literal["classifier"] = "classifier"
    """classifier: a network trained on the data set's own labels; never called FID."""
    likelihood: LikelihoodSection = LikelihoodSection()
    """Bits per dimension."""


class ReportSection(Section):
    """The page that shows a run."""

    neighbours: int = Field(default=16, ge=0)
    """Samples shown beside their nearest training images."""
