"""This process's way to a cluster: a child process that has joined it, and calls that go through it.

Owns the child's life and the matching of answers to calls, from any thread. What is called is ``client.py``'s affair.
"""

import itertools
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import ClusterError
from .address import NAMESPACE, Address, environment, refuse_silence
from .link_process import from_plain, read_frame, to_plain, write_frame

SCRIPT = Path(__file__).with_name("link_process.py")
JOIN_S = 90.0
ENDED = "the process that had joined the cluster has ended, as it does when the head is lost"


class Lost(Exception):
    """A call did not come back: kind is the class of Ray's error."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Ref:
    """A reference that the child keeps, for as long as this is."""

    def __init__(self, link: "Link", name: str):
        self.link, self.name = link, name
        weakref.finalize(self, link.forget, name).atexit = False  # the child goes with this process


class Link:
    """A child that has joined the cluster at ``address``. Raises ClusterError if it cannot."""

    def __init__(self, address: Address):
        refuse_silence(address)
        self.address = address
        self._numbers, self._sending = itertools.count(1), threading.Lock()
        self._answers: dict[int, SimpleQueue] = {0: SimpleQueue()}
        self._child = subprocess.Popen(
            [sys.executable, str(SCRIPT), address.ray, NAMESPACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=os.environ | environment(address))
        # A child of a process that has gone hears the end of its stdin; this is for one that drops its links.
        self._end = weakref.finalize(self, self._child.kill)
        threading.Thread(target=self._listen, args=(self._child.stdout, self._answers), daemon=True, name="hywu-link").start()
        try:
            self._wait(0, JOIN_S)
        except Lost as error:
            self.close()
            raise ClusterError(
                f"no Ray cluster can be used at {address.ray} ({error}): start one with `hywu serve` or `ray start --head`, "
                "with the same Python and Ray as here; for one with tokens set RAY_AUTH_MODE=token and put its token into "
                "~/.ray/auth_token") from None

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        """A method of ``link_process.Joined``; bytes and ``Ref`` may be in its arguments and in what it returns.

        Raises: Lost, for whatever goes wrong there.
        """
        number, blobs = next(self._numbers), []
        plain = to_plain(arguments, blobs, lambda reference: reference.name)
        self._answers[number] = SimpleQueue()
        try:
            with self._sending:
                write_frame(self._child.stdin, {"id": number, "method": method, "arguments": plain}, blobs)
        except (OSError, ValueError):
            self._answers.pop(number)
            raise Lost("ConnectionLost", ENDED) from None
        return self._wait(number, timeout_s)

    def forget(self, name: str) -> None:
        """Called wherever a ``Ref`` dies, maybe amid another call."""
        if self.alive:
            threading.Thread(target=self._forget, args=(name,), daemon=True).start()

    def _forget(self, name: str) -> None:
        try:
            self.call("forget", name, timeout_s=JOIN_S)
        except Lost:
            pass  # then the reference is gone as well

    def close(self) -> None:
        self._end()

    def _wait(self, number: int, timeout_s: float) -> Any:
        try:
            said, blobs = self._answers[number].get(timeout=timeout_s)
        except Empty:
            raise Lost("GetTimeoutError", f"no answer within {timeout_s:.0f} s") from None
        finally:
            self._answers.pop(number, None)
        if "error" in said:
            kind, text, version = said["error"]
            raise Lost(kind, text + (f" (Ray {version} here)" if version else ""))
        return from_plain(said["result"], blobs, lambda name: Ref(self, name))

    @staticmethod
    def _listen(stream: Any, answers: dict[int, SimpleQueue]) -> None:
        while (frame := read_frame(stream)) is not None:
            queue = answers.get(frame[0]["id"])
            if queue is not None:
                queue.put(frame)
        gone = {"error": ["ConnectionLost", ENDED, ""]}
        for queue in list(answers.values()):
            queue.put((gone, []))


_links: dict[str, Link] = {}
_opening = threading.Lock()


def link_to(address: Address) -> Link:
    """This process's link to a cluster, made anew if it has ended. Raises ClusterError."""
    with _opening:
        found = _links.get(address.ray)
        if found is None or not found.alive:
            found = _links[address.ray] = Link(address)
        return found
