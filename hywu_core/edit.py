"""One edit from pictures and an instruction to a picture: all steps in order, nothing else.

The command line, the tests and the README's example call this; the nodes call the same steps one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from .condition import Condition, encode
from .generator.handle import GeneratorHandle, write_lora
from .handle import ModelHandle
from .lora.attach import check_strength, inject
from .lora.value import LoRA
from .progress import silent
from .sampling.denoise import check_request, choose_bucket, sample
from .think import think
from .vision.buckets import Buckets
from .vision.pictures import restore_size


@dataclass(frozen=True, eq=False)
class Edit:
    """The edited picture and everything that was made on the way: latent (1, c, h, w) on the diffusion scale."""

    picture: Image.Image
    latent_bchw: torch.Tensor
    lora: LoRA | None
    thinking: str
    condition: Condition


def edit(
    model: ModelHandle,
    generator: GeneratorHandle | None,
    pictures: Sequence[Image.Image],
    instruction: str,
    *,
    thinking: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    seed: int = 0,
    size: str = "auto",
    strength: float = 1.0,
    on_stage=lambda name: silent,
) -> Edit:
    """Edit ``pictures`` as told (spec section 0); no pictures: paint from text; no generator: the plain backbone.

    Args:
        thinking: None lets the backbone think first, "" goes without, any other text is used as it is.
        strength: of the written LoRA; 0 is the plain backbone.
        seed: for thinking, the sources' latents and the noise.
        size: "auto" keeps to the sources' shape, down to their exact ratio.
        on_stage: asked for the tick of each stage by name ("think", "encode", "generate", "sample").

    Raises: PictureError, PromptError, RequestError, LoRAError.
    """
    check_request(model, steps, guidance, shift, seed, size)
    check_strength(strength)
    if thinking is None:
        thinking = think(model, pictures, instruction, seed=seed, on_tick=on_stage("think"))
    fit = "stretch" if size == "auto" else "crop"
    condition = encode(model, pictures, instruction, thinking, seed=seed, fit=fit, on_tick=on_stage("encode"))
    lora = None
    if generator is not None:
        lora = write_lora(generator, condition, on_stage("generate"))
        model = inject(model, lora, strength)
    latent_bchw = sample(
        model, condition, steps=steps, guidance=guidance, shift=shift, seed=seed, size=size, on_tick=on_stage("sample"))
    picture = decode(model, latent_bchw)
    if size == "auto":
        picture = restore(model, condition, picture)
    return Edit(picture, latent_bchw, lora, thinking, condition)


@torch.no_grad()
def decode(model: ModelHandle, latent_bchw: torch.Tensor) -> Image.Image:
    """A latent (1, c, h, w) on the diffusion scale as an 8-bit picture (spec section 9)."""
    vae = model.backbone.vae
    with model.backbone.present("vae") as device:
        pixels_bchw = vae.decode(vae.unscale(latent_bchw).to(device, vae.dtype))
    bytes_hwc = ((pixels_bchw[0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(bytes_hwc.cpu().numpy())


def restore(model: ModelHandle, condition: Condition, picture: Image.Image) -> Image.Image:
    """Bring a picture of size "auto" back to the exact ratio of the source it follows (spec section 10, last paragraph)."""
    bucket = choose_bucket(model, condition, "auto")
    originals_hw = [source.original_hw for source in condition.pictures]
    height, width = restore_size(bucket, originals_hw, Buckets.of(model.config))
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)
