"""The backbone: embedders, towers and VAE around stages of decoder layers, under the published tensor names.

Owns the module tree (what a checkpoint is loaded into) and the walk through the stages; what goes in is built in ``inputs.py``,
what it is used for lies in ``condition``, ``think`` and ``sampling``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

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
from .waves import run_in_waves


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
        self.waves = False
        # Set by placement: where sequences begin, and the parts that live elsewhere and come for the time of their use.
        self.home: torch.device | None = None
        self.visits: dict[str, Callable[[], AbstractContextManager[torch.device]]] = {}
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where sequences begin and end, and pictures become tokens; words and logits may lie elsewhere."""
        return self.home or self.time_embed.mlp[0].weight.device

    def present(self, part: str) -> AbstractContextManager[torch.device]:
        """Around the use of a part: the device on which it is meanwhile. Parts: "vae", "vision" (tower and aligner), "wte", and
        "small" (embedders and final layer)."""
        if part in self.visits:
            return self.visits[part]()
        module = {"vae": self.vae, "vision": self.vision_model, "wte": self.model.wte, "small": self.time_embed}[part]
        return nullcontext(next(module.parameters()).device)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around a run of passes: what stages hold between two layers' turns is given back at the end, whatever happened."""
        with ExitStack() as ends:
            for stage in self.stages:
                ends.callback(stage.rest)
            with self.present("small"):
                yield

    def embed(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L) on any device to their word embeddings (B, L, D) on the backbone's."""
        with self.present("wte") as device:
            return self.model.wte(ids_BL.to(device)).to(self.device)

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
        With ``waves`` several rows go through several stages one behind the other (``waves.py``).
        """
        if caches is not None:
            if positions_L is None:
                positions_L = torch.arange(hidden_BLD.shape[1])
            for cache in caches:
                cache.reserve(int(positions_L[-1]) + 1)
        if self.waves and len(self.stages) > 1 and len(hidden_BLD) > 1:
            return run_in_waves(self.stages, hidden_BLD, rope, mask, caches, positions_L, on_layer).to(self.device)
        for index, stage in enumerate(self.stages):
            cache = None if caches is None else caches[index]
            hidden_BLD = stage.run(hidden_BLD, rope, mask, cache, positions_L, on_layer)
        return hidden_BLD.to(self.device)

    def logits(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Last-layer hidden states (B, L, D) to vocabulary logits (B, L, V), fp32."""
        return self.lm_head(self.model.ln_f(hidden_BLD.to(self.lm_head.weight.device))).float()

    def velocity(self, hidden_BLD: torch.Tensor, t_B: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Last-layer hidden states of the picture's tokens (B, h·w, D) at time t to the velocity (B, c, h, w), fp32."""
        return self.final_layer(hidden_BLD, self.time_embed_2(t_B), grid).float()

    def adapted_modules(self) -> Iterator[tuple[str, AdaptedLinear | Experts]]:
        """Every module that a LoRA reaches, with its name (``model.layers.0.mlp.experts``), in layer order."""
        for name, module in self.model.layers.named_modules():
            if isinstance(module, AdaptedLinear | Experts):
                yield f"model.layers.{name}", module


def build_backbone(config: BackboneConfig, dtype: torch.dtype) -> Backbone:
    """The module tree on ``meta``: names, shapes and final dtypes, no memory."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Backbone(config).eval()
    finally:
        torch.set_default_dtype(default)
