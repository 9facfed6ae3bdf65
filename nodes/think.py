"""Step 0: the backbone reasons about pictures and instruction and writes a text that the Condition Encoder takes."""

import torch
from comfy_api.latest import io

from ..hywu_core.handle import ModelHandle
from ..hywu_core.think import think
from . import host, memory, sockets

MODES = ["think_recaption", "think", "recaption"]
# Names that the text part selects by (spec section 5); the texts lie in the checkpoint.
SYSTEM_PROMPTS = ["en_unified", "en_vanilla", "en_recaption", "en_think_recaption", "None"]
SYSTEM_PROMPT_TOOLTIP = "Which of the checkpoint's system prompts opens the conversation. HY-WU was trained with en_unified."
INSTRUCTION_TOOLTIP = "What to do with the pictures, or without any picture what to paint, in plain words."
SEED_MAX = 0xFFFFFFFFFFFFFFFF


class HYWUThink(io.ComfyNode):
    """HYWU_MODEL + pictures + instruction -> reasoning text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUThink",
            display_name="HY-WU Think",
            category=sockets.CATEGORY,
            description="Lets the backbone reason about the request and rewrite it as a detailed text. Optional: the Condition "
                        "Encoder also works without. The text can be shown, edited and kept.",
            inputs=[
                sockets.Model.Input("model", tooltip="The backbone; injected LoRAs are not used for thinking."),
                io.String.Input("instruction", multiline=True, default="", tooltip=INSTRUCTION_TOOLTIP),
                io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True,
                             tooltip="Thinking has its own randomness: the same seed gives the same text."),
                io.Combo.Input("mode", options=MODES, default="think_recaption",
                               tooltip="think_recaption reasons first and then describes the result (what HY-WU was trained "
                                       "with); recaption only describes it, which is shorter."),
                io.Int.Input("max_new_tokens", default=2048, min=1, max=16384,
                             tooltip="The text is cut after so many tokens. 2048 is the checkpoint's own limit."),
                io.Float.Input("temperature", default=0.6, min=0.0, max=2.0, step=0.05,
                               tooltip="How freely words are drawn. 0 always takes the likeliest."),
                io.Int.Input("top_k", default=1024, min=0, max=1_000_000,
                             tooltip="Draw from so many likeliest tokens; 0 draws from all."),
                io.Float.Input("top_p", default=0.95, min=0.01, max=1.0, step=0.01,
                               tooltip="Draw from the likeliest tokens that together have this probability."),
                io.Combo.Input("system_prompt", options=SYSTEM_PROMPTS, default="en_unified", tooltip=SYSTEM_PROMPT_TOOLTIP),
                *host.picture_inputs("The picture to edit. Without any picture the instruction describes one to be painted."),
            ],
            outputs=[io.String.Output("thinking", display_name="thinking",
                                      tooltip="For the thinking input of the Condition Encoder.")],
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, instruction: str, seed: int, mode: str, max_new_tokens: int, temperature: float, top_k: int,
        top_p: float, system_prompt: str, image_1: torch.Tensor | None = None, image_2: torch.Tensor | None = None,
        image_3: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        pictures = host.pictures(image_1, image_2, image_3)
        return io.NodeOutput(memory.at_work(model, len(pictures), lambda: think(
            model, pictures, instruction, seed=seed, mode=mode, max_new_tokens=max_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, system_prompt=system_prompt, on_tick=host.ticker())))
