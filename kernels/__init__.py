"""Arithmetic with a LoRA in it. ``reference`` is the specification, in plain torch; knows nothing of models or ComfyUI."""
