"""The backbone: embedders, towers and VAE around stages of decoder layers, under the published tensor names.

Owns the module tree (what a checkpoint is loaded into) and the walk through the stages; what goes in is built in ``inputs.py``,
what it is used for lies in ``condition``, ``think`` and ``sampling``.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ..config import BackboneConfig
from ..vision.vae import VAE
from ..vision.vit import Aligner, VisionTower
from .adapted import AdaptedLinear, Experts
from .cache import KVCache
from .embedders import FinalLayer, NumberEmbedder, PatchEmbed
from .layer import DecoderLayer, RMSNorm
from .mask import CanvasSight
from .stage import Rope, Stage


class Decoder(nn.Module):
    """Token embedding, layers and the final norm: what lies below ``model.``."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Backbone(nn.Module):
    """HunyuanImage-3.0 with all its parts; parameter names are the published ones (spec section 1)."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        width, inner, latent = config.hidden_size, config.patch_embed_hidden_dim, config.vae.latent_channels
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.timestep_emb = NumberEmbedder(width)
        self.time_embed = NumberEmbedder(width)
        self.time_embed_2 = NumberEmbedder(width)
        if config.cfg_distilled:
            self.guidance_emb = NumberEmbedder(width)
        if config.use_meanflow:
            self.timestep_r_emb = NumberEmbedder(width)
        self.patch_embed = PatchEmbed(latent, inner, width)
        self.final_layer = FinalLayer(width, inner, latent)
        self.vision_model = VisionTower(config)
        self.vision_aligner = Aligner(config)
        self.vae = VAE(config.vae)
        self.stages: Sequence[Stage] = (Stage(self.model.layers, 0),)
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where tokens are embedded and sequences begin."""
        return self.model.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.wte.weight.dtype

    def new_cache(self, rows: int, capacity: int) -> list[KVCache]:
        """One empty cache a stage."""
        return [stage.new_cache(rows, capacity) for stage in self.stages]

    def run(
        self,
        hidden_BLD: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | CanvasSight | None,
        caches: list[KVCache] | None = None,
        positions_L: torch.Tensor | None = None,
        on_layer: Callable[[int], None] = lambda layer: None,
    ) -> torch.Tensor:
        """Through all stages: (B, L, D) embeddings to the last layer's hidden states, before ``ln_f``.

        mask: bool (L, keys), True = may attend; None = attend to all; a canvas's sight. With caches, ``positions_L`` (default
        0..L-1) says which slots x's keys and values take. on_layer is called after each layer and may raise to cancel.
        """
        if caches is not None and positions_L is None:
            positions_L = torch.arange(hidden_BLD.shape[1])
        for index, stage in enumerate(self.stages):
            cache = None
            if caches is not None:
                cache = caches[index]
                cache.reserve(int(positions_L[-1]) + 1)
            hidden_BLD = stage.run(hidden_BLD, rope, mask, cache, positions_L, on_layer)
        return hidden_BLD.to(self.device)

    def logits(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Last-layer hidden states (B, L, D) to vocabulary logits (B, L, V), fp32."""
        return self.lm_head(self.model.ln_f(hidden_BLD)).float()

    def velocity(self, hidden_BLD: torch.Tensor, t_B: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Last-layer hidden states of the picture's tokens (B, h·w, D) at time t to the velocity (B, c, h, w), fp32."""
        return self.final_layer(hidden_BLD, self.time_embed_2(t_B), grid).float()

    def adapted_modules(self) -> Iterator[tuple[str, AdaptedLinear | Experts]]:
        """Every module that a LoRA reaches, with its name (``model.layers.0.mlp.experts``), in layer order."""
        for name, module in self.model.layers.named_modules():
            if isinstance(module, AdaptedLinear | Experts):
                yield f"model.layers.{name}", module
