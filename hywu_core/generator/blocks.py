"""The transformer block of the generator: factorised self-attention, cross-attention to the condition, feed-forward.

Owns one block and its parts, with the published parameter names. Does not make tokens or positions (``model.py``).

A block sees x_BNWG: for each of N backbone layers a row of W tokens (W = P * R / dim_accumulation, so many rows of a parameter
token side by side make up the width G). Nothing mixes both axes at once: the first attention runs over N for each place in the
row, everything after it runs inside one layer. Both halves can therefore be computed in slices, and without gradients they are:
the 176,512 tokens of the published sizes would otherwise need 13 GB of activations for one feed-forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..backbone.layer import RMSNorm
from .rope import RotaryTable, rotate

EPS = 1e-6
# Tokens that one slice holds: four of the published layers. Their widest activation is 22,064 x 16,384 in bf16 = 0.7 GB, and
# matrix products of that height still keep an accelerator busy. Not a setting: it changes no result.
TOKENS_AT_ONCE = 22_064


class Attention(nn.Module):
    """Multi-head attention without masks, between rotated queries and rotated keys."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.W_q = nn.Linear(width, width)
        self.W_k = nn.Linear(width, width)
        self.W_v = nn.Linear(width, width)
        self.W_o = nn.Linear(width, width)

    def keys_values(self, source_BSG: torch.Tensor, table: RotaryTable) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, S, H, Q) of what is attended to."""
        return rotate(self._heads(self.W_k(source_BSG)), table), self._heads(self.W_v(source_BSG))

    def forward(
        self, x_BLG: torch.Tensor, table: RotaryTable, keys_values: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Attend from ``x_BLG`` to ``keys_values``, or to itself; returns (B, L, G)."""
        q_BLHQ = rotate(self._heads(self.W_q(x_BLG)), table)
        k_BSHQ, v_BSHQ = self.keys_values(x_BLG, table) if keys_values is None else keys_values
        out_BHLQ = F.scaled_dot_product_attention(q_BLHQ.transpose(1, 2), k_BSHQ.transpose(1, 2), v_BSHQ.transpose(1, 2))
        return self.W_o(out_BHLQ.transpose(1, 2).flatten(2))

    def _heads(self, x_BLG: torch.Tensor) -> torch.Tensor:
        return x_BLG.unflatten(-1, (-1, self.head_dim))


class FeedForward(nn.Module):
    """fc2(silu(fc1 x)), four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class Positions(NamedTuple):
    """The rotary tables that all blocks share."""

    layers: RotaryTable  # (N, Q/2): 0..N-1
    row: RotaryTable  # (W, Q/2): (parameter token, piece of it)
    tokens: RotaryTable  # (N * W, Q/2): (layer, place in the row), the queries of the cross-attention
    condition: RotaryTable  # (S, Q/2): on the diagonal behind the row, the keys of the cross-attention


class Block(nn.Module):
    """x += n-attention; x += row attention; x += cross-attention; x += feed-forward, each on its own RMS norm of x."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.self_attn_n = Attention(width, head_dim)
        self.self_attn_hw = Attention(width, head_dim)
        self.self_attn_cross = Attention(width, head_dim)
        self.feed_forward = FeedForward(width)
        self.norm1 = RMSNorm(width, EPS)
        self.norm2 = RMSNorm(width, EPS)
        self.norm3 = RMSNorm(width, EPS)
        self.norm4 = RMSNorm(width, EPS)

    def forward(self, x_BNWG: torch.Tensor, context_BSG: torch.Tensor, positions: Positions) -> torch.Tensor:
        """Returns the new x_BNWG; without gradients and above one slice it is written over the old one."""
        keys_values = self.self_attn_cross.keys_values(context_BSG, positions.condition)
        x_BNWG = in_slices(lambda piece, start: self._across_layers(piece, positions), x_BNWG, axis=2)
        return in_slices(lambda piece, start: self._within_layers(piece, start, keys_values, positions), x_BNWG, axis=1)

    def _across_layers(self, x_BNWG: torch.Tensor, positions: Positions) -> torch.Tensor:
        B, N, W, G = x_BNWG.shape
        # One copy, so that the three projections read rows that lie together.
        columns = self.norm1(x_BNWG).transpose(1, 2).reshape(B * W, N, G).contiguous()
        return x_BNWG + self.self_attn_n(columns, positions.layers).view(B, W, N, G).transpose(1, 2)

    def _within_layers(
        self, x_BNWG: torch.Tensor, first_layer: int, keys_values: tuple[torch.Tensor, torch.Tensor], positions: Positions
    ) -> torch.Tensor:
        B, N, W, G = x_BNWG.shape
        rows = self.norm2(x_BNWG).view(B * N, W, G)
        x_BNWG = x_BNWG + self.self_attn_hw(rows, positions.row).view(B, N, W, G)
        queries = positions.tokens.rows(first_layer * W, (first_layer + N) * W)
        cross = self.self_attn_cross(self.norm3(x_BNWG).view(B, N * W, G), queries, keys_values)
        x_BNWG = x_BNWG + cross.view(B, N, W, G)
        return x_BNWG + self.feed_forward(self.norm4(x_BNWG))


def in_slices(step: Callable[[torch.Tensor, int], torch.Tensor], x_BNWG: torch.Tensor, axis: int) -> torch.Tensor:
    """Run ``step(slice, its start)``, which works independently along ``axis``; with gradients always in one piece.

    Without gradients and above one slice the result is written over ``x_BNWG``.
    """
    length = x_BNWG.shape[axis]
    tokens_each = x_BNWG.shape[:3].numel() // length
    size = max(1, TOKENS_AT_ONCE // tokens_each)
    if size >= length or torch.is_grad_enabled():
        return step(x_BNWG, 0)
    for start in range(0, length, size):
        piece = x_BNWG.narrow(axis, start, min(size, length - start))
        piece.copy_(step(piece, start))
    return x_BNWG
