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
    ticks, stop = SimpleQueue(), Event()

    def ticked(layer: int) -> None:
        if stop.is_set():
            raise _Stopped
        ticks.put(layer)

    def turn(stage: Stage, row: int, before: Future | None, cache: KVCache | None) -> torch.Tensor:
        with torch.no_grad():  # a setting of each thread
            row_BLD = hidden_BLD[row : row + 1] if before is None else before.result()
            return stage.run(row_BLD, rope, mask, cache, positions_L, ticked)

    with ExitStack() as threads:
        workers = [threads.enter_context(ThreadPoolExecutor(1, thread_name_prefix="hywu-stage")) for _ in stages]
        ends: list[Future] = []
        for row in range(len(hidden_BLD)):
            before = None
            for index, (stage, worker) in enumerate(zip(stages, workers, strict=True)):
                cache = None if caches is None else caches[index].row(row)
                before = worker.submit(turn, stage, row, before, cache)
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
        return torch.cat([end.result() for end in ends])
