"""The denoise loop: both guidance rows in one pass, the prompt's keys and values computed once (spec sections 6 and 8).

Step 0 runs the whole sequence and fills the cache; later steps run the canvas alone against it. Unlike the reference, the
requested steps, guidance and shift are what is run, and guidance 1 needs one row only.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from ..backbone import inputs
from ..backbone.cache import KVCache
from ..backbone.model import Backbone
from ..backbone.stage import Rope
from ..condition import Condition
from ..elsewhere import done_where_the_model_is
from ..errors import LoRAError, RequestError
from ..handle import ModelHandle
from ..lora.attach import attached
from ..progress import Tick, silent
from ..seeds import seeded
from ..text.template import Sequence, image_sequence
from ..vision.buckets import Bucket, Buckets
from .guidance import guide
from .schedule import Schedule
from .taylor import TaylorPlan, TaylorSettings


@done_where_the_model_is
def sample(
    model: ModelHandle,
    condition: Condition,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    seed: int = 0,
    size: str = "auto",
    taylor: TaylorSettings | None = None,
    on_tick: Tick = silent,
) -> torch.Tensor:
    """Denoise one picture; returns its latent (1, c, h, w) on the diffusion scale, fp32.

    Args:
        model: with the LoRAs to apply; without any, this is the plain backbone's picture.
        steps, guidance, shift: None takes the checkpoint's own (generation_config.json).
        seed: of the initial noise, drawn on the CPU, so that it is the same on every device.
        size: "auto" for the ratio that the backbone chose, else "HEIGHTxWIDTH", "WIDTH:HEIGHT" or "<img_ratio_i>"; always the
            nearest bucket.
        taylor: skip steps by TaylorCache; faster, not exact.
        on_tick: a tick a layer (a cancel point) and a step, the latter with the current estimate of the clean latent.

    Raises: RequestError for settings out of range; LoRAError if the condition is another backbone's.
    """
    check_condition(model, condition)
    schedule, guidance = settings(model, steps, guidance, shift)
    bucket = choose_bucket(model, condition, size)
    factor = model.config.vae.ffactor_spatial
    shape = (1, model.config.vae.latent_channels, bucket.height // factor, bucket.width // factor)
    # The noise is rounded to bf16 as in the published pipeline.
    noise_bchw = torch.randn(shape, generator=seeded(seed)).bfloat16().float()
    sequence = canvas_sequence(model, condition, bucket, guidance)
    return denoise(model, condition, sequence, schedule, guidance, noise_bchw, taylor, on_tick)


@torch.no_grad()
def denoise(
    model: ModelHandle,
    condition: Condition,
    sequence: Sequence,
    schedule: Schedule,
    guidance: float,
    latent_bchw: torch.Tensor,
    taylor: TaylorSettings | None = None,
    on_tick: Tick = silent,
) -> torch.Tensor:
    """Run ``schedule`` from the noise ``latent_bchw`` (1, c, h, w) under the model's LoRAs; raises as ``check_finite``."""
    backbone, steps = model.backbone, len(schedule)
    span = slice(*sequence.later_slice)
    rows, grid = sequence.ids_BL.shape[0], tuple(latent_bchw.shape[2:])
    image_tokens = grid[0] * grid[1]
    positions_L = torch.arange(span.start, span.stop)
    cos_LQ, sin_LQ = inputs.rope_table(backbone, sequence)
    plan = TaylorPlan(taylor, steps) if taylor else None
    latent_bchw = latent_bchw.to(backbone.device)
    on_tick(0, steps, None)
    with attached(model, lambda: on_tick(0, steps, None)), backbone.at_work():
        caches = backbone.new_cache(rows, sequence.length)
        for step, t in enumerate(schedule.timesteps):
            if plan is None or plan.is_full(step):
                canvas_BLD = inputs.canvas(backbone, sequence, latent_bchw, t, schedule.next_timestep(step), guidance)
                canvas_BLD = canvas_BLD.expand(rows, -1, -1)
                tick = partial(_stay, on_tick, step, steps)
                if step == 0:
                    hidden_BLD = inputs.embed(backbone, sequence, condition.pictures)
                    hidden_BLD[:, span] = canvas_BLD
                    hidden_BLD = _first_pass(backbone, sequence, hidden_BLD, (cos_LQ, sin_LQ), caches, tick)
                    sight = inputs.canvas_sight(backbone, sequence)
                else:
                    hidden_BLD = backbone.run(
                        canvas_BLD, (cos_LQ[span], sin_LQ[span]), sight, caches, positions_L, on_layer=tick)
                if plan is not None and plan.stores(step):
                    plan.predictor.store(step, hidden_BLD)
            else:
                hidden_BLD = plan.predictor.predict(step)
            t_B = t.expand(rows).to(backbone.device)
            velocity_bchw = guide(backbone.velocity(hidden_BLD[:, -image_tokens:], t_B, grid), guidance)
            clean_bchw = schedule.clean(step, latent_bchw, velocity_bchw)
            latent_bchw = schedule.advance(step, latent_bchw, velocity_bchw)
            on_tick(step + 1, steps, clean_bchw)
    check_finite(model, latent_bchw)
    return latent_bchw


