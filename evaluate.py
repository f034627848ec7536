"""Exact match of a checkpoint on GSM8K.

python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best
python evaluate.py --ckpt meta-llama/Llama-2-7b-hf --split validation --limit 100
python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best --calculator true
python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best --samples 8 --temperature 0.7
python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best --split train --samples 8
python evaluate.py --rescore checkpoints/llama-2-7b-gsm8k/eval/test/predictions.jsonl
python evaluate.py --compare one/predictions.jsonl other/predictions.jsonl
torchrun --nproc_per_node 8 evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best

Greedy decoding gives the score. A calculator or several samples per problem give additional ones.
Samples of the rows that a run was trained on are for augment.py, and are all that is decoded then.
Each completion is written to predictions.jsonl as soon as it is finished, and the same command
resumes after a stop. scores.json and the table are written at the end.
"""

import argparse
from pathlib import Path

from run.script import check_platform, ends_early, read_command_line, run_script

check_platform()  # before the imports that would fail

from run.arguments import (
    ArgumentParser,
    not_negative_int,
    parse_arguments,
    positive_float,
    positive_int,
)
from run.evaluation_modes import check_mode, given_flags

TEMPERATURE = 0.7  # the default for samples, as in gsm8k-ScRel's majority votes


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="checkpoint, model folder or hub id (best of config's run)")
    add("--split", choices=("test", "validation", "train"), help="which rows (test)")
    add("--limit", type=positive_int, metavar="N", help="only the first N rows")
    add("--output", type=Path, metavar="DIR", help="folder for the results (eval/SPLIT of the run)")
    add("--rescore", type=Path, metavar="FILE", help="rescore a predictions.jsonl without a model")
    add(
        "--verify-batching",
        type=not_negative_int,
        metavar="N",
        help="decode N problems again, one at a time, with generate (4 in float32, else 0)",
    )
    add("--samples", type=positive_int, metavar="K", help="K samples per problem: maj@k, pass@k")
    add("--temperature", type=positive_float, metavar="T", help=f"for --samples ({TEMPERATURE})")
    add("--compare", nargs=2, type=Path, metavar="FILE", help="compare two predictions.jsonl")
    arguments, typed = parse_arguments(parser, argv)
    check_mode(arguments, typed)
    arguments.split = arguments.split or "test"
    arguments.temperature = arguments.temperature or TEMPERATURE
    return arguments, typed


if __name__ == "__main__":
    command_line = read_command_line(read_arguments)  # before the heavy imports

from grading.rescore import judge_files

if __name__ == "__main__" and ends_early(judge_files, command_line[0]):
    raise SystemExit

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import data
from engine import memory, ranks
from engine.decoding import Completion
from engine.device import pick_device, prepare_process
from engine.hub import fetch
from engine.llama import Llama
from engine.loading import check_fits, check_ids, check_prompts, load_model, load_tokenizer
from engine.ranks import Ranks
from engine.strategy import Decoder, Greedy, How, Sampling, decode, eos_token_ids
from engine.verify import check_finite, verify_batching
from grading.calculator import ForcedResults
from grading.dataset import Problem
from grading.next_steps import next_steps
from grading.predictions import PredictionsFile, graded_row, open_files, writing_into
from grading.report import evaluation_report
from grading.results import CALCULATOR, GREEDY, SAMPLES, CompletionId, folders_of, previous_timing
from grading.samples import random_stream
from grading.scores_file import Scored, score_predictions, write_all_scores
from page.write import report_evaluation
from run.evaluation import Score, evaluation_folder, log_scores
from run.model_source import Source, resolve_source
from run.paths import hide_home
from run.places import anchored
from run.progress_bar import ProgressBar
from run.setting_types import TRAIN_ROWS
from run.training_json import tokenizer_record
from run.wandb_run import start_tracker


