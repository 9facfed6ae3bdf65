"""Kernels and host time of one decoder layer with a LoRA, against a straightforward loop over experts.

``python -m comfyui_hywu.benchmarks.layer_ops [--tokens 128]``: small widths, so that launches and not arithmetic are counted.
All arms run in this process, interleaved, with the same weights; the loop is what a first implementation of spec section 3
looks like: for every expert a mask over all tokens, the projections, and the LoRA's products added. ``reference`` sorts the
tokens by expert, and ``without LoRA`` is ours with nothing attached.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..hywu_core.backbone.layer import DecoderLayer
from ..hywu_core.backbone.rope import positions, table
from ..hywu_core.config import BackboneConfig
from ..kernels import experts, reference
from ..kernels.reference import Adapter
from .record import record

MEMORY = ("empty", "new_empty")  # hands out memory and computes nothing
VIEWS = ("view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "split", "slice", "select", "t.", "chunk",
         "detach", "alias", "as_strided", "unbind", "_unsafe_view", "split_with_sizes")


class CountOps(TorchDispatchMode):
    """Counts the aten operators that compute or copy while the block runs; views and reads of single values apart."""

    def __init__(self):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.views = self.syncs = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function).removeprefix("aten.")
        if name.startswith(("_local_scalar_dense", "item")):
            self.syncs += 1
        elif name.startswith(VIEWS):
            self.views += 1
        elif not name.startswith(MEMORY):
            self.kernels[name] += 1
        return function(*arguments, **(keywords or {}))


def loop_expert_mlp(x_TD, gate_and_up_EFD, down_EDF, expert_TK, weight_TK, up=None, gate=None, down=None):
    """The same mathematics as ``reference.expert_mlp``, one expert after the other over a mask of all tokens."""
    up, gate, down = (each and each.folded() for each in (up, gate, down))
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate_and_up_EFD.shape[0]):
        token, choice = torch.where(expert_TK == expert)
        x = x_TD[token]
        a, b = (x @ gate_and_up_EFD[expert].T).chunk(2, dim=-1)
        if up is not None:
            a = a + (x @ up.a[expert].T) @ up.b[expert].T
            b = b + (x @ gate.a[expert].T) @ gate.b[expert].T
        hidden = a * F.silu(b)
        y = hidden @ down_EDF[expert].T
        if down is not None:
            y = y + (hidden @ down.a[expert].T) @ down.b[expert].T
        out_TD.index_add_(0, token, y * weight_TK[token, choice].unsqueeze(-1))
    return out_TD


def at_once(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """It takes all tokens at once, however many it is told to."""
    return lambda *arguments, at_once=None, **adapters: function(*arguments, **adapters)


def layer_config(width: int, experts: int) -> BackboneConfig:
    """A one-layer backbone with the published proportions: 64 experts, 8 a token, grouped heads."""
    return BackboneConfig(
        vocab_size=8, hidden_size=width, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        attention_head_dim=width // 8, num_experts=experts, moe_topk=(8,), moe_intermediate_size=(width * 3 // 4,),
        num_shared_expert=(1,), intermediate_size=width * 3 // 4, moe_layer_num_skipped=0, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope_theta=1e4, patch_embed_hidden_dim=32, image_base_size=1024,
        cond_token_attn_type="joint_full", cfg_distilled=False, use_meanflow=False, vae=None, vit={})


def build(config: BackboneConfig, rank: int) -> DecoderLayer:
    """A layer of random weights with a LoRA of this rank attached to every projection, of 0 for none."""
    torch.manual_seed(0)
    layer = DecoderLayer(config, 0).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.5 * parameter.shape[-1] ** -0.5)
    for module in layer.modules():
        for target in module.targets() if rank and hasattr(module, "targets") else ():
            a, b = (torch.randn(shape) * 0.05 for shape in (target.a_shape(rank), target.b_shape(rank)))
            module.attach(target.name, Adapter(a, b, torch.full((rank,), 4.0)))
    return layer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    config = layer_config(options.width, options.experts)
    layer = build(config, rank=16)
    hidden = torch.randn(1, options.tokens, options.width)
    rope = table(positions(options.tokens, []), config.attention_head_dim, config.rope_theta)
    ours = experts.expert_mlp
    arms = {"ours": ours, "without LoRA": ours, "reference": at_once(reference.expert_mlp), "loop": at_once(loop_expert_mlp)}
    plain = build(config, rank=0)
    figures, outputs, seconds = {}, {}, {name: [] for name in arms}
    try:
        for turn in range(options.rounds + 1):
            for name, function in arms.items():
                experts.expert_mlp = function
                ran = plain if name == "without LoRA" else layer
                if turn == 0:
                    ran(hidden, rope, None)  # the first time the kernels are tried out
                    with CountOps() as count:
                        outputs[name] = ran(hidden, rope, None)
                    figures[name] = {"kernels": count.kernels.total(), "views": count.views, "syncs": count.syncs}
                    continue
                started = time.perf_counter()
                ran(hidden, rope, None)
                seconds[name].append(time.perf_counter() - started)
    finally:
        experts.expert_mlp = ours
    error = float((outputs["ours"] - outputs["loop"]).abs().max() / outputs["loop"].abs().max())
    for name in arms:
        figures[name] |= {"ms_min": 1e3 * min(seconds[name]), "ms_median": 1e3 * statistics.median(seconds[name])}
        print(f"{name:12s} {figures[name]['kernels']:5d} kernels {figures[name]['views']:5d} views "
              f"{figures[name]['ms_min']:8.2f} ms (min of {options.rounds})")
    ratios = {name: figures[name]["ms_min"] / figures["ours"]["ms_min"] for name in arms}
    print(f"the loop takes {ratios['loop']:.2f} x the time, the reference {ratios['reference']:.2f} x; results differ by "
          f"{error:.1e} of the largest value")
    if options.record:
        record("layer_ops", {
            "tokens": options.tokens, "width": options.width, "experts": options.experts, "arms": figures,
            "over_ours": ratios, "relative_difference": error})


if __name__ == "__main__":
    main()
