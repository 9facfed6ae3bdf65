"""The generator stage: the paper's objective. The frozen backbone reads a request, the generator writes a LoRA from its hidden
states, the backbone paints with that LoRA, and the flow-matching error of the picture flows through it into the generator.

Owns the generator's start (the projection of B is zero: at step 0 every LoRA does nothing) and its step. There are no stored
adapters to regress onto: nobody ever says what the weights should be.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ..backbone.model import Backbone
from ..config import GeneratorConfig
from ..generator.model import ParameterGenerator
from ..generator.tokens import detokenise
from ..lora.attach import attached_rows
from ..progress import Tick, silent
from . import channels
from .batches import Batch, Batches, Draws
from .forward import decibels, embed_pictures, flow_errors, flow_loss, on_device, predict_clean, prefix_hidden
from .loop import Stage
from .recipe import Recipe, generator_config
from .sheets import samples

CONSTANT_GAIN = 8.0  # how much more of the constant channel an A reads at the start than of any other


def new_generator(recipe: Recipe, model: Backbone, batches: Batches) -> tuple[ParameterGenerator, GeneratorConfig]:
    """A generator at its start; deterministic for the recipe's seed.

    The input projection sees numbers of size one, whatever the scales of the residual stream. The rows of an A have the size
    that keeps A x near one, and read the stream's constant channel more than others, because what an edit needs first of all
    are constants: gates to open. The projection of B is zero.
    """
    config = GeneratorConfig.from_dict(generator_config(recipe.sizes, recipe.generator))
    torch.manual_seed(recipe.seed)
    generator = ParameterGenerator(config)
    drawn = [on_device(batches.draw(4, Draws.of(recipe.seed, "start", number)), model.device) for number in range(12)]
    seen = torch.cat([_condition(model, batch)[0].flatten(0, 1).cpu() for batch in drawn])
    mean, spread = seen.mean(0), seen.std(0).clamp_min(0.05)
    network = generator.model
    piece = config.d_model // config.dim_accumulation
    with torch.no_grad():
        network.hw_pos.weight.normal_(0, 1)
        network.layer_pos.weight.normal_(0, 1)
        generator.hidden_in.weight.normal_(0, seen.shape[1] ** -0.5).div_(spread)
        generator.hidden_in.bias.copy_(-generator.hidden_in.weight @ mean)
        network.proj_out_A.weight.normal_(0, (config.input_dim * piece) ** -0.5)
        network.proj_out_A.bias.zero_()
        network.proj_out_A.weight[channels.CONSTANT :: config.input_dim] *= CONSTANT_GAIN
        network.proj_out_B.weight.zero_()
        network.proj_out_B.bias.zero_()
    return generator, config


@torch.no_grad()
def _condition(model: Backbone, batch: Batch):
    """The conditions (B, S, D) of a batch, from one prefill of the un-adapted backbone, and its pictures' tokens."""
    pictures = embed_pictures(model, batch)
    return prefix_hidden(model, batch, pictures).float(), pictures


class GeneratorObjective:
    """From a batch to the errors of the pictures painted with the LoRAs that the generator writes for it."""

    def __init__(self, model: Backbone, generator: ParameterGenerator, config: GeneratorConfig, batches: Batches):
        self.model, self.generator, self.config, self.batches = model, generator, config, batches
        self.weight_c = pixel_weights(batches).to(model.device)

    def matrices(self, condition_BSD: torch.Tensor) -> dict[str, torch.Tensor]:
        """The written LoRAs, one a row."""
        return detokenise(self.generator(condition_BSD), self.generator.layout, self.config.prefix)

    def errors(self, batch: Batch, draws: Draws) -> torch.Tensor:
        """(B,) mean squared pixel errors, differentiable in the generator's weights."""
        condition_BSD, pictures = _condition(self.model, batch)
        with attached_rows(self.model, self.matrices(condition_BSD), self.config.scale):
            return flow_errors(self.model, batch, pictures, self.weight_c, draws.torch)

    @torch.no_grad()
    def painted(self, batch: Batch, draws: Draws) -> torch.Tensor:
        """Clean latents (B, c, h, w) painted in one step from noise."""
        batch = on_device(batch, self.model.device)
        condition_BSD, pictures = _condition(self.model, batch)
        noise_bchw = torch.randn(batch.wanted_bchw.shape, generator=draws.torch)
        ones_B = torch.ones(batch.rows, device=self.model.device)
        with attached_rows(self.model, self.matrices(condition_BSD), self.config.scale):
            return predict_clean(self.model, batch, pictures, noise_bchw.to(self.model.device), ones_B)


def pixel_weights(batches: Batches) -> torch.Tensor:
    """(c,) what an error of one in each latent channel weighs in pixels."""
    return 1 / batches.kernel.flatten(1).norm(dim=1)


def by_edit(batch: Batch, errors_B: torch.Tensor) -> dict[str, float]:
    """Mean PSNR in dB of every edit in a batch, for the log."""
    values: dict[str, list[float]] = {}
    for edit, value in zip(batch.edits, decibels(errors_B.detach()).tolist(), strict=True):
        values.setdefault(edit, []).append(value)
    return {edit: sum(found) / len(found) for edit, found in values.items()}


def train_generator(
    model: Backbone, generator: ParameterGenerator, config: GeneratorConfig, batches: Batches, held_out: Batches,
    recipe: Recipe, folder: Path, precision: torch.autocast, on_tick: Tick = silent,
    on_log: Callable[[str], None] = lambda line: None,
) -> None:
    """Train ``generator`` in place; ``held_out`` makes the sample sheets only."""
    model.requires_grad_(False)
    objective = GeneratorObjective(model, generator, config, batches)
    rows = recipe.generator_stage.batch

    def step(draws: Draws):
        batch = on_device(batches.draw(rows, draws), model.device)
        with precision:
            errors_B = objective.errors(batch, draws)
        return flow_loss(errors_B), {"dB": float(decibels(errors_B.detach()).mean()), **by_edit(batch, errors_B)}

    def sheet() -> Image.Image:
        return samples(model, held_out, GeneratorObjective(model, generator, config, held_out).painted)

    Stage("generator", folder, recipe.generator_stage, recipe.seed, dict(generator.named_parameters())).run(
        step, sample=sheet, on_tick=on_tick, on_log=on_log)

