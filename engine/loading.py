"""Tokenizers and models, loaded from Hugging Face folders and checked against the data."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from engine import device_errors, memory, packing
from engine.agreement import check_same_on_all
from engine.device import Kernels, kernels_for, pick_device
from engine.hub import fetch
from engine.llama import Llama
from engine.ranks import ALONE, Ranks
from engine.recipe import Recipe, weight_bytes
from engine.refusals import (
    Shape,
    check_folder,
    check_names,
    check_shapes,
    damaged,
    refuse_code,
    refuse_pointer,
)
from engine.shape import not_a_llama, read_config, read_shape
from engine.sharding import is_spread
from engine.tokenizer import Tokenizer
from engine.tokenizer_files import made_without_scores, read_files
from run.errors import UserError

if TYPE_CHECKING:
    from run.method import Adapter

# Errors end in one line of our own. Transformers' warnings, and its progress bars where there is no
# terminal, would hide that line.
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# PEFT imports bitsandbytes, which warns of a missing package for a kernel that is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


# ---------------------------------------------------------------- loading


def load_tokenizer(folder: Path, trained_with: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer in ``folder``.

    A base model must use the ids of its vocabulary file. A checkpoint of ours keeps the ids that it
    was trained with, and prints a warning if they differ from the file's.

    Args:
        trained_with: None for a base model. For a checkpoint of ours, the record of its tokenizer
            in training.json, empty if an older version wrote none.

    Raises:
        UserError: it can't be read, or is rejected (see `Tokenizer`).
    """
    refuse_code(folder)
    try:
        files = read_files(folder)
    except OSError as error:
        raise UserError(
            f"model {folder}: its tokenizer can't be read ({error.strerror}): copy it again"
        ) from None
    for name, content in files.items():
        refuse_pointer(folder / name, content)
    tokenizer = Tokenizer(files, str(folder), keep_ids=trained_with is not None)
    if trained_with is None or tokenizer.other_ids:
        return tokenizer
    if trained_with.get("other_ids") or (not trained_with and made_without_scores(files)):
        tokenizer.other_ids = True
        print(
            f"model {folder}: was trained by an older version, which ignored the scores in its "
            "base's tokenizer.model, with ids that may not be SentencePiece's; they are kept"
        )
    return tokenizer


def check_fits(
    name: str | Path,
    dtype: torch.dtype,
    adapter: "Adapter | None" = None,
    available: int | None = None,
) -> None:
    """Raises UserError if a model's weights exceed the device's memory, before they are downloaded.

    Args:
        name: its folder or hub id.
        adapter: what is added to its base model, which takes the place of ``name``.
        available: the memory of the device in bytes; None: that of this one, unless it is a CPU.
    """
    available = available or memory.total_bytes(pick_device())
    if available is None:
        return
    name, recipe = (adapter.base, recipe_of(adapter)) if adapter else (name, Recipe())
    shape = read_shape(fetch(str(name), ["config.json"]), dtype)
    needed, number = weight_bytes(shape, recipe), shape.parameters
    if needed > available:
        smaller = "set dtype bfloat16, or " if dtype == torch.float32 else ""
        raise UserError(
            f"model {name}: the weights of its {shape.size} take "
            f"{needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} ({needed / number:.3g} "
            f"bytes each), over the {available / 1e9:.1f} GB of the device: {smaller}take a larger "
            "device or a smaller model"
        )


def recipe_of(adapter: "Adapter") -> Recipe:
    return Recipe("qlora" if adapter.is_base_quantised else "lora", adapter.rank)


@memory.reported("loading the weights", memory.LARGER_DEVICE)
def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | None = None,
    kernels: Kernels | None = None,
    adapter: "Adapter | None" = None,
    ranks: Ranks = ALONE,
) -> Llama:
    """The model in ``folder``, in eval mode.

    Args:
        device: None: see `pick_device`.
        adapter: what to add to it; its own weights are then frozen.
        ranks: the processes that `engine.sharding` spreads it over; of several, each leaves the
            weights in host memory.

    Raises:
        UserError: it can't be read, is not an unquantised Llama, lacks weights, or does not fit
            into memory.
    """
    check_folder(folder)
    config, shapes = _read_config(folder)
    # Adapters belong to a base that is rounded to the dtype in which they were trained.
    rounded = getattr(torch, adapter.dtype) if adapter else dtype
    try:
        check_shapes(folder, shapes)
        model, report = LlamaForCausalLM.from_pretrained(
            folder, config=config, dtype=rounded, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # Transformers, safetensors and torch raise many types
        if device_errors.is_out_of_memory(error):
            raise
        raise damaged(folder, "weights", error) from None
    check_names(folder, report["missing_keys"], report["unexpected_keys"])
    _untie_head_of_its_own(model, folder)
    model.generation_config = _without_sampling(model.generation_config)
    device = device or pick_device()
    kernels = kernels or kernels_for(device)
    if dtype != rounded:
        for weight in model.parameters():
            weight.data = weight.data.to(dtype)
    if adapter and adapter.is_base_quantised:
        from engine.nf4 import quantise

        quantise(model, folder, device)
    kernels.replace_linear_layers(model)
    llama = Llama(model.to(device) if ranks.size == 1 else model, kernels)
    llama.ranks = ranks
    if adapter:
        from engine.lora import add_adapters

        add_adapters(llama, adapter)
    return llama.eval()


def _without_sampling(config: GenerationConfig) -> GenerationConfig:
    """``config`` without the sampling settings of Llama-2's, which our decoding does not use.

    They are inconsistent, and would make save_pretrained raise an error after training.
    """
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )


