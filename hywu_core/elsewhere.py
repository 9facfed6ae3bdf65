"""Steps of an edit that are done where the model is: here, or by whoever a handle of a model elsewhere stands for.

Owns that one decision. A handle with ``elsewhere`` holds no weights; every step that is given one hands its arguments on and
returns what comes back, so graphs, command line and ``edit`` do not know the difference. Who answers is ``cluster/client.py``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from .progress import Tick, silent

Step = TypeVar("Step", bound=Callable)


class Elsewhere(Protocol):
    """Where a handle's model is."""

    def do(self, step: str, handle: Any, arguments: dict[str, Any], on_tick: Tick) -> Any:
        """What the step of that name returns for these arguments (by name, without the handle and ``on_tick``); ticks come in
        this thread, and may raise to cancel."""


def done_where_the_model_is(step: Step) -> Step:
    """For a function whose first argument is a handle with ``elsewhere``."""
    signature = inspect.signature(step)

    @functools.wraps(step)
    def done(handle, *args, **kwargs):
        if handle.elsewhere is None:
            return step(handle, *args, **kwargs)
        bound = signature.bind(handle, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        return handle.elsewhere.do(step.__name__, handle, arguments, arguments.pop("on_tick", silent))

    return done
