"""Does a checkpoint open in Transformers 4, which vLLM, lm-eval and many machines still have, as it does in 5?

python benchmarks/transformers4.py

Two checkpoints, one like Llama-2 (a tokenizer.model alone) and one like Llama-3 (bytes, scaled
rotary embeddings), are saved by this program, and opened by Transformers 4 in a virtual
environment of its own: ids, rotary parameters and loss must be the same. Takes half a minute.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run.errors import UserError
from run.script import run_script
from standin import make_problems, make_tokenizer

PACKAGES = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
# What Transformers, whichever, makes of a checkpoint.
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(texts).input_ids
with torch.no_grad():
    losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in ids]
print(json.dumps({"ids": ids, "losses": losses, "written": tokenizer.batch_decode(ids, skip_special_tokens=True)}))
"""


def main() -> None:
    texts = [
        f"Question: {row['question']}\nAnswer: {row['answer']}" for row in make_problems(40, seed=3)
    ]
    texts += ["Question: It’s  3 – 2 × €5,  七?\n\nAnswer: ½", "week.  How   much\n#### 1,450"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = make_environment(folder / "environment")
        for kind, make_base in (("llama-2", like_llama_2), ("llama-3", like_llama_3)):
            make_base(folder / kind, texts)
            ours = save(folder / kind, folder / f"{kind}-run" / "best", texts)
            for generation, python in ((5, sys.executable), (4, str(old))):
                compare(
                    f"{kind} in Transformers {generation}",
                    ours,
                    read(python, folder / f"{kind}-run" / "best", texts),
                )
    print("Transformers 4 and 5 read the same ids and losses from both")


def make_environment(folder: Path) -> Path:
    """A virtual environment with Transformers 4, and for all else the packages of this one; its python."""
    venv.create(folder, with_pip=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(packages) / "others.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # behind those of its own
    interpreter = folder / "bin" / "python"
    install = [
        str(interpreter),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    subprocess.run([*install, *PACKAGES], check=True)
    return interpreter


def like_llama_2(folder: Path, texts: list[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(texts, folder, vocab_size=450)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=450, bos_token_id=1, eos_token_id=2, **shape())
    ).save_pretrained(folder)


def like_llama_3(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    # As Transformers 5 writes it: a class and a list that 4 can't read.
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": special[0],
        "eos_token": special[1],
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"extra_special_tokens": [special[1]]})
    )
    config = LlamaConfig(
        vocab_size=450, bos_token_id=0, eos_token_id=1, rope_parameters=ROPE, **shape()
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def shape() -> dict[str, int]:
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }


def save(base: Path, best: Path, texts: list[str]) -> dict[str, Any]:
    """Save ``base`` as a checkpoint; gives what it is to be read as."""
    import torch

    from engine.loading import load_model, load_tokenizer
    from run.checkpoint import save_checkpoint

    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32, torch.device("cpu"))
    save_checkpoint(best, model, tokenizer, {})
    ids = [[tokenizer.bos_token_id, *row] for row in tokenizer.encode(texts)]
    with torch.no_grad():
        losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in ids]
    return {"ids": ids, "losses": losses, "written": texts}


def read(python: str, folder: Path, texts: list[str]) -> dict[str, Any]:
    result = subprocess.run(
        [python, "-c", READ, str(folder), json.dumps(texts)], capture_output=True, text=True
    )
    if result.returncode:
        raise UserError(
            f"{folder.parent.name}: can't be read: {result.stderr.strip().splitlines()[-1]}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def compare(title: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if ours["ids"] != theirs["ids"]:
        raise UserError(f"{title}: other ids")
    largest = max(
        abs(one - other) for one, other in zip(ours["losses"], theirs["losses"], strict=True)
    )
    if largest > 1e-5:
        raise UserError(f"{title}: a loss is {largest:.3g} off")
    if ours["written"] != theirs["written"]:
        raise UserError(f"{title}: ids are decoded to another text")
    print(f"{title}: the same ids of {len(ours['ids'])} texts, losses within {largest:.1g}")


if __name__ == "__main__":
    run_script(main)
