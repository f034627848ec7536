"""Settings: all faults at once, by name; nothing guessed."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import flags, seal

import augment
import evaluate
import perplexity
import report
import train
from run import config, files, folder, model_source, setting_types
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


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    files.forget_what_was_said()


@pytest.mark.parametrize("name", ["config.yaml", "demo.yaml"])
def test_shipped_files_hold_exactly_the_fields_each_with_a_comment(name: str) -> None:
    """And demo.yaml those that differ, so that a reader sees which."""
    values, comments = config.read_settings(ROOT / name)
    shipped = config.load_config(ROOT / name, {})
    default = config.load_config(config.CONFIG_FILE, {})
    keys = [field.name for field in fields(config.Config)]
    if name == "demo.yaml":
        keys = [key for key in keys if getattr(shipped, key) != getattr(default, key)]
        assert 10 < len(keys) < 20
    assert list(values) == keys
    assert all(comments.values())


def test_shipped_files_are_narrow() -> None:
    for name in ("config.yaml", "demo.yaml"):
        assert max(map(len, (ROOT / name).read_text().splitlines())) <= 100


def test_the_default_is_the_published_recipe() -> None:
    """gsm8k-ScRel: 3 epochs, 128 sequences a step, AdamW 2e-5, cosine, 3 % warmup, no decay."""
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
    again = file.read_text().partition("epochs: 4")[0].count("\n") + 1
    outcome = call(train, "--config", str(file))
    outcome.assert_user_error(
        f"{file}: ",
        "batch_size: 'many' must be a positive integer",
        "learning_rate: '-2e-5' must be a positive, finite number",
        "unknown setting 'sead': did you mean 'seed'?",
        f"epochs is set twice (again on line {again})",
        "dtype: 'fp16' must be 'bfloat16' or 'float32'",
        "warmup_ratio: '.inf' must be a number of at least 0 and below 1",
    )
    with pytest.raises(UserError) as error:  # of config.yaml itself, which has every setting
        config.read_files(file, base=file)
    assert str(error.value).startswith(f"{file}: epochs is set twice")
    for fragment in ("seed is missing: add it", "unknown setting 'sead'", "batch_size: 'many'"):
        assert fragment in str(error.value)


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
        ("mask_rate", "1.1"),
        ("mask_rate", "-0.1"),
        ("mask_warmup_ratio", "nan"),
        ("mask_token", ""),
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
        ("keep_state", "null"),
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
        ("max_length", "1"),
        ("seed", str(2**32)),
        ("run_name", 129 * "a"),
        ("output_dir", "a\rb"),
        ("weight_decay", "-0.1"),
    ],
)
def test_values_out_of_range_are_refused(call, key: str, value: str) -> None:
    call(train, f"--{key}={value}").assert_user_error(
        f"{key}: ", "must" if "\\n" not in value else "real line break"
    )


def test_the_ends_of_ranges_are_accepted() -> None:
    """Guards against a limit that excludes what its message allows."""
    ends = {"max_length": 2, "micro_batch_tokens": 2, "seed": 2**32 - 1, "run_name": 128 * "a"}
    ends |= {"min_lr_ratio": 1.0, "warmup_ratio": 0.0, "weight_decay": 0.0}
    typed = {key: str(value) for key, value in ends.items()}
    made = config.load_config(config.CONFIG_FILE, typed)
    assert {key: getattr(made, key) for key in ends} == ends


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
    ("text", "value"),
    [("true", True), ("no", False), ("off", False), ("True", True), ("null", None)],
)
def test_booleans(text: str, value: bool | None) -> None:
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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028", "\u2029"])
def test_lines_end_where_yaml_ends_them(tmp_path: Path, end: str) -> None:
    """Guards against a comment that is sought in a line that the file seems not to have."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"epochs: 2{end}{end}seed: 4  # a seed", encoding="utf-8", newline="")
    values = {"epochs": "2", "seed": "4"}
    assert config.read_settings(file) == (values, {"epochs": "", "seed": "a seed"})


