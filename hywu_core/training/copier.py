"""The backbone's structured start: at step 0 it can already copy its first source picture, whatever text lies between.

Owns the weights that follow from the channel map; no gradient is needed for any of it but a 10 x 33 projection
(``places.find_places``). The ideas: (1) A large constant channel makes the RMS norms nearly linear. (2) Two heads of one layer
carry the 64 latent channels of the cell they look at. (3) The final layer forms x_t - copy, and a pair of constants that grows
with t inside each norm group turns it into (x_t - copy) / t, which is the velocity. (4) Where to look is found by place: zero
padding tells a latent cell that it lies near a border, heads of layer 0 look two cells up, down, left and right, heads of layer
1 four cells, and equal findings attract each other in the copy layer: up to 16 cells a side are told apart. (5) Behind an
``<eoi>`` a source picture knows that it is not the first. (6) *Skills that nothing reaches*: in the last two layers 64 units
each read one latent channel of the copy and would take it from the picture or add to it, but their gates are closed. What a
LoRA has to do for an edit is to open some of them. (7) *Squares*: units of layer 0 tell a cell how much brightness, colour,
coarse and fine structure it holds; two heads of the copy layer tell every token the means of these and of the colours, for both
pictures, so that contrast, noise and blur can be read off. Painted cells are not told: that is for the LoRA to know.
"""

import torch
from torch.nn import functional as F

from ..backbone.model import Backbone
from ..text.tokenizer import BOS, EOI, Tokenizer
from . import channels as at
from .places import look_around, tell_likeness, tell_second


@torch.no_grad()
def start(model: Backbone, tokenizer: Tokenizer) -> None:
    """Write the start into ``model``; torch's global seed decides the random rest. The VAE is not touched."""
    d = model.config.hidden_size
    unit = at.LEVEL / d**0.5
    _random(model)
    norms = [getattr(layer, name) for layer in model.model.layers for name in ("input_layernorm", "post_attention_layernorm")]
    for norm in [model.model.ln_f, *norms]:
        norm.weight.fill_(unit)
        norm.weight[at.CONSTANT] = unit / at.LEVEL
    wte = model.model.wte.weight
    wte.normal_(0, 1.0)
    wte[:, at.RESERVED] = 0
    wte[:, at.CONSTANT] = at.LEVEL
    wte[tokenizer.id(EOI), at.END_MARK] = at.FLAG
    wte[tokenizer.id(BOS), at.BEGIN_MARK] = at.FLAG
    for linear in _writers(model):
        linear.weight.mul_(0.5)
        linear.weight[at.RESERVED] = 0
        linear.bias[at.RESERVED] = 0
        linear.bias[at.CONSTANT] = at.LEVEL
    tower = model.vision_model
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    tower.embeddings.position_embedding.weight.normal_(0, 0.3)
    _layers(model)
    _patch_embed(model)
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    look_around(first, 2, at.SEEN, [(2 * side, 2 * side + 1) for side in range(4)])
    look_around(second, 4, at.FAR, [(2 * side, 2 * side + 1, 9 + 2 * side, 10 + 2 * side) for side in range(4)])
    tell_second(first)
    _repeat_ratio(model, tokenizer.id(tokenizer.img_size), list(tokenizer.ratio_ids))
    _skills(model)
    _squares(model)
    tell_likeness(model.model.layers[at.COPY_LAYER].self_attn)
    _final_layer(model)


def _random(model: Backbone) -> None:
    d = model.config.hidden_size
    model.lm_head.weight.normal_(0, d**-0.5)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = mlp.shared_mlp.down_proj.weight.shape[1], mlp.experts.down_proj.shape[2]
        for weight, size in (
            (attention.qkv_proj.weight, d**-0.5), (mlp.gate.wg.weight, d**-0.5),
            (mlp.shared_mlp.gate_and_up_proj.weight, d**-0.5), (mlp.experts.gate_and_up_proj, d**-0.5),
            (attention.o_proj.weight, d**-0.5), (mlp.shared_mlp.down_proj.weight, inner[0] ** -0.5),
            (mlp.experts.down_proj, inner[1] ** -0.5),
        ):
            weight.normal_(0, size)


def _writers(model: Backbone) -> tuple[torch.nn.Linear, ...]:
    """The last linears of what embeds something else than words and latents."""
    return model.timestep_emb.mlp[2], model.guidance_emb.mlp[2], model.vision_aligner.layers[-1]


