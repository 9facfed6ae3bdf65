"""Step 0 of an edit: the backbone looks at pictures and instruction and writes down what is to be done.

Runs without any LoRA. Owns the prompt, the prefill and the one-token steps; which token follows which is decided in
``text/reasoning.py``.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
from PIL import Image

from .backbone import inputs
from .backbone.mask import attention_mask
from .backbone.pictures import EncodedPicture, posterior_noise
from .backbone.stage import Rope
from .condition import encode_pictures, fit_pictures
from .elsewhere import done_where_the_model_is
from .errors import PromptError
from .handle import ModelHandle
from .progress import Tick, silent
from .seeds import seeded
from .text.reasoning import plan_reasoning, reason, reasoning_text, sampling_of
from .text.template import Sequence, text_sequence

# Slots that the cache has beyond the prompt before it first grows.
FIRST_SLOTS = 256


@done_where_the_model_is
@torch.no_grad()
def think(
    model: ModelHandle,
    pictures: Many[Image.Image],
    instruction: str,
    *,
    seed: int = 0,
    mode: str = "think_recaption",
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    system_prompt: str = "en_unified",
    on_tick: Tick = silent,
) -> str:
    """Thinking text for a request, tags included, for ``encode``'s ``thinking`` (spec section 11).

    Args:
        mode: "think_recaption" reasons and then rewrites the instruction, "think" only reasons, "recaption" only rewrites.
        temperature, top_k, top_p, max_new_tokens: None takes the checkpoint's own; temperature 0 is greedy.
        seed: of the draws and of the sources' latents. Unlike the reference's, the same seed gives the same text.
        on_tick: a tick a picture and layer of the prompt (a cancel point) and a token.

    Raises: PictureError, PromptError, RequestError.
    """
    sources = fit_pictures(model, pictures, "stretch")
    plan = plan_reasoning(model.tokenizer, model.generation, mode)
    sampling = sampling_of(model.generation, temperature, top_k, top_p)
    sequence = text_sequence(
        model.tokenizer, model.config, model.generation, instruction, sources, bot_task=mode,
        system_prompt=model.system_prompts.select(system_prompt, mode))
    budget = model.generation.max_new_tokens if max_new_tokens is None else max_new_tokens
    room = model.config.max_position_embeddings - sequence.length
    if room < 1:
        raise PromptError(
            f"the prompt has {sequence.length} tokens, which leaves none of the backbone's "
            f"{model.config.max_position_embeddings} positions to think in: shorten the instruction or use fewer pictures")
    budget = min(budget, room)

    def stay(done: int, total: int, latent: torch.Tensor | None) -> None:
        on_tick(0, budget, None)

    encoded = encode_pictures(model, sources, posterior_noise(model.config.vae, sources, seed), budget, stay)
    continuation = Continuation(model, sequence, encoded, lambda layer: stay(0, budget, None))
    with model.backbone.at_work():
        tokens = reason(continuation, plan, sampling, seeded(seed), budget, on_tick)
    return reasoning_text(model.tokenizer, plan, tokens, model.generation.drop_think)


class Continuation:
    """A one-row sequence that grows against a cache: call it with each new token, or with some that are certain, for what may
    follow. The first call, with none, runs the prompt (``on_layer`` after each of its layers).
    """

    def __init__(
        self,
        model: ModelHandle,
        sequence: Sequence,
        pictures: Many[EncodedPicture],
        on_layer: Callable[[int], None] = lambda layer: None,
    ):
        self._backbone, self._sequence, self._pictures, self._on_layer = model.backbone, sequence, pictures, on_layer
        self._length = sequence.length
        self._caches = self._backbone.new_cache(1, self._length + FIRST_SLOTS)

    @torch.no_grad()
    def __call__(self, tokens: Many[int]) -> torch.Tensor:
        """Raw scores (1, V), fp32, of what follows ``tokens`` (none: of what follows the prompt)."""
        watched = {} if tokens else {"on_layer": self._on_layer}
        hidden_BLD, rope, mask, positions_L = self._given(tokens)
        hidden_BLD = self._backbone.run(hidden_BLD, rope, mask, self._caches, positions_L, **watched)
        return self._backbone.logits(hidden_BLD[:, -1:])[:, 0]

    def _given(self, tokens: Many[int]) -> tuple[torch.Tensor, Rope, torch.Tensor | None, torch.Tensor | None]:
        """Embeddings (1, L, D), rotations, mask and positions of the prompt, or of ``tokens`` behind all that came before."""
        backbone = self._backbone
        if not tokens:
            return (inputs.embed(backbone, self._sequence, self._pictures), inputs.rope_table(backbone, self._sequence),
                    inputs.mask(backbone, self._sequence), None)
        positions_L = torch.arange(self._length, self._length + len(tokens))
        self._length += len(tokens)
        # A single token sees everything before it.
        mask = None if len(tokens) == 1 else attention_mask(self._length, [], positions_L).to(backbone.device)
        return backbone.embed(torch.tensor([tokens])), inputs.text_rope(backbone, positions_L), mask, positions_L
