"""From a seed to the generator of random numbers that a stage draws from: one rule for what a seed may be.

Draws are made on the CPU, so that a seed means the same on every device.
"""

import torch

from .errors import RequestError

SEED_BITS = 64


def seeded(seed: int) -> torch.Generator:
    """A CPU generator for ``seed``. Raises RequestError for a seed that does not fit into 64 bits, signed or not."""
    lowest, highest = -(1 << (SEED_BITS - 1)), (1 << SEED_BITS) - 1
    if not lowest <= seed <= highest:
        raise RequestError(f"seed {str(seed)[:40]} is out of range: give one from {lowest} to {highest}")
    return torch.Generator().manual_seed(seed)
