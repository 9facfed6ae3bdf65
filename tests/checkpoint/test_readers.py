"""Readers at work at once: all their numbers come out, errors and closing stop them, and no thread is left."""

import threading
import time
from collections.abc import Generator

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import load as load_file
from comfyui_hywu.hywu_core.checkpoint.readers import at_once
from comfyui_hywu.hywu_core.checkpoint.shards import open_shards
from comfyui_hywu.hywu_core.errors import CheckpointError
from safetensors.torch import save_file


def reader(count: int, seen: list, fails_at: int | None = None) -> Generator[int, None, None]:
    try:
        for number in range(count):
            if number == fails_at:
                raise CheckpointError(f"damaged at {number}")
            seen.append(threading.current_thread().name)
            yield number
            time.sleep(0.001)
    finally:
        seen.append("closed")


def no_thread_is_left() -> bool:
    return not any(thread.name.startswith("hywu-read") for thread in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_all_numbers_come_out(threads):
    seen: list[str] = []
    assert sorted(at_once([reader(5, seen), reader(3, seen), reader(0, seen)], threads)) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert seen.count("closed") == 3 and no_thread_is_left()
    assert any(name.startswith("hywu-read") for name in seen) == (threads > 1)


def test_two_readers_are_at_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=20)

    def waits() -> Generator[int, None, None]:
        meeting.wait()  # only passes if the other one has been started, too
        yield 1

    assert sum(at_once([waits(), waits()], 2)) == 2


def test_an_error_comes_out_and_the_others_stop():
    seen: list[str] = []
    with pytest.raises(CheckpointError, match="damaged at 2"):
        list(at_once([reader(3, seen, fails_at=2), reader(100_000, seen)], 2))
    assert len(seen) < 50_000 and seen.count("closed") == 2 and no_thread_is_left()


def test_closing_stops_all_and_what_has_not_begun_does_not():
    seen: list[str] = []
    numbers = at_once([reader(100_000, seen) for _ in range(3)], 2)
    next(numbers)
    numbers.close()
    assert len(seen) < 50_000 and no_thread_is_left()


@pytest.fixture
def two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(load_file, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(load_file, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(load_file, "TICK_BYTES", 1 << 12)
    monkeypatch.setattr(load_file.os, "cpu_count", lambda: 2)
    random = torch.Generator().manual_seed(0)
    stored = {f"{side}.{number}": torch.randn(40, 50, generator=random) for side in "ab" for number in range(6)}
    for side in "ab":
        save_file({name: value for name, value in stored.items() if name[0] == side}, tmp_path / f"{side}.safetensors")
    return tmp_path, stored


@pytest.mark.parametrize("inference", [False, True])
def test_two_files_at_once_give_the_stored_values(two_files, inference):
    folder, stored = two_files
    ticks: list[tuple] = []
    names: set[str] = set()
    with torch.inference_mode(inference):
        places = {name: torch.empty(40, 50, dtype=torch.float64) for name in stored}
        load_file.read_tensors(places, open_shards(folder), lambda *tick: (ticks.append(tick), names.add(
            threading.current_thread().name)))
    assert all(torch.equal(places[name], value.double()) for name, value in stored.items())
    assert names == {threading.current_thread().name} and len(ticks) > 6


def test_a_damaged_file_is_named(two_files):
    folder, stored = two_files
    stored["b.3"][1, 1] = torch.nan
    save_file({name: value for name, value in stored.items() if name[0] == "b"}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: 'b\.3'"):
        load_file.read_tensors({name: torch.empty(40, 50) for name in stored}, open_shards(folder))
    assert no_thread_is_left()


def test_a_cancel_in_a_tick_stops_the_readers(two_files):
    folder, stored = two_files
    places = {name: torch.full((40, 50), 7.0) for name in stored}

    def cancel(done: int, total: int, latent: None) -> None:
        if calls.append(done) is None and len(calls) == 2:
            raise KeyboardInterrupt

    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        load_file.read_tensors(places, open_shards(folder), cancel)
    assert no_thread_is_left()
    before = {name: place.clone() for name, place in places.items()}
    time.sleep(0.05)
    assert all(torch.equal(places[name], value) for name, value in before.items())
