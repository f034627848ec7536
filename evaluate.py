"""Decoding and exact match of a checkpoint on GSM8K.

python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best
python evaluate.py --ckpt meta-llama/Llama-2-7b-hf --split validation --limit 100
python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best --calculator true
python evaluate.py --ckpt checkpoints/llama-2-7b-gsm8k/best --samples 8 --temperature 0.7
python evaluate.py --rescore checkpoints/llama-2-7b-gsm8k/eval/test/predictions.jsonl
python evaluate.py --compare one/predictions.jsonl other/predictions.jsonl

The score is that of greedy decoding; beside it come those with a calculator, and of samples.
Each completion is written to predictions.jsonl as it is finished; the same command goes on
where it was stopped. scores.json and the table come at the end.
"""

import argparse
import sys
from pathlib import Path

from run.errors import UserError, one_line
from run.script import check_platform, check_printed, run_script

check_platform()  # before the imports that would fail

from run.arguments import (
    ArgumentParser,
    not_negative_number,
    parse_arguments,
    positive_float,
    positive_number,
)
from run.config import Config
from run.paths import hide_home, local_path

TEMPERATURE = 0.7  # of samples, where none is given: the one of gsm8k-ScRel's majority votes


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--ckpt",
        metavar="DIR",
        help="checkpoint, model folder or hub id (best of the config's run)",
    )
    parser.add_argument("--split", choices=("test", "validation"), help="which rows (test)")
    parser.add_argument("--limit", type=positive_number, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where results go (eval/SPLIT of the run)"
    )
    parser.add_argument(
        "--rescore",
        type=Path,
        metavar="FILE",
        help="score a predictions.jsonl again, without a model",
    )
    parser.add_argument(
        "--verify-batching",
        type=not_negative_number,
        metavar="N",
        help="decode N problems again, alone, by Transformers' generate (4 in float32, else 0)",
    )
    parser.add_argument(
        "--samples",
        type=positive_number,
        metavar="K",
        help="also draw K completions of each problem: maj@k, pass@k",
    )
    parser.add_argument(
        "--temperature", type=positive_float, metavar="T", help="of these samples (0.7)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="are two predictions.jsonl really different? (paired test)",
    )
    arguments, typed = parse_arguments(parser, argv)
    model_flags = ("ckpt", "split", "limit", "verify_batching", "samples", "temperature")
    for mode, others in (
        ("compare", (*model_flags, "output", "rescore")),
        ("rescore", model_flags),
    ):
        used = [
            f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) is not None
        ]
        used += [f"--{key}" for key in typed]
        if getattr(arguments, mode) and used:
            raise UserError(
                f"command line: {', '.join(used)} can't go with --{mode}, which reads files and no model"
            )
    if arguments.temperature and not arguments.samples:
        raise UserError(
            "command line: --temperature is that of samples: say how many with --samples K"
        )
    arguments.split = arguments.split or "test"
    arguments.temperature = arguments.temperature or TEMPERATURE
    return arguments, typed


if (
    __name__ == "__main__"
):  # before the heavy imports: --help and a mistyped flag are answered at once
    _parsed: list = []
    run_script(lambda: _parsed.extend(read_arguments(sys.argv[1:])))

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

import data
from engine import verify
from engine.cpu import heap
from engine.decoding import Completion, greedy_decode, sample_decode
from engine.device import pick_device
from engine.hub import fetch
from engine.loading import check_ids, check_positions, eos_token_ids, load_model, load_tokenizer
from engine.tokenizer import Tokenizer
from grading import compare as comparing
from grading import dataset, mistakes, report, rules, score
from grading.calculator import ForcedResults
from grading.predictions import (
    IDENTITY_FILE,
    PREDICTIONS_FILE,
    SCORES_FILE,
    Key,
    PredictionsFile,
    read_identity,
    read_predictions,
    read_scores,
    said_before,
    say_contradictions,
)
from run.files import replace_file
from run.locks import locked, locked_if_free
from run.manifest import FINISHED_FILE, LAST, check_no_links, weights_identity
from run.metrics_log import MetricsLog, is_logged
from run.model_source import Source, resolve_source
from run.progress_bar import ProgressBar
from run.training_json import read_description
from run.wandb_run import saved_run, start_tracker

