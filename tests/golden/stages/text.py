"""The stages of the text part: sequences (g), the course of thinking (h2), its logits processors (h3) and filters (h4)."""

from dataclasses import dataclass

import torch
from comfyui_hywu.hywu_core.backbone.mask import attention_mask
from comfyui_hywu.hywu_core.config import BackboneConfig, GenerationConfig
from comfyui_hywu.hywu_core.text.logits import RatioSlice, Sampling, StageTransitions, filter_scores
from comfyui_hywu.hywu_core.text.reasoning import plan_reasoning, reason, reasoning_text, sampling_of
from comfyui_hywu.hywu_core.text.sections import CanvasSection, TextSection
from comfyui_hywu.hywu_core.text.system_prompt import read_system_prompts
from comfyui_hywu.hywu_core.text.template import Sequence, image_sequence, text_sequence
from comfyui_hywu.hywu_core.text.tokenizer import Tokenizer
from comfyui_hywu.hywu_core.vision.buckets import Buckets
from comfyui_hywu.hywu_core.vision.pictures import prepare_picture

from ..case import Case, unpack_mask
from ..checks import Checks


@dataclass
class Parts:
    """What text needs of a case; nothing of it reads a weight."""

    config: BackboneConfig
    generation: GenerationConfig
    tokenizer: Tokenizer

    @classmethod
    def of(cls, case: Case) -> "Parts":
        config = BackboneConfig.from_folder(case.base)
        return cls(config, GenerationConfig.from_folder(case.base, config), Tokenizer.from_folder(case.base, config))


def chat_template(case: Case, stage: str, checks: Checks) -> None:
    """Every prompt of the stage, built from its request; text, tokens, spans, scatter places, masks and rope spans."""
    parts, prompts = Parts.of(case), read_system_prompts(case.base)
    tensors = case.tensors(stage)
    for name, meta in case.meta(stage).items():
        golden = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        chosen = prompts.select(meta["system_prompt_kind"], meta["bot_task"], custom=meta["system_prompt"])
        checks.exact(f"{name} system prompt", chosen, meta["system_prompt"])
        sequence = _build(case, parts, meta, chosen)
        checks.exact(f"{name} tokens", sequence.ids_BL, golden["tokens"])
        checks.exact(f"{name} length", golden["real_pos"].unique().tolist(), [sequence.length])
        checks.exact(f"{name} decoded", parts.tokenizer.decode(sequence.ids_BL[0].tolist()), meta["decoded"])
        _check_sections(name, sequence, meta, checks)
        _check_places(name, sequence, parts.config.cond_token_attn_type, meta, golden, checks)


def _build(case: Case, parts: Parts, meta: dict, system_prompt: str | None) -> Sequence:
    fit = "stretch" if meta["infer_align_image_size"] else "crop"
    pictures = [prepare_picture(case.image(name), parts.config, fit) for name in meta["images"]]
    common = {"thinking": meta["cot_text"] or "", "system_prompt": system_prompt, "drop_think": meta["drop_think"]}
    of_case = parts.tokenizer, parts.config, parts.generation, meta["prompt"], pictures
    if meta["mode"] == "gen_text":
        return text_sequence(*of_case, bot_task=meta["bot_task"], **common)
    bucket = Buckets.of(parts.config).parse(meta["image_size"])
    return image_sequence(*of_case, bucket, **common)


_KINDS = {"text": "TextSection", "cond_joint_image": "PictureSection", "gen_image": "CanvasSection"}


def _check_sections(name: str, sequence: Sequence, meta: dict, checks: Checks) -> None:
    want = [section for section in meta["sections"][0] if section["type"] != "text" or section["text"]]
    got = [section for section, _ in sequence.sections]
    checks.exact(f"{name} texts", [section.text for section in got if isinstance(section, TextSection)],
                 [section["text"] for section in want if section["type"] == "text"])
    checks.exact(f"{name} kinds", [type(section).__name__ for section in got], [_KINDS[section["type"]] for section in want])
    slices = [tuple(each) for each in meta["text_slices"][0] if each[0] < each[1]]
    checks.exact(f"{name} text slices",
                 [place for section, place in sequence.sections if isinstance(section, TextSection)], slices)
    for section, mine in zip(want, got, strict=False):
        if isinstance(mine, CanvasSection):
            checks.exact(f"{name} painted size", (mine.bucket.index, mine.bucket.height, mine.bucket.width),
                         (section["ratio_idx"], section["image_height"], section["image_width"]))


