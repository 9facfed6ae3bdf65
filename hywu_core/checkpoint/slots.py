"""Which place in a module each published tensor goes to.

Owns the walk over a module; a module whose parameters are laid out otherwise than published says so itself with
``checkpoint_slots()``. Reads nothing. Works on ``meta`` and on real tensors alike.
"""

from torch import Tensor, nn


def slots(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Published tensor name -> the parameter, persistent buffer, or view into one, that takes it.

    A submodule that defines ``checkpoint_slots() -> dict[str, Tensor]`` (names relative to itself, views into its parameters)
    answers for its whole subtree; every other module contributes its own parameters and persistent buffers by name.
    """
    if hasattr(module, "checkpoint_slots"):
        return {prefix + name: slot for name, slot in module.checkpoint_slots().items()}
    found = {prefix + name: slot for name, slot in module.named_parameters(recurse=False, remove_duplicate=False)}
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            found[prefix + name] = buffer
    for name, child in module.named_children():
        found.update(slots(child, f"{prefix}{name}."))
    return found
