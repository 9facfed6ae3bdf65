"""Checkpoint folders: where each tensor lies (shards), who takes it (slots), reading (load), telling apart (fingerprint)."""

from .fingerprint import backbone_fingerprint, fingerprint, generator_fingerprint
from .load import UNUSED_VISION_HEAD, load_weights
from .shards import Shards, TensorEntry, open_shards
from .slots import slots

__all__ = ["Shards", "TensorEntry", "UNUSED_VISION_HEAD", "backbone_fingerprint", "fingerprint", "generator_fingerprint",
           "load_weights", "open_shards", "slots"]
