"""Which projections of a backbone a LoRA adapts, without building the backbone: for LoRAs that come from elsewhere."""

from dataclasses import dataclass

from ..config import BackboneConfig, LoRATarget
from ..errors import LoRAError

PREFIX = "model.layers."
GROUP = "mlp.experts"  # the routed experts: w1 gate, w2 down, w3 up


@dataclass(frozen=True)
class Adapted:
    """The targets of every layer, in the reference's order."""

    num_layers: int
    targets: tuple[LoRATarget, ...]


def targets_of(width: int, attention: int, qkv: int, shared: int, inner: int, experts: int) -> tuple[LoRATarget, ...]:
    """The seven targets of a layer (spec section 3). attention: width of all query heads together."""
    return (
        LoRATarget("self_attn.qkv_proj", width, qkv), LoRATarget("self_attn.o_proj", attention, width),
        LoRATarget("mlp.shared_mlp.gate_and_up_proj", width, 2 * shared), LoRATarget("mlp.shared_mlp.down_proj", shared, width),
        LoRATarget(f"{GROUP}.w1", width, inner, experts), LoRATarget(f"{GROUP}.w2", inner, width, experts),
        LoRATarget(f"{GROUP}.w3", width, inner, experts))


PUBLISHED = Adapted(32, targets_of(4096, 4096, 6144, 3072, 3072, 64))  # HunyuanImage-3.0


def adapted(config: BackboneConfig) -> Adapted:
    """What a LoRA adapts of this backbone.

    Raises:
        LoRAError: its layers are not all alike, so that no LoRA of HY-WU fits it.
    """
    sizes = set(zip(config.moe_intermediate_size, config.num_shared_expert, strict=True))
    if len(sizes) > 1 or config.moe_layer_num_skipped:
        raise LoRAError(f"the backbone's layers have {len(sizes)} different sizes and {config.moe_layer_num_skipped} of them "
                        "no experts, expected 1 and 0: a LoRA of HY-WU has the same targets in every layer")
    (inner, shared), = sizes
    heads, head = config.num_attention_heads, config.attention_head_dim
    return Adapted(config.num_hidden_layers, targets_of(
        config.hidden_size, heads * head, (heads + 2 * config.num_key_value_heads) * head, inner * shared, inner,
        config.num_experts))
