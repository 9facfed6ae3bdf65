"""Golden stages of single backbone parts: adapted projections, attention, embedders, the schedule and TaylorCache."""

import torch
from comfyui_hywu.hywu_core.backbone import rope
from comfyui_hywu.hywu_core.backbone.cache import KVCache
from comfyui_hywu.hywu_core.backbone.embedders import sinusoid
from comfyui_hywu.hywu_core.lora.attach import attached, inject
from comfyui_hywu.hywu_core.lora.value import LoRA
from comfyui_hywu.hywu_core.sampling.guidance import guide
from comfyui_hywu.hywu_core.sampling.schedule import Schedule
from comfyui_hywu.hywu_core.sampling.taylor import TaylorPredictor, split_frequencies

from ..case import Case
from ..checks import Checks


def reference_lora(case: Case, stage: str) -> LoRA:
    """The LoRA dict of a golden stage as our value."""
    return LoRA.from_reference_state(case.tensors(stage))


def lora_moe(case: Case, stage: str, checks: Checks) -> None:
    """Every adapted projection of one layer, and the mixture of experts, without and with the LoRA."""
    golden, index = case.tensors(stage), case.meta(stage)["layer"]
    layer = case.model.backbone.model.layers[index]
    x_BLD = golden["x"]
    x_TD = x_BLD.flatten(0, 1)
    expert_TK, weight_TK = layer.mlp.gate(x_TD)
    checks.exact("route_idx", expert_TK, golden["route_idx"])
    checks.close("route_weights", weight_TK, golden["route_weights"])
    linears = {name.removesuffix(".in"): tensor for name, tensor in golden.items() if name.endswith(".in")}
    with_lora = inject(case.model, reference_lora(case, "b_pg_state_real"))
    for kind, model in (("base", case.model), ("lora", with_lora)):
        with attached(model):
            for name, value in linears.items():
                checks.close(f"{name}.{kind}", layer.get_submodule(name)(value), golden[f"{name}.{kind}"])
            checks.close(f"shared_mlp.{kind}", layer.mlp.shared_mlp(x_BLD), golden[f"shared_mlp.{kind}"])
            routed = layer.mlp.experts(x_BLD, expert_TK, weight_TK)
            checks.close(f"experts.{kind}", routed, golden[f"experts.{kind}"])
            checks.close(f"mlp.{kind}", layer.mlp(x_BLD), golden[f"mlp.{kind}"])
    all_to_first = torch.zeros(len(x_TD), 1, dtype=torch.int64)
    alone = layer.mlp.experts(x_BLD, all_to_first, torch.ones(len(x_TD), 1))
    checks.close("expert0_plain", alone, golden["expert0_plain.base"])


def rope_attention(case: Case, stage: str, checks: Checks) -> None:
    """Rope tables, attention over a full sequence, over re-fed rows with cache overwrite, and over one decoded token."""
    golden, meta = case.tensors(stage), case.meta(stage)
    config, layer = case.model.config, case.model.backbone.model.layers[0]
    spans = [(tuple(span), tuple(grid)) for span, grid in meta["rope_image_info"]]
    yx_L2 = rope.positions(meta["seq_len"], spans)
    checks.exact("rope.pos_yx", yx_L2, golden["rope.pos_yx"])
    cos_LQ, sin_LQ = rope.table(yx_L2, config.attention_head_dim, config.rope_theta)
    checks.close("rope.cos", cos_LQ, golden["rope.cos"][0])
    checks.close("rope.sin", sin_LQ, golden["rope.sin"][0])

    def tables(positions_L):
        return cos_LQ[positions_L], sin_LQ[positions_L]

    x_BLD = golden["attn.x"]
    rows, length, _ = x_BLD.shape
    everything = torch.arange(length)
    checks.close("input_layernorm", layer.input_layernorm(x_BLD), golden["input_layernorm.out"])
    # The goldens give each row a mask and positions of its own; a request's rows share them, so the rows run one by one.
    for row in range(rows):
        pick, cache = slice(row, row + 1), empty_cache(config, length)
        out = layer.self_attn(x_BLD[pick], tables(everything), golden["attn.mask"][row, 0], cache, 0, everything)
        checks.close(f"attn.out[{row}]", out, golden["attn.out"][pick])
        keys, values = cache.layer(0)
        checks.close(f"attn.cache_k[{row}]", keys, golden["attn.cache_k"][pick])
        checks.close(f"attn.cache_v[{row}]", values, golden["attn.cache_v"][pick])
        again = golden["attn2.position_ids"][row]
        out = layer.self_attn(
            golden["attn2.x"][pick], tables(again), golden["attn2.mask"][row, 0], cache, 0, again)
        checks.close(f"attn2.out[{row}]", out, golden["attn2.out"][pick])
        keys, values = cache.layer(0)
        checks.close(f"attn2.cache_k[{row}]", keys, golden["attn2.cache_k"][pick])
        checks.close(f"attn2.cache_v[{row}]", values, golden["attn2.cache_v"][pick])
        plain = layer(x_BLD[pick], tables(everything), golden["attn.mask"][row, 0])
        checks.close(f"layer.out[{row}]", plain, golden["layer.out"][pick])


    # The decoded token follows the first pass, not the one that overwrote parts of its cache.
    cache, position = empty_cache(config, length), torch.tensor([length])
    layer.self_attn(x_BLD[:1], tables(everything), golden["attn.mask"][0, 0], cache, 0, everything)
    cache.reserve(length + 1)
    out = layer.self_attn(golden["attn3.x"], tables(position), None, cache, 0, position)
    checks.close("attn3.out", out, golden["attn3.out"])


