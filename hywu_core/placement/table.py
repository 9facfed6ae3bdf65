"""A plan as a compact table for a terminal and for the loader node: monospace, fewer than 40 lines.

Owns the text only. GB are 10⁹ bytes.
"""

import textwrap
from collections.abc import Iterator

from .plan import Peak, Plan, StagePlan, gb
from .request import Lengths, Request

WIDTH = 120
FIXED = "\N{NO-BREAK SPACE}"  # where no line ends; printed as a space
SHOWN = 8  # devices; of more, equal ones stand for each other


def describe(plan: Plan) -> str:
    """What lies where, the peak of every device with what it consists of, and the seconds of every phase.

    Of a plan of ``build.whole`` only what lies where: it has no figures.
    """
    return "\n".join(_lines(plan))


def row(plan: Plan) -> str:
    """One line of a table in Markdown: format, layers, generator, worst peak, RAM, seconds of a step and of an edit."""
    worst = max(plan.peaks, key=lambda peak: peak.total / peak.free)
    stages = " · ".join(f"{stage.layers - len(stage.streamed)}+{len(stage.streamed)}" for stage in plan.stages)
    generator = f"{plan.generator.mode} ({plan.generator.device})" if plan.generator else "–"
    cells = (plan.format, stages + (" ×2 waves" if plan.waves else ""), generator,
             f"{worst.total / 1e9:.1f} of {worst.free / 1e9:.1f} ({worst.phase})",
             f"{plan.ram.total / 1e9:.0f} of {plan.ram.free / 1e9:.0f}", f"{plan.seconds['step']:.2f}",
             f"{plan.seconds['think']:.0f}", f"{plan.seconds['total']:.0f}")
    return " | ".join(cells)


def _lines(plan: Plan) -> Iterator[str]:
    if plan.lengths is not None:  # else nothing was planned for: ``whole`` of build.py
        yield _request(plan.request, plan.lengths)
    yield from _wrapped(f"format     {plan.format}, computed in {str(plan.dtype).removeprefix('torch.')}: {plan.reason}")
    for index, stage in enumerate(plan.stages):
        yield f"{'layers' if index == 0 else '':10s} {_stage(stage)}"
    if plan.waves:
        yield f"{'':10s} both rows under way at once, as two waves"
    yield f"home       {plan.home}: sequences, embedders{_together(plan)}"
    for name, place in plan.places.items():
        if place != plan.home:
            visits = f", comes to {plan.visits[name]} when used" if name in plan.visits else ""
            yield f"{'':10s} {name} on {place}{visits}"
    if plan.generator:
        kept = {"ram": ", kept in RAM", "disk": ", kept on disk"}[plan.generator.kept]
        kept = "" if plan.generator.mode == "resident" else kept
        yield f"generator  {plan.generator.mode} on {plan.generator.device}{kept}"
    yield f"experts    {plan.expert_tokens} tokens at once"
    if plan.peaks:
        yield from _figures(plan)
    for note in plan.notes:
        yield f"note       {note}"


def _request(request: Request, lengths: Lengths) -> str:
    return (f"{lengths.height} x {lengths.width}, {request.pictures} picture{'' if request.pictures == 1 else 's'}, "
            f"{request.rows} row{'s' if request.rows == 2 else ''} of {lengths.whole} tokens, {request.thinking} of them "
            f"thinking; {request.steps} steps")


def _figures(plan: Plan) -> Iterator[str]:
    """Peaks and seconds."""
    yield "peak"
    for peak in _distinct(plan.peaks):
        yield from _peak(peak)
    if plan.peaks[0] is not plan.ram:
        yield from _peak(plan.ram)
    phases = [f"{name} {value:.1f}" for name, value in plan.seconds.items() if name not in ("total", "step") and value]
    yield f"seconds    {', '.join(phases)}"
    yield f"{'':10s} {plan.seconds['total']:.0f} s an edit, {plan.seconds['step']:.2f} s a step (predicted)"


def _stage(stage: StagePlan) -> str:
    text = f"{stage.first:2d}-{stage.first + stage.layers - 1:<2d} on {stage.device}"
    if stage.streamed:
        text += (f", {len(stage.streamed)} of {stage.layers} streamed from {stage.streamed_from} through {stage.ring} buffers"
                 f"{', single tokens on the CPU' if stage.experts_on_host else ''}")
    return text + (", unpacked one by one" if stage.compute_buffer else "")


def _together(plan: Plan) -> str:
    here = [name for name, place in plan.places.items() if place == plan.home and name != "small"]
    return ", " + ", ".join(here) if here else ""


def _distinct(peaks: tuple[Peak, ...]) -> Iterator[Peak]:
    """All of a few; of many those that differ."""
    seen = set()
    for peak in peaks:
        key = (peak.total, peak.free)
        if len(peaks) <= SHOWN // 2 or key not in seen:
            yield peak
        seen.add(key)


def _peak(peak: Peak) -> list[str]:
    largest = sorted(peak.items.items(), key=lambda item: -item[1])
    items = ", ".join(f"{name.replace(' ', FIXED)}{FIXED}{nbytes / 1e9:.1f}" for name, nbytes in largest if nbytes >= 5e7)
    return _wrapped(f"  {peak.device:7s} {gb(peak.total):>8s} of {gb(peak.free)} free ({peak.phase}): {items}")


def _wrapped(text: str) -> list[str]:
    return [line.replace(FIXED, " ") for line in textwrap.wrap(text, WIDTH, subsequent_indent=" " * 11)]
