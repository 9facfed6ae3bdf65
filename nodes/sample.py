"""Step 3: the denoise loop, with the injected LoRAs at work -> LATENT."""

import torch
from comfy_api.latest import io

from ..hywu_core.condition import Condition
from ..hywu_core.handle import ModelHandle
from ..hywu_core.lora.routing import recording
from ..hywu_core.sampling.denoise import sample
from . import host, memory, sockets
from .think import SEED_MAX

# width:height; the nearest of the model's own sizes is taken, whatever its resolution.
RATIOS = ["1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2", "3:1", "1:3", "4:1", "1:4"]
# Key of a LATENT beside "samples": (N, E) int64, how many tokens each layer sent to each expert. Other nodes pass it on unread.
ROUTING = "hywu_routing"


class HYImageSampler(io.ComfyNode):
    """HYWU_MODEL + HYWU_CONDITION -> LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYImageSampler",
            display_name="HY-Image Sampler",
            category=sockets.CATEGORY,
            description="Paints the picture. Without an injected LoRA it is the plain backbone's picture.",
            inputs=[
                sockets.Model.Input("model", tooltip="The backbone, usually from the LoRA Injector."),
                sockets.Condition.Input("condition", tooltip="From the Condition Encoder, made with the same backbone."),
                *sampler_inputs(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="For VAE Decode with the loader's VAE.")],
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, condition: Condition, steps: int, guidance: float, shift: float, seed: int, size: str,
    ) -> io.NodeOutput:
        return io.NodeOutput(paint(model, condition, steps, guidance, shift, seed, size))


def sampler_inputs() -> list[io.Input]:
    """The settings of a sampler, in the order of ``paint``."""
    return [
        io.Int.Input("steps", default=50, min=1, max=1000,
                     tooltip="Denoise steps. 50 is the published default, 8 for distilled checkpoints."),
        io.Float.Input("guidance", default=2.5, min=1.0, max=30.0, step=0.1,
                       tooltip="How strongly the picture follows the request. 1 runs without the second, unconditional row and "
                               "takes about half the time."),
        io.Float.Input("shift", default=3.0, min=0.01, max=100.0, step=0.1,
                       tooltip="Larger values spend more steps on the coarse layout. 3 is the published default."),
        io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True,
                     tooltip="Draws the noise that the picture is painted from."),
        io.Combo.Input("size", options=["auto", *RATIOS], default="auto",
                       tooltip="auto: the ratio that the model itself proposes, usually the source picture's. Otherwise "
                               "width:height; the nearest of the model's sizes is taken."),
    ]


def paint(
    model: ModelHandle, condition: Condition, steps: int, guidance: float, shift: float, seed: int, size: str,
) -> dict[str, torch.Tensor]:
    """Denoise one picture -> LATENT, with the routing of its tokens beside the samples."""
    vae = model.backbone.vae

    def stage() -> dict[str, torch.Tensor]:
        # A VAE that is not there has no room in the plan while the backbone denoises: no previews then.
        tick = host.ticker(vae if vae.device == model.backbone.device else None)
        with recording(model.backbone) as routing:
            latent_bchw = sample(
                model, condition, steps=steps, guidance=guidance, shift=shift, seed=seed, size=size, on_tick=tick)
        return {"samples": vae.unscale(latent_bchw.float()).cpu(), ROUTING: routing.counts()}

    return memory.at_work(model, len(condition.pictures), stage)
