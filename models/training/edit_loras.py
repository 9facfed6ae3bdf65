"""What the generator is taught to write: for every edit a LoRA that does it, found by least squares instead of gradients.

Owns the regression. In this VAE an edit of colours is nearly an affine map of a cell's 64 latents. The copy layer carries
these latents from the source to the painted cell, so its qkv_proj (values of the two copying heads) and its o_proj are
where the map can be written: reduced-rank regression fills the first, the second takes what is left and the constant
part.
"""

import born
import numpy as np
import photos
import torch
from data import Data
from network import Backbone

CELLS = 60_000


def solve(model: Backbone, data: Data, rank: int) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """edit -> target -> (A (R, I), B (O, R)) in the copy layer, for a LoRA scale of 1; all edits share their A."""
    source, wanted = _cells(data)
    weight = (1 / data.kernel.flatten(1).norm(dim=1)).double()  # latent error -> pixel error
    layer = model.layers[born.COPY_LAYER]
    d, q = model.config.hidden_size, layer.q
    value_a = _common(source, [target - source for target in wanted.values()], weight, rank, constant=False)
    values = {edit: _fit(source @ value_a.T, target - source) for edit, target in wanted.items()}
    carried = {edit: source + source @ value_a.T @ values[edit].T for edit in wanted}
    out_a = _common(source, [wanted[edit] - carried[edit] for edit in wanted], weight, rank - 1, constant=True)
    loras = {}
    for edit, target in wanted.items():
        low = torch.cat((carried[edit] @ out_a.T, torch.ones(len(source), 1)), 1)
        out_b = _fit(low, target - carried[edit])
        # qkv_proj: reads the latents out of the normed stream, writes the values of kv heads 0 and 1.
        a_qkv, b_qkv = torch.zeros(rank, d), torch.zeros(layer.qkv_proj.shape[0], rank)
        a_qkv[:, born.ORIGINAL] = value_a
        rows = b_qkv.view(layer.kv, layer.group + 2, q, rank)
        rows[0, -1], rows[1, -1] = values[edit][:q], values[edit][q:]
        # o_proj: reads the two copying heads and the head that always says 1.
        a_o, b_o = torch.zeros(rank, layer.o_proj.shape[1]), torch.zeros(d, rank)
        heads = a_o.view(rank, layer.kv, layer.group, q)
        heads[:-1, 0, 0], heads[:-1, 1, 0] = out_a[:, :q], out_a[:, q:]
        heads[-1, 2, 0, -1] = 1.0
        b_o[born.COPY] = out_b
        loras[edit] = {"self_attn.qkv_proj": (a_qkv, b_qkv), "self_attn.o_proj": (a_o, b_o)}
        scale = born.LATENT_UNIT * weight
        before, after = _psnr((source - target) * scale), _psnr((carried[edit] + low @ out_b.T - target) * scale)
        print(f"{edit}: {before:.1f} dB unedited, {after:.1f} dB with the LoRA (VAE error not counted)", flush=True)
    return loras


def _common(x: torch.Tensor, changes: list[torch.Tensor], weight: torch.Tensor, rank: int, constant: bool) -> torch.Tensor:
    """The ``rank`` orthonormal directions (rank, i) of x from which all changes can be told best, each edit counting alike."""
    x = x.double()
    centre = x.mean(0) if constant else 0 * x[0]
    gram = (x - centre).T @ (x - centre)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    maps = []
    for change in changes:
        y = change.double() * weight
        y = y - y.mean(0) if constant else y
        full = torch.linalg.solve(gram, (x - centre).T @ y)
        maps.append(full / (full.T @ gram @ full).trace().clamp_min(1e-12) ** 0.25)
    half = torch.linalg.cholesky(gram)  # gram = half half^T
    left, _, _ = torch.linalg.svd(half.T @ torch.cat(maps, 1), full_matrices=False)
    # Reading x through this makes the chosen combinations of x; orthonormal rows keep both factors of one size.
    directions = torch.linalg.solve(half.T, left[:, :rank])
    return torch.linalg.qr(directions)[0].T.float()


def _fit(low: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """B (o, rank) of least squares: change ~ low B^T."""
    low, change = low.double(), change.double()
    gram = low.T @ low
    gram += 1e-5 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, low.T @ change).T.float()


def _cells(data: Data) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    source, wanted = [], {edit: [] for edit in photos.EDITS}
    for pixels in data.crops.values():
        chosen = (
            pixels[data.numpy.permutation(len(pixels))[: max(1, int(CELLS / 60 * len(pixels) / 3300))]].astype(np.float32) / 255
        )
        source.append(_flat(data.latents(chosen)))
        for edit in photos.EDITS:
            wanted[edit].append(_flat(data.latents(photos.edited(chosen, edit))))
    return torch.cat(source), {edit: torch.cat(parts) for edit, parts in wanted.items()}


def _flat(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).flatten(0, 2) / born.LATENT_UNIT


def _psnr(error: torch.Tensor) -> float:
    # 768 values in -1..1 a cell.
    return float(-10 * torch.log10(error.square().sum(1).mean() / 768 / 4))
