"""Every plan's predicted peaks against what is counted when it is played through on meta: within 5 %, phase by phase."""

import pytest
import torch
from comfyui_hywu.hywu_core.placement.devices import parse_devices
from comfyui_hywu.hywu_core.placement.plan import plan
from comfyui_hywu.hywu_core.placement.request import Request

from .live import counted
from .replay import Replay

TOLERANCE = 0.05
PLANS = (
    ("8x40", "auto", {}), ("4x80", "auto", {}), ("2x141", "auto", {}), ("1x141", "fp8", {}), ("1x96", "int4", {}),
    ("2x48", "auto", {}), ("2x48", "int4", {}), ("1x24+64ram", "int4", {}), ("2x24+192ram", "int8", {}),
    ("24,48+96ram", "auto", {}), ("48:24+64ram", "int4", {}), ("1x12+64ram", "int4", {"rows": 1}), ("cpu+24ram", "auto", {}),
    ("1x32+128ram", "auto", {}), ("2x24+192ram", "int4", {}), ("1x16+64ram", "auto", {}), ("cpu+192ram", "auto", {}),
    ("4x80", "auto", {"pictures": 3}), ("1x24+64ram", "int4", {"pictures": 0, "size": "768x1024", "thinking": 0}))


@pytest.fixture(scope="module")
def replay(real_config, real_generator_config):
    return Replay(real_config, real_generator_config)


@pytest.mark.parametrize(("machine", "format", "request_"), PLANS, ids=[f"{m}-{f}-{r}" for m, f, r in PLANS])
def test_predicted_peaks_are_what_a_replay_counts(sizes, generator, replay, machine, format, request_, record_property):
    made = plan(sizes, parse_devices(machine), Request(**request_), format=format, generator=generator)
    played = replay.peaks(made)
    wrong = []
    for peak in made.peaks:
        if not peak.total:
            continue
        counted_ = played[peak.device]
        most = max(counted_.values())
        record_property(peak.device, f"{peak.total / most - 1:+.2%}")
        if abs(peak.total - most) > TOLERANCE * most:
            wrong.append(f"{peak.device}: predicted {peak.total / 1e9:.2f} GB, counted {most / 1e9:.2f}")
        for phase, nbytes in counted_.items():
            if abs(peak.phases[phase] - nbytes) > TOLERANCE * nbytes:
                wrong.append(f"{peak.device} {phase}: predicted {peak.phases[phase] / 1e9:.2f} GB, counted {nbytes / 1e9:.2f}")
    if made.ram is not made.peaks[0]:
        waiting = replay.ram(made)
        if abs(made.ram.total - waiting) > TOLERANCE * waiting:
            wrong.append(f"memory: predicted {made.ram.total / 1e9:.2f} GB, counted {waiting / 1e9:.2f}")
    assert not wrong, wrong


def test_the_counter_sees_what_lives_and_what_has_gone():
    with counted() as live:
        a = torch.empty(1000, dtype=torch.uint8, device="meta")
        b = a.view(10, 100)  # the same memory
        assert live.now == 1000
        c = torch.empty(500, device="meta") + 1  # two of them until the first is dropped
        assert live.peak == 1000 + 2 * 2000 and live.now == 3000
        del a
        assert live.now == 3000
        del b, c
        assert live.now == 0 and live.peak == 5000
