"""The configurations of a published backbone folder and generator folder as frozen values.

Owns reading and checking ``config.json`` and ``generation_config.json``; knows no tensors. Key names and defaults follow the
published files (spec section 1).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError

ATTENTION_TYPES = ("joint_full", "full", "full_causal", "causal")
# Keys of config.json that name the id of a special token: what a tokenizer is checked against.
SPECIAL_ID_KEYS = {
    "bos_token_id": "<|startoftext|>",
    "eos_token_id": "<|endoftext|>",
    "im_start_id": "<boi>",
    "im_end_id": "<eoi>",
    "image_token_id": "<img>",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object from ``path``.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is no complete checkpoint; download it again") from None
    except OSError as error:  # the folder is a file, the file is a folder, or it may not be read
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): give the folder that holds it") from None
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, numbers of thousands of digits
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object: download it again")
    return value


def torch_dtype(name: str) -> torch.dtype:
    """"bfloat16" -> torch.bfloat16. Raises CheckpointError for a name that is no floating dtype to compute in."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise CheckpointError(f"config.json: torch_dtype {name!r} is none of {sorted(dtypes)}")
    return dtypes[name]


def _require(raw: dict[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise CheckpointError(f"{where} has no value for '{key}': it is not a HunyuanImage-3 / HY-WU configuration")
    return raw[key]


def _check_counts(raw: dict[str, Any], keys: tuple[str, ...], where: str, least: int = 1) -> None:
    """Whole numbers of at least ``least``, or lists of them, wherever a key has a value: sizes come from an untrusted file."""
    for key in keys:
        value = raw.get(key)
        for entry in value if isinstance(value, list) else [value]:
            if entry is not None and (type(entry) is not int or entry < least):
                raise CheckpointError(f"{where}: '{key}' is {str(value)[:60]!r}, expected whole numbers of at least {least}: "
                                      "download the file again")


def _check_single(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """One number, not a list, wherever a key has a value."""
    for key in keys:
        if isinstance(raw.get(key), list):
            raise CheckpointError(f"{where}: '{key}' is a list of {len(raw[key])}, expected 1 number: download the file again")


def _check_objects(raw: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """JSON objects that hold something, wherever a key has a value."""
    for key in keys:
        if raw.get(key) is not None and (not isinstance(raw[key], dict) or not raw[key]):
            raise CheckpointError(f"{where}: '{key}' is {str(raw[key])[:60]!r}, expected an object with entries: download the "
                                  "file again")


def _per_layer(value: int | list[int], layers: int, key: str) -> tuple[int, ...]:
    """Published configs give either one number for all layers or a list with one per layer."""
    values = tuple(value) if isinstance(value, list) else (value,) * layers
    if len(values) != layers:
        raise CheckpointError(f"config.json: '{key}' has {len(values)} entries for {layers} layers")
    return values


@dataclass(frozen=True)
class VAEConfig:
    """The 3-D VAE (spec section 9)."""

    block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    ffactor_spatial: int  # pixels per latent cell along height and width
    ffactor_temporal: int  # frames per latent frame
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 1.0
    shift_factor: float | None = None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "VAEConfig":
        where = "config.json: 'vae'"
        return cls(
            block_out_channels=tuple(_require(raw, "block_out_channels", where)),
            latent_channels=_require(raw, "latent_channels", where),
            layers_per_block=_require(raw, "layers_per_block", where),
            ffactor_spatial=_require(raw, "ffactor_spatial", where),
            ffactor_temporal=_require(raw, "ffactor_temporal", where),
            in_channels=raw.get("in_channels", 3),
            out_channels=raw.get("out_channels", 3),
            scaling_factor=raw.get("scaling_factor") or 1.0,
            shift_factor=raw.get("shift_factor"),
        )


@dataclass(frozen=True)
class BackboneConfig:
    """HunyuanImage-3.0 as far as it is used (spec sections 1, 2, 7)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    attention_head_dim: int
    num_experts: int
    moe_topk: tuple[int, ...]  # per layer
    moe_intermediate_size: tuple[int, ...]  # per layer
    num_shared_expert: tuple[int, ...]  # per layer; the shared MLP is this many expert widths of `intermediate_size` wide
    intermediate_size: int
    moe_layer_num_skipped: int  # the first layers that have a dense MLP
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    patch_embed_hidden_dim: int
    image_base_size: int
    cond_token_attn_type: str
    cfg_distilled: bool
    use_meanflow: bool
    vae: VAEConfig
    vit: dict[str, Any] = field(hash=False)  # keyword arguments of transformers' Siglip2VisionConfig
    vit_max_num_patches: int = 1024
    vit_aligner_depth: int = 2
    torch_dtype: str = "bfloat16"
    special_ids: dict[str, int] = field(default_factory=dict, hash=False)  # special token -> the id that config.json says

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "BackboneConfig":
        """Raises CheckpointError for a missing key or a value that this implementation does not know."""
        single = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "attention_head_dim", "num_experts", "intermediate_size", "max_position_embeddings",
                  "patch_embed_hidden_dim", "image_base_size")
        _check_counts(raw, (*single, "moe_topk", "moe_intermediate_size"), "config.json")
        _check_counts(raw, ("num_shared_expert", "moe_layer_num_skipped"), "config.json", least=0)
        _check_single(raw, (*single, "moe_layer_num_skipped"), "config.json")
        _check_objects(raw, ("vae", "vit", "vit_processor", "vit_aligner"), "config.json")
        layers = _require(raw, "num_hidden_layers", "config.json")
        heads = _require(raw, "num_attention_heads", "config.json")
        kv_heads = raw.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise CheckpointError(f"config.json: {heads} attention heads cannot be shared by {kv_heads} key/value heads")
        for key, only in (("patch_size", 1), ("img_proj_type", "unet"), ("cond_image_type", "vae_vit"), ("rope_type", "2d")):
            if raw.get(key, only) != only:
                raise CheckpointError(f"config.json: '{key}' is {raw[key]!r}, only {only!r} is supported")
        attention_type = raw.get("cond_token_attn_type", "joint_full")
        if attention_type not in ATTENTION_TYPES:
            raise CheckpointError(f"config.json: cond_token_attn_type {attention_type!r} is none of {ATTENTION_TYPES}")
        intermediate = _require(raw, "intermediate_size", "config.json")
        vit = dict(_require(raw, "vit", "config.json"))
        return cls(
            vocab_size=_require(raw, "vocab_size", "config.json"),
            hidden_size=_require(raw, "hidden_size", "config.json"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            attention_head_dim=raw.get("attention_head_dim") or raw["hidden_size"] // heads,
            num_experts=_require(raw, "num_experts", "config.json"),
            moe_topk=_per_layer(_require(raw, "moe_topk", "config.json"), layers, "moe_topk"),
            moe_intermediate_size=_per_layer(raw.get("moe_intermediate_size") or intermediate, layers, "moe_intermediate_size"),
            num_shared_expert=_per_layer(raw.get("num_shared_expert") or 1, layers, "num_shared_expert"),
            intermediate_size=intermediate,
            moe_layer_num_skipped=raw.get("moe_layer_num_skipped") or 0,
            max_position_embeddings=_require(raw, "max_position_embeddings", "config.json"),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
            rope_theta=raw.get("rope_theta", 10000.0),
            patch_embed_hidden_dim=raw.get("patch_embed_hidden_dim") or 1024,
            image_base_size=raw.get("image_base_size") or 1024,
            cond_token_attn_type=attention_type,
            cfg_distilled=bool(raw.get("cfg_distilled", False)),
            use_meanflow=bool(raw.get("use_meanflow", False)),
            vae=VAEConfig.from_dict(_require(raw, "vae", "config.json")),
            vit=vit,
            vit_max_num_patches=(raw.get("vit_processor") or {}).get("max_num_patches", 1024),
            vit_aligner_depth=(raw.get("vit_aligner") or {}).get("depth", 2),
            torch_dtype=raw.get("torch_dtype") or raw.get("dtype") or "bfloat16",
            special_ids={token: raw[key] for key, token in SPECIAL_ID_KEYS.items() if isinstance(raw.get(key), int)},
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "BackboneConfig":
        return cls.from_dict(read_json(Path(folder) / "config.json"))


@dataclass(frozen=True)
class GenerationConfig:
    """``generation_config.json`` of the backbone: defaults for thinking and sampling, all of which a request may override."""

    sequence_template: str = "instruct"  # "instruct" | "pretrain"
    drop_think: bool = False
    max_length: int = 22800
    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_k: int = 1024
    top_p: float = 0.95
    do_sample: bool = True
    use_system_prompt: str = "en_unified"
    bot_task: str = "think_recaption"
    diff_infer_steps: int = 50
    diff_guidance_scale: float = 2.5
    flow_shift: float = 3.0

    @classmethod
    def from_folder(cls, folder: Path, config: BackboneConfig) -> "GenerationConfig":
        raw = read_json(Path(folder) / "generation_config.json")
        known = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
        # The published base model says nothing about its template, and then the plain one applies (spec section 5).
        known.setdefault("sequence_template", "pretrain")
        known.setdefault("max_length", config.max_position_embeddings)
        if known["sequence_template"] not in ("instruct", "pretrain"):
            raise CheckpointError(f"generation_config.json: sequence_template {known['sequence_template']!r} is unknown")
        return cls(**known)


@dataclass(frozen=True)
class LoRATarget:
    """One projection of every backbone layer that the generator writes a LoRA for.

    ``name`` is relative to the layer ("self_attn.qkv_proj", "mlp.experts.w1"); ``experts`` is 0 for a plain linear.
    """

    name: str
    in_features: int
    out_features: int
    experts: int = 0

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """(R, I), or (E, R, I) for experts."""
        return (self.experts, rank, self.in_features) if self.experts else (rank, self.in_features)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """(O, R), or (E, O, R) for experts."""
        return (self.experts, self.out_features, rank) if self.experts else (self.out_features, rank)


@dataclass(frozen=True)
class GeneratorConfig:
    """The HY-WU parameter generator (spec section 4)."""

    input_dim: int
    d_model: int
    head_dim: int
    num_pg_layers: int
    num_base_model_layers: int
    token_dim: int
    output_dim: int
    dim_accumulation: int
    rank: int
    alpha: float
    prefix: str
    targets: tuple[LoRATarget, ...]  # groups expanded, in the order of pg_mapping
    torch_dtype: str = "bfloat16"

    @property
    def scale(self) -> float:
        """What multiplies (x Aᵀ) Bᵀ at strength 1."""
        return self.alpha / self.rank

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "GeneratorConfig":
        """Raises CheckpointError for a missing key or sizes that contradict each other."""
        where = "generator config.json"
        sizes = ("input_dim", "d_model", "head_dim", "num_pg_layers", "num_base_model_layers", "token_dim", "output_dim",
                 "dim_accumulation", "rank")
        _check_counts(raw, sizes, where)
        _check_single(raw, sizes, where)
        _check_objects(raw, ("pg_mapping",), where)
        targets: list[LoRATarget] = []
        for name, entry in _require(raw, "pg_mapping", where).items():
            if entry.get("type") == "grouped":
                for sub, dims in entry["sub_weights"].items():
                    targets.append(LoRATarget(f"{name}.{sub}", dims["lora_A_dim"], dims["lora_B_dim"], entry["num_experts"]))
            else:
                targets.append(LoRATarget(name, entry["lora_A_dim"], entry["lora_B_dim"]))
        config = cls(
            **{key: _require(raw, key, where) for key in (
                "input_dim", "d_model", "head_dim", "num_pg_layers", "num_base_model_layers", "token_dim", "dim_accumulation",
                "rank", "alpha")},
            output_dim=raw.get("output_dim") or raw["token_dim"],
            prefix=raw.get("prefix", "model.layers."),
            targets=tuple(targets),
            torch_dtype=raw.get("torch_dtype") or raw.get("dtype") or "bfloat16",
        )
        for whole, part in (("rank", "dim_accumulation"), ("d_model", "dim_accumulation"), ("d_model", "head_dim")):
            if getattr(config, whole) % getattr(config, part):
                raise CheckpointError(
                    f"{where}: {whole} {getattr(config, whole)} is not a multiple of {part} {getattr(config, part)}")
        return config

    @classmethod
    def from_folder(cls, folder: Path) -> "GeneratorConfig":
        return cls.from_dict(read_json(Path(folder) / "config.json"))
