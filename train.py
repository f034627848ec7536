"""Fine-tune Llama-2-7B on GSM8K: python train.py

python train.py
python train.py --learning_rate 1e-5 --run_name lower-rate
python train.py --config demo.yaml
python train.py --model ./my-llama --dataset ./my-gsm8k --wandb_mode disabled
python train.py --selftest

Settings stand in config.yaml, each with its meaning; any of them can be set on the command
line. A run that was stopped goes on when the same command is typed again.
"""

import sys

from run.errors import NotFiniteError, Stopped, UserError
from run.script import check_platform, run_script
from run.signals import StopSignal

check_platform()  # before the imports that would fail

from run.arguments import ArgumentParser, parse_arguments
from run.config import Config, anchored, load_config, settings_text
from run.paths import local_path


def read_arguments(argv: list[str]) -> tuple[Config, bool]:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="a few steps in a temporary folder: is a killed run resumed bit for bit?",
    )
    arguments, typed = parse_arguments(parser, argv)
    return load_config(arguments.config, typed), arguments.selftest


if (
    __name__ == "__main__"
):  # before the heavy imports: --help and a mistyped setting are answered at once
    _parsed: list[Config | bool] = []
    run_script(lambda: _parsed.extend(read_arguments(sys.argv[1:])))

import math
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import data
from engine import memory, packing
from engine.cpu import heap
from engine.decoding import greedy_decode
from engine.device import pick_device
from engine.hub import fetch
from engine.llama import checkpoint_activations, compile_layers
from engine.loading import (
    check_ids,
    check_lengths,
    eos_token_ids,
    load_model,
    load_tokenizer,
    own_memory,
)
from engine.loss import Measurement, measure, perplexity_of, summed_loss
from engine.optimizer import build_optimizer, checkpoint_bytes, scheduled_rate
from engine.state import get_random_state, pack_state, set_random_state, unpack_state
from engine.tokenizer import Tokenizer
from grading import dataset
from grading.rules import correct_openai
from run.checkpoint import save_checkpoint, set_damaged_aside
from run.files import replace_file
from run.folder import check_same_run, check_unfinished, claimed
from run.manifest import BEST, LAST, check_whole
from run.metrics_log import MetricsLog
from run.progress import Progress, Speed
from run.progress_bar import ProgressBar
from run.retention import check_disk_space, remove_state
from run.shell import evaluation_command
from run.training_json import describe, read_description, saved_settings
from run.wandb_run import RunPath, new_run, saved_run, start_tracker

# ---------------------------------------------------------------- the story


def main(config: Config, selftest: bool = False) -> None:
    if selftest:
        from selftest import run_selftest

        run_selftest(config)
        return
    run_folder = local_path(config.output_dir) / config.run_name
    with claimed(run_folder, config.resume) as resume_from:
        saved = (
            None
            if resume_from is None
            else saved_settings(resume_from, read_description(resume_from))
        )
        train(anchored(config, saved), run_folder, resume_from)


