"""Room behind a weight for a LoRA: buffers a little longer than the weight, which stays as it is.

``with_room`` makes them, ``beside`` finds again what lies side by side. The weight itself is copied when the first LoRA comes,
and again for one of a larger rank; its values are never written to. Without a LoRA nothing reads the room.
"""

import torch

ALIGNMENT = 16  # bytes that the library's grouped GEMM wants strides to be multiples of


def aligned(count: int, dtype: torch.dtype) -> int:
    """``count`` values or a few more, so many that the next row is aligned."""
    step = max(1, ALIGNMENT // dtype.itemsize)
    return -(-count // step) * step


def with_room(weight: torch.Tensor, dim: int, room: int) -> torch.Tensor:
    """A buffer like ``weight`` with at least ``room`` more along ``dim``, the weight copied to its begin; rows stay aligned."""
    shape = list(weight.shape)
    shape[dim] += room
    if dim == weight.ndim - 1:
        shape[dim] = aligned(shape[dim], weight.dtype)
    buffer = weight.new_empty(shape)
    buffer.narrow(dim, 0, weight.shape[dim]).copy_(weight)
    return buffer


def beside(first: torch.Tensor, *others: torch.Tensor, dim: int) -> torch.Tensor | None:
    """``torch.cat`` along ``dim`` without copying, for parts that lie one behind the other in one storage; else None."""
    place, length = first.storage_offset(), 0
    storage = first.untyped_storage().data_ptr()
    for part in (first, *others):
        if (part.untyped_storage().data_ptr() != storage or part.stride() != first.stride()
                or part.storage_offset() != place + length * first.stride(dim)):
            return None
        length += part.shape[dim]
    shape = list(first.shape)
    shape[dim] = length
    return first.as_strided(shape, first.stride(), place)
