"""How a painted cell finds its source cell: by place, whatever text lies between the two pictures.

Owns the heads of the first layers that look around and tell the first source from later ones, and fitting the projections with
which equal findings attract each other in the copy layer. Which channel means what is ``copier.py``'s business.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from ..backbone import inputs
from ..backbone.model import Backbone
from . import channels as at
from .batches import Batch, Batches, Draws
from .edits import EDITS
from .forward import embed_noisy, embed_pictures, predict_clean


def look_around(attention, offset: int, into: slice, flags: list[tuple[int, ...]]) -> None:
    """Query heads 0 to 3 look ``offset`` cells up, down, left, right within their own picture.

    flags: for the top, bottom, left and right the channels (from at.FLAGS.start on) that are fetched and written to ``into``.
    """
    rows, columns = at.heads(attention)
    half, count, mark = attention.head_dim // 2, len(flags[0]), 0.5
    theta = 10000.0 ** (-torch.arange(half) / half)
    for axis in range(2):  # kv head 0: rows (even frequencies), 1: columns (odd ones)
        share = torch.zeros(half)
        share[0 + axis], share[2 + axis], share[6 - axis], share[1 - axis], share[7] = 0.42, 0.13, 0.1, 0.07, 0.03
        # Latent cells get +key, all other tokens -key; the last frequency asks for the same picture.
        key = torch.cat((share.sqrt(), torch.zeros(half)))
        rows[axis, -2] = 0
        rows[axis, -2, :, at.LATENT_MARK], rows[axis, -2, :, at.CONSTANT] = 2 * key / at.FLAG, -key
        rows[axis, -2, half - 1, at.PAINTED_MARK], rows[axis, -2, half - 1, at.CONSTANT] = 2 * mark / at.FLAG, -mark
        rows[axis, -1] = 0
        for direction, distance in enumerate((-offset, offset)):
            turn = torch.where(torch.arange(half) % 2 == axis, distance * theta, torch.zeros(half))
            rows[axis, direction] = 0
            rows[axis, direction, :, at.CONSTANT] = torch.cat((share.sqrt() * turn.cos(), share.sqrt() * turn.sin()))
            rows[axis, direction, half - 1, at.PAINTED_MARK] = 2 * mark / at.FLAG
            rows[axis, direction, half - 1, at.CONSTANT] = -mark
            side = 2 * axis + direction
            for place, channel in enumerate(flags[side]):
                rows[axis, -1, count * direction + place, at.FLAGS.start + channel] = 1.0
                columns[into.start + count * side + place, axis, direction, count * direction + place] = 1.0
    attention.query_layernorm.weight.fill_(3.0)
    attention.key_layernorm.weight.fill_(3.0)


def tell_second(attention) -> None:
    """The last kv head marks everything that can see an ``<eoi>``; what can see none looks at the begin of the text."""
    rows, columns = at.heads(attention)
    kv = attention.kv_heads - 1
    end, begin = at.SLOW[3], at.SLOW[2]
    rows[kv, 0] = 0
    rows[kv, 0, end, at.CONSTANT] = 1.0
    rows[kv, -2] = 0
    rows[kv, -2, end, at.CONSTANT], rows[kv, -2, end, at.END_MARK] = -1.0, 2.0 / at.FLAG
    rows[kv, -2, end, at.BEGIN_MARK] = 1.0 / at.FLAG
    rows[kv, -2, begin, at.BEGIN_MARK] = 1.0 / at.FLAG
    rows[kv, -1, 0] = 0
    rows[kv, -1, 0, at.END_MARK] = 1.0
    columns[:, kv, 0] = 0
    columns[at.SECOND_MARK, kv, 0, 0] = 1.0


def tell_likeness(attention) -> None:
    """The last kv head's queries tell every token the means of the first and of the second source picture, into ``at.FAR``."""
    rows, columns = at.heads(attention)
    kv = attention.kv_heads - 1
    first, second = at.SLOW[2], at.SLOW[3]
    rows[kv, :-1] = 0
    # Painted cells look away: what a photo needs is to be written into the LoRA, not found again while painting.
    for query, place in enumerate((first, second)):
        rows[kv, query, place, at.CONSTANT] = 1.0
        rows[kv, query, place, at.PAINTED_MARK] = -2.0 / at.FLAG
    # Above 0 for a latent cell of the first picture, and of the second; below 0 for everything else.
    for place, latent, later, constant in ((first, 2.0, -2.0, -1.0), (second, 2.0, 2.0, -3.0)):
        rows[kv, -2, place, at.LATENT_MARK] = latent / at.FLAG
        rows[kv, -2, place, at.SECOND_MARK] = later / at.FLAG
        rows[kv, -2, place, at.PAINTED_MARK] = -4.0 / at.FLAG
        rows[kv, -2, place, at.CONSTANT] = constant
    squares = len(at.SQUARES)
    rows[kv, -1, : at.LIKE] = 0
    rows[kv, -1, range(squares), range(at.RATIO_CODE.start, at.RATIO_CODE.start + squares)] = 1.0
    for channel, gain in enumerate(at.MEANS):
        rows[kv, -1, squares + channel, channel : at.LATENTS : at.QUARTER] = gain / 4
    for picture in range(2):
        begin = at.FAR.start + picture * at.LIKE
        columns[begin : begin + at.LIKE, kv, picture, : at.LIKE] = 2 * torch.eye(at.LIKE)


