"""LoRA: the value (``value.py``), its files (``files.py``) and how it is attached to a backbone (``attach.py``)."""
