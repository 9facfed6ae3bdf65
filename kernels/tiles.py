"""What the Triton kernels share: how large a tile is, whose rows it holds where pairs are sorted by expert, trying one out."""

from collections.abc import Callable
from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

# The side of a tile, by the bytes of a value: more of fp32 would take more shared memory than consumer cards have.
SIDES = {2: 64, 4: 32}


def attempt(kernel: Callable[..., torch.Tensor], *arguments) -> torch.Tensor | None:
    """What a small case gives, None if it cannot be compiled or launched: for want of a C compiler or its headers, of a place
    to keep what was compiled, of libcuda (an AssertionError), of shared memory, ..."""
    try:
        return kernel(*arguments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TritonError, OSError, SubprocessError, AssertionError):
        return None


@triton.jit
def expert_of_tile(ends, tile, EXPERTS: tl.constexpr, EXPERTS_UP: tl.constexpr, BLOCK_P: tl.constexpr):
    """The tile's expert (``EXPERTS`` behind the last tile), its first row, and the end of the expert's rows.

    Each expert's rows are cut into tiles of BLOCK_P of its own; EXPERTS_UP is the next power of two.
    """
    number = tl.arange(0, EXPERTS_UP)
    real = number < EXPERTS
    stop = tl.load(ends + number, mask=real, other=0)
    start = tl.load(ends + number - 1, mask=real & (number > 0), other=0)
    count = tl.where(real, (stop - start + BLOCK_P - 1) // BLOCK_P, 0)
    behind = tl.cumsum(count, 0)
    expert = tl.sum(((behind <= tile) & real).to(tl.int32), 0)
    mine = number == expert
    first = tl.sum(tl.where(mine, start + (tile - behind + count) * BLOCK_P, 0), 0)
    end = tl.sum(tl.where(mine, stop, 0), 0)
    return expert, first, end
