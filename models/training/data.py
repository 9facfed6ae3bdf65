"""Training batches: a crop, an instruction, the thinking, and the picture that it should become.

Owns tokenising whole sequences, grouping instructions by length (a batch has one layout), and computing source and target
latents on the fly with the encoder as one convolution.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import photos
import torch
import words
from comfyui_hywu.hywu_core.vision.buckets import Buckets
from comfyui_hywu.hywu_core.vision.pictures import _patches, vit_size
from layout import Layout, lay_out
from torch.nn import functional as F

BASE_SIZE = words.BASE_SIZE


@dataclass
class Batch:
    """One step's samples. answers: the next token after every prefix place, -100 where nothing is learned."""

    layout: Layout
    grid: tuple[int, int] | None
    ids: torch.Tensor
    answers: torch.Tensor
    ratio_ids: torch.Tensor | None = None
    source: torch.Tensor | None = None
    target: torch.Tensor | None = None
    patches: torch.Tensor | None = None
    patch_mask: torch.Tensor | None = None
    patch_grid: tuple[int, int] | None = None
    edits: list[str] | None = None

    def vision(self) -> tuple:
        """What Backbone.embed_prefix takes behind ids and layout; all None for text alone."""
        return self.source, self.patches, self.patch_mask, self.patch_grid and [self.patch_grid] * len(self.ids)


@dataclass(frozen=True)
class Request:
    """An instruction without a picture yet; ``thinks`` says whether the sequence holds thinking."""

    edit: str
    instruction: tuple[int, ...]
    thinks: bool

    @property
    def length(self) -> int:
        return len(self.instruction) + (17 if self.thinks else 0)