def empty_cache(config, length: int) -> KVCache:
    """A cache for one layer and one row with ``length`` slots in use."""
    cache = KVCache(1, 1, config.num_key_value_heads, length, config.attention_head_dim, device="cpu", dtype=torch.float32)
    cache.reserve(length)
    return cache


def check_embedders(case: Case, checks: Checks) -> None:
    """The embedder part of f_vision_vae_embed."""
    golden, backbone = case.tensors("f_vision_vae_embed"), case.model.backbone
    checks.close("sinusoid", sinusoid(golden["t"]), golden["sinusoid"])
    for name in ("timestep_emb", "time_embed", "time_embed_2", "guidance_emb", "timestep_r_emb"):
        if f"{name}.out" in golden:
            checks.close(f"{name}.out", getattr(backbone, name)(golden["t"]), golden[f"{name}.out"])
    latent = golden["patch_embed.x"]
    checks.close("patch_embed", backbone.patch_embed(latent, golden["patch_embed.t_emb"]), golden["patch_embed.out"])
    velocity = backbone.final_layer(golden["final_layer.x"], golden["final_layer.t_emb"], tuple(latent.shape[2:]))
    checks.close("final_layer", velocity, golden["final_layer.out"])


def scheduler(case: Case, stage: str, checks: Checks) -> None:
    """Sigmas, timesteps, Euler steps and guidance."""
    golden = case.tensors(stage)
    for name in [key.removesuffix(".sigmas") for key in golden if key.endswith(".sigmas")]:
        shift, steps = name.removeprefix("s").split("_n")
        schedule = Schedule(int(steps), float(shift))
        checks.close(f"{name}.sigmas", schedule.sigmas, golden[f"{name}.sigmas"])
        checks.close(f"{name}.timesteps", schedule.timesteps, golden[f"{name}.timesteps"])
        if f"{name}.x0" not in golden:
            continue
        following = torch.stack([schedule.next_timestep(step) for step in range(len(schedule))])
        checks.close(f"{name}.timestep_r", following, golden[f"{name}.timestep_r"])
        latent = golden[f"{name}.x0"]
        for step in range(4):
            latent = schedule.advance(step, latent, golden[f"{name}.v"] * (step + 1))
            if step in (0, 3):
                checks.close(f"{name}.x_after{step}", latent, golden[f"{name}.x_after{step}"])
    rows = torch.cat((golden["cfg_cond"], golden["cfg_uncond"]))
    for name in [key for key in golden if key.startswith("cfg_out_")]:
        checks.close(name, guide(rows, float(name.removeprefix("cfg_out_").replace("_", "."))), golden[name])


def taylor(case: Case, stage: str, checks: Checks) -> None:
    """The expansion itself: full steps with gaps 3, 4, 5, predictions one and two steps ahead."""
    golden = case.tensors(stage)
    predictor, step = TaylorPredictor(low_order=0, high_order=2), 0
    low, high = split_frequencies(golden["x0"])
    checks.close("low", low, golden["low0"])
    checks.close("high", high, golden["high0"])
    for index, gap in enumerate((0, 3, 4, 5)):
        step += gap
        predictor.store(step, golden[f"x{index}"])
        for ahead in (1, 2):
            checks.close(f"pred{index}_d{ahead}", predictor.predict(step + ahead), golden[f"pred{index}_d{ahead}"])


STAGES = {
    "c_lora_moe": lora_moe,
    "d_rope_attention": rope_attention,
    "j_scheduler": scheduler,
    "l_taylor": taylor,
}