def _first_pass(
    backbone: Backbone, sequence: Sequence, hidden_BLD: torch.Tensor, rope: Rope, caches: list[KVCache],
    tick: Callable[[int], None],
) -> torch.Tensor:
    """Fill the caches with the whole sequence, what the rows share but once; returns the canvas's last hidden states."""
    mask_LL, shared, span = inputs.mask(backbone, sequence), sequence.shared_prefix, slice(*sequence.later_slice)
    if shared:
        head = tuple(part_LQ[:shared] for part_LQ in rope)
        backbone.run(hidden_BLD[:1, :shared], head, mask_LL[:shared, :shared], caches, on_layer=tick)
    tail, positions_L = tuple(part_LQ[shared:] for part_LQ in rope), torch.arange(shared, sequence.length)
    hidden_BLD = backbone.run(hidden_BLD[:, shared:], tail, mask_LL[shared:], caches, positions_L, on_layer=tick)
    return hidden_BLD[:, span.start - shared : span.stop - shared]


def _stay(on_tick: Tick, step: int, steps: int, layer: int) -> None:
    """A cancel point after each layer; the bar does not move."""
    on_tick(step, steps, None)


def check_finite(model: ModelHandle, latent_bchw: torch.Tensor) -> None:
    """Raises RequestError for a latent with NaN or Inf: it would decode to a black picture without a word."""
    bad = int((~torch.isfinite(latent_bchw)).sum())
    if bad:
        strengths = ", ".join(f"{injected.strength:g}" for injected in model.loras) or "none"
        raise RequestError(
            f"{bad} of {latent_bchw.numel()} values of the picture are NaN or Inf (LoRA strengths: {strengths}): lower the "
            "strength, or load the model in bfloat16 or float32")


def canvas_sequence(model: ModelHandle, condition: Condition, bucket: Bucket, guidance: float) -> Sequence:
    """The sequence to denoise on: one row for a distilled backbone or guidance 1, else [conditional, unconditional]."""
    rows = 1 if model.config.cfg_distilled or guidance == 1.0 else 2
    return image_sequence(
        model.tokenizer, model.config, model.generation, condition.instruction, condition.pictures, bucket,
        thinking=condition.thinking, system_prompt=model.system_prompts.select(condition.system_prompt, "image"), rows=rows)


def settings(
    model: ModelHandle, steps: int | None, guidance: float | None, shift: float | None
) -> tuple[Schedule, float]:
    """The schedule and guidance to sample with; None takes the checkpoint's own. Raises RequestError."""
    schedule = Schedule(_or(steps, model.generation.diff_infer_steps), _or(shift, model.generation.flow_shift))
    return schedule, check_guidance(_or(guidance, model.generation.diff_guidance_scale))


def check_request(
    model: ModelHandle, steps: int | None, guidance: float | None, shift: float | None, seed: int, size: str
) -> None:
    """Raises RequestError for what ``sample`` would refuse: asked at once, it costs nobody the minutes before sampling."""
    settings(model, steps, guidance, shift)
    seeded(seed)
    if size.strip() != "auto":
        Buckets.of(model.config).parse(size)


def choose_bucket(model: ModelHandle, condition: Condition, size: str) -> Bucket:
    """The bucket for a size as typed, or the one that the backbone chose for "auto". Raises RequestError."""
    buckets = Buckets.of(model.config)
    return buckets.at(condition.ratio_index) if size.strip() == "auto" else buckets.parse(size)


def check_guidance(guidance: float) -> float:
    """Raises RequestError for guidance that is no number within 0 .. 100."""
    if not math.isfinite(guidance) or not 0.0 <= guidance <= 100.0:
        raise RequestError(f"guidance {guidance} asked for, it must be within 0 and 100 (the published default is 2.5)")
    return float(guidance)


def check_condition(model: ModelHandle, condition: Condition) -> None:
    """Raises LoRAError if the condition was encoded by another backbone than the one that is to sample."""
    if condition.backbone_fingerprint != model.fingerprint:
        raise LoRAError(
            f"the condition was encoded by the backbone {condition.backbone_fingerprint}, the model to sample with is "
            f"{model.fingerprint}: encode it again with this model")


def _or(value, default):
    return default if value is None else value
