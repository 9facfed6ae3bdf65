"""The backbone's structured start: at step 0 it can already copy, as soon as it knows where to look.

Owns which channel of the residual stream means what, and the weights that follow from it. Three ideas: (1) a large
constant channel makes the RMS norms nearly linear; (2) two heads of one layer carry the 64 latent channels of the token
they look at; (3) the final layer forms x_t - copy, and a pair of constants that grows with t inside each norm group turns
it into (x_t - copy) / t, which is the velocity, at the right amplitude. Where to look is found by place: zero padding
tells a latent cell that it lies near a border, four heads of layer 0 look two cells up, down, left and right, four of
layer 1 look four cells, and equal findings attract each other in the copy layer, whatever text lies between the two
pictures. That tells up to 16 cells a side apart.
"""

import torch
from network import Backbone

LATENT_UNIT = 3.0  # latent / 3 has a standard deviation of about 1
COPY_LAYER = 2
COPY_HEADS = (0, 2)  # query heads; of key/value heads 0 and 1
ORIGINAL, COPY, CONSTANT = slice(0, 64), slice(64, 128), 128
# One channel for every distance from the top, the bottom, the left and the right border: 0 and 1, then 2 and 3, then 4 to 7.
FLAGS, LATENT_MARK, SEEN, FAR = slice(129, 137), 137, slice(138, 146), slice(146, 162)
PAINTED_MARK = 162  # a latent cell of the painted picture: its timestep is not 0
FLAG = 4.0
RATIO_MARK, SIZE_MARK = 163, 164  # of <img_ratio_i> and <img_size> tokens
RATIO_CODE = slice(165, 181)
RESERVED = slice(128, 163)  # nothing but what is written here may touch these
WORKSPACE = slice(163, 192)  # what the language may write; everything below belongs to pictures
LEVEL = 120.0  # of the constant channel
PAIR = 8.0  # of the constant pairs at t = 1, in latent units
GAIN, BIAS = 4.0, 8.0  # put the last SiLU's input into 5..11, where it is the identity


