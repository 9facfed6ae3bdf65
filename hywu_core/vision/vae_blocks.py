"""Building blocks of the 3-D VAE: residual block, attention, and the two resampling blocks (spec section 9).

Owns single blocks; how they are stacked is in ``vae.py``. Attribute names are the published tensor names. All activations are
``(b, c, t, h, w)``.
"""

import torch
import torch.nn.functional as F
from torch import nn

_GROUPS = 32
_EPS = 1e-6
# Up to this many values in the first four axes of a batch of one, torch 2.x leaves 3-D convolutions on the CPU to a kernel that
# took 7 to 25 times as long as the same work in 2-D (32 channels, 4 x 64 x 64: 59 ms against 8 ms on two cores).
_ONEDNN_FROM = 20480


class Conv3(nn.Conv3d):
    """A 3x3x3 convolution with one zero on every side of time, height and width."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(b, c, t, h, w)`` -> ``(b, out, t, h, w)``."""
        b, c, t, h, _ = x.shape
        # With one frame two thirds of the kernel meet nothing but the zeros outside; half of a picture's way is like that.
        if t == 1 or (x.device.type == "cpu" and b == 1 and c * t * h <= _ONEDNN_FROM):
            return torch.stack([self._frame(x, i) for i in range(t)], dim=2)
        return super().forward(x)

    def _frame(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """Output frame i ``(b, out, h, w)`` as one 2-D convolution over the channels of the frames that it sees."""
        first, last = max(i - 1, 0), min(i + 1, x.shape[2] - 1)
        frames = x[:, :, first:last + 1].transpose(1, 2).flatten(1, 2)
        weight = self.weight[:, :, first - i + 1:last - i + 2].transpose(1, 2).flatten(1, 2)
        return F.conv2d(frames, weight, self.bias, padding=1)


def norm(channels: int) -> nn.GroupNorm:
    """The VAE's normalisation; torch sums its statistics in fp32 for half-precision input."""
    return nn.GroupNorm(_GROUPS, channels, eps=_EPS)


def swish(x: torch.Tensor) -> torch.Tensor:
    """SiLU in place: always called on the fresh output of a norm, and full-size activations are what fills the memory."""
    return F.silu(x, inplace=True)


class ResnetBlock(nn.Module):
    """x + conv2(swish(norm2(conv1(swish(norm1(x)))))), with a 1x1x1 convolution on x where the width changes."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = Conv3(channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = Conv3(out_channels, out_channels)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv3d(channels, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions of all frames."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv3d(channels, channels, kernel_size=1)
        self.k = nn.Conv3d(channels, channels, kernel_size=1)
        self.v = nn.Conv3d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv3d(channels, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        # (b, c, t, h, w) -> (b, 1 head, t*h*w, c)
        q, k, v = (project(h).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


def space_to_depth(x: torch.Tensor, time: int, space: int) -> torch.Tensor:
    """``(b, c, t*time, h*space, w*space)`` -> ``(b, time*space*space*c, t, h, w)``, channels as (time, row, column, c)."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // time, time, h // space, space, w // space, space)
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(b, -1, t // time, h // space, w // space)


def depth_to_space(x: torch.Tensor, time: int, space: int) -> torch.Tensor:
    """The inverse of ``space_to_depth``."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, time, space, space, c // (time * space * space), t, h, w)
    return x.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(b, -1, t * time, h * space, w * space)


class Downsample(nn.Module):
    """Halve height and width (and time): a convolution and a channel-averaged copy of the input, both by space-to-depth."""

    def __init__(self, channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.time = 2 if temporal else 1
        factor = self.time * 4
        _divisible(out_channels, factor, "output")
        _divisible(factor * channels, out_channels, "rearranged input")
        self.out_channels = out_channels
        self.conv = Conv3(channels, out_channels // factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = space_to_depth(x, self.time, 2)
        h = space_to_depth(self.conv(x), self.time, 2)
        return h + shortcut.unflatten(1, (self.out_channels, -1)).mean(2)


class Upsample(nn.Module):
    """Double height and width (and time): a convolution and a channel-repeated copy of the input, both by depth-to-space."""

    def __init__(self, channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.time = 2 if temporal else 1
        factor = self.time * 4
        _divisible(factor * out_channels, channels, "rearranged output")
        self.repeats = factor * out_channels // channels
        self.conv = Conv3(channels, out_channels * factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = depth_to_space(self.conv(x), self.time, 2)
        return h + depth_to_space(x.repeat_interleave(self.repeats, dim=1), self.time, 2)


def _divisible(whole: int, part: int, what: str) -> None:
    if whole % part:
        raise ValueError(f"VAE: {whole} {what} channels cannot be divided into groups for {part}")
