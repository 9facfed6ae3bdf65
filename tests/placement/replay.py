"""Plays a plan through on ``meta``, phase by phase, and counts the bytes of every tensor that would lie on each device.

The second opinion on ``placement``'s arithmetic: slabs come from ``slab.py``, caches from ``Stage``, the LoRA from attaching
one, and every step of an edit is the real module's forward pass. Nothing of ``sizes.py``, ``activations.py`` or ``memory.py``
is used.
"""

from dataclasses import replace

import torch
from comfyui_hywu.hywu_core.backbone.adapted import Experts
from comfyui_hywu.hywu_core.backbone.mask import CanvasSight
from comfyui_hywu.hywu_core.backbone.stage import Stage
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.handle import build_backbone
from comfyui_hywu.hywu_core.placement.plan import Plan, StagePlan
from comfyui_hywu.hywu_core.placement.slab import adapted_modules, compute_layout, stored_layout
from comfyui_hywu.kernels.reference import Adapter
from torch import nn

from .live import counted

RANK = 16


class Replay:
    """The modules of one checkpoint on ``meta``, on which plans for it are played."""

    def __init__(self, config: BackboneConfig, generator: GeneratorConfig, dtype: torch.dtype = torch.bfloat16):
        self.config, self.dtype = config, dtype
        self.backbone = build_backbone(config, dtype)
        # One block, because they work one after the other; of the others only the weights count.
        with torch.device("meta"):
            self.generator = ParameterGenerator(replace(generator, num_pg_layers=1)).to(dtype)
        self.blocks = generator.num_pg_layers
        self.parts = {
            "wte": [self.backbone.model.wte], "lm_head": [self.backbone.lm_head], "vae": [self.backbone.vae],
            "vision": [self.backbone.vision_model, self.backbone.vision_aligner],
            "small": [module for name, module in self.backbone.named_children()
                      if name not in ("model", "lm_head", "vae", "vision_model", "vision_aligner")]}

    def peaks(self, plan: Plan) -> dict[str, dict[str, int]]:
        """Device -> phase -> the most that was alive in it."""
        found: dict[str, dict[str, int]] = {}
        devices = dict.fromkeys((*(stage.device for stage in plan.stages), plan.home))
        if plan.generator:
            devices[plan.generator.device] = None
        for device in devices:
            stage = next((stage for stage in plan.stages if stage.device == device), None)
            found[device] = _Device(self, plan, device, stage).phases()
        return found

    def ram(self, plan: Plan) -> int:
        """What the computer's memory holds beside GPUs: what waits there, the LoRA as a value, and the process."""
        with counted() as live:
            held = [_bytes(2_500_000_000), torch.empty(self.lora_values(), dtype=self.dtype, device="meta")]
            for stage in plan.stages:
                if stage.streamed_from == "ram":
                    held += [_bytes(stored_layout(self.backbone.model.layers[number], self.dtype, RANK, plan.format).nbytes)
                             for number in stage.streamed]
            # Layers that come, or are unpacked, for their turn: their part of the LoRA waits in pinned memory.
            absent = range(len(self.backbone.model.layers)) if plan.format != "bf16" else [
                number for stage in plan.stages for number in stage.streamed]
            held += [torch.empty(shape, dtype=self.dtype, device="meta") for number in absent
                     for _, module in adapted_modules(self.backbone.model.layers[number]) for target in module.targets()
                     for shape in (target.a_shape(RANK), target.b_shape(RANK))]
            held += [each for name, place in plan.places.items() if place == "cpu" for each in _copies(*self.parts[name])]
            if plan.generator.mode != "resident" and plan.generator.kept == "ram":
                held += self.generator_weights(self.blocks)
            return live.now if held else 0

    def generator_weights(self, blocks: int) -> list[torch.Tensor]:
        """Of so many blocks and of everything around them."""
        model = self.generator
        block = [torch.empty_like(each) for _ in range(blocks) for each in model.model.blocks[0].parameters()]
        return block + [torch.empty_like(each) for name, each in model.named_parameters() if ".blocks." not in name]

    def lora_values(self) -> int:
        return self.generator.layout.num_values * self.config.num_hidden_layers


