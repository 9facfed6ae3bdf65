"""The weight generator in a process of its own: a condition comes, a LoRA goes out in as many parts as there are stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from ..errors import RequestError
from ..generator.handle import load_generator, write_lora
from ..lora.value import LoRA
from .part import Part
from .wire import pack, unpack


def shards_of(lora: LoRA, layers: Sequence[range]) -> list[bytes]:
    """Each stage's part of a LoRA as a safetensors file; layers: of each stage."""
    parts = []
    for own in layers:
        starts = tuple(f"{lora.prefix}{layer}." for layer in own)
        parts.append(safetensors.torch.save(
            {key: lora.tensors[key].contiguous() for key in lora.tensors if key.startswith(starts)}))
    return parts


def header_of(lora: LoRA) -> dict[str, Any]:
    """All of a LoRA but its matrices, as plain data."""
    return {"alpha": lora.alpha, "rank": lora.rank, "rank_weights": list(lora.rank_weights), "prefix": lora.prefix,
            "num_layers": lora.num_layers, "dtype": str(lora.dtype).removeprefix("torch."), "provenance": lora.provenance,
            "targets": [[target.name, target.in_features, target.out_features, target.experts] for target in lora.targets]}


class WriterActor(Part):
    """A generator folder, loaded in ``mode`` (``generator/handle.py``) on ``device``."""

    def __init__(self, name: str, folder: str, device: str, mode: str, kept: str, dtype: Any, threads: int = 0):
        self._generator = load_generator(Path(folder), device=device, dtype=dtype, mode=mode, kept=kept)
        self._done: dict[str, tuple[int, int]] = {}
        self._stopped: set[str] = set()
        super().__init__(name, self._generator.fingerprint, threads)

    def write(self, request: str, condition: bytes, layers: list[tuple[int, int]]) -> list[bytes]:
        """The header (``wire.pack``) and a part for each of ``layers`` (first, count), of the LoRA for a packed condition.

        Raises: as ``write_lora``; RequestError once ``stop`` was called for the request.
        """
        return self.work(self._write, request, condition, layers)

    def _write(self, request: str, condition: bytes, layers: list[tuple[int, int]]) -> list[bytes]:
        def tick(done: int, total: int, latent: Any) -> None:
            self._done[request] = (done, total)
            if request in self._stopped:
                raise RequestError("the request was cancelled")

        try:
            lora = write_lora(self._generator, unpack(condition)["condition"], tick)
        finally:
            self._stopped.discard(request)
            self._done.pop(request, None)
        return [pack(header_of(lora)), *shards_of(lora, [range(first, first + count) for first, count in layers])]

    def progress(self, request: str) -> tuple[int, int]:
        """Blocks done and in all, of the LoRA that this request has written; (0, 0) while others are."""
        return self._done.get(request, (0, 0))

    def stop(self, request: str) -> None:
        """The LoRA of this request is not wanted any more."""
        self._stopped.add(request)
