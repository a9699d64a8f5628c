"""The train section: optimisation, checkpoints, log."""

from typing import Literal

from pydantic import Field, model_validator

from fm_core.config.section import Section, Stage
from fm_core.config.speed import SpeedSection


class TrainSection(Section):
    """Optimisation, checkpoints and what is logged."""

    images: int = Field(default=128_000, ge=1)
    """Train until this many images were seen."""
    global_batch: int = Field(default=128, ge=1)
    """Images in one optimizer step, over all processes; independent of the hardware."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Most images in one forward pass of one process; by default the global batch over the processes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up, down to zero at train.images."""
    warmup_images: int = Field(default=0, ge=0)
    """The learning rate rises linearly from zero over this many images."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the means of gradient and of its square, each at least 0 and below 1."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    label_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the labels that training hides from the network, as sampling with guidance needs it."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 leaves it alone."""
    ema_decays: tuple[float, ...] = (0.999,)
    """Decay per optimizer step of each exponential moving average of the weights."""
    ema_warmup: bool = True
    """Use min(decay, (1 + steps) / (10 + steps)) so that early averages forget the initial weights."""
    ema_power_widths: tuple[float, ...] = ()
    """Relative widths of power-function averages (EDM2: 0.05, 0.10); any width can be made of them later."""
    snapshot_images: int | None = Field(default=None, ge=1)
    """Keep the power-function averages of every so many images, for good; None: not at all."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    zero_stage: Stage = 1
    """DeepSpeed's ZeRO stage."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    speed: SpeedSection = SpeedSection()
    """Ways to the same losses in less time."""
    log_images: int = Field(default=12_800, ge=1)
    """Log after every so many images."""
    checkpoint_images: int = Field(default=64_000, ge=1)
    """Save a checkpoint after every so many images."""
    checkpoint_root: str | None = None
    """fsspec URL for checkpoints; by default train/checkpoints in the run directory."""
    checkpoint_staging: str | None = None
    """Local folder where checkpoints wait for their upload; by default train/staging in the run directory."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """How many of the newest complete checkpoints stay; the one of the lowest held-out loss stays as well."""
    keep_every_images: int | None = Field(default=None, ge=1)
    """The first checkpoint at or after every multiple of so many images stays for good."""
    held_out_images: int = Field(default=1024, ge=0)
    """The loss of so many held-out images, the first ones, is measured at every checkpoint; 0: never."""
    hang_seconds: float = Field(default=600.0, gt=0)
    """A job in which nothing moves for so many seconds has failed; a first step may take three times that."""
    skipped_limit: int = Field(default=8, ge=1)
    """Steps in a row whose gradient is not finite before training goes back, once, to its last checkpoint."""
    init_from: str | None = None
    """Run directory or .safetensors file whose weights to start from; a file may also hold the weights of a
    public UNet under guided-diffusion's names, as torchcfm keeps them."""
    init_attention_order: Literal["legacy", "new"] = "legacy"
    """Of such a public file: new where its use_new_attention_order was set."""
    prometheus: str | None = None
    """Directory of node_exporter's textfile collector, for the newest metrics of the run."""
    tensorboard: bool = False
    """Write TensorBoard's event files into train/tensorboard in the run directory; needs tensorboardX."""
    wandb: str | None = None
    """Project at Weights & Biases to copy the metrics to; needs wandb and its WANDB_API_KEY."""

    @model_validator(mode="after")
    def _decays_are_rates(self) -> "TrainSection":
        if not self.init_from and self.idle("init_from", "init_attention_order"):
            raise ValueError("train.init_attention_order does nothing without train.init_from")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must lie in 0 <= beta < 1, unlike {list(self.betas)}")
        if not self.ema_decays or any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError("train.ema_decays must hold at least one number between 0 and 1")
        for key in ("ema_decays", "ema_power_widths"):
            names = [f"{number:g}" for number in getattr(self, key)]
            if len(set(names)) < len(names):
                raise ValueError(f"train.{key}: two averages would have one name among {', '.join(names)}")
        if any(not 0 < width <= 0.28 for width in self.ema_power_widths):
            raise ValueError("train.ema_power_widths must lie between 0 and 0.28")
        if self.snapshot_images and not self.ema_power_widths:
            raise ValueError("train.snapshot_images needs train.ema_power_widths, e.g. [0.05, 0.1]")
        return self
