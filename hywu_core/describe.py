"""What lies in a checkpoint folder or a LoRA file, as text: ``hywu inspect``.

Reads headers and the small tensors of fingerprints only, so an 80 B checkpoint is described in seconds; of a LoRA file the
values only where its header has no digest.
"""

import re
from collections import Counter
from pathlib import Path

from .checkpoint import UNUSED_VISION_HEAD, Shards, backbone_fingerprint, generator_fingerprint, open_shards
from .checkpoint.packed import QUANT
from .config import BackboneConfig, GenerationConfig, GeneratorConfig
from .errors import CheckpointError
from .json_fields import read_json

GENERATOR_TYPE = "parameter_generator"
SHOWN = 4000  # characters of an instruction or a thinking text


def describe(path: Path) -> str:
    """A few lines on a backbone folder, a generator folder, or a LoRA file.

    Raises: CheckpointError, LoRAError.
    """
    path = Path(path)
    if path.is_file():
        return _describe_lora(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there: give a checkpoint folder or a LoRA file")
    raw = read_json(path / "config.json")
    shards = open_shards(path)
    return _describe_generator(path, shards) if raw.get("model_type") == GENERATOR_TYPE else _describe_backbone(path, shards)


def _describe_backbone(folder: Path, shards: Shards) -> str:
    config = BackboneConfig.from_folder(folder)
    generation = GenerationConfig.from_folder(folder, config)
    kind = "distilled" if config.cfg_distilled else "guided by two rows"
    lines = [
        f"{folder}: HunyuanImage-3 backbone, {kind}{', mean flow' if config.use_meanflow else ''}",
        f"  layers {config.num_hidden_layers}, width {config.hidden_size}, heads {config.num_attention_heads} "
        f"({config.num_key_value_heads} key/value) x {config.attention_head_dim}",
        f"  experts {config.num_experts}, {config.moe_topk[0]} a token, width {config.moe_intermediate_size[0]}; "
        f"shared width {config.moe_intermediate_size[0] * config.num_shared_expert[0]}",
        f"  pictures about {config.image_base_size} x {config.image_base_size}; vocabulary {config.vocab_size}",
        f"  default steps {generation.diff_infer_steps}, guidance {generation.diff_guidance_scale}, "
        f"shift {generation.flow_shift}; template {generation.sequence_template}",
        f"  fingerprint {backbone_fingerprint(shards)}",
    ]
    return "\n".join(lines + _weights(shards, UNUSED_VISION_HEAD))


def _describe_generator(folder: Path, shards: Shards) -> str:
    config = GeneratorConfig.from_folder(folder)
    values = sum(_numel(target.a_shape(config.rank)) + _numel(target.b_shape(config.rank)) for target in config.targets)
    lines = [
        f"{folder}: HY-WU weight generator",
        f"  blocks {config.num_pg_layers}, width {config.d_model}; reads conditions of width {config.input_dim}",
        f"  writes rank {config.rank}, alpha {config.alpha:g}, {values * config.num_base_model_layers} values "
        f"for {config.num_base_model_layers} layers",
        *(f"    {target.name}: {target.in_features} -> {target.out_features}"
          f"{f', {target.experts} experts' if target.experts else ''}" for target in config.targets),
        f"  fingerprint {generator_fingerprint(shards)}",
    ]
    return "\n".join(lines + _weights(shards))


def _describe_lora(path: Path) -> str:
    from .lora.files import load_lora, read_summary
    from .lora.header import shown

    found = read_summary(path)
    lora, origin = found.frame, found.provenance
    experts = lora.num_layers * max(target.experts for target in lora.targets)
    kept = "" if found.form.kept is None else f", {sum(map(len, found.form.kept))} of {experts} experts kept"
    error = "" if found.error is None else f", relative error of the update {found.error:.3%}"
    thumbnail = "none" if found.thumbnail is None else f"{len(found.thumbnail)} bytes"
    weighted = "" if set(lora.rank_weights) == {1.0} else f", weights of the ranks {shown(list(lora.rank_weights), 200)}"
    lines = [
        f"{path}: LoRA of HY-WU, {lora.num_values} values ({_size(lora.nbytes)}, {_dtype(lora.dtype)}), "
        f"{lora.num_layers} layers",
        f"  stored {found.form.stored}, {_size(found.nbytes)}{kept}{error}; thumbnail {thumbnail}",
        f"  rank {lora.rank}, alpha {lora.alpha:g}: scale {lora.scale:g} at strength 1{weighted}",
        *(f"    {target.name}: {target.in_features} -> {target.out_features}"
          f"{f', {target.experts} experts' if target.experts else ''}" for target in lora.targets),
        *([f"  made: {shown(origin.made, SHOWN)}"] if origin.made else []),
        f"  instruction {shown(origin.instruction, SHOWN)}, seed {origin.seed}, source pictures {len(origin.picture_digests)}",
        f"  thinking {shown(origin.thinking, SHOWN)}",
        f"  backbone {shown(origin.backbone_fingerprint, 80)[1:-1]}, "
        f"generator {shown(origin.generator_fingerprint, 80)[1:-1]}",
        # The only thing that needs the values, and only of files that were written without it.
        f"  digest {found.digest or load_lora(path).digest}",
    ]
    return "\n".join(lines)


def _weights(shards: Shards, unused: frozenset[str] = frozenset()) -> list[str]:
    """Parameters and bytes by part and dtype, the largest part first."""
    parts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    total = 0
    for name, entry in shards.entries.items():
        if name in unused:
            continue
        part = re.sub(r"\.\d+\..*", "", name).removesuffix(".weight").removesuffix(".bias")
        part = part if part.startswith("model.") else part.split(".")[0]
        parts[part] += _numel(entry.shape)
        dtypes[_dtype(entry.dtype)] += entry.nbytes
        total += _numel(entry.shape)
    skipped = sum(name in unused for name in shards.entries)
    stored = ", ".join(f"{dtype} {_size(nbytes)}" for dtype, nbytes in dtypes.most_common())
    # Of packed weights the values are bytes of codes and scales, not parameters.
    what = "stored values" if any(name.endswith(QUANT) for name in shards.entries) else "parameters"
    lines = [f"  {len(shards.entries) - skipped} tensors, {total} {what}: {stored}"]
    if skipped:
        lines.append(f"  {skipped} more tensors are never used (the vision tower's pooling head)")
    return lines + [f"    {part}: {count} {what}" for part, count in parts.most_common()]


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _dtype(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
