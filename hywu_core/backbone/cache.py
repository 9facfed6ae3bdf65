"""Keys and values of a run of layers, written in place at given positions (spec section 6).

A cache belongs to one stage and lies on its device. Denoise steps after the first overwrite the slots of the picture's tokens;
thinking appends one slot per token, and the buffers grow by doubling.
"""

from copy import copy

import torch


class KVCache:
    """Keys and values (B, H_kv, capacity, Q) of each layer of one stage.

    ``length`` counts the slots in use; attention sees exactly these.
    """

    def __init__(self, layers: int, rows: int, heads: int, capacity: int, head_dim: int, *, device, dtype):
        self._keys = [torch.empty(rows, heads, capacity, head_dim, device=device, dtype=dtype) for _ in range(layers)]
        self._values = [torch.empty_like(keys) for keys in self._keys]
        self.length = 0

    def reserve(self, length: int) -> None:
        """Make ``length`` slots usable; what was written stays."""
        if length > self._keys[0].shape[2]:
            capacity = max(length, 2 * self._keys[0].shape[2])
            # In place: the old buffers go one by one, also for a graph's view of all of it (``whole``).
            for tensors in (self._keys, self._values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = self._grown(tensor, capacity)
        self.length = max(self.length, length)

    def _grown(self, tensor: torch.Tensor, capacity: int) -> torch.Tensor:
        rows, heads, _, head_dim = tensor.shape
        grown = tensor.new_empty(rows, heads, capacity, head_dim)
        grown[:, :, : self.length] = tensor[:, :, : self.length]
        return grown

    def write(
        self, layer: int, k_BHLQ: torch.Tensor, v_BHLQ: torch.Tensor, positions_L: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's keys and values at ``positions_L`` and return views of all slots in use, (B, H_kv, length, Q).

        One row's are written to all rows of the cache, and only one row's views come back.
        """
        keys, values, rows = self._keys[layer], self._values[layer], len(k_BHLQ)
        keys.index_copy_(2, positions_L, k_BHLQ.expand(len(keys), -1, -1, -1))
        values.index_copy_(2, positions_L, v_BHLQ.expand(len(values), -1, -1, -1))
        return keys[:rows, :, : self.length], values[:rows, :, : self.length]

    def row(self, row: int) -> "KVCache":
        """One row of the cache as a cache that shares its memory; for as long as this one does not grow."""
        one = copy(self)
        one._keys = [keys[row : row + 1] for keys in self._keys]
        one._values = [values[row : row + 1] for values in self._values]
        return one

    def whole(self) -> "KVCache":
        """All slots as if they were in use, in the same memory; when this one grows, it has to be made anew."""
        whole = copy(self)
        whole.length = self._keys[0].shape[2]
        return whole

    def shares(self, other: "KVCache") -> bool:
        """Whether ``other`` is all of this one (``whole``), which has not grown since."""
        return self._keys is other._keys and self._keys[0].shape[2] == other.length

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of a layer's slots in use."""
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]
