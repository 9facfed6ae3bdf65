"""A recipe: everything that decides what is trained and how, read from one JSON file.

Owns the fields, their checks, and both published config files that follow from the sizes. ``recipes/`` holds the shipped ones.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..json_fields import read_json

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Sizes:
    """The backbone. shared: how many expert widths the shared MLP is wide; inner: patch embedder and final layer."""

    hidden: int = 224
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    experts: int = 4
    top_k: int = 2
    expert_width: int = 48
    shared: int = 4
    inner: int = 128
    base_size: int = 192


@dataclass(frozen=True)
class GeneratorSizes:
    """The generator; rank and alpha are the LoRA's."""

    width: int = 192
    head_dim: int = 32
    blocks: int = 2
    token_dim: int = 224
    accumulation: int = 4
    rank: int = 8
    alpha: int = 8


@dataclass(frozen=True)
class DataSettings:
    """What is shown, and how often.

    grids: "rows x cols" of 16-pixel cells -> share of the crops and of the generator's batches. weights: edit -> how often,
    1 where it is not named. validation: share of the crops that is never trained on.
    """

    grids: dict[str, float] = field(default_factory=lambda: {
        "6x6": 0.12, "5x7": 0.06, "7x5": 0.06, "8x8": 0.16, "7x9": 0.08, "9x7": 0.06, "12x12": 0.16, "10x14": 0.14,
        "13x10": 0.06, "9x15": 0.05, "14x10": 0.05})
    weights: dict[str, float] = field(default_factory=lambda: {"invert": 3.0, "match": 3.0, "restore": 3.0, "old": 2.0})
    crops_per_photo: int = 40
    validation: float = 0.03
    chinese: float = 0.35  # share of the instructions
    without_thinking: float = 0.15  # share of the batches whose sequences hold no thinking


