"""Golden stages of the whole flow, through the product's own functions: text, condition, ratio, and edits end to end."""

import itertools
import re
from dataclasses import replace

import numpy as np
import torch
from comfyui_hywu.hywu_core import condition as condition_module
from comfyui_hywu.hywu_core import edit as edit_module
from comfyui_hywu.hywu_core.backbone import inputs
from comfyui_hywu.hywu_core.backbone.pictures import encode_picture
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling import denoise as denoise_module
from comfyui_hywu.hywu_core.sampling.schedule import Schedule
from comfyui_hywu.hywu_core.sampling.taylor import TaylorSettings
from comfyui_hywu.hywu_core.text.template import text_sequence
from comfyui_hywu.hywu_core.think import Continuation
from comfyui_hywu.hywu_core.vision.pictures import prepare_picture

from ..case import Case, unpack_mask
from ..checks import END_TO_END, Checks


def encode_case(case: Case, names: list[str], golden: dict, instruction: str, thinking: str, fit: str):
    """A condition from golden pictures and posterior noise (drawn once a picture; the reference draws it three times)."""
    sources = [prepare_picture(case.image(name), case.model.config, fit) for name in names]
    noise = [golden[f"vae_noise.{index}"][:, :, 0] for index in range(len(sources))]
    return condition_module.encode_sources(case.model, sources, noise, instruction, thinking, 0, "en_unified")


def condition(case: Case, stage: str, checks: Checks) -> None:
    """The prefill that the generator reads: tokens, input embeddings, first and last layer."""
    golden, meta = case.tensors(stage), case.meta(stage)
    seen = record_layers(case)
    with seen:
        result = encode_case(case, meta["images"], golden, meta["prompt"], meta["cot_text"] or "", meta.get("fit", "stretch"))
    checks.close("condition", result.hidden_SD.unsqueeze(0), golden["condition"], END_TO_END)
    checks.close("layer0.in", seen.inputs[0], golden["layer0.in"], END_TO_END)
    for name in [key for key in golden if key.startswith("layer") and key.endswith(".out")]:
        index = int(name.removeprefix("layer").removesuffix(".out"))
        checks.close(name, seen.outputs[index], golden[name], END_TO_END)


class record_layers:
    """Inputs and outputs of every decoder layer while the block runs, last call wins."""

    def __init__(self, case: Case):
        self.layers = case.model.backbone.model.layers
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}

    def __enter__(self):
        def hook(index):
            def store(module, arguments, output):
                self.inputs[index], self.outputs[index] = arguments[0], output
            return store

        self._handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(self.layers)]
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()


def whole_edit(case: Case, stage: str, checks: Checks) -> None:
    """WUPipeline.generate: condition, LoRA, every denoise step, latent, pixels and the final size."""
    golden, meta = case.tensors(stage), case.meta(stage)
    auto = meta["image_size"] == "auto"
    result = encode_case(case, meta["images"], golden, meta["prompt"], meta["cot_text"] or "", "stretch" if auto else "crop")
    checks.close("condition", result.hidden_SD.unsqueeze(0), golden["condition"], END_TO_END)
    for index, picture in enumerate(result.pictures):
        # Row 0's pictures: a list when there are several of them, one tensor (1, c, h, w) or (rows, c, h, w) when there is one.
        several = f"cond_vae_latent.0.{index}" in golden
        wanted = golden[f"cond_vae_latent.0.{index}"] if several else golden["cond_vae_latent.0"]
        checks.close(f"cond_vae_latent.{index}", picture.latent_chw, wanted.view(-1, *picture.latent_chw.shape)[0])
    model = case.model
    if meta["with_lora"]:
        model = inject(model, write_lora(case.generator, result))
    guidance = meta["guidance_scale"]
    schedule = Schedule(meta["steps_run"], model.generation.flow_shift)
    checks.close("timesteps", schedule.timesteps, golden["timesteps"])
    checks.close("sigmas", schedule.sigmas, golden["sigmas"])
    bucket = denoise_module.choose_bucket(model, result, meta["image_size"])
    sequence = denoise_module.canvas_sequence(model, result, bucket, guidance)
    checks.exact("input_ids", sequence.ids_BL, golden["input_ids"])
    wanted = unpack_mask(golden["attention_mask_packed"], sequence.length)
    got = inputs.mask(model.backbone, sequence)
    for row in range(len(wanted)):
        checks.exact(f"attention_mask[{row}]", got, wanted[row])
    spans = [[list(span), list(grid)] for span, grid in sequence.rope_spans(model.config.cond_token_attn_type)]
    checks.exact("rope_image_info", spans, (meta.get("rope_image_info") or [[]])[0] or [])
    if "step1.attention_mask_packed" in golden:
        later = torch.arange(*sequence.later_slice)
        checks.exact("step1.position_ids", later.expand(len(wanted), -1), golden["step1.position_ids"])
        checks.exact("step1.attention_mask", inputs.mask(model.backbone, sequence, later),
                     unpack_mask(golden["step1.attention_mask_packed"], sequence.length)[0])
    trace = trace_steps(case)
    with trace:
        latent = denoise_module.denoise(model, result, sequence, schedule, guidance, golden["init_latents_bf16"])
    check_steps(checks, golden, trace, "")
    checks.close("final_latents", latent, golden["final_latents"], END_TO_END)
    z = model.backbone.vae.unscale(latent)
    checks.close("decode_z", z, golden["decode_z"][:, :, 0], END_TO_END)
    checks.close("decode_image", model.backbone.vae.decode(z), golden["decode_image"][:, :, 0], END_TO_END)
    picture = edit_module.decode(model, latent)
    if auto:
        picture = edit_module.restore(model, result, picture)
    checks.exact("final_size", list(picture.size), meta["final_size"])
    checks.pixels("image_uint8", torch.from_numpy(np.array(picture)), golden["image_uint8"])


