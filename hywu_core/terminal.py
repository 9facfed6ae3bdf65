"""Progress of a stage on a terminal. What ticks is the stage's affair, which command runs it ``cli.py``'s."""

import sys


class Terminal:
    """Progress of one stage as a line on stderr: rewritten in place on a terminal, one line a stage elsewhere."""

    def __init__(self, name: str):
        self.name = name
        self.done = -1

    def __call__(self, done: int, total: int, latent=None) -> None:
        if done == self.done:
            return
        self.done = done
        if sys.stderr.isatty():
            print(f"\r{self.name:9s} {done}/{total} ", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total:
            print(f"{self.name:9s} {done}/{total}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line of a stage that stops before its total, as thinking does."""
        if sys.stderr.isatty() and self.done >= 0:
            print(file=sys.stderr)
