"""What benchmarks/cuda.py promises of its steps, on a CPU: see its docstring."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import processes

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "benchmarks" / "cuda.py"
COMPARED = ("attention", "attention in decoding")  # with float64


def run(*options: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARK, *map(str, options)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(process: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in process.stdout.splitlines()]


def work(step: str, folder: Path) -> None:
    """What the process of one step does."""
    sys.path.insert(0, str(BENCHMARK.parent))
    # By its path: newer builds of PyTorch bring a package of the same name, and import it.
    spec = importlib.util.spec_from_file_location("benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    with (folder / "printed").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if step == "small":
        import cuda_small

        # Both take seconds.
        cuda_small.compile_layers = lambda model: None
        os.environ.pop("TOKENIZER_DIR", None)
    options = ["--dry", "--worker", step, "--scratch", str(folder), "--output", str(folder)]
    arguments = benchmark.read_arguments([*options, "--smollm", str(folder / "smollm")])
    sys.exit(benchmark.main(arguments))


def work_short_of_memory(step: str, folder: Path) -> None:
    """Memory runs out in the Trainer's first micro-batch, and must be free before the next one."""
    import torch
    from transformers import Trainer

    whole, held = Trainer.training_step, []

    def training_step(*arguments: Any) -> torch.Tensor:
        if held:
            gc.collect()
            assert held[0]() is None, "the failed pass's tensors are still held"
            Trainer.training_step = whole
            return whole(*arguments)
        tensor = torch.zeros(1)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    Trainer.training_step = training_step
    work(step, folder)


def work_with_less_memory_than_planned(step: str, folder: Path) -> None:
    """No micro-batch of more than 600 tokens fits."""
    import torch

    import train

    whole = train.accumulate_gradients

    def accumulate_gradients(model: Any, micro_batches: Any, *others: Any) -> Any:
        if max(each.num_tokens for each in micro_batches) > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, micro_batches, *others)

    train.accumulate_gradients = accumulate_gradients
    work(step, folder)


def work_without_scripts(step: str, folder: Path) -> None:
    """In its place, each notes what is kept when it starts, and leaves the files that it would."""
    sys.path.insert(0, str(BENCHMARK.parent))
    from cuda_work import Work

    def run_script(work: Work, part: str, script: str, *options: str | Path) -> None:
        work.results.write(part, kept=sorted(file.name for file in folder.glob("smollm_*")))
        run, before = folder / "runs" / "smollm", folder / "before"
        names = {"train.py": run / "metrics.jsonl", "evaluate.py": run / "eval/test/scores.json"}
        file = before / "scores.json" if before in options else names.get(script)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(part)

    Work.run_script = run_script
    work(step, folder)


