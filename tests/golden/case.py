"""One golden case folder: checkpoints, pictures, and the inputs and outputs of every stage (spec/golden-format.md).

Owns reading the folder; compares nothing. Works for any sizes and seed: everything is taken from the case's own files.
"""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file


class Case:
    """A case folder with ``base/ pg/ images/ golden/``.

    arrange: makes the plan by which the backbone is loaded from its configuration, None = whole; generator: how the generator
    is, as keywords of ``load_generator``.
    """

    def __init__(self, folder: Path, arrange: Callable | None = None, generator: dict[str, str] | None = None):
        self.folder, self._arrange, self._generator = Path(folder), arrange, generator or {}
        self.base = self.folder / "base"
        self.pg = self.folder / "pg"
        self.manifest: dict[str, Any] = json.loads((self.folder / "golden" / "manifest.json").read_text())

    @property
    def stages(self) -> list[str]:
        """Names of the stages that the manifest lists, sorted."""
        return sorted(self.manifest["stages"])

    def tensors(self, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "golden" / f"{stage}.safetensors")

    def meta(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / "golden" / f"{stage}.json").read_text())

    def image(self, name: str) -> Image.Image:
        return Image.open(self.folder / "images" / f"{name}.png")

    @cached_property
    def model(self):
        """The backbone folder loaded in fp32 on the CPU through the product's own loader."""
        from comfyui_hywu.hywu_core.config import BackboneConfig
        from comfyui_hywu.hywu_core.handle import load_model

        plan = self._arrange(BackboneConfig.from_folder(self.base)) if self._arrange else None
        return load_model(self.base, dtype=torch.float32, plan=plan)

    @cached_property
    def generator(self):
        from comfyui_hywu.hywu_core.generator.handle import load_generator

        return load_generator(self.pg, dtype=torch.float32, **self._generator)


def unpack_mask(packed: torch.Tensor, length: int) -> torch.Tensor:
    """Undo ``numpy.packbits`` along the last axis: (…, ceil(length/8)) uint8 -> (…, length) bool."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=length).astype(bool))