class Data:
    """Draws batches from crops; ``seed`` decides everything."""

    def __init__(self, crops: dict[tuple[int, int], np.ndarray], kernel: torch.Tensor, offset: torch.Tensor, seed: int):
        self.vocab = words.vocabulary()
        self.special = {token: len(self.vocab) + index for index, token in enumerate(words.SPECIALS)}
        self.crops, self.kernel, self.offset = crops, kernel, offset
        self.draw, self.numpy = random.Random(seed), np.random.default_rng(seed)
        # Several buckets of the table round to one grid; all their ratio tokens are met.
        self.buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
        for bucket in Buckets(BASE_SIZE, extras=()).entries:
            self.buckets[bucket.grid].append(bucket.index)
        self.patches = {grid: self._patches(pixels) for grid, pixels in crops.items()}
        self.seen = {grid: [photos.describe(one / 255.0) for one in pixels] for grid, pixels in crops.items()}
        self.pools = {kind: self._pool(kind) for kind in ("spoken", "silent")}

    def _patches(self, pixels: np.ndarray):
        rows_cols = pixels.shape[1:3]
        size = vit_size(*rows_cols, 16, 16)
        chw = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        small = [F.interpolate(one[None], size, mode="bilinear", antialias=True)[0] for one in chw]
        made = [_patches(one, 16, 16) for one in small]
        return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made]), made[0][2]

    def encode(self, text: str) -> list[int]:
        return [self.vocab.get(word, 0) for word in words.tokens(text)]

    def _pool(self, kind: str) -> dict[int, dict[str, list[Request]]]:
        """length -> edit -> requests. "spoken" instructions come with thinking, "silent" ones without."""
        pool: dict[int, dict[str, list[Request]]] = defaultdict(lambda: defaultdict(list))
        for _ in range(4000):
            for edit in photos.EDITS:
                thinks = kind == "spoken"
                request = Request(edit, tuple(self.encode(words.phrase(edit, self.draw))), thinks)
                pool[request.length][edit].append(request)
        return {length: edits for length, edits in pool.items() if len(edits) >= 3}

    def requests(self, kind: str, count: int) -> list[Request]:
        """``count`` requests of one length, over all edits."""
        pool = self.pools[kind]
        length = self.draw.choices(list(pool), [sum(map(len, edits.values())) for edits in pool.values()])[0]
        return [self.draw.choice(pool[length][edit]) for edit in self.draw.choices(list(pool[length]), k=count)]

    def _sequence(
        self, request: Request, seen: tuple[str, str] | None, image: list[int], ratio: int
    ) -> tuple[list[int], list[int]]:
        """ids and answers up to the answer's <img_size>; spec section 5, template "instruct" ("\\n\\n" has no tokens here)."""
        s = self.special
        ids = [
            s["<|startoftext|>"],
            *self.encode(words.SYSTEM),
            *self.encode("user :"),
            *image,
            *request.instruction,
            *self.encode("assistant :"),
        ]
        answers = [-100] * len(ids)
        if request.thinks:
            inner = self.encode(words.thought(request.edit)), self.encode(words.recaption(request.edit, seen))
            spoken = [s["<think>"], *inner[0], s["</think>"], s["<recaption>"], *inner[1], s["</recaption>"]]
            answers += [*spoken[1:], s["<answer>"]]
            ids += spoken
        ids += [s["<answer>"], s["<boi>"], s[words.SIZE_TOKEN]]
        answers += [s["<boi>"], s[words.SIZE_TOKEN], s[f"<img_ratio_{ratio}>"]]
        return ids, answers

    def text(self, count: int) -> Batch:
        """Instructions without a picture: cheap practice for the language."""
        requests = self.requests("spoken", count)
        made = [self._sequence(request, None, [], 16) for request in requests]
        layout = lay_out(0, len(made[0][0]), None)
        answers = torch.tensor([answer for _, answer in made])
        answers[:, -1] = -100  # without a picture there is no ratio to repeat
        return Batch(layout, None, torch.tensor([ids for ids, _ in made]), answers, edits=[r.edit for r in requests])

    def edit(self, requests: list[Request], copy: list[bool], grid: tuple[int, int] | None = None) -> Batch:
        """Requests on random crops of one grid; ``copy``: the wanted picture is the source itself."""
        grids = list(self.crops)
        grid = grid or self.draw.choices(grids, [len(self.crops[g]) for g in grids])[0]
        picks = self.numpy.integers(0, len(self.crops[grid]), len(requests))
        pixels = self.crops[grid][picks].astype(np.float32) / 255
        wanted = np.stack(
            [
                one if same else photos.edited(one, request.edit)
                for one, request, same in zip(pixels, requests, copy, strict=True)
            ]
        )
        ratios = self.draw.choices(self.buckets[grid], k=len(requests))
        s, rows = self.special, []
        for request, pick, ratio in zip(requests, picks, ratios, strict=True):
            image = [
                s["<boi>"],
                s[words.SIZE_TOKEN],
                s[f"<img_ratio_{ratio}>"],
                s["<timestep>"],
                *[s["<img>"]] * (grid[0] * grid[1]),
                s["<joint_img_sep>"],
                *[s["<img>"]] * 16,
                s["<eoi>"],
            ]
            rows.append(self._sequence(request, self.seen[grid][pick], image, ratio))
        ids, answers = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
        patches, mask, patch_grid = self.patches[grid]
        head = 1 + len(self.encode(words.SYSTEM)) + 2
        layout = lay_out(head, ids.shape[1] - head - grid[0] * grid[1] - 22, grid, patch_grid)
        return Batch(
            layout,
            grid,
            ids,
            answers,
            torch.tensor([s[f"<img_ratio_{ratio}>"] for ratio in ratios]),
            self.latents(pixels),
            self.latents(wanted),
            patches[picks],
            mask[picks],
            patch_grid,
            [r.edit for r in requests],
        )

    def latents(self, pixels: np.ndarray) -> torch.Tensor:
        """(n, h, w, 3) in 0..1 -> latents (n, z, h/16, w/16), as bytes would give them."""
        chw = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return F.conv2d((chw * 255).round() / 127.5 - 1, self.kernel, self.offset, stride=16)
