"""Greedy decoding and exact match of a checkpoint on GSM8K.

python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best
python evaluate.py --ckpt meta-llama/Llama-2-7b-hf --split validation --limit 100
python evaluate.py --rescore checkpoints/llama-2-7b-gsm8k/eval/test/predictions.jsonl
python evaluate.py --compare one/predictions.jsonl other/predictions.jsonl

Each completion is written to predictions.jsonl as it is finished; the same command goes on
where it was stopped. scores.json and the table come at the end.
"""

import argparse
import sys
from pathlib import Path

from config import ArgumentParser, Config, local_path, not_negative_number, parse_arguments, positive_number
from errors import UserError, one_line, run_script


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--ckpt", metavar="DIR", help="checkpoint, model folder or hub id (best of the config's run)")
    parser.add_argument("--split", choices=("test", "validation"), help="which rows (test)")
    parser.add_argument("--limit", type=positive_number, metavar="N", help="only the first N rows")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where results go (eval/SPLIT of the run)")
    parser.add_argument("--rescore", type=Path, metavar="FILE", help="score a predictions.jsonl again, without a model")
    parser.add_argument(
        "--verify-batching",
        type=not_negative_number,
        metavar="N",
        help="decode N problems again, alone, by Transformers' generate (4 in float32, else 0)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="are two predictions.jsonl really different? (paired test)",
    )
    arguments, typed = parse_arguments(parser, argv)
    model_flags = ("ckpt", "split", "limit", "verify_batching")
    for mode, others in (("compare", (*model_flags, "output", "rescore")), ("rescore", model_flags)):
        used = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) is not None]
        used += [f"--{key}" for key in typed]
        if getattr(arguments, mode) and used:
            raise UserError(f"command line: {', '.join(used)} can't go with --{mode}, which reads files and no model")
    arguments.split = arguments.split or "test"
    return arguments, typed


if __name__ == "__main__":  # before the heavy imports: --help and a mistyped flag are answered at once
    _parsed: list = []
    run_script(lambda: _parsed.extend(read_arguments(sys.argv[1:])))

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import analysis
import data
import memory
import scoring
import verify
from checkpoint import Source, replace_file, resolve_source
from generate import Completion, greedy_decode
from model import (
    check_positions,
    check_vocabulary,
    eos_token_ids,
    fetch,
    load_model,
    load_tokenizer,
    pick_device,
    weights_identity,
)
from tracking import MetricsLog, start_tracker

VERIFIED_IN_FLOAT32 = 4  # problems, where --verify-batching does not say how many
# A kill loses no line that was written; this is what the loss of power may take. Each sync costs milliseconds.
SECONDS_BETWEEN_SYNCS = 1.0
PREDICTIONS_FILE, SCORES_FILE, IDENTITY_FILE = "predictions.jsonl", "scores.json", "evaluation.json"


# ---------------------------------------------------------------- the story


def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    if arguments.rescore:
        rescore(arguments.rescore, arguments.output)
        return
    if arguments.compare:
        compare(*arguments.compare)
        return
    memory.keep_freed_memory()
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    config = source.config
    folder = fetch(source.path)
    tokenizer = load_tokenizer(folder)
    all_problems = data.load_split(config.dataset, arguments.split, config.validation_size, config.seed)
    problems = all_problems[: arguments.limit]
    prompts = data.encode_prompts(tokenizer, problems, config.prompt)
    model = load_model(folder, getattr(torch, config.dtype), pick_device())
    check_vocabulary(model, tokenizer, source.path)
    longest = max(map(len, prompts)) + config.max_new_tokens
    check_positions(model, longest, "the longest prompt with max_new_tokens", "set a smaller max_new_tokens")
    output = arguments.output or output_folder(source, arguments.split)
    identity = identify(source, weights_identity(folder), arguments.split, all_problems)
    with PredictionsFile(output, identity, len(problems)) as predictions:
        speed, completions = decode(model, tokenizer, problems, prompts, predictions, config)
        said, count = speed or said_before(output), arguments.verify_batching
        if speed or count is not None or "verified_batching" not in said:
            said = said | verify_batching(count, model, tokenizer, prompts, predictions, completions, config)
        rows = list(predictions.rows.values())
        scores = scoring.score(rows, len(problems), str(predictions.file)) | analysis.analyse(rows)
    scores = predictions.identity | scores | said
    replace_file(output / SCORES_FILE, json.dumps(scores, indent=2) + "\n")
    if speed and len(problems) == len(all_problems):
        track(source, arguments.split, scores)
    print(scoring.score_table(scores, f"{source.path} on {arguments.split}"))
    print(analysis.analysis_table(scores))
    print(f"results: {output}")


