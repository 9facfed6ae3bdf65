"""The configurations of a published backbone folder and generator folder as frozen values.

Owns reading and checking ``config.json`` and ``generation_config.json``; knows no tensors. Key names and defaults follow the
published files (spec section 1).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .json_fields import check_counts, check_lists, check_objects, check_single, count, read_json, require

VIT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "num_patches",
             "patch_size")
ATTENTION_TYPES = ("joint_full", "full", "full_causal", "causal")
# Keys of config.json that name the id of a special token: what a tokenizer is checked against.
SPECIAL_ID_KEYS = {
    "bos_token_id": "<|startoftext|>",
    "eos_token_id": "<|endoftext|>",
    "im_start_id": "<boi>",
    "im_end_id": "<eoi>",
    "image_token_id": "<img>",
}


def torch_dtype(name: str) -> torch.dtype:
    """"bfloat16" -> torch.bfloat16. Raises CheckpointError for a name that is no floating dtype to compute in."""
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise CheckpointError(f"config.json: torch_dtype {name!r} is none of {sorted(dtypes)}")
    return dtypes[name]


def _per_layer(value: int | list[int], layers: int, key: str) -> tuple[int, ...]:
    """Published configs give either one number for all layers or a list with one per layer."""
    values = tuple(value) if isinstance(value, list) else (value,) * layers
    if len(values) != layers:
        raise CheckpointError(f"config.json: '{key}' has {len(values)} entries for {layers} layers")
    return values


def _extra_sizes(value: Any) -> tuple[tuple[int, int], ...] | None:
    """Our own key, absent in published files: at small base sizes their absolute 1280 x 720 is far out of reach."""
    if value is None:
        return None
    sizes = value if isinstance(value, list) else [value]
    if sizes is not value or not all(isinstance(size, list) and len(size) == 2 for size in sizes) or not all(
            type(side) is int and side > 0 and side % 16 == 0 for size in sizes for side in size):
        raise CheckpointError(f"config.json: 'image_extra_sizes' is {str(value)[:60]!r}, expected a list of [height, width] in "
                              "multiples of 16 pixels")
    return tuple((height, width) for height, width in value)


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
        sizes = ("latent_channels", "ffactor_spatial", "ffactor_temporal", "in_channels", "out_channels")
        check_counts(raw, (*sizes, "block_out_channels"), where)
        check_counts(raw, ("layers_per_block",), where, least=0)
        check_single(raw, (*sizes, "layers_per_block"), where)
        check_lists(raw, ("block_out_channels",), where)
        return cls(
            block_out_channels=tuple(require(raw, "block_out_channels", where)),
            latent_channels=require(raw, "latent_channels", where),
            layers_per_block=require(raw, "layers_per_block", where),
            ffactor_spatial=require(raw, "ffactor_spatial", where),
            ffactor_temporal=require(raw, "ffactor_temporal", where),
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
    num_shared_expert: tuple[int, ...]  # per layer; the shared MLP is this many expert widths wide
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
    image_extra_sizes: tuple[tuple[int, int], ...] | None = None  # (height, width) beside the walk; None = the published four
    special_ids: dict[str, int] = field(default_factory=dict, hash=False)  # special token -> the id that config.json says

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "BackboneConfig":
        """Raises CheckpointError for a missing key or a value that this implementation does not know."""
        single = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                  "attention_head_dim", "num_experts", "intermediate_size", "max_position_embeddings",
                  "patch_embed_hidden_dim", "image_base_size")
        check_counts(raw, (*single, "moe_topk", "moe_intermediate_size"), "config.json")
        check_counts(raw, ("num_shared_expert", "moe_layer_num_skipped"), "config.json", least=0)
        check_single(raw, (*single, "moe_layer_num_skipped"), "config.json")
        check_objects(raw, ("vae", "vit", "vit_processor", "vit_aligner"), "config.json")
        check_counts(require(raw, "vit", "config.json"), VIT_SIZES, "config.json: 'vit'")
        check_single(raw["vit"], VIT_SIZES, "config.json: 'vit'")
        layers = require(raw, "num_hidden_layers", "config.json")
        heads = require(raw, "num_attention_heads", "config.json")
        kv_heads = raw.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise CheckpointError(f"config.json: {heads} attention heads cannot be shared by {kv_heads} key/value heads")
        for key, only in (("patch_size", 1), ("img_proj_type", "unet"), ("cond_image_type", "vae_vit"), ("rope_type", "2d")):
            if raw.get(key, only) != only:
                raise CheckpointError(f"config.json: '{key}' is {raw[key]!r}, only {only!r} is supported")
        attention_type = raw.get("cond_token_attn_type", "joint_full")
        if attention_type not in ATTENTION_TYPES:
            raise CheckpointError(f"config.json: cond_token_attn_type {attention_type!r} is none of {ATTENTION_TYPES}")
        intermediate = require(raw, "intermediate_size", "config.json")
        vit = dict(raw["vit"])
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            require(vit, key, "config.json: 'vit'")
        moe_topk = _per_layer(require(raw, "moe_topk", "config.json"), layers, "moe_topk")
        if max(moe_topk) > require(raw, "num_experts", "config.json"):
            raise CheckpointError(f"config.json: moe_topk asks for {max(moe_topk)} of {raw['num_experts']} experts")
        return cls(
            vocab_size=require(raw, "vocab_size", "config.json"),
            hidden_size=require(raw, "hidden_size", "config.json"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            attention_head_dim=raw.get("attention_head_dim") or raw["hidden_size"] // heads,
            num_experts=raw["num_experts"],
            moe_topk=moe_topk,
            moe_intermediate_size=_per_layer(raw.get("moe_intermediate_size") or intermediate, layers, "moe_intermediate_size"),
            num_shared_expert=_per_layer(raw.get("num_shared_expert") or 1, layers, "num_shared_expert"),
            intermediate_size=intermediate,
            moe_layer_num_skipped=raw.get("moe_layer_num_skipped") or 0,
            max_position_embeddings=require(raw, "max_position_embeddings", "config.json"),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
            rope_theta=raw.get("rope_theta", 10000.0),
            patch_embed_hidden_dim=raw.get("patch_embed_hidden_dim") or 1024,
            image_base_size=raw.get("image_base_size") or 1024,
            image_extra_sizes=_extra_sizes(raw.get("image_extra_sizes")),
            cond_token_attn_type=attention_type,
            cfg_distilled=bool(raw.get("cfg_distilled", False)),
            use_meanflow=bool(raw.get("use_meanflow", False)),
            vae=VAEConfig.from_dict(require(raw, "vae", "config.json")),
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
        return cls.from_dict(read_json(Path(folder) / "generation_config.json"), config)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], config: BackboneConfig) -> "GenerationConfig":
        known = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
        for key, value in known.items():
            kind = type(cls.__dataclass_fields__[key].default)
            # JSON writes 1.0 as 1; a bool is no number here.
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise CheckpointError(f"generation_config.json: '{key}' is {str(value)[:60]!r}, expected a {kind.__name__}: "
                                      "download the file again")
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


def _target_sizes(entry: Any, where: str) -> tuple[int, int]:
    check_objects({"dims": entry}, ("dims",), where)
    return count(entry, "lora_A_dim", where), count(entry, "lora_B_dim", where)


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
        check_counts(raw, sizes, where)
        check_single(raw, sizes, where)
        check_objects(raw, ("pg_mapping",), where)
        targets: list[LoRATarget] = []
        for name, entry in require(raw, "pg_mapping", where).items():
            place = f"{where}: pg_mapping '{name}'"
            check_objects({name: entry}, (name,), f"{where}: pg_mapping")
            if entry.get("type") == "grouped":
                check_objects(entry, ("sub_weights",), place)
                for sub, dims in require(entry, "sub_weights", place).items():
                    experts = count(entry, "num_experts", place)
                    targets.append(LoRATarget(f"{name}.{sub}", *_target_sizes(dims, place), experts))
            else:
                targets.append(LoRATarget(name, *_target_sizes(entry, place)))
        config = cls(
            **{key: require(raw, key, where) for key in (
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
