"""What the routed experts' LoRA costs: a loop over experts with and without it, ours with and without it, and merged weights.

``python -m comfyui_hywu.benchmarks.moe_lora [--record]``: on a GPU with the published sizes in bf16 (64 experts, 8 a token,
4096 and 3072 wide, 8194 tokens and 1), on a CPU with small ones in fp32. Tokens go to the experts evenly, or skewed (most go to
one expert in eight). All arms run interleaved in this process on the same inputs, each on another layer than the one before, so
that no cache holds the weights; each figure is the smallest of the rounds. ``peak`` is one large square matrix product.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from ..hywu_core.backbone.adapted import Experts
from ..kernels import experts as ours
from ..kernels.reference import Adapter
from .layer_ops import loop_expert_mlp
from .record import record

TOP_K, RANK, SCALE = 8, 16, 4.0


def routed(tokens: int, experts: int, skewed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts (T, K), no one twice, and their weights, which sum to 1."""
    generator = torch.Generator().manual_seed(0)
    liking_TE = torch.rand(tokens, experts, generator=generator)
    if skewed:
        liking_TE[:, : experts // 8] += torch.rand(tokens, 1, generator=generator)
    expert_TK = liking_TE.topk(TOP_K, dim=-1).indices
    return expert_TK.to(device), torch.full((tokens, TOP_K), 1 / TOP_K, device=device)


class Layer:
    """Experts of random weights: with a LoRA in the room behind them, without one, and with it merged into copies."""

    def __init__(self, experts: int, width: int, inner: int, device: torch.device, dtype: torch.dtype):
        module = Experts(experts, width, inner).to(device, dtype)
        for parameter in module.parameters():
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        for target in module.targets():
            a, b = (torch.randn(shape, device=device, dtype=dtype) * 0.02
                    for shape in (target.a_shape(RANK), target.b_shape(RANK)))
            module.attach(target.name, Adapter(a, b, torch.full((RANK,), SCALE, device=device)))
        self.weights = module.gate_and_up_proj.data, module.down_proj.data
        self.lora = tuple(module.adapters[name] for name in ("w3", "w1", "w2"))
        # b holds the scale already.
        up, gate, down = (torch.bmm(each.b, each.a) for each in self.lora)
        self.merged = self.weights[0] + torch.cat((up, gate), dim=1), self.weights[1] + down


def arms(layer: Layer, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    return {
        "loop": partial(loop_expert_mlp, x, *layer.weights, expert, weight),
        "loop + LoRA": partial(loop_expert_mlp, x, *layer.weights, expert, weight, *layer.lora),
        "ours": partial(ours.expert_mlp, x, *layer.weights, expert, weight),
        "ours + LoRA": partial(ours.expert_mlp, x, *layer.weights, expert, weight, *layer.lora),
        "ours, merged": partial(ours.expert_mlp, x, *layer.merged, expert, weight)}


def seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@torch.no_grad()
def main() -> None:
    """Measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda"
    experts, width, inner, dtype = (64, 4096, 3072, torch.bfloat16) if large else (64, 256, 192, torch.float32)
    layers = [Layer(experts, width, inner, device, dtype) for _ in range(4)]
    side = 8192 if large else 1024
    square = torch.randn(side, side, device=device, dtype=dtype)
    peak = 2 * side**3 / min(seconds(lambda: square @ square, device) for _ in range(options.rounds))
    print(f"{device} {dtype}: {experts} experts, {TOP_K} a token, {width} and {inner} wide, rank {RANK}; "
          f"peak {peak / 1e12:.3f} TFLOP/s")
    figures = {"experts": experts, "width": width, "inner": inner, "dtype": str(dtype), "peak_tflops": peak / 1e12, "cases": {}}
    for tokens in ((8194, 1) if large else (1024, 1)):
        for skewed in (False, True):
            x = torch.randn(tokens, width, device=device, dtype=dtype)
            expert, weight = routed(tokens, experts, skewed, device)
            best: dict[str, float] = {}
            wanted = arms(layers[0], x, expert, weight)["loop + LoRA"]().float()
            got = arms(layers[0], x, expert, weight)["ours + LoRA"]().float()
            error = float((got - wanted).abs().max() / wanted.abs().max())
            for turn in range(options.rounds + 1):
                for number, name in enumerate(arms(layers[0], x, expert, weight)):
                    taken = seconds(arms(layers[(turn + number) % len(layers)], x, expert, weight)[name], device)
                    if turn:  # the first one warms up
                        best[name] = min(taken, best.get(name, taken))
            useful = 2 * tokens * TOP_K * 3 * width * inner
            case = f"{tokens} tokens, {'skewed' if skewed else 'even'}"
            figures["cases"][case] = {
                "ms": {name: 1e3 * value for name, value in best.items()},
                "lora_over_ours": best["ours + LoRA"] / best["ours"],
                "loop_lora_over_ours_lora": best["loop + LoRA"] / best["ours + LoRA"],
                "over_merged": best["ours + LoRA"] / best["ours, merged"], "share_of_peak": useful / best["ours + LoRA"] / peak,
                "relative_error": error}
            of = figures["cases"][case]
            print(f"{case:24s}" + "  ".join(f"{name} {1e3 * value:.2f} ms" for name, value in best.items()))
            print(f"{'':24s}LoRA {of['lora_over_ours']:.3f} x ours without, {of['over_merged']:.3f} x merged; the loop with "
                  f"LoRA {of['loop_lora_over_ours_lora']:.2f} x ours; {of['share_of_peak']:.0%} of peak; error {error:.1e}")
    if not large:
        print("the published sizes on a GPU: not measured, there is none here")
    if options.record:
        record("moe_lora", figures)


if __name__ == "__main__":
    main()
