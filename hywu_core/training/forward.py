"""The two losses, computed by the modules that inference runs.

Owns the differentiable way through the backbone: embedding a batch, the prefix's hidden states (which are the condition), the
words' cross entropy, and the flow-matching loss of the painted picture with whatever LoRA is attached. Same template, same
embedding, same layers as ``condition.encode`` and ``sampling.denoise``; only the rows of a batch differ from each other.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..backbone import inputs
from ..backbone.model import Backbone
from ..text.template import Sequence
from .batches import Batch

GUIDANCE = 2.5
LEAST_TIME = 0.05
# Below this mean squared pixel error (30 dB) a row's loss flattens: no use in polishing what the VAE cannot show.
GOOD_ENOUGH = 1e-3


class RowPictures(NamedTuple):
    """A source's tokens, one picture a row: (B, L, D)."""

    vae_tokens_LD: torch.Tensor
    vit_tokens_LD: torch.Tensor


def embed_pictures(backbone: Backbone, batch: Batch) -> list[RowPictures]:
    """Every source picture of every row as tokens."""
    zero_B = torch.zeros(1, device=backbone.device)
    encoded = []
    for source in batch.sources:
        features = backbone.vision_model(source.patches, source.patch_mask, [source.grid] * batch.rows)
        clean_BD = backbone.time_embed(zero_B).expand(batch.rows, -1)
        encoded.append(RowPictures(backbone.patch_embed(source.latent_bchw, clean_BD), backbone.vision_aligner(features)))
    return encoded


def prefix_hidden(backbone: Backbone, batch: Batch, pictures: list[RowPictures]) -> torch.Tensor:
    """Last hidden states (B, S, D) of everything before the painted picture: the condition, and where words come from."""
    sequence = batch.sequence
    sources = tuple(image for image in sequence.images if image.kind != "gen")
    prefix = Sequence(sequence.ids_BL[:, : batch.prefix], sources, sequence.cond_timestep)
    return backbone.run(inputs.embed(backbone, prefix, pictures), inputs.rope_table(backbone, prefix),
                        inputs.mask(backbone, prefix))


def word_loss(backbone: Backbone, hidden_BSD: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
    """Cross entropy of the taught words, and the share of them that the model would choose."""
    answers_BL = batch.answers_BL.to(hidden_BSD.device)
    taught = answers_BL >= 0
    logits = backbone.logits(hidden_BSD[taught])
    return F.cross_entropy(logits, answers_BL[taught]), (logits.argmax(-1) == answers_BL[taught]).float().mean().item()


def embed_noisy(
    backbone: Backbone, batch: Batch, pictures: list[RowPictures], noisy_bchw: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """The whole sequences (B, L, D) as denoise step 0 embeds them, with the noisy latents (B, c, h, w) at time t in place."""
    sequence, scaled_B = batch.sequence, inputs.TIMESTEP_SCALE * t_B
    hidden_BLD = inputs.embed(backbone, sequence, pictures)
    canvas_BLD = inputs.canvas(backbone, sequence, noisy_bchw, scaled_B, scaled_B, GUIDANCE)
    hidden_BLD[:, slice(*sequence.later_slice)] = canvas_BLD.to(hidden_BLD)
    return hidden_BLD


def predict_clean(
    backbone: Backbone, batch: Batch, pictures: list[RowPictures], noise_bchw: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """The clean latents (B, c, h, w) that the backbone sees in x_t = (1 - t) x_0 + t n, with whatever is attached to it.

    One full pass as denoise step 0 makes it: x_0 = x_t - t v.
    """
    sequence = batch.sequence
    t = t_B.view(-1, 1, 1, 1)
    noisy_bchw = (1 - t) * batch.wanted_bchw + t * noise_bchw
    hidden_BLD = embed_noisy(backbone, batch, pictures, noisy_bchw, t_B)
    # What follows the picture is invisible to it.
    seen = sequence.gen.stop
    rope = tuple(part[:seen] for part in inputs.rope_table(backbone, sequence))
    hidden_BLD = backbone.run(hidden_BLD[:, :seen], rope, inputs.mask(backbone, sequence)[:seen, :seen])
    velocity_bchw = backbone.velocity(hidden_BLD[:, sequence.gen.start : seen], inputs.TIMESTEP_SCALE * t_B,
                                      sequence.gen.grid)
    return noisy_bchw - t * velocity_bchw


def flow_errors(
    backbone: Backbone, batch: Batch, pictures: list[RowPictures], weight_c: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error (B,) of a noisy pass in pixels (0..1), as far as the VAE can see them.

    The flow-matching error |v - (n - x_0)|² times t², each latent channel weighted by how many pixels it moves (``weight_c``,
    the inverse norm of its encoder kernel). The noise and t (12 % of the draws are t = 1) come from ``generator``.
    """
    rows = batch.rows
    noise_bchw = torch.randn(batch.wanted_bchw.shape, generator=generator)
    t_B = 1 - torch.rand(rows, generator=generator) ** 1.4
    t_B = torch.where(torch.rand(rows, generator=generator) < 0.12, 1.0, t_B.clamp_min(LEAST_TIME))
    clean_bchw = predict_clean(backbone, batch, pictures, noise_bchw.to(backbone.device), t_B.to(backbone.device))
    error_bchw = (clean_bchw - batch.wanted_bchw) * weight_c.view(1, -1, 1, 1)
    # A cell is 768 values in -1..1.
    return error_bchw.square().sum(1).mean((1, 2)) / 768 / 4


def flow_loss(errors_B: torch.Tensor) -> torch.Tensor:
    """Mean log of the errors: a decibel counts alike whether an edit changes much or little."""
    return (errors_B + GOOD_ENOUGH).log().mean()


def decibels(errors_B: torch.Tensor) -> torch.Tensor:
    """Mean squared errors as PSNR in dB."""
    return -10 * errors_B.clamp_min(1e-9).log10()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    if device.type == "cpu":
        return batch
    sources = tuple(
        replace(source, latent_bchw=source.latent_bchw.to(device), patches=source.patches.to(device),
                patch_mask=source.patch_mask.to(device)) for source in batch.sources)
    return replace(batch, sources=sources, wanted_bchw=batch.wanted_bchw.to(device))
