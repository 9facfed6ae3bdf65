"""The base stage: a backbone that can copy its source learns to read instructions, to look, and to think aloud.

Owns the objective of the words and the assembly of the frozen base: VAE by linear algebra, structured start, then language.
Everything that pictures need is held fixed meanwhile (``copier.protect``), so no picture has to be painted here.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from ..backbone.model import Backbone
from ..config import BackboneConfig
from ..progress import Tick, silent
from ..vision.vae import VAE
from . import copier, places
from .batches import Batches, Draws
from .forward import embed_pictures, on_device, prefix_hidden, word_loss
from .loop import Stage
from .recipe import Recipe

SMALL = 7 * 7  # cells; words are mostly practised on small pictures, which cost little


def born(config: BackboneConfig, vae: VAE, batches: Batches) -> Backbone:
    """The structured start with its VAE; deterministic for the recipe's seed."""
    torch.manual_seed(batches.recipe.seed)
    model = Backbone(config)
    model.vae.load_state_dict(vae.state_dict())
    copier.start(model, batches.tokenizer)
    places.find_places(model, batches)
    copier.make_firm(model)
    places.calibrate(model, batches)
    return model


def train_base(
    model: Backbone, batches: Batches, recipe: Recipe, folder: Path, precision: torch.autocast, on_tick: Tick = silent,
    on_log: Callable[[str], None] = lambda line: None,
) -> None:
    """Teach ``model`` the words, in place."""
    masks = copier.protect(model)
    free = {name: parameter for name, parameter in model.named_parameters() if bool(masks[parameter].any())}
    rows = recipe.base_stage.batch

    def step(draws: Draws):
        batch = on_device(word_batch(batches, rows, draws), model.device)
        with precision:
            hidden_BSD = prefix_hidden(model, batch, embed_pictures(model, batch))
            loss, right = word_loss(model, hidden_BSD, batch)
        return loss, {"right": right}

    Stage("base", folder, recipe.base_stage, recipe.seed, free, masks).run(step, on_tick=on_tick, on_log=on_log)


def word_batch(batches: Batches, rows: int, draws: Draws):
    """A batch to practise words on: small pictures six times out of seven, else of any size and fewer of them."""
    small = [grid for grid in batches.crops if grid[0] * grid[1] <= SMALL]
    if small and draws.choose.random() < 6 / 7:
        return batches.draw(rows, draws, grid=draws.choose.choice(small))
    return batches.draw(max(2, rows // 3), draws)