class trace_steps:
    """What the denoise loop computes, step by step, taken from the velocity and Euler functions that it calls."""

    def __init__(self, case: Case):
        self.backbone = case.model.backbone
        self.raw: list[torch.Tensor] = []
        self.latents_in: list[torch.Tensor] = []
        self.predictions: list[torch.Tensor] = []
        self.latents_out: list[torch.Tensor] = []
        self.canvases: list[torch.Tensor] = []
        self.full_steps: list[int] = []

    def __enter__(self):
        self._velocity, self._advance, self._canvas = self.backbone.velocity, Schedule.advance, inputs.canvas

        def velocity(*arguments):
            self.raw.append(self._velocity(*arguments))
            return self.raw[-1]

        def advance(schedule, step, latent, prediction):
            self.latents_in.append(latent)
            self.predictions.append(prediction)
            self.latents_out.append(self._advance(schedule, step, latent, prediction))
            return self.latents_out[-1]

        def canvas(*arguments):
            self.full_steps.append(len(self.raw))
            self.canvases.append(self._canvas(*arguments))
            return self.canvases[-1]

        self.backbone.velocity, Schedule.advance, inputs.canvas = velocity, advance, canvas
        return self

    def __exit__(self, *error):
        del self.backbone.velocity
        Schedule.advance, inputs.canvas = self._advance, self._canvas


def check_steps(checks: Checks, golden: dict, trace: trace_steps, prefix: str) -> None:
    """Compare every traced step that the golden holds."""
    for step in range(len(trace.raw)):
        for name, values in (("raw_pred", trace.raw), ("pred", trace.predictions), ("latents_in", trace.latents_in),
                             ("latents_out", trace.latents_out)):
            if f"{prefix}step{step}.{name}" in golden:
                checks.close(f"{prefix}step{step}.{name}", values[step], golden[f"{prefix}step{step}.{name}"], END_TO_END)
    if "step1.inputs_embeds" in golden:
        wanted = golden["step1.inputs_embeds"]
        checks.close("step1.inputs_embeds", trace.canvases[1].expand(len(wanted), -1, -1), wanted, END_TO_END)


def greedy_text(case: Case, stage: str, checks: Checks) -> None:
    """Prefill and five decode steps, greedily."""
    golden, meta = case.tensors(stage), case.meta(stage)
    model = case.model
    sources = [prepare_picture(case.image(name), model.config, meta.get("fit", "stretch")) for name in meta["images"]]
    pictures = [encode_picture(model.backbone, source, golden[f"vae_noise.{index}"][:, :, 0])
                for index, source in enumerate(sources)]
    for index, picture in enumerate(pictures[:len(golden["cond_vae_images"])]):
        checks.close(f"cond_vae_images[{index}]", picture.latent_chw, golden["cond_vae_images"][index])
    sequence = text_sequence(
        model.tokenizer, model.config, model.generation, meta["prompt"], sources, bot_task=meta["bot_task"],
        system_prompt=model.system_prompts.select("en_unified", meta["bot_task"]))
    checks.exact("input_ids", sequence.ids_BL, golden["input_ids"])
    prefill = model.backbone.run(
        inputs.embed(model.backbone, sequence, pictures), inputs.rope_table(model.backbone, sequence),
        inputs.mask(model.backbone, sequence))
    checks.close("prefill_logits_last8", model.backbone.logits(prefill[:, -8:]), golden["prefill_logits_last8"], END_TO_END)
    continuation, tokens, logits = Continuation(model, sequence, pictures), [], []
    wanted = golden["sequences"][0, sequence.length:].tolist()
    for _ in wanted:
        logits.append(continuation(tokens[-1:]))
        tokens.append(int(logits[-1].argmax()))
    checks.exact("sequences", tokens, wanted)
    checks.close("logits", torch.stack(logits, dim=1), golden["logits"], END_TO_END)


