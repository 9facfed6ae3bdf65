"""What a LoRA looks like: its norms, its singular values, its experts, and two LoRAs side by side, as pictures.

Owns what is shown and in which words; how it is drawn is ``drawing.py``'s. Layers run from left to right in all of them.
"""

import math

import numpy as np
import torch
from PIL import Image

from ..errors import LoRAError
from .algebra import group
from .drawing import FAINT, GRID, INK, LINES, Panel, Scale, Sheet, blue_red, heat_maps, short
from .spectrum import Comparison, Spectra
from .weight_norms import WeightNorms

TOP_EXPERTS = 6  # named below the experts' picture
SHOWN_BELOW = 1e-5  # of the largest singular value: the lower end of the plot


def relative_norms(spectra: Spectra, weights: WeightNorms | None) -> torch.Tensor:
    """(N, targets): norm of each update over the norm of the weight it is added to, or the update's alone without weights.

    Raises:
        LoRAError: the weights have other targets than the LoRA.
    """
    norms = spectra.norms()
    if weights is None:
        return norms
    keys = {(layer, target.name) for layer in range(spectra.num_layers) for target in spectra.targets}
    if different := keys ^ weights.values.keys():
        raise LoRAError(f"the LoRA and the backbone differ in {len(different)} of {len(keys)} projections, such as "
                        f"{min(different)}: connect the backbone that the LoRA was written for")
    against = torch.tensor(
        [[weights.whole(layer, target.name) for target in spectra.targets] for layer in range(spectra.num_layers)],
        dtype=torch.float64)
    return norms / against.clamp_min(torch.finfo(torch.float64).tiny)


def norm_map(spectra: Spectra, weights: WeightNorms | None = None) -> Image.Image:
    """A heat map of layers and projections: how large the update is, against the weight where the weights are given.

    Raises:
        LoRAError: as ``relative_norms``.
    """
    values = relative_norms(spectra, weights).T.numpy()
    if weights is None:
        title, unit = "Norm of the update s·BA of each projection", "|sBA|"
    else:
        title, unit = "Norm of the update s·BA against its weight W", "|sBA|/|W|"
    names = [target.name for target in spectra.targets]
    row, layer = np.unravel_index(int(values.argmax()), values.shape)
    lines = [f"Largest: {short(values[row, layer])} at layer {layer}, {names[row]}. Whole update: norm {short(spectra.norm)}.",
             "Experts of a projection are taken together."]
    return heat_maps(title, [Panel("", values, Scale.of(values), unit, names, "projection")], lines)


def spectrum_plot(spectra: Spectra) -> Image.Image:
    """Singular values of each projection, largest first, on a logarithmic scale: mean over its updates, and the middle 80 %."""
    ranks = spectra.effective_ranks().mean(0)
    middle, curves = torch.tensor([0.1, 0.9], dtype=torch.float64), {}
    for target in spectra.targets:
        values = torch.cat([spectra.values[layer, target.name].view(-1, _rank(spectra)) for layer in range(spectra.num_layers)])
        curves[target.name] = np.stack([values.mean(0), *torch.quantile(values, middle, dim=0)])
    shown = np.concatenate([curve[curve > 0] for curve in curves.values()])
    high = float(shown.max()) if shown.size else 1.0
    low = max(high * SHOWN_BELOW, float(shown.min()) if shown.size else 0.0)
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
    if bottom == top:
        bottom -= 1
    rank, (left, upper, width, height) = _rank(spectra), (110, 76, 660, 440)
    sheet = Sheet(1220, 600)
    sheet.text(24, 18, "Singular values of the updates", 22)

    def place(index: int, value: float) -> tuple[float, float]:
        share = (math.log10(max(value, 10.0**bottom)) - bottom) / (top - bottom)
        return left + width * (index + 0.5) / rank, upper + height * (1 - min(1.0, share))

    for decade in range(bottom, top + 1):
        y = place(0, 10.0**decade)[1]
        sheet.line([(left, y), (left + width, y)], GRID)
        sheet.text(left - 10, y, f"1e{decade}" if abs(decade) > 2 else short(10.0**decade), 14, INK, "rm")
    every = max(1, math.ceil(rank / 16))
    for index in range(0, rank, every):
        sheet.text(place(index, high)[0], upper + height + 8, str(index + 1), 14, INK, "ma")
    sheet.text(left + width / 2, upper + height + 32, "number of the singular value", 15, FAINT, "ma")
    sheet.text(24, upper - 16, "singular value (log)", 15, FAINT, "ls")
    for number, curve in enumerate(curves.values()):
        colour = LINES[number % len(LINES)]
        band = [place(index, value) for index, value in enumerate(curve[2])]
        band += [place(index, value) for index, value in reversed(list(enumerate(curve[1])))]
        if rank > 1:
            sheet.polygon(band, colour + "20")
    for number, (name, curve) in enumerate(curves.items()):
        colour = LINES[number % len(LINES)]
        points = [place(index, value) for index, value in enumerate(curve[0])]
        # The first are the widest: lines that lie on each other are all seen.
        sheet.line(points, colour, 2 + 1.5 * (len(curves) - 1 - number))
        for point in points:
            sheet.dot(*point, 3, colour)
        y = upper + 30 + 44 * number
        if y < 560:
            sheet.line([(left + width + 28, y), (left + width + 58, y)], colour, 3)
            sheet.text(left + width + 68, y - 9, name, 15, INK, "lm", width=320)
            sheet.text(left + width + 68, y + 10, f"effective rank {ranks[number]:.1f} of {rank}", 13, FAINT, "lm")
    sheet.rectangle(left, upper, width, height, outline=FAINT)
    sheet.text(24, 572, "Lines: mean over layers and experts. Bands: the middle 80 %.", 14, FAINT)
    return sheet.done()


