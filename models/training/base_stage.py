"""The base stage: the backbone learns to read instructions, to think, and to repeat the source's size.

Copying pictures it can already. Owns the search for the copy layer's projection and the training loop of the language.
Weights that pictures need are held fixed, so no painted picture is needed here.
"""

import time

import born
import numpy as np
import torch
from data import Batch, Data
from network import Backbone
from torch.nn import functional as F


@torch.no_grad()
def find_places(model: Backbone, data: Data, pictures: int = 3) -> None:
    """Collect what the cells of every grid find in both pictures; fit the copy layer's projections to it (``born.point``)."""
    pairs = []
    for grid in data.crops:
        for _ in range(pictures):
            batch = data.edit(data.requests(data.draw.choice(("spoken", "silent")), 1), [True], grid)
            source, painted = _found(model, batch, torch.rand(1) * 0.9 + 0.1)
            pairs.append((source[0], painted[0], batch.layout.prefix + 3 - batch.layout.vae[0]))
    born.point(model, pairs)


def _found(model: Backbone, batch: Batch, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Findings of source and painted cells (B, cells, 32), as the copy layer sees them."""
    x_t = (1 - t) * batch.target + t * torch.randn_like(batch.target)
    h = model.embed_prefix(batch.ids, batch.layout, *batch.vision())
    p = model.embed_painted(x_t, t.expand(len(h)), torch.full((len(h),), 2.5), batch.ratio_ids)
    before, after = model.rope(batch.layout.prefix_positions), model.rope(batch.layout.painted_positions)
    for layer in model.layers[: born.COPY_LAYER]:
        q, k, v = layer.heads(layer.input_layernorm(h), before)
        h, _ = layer.finish(h, F.scaled_dot_product_attention(q, k, v, attn_mask=batch.layout.prefix_mask, enable_gqa=True))
        q, more_k, more_v = layer.heads(layer.input_layernorm(p), after)
        k, v = torch.cat((k, more_k), 2), torch.cat((v, more_v), 2)
        p, _ = layer.finish(p, F.scaled_dot_product_attention(q, k, v, attn_mask=batch.layout.painted_mask, enable_gqa=True))
    norm = model.layers[born.COPY_LAYER].input_layernorm
    return tuple(
        torch.cat((cells[..., born.FLAGS], cells[..., born.SEEN.start : born.FAR.stop]), -1)
        for cells in (norm(h)[:, batch.layout.vae[0] : batch.layout.vae[1]], norm(p)[:, 3:])
    )


@torch.no_grad()
def report_copies(model: Backbone, data: Data, t: float = 0.7) -> None:
    """Print for every grid how much attention the copying heads give the right cell, and the error of a plain copy."""
    for grid in data.crops:
        batch = data.edit(data.requests("spoken", 2), [True, True], grid)
        times = torch.full((2,), t)
        x_t = (1 - t) * batch.target + t * torch.randn_like(batch.target)
        _, kept, _ = model.run_prefix(model.embed_prefix(batch.ids, batch.layout, *batch.vision()), batch.layout)
        painted = model.embed_painted(x_t, times, torch.full((2,), 2.5), batch.ratio_ids)
        tokens, attention = model.run_painted(painted, kept, batch.layout, born.COPY_LAYER)
        attention = attention[:, list(born.COPY_HEADS)][..., batch.layout.vae[0] : batch.layout.vae[1]]
        clean = x_t - t * model.velocity(tokens, times, grid)
        error = (clean - batch.target).square().mean() / batch.target.square().mean()
        print(
            f"grid {grid}: attention to the right cell {attention.diagonal(dim1=2, dim2=3).mean():.3f}, copy error {error:.4f}",
            flush=True,
        )


def word_loss(model: Backbone, h: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross entropy of the places that have an answer, and how many of them are right."""
    chosen = answers >= 0
    logits = model.words(h[chosen])
    return F.cross_entropy(logits, answers[chosen]), (logits.argmax(-1) == answers[chosen]).float().mean().item()


def train(model: Backbone, data: Data, minutes: float, texts: int = 24, pictures: int = 8, rate: float = 2e-3) -> None:
    """Train for ``minutes``; the schedule follows the clock, so that a busy machine still gets its cool-down."""
    masks = born.protect(model)
    free = [parameter for parameter in model.parameters() if masks[parameter].any()]
    optimizer = torch.optim.AdamW(free, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    start, step = time.time(), 0
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * share)))
        optimizer.zero_grad()
        report = []
        kind = data.draw.choice(("spoken", "spoken", "silent"))
        for batch in (data.text(texts), data.edit(data.requests(kind, pictures), [True] * pictures)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h, _, balance = model.run_prefix(model.embed_prefix(batch.ids, batch.layout, *batch.vision()), batch.layout)
                loss, right = word_loss(model, h, batch.answers)
            (loss + 0.01 * balance).backward()
            report.append(f"{loss.item():.3f} {right:.3f}")
        for parameter in free:
            if parameter.grad is not None:
                parameter.grad *= masks[parameter]
        norm = torch.nn.utils.clip_grad_norm_(free, 1.0).item()
        optimizer.step()
        if step % 25 == 0:
            took = (time.time() - start) / (step + 1)
            print(f"base {step} text {report[0]} picture {report[1]} norm {norm:.2f} {took:.2f} s/step", flush=True)
        step += 1
    print(f"base: {step} steps of {texts} texts and {pictures} pictures in {(time.time() - start) / 60:.1f} min", flush=True)
