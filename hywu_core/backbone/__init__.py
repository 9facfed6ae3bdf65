"""HunyuanImage-3.0: rope, cache, attention, experts, embedders, the stage (a run of layers) and the model (stages in a row)."""
