"""DiT, SiT and ADM's U-Net, written from their papers, with the names and shapes of the public files.

They share no code with fm_core, compute in the dtype of their weights, and embed times as the public networks
do: SiT the time from noise (0) to data (1), DiT and ADM the number of DDPM's step, 0 to 999.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoids(t, width):
    """Cosines, then sines, of t at frequencies from 1 down to 1e-4."""
    powers = torch.arange(width // 2, dtype=t.dtype) * 2 / width
    angles = t[:, None] / 10_000**powers
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_embedding(side, width, dtype):
    """Position embedding [1, side^2, width]: the column in the first half of the channels, then the row."""
    quarter = width // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    table = torch.zeros(side, side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            parts = [f(frequency * place) for place in (column, row) for f in (torch.sin, torch.cos)]
            table[row, column] = torch.cat(parts)
    return table.view(1, side * side, width).to(dtype)


def standardized(x):
    """Layer normalization without weights, epsilon 1e-6."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class _Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        outputs = []
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        for part in torch.arange(x.shape[-1]).chunk(self.heads):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(len(part))
            outputs.append(scores.softmax(-1) @ v[..., part])
        return self.proj(torch.cat(outputs, -1))


class _Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        b1, g1, a1, b2, g2, a2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + a1 * self.attn(standardized(x) * (1 + g1) + b1)
        h = self.mlp["fc1"](standardized(x) * (1 + g2) + b2)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return x + a2 * self.mlp["fc2"](h)


class PublicTransformer(nn.Module):
    """DiT or SiT: (x, t, label) -> [N, channels, S, S], twice the channels with `variances`."""

    def __init__(self, side, channels, patch, width, depth, heads, classes, variances, dtype=torch.float32):
        super().__init__()
        self.patch, self.outputs = patch, channels * (2 if variances else 1)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        layers = (nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "linear": nn.Linear(width, patch * patch * self.outputs),
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            }
        )
        self.to(dtype)
        self.pos_embed.data = grid_embedding(side // patch, width, dtype)

    def forward(self, x, t, label):
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](sinusoids(t, 256)) + self.y_embedder["embedding_table"](label)
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        patches = self.final_layer["linear"](standardized(tokens) * (1 + scale) + shift)
        # fold wants the channels before the places in a patch.
        patches = patches.unflatten(2, (self.patch**2, self.outputs)).transpose(2, 3).flatten(2)
        return F.fold(patches.transpose(1, 2), x.shape[2:], self.patch, stride=self.patch)


def _normalized(layer, x):
    return F.group_norm(x, 32, layer.weight, layer.bias, 1e-5)


class _Residual(nn.Module):
    def __init__(self, inputs, outputs, features, scale_shift, resampling):
        super().__init__()
        self.scale_shift, self.resampling = scale_shift, resampling
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(features, (1 + scale_shift) * outputs))
        last = (
            nn.GroupNorm(32, outputs),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.out_layers = nn.Sequential(*last)
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def _resampled(self, x):
        if self.resampling == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.resampling == "up" else x

    def forward(self, x, c):
        h = self.in_layers[2](self._resampled(F.silu(_normalized(self.in_layers[0], x))))
        vector = self.emb_layers(c)[:, :, None, None]
        if self.scale_shift:
            scale, shift = vector.chunk(2, dim=1)
            h = _normalized(self.out_layers[0], h) * (1 + scale) + shift
        else:
            h = _normalized(self.out_layers[0], h + vector)
        return self.skip_connection(self._resampled(x)) + self.out_layers[1:](h)


class _PixelAttention(nn.Module):
    def __init__(self, channels, head_channels, new_order):
        super().__init__()
        self.heads, self.new_order = channels // head_channels, new_order
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, _):
        everything = self.qkv(_normalized(self.norm, x).flatten(2))  # [N, 3 channels, pixels]
        if self.new_order:  # all queries, all keys, all values; each with its heads
            q, k, v = (part.chunk(self.heads, 1) for part in everything.chunk(3, 1))
        else:  # queries, keys and values of each head
            q, k, v = zip(*(head.chunk(3, 1) for head in everything.chunk(self.heads, 1)), strict=True)
        outputs = []
        for query, key, value in zip(q, k, v, strict=True):
            scores = (query.transpose(1, 2) @ key / math.sqrt(query.shape[1])).softmax(-1)
            outputs.append(value @ scores.transpose(1, 2))
        return x + self.proj_out(torch.cat(outputs, 1)).view_as(x)


class _Plain(nn.Module):
    """Resampling by a convolution."""

    def __init__(self, channels, kind):
        super().__init__()
        if kind == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, _):
        return (
            self.op(x)
            if hasattr(self, "op")
            else self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        )


class PublicUNet(nn.Module):
    """ADM's U-Net: (x, step, label or None) -> [N, channels, S, S], twice the channels with `variances`."""

    def __init__(
        self,
        channels,
        width,
        multipliers,
        blocks,
        attention_levels,
        head_channels,
        classes,
        scale_shift,
        resblock_updown,
        new_order,
        variances,
    ):
        super().__init__()
        self.width, features = width, 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, features), nn.SiLU(), nn.Linear(features, features))
        self.label_emb = nn.Embedding(classes, features) if classes else None

        def residual(inputs, outputs, resampling=None):
            return _Residual(inputs, outputs, features, scale_shift, resampling)

        def resampled(current, kind):
            return residual(current, current, kind) if resblock_updown else _Plain(current, kind)

        def attention(current):
            return _PixelAttention(current, head_channels, new_order)

        current = width * multipliers[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, current, 3, padding=1)])])
        skipped = [current]
        for level, factor in enumerate(multipliers):
            for _ in range(blocks):
                stage = [residual(current, width * factor)]
                current = width * factor
                self.input_blocks.append(
                    nn.ModuleList(stage + [attention(current)] * (level in attention_levels))
                )
                skipped.append(current)
            if level + 1 < len(multipliers):
                self.input_blocks.append(nn.ModuleList([resampled(current, "down")]))
                skipped.append(current)
        self.middle_block = nn.ModuleList(
            [residual(current, current), attention(current), residual(current, current)]
        )
        self.output_blocks = nn.ModuleList()
        for level, factor in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                stage = [residual(current + skipped.pop(), width * factor)]
                current = width * factor
                stage += [attention(current)] * (level in attention_levels)
                stage += [resampled(current, "up")] * (number == blocks and level > 0)
                self.output_blocks.append(nn.ModuleList(stage))
        outputs = channels * (2 if variances else 1)
        self.out = nn.Sequential(
            nn.GroupNorm(32, current), nn.SiLU(), nn.Conv2d(current, outputs, 3, padding=1)
        )

    def forward(self, x, step, label):
        c = self.time_embed(sinusoids(step, self.width))
        c = c if self.label_emb is None else c + self.label_emb(label)
        h = self.input_blocks[0][0](x)
        skips = [h]
        for stage in self.input_blocks[1:]:
            for layer in stage:
                h = layer(h, c)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, c)
        for stage in self.output_blocks:
            h = torch.cat([h, skips.pop()], 1)
            for layer in stage:
                h = layer(h, c)
        return self.out(h)


def randomized(network, seed=0, scale=0.1):
    """The network in evaluation mode with every parameter random, except the position embedding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(scale * noise + (1.0 if parameter.dim() == 1 and "norm" in name else 0.0))
    return network.eval()
