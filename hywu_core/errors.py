"""What can go wrong with an edit, one class per thing that the user can mend.

Every message carries both numbers (what was expected, what was found) and the remedy. Nothing here catches anything: a cancel
raised inside a progress callback passes through the whole core untouched.
"""


class HYWUError(Exception):
    """Base of all errors that this project raises on purpose."""


class CheckpointError(HYWUError):
    """A checkpoint folder is incomplete, damaged, or not what its configuration says."""


class PictureError(HYWUError):
    """A source picture cannot be read or has a shape that no resolution bucket can hold."""


class PromptError(HYWUError):
    """The instruction or the thinking text cannot be turned into a sequence (empty, too long, special tokens inside)."""


class LoRAError(HYWUError):
    """A LoRA is damaged, or was written for another backbone than the one it is injected into."""


class RequestError(HYWUError):
    """A sampling setting is out of range (steps, guidance, size, strength)."""


class PlacementError(HYWUError):
    """A request does not fit on the devices that there are, or the devices are described wrongly."""


class ClusterError(HYWUError):
    """A cluster cannot be reached, a part of it has died or hangs, or is of another version."""
