"""Checkpoint folders: where each tensor lies (shards), who takes it (slots), reading (load), telling apart (fingerprint),
packed weights (packed, formats) and smaller copies (convert)."""

from .fingerprint import backbone_fingerprint, fingerprint, generator_fingerprint
from .load import UNUSED_VISION_HEAD, load_weights
from .packed import Packed, PackedWeight, find_packed, read_packed
from .shards import Shards, TensorEntry, open_shards
from .slots import slots

__all__ = ["Packed", "PackedWeight", "Shards", "TensorEntry", "UNUSED_VISION_HEAD", "backbone_fingerprint", "find_packed",
           "fingerprint", "generator_fingerprint", "load_weights", "open_shards", "read_packed", "slots"]
