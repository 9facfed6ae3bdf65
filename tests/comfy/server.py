"""A ComfyUI server as a context manager, and one run of a graph through its API as a function.

Owns starting, stopping, folders and the HTTP and WebSocket calls of the tests and the demo; finding ComfyUI is ``fetch.py``'s.
Every server has its own base folder (input, output, temp, user, models) and holds the pack as a linked custom node.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fetch import ROOT, fetch_comfyui, find_comfyui

PACK = "ComfyUI-HYWU"  # the folder name under custom_nodes
START_SECONDS = 240
STOP_SECONDS = 15
START = Path(__file__).with_name("start.py")

TEXT = 3  # BinaryEventTypes in ComfyUI's protocol.py

Message = dict[str, Any]


@dataclass
class Run:
    """What one queued graph did."""

    prompt_id: str
    messages: list[Message] = field(default_factory=list)
    previews: int = 0  # preview pictures that came over the socket
    texts: dict[str, list[str]] = field(default_factory=dict)  # texts that nodes showed while they ran, by node id
    history: dict[str, Any] = field(default_factory=dict)

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [message["data"] for message in self.messages if message["type"] == kind]

    @property
    def status(self) -> str:
        """'success', 'error' or 'interrupted'."""
        for kind in ("error", "interrupted"):
            if self.of_type(f"execution_{kind}"):
                return kind
        return "success"

    @property
    def error(self) -> str:
        return "\n".join(f"{data['node_type']}: {data['exception_message']}" for data in self.of_type("execution_error"))

    @property
    def executed(self) -> set[str]:
        """Ids of the nodes that ran, cached ones not among them."""
        return {data["node"] for data in self.of_type("executing") if data.get("node")}

    @property
    def ticks(self) -> dict[str, int]:
        """Progress messages per node id."""
        counts: dict[str, int] = {}
        for data in self.of_type("progress"):
            counts[data["node"]] = counts.get(data["node"], 0) + 1
        return counts


class Refused(Exception):
    """ComfyUI did not queue the graph; holds its JSON answer."""


class ComfyServer:
    """A running ComfyUI: ``with ComfyServer(folder) as server: server.run(graph)``."""

    def __init__(self, base: Path, arguments: tuple[str, ...] = (), environment: dict[str, str] | None = None):
        self.base = Path(base).resolve()
        self.arguments = arguments
        self.environment = environment or {}
        self.log = self.base / "server.log"
        self.process: subprocess.Popen | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def folder(self, name: str) -> Path:
        """One of the server's folders ("input", "output", "models", ...), made where it is missing."""
        path = self.base / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def __enter__(self) -> "ComfyServer":
        comfyui = find_comfyui() or fetch_comfyui()
        for name in ("input", "output", "temp", "user", "models", "custom_nodes"):
            self.folder(name)
        link = self.base / "custom_nodes" / PACK
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        self.port = _free_port()
        command = [
            sys.executable, str(START), str(comfyui), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
            "--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
            "--disable-auto-launch", "--disable-api-nodes", *self.arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **self.environment})
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server that this object started; harmless if it has ended."""
        if self.process is None:
            return
        for how in (signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(how)
                try:
                    self.process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        self.process.stdin.close()
        self.process = None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with status {self.process.returncode}:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
        raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body

    def post(self, path: str, value: Any) -> Any:
        """POST JSON. Raises Refused with ComfyUI's answer when it does not accept the value."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(value).encode(), headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode(errors="replace")) from None
        return json.loads(body) if body else None

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def forget(self) -> None:
        """Drop all cached node outputs."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def run(self, graph: dict[str, Any], on_message: Callable[[Message], None] | None = None, timeout: float = 300) -> Run:
        """Queue an API-format graph and wait until it has ended in one way or another.

        ``on_message`` sees every message of this run as it arrives, and may call ``interrupt``.

        Raises:
            Refused: the graph did not pass ComfyUI's validation.
        """
        run = asyncio.run(asyncio.wait_for(self._run(graph, on_message), timeout))
        history = self.get(f"/history/{run.prompt_id}")
        run.history = history.get(run.prompt_id, {})
        return run

    async def _run(self, graph: dict[str, Any], on_message: Callable[[Message], None] | None) -> Run:
        import aiohttp

        client = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_:
                answer = await asyncio.to_thread(self.post, "/prompt", {"prompt": graph, "client_id": client})
                run = Run(answer["prompt_id"])
                async for raw in socket_:
                    if raw.type == aiohttp.WSMsgType.BINARY:
                        _take_binary(run, raw.data)
                        continue
                    if raw.type != aiohttp.WSMsgType.TEXT:
                        raise RuntimeError(f"the socket was closed during a run:\n{self.tail()}")
                    message = json.loads(raw.data)
                    if message.get("data", {}).get("prompt_id") != run.prompt_id:
                        continue
                    run.messages.append(message)
                    if on_message is not None:
                        await asyncio.to_thread(on_message, message)
                    ended = message["type"] in ("execution_success", "execution_error", "execution_interrupted")
                    if ended:
                        await self._until_stored(run.prompt_id)
                        return run
        raise RuntimeError(f"the socket was closed during a run:\n{self.tail()}")

    async def _until_stored(self, prompt_id: str) -> None:
        """The history entry is written a moment after the last message."""
        for _ in range(200):
            if await asyncio.to_thread(self.get, f"/history/{prompt_id}"):
                return
            await asyncio.sleep(0.05)

    def outputs(self, run: Run, node: str, kind: str = "images") -> list[Path]:
        """The files that one node of a finished run saved."""
        return [self.base / item["type"] / item.get("subfolder", "") / item["filename"]
                for item in run.history["outputs"][node][kind]]


def _take_binary(run: Run, data: bytes) -> None:
    """ComfyUI's binary messages: a type, then for a text the length of the node's id, the id and the text."""
    if int.from_bytes(data[:4], "big") != TEXT:
        run.previews += 1
        return
    length = int.from_bytes(data[4:8], "big")
    run.texts.setdefault(data[8 : 8 + length].decode(), []).append(data[8 + length :].decode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
