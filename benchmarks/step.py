"""Eight decoder layers at prefill, denoise step and decode token, thinking, and whole edits: ours and a first implementation.

``python -m comfyui_hywu.benchmarks.step [--record]``: on a GPU eight layers of the published sizes in bf16; on a CPU
scaled-down ones in fp32 (``SMALL``), then the bundled checkpoint and a middle-sized one of random weights (``MIDDLE``). All
arms run interleaved in this process with the same weights; each figure is the smallest of the rounds. ``loop`` is
what a first implementation of spec sections 2 to 4 looks like (``first.py``).

The floor is max(operations / peak, bytes / bandwidth) of the useful work without a LoRA, at rates measured in this run. Kernels
are aten operators on a CPU, launches and copies on a GPU. With one thread on a CPU processor time is taken.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import date
from types import SimpleNamespace
from typing import NamedTuple

import torch
from PIL import Image

from ..hywu_core import think as thinking_module
from ..hywu_core.backbone.mask import CanvasSight, attention_mask
from ..hywu_core.backbone.model import Backbone
from ..hywu_core.backbone.pictures import posterior_noise
from ..hywu_core.backbone.rope import positions, table
from ..hywu_core.backbone.token_graph import waits
from ..hywu_core.condition import encode, encode_pictures, fit_pictures
from ..hywu_core.config import BackboneConfig
from ..hywu_core.edit import decode
from ..hywu_core.generator.handle import GeneratorHandle, load_generator, write_lora
from ..hywu_core.handle import ModelHandle, load_model
from ..hywu_core.json_fields import read_json
from ..hywu_core.lora.attach import inject
from ..hywu_core.sampling.denoise import sample
from ..hywu_core.text.template import Sequence
from ..hywu_core.think import think
from ..hywu_core.training.recipe import GeneratorSizes, Sizes
from . import generator as generator_benchmark
from .edit import ROOT, THINKING
from .first import CatCache, armed, random_backbone, random_lora, sized
from .layer_ops import CountOps
from .load import CONFIG
from .moe_lora import RANK, SCALE
from .moe_lora import seconds as seconds_of
from .record import record

MINI = ROOT / "models" / "hywu-mini"
SMALL = Sizes(hidden=512, layers=8, heads=8, kv_heads=2, head_dim=64, experts=64, top_k=8, expert_width=384, shared=1)
MIDDLE = Sizes(hidden=1024, layers=4, heads=8, kv_heads=2, head_dim=128, experts=64, top_k=8, expert_width=768, shared=1,
               base_size=512)
MIDDLE_GENERATOR = GeneratorSizes(width=512, head_dim=64, blocks=2, token_dim=1024, rank=RANK, alpha=int(RANK * SCALE))
LENGTHS = {"cuda": (7400, 64), "cpu": (512, 16)}  # tokens of the prompt, and the sides of the canvas, of which there are ROWS
ROWS = 2
ARMS = {"ours + LoRA": (True, False), "ours": (False, False), "loop + LoRA": (True, True)}  # LoRA? straightforward?
NOT_MEASURED = "not measured"


def clock() -> float:
    return time.process_time() if not torch.cuda.is_available() and torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        return seconds_of(run, device)
    started = clock()
    run()
    return clock() - started


class Rates(NamedTuple):
    """Operations and bytes a second of one large matrix product, and of the better of a matrix-vector product and a copy."""

    peak: float
    bandwidth: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, rounds: int) -> "Rates":
        side, wide = (8192, 32768) if device.type == "cuda" else (1024, 8192)
        square, large = (torch.randn(size, size, device=device, dtype=dtype) for size in (side, wide))
        vector, other = torch.randn(wide, device=device, dtype=dtype), torch.empty_like(large)

        def best(run: Callable) -> float:
            return min(seconds(run, device) for _ in range(rounds + 2))

        return cls(2 * side**3 / best(lambda: square @ square),
                   max(large.nbytes / best(lambda: large @ vector), 2 * large.nbytes / best(lambda: other.copy_(large))))

    def floor(self, backbone: Backbone, tokens: int, pairs: int, keys: int, scores: int = 0) -> tuple[float, str]:
        """Seconds of ``tokens`` through all layers, and what binds.

        pairs: of a query and a key that it sees. keys: that are read, of all rows. scores: rows that get scores.
        """
        config, layers = backbone.config, backbone.config.num_hidden_layers
        queries, width = config.num_attention_heads * config.attention_head_dim, config.hidden_size
        kv, top_k = config.num_key_value_heads * config.attention_head_dim, config.moe_topk[0]
        expert = 3 * width * config.moe_intermediate_size[0]
        dense = width * (2 * queries + 2 * kv + config.num_experts) + config.num_shared_expert[0] * expert
        head = width * config.vocab_size if scores else 0
        operations = layers * (2 * tokens * (dense + top_k * expert) + 4 * pairs * queries) + 2 * scores * head
        values = layers * (dense + min(config.num_experts, tokens * top_k) * expert + 2 * keys * kv) + head
        work, way = operations / self.peak, values * backbone.dtype.itemsize / self.bandwidth
        return max(work, way), "peak" if work > way else "bandwidth"


class Stage(NamedTuple):
    """One kind of pass: ``run`` by whether it is the first implementation's way, and its floor with what binds it."""

    run: dict[bool, Callable[[], torch.Tensor]]
    floor: float
    bound: str


