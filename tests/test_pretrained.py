"""Folders that are not a Llama with full weights are refused; best/ opens in other programs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import flags
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import evaluate
import perplexity
import train
from engine.hub import fetch
from engine.llama import Llama
from engine.loading import check_data, check_lengths, load_model, load_tokenizer
from engine.packing import IGNORE, Example, collate
from run.errors import UserError

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_weights(folder: Path, *files: str) -> None:
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).write_text("{}")


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: edit(
        folder / "config.json", quantization_config={"quant_method": method, "bits": 4}
    )


def old_gptq(folder: Path) -> None:
    """As saved before config.json mentioned quantisation."""

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj"
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"] = torch.zeros(4, 48)
        tensors[f"{name}.scales"] = torch.zeros(1, 48)

    change_weights(folder, pack)


def float8(folder: Path) -> None:
    change_weights(
        folder,
        lambda tensors: tensors.update(
            {
                name: weight.to(torch.float8_e4m3fn)
                for name, weight in tensors.items()
                if "mlp" in name
            }
        ),
    )


def more_rows(folder: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.zeros(1, 32)])

    change_weights(folder, grow)


def adapter(folder: Path, keep_weights: bool, keep_config: bool) -> None:
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "somewhere"}'
    )
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    if keep_weights:
        shutil.copyfile(folder / "adapter_model.safetensors", folder / "model.safetensors")
    if not keep_config:
        (folder / "config.json").unlink()


def rename_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"
    )


def lora_inside(folder: Path) -> None:
    change_weights(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
        ),
    )


def compiled_names(folder: Path) -> None:
    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    change_weights(folder, prefix)


def adapted_names(folder: Path) -> None:
    def prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    change_weights(folder, prefix)


def two_vocabularies(folder: Path) -> None:
    change_weights(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": torch.cat([tensors["lm_head.weight"], torch.zeros(1, 32)])},
        ),
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            pointer,
            "model.safetensors: is a pointer to a file that git has not fetched: run git lfs pull",
        ),
        (
            lambda f: rename_weights(f, "consolidated.safetensors"),
            "has consolidated.safetensors, but neither model.safetensors nor the model.s",
        ),
        (
            lambda f: rename_weights(f, "model-00001-of-00002.safetensors"),
            "copy the index too, or rename the file",
        ),
        (lambda f: rename_weights(f, "adapter_model.safetensors"), "contains a PEFT adapter"),
        (
            lora_inside,
            "its files contain a PEFT adapter among the weights "
            "(model.layers.0.self_attn.q_proj.lora_A.weight)",
        ),
        (
            adapted_names,
            "its files contain a PEFT adapter among the weights (base_model.model.lm_head.weight)",
        ),
        (two_vocabularies, "rows: they do not belong together, copy its weights again"),
        (
            lambda f: edit(f / "config.json", vocab_size=None),
            "its config.json does not describe a Llama (",
        ),
        (
            lambda f: edit(f / "config.json", rope_parameters={"rope_type": "banana"}),
            "its config.json does not describe a Llama (",
        ),
        (lambda f: edit(f / "config.json", num_attention_heads=5), "correct that setting"),
        (
            lambda f: edit(f / "config.json", num_hidden_layers=-2),
            "does not describe a Llama (ValueError: num_hidden_layers is -2)",
        ),
        (lambda f: without_weights(f), "has no weights in safetensors: copy its *.safetensors too"),
        (
            lambda f: without_weights(f, "pytorch_model.bin"),
            "has pickled weights only (.bin), which are not read: conv",
        ),
        (
            lambda f: without_weights(f, "pytorch_model.bin.index.json"),
            "has pickled weights only (.bin)",
        ),
        (
            lambda f: without_weights(f, "consolidated.00.pth"),
            "has weights in Meta's own format only (.pth)",
        ),
        (
            lambda f: without_weights(f, "llama.Q4_K_M.gguf"),
            "has weights in GGUF only, which are quantised: name the",
        ),
        (
            quantised("bitsandbytes"),
            "its weights are quantised (its config.json says bitsandbytes)",
        ),
        (quantised("gptq"), "its weights are quantised (its config.json says gptq)"),
        (quantised("awq"), "its weights are quantised (its config.json says awq)"),
        (quantised("fp8"), "its weights are quantised (its config.json says fp8)"),
        (
            quantised("compressed-tensors"),
            "quantised (its config.json says compressed-tensors), so they can't be trained",
        ),
        (old_gptq, "its weights are quantised (they come with model.layers.0.mlp.up_proj.qweight)"),
        (
            float8,
            "its weights are quantised (model.layers.0.mlp.down_proj.weight is stored as F8_E4M3)",
        ),
        (
            compiled_names,
            "the first is model.embed_tokens.weight, and contain 20 that its config.json has no "
            "place for, the first is _orig_mod.model.embed_tokens.weight: save it again under the",
        ),
        (more_rows, "rows, but its config.json says vocab_size"),
        (
            lambda f: edit(f / "config.json", pad_token_id=99999),
            "pad_token_id 99999 with vocab_size",
        ),
        (
            lambda f: adapter(f, True, True),
            "contains a PEFT adapter (adapter_config.json) alongside its weights: merge",
        ),
        (
            lambda f: adapter(f, False, True),
            "contains a PEFT adapter (adapter_config.json) but not the weights themselves",
        ),
        (
            lambda f: adapter(f, False, False),
            "contains a PEFT adapter (adapter_config.json) but not the weights themselves",
        ),
        (
            lambda f: edit(f / "tokenizer_config.json", bos_token="", eos_token="", unk_token=""),
            "an empty bos_token",
        ),
        (
            lambda f: edit(f / "config.json", hidden_act="gelu"),
            "its hidden_act is 'gelu': only 'silu'",
        ),
        (
            lambda f: edit(
                f / "config.json", rope_parameters=LINEAR | {"partial_rotary_factor": 0.5}
            ),
            "has partial_rotary_factor 0.5: only 1 is supported",
        ),
        (
            lambda f: edit(f / "config.json", partial_rotary_factor=0.5),
            "has partial_rotary_factor 0.5: only 1 is supported",
        ),
        (
            lambda f: edit(f / "config.json", attention_dropout=2.0),
            "has attention_dropout 2.0: it must be from 0 to 1",
        ),
        (
            lambda f: edit(f / "generation_config.json", eos_token_id="</s>"),
            "has eos_token_id '</s>': it must be the id of a token, or a list of ids",
        ),
        (
            lambda f: edit(f / "config.json", sliding_window=8),
            "over the model's sliding_window of 8 (null in its config.json if it attends to all",
        ),
        (
            lambda f: edit(f / "config.json", intermediate_size=64),
            "mlp.down_proj.weight has the shape (32, 48), but its",
        ),
    ],
)
@pytest.mark.parametrize("script", [train, perplexity])
def test_each_kind_of_folder_has_its_own_cause_and_cure(
    call,
    settings: dict[str, str],
    tmp_path: Path,
    script,
    damage: Callable[[Path], None],
    words: str,
) -> None:
    """Guards against "damaged or incomplete, copy it again" for folders that are neither."""
    shutil.copytree(settings["model"], folder := tmp_path / "base")
    damage(folder)
    arguments = flags(settings | {"model": str(folder)})
    outcome = call(script, *([] if script is train else ["--ckpt", str(folder)]), *arguments)
    outcome.assert_user_error(words)
    assert "damaged" not in outcome.err


def test_an_empty_quantization_is_none(settings: dict[str, str], tmp_path: Path) -> None:
    for value in ({}, None):
        shutil.copytree(settings["model"], folder := tmp_path / str(value))
        edit(folder / "config.json", quantization_config=value)
        load_model(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_installed_is_not_needed(
    settings: dict[str, str], tmp_path: Path, key: str
) -> None:
    """Guards against a model that is refused for the settings of the program that it served."""
    shutil.copytree(settings["model"], folder := tmp_path / "base")
    edit(folder / "config.json", **{key: "flash_attention_3"})
    model = load_model(folder, torch.float32, torch.device("cpu"))
    assert model.pretrained.generate(torch.tensor([[1]]), max_new_tokens=1).shape == (1, 2)


def test_a_head_of_its_own_is_not_tied_in_what_is_saved(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Transformers 5 loads such a head; 4 would go by the config, and use the embedding."""
    shutil.copytree(settings["model"], folder := tmp_path / "base")
    edit(folder / "config.json", tie_word_embeddings=True)
    outcome = call(train, *flags(settings | {"model": str(folder), "epochs": "1"}))
    assert (
        outcome.code == 0
        and "its head is not tied to its embedding, though its config.json sets" in outcome.out
    )
    best = Path(settings["output_dir"]) / "test" / "best"
    assert json.loads((best / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(best / "model.safetensors")


def test_a_pad_id_that_the_embedding_has_is_no_fault(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """The first Llamas had -1, and Llama-2's generation_config has 0."""
    for pad in (-1, 0, 2, None):
        shutil.copytree(settings["model"], folder := tmp_path / str(pad))
        edit(folder / "config.json", pad_token_id=pad)
        load_model(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "said"), [("0", False), ("false", False), ("1", True), ("ON", True)]
)
def test_offline_is_said_where_it_is_set(
    call, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, value: str, said: bool
) -> None:
    """Guards against a variable that is set to 0 being blamed."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants._is_true(value))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    outcome = call(train, *flags(settings | {"model": "owner/name"}))
    outcome.assert_user_error("model 'owner/name' can't be loaded from the hub")
    assert ("(HF_HUB_OFFLINE is set)" in outcome.err) == said


# ---------------------------------------------------------------- best/ elsewhere

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
LONG |= {"original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_theta": 500000.0, "rope_scaling": LLAMA3}, 500000.0, LLAMA3),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}, 500000.0, LLAMA3),
        ({"rope_parameters": LONG | {"rope_theta": 10000.0}}, 10000.0, LONG),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            10000.0,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
    ids=["Llama-2", "another theta", "as 4 writes it", "as 5 writes it", "longrope", "an old name"],
)
def test_rope_is_written_as_both_generations_read_it(
    call,
    settings: dict[str, str],
    tmp_path: Path,
    given: dict[str, object],
    theta: float,
    scaling: object,
) -> None:
    """Transformers 4 ignores rope_parameters silently, and decodes with a theta of 10,000."""
    shutil.copytree(settings["model"], folder := tmp_path / "base")
    content = json.loads((folder / "config.json").read_text())
    del content["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(content | given))
    assert call(train, *flags(settings | {"model": str(folder), "epochs": "1"})).code == 0
    best = Path(settings["output_dir"]) / "test" / "best"
    written = json.loads((best / "config.json").read_text())
    assert written["rope_theta"] == theta
    read_by_4 = written["rope_scaling"]
    assert read_by_4 is None if scaling is None else scaling.items() <= read_by_4.items()
    assert "rope_theta" not in (read_by_4 or {})  # which 4 takes for a setting that it lacks
    assert written.get("original_max_position_embeddings") == (
        256 if scaling is LONG else None
    )  # 4 looks for it there
    assert (
        LlamaConfig.from_pretrained(best).rope_parameters
        == LlamaConfig.from_pretrained(folder).rope_parameters
    )


@pytest.mark.parametrize(
    ("given", "written"), [(None, 2), (5, [2, 5]), ([5, 7], [2, 5, 7]), (2, 2), ([5, 2], [5, 2])]
)
def test_generate_stops_at_the_eos_that_was_learned(
    call, settings: dict[str, str], tmp_path: Path, given: object, written: object
) -> None:
    """Guards against completions that end here, but nowhere else: the base may name another EOS."""
    shutil.copytree(settings["model"], folder := tmp_path / "base")
    edit(folder / "config.json", eos_token_id=given)
    edit(folder / "generation_config.json", eos_token_id=given)
    assert call(train, *flags(settings | {"model": str(folder), "epochs": "1"})).code == 0
    for name in ("best", "last"):  # of which the second one is not the first save
        saved = Path(settings["output_dir"]) / "test" / name
        assert GenerationConfig.from_pretrained(saved).eos_token_id == written


def test_the_loss_is_the_same_in_transformers_own_model(call, settings: dict[str, str]) -> None:
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    best = Path(settings["output_dir"]) / "test" / "best"
    ids = torch.tensor([[1, *load_tokenizer(best).encode(["Question: How many?\nAnswer: 3"])[0]]])
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(best)(ids, labels=ids).loss
        model = load_model(best, torch.float32, torch.device("cpu"))
        loaded = model.pretrained(ids, labels=ids).loss
        example = Example(ids[0].tolist(), ids[0].tolist())
        ours = model(collate([example], model.kernels)) / (ids.shape[1] - 1)
    assert torch.equal(theirs, loaded)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_a_folder_is_fetched_as_it_is(settings: dict[str, str]) -> None:
    assert fetch(settings["model"]) == Path(settings["model"])
    assert evaluate.fetch is fetch


# ---------------------------------------------------------------- the limits of a model


@pytest.mark.parametrize("kind", ["positions", "longrope", "window"])
def test_what_just_fits_is_trained_and_decoded(model: Llama, kind: str) -> None:
    """Guards against positions that the model has not learned, and against a limit one too low."""
    model.config.max_position_embeddings = 20 if kind == "positions" else 40
    if kind == "longrope":
        model.config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 20}
    model.config.sliding_window = 20 if kind == "window" else 30
    row = Example([1] * 20, [IGNORE] * 12 + [1] * 8)
    prompt = [1] * 12
    check_lengths(model, [row], [prompt], 8)
    for rows, prompts, new, words in (
        ([row, Example([1] * 21, [IGNORE] * 12 + [1] * 9)], [prompt], 8, "row has 21 tokens"),
        ([row], [prompt], 9, "with max_new_tokens has 21 tokens, over the model's"),
        ([row], [prompt, [*prompt, 1]], 8, "with max_new_tokens has 21 tokens"),
        ([row, Example([1] * 20, [IGNORE] * 13 + [1] * 7)], [prompt], 8, "max_new_tokens has 21"),
        ([row], [[1] * 21], 0, "the longest prompt has 21 tokens"),
    ):
        with pytest.raises(UserError, match=words):
            check_lengths(model, rows, prompts, new)


def test_the_last_id_of_the_embedding_is_the_largest(model: Llama) -> None:
    """Guards against a lookup outside the embedding, of the rows or of validation's prompts."""
    size = model.pretrained.get_input_embeddings().num_embeddings
    row = Example([1, 2], [IGNORE, 2])
    check_data(model, [Example([1, size - 1], [IGNORE, 2])], [[size - 1]], 8, "name")
    for rows, prompts in (([Example([1, size], [IGNORE, 2])], [[1]]), ([row], [[1], [size]])):
        with pytest.raises(
            UserError, match=f"the id {size}, but its embedding has only {size} row"
        ):
            check_data(model, rows, prompts, 8, "name")