@dataclass(frozen=True)
class Parts:
    """The functions of an evaluation that a test may replace."""

    load_model: Callable[..., Llama] = load_model
    open_predictions: Callable[..., PredictionsFile] = PredictionsFile
    decode: Callable[..., Iterator[Completion]] = decode
    start_tracker: Callable[..., Any] = start_tracker


# ---------------------------------------------------------------- the story


def main(arguments: argparse.Namespace, typed: dict[str, str], *, parts: Parts = Parts()) -> None:
    if judge_files(arguments):
        return
    with ranks.job(pick_device()) as here:
        source = resolve_source(arguments.ckpt, arguments.config, typed)
        prepare_process(pick_device(), getattr(torch, source.config.dtype))
        check_fits(source.path, getattr(torch, source.config.dtype), adapter=source.adapter)
        output = arguments.output or evaluation_folder(
            source.path, source.run_folder, source.config.output_dir, arguments.split
        )
        asked = arguments.split, source.config.calculator, arguments.samples
        folders = folders_of(output, *asked).values()
        with writing_into(*folders if here.is_main else ()):
            evaluate(arguments, source, output, here, parts)
        if here.is_main:
            report_evaluation(output, source.run_folder)
            flags = given_flags(arguments, typed)
            for line in next_steps(source.path, output, flags, bool(arguments.samples)):
                print(line)


@memory.reported("evaluating", "set a smaller decode_slots, or take a device with more memory")
def evaluate(
    arguments: argparse.Namespace, source: Source, output: Path, here: Ranks, parts: Parts
) -> None:
    """Decode and score as requested, into folders that the caller has locked."""
    config, split = source.config, arguments.split

    # The questions
    folder = fetch(source.model)
    weights = source.weights_identity(folder)
    tokenizer_folder = source.tokenizer(folder)
    tokenizer = load_tokenizer(tokenizer_folder, tokenizer_record(tokenizer_folder))
    calculator = ForcedResults(tokenizer) if config.calculator else None
    rows = config.dataset, split, config.validation_size, config.seed
    all_problems, sha256 = data.load_questions(*rows)
    source.check_rows(split, sha256)
    data_sha256 = data.fingerprint(all_problems)
    problems = all_problems[: arguments.limit]
    prompts = data.encode_prompts(tokenizer, problems, config.prompt)

    # The model that answers them
    dtype, device = getattr(torch, config.dtype), pick_device()
    model = parts.load_model(folder, dtype, device, None, source.adapter)
    model.ranks = here  # to each of which the questions are dealt
    check_ids(model, prompts, source.path)
    check_prompts(model, max(map(len, prompts)), config.max_new_tokens)
    check_finite(model, prompts[0], source.path)
    decoder = Decoder(
        model=model,
        tokenizer=tokenizer,
        questions=[problem.question for problem in problems],
        prompts=prompts,
        slots=config.decode_slots,
        max_new_tokens=config.max_new_tokens,
        eos_token_ids=eos_token_ids(model, tokenizer),
        decode=parts.decode,
    )
    identity = {
        "checkpoint": hide_home(source.path),
        "weights": weights,
        "tokenizer": tokenizer.identity,
        "split": split,
        "data_sha256": data_sha256,
        "prompt": config.prompt,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
    }
    if split == "train":  # where augment.py finds the rows again
        identity |= {key: getattr(anchored(config), key) for key in TRAIN_ROWS}
    source.check_unchanged()
    paths = {"checkpoint": None, "dataset": None}  # which may differ between machines
    here.check_same(identity | paths | {"rows": len(problems), "calculator": config.calculator})
    if not here.is_main:
        return decoder.answer(calculator)

    # Open every file before decoding, so that one that can't be resumed fails immediately
    sampling = {"temperature": arguments.temperature, "seed": config.seed}
    asked = len(problems), arguments.samples, config.calculator, sampling
    files = open_files(parts.open_predictions, output, identity, *asked)

    # Greedy decoding gives the score, and the others are reported with it
    stream = random_stream(weights, **sampling) if split == "train" else config.seed
    hows = {
        GREEDY: Greedy(),
        CALCULATOR: Greedy(calculator),
        SAMPLES: Sampling(arguments.temperature, stream, calculator),
    }
    scored: dict[str, Scored | None] = {}
    verified = arguments.verify_batching
    try:
        for name, file in files.items():
            scored[name] = None  # begun and not complete
            scored[name] = decode_and_score(decoder, problems, file, hows[name], verified)
    finally:  # if one decoding is stopped, the scores of the earlier ones are still written
        scores = write_all_scores(output, scored)
        if scores and source.run_folder and split != "train" and len(problems) == len(all_problems):
            log_scores(
                source.run_folder,
                source.description,
                identity,
                [Score(one.logged, one.is_new, one.tables) for one in scored.values() if one],
                run_name=config.run_name,
                wandb_mode=config.wandb_mode,
                wandb_project=config.wandb_project,
                start_tracker=parts.start_tracker,
            )
    print(evaluation_report(scores, f"{source.path} on {split}"))
    print(f"results: {output}")


