"""The rows of a batch as waves through the stages: while one row is in the second stage, the next one is in the first.

Owns the order and the threads, one a stage; what a stage does is ``stage.py``'s. With two rows and as many devices the work of
two stages takes the time of three half stages instead of four. Guidance makes rows meet again after the last stage.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Event

import torch

from .cache import KVCache
from .mask import CanvasSight
from .stage import Rope, Stage


class _Stopped(Exception):
    """Ends a stage's thread after ``on_layer`` has raised; never seen outside."""


def run_in_waves(
    stages: Sequence[Stage],
    hidden_BLD: torch.Tensor,
    rope: Rope,
    mask: torch.Tensor | CanvasSight | None,
    caches: Sequence[KVCache] | None,
    positions_L: torch.Tensor | None,
    on_layer: Callable[[int], None],
) -> torch.Tensor:
    """What running the rows of ``hidden_BLD`` one by one through all stages gives, put together again on the last device.

    on_layer is called in the calling thread, once a layer and row, and may raise: the other threads then stop after the layer
    that they are in. The caches must have room already. Without gradients.
    """
    ticks, stop, inference = SimpleQueue(), Event(), torch.is_inference_mode_enabled()

    def ticked(layer: int) -> None:
        if stop.is_set():
            raise _Stopped
        ticks.put(layer)

    def turn(index: int, row: int, before: Future | None, cache: KVCache | None) -> torch.Tensor:
        with torch.inference_mode(inference), torch.no_grad():  # settings of each thread
            try:
                row_BLD = hidden_BLD[row : row + 1] if before is None else before.result()
                row_BLD = stages[index].run(row_BLD, rope, mask, cache, positions_L, ticked)
                # Sent on from here, or the way to the next device would queue behind this one's next row.
                return row_BLD if index + 1 == len(stages) else row_BLD.to(stages[index + 1].device)
            except BaseException:
                stop.set()  # what one row has met the others need not meet, too
                raise

    with ExitStack() as threads:
        workers = [threads.enter_context(ThreadPoolExecutor(1, thread_name_prefix="hywu-stage")) for _ in stages]
        ends: list[Future] = []
        for row in range(len(hidden_BLD)):
            before = None
            for index, worker in enumerate(workers):
                cache = None if caches is None else caches[index].row(row)
                before = worker.submit(turn, index, row, before, cache)
            # Comes after all ticks of its row, as the last stage's thread sends both.
            before.add_done_callback(lambda future: ticks.put(None))
            ends.append(before)
        try:
            open_rows = len(ends)
            while open_rows:
                layer = ticks.get()
                if layer is None:
                    open_rows -= 1
                else:
                    on_layer(layer)
        except BaseException:
            stop.set()
            raise
        failures = [error for end in ends if (error := end.exception()) is not None]
        if failures:
            raise next((error for error in failures if not isinstance(error, _Stopped)), failures[0])
        return torch.cat([end.result() for end in ends])
