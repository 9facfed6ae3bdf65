"""The model handle: everything of a loaded backbone folder, and the LoRAs that are injected into it, as one frozen value.

This is what the socket HYWU_MODEL carries. Injecting returns a new handle that shares all weights (``lora/attach.py``), so two
branches of a graph never see each other's LoRA.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .backbone.model import Backbone
from .checkpoint.fingerprint import backbone_fingerprint
from .checkpoint.load import UNUSED_VISION_HEAD, load_weights
from .checkpoint.shards import open_shards
from .config import BackboneConfig, GenerationConfig, torch_dtype
from .errors import RequestError
from .progress import Tick, silent
from .text.system_prompt import SystemPrompts, read_system_prompts
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from .lora.value import LoRA


@dataclass(frozen=True, eq=False)
class InjectedLoRA:
    """A LoRA and the strength at which it acts; alpha / rank is in the LoRA itself."""

    lora: "LoRA"
    strength: float


@dataclass(frozen=True, eq=False)
class ModelHandle:
    """A loaded backbone with its tokenizer and texts, and the LoRAs to attach while it denoises."""

    backbone: Backbone = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    config: BackboneConfig
    generation: GenerationConfig
    system_prompts: SystemPrompts = field(repr=False)
    fingerprint: str
    loras: tuple[InjectedLoRA, ...] = ()


def build_backbone(config: BackboneConfig, dtype: torch.dtype) -> Backbone:
    """The module tree on ``meta``: names, shapes and final dtypes, no memory."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Backbone(config).eval()
    finally:
        torch.set_default_dtype(default)


def load_model(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, on_tick: Tick = silent
) -> ModelHandle:
    """Load a published backbone folder.

    Args:
        folder: config.json, generation_config.json, tokenizer.json, system_prompt.py and the weights.
        dtype: what the weights are kept and computed in; None takes config.json's torch_dtype.
        on_tick: called while weights are read, in MB.

    Raises:
        CheckpointError: something is missing, damaged or contradicts config.json; the file is named.
        RequestError: a device that is not there, or float16 on the CPU.
    """
    folder = Path(folder)
    config = BackboneConfig.from_folder(folder)
    dtype = dtype or torch_dtype(config.torch_dtype)
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        # torch convolves fp16 on CPUs without a fast kernel: a decode of 256 x 256 takes minutes instead of seconds.
        raise RequestError("float16 is far too slow on the CPU: choose float32, or bfloat16 for half the memory")
    generation = GenerationConfig.from_folder(folder, config)
    system_prompts = read_system_prompts(folder)
    tokenizer = Tokenizer.from_folder(folder, config)
    shards = open_shards(folder)
    backbone = build_backbone(config, dtype)
    load_weights(backbone, shards, skip=UNUSED_VISION_HEAD, device=device, on_tick=on_tick)
    return ModelHandle(backbone, tokenizer, config, generation, system_prompts, backbone_fingerprint(shards))
