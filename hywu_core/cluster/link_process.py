"""The process that is a cluster's client for another one: it joins Ray, passes calls to the desk, and keeps references.

Started by ``link.py`` as a script, so it imports nothing of this package. A process that has joined a Ray cluster is ended by
Ray when the cluster's head is lost, which ComfyUI must not be; and Ray reads its environment once, which is this process's own.

Frames on stdin and stdout: four bytes of length, a JSON header, and the blobs whose lengths the header names. Nothing pickled.
"""

import json
import os
import signal
import struct
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

FRAME = struct.Struct("<I")
CALLS_AT_ONCE = 256


def write_frame(stream: BinaryIO, header: dict[str, Any], blobs: list[bytes]) -> None:
    text = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    for piece in (FRAME.pack(len(text)), text, *blobs):
        stream.write(piece)
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """The next header and its blobs; None at the end of the stream."""
    start = stream.read(FRAME.size)
    if len(start) < FRAME.size:
        return None
    header = json.loads(stream.read(FRAME.unpack(start)[0]))
    blobs = [stream.read(size) for size in header["blobs"]]
    return (header, blobs) if all(len(blob) == size for blob, size in zip(blobs, header["blobs"], strict=True)) else None


def to_plain(value: Any, blobs: list[bytes], name_of) -> Any:
    """JSON with bytes as blobs and what else there is by the name that ``name_of`` gives it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        blobs.append(value)
        return {"$blob": len(blobs) - 1}
    if isinstance(value, list | tuple):
        return [to_plain(item, blobs, name_of) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item, blobs, name_of) for key, item in value.items()}
    return {"$ref": name_of(value)}


def from_plain(plain: Any, blobs: list[bytes], by_name) -> Any:
    if isinstance(plain, list):
        return [from_plain(item, blobs, by_name) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"$blob"}:
        return blobs[plain["$blob"]]
    if plain.keys() == {"$ref"}:
        return by_name(plain["$ref"])
    return {key: from_plain(item, blobs, by_name) for key, item in plain.items()}


class Joined:
    """The calls that a client can make."""

    def __init__(self, namespace: str):
        self._namespace, self._references = namespace, {}

    def keep(self, reference: Any) -> str:
        name = uuid.uuid4().hex
        self._references[name] = reference
        return name

    def kept(self, name: str) -> Any:
        return self._references[name]

    def desk(self, name: str, method: str, arguments: list[Any], timeout_s: float) -> Any:
        """Call a method of the desk of that name. Raises ValueError if there is none."""
        actor = ray.get_actor(name, namespace=self._namespace)
        return ray.get(getattr(actor, method).remote(*arguments), timeout=timeout_s)

    def put(self, data: bytes) -> Any:
        return ray.put(data)

    def fetch(self, reference: Any, timeout_s: float) -> bytes:
        return ray.get(reference, timeout=timeout_s)

    def forget(self, name: str) -> None:
        self._references.pop(name, None)


def main() -> None:
    global ray
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who still has a cancel to send
    out, source = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)  # whatever is printed must not get between frames
    address, namespace = sys.argv[1:]
    import ray

    sending = threading.Lock()
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="ERROR")
        with sending:
            write_frame(out, {"id": 0, "result": ray.__version__}, [])
    except Exception as error:  # the process's end: its parent has to hear of it
        write_frame(out, {"id": 0, "error": [type(error).__name__, " ".join(str(error).split())[:400], ray.__version__]}, [])
        return
    joined = Joined(namespace)

    def answer(header: dict[str, Any], blobs: list[bytes]) -> None:
        mine: list[bytes] = []
        try:
            arguments = from_plain(header["arguments"], blobs, joined.kept)
            result = to_plain(getattr(joined, header["method"])(*arguments), mine, joined.keep)
            said = {"id": header["id"], "result": result}
        except Exception as error:  # as above
            mine, said = [], {"id": header["id"], "error": [type(error).__name__, " ".join(str(error).split())[:400], ""]}
        with sending:
            write_frame(out, said, mine)

    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        while (frame := read_frame(source)) is not None:
            pool.submit(answer, *frame)
        os._exit(0)  # the parent has gone: so do calls that are under way


if __name__ == "__main__":
    main()
