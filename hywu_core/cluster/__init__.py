"""The model on other machines: Ray actors for stages, towers and generator, a desk that serves many users, and its clients.

Needs Ray, an optional extra. Whoever begins reads an address first (``address.py``, the only file here that loads without Ray).
"""
