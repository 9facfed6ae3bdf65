"""Arithmetic on LoRAs: scale, blend, mask, mean. Each gives a new LoRA at once and copies nothing (``lora/algebra.py``)."""

from comfy_api.latest import io

from ..hywu_core.lora.algebra import RANK_LIMIT, Selection, blend, joined, masked, mean, numbers, scaled
from ..hywu_core.lora.compress import compressed
from ..hywu_core.lora.value import LoRA
from . import host, sockets

SLOTS = 4  # LoRAs of a Blend; more by wiring one Blend into the next
MEANS = ("matrices", "updates")


def lora_slots(first: str, more: str) -> list[io.Input]:
    """lora_1, which must be connected, to lora_4."""
    return [sockets.LoRA.Input(f"lora_{number}", optional=number > 1, tooltip=first if number == 1 else more)
            for number in range(1, SLOTS + 1)]


class HYWUScaleLoRA(io.ComfyNode):
    """HYWU_LORA -> HYWU_LORA, times a number."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUScaleLoRA",
            display_name="HY-WU Scale LoRA",
            category=sockets.LORA_CATEGORY,
            description="Multiplies a LoRA by a number: what the injector's strength does, but kept in the LoRA itself, "
                        "so that it can be blended or saved.",
            inputs=[
                sockets.LoRA.Input("lora", tooltip="The LoRA to scale."),
                io.Float.Input("factor", default=1.0, min=-16.0, max=16.0, step=0.05, round=0.0001,
                               tooltip="1 changes nothing, 0 is no LoRA, negative values push away from the edit."),
            ],
            outputs=[sockets.LoRA.Output("scaled", display_name="lora", tooltip="The scaled LoRA.")],
        )

    @classmethod
    def execute(cls, lora: LoRA, factor: float) -> io.NodeOutput:
        return io.NodeOutput(scaled(lora, factor))


class HYWUBlendLoRAs(io.ComfyNode):
    """Up to four HYWU_LORA with weights -> their weighted sum."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUBlendLoRAs",
            display_name="HY-WU Blend LoRAs",
            category=sockets.LORA_CATEGORY,
            description="The weighted sum of LoRAs, exact: it acts as if they were injected in a row. Wire one Blend into the "
                        "next for more than four. A rank above 0 makes the sum small again and reports what that loses.",
            inputs=[
                *lora_slots("The first LoRA.", "Another LoRA of the same backbone, of any rank."),
                *(io.Float.Input(f"weight_{number}", default=1.0, min=-16.0, max=16.0, step=0.05, round=0.0001,
                                 tooltip=f"Factor of lora_{number}; without effect while that is not connected.")
                  for number in range(1, SLOTS + 1)),
                io.Int.Input("rank", default=0, min=0, max=RANK_LIMIT,
                             tooltip="0: exact, the ranks add up. Otherwise the best approximation of this rank (by SVD), "
                                     "which takes some minutes for LoRAs of full size."),
            ],
            outputs=[
                sockets.LoRA.Output("blend", display_name="lora", tooltip="The blend."),
                io.Float.Output("error", display_name="error",
                                tooltip="Share of the blend's norm that the smaller rank loses; 0 when exact."),
            ],
        )

    @classmethod
    def execute(
        cls, lora_1: LoRA, weight_1: float, weight_2: float, weight_3: float, weight_4: float, rank: int,
        lora_2: LoRA | None = None, lora_3: LoRA | None = None, lora_4: LoRA | None = None,
    ) -> io.NodeOutput:
        pairs = [(lora, weight) for lora, weight in zip(
            (lora_1, lora_2, lora_3, lora_4), (weight_1, weight_2, weight_3, weight_4), strict=True) if lora is not None]
        loras, weights = zip(*pairs, strict=True)
        if not rank:
            found, error = blend(loras, weights), 0.0
        else:
            small = compressed(joined(loras, weights), rank, on_tick=host.ticker())
            found, error = small.lora, small.error
        text = f"{len(loras)} LoRAs, rank {found.rank}, " + (f"error {error:.2%}" if error else "exact")
        return io.NodeOutput(found, error, ui=host.said(text))


