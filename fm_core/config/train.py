"""The train section: optimization, checkpoints and metrics."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fm_core.config.location import Location
from fm_core.config.performance import PerformanceSection
from fm_core.config.section import Section, Stage


class TrainSection(Section):
    """Optimization, checkpoints and metrics."""

    aliases: ClassVar[Mapping[str, str]] = {"held_out_images": "validation_images"}

    images: int = Field(default=128_000, ge=1)
    """Total number of training images to see. By default it grows with the number and size of the images; the
    value shown is that for the digits."""
    global_batch: int = Field(default=128, ge=1)
    """Images in one optimizer step, over all processes; independent of the hardware."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Largest number of images in one forward pass of one process; by default global_batch / processes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW; by default lower for wider networks."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule after warm-up; linear and cosine decay to zero at train.images."""
    warmup_images: int = Field(default=0, ge=0)
    """The learning rate rises linearly from zero over this many images."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas (decay rates of the first and second moments), each at least 0 and below 1."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    label_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Label dropout: probability of hiding the label in training, as classifier-free guidance requires."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Maximum norm of the gradient; 0 turns clipping off."""
    ema_decays: tuple[float, ...] = (0.999,)
    """Decay per optimizer step of each exponential moving average of the weights; by default 0.9999 from
    10,000 steps on."""
    ema_warmup: bool = True
    """Use min(decay, (1 + steps) / (10 + steps)) so that early averages forget the initial weights."""
    ema_power_widths: tuple[float, ...] = ()
    """Relative widths of power-function EMAs (EDM2: 0.05, 0.10), from which any width can be made later."""
    snapshot_images: int | None = Field(default=None, ge=1)
    """Interval of permanent snapshots of the power-function EMAs, in images; None: never."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    zero_stage: Stage = 1
    """DeepSpeed's ZeRO stage."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and takes more time."""
    speed: PerformanceSection = PerformanceSection()
    """Performance options."""
    log_images: int = Field(default=12_800, ge=1)
    """Logging interval in images."""
    checkpoint_images: int = Field(default=64_000, ge=1)
    """Checkpoint interval in images; by default at least a twentieth of train.images."""
    checkpoint_root: Location | None = None
    """fsspec URL for checkpoints; by default train/checkpoints in the run directory."""
    checkpoint_staging: Location | None = None
    """Local folder for checkpoints until they are uploaded; by default train/staging in the run directory."""
    start_over: bool = False
    """Start again at step 0, once; checkpoints and metrics are renamed, not deleted."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Number of newest complete checkpoints to keep, besides the one with the lowest validation loss."""
    keep_every_images: int | None = Field(default=None, ge=1)
    """Keep the first checkpoint at or after every multiple of this many images permanently."""
    validation_images: int = Field(default=1024, ge=0)
    """Number of validation images, from the first, whose loss is measured at every checkpoint; 0: never."""
    hang_seconds: float = Field(default=600.0, gt=0)
    """Fail the job if no rank makes progress for this many seconds (three times that for the first step)."""
    skipped_limit: int = Field(default=8, ge=1)
    """Consecutive steps with non-finite gradients after which training rolls back, once, to a checkpoint."""
    init_from: Location | None = None
    """Run directory, or .safetensors or .pt file, with the initial weights; a file may also contain weights
    of a published U-Net or transformer with the parameter names of guided-diffusion, DiT or SiT."""
    init_source: Literal["sit", "dit", "adm"] | None = None
    """Whose weights such a published file has. sit needs model.time_scale 1, dit and adm (DDPM's steps) need
    1000; by default those of a U-Net whose time is that of this network, as saved by torchcfm."""
    init_attention_order: Literal["legacy", "new"] = "legacy"
    """Attention order of a published U-Net: new if it was trained with use_new_attention_order."""
    prometheus: Location | None = None
    """Directory of node_exporter's textfile collector, where the newest metrics of the run are written."""
    tensorboard: bool = False
    """Write TensorBoard event files to train/tensorboard in the run directory; needs tensorboardX."""
    wandb: str | None = None
    """Weights & Biases project to log the metrics to; needs wandb and WANDB_API_KEY."""

    @model_validator(mode="after")
    def _check_values(self) -> "TrainSection":
        for key in ("init_source", "init_attention_order"):
            if not self.init_from and self.set_without("init_from", key):
                raise ValueError(f"train.{key} does nothing without train.init_from")
        if self.init_source in ("sit", "dit") and self.init_attention_order != "legacy":
            raise ValueError(
                f"train.init_attention_order {self.init_attention_order} is of a U-Net (adm), and "
                f"train.init_source {self.init_source} of a transformer: remove it"
            )
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be at least 0 and below 1, not {list(self.betas)}")
        if not self.ema_decays or any(not 0 < decay < 1 for decay in self.ema_decays):
            raise ValueError("train.ema_decays must contain at least one number, each between 0 and 1")
        for key in ("ema_decays", "ema_power_widths"):
            names = [f"{number:g}" for number in getattr(self, key)]
            if len(set(names)) < len(names):
                raise ValueError(f"train.{key}: two averages would have the same name: {', '.join(names)}")
        if any(not 0 < width <= 0.28 for width in self.ema_power_widths):
            raise ValueError("train.ema_power_widths must be between 0 and 0.28")
        if self.snapshot_images and not self.ema_power_widths:
            raise ValueError("train.snapshot_images needs train.ema_power_widths, e.g. [0.05, 0.1]")
        return self
