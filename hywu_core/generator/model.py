"""The parameter generator: condition in, the parameter tokens of every backbone layer out.

Owns the network around the blocks with the published parameter names. The blocks are in ``blocks.py``, the meaning of a token
in ``tokens.py``, loading and writing a LoRA in ``handle.py``.

The tokens start from learned positions alone: everything that depends on the request comes in through cross-attention.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..backbone.layer import RMSNorm
from ..config import GeneratorConfig
from ..errors import CheckpointError
from ..progress import Tick, silent
from .blocks import EPS, Block, Positions, in_slices
from .rope import rotary_table
from .tokens import TokenLayout


class TokenTransformer(nn.Module):
    """Learned token positions, the blocks, and the two output projections (``model.*`` of the published names)."""

    def __init__(self, config: GeneratorConfig, layout: TokenLayout):
        super().__init__()
        self.config = config
        self.layout = layout
        piece = config.d_model // config.dim_accumulation
        self.hw_pos = nn.Embedding(layout.num_tokens * config.rank, piece)
        self.layer_pos = nn.Embedding(config.num_base_model_layers, piece)
        self.norm_input = RMSNorm(config.d_model, EPS)
        self.norm_tokens = RMSNorm(config.d_model, EPS)
        self.blocks = nn.ModuleList(Block(config.d_model, config.head_dim) for _ in range(config.num_pg_layers))
        self.norm_final = RMSNorm(config.d_model, EPS)
        self.proj_out_A = nn.Linear(piece, config.output_dim)
        self.proj_out_B = nn.Linear(piece, config.output_dim)
        # Entered around each block's turn: whoever placed its weights elsewhere brings them.
        self.present: Callable[[int], AbstractContextManager] = lambda index: nullcontext()

    def forward(self, context_BSG: torch.Tensor, on_tick: Tick = silent) -> torch.Tensor:
        """Projected condition (B, S, G) -> raw tokens (B, N, P, R, C); ticks per block."""
        context_BSG = self.norm_input(context_BSG)
        positions = self.positions(context_BSG.shape[1], context_BSG.device)
        # Rows of a batch start equal but are written to apart.
        x_BNWG = self.position_tokens().expand(context_BSG.shape[0], -1, -1, -1).contiguous()
        x_BNWG = in_slices(lambda piece, start: self.norm_tokens(piece), x_BNWG, axis=1)
        on_tick(0, len(self.blocks), None)
        for done, block in enumerate(self.blocks, start=1):
            with self.present(done - 1):
                x_BNWG = block(x_BNWG, context_BSG, positions)
            on_tick(done, len(self.blocks), None)
        x_BNWG = in_slices(lambda piece, start: self.norm_final(piece), x_BNWG, axis=1)
        if torch.is_grad_enabled():
            return self._project(x_BNWG)
        # A layer at a time into its place: at the published sizes the tokens and the result are 1.45 GB each.
        rows, layers = x_BNWG.shape[:2]
        raw_BNPRC = x_BNWG.new_empty(rows, layers, self.layout.num_tokens, self.layout.rank, self.config.output_dim)
        for layer in range(layers):
            raw_BNPRC[:, layer : layer + 1] = self._project(x_BNWG[:, layer : layer + 1])
        return raw_BNPRC

    def position_tokens(self) -> torch.Tensor:
        """The learned start (N, W, G): W = P * R / a tokens a layer, each of a = dim_accumulation rows side by side."""
        rows = self.hw_pos.weight.unflatten(0, (-1, self.config.dim_accumulation))  # (W, a, G/a)
        return (rows + self.layer_pos.weight[:, None, None]).flatten(2)

    def positions(self, condition_length: int, device: torch.device) -> Positions:
        """The rotary tables for a condition of ``condition_length`` tokens (spec section 4)."""
        head_dim, layers = self.config.head_dim, self.config.num_base_model_layers
        pieces = self.config.rank // self.config.dim_accumulation
        row = torch.arange(self.layout.num_tokens * pieces, device=device)
        token = torch.arange(layers * len(row), device=device)
        # Behind both axes of the row, so that no key shares a position with a parameter token.
        diagonal = torch.arange(condition_length, device=device) + max(self.layout.num_tokens, pieces)
        return Positions(
            layers=rotary_table((torch.arange(layers, device=device),), head_dim),
            row=rotary_table((row // pieces, row % pieces), head_dim),
            tokens=rotary_table((token // len(row), token % len(row)), head_dim),
            condition=rotary_table((diagonal, diagonal), head_dim))

    def _project(self, x_BNWG: torch.Tensor) -> torch.Tensor:
        """Take the tokens apart again and give the A tokens and the B tokens each their projection."""
        B, N = x_BNWG.shape[:2]
        x_BNPRG = x_BNWG.view(B, N, self.layout.num_tokens, self.layout.rank, -1)
        a, b = x_BNPRG.split([self.layout.num_a_tokens, self.layout.num_tokens - self.layout.num_a_tokens], dim=2)
        return torch.cat((self.proj_out_A(a), self.proj_out_B(b)), dim=2)


class ParameterGenerator(nn.Module):
    """The published generator: 8.0966e9 parameters, which write 722,993,152 values.

    Raises:
        CheckpointError: sizes of the configuration that contradict each other.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        if config.output_dim != config.token_dim:
            raise CheckpointError(f"generator config.json: output_dim is {config.output_dim}, but a parameter token is "
                                  f"{config.token_dim} wide (token_dim); use the folder's own config.json")
        if config.head_dim % 4:
            raise CheckpointError(f"generator config.json: head_dim {config.head_dim} is not a multiple of 4, which rotary "
                                  "positions on two axes need; use the folder's own config.json")
        self.layout = TokenLayout.from_config(config)
        self.hidden_in = nn.Linear(config.input_dim, config.d_model)
        self.model = TokenTransformer(config, self.layout)

    def forward(self, condition_BSD: torch.Tensor, on_tick: Tick = silent) -> torch.Tensor:
        """Conditions (B, S, D) of equal length -> raw parameter tokens (B, N, P, R, C); differentiable, ticks per block."""
        return self.model(self.hidden_in(condition_BSD), on_tick)
