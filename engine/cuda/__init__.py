"""What only a GPU needs, for speed and before it is used. Only `engine.device` imports it."""