class HYWUMaskLoRA(io.ComfyNode):
    """HYWU_LORA -> HYWU_LORA with a part of it switched off."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUMaskLoRA",
            display_name="HY-WU Mask LoRA",
            category=sockets.LORA_CATEGORY,
            description="Keeps a part of a LoRA and switches off the rest: some layers, some kinds of projections, some "
                        "experts. What one mask keeps and what its inversion keeps add up to the whole.",
            inputs=[
                sockets.LoRA.Input("lora", tooltip="The LoRA to take a part of."),
                io.String.Input("layers", default="",
                                tooltip="Layers to keep, the first is 0: such as 0-7, 12. Empty keeps all."),
                io.Boolean.Input("attention", default=True, tooltip="Keep the projections of attention (qkv and o)."),
                io.Boolean.Input("shared_mlp", default=True, tooltip="Keep the shared MLP, which every token passes."),
                io.Boolean.Input("routed_experts", default=True, tooltip="Keep the routed experts."),
                io.String.Input("experts", default="",
                                tooltip="Which routed experts to keep, the first is 0: such as 0-3, 17. Empty keeps all."),
                io.Boolean.Input("invert", default=False,
                                 tooltip="Keep everything but what is chosen above."),
            ],
            outputs=[sockets.LoRA.Output("masked", display_name="lora", tooltip="The part that is kept; the rest is zero.")],
        )

    @classmethod
    def execute(
        cls, lora: LoRA, layers: str, attention: bool, shared_mlp: bool, routed_experts: bool, experts: str, invert: bool,
    ) -> io.NodeOutput:
        groups = tuple(name for name, kept in (("attention", attention), ("shared", shared_mlp), ("experts", routed_experts))
                       if kept)
        selection = Selection(
            numbers(layers, lora.num_layers, "layers"), groups,
            numbers(experts, max(target.experts for target in lora.targets), "experts"), invert)
        note = ", ".join(filter(None, (
            layers and f"layers {layers.strip()}", " + ".join(groups), experts and f"experts {experts.strip()}")))
        return io.NodeOutput(masked(lora, selection, f"{'all but ' if invert else ''}{note}"))


class HYWUMeanLoRAs(io.ComfyNode):
    """Many HYWU_LORA, single or as lists -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUMeanLoRAs",
            display_name="HY-WU Mean LoRA",
            category=sockets.LORA_CATEGORY,
            description="One LoRA for many requests. The paper's uniform LoRA is the mean of the matrices: it shows what is "
                        "lost when every request gets the same weights.",
            inputs=[
                *lora_slots("A LoRA, or a list of them from Load LoRAs.", "Another LoRA, or another list."),
                io.Combo.Input("of", options=list(MEANS), default=MEANS[0],
                               tooltip="matrices: A with A and B with B, as in the paper; needs equal ranks. updates: the "
                                       "exact mean of what the LoRAs do, whose rank is the sum of theirs."),
                io.Int.Input("rank", default=0, min=0, max=RANK_LIMIT,
                             tooltip="For updates: 0 is exact, otherwise the best approximation of this rank (by SVD)."),
            ],
            outputs=[sockets.LoRA.Output("mean", display_name="lora", tooltip="The mean.")],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls, lora_1: list[LoRA], of: list[str], rank: list[int], lora_2: list[LoRA] | None = None,
        lora_3: list[LoRA] | None = None, lora_4: list[LoRA] | None = None,
    ) -> io.NodeOutput:
        loras = [lora for each in (lora_1, lora_2, lora_3, lora_4) for lora in each or () if lora is not None]
        if of[0] == MEANS[1] and rank[0]:
            small = compressed(joined(loras, [1 / len(loras)] * len(loras)), rank[0], on_tick=host.ticker())
            found, said = small.lora, f", error {small.error:.2%}"
        else:
            found, said = mean(loras, of[0]), ""
        return io.NodeOutput(found, ui=host.said(f"{len(loras)} LoRAs, rank {found.rank}{said}"))
