"""Machines from a line and from this machine: sizes, order, what is free, and lines that are none."""

import pytest
import torch
from comfyui_hywu.hywu_core.errors import PlacementError
from comfyui_hywu.hywu_core.placement.devices import CARDS, GIB, available_memory, find_devices, parse_devices


def test_cards_come_first_and_the_memory_last():
    *cards, ram = parse_devices("2x24+192ram")
    assert [card.name for card in cards] == ["cuda:0", "cuda:1"] and ram.name == ram.kind == "cpu"
    assert all(card.kind == "cuda" and card.card == "4090" for card in cards)
    assert ram.total == 192 * GIB and ram.free == 188 * GIB


def test_a_card_has_what_torch_sees_of_it_less_the_context():
    for line, seen in (("4090", 23.64), ("h100", 78.8), ("h200", 138.9)):  # GiB, as torch reports them
        card, _ = parse_devices(line)
        assert card.total / GIB == pytest.approx(seen, abs=0.1)
        assert card.total - card.free == GIB // 2


def test_names_sizes_and_unequal_cards():
    assert [card.card for card in parse_devices("24,48+96ram")[:-1]] == ["4090", "a6000"]
    assert [card.card for card in parse_devices("1x3090+RTX4080+64ram")[:-1]] == ["3090", "rtx4080"]
    assert parse_devices("cpu+24ram")[0].kind == "cpu" and len(parse_devices("cpu+24ram")) == 1
    assert len({(card.name) for card in CARDS}) == len(CARDS)


def test_a_number_behind_a_colon_is_what_is_free():
    card, ram = parse_devices("24:12+64ram:40")
    assert card.free == 12 * GIB and ram.free == 40 * GIB and card.total > 23 * GIB


def test_without_a_size_the_memory_is_as_large_as_the_cards():
    assert parse_devices("4x80")[-1].total == pytest.approx(320 * GIB, rel=1e-6)
    assert parse_devices("12")[-1].total == 32 * GIB


@pytest.mark.parametrize(("line", "says"), (
    ("", "not understood"), ("3y", "'3y' is no size"), ("64ram", "names no card"), ("24:30", "30 GiB free of 24"),
    ("24+64ram+32ram", "one 'ram'"), ("2000", "4 to 1024"), ("2x64ram", "one 'ram'"), ("24+8ram:9", "9 GiB of memory"),
    ("2x", "no size"), ("24;48", "not understood")))
def test_a_line_that_is_none_is_refused_with_the_remedy(line, says):
    with pytest.raises(PlacementError, match=says.replace("(", r"\(")):
        parse_devices(line)


def test_this_machine():
    *cards, ram = find_devices()
    assert len(cards) == torch.cuda.device_count() or cards[0].kind == "mps"
    assert 0 < ram.free <= ram.total


def test_a_control_group_counts_where_it_allows_less(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000000 kB\nMemFree:  5 kB\nMemAvailable:    600000 kB\n")
    assert available_memory(tmp_path) == (1000000 * 1024, 600000 * 1024)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text(f"{100 << 20}\n")
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path)[1] == 600000 * 1024
    (group / "memory.max").write_text(f"{400 << 20}\n")
    assert available_memory(tmp_path) == (400 << 20, 300 << 20)
