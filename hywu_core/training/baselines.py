"""What HY-WU is compared with, trained on the same batches for as many steps: one shared static LoRA, and full fine-tuning.

Owns both objectives; the losses are ``forward.py``'s. A static LoRA has the generator's rank, alpha and targets.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..backbone.model import Backbone
from ..config import GeneratorConfig
from ..lora.attach import attached_rows
from ..lora.value import LoRA
from ..progress import Tick, silent
from .batches import Batch, Batches, Draws
from .forward import decibels, embed_pictures, flow_errors, flow_loss, on_device
from .generator_stage import pixel_weights
from .loop import Stage
from .recipe import StageSettings


def static_parameters(config: GeneratorConfig, seed: int) -> dict[str, nn.Parameter]:
    """A by a small random start, B zero: reference key -> (1, ...) for all rows of a batch."""
    random = torch.Generator().manual_seed(seed)
    parameters = {}
    for layer in range(config.num_base_model_layers):
        for side in "AB":
            for target in config.targets:
                shape = target.a_shape(config.rank) if side == "A" else target.b_shape(config.rank)
                value = torch.zeros(1, *shape)
                if side == "A":
                    value.normal_(0, target.in_features**-0.5, generator=random)
                parameters[f"{config.prefix}{layer}.{target.name}.lora_{side}"] = nn.Parameter(value)
    return parameters


def static_lora(parameters: dict[str, nn.Parameter], config: GeneratorConfig) -> LoRA:
    """The trained baseline as a LoRA that any graph takes."""
    return LoRA.from_tensors({key: value.detach()[0].cpu().clone() for key, value in parameters.items()}, config.alpha)


def static_errors(
    model: Backbone, config: GeneratorConfig, parameters: dict[str, nn.Parameter], batch: Batch, weight_c: torch.Tensor,
    draws: Draws,
) -> torch.Tensor:
    """(B,) mean squared pixel errors of a batch painted with the shared LoRA."""
    with torch.no_grad():
        pictures = embed_pictures(model, batch)
    with attached_rows(model, parameters, config.scale):
        return flow_errors(model, batch, pictures, weight_c, draws.torch)


def train_static(
    model: Backbone, config: GeneratorConfig, batches: Batches, settings: StageSettings, seed: int, folder: Path,
    on_tick: Tick = silent, on_log: Callable[[str], None] = lambda line: None,
) -> dict[str, nn.Parameter]:
    """Train one LoRA for all requests on the frozen backbone."""
    model.requires_grad_(False)
    weight_c = pixel_weights(batches).to(model.device)
    parameters = {name: nn.Parameter(value.to(model.device)) for name, value in static_parameters(config, seed).items()}

    def step(draws: Draws):
        errors_B = static_errors(
            model, config, parameters, on_device(batches.draw(settings.batch, draws), model.device), weight_c, draws)
        return flow_loss(errors_B), {"dB": float(decibels(errors_B.detach()).mean())}

    Stage("static", folder, settings, seed, parameters).run(step, on_tick=on_tick, on_log=on_log)
    return parameters


def train_full(
    model: Backbone, batches: Batches, settings: StageSettings, seed: int, folder: Path, on_tick: Tick = silent,
    on_log: Callable[[str], None] = lambda line: None,
) -> None:
    """Fine-tune every weight of ``model`` but the VAE's, in place."""
    weight_c = pixel_weights(batches).to(model.device)
    parameters = {name: value for name, value in model.named_parameters() if not name.startswith(("vae.", "lm_head."))}

    def step(draws: Draws):
        batch = on_device(batches.draw(settings.batch, draws), model.device)
        errors_B = flow_errors(model, batch, embed_pictures(model, batch), weight_c, draws.torch)
        return flow_loss(errors_B), {"dB": float(decibels(errors_B.detach()).mean())}

    Stage("full", folder, settings, seed, parameters).run(step, on_tick=on_tick, on_log=on_log)


def task_gradients(
    model: Backbone, config: GeneratorConfig, parameters: dict[str, nn.Parameter], batches: Batches, rows: int, seed: int
) -> dict[str, torch.Tensor]:
    """edit -> the gradient of its loss on the shared LoRA, flattened; same photos and noise for all edits of one picture."""
    weight_c, gradients = pixel_weights(batches), {}
    grid = max(batches.crops, key=lambda each: len(batches.crops[each]))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for edit in batches.recipe.edit_names():
        draws = Draws.of(seed, "gradients", 0)
        batch = batches.draw(rows, draws, grid=grid, thinks=True, edit=edit)
        errors_B = static_errors(model, config, parameters, batch, weight_c, Draws.of(seed, "noise", 0))
        flow_loss(errors_B).backward()
        gradients[edit] = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
        for parameter in parameters.values():
            parameter.grad = None
    return gradients