def _read_config(folder: Path) -> tuple[LlamaConfig, dict[str, Shape]]:
    """The configuration in config.json, and the shape that it implies for each weight."""
    config = read_config(folder)
    try:
        with torch.device("meta"):
            weights = LlamaForCausalLM(config).state_dict()
    except Exception as error:  # Transformers and torch raise many types
        raise not_a_llama(folder, error) from None
    return config, {name: tuple(weight.shape) for name, weight in weights.items()}


def _untie_head_of_its_own(model: LlamaForCausalLM, folder: Path) -> None:
    """Keep a head that differs from the embedding, whatever tie_word_embeddings says.

    Transformers 5 loads a separate head in spite of the setting. Transformers 4 goes by the setting
    alone, so it would use the embedding in its place when it opens our checkpoint.
    """
    is_own = model.lm_head.weight is not model.model.embed_tokens.weight
    if model.config.tie_word_embeddings and is_own:
        model.config.tie_word_embeddings = False
        print(
            f"model {folder}: its head is not tied to its embedding, though its config.json sets "
            "tie_word_embeddings; the head is kept"
        )


def copy_from_mapped_file(model: Llama) -> None:
    """Copy the weights from their memory-mapped file into ordinary memory.

    A file that is removed while it is mapped, like a replaced checkpoint, keeps its disk space.
    """
    for parameter in model.trained:
        if parameter.device.type == "cpu" and not is_spread(parameter):  # which is a copy
            parameter.data = parameter.data.clone()


# ---------------------------------------------------------------- model, tokenizer and data match


def check_ids(model: Llama, sequences: Iterable[list[int]], name: str) -> None:
    """Raises UserError if a sequence contains an id for which the embedding has no row.

    A tokenizer may have tokens without a row, such as a pad token, as long as no text needs them.
    """
    rows = model.pretrained.get_input_embeddings().num_embeddings
    largest = max((max(ids) for ids in sequences if ids), default=0)
    if largest >= rows:
        raise UserError(
            f"model {name!r}: its tokenizer produces the id {largest}, but its embedding has only "
            f"{rows} rows: use the tokenizer that the model was made with"
        )


def check_positions(model: Llama, longest: int, what: str, cure: str) -> None:
    """Raises UserError if a sequence of ``longest`` tokens exceeds the model's positions.

    LongRoPE (arXiv:2402.13753) has other frequencies for sequences longer than the original ones.
    Transformers chooses them by the longest of all that it computes together, so the loss of a
    shorter one would depend on the others. With a sliding window, its `generate` forgets what lies
    before the window, but its loss does not.
    """
    positions = model.config.max_position_embeddings
    limit = f"{positions} positions"
    rope = model.config.rope_parameters
    if rope["rope_type"] == "longrope" and rope["original_max_position_embeddings"] < positions:
        positions = rope["original_max_position_embeddings"]
        limit = f"{positions} original positions (longrope)"
    window = getattr(model.config, "sliding_window", None)
    if isinstance(window, int) and window < positions:
        positions = window
        limit = f"sliding_window of {window} (null in its config.json if it attends to all tokens)"
    if longest > positions:
        raise UserError(f"{what} has {longest} tokens, over the model's {limit}: {cure}")


def check_data(
    model: Llama,
    examples: Sequence[packing.Example],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    name: str,
) -> None:
    """Raises UserError if an id has no row in the embedding, or a sequence has too many tokens.

    Or if several ranks do not have the same rows and weights.
    """
    check_same_on_all(model, examples)
    check_ids(model, [*(example.input_ids for example in examples), *prompts], name)
    check_lengths(model, examples, prompts, max_new_tokens)


def check_lengths(
    model: Llama,
    examples: Sequence[packing.Example],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
) -> None:
    """Raises UserError if a row, or a prompt and its completion, exceeds the model's positions."""
    longest = max(len(example.input_ids) for example in examples)
    check_positions(model, longest, "the longest row", "set a smaller max_length")
    trained = [example.labels.count(packing.IGNORE) for example in examples]
    check_prompts(model, max([*trained, *map(len, prompts)]), max_new_tokens)


def check_prompts(model: Llama, longest: int, max_new_tokens: int) -> None:
    """Raises UserError if a prompt of ``longest`` tokens, or its completion, is too long."""
    cure = "take rows with so long a question out of the data set"
    check_positions(model, longest, "the longest prompt", cure)
    what, cure = "the longest prompt with max_new_tokens", "set a smaller max_new_tokens"
    check_positions(model, longest + max_new_tokens, what, cure)
