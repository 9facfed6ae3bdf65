"""How large a generator is, for the plan: counted on its modules on ``meta``, as ``placement/sizes.py`` counts the backbone."""

from dataclasses import replace

import torch

from ..config import GeneratorConfig, torch_dtype
from ..placement.sizes import GeneratorSizes
from .blocks import TOKENS_AT_ONCE
from .model import ParameterGenerator


def generator_sizes(config: GeneratorConfig, dtype: torch.dtype | None = None) -> GeneratorSizes:
    """Count the generator of ``config``, held in ``dtype`` (default: its own)."""
    dtype = dtype or torch_dtype(config.torch_dtype)
    with torch.device("meta"):
        model = ParameterGenerator(replace(config, num_pg_layers=1)).to(dtype)
    block = sum(parameter.nbytes for parameter in model.model.blocks[0].parameters())
    layout = model.layout
    return GeneratorSizes(
        blocks=config.num_pg_layers, block=block, rest=sum(parameter.nbytes for parameter in model.parameters()) - block,
        width=config.d_model, head_dim=config.head_dim, layers=config.num_base_model_layers,
        row=layout.num_tokens * config.rank // config.dim_accumulation,
        written=layout.num_values * config.num_base_model_layers * dtype.itemsize, at_once=TOKENS_AT_ONCE,
        itemsize=dtype.itemsize)
