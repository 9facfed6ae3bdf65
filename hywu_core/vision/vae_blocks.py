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
        b, c, t, h, w = x.shape
        reach = self.reach()
        if reach is None:
            # Never the bias itself, which contiguous() would give for a single cell: callers add in place.
            return self.bias[:, None, None, None].expand(b, -1, t, h, w).clone(memory_format=torch.contiguous_format)
        if reach == (0, 0, 0):
            weight = self.weight[:, :, 1, 1, 1].expand(b, -1, -1)
            return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, (t, h, w))
        # With one frame two thirds of the kernel meet nothing but the zeros outside; half of a picture's way is like that.
        if t == 1 or not reach[0] or (x.device.type == "cpu" and b == 1 and c * t * h <= _ONEDNN_FROM):
            return torch.stack([self._frame(x, i, reach) for i in range(t)], dim=2)
        return super().forward(x)

    def reach(self) -> tuple[int, int, int] | None:
        """How far the weights look in time, height and width, each 0 or 1; None: they are zeros and only the bias speaks.

        The bundled checkpoint's VAE is mostly such zeros. They are looked for on a CPU, where work is dear and a look is cheap,
        and not while the weights learn: zeros get gradients, too.
        """
        weight = self.weight
        # Learnt weights have no zeros: one kernel tells.
        if weight.device.type != "cpu" or weight.requires_grad or weight[0, 0].all():
            return 1, 1, 1
        used = weight.abs().sum((0, 1)) != 0
        if not used.any():
            return None
        return tuple(int(used.index_select(axis, torch.tensor([0, 2])).any()) for axis in range(3))

    def _frame(self, x: torch.Tensor, i: int, reach: tuple[int, int, int]) -> torch.Tensor:
        """Output frame i ``(b, out, h, w)`` as one 2-D convolution over the channels of the frames that it sees."""
        time, rows, columns = reach
        first, last = max(i - time, 0), min(i + time, x.shape[2] - 1)
        frames = x[:, :, first:last + 1].transpose(1, 2).flatten(1, 2)
        weight = self.weight[:, :, first - i + 1:last - i + 2, 1 - rows:2 + rows, 1 - columns:2 + columns]
        return F.conv2d(frames, weight.transpose(1, 2).flatten(1, 2), self.bias, padding=(rows, columns))


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
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        if self.conv2.reach() is None:  # the branch says the same whatever it hears
            return shortcut + self.conv2.bias[:, None, None, None] if self.conv2.bias.any() else shortcut
        h = self.conv1(swish(self.norm1(x)))
        return shortcut + self.conv2(swish(self.norm2(h)))


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
        self.slots = out_channels // factor
        self.conv = Conv3(channels, self.slots)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Neighbouring channels are averaged before they are rearranged: the same numbers, and less to move.
        return space_to_depth(self.conv(x).add_(x.unflatten(1, (self.slots, -1)).mean(2)), self.time, 2)


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
        h = self.conv(x)
        h.unflatten(1, (-1, self.repeats)).add_(x.unsqueeze(2))
        return depth_to_space(h, self.time, 2)


def _divisible(whole: int, part: int, what: str) -> None:
    if whole % part:
        raise ValueError(f"VAE: {whole} {what} channels cannot be divided into groups for {part}")