def born(model: Backbone, size_id: int, ratio_ids: list[int]) -> None:
    """Write the start into ``model``; the global torch seed decides the random rest."""
    d = model.config.hidden_size
    unit = LEVEL / d**0.5
    with torch.no_grad():
        for norm in [
            model.ln_f,
            *(getattr(layer, name) for layer in model.layers for name in ("input_layernorm", "post_attention_layernorm")),
        ]:
            norm.weight.fill_(unit)
            norm.weight[CONSTANT] = unit / LEVEL
        model.wte.weight.normal_(0, 1.0)
        model.wte.weight[:, RESERVED] = 0
        model.wte.weight[:, CONSTANT] = LEVEL
        model.lm_head.weight.normal_(0, d**-0.5)
        for linear in _writers(model):
            linear.weight.mul_(0.5)
            linear.weight[RESERVED] = 0
            linear.bias[RESERVED] = 0
            linear.bias[CONSTANT] = LEVEL
        tower = model.vision_model
        for parameter in tower.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        tower.embeddings.position_embedding.weight.normal_(0, 0.3)
        _layers(model)
        _patch_embed(model)
        _look_around(model.layers[0], 2, SEEN, [(2 * side, 2 * side + 1) for side in range(4)])
        _look_around(model.layers[1], 4, FAR, [(2 * side, 2 * side + 1, 9 + 2 * side, 10 + 2 * side) for side in range(4)])
        _repeat_ratio(model, size_id, ratio_ids)
        _final_layer(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _writers(model: Backbone) -> tuple[torch.nn.Linear, ...]:
    """The last linears of what embeds something else than words and latents."""
    return model.timestep_emb.mlp[2], model.guidance_emb.mlp[2], model.vision_aligner.layers[-1]


def _layers(model: Backbone) -> None:
    for index, layer in enumerate(model.layers):
        layer.query_layernorm.weight.fill_(1.5)
        layer.key_layernorm.weight.fill_(1.5)
        # Nothing but the two heads writes the latent channels at the start.
        for out in (layer.o_proj, layer.shared_out, *layer.experts_out):
            out.mul_(3.0)
            out[: WORKSPACE.start] = 0
        if index != COPY_LAYER:
            continue
        rows = layer.qkv_proj.view(layer.kv, layer.group + 2, layer.q, -1)
        columns = layer.o_proj.view(layer.o_proj.shape[0], layer.kv, layer.group, layer.q)
        eye = torch.eye(layer.q)
        for half in range(2):
            rows[half, -1] = 0
            rows[half, -1, :, half * layer.q : (half + 1) * layer.q] = eye
            columns[:, half, 0] = 0
            columns[COPY.start + half * layer.q : COPY.start + (half + 1) * layer.q, half, 0] = eye
        # One value that is 1 wherever a free head looks: the constant part of an edit's LoRA reads it.
        rows[2, -1, -1] = 0
        rows[2, -1, -1, CONSTANT] = 1.0


def _patch_embed(model: Backbone) -> None:
    first, block = model.patch_embed.model
    first.weight.zero_()
    first.weight[ORIGINAL, :, 1, 1] = torch.eye(64) / LATENT_UNIT
    # A constant inner channel, which the zero padding of the next convolutions turns into borders.
    first.bias.zero_()
    first.bias[64:128:2], first.bias[65:128:2] = 1.0, -1.0
    block.skip_connection.weight.zero_()
    block.skip_connection.weight[ORIGINAL, ORIGINAL, 0, 0] = torch.eye(64)
    block.skip_connection.bias.zero_()
    block.skip_connection.bias[CONSTANT] = LEVEL
    block.skip_connection.bias[LATENT_MARK] = FLAG
    block.emb_layers[1].weight.zero_()
    block.emb_layers[1].bias.zero_()
    second, third = block.in_layers[2], block.out_layers[3]
    second.weight[:6] = 0
    second.bias[:6] = 0
    one = torch.nn.functional.silu(torch.tensor(1.0))
    above, below = (0, 1), (2, 1)
    taps = (above, below, (1, 0), (1, 2))
    for inner, (row, column) in enumerate(taps):
        second.weight[inner, 64, row, column] = 1 / one  # 0 where that neighbour is missing, else 1
    second.bias[4], second.bias[5] = 3.0, -3.0  # keep the norm group's divisor the same for every grid
    third.weight.zero_()
    third.bias.zero_()
    # Inner channel 6 becomes FLAG wherever t > 0 (the smallest step of any schedule in use is far above 0.01).
    block.out_layers[0].weight[6], block.out_layers[0].bias[6] = 0, 0
    t = torch.cat((torch.zeros(400), torch.linspace(0.02, 1, 400)))
    features = torch.nn.functional.silu(model.time_embed(1000 * t))
    features = torch.cat((features, torch.ones(len(t), 1)), 1).double()
    gram = features.T @ features
    gram += 1e-7 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, features.T @ (t > 0).double() * FLAG).float()
    inner = block.emb_layers[1].weight.shape[0] // 2 + 6
    block.emb_layers[1].weight[inner], block.emb_layers[1].bias[inner] = solution[:-1], solution[-1]
    third.weight[PAINTED_MARK, 6, 1, 1] = 1.0
    # Solve the flags from the neighbour's answer and the neighbour's neighbour's, on a large grid.
    probe = block.in_layers(first(torch.zeros(1, model.config.vae.latent_channels, 12, 12)))
    probe = torch.nn.functional.silu(block.out_layers[0](probe))[0, 0, :, 6]
    cells = torch.stack((probe[:4], torch.cat((torch.zeros(1), probe[:3])), torch.ones(4)), 1)
    wanted = torch.eye(4)[:, :2] * FLAG
    solution = torch.linalg.lstsq(cells, wanted).solution
    for side, (row, column) in enumerate(taps):
        for order in range(2):
            out = FLAGS.start + 2 * side + order
            third.weight[out, side, 1, 1], third.weight[out, side, row, column] = solution[0, order], solution[1, order]
            third.bias[out] = solution[2, order]


def _look_around(layer: torch.nn.Module, offset: int, into: slice, flags: list[tuple[int, ...]]) -> None:
    """Heads 0 to 3 look ``offset`` cells up, down, left, right within their own picture.

    flags: for the top, bottom, left and right the channels (from FLAGS.start on) that are fetched and written to ``into``.
    """
    d = layer.qkv_proj.shape[1]
    rows = layer.qkv_proj.view(layer.kv, layer.group + 2, layer.q, d)
    columns = layer.o_proj.view(-1, layer.kv, layer.group, layer.q)
    columns[RESERVED] = 0  # no other head writes there
    half, count, mark = layer.q // 2, len(flags[0]), 0.5
    theta = 10000.0 ** (-torch.arange(half) / half)
    for axis in range(2):  # kv head 0: rows (even frequencies), 1: columns (odd ones)
        share = torch.zeros(half)
        share[0 + axis], share[2 + axis], share[6 - axis], share[1 - axis], share[7] = 0.42, 0.13, 0.1, 0.07, 0.03
        # Latent cells get +key, all other tokens -key; the last frequency asks for the same picture.
        key = torch.cat((share.sqrt(), torch.zeros(half)))
        rows[axis, -2] = 0
        rows[axis, -2, :, LATENT_MARK], rows[axis, -2, :, CONSTANT] = 2 * key / FLAG, -key
        rows[axis, -2, half - 1, PAINTED_MARK], rows[axis, -2, half - 1, CONSTANT] = 2 * mark / FLAG, -mark
        rows[axis, -1] = 0
        for direction, distance in enumerate((-offset, offset)):
            turn = torch.where(torch.arange(half) % 2 == axis, distance * theta, torch.zeros(half))
            rows[axis, direction] = 0
            rows[axis, direction, :, CONSTANT] = torch.cat((share.sqrt() * turn.cos(), share.sqrt() * turn.sin()))
            rows[axis, direction, half - 1, PAINTED_MARK], rows[axis, direction, half - 1, CONSTANT] = 2 * mark / FLAG, -mark
            side = 2 * axis + direction
            for place, channel in enumerate(flags[side]):
                rows[axis, -1, count * direction + place, FLAGS.start + channel] = 1.0
                columns[into.start + count * side + place, axis, direction, count * direction + place] = 1.0
    layer.query_layernorm.weight.fill_(3.0)
    layer.key_layernorm.weight.fill_(3.0)


