"""Batches: a crop, an instruction, the thinking, and the picture that the crop should become.

Owns which requests share a batch (all rows have one layout, so they have equally many tokens), and turning them into latents,
patches and token ids: the sequences are the template's, word for word, as inference builds them. Small models find their
source cell by place and not by a constant distance (``copier.py``), so lengths and grids vary freely from batch to batch.

Everything that is drawn for a batch comes from the three generators of a ``Draws``: the same draws, the same batch.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..config import BackboneConfig, GenerationConfig
from ..text.template import Sequence, image_sequence
from ..text.tokenizer import IMG, Tokenizer
from ..vision.buckets import Bucket, Buckets
from ..vision.pictures import _patches, resize_for_vit
from . import language
from .edits import DAMAGES, EDITS, damaged, describe, edited
from .recipe import Recipe

POOL = 500  # instructions an edit and language


@dataclass(frozen=True)
class Draws:
    """Where chance comes from: one for choices, one for pictures, one for tensors."""

    choose: random.Random
    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, what: str, step: int) -> "Draws":
        """Draws of one step of one stage; nothing has to be kept to go on later."""
        number = random.Random(f"{seed} {what} {step}").getrandbits(60)
        return cls(random.Random(number), np.random.default_rng(number), torch.Generator().manual_seed(number))


@dataclass(frozen=True)
class Source:
    """One source picture of every row: pixels (B, h, w, 3) uint8, latents (B, c, h, w), patches (B, P, d), mask and grid."""

    pixels: np.ndarray
    latent_bchw: torch.Tensor
    patches: torch.Tensor
    patch_mask: torch.Tensor
    grid: tuple[int, int]
    bucket: Bucket


@dataclass(frozen=True)
class Batch:
    """One step's rows. prefix: tokens up to and with the answer's ``<img_size>``, which is what the condition is made of.

    answers_BL: the next token after every place of the prefix, -100 where nothing is taught. wanted_bchw: clean target latents.
    """

    sequence: Sequence
    prefix: int
    answers_BL: torch.Tensor
    sources: tuple[Source, ...]
    wanted_bchw: torch.Tensor
    wanted_pixels: np.ndarray
    edits: tuple[str, ...]
    instructions: tuple[str, ...]
    thinking: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.edits)


@dataclass(frozen=True)
class _Variant:
    """An edit, and for "restore" the damage, None for none."""

    edit: str
    damage: str | None


class Batches:
    """Draws batches from crops. kernel, offset: the VAE's encoder as one convolution (``linear_vae.as_convolution``)."""

    def __init__(
        self, recipe: Recipe, crops: dict[tuple[int, int], np.ndarray], tokenizer: Tokenizer, config: BackboneConfig,
        generation: GenerationConfig, kernel: torch.Tensor, offset: torch.Tensor,
    ):
        self.recipe, self.crops, self.tokenizer = recipe, crops, tokenizer
        self.config, self.generation, self.kernel, self.offset = config, generation, kernel, offset
        self.buckets = Buckets.of(config)
        self.variants = [
            _Variant(edit, damage)
            for edit in recipe.edit_names() for damage in ((*DAMAGES, None) if edit == "restore" else (None,))]
        seen = ("dark", "gray")
        self.lengths = {
            variant: self._count(language.thinking(variant.edit, seen, variant.damage, seen)) for variant in self.variants}
        self.pool = self._pool()

    def weight(self, edit: str) -> float:
        """How often an edit is drawn, against 1."""
        return self.recipe.data.weights.get(edit, 1.0)

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _pool(self) -> dict[str, dict[int, list[str]]]:
        """edit -> tokens of the instruction -> instructions."""
        draw = random.Random(self.recipe.seed)
        pool: dict[str, dict[int, list[str]]] = {}
        for edit in self.recipe.edit_names():
            by_length: dict[int, list[str]] = defaultdict(list)
            for _ in range(POOL):
                text = language.instruction(edit, "zh" if draw.random() < self.recipe.data.chinese else "en", draw)
                by_length[self._count(text)].append(text)
            pool[edit] = dict(by_length)
        return pool

    def draw(
        self, rows: int, draws: Draws, *, grid: tuple[int, int] | None = None, thinks: bool | None = None,
        pictures: int | None = None, edit: str | None = None,
    ) -> Batch:
        """A batch; what is None is drawn. thinks: whether the sequences hold thinking; pictures: sources a row, 1 or 2."""
        if thinks is None:
            thinks = draws.choose.random() >= self.recipe.data.without_thinking
        names = [edit] if edit else list(self.recipe.edit_names())
        names = [name for name in names if pictures in (None, EDITS[name].pictures)]
        first = draws.choose.choices(names, [self.weight(name) for name in names])[0]
        chosen = self._requests([name for name in names if EDITS[name].pictures == EDITS[first].pictures], first, rows, thinks,
                                draws)
        grids = list(self.crops)
        if grid is None:
            shares = self.recipe.grids()
            grid = draws.choose.choices(grids, [shares.get(each, 0.0) + 1e-9 for each in grids])[0]
            # Large pictures cost more: fewer of them.
            chosen = chosen[: max(min(rows, 4), min(rows, rows * 64 // (grid[0] * grid[1])))]
            rows = len(chosen)
        picks = draws.numpy.integers(0, len(self.crops[grid]), rows)
        clean = self.crops[grid][picks].astype(np.float32) / 255
        other = None
        if EDITS[first].pictures == 2:
            other_grid = draws.choose.choice(grids)
            other = self.crops[other_grid][draws.numpy.integers(0, len(self.crops[other_grid]), rows)].astype(np.float32) / 255
        return self.make(chosen, clean, other, thinks, draws)

    def _requests(
        self, names: list[str], first: str, rows: int, thinks: bool, draws: Draws
    ) -> list[tuple[_Variant, str]]:
        """Rows of equally many tokens: the first row's edit decides how many."""
        def extra(variant: _Variant) -> int:
            return self.lengths[variant] if thinks else 0

        by_edit = {name: [variant for variant in self.variants if variant.edit == name] for name in names}
        variant = draws.choose.choice(by_edit[first])
        sizes = self.pool[first]
        length = draws.choose.choices(list(sizes), [len(texts) for texts in sizes.values()])[0]
        total = length + extra(variant)
        fitting = {
            name: possible for name in names
            if (possible := [each for each in by_edit[name] if total - extra(each) in self.pool[name]])}
        chosen = [(variant, draws.choose.choice(sizes[length]))]
        while len(chosen) < rows:
            name = draws.choose.choices(list(fitting), [self.weight(each) for each in fitting])[0]
            variant = draws.choose.choice(fitting[name])
            chosen.append((variant, draws.choose.choice(self.pool[variant.edit][total - extra(variant)])))
        return chosen

    def make(
        self, chosen: list[tuple[_Variant, str]], clean: np.ndarray, other: np.ndarray | None, thinks: bool, draws: Draws
    ) -> Batch:
        """The batch of these requests on these pictures (B, h, w, 3) in 0..1."""
        shown, wanted, texts = [], [], []
        for row, (variant, _) in enumerate(chosen):
            second = None if other is None else other[row]
            source = clean[row]
            if variant.damage is not None:
                source = damaged(source, variant.damage, draws.numpy)
            shown.append((source * 255).round().astype(np.uint8))
            wanted.append(edited(clean[row] if variant.edit == "restore" else source, variant.edit, second))
            texts.append(language.thinking(
                variant.edit, describe(source), variant.damage, None if second is None else describe(second)) if thinks else "")
        sources = [self.source(np.stack(shown), draws)]
        if other is not None:
            sources.append(self.source((other * 255).round().astype(np.uint8), draws))
        rows = [
            image_sequence(
                self.tokenizer, self.config, self.generation, text, sources, sources[0].bucket, thinking=thought,
                system_prompt=language.SYSTEM_PROMPT, rows=1)
            for (_, text), thought in zip(chosen, texts, strict=True)]
        ids_BL = torch.cat([sequence.ids_BL for sequence in rows])
        prefix = rows[0].gen_timestep - 1
        wanted_pixels = np.stack(wanted)
        return Batch(
            replace(rows[0], ids_BL=ids_BL), prefix, self._answers(ids_BL, prefix, thinks), tuple(sources),
            self.latents(wanted_pixels), wanted_pixels, tuple(variant.edit for variant, _ in chosen),
            tuple(text for _, text in chosen), tuple(texts))

    def _answers(self, ids_BL: torch.Tensor, prefix: int, thinks: bool) -> torch.Tensor:
        """What is taught: everything behind ``<think>``, else behind ``<answer>``; last of all the ratio."""
        opening = self.tokenizer.id("<think>" if thinks else "<answer>")
        begin_B1 = (ids_BL == opening).int().argmax(1, keepdim=True)
        answers_BL = ids_BL[:, 1 : prefix + 1].clone()
        answers_BL[torch.arange(prefix) < begin_B1] = -100
        answers_BL[answers_BL == self.tokenizer.id(IMG)] = -100
        return answers_BL

    def source(self, pixels: np.ndarray, draws: Draws) -> Source:
        """Pictures (B, h, w, 3) uint8 of one size as both towers take them."""
        height, width = pixels.shape[1:3]
        patch, most = self.config.vit["patch_size"], self.config.vit_max_num_patches
        made = [_patches(resize_for_vit(Image.fromarray(one), patch, most), patch, most) for one in pixels]
        # Several buckets of the table round to one grid of cells; their ratio tokens are all met.
        nearest = sorted(self.buckets.entries, key=lambda bucket: abs(bucket.ratio - height / width))[:3]
        same = [bucket for bucket in nearest if bucket.grid == (height // 16, width // 16)] or nearest[:1]
        return Source(
            pixels, self.latents(pixels.astype(np.float32) / 255), torch.stack([each[0] for each in made]),
            torch.stack([each[1] for each in made]), made[0][2],
            Bucket(draws.choose.choice(same).index, height, width))

    def latents(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, h, w, 3) in 0..1 -> latents (B, c, h/16, w/16), as bytes would give them."""
        chw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return F.conv2d((chw * 255).round() / 127.5 - 1, self.kernel, self.offset, stride=16)