VERIFIED_IN_FLOAT32 = 4  # problems, where --verify-batching does not say how many
CALCULATOR, SAMPLES = (
    "calculator",
    "samples",
)  # folders beside the greedy predictions, and names in scores.json
IDENTITY = (
    "weights",
    "split",
    "data_sha256",
    "prompt",
    "max_new_tokens",
    "dtype",
)  # of an evaluation, in scores.json


# ---------------------------------------------------------------- the story


def main(arguments: argparse.Namespace, typed: dict[str, str]) -> None:
    if arguments.rescore:
        rescore(arguments.rescore, arguments.output)
        return
    if arguments.compare:
        compare(*arguments.compare)
        return
    heap.keep_freed_memory()
    source = resolve_source(arguments.ckpt, arguments.config, typed)
    output = arguments.output or output_folder(source, arguments.split)
    stages = [CALCULATOR] * source.config.calculator + [SAMPLES] * bool(arguments.samples)
    with writing_into(output, *(output / name for name in stages)):
        evaluate(arguments, source, output)


def evaluate(arguments: argparse.Namespace, source: Source, output: Path) -> None:
    """Decode and score what is asked for, into ``output``, into which no other process writes meanwhile."""
    config = source.config
    folder = fetch(source.path)
    tokenizer = load_tokenizer(folder)
    calculator = ForcedResults(tokenizer) if config.calculator else None
    all_problems = data.load_split(
        config.dataset, arguments.split, config.validation_size, config.seed
    )
    source.check_rows(arguments.split, data.fingerprint(all_problems))
    problems = all_problems[: arguments.limit]
    prompts = data.encode_prompts(tokenizer, problems, config.prompt)
    model = load_model(folder, getattr(torch, config.dtype), pick_device())
    check_ids(model, prompts, source.path)
    longest = max(map(len, prompts)) + config.max_new_tokens
    check_positions(
        model, longest, "the longest prompt with max_new_tokens", "set a smaller max_new_tokens"
    )
    identity = identify(source, weights_identity(folder), tokenizer, arguments.split, all_problems)
    source.check_unchanged()
    work = Work(model, tokenizer, problems, prompts, config)

    # All of them before the first is decoded: what can't go on is refused at once, and not after the others.
    stages = [(PredictionsFile(output, identity, len(problems)), None, None)]
    if calculator:
        file = PredictionsFile(
            output / CALCULATOR, identity | {"with_calculator": True}, len(problems)
        )
        stages.append((file, calculator, None))
    if arguments.samples:
        drawn = {
            "temperature": arguments.temperature,
            "seed": config.seed,
            "with_calculator": config.calculator,
        }
        file = PredictionsFile(output / SAMPLES, identity | drawn, len(problems), arguments.samples)
        stages.append((file, calculator, drawn))
    found: list[tuple[dict[str, Any], bool]] = []
    try:
        for stage in stages:
            found.append(evaluate_one(work, *stage, arguments.verify_batching))
    finally:  # a stop in one stage takes nothing from the score of those before
        if found and len(problems) == len(all_problems):
            track(source, arguments.split, identity, found)
    finish(
        found[0][0],
        output / PREDICTIONS_FILE,
        output / SCORES_FILE,
        f"{source.path} on {arguments.split}",
    )
    print(f"results: {output}")


def rescore(file: Path, output: Path | None) -> None:
    """Score predictions again; ``scores.json`` goes beside their file, or under ``output``."""
    if not os.access(file, os.R_OK):  # said before a folder is made for it
        read_predictions(file)
    folder = output or file.parent
    is_named = file.name != PREDICTIONS_FILE
    with writing_into(folder):
        target = folder / SCORES_FILE if output else scores_file_beside(file)
        scores = scores_again(file) | (
            {"predictions": file.name} if is_named and not output else {}
        )
        if is_named or folder.resolve() != file.parent.resolve():
            check_replaceable(target, scores | scores_beside(file, scores)[0])
        try:
            finish(scores, file, target, str(file))
        except OSError as error:
            raise UserError(
                f"{folder}: can't be written ({error.strerror}): choose another --output"
            ) from None


