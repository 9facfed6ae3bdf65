"""What to plan for, read from a checkpoint folder: sizes from its configuration, the request from its defaults.

Owns finding both out without any weights being there. A path may also be a configuration file alone.
"""

from collections import Counter
from pathlib import Path

import torch

from ..checkpoint.packed import find_packed
from ..checkpoint.shards import MANIFEST, open_shards
from ..config import BackboneConfig, GenerationConfig, torch_dtype
from ..json_fields import read_json, require
from .devices import Device
from .request import Request
from .sizes import PLAIN, ModelSizes, model_sizes


def sizes_for(path: Path, devices: tuple[Device, ...], dtype: torch.dtype | None = None) -> ModelSizes:
    """The sizes of the backbone at ``path`` in ``dtype``; None: the checkpoint's, or float32 for a CPU that has room for it.

    Raises: CheckpointError for a configuration that is none.
    """
    path = Path(path)
    config = BackboneConfig.from_folder(path) if path.is_dir() else BackboneConfig.from_dict(read_json(path))
    own_form = stored_form(path) if path.is_dir() else PLAIN
    if dtype is None and len(devices) == 1:
        # CPUs compute in float32 what they are given in bfloat16, most of them slowly.
        wide = model_sizes(config, torch.float32, own_form)
        if 2 * wide.total(own_form) < devices[0].free:
            return wide
    return model_sizes(config, dtype or torch_dtype(config.torch_dtype), own_form)


def stored_form(folder: Path) -> str:
    """The format of a folder's layers: what its manifest or its files' headers say; without any weights the published one."""
    if (folder / MANIFEST).is_file():
        return require(read_json(folder / MANIFEST), "format", MANIFEST)
    if not any(folder.glob("*.safetensors")):
        return PLAIN
    forms = Counter(weight.codec.format for weight in find_packed(open_shards(folder)).weights.values())
    return forms.most_common(1)[0][0] if forms else PLAIN


def request_for(
    path: Path, config: BackboneConfig, *, size: str, pictures: int, steps: int | None, guidance: float | None, thinking: int
) -> Request:
    """A request; None takes the checkpoint's own. Raises PlacementError for numbers out of range."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    has_defaults = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_folder(folder, config) if has_defaults else GenerationConfig()
    guidance = generation.diff_guidance_scale if guidance is None else guidance
    return Request(
        size=size, pictures=pictures, rows=1 if config.cfg_distilled or guidance == 1.0 else 2,
        steps=generation.diff_infer_steps if steps is None else steps, thinking=min(thinking, generation.max_new_tokens))