def test_the_flag_beats_the_file(tmp_path: Path) -> None:
    file = edited(tmp_path, ("epochs: 3", "epochs: 5"))
    assert train.read_arguments(["--config", str(file)])[0].epochs == 5
    assert train.read_arguments(["--config", str(file), "--epochs", "7"])[0].epochs == 7
    assert train.read_arguments(["--epochs", "7", f"--config={file}"])[0].epochs == 7


def test_a_flag_given_twice_is_refused(call) -> None:
    """Guards against the second of two values that wins silently, as in the file."""
    call(train, "--epochs", "2", "--epochs=9").assert_user_error("--epochs is given twice")


@pytest.mark.parametrize(
    ("script", "words", "fault"),
    [
        (evaluate, "--limit 5 --limit=7", "--limit is given twice: keep one"),
        (perplexity, "--ckpt a --ckpt b", "--ckpt is given twice: keep one"),
        (
            augment,
            "--samples a --samples b --output c",
            "--samples is given twice: keep one, with all values behind it",
        ),
        (report, "--run a --run b", "--run is given twice: keep one, with all values behind it"),
        (evaluate, "--output=", "argument --output: '' must name a file or folder"),
        (report, "--run=", "argument --run: '' must name a file or folder"),
    ],
)
def test_a_flag_of_one_script_is_given_once_and_not_empty(
    call, script, words: str, fault: str
) -> None:
    """Guards against samples that are left out silently, and an output that goes anywhere."""
    call(script, *words.split()).assert_user_error(f"command line: {fault}")


def test_docstrings_need_not_be_there() -> None:
    """Guards against a command line that only Python with docstrings can read (python -OO)."""
    here = Path(evaluate.__file__).parent
    command = [sys.executable, "-OO", "report.py", "--run", "nothing-here"]
    end = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert (end.returncode, end.stderr.splitlines()[0][:20]) == (2, "error: nothing-here:")


def test_a_flag_repairs_the_file(tmp_path: Path) -> None:
    """What is wrong in the file and typed anew is no fault."""
    file = edited(tmp_path, ("epochs: 3", "epochs: none"))
    assert train.read_arguments(["--config", str(file), "--epochs", "7"])[0].epochs == 7


@pytest.mark.parametrize("script", [train, evaluate, perplexity])
def test_a_config_file_is_named_once(call, script) -> None:
    """Guards against a settings file that is ignored silently."""
    twice = ["--config", "demo.yaml", "--config=demo.yaml"]
    call(script, *twice).assert_user_error("--config is given twice")
    call(script, "--config=").assert_user_error("--config names no file")


def test_a_file_may_have_the_name_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an overlay that is taken for the flags."""
    monkeypatch.chdir(tmp_path)
    Path("command line").write_text("epochs: 7\n")
    assert train.read_arguments(["--config", "command line", "--seed", "5"])[0].epochs == 7


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
    """Guards against a YAML loader that makes objects: the tag must only fail the type check."""
    marker = tmp_path / "executed"
    tag = f"!!python/object/apply:os.system ['touch {marker}']"
    outcome = call(train, "--config", str(edited(tmp_path, ("seed: 0", f"seed: {tag}"))))
    outcome.assert_user_error("a setting is one value, not a list or a mapping")
    assert not marker.exists()


def test_resolved_settings_read_back_unchanged(settings: dict[str, str], tmp_path: Path) -> None:
    resolved, *_ = train.read_arguments([*flags(settings), "--prompt", "Q: {question}\n\tA: ’#’:"])
    (tmp_path / "config.yaml").write_text(config.settings_text(resolved))
    assert train.read_arguments(["--config", str(tmp_path / "config.yaml")])[0] == resolved


@pytest.mark.parametrize("key", ["model", "dataset", "output_dir", "prompt"])
def test_what_the_locale_cannot_read_says_what_helps(key: str) -> None:
    """As a path in other letters under LC_ALL=C; pydantic's words name no cure."""
    with pytest.raises(UserError) as error:
        config.load_config(config.CONFIG_FILE, {key: "caf\udcc3\udca9{question}"})
    shown = f'{key}: "caf\\udcc3\\udca9{{question}}"'
    assert f"{shown} must be valid UTF-8, in a locale" in str(error.value)
    assert "LC_ALL=C.UTF-8" in str(error.value) and "parse raw data" not in str(error.value)