def rescore(file: Path, output: Path | None) -> None:
    """Score a ``predictions.jsonl`` again; ``scores.json`` goes beside it, or under ``output``."""
    rows = read_predictions(file)
    identity = read_identity(file.with_name(IDENTITY_FILE)) or read_identity(file.with_name(SCORES_FILE))
    if "num_problems" not in identity:
        print(f"{file}: nothing beside it says how many problems were asked: taken to be all {len(rows)}")
    scores = scoring.score(rows, identity.get("num_problems", len(rows)), str(file)) | analysis.analyse(rows)
    scores = identity | scores | said_before(file.parent)
    folder = output or file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / SCORES_FILE, json.dumps(scores, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}): choose another --output") from None
    print(scoring.score_table(scores, str(file)))
    print(analysis.analysis_table(scores))


def compare(first: Path, second: Path) -> None:
    """Say whether two ``predictions.jsonl`` really differ."""
    names = str(first), str(second)
    result = analysis.compare(read_predictions(first), read_predictions(second), names)
    print(analysis.comparison_table(result, names))


# ---------------------------------------------------------------- its parts


def output_folder(source: Source, split: str) -> Path:
    """In the run's own ``eval`` folder; for a model that belongs to no run, in one named after it."""
    if source.run_folder is not None:
        checkpoint = Path(source.path).name
        return source.run_folder / "eval" / (split if checkpoint == "best" else f"{checkpoint}-{split}")
    name = source.path.replace("/", "--") if not Path(source.path).exists() else Path(source.path).resolve().name
    return local_path(source.config.output_dir) / name / "eval" / split


def identify(source: Source, weights: str, split: str, problems: Sequence[data.Problem]) -> dict[str, Any]:
    """Everything that a completion depends on: predictions of another identity are never mixed in."""
    config: Config = source.config
    return {
        "checkpoint": source.path,
        "weights": weights,
        "split": split,
        "data_sha256": data.fingerprint(problems),
        "prompt": config.prompt,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
    }


def decode(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[data.Problem],
    prompts: Sequence[list[int]],
    predictions: "PredictionsFile",
    config: Config,
) -> tuple[dict[str, Any], dict[int, Completion]]:
    """Complete every problem that ``predictions`` does not hold yet, each written as soon as it is finished.

    Returns:
        ``seconds`` that it took, and ``tokens_per_second``, without what was there before (nothing
        where all was); and the completions that were not there before.
    """
    waiting = [index for index in range(len(problems)) if index not in predictions.rows]
    if len(waiting) < len(problems):
        print(f"going on: {len(problems) - len(waiting)} of {len(problems)} problems are in {predictions.file}")
    started, tokens, completions = time.perf_counter(), 0, {}
    with tqdm(total=len(problems), initial=len(predictions.rows), desc="decoding", unit="problem", disable=None) as bar:
        for completion in greedy_decode(
            model,
            [prompts[index] for index in waiting],
            max_new_tokens=config.max_new_tokens,
            eos_token_ids=eos_token_ids(model, tokenizer),
            slots=config.decode_slots,
        ):
            index = waiting[completion.index]
            text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            num_tokens = len(completion.token_ids) + (completion.stop == "eos")
            predictions.write(index, problems[index], text, completion.stop, num_tokens)
            completions[index] = completion
            tokens += num_tokens
            rate = tokens / (time.perf_counter() - started)
            bar.update()
            bar.set_postfix(exact_match=f"{predictions.num_correct / len(predictions.rows):.1%}", tok_s=f"{rate:.0f}")
    seconds = time.perf_counter() - started
    if not waiting:
        return {}, {}
    return {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}, completions