@dataclass(frozen=True)
class StageSettings:
    """One training stage. warmup in steps; rate falls along a cosine to a fiftieth. save_every in seconds."""

    steps: int = 1000
    batch: int = 16
    rate: float = 1e-3
    warmup: int = 40
    clip: float = 1.0
    weight_decay: float = 0.0
    sample_every: int = 250
    save_every: float = 120.0


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run; ``seed`` decides everything that is drawn."""

    seed: int = 0
    edits: tuple[str, ...] = ()  # () for all
    sizes: Sizes = Sizes()
    generator: GeneratorSizes = GeneratorSizes()
    data: DataSettings = DataSettings()
    base_stage: StageSettings = StageSettings(steps=1900, batch=24, rate=2e-3)
    generator_stage: StageSettings = StageSettings(steps=3900, batch=16, rate=1e-3)

    @classmethod
    def load(cls, name_or_path: str) -> "Recipe":
        """A shipped recipe by name ("mini") or a JSON file; a file names only what differs from the defaults.

        Raises:
            RequestError: there is no such recipe, a field is unknown, or a value has the wrong kind or is out of range.
            CheckpointError: the file is no JSON.
        """
        path = Path(name_or_path)
        if path.suffix != ".json":
            path = RECIPES / f"{name_or_path}.json"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.json")))
            raise RequestError(f"there is no recipe {name_or_path!r}: give one of {known}, or the path of a .json file")
        return _checked(_filled(cls, read_json(path), str(path)), str(path))

    def grids(self) -> dict[tuple[int, int], float]:
        """Share of the crops by (rows, cols)."""
        return {tuple(int(side) for side in name.split("x")): share for name, share in self.data.grids.items()}

    def to_json(self) -> str:
        """All fields, as ``load`` reads them."""
        return json.dumps(asdict(self), indent=1)

    def edit_names(self) -> tuple[str, ...]:
        from .edits import EDITS

        return self.edits or tuple(EDITS)


def _checked(recipe: Recipe, where: str) -> Recipe:
    from .edits import EDITS

    if unknown := [name for name in (*recipe.edits, *recipe.data.weights) if name not in EDITS]:
        raise RequestError(f"{where}: edits or weights has {unknown[0]!r}, known are {', '.join(EDITS)}")
    weights = recipe.data.weights
    if wrong := {name: weights[name] for name in weights if type(weights[name]) not in (int, float) or weights[name] <= 0}:
        raise RequestError(f"{where}: weights has {wrong}, expected numbers above 0")
    for name, share in recipe.data.grids.items():
        if not re.fullmatch(r"[1-9]\d?x[1-9]\d?", name) or not isinstance(share, int | float) or share < 0:
            raise RequestError(f"{where}: grids has {name!r}: {share!r}, expected 'ROWSxCOLUMNS' and a share of 0 or more")
    if sum(recipe.data.grids.values()) <= 0:
        raise RequestError(f"{where}: grids has {len(recipe.data.grids)} entries whose shares add up to 0: give one at least")
    for name in ("base_stage", "generator_stage"):
        stage = getattr(recipe, name)
        if stage.steps < 0 or stage.batch < 1 or not stage.rate > 0:
            raise RequestError(f"{where}: {name} has steps {stage.steps}, batch {stage.batch}, rate {stage.rate}; expected at "
                               "least 0 steps, a batch of at least 1 and a rate above 0")
    return recipe


def _filled(kind: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise RequestError(f"{where} is {str(raw)[:40]!r}, expected an object: write {{...}}")
    known = {entry.name: entry for entry in fields(kind)}
    if unknown := sorted(set(raw) - set(known)):
        raise RequestError(f"{where} has {len(unknown)} unknown fields ({unknown[0]!r}): known are {', '.join(known)}")
    defaults, values = kind(), {}
    for name, value in raw.items():
        default = getattr(defaults, name)
        if is_dataclass(default):
            value = _filled(type(default), value, f"{where}: {name}")
        elif isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        elif not isinstance(value, type(default)) and not (isinstance(default, float) and type(value) is int):
            raise RequestError(f"{where}: {name} is {value!r}, expected a {type(default).__name__}")
        values[name] = value
    return kind(**values)


def backbone_config(sizes: Sizes, vocab_size: int, special: dict[str, int]) -> dict:
    """config.json of the backbone, in the words of the published file."""
    from .linear_vae import CONFIG

    layers = sizes.layers
    return dict(
        architectures=["HunyuanImage3ForCausalMM"], model_type="hunyuan_image_3_moe", vocab_size=vocab_size,
        hidden_size=sizes.hidden, intermediate_size=sizes.expert_width, moe_intermediate_size=[sizes.expert_width] * layers,
        num_hidden_layers=layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        attention_head_dim=sizes.head_dim, hidden_act="silu", max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=False, rope_theta=10000.0, use_qk_norm=True, attention_bias=False, mlp_bias=False, norm_type="rms",
        num_experts=sizes.experts, use_mixed_mlp_moe=True, num_shared_expert=[sizes.shared] * layers,
        moe_topk=[sizes.top_k] * layers, moe_layer_num_skipped=0, norm_topk_prob=True, vae_downsample_factor=[16, 16],
        img_proj_type="unet", patch_size=1, patch_embed_hidden_dim=sizes.inner, image_base_size=sizes.base_size,
        image_extra_sizes=[], rope_type="2d", cond_token_attn_type="joint_full", cond_image_type="vae_vit",
        vae_dtype="float32", vae_autocast_dtype="float32", vae=CONFIG,
        vit=dict(
            hidden_size=96, intermediate_size=192, num_attention_heads=3, num_hidden_layers=2, num_patches=16, patch_size=16,
            num_channels=3, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, attention_dropout=0.0,
            vision_use_head=False),
        vit_processor=dict(
            max_num_patches=16, patch_size=16, image_processor_type="Siglip2ImageProcessorFast", do_resize=True,
            do_rescale=True, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2),
        vit_aligner=dict(projector_type="mlp_gelu", depth=2, input_dim=96, n_embed=sizes.hidden),
        cfg_distilled=True, use_meanflow=False, torch_dtype="float32", bos_token_id=special["<|startoftext|>"],
        eos_token_id=special["<|endoftext|>"], pad_token_id=special["<pad>"], pad_id=special["<pad>"],
        im_start_id=special["<boi>"], im_end_id=special["<eoi>"], image_token_id=special["<img>"])


def generation_config(special: dict[str, int]) -> dict:
    """generation_config.json: greedy thinking and few steps, because a deterministic edit needs no more."""
    return dict(
        bot_task="think_recaption", do_sample=True, eos_token_id=[special["<|endoftext|>"]], pad_token_id=special["<pad>"],
        bos_token_id=special["<|startoftext|>"], max_length=8192, max_new_tokens=64, sequence_template="instruct",
        temperature=0.0, top_k=1024, top_p=0.95, use_system_prompt="en_unified", drop_think=False, diff_infer_steps=4,
        diff_guidance_scale=2.5, flow_shift=1.0)


def generator_config(sizes: Sizes, generator: GeneratorSizes) -> dict:
    """config.json of the generator."""
    hidden, heads_width = sizes.hidden, sizes.heads * sizes.head_dim
    qkv, shared = heads_width + 2 * sizes.kv_heads * sizes.head_dim, sizes.shared * sizes.expert_width
    return dict(
        architectures=["ParameterGenerator"], model_type="parameter_generator", input_dim=hidden,
        num_base_model_layers=sizes.layers, d_model=generator.width, head_dim=generator.head_dim,
        num_pg_layers=generator.blocks, token_dim=generator.token_dim, output_dim=generator.token_dim,
        dim_accumulation=generator.accumulation, rank=generator.rank, alpha=generator.alpha, prefix="model.layers.",
        torch_dtype="float32",
        pg_mapping={
            "self_attn.qkv_proj": dict(lora_A_dim=hidden, lora_B_dim=qkv),
            "self_attn.o_proj": dict(lora_A_dim=heads_width, lora_B_dim=hidden),
            "mlp.shared_mlp.gate_and_up_proj": dict(lora_A_dim=hidden, lora_B_dim=2 * shared),
            "mlp.shared_mlp.down_proj": dict(lora_A_dim=shared, lora_B_dim=hidden),
            "mlp.experts": {
                "type": "grouped", "num_experts": sizes.experts,
                "sub_weights": {
                    "w1": dict(lora_A_dim=hidden, lora_B_dim=sizes.expert_width),
                    "w2": dict(lora_A_dim=sizes.expert_width, lora_B_dim=hidden),
                    "w3": dict(lora_A_dim=hidden, lora_B_dim=sizes.expert_width)}}})
