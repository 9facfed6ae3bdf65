"""From a plan to processes: who is where, with what share of which device, and how much room requests have."""

from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.cluster.layout import OTHER_SHARE, STAGE_SHARE, describe, mode_of, on_cpus, on_gpus
from comfyui_hywu.hywu_core.errors import CheckpointError, PlacementError
from comfyui_hywu.hywu_core.placement.build import ELSEWHERE
from comfyui_hywu.hywu_core.placement.devices import parse_devices

DATA = Path(__file__).resolve().parents[1] / "data" / "real-config"
MINI = Path(__file__).resolve().parents[2] / "models" / "hywu-mini"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> tuple[Path, Path]:
    """The published configurations, as folders without weights."""
    folders = []
    for name in ("hunyuanimage3-instruct", "hy-wu"):
        folders.append(tmp_path_factory.mktemp(name))
        (folders[-1] / "config.json").write_bytes((DATA / f"{name}.config.json").read_bytes())
    return tuple(folders)


def gpus(line: str, nodes: int):
    cards = parse_devices(line)[:-1]
    return [(f"10.0.0.{number * nodes // len(cards)}", card) for number, card in enumerate(cards)]


def test_layers_are_cut_evenly_on_cpus():
    found = on_cpus(MINI / "backbone", MINI / "generator", 1, 3, 24 << 30, None)
    assert [part.layers for part in found.of("stage")] == [range(0, 1), range(1, 3), range(3, 4)]
    assert [len(found.of(kind)) for kind in ("tower", "writer", "desk")] == [1, 1, 1]
    assert found.bundles == (None,) * 3 and found.capacity == (4 << 30,) * 3
    assert found.plan.dtype == torch.float32 and mode_of(found) == {"device": "cpu", "mode": "resident", "kept": "ram"}
    assert on_cpus(MINI / "backbone", None, 3, 3, 24 << 30, torch.bfloat16).capacity == (12 << 30,) * 3


@pytest.mark.parametrize("stages", [0, 5])
def test_more_stages_than_layers_are_refused(stages):
    with pytest.raises(PlacementError, match="1 to 4"):
        on_cpus(MINI / "backbone", None, 1, stages, 1 << 30, None)


def test_a_generator_that_cannot_serve_is_refused_at_once(real, tmp_path):
    with pytest.raises(CheckpointError, match="config.json is missing"):
        on_cpus(MINI / "backbone", tmp_path / "none", 1, 1, 1 << 30, None)
    with pytest.raises(CheckpointError, match="4096 wide with 32 layers, this one is .* with 4"):
        on_cpus(MINI / "backbone", real[1], 1, 1, 1 << 30, None)
    with pytest.raises(CheckpointError, match="this one is 4096 wide with 32"):
        on_gpus(real[0], MINI / "generator", gpus("4x80", 1), format="auto", size="1:1", dtype=None)


def test_each_part_holds_its_own_and_nothing_else():
    found = on_cpus(MINI / "backbone", MINI / "generator", 1, 2, 1 << 30, None)
    stage, tower, desk = found.of("stage")[1], found.of("tower")[0], found.of("desk")[0]
    assert [part.first for part in stage.plan.stages] == [2] and set(stage.plan.places.values()) == {ELSEWHERE}
    for part, held in ((tower, {"vision", "vae"}), (desk, {"wte", "lm_head", "small"})):
        assert part.plan.stages == ()
        assert {name for name, place in part.plan.places.items() if place != ELSEWHERE} == held


def test_a_rack_of_four_cards(real):
    backbone, generator = real
    found = on_gpus(backbone, generator, gpus("4x80", 2), format="auto", size="1:1", dtype=None)
    stages = found.of("stage")
    assert len(stages) == 4 and [part.layers.start for part in stages] == [0, 8, 16, 24] and found.gpu
    assert {part.bundle for part in stages} == {0, 1, 2, 3} and found.bundles == (None,) * 4  # alike: any card will do
    shares: dict[int, float] = {}
    for part in found.parts:
        shares[part.bundle] = shares.get(part.bundle, 0) + part.share
    assert max(shares.values()) <= 1.0 + 1e-9 and min(part.share for part in found.parts) == OTHER_SHARE
    assert {part.share for part in stages} == {STAGE_SHARE, 1.0}
    assert all(1e9 < room < 45e9 for room in found.capacity)
    assert all(part.plan.stages[0].device == "cuda:0" for part in stages)  # a process sees its own card only
    assert "stage 3 (layers 24 to 31)" in describe(found)


def test_unequal_cards_are_held_to_their_nodes(real):
    backbone, generator = real
    found = on_gpus(backbone, generator, gpus("141,80,80", 3), format="bf16", size="1:1", dtype=None)
    assert len(found.bundles) > 1 and None not in found.bundles and found.bundles[0] == "10.0.0.0"
    # Cards that the plan does not need are left to others.
    small = on_gpus(backbone, generator, gpus("141,80,80", 3), format="fp8", size="1:1", dtype=None)
    assert small.bundles == ("10.0.0.0",) and {part.bundle for part in small.parts} == {0}


def test_what_does_not_fit_says_what_would(real):
    backbone, generator = real
    with pytest.raises(PlacementError, match="does not fit.*What would fit|too little"):
        on_gpus(backbone, generator, gpus("2x24", 1), format="auto", size="1:1", dtype=None)
