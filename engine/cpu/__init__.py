"""CPU versions of operations, for speed. Only `engine.device` imports them. Not used on a GPU."""
