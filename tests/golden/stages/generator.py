"""Golden stages of the generator: parameter tokens, rotary tables, the blocks from inside, and the LoRA that comes out."""

import re
from types import SimpleNamespace

import torch
from comfyui_hywu.hywu_core.generator.handle import write_lora
from comfyui_hywu.hywu_core.generator.tokens import detokenise_layer, tokenise_layer

from ..case import Case
from ..checks import Checks


def param_tokenizer(case: Case, stage: str, checks: Checks) -> None:
    """One layer's matrices to tokens and back; the unused tails are NaN on the way out and ignored on the way in."""
    golden, meta = case.tensors(stage), case.meta(stage)
    config, layout = case.generator.config, case.generator.model.layout
    spans = [[span.name, list(span.shape)] for span in layout.spans]
    checks.exact("key_order", spans, meta["key_order"])
    checks.exact("lora_A_token_count", layout.num_a_tokens, meta["lora_A_token_count"])
    checks.exact("lora_B_token_count", layout.num_tokens - layout.num_a_tokens, meta["lora_B_token_count"])
    checks.exact("token_size", [layout.rank, layout.token_dim], meta["token_size"])
    # The reference counts what all layers' tokens can hold, unused tails included.
    held = config.num_base_model_layers * layout.num_tokens * layout.rank * layout.token_dim
    checks.exact("lora_count", held, meta["lora_count"])
    checks.exact("scale", config.scale, meta["scale"])
    matrices = {name.removeprefix("in."): tensor for name, tensor in golden.items() if name.startswith("in.")}
    tokens_BPRC = tokenise_layer(matrices, layout)
    checks.close("tokens", tokens_BPRC, golden["tokens"], (0.0, 0.0))
    for name, matrix in detokenise_layer(tokens_BPRC.nan_to_num(7.0), layout).items():
        checks.exact(f"out.{name}", matrix, golden[f"out.{name}"])


def freqs(case: Case, stage: str, checks: Checks) -> None:
    """The four rotary tables, as the reference's rotation matrices, for its condition of 23 tokens."""
    golden = case.tensors(stage)
    positions = case.generator.model.model.positions(golden["l_freqs"].shape[2], torch.device("cpu"))
    tables = {"hw": positions.row, "n": positions.layers, "l": positions.condition, "all": positions.tokens}
    for name, (cos, sin) in tables.items():
        matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))[None, None]
        checks.close(f"{name}_freqs", matrices, golden[f"{name}_freqs"])


def generator(case: Case, stage: str, checks: Checks) -> None:
    """One run with hooks on every module whose input or output the case holds."""
    golden, condition_BSD = case.tensors(stage), _condition(case, stage)
    seen: dict[str, torch.Tensor] = {"condition": condition_BSD}
    hooks = [_watch(case.generator.model, name, seen) for name in golden if name not in ("condition", "raw_tokens.out")]
    try:
        seen["raw_tokens.out"] = case.generator.model(condition_BSD)
    finally:
        for hook in hooks:
            hook.remove()
    for name in golden:
        checks.close(name, seen[name], golden[name])


def _condition(case: Case, stage: str) -> torch.Tensor:
    """The "real" condition is the one of the whole k_fixed_lora run, the random one lies in the stage itself."""
    return case.tensors("k_fixed_lora" if stage.endswith("_real") else stage)["condition"]


def _watch(model: torch.nn.Module, name: str, seen: dict[str, torch.Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Keep what goes into or comes out of the module that ``block0.self_attn_n.in`` and the like name."""
    path, end = name.rsplit(".", 1)
    path = re.sub(r"^block(\d+)", r"blocks.\1", path)
    module = model.get_submodule(path if path == "hidden_in" else f"model.{path}")

    def keep(_, inputs, output):
        # A copy: without gradients a block may write over its input.
        seen[name] = (inputs[0] if end == "in" else output).clone()

    return module.register_forward_hook(keep)


def pg_state(case: Case, stage: str, checks: Checks) -> None:
    """The whole step as the product runs it, against the reference's LoRA dict: order, shapes, values, scale."""
    golden = case.tensors(stage)
    condition = SimpleNamespace(
        hidden_SD=_condition(case, stage.replace("pg_state", "generator"))[0], backbone_fingerprint="", instruction="",
        thinking="", picture_digests=(), seed=0)
    lora = write_lora(case.generator, condition)
    checks.exact("order", [*lora.tensors, "scale"], case.meta(stage)["order"])
    checks.exact("scale", torch.tensor(lora.scale, dtype=golden["scale"].dtype), golden["scale"])
    for key, tensor in lora.tensors.items():
        checks.close(key, tensor[None], golden[key])


STAGES = {
    "a_param_tokenizer": param_tokenizer, "b_freqs": freqs, "b_generator": generator, "b_pg_state": pg_state}
