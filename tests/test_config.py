"""Settings: all faults at once, by name; nothing guessed."""

from dataclasses import fields
from pathlib import Path

import pytest
from conftest import flags

import evaluate
import perplexity
import train
from run import config
from run.errors import UserError

ROOT = Path(config.__file__).parents[1]
SHIPPED = (ROOT / "config.yaml").read_text()


def edited(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = SHIPPED
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", ["config.yaml", "demo.yaml"])
def test_shipped_files_hold_exactly_the_fields_each_with_a_comment(name: str) -> None:
    values, comments = config.read_settings(ROOT / name)
    assert list(values) == [field.name for field in fields(config.Config)]
    assert all(comments.values())
    config.load_config(ROOT / name, {})


def test_the_default_is_the_published_recipe() -> None:
    """gsm8k-ScRel: 3 epochs, 128 sequences a step, AdamW 2e-5, cosine, 3 % warmup, no weight decay."""
    found = config.load_config(config.CONFIG_FILE, {})
    assert (found.model, found.dataset) == ("meta-llama/Llama-2-7b-hf", "openai/gsm8k")
    assert (found.epochs, found.batch_size, found.learning_rate) == (3, 128, 2e-5)
    assert (found.lr_schedule, found.warmup_ratio, found.weight_decay) == ("cosine", 0.03, 0.0)
    assert (found.prompt, found.max_length, found.resume) == (
        "Question: {question}\nAnswer:",
        1024,
        "auto",
    )
    assert (found.checkpoint_steps, found.wandb_mode) == (100, None)


def test_all_faults_are_reported_together_by_name(call, tmp_path: Path) -> None:
    """Guards against one error a try, and against a duplicate key that wins silently."""
    file = edited(
        tmp_path,
        ("batch_size: 128", "batch_size: many"),
        ("learning_rate: 2e-5", "learning_rate: -2e-5"),
        ("seed: 0", "sead: 0"),
        ("epochs: 3", "epochs: 3\nepochs: 4"),
        ("dtype: bfloat16", "dtype: fp16"),
        ("warmup_ratio: 0.03", "warmup_ratio: .inf"),
    )
    outcome = call(train, "--config", str(file))
    outcome.assert_user_error(
        f"{file}: ",
        "batch_size: 'many' must be a whole number",
        "learning_rate: '-2e-5' must be greater than 0",
        "'sead' is no setting: did you mean 'seed'?",
        "seed is missing",
        "epochs is set twice",
        "dtype: 'fp16' must be 'bfloat16' or 'float32'",
        "warmup_ratio: '.inf' must be a valid number",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "0"),
        ("learning_rate", "null"),
        ("warmup_ratio", "1"),
        ("min_lr_ratio", "1.1"),
        ("adam_beta1", "1.0"),
        ("max_grad_norm", "0"),
        ("epochs", "0"),
        ("epochs", "1.5"),
        ("epochs", "1.0"),
        ("epochs", "1_0"),
        ("output_dir", "a\tb\x07"),
        ("model", "\udcff"),
        ("epochs", "-1"),
        ("epochs", ""),
        ("batch_size", "1e2"),
        ("checkpoint_steps", "0"),
        ("seed", "-1"),
        ("gradient_checkpointing", "maybe"),
        ("gradient_checkpointing", "null"),
        ("resume", "always"),
        ("wandb_mode", "on"),
        ("lr_schedule", "Cosine"),
        ("run_name", "../escape"),
        ("run_name", "/absolute"),
        ("run_name", ".."),
        ("run_name", ".hidden"),
        ("run_name", ""),
        ("run_name", "a/b"),
        ("run_name", "name\n"),
        ("prompt", "no place for it"),
        ("prompt", "{question} {question}"),
        ("prompt", "Question: {question}\\nAnswer:"),
        ("model", ""),
        ("dataset", ""),
        ("micro_batch_tokens", "1023"),
    ],
)
def test_values_out_of_range_are_refused(call, key: str, value: str) -> None:
    call(train, f"--{key}={value}").assert_user_error(
        f"{key}: ", "must" if "\\n" not in value else "real line break"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("0.00001", 1e-5), ("1.0e-05", 1e-5), ("5", 5.0)],
)
def test_numbers_in_every_spelling(tmp_path: Path, text: str, value: float) -> None:
    """Guards against YAML 1.1, to which 1e-5 is a string."""
    file = edited(tmp_path, ("learning_rate: 2e-5", f"learning_rate: {text}"))
    assert config.load_config(file, {}).learning_rate == value
    assert train.read_arguments(["--learning_rate", text])[0].learning_rate == value


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("no", False), ("off", False), ("True", True)]
)
def test_booleans(text: str, value: bool) -> None:
    """Guards against argparse's type=bool, to which every text is true."""
    assert (
        train.read_arguments(["--gradient_checkpointing", text])[0].gradient_checkpointing is value
    )


