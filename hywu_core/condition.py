"""Step 1 of an edit: pictures and instruction become the Condition, from one prefill of the un-adapted backbone.

The condition (last-layer hidden states, which the weight generator reads) and the size ratio come out of the same forward pass;
the reference runs it twice. Everything that sampling needs later travels in the value, so source pictures are encoded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from .backbone import inputs
from .backbone.pictures import EncodedPicture, encode_picture, posterior_noise
from .elsewhere import done_where_the_model_is
from .errors import PictureError
from .handle import ModelHandle
from .progress import Tick, silent
from .text.template import text_sequence
from .vision.buckets import Buckets
from .vision.pictures import SourcePicture, prepare_picture, upright_rgb

MAX_PICTURES = 3


@dataclass(frozen=True, eq=False)
class Condition:
    """What one request looks like to the backbone.

    hidden_SD: hidden states (S, D) of the last layer, before the final norm, one per token. ratio_index: the size that the
    backbone would give the picture. pictures: the encoded sources. The texts and the seed are those of the request.
    """

    hidden_SD: torch.Tensor
    ratio_index: int
    instruction: str
    thinking: str
    system_prompt: str
    seed: int
    pictures: tuple[EncodedPicture, ...]
    backbone_fingerprint: str

    @property
    def picture_digests(self) -> tuple[str, ...]:
        return tuple(picture.digest for picture in self.pictures)


@done_where_the_model_is
def encode(
    model: ModelHandle,
    pictures: Sequence[Image.Image],
    instruction: str,
    thinking: str = "",
    *,
    seed: int = 0,
    fit: str = "stretch",
    system_prompt: str = "en_unified",
    on_tick: Tick = silent,
) -> Condition:
    """Encode a request (spec sections 0, 2 and 8).

    Args:
        pictures: none for a picture from text alone, else up to three sources in the order the instruction counts them.
        thinking: the text of ``think``, possibly edited; "" goes without.
        seed: draws each source's latent from the VAE's posterior.
        fit: "stretch" bends a source to its bucket (the published way when the size is "auto"), "crop" cuts it.
        system_prompt: a name of the checkpoint's ``system_prompt.py``, "None", or a text of one's own.
        on_tick: one tick a picture and a layer.

    Raises: PictureError, PromptError.
    """
    sources = fit_pictures(model, pictures, fit)
    noise = posterior_noise(model.config.vae, sources, seed)
    return encode_sources(model, sources, noise, instruction, thinking, seed, system_prompt, on_tick)


@torch.no_grad()
def encode_sources(
    model: ModelHandle,
    sources: Sequence[SourcePicture],
    noise: Sequence[torch.Tensor],
    instruction: str,
    thinking: str,
    seed: int,
    system_prompt: str,
    on_tick: Tick = silent,
) -> Condition:
    """``encode`` on fitted pictures, with the posterior noise (1, c, h, w) of each given."""
    sequence = text_sequence(
        model.tokenizer, model.config, model.generation, instruction, sources, thinking=thinking, bot_task="img_ratio",
        system_prompt=model.system_prompts.select(system_prompt, "img_ratio"))
    total = len(sources) + model.config.num_hidden_layers
    on_tick(0, total, None)
    encoded = encode_pictures(model, sources, noise, total, on_tick)
    backbone = model.backbone
    with backbone.at_work():
        hidden_BLD = backbone.run(
            inputs.embed(backbone, sequence, encoded),
            inputs.rope_table(backbone, sequence),
            inputs.mask(backbone, sequence),
            on_layer=lambda layer: on_tick(len(sources) + layer + 1, total, None),
        )
    # A base size whose table has fewer buckets than there are ratio tokens leaves the last tokens without a meaning.
    ratio_ids = list(model.tokenizer.ratio_ids)[: len(Buckets.of(model.config))]
    ratio_V = backbone.logits(hidden_BLD[:, -1:])[0, 0, ratio_ids]
    return Condition(
        hidden_BLD[0], int(ratio_V.argmax()), instruction, thinking, system_prompt, seed, tuple(encoded), model.fingerprint)


def fit_pictures(model: ModelHandle, pictures: Sequence[Image.Image], fit: str) -> list[SourcePicture]:
    """Source pictures fitted to their buckets. Raises PictureError for a bad one, by its number, or too many."""
    if len(pictures) > MAX_PICTURES:
        raise PictureError(f"{len(pictures)} pictures given, the backbone takes {MAX_PICTURES} at most: leave some out")
    upright = [upright_rgb(picture, f"picture {number}") for number, picture in enumerate(pictures, start=1)]
    return [prepare_picture(picture, model.config, fit) for picture in upright]


def encode_pictures(
    model: ModelHandle, sources: Sequence[SourcePicture], noise: Sequence[torch.Tensor], total: int, on_tick: Tick
) -> list[EncodedPicture]:
    """Encode the sources one by one, a tick (of ``total``) after each."""
    encoded = []
    for source, noise_bchw in zip(sources, noise, strict=True):
        encoded.append(encode_picture(model.backbone, source, noise_bchw))
        on_tick(len(encoded), total, None)
    return encoded
