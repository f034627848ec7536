"""The config.json of a checkpoint, for readers of more than one version of Transformers."""

import json
from pathlib import Path


def write_both_spellings(file: Path) -> None:
    """Add the rotary embedding's parameters to a ``config.json`` as Transformers 4 spells them.

    Transformers 5 writes only ``rope_parameters``. Transformers 4, and with it many installations
    of vLLM and lm-eval, silently ignores that and assumes a theta of 10,000 and no scaling.
    """
    content = json.loads(file.read_bytes())
    rope = content.get("rope_parameters")
    if rope is not None:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        content["rope_theta"] = rope["rope_theta"]
        content["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
        if rope.get("rope_type") == "longrope" and "original_max_position_embeddings" in rope:
            content["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
