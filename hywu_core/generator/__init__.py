"""The hypernetwork: reads a Condition and writes the LoRA for that one request (spec section 4)."""