def dry_step(
    step: str, folder: Path, work: Callable[[str, Path], None] = work
) -> list[dict[str, Any]]:
    """The results of ``step`` alone."""
    process = processes.Process(target=work, args=[step, folder])
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "printed").read_text()
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dry_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The step small, whose rows are missing, then the step facts; and where the results are."""
    output = tmp_path_factory.mktemp("results")
    missing = {"GSM8K_DIR": str(output / "gsm8k"), "TOKENIZER_DIR": str(output / "tokenizer")}
    options = "--dry", "--steps", "small", "facts", "--output", output
    return run(*options, **missing), output


def test_each_result_is_a_line_as_soon_as_it_is_known(
    dry_run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    """Guards against a measurement that is lost, and against one that only a device would run."""
    process, output = dry_run
    assert (output / "results.jsonl").read_text() == process.stdout
    facts = [line for line in results(process) if line["step"] == "facts"]
    assert [line["part"] for line in facts] == [
        "versions",
        "imports",
        "device",
        "copy",
        "product",
        "fp8 product",
        "attention",
        *["repeated attention"] * 2,
        "attention in decoding",
        "end",
    ]
    assert not any("failed" in line for line in facts), process.stdout
    times = [line["at"] for line in results(process)]
    assert times == sorted(times) and times[0] > 0
    (product,) = [line for line in facts if line["part"] == "fp8 product"]
    assert 0.02 < product["error"] < 0.06 and product["error_but_for_rounding"] < 2**-8
    errors = [each["worst_relative_error"] for each in facts if each["part"] in COMPARED]
    # In bfloat16, which rounds by up to 2**-8: what products read, what they give, and gradients.
    assert len(errors) >= len(COMPARED) and all(0 < error < 0.01 for error in errors)


def test_a_step_that_fails_is_a_result_and_the_next_one_runs(
    dry_run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    """Guards against device time that is lost for all steps to a mistake in one."""
    process, output = dry_run
    failed, end = [line for line in results(process) if line["step"] == "small"]
    assert failed["failed"].startswith(f"UserError: dataset {str(output / 'gsm8k')!r}")
    assert end["part"] == "end" and end["failed"] == "exit code 1"
    assert results(process)[-1]["step"] == "facts"
    assert process.returncode == 1


def test_the_step_save_measures_what_training_waits_for(tmp_path: Path) -> None:
    """Guards against a measurement that only a device would run."""
    lines = dry_step("save", tmp_path)
    (disk,) = [line for line in lines if line["part"] == "disk"]
    assert disk["written"] == disk["read"] > 1e7 and not (tmp_path / "plain").exists()
    (load,) = [line for line in lines if line["part"] == "load"]
    assert load["same"] == load["tensors"] > 0 and load["times_plain_file"] > 0
    assert disk["written"] > 0.8 * load["bytes"]
    at_once, *beside = [line for line in lines if line["part"] == "save"]
    assert at_once["how"] == "at once" and at_once["training_waits_s"] == at_once["whole_s"]
    assert [line["how"] for line in beside] == ["beside training"] * 2
    for line in beside:
        assert line["bytes"] > 1e7 and line["training_waits_s"] > 0 and line["whole_s"] > 0
        assert line["times_plain_file"] > 0


def test_the_step_small_runs_out_of_memory_and_heals(tmp_path: Path) -> None:
    """Guards against a measurement that only a device would run."""
    lines = dry_step("small", tmp_path)
    plain, in_fp8 = [line for line in lines if line["part"] == "accumulation"]
    for line, smallest, largest in ((plain, 0, 1e-5), (in_fp8, 0.01, 0.2)):
        assert line["micro_batches"] == [1, 2]
        assert all(smallest < error < largest for error in line["relative_errors"])
    # Rounding to 8 bits does not depend on the micro-batches; that to bfloat16 comes after sums.
    assert in_fp8["relative_difference"] < min(in_fp8["relative_errors"]) / 2
    healed = [line for line in lines if line["part"] == "healing"]
    assert [line["how"] for line in healed] == ["limited", "filled"]
    for line in healed:
        assert line["halved"] == 1 and line["same_loss"] and line["same_gradients"]
        assert 0 < line["relative_difference_from_one_micro_batch"] < 1e-5
    (completions,) = [line for line in lines if line["part"] == "completions"]
    assert completions["same_alone"] == completions["of_alone"] == 2
    (fewer,) = [line for line in lines if line["part"] == "fewer slots"]
    assert fewer["slots"] == [6, 3] and fewer["same"] == fewer["of"] == 5


def test_the_step_decode_decodes_twice_without_freeing_memory(tmp_path: Path) -> None:
    """Guards against a second decoding that runs out of memory, which only a device can show."""
    lines = dry_step("decode", tmp_path)
    (again,) = [line for line in lines if line["part"] == "decoding again"]
    first, second = again["completions"]
    assert first == second == 11  # of 12; the longest is not awaited


def test_the_step_train_gives_a_speed_where_memory_runs_out_as_training_would(
    tmp_path: Path,
) -> None:
    """Guards against a card without a figure: a plan may miss by the little that it leaves free."""
    lines = dry_step("train", tmp_path, work_with_less_memory_than_planned)
    assert not any("failed" in line for line in lines), lines
    plain, in_fp8 = [line for line in lines if line["part"] == "training"]
    assert not plain["fp8"] and in_fp8["fp8"]
    for line in plain, in_fp8:
        assert line["micro_batch_tokens"] <= 512 < line["planned_micro_batch_tokens"]
        assert line["micro_batches"] > 1 and line["tokens_per_s"] > 0
        assert line["expected_tokens_per_s"] > 0
    profiles = [line for line in lines if line["part"] == "profile"]
    assert [line["file"] for line in profiles] == ["profile_train.txt", "profile_train_fp8.txt"]
    assert all((tmp_path / line[key]).exists() for line in profiles for key in ("file", "trace"))


def test_the_step_real_keeps_what_each_script_has_written(tmp_path: Path) -> None:
    """Guards against scores that are lost where the next script is stopped at the limit."""
    *lines, last = dry_step("real", tmp_path, work_without_scripts)
    kept = {line["part"]: line["kept"] for line in (*lines, last)}
    assert kept["training"] == ["smollm_before.json"]
    assert kept["score after"] == ["smollm_before.json", "smollm_metrics.jsonl"]
    assert last["part"] == "samples after" and last["kept"] == sorted(
        ["smollm_after.json", "smollm_before.json", "smollm_metrics.jsonl"]
    )
    assert (tmp_path / "smollm_samples.json").read_text() == "samples after"


def test_the_step_contenders_compares_equal_work(tmp_path: Path) -> None:
    """Guards against a contender that does other work, or is given up for a lack of memory."""
    lines = dry_step("contenders", tmp_path, work_short_of_memory)
    short, *trainers = [line for line in lines if line["part"] == "Trainer"]
    assert short["batch"] == 16 and short["out_of_memory"] == "CUDA out of memory"
    settings = [(line["batch"], line["flattened"], line["recomputed"]) for line in trainers]
    assert settings == [(8, False, False), (8, True, False), (16, False, True)]
    (ours,) = [line for line in lines if line["part"] == "training"]
    # Over the same rows. Flattened, they come in our order. Sorted, others make up a step, so the
    # mean over steps differs. bfloat16 adds up to 2**-8 of a logit, and hardly any on average.
    losses = [line["loss"] for line in trainers]
    assert [losses[1], losses[2]] == pytest.approx([ours["loss"], losses[0]], abs=2e-4)
    assert losses[0] == pytest.approx(ours["loss"], abs=0.003)
    assert trainers[0]["padding"] == trainers[1]["padding"] == 0 < trainers[2]["padding"]
    assert [line["steps"] for line in (ours, *trainers)] == [2] * 4
    tokens = [line["tokens_per_s"] * line["seconds"] for line in (ours, *trainers)]
    assert tokens == pytest.approx([tokens[0]] * 4)
    best = max(line["tokens_per_s"] for line in trainers)
    (beside,) = [line for line in lines if line["part"] == "training beside the Trainer"]
    assert beside["times_the_trainer"] == pytest.approx(ours["tokens_per_s"] / best)

    generated = [line for line in lines if line["part"] == "generate"]
    (decoded,) = [line for line in lines if line["part"] == "decoding"]
    assert [line["batch"] for line in generated] == [2, 4]
    for line in generated:
        assert line["tokens"] == line["of_tokens"] == decoded["tokens"]
        assert line["problems"] == decoded["problems"]
    best = max(line["tokens_per_s"] for line in generated)
    assert decoded["times_generate"] == pytest.approx(decoded["tokens_per_s"] / best)


def test_a_step_is_stopped_at_its_limit_and_the_next_one_runs(tmp_path: Path) -> None:
    """Guards against a step that hangs, and takes the time of the others."""
    options = "--dry", "--steps", "facts", "decode", "--limit", "0.2", "--output", tmp_path
    process = run(*options)
    assert process.returncode == 1
    lines = results(process)
    assert [line["step"] for line in lines] == ["facts", "decode"], process.stdout
    for line in lines:
        assert line["failed"] == "stopped at its limit of 0.2 s"
        assert 0.2 <= line["seconds"] < 5


def test_the_step_that_needs_a_real_model_asks_for_it_at_once(tmp_path: Path) -> None:
    """Guards against minutes on a device before a missing flag is found."""
    process = run("--group", "third", "--output", tmp_path / "results")
    assert process.returncode == 2 and "--smollm" in process.stderr
    assert not (tmp_path / "results").exists()


def test_each_group_takes_at_most_330_seconds() -> None:
    """Guards against a group that is cut off before its last step, where time is lent."""
    code = (
        "import cuda; print(*(sum(map(cuda.LIMITS.get, steps)) for steps in cuda.GROUPS.values()))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARK.parent, capture_output=True, text=True
    )
    groups = [int(seconds) for seconds in process.stdout.split()]
    assert groups and all(0 < seconds <= 330 for seconds in groups), (groups, process.stderr)


def test_the_benchmark_does_not_hide_the_package_of_its_name(tmp_path: Path) -> None:
    """Guards against a torch that does without cuda.bindings: benchmarks find cuda.py first."""
    package = tmp_path / "cuda" / "bindings"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()  # or it gives way to the real one, if that is installed
    (package / "runtime.py").write_text("version = 13")
    code = "import cuda; from cuda.bindings import runtime; print(cuda.__file__, runtime.version)"
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=BENCHMARK.parent,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.stdout.split() == [str(BENCHMARK), "13"], process.stderr
