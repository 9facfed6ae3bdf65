"""Step 1: pictures, instruction and thinking -> the condition, in one prefill of the un-adapted backbone."""

import torch
from comfy_api.latest import io

from ..hywu_core.condition import encode
from ..hywu_core.handle import ModelHandle
from . import host, memory, sockets
from .think import INSTRUCTION_TOOLTIP, SEED_MAX, SYSTEM_PROMPT_TOOLTIP, SYSTEM_PROMPTS


class HYWUConditionEncoder(io.ComfyNode):
    """HYWU_MODEL + pictures + instruction (+ thinking) -> HYWU_CONDITION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUConditionEncoder",
            display_name="HY-WU Condition Encoder",
            category=sockets.CATEGORY,
            description="Reads one to three pictures (or none) and the instruction with the backbone. The result is what the "
                        "Weight Generator writes the LoRA from and what the sampler paints from.",
            inputs=[
                sockets.Model.Input("model", tooltip="The backbone; injected LoRAs are not used for encoding."),
                io.String.Input("instruction", multiline=True, default="", tooltip=INSTRUCTION_TOOLTIP),
                io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True,
                             tooltip="Draws the small noise with which the VAE encodes the source pictures."),
                io.Combo.Input("fit", options=["stretch", "crop"], default="stretch",
                               tooltip="How a source picture meets the nearest of the model's sizes: stretch distorts it "
                                       "slightly (right for size 'auto'), crop cuts its middle out (right for a fixed size)."),
                io.Combo.Input("system_prompt", options=SYSTEM_PROMPTS, default="en_unified", tooltip=SYSTEM_PROMPT_TOOLTIP),
                io.String.Input("thinking", multiline=True, default="", optional=True,
                                tooltip="The text from HY-WU Think, or your own. Empty: the instruction alone."),
                *host.picture_inputs("The picture to edit. Without any picture the instruction describes one to be painted."),
            ],
            outputs=[sockets.Condition.Output("condition", display_name="condition",
                                              tooltip="For the Weight Generator and the HY-Image Sampler.")],
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, instruction: str, seed: int, fit: str, system_prompt: str, thinking: str = "",
        image_1: torch.Tensor | None = None, image_2: torch.Tensor | None = None, image_3: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        pictures = host.pictures(image_1, image_2, image_3)
        return io.NodeOutput(memory.at_work(model, len(pictures), lambda: encode(
            model, pictures, instruction, thinking, seed=seed, fit=fit, system_prompt=system_prompt, on_tick=host.ticker())))