def verify_batching(
    count: int | None,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    predictions: "PredictionsFile",
    completions: dict[int, Completion],
    config: Config,
) -> dict[str, Any]:
    """Decode ``count`` of the problems again, alone, and compare.

    Args:
        count: None for the default of the dtype.
        completions: those that this process has decoded; of others the text alone is known, and
            they are decoded once more in a batch as well.

    Returns:
        ``verified_batching``: how many problems, and how many of them differ; nothing where none was asked for.

    Raises:
        UserError: one differs, in float32.
    """
    exact = config.dtype == "float32"
    chosen = verify.sample(sorted(predictions.rows), VERIFIED_IN_FLOAT32 * exact if count is None else count)
    if not chosen:
        return {}
    limits = {"max_new_tokens": config.max_new_tokens, "eos_token_ids": eos_token_ids(model, tokenizer)}
    again = [index for index in chosen if index not in completions]
    for completion in greedy_decode(model, [prompts[index] for index in again], slots=config.decode_slots, **limits):
        completions[again[completion.index]] = completion
    found = verify.differences(model, {index: prompts[index] for index in chosen}, completions, **limits)
    shown = {index: difference.describe(tokenizer) for index, difference in found.items()}
    for index in again:
        text = tokenizer.decode(completions[index].token_ids, skip_special_tokens=True)
        if text != predictions.rows[index]["completion"] and index not in shown:
            shown[index] = f"{predictions.file} holds another completion than this machine writes now"
    if shown and exact:
        index, what = next(iter(shown.items()))
        raise UserError(
            f"{len(shown)} of {len(chosen)} completions differ from those of Transformers' generate alone (problem "
            f"{index}: {what}): no score, since in float32 batching must change nothing; --verify-batching 0 skips this"
        )
    print(
        f"verified: {len(chosen) - len(shown)} of {len(chosen)} completions are those of Transformers' generate alone"
    )
    for index, what in shown.items():
        print(f"  problem {index}: {what}")
    return {"verified_batching": {"problems": len(chosen), "differences": len(shown)}}


