"""Fine-tune Llama-2-7B on GSM8K: python train.py

python train.py --config demo.yaml
python train.py --method lora --learning_rate 2e-4 --run_name lora
python train.py --plan --device_memory 24 --devices 8
python train.py --preflight
torchrun --nproc_per_node 8 train.py

config.yaml lists every setting. To resume a run that was stopped, type the same command again.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from run.script import check_platform, ends_early, read_command_line, run_script
from run.signals import StopSignal

check_platform()  # before the imports that would fail

from run.config import Config, settings_text
from run.looks import Look, PlanFor
from run.paths import local_path
from run.places import anchored
from run.train_arguments import read_train_arguments

read_arguments = partial(read_train_arguments, __doc__)

if __name__ == "__main__":
    command_line = read_command_line(read_arguments)  # before the heavy imports

import plan

if __name__ == "__main__" and ends_early(plan.look_early, command_line[0], command_line[-1]):
    raise SystemExit

import torch

import data
import preflight
from engine import device_errors, faults, gradients, loading, memory
from engine.compiling import prepare
from engine.device import pick_device, prepare_process
from engine.hub import fetch
from engine.llama import Llama
from engine.measure import Measurement, StepResult, measure, perplexity_of
from engine.optimizer import build_optimizer, checkpoint_bytes, make_state
from engine.packing import NOT_AHEAD, Example, MicroBatch, Packer
from engine.plan import Plan
from engine.ranks import ALONE, Ranks, job
from engine.sharding import shard
from engine.state import copy_to_host, get_random_state, pack_state, set_random_state, unpack_state
from engine.strategy import complete
from engine.together import parts_of
from grading.answer_parts import PARTS
from grading.dataset import Problem, load_problems
from grading.score import share_correct
from page.write import report_if_possible
from run.checkpoint import save_checkpoint
from run.closing import finish, finish_late
from run.common import common_settings, go_on_together
from run.files import replace_file
from run.folder import check_same_run, claimed_by_all, find_opening, restore
from run.manifest import LAST
from run.model_source import Start, find_start
from run.progress import Progress
from run.retention import check_disk_space, late_ends
from run.run_log import open_log, wandb_path
from run.saves import Saves
from run.selftest import run_selftest
from run.training_json import tokenizer_record

# ---------------------------------------------------------------- the story


def train(config: Config, folder: Path, resume_from: Path | None, parts: "Parts") -> None:
    # What to learn from
    start = find_start(asdict(config), resume_from, fetch)
    tokenizer = loading.load_tokenizer(start.tokenizer, tokenizer_record(start.tokenizer))
    problems = data.load_for_training(config.dataset, config.validation_size, config.seed)
    rows, held_out = data.encode_for_training(tokenizer, problems, config.prompt, config.max_length)
    prompts = data.encode_prompts(tokenizer, problems.validation, config.prompt)
    batches = data.batches_of(rows, asdict(config), tokenizer, start.weights)
    steps = config.epochs * batches.per_epoch
    if resume_from is not None:
        check_same_run(resume_from, asdict(config), problems.sha256["train_sha256"])
        if late_ends(resume_from, steps, asdict(config)):
            return parts.ranks.once(finish_late, folder, resume_from, asdict(config), parts.report)

    # What learns
    ranks, max_norm = parts.ranks, config.max_grad_norm
    planned = plan.plan_run(config, start.weights, rows, resume_from, ranks)
    model, optimizer = build(config, start, planned, rows + held_out, prompts, ranks)
    packer = Packer(batches, ranks)
    schedule = plan.schedule_of(config, steps)
    decode = partial(parts.complete, model, tokenizer, config.max_new_tokens, config.decode_slots)

    # Where it left off
    torch.manual_seed(config.seed + parts.ranks.rank)
    progress = Progress()
    if resume_from is not None:
        loading.copy_from_mapped_file(model)  # which the next saves will remove
        limits = config.micro_batch_tokens, planned.micro_batch_tokens
        progress = restore(resume_from, partial(unpack_state, optimizer=optimizer), steps, *limits)
    progress.run = wandb_path(config.wandb_project, resume_from)
    record, hashes = (asdict(config), asdict(planned)), (start.base, problems.sha256)
    saves = Saves(folder, *record, batches.per_epoch, *hashes, tokenizer, parts)

    # Fail in second five, not in hour five
    check_disk_space(folder, *checkpoint_bytes(model.trained, config.optimizer))
    if resume_from is None:
        saves.save_last(model, progress, *pack_state(optimizer, asdict(progress)))
    else:
        progress = go_on_together(folder, resume_from, progress, ranks)
    make_state(optimizer)

    # Where it reports
    parts.ranks.once(replace_file, folder / "config.yaml", settings_text(config))
    log = open_log(saves, progress, batches, steps, plan.usage(config, start.weights, rows, ranks))
    log.start(len(rows), len(held_out), config.batch_size, model.device.type, config.arithmetic)

    with log, parts.ranks.agreed(StopSignal()) as stop, saves:
        while progress.step < steps:
            batch, rate = packer.batch(progress.step), schedule.learning_rate(progress.step)
            budget = progress.budget(planned.micro_batch_tokens)
            with log.timing(batch):
                result = parts.step(model, optimizer, batch, rate, budget, max_norm, packer)
            progress.add_step(result.nats, result.num_labels)
            if not result.is_finite:
                raise log.not_finite(result, faults.rows_at_fault(model, batch), folder / LAST)
            if result.micro_batch_tokens < budget:
                progress.fitting = planned.micro_batch_tokens, result.micro_batch_tokens
                log.out_of_memory(result.micro_batch_tokens)
            if progress.is_due(config.log_every) or progress.step == steps:
                loss = progress.take_mean_loss()
                log.step(loss, perplexity_of(loss), rate, result.grad_norm)
            log.advance()

            # How good is the model after this epoch, and is it the best so far?
            epoch_ends = progress.is_due(batches.per_epoch)
            if epoch_ends:
                measured = parts.measure(model, held_out, planned.micro_batch_tokens, PARTS)
                log.check_validation(measured, folder / LAST)
                match = exact_match(config.best_by, decode, prompts, problems.validation)
                log.validation(measured, match, len(prompts))
                if progress.improve(measured.loss, match):
                    saves.save_best(model, progress, measured)

            # Saves are taken between steps, never inside one
            signal_number = stop.signal_number
            if epoch_ends or saves.is_due(progress) or signal_number is not None:
                saves.save_last(model, progress, *pack_state(optimizer, asdict(progress)))
            if epoch_ends:
                log.sample(decode, prompts, problems.validation, memory.release)
            if signal_number is not None and progress.step < steps:
                raise log.stopped(signal_number, folder / LAST)
    parts.ranks.once(finish, folder, config.keep_state, progress.best, parts.report)


def build(
    config: Config, start: Start, planned: Plan, rows: list[Example], prompts: list, ranks: Ranks
) -> tuple[Llama, torch.optim.Optimizer]:
    """The model that is trained, and its optimizer. All ``rows`` and ``prompts`` must fit it."""
    dtype = getattr(torch, config.dtype)
    model = loading.load_model(start.weights, dtype, adapter=start.adapter, ranks=ranks)
    loading.check_data(model, rows, prompts, config.max_new_tokens, config.model)
    shard(model, config.shard_over, config.reshard_after_forward, planned.reduces_each)
    prepare(model, planned.recomputation, config.compile, config.fp8)
    adam = config.learning_rate, (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    return model, build_optimizer(model.trained, *adam, config.weight_decay, config.optimizer)


# ---------------------------------------------------------------- one step


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    learning_rate: float,
    micro_batch_tokens: int,
    max_grad_norm: float | None,
    packer: Packer = NOT_AHEAD,
) -> StepResult:
    """Make one optimizer step on ``batch``, unless its loss or gradient is not finite.

    If memory runs out, the step starts again with micro-batches of half the tokens. This changes
    only the order of some additions. Raises UserError if even a single sequence does not fit, or
    in one of several processes, which start again with half the tokens.
    """
    model.train()
    random_state = get_random_state()
    while True:
        try:
            micro_batches = packer.pack(batch, micro_batch_tokens, model.kernels)
            sums = accumulate_gradients(model, micro_batches, max_grad_norm, packer)
            break
        except Exception as error:
            if not device_errors.is_out_of_memory(error):
                raise
            if faults.is_each_alone(batch, micro_batch_tokens):
                raise faults.does_not_fit(batch) from None
            if model.ranks.size > 1:
                raise faults.out_of_memory_on(model.ranks.rank, micro_batch_tokens) from None
        # Outside the except block, where the traceback no longer holds the failed pass's tensors.
        model.zero_grad()
        memory.release()
        set_random_state(random_state)
        micro_batch_tokens //= 2
    result = StepResult(*sums, micro_batch_tokens)
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=model.kernels.frees_gradients)
    return result


def accumulate_gradients(
    model: Llama,
    micro_batches: Sequence[MicroBatch],
    max_grad_norm: float | None,
    packer: Packer = NOT_AHEAD,
) -> tuple[float, int, float]:
    """Accumulate the gradient of a batch over its micro-batches, and clip it.

    The loss is the mean over the supervised tokens of the batch. All of them weigh the same,
    however they are distributed over micro-batches.

    Returns:
        Summed loss in nats, number of supervised tokens, and gradient norm before clipping.
    """
    num_labels = model.ranks.total(micro_batch.num_labels for micro_batch in micro_batches)
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    for micro_batch in model.in_turn(micro_batches):
        loss = model(micro_batch)  # summed over its supervised tokens
        (loss / num_labels).backward()
        nats += loss.detach()
    found = model.ranks.sum(nats), *gradients.clipping(model.trained, max_grad_norm)
    packer.pack_ahead(model.kernels)  # before the next line waits for the device
    total, grad_norm, factor = torch.stack([each.double() for each in found]).tolist()
    gradients.scale(model.trained, factor)
    return total, num_labels, grad_norm


def exact_match(
    best_by: str, decode: Callable[..., list], prompts: list[list[int]], problems: list[Problem]
) -> float | None:
    """As ``evaluate.py --split validation`` computes it; None if the loss chooses the best."""
    if best_by != "val_exact_match":
        return None
    try:
        return share_correct([text for text, _ in decode(prompts)], problems)
    except Exception as error:
        raise faults.exact_match_failed(error) from None


# ---------------------------------------------------------------- the script


@dataclass(frozen=True)
class Parts:
    """The functions of `train` that a test can replace through `main`, and who computes them."""

    step: Callable[..., StepResult] = train_step
    measure: Callable[..., Measurement] = measure
    complete: Callable[..., list[tuple[str, str]]] = complete
    save: Callable[..., None] = save_checkpoint
    copy: Callable[..., dict[str, torch.Tensor] | None] = copy_to_host
    report: Callable[..., None] = report_if_possible
    ranks: Ranks = ALONE


def main(
    config: Config, selftest: bool = False, wanted: PlanFor | Look | None = None, **parts: Callable
) -> None:
    if isinstance(wanted, PlanFor):
        return plan.print_plan(config, wanted)
    device, dtype = pick_device(), getattr(torch, config.dtype)
    cure = f"set a smaller micro_batch_tokens, or {memory.LARGER}"
    with job(device, common_settings(config)) as ranks, memory.reported("training", cure):
        prepare_process(device, dtype, fp8=config.fp8)
        if selftest:
            return run_selftest(config, partial(load_problems, config.dataset))
        if wanted is Look.PREFLIGHT:
            plan.check_trains(config, None, ranks.size)
            opening = find_opening, loading.load_tokenizer, plan.plan_run, plan.schedule_of
            return preflight.look(config, ranks, preflight.Tools(*opening, build, train_step))
        folder, budget = local_path(config.output_dir) / config.run_name, config.micro_batch_tokens
        with claimed_by_all(folder, config.resume, ranks, budget) as resume_from:
            config = anchored(config, resume_from)
            plan.check_trains(config, resume_from, ranks.size)
            together = parts_of(ranks, save_checkpoint, complete) | parts
            train(config, folder, resume_from, Parts(**together))


if __name__ == "__main__":
    run_script(main, *command_line)
