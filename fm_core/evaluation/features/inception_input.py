"""InceptionV3 with the resizing of other programs, and with the spatial features of sFID.

The network has torch-fidelity's structure, which resizes its input as TensorFlow 1 does. Another resizing
replaces the input of the first convolution and leaves all subsequent layers unchanged.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from fm_core.config.protocols import Resize

SIDE = 299
"""Height and width of the network's input."""
SPATIAL_CHANNELS = 7
"""Channels of the layer mixed_6/conv that sFID uses: 7 x 17 x 17 = 2,023 features."""


def torch_bilinear(images: Tensor) -> Tensor:
    """Prepare the input as pytorch-fid does: resize images in 0 .. 1, then scale them to -1 .. 1.

    uint8 [N, 3, H, W] -> float32 [N, 3, 299, 299].
    """
    resized = interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def pillow_bicubic(images: Tensor) -> Tensor:
    """Prepare the input as clean-fid does: Pillow's bicubic filter on each channel in float32, unrounded.

    uint8 [N, 3, H, W] -> float32 [N, 3, 299, 299] in -1 .. 127/128.
    """
    # With antialias, PyTorch uses the same kernel and support as Pillow, whose weights are float64.
    resized = interpolate(
        images.double(), size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True
    )
    return (resized.float().clamp(0, 255) - 128) / 128


INPUTS: Mapping[Resize, Callable[[Tensor], Tensor] | None] = MappingProxyType(
    {"tensorflow1-bilinear": None, "torch-bilinear": torch_bilinear, "pillow-bicubic": pillow_bicubic}
)
"""Function that prepares the network's input, by name of the resizing; None selects the network's own."""


class InceptionVariant(nn.Module):
    """uint8 [N, 3, H, W] -> (features [N, 2048], logits [N, 1008]), plus [N, 17, 17, 7] if `spatial`.

    `network` returns features and logits, and has the layers Conv2d_1a_3x3 and Mixed_6d of torch-fidelity.
    The spatial features have the same order as mu_s and sigma_s in the files of guided-diffusion.
    """

    def __init__(self, network: nn.Module, resize: Resize, spatial: bool = False) -> None:
        super().__init__()
        self.network = network
        self._make_input = INPUTS[resize]
        self._input: Tensor | None = None
        self._spatial: Tensor | None = None
        layers: Any = network
        if self._make_input is not None:
            layers.Conv2d_1a_3x3.register_forward_pre_hook(self._replace_input)
        self._with_spatial = spatial
        if spatial:
            layers.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return features, logits, and the spatial features if they were requested."""
        if self._make_input is not None:
            self._input = self._make_input(images)
        features, logits = self.network(images)
        outputs = (features, logits)
        if self._with_spatial:
            assert self._spatial is not None, "the network has run"
            outputs = (*outputs, self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).contiguous())
        self._input = self._spatial = None
        return outputs

    def _replace_input(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._input is not None, "forward has made it"
        return (self._input, *arguments[1:])

    def _keep_spatial(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._spatial = output