# ---------------------------------------------------------------- its parts


def decode_and_score(
    decoder: Decoder,
    problems: Sequence[Problem],
    predictions: PredictionsFile,
    how: How,
    num_verified: int | None = None,
) -> Scored:
    """Decode the missing ``predictions``, verify the batching, and score all of them.

    Args:
        num_verified: see `verify_batching`. Samples are not verified, since Transformers uses
            different random numbers.
    """
    with predictions:
        timing, completions = decode_missing(decoder, problems, predictions, how)
        # Where nothing was missing, an earlier evaluation measured and verified the decoding.
        about = timing or previous_timing(predictions.folder)
        is_verified = "verified_batching" in about and num_verified is None
        if isinstance(how, Greedy) and not is_verified:
            texts = {which: row["completion"] for which, row in predictions.rows.items()}
            about |= verify_batching(decoder, how, texts, completions, num_verified)
        predictions.record(about)
    rows, is_new = list(predictions.rows.values()), bool(timing)
    return score_predictions(rows, predictions.identity, predictions.file, about, is_new)


def decode_missing(
    decoder: Decoder, problems: Sequence[Problem], predictions: PredictionsFile, how: How
) -> tuple[dict[str, Any], dict[CompletionId, Completion]]:
    """Decode every completion missing from ``predictions``; write each as soon as it is finished.

    Returns:
        The ``seconds`` taken and the ``tokens_per_second``, or nothing if none was missing; and the
        greedy completions, which can be verified, but not samples, of which there may be many.
    """
    is_greedy = isinstance(how, Greedy)
    missing, total = predictions.missing(), predictions.size
    done = total - len(missing)
    if done:
        print(f"resuming: {done} of {total} {how.unit}s are in {predictions.file}")
    if not missing:
        return {}, {}
    started, tokens, completions = time.perf_counter(), 0, {}
    with ProgressBar(how.title, total, how.unit, done) as bar:
        for completion in decoder.completions(missing, how):
            which = missing[completion.index]
            text = decoder.tokenizer.decode(completion.token_ids)
            num_tokens = len(completion.token_ids) + int(completion.stop == "eos")
            problem = problems[which.problem]
            sample = None if is_greedy else which.sample
            predictions.write(
                graded_row(which.problem, sample, problem, text, completion.stop, num_tokens)
            )
            if is_greedy:
                completions[which] = completion
            tokens += num_tokens
            speed = tokens / (time.perf_counter() - started)
            share = predictions.num_correct / len(predictions.rows)
            bar.update(exact_match=f"{share:.1%}", tok_s=f"{speed:.0f}")
    seconds = time.perf_counter() - started
    speed = tokens / max(seconds, 1e-9)
    return {"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)}, completions


if __name__ == "__main__":
    run_script(main, *command_line)
