"""A ring of buffers on a device through which layers pass that do not fit there, fetched ahead of their turn.

Owns the buffers, the order and the waiting: a fetch begins when a buffer is free and never before the device is done with
what lay in it. What a fetch does (copy from pinned memory, read a file) is told by whoever makes the ring. One worker thread
fetches; on a GPU its copies go through a stream of their own and nobody but the streams waits for them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Fetch = Callable[[int, torch.Tensor], None]  # layer, buffer (uint8): fills as much of the layer's slab as the buffer holds
DENSE, WHOLE = 0, 1  # the part of a layer's slab that every token needs, and all of it


@dataclass
class _Slot:
    buffer: torch.Tensor
    layer: int = -1
    nbytes: int = 0
    arrival: Future | None = None  # of an event on the copy stream, or of None where there are no streams
    released: torch.cuda.Event | None = None  # the device is done with what lies here

    def holds(self, layer: int, nbytes: int) -> bool:
        return self.layer == layer and self.nbytes >= nbytes


class Ring:
    """``buffers`` buffers for the layers of ``sizes``, which come round in that order again and again.

    sizes: layer -> bytes of the parts of its slab, DENSE and WHOLE.
    Any layer may be asked for at any time: out of turn (after a cancel) it costs the time of a fetch. The thread and the
    buffers live until ``close``.
    """

    def __init__(self, device: torch.device, buffers: int, sizes: Mapping[int, tuple[int, int]], fetch: Fetch):
        if buffers < 1 or not sizes:
            raise ValueError(f"a ring needs a buffer and a layer, got {buffers} and {len(sizes)}")
        self._device, self._sizes, self._order, self._fetch = device, sizes, list(sizes), fetch
        most = max(size[WHOLE] for size in sizes.values())
        # ComfyUI runs nodes in inference mode, which is a setting of its thread: what is made in it the worker could not fill.
        with torch.inference_mode(False):
            self._slots = [_Slot(torch.empty(most, dtype=torch.uint8, device=device)) for _ in range(min(buffers, len(sizes)))]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hywu-ring")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            # The buffers' memory may have been somebody else's a moment ago, with work on it still queued.
            for slot in self._slots:
                slot.released = torch.cuda.current_stream(device).record_event()

    @contextmanager
    def arrived(self, layer: int, part: int = WHOLE) -> Iterator[torch.Tensor]:
        """The buffer with that part of ``layer``'s slab, for as long as the block runs; meanwhile those after it are fetched.

        What a fetch raises comes out here, and the next call tries again.
        """
        nbytes = self._sizes[layer][part]
        slot = next((slot for slot in self._slots if slot.holds(layer, nbytes)), None)
        if slot is None:
            slot = self._slot_for(layer, keep=())
            self._start(slot, layer, nbytes)
        ahead = [self._after(layer, step) for step in range(1, len(self._slots))]
        for following in ahead:
            wanted = self._sizes[following][part]
            if not any(other.holds(following, wanted) for other in self._slots):
                self._start(self._slot_for(following, keep=(layer, *ahead)), following, wanted)
        try:
            event = slot.arrival.result()
        except BaseException:
            slot.layer = -1
            raise
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        try:
            yield slot.buffer[:nbytes]
        finally:
            if self._stream is not None:
                slot.released = torch.cuda.current_stream(self._device).record_event()

    def close(self) -> None:
        """Let what is on its way arrive, then give the buffers back."""
        try:
            self._worker.shutdown(wait=True, cancel_futures=True)
            if self._stream is not None:
                self._stream.synchronize()  # a copy into memory that somebody else has got by now would be written over theirs
        finally:
            self._slots.clear()

    def _after(self, layer: int, step: int) -> int:
        return self._order[(self._order.index(layer) + step) % len(self._order)]

    def _slot_for(self, layer: int, keep: Sequence[int]) -> _Slot:
        """The slot with a shorter part of the layer, else one that holds none of ``keep``, best one that waits for nothing."""
        for slot in self._slots:
            if slot.layer == layer:
                return slot
        free = [slot for slot in self._slots if slot.layer not in keep]
        return min(free, key=lambda slot: slot.arrival is not None and not slot.arrival.done())

    def _start(self, slot: _Slot, layer: int, nbytes: int) -> None:
        slot.layer, slot.nbytes = layer, nbytes
        slot.arrival = self._worker.submit(self._bring, layer, slot.buffer[:nbytes], slot.released)
        slot.released = None

    def _bring(self, layer: int, buffer: torch.Tensor, released: torch.cuda.Event | None) -> torch.cuda.Event | None:
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                self._fetch(layer, buffer)
                return None
            with torch.cuda.stream(self._stream):
                if released is not None:
                    self._stream.wait_event(released)
                self._fetch(layer, buffer)
                return self._stream.record_event()
