"""A cluster's model and generator as handles: what they are given is sent to the desk, what they return comes from there.

Owns one client's requests, its progress and cancel, and LoRAs that stay on the cluster until somebody looks at them. Only plain
bytes, and references of LoRA parts, are sent.
"""

import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import safetensors.torch
import torch

from ..backbone.model import Backbone, build_backbone
from ..config import BackboneConfig, GenerationConfig, GeneratorConfig, LoRATarget
from ..errors import ClusterError
from ..generator.handle import GeneratorHandle
from ..handle import ModelHandle
from ..lora.value import LoRA
from ..progress import Tick, silent
from .address import Address
from .link import Lost, Ref, link_to
from .tower_actor import Standing, towers_elsewhere
from .wire import PROTOCOL, PartsLost, error_of, pack, unpack
from .writer_actor import shards_of

POLL_S = 0.5
BACK_S = 120.0  # for a desk to be started again, with the embeddings that it holds
ANSWER_S = 120.0  # for the desk to answer at all
FETCH_S = 600.0  # for a LoRA's part to come over the network


class DeskAway(ClusterError):
    """The desk is being started again: what was under way is lost, what is new may wait for it."""


class PartsOnCluster(Mapping[str, torch.Tensor]):
    """A LoRA's matrices as they lie on the cluster, one part a stage; fetched, and kept, when they are asked for.

    again: writes the same LoRA once more and returns its references, for when the ones that are known are lost.
    """

    def __init__(self, client: "Client", keys: tuple[tuple[str, int], ...], parts: list[Ref], again: Callable[[], list[Ref]]):
        self.client, self.parts, self._again = client, parts, again
        self._stage, self._fetched = dict(keys), {}

    def __getitem__(self, key: str) -> torch.Tensor:
        stage = self._stage[key]
        if stage not in self._fetched:
            try:
                part = self.client.fetch(self.parts[stage])
            except PartsLost:
                self.renew()
                part = self.client.fetch(self.parts[stage])
            self._fetched[stage] = safetensors.torch.load(part)
        return self._fetched[stage][key]

    def renew(self) -> None:
        """Write the LoRA again, the same numbers."""
        self.parts = self._again()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stage)

    def __len__(self) -> int:
        return len(self._stage)

    def __contains__(self, key: object) -> bool:
        return key in self._stage