def scores_file_beside(file: Path) -> Path:
    """Where the scores of a file of predictions go: into ``scores.json``, unless that is, or will be, of other ones.

    Several files of other names than ``predictions.jsonl`` may share a folder, with an evaluation too.
    """
    plain = file.with_name(SCORES_FILE)
    if file.name == PREDICTIONS_FILE:
        return plain
    taken = any(file.with_name(name).exists() for name in (PREDICTIONS_FILE, IDENTITY_FILE))
    if taken or (plain.exists() and read_scores(plain).get("predictions") != file.name):
        return file.with_name(f"{file.name.removesuffix('.jsonl')}.{SCORES_FILE}")
    return plain


def scores_again(file: Path) -> dict[str, Any]:
    """The scores of predictions, by what stands in their file and, of a ``predictions.jsonl``, beside it."""
    rows = read_predictions(file)
    identity, said = {}, {}
    if file.name == PREDICTIONS_FILE:  # of another name: what stands beside it is of another file
        identity = read_identity(file.with_name(IDENTITY_FILE)) or read_identity(
            file.with_name(SCORES_FILE)
        )
        identity = {
            key: value for key, value in identity.items() if key not in (CALCULATOR, SAMPLES)
        }
        said = said_before(file.parent)
    if "num_problems" not in identity:
        identity["num_problems"] = len({row["id"] for row in rows})
        print(
            f"{file}: nothing beside it says how many problems were asked: taken to be all {identity['num_problems']}"
        )
    scores = identity | score_rows(rows, identity, file) | said
    golds = {f"id {row['id']}": row["gold"] for row in rows}
    rules.say_odd_golds(golds, str(file))
    return scores


def compare(first: Path, second: Path) -> None:
    """Say whether two ``predictions.jsonl`` really differ."""
    names = str(first), str(second)
    found = [read_predictions(file) for file in (first, second)]
    for rows, name in zip(found, names, strict=True):
        say_contradictions(rows, name)
    result = comparing.compare(*found, names)
    print(report.comparison_table(result, names))
    check_printed()


# ---------------------------------------------------------------- its parts


@contextmanager
def writing_into(*folders: Path) -> Iterator[None]:
    """Make ``folders``, and keep other evaluations out of them. Those that stay empty are removed at the end."""
    with ExitStack() as stack:
        for folder in folders:
            held = f"{folder}: another process is evaluating into it: wait for it, or choose another --output"
            try:
                stack.enter_context(locked(folder, held))
            except OSError as error:
                raise UserError(
                    f"{folder}: can't be written ({error.strerror}): choose another --output"
                ) from None
        yield


def output_folder(source: Source, split: str) -> Path:
    """In the run's own ``eval`` folder; for a model that belongs to no run, in one named after it."""
    if source.run_folder is not None:
        for folder in (source.run_folder, source.run_folder / "eval"):
            check_no_links(folder)
        checkpoint = Path(source.path).name
        return (
            source.run_folder
            / "eval"
            / (split if checkpoint == "best" else f"{checkpoint}-{split}")
        )
    name = (
        source.path.replace("/", "--")
        if not Path(source.path).exists()
        else Path(source.path).resolve().name
    )
    return local_path(source.config.output_dir) / name / "eval" / split


def identify(
    source: Source,
    weights: str,
    tokenizer: Tokenizer,
    split: str,
    problems: Sequence[dataset.Problem],
) -> dict[str, Any]:
    """Everything that a completion depends on: predictions of another identity are never mixed in."""
    config: Config = source.config
    return {
        "checkpoint": hide_home(source.path),
        "weights": weights,
        "tokenizer": tokenizer.identity,
        "split": split,
        "data_sha256": data.fingerprint(problems),
        "prompt": config.prompt,
        "max_new_tokens": config.max_new_tokens,
        "dtype": config.dtype,
    }


