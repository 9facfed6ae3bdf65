"""The loaded generator as a value, and ``write_lora``, the second step of an edit.

Owns loading a generator folder to where it is to be kept (on its device, or elsewhere until it is needed) and turning a
condition into a LoRA. The network is ``model.py``'s.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint import Shards, generator_fingerprint, load_weights, open_shards, slots
from ..checkpoint.load import check_names, materialise, read_tensors, usable_device
from ..config import GeneratorConfig, torch_dtype
from ..elsewhere import Elsewhere, done_where_the_model_is
from ..errors import CheckpointError, LoRAError, RequestError
from ..lora.value import LoRA, Provenance
from ..placement.blocks import StreamedBlocks
from ..placement.visits import reading, visiting
from ..progress import Tick, silent
from .model import ParameterGenerator
from .tokens import detokenise

if TYPE_CHECKING:
    from ..condition import Condition

Present = Callable[[torch.device], AbstractContextManager[torch.device]]


@dataclass(frozen=True, eq=False)
class GeneratorHandle:
    """A loaded generator: the socket value that nodes pass on.

    ``present`` is what brings one that is kept elsewhere to ``device``, see ``load_generator``. A handle with another
    ``device`` (``dataclasses.replace``) shares the weights and writes there. With ``elsewhere`` there is no model here.
    """

    model: ParameterGenerator | None
    config: GeneratorConfig
    fingerprint: str
    present: Present | None = None
    device: torch.device = torch.device("cpu")
    elsewhere: Elsewhere | None = None

    def at_work(self) -> AbstractContextManager[torch.device]:
        """Around writing: the device on which it is done."""
        return self.present(self.device) if self.present else nullcontext(self.model.hidden_in.weight.device)


def load_generator(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, mode: str = "resident",
    kept: str = "ram", on_tick: Tick = silent,
) -> GeneratorHandle:
    """Load a generator folder (config.json and safetensors).

    Args:
        device: where it writes.
        dtype: None takes the one of its configuration.
        mode: "resident" on the device; "shared": kept elsewhere and brought there whole while it writes; "streamed": brought
            block by block.
        kept: where a generator that is not resident waits, in "ram" or on "disk".

    Raises:
        CheckpointError: the folder is incomplete, damaged or not what its configuration says.
        RequestError: a device that is not there, or a mode that is none.
    """
    if mode not in ("resident", "shared", "streamed") or kept not in ("ram", "disk"):
        raise RequestError(f"a generator that is {mode!r} and kept on {kept!r} asked for: choose resident, shared or streamed, "
                           "and ram or disk")
    config = GeneratorConfig.from_folder(Path(folder))
    dtype = dtype or torch_dtype(config.torch_dtype)
    shards = open_shards(Path(folder))
    with torch.device("meta"):
        model = ParameterGenerator(config).to(dtype).eval().requires_grad_(False)
    place = {"resident": _load_resident, "shared": _load_shared, "streamed": _load_streamed}[mode]
    device = usable_device(device)
    present = place(model, shards, device, kept, on_tick)
    return GeneratorHandle(model, config, generator_fingerprint(shards), present, device)


def _load_resident(model: ParameterGenerator, shards: Shards, device: torch.device, kept: str, on_tick: Tick) -> None:
    load_weights(model, shards, device=device, on_tick=on_tick)


def _load_shared(model: ParameterGenerator, shards: Shards, device: torch.device, kept: str, on_tick: Tick) -> Present:
    if kept == "disk":
        check_names(slots(model), shards, frozenset())
        return partial(reading, {"": model}, shards)
    load_weights(model, shards, on_tick=on_tick)
    return partial(visiting, (model,))


def _load_streamed(model: ParameterGenerator, shards: Shards, device: torch.device, kept: str, on_tick: Tick) -> Present:
    check_names(slots(model), shards, frozenset())
    blocks = StreamedBlocks(model.model.blocks, "model.blocks", shards, device, kept)
    # What is around the blocks is small (1 % of the published one): in RAM, from where it comes for the same time.
    materialise(model, lambda path: None if path.startswith("model.blocks.") else torch.device("cpu"))
    around = {name: place for name, place in slots(model).items() if not place.is_meta}
    read_tensors(around | blocks.places, shards, on_tick)
    model.model.present = blocks.present
    visitors = tuple(module for module in (*model.children(), *model.model.children())
                     if module not in (model.model, model.model.blocks))

    @contextmanager
    def present(device: torch.device) -> Iterator[torch.device]:
        blocks.device = device
        try:
            with visiting(visitors, device):
                yield device
        finally:
            blocks.rest()

    return present


@done_where_the_model_is
@torch.no_grad()
def write_lora(generator: GeneratorHandle, condition: "Condition", on_tick: Tick = silent) -> LoRA:
    """Write the LoRA for one condition, in the generator's dtype, on the CPU; ticks per block (spec section 4).

    Raises:
        CheckpointError: the condition has another width than the generator reads.
        LoRAError: the condition or the written values are not finite.
    """
    config = generator.config
    hidden_SD = condition.hidden_SD
    if hidden_SD.ndim != 2 or hidden_SD.shape[1] != config.input_dim:
        raise CheckpointError(
            f"the condition has shape {tuple(hidden_SD.shape)}, but this generator reads (tokens, {config.input_dim}): it was "
            "made for another backbone; load the generator that belongs to this backbone")
    if not torch.isfinite(hidden_SD).all():
        raise LoRAError(f"the condition holds NaN or Inf in {int((~torch.isfinite(hidden_SD)).sum())} of {hidden_SD.numel()} "
                        "values, expected none; load the backbone in bfloat16 or float32 and encode again")
    def tick(done: int, total: int, latent: torch.Tensor | None) -> None:
        if device.type == "cuda":
            # Kernels are only queued: without waiting all ticks would come at once, and a cancel would stop nothing.
            torch.cuda.synchronize(device)
        on_tick(done, total, latent)

    with generator.at_work() as device:
        tokens_BNPRC = generator.model(hidden_SD[None].to(device, generator.model.hidden_in.weight.dtype), tick)
    _refuse_not_finite(tokens_BNPRC)
    matrices = detokenise(tokens_BNPRC, generator.model.layout, config.prefix)
    # Each matrix gets memory of its own: as views they would drag all 1.45 GB along wherever one of them is sent.
    tensors = {key: matrix[0].to("cpu", copy=True) for key, matrix in matrices.items()}
    return LoRA.from_tensors(tensors, config.alpha, Provenance(
        backbone_fingerprint=condition.backbone_fingerprint, generator_fingerprint=generator.fingerprint,
        instruction=condition.instruction, thinking=condition.thinking, picture_digests=tuple(condition.picture_digests),
        seed=condition.seed))


def _refuse_not_finite(tokens_BNPRC: torch.Tensor) -> None:
    # The sum needs no second tensor of this size; only when it is suspicious are the values looked at.
    if not torch.isfinite(tokens_BNPRC.sum(dtype=torch.float32)) and not torch.isfinite(tokens_BNPRC).all():
        wrong = int((~torch.isfinite(tokens_BNPRC)).sum())
        raise LoRAError(f"the generator wrote NaN or Inf in {wrong} of {tokens_BNPRC.numel()} values, expected none; its "
                        f"weights are damaged or {tokens_BNPRC.dtype} is too narrow: load it in bfloat16 or float32")