def experts_picture(spectra: Spectra, routing: torch.Tensor | None = None) -> Image.Image:
    """Layers and experts: the norm of each expert's update, and how often tokens came to it.

    routing: (N, E) int64 of ``routing.recording``.

    Raises:
        LoRAError: the routing is of another number of layers or experts.
    """
    energy_NE = spectra.expert_energy()
    check_routing(energy_NE, routing)
    if not energy_NE.shape[1]:
        sheet = Sheet(760, 120)
        sheet.text(24, 44, "This LoRA has no routed experts.", 20)
        return sheet.done()
    norms = energy_NE.sqrt().T.numpy()
    names = [str(expert) for expert in range(len(norms))]
    panels = [Panel("Norm of the update of each routed expert (its projections together)", norms, Scale.of(norms), "|sBA|",
                    names, "expert")]
    lines = ["Largest share of the experts' energy: " + ", ".join(top_experts(energy_NE)) + "."]
    if routing is not None:
        share = routed_share(routing).T.numpy()
        panels.append(Panel("Share of the tokens that were routed to each expert", share, Scale.of(share, log=False), "share",
                            names, "expert"))
        lines.append(f"Correlation of norm and share over all experts: {_correlation(norms, share)}.")
    return heat_maps("Routed experts", panels, lines)


def comparison_picture(targets: list[str], found: Comparison) -> Image.Image:
    """Two LoRAs: the cosine of their updates, and how far apart the directions are that they read and write."""
    panels = [
        Panel("Cosine of the updates: 1 the same, 0 unrelated, -1 opposite", found.cosines.T.numpy(), Scale(-1.0, 1.0),
              "cosine", targets, "projection", colours=blue_red),
        Panel("Mean principal angle between what they read (rows of A)", found.angles_in.T.numpy(), Scale(0.0, 90.0), "degrees",
              targets, "projection"),
        Panel("Mean principal angle between what they write (columns of B)", found.angles_out.T.numpy(), Scale(0.0, 90.0),
              "degrees", targets, "projection")]
    lines = [f"Cosine of the whole updates: {found.cosine:.4f}. Norms: {short(found.norms[0])} and {short(found.norms[1])}."]
    return heat_maps("Two LoRAs", panels, lines)


def check_routing(energy_NE: torch.Tensor, routing: torch.Tensor | None) -> None:
    """Raises LoRAError unless the counts are of as many layers and experts as the LoRA."""
    if routing is not None and (routing.ndim != 2 or routing.shape != energy_NE.shape):
        raise LoRAError(f"the routing is of {tuple(routing.shape)} layers and experts, the LoRA of {tuple(energy_NE.shape)}: "
                        "connect the latent of a sampler that ran this LoRA's backbone")


def routed_share(routing: torch.Tensor) -> torch.Tensor:
    """(N, E) fp64: each expert's share of its layer's tokens; NaN for a layer without any."""
    counts = routing.double()
    return counts / counts.sum(1, keepdim=True)


def top_experts(energy_NE: torch.Tensor, count: int = TOP_EXPERTS) -> list[str]:
    """"layer 3 expert 17 (2.1 %)" of the experts with the largest energy."""
    whole = float(energy_NE.sum()) or 1.0
    values, places = energy_NE.flatten().topk(min(count, energy_NE.numel()))
    experts = energy_NE.shape[1]
    return [f"layer {int(place) // experts} expert {int(place) % experts} ({float(value) / whole:.1%})"
            for value, place in zip(values, places, strict=True)]


def group_shares(spectra: Spectra) -> dict[str, float]:
    """Share of the squared norm by group of projections ("attention", "shared", "experts")."""
    squares, found = spectra.norms().square().sum(0), {}
    for target, square in zip(spectra.targets, squares, strict=True):
        found[group(target)] = found.get(group(target), 0.0) + float(square)
    whole = sum(found.values()) or 1.0
    return {name: square / whole for name, square in found.items()}


def _correlation(norms: np.ndarray, share: np.ndarray) -> str:
    there = np.isfinite(share)
    if there.sum() < 2 or norms[there].std() == 0 or share[there].std() == 0:
        return "none, as one of them does not vary"
    return f"{np.corrcoef(norms[there], share[there])[0, 1]:.2f}"


def _rank(spectra: Spectra) -> int:
    return next(iter(spectra.values.values())).shape[-1]
