"""What tests fork processes from: imported by multiprocessing's server, once, before the first one.

It does what each of them would do again, and takes no part in the tests themselves.
"""

import gc
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for conftest; each process gets the tests' own

for name in (
    "train",
    "evaluate",
    "engine.sharding",
    "conftest",
    # What these import only when they use it.
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "engine.lora",
    "peft.tuners.lora",
    "sentencepiece",
    "transformers.conversion_mapping",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.tokenization_llama",
):
    import_module(name)

# Compiles a thousand patterns for the first model that is loaded.
sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")

# The objects of all these modules are not looked through, and so not copied, in each process.
gc.collect()
gc.freeze()
