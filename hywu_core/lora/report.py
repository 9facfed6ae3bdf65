"""What was measured of a LoRA in words and as data: the text of a report, and the numbers that a panel draws from.

Owns rounding and words; measuring is ``spectrum.py``'s, ``weight_norms.py``'s and ``routing.py``'s, pictures ``pictures.py``'s.
"""

import math
from typing import Any

import torch

from .drawing import short
from .pictures import check_routing, group_shares, relative_norms, routed_share, top_experts
from .spectrum import Comparison, Spectra
from .value import LoRA
from .weight_norms import WeightNorms

DIGITS = 4  # of numbers in the data


def report(lora: LoRA, spectra: Spectra, weights: WeightNorms | None = None, routing: torch.Tensor | None = None) -> str:
    """What a LoRA is and how large its update is, in a few lines.

    Raises:
        LoRAError: weights or routing of another backbone.
    """
    origin, energy_NE = lora.provenance, spectra.expert_energy()
    check_routing(energy_NE, routing)
    lines = [
        f"instruction: {origin.instruction or '(none)'}",
        *([f"made: {origin.made}"] if origin.made else []),
        f"backbone {origin.backbone_fingerprint or '(unknown)'}, generator {origin.generator_fingerprint or '(unknown)'}",
        f"{lora.num_values:,} values, {lora.num_layers} layers, {len(lora.targets)} projections, rank {lora.rank}, "
        f"scale {short(lora.scale)}, {str(lora.dtype).removeprefix('torch.')}",
        f"norm of the update: {short(spectra.norm)}",
        "share of its square: " + ", ".join(f"{name} {share:.1%}" for name, share in group_shares(spectra).items()), "",
        f"{'projection':32s} {'norm':>9s} {'rank':>6s}" + (f" {'of its weight':>14s}" if weights is not None else "")]
    norms, ranks = spectra.norms().norm(dim=0), spectra.effective_ranks().mean(0)
    relative = relative_norms(spectra, weights).mean(0) if weights is not None else None
    for number, target in enumerate(spectra.targets):
        line = f"{target.name:32s} {short(float(norms[number])):>9s} {float(ranks[number]):6.1f}"
        lines.append(line + (f" {float(relative[number]):14.3%}" if relative is not None else ""))
    lines.append("rank: the effective rank, mean over layers and experts" + (
        "; of its weight: norm over the weight's norm, mean over layers" if weights is not None else ""))
    if energy_NE.shape[1]:
        lines += ["", "experts with the largest update: " + ", ".join(top_experts(energy_NE))]
    if routing is not None and routing.sum() > 0:
        share_NE = torch.nan_to_num(routed_share(routing))
        there = energy_NE.sum(1) > 0
        held = (share_NE * energy_NE)[there].sum(1) / energy_NE[there].sum(1)
        even = 1 / energy_NE.shape[1]
        lines.append(f"tokens routed: {int(routing.sum()):,}; an expert's tokens, weighted by its update's energy, are "
                     f"{float(held.mean()) / even:.2f} times the even share" if there.any() else
                     f"tokens routed: {int(routing.sum()):,}")
    return "\n".join(lines)


def panel_data(
    lora: LoRA, spectra: Spectra, weights: WeightNorms | None = None, routing: torch.Tensor | None = None,
) -> dict[str, Any]:
    """JSON for the panel, about 100 KB at the published sizes; numbers have DIGITS digits, what is not finite is null.

    Its keys: ``instruction``, ``rank``, ``layers``, ``targets`` [{name, experts}], ``norms`` [layer][target], ``relative`` the
    same or null, ``ranks`` [layer][target], ``spectra`` [layer][target][R] (root mean square over experts), ``experts``
    {target number: [layer][E]} norms, ``routing`` [layer][E] counts or null.

    Raises:
        LoRAError: weights or routing of another backbone.
    """
    energy_NE = spectra.expert_energy()
    check_routing(energy_NE, routing)
    layers = range(spectra.num_layers)
    experts, curves = {}, []
    for layer in layers:
        rows = []
        for target in spectra.targets:
            values = spectra.values[layer, target.name]
            rows.append(_numbers(values.square().mean(0).sqrt() if target.experts else values))
        curves.append(rows)
    for number, target in enumerate(spectra.targets):
        if target.experts:
            experts[str(number)] = [_numbers(spectra.values[layer, target.name].norm(dim=-1)) for layer in layers]
    return {
        "instruction": lora.provenance.instruction or lora.provenance.made, "rank": lora.rank, "layers": spectra.num_layers,
        "targets": [{"name": target.name, "experts": target.experts} for target in spectra.targets],
        "norms": [_numbers(row) for row in spectra.norms()],
        "relative": None if weights is None else [_numbers(row) for row in relative_norms(spectra, weights)],
        "ranks": [_numbers(row) for row in spectra.effective_ranks()], "spectra": curves, "experts": experts,
        "routing": None if routing is None else routing.tolist()}


def comparison_report(lora_a: LoRA, lora_b: LoRA, found: Comparison) -> str:
    """Two LoRAs in words: cosines by projection and as a whole, principal angles."""
    lines = [f"{name}: {lora.provenance.instruction or lora.provenance.made or '(no instruction)'}, norm {short(norm)}"
             for name, lora, norm in zip("AB", (lora_a, lora_b), found.norms, strict=True)]
    whole = "none, an update is zero" if math.isnan(found.cosine) else f"{found.cosine:.4f}"
    lines += [
        f"cosine of the whole updates: {whole} (1 the same direction, 0 unrelated, -1 opposite)", "",
        f"{'projection':32s} {'cosine':>8s} {'reads':>7s} {'writes':>7s}"]
    columns = [torch.nanmean(values, dim=0) for values in (found.cosines, found.angles_in, found.angles_out)]
    for number, target in enumerate(lora_a.targets):
        cosine, reads, writes = (float(column[number]) for column in columns)
        if math.isnan(cosine):
            lines.append(f"{target.name:32s} {'zero':>8s}")
        else:
            lines.append(f"{target.name:32s} {cosine:8.4f} {reads:6.1f}° {writes:6.1f}°")
    lines.append("means over layers (and experts); angles between the subspaces that the updates read and write: 0° the same, "
                 "90° orthogonal")
    return "\n".join(lines)


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