def _layers(model: Backbone) -> None:
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.query_layernorm.weight.fill_(1.5)
        attention.key_layernorm.weight.fill_(1.5)
        # Nothing but the two heads writes the latent channels at the start.
        for out in (attention.o_proj.weight, layer.mlp.shared_mlp.down_proj.weight, *layer.mlp.experts.down_proj):
            out[:at.WORKSPACE] = 0
        if index != at.COPY_LAYER:
            continue
        rows, columns = at.heads(attention)
        q = attention.head_dim
        eye = torch.eye(q)
        for half in range(2):
            rows[half, -1] = 0
            rows[half, -1, :, half * q : (half + 1) * q] = eye
            columns[:, half, 0] = 0
            columns[at.COPY.start + half * q : at.COPY.start + (half + 1) * q, half, 0] = eye
        # One value that is the same wherever a free head looks: the constant part of an edit's LoRA can read it.
        rows[2, -1, -1] = 0
        rows[2, -1, -1, at.CONSTANT] = at.ALWAYS


def _patch_embed(model: Backbone) -> None:
    first, block = model.patch_embed.model
    group = model.config.hidden_size // 32  # channels of one norm group
    first.weight.zero_()
    first.weight[at.ORIGINAL, :, 1, 1] = torch.eye(64) / at.LATENT_UNIT
    # A constant inner channel, which the zero padding of the next convolutions turns into borders.
    first.bias.zero_()
    first.bias[64:128:2], first.bias[65:128:2] = 1.0, -1.0
    block.skip_connection.weight.zero_()
    block.skip_connection.weight[at.ORIGINAL, at.ORIGINAL, 0, 0] = torch.eye(64)
    block.skip_connection.bias.zero_()
    block.skip_connection.bias[at.CONSTANT] = at.LEVEL
    block.skip_connection.bias[at.LATENT_MARK] = at.FLAG
    block.emb_layers[1].weight.zero_()
    block.emb_layers[1].bias.zero_()
    second, third = block.in_layers[2], block.out_layers[3]
    second.weight[:group] = 0
    second.bias[:group] = 0
    one = F.silu(torch.tensor(1.0))
    taps = ((0, 1), (2, 1), (1, 0), (1, 2))  # above, below, left, right
    for inner, (row, column) in enumerate(taps):
        second.weight[inner, 64, row, column] = 1 / one  # 0 where that neighbour is missing, else 1
    second.bias[4], second.bias[5] = 3.0, -3.0  # keep the norm group's divisor the same for every grid
    third.weight.zero_()
    third.bias.zero_()
    # The first channel of the second group becomes at.FLAG wherever t > 0 (the smallest step in use is far above 0.01).
    block.out_layers[0].weight[group], block.out_layers[0].bias[group] = 0, 0
    t = torch.cat((torch.zeros(400), torch.linspace(0.02, 1, 400)))
    weight, bias = _solve_time(model.time_embed, t, (t > 0) * at.FLAG)
    inner = block.emb_layers[1].weight.shape[0] // 2 + group
    block.emb_layers[1].weight[inner], block.emb_layers[1].bias[inner] = weight, bias
    third.weight[at.PAINTED_MARK, group, 1, 1] = 1.0
    # Solve the flags from the neighbour's answer and the neighbour's neighbour's, on a large grid.
    probe = block.in_layers(first(torch.zeros(1, model.config.vae.latent_channels, 12, 12)))
    probe = F.silu(block.out_layers[0](probe))[0, 0, :, 6]
    cells = torch.stack((probe[:4], torch.cat((torch.zeros(1), probe[:3])), torch.ones(4)), 1)
    wanted = torch.eye(4)[:, :2] * at.FLAG
    solution = torch.linalg.lstsq(cells, wanted).solution
    for side, (row, column) in enumerate(taps):
        for order in range(2):
            out = at.FLAGS.start + 2 * side + order
            third.weight[out, side, 1, 1], third.weight[out, side, row, column] = solution[0, order], solution[1, order]
            third.bias[out] = solution[2, order]


def _solve_time(embedder: torch.nn.Module, t: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None = None):
    """Weight and bias of a linear behind silu(embedder(1000 t)) that gives ``wanted``, by (weighted) ridge regression."""
    features = torch.cat((F.silu(embedder(1000 * t)), torch.ones(len(t), 1)), 1).double()
    target = wanted.double()
    if weight is not None:
        features, target = features * weight.double().unsqueeze(1), target * weight.double()
    gram = features.T @ features
    gram += 1e-7 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, features.T @ target).float()
    return solution[:-1], solution[-1]


