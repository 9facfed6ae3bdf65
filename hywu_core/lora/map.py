"""Many LoRAs as points of a plane: near each other where their updates are alike.

Owns what a point is, reading it from a file (from its header alone where the file holds a sketch) and the two directions in
which the sketches spread most. Drawing is ``map_picture.py``'s.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from ..errors import LoRAError, RequestError
from ..progress import Tick, silent
from .files import Summary, asked_for, load_lora, read_summary
from .header import shown
from .sketch import sketch, sketch_of_text
from .value import LoRA

TICKS = 100  # a file
SHOWN = 300  # characters of a name or an instruction in a report
# Of files without one in their header: (path, size, time of change) -> sketch, 4 KB each.
_MEASURED: dict[tuple[str, int, int], torch.Tensor] = {}


@dataclass(frozen=True, eq=False)
class Point:
    """One LoRA of a map. sketch_D: (sketch.LENGTH,) fp32."""

    name: str
    instruction: str
    backbone_fingerprint: str
    sketch_D: torch.Tensor = field(repr=False)
    thumbnail: Image.Image | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Map:
    """Points in the plane of their first two principal components.

    places: (n, 2) fp64, in units of the update's norm. shares: of the spread, what each direction holds. cosines: (n, n),
    estimated.
    """

    points: tuple[Point, ...]
    places: torch.Tensor
    shares: tuple[float, float]
    cosines: torch.Tensor

    def nearest(self, index: int) -> int | None:
        """The point whose update has the largest cosine with that of ``index``; None for the only one."""
        if len(self.points) < 2:
            return None
        others = self.cosines[index].clone()
        others[index] = -torch.inf
        return int(others.argmax())


def point_of(lora: LoRA, name: str, on_tick: Tick = silent) -> Point:
    """A LoRA in memory. Ticks per target of each layer."""
    origin = lora.provenance
    return Point(name, origin.instruction or origin.made, origin.backbone_fingerprint, sketch(lora, on_tick))


def points_of_files(
    files: Mapping[str, Path], wanted: str = "", on_tick: Tick = silent,
) -> tuple[list[Point], list[str]]:
    """The LoRAs of some files by name, and for each that cannot be read a line with the reason.

    wanted: only those whose instruction or name holds all of these words. Of files whose headers name the same digest the first
    is taken. Ticks TICKS times a file; the values are read only of files without a sketch in their header.
    """
    points, left_out, summaries = [], [], {}
    for name, path in files.items():
        try:
            summaries[name] = read_summary(path)
        except LoRAError as error:
            left_out.append(f"{name}: {error}")
    chosen = dict(asked_for(summaries.items(), wanted))
    for number, (name, summary) in enumerate(chosen.items()):
        try:
            points.append(_point(files[name], name, summary, _part(on_tick, number, len(chosen))))
        except LoRAError as error:
            left_out.append(f"{name}: {error}")
        on_tick((number + 1) * TICKS, len(chosen) * TICKS, None)
    return points, left_out


def _part(on_tick: Tick, number: int, files: int) -> Tick:
    return lambda done, total, latent: on_tick(number * TICKS + TICKS * done // max(total, 1), files * TICKS, None)


def _point(path: Path, name: str, summary: Summary, on_tick: Tick) -> Point:
    thumbnail = None if summary.thumbnail is None else Image.open(io.BytesIO(summary.thumbnail)).convert("RGB")
    origin = summary.provenance
    found = _sketch(path, summary.sketch, on_tick)
    return Point(name, origin.instruction or origin.made, origin.backbone_fingerprint, found, thumbnail)


def _sketch(path: Path, text: str | None, on_tick: Tick) -> torch.Tensor:
    """The file's own, if it is one; else measured, once for each state of the file."""
    if text:
        try:
            return sketch_of_text(text)
        except LoRAError:
            pass  # the values are there to be measured
    status = path.stat()
    key = str(path.resolve()), status.st_size, status.st_mtime_ns
    if key not in _MEASURED:
        _MEASURED[key] = sketch(load_lora(path), on_tick)
    return _MEASURED[key]


def lora_map(points: Sequence[Point]) -> Map:
    """The plane of the two principal components of the sketches: the directions in which they differ most from their mean.

    One point lies in the middle. Signs are chosen so that the farthest point of each direction is on its positive side.

    Raises:
        RequestError: no points.
        LoRAError: they are of several backbones; it says how many of which.
    """
    if not points:
        raise RequestError("a map needs at least 1 LoRA, 0 were given: save some LoRAs first, or choose another folder or "
                           "filter")
    backbones = Counter(point.backbone_fingerprint for point in points)
    if len(backbones) > 1:
        counts = ", ".join(f"{count} of {name or 'an unknown one'}" for name, count in backbones.most_common(8))
        raise LoRAError(f"the {len(points)} LoRAs were written for {len(backbones)} backbones ({counts}), a map shows those of "
                        "one: keep them in folders of their own")
    sketches = torch.stack([point.sketch_D for point in points]).double()
    norms = sketches.norm(dim=1)
    cosines = (sketches @ sketches.T / (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    left, values, _ = torch.linalg.svd(sketches - sketches.mean(0), full_matrices=False)
    places = torch.zeros(len(points), 2, dtype=torch.float64)
    count = min(2, len(values))
    places[:, :count] = left[:, :count] * values[:count]
    farthest = places.gather(0, places.abs().argmax(0, keepdim=True))
    places *= torch.where(farthest < 0, -1.0, 1.0)
    spread = float(values.square().sum())
    # What rounding leaves of equal sketches is no direction.
    shares = [float(value) ** 2 / spread if spread > 1e-12 * float(norms.square().sum()) else 0.0 for value in values[:2]]
    return Map(tuple(points), places, tuple((*shares, 0.0, 0.0)[:2]), cosines)


def map_report(found: Map, left_out: Sequence[str] = ()) -> str:
    """The points by number, with their instruction and nearest neighbour, and what could not be read."""
    backbone = found.points[0].backbone_fingerprint or "(unknown)"
    lines = [f"{len(found.points)} LoRAs of the backbone {backbone}; the two directions hold {found.shares[0]:.0%} and "
             f"{found.shares[1]:.0%} of their spread. Cosines are estimated, within about 0.07."]
    for index, point in enumerate(found.points):
        # As a terminal may show it: no escapes, no lines of a file's own making, and not ten million characters.
        name, instruction = (shown(text, SHOWN)[1:-1] for text in (point.name, point.instruction))
        line = f"{index + 1:3d}  {name}: {instruction or '(no instruction)'}"
        if (near := found.nearest(index)) is not None:
            line += f"  (nearest: {near + 1}, cosine {found.cosines[index, near]:.2f})"
        lines.append(line)
    if left_out:
        lines += ["", f"Left out, {len(left_out)}:", *left_out]
    return "\n".join(lines)