def point(model: Backbone, pairs: list[tuple[torch.Tensor, torch.Tensor, int]], steps: int = 800) -> None:
    """Let equal findings attract in the copy layer.

    pairs: what source cells and painted cells of one picture found, (cells, 32) each, in the same order, and how many
    tokens lie between them. The projections are fitted so that each painted cell picks its own source cell, whatever the
    distance; they lie in the slowest frequencies, which the distance turns least.
    """
    layer = model.layers[COPY_LAYER]
    rows = layer.qkv_proj.view(layer.kv, layer.group + 2, layer.q, -1)
    slow, one, mark, weight = torch.cat((torch.arange(10, 15), torch.arange(26, 31))), 15, 1.2, 3.0
    start = 0.15 * torch.randn(len(slow), pairs[0][0].shape[1] + 1)
    asks, offers = start.clone().requires_grad_(True), start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([asks, offers], lr=0.02)
    theta = 10000.0 ** (-torch.arange(10, 15) / (layer.q // 2))

    def unit(project: torch.Tensor, found: torch.Tensor, distance: float) -> torch.Tensor:
        first, second = (torch.cat((found, torch.ones(len(found), 1)), 1) @ project.T).chunk(2, 1)
        cos, sin = (distance * theta).cos(), (distance * theta).sin()
        code = torch.cat((first * cos - second * sin, second * cos + first * sin, torch.full((len(found), 1), mark)), 1)
        return code / code.norm(dim=1, keepdim=True)

    with torch.enable_grad():
        for step in range(steps):
            loss = 0.0
            for index in torch.randint(len(pairs), (4,)):
                source, painted, distance = pairs[index]
                distance = distance + float(torch.randint(-15, 16, ()))
                logits = unit(asks, painted, distance) @ unit(offers, source, 0.0).T * weight**2 * layer.q**0.5
                loss = loss + torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 200 == 199:
                print(f"place {step}: {loss.item() / 4:.5f}", flush=True)
    with torch.no_grad():
        for half in range(2):
            for part, project in ((0, asks.detach()), (layer.group, offers.detach())):
                rows[half, part] = 0
                rows[half, part, slow, FLAGS] = project[:, :8]
                rows[half, part, slow, SEEN.start : FAR.stop] = project[:, 8:-1]
                rows[half, part, slow, CONSTANT] = project[:, -1]
            # Only source cells have a key of the query's sign.
            rows[half, 0, one, CONSTANT] = mark
            rows[half, layer.group, one, LATENT_MARK] = 2 * mark / FLAG
            rows[half, layer.group, one, PAINTED_MARK] = -2 * mark / FLAG
            rows[half, layer.group, one, CONSTANT] = -mark
        layer.query_layernorm.weight.fill_(weight)
        layer.key_layernorm.weight.fill_(weight)


def _repeat_ratio(model: Backbone, size_id: int, ratio_ids: list[int]) -> None:
    """Layer 2: the answer's <img_size> token fetches the code of the source's <img_ratio>, which lm_head knows."""
    layer = model.layers[2]
    code = torch.where(torch.randn(len(ratio_ids), RATIO_CODE.stop - RATIO_CODE.start) > 0, 1.0, -1.0)
    marks = slice(RATIO_MARK, RATIO_CODE.stop)
    model.wte.weight[:, marks] = 0
    model.wte.weight[size_id, SIZE_MARK] = FLAG
    model.wte.weight[ratio_ids, RATIO_MARK] = FLAG
    model.wte.weight[ratio_ids, RATIO_CODE] = 2 * code
    model.lm_head.weight[:, marks] = 0
    model.lm_head.weight[ratio_ids, RATIO_CODE] = 0.3 * code
    rows = layer.qkv_proj.view(layer.kv, layer.group + 2, layer.q, -1)
    columns = layer.o_proj.view(layer.o_proj.shape[0], layer.kv, layer.group, layer.q)
    slow = torch.arange(12, 16)
    for part in (0, layer.group):
        rows[2, part] = 0
    rows[2, 0, slow, SIZE_MARK] = 1.0
    rows[2, layer.group, slow, RATIO_MARK], rows[2, layer.group, slow, CONSTANT] = 0.5, -1.0
    rows[2, -1, :16] = 0
    rows[2, -1, range(16), range(RATIO_CODE.start, RATIO_CODE.stop)] = 1.0
    columns[marks] = 0
    columns[RATIO_CODE, 2, 0, :16] = torch.eye(16)


def protect(model: Backbone) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Masks (1 = free) for the base stage: language may use only what pictures do not need, so no picture has to be trained."""
    masks = {}
    for name, parameter in model.named_parameters():
        mask = torch.ones_like(parameter)
        if name.startswith(("patch_embed", "final_layer", "time_embed")):
            mask.zero_()
        for index, layer in enumerate(model.layers):
            place = f"layers.{index}."
            if name in (place + "o_proj", place + "shared_out"):
                mask[: WORKSPACE.start] = 0
            elif name == place + "experts_out":
                mask[:, : WORKSPACE.start] = 0
            elif (
                index <= COPY_LAYER
                and name.startswith(place)
                and name.endswith(("input_layernorm.weight", "query_layernorm.weight", "key_layernorm.weight"))
            ):
                mask.zero_()
            elif index <= COPY_LAYER and name == place + "qkv_proj":
                parts = mask.view(layer.kv, layer.group + 2, layer.q, -1)
                parts[:2] = 0
                if index == COPY_LAYER:
                    parts[:2, 1] = 1  # the heads beside the two copying ones
                    parts[2, -1, -1] = 0
        if name == "wte.weight":
            mask[:, RESERVED] = 0
        if any(parameter is part for linear in _writers(model) for part in (linear.weight, linear.bias)):
            mask[RESERVED] = 0
        masks[parameter] = mask
    return masks


def _final_layer(model: Backbone) -> None:
    block, (norm, _, out) = model.final_layer.model[0], model.final_layer.model[1]
    e = torch.arange(64) // 2 * 4 + torch.arange(64) % 2  # places of the 64 differences; +PAIR, -PAIR follow every two
    block.skip_connection.weight.zero_()
    block.skip_connection.bias.zero_()
    block.skip_connection.weight[e, torch.arange(64), 0, 0] = 1.0
    block.skip_connection.weight[e, torch.arange(64, 128), 0, 0] = -1.0
    block.out_layers[3].weight.zero_()
    block.out_layers[3].bias.zero_()
    block.out_layers[3].weight[2::4, 0, 1, 1] = PAIR
    block.out_layers[3].weight[3::4, 0, 1, 1] = -PAIR
    # Inner channel 0 is to be t after its SiLU: solve the shift for it.
    block.out_layers[0].weight[0] = 0
    block.out_layers[0].bias[0] = 0
    t = torch.linspace(0.01, 1, 400)
    shift = t.clone()
    for _ in range(60):
        value = torch.nn.functional.silu(shift)
        shift -= (value - t) / (torch.sigmoid(shift) * (1 + shift * (1 - torch.sigmoid(shift))))
    features = torch.nn.functional.silu(model.time_embed_2(1000 * t))
    features = torch.cat((features, torch.ones(len(t), 1)), 1).double() / t.double().unsqueeze(1)
    gram = features.T @ features
    gram += 1e-7 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, features.T @ (shift / t).double()).float()
    linear = block.emb_layers[1]
    inner = linear.weight.shape[0] // 2
    linear.weight.mul_(0.3)
    linear.weight[[0, inner]] = 0
    linear.bias[[0, inner]] = 0
    linear.weight[inner] = solution[:-1]
    linear.bias[inner] = solution[-1]
    norm.weight.fill_(GAIN)
    norm.bias.fill_(BIAS)
    typical = ((PAIR**2 + 1.1) / 2) ** 0.5  # the norm's divisor over t
    out.weight.zero_()
    out.bias.zero_()
    scale = LATENT_UNIT * typical / GAIN
    out.weight[torch.arange(64), e, 1, 1] = scale
    # The group's mean is taken away by the norm and read back from its constant pair.
    group = torch.arange(64) // 2 * 4
    for offset in (2, 3):
        out.weight[torch.arange(64), group + offset, 1, 1] = -scale / 2