class Client:
    """A client of one service, ``Elsewhere`` for its handles. on_note is told what there is to tell beside progress."""

    def __init__(self, address: Address, on_note: Callable[[str], None] = lambda text: None):
        """Raises ClusterError if there is no such service, or if it is of another version."""
        self.address, self.on_note, self.user = address, on_note, uuid.uuid4().hex
        self.link = link_to(address)
        said = self._asked("introduce")
        if said["protocol"] != PROTOCOL:
            raise ClusterError(f"the cluster speaks version {said['protocol']} and this client {PROTOCOL}: install the same "
                               "version of this pack")
        self.layers = [range(first, first + count) for first, count in said["layers"]]
        self._said = said
        self._uploaded: weakref.WeakKeyDictionary[LoRA, list[Ref]] = weakref.WeakKeyDictionary()

    def model(self) -> ModelHandle:
        """The backbone that is served."""
        said, dtype = self._said, getattr(torch, self._said["dtype"])
        config = BackboneConfig.from_dict(said["config"])
        backbone = build_backbone(config, dtype)
        towers_elsewhere(backbone, self._vae)
        backbone.home = torch.device("cpu")
        return ModelHandle(Standing(backbone), None, config, GenerationConfig.from_dict(said["generation"], config), None,
                           said["fingerprint"], elsewhere=self)

    def generator(self) -> GeneratorHandle:
        """The generator that is served. Raises ClusterError if none is."""
        if self._said["generator"] is None:
            raise ClusterError(f"the cluster {self.address.ray} serves no generator: start it with `hywu serve --generator "
                               "FOLDER`, or load one here")
        config = GeneratorConfig.from_dict(self._said["generator"])
        return GeneratorHandle(None, config, self._said["generator_fingerprint"], elsewhere=self)

    def identity(self) -> dict[str, Any]:
        """What is served now, by whom: the same as long as handles of this client are good."""
        said = self._asked("introduce")
        return {name: said[name] for name in ("served", "fingerprint", "generator_fingerprint", "dtype", "started")}

    def check_served(self, name: str) -> None:
        """Raises ClusterError unless the backbone folder that is served ends with ``name``, which a graph asks for."""
        self._check(name, self._said["served"])

    def check_generator(self, name: str) -> None:
        """Raises ClusterError unless the generator folder that is served ends with ``name``."""
        self._check(name, self._said["served_generator"])

    def _check(self, name: str, served: str) -> None:
        wanted = name.strip("/").split("/")
        if served.split("/")[-len(wanted):] != wanted:
            raise ClusterError(f"the graph asks for {name}, the cluster {self.address.ray} serves {served or 'none'}: choose "
                               "that one, or another cluster or service (ADDRESS#NAME)")

    def status(self) -> dict[str, Any]:
        """See ``desk.Desk.status``."""
        return self._asked("status")

    def do(self, step: str, handle: Any, arguments: dict[str, Any], on_tick: Tick) -> Any:
        """``Elsewhere``. Raises: what the step raises there; ClusterError if a part of the cluster is lost on the way."""
        if step == "sample":
            return self._sample(handle, arguments, on_tick)
        result, parts = self._run(step, arguments, [], [], on_tick)
        if step == "write_lora":
            def again() -> list[Any]:
                self.on_note("a LoRA that lay on the cluster was lost: it is written once more")
                return self._run(step, arguments, [], [], silent)[1]

            return self._lora(unpack(bytes(result["packed"].numpy())), parts, again)
        return result["text"] if step == "think" else result["condition"]

    def _sample(self, model: ModelHandle, arguments: dict[str, Any], on_tick: Tick) -> torch.Tensor:
        active = [injected for injected in model.loras if injected.strength != 0.0]
        headers = [{"rank": each.lora.rank, "alpha": each.lora.alpha, "rank_weights": list(each.lora.rank_weights),
                    "strength": each.strength} for each in active]
        try:
            result, _ = self._run("sample", arguments, headers, [self._parts(each.lora) for each in active], on_tick)
        except PartsLost:
            parts = [self._parts(each.lora, anew=True) for each in active]
            result, _ = self._run("sample", arguments, headers, parts, on_tick)
        self._count(model.backbone, result["routing"])
        return result["latent"]

    def _parts(self, lora: LoRA, anew: bool = False) -> list[Ref]:
        """The references of a LoRA's parts; one that is not on the cluster is put there, once, or ``anew`` if it was lost."""
        if isinstance(lora.tensors, PartsOnCluster) and lora.tensors.client is self:
            if anew or self._through_another_link(lora.tensors.parts):
                lora.tensors.renew()
            return lora.tensors.parts
        if anew or lora not in self._uploaded or self._through_another_link(self._uploaded[lora]):
            self._uploaded[lora] = [self._call("put", part, timeout_s=FETCH_S) for part in shards_of(lora, self.layers)]
        return self._uploaded[lora]

    def fetch(self, part: Ref) -> bytes:
        """A part's bytes. Raises PartsLost if it is gone."""
        if self._through_another_link([part]):
            raise PartsLost("the link has ended through which this LoRA was had")
        return self._call("fetch", part, FETCH_S, timeout_s=FETCH_S)

    def _through_another_link(self, parts: list[Ref]) -> bool:
        """Whether they were had through a link that has ended since."""
        return any(part.link is not self.link for part in parts)

    def _lora(self, header: Mapping[str, Any], parts: list[Any], again: Callable[[], list[Any]]) -> LoRA:
        targets = tuple(LoRATarget(*target) for target in header["targets"])
        stage_of = {layer: stage for stage, layers in enumerate(self.layers) for layer in layers}
        keys = tuple((f"{header['prefix']}{layer}.{target.name}.lora_{side}", stage_of[layer])
                     for layer in range(header["num_layers"]) for side in "AB" for target in targets)
        tensors = PartsOnCluster(self, keys, parts, again)
        return LoRA(tensors, getattr(torch, header["dtype"]), header["rank"],
                    float(header["alpha"]), tuple(header["rank_weights"]), targets, header["num_layers"], header["prefix"],
                    header["provenance"])

    def _count(self, backbone: Backbone, routing_NE: torch.Tensor | None) -> None:
        """Where somebody records the routing (``lora/routing.py``), add what was counted there."""
        for layer, counts_E in zip(backbone.model.layers, () if routing_NE is None else routing_NE, strict=False):
            gate = getattr(layer.mlp, "gate", None)
            if gate is not None and gate.counts_E is not None:
                gate.counts_E += counts_E

    def _vae(self, method: str, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._run(method, {"tensor": tensor.float()}, [], [], silent)[0]["parts"]

    def _run(self, step: str, arguments: dict[str, Any], headers: list[dict], parts: list[list[Any]], on_tick: Tick,
             ) -> tuple[dict[str, Any], list[Any]]:
        message = pack({"step": step, "user": self.user, "arguments": arguments, "loras": headers})
        ticket, version, note = self._submitted(message, parts, on_tick), -1, ""
        try:
            while True:
                said = self._asked("poll", ticket, version, POLL_S)
                if said["note"] not in ("", note):
                    self.on_note(said["note"])
                version, note = said["version"], said["note"]
                latent = None if said["latent"] is None else unpack(said["latent"])["latent"]
                on_tick(said["done"], said["total"], latent)
                answer = said["answer"]
                if answer is not None:
                    if "error" in answer:
                        raise error_of(*answer["error"])
                    return unpack(answer["result"]), answer["parts"]
        except BaseException:
            self._give_up(ticket)
            raise

    def _submitted(self, message: bytes, parts: list[list[Any]], on_tick: Tick) -> str:
        """The ticket of a new request, which waits for a desk that is being started again."""
        began, told = time.monotonic(), False
        while True:
            try:
                return self._asked("submit", message, parts)["ticket"]
            except DeskAway:
                if time.monotonic() - began > BACK_S:
                    raise
                if not told:
                    self.on_note("waiting for the desk of the cluster, which is started again")
                told = True
                on_tick(0, 1, None)
                time.sleep(1.0)

    def _give_up(self, ticket: str) -> None:
        """Cancel, without a word if that is not heard: what nobody asks for is given up there by itself."""
        try:
            self._call("desk", self.address.actor("desk"), "cancel", [ticket], ANSWER_S, timeout_s=1.0)
        except ClusterError:
            pass

    def _asked(self, method: str, *arguments: Any) -> dict[str, Any]:
        """What the desk answers. Raises what it answers with, or ClusterError if it does not answer."""
        said = self._call("desk", self.address.actor("desk"), method, arguments, ANSWER_S, timeout_s=2 * ANSWER_S)
        if "error" in said:
            raise error_of(*said["error"])
        return said

    def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """Through the link. Raises ClusterError for what is lost."""
        where = f"the desk of the cluster {self.address.ray}"
        if not self.link.alive:
            self.link = link_to(self.address)
        try:
            return self.link.call(method, *arguments, timeout_s=timeout_s)
        except Lost as error:
            if error.kind == "GetTimeoutError":
                raise ClusterError(f"{where} has not answered for {ANSWER_S:.0f} s: look at `hywu status --address "
                                   f"{self.address.ray}`") from None
            if error.kind == "ValueError":
                raise ClusterError(f"the cluster {self.address.ray} has no service {self.address.service!r}: start it with "
                                   f"`hywu serve --address {self.address.ray} --model FOLDER --generator FOLDER`") from None
            if error.kind in ("OwnerDiedError", "ObjectLostError"):
                raise PartsLost(f"a LoRA's part is lost ({error.kind})") from None
            kind = DeskAway if error.kind == "ActorUnavailableError" else ClusterError
            raise kind(f"{where} died or cannot be reached ({error}): it is started again if its node lives, run the "
                               "request again") from None


_clients: dict[Address, Client] = {}


def client_of(address: str, on_note: Callable[[str], None] = lambda text: None) -> Client:
    """This process's client of the service at ``address``, made anew with its link. Raises ClusterError."""
    parsed = Address.parse(address)
    known = _clients.get(parsed)
    if known is None or known.link is not link_to(parsed):
        known = _clients[parsed] = Client(parsed, on_note)
    known.on_note = on_note
    return known