def _check_places(name: str, sequence: Sequence, attention: str, meta: dict, golden: dict[str, torch.Tensor],
                  checks: Checks) -> None:
    for kind in ("vae", "vit", "gen"):
        spans = [[span.start, span.stop] for span in sequence.spans(kind)]
        checks.exact(f"{name} {kind} spans", spans, meta[f"{kind}_image_slices"][0])
        if f"{kind}_image_mask" in golden:
            mask_L = torch.zeros(sequence.length, dtype=torch.bool)
            for start, stop in spans:
                mask_L[start:stop] = True
            checks.exact(f"{name} {kind} mask", mask_L.expand_as(golden[f"{kind}_image_mask"]), golden[f"{kind}_image_mask"])
    checks.exact(f"{name} joint spans", [list(span) for span in sequence.joint_spans], meta["joint_image_slices"][0])
    checks.exact(f"{name} rope spans", [[list(span), list(grid)] for span, grid in sequence.rope_spans(attention)],
                 meta["rope_image_info"][0])
    places = {
        "cond_timestep_scatter_index": list(sequence.cond_timestep),
        "gen_timestep_scatter_index": [sequence.gen_timestep],
        "guidance_scatter_index": [sequence.guidance],
        "gen_timestep_r_scatter_index": [sequence.gen_timestep_r],
    }
    for key, value in golden.items():
        if key.endswith("_scatter_index"):
            checks.exact(f"{name} {key}", torch.tensor([places[key]] * len(value)), value)
    mask_LL = attention_mask(sequence.length, sequence.full_spans(attention))
    for row in unpack_mask(golden["attention_mask_packed"], sequence.length):
        checks.exact(f"{name} attention mask", mask_LL, row)


def thinking(case: Case, stage: str, checks: Checks) -> None:
    """Recorded scores played through the loop that think.py uses: every token, the text, the plan."""
    parts = Parts.of(case)
    tensors = case.tensors(stage)
    for name, meta in case.meta(stage).items():
        plan = plan_reasoning(parts.tokenizer, parts.generation, meta["bot_task"], want_ratio=meta["image_size"] == "auto")
        checks.exact(f"{name} transitions", [[trigger, list(ids)] for trigger, ids in plan.transitions.items()],
                     meta["stage_transitions"])
        checks.exact(f"{name} stop tokens", sorted(plan.stop_ids), sorted(meta["final_stop_tokens"]))
        recorded = iter(tensors[f"{name}.raw_logits"])
        tokens = reason(lambda new, recorded=recorded: [next(recorded) for _ in new or [None]][-1].unsqueeze(0), plan,
                        sampling_of(parts.generation), torch.Generator().manual_seed(0), parts.generation.max_new_tokens)
        checks.exact(f"{name} tokens", tokens, meta["new_tokens"])
        checks.exact(f"{name} all scores used", sum(1 for _ in recorded), 0)
        checks.exact(f"{name} decoded", parts.tokenizer.decode(tokens), meta["decoded"])
        checks.exact(f"{name} text", [reasoning_text(parts.tokenizer, plan, tokens, parts.generation.drop_think)],
                     meta["cot_text"])


def processors(case: Case, stage: str, checks: Checks) -> None:
    """The stage's own small vocabulary: transitions {5: [9, 7, 11], 6: []}, slice after 11 to 20..24 and 30, 31."""
    tensors = case.tensors(stage)
    transitions, ratio = StageTransitions({5: [9, 7, 11], 6: []}), RatioSlice(11, (*range(20, 25), *range(30, 32)))
    for step, (last,) in enumerate(tensors["last_tokens"].tolist()):
        scores_BV = tensors["scores"][step]
        checks.close(f"step {step} transitions", transitions(last, scores_BV), tensors["stage_out"][step], (0.0, 0.0))
        checks.close(f"step {step} slice", ratio(last, scores_BV), tensors["slice_out"][step], (0.0, 0.0))


def filters(case: Case, stage: str, checks: Checks) -> None:
    """Temperature 0.6, then top-k, then top-p as the names of the outputs say."""
    tensors = case.tensors(stage)
    for name, want in tensors.items():
        if name.startswith("out_k"):
            top_k, top_p = name.removeprefix("out_k").split("_p")
            got = filter_scores(tensors["logits"], Sampling(0.6, int(top_k), int(top_p) / 10 ** len(top_p)))
            checks.exact(f"{name} filtered", got.isinf(), want.isinf())
            checks.close(name, got.masked_fill(got.isinf(), 0.0), want.masked_fill(want.isinf(), 0.0))


STAGES = {"g_chat_template": chat_template, "h2_cot": thinking, "h3_processors": processors, "h4_sampling": filters}
