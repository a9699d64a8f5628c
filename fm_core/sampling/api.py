"""Public Python API: load a trained model from a run, an export or a file, and sample it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fm_core.errors import UserError
from fm_core.method.objectives import Objective
from fm_core.method.solver import Solver
from fm_core.method.time_grid import grid_of
from fm_core.models.published_weights import Source
from fm_core.sampling.checkpoint_source import EXPORTED, Model, load_model, locate_model
from fm_core.sampling.generate import Draw, generate
from fm_core.sampling.guide_model import guided_by
from fm_core.sampling.model_hub import download_export, is_hub_url
from fm_core.sampling.published_models import PublishedModel, load_published
from fm_core.storage.local_paths import expand_home

__all__ = ["EXPORTED", "LoadedModel", "PublishedModel", "load"]


@dataclass(frozen=True)
class LoadedModel:
    """A trained network, its objective and a sampler."""

    model: Model
    device: torch.device

    @property
    def network(self) -> nn.Module:
        """The network: maps (t [N], x [N, C, S, S], label int64 [N] or None) to a tensor like x.

        A network of a flow map takes a fourth argument, the second time s [N].
        """
        return self.model.network

    @property
    def objective(self) -> Objective:
        """The training objective; `objective.velocity(network)` is the velocity field to solve.

        Of a flow map, `objective.displacement(network)` is the function (t, s, x) -> x_s - x_t.
        """
        return self.model.objective

    def save(self, file: str | Path) -> None:
        """Write the weights, as float32 with everything that `load` needs, to a .safetensors file.

        The file can be given to `load`, sample.weights and train.init_from. A leading ~ is expanded.

        Raises:
            OSError: the file cannot be written.
        """
        path, recipe = expand_home(file), {"recipe": json.dumps(self.model.recipe)}
        partial = path.with_name(f".{path.name}.partial")
        weights = {name: weight.cpu().contiguous() for name, weight in self.network.state_dict().items()}
        try:
            save_file(weights, partial, recipe)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        partial.replace(path)

    def sample(
        self,
        images: int,
        *,
        seed: int = 0,
        first: int = 0,
        classes: Sequence[int] = (),
        class_mode: Literal["drawn", "balanced", "in-turn"] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: "LoadedModel | None" = None,
        solver: str | Solver = "dopri5",
        rtol: float | None = None,
        atol: float | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] = "uniform",
        error_norm: Literal["batch", "worst"] = "batch",
        batch: int = 250,
    ) -> Tensor:
        """Generate the images with indices first .. first + images - 1 of a seed, uint8 [images, C, S, S].

        At most `batch` images are solved together, split at multiples of `batch`. Complete batches are
        bit-identical to those of `fm sample` with the same settings. A partial batch differs: by rounding
        with fixed steps, and by its step sizes with an adaptive solver.

        `solver` is a name, used with the settings that follow it as in the sample section, or a
        `fm_core.method.solver.Solver`, which contains all settings.

        `class_mode` and `guidance_interval` are as in the sample section; `guide` is the weaker model of
        autoguidance.

        Raises:
            UserError: the model or the solver does not support this request.
            ValueError: `images` or `batch` is less than 1, `first` is negative, or `seed` is not in
                0 .. 2^64 - 1.
        """
        if images < 1 or batch < 1 or first < 0:
            raise ValueError(
                f"images {images} and batch {batch} must be at least 1, first {first} at least 0"
            )
        if isinstance(solver, str):
            solver = Solver(solver, rtol, atol, steps, error_norm, grid_of(grid))
        elif (rtol, atol, steps, grid, error_norm) != (None, None, None, "uniform", "batch"):
            raise UserError("a Solver has its own settings; give it none beside rtol, atol, steps and grid")
        draw = Draw(
            solver, seed, guidance, classes, guidance_interval=guidance_interval, class_mode=class_mode
        )
        model = self.model if guide is None else guided_by(self.model, guide.model, guidance_interval)
        draw.check(model)
        last = first + images
        cuts = [first, *range((first // batch + 1) * batch, last, batch), last]
        parts = [generate(model, draw, a, b - a, self.device).images for a, b in pairwise(cuts)]
        return torch.cat(parts)


def load(
    where: str | Path,
    weights: str = "ema",
    step: int | Literal["latest", "best"] = "latest",
    device: torch.device | str | None = None,
    trust_code: bool = False,
    published: Source | PublishedModel | None = None,
) -> LoadedModel:
    """Load a model from a run directory, an exported folder, a weights file, or the Hugging Face hub.

    Args:
        where: the directory or file, or hf://USER/NAME or hf://USER/NAME@REVISION for what `fm export` wrote
            there. Nothing else is downloaded.
        weights: for a run: ema, ema-<decay> or raw.
        step: for a run: optimizer step of the checkpoint, latest, or best (lowest validation loss).
        device: by default the first GPU, or the CPU.
        trust_code: import user-defined classes named by a weights file or an exported folder; those named by
            a run directory's own config.yaml are always imported. Importing a module runs its code.
        published: for a .pt or .safetensors file of SiT, DiT or ADM: whose it is (sit, dit, adm), or a
            `PublishedModel`, which also has what the tensors do not determine.

    Raises:
        UserError: there are no weights to load, their hash differs, or they name code that is not trusted.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if is_hub_url(where):
        where = download_export(str(where))
    if published:
        named = published if isinstance(published, PublishedModel) else PublishedModel(published)
        return LoadedModel(load_published(expand_home(where), named, chosen), chosen)
    path, config = locate_model(where, weights, step)
    return LoadedModel(load_model(path, chosen, config, trust_code), chosen)