@dataclass(frozen=True)
class Work:
    """What is decoded, and by what.

    Attributes:
        prompts: token ids of each of ``problems``.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    problems: Sequence[dataset.Problem]
    prompts: Sequence[list[int]]
    config: Config

    def settings(self, calculator: ForcedResults | None) -> dict[str, Any]:
        """What `generate` wants to know beside model and prompts."""
        return {
            "max_new_tokens": self.config.max_new_tokens,
            "eos_token_ids": eos_token_ids(self.model, self.tokenizer),
            "slots": self.config.decode_slots,
            "calculator": calculator,
        }

    def text(self, completion: Completion) -> str:
        return self.tokenizer.decode(completion.token_ids)


def evaluate_one(
    work: Work,
    predictions: PredictionsFile,
    calculator: ForcedResults | None,
    drawn: dict[str, Any] | None,
    count: int | None,
) -> tuple[dict[str, Any], bool]:
    """Decode what ``predictions`` does not hold yet, verify ``count`` of all (`verify_batching`), and score.

    Args:
        drawn: see `decode`; samples are not verified, since Transformers draws otherwise.

    Returns:
        What went into the ``scores.json`` beside it, and whether anything was decoded.
    """
    with predictions:
        speed, completions = decode(work, predictions, calculator, drawn)
        said = speed or said_before(predictions.folder)
        if drawn is None and (speed or count is not None or "verified_batching" not in said):
            said = said | verify_batching(count, work, predictions, completions, calculator)
    rows = list(predictions.rows.values())
    scores = predictions.identity | score_rows(rows, predictions.identity, predictions.file) | said
    before = read_scores(predictions.folder / SCORES_FILE)
    beside = {
        name: before[name] for name in (CALCULATOR, SAMPLES) if name in before
    }  # until `finish` looks again
    write_scores(predictions.folder / SCORES_FILE, scores | beside)
    return scores, bool(speed)


def headlines(scores: dict[str, Any]) -> dict[str, float]:
    """The numbers of a stage that W&B and metrics.jsonl get."""
    if "maj_at" in scores:
        return {f"maj_at_{k}": share for k, share in scores["maj_at"].items()}
    return {
        "calculator_exact_match" if scores.get("with_calculator") else "exact_match": scores[
            "exact_match"
        ]
    }


def decode(
    work: Work,
    predictions: PredictionsFile,
    calculator: ForcedResults | None,
    drawn: dict[str, Any] | None,
) -> tuple[dict[str, Any], dict[Key, Completion]]:
    """Write every completion that ``predictions`` does not hold yet, each as soon as it is finished.

    Args:
        drawn: the ``temperature`` and ``seed`` of samples; None: greedy decoding.

    Returns:
        ``seconds`` that it took, and ``tokens_per_second``, without what was there before (nothing
        where all was); and the greedy completions that were not there before.
    """
    waiting, total, unit = predictions.missing(), predictions.size, "sample" if drawn else "problem"
    if len(waiting) < total:
        print(f"going on: {total - len(waiting)} of {total} {unit}s are in {predictions.file}")
    started, tokens, completions = time.perf_counter(), 0, {}
    title = "sampling" if drawn else "calculating" if calculator else "decoding"
    with ProgressBar(title, total, unit, total - len(waiting)) as bar:
        for completion in generated(work, waiting, calculator, drawn):
            key = waiting[completion.index]
            num_tokens = len(completion.token_ids) + (completion.stop == "eos")
            predictions.write(
                key, work.problems[key[0]], work.text(completion), completion.stop, num_tokens
            )
            if drawn is None:  # to be verified; samples are many
                completions[key] = completion
            tokens += num_tokens
            rate = tokens / (time.perf_counter() - started)
            bar.update(
                exact_match=f"{predictions.num_correct / len(predictions.rows):.1%}",
                tok_s=f"{rate:.0f}",
            )
    seconds = time.perf_counter() - started
    if not waiting:
        return {}, {}
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }, completions


def generated(
    work: Work, keys: Sequence[Key], calculator: ForcedResults | None, drawn: dict[str, Any] | None
) -> Iterator[Completion]:
    """The completions of ``keys``, greedy or drawn; the index of each is that among ``keys``."""
    prompts = [work.prompts[index] for index, _ in keys]
    if drawn is None:
        return greedy_decode(work.model, prompts, **work.settings(calculator))
    # Of a problem's own text, so that other rows in the data set change no sample.
    seeds = [f"{drawn['seed']}/{sample}/{work.problems[index].question}" for index, sample in keys]
    return sample_decode(
        work.model, prompts, seeds, temperature=drawn["temperature"], **work.settings(calculator)
    )


def verify_batching(
    count: int | None,
    work: Work,
    predictions: PredictionsFile,
    completions: dict[Key, Completion],
    calculator: ForcedResults | None,
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
    exact = work.config.dtype == "float32"
    chosen = verify.sample(
        sorted(predictions.rows), VERIFIED_IN_FLOAT32 * exact if count is None else count
    )
    if not chosen:
        return {}
    again = [key for key in chosen if key not in completions]
    for completion in generated(work, again, calculator, None):
        completions[again[completion.index]] = completion
    prompts = {key: work.prompts[key[0]] for key in chosen}
    limits = {key: value for key, value in work.settings(calculator).items() if key != "slots"}
    found = verify.differences(work.model, prompts, completions, **limits)
    shown = {key: difference.describe(work.tokenizer) for key, difference in found.items()}
    for key in again:
        if work.text(completions[key]) != predictions.rows[key]["completion"] and key not in shown:
            shown[key] = f"{predictions.file} holds another completion than this machine writes now"
    if shown and exact:
        (index, _), what = next(iter(shown.items()))
        raise UserError(
            f"{len(shown)} of {len(chosen)} completions differ from those of Transformers' generate alone (problem "
            f"{index}: {what}): no score, since in float32 batching must change nothing; --verify-batching 0 skips this"
        )
    print(
        f"verified: {len(chosen) - len(shown)} of {len(chosen)} completions"
        + (" with the calculator" if calculator else "")
        + " are those of Transformers' generate alone"
    )
    for (index, _), what in shown.items():
        print(f"  problem {index}: {what}")
    return {"verified_batching": {"problems": len(chosen), "differences": len(shown)}}


# ---------------------------------------------------------------- scores


def score_rows(
    rows: Sequence[dict[str, Any]], identity: dict[str, Any], source: Path
) -> dict[str, Any]:
    """All that is said of greedy predictions, or of samples; ``identity`` says how many there must be."""
    say_contradictions(rows, source)
    can_go_on = (
        "weights" in identity
    )  # those of other programs are none that evaluate.py goes on with
    if any("sample" in row for row in rows):
        num_samples = identity.get("num_samples")
        return score.score_samples(
            rows, identity["num_problems"], num_samples, str(source), can_go_on
        )
    return score.score(rows, identity["num_problems"], str(source), can_go_on) | mistakes.analyse(
        rows
    )


def scores_beside(greedy: Path, scores: dict[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """Scores with the calculator, and of samples, where such stand complete beside the ``greedy`` predictions.

    Args:
        scores: those of ``greedy``.

    Returns:
        The scores by name; and the files that are not complete, or of another evaluation.
    """
    found: dict[str, Any] = {}
    left_out: list[Path] = []
    if greedy.name != PREDICTIONS_FILE:
        return found, left_out
    same = (*IDENTITY, "num_problems")
    for name in (CALCULATOR, SAMPLES):
        file = greedy.parent / name / PREDICTIONS_FILE
        if not file.exists():
            continue
        try:
            identity = read_identity(file.with_name(IDENTITY_FILE))
            if any(identity.get(key) != scores.get(key) for key in same):
                raise UserError(f"{file}: of another evaluation")
            rows = read_predictions(file, drop_cut_line=True)
            one = score_rows(rows, identity, file)
            one |= comparing.gain(read_predictions(greedy), rows) if name == CALCULATOR else {}
        except UserError:  # whatever is wrong there, it takes nothing from the greedy score
            left_out.append(file)
            continue
        shown = ("temperature", "seed", "with_calculator")
        found[name] = {key: identity[key] for key in shown if key in identity} | one
    return found, left_out


def check_replaceable(target: Path, scores: dict[str, Any]) -> None:
    """Raises UserError where ``scores`` would replace, or stand beside, what is of other predictions."""
    others = (PREDICTIONS_FILE, IDENTITY_FILE) if target.name == SCORES_FILE else ()
    held = [name for name in others if target.with_name(name).exists()]
    if target.exists():
        before = read_scores(target)
        same = (
            ("predictions",)
            if "predictions" in scores
            else IDENTITY
            if "weights" in scores
            else scores.keys()
        )
        held += [target.name] * any(before.get(key) != scores.get(key) for key in same)
    if held:
        raise UserError(
            f"{target.parent}: holds {' and '.join(held)} of other predictions, which is not replaced: choose another "
            "--output"
        )


def write_scores(target: Path, scores: dict[str, Any]) -> None:
    replace_file(target, json.dumps(scores, indent=2) + "\n")


def finish(scores: dict[str, Any], file: Path, target: Path, title: str) -> None:
    """Write ``scores``, of ``file``, to ``target``, with those of what stands beside it, and print all of them."""
    beside, left_out = scores_beside(file, scores)
    write_scores(target, scores | beside)
    for other in left_out:
        print(f"{other}: is not complete, or of another evaluation: left out of {SCORES_FILE}")
    print_tables(scores | beside, title)
    if target.name != SCORES_FILE:
        print(f"scores: {target}, since {SCORES_FILE} is that of other predictions")


def print_tables(scores: dict[str, Any], title: str) -> None:
    if "maj_at" in scores:
        print(report.samples_table(scores, one_line(title)))
        return
    print(report.score_table(scores, title))
    print(report.analysis_table(scores))
    if CALCULATOR in scores:
        print(report.gain_line(scores[CALCULATOR]))
    if SAMPLES in scores:
        print(report.samples_table(scores[SAMPLES], "  drawn"))


def track(
    source: Source,
    split: str,
    identity: dict[str, Any],
    found: Sequence[tuple[dict[str, Any], bool]],
) -> None:
    """Log what is new of ``found`` into the run of the checkpoint, if data and decoding are the run's own.

    Args:
        found: scores, and whether anything was decoded for them now. Where nothing was, they are new if the run's
            metrics.jsonl lacks them: an earlier evaluation may have ended between its last completion and this.
    """
    if source.description is None or source.run_folder is None:
        return
    trained = source.description["settings"]
    same = all(identity[key] == trained.get(key) for key in ("prompt", "max_new_tokens", "dtype"))
    same &= identity["data_sha256"] == source.description["data"].get(f"{split}_sha256")
    if not same:
        print("not logged as the run's score: data or settings are not those of the run")
        return
    prefix = "eval/" if split == "test" else f"eval/{split}_"
    config, step, epoch = source.config, source.description["step"], source.description["epoch"]
    news: dict[str, float] = {}
    for scores, is_decoded in found:
        numbers = {prefix + name: value for name, value in headlines(scores).items()}
        if is_decoded or not is_logged(source.run_folder, step, numbers):
            news |= numbers
    if not news:
        return
    tracker = start_tracker(
        config.wandb_mode,
        run=saved_run(
            newest_description(source), config.wandb_project, trained.get("wandb_project")
        ),
        name=config.run_name,
        folder=source.run_folder,
        settings={},
    )
    # The run is held until the line is written and no longer: whoever wants to train must not wait for W&B.
    with ExitStack() as stack, locked_if_free(source.run_folder) as alone:
        metrics = stack.enter_context(MetricsLog(source.run_folder, tracker, alone=alone))
        metrics.write(step, epoch, news)


def newest_description(source: Source) -> dict[str, Any]:
    """The ``training.json`` that knows best where W&B has the run: a sweep may have moved it since ``best``."""
    for place in ((source.run_folder / LAST,), (source.run_folder, FINISHED_FILE)):
        try:
            return read_description(*place)
        except UserError:  # removed, to have its room
            continue
    return source.description


if __name__ == "__main__":
    run_script(main, *_parsed)
