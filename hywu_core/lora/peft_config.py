"""``adapter_config.json`` of a PEFT LoRA: what it asks for, and whether a LoRA of HY-WU can be that.

Everything in it is untrusted. Rank and alpha of a module are found as PEFT does (``get_pattern_key``): by patterns that are
regular expressions, of which only those are taken that cannot take for ever.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LoRAError
from ..json_fields import read_json
from .header import shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 8 << 20
MAX_PATTERNS = 20_000
MAX_RANK = 1 << 16
# Keys that change nothing about what the matrices do, or are read below. Any other one must be empty.
_HARMLESS = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config",
    "eva_config", "ensure_weight_tying"))
# Ways to begin that leave the base weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ) belong to changed ones.
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
# Names, dots, escaped dots, digits, choices, and repetition of these.
_SAFE = re.compile(r"(?:[\w-]|\\?\.|\[0-9\]|\\d|[()|^$*+?])+", re.ASCII)


@dataclass(frozen=True)
class PeftConfig:
    """Of a LoRA that is nothing but matrices A and B on linears."""

    rank: int
    alpha: float
    ranks: tuple[tuple[re.Pattern[str], float], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    rslora: bool

    def rank_of(self, module: str) -> int:
        return int(_found(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What multiplies B·A of the module ("model.layers.0.self_attn.o_proj")."""
        rank = self.rank_of(module)
        return _found(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_peft_config(folder: Path) -> PeftConfig:
    """Read and check the configuration of a PEFT folder.

    Raises:
        LoRAError: it is missing, damaged, no LoRA, or a LoRA with more to it than A and B (DoRA, biases, whole modules, an
            initialisation that changes the base weights).
    """
    path = folder / CONFIG
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise LoRAError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}: it is no adapter's "
                            "configuration")
        raw = read_json(path)
    except CheckpointError as error:
        raise LoRAError(f"{folder} is no PEFT folder: {str(error)[:300]}") from None
    _check_plain(raw, path)
    rank = raw.get("r")
    if type(rank) is not int or not 0 < rank <= MAX_RANK:
        raise LoRAError(f"{path}: r is {shown(rank, 40)}, expected a whole number of 1 to {MAX_RANK}: export it again")
    rslora = raw.get("use_rslora", False)
    if type(rslora) is not bool:
        raise LoRAError(f"{path}: use_rslora is {shown(rslora, 40)}, expected true or false: export it again")
    alphas = _patterns(raw, "alpha_pattern", path)
    ranks = _patterns(raw, "rank_pattern", path)
    for pattern, value in ranks:
        if not 0 < value <= MAX_RANK or value != int(value):
            raise LoRAError(f"{path}: rank_pattern {shown(pattern.pattern, 80)} says {value:g}, expected a whole number of "
                            f"1 to {MAX_RANK}: export it again")
    return PeftConfig(rank, _number(raw.get("lora_alpha"), "lora_alpha", path), ranks, alphas, rslora)


def _check_plain(raw: dict[str, Any], path: Path) -> None:
    if raw.get("peft_type") != "LORA":
        raise LoRAError(f"{path}: peft_type is {shown(raw.get('peft_type'), 40)}, expected 'LORA': other kinds of adapters "
                        "cannot be imported")
    if raw.get("bias", "none") != "none":
        raise LoRAError(f"{path}: bias is {shown(raw['bias'], 40)}, expected 'none': a LoRA of HY-WU has no biases; train it "
                        "without")
    if not any(raw.get("init_lora_weights") is known or raw.get("init_lora_weights") == known for known in _INITIAL):
        raise LoRAError(f"{path}: init_lora_weights is {shown(raw['init_lora_weights'], 40)}, expected True: it changes the "
                        "base weights, too; make an ordinary LoRA of it with PEFT's path_initial_model_for_weight_conversion")
    for key, value in raw.items():
        if key not in _HARMLESS and value not in (None, False, 0, "", [], {}):
            raise LoRAError(f"{path}: {shown(key, 60)} is {shown(value, 60)}, expected nothing there: a LoRA of HY-WU holds "
                            "A and B of the adapted projections only; train it without that")


def _patterns(raw: dict[str, Any], key: str, path: Path) -> tuple[tuple[re.Pattern[str], float], ...]:
    found = raw.get(key) or {}
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
        raise LoRAError(f"{path}: {key} is {shown(found, 80)}, expected an object of at most {MAX_PATTERNS} entries")
    patterns = []
    for pattern, value in found.items():
        if len(pattern) > 256 or not _SAFE.fullmatch(pattern) or _greedy(pattern):
            raise LoRAError(f"{path}: {key} has the pattern {shown(pattern, 80)}, expected module names, or names with \\d+ "
                            "and at most one .*: write it simpler")
        try:
            compiled = re.compile(rf"(?:.*\.)?(?:{pattern})$")
        except re.error as error:
            raise LoRAError(f"{path}: {key} has the pattern {shown(pattern, 80)}, which is no regular expression ({error}): "
                            "export it again") from None
        patterns.append((compiled, _number(value, f"{key} {shown(pattern, 80)}", path)))
    return tuple(patterns)


def _greedy(pattern: str) -> bool:
    """Whether more is repeated than runs of digits, single characters and one dot."""
    return re.search(r"[)*+?|(^$][*+?]", pattern) is not None or len(re.findall(r"(?<!\\)\.[*+?]", pattern)) > 1


def _number(value: Any, what: str, path: Path) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise LoRAError(f"{path}: {what} is {shown(value, 40)}, expected a finite number: export it again")
    return float(value)


def _found(patterns: tuple[tuple[re.Pattern[str], float], ...], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