def ratio(case: Case, stage: str, checks: Checks) -> None:
    """The ratio stage: same prefill as the condition, 37 logits, the index of the largest.

    It dumps its tokens only. Request and noise are those of a neighbouring stage that gives the same tokens: in the known cases
    the text stage's pictures and noise with another stage's thinking.
    """
    golden = case.tensors(stage)
    names = [name for name in case.stages if name.startswith(("h_text_greedy", "i_condition_", "k_auto"))]
    metas = {name: case.meta(name) for name in names}
    thoughts = sorted({meta.get("cot_text") or "" for meta in metas.values()})
    for name, thinking in itertools.product(sorted(names), thoughts):
        prompt, pictures = metas[name]["prompt"], metas[name]["images"]
        sources = [prepare_picture(case.image(picture), case.model.config, "stretch") for picture in pictures]
        sequence = text_sequence(
            case.model.tokenizer, case.model.config, case.model.generation, prompt, sources, thinking=thinking,
            bot_task="img_ratio", system_prompt=case.model.system_prompts.select("en_unified", "img_ratio"))
        if torch.equal(sequence.ids_BL, golden["input_ids"]):
            break
    else:
        checks.failures.append(f"no request of {names} with any of {len(thoughts)} thinking texts gives this stage's input_ids")
        return
    result = encode_case(case, pictures, case.tensors(name), prompt, thinking, "stretch")
    logits_V = case.model.backbone.logits(result.hidden_SD[None, -1:])[0, 0]
    checks.close("logits", logits_V, golden["logits"][0], END_TO_END)
    checks.close("scores", logits_V[list(case.model.tokenizer.ratio_ids)], golden["scores"][0], END_TO_END)
    checks.exact("ratio", result.ratio_index, int(golden["sequences"][0, -1]))


def pictures_of_sizes(case: Case, listed: str) -> list[str]:
    """The case's pictures that a dumped argument such as "[<PIL... size=240x240 at 0x7F>]" stands for, by their sizes."""
    by_size = {case.image(path.stem).size: path.stem for path in sorted((case.folder / "images").glob("*.png"))}
    return [by_size[int(width), int(height)] for width, height in re.findall(r"size=(\d+)x(\d+)", listed)]


def taylor_edit(case: Case, stage: str, checks: Checks) -> None:
    """Eight steps with and without TaylorCache, and which of them were computed in full."""
    golden, meta = case.tensors(stage), case.meta(stage)
    request, options = meta["kw"], meta["taylor"]
    names = pictures_of_sizes(case, request["image"])
    settings = TaylorSettings(
        interval=options["taylor_cache_interval"], low_order=options["taylor_cache_low_freqs_order"],
        high_order=options["taylor_cache_high_freqs_order"], first_steps=options["taylor_cache_first_enhance_steps"],
        last_steps=options["taylor_cache_tailing_enhance_steps"])
    model = case.model
    for prefix, taylor in (("plain.", None), ("taylor.", settings)):
        part = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
        result = encode_case(case, names, part, request["prompt"], request["cot_text"], "crop")
        steps = sum(1 for key in part if key.endswith(".pred"))
        guidance = model.generation.diff_guidance_scale
        sequence = denoise_module.canvas_sequence(
            model, replace(result), denoise_module.choose_bucket(model, result, request["image_size"]), guidance)
        trace = trace_steps(case)
        with trace:
            latent = denoise_module.denoise(
                model, result, sequence, Schedule(steps, model.generation.flow_shift), guidance, part["init_latents"], taylor)
        check_steps(checks, golden, trace, prefix)
        checks.close(f"{prefix}final_latents", latent, part["final_latents"], END_TO_END)
        checks.exact(f"{prefix}full_steps", trace.full_steps, meta[f"{prefix.rstrip('.')}_full_steps"])


STAGES = {
    "h_text_greedy": greedy_text,
    "h_ratio": ratio,
    "i_condition_": condition,
    "k_": whole_edit,
    "l2_taylor_e2e": taylor_edit,
}