def train(config: Config, run_folder: Path, resume_from: Path | None) -> None:
    heap.keep_freed_memory()
    device, dtype = pick_device(), getattr(torch, config.dtype)
    base = resume_from or check_whole(fetch(config.model))
    tokenizer = load_tokenizer(base)
    training, validation, held_out, data_hashes = load_data(config, tokenizer)
    if resume_from is not None:
        check_same_run(resume_from, config, data_hashes["train_sha256"])
    total_steps = config.epochs * training.steps_per_epoch
    if resume_from is not None and not config.keep_state:
        description = read_description(resume_from)
        if description["step"] >= total_steps:
            remove_state(run_folder, description)
            return

    model = load_model(base, dtype, device)
    prompts = data.encode_prompts(
        tokenizer, held_out, config.prompt
    )  # of rows too long to train on as well
    examples = [*training.examples, *validation]
    check_ids(model, [*(example.input_ids for example in examples), *prompts], config.model)
    check_lengths(model, examples, prompts, config.max_new_tokens)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    if config.compile:
        compile_layers(model)
    optimizer = configured_optimizer(model, config)
    torch.manual_seed(config.seed)
    progress = Progress()
    if resume_from is not None:
        own_memory(model)
        progress = unpack_state(resume_from, optimizer, Progress)
        check_unfinished(progress.step, total_steps, run_folder)
        print(f"resuming: {resume_from} at step {progress.step} of {total_steps}")
    progress.run = where_to_log(config.wandb_project, resume_from)

    def save(name: str, result: Measurement | None = None) -> None:
        description = describe(
            config, progress, training.steps_per_epoch, data_hashes, tokenizer, result
        )
        tensors = None
        if name == LAST:
            tensors, description["state"] = pack_state(optimizer, asdict(progress))
        save_checkpoint(run_folder / name, model, tokenizer, description, tensors)

    check_disk_space(run_folder, *checkpoint_bytes(model.parameters()))
    if resume_from is None:
        save(
            LAST
        )  # a disk or a folder that can't hold a checkpoint is found out now, not after an epoch
    else:
        set_damaged_aside(run_folder, resume_from)
        if progress.forget_best_without(run_folder / BEST):
            print(f"{run_folder / BEST}: is gone: the best is chosen among the epochs to come")
    replace_file(run_folder / "config.yaml", settings_text(config))
    tracker = start_tracker(
        config.wandb_mode,
        run=progress.run,
        name=config.run_name,
        folder=run_folder,
        settings=asdict(config),
    )
    progress.run = tracker.run or progress.run
    print(
        f"training: {len(training.examples)} rows, {total_steps} steps of {config.batch_size} sequences in "
        f"{config.epochs} epochs, on {device.type} in {config.dtype}; validation: {len(validation)} rows"
    )
    bar = ProgressBar("training", total_steps, "step", progress.step)
    with MetricsLog(run_folder, tracker, progress.step) as metrics, StopSignal() as stop, bar:
        speed = Speed()
        while progress.step < total_steps:
            speed.start()
            step, epoch = progress.step + 1, (progress.step + 1) / training.steps_per_epoch
            rate = set_learning_rate(optimizer, config, progress.step, total_steps)
            window = training.window(progress.step)
            budget = progress.budget(config.micro_batch_tokens)
            nats, num_labels, grad_norm, fitting = accumulate_in_memory(
                model, window, budget, device, config.max_grad_norm
            )
            numbers = {"train/loss": nats / num_labels, "train/grad_norm": grad_norm}
            check_finite(
                metrics, step, epoch, numbers, run_folder, partial(at_fault, model, window)
            )
            optimizer.step()
            memory.clear_gradients(optimizer, device)
            speed.stop(sum(len(example.input_ids) for example in window))
            progress.count(nats, num_labels)

            if fitting < budget:
                progress.fitting = config.micro_batch_tokens, fitting
                bar.write(
                    f"step {step}: out of memory; micro_batch_tokens is {fitting} from here on"
                )
                metrics.write(step, epoch, {"train/micro_batch_tokens": fitting})

            if step % config.log_every == 0 or step == total_steps:
                loss, tokens_per_second = progress.read_and_reset_loss(), speed.read_and_reset()
                numbers = {
                    "train/loss": loss,
                    "train/perplexity": perplexity_of(loss),
                    "train/learning_rate": rate,
                    "train/grad_norm": grad_norm,
                    "train/tokens_per_second": tokens_per_second,
                }
                metrics.write(step, epoch, numbers)
                bar.update(loss=f"{loss:.4f}", tok_s=f"{tokens_per_second:.0f}")
            else:
                bar.update()

            epoch_ends = step % training.steps_per_epoch == 0
            if epoch_ends:
                result = measure(model, validation, config.micro_batch_tokens, device)
                numbers = {"val/loss": result.loss, "val/perplexity": result.perplexity}
                check_finite(
                    metrics, step, epoch, numbers, run_folder, lambda: "the validation rows"
                )
                exact_match = measure_exact_match(model, tokenizer, held_out, config)
                metrics.write(
                    step,
                    epoch,
                    numbers | ({} if exact_match is None else {"val/exact_match": exact_match}),
                )
                shown = (
                    ""
                    if exact_match is None
                    else f", exact match {exact_match:.2%} of {len(held_out)}"
                )
                bar.write(f"epoch {epoch:.0f} of {config.epochs}: validation {result}{shown}")
                # best before last: after a kill between the two, the epoch is trained again and best saved again.
                if progress.is_best(result.loss, exact_match):
                    save(BEST, result)

            due = config.checkpoint_steps is not None and step % config.checkpoint_steps == 0
            stopped_by = stop.signal_number  # read once: a signal may come between two looks at it
            if epoch_ends or due or stopped_by is not None:
                save(LAST)
            if epoch_ends:
                bar.write(write_sample(model, tokenizer, held_out[0], config))
            if stopped_by is not None and step < total_steps:
                name, saved = signal.Signals(stopped_by).name, f"saved in {run_folder / LAST}"
                raise Stopped(
                    stopped_by, f"{name} after step {step}, {saved}: type the same command to go on"
                )

    if not config.keep_state:
        try:
            remove_state(run_folder, read_description(run_folder / LAST))
        except UserError as error:  # the run is none the worse
            print(error)
    print(
        f"done: best validation loss {progress.best_loss:.6f}; next: {evaluation_command(run_folder / BEST)}"
    )


