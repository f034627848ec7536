"""The same operations, faster on a CPU. Only `engine.device` imports this; on a GPU, skip it."""