def _repeat_ratio(model: Backbone, size_id: int, ratio_ids: list[int]) -> None:
    """Copy layer: the answer's <img_size> token fetches the code of the first source's <img_ratio>, which lm_head knows."""
    attention, wte, lm_head = model.model.layers[at.COPY_LAYER].self_attn, model.model.wte.weight, model.lm_head.weight
    code = _far_apart(len(ratio_ids), at.RATIO_CODE.stop - at.RATIO_CODE.start)
    marks = slice(at.RATIO_MARK, at.RATIO_CODE.stop)
    wte[[size_id, *ratio_ids], at.ORIGINAL] = 0  # no squares that would disturb the code
    wte[size_id, at.SIZE_MARK] = at.FLAG
    wte[ratio_ids, at.RATIO_MARK] = at.FLAG
    wte[ratio_ids, at.RATIO_CODE] = 4 * code
    lm_head[:, marks] = 0
    lm_head[ratio_ids] = 0
    lm_head[ratio_ids, at.RATIO_CODE] = 0.5 * code
    rows, columns = at.heads(attention)
    slow = list(at.SLOW)
    rows[2, 0] = 0
    rows[2, attention.group] = 0
    rows[2, 0, slow, at.SIZE_MARK] = 1.0
    rows[2, attention.group, slow, at.RATIO_MARK] = 0.5
    rows[2, attention.group, slow, at.CONSTANT], rows[2, attention.group, slow, at.SECOND_MARK] = -1.0, -0.5
    places = code.shape[1]
    rows[2, -1, :places] = 0
    rows[2, -1, range(places), range(at.RATIO_CODE.start, at.RATIO_CODE.stop)] = 1.0
    columns[at.RATIO_CODE, 2, 0, :places] = torch.eye(places)


def _far_apart(count: int, places: int) -> torch.Tensor:
    """Codes (count, places) of -1 and 1, any two of which differ in 4 places or more: greedily the first ones."""
    found: list[int] = []
    for word in range(2**places):
        if all((word ^ other).bit_count() >= 4 for other in found):
            found.append(word)
    return torch.tensor([[1.0 if word >> place & 1 else -1.0 for place in range(places)] for word in found[:count]])


@torch.no_grad()
def make_firm(model: Backbone) -> None:
    """Make the queries and keys of picture copying large, once they are found.

    Their norm takes the size away again, so nothing changes, but a LoRA would have to be as large to turn them: it edits what
    is copied instead of flattening where it is looked up.
    """
    for index, layer in enumerate(model.model.layers[: at.COPY_LAYER + 1]):
        rows, _ = at.heads(layer.self_attn)
        rows[:2, 0] *= at.FIRM
        rows[:2, -2] *= at.FIRM
        if index < at.COPY_LAYER:
            rows[:2, 1] *= at.FIRM
        if index == 0:
            rows[-1, 0] *= at.FIRM
            rows[-1, -2] *= at.FIRM


def _skills(model: Backbone) -> None:
    """Closed units for a LoRA to open: see (6) above; the unit behind them is always the same and writes nowhere."""
    for index, sign in at.SKILL_SIGNS.items():
        mlp = model.model.layers[index].mlp.shared_mlp
        up, gate = mlp.gate_and_up_proj.weight.chunk(2)
        down = mlp.down_proj.weight
        up[: at.LATENTS + 1] = 0
        gate[: at.LATENTS + 1] = 0
        down[:, : at.LATENTS + 1] = 0
        up[:at.LATENTS, at.COPY] = torch.eye(at.LATENTS)
        down[at.COPY, :at.LATENTS] = sign * at.SKILL * torch.eye(at.LATENTS)
        up[at.LATENTS, at.CONSTANT], gate[at.LATENTS, at.CONSTANT] = at.ALWAYS / F.silu(torch.tensor(4.0)), 4.0


def _squares(model: Backbone) -> None:
    """Two units make a square: silu(x) x + silu(-x) (-x) = x x."""
    mlp = model.model.layers[0].mlp.shared_mlp
    up, gate = mlp.gate_and_up_proj.weight.chunk(2)
    down, unit = mlp.down_proj.weight, 0
    for place, (channels, mean_square) in enumerate(at.SQUARES):
        read = [start + channel for start in range(0, at.LATENTS, at.QUARTER) for channel in channels]
        for channel in read:
            for sign in (1.0, -1.0):
                up[unit], gate[unit], down[:, unit] = 0, 0, 0
                up[unit, channel] = gate[unit, channel] = sign
                down[at.RATIO_CODE.start + place, unit] = 1 / (mean_square * len(read))
                unit += 1