# ---------------------------------------------------------------- its parts


def load_data(
    config: Config, tokenizer: Tokenizer
) -> tuple[data.TrainingData, list[packing.Example], list[dataset.Problem], dict[str, str]]:
    """Training and validation examples, the validation problems, and the hashes of the rows."""
    rows = dataset.load_problems(config.dataset, "train")
    test = dataset.load_problems(config.dataset, "test")
    data.check_disjoint(rows, test)
    train, validation = data.carve_validation(rows, config.validation_size, config.seed)
    examples = {
        name: data.leave_out_long(
            data.encode(tokenizer, problems, config.prompt), config.max_length, name
        )
        for name, problems in (("train", train), ("validation", validation))
    }
    hashes = {
        f"{name}_sha256": data.fingerprint(problems)
        for name, problems in (("train", rows), ("validation", validation), ("test", test))
    }
    training = data.TrainingData(examples["train"], config.batch_size, config.seed)
    return training, examples["validation"], validation, hashes


def where_to_log(project: str, resume_from: Path | None) -> RunPath:
    """Where a new run goes in W&B, or where the resumed one is already."""
    if resume_from is None:
        return new_run(project)
    before = read_description(resume_from)
    return saved_run(before, project, before["settings"].get("wandb_project"))


def accumulate(
    model: LlamaForCausalLM,
    window: Sequence[packing.Batch],
    device: torch.device,
    max_grad_norm: float | None,
) -> tuple[float, int, float]:
    """Add up the gradient of one optimizer step over its micro-batches, and clip it.

    The loss is the mean over the supervised tokens of the whole window: each weighs the same,
    whichever micro-batch it fell into, and however full the last one is.

    Returns:
        The window's summed loss in nats, its supervised tokens, and the gradient norm before clipping.
    """
    num_labels = sum(batch.num_labels for batch in window)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for batch in window:
        loss = summed_loss(model, batch.to(device))
        (loss / num_labels).backward()
        nats += loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    return nats.item(), num_labels, grad_norm.item()


def accumulate_in_memory(
    model: LlamaForCausalLM,
    examples: Sequence[packing.Example],
    micro_batch_tokens: int,
    device: torch.device,
    max_grad_norm: float | None,
) -> tuple[float, int, float, int]:
    """`accumulate` that starts again with micro-batches of half the tokens when memory runs out.

    The gradient, and all that follows from it, is that of the same window; only the order of
    some additions differs.

    Returns:
        What `accumulate` does, and the micro_batch_tokens that fit.

    Raises:
        UserError: one sequence alone does not fit.
    """
    random_state = get_random_state()
    while True:
        window = packing.pack(examples, micro_batch_tokens)
        try:
            return *accumulate(model, window, device, max_grad_norm), micro_batch_tokens
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            if len(window) == len(examples):
                longest = max(len(example.input_ids) for example in examples)
                raise UserError(
                    f"out of memory with each sequence alone, the longest of {longest} tokens: set "
                    "gradient_checkpointing true, dtype bfloat16 or a smaller max_length, or take a larger device"
                ) from None
        # Here the error is gone, and with it the tensors that its traceback held.
        model.zero_grad()
        memory.release()
        set_random_state(random_state)
        micro_batch_tokens //= 2


