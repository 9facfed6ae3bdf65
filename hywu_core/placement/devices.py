"""What there is to place on: cards, the computer's memory and its disk, as plain numbers.

Owns ``Device``, the table of cards, reading a machine from a line (``2x24+192ram``) and looking at the machine that this runs
on. Places nothing. The computer's memory is a device too, always the last one: layers lie there while they wait, and where
there is no GPU they run there.

Memory: a "24" card has 24 GiB, of which torch sees 98.5 % (a 4090 23.64, an H100 78.8, an H200 138.9 GiB: the rest is the
driver's), and the process's context and libraries take half a GiB more. Free is what is left; headroom against fragmentation is
the plan's affair. "64ram" is 64 GiB, of which the operating system keeps 4. All values in bytes and per second.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlacementError

GIB = 1 << 30
SEEN, CONTEXT = 0.985, GIB // 2  # see above
SYSTEM_RAM = 4 * GIB
# Datasheets give 3 to 7 GB/s for NVMe; what a checkpoint's files really come in with is nearer to this.
DISK = 2.5e9
RAM_BANDWIDTH = 80e9  # two channels of DDR5
CPU_FLOPS = 1e12  # a desktop's cores with AVX-512 bf16 or fp32, a round figure
PCIE4, PCIE5 = 25e9, 50e9  # pinned, x16


@dataclass(frozen=True)
class Device:
    """A place for weights.

    name: "cuda:0" or "cpu". kind: "cuda", "mps" or "cpu". total, free: bytes. flops: dense bf16 products a second with fp32
    accumulation. bandwidth: of its memory, bytes/s. link: bytes/s from pinned memory; for the CPU from the disk. card: for
    text.
    """

    name: str
    kind: str
    total: int
    free: int
    flops: float
    bandwidth: float
    link: float
    card: str = ""


@dataclass(frozen=True)
class Card:
    """A row of the table; ``pattern`` finds it in what torch says a GPU is called, GiB chooses among variants."""

    name: str
    pattern: str
    gib: int
    flops: float
    bandwidth: float
    link: float


# H200 measured, H100 and the consumer cards assumed alike; all others from NVIDIA's
# datasheets (dense, fp32 accumulation). A size without a name means the first card here of that size.
CARDS = (
    Card("rtx4070", r"RTX 4070", 12, 58e12, 504e9, PCIE4),
    Card("rtx3060", r"RTX 3060", 12, 26e12, 360e9, PCIE4),
    Card("rtx4080", r"RTX 4080", 16, 98e12, 717e9, PCIE4),
    Card("rtx5080", r"RTX 5080", 16, 112e12, 960e9, PCIE5),
    Card("4090", r"RTX 4090", 24, 165e12, 1.01e12, PCIE4),
    Card("3090", r"RTX 3090", 24, 71e12, 936e9, PCIE4),
    Card("l4", r"\bL4\b", 24, 121e12, 300e9, PCIE4),
    Card("a10", r"\bA10G?\b", 24, 125e12, 600e9, PCIE4),
    Card("5090", r"RTX 5090", 32, 209e12, 1.79e12, PCIE5),
    Card("a100-40", r"A100", 40, 312e12, 1.55e12, PCIE4),
    Card("a6000", r"A6000|\bA40\b", 48, 155e12, 768e9, PCIE4),
    Card("6000ada", r"6000 Ada", 48, 364e12, 960e9, PCIE4),
    Card("l40s", r"L40S", 48, 362e12, 864e9, PCIE4),
    Card("h100", r"H100|H800", 80, 700e12, 3.0e12, PCIE5),
    Card("a100", r"A100|A800", 80, 312e12, 2.0e12, PCIE4),
    Card("pro6000", r"PRO 6000", 96, 250e12, 1.79e12, PCIE5),
    Card("h20", r"H20\b", 96, 148e12, 4.0e12, PCIE5),
    Card("h200", r"H200", 141, 790e12, 4.3e12, PCIE5),
    Card("b200", r"B200", 180, 2250e12, 7.7e12, PCIE5),
)

_ITEM = re.compile(r"(?:(?P<count>\d+)x)?(?P<what>[a-z0-9.-]+?)(?P<ram>ram)?(?::(?P<free>\d+(?:\.\d+)?))?", re.IGNORECASE)
_SYNTAX = ("write cards joined by '+' or ',': [COUNTx]SIZE or NAME, each with ':FREE' behind it where less is free, and "
           "'RAMram' (sizes in GiB). Examples: 2x24+192ram, 4x80, 1x4090+64ram, 24,48+96ram, 1x24:12, cpu+24ram")


def parse_devices(text: str) -> tuple[Device, ...]:
    """A machine from a line: cards first, the computer's memory last.

    ``4x80`` four cards of 80 GiB; ``1x4090`` by name; ``24,48`` two unequal ones; ``24:12`` one of 24 with 12 GiB free;
    ``64ram`` and ``64ram:40`` likewise for the memory; ``cpu`` for no card. Without ``ram`` the memory is as large as all cards
    together and at least 32 GiB.

    Raises: PlacementError for a line that is none, or a size that no card has.
    """
    cards: list[Device] = []
    ram: Device | None = None
    cpu_named = False
    for item in re.split(r"[+,]", text.replace(" ", "")):
        match = _ITEM.fullmatch(item)
        if not match:
            raise PlacementError(f"devices {text[:60]!r}: {item[:20]!r} is not understood; {_SYNTAX}")
        free = float(match["free"]) if match["free"] else None
        if match["ram"]:
            if ram is not None or match["count"]:
                raise PlacementError(f"devices {text[:60]!r}: there is one 'ram', and it is not counted; {_SYNTAX}")
            ram = _memory(_size(match["what"], text), free)
        elif match["what"].lower() == "cpu":
            cpu_named = True
        else:
            cards += [_card(match["what"], text, len(cards) + number, free) for number in range(int(match["count"] or 1))]
    if not cards and not cpu_named:
        raise PlacementError(f"devices {text[:60]!r} names no card; say 'cpu+{text or '64ram'}' to do without; {_SYNTAX}")
    if ram is None:
        ram = _memory(max(32.0, sum(card.total for card in cards) / SEEN / GIB), None)
    return (*cards, ram)


def _size(text: str, line: str) -> float:
    if not re.fullmatch(r"\d+(?:\.\d+)?", text) or float(text) <= 0:
        raise PlacementError(f"devices {line[:60]!r}: {text[:20]!r} is no size in GiB; {_SYNTAX}")
    return float(text)


def _card(what: str, line: str, index: int, free: float | None) -> Device:
    named = next((card for card in CARDS if card.name.removeprefix("rtx") == what.lower().removeprefix("rtx")), None)
    if named is None:
        size = _size(what, line)
        if not 4 <= size <= 1024:
            raise PlacementError(f"devices {line[:60]!r}: a card of {size:g} GiB is not known; sizes go from 4 to 1024, names "
                                 f"are {', '.join(card.name for card in CARDS)}")
        named, size_gib = min(CARDS, key=lambda card: abs(card.gib - size)), size
    else:
        size_gib = float(named.gib)
    total = int(size_gib * GIB * SEEN)
    if free is not None and free > size_gib:
        raise PlacementError(f"devices {line[:60]!r}: {free:g} GiB free of {size_gib:g}; the number behind ':' is what is free")
    left = total - CONTEXT if free is None else min(int(free * GIB), total - CONTEXT)
    return Device(f"cuda:{index}", "cuda", total, left, named.flops, named.bandwidth, named.link, named.name)


def _memory(size: float, free: float | None) -> Device:
    total = int(size * GIB)
    if free is not None and free > size:
        raise PlacementError(f"{free:g} GiB of memory free of {size:g}: the number behind ':' is what is free")
    left = max(0, total - SYSTEM_RAM) if free is None else int(free * GIB)
    return Device("cpu", "cpu", total, left, CPU_FLOPS, RAM_BANDWIDTH, DISK, "memory")


def find_devices() -> tuple[Device, ...]:
    """This machine: every GPU that torch sees with what is free on it now, and the memory that this process may still take."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        # What torch's allocator holds without using it is ours as well.
        free += torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        card = _known(torch.cuda.get_device_name(index), total)
        found.append(Device(f"cuda:{index}", "cuda", total, free, card.flops, card.bandwidth, card.link, card.name))
    if not found and torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        # One memory for both: layers "on the card" come out of the same chips. Figures of an M3 Max, Apple's own.
        found.append(Device("mps", "mps", total, total - torch.mps.driver_allocated_memory(), 28e12, 400e9, 100e9, "mps"))
    total, free = available_memory()
    return (*found, Device("cpu", "cpu", total, free, CPU_FLOPS, RAM_BANDWIDTH, DISK, "memory"))


def _known(name: str, total: int) -> Card:
    """The card of that name and about that size, or of about that size."""
    same = [card for card in CARDS if re.search(card.pattern, name)] or CARDS
    return min(same, key=lambda card: abs(card.gib * GIB * SEEN - total))


def available_memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, free) bytes of memory for this process: the machine's, or its control group's where that allows less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE))
        total, free = int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    groups = root / "sys/fs/cgroup"
    for limit_name, used_name in (("memory.max", "memory.current"),
                                  ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        limit, used = groups / limit_name, groups / used_name
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
            allowed = int(text)
            total, free = min(total, allowed), min(free, max(0, allowed - int(used.read_text())))
    return total, free
