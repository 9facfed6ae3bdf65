"""Parameter tokens: how the LoRA matrices of one backbone layer are laid out as a row of equally large tokens.

Owns the layout (which tokens hold which matrix) and both directions. Knows no network. All counts come from the configuration's
targets; with the published ones a layer has 1379 tokens of 16 x 1024 values, 719 for the A matrices and then 660 for the B.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..config import GeneratorConfig


@dataclass(frozen=True)
class ParameterSpan:
    """The tokens [start, stop) of a layer that hold one matrix, row-major, the tail of the last token unused."""

    name: str  # "mlp.experts.w1.lora_A", relative to the layer
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TokenLayout:
    """All matrices of one layer in token order: every A in the order of the targets, then every B."""

    spans: tuple[ParameterSpan, ...]
    num_a_tokens: int  # the first tokens, which go through proj_out_A
    num_tokens: int  # P
    rank: int
    token_dim: int

    @classmethod
    def from_config(cls, config: GeneratorConfig) -> "TokenLayout":
        """Lay out the targets of ``config``; each matrix takes ceil(values / (R * C)) tokens of its own."""
        shapes = [(f"{target.name}.lora_A", target.a_shape(config.rank)) for target in config.targets]
        shapes += [(f"{target.name}.lora_B", target.b_shape(config.rank)) for target in config.targets]
        spans: list[ParameterSpan] = []
        start = 0
        for name, shape in shapes:
            stop = start - (-math.prod(shape) // (config.rank * config.token_dim))
            spans.append(ParameterSpan(name, shape, start, stop))
            start = stop
        num_a = spans[len(config.targets) - 1].stop
        return cls(tuple(spans), num_a, start, config.rank, config.token_dim)

    @property
    def num_values(self) -> int:
        """LoRA values of one layer, without the unused tails."""
        return sum(math.prod(span.shape) for span in self.spans)


def tokenise_layer(matrices: Mapping[str, torch.Tensor], layout: TokenLayout) -> torch.Tensor:
    """Write the matrices of one layer as tokens_BPRC; unused tails are NaN, so that a loss can leave them out.

    Args:
        matrices: name ("mlp.experts.w1.lora_A") -> (B, R, I), (B, O, R), (B, E, R, I) or (B, E, O, R).

    Raises:
        KeyError: a matrix of the layout is missing.
        ValueError: a matrix has another shape than the layout's.
    """
    rows = []
    for span in layout.spans:
        matrix = matrices[span.name]
        if tuple(matrix.shape[1:]) != span.shape:
            raise ValueError(f"{span.name} has shape {tuple(matrix.shape[1:])} behind the batch axis, expected {span.shape}")
        capacity = (span.stop - span.start) * layout.rank * layout.token_dim
        flat = matrix.flatten(1)
        padded = torch.nn.functional.pad(flat, (0, capacity - flat.shape[1]), value=math.nan)
        rows.append(padded.unflatten(1, (span.stop - span.start, layout.rank, layout.token_dim)))
    return torch.cat(rows, dim=1)


def detokenise_layer(tokens_BPRC: torch.Tensor, layout: TokenLayout) -> dict[str, torch.Tensor]:
    """Read the matrices of one layer out of its tokens: name -> (B, *shape), in token order (views where B is 1).

    Raises:
        ValueError: there are more or fewer tokens than the layout has.
    """
    if tokens_BPRC.shape[1] != layout.num_tokens:
        raise ValueError(f"{tokens_BPRC.shape[1]} tokens for a layer, expected {layout.num_tokens}")
    return {
        span.name: tokens_BPRC[:, span.start:span.stop].flatten(1)[:, :math.prod(span.shape)].unflatten(1, span.shape)
        for span in layout.spans}


def detokenise(tokens_BNPRC: torch.Tensor, layout: TokenLayout, prefix: str) -> dict[str, torch.Tensor]:
    """Read the matrices of all layers: reference key -> (B, *shape), layer 0 all A, layer 0 all B, layer 1 and so on."""
    return {
        f"{prefix}{layer}.{name}": matrix
        for layer, tokens_BPRC in enumerate(tokens_BNPRC.unbind(1))
        for name, matrix in detokenise_layer(tokens_BPRC, layout).items()}
