"""A LoRA as a PEFT folder, for everything that reads PEFT adapters: ``adapter_config.json`` and ``adapter_model.safetensors``.

Owns the published module names and how our matrices become theirs. Reading such folders is ``peft_import.py``'s. The peft
library is not needed here; the tests load the folder with it.

The published experts are modules of their own with gate and up in one projection, ``{e}.gate_and_up_proj`` (2F, D), **up**
(w3) in its first half and **gate** (w1) in its second (spec section 2). Two LoRAs on the halves are one of rank 2R on both:

    A = [A_w3; A_w1]     B = [[B_w3, 0], [0, B_w1]]

with twice the alpha, so that alpha / rank stays. A quarter more values than the LoRA has are written.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checkpoint.shard_file import write_file
from ..errors import LoRAError, RequestError
from ..progress import Tick, silent
from . import header
from .aside import check_folder, written_whole
from .frame import offsets_for
from .peft_config import CONFIG, WEIGHTS
from .stored import AS_IT_IS, Field, Form
from .targets import GROUP, PREFIX
from .value import LoRA, raw_bytes

BASE_MODEL = "tencent/HunyuanImage-3.0-Instruct"
MODULE = "base_model.model."  # what PEFT puts before the name of a module
GATE_UP, DOWN = "gate_and_up_proj", "down_proj"
UP, GATE, LAST = f"{GROUP}.w3", f"{GROUP}.w1", f"{GROUP}.w2"
NOTE = "hywu."  # before our own keys in the metadata of the weights


def export_peft(lora: LoRA, folder: Path, on_tick: Tick = silent) -> Path:
    """Write ``lora`` as a new PEFT folder, whole or not at all; returns it. Ticks per module, a layer's target is in memory.

    A weight that all ranks share goes into lora_alpha; where ranks differ in theirs they are multiplied into B, in fp32.

    Raises:
        RequestError: there is something at ``folder`` already.
        LoRAError: the LoRA's names are not the published ones, the folder above is missing, or the disk is too full.
    """
    folder = Path(folder)
    check_folder(folder)
    if folder.exists():
        raise RequestError(f"{folder} is there already, expected a new folder: choose another name, or remove it")
    _check_names(lora)
    uniform = len(set(lora.rank_weights)) == 1
    dtype = lora.dtype if uniform else torch.promote_types(lora.dtype, torch.float32)
    alpha = lora.alpha * (lora.rank_weights[0] if uniform else 1.0)
    weights = None if uniform else torch.tensor(lora.rank_weights, dtype=torch.float64)
    metadata = {"format": "pt"} | {
        NOTE + key: value for key, value in header.metadata_for(lora, Form(AS_IT_IS, lora.dtype)).items()
        if key in header.ORIGIN}
    fields = dict(_fields(lora, dtype))
    offsets = offsets_for(fields)
    start = header.header_bytes(metadata, fields, offsets)
    aside = folder.parent / f".hywu-{secrets.token_hex(8)}.part"
    try:
        aside.mkdir()
        with written_whole(aside / WEIGHTS, len(start) + max(end for _, end in offsets.values())) as file:
            file.write(start)
            for done, (name, matrix) in enumerate(_tensors(lora, dtype, weights), start=1):
                file.seek(len(start) + offsets[name][0])
                file.write(raw_bytes(matrix))
                if done % 2 == 0:
                    on_tick(done // 2, len(fields) // 2, None)
        write_file(aside / CONFIG, json.dumps(_config(lora, alpha), indent=2).encode())
        aside.rename(folder)
    except OSError as error:
        raise LoRAError(f"cannot save {folder}: {error.strerror or error}; save to another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _check_names(lora: LoRA) -> None:
    names = {target.name: target.experts for target in lora.targets}
    grouped = {name for name, experts in names.items() if experts}
    if lora.prefix != PREFIX or grouped - {UP, GATE, LAST} or (UP in grouped) != (GATE in grouped):
        raise LoRAError(f"the LoRA adapts {lora.prefix}*.{{{', '.join(sorted(names))}}}, expected {PREFIX}* with all or none "
                        f"of {GATE} and {UP}, and {LAST}: only a LoRA of the published module tree can become a PEFT folder")


def _modules(lora: LoRA) -> Iterator[tuple[int, str, int, int, int]]:
    """(layer, module, its inputs, outputs and rank), experts one by one, in the order of writing."""
    targets = {target.name: target for target in lora.targets}
    for layer in range(lora.num_layers):
        for target in lora.targets:
            if not target.experts:
                yield layer, target.name, target.in_features, target.out_features, lora.rank
        for first, module, both in ((UP, GATE_UP, 2), (LAST, DOWN, 1)):
            if first in targets:
                target = targets[first]
                for expert in range(target.experts):
                    yield (layer, f"{GROUP}.{expert}.{module}", target.in_features, both * target.out_features,
                           both * lora.rank)


def _fields(lora: LoRA, dtype: torch.dtype) -> Iterator[tuple[str, Field]]:
    for layer, module, inputs, outputs, rank in _modules(lora):
        path = f"{MODULE}{PREFIX}{layer}.{module}"
        yield f"{path}.lora_A.weight", (dtype, (rank, inputs))
        yield f"{path}.lora_B.weight", (dtype, (outputs, rank))


def _tensors(lora: LoRA, dtype: torch.dtype, weights: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of ``_fields`` in their order."""
    def sides(layer: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (lora.tensors[f"{PREFIX}{layer}.{name}.lora_{side}"].detach().cpu() for side in "AB")
        return a.to(dtype), (b if weights is None else b.double() * weights).to(dtype)

    kept: tuple[int, str, list[tuple[torch.Tensor, torch.Tensor]]] = (-1, "", [])
    for layer, module, *_ in _modules(lora):
        path = f"{MODULE}{PREFIX}{layer}.{module}"
        if not module.startswith(f"{GROUP}."):
            a, b = sides(layer, module)
        else:
            expert, kind = module.removeprefix(f"{GROUP}.").split(".")
            if kept[:2] != (layer, kind):  # a stack is asked for once, not for each expert
                kept = layer, kind, [sides(layer, name) for name in ((UP, GATE) if kind == GATE_UP else (LAST,))]
            stacks = [(a[int(expert)], b[int(expert)]) for a, b in kept[2]]
            a = torch.cat([a for a, _ in stacks])
            b = torch.block_diag(*(b for _, b in stacks))
        yield f"{path}.lora_A.weight", a
        yield f"{path}.lora_B.weight", b


def _config(lora: LoRA, alpha: float) -> dict[str, object]:
    linears = [target.name for target in lora.targets if not target.experts]
    grouped = {target.name for target in lora.targets if target.experts}
    kinds = [kind for kind, name in ((GATE_UP, UP), (DOWN, LAST)) if name in grouped]
    choices = [name.replace(".", r"\.") for name in linears]
    choices += [rf"mlp\.experts\.\d+\.{kind}" for kind in kinds]
    both = rf"mlp\.experts\.\d+\.{GATE_UP}"
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": BASE_MODEL, "inference_mode": True,
        "r": lora.rank, "lora_alpha": alpha, "target_modules": rf"model\.layers\.\d+\.({'|'.join(choices)})",
        "rank_pattern": {both: 2 * lora.rank} if UP in grouped else {},
        "alpha_pattern": {both: 2 * alpha} if UP in grouped else {},
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "modules_to_save": None}
