"""The token layout of a layer and both directions through it."""

import pytest
import torch
from comfyui_hywu.hywu_core.generator.tokens import TokenLayout, detokenise, detokenise_layer, tokenise_layer

# Counted by hand for conftest's configuration: a token holds rank 4 x token_dim 5 = 20 values.
BY_HAND = [
    ("self_attn.qkv_proj.lora_A", (4, 7), 0, 2),  # 28 values
    ("mlp.experts.w2.lora_A", (3, 4, 3), 2, 4),  # 36
    ("mlp.experts.w1.lora_A", (3, 4, 7), 4, 9),  # 84
    ("self_attn.qkv_proj.lora_B", (11, 4), 9, 12),  # 44
    ("mlp.experts.w2.lora_B", (3, 7, 4), 12, 17),  # 84
    ("mlp.experts.w1.lora_B", (3, 3, 4), 17, 19),  # 36
]


@pytest.fixture
def layout(config) -> TokenLayout:
    return TokenLayout.from_config(config)


def test_layout_by_hand(layout):
    assert [(span.name, span.shape, span.start, span.stop) for span in layout.spans] == BY_HAND
    assert (layout.num_a_tokens, layout.num_tokens) == (9, 19)
    assert layout.num_values == 28 + 36 + 84 + 44 + 84 + 36


def test_values_lie_row_major_and_the_tail_is_nan(layout):
    matrices = {name: torch.full((1, *shape), float(i)) for i, (name, shape, _, _) in enumerate(BY_HAND)}
    matrices["self_attn.qkv_proj.lora_A"] = torch.arange(28.0).view(1, 4, 7)
    tokens = tokenise_layer(matrices, layout)
    assert tokens.shape == (1, 19, 4, 5)
    assert tokens[0, 0].flatten().tolist() == list(range(20))
    assert tokens[0, 1].flatten()[:8].tolist() == list(range(20, 28))
    assert tokens[0, 1].flatten()[8:].isnan().all()
    assert int(tokens.isnan().sum()) == 19 * 20 - layout.num_values


def test_round_trip_of_a_batch(layout):
    torch.manual_seed(0)
    matrices = {name: torch.randn(2, *shape) for name, shape, _, _ in BY_HAND}
    back = detokenise_layer(tokenise_layer(matrices, layout), layout)
    assert list(back) == [name for name, *_ in BY_HAND]
    assert all(torch.equal(back[name], matrices[name]) for name in matrices)


def test_all_layers_by_reference_key(layout):
    tokens = torch.randn(1, 3, 19, 4, 5)
    matrices = detokenise(tokens, layout, "model.layers.")
    assert list(matrices) == [f"model.layers.{layer}.{name}" for layer in range(3) for name, *_ in BY_HAND]
    assert torch.equal(matrices["model.layers.2.mlp.experts.w1.lora_B"].flatten(), tokens[0, 2, 17:].flatten()[:36])


def test_wrong_sizes_are_refused(layout):
    matrices = {name: torch.zeros(1, *shape) for name, shape, _, _ in BY_HAND}
    with pytest.raises(ValueError, match=r"\(7, 4\) behind the batch axis, expected \(4, 7\)"):
        tokenise_layer({**matrices, "self_attn.qkv_proj.lora_A": torch.zeros(1, 7, 4)}, layout)
    with pytest.raises(KeyError):
        tokenise_layer({"self_attn.qkv_proj.lora_A": torch.zeros(1, 4, 7)}, layout)
    with pytest.raises(ValueError, match="18 tokens for a layer, expected 19"):
        detokenise_layer(torch.zeros(1, 18, 4, 5), layout)
