"""The model handle: everything of a loaded backbone folder, and the LoRAs that are injected into it, as one frozen value.

This is what the socket HYWU_MODEL carries. Injecting returns a new handle that shares all weights (``lora/attach.py``), so two
branches of a graph never see each other's LoRA.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .backbone.model import Backbone, build_backbone
from .checkpoint.fingerprint import backbone_fingerprint
from .checkpoint.load import usable_device
from .checkpoint.shards import open_shards
from .config import BackboneConfig, GenerationConfig, torch_dtype
from .elsewhere import Elsewhere
from .errors import RequestError
from .placement.build import Placed, whole
from .placement.plan import Plan
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
    """A loaded backbone with its tokenizer and texts, and the LoRAs to attach while it denoises.

    With ``elsewhere`` its weights are on meta, and whoever that is does the steps; it has no tokenizer and no texts then.
    """

    placed: Placed = field(repr=False)
    tokenizer: Tokenizer | None = field(repr=False)
    config: BackboneConfig
    generation: GenerationConfig
    system_prompts: SystemPrompts | None = field(repr=False)
    fingerprint: str
    loras: tuple[InjectedLoRA, ...] = ()
    elsewhere: Elsewhere | None = field(default=None, repr=False)

    @property
    def backbone(self) -> Backbone:
        return self.placed.backbone


def load_model(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, plan: Plan | None = None,
    on_tick: Tick = silent,
) -> ModelHandle:
    """``open_model``, and its weights; on_tick counts their MB while they are read. If it raises (a cancel) nothing is kept."""
    model = open_model(folder, device=device, dtype=dtype, plan=plan)
    try:
        model.placed.load(on_tick)
    except BaseException:
        model.placed.release()
        raise
    return model


def open_model(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, plan: Plan | None = None,
) -> ModelHandle:
    """A backbone folder that is ready to be loaded (``model.placed.load``): everything of it but the weights.

    Args:
        folder: config.json, generation_config.json, tokenizer.json, system_prompt.py and the weights: the published one, one
            that `hywu convert` made, or with the native pack's files.
        device: where everything goes that no plan puts elsewhere.
        dtype: what weights are computed in; None takes the plan's or config.json's torch_dtype.
        plan: where everything goes, of ``placement``; then ``device`` is not asked for.

    Raises:
        CheckpointError: something is missing, damaged or contradicts config.json; the file is named.
        RequestError: a device that is not there, or float16 on the CPU.
    """
    folder = Path(folder)
    config = BackboneConfig.from_folder(folder)
    dtype = dtype or (plan.dtype if plan else torch_dtype(config.torch_dtype))
    plan = plan or whole(config, dtype, usable_device(device))
    if dtype == torch.float16 and plan.home == "cpu":
        # torch convolves fp16 on CPUs without a fast kernel: a decode of 256 x 256 takes minutes instead of seconds.
        raise RequestError("float16 is far too slow on the CPU: choose float32, or bfloat16 for half the memory")
    generation = GenerationConfig.from_folder(folder, config)
    system_prompts = read_system_prompts(folder)
    tokenizer = Tokenizer.from_folder(folder, config)
    shards = open_shards(folder)
    placed = Placed(build_backbone(config, dtype), shards, plan)
    return ModelHandle(placed, tokenizer, config, generation, system_prompts, backbone_fingerprint(shards))