@torch.no_grad()
def stages(backbone: Backbone, rates: Rates, prompt: int, side: int) -> dict[str, Stage]:
    """Prefill of ``prompt`` tokens, a denoise step of ROWS canvases behind them, and a token of text behind them."""
    config, device, dtype = backbone.config, backbone.device, backbone.dtype
    grid = int((prompt // 2) ** 0.5)
    source, canvas = (prompt // 4, prompt // 4 + grid**2), 1 + side**2
    length = prompt + canvas
    yx_L2 = positions(length, [(source, (grid, grid)), ((prompt + 1, length), (side, side))])
    cos_LQ, sin_LQ = (part.to(device) for part in table(yx_L2, config.attention_head_dim, config.rope_theta))
    mask_LL = attention_mask(length, [source, (prompt + 1, length)]).to(device)
    noise = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, device=device, dtype=dtype)

    def filled(rows: int, used: int) -> list:
        caches = backbone.new_cache(rows, length)
        shape = rows, config.num_key_value_heads, used, config.attention_head_dim
        for cache in caches:
            cache.reserve(used)
            for layer in range(config.num_hidden_layers):
                cache.write(layer, random(*shape), random(*shape), torch.arange(used, device=device))
        return caches

    def part(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return cos_LQ[start:stop], sin_LQ[start:stop]

    words, empty = random(1, prompt, config.hidden_size), backbone.new_cache(1, prompt)
    canvases, full, places = random(ROWS, canvas, config.hidden_size), filled(ROWS, length), torch.arange(prompt, length)
    tokens, before, place = random(8, 1, 1, config.hidden_size), filled(1, prompt), torch.tensor([prompt])
    turns = {straight: itertools.cycle(tokens) for straight in (False, True)}  # other experts every time
    sight = CanvasSight.of(prompt, (prompt + 1, length)).to(device)
    kept = [{layer: before[0].layer(layer)[side].clone() for layer in range(config.num_hidden_layers)} for side in (0, 1)]

    def prefill() -> torch.Tensor:
        return backbone.run(words, part(0, prompt), mask_LL[:prompt, :prompt], empty)

    def denoise(seen) -> torch.Tensor:
        return backbone.run(canvases, part(prompt, length), seen, full, places)

    def token(straight: bool) -> torch.Tensor:
        caches = [CatCache(*kept)] if straight else before
        return backbone.logits(backbone.run(next(turns[straight]), part(prompt, prompt + 1), None, caches, place))

    return {
        f"prefill, {prompt} tokens": Stage(
            dict.fromkeys((False, True), prefill), *rates.floor(backbone, prompt, int(mask_LL[:prompt, :prompt].sum()), 0)),
        f"denoise, {ROWS} x {canvas} of {length}": Stage(
            {False: lambda: denoise(sight), True: lambda: denoise(mask_LL[prompt:])},
            *rates.floor(backbone, ROWS * canvas, ROWS * canvas * length, ROWS * length)),
        f"decode, token {prompt + 1}": Stage(
            {straight: lambda straight=straight: token(straight) for straight in (False, True)},
            *rates.floor(backbone, 1, prompt + 1, prompt + 1, scores=1))}


def launches(run: Callable, device: torch.device) -> tuple[int, int | str]:
    """Kernels of one run, and how often it waits for the device."""
    if device.type != "cuda":
        with CountOps() as count:
            run()
        return count.kernels.total(), NOT_MEASURED
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
    return kernels, waits(run)


@torch.no_grad()
def layers(backbone: Backbone, rates: Rates, prompt: int, side: int, rounds: int) -> dict[str, dict]:
    """Kernels, waits, time and share of the floor of each stage and arm, and how far the loop's result is from ours."""
    lora, device, figures = random_lora(backbone), backbone.device, {}
    for name, stage in stages(backbone, rates, prompt, side).items():
        best, outputs, of = {}, {}, {}
        for turn in range(rounds + 1):
            for arm, (worn, straight) in ARMS.items():
                with armed(backbone, lora if worn else None, straight):
                    run = stage.run[straight]
                    if turn:
                        best[arm] = min(best.get(arm, float("inf")), seconds(run, device))
                        continue
                    outputs[arm] = run().float()  # and warms up
                    kernels, waits = launches(run, device)
                    of[arm] = {"kernels_a_layer": kernels / backbone.config.num_hidden_layers, "syncs": waits}
        wanted = outputs["loop + LoRA"]
        for arm, value in best.items():
            of[arm] |= {"ms": 1e3 * value, "over_ours_lora": value / best["ours + LoRA"], "share_of_floor": stage.floor / value}
        figures[name] = {"floor_ms": 1e3 * stage.floor, "bound_by": stage.bound, "arms": of, "relative_difference": float(
            (outputs["ours + LoRA"] - wanted).norm() / wanted.norm())}
    return figures


# ---- thinking and whole edits


@torch.no_grad()
def thinking(backbone: Backbone, rates: Rates, prompt: int, tokens: int, rounds: int) -> dict:
    """Tokens a second behind a prompt, without a LoRA, the same ids in both arms; each is waited for."""
    ids = torch.randint(backbone.config.vocab_size, (1, prompt + tokens), generator=torch.Generator().manual_seed(2))
    sequence, arms, scores = Sequence(ids[:, :prompt]), {}, {}
    for _, (name, straight) in itertools.product(range(rounds), (("ours", False), ("loop", True))):
        with armed(backbone, None, straight):
            run = thinking_module.Continuation(SimpleNamespace(backbone=backbone), sequence, ())
            times = [clock()]
            for new in ([], *ids[0, prompt:, None].tolist()):
                scores[name] = run(new)
                int(scores[name].argmax())
                times.append(clock())
        found = {"prompt_s": times[1] - times[0], "token_s": (times[-1] - times[1]) / tokens}
        arms[name] = {key: min(value, arms.get(name, found)[key]) for key, value in found.items()}
    floor, bound = rates.floor(backbone, 1, prompt + tokens // 2, prompt + tokens // 2, scores=1)
    for each in arms.values():
        each |= {"tokens_a_second": 1 / each["token_s"], "share_of_floor": floor / each["token_s"]}
    return {"prompt": prompt, "tokens": tokens, "floor_s": floor, "bound_by": bound, "arms": arms,
            "speed_over_loop": arms["loop"]["token_s"] / arms["ours"]["token_s"],
            "prompt_speed_over_loop": arms["loop"]["prompt_s"] / arms["ours"]["prompt_s"],
            "relative_difference": float((scores["ours"] - scores["loop"]).norm() / scores["loop"].norm())}


def middle(mini: ModelHandle, sizes: Sizes, written_by: GeneratorSizes) -> tuple[ModelHandle, GeneratorHandle]:
    """Random weights of another size behind the bundled checkpoint's texts, towers and VAE layout, and a generator for them."""
    config, device = sized(mini.config, sizes), mini.backbone.device
    backbone = random_backbone(config, device, mini.backbone.dtype)
    network = generator_benchmark.build(sizes, written_by, device, mini.backbone.dtype)
    for head in (network.model.proj_out_A, network.model.proj_out_B):
        head.weight.data.mul_(0.02)  # a LoRA that does not drown the weights
    fingerprint = f"random-{sizes.hidden}"
    return (replace(mini, placed=SimpleNamespace(backbone=backbone), config=config, fingerprint=fingerprint),
            GeneratorHandle(network, network.model.config, fingerprint, device=device))


def whole_edit(model: ModelHandle, generator: GeneratorHandle, picture: Image.Image, rounds: int) -> dict:
    """An edit stage by stage, ours and the loop's way; the latter also with what the published pipeline does repeatedly."""
    arms: dict[str, dict[str, float]] = {"ours": {}, "loop": {}}
    latents, text = {}, "make it brighter"

    def timed(name: str, stage: str, run: Callable):
        started = clock()
        result = run()
        arms[name][stage] = min(clock() - started, arms[name].get(stage, float("inf")))
        return result

    for _, name in itertools.product(range(rounds), arms):
        with armed(model.backbone, None, straight=name == "loop"):
            timed(name, "think", lambda: think(model, [picture], text, temperature=0.0))
            condition = timed(name, "encode", lambda: encode(model, [picture], text, THINKING))
            lora = timed(name, "generate", lambda condition=condition: write_lora(generator, condition))
            latents[name] = timed(name, "sample", lambda condition=condition, lora=lora: sample(
                inject(model, lora), condition, size="1:1"))
            timed(name, "decode", lambda latent=latents[name]: decode(model, latent))
    with torch.no_grad():
        sources = fit_pictures(model, [picture], "stretch")
        noise = posterior_noise(model.config.vae, sources, 0)
        for _ in range(rounds):
            timed("loop", "pictures", lambda: encode_pictures(model, sources, noise, 1, lambda *_: None))
    pictures = arms["loop"].pop("pictures")
    total = {name: sum(stages.values()) for name, stages in arms.items()}
    repeated = total["loop"] + arms["loop"]["encode"] + pictures
    return {
        "seconds": arms, "pictures_s": pictures, "total": total, "total_loop_passes_repeated": repeated,
        "speed_over_loop": total["loop"] / total["ours"], "speed_over_loop_passes_repeated": repeated / total["ours"],
        "stage_speed_over_loop": {stage: arms["loop"][stage] / value for stage, value in arms["ours"].items()},
        "relative_difference": float((latents["ours"] - latents["loop"]).norm() / latents["loop"].norm())}


def table_of_layers(figures: dict[str, dict]) -> Iterator[str]:
    for stage, of in figures.items():
        yield f"{stage}: floor {of['floor_ms']:.2f} ms ({of['bound_by']}); results differ by {of['relative_difference']:.1e}"
        for arm, value in of["arms"].items():
            yield (f"  {arm:12s}{value['kernels_a_layer']:7.1f} kernels a layer, syncs {value['syncs']},{value['ms']:9.2f} ms,"
                   f"{value['over_ours_lora']:5.2f} x ours + LoRA,{value['share_of_floor']:5.0%} of the floor")


def main() -> None:
    """Measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = device.type == "cuda"
    dtype, (prompt, side) = torch.bfloat16 if large else torch.float32, LENGTHS[device.type]
    mini = load_model(MINI / "backbone", device=device, dtype=torch.float32)
    rates = Rates.measured(device, dtype, options.rounds)
    if large:
        config = replace(BackboneConfig.from_dict(read_json(CONFIG)), num_hidden_layers=8)
    else:
        config = sized(mini.config, SMALL, vocab_size=16_640)
    print(f"{device} {dtype}: peak {rates.peak / 1e12:.3f} TFLOP/s, {rates.bandwidth / 1e9:.1f} GB/s; 8 layers, "
          f"{config.hidden_size} and {config.moe_intermediate_size[0]} wide, {config.num_experts} experts, "
          f"{config.moe_topk[0]} a token" + ("" if large else ": scaled down"))
    backbone = random_backbone(config, device, dtype)
    figures = {"date": date.today().isoformat(), "device": str(device), "dtype": str(dtype),
               "clock": "processor" if not large and torch.get_num_threads() == 1 else "wall", "peak_tflops": rates.peak / 1e12,
               "bandwidth_gbs": rates.bandwidth / 1e9, "published_sizes_on_a_gpu": "measured" if large else NOT_MEASURED,
               "layers": {"layers": 8, "width": config.hidden_size, "inner": config.moe_intermediate_size[0],
                          "experts": config.num_experts, "top_k": config.moe_topk[0], "rank": RANK},
               "middle": asdict(MIDDLE),
               "stages": layers(backbone, rates, prompt, side, options.rounds)}
    print(*table_of_layers(figures["stages"]), sep="\n")
    few = max(2, options.rounds // 2)
    figures["thinking"] = {"8 layers": thinking(backbone, rates, prompt, 32, few)}
    del backbone
    picture = Image.open(ROOT / "tests" / "data" / "photo.jpg")
    generator = load_generator(MINI / "generator", device=device, dtype=torch.float32)
    mini_rates = rates if not large else Rates.measured(device, torch.float32, options.rounds)
    figures["thinking"]["hywu-mini"] = thinking(mini.backbone, mini_rates, 512, 32, options.rounds)
    figures["edits"] = {"hywu-mini": whole_edit(mini, generator, picture, options.rounds)}
    model, generator = middle(mini, MIDDLE, MIDDLE_GENERATOR)
    figures["thinking"]["middle"] = thinking(model.backbone, mini_rates, 512, 32, few)
    figures["edits"]["middle"] = whole_edit(model, generator, picture, few)
    for name, of in figures["thinking"].items():
        ours, loop = of["arms"]["ours"], of["arms"]["loop"]
        print(f"thinking, {name}: {ours['tokens_a_second']:.1f} tokens/s, the loop {loop['tokens_a_second']:.1f}: "
              f"{of['speed_over_loop']:.2f} x (its prompt {of['prompt_speed_over_loop']:.2f} x); "
              f"{ours['share_of_floor']:.0%} and {loop['share_of_floor']:.0%} of the floor")
    for name, of in figures["edits"].items():
        stages = ", ".join(f"{stage} {value:.3f} s / {of['stage_speed_over_loop'][stage]:.2f} x"
                           for stage, value in of["seconds"]["ours"].items())
        print(f"edit, {name}: {of['total']['ours']:.2f} s, the loop {of['total']['loop']:.2f}: {of['speed_over_loop']:.2f} x; "
              f"passes repeated {of['speed_over_loop_passes_repeated']:.2f} x; latents differ by "
              f"{of['relative_difference']:.1e}; by stage: {stages}")
    if not large:
        print("the published sizes on a GPU, and waits for it: not measured, there is none here")
    if options.record:
        record("step", figures)


if __name__ == "__main__":
    main()