class PredictionsFile:
    """``predictions.jsonl`` as it grows, and what it holds from before.

    Attributes:
        rows: the predictions by id.
        num_correct: how many of them are, by the headline rule.
        identity: see `identify`, with ``num_problems``.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], num_problems: int):
        """Open ``folder``, and keep what an interrupted evaluation with the same identity left there.

        Raises:
            UserError: what is there belongs to another evaluation, or holds more problems than
                asked for now, or the folder can't be written.
        """
        self.file = folder / PREDICTIONS_FILE
        self.identity = identity | {"num_problems": num_problems}
        self.rows: dict[int, dict[str, Any]] = {}
        self._synced = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.file.exists():
                self._keep_finished(folder, num_problems)
            elif others := [name for name in (SCORES_FILE, IDENTITY_FILE) if (folder / name).exists()]:
                raise UserError(f"{folder}: holds {' and '.join(others)} of something else: choose another --output")
            self._stream = self.file.open("a", encoding="utf-8")
            replace_file(folder / IDENTITY_FILE, json.dumps(self.identity, indent=2) + "\n")
            self.num_correct = sum(row["correct"] for row in self.rows.values())
        except OSError as error:
            raise UserError(f"{folder}: can't be written ({error.strerror}): choose another --output") from None

    def _keep_finished(self, folder: Path, num_problems: int) -> None:
        if b"\n" not in self.file.read_bytes():
            return  # stopped before its first completion: nothing to mix with
        cure = f"choose another --output, or move {folder} away"
        before = read_identity(folder / IDENTITY_FILE)
        changed = [
            f"{key} was {before.get(key)!r} and is {value!r}"
            for key, value in self.identity.items()
            if key not in ("num_problems", "checkpoint") and before.get(key) != value  # weights says which model it is
        ]
        if changed:
            raise UserError(f"{self.file}: belongs to another evaluation ({'; '.join(changed)}): {cure}")
        rows = read_predictions(self.file, drop_cut_line=True)
        self.rows = {row["id"]: row for row in rows}
        beyond = [row["id"] for row in rows if row["id"] >= num_problems]
        if beyond or len(self.rows) < len(rows):
            raise UserError(f"{self.file}: holds {len(rows)} problems, with {num_problems} asked for now: {cure}")
        # Without the line that a kill cut in the middle.
        replace_file(self.file, "".join(_json_line(row) for row in rows))

    def write(self, index: int, problem: data.Problem, completion: str, stop: str, num_tokens: int) -> None:
        """Add one prediction as one whole line."""
        label, false_equation = analysis.mistake(completion, problem.gold, stop)
        row = {
            "id": index,
            "question": problem.question,
            "gold": problem.gold,
            "completion": completion,
            "answer": scoring.extract_openai(completion),
            "correct": scoring.correct_openai(completion, problem.gold),
            "stop": stop,
            "num_tokens": num_tokens,
            "label": label,
            "false_equation": false_equation,
            "steps": analysis.count_steps(problem.answer),
        }
        self._stream.write(_json_line(row))
        self._stream.flush()
        if time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS:
            self._sync()
        self.rows[index] = row
        self.num_correct += row["correct"]

    def __enter__(self) -> "PredictionsFile":
        return self

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._stream.close()


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"  # ASCII: U+2028 in a question must not look like a line's end to anyone


def read_predictions(file: Path, drop_cut_line: bool = False) -> list[dict[str, Any]]:
    """The rows of a ``predictions.jsonl``, each checked to have what scoring needs.

    Args:
        drop_cut_line: a last line without its end, from a kill, is no error.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}): name a predictions.jsonl") from None
    if lines[-1] == b"" or drop_cut_line:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            for key, kind in (("id", int), ("gold", str), ("completion", str), ("stop", str), ("correct", bool)):
                if type(row[key]) is not kind:
                    raise ValueError(f"{key!r} is {row[key]!r}, not of type {kind.__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}: is no prediction ({type(error).__name__}: {one_line(error)[:120]}): each line "
                "holds one that evaluate.py wrote; restore it or evaluate again"
            ) from None
        rows.append(row)
    return rows


def read_identity(file: Path) -> dict[str, Any]:
    """An ``evaluation.json``, or the ``scores.json`` that holds the same and more; empty where there is none."""
    try:
        identity = json.loads(file.read_bytes()) if file.exists() else {}
        if not isinstance(identity, dict) or not isinstance(identity.get("num_problems", 0), int):
            raise ValueError("it must hold an object with num_problems")
        return identity
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: is damaged ({one_line(error)[:120]}): move it away or evaluate again") from None


def said_before(folder: Path) -> dict[str, Any]:
    """What an earlier ``scores.json`` in ``folder`` says of the decoding: its time, and whether it was verified."""
    before = read_identity(folder / SCORES_FILE)
    return {key: before[key] for key in ("seconds", "tokens_per_second", "verified_batching") if key in before}


def track(source: Source, split: str, scores: dict[str, Any]) -> None:
    """Log the exact match into the run that the checkpoint comes from, if data and decoding are the run's own."""
    if source.description is None or source.run_folder is None:
        return
    trained = source.description["settings"]
    same = all(scores[key] == trained.get(key) for key in ("prompt", "max_new_tokens", "dtype"))
    same &= scores["data_sha256"] == source.description["data"].get(f"{split}_sha256")
    if not same:
        print("not logged as the run's score: data or settings are not those of the run")
        return
    name = "eval/exact_match" if split == "test" else f"eval/{split}_exact_match"
    config, step, epoch = source.config, source.description["step"], source.description["epoch"]
    tracker = start_tracker(
        config.wandb_mode,
        project=config.wandb_project,
        name=config.run_name,
        run_id=source.description["wandb_run_id"],
        folder=source.run_folder,
        settings={},
    )
    with MetricsLog(source.run_folder, tracker) as metrics:
        metrics.write(step, epoch, {name: scores["exact_match"]})


if __name__ == "__main__":
    run_script(main, *_parsed)
