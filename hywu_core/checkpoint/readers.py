"""Several readers at once, each a generator that yields how many bytes it has read, as one generator of these numbers.

Owns the threads: none is left when the generator ends, whether it was read to its end, an error came out, or it was closed.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import torch


def at_once(readers: Sequence[Generator[int, None, None]], threads: int) -> Iterator[int]:
    """All that ``readers`` yield, at most ``threads`` of them at work at a time, in their order; 1 uses no thread.

    The first error of a reader comes out here; the others then stop at their next number, as they do when this is closed.
    """
    if threads == 1:
        for reader in readers:
            yield from reader
        return
    numbers: queue.SimpleQueue[int | Future] = queue.SimpleQueue()
    stopped = threading.Event()
    inference = torch.is_inference_mode_enabled()  # a setting of a thread; memory made in this mode is written in it only

    def work(reader: Generator[int, None, None]) -> None:
        with closing(reader), torch.inference_mode(inference), torch.no_grad():
            for number in reader:
                if stopped.is_set():
                    return
                numbers.put(number)

    with ThreadPoolExecutor(threads, thread_name_prefix="hywu-read") as pool:
        try:
            for reader in readers:
                pool.submit(work, reader).add_done_callback(numbers.put)
            for _ in readers:
                while not isinstance(number := numbers.get(), Future):
                    yield number
                number.result()  # raises what the reader raised
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