class _Device:
    """One device of a plan."""

    def __init__(self, replay: Replay, plan: Plan, device: str, stage: StagePlan | None):
        self.replay, self.plan, self.device, self.part = replay, plan, device, stage
        self.lengths, self.rows, self.home = plan.lengths, plan.request.rows, device == plan.home
        self.on_cpu = device == "cpu"
        self.layers = [] if stage is None else list(replay.backbone.model.layers[stage.first : stage.first + stage.layers])
        self.stage = Stage(self.layers, stage.first) if stage else None
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, Experts):
                    module.tokens_at_once = plan.expert_tokens

    def phases(self) -> dict[str, int]:
        plan, found = self.plan, {}
        if self.home and plan.request.pictures:
            found["pictures"] = self._count(self._pictures, buffers=False)
        if self.layers:
            if plan.request.thinking:
                found["read"] = self._count(lambda: self._prefill(self.lengths.prompt, cached=True))
                found["think"] = self._count(self._thinking)
            found["encode"] = self._count(lambda: self._prefill(self.lengths.condition, cached=False))
            found["denoise"] = self._count(self._denoise)
        if plan.generator and plan.generator.device == self.device:
            found["generate"] = self._count(self._generate, buffers=False)
        if self.home:
            found["decode"] = self._count(self._decode, buffers=False)
        return found

    def _count(self, phase, buffers: bool = True) -> int:
        with counted(fused=not self.on_cpu) as live:
            weights = self._weights(buffers)
            phase()
            del weights
            return live.peak

    # ---- weights

    def _weights(self, buffers: bool) -> list[torch.Tensor]:
        """Everything that stays, and the ring and the compute buffer while layers run."""
        plan, tensors = self.plan, []
        for number, layer in enumerate(self.layers):
            adapted = {f"{path}.{weight}" for path, module in adapted_modules(layer) for weight in module.ROOMS}
            tensors += [torch.empty_like(each) for name, each in layer.named_parameters() if name not in adapted]
            if self.part.first + number not in self.part.streamed:
                tensors.append(_bytes(stored_layout(layer, self.replay.dtype, RANK, plan.format).nbytes))
        if self.layers and buffers:
            stored = stored_layout(self.layers[0], self.replay.dtype, RANK, plan.format)
            tensors += [_bytes(stored.nbytes) for _ in range(self.part.ring)]
            if self.part.compute_buffer:
                tensors.append(_bytes(compute_layout(self.layers[0], self.replay.dtype, RANK).nbytes))
        for name, place in plan.places.items():
            if place == self.device and name not in plan.visits:
                tensors += _copies(*self.replay.parts[name])
                if name == "small":
                    tensors += _copies(self.replay.backbone.model.ln_f)
        if plan.generator and plan.generator.mode == "resident" and plan.generator.device == self.device:
            tensors += self.replay.generator_weights(self.replay.blocks)
        if self.on_cpu:
            tensors += [_bytes(2_500_000_000), torch.empty(self.replay.lora_values(), dtype=self.replay.dtype, device="meta")]
        return tensors

    def _visitor(self, name: str) -> list[torch.Tensor]:
        return _copies(*self.replay.parts[name]) if name in self.plan.visits or self.plan.places[name] == "disk" else []

    # ---- steps

    def _states(self, rows: int, length: int) -> torch.Tensor:
        return torch.empty(rows, length, self.replay.config.hidden_size, dtype=self.replay.dtype, device="meta")

    def _sources(self) -> list[torch.Tensor]:
        vit = self.replay.config.vit_max_num_patches
        return [self._states(1, tokens) for _ in range(self.plan.request.pictures) for tokens in (self.lengths.cells, vit)]

    def _pictures(self) -> None:
        backbone, lengths, held = self.replay.backbone, self.lengths, []
        for _ in range(self.plan.request.pictures):
            if self.plan.places["vae"] in (self.device, "disk") or "vae" in self.plan.visits:
                visitor = self._visitor("vae")
                pixels = torch.empty(1, 3, lengths.height, lengths.width, dtype=self.replay.dtype, device="meta")
                held.append(backbone.vae.encode(pixels).mean)
                del visitor, pixels
            held.append(backbone.patch_embed(self._latent(), self._states(1, 1)[:, 0]))
            visitor = self._visitor("vision")
            patches = torch.empty(1, self.replay.config.vit_max_num_patches, 768, dtype=self.replay.dtype, device="meta")
            mask = torch.empty(patches.shape[:2], dtype=torch.int32, device="meta")
            held.append(backbone.vision_aligner(backbone.vision_model(patches, mask, [(32, 32)])))
            del visitor

    def _latent(self) -> torch.Tensor:
        grid = (self.lengths.height // 16, self.lengths.width // 16)
        return torch.empty(1, self.replay.config.vae.latent_channels, *grid, device="meta")

    def _run(self, rows: int, length: int, mask, cache=None) -> None:
        """One layer of the stage, as the stage runs it: its input stays until it is through."""
        cos = torch.empty(length, self.replay.config.attention_head_dim, device="meta")
        positions = torch.empty(length, dtype=torch.int64, device="meta")
        one, rope = Stage(self.layers[-1:], 0), (cos, cos.clone())
        one.run(self._states(rows, length), rope, mask, cache, positions, lambda layer: None)

    def _prefill(self, length: int, cached: bool) -> None:
        held = self._sources() + [self._states(1, length)] if self.home else []
        cache = self.stage.new_cache(1, self.lengths.prompt + 256) if cached else None
        if cached:
            cache.reserve(length)
        self._run(1, length, torch.empty(length, length, dtype=torch.bool, device="meta"), cache)
        del held

    def _thinking(self) -> None:
        held = self._sources() if self.home else []
        cache = self.stage.new_cache(1, self.lengths.prompt + 256)
        for length in range(self.lengths.prompt, self.lengths.prompt + self.lengths.thought + 1):
            cache.reserve(length)
        del held

    def _denoise(self) -> None:
        lengths, rows = self.lengths, 1 if self.plan.waves else self.rows
        held = self._sources() + [self._states(1, lengths.condition)] if self.home else []
        lora = self._land()
        cache = self.stage.new_cache(self.rows, lengths.whole)
        cache.reserve(lengths.whole)
        view = cache.row(0) if self.plan.waves else cache
        tail = lengths.whole - lengths.shared
        if self.home:
            embedded = [self._states(self.rows, lengths.whole), self._states(1, lengths.canvas)]
            mask = torch.empty(lengths.whole, lengths.whole, dtype=torch.bool, device="meta")
        else:
            embedded, mask = [], torch.empty(tail, lengths.whole, dtype=torch.bool, device="meta")
        rope = torch.empty(2, lengths.whole, self.replay.config.attention_head_dim, device="meta")
        if lengths.shared:
            self._run(1, lengths.shared, mask[: lengths.shared, : lengths.shared].expand(lengths.shared, -1)
                      if self.home else torch.empty(lengths.shared, lengths.shared, dtype=torch.bool, device="meta"))
        waiting = [self._states(1, tail)] if self.plan.waves else []
        self._run(rows, tail, mask[-tail:], view)
        del embedded, mask, waiting
        # Later passes: the canvas is a row that both share.
        held += [self._states(1, lengths.canvas)] if self.home else []
        waiting = [self._states(1, lengths.canvas)] if self.plan.waves else []
        before = torch.empty(1, lengths.whole - lengths.canvas, dtype=torch.bool, device="meta")
        self._run(rows, lengths.canvas, CanvasSight(before, lengths.whole), view)
        del waiting
        if self.home:
            backbone, embedding = self.replay.backbone, self._states(self.rows, 1)[:, 0]
            backbone.patch_embed(self._latent(), embedding[:1])
            backbone.final_layer(self._states(self.rows, lengths.cells), embedding, tuple(self._latent().shape[2:]))
        del held, lora, rope
        self._take_off()

    def _land(self) -> list[torch.Tensor]:
        """The LoRA of one layer attached to it; of the others, what of theirs stays on the device beside their weights."""
        layer = self.layers[-1]
        in_place = 0 if self.part.compute_buffer else self.part.layers - len(self.part.streamed)
        others = in_place - (0 if self.part.streamed or self.part.compute_buffer else 1)
        landed, beside = [], []
        for _, module in adapted_modules(layer):
            for target in module.targets():
                a, b = (torch.empty(shape, dtype=self.replay.dtype, device="meta")
                        for shape in (target.a_shape(RANK), target.b_shape(RANK)))
                landed += [a, b]
                beside.append(a if target.name == "w2" else b)
        held = [torch.empty_like(each) for _ in range(others) for each in beside]
        if not (self.part.streamed or self.part.compute_buffer):
            landed = beside
        self._attach(layer)
        return held + landed

    def _attach(self, layer: nn.Module) -> None:
        """Adapters behind the weights of a compute slab, made outside of the count: the slabs are counted already."""
        with torch.utils._python_dispatch._disable_current_modes():
            slab = compute_layout(layer, self.replay.dtype, RANK)
            views = slab.views(_bytes(slab.nbytes))
            for path, module in adapted_modules(layer):
                module.place(views[path])
                for target in module.targets():
                    a, b = (torch.empty(shape, dtype=self.replay.dtype, device="meta")
                            for shape in (target.a_shape(RANK), target.b_shape(RANK)))
                    module.attach(target.name, Adapter(a, b, None))

    def _take_off(self) -> None:
        for _, module in adapted_modules(self.layers[-1]):
            for name in module.attached():
                module.attach(name, None)

    def _generate(self) -> None:
        generator = self.plan.generator
        visitor = {"resident": 0, "shared": self.replay.blocks, "streamed": 2}[generator.mode]
        weights = self.replay.generator_weights(visitor) if visitor else []
        condition = self._states(1, self.lengths.condition)
        written = self.replay.generator(condition)
        del weights, written

    def _decode(self) -> None:
        if self.plan.places["vae"] not in (self.device, "disk") and "vae" not in self.plan.visits:
            return
        visitor = self._visitor("vae")
        self.replay.backbone.vae.decode(self._latent().to(self.replay.dtype))
        del visitor


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="meta")


def _copies(*modules: nn.Module) -> list[torch.Tensor]:
    return [torch.empty_like(parameter) for module in modules for parameter in module.parameters()]
