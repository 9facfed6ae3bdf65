"""From a token sequence to the backbone's input embeddings (spec section 7).

Owns what stands where: word embeddings, the tokens of source pictures, and the *canvas*, the run of tokens from ``<timestep>``
to the last ``<img>`` of the picture being made, which is all that later denoise steps recompute.
"""

from collections.abc import Sequence as Many

import torch

from ..text.template import Sequence
from . import rope
from .mask import CanvasSight, attention_mask
from .model import Backbone
from .pictures import EncodedPicture
from .stage import Rope

TIMESTEP_SCALE = 1000.0


def embed(backbone: Backbone, sequence: Sequence, pictures: Many[EncodedPicture]) -> torch.Tensor:
    """(B, L, D) embeddings of a sequence with its source pictures in place; a canvas keeps its word embeddings.

    A picture's tokens are (L, D), the same for all rows, or (B, L, D) in training, where every row has pictures of its own.
    """
    hidden_BLD = backbone.embed(sequence.ids_BL)
    for image in sequence.images:
        if image.kind == "vae":
            hidden_BLD[:, image.start : image.stop] = pictures[image.picture].vae_tokens_LD.to(hidden_BLD)
        elif image.kind == "vit":
            hidden_BLD[:, image.start : image.stop] = pictures[image.picture].vit_tokens_LD.to(hidden_BLD)
    if sequence.cond_timestep:
        clean_D = backbone.timestep_emb(torch.zeros(1, device=backbone.device))
        hidden_BLD[:, list(sequence.cond_timestep)] = clean_D.to(hidden_BLD)
    return hidden_BLD


def canvas(
    backbone: Backbone, sequence: Sequence, latent_bchw: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor, guidance: float
) -> torch.Tensor:
    """(b, n, D) tokens of the canvas at time ``t`` (0..1000, one or b of them): timestep, guidance and next timestep where the
    backbone has them, and the noisy latents (b, c, h, w). All rows of a request share one; in training each row has its own.
    """
    device = backbone.device
    b = latent_bchw.shape[0]
    t_B = t.reshape(-1).to(device).expand(b)
    tokens = [backbone.timestep_emb(t_B).unsqueeze(1)]
    if sequence.guidance is not None:
        # The distilled backbone was trained with its guidance rounded to bf16 (2.5 -> 2500 -> 2496), spec section 8.
        scaled = torch.tensor([TIMESTEP_SCALE * guidance]).bfloat16().float()
        tokens.append(backbone.guidance_emb(scaled.to(device)).unsqueeze(1).expand(b, -1, -1))
    if sequence.gen_timestep_r is not None:
        tokens.append(backbone.timestep_r_emb(t_next.reshape(-1).to(device).expand(b)).unsqueeze(1))
    tokens.append(backbone.patch_embed(latent_bchw.to(device), backbone.time_embed(t_B)))
    return torch.cat(tokens, dim=1)


def rope_table(backbone: Backbone, sequence: Sequence) -> Rope:
    """Cosines and sines (L, Q) for a sequence, where the backbone's sequences begin."""
    return _table(backbone, rope.positions(sequence.length, sequence.rope_spans(backbone.config.cond_token_attn_type)))


def text_rope(backbone: Backbone, positions_L: torch.Tensor) -> Rope:
    """Cosines and sines (L, Q) for tokens of text at these positions of a sequence."""
    return _table(backbone, positions_L.unsqueeze(1).expand(-1, 2))


def _table(backbone: Backbone, yx_L2: torch.Tensor) -> Rope:
    cos_LQ, sin_LQ = rope.table(yx_L2, backbone.config.attention_head_dim, backbone.config.rope_theta)
    return cos_LQ.to(backbone.device), sin_LQ.to(backbone.device)


def canvas_sight(backbone: Backbone, sequence: Sequence) -> CanvasSight:
    """Who sees what when the canvas is computed alone, against the cache."""
    start, stop = sequence.later_slice
    return CanvasSight.of(start, (sequence.gen.start, stop)).to(backbone.device)


def mask(backbone: Backbone, sequence: Sequence, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The sequence's attention mask (rows, L), all rows of it if ``rows`` is None."""
    return attention_mask(sequence.length, sequence.full_spans(backbone.config.cond_token_attn_type), rows).to(backbone.device)
