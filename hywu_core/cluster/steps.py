"""What a desk does for each step that a client may ask for: check the arguments, which are anybody's, and run the core's step.

Owns the list of steps, what their arguments may be, and the way of each to the actors. Queues and tickets are ``desk.py``'s.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray
import torch
from PIL import Image

from ..backbone.pictures import EncodedPicture
from ..condition import Condition, encode
from ..errors import ClusterError, RequestError
from ..handle import ModelHandle
from ..lora.attach import check_strength
from ..lora.value import fits
from ..sampling.denoise import sample
from ..sampling.taylor import TaylorSettings
from ..think import think
from ..vision.buckets import Buckets
from .admission import Admission
from .remote import Actor, Session
from .tower_actor import Call, Standing
from .wire import opened, pack, parcel

MAX_TEXT = 200_000
MAX_RANK = 1024
MAX_LORAS = 16
LARGEST = 1e18  # of any number that a request may hold
VAE_BUCKETS = 4  # as many pictures of the largest size, or one of four times its area


class Report(Protocol):
    """Where a step says how far it is, and waits for parts that are away; all may raise to cancel."""

    def tick(self, done: int, total: int, latent: torch.Tensor | None) -> None: ...

    def note(self, text: str) -> None: ...

    def check(self) -> None: ...

    def all_up(self) -> None: ...


def tower_call(tower: Actor, check: Callable[[], None]) -> Call:
    """Calls of a tower actor with tensors, as ``RemoteVAE`` and ``RemoteVision`` make them."""
    def call(method: str, *arguments: Any) -> tuple[torch.Tensor, ...]:
        sent = [parcel(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        return tuple(opened(part, torch.device("cpu")) for part in tower.call(method, *sent, check=check))

    return call


class Steps:
    """The steps on one service. model: the desk's, its stages and towers elsewhere."""

    def __init__(self, model: ModelHandle, stages: Sequence[Actor], tower: Actor, writer: Actor | None, admission: Admission):
        self.model, self.stages, self.tower, self.writer, self.admission = model, stages, tower, writer, admission
        self._targets = [target for name, module in model.backbone.adapted_modules() for target in module.targets()
                         if name.startswith("model.layers.0.")]

    def do(self, step: str, request: str, user: str, arguments: Mapping[str, Any], loras: Sequence[Mapping[str, Any]],
           parts: Sequence[Sequence[Any]], report: Report) -> tuple[dict[str, Any], list[Any]]:
        """Run a step; returns its result for ``wire.pack`` and, of a LoRA, the references of its parts.

        Raises: RequestError for arguments that are none; what the step raises.
        """
        if step not in ARGUMENTS:
            raise RequestError(f"a cluster does {', '.join(ARGUMENTS)}; {step[:40]!r} is none of them")
        kinds = ARGUMENTS[step]
        if set(arguments) != set(kinds):
            raise RequestError(f"{step} takes {', '.join(kinds)}; {', '.join(arguments)[:200]} came: client and cluster need "
                               "the same version of this pack")
        for name, value in arguments.items():
            if not kinds[name](value):
                raise RequestError(f"{step}: {name} is {str(value)[:60]!r}, which it cannot be")
        if isinstance(arguments.get("condition"), Condition):
            check_sizes(self.model, arguments["condition"])
        return getattr(self, f"_{step}")(request, user, dict(arguments), loras, parts, report)

    def _think(self, request, user, arguments, loras, parts, report):
        limit = arguments["max_new_tokens"]
        slots = self.model.generation.max_new_tokens if limit is None else limit
        session = self._session(request, user, report, slots=min(slots, self.model.config.max_position_embeddings))
        try:
            text = think(self._view(session), **arguments, on_tick=report.tick)
        finally:
            session.close()
        return {"text": text}, []

    def _encode(self, request, user, arguments, loras, parts, report):
        session = self._session(request, user, report)
        # It keeps nothing on the stages, but has its turn like others.
        with self.admission.admitted(user, [0] * len(self.stages), session.on_place):
            return {"condition": encode(self._view(session), **arguments, on_tick=report.tick)}, []

    def _sample(self, request, user, arguments, loras, parts, report):
        headers, lora_bytes = self._headers(loras, parts)
        session = self._session(request, user, report, loras=list(zip(headers, parts, strict=True)), lora_bytes=lora_bytes)
        routing = None
        try:
            latent_bchw = sample(self._view(session), **arguments, on_tick=report.tick)
        finally:
            routing = session.close()
        return {"latent": latent_bchw, "routing": routing}, []

    def _write_lora(self, request, user, arguments, loras, parts, report):
        if self.writer is None:
            raise RequestError("this cluster serves no generator: start it with one (`hywu serve`), or load one here")
        layers = [(stage.first, stage.count) for stage in self.stages]
        header, *written = self.writer.start("write", request, pack(arguments), layers, returns=1 + len(layers))
        asked = self.writer.start("progress", request)

        def check() -> None:
            nonlocal asked
            report.check()
            if ray.wait([asked], timeout=0)[0]:
                report.tick(*self.writer.wait(asked, report.check), None)
                asked = self.writer.start("progress", request)

        try:
            return {"packed": torch.frombuffer(bytearray(self.writer.wait(header, check)), dtype=torch.uint8)}, written
        except BaseException:
            self.writer.start("stop", request)
            raise

    def _vae_encode(self, request, user, arguments, loras, parts, report):
        self._check_area(arguments["tensor"], 1)
        return {"parts": tower_call(self.tower, report.check)("vae_encode", arguments["tensor"])}, []

    def _vae_decode(self, request, user, arguments, loras, parts, report):
        self._check_area(arguments["tensor"], self.model.config.vae.ffactor_spatial)
        return {"parts": tower_call(self.tower, report.check)("vae_decode", arguments["tensor"])}, []

    def _check_area(self, tensor: torch.Tensor, pixels_a_cell: int) -> None:
        """Raises RequestError for a picture that would keep the tower from others for minutes, or take all of its memory."""
        batch, _, height, width = tensor.shape
        area = batch * height * width * pixels_a_cell**2
        most = VAE_BUCKETS * max(bucket.height * bucket.width for bucket in Buckets.of(self.model.config).entries)
        if area > most:
            raise RequestError(f"{batch} x {height * pixels_a_cell} x {width * pixels_a_cell} pixels are {area / 1e6:.1f} "
                               f"million, a cluster's VAE takes {most / 1e6:.1f} million at once: decode fewer or tiled")

    def _session(self, request: str, user: str, report: Report, **more: Any) -> Session:
        def on_place(place: int) -> None:
            report.note(f"waiting for others on the cluster: place {place} in the queue")
            report.check()

        return Session(request, user, self.stages, self.admission, report.check, on_place, report.all_up, self._bytes,
                       **more)

    def _view(self, session: Session) -> ModelHandle:
        return replace(self.model, placed=Standing(session.view(self.model.backbone)))

    def _bytes(self, layers: int, rows: int, slots: int, direct: bool) -> int:
        """Of a request on a stage: keys and values, and what has come and not yet gone where the object store does not keep
        it."""
        config = self.model.config
        width = 2 * layers * config.num_key_value_heads * config.attention_head_dim + 2 * direct * config.hidden_size
        return rows * slots * width * self.model.backbone.dtype.itemsize

    def _headers(self, loras: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[Any]]) -> tuple[list[dict], list[int]]:
        """What stages need to know of each LoRA, and how many bytes they will hold."""
        if len(loras) > MAX_LORAS or len(parts) != len(loras) or any(len(own) != len(self.stages) for own in parts):
            raise RequestError(f"{len(loras)} LoRAs came in {[len(own) for own in parts]} parts, expected at most {MAX_LORAS} "
                               f"in {len(self.stages)} parts each")
        headers, held = [], [0] * len(self.stages)
        for lora in loras:
            rank, alpha, weights, strength = (lora.get(key) for key in ("rank", "alpha", "rank_weights", "strength"))
            if not (_whole(rank) and 1 <= rank <= MAX_RANK and _number(alpha) and alpha > 0 and isinstance(weights, tuple)
                    and len(weights) == rank and all(map(_number, weights)) and fits(weights, alpha / rank)
                    and _number(strength)):
                raise RequestError("a LoRA came without rank, alpha, weights and strength that make sense: generate it again")
            check_strength(strength)
            headers.append({"rank": rank, "strength": strength, "scale": [weight * (alpha / rank) for weight in weights]})
            own = sum(math.prod(target.a_shape(rank)) + math.prod(target.b_shape(rank)) for target in self._targets)
            own *= self.model.backbone.dtype.itemsize
            held = [before + own * stage.count for before, stage in zip(held, self.stages, strict=True)]
        return headers, held