def check_finite(
    metrics: MetricsLog,
    step: int,
    epoch: float,
    numbers: Mapping[str, float],
    run_folder: Path,
    find_rows: Callable[[], str],
) -> None:
    """Log ``numbers`` and raise NotFiniteError where one is NaN or infinite: before it reaches the weights.

    Args:
        find_rows: says which rows it came from; called only where there is one.
    """
    if all(map(math.isfinite, numbers.values())):
        return
    metrics.write(step, epoch, numbers)
    shown = ", ".join(f"{name.partition('/')[2]} {value}" for name, value in numbers.items())
    raise NotFiniteError(
        f"step {step}: {shown} must be finite, with {find_rows()}; the weights of {run_folder / LAST} are from before: "
        "lower the learning_rate, or set dtype float32"
    )


def at_fault(model: LlamaForCausalLM, examples: Sequence[packing.Example]) -> str:
    """Which of the sequences of a step give, each alone, a loss or gradient that is not finite."""
    lines = []
    for example in examples:
        model.zero_grad()
        nats, _, grad_norm = accumulate(model, [packing.collate([example])], model.device, None)
        if not (math.isfinite(nats) and math.isfinite(grad_norm)):
            lines.append(example.line)
    model.zero_grad()
    if not lines:
        return f"none of its {len(examples)} rows alone, but all of them together"
    shown = ", ".join(map(str, sorted(lines)[:8])) + (", ..." if len(lines) > 8 else "")
    return f"{len(lines)} of its {len(examples)} rows of train, line {shown}"


def configured_optimizer(model: LlamaForCausalLM, config: Config) -> torch.optim.Optimizer:
    return build_optimizer(
        model.parameters(),
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, config: Config, step: int, total_steps: int
) -> float:
    rate = scheduled_rate(
        step,
        total_steps,
        peak=config.learning_rate,
        schedule=config.lr_schedule,
        warmup_ratio=config.warmup_ratio,
        min_ratio=config.min_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def complete(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[dataset.Problem],
    config: Config,
) -> dict[int, tuple[str, str]]:
    """What the model writes for each of ``problems``, by number: text, and why it stopped."""
    prompts = data.encode_prompts(tokenizer, problems, config.prompt)
    model.eval()
    try:
        return {
            completion.index: (tokenizer.decode(completion.token_ids), completion.stop)
            for completion in greedy_decode(
                model,
                prompts,
                max_new_tokens=config.max_new_tokens,
                eos_token_ids=eos_token_ids(model, tokenizer),
                slots=config.decode_slots,
            )
        }
    finally:  # where memory is short too: in eval mode training would recompute nothing, and drop nothing out
        model.train()


def measure_exact_match(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[dataset.Problem],
    config: Config,
) -> float | None:
    """The share of ``problems`` that greedy decoding gets right, as ``evaluate.py --split validation`` has it.

    None where it is not what chooses the best checkpoint: decoding takes longer than the loss.
    """
    if config.best_by != "val_exact_match":
        return None
    found = complete(model, tokenizer, problems, config)
    return sum(
        correct_openai(text, problems[number].gold) for number, (text, _) in found.items()
    ) / len(problems)


def write_sample(
    model: LlamaForCausalLM, tokenizer: Tokenizer, problem: dataset.Problem, config: Config
) -> str:
    """What the model writes for one validation problem, next to what the data set says."""
    try:
        text, stop = complete(model, tokenizer, [problem], config)[0]
    except UserError as error:  # no memory for it: not worth a run
        return f"  no sample: {error}"
    return f"  question: {problem.question!r}\n  model:    {text!r} ({stop})\n  gold:     {problem.answer!r}"


if __name__ == "__main__":
    run_script(main, *_parsed)