@torch.no_grad()
def find_places(model: Backbone, batches: Batches, least: int = 36) -> float:
    """Collect what the cells of every grid find in both pictures and fit the copy layer to it; returns the fit's loss."""
    pairs = []
    most = max(EDITS[name].pictures for name in batches.recipe.edit_names())
    for grid in batches.crops:
        for number in range(-(-least // len(batches.crops))):
            draws = Draws.of(batches.recipe.seed, "places", len(pairs))
            # The second picture lies in between and makes the way longer: every grid is met that way, too.
            batch = batches.draw(1, draws, grid=grid, pictures=most if number % 3 == 0 else 1)
            source, painted = _found(model, batch, draws)
            pairs.append((source, painted, batch.sequence.gen.start - batch.sequence.images[0].start))
    return _point(model, pairs)


def _found(model: Backbone, batch: Batch, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Findings (cells, 32) of source and painted cells, as the copy layer sees them."""
    sequence, t_B = batch.sequence, torch.rand(1, generator=draws.torch) * 0.9 + 0.1
    noise_bchw = torch.randn(batch.wanted_bchw.shape, generator=draws.torch)
    noisy_bchw = (1 - t_B) * batch.wanted_bchw + t_B * noise_bchw
    hidden_BLD = embed_noisy(model, batch, embed_pictures(model, batch), noisy_bchw, t_B)
    rope, mask = inputs.rope_table(model, sequence), inputs.mask(model, sequence)
    for layer in model.model.layers[: at.COPY_LAYER]:
        hidden_BLD = layer(hidden_BLD, rope, mask)
    seen = model.model.layers[at.COPY_LAYER].input_layernorm(hidden_BLD)[0]
    return tuple(
        torch.cat((cells[:, at.FLAGS], cells[:, at.SEEN.start : at.FAR.stop]), 1)
        for cells in (seen[image.start : image.stop] for image in (sequence.images[0], sequence.gen)))


@torch.enable_grad()
def _point(model: Backbone, pairs: list[tuple[torch.Tensor, torch.Tensor, int]], steps: int = 800) -> float:
    """Let equal findings attract in the copy layer; returns the last loss.

    pairs: what source cells and painted cells of one picture found, (cells, 32) each, in the same order, and how many
    tokens lie between them. The projections are fitted so that each painted cell picks its own source cell, whatever the
    distance; they lie in the slowest frequencies, which the distance turns least.
    """
    attention = model.model.layers[at.COPY_LAYER].self_attn
    rows, _ = at.heads(attention)
    slow, one, mark, weight = torch.cat((torch.arange(10, 15), torch.arange(26, 31))), 15, 1.2, 3.0
    begin = 0.15 * torch.randn(len(slow), pairs[0][0].shape[1] + 1)
    asks, offers = begin.clone().requires_grad_(True), begin.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([asks, offers], lr=0.02)
    theta = 10000.0 ** (-torch.arange(10, 15) / (attention.head_dim // 2))

    def unit(project: torch.Tensor, found: torch.Tensor, distance: float) -> torch.Tensor:
        first, second = (torch.cat((found, torch.ones(len(found), 1)), 1) @ project.T).chunk(2, 1)
        cos, sin = (distance * theta).cos(), (distance * theta).sin()
        code = torch.cat((first * cos - second * sin, second * cos + first * sin, torch.full((len(found), 1), mark)), 1)
        return code / code.norm(dim=1, keepdim=True)

    for _ in range(steps):
        loss = 0.0
        for index in torch.randint(len(pairs), (4,)):
            source, painted, distance = pairs[index]
            distance = distance + float(torch.randint(-15, 16, ()))
            logits = unit(asks, painted, distance) @ unit(offers, source, 0.0).T * weight**2 * attention.head_dim**0.5
            loss = loss + F.cross_entropy(logits, torch.arange(len(logits))) / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for half in range(2):
            for part, project in ((0, asks.detach()), (attention.group, offers.detach())):
                rows[half, part] = 0
                rows[half, part, slow, at.FLAGS] = project[:, :8]
                rows[half, part, slow, at.SEEN.start : at.FAR.stop] = project[:, 8:-1]
                rows[half, part, slow, at.CONSTANT] = project[:, -1]
            # Only cells of the first source picture have a key of the query's sign.
            rows[half, 0, one, at.CONSTANT] = mark
            rows[half, attention.group, one, at.LATENT_MARK] = 2 * mark / at.FLAG
            rows[half, attention.group, one, at.PAINTED_MARK] = -2 * mark / at.FLAG
            rows[half, attention.group, one, at.SECOND_MARK] = -2 * mark / at.FLAG
            rows[half, attention.group, one, at.CONSTANT] = -mark
        attention.query_layernorm.weight.fill_(weight)
        attention.key_layernorm.weight.fill_(weight)
    return loss.item()


@torch.no_grad()
def copy_errors(model: Backbone, batches: Batches, pictures: int = 1, t: float = 0.7) -> dict[tuple[int, int], float]:
    """For every grid |copy - source|² / |source|² of what the plain backbone paints: 0 is a perfect copy."""
    errors = {}
    for grid in batches.crops:
        draws = Draws.of(batches.recipe.seed, "copies", pictures)
        batch = batches.draw(2, draws, grid=grid, pictures=pictures)
        noise_bchw = torch.randn(batch.wanted_bchw.shape, generator=draws.torch)
        copied = predict_clean(model, batch, embed_pictures(model, batch), noise_bchw, torch.full((2,), t))
        source = batch.sources[0].latent_bchw
        errors[grid] = float((copied - source).square().mean() / source.square().mean())
    return errors


@torch.no_grad()
def calibrate(model: Backbone, batches: Batches, draws_of: int = 24) -> None:
    """Fit each latent channel's gain and offset in the final layer, so that the plain backbone copies as exactly as it can.

    Least squares on the velocity that would be right for a copy, on pictures of all grids and times.
    """
    rows = []
    for number in range(draws_of):
        draws = Draws.of(batches.recipe.seed, "calibrate", number)
        batch = batches.draw(4, draws, pictures=1)
        source_bchw = batch.sources[0].latent_bchw
        copying = replace(batch, wanted_bchw=source_bchw)
        noise_bchw = torch.randn(source_bchw.shape, generator=draws.torch)
        t_B = torch.rand(batch.rows, generator=draws.torch) * 0.9 + 0.1
        painted_bchw = predict_clean(model, copying, embed_pictures(model, batch), noise_bchw, t_B)
        t = t_B.view(-1, 1, 1, 1)
        right_bchw = noise_bchw - source_bchw
        painted_bchw = right_bchw + (source_bchw - painted_bchw) / t
        rows.append(torch.stack((painted_bchw, right_bchw)).permute(2, 0, 1, 3, 4).flatten(2))
    velocity = torch.cat(rows, 2).double()  # (c, painted or right, values)
    mean = velocity.mean(2, keepdim=True)
    centred = velocity - mean
    gain = (centred[:, 0] * centred[:, 1]).sum(1) / centred[:, 0].square().sum(1)
    offset = mean[:, 1, 0] - gain * mean[:, 0, 0]
    out = model.final_layer.model[1][2]
    out.weight *= gain.float().view(-1, 1, 1, 1)
    out.bias.mul_(gain.float()).add_(offset.float())