def protect(model: Backbone) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Masks (1 = free) for the base stage: language may use only what pictures do not need, so no picture has to be painted."""
    masks = {parameter: torch.ones_like(parameter) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed", "final_layer", "time_embed", "vae.")):
            masks[parameter].zero_()
    layers = model.model.layers
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        for out in (attention.o_proj.weight, mlp.shared_mlp.down_proj.weight):
            masks[out][:at.WORKSPACE] = 0
        masks[mlp.experts.down_proj][:, :at.WORKSPACE] = 0
        if index <= at.COPY_LAYER:
            for norm in (layer.input_layernorm, attention.query_layernorm, attention.key_layernorm):
                masks[norm.weight].zero_()
            parts = masks[attention.qkv_proj.weight].view(attention.kv_heads, attention.group + 2, attention.head_dim, -1)
            parts[:2] = 0
            if index == 0:
                parts[-1, 0], parts[-1, -2:] = 0, 0
            if index == at.COPY_LAYER:
                parts[:2, 1] = 1  # the heads beside the two copying ones
                # What repeats the size, and the constant value.
                places = at.RATIO_CODE.stop - at.RATIO_CODE.start
                parts[2, 0], parts[2, -2], parts[2, -1, :places], parts[2, -1, -1] = 0, 0, 0, 0
                parts[-1, :-1], parts[-1, -1, : at.LIKE] = 0, 0  # what tells the pictures' means
    for index, units in {0: at.SQUARE_UNITS, **dict.fromkeys(at.SKILL_SIGNS, at.LATENTS + 1)}.items():
        layer = layers[index]
        masks[layer.post_attention_layernorm.weight].zero_()
        for half in masks[layer.mlp.shared_mlp.gate_and_up_proj.weight].chunk(2):
            half[:units] = 0
        masks[layer.mlp.shared_mlp.down_proj.weight][:, :units] = 0
    wte, mask = model.model.wte.weight, masks[model.model.wte.weight]
    mask[:, at.RESERVED] = 0
    mask[wte[:, at.RATIO_MARK : at.SIZE_MARK + 1].any(1), at.ORIGINAL] = 0
    masks[model.model.ln_f.weight][at.RATIO_CODE] = 0
    lm_head = model.lm_head.weight
    masks[lm_head][:, at.RATIO_MARK : at.RATIO_CODE.stop] = 0
    # Sizes that the practice does not show would be unlearned.
    masks[lm_head][lm_head[:, at.RATIO_CODE].any(1)] = 0
    for linear in _writers(model):
        masks[linear.weight][at.RESERVED] = 0
        masks[linear.bias][at.RESERVED] = 0
    return masks


def _final_layer(model: Backbone) -> None:
    block, (norm, _, out) = model.final_layer.model[0], model.final_layer.model[1]
    e = torch.arange(64) // 2 * 4 + torch.arange(64) % 2  # places of the 64 differences; +at.PAIR, -at.PAIR follow every two
    block.skip_connection.weight.zero_()
    block.skip_connection.bias.zero_()
    block.skip_connection.weight[e, torch.arange(64), 0, 0] = 1.0
    block.skip_connection.weight[e, torch.arange(64, 128), 0, 0] = -1.0
    block.out_layers[3].weight.zero_()
    block.out_layers[3].bias.zero_()
    block.out_layers[3].weight[2::4, 0, 1, 1] = at.PAIR
    block.out_layers[3].weight[3::4, 0, 1, 1] = -at.PAIR
    # Inner channel 0 is to be t after its SiLU: solve the shift for it.
    block.out_layers[0].weight[0] = 0
    block.out_layers[0].bias[0] = 0
    t = torch.linspace(0.01, 1, 400)
    shift = t.clone()
    for _ in range(60):
        value = F.silu(shift)
        shift -= (value - t) / (torch.sigmoid(shift) * (1 + shift * (1 - torch.sigmoid(shift))))
    linear = block.emb_layers[1]
    inner = linear.weight.shape[0] // 2
    linear.weight.mul_(0.3)
    linear.weight[[0, inner]] = 0
    linear.bias[[0, inner]] = 0
    linear.weight[inner], linear.bias[inner] = _solve_time(model.time_embed_2, t, shift, 1 / t)
    norm.weight.fill_(at.GAIN)
    norm.bias.fill_(at.BIAS)
    typical = ((at.PAIR**2 + 1.1) / 2) ** 0.5  # the norm's divisor over t
    out.weight.zero_()
    out.bias.zero_()
    scale = at.LATENT_UNIT * typical / at.GAIN
    out.weight[torch.arange(64), e, 1, 1] = scale
    # The group's mean is taken away by the norm and read back from its constant pair.
    group = torch.arange(64) // 2 * 4
    for offset in (2, 3):
        out.weight[torch.arange(64), group + offset, 1, 1] = -scale / 2