def test_no_is_a_text_where_a_text_is_asked(tmp_path: Path) -> None:
    """Guards against YAML 1.1, to which no is False."""
    file = edited(tmp_path, ("run_name: llama-2-7b-gsm8k", "run_name: no"))
    assert config.load_config(file, {}).run_name == "no"


def test_null_is_the_empty_value(tmp_path: Path) -> None:
    file = edited(tmp_path, ("max_grad_norm: 1.0", "max_grad_norm: null"))
    assert config.load_config(file, {}).max_grad_norm is None
    assert train.read_arguments(["--max_grad_norm", "null"])[0].max_grad_norm is None
    file = edited(tmp_path, ("max_grad_norm: 1.0 ", "max_grad_norm:  "))
    with pytest.raises(UserError, match="max_grad_norm: ''"):
        config.load_config(file, {})


def test_the_flag_beats_the_file(tmp_path: Path) -> None:
    file = edited(tmp_path, ("epochs: 3", "epochs: 5"))
    assert train.read_arguments(["--config", str(file)])[0].epochs == 5
    assert train.read_arguments(["--config", str(file), "--epochs", "7"])[0].epochs == 7
    assert train.read_arguments(["--epochs", "7", f"--config={file}"])[0].epochs == 7


def test_a_flag_given_twice_is_refused(call) -> None:
    """Guards against the second of two values that wins silently, as in the file."""
    call(train, "--epochs", "2", "--epochs=9").assert_user_error("--epochs is given twice")


def test_a_flag_repairs_the_file(tmp_path: Path) -> None:
    """What is wrong in the file and typed anew is no fault."""
    file = edited(tmp_path, ("epochs: 3", "epochs: none"))
    assert train.read_arguments(["--config", str(file), "--epochs", "7"])[0].epochs == 7


@pytest.mark.parametrize("script", [train, evaluate, perplexity])
@pytest.mark.parametrize(
    "argument", [["--epoch", "3"], ["--conf", "x"], ["stray"], ["--epochs"], ["--lr", "1"]]
)
def test_abbreviated_and_unknown_flags_are_refused(call, script, argument: list[str]) -> None:
    """Guards against --epoch taken for --epochs."""
    call(script, *argument).assert_user_error("command line: ", "--help")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a\n- b\n",
        b"text",
        b"key: [1, 2]\n",
        b"a: {b: c}\n",
        b"a: 'x\n",
        b"\xff\xfe",
        b"a: !!python/none\n? [x]\n: 1\n",
    ],
)
def test_files_that_are_no_settings(call, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    call(train, "--config", str(file)).assert_user_error(str(file))


def test_missing_file_and_folder(call, tmp_path: Path) -> None:
    call(train, "--config", str(tmp_path / "none.yaml")).assert_user_error(
        "none.yaml: can't be read", "--config FILE"
    )
    call(train, "--config", str(tmp_path)).assert_user_error("can't be read")


def test_python_objects_in_yaml_stay_text(call, tmp_path: Path) -> None:
    """Guards against a YAML loader that makes objects: the tag must do nothing but fail the type check."""
    marker = tmp_path / "executed"
    tag = f"!!python/object/apply:os.system ['touch {marker}']"
    outcome = call(train, "--config", str(edited(tmp_path, ("seed: 0", f"seed: {tag}"))))
    outcome.assert_user_error("seed is missing")
    assert not marker.exists()


def test_resolved_settings_read_back_unchanged(settings: dict[str, str], tmp_path: Path) -> None:
    resolved, _ = train.read_arguments([*flags(settings), "--prompt", "Q: {question}\n\tA: ’#’:"])
    (tmp_path / "config.yaml").write_text(config.settings_text(resolved))
    assert train.read_arguments(["--config", str(tmp_path / "config.yaml")])[0] == resolved


@pytest.mark.parametrize("key", ["model", "dataset", "output_dir", "prompt"])
def test_what_the_locale_cannot_read_says_what_helps(key: str) -> None:
    """As a path in other letters under LC_ALL=C; pydantic's words name no cure."""
    with pytest.raises(UserError) as error:
        config.load_config(config.CONFIG_FILE, {key: "caf\udcc3\udca9{question}"})
    assert f"{key}: 'caf\\udcc3\\udca9{{question}}' must be valid UTF-8, in a locale" in str(
        error.value
    )
    assert "LC_ALL=C.UTF-8" in str(error.value) and "parse raw data" not in str(error.value)
