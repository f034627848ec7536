"""What makes decoding and training fast on a GPU. Imported only by `engine.device`."""
