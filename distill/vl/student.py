"""The joint student: a small transformer over picture patches and text tokens, with a head on its first token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from edgekd.configs.vl import VlTrainConfig
from edgekd.core.preprocess import Preprocess
from edgekd.distill.vl.tokens import END


class Joint(NamedTuple):
    """The states of the last layer, one row per picture-text pair."""

    logits: Tensor
    """float `[B, C]`; for `choice` `[B, K]`."""
    cls: Tensor
    """float `[B, d]`, or `[B · K, d]` for `choice`."""
    patches: Tensor
    """float `[…, P, d]`; P is 0 for a blind student."""
    text: Tensor
    """float `[…, L, d]`."""


class Block(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Float `[B, N, d]` and a bias of the attention scores, `[B, 1, 1, N]` → `[B, N, d]`."""
        rows = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, h, d/h]
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, N, d/h]
        x = x + self.out(
            scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        )
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VlStudent(nn.Module):
    """Picture and text to logits, without any part of a teacher.

    Args:
        backbone: timm model; its `forward_features` gives a map `[B, c, h, w]` or tokens `[B, prefix + P, c]`.
        channels: c. patches: P.
        preprocess: input size, and the statistics to normalise with.
        rows: int64 `[49408]`, row of every CLIP token in the student's table (`tokens.token_rows`).
        config: task, width, layers, heads, and `blind` for a student without pictures (the control `question-only`).
        outputs: number of answers; ignored for `choice`, which has one score per candidate.
        length: L, tokens per text.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        patches: int,
        preprocess: Preprocess,
        rows: NDArray[np.int64],
        config: VlTrainConfig,
        *,
        outputs: int,
        length: int,
    ) -> None:
        super().__init__()
        self.task, self.blind, width = config.task, config.blind, config.width
        self.size, self.length = preprocess.size, length
        self.backbone = None if config.blind else backbone
        self.project = None if config.blind else nn.Linear(channels, width)
        self.patch_place = nn.Parameter(0.02 * torch.randn(0 if config.blind else patches, width))
        self.embed = nn.Embedding(int(rows.max()) + 1, width)
        self.text_place = nn.Parameter(0.02 * torch.randn(length, width))
        self.first = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1 if config.task == "choice" else outputs)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer("rows", torch.from_numpy(rows))
        self.register_buffer("mean", torch.tensor(preprocess.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std)[:, None, None], persistent=False)

    @property
    def patches(self) -> int:
        """Return P, 0 for a blind student."""
        return len(self.patch_place)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """RGB uint8 `[B, S, S, 3]` and CLIP token ids int64 `[B, L]` (`choice`: `[B, K, L]`) → logits `[B, C or K]`."""
        return self.fuse(self.encode(images), tokens).logits

    def encode(self, images: Tensor) -> Tensor:
        """RGB uint8 `[B, S, S, 3]` → the backbone's map as float `[B, P, c]`; `[B, 0, 0]` for a blind student."""
        if self.backbone is None:
            return torch.zeros(len(images), 0, 0)
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std  # [B, 3, S, S]
        return patch_rows(self.backbone, pixels)

    def fuse(self, maps: Tensor, tokens: Tensor) -> Joint:
        """Return logits and hidden states for the backbone's maps and token ids."""
        if self.project is None:
            seen = self.patch_place.expand(len(maps), -1, -1)  # [B, 0, d]
        else:
            seen = self.project(maps) + self.patch_place  # [B, P, d]
        if self.task == "choice":
            count = tokens.shape[1]
            seen = seen.unsqueeze(1).expand(-1, count, -1, -1).flatten(0, 1)  # [B · K, P, d]
            tokens = tokens.flatten(0, 1)  # [B · K, L]
        text = self.embed(self.rows[tokens]) + self.text_place  # [B, L, d]
        first = self.first.expand(len(tokens), 1, -1)
        x = torch.cat([first, seen, text], dim=1)  # [B, 1 + P + L, d]
        end = (tokens == END).int()
        padding = (end.cumsum(dim=1) - end) > 0  # behind the end, [B, L]
        kept = torch.zeros_like(x[:, : 1 + self.patches, 0])
        bias = torch.cat([kept, -1e4 * padding.to(x.dtype)], dim=1)
        for block in self.blocks:
            x = block(x, bias[:, None, None, :])
        x = self.norm(x)
        logits = self.head(x[:, 0])  # [B, C]
        if self.task == "choice":
            logits = logits.reshape(-1, count)  # [B, K]
        return Joint(logits, x[:, 0], x[:, 1 : 1 + self.patches], x[:, 1 + self.patches :])


def patch_rows(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Return a timm model's last map or patch tokens as float `[B, P, c]`, class and register tokens left out."""
    found: Tensor = backbone.forward_features(pixels)  # type: ignore[operator]
    if found.ndim == 4:
        return found.flatten(2).transpose(1, 2)  # [B, h · w, c]
    return found[:, int(getattr(backbone, "num_prefix_tokens", 0)) :]
