"""The generator stage: from the frozen backbone's hidden states of a request to the LoRA that does it.

Owns the regression onto the solved LoRAs (``edit_loras.py``). The generator sees what it sees later: pictures of all
shapes, spoken instructions with and without thinking; the only thing it is told is which matrices would have been right.
"""

import time

import born
import config
import numpy as np
import photos
import torch
from comfyui_hywu.hywu_core.config import GeneratorConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.generator.tokens import tokenise_layer
from data import Data
from network import Backbone


def targets(loras: dict, settings: GeneratorConfig, generator: ParameterGenerator) -> torch.Tensor:
    """The wanted tokens of every edit, (edits, N, P, R, C); NaN where a token's tail is unused."""
    rows = []
    for edit in photos.EDITS:
        layers = []
        for index in range(settings.num_base_model_layers):
            matrices = {}
            for target in settings.targets:
                a, b = torch.zeros(target.a_shape(settings.rank)), torch.zeros(target.b_shape(settings.rank))
                if index == born.COPY_LAYER and target.name in loras[edit]:
                    a, b = loras[edit][target.name]
                matrices[f"{target.name}.lora_A"], matrices[f"{target.name}.lora_B"] = a[None], b[None]
            layers.append(tokenise_layer(matrices, generator.layout)[0])
        rows.append(torch.stack(layers))
    return torch.stack(rows)


@torch.no_grad()
def conditions(model: Backbone, data: Data, count: int) -> tuple[torch.Tensor, list[str]]:
    """Hidden states (B, S, D) of ``count`` requests of one layout, and their edits."""
    kind = data.draw.choice(("spoken", "spoken", "silent"))
    batch = data.edit(data.requests(kind, count), [True] * count)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, _, _ = model.run_prefix(model.embed_prefix(batch.ids, batch.layout, *batch.vision()), batch.layout)
    return h.float(), batch.edits


def start(generator: ParameterGenerator, model: Backbone, data: Data, wanted: torch.Tensor) -> None:
    """A start in the right units.

    The input projection sees numbers of size one (the stream has a large constant and unequal channels); the output projections
    span the rows of the wanted tokens, the rest of their columns being nearly zero: what is not needed can be put there.
    """
    seen = torch.cat([conditions(model, data, 4)[0].flatten(0, 1) for _ in range(8)])
    mean, spread = seen.mean(0), seen.std(0).clamp_min(0.05)
    with torch.no_grad():
        generator.model.hw_pos.weight.normal_(0, 1)
        generator.model.layer_pos.weight.normal_(0, 1)
        weight = torch.randn_like(generator.hidden_in.weight) * seen.shape[1] ** -0.5
        generator.hidden_in.weight.copy_(weight / spread)
        generator.hidden_in.bias.copy_(-generator.hidden_in.weight @ mean)
        border = generator.layout.num_a_tokens
        for linear, part in (
            (generator.model.proj_out_A, wanted[:, :, :border]),
            (generator.model.proj_out_B, wanted[:, :, border:]),
        ):
            rows = part.nan_to_num().flatten(0, -2)
            rows = rows[rows.abs().sum(1) > 0]
            _, size, directions = torch.linalg.svd(rows, full_matrices=False)
            count = min(len(size), linear.weight.shape[1] - 8)
            linear.weight.normal_(0, 1e-3)
            linear.weight[:, :count] = (directions[:count] * size[:count, None]).T * len(rows) ** -0.5
            linear.bias.zero_()
            print(f"rows {len(rows)}, kept {size[:count].square().sum() / size.square().sum():.5f} of their energy")


def train(
    model: Backbone,
    data: Data,
    loras: dict,
    minutes: float,
    generator: ParameterGenerator | None = None,
    batch: int = 8,
    rate: float = 1.5e-3,
) -> ParameterGenerator:
    """Train for ``minutes`` by the clock; ``generator``: go on with this one."""
    settings = GeneratorConfig.from_dict(config.generator())
    fresh = generator is None
    generator = generator or ParameterGenerator(settings)
    wanted = targets(loras, settings, generator)
    if fresh:
        start(generator, model, data, wanted)
    used = ~wanted.isnan()
    wanted = wanted.nan_to_num()
    # Rows that some edit needs count by their size; all others only have to stay near zero. Nearest of all in the layers that
    # find the place: what is written there by mistake makes cells look away.
    size = wanted.square().mean((0, 4), keepdim=True).sqrt()
    needed = size > 1e-6
    stray = torch.full_like(size, 100.0)
    stray[:, : born.COPY_LAYER] = 300.0
    stray[:, born.COPY_LAYER] = 3000.0
    weight = torch.where(needed, 1 / size.clamp_min(1e-3).square() / needed.float().mean(), stray) * used[:1]
    optimizer = torch.optim.AdamW(generator.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    began, step = time.time(), 0
    while (part := (time.time() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 40) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * part)))
        condition, edits = conditions(model, data, batch)
        number = torch.tensor([photos.EDITS.index(edit) for edit in edits])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            written = generator(condition)
        loss = ((written.float() - wanted[number]).square() * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            error = (
                (written.float() - wanted[number])[:, needed[0, :, :, :, 0]].square().sum() / wanted[number].square().sum()
            ).sqrt()
            took = (time.time() - began) / (step + 1)
            print(f"generator {step} loss {loss.item():.4f} relative error {error.item():.4f} {took:.2f} s/step", flush=True)
        step += 1
    print(f"generator: {step} steps of {batch} in {(time.time() - began) / 60:.1f} min", flush=True)
    return generator
