"""Checks that a checkpoint opens in Transformers 4, which vLLM and lm-eval still use, as in 5.

python benchmarks/transformers4.py

This program saves two checkpoints, one like Llama-2 (with only a tokenizer.model) and one like
Llama-3 (byte-level BPE, scaled rotary embeddings). Transformers 4 opens them in a separate virtual
environment. Ids, rotary parameters and loss must be the same. It takes half a minute.
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

from run.arguments import ArgumentParser
from run.errors import UserError
from run.script import run_script
from standin import make_problems, make_tokenizer

PACKAGES = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
# How either version of Transformers reads a checkpoint.
READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer(texts).input_ids
with torch.no_grad():
    losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in ids]
written = tokenizer.batch_decode(ids, skip_special_tokens=True)
print(json.dumps({"ids": ids, "losses": losses, "written": written}))
"""


def main() -> None:
    ArgumentParser(__doc__).parse_args()  # only for --help
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
    """The python of a new virtual environment with Transformers 4 and our other packages."""
    venv.create(folder, with_pip=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A .pth file adds this environment's packages after its own.
    (Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    interpreter = folder / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([str(interpreter), *install, *PACKAGES], check=True)
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
    # As Transformers 5 writes it, with a class and a list that 4 can't read.
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
    """Save ``base`` as a checkpoint, and return the ids, losses and texts to expect from it."""
    import torch

    from engine.loading import load_model, load_tokenizer
    from run.checkpoint import save_checkpoint

    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32, torch.device("cpu"))
    model = model.pretrained
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
        raise UserError(f"{title}: the ids differ")
    largest = max(
        abs(one - other) for one, other in zip(ours["losses"], theirs["losses"], strict=True)
    )
    if largest > 1e-5:
        raise UserError(f"{title}: a loss differs by {largest:.3g}")
    if ours["written"] != theirs["written"]:
        raise UserError(f"{title}: the decoded texts differ")
    print(f"{title}: the same ids of {len(ours['ids'])} texts, losses within {largest:.1g}")


if __name__ == "__main__":
    run_script(main)
