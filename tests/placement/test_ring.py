"""The ring: layers arrive whole and in time, ahead of their turn, out of turn too, and a failed fetch is tried again."""

import threading
import time

import pytest
import torch
from comfyui_hywu.hywu_core.placement.ring import DENSE, Ring

CPU, NBYTES = torch.device("cpu"), 64


class Link:
    """A fake link: fills a buffer with the layer's number after ``seconds``, and writes down when."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.fetched, self.times = seconds, [], []
        self.broken: set[int] = set()

    def __call__(self, layer: int, buffer: torch.Tensor) -> None:
        begun = time.monotonic()
        time.sleep(self.seconds)
        self.fetched.append(layer)
        if layer in self.broken:
            raise OSError(f"layer {layer} cannot be read")
        buffer.fill_(layer)
        self.times.append((layer, begun, time.monotonic()))


@pytest.fixture
def ring_of():
    made = []

    def make(buffers, order, link):
        made.append(Ring(CPU, buffers, {layer: (16, NBYTES) for layer in order}, link))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@pytest.mark.parametrize("buffers", [1, 2, 3, 9])
def test_every_layer_arrives_whole_round_after_round(ring_of, buffers):
    link, order = Link(), [0, 3, 4, 7]
    ring = ring_of(buffers, order, link)
    for _ in range(3):
        for layer in order:
            with ring.arrived(layer) as slab:
                assert slab.tolist() == [layer] * NBYTES
    expected = 4 if buffers >= 4 else 3 * 4  # what fits stays
    assert expected <= len(link.fetched) <= expected + buffers


def test_a_buffer_in_use_is_never_written_to(ring_of):
    """While a layer computes, those ahead are fetched into the other buffers only."""
    link, order = Link(), list(range(6))
    ring = ring_of(2, order, link)
    for layer in order * 2:
        with ring.arrived(layer) as slab:
            for _ in range(5):
                time.sleep(0.001)
                assert slab.tolist() == [layer] * NBYTES


def test_fetching_hides_behind_computing(ring_of):
    """With as long a way as a layer's work, a pass takes the time of one of them and not of both."""
    link, order = Link(0.05), list(range(6))
    ring = ring_of(2, order, link)
    begun = time.monotonic()
    for layer in order:
        with ring.arrived(layer):
            time.sleep(0.05)
    assert time.monotonic() - begun < 6 * 0.1 - 0.05  # one after the other would be 0.6
    fetched = {layer: (start, stop) for layer, start, stop in link.times[:6]}
    assert all(fetched[layer + 1][0] <= fetched[layer][1] + 0.05 for layer in range(5))


def test_a_layer_out_of_turn_costs_a_fetch_and_nothing_else(ring_of):
    """A pass that was cancelled leaves the ring somewhere; the next one begins with the first layer."""
    link, order = Link(), list(range(5))
    ring = ring_of(3, order, link)
    for layer in (0, 1, 2, 0, 1, 4, 2, 2, 3):
        with ring.arrived(layer) as slab:
            assert slab.tolist() == [layer] * NBYTES


def test_the_begin_of_a_slab_is_enough_until_all_of_it_is_wanted(ring_of):
    link = Link()
    ring = ring_of(2, [0, 1], link)
    with ring.arrived(0, DENSE) as slab:
        assert slab.tolist() == [0] * 16
    with ring.arrived(1, DENSE):
        pass
    with ring.arrived(0) as slab:
        assert slab.tolist() == [0] * NBYTES
    with ring.arrived(0, DENSE) as slab:  # a whole one serves for a part
        assert len(slab) == 16
    assert link.fetched.count(0) == 2


def test_a_failed_fetch_is_raised_and_tried_again(ring_of):
    link = Link()
    link.broken = {1}
    ring = ring_of(2, [0, 1, 2], link)
    with ring.arrived(0):
        pass
    with pytest.raises(OSError, match="layer 1 cannot be read"), ring.arrived(1):
        pass
    link.broken = set()
    with ring.arrived(1) as slab:
        assert slab.tolist() == [1] * NBYTES


def test_an_error_in_the_block_leaves_the_ring_usable(ring_of):
    ring = ring_of(2, [0, 1, 2], Link())
    with pytest.raises(KeyError), ring.arrived(0):
        raise KeyError
    with ring.arrived(1) as slab:
        assert slab.tolist() == [1] * NBYTES


def test_closing_ends_the_thread():
    before = threading.active_count()
    ring = Ring(CPU, 2, {0: (16, NBYTES), 1: (16, NBYTES)}, Link())
    with ring.arrived(0):
        pass
    ring.close()
    assert threading.active_count() == before


def test_layers_of_different_sizes_share_the_buffers(ring_of):
    ring = Ring(CPU, 2, {0: (4, 64), 1: (2, 8), 2: (4, 32)}, Link())
    for layer, size in ((0, 64), (1, 8), (2, 32), (0, 64)):
        with ring.arrived(layer) as slab:
            assert slab.tolist() == [layer] * size
    ring.close()


def test_a_ring_without_buffers_is_refused():
    with pytest.raises(ValueError, match="0"):
        Ring(CPU, 0, {0: (16, NBYTES)}, Link())