# ---------------------------------------------------------------- files that hold what differs


def overlay(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    file = tmp_path / name
    file.write_text(text)
    return file


def test_a_file_may_hold_only_what_differs(tmp_path: Path) -> None:
    file = overlay(tmp_path, "epochs: 5\n")
    default = config.load_config(config.CONFIG_FILE, {})
    assert config.load_config(file, {}) == replace(default, epochs=5)
    assert train.read_arguments(["--config", str(file)])[0] == replace(default, epochs=5)


def test_the_flag_beats_the_file_and_the_file_beats_config_yaml(tmp_path: Path) -> None:
    file = overlay(tmp_path, "epochs: 5\nbatch_size: 6\n")
    found = train.read_arguments(["--batch_size", "7", "--config", str(file)])[0]
    assert (found.epochs, found.batch_size, found.seed) == (5, 7, 0)


def test_a_relative_file_is_found_from_where_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay(tmp_path, "epochs: 5\n")
    monkeypatch.chdir(tmp_path)
    assert train.read_arguments(["--config", "mine.yaml"])[0].epochs == 5


def test_faults_are_named_with_the_source_that_they_come_from(call, tmp_path: Path) -> None:
    """Guards against a fault of the command line that is looked for in a file."""
    file = overlay(tmp_path, "epoch: 5\nseed: x\nepochs: 0\n")
    outcome = call(train, "--config", str(file), "--batch_size", "0", "--epochs", "1")
    outcome.assert_user_error(
        f"error: {file}: unknown setting 'epoch': did you mean 'epochs'?; seed: 'x' must be",
        "; command line: batch_size: '0' must be a positive integer",
    )
    assert "epochs: " not in outcome.err  # the flag repairs it


def test_what_two_sources_disagree_on_is_named_with_the_smaller_one(tmp_path: Path) -> None:
    file = overlay(tmp_path, "micro_batch_tokens: 512\n")
    with pytest.raises(UserError, match=f"^{file}: micro_batch_tokens: 512 must be at least"):
        config.load_config(file, {})
    assert config.load_config(file, {"max_length": "512"}).micro_batch_tokens == 512


def test_config_yaml_itself_leaves_nothing_out(tmp_path: Path) -> None:
    """What no file sets is missing from config.yaml, not from the file on top of it."""
    base = edited(tmp_path, ("epochs: 3 ", "# "), ("seed: 0 ", "# "))
    file = overlay(tmp_path, "seed: 5\n")
    with pytest.raises(UserError, match=f"^{base}: epochs is missing: add it [^;]*$"):
        config.read_files(file, base).with_flags({})
    assert config.read_files(file, base).with_flags({"epochs": "2"}).seed == 5


@pytest.mark.parametrize("fault", ["", "epochs: 3\nepochs: 4\n", "seed: [1]\n"])
def test_a_faulty_file_is_reported_with_what_is_wrong_in_config_yaml(
    tmp_path: Path, fault: str
) -> None:
    base = edited(tmp_path, ("epochs: 3 ", "epochs: 3\nepochs: 4 "), ("seed: 0 ", "seed: x "))
    with pytest.raises(UserError) as error:
        config.read_files(overlay(tmp_path, f"dtype: float\n{fault}"), base)
    assert f"{base}: epochs is set twice" in str(error.value)
    assert "dtype: 'float' must be" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_file_changes_is_reported_at_the_start(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    """Guards against a demo whose reader cannot see what differs, and noise about the rest."""
    file = overlay(tmp_path, "epochs: 1\nseed: 0\nlearning_rate: 2.0e-05\nlog_every: 3\n")
    with_file = ["--config", str(file), *flags({k: settings[k] for k in settings if k != "epochs"})]
    del with_file[with_file.index("--learning_rate") : with_file.index("--learning_rate") + 2]
    outcome = call(train, *with_file)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"settings: 2 from {file}: epochs, log_every\n")
    assert outcome.out.count("settings: ") == 1
    files.forget_what_was_said()
    outcome = call(perplexity, "--ckpt", settings["model"], "--limit", "1", *with_file)
    assert outcome.out.startswith(f"settings: 2 from {file}: epochs, log_every\n")
    for arguments in ([], ["--config", str(config.CONFIG_FILE)]):
        files.forget_what_was_said()
        assert "settings: " not in call(train, *flags(settings | {"model": "x"}), *arguments).out


def test_a_resolved_file_changes_what_its_run_changed(
    call, settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against 2.0e-05 reported as another value than 2e-5."""
    resolved, *_ = train.read_arguments(["--epochs", "5", "--max_grad_norm", "null"])
    file = overlay(tmp_path, config.settings_text(resolved))
    assert len(config.read_settings(file)[0]) == len(config.KEYS)
    again, *_ = train.read_arguments(["--config", str(file)])
    assert again == resolved
    assert capsys.readouterr().out == f"settings: 2 from {file}: epochs, max_grad_norm\n"
    files.forget_what_was_said()
    train.read_arguments(["--config", str(overlay(tmp_path, "epochs: 3\n"))])
    assert capsys.readouterr().out.endswith("mine.yaml, which changes nothing\n")
    files.forget_what_was_said()  # and a flag on top is no change of the file's
    file = overlay(tmp_path, "epochs: 5\nlog_every: 3\n")
    train.read_arguments(["--config", str(file), "--epochs", "7"])
    assert capsys.readouterr().out == f"settings: 1 from {file}: log_every\n"


@pytest.mark.parametrize("script", [train, evaluate, perplexity])
def test_help_shows_every_setting_with_the_value_of_the_file_on_top(
    script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its meaning, also where the file has none; and nothing is reported as of a start."""
    file = overlay(tmp_path, "epochs: 55 # mine\n")
    with pytest.raises(SystemExit):
        script.read_arguments(["--config", str(file), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "settings (values from mine.yaml and config.yaml)" in shown
    assert "passes over the training rows (now '55')" in shown
    assert "sequences per optimizer step (now '128')" in shown
    assert "settings: " not in shown


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a file that is edited between two looks at it."""
    file, read = overlay(tmp_path, "epochs: 5\n"), []
    original = Path.read_text

    def read_text(self: Path, **keywords: object) -> str:
        read.append(self)
        return original(self, **keywords)

    monkeypatch.setattr(Path, "read_text", read_text)
    train.read_arguments(["--config", str(file)])
    assert read == [config.CONFIG_FILE, file]


def test_a_setting_newer_than_the_checkpoint_is_taken_from_the_files(
    call, settings: dict[str, str], tmp_path: Path
) -> None:
    assert call(train, *flags(settings | {"epochs": "1"})).code == 0
    best = Path(settings["output_dir"]) / settings["run_name"] / "best"
    description = json.loads((best / "training.json").read_text())
    del description["settings"]["max_new_tokens"]
    (best / "training.json").write_text(json.dumps(description))
    seal(best)
    found = config.read_files(overlay(tmp_path, "max_new_tokens: 11\nepochs: 9\n"))
    resolved = model_source.resolve_source(str(best), found, {"seed": "4"}).config
    assert (resolved.max_new_tokens, resolved.epochs, resolved.seed) == (11, 1, 4)


# ---------------------------------------------------------------- values as they are shown


@pytest.mark.parametrize(
    ("value", "shown", "in_a_sentence"),
    [
        (None, "null", "null"),
        (False, "false", "false"),
        (1e-5, "1e-5", "1e-5"),
        (0.667, "0.667", "0.667"),
        (1.5e-10, "1.5e-10", "1.5e-10"),
        (128, "128", "128"),
        ("~/base", "~/base", "'~/base'"),
        ("Q: {question} #A", '"Q: {question} #A"', "'Q: {question} #A'"),
        ("<unk>", "<unk>", "'<unk>'"),
        (">", '">"', "'>'"),
        ("-", '"-"', "'-'"),
        ("a  b\u202e\U000e0001",) + ('"a  b\\u202e\\U000e0001"',) * 2,
        ("Question: {question}\nAnswer:",) + ('"Question: {question}\\nAnswer:"',) * 2,
    ],
)
def test_values_are_shown_as_users_write_them(
    tmp_path: Path, value: object, shown: str, in_a_sentence: str
) -> None:
    """Guards against Python's False and 1e-05, and against text that YAML reads as another."""
    assert (setting_types.in_yaml(value), setting_types.quoted(value)) == (shown, in_a_sentence)
    file = tmp_path / "settings.yaml"
    for text in (shown, in_a_sentence):
        file.write_text(f"key: {text}  # comment\n")
        read = config.read_settings(file)[0]["key"]
        assert read == "null" if value is None else setting_types.parse(type(value), read) == value


def resume(
    tmp_path: Path, before: Mapping[str, Any], now: Mapping[str, Any], unknown: str = ""
) -> None:
    """Go on with the settings ``now`` with a run of the settings ``before``.

    Args:
        unknown: the setting that there was not at that time.
    """
    shipped, _ = config.read_settings(config.CONFIG_FILE)
    old, new = (asdict(config.merge({"shipped": shipped, "file": one})) for one in (before, now))
    old.pop(unknown, None)
    content = {"step": 1, "epoch": 0.5, "wandb_run_id": "a", "data": {"train_sha256": "b"}}
    (tmp_path / "training.json").write_text(json.dumps(content | {"settings": old}))
    folder.check_same_run(tmp_path, new, "b")


def test_changed_settings_are_shown_as_users_write_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume(tmp_path, {}, {"compile": "true", "keep_state": "false"})
    changes = "compile was null and is true; keep_state was true and is false"
    assert capsys.readouterr().out == f"resuming: {changes}\n"
    with pytest.raises(UserError, match="learning_rate was 2e-5 and is 1e-5"):
        resume(tmp_path, {}, {"learning_rate": "1e-5"})
    with pytest.raises(UserError, match="method: false must be 'full', 'lora' or 'qlora'"):
        resume(tmp_path, {}, {"method": False})


@pytest.mark.parametrize(
    ("key", "value", "change"),
    [
        ("method", "lora", "method was 'full' and is 'lora'"),
        ("optimizer", "adamw_8bit", "optimizer was 'adamw' and is 'adamw_8bit'"),
        ("mask_rate", "0.4", "mask_rate was 0.0 and is 0.4"),
        ("fp8", "true", "fp8 was false and is true"),
    ],
)
def test_a_run_from_before_a_setting_goes_on_as_it_was(
    tmp_path: Path, key: str, value: str, change: str
) -> None:
    """Guards against steps of two kinds in one run, as the setting is not in its checkpoint."""
    resume(tmp_path, {}, {}, key)
    with pytest.raises(UserError, match=change):
        resume(tmp_path, {}, {key: value}, key)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_epochs_may_change_where_no_rate_depends_on_them(tmp_path: Path, shape: str) -> None:
    before = {"lr_schedule": shape, "warmup_ratio": "0"}
    if shape == "constant":
        return resume(tmp_path, before, before | {"epochs": "9"})
    with pytest.raises(UserError, match="epochs was 3 and is 9"):
        resume(tmp_path, before, before | {"epochs": "9"})


# ---------------------------------------------------------------- settings without effect


IDLE = [
    (
        {"method": "full"},
        {"lora_rank": "8", "lora_alpha": "32", "lora_dropout": "0.1", "lora_rslora": "true"},
        {"method": "lora"},
    ),
    ({"mask_rate": "0"}, {"mask_warmup_ratio": "0.5", "mask_token": "<unk>"}, {"mask_rate": "0.4"}),
    ({"lr_schedule": "constant"}, {"min_lr_ratio": "0.1"}, {"lr_schedule": "cosine"}),
]


@pytest.mark.parametrize(("idling", "changes", "working"), IDLE)
def test_what_has_no_effect_may_change(
    tmp_path: Path, idling: Mapping[str, str], changes: Mapping[str, str], working: Mapping
) -> None:
    """Guards against a full run that can't be resumed for the rank of adapters that it lacks."""

    resume(tmp_path, idling, idling | changes)
    with pytest.raises(UserError, match="cannot resume with these changes") as refused:
        resume(tmp_path, working, working | changes)
    shipped, _ = config.read_settings(config.CONFIG_FILE)
    for key, value in changes.items():
        assert f"{key} was " in str(refused.value)
        ((other, idle),) = idling.items()
        layers = {"shipped": shipped | idling, config.COMMAND_LINE: {key: value}}
        if key == "min_lr_ratio":  # a sweep over schedules types it for all of them
            assert str(config.merge(layers).min_lr_ratio) == value
            continue
        with pytest.raises(UserError) as typed:
            config.merge(layers)
        problem = f"command line: {key}: has no effect with {other} {idle}: leave it out, or set "
        assert problem in str(typed.value)


# ---------------------------------------------------------------- settings of a later version

# Those of the first version, without those that may change when a run is resumed.
FIRST = (
    "model dataset prompt max_length validation_size seed epochs batch_size learning_rate "
    "lr_schedule warmup_ratio min_lr_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm dtype"
)
# What belongs to a setting in `folder.OLDER`, and had no effect before that was there.
BELONGING = {*config.ADAPTER_SETTINGS, "mask_warmup_ratio", "mask_token"}


def test_what_was_so_before_there_was_a_setting_is_known() -> None:
    """Guards against a new setting for which a run of an older version can't be resumed.

    Add it to OLDER in run/folder.py with what was so before, or to FREE_SETTINGS there if it
    changes no gradient.
    """
    known = {*FIRST.split(), *folder.OLDER, *BELONGING}
    assert set(config.KEYS) - folder.FREE_SETTINGS == known


def test_a_setting_that_a_checkpoint_lacks_does_not_begin_in_mid_run(
    call, settings: dict[str, str], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run whose second half was trained, or judged, otherwise than its first."""
    for name in ("last", "previous"):
        file = stopped / name / "training.json"
        description = json.loads(file.read_text())
        for key in ("best_by", "weight_decay"):  # the second as if it were of a later version
            del description["settings"][key]
        file.write_text(json.dumps(description))
        seal(stopped / name)
    call(train, *flags(settings), "--best_by", "val_exact_match").assert_user_error(
        "best_by was 'val_loss' and is 'val_exact_match'"
    )
    call(train, *flags(settings), "--weight_decay", "0.1").assert_user_error(
        f"{stopped / 'last'}: cannot resume, since it was saved before there was weight_decay: "
        "add what was so then to OLDER in run/folder.py, or start again under another --run_name"
    )
    monkeypatch.setitem(folder.OLDER, "weight_decay", 0.0)
    call(train, *flags(settings), "--weight_decay", "0.1").assert_user_error(
        "weight_decay was 0.0 and is 0.1"
    )
    assert call(train, *flags(settings)).code == 0