def check_sizes(model: ModelHandle, condition: Condition) -> None:
    """Raises ClusterError for a condition that this backbone cannot have made; its numbers are checked where they are used."""
    config, width = model.config, model.config.hidden_size
    hidden_SD, buckets, cell = condition.hidden_SD, Buckets.of(config), config.vae.ffactor_spatial
    sound = (isinstance(hidden_SD, torch.Tensor) and hidden_SD.ndim == 2 and hidden_SD.shape[1] == width
             and 0 < len(hidden_SD) <= config.max_position_embeddings and hidden_SD.is_floating_point()
             and _whole(condition.ratio_index) and 0 <= condition.ratio_index < len(buckets) and _whole(condition.seed)
             and all(_text(text) for text in (condition.instruction, condition.thinking, condition.system_prompt,
                                              condition.backbone_fingerprint))
             and isinstance(condition.pictures, tuple) and len(condition.pictures) <= 3)
    for picture in condition.pictures if sound else ():
        sound = sound and isinstance(picture, EncodedPicture) and picture.bucket in buckets.entries
        if sound:
            height, width_px = picture.bucket.height, picture.bucket.width
            cells = (height // cell, width_px // cell)
            tokens = {"latent_chw": (config.vae.latent_channels, *cells), "vae_tokens_LD": (math.prod(cells), width),
                      "vit_tokens_LD": (config.vit_max_num_patches, width)}
            sound = all(isinstance(found := getattr(picture, name), torch.Tensor) and tuple(found.shape) == shape
                        and found.is_floating_point() for name, shape in tokens.items())
            sound = sound and all(_pair(pair) for pair in (picture.grid, picture.original_hw)) and _text(picture.digest)
            sound = sound and math.prod(picture.grid) <= config.vit_max_num_patches
    if not sound:
        raise ClusterError(f"the condition's tensors or texts do not fit this cluster's backbone ({width} wide): encode it "
                           "again with the model that the cluster serves")


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_whole(part) and part > 0 for part in value)


def _or_none(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or kind(value)


def _pictures(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(picture, Image.Image) for picture in value)


def _taylor(value: Any) -> bool:
    return isinstance(value, TaylorSettings) and all(_whole(getattr(value, name)) for name in value.__dataclass_fields__)


def _image_like(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point() and value.numel() > 0


_request = {"pictures": _pictures, "instruction": _text, "seed": _whole, "system_prompt": _text}
_condition = {"condition": lambda value: isinstance(value, Condition)}
# Step -> argument -> what it may be. Whether a value is in range is for the step itself.
ARGUMENTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "think": _request | {"mode": _text, "max_new_tokens": _or_none(_whole), "temperature": _or_none(_number),
                         "top_k": _or_none(_whole), "top_p": _or_none(_number)},
    "encode": _request | {"thinking": _text, "fit": _text},
    "write_lora": _condition,
    "sample": _condition | {"steps": _or_none(_whole), "guidance": _or_none(_number), "shift": _or_none(_number),
                            "seed": _whole, "size": _text, "taylor": _or_none(_taylor)},
    "vae_encode": {"tensor": _image_like},
    "vae_decode": {"tensor": _image_like},
}
