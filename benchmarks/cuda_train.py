"""The steps train and adapters of cuda.py: optimizer steps of a random Llama-2-7B.

Their traces say where the time goes.
"""

import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch

# This benchmark's neighbour, which also puts the repository on the path.
from cuda_work import Work, flops, random_llama_2_7b, read_rows, tokens_of

import train
from engine.compiling import compile_layers
from engine.cuda.fp8 import Fp8Linear
from engine.cuda.linear import Linear
from engine.footprint import footprint, most_in_a_step
from engine.llama import EAGER, Llama
from engine.measure import StepResult
from engine.memory import free_bytes, kind
from engine.optimizer import ADAMW, ADAMW_8BIT, build_optimizer, make_state, training_bytes
from engine.packing import NOT_AHEAD, Example, Packer, pack
from engine.plan import Device, Plan, Wishes, choose
from engine.recipe import Recipe, Recomputation
from engine.roofline import expected_step
from engine.shape import ModelShape
from plan import card_of, rows_of
from run.method import FULL, Adapter

BATCH_SIZE = 128
RANK = 64  # of the adapters
# Of an H100 or H200 for dense products in bfloat16, by its data sheet.
PEAK_FLOPS = 989e12


@dataclass(frozen=True)
class Variant:
    """How a step is computed.

    Attributes:
        tokens: of a micro-batch; None: as train.py chooses.
        recomputed: how many layers are recomputed; None: as train.py chooses.
        compiled: whether the operations between products are compiled.
        adds: whether products add to the gradients themselves.
        fp8: whether they are computed in 8-bit floats.
    """

    tokens: int | None = None
    recomputed: int | None = None
    compiled: bool = True
    adds: bool = True
    fp8: bool = False


AS_CHOSEN, IN_FP8 = Variant(), Variant(fp8=True)
VARIANTS = (Variant(8192), Variant(4096), Variant(8192, 32, compiled=False, adds=False))


def measure_training(work: Work) -> None:
    model = random_llama_2_7b(work).train()
    work.results.write("model", parameters=sum(one.numel() for one in model.parameters()))
    training = Training(work, model, Recipe())
    for name, variant in {"train": AS_CHOSEN, "train_fp8": IN_FP8}.items():
        training.measure(variant)
        work.attempt("profile", Work.profile, name, training.profiled_step)
    for variant in () if work.is_dry else VARIANTS:
        training.measure(variant)


def measure_adapters(work: Work) -> None:
    """Each method with a model of its own, and steps of the optimizers alone."""
    for method in ("lora", "qlora"):
        work.attempt(method, train_adapters, method)
    has_torchao = find_spec("torchao") is not None
    for name in (ADAMW, ADAMW_8BIT) if has_torchao else (ADAMW,):
        work.attempt("optimizer", measure_optimizer, name)


def train_adapters(work: Work, method: str) -> None:
    """A step of adapters; for qlora, the layers are first converted to 4 bits."""
    from engine.lora import add_adapters

    is_quantised = method == "qlora"
    if is_quantised and find_spec("bitsandbytes") is None:
        work.results.write(method, skipped="bitsandbytes is not installed")
        return
    model = random_llama_2_7b(work).train()
    if is_quantised:
        from engine.nf4 import quantise

        quantise(model.pretrained, Path("random"), model.device)
    add_adapters(model, Adapter("", "bfloat16", is_quantised, RANK, 16, False, 0.0, 0, None))
    training = Training(work, model, Recipe(method, RANK))
    training.measure(AS_CHOSEN)
    work.attempt("profile", Work.profile, method, training.profiled_step)
    if not is_quantised:
        training.measure(IN_FP8)


class Training:
    """A model that is trained by one variant after the other; each result names its ``method``.

    The learning rate is 0, which takes as long as any other: the weights stay the same, so all
    variants must find the same loss.

    Attributes:
        tokens_per_s: of the variant that was measured last; None: of none.
        micro_batch_tokens: of the same.
    """

    tokens_per_s: float | None = None
    micro_batch_tokens: int

    def __init__(self, work: Work, model: Llama, recipe: Recipe):
        self.work, self.model, self.recipe = work, model, recipe
        batch_size, steps = 4 if work.is_dry else BATCH_SIZE, 4
        rows = read_rows("train", batch_size * steps)
        starts = range(0, len(rows), batch_size)
        self.batches = [rows[start : start + batch_size] for start in starts]
        self.rows = rows_of(rows, batch_size)
        self.shape = ModelShape(model.config, model.dtype)
        # As before the weights were loaded, which is when train.py plans.
        self.free_memory = free_bytes(model.device)
        self.free_memory += sum(weight.nbytes for weight in model.pretrained.parameters())
        self.optimizer = build_optimizer(model.trained, 0.0, (0.9, 0.999), 1e-8, 0.0)
        make_state(self.optimizer)

    def measure(self, variant: Variant) -> None:
        self.work.attempt("training", self._measure, variant)
        self.model.zero_grad()  # after a failure

    def _measure(self, _: Work, variant: Variant) -> None:
        model, plan = self.model, self._plan(variant)
        recomputed, compiled, adds = variant.recomputed, variant.compiled, variant.adds
        model.recomputed_blocks = plan.recomputed_blocks if recomputed is None else recomputed
        model.recomputes_parts = plan.recomputes_parts if recomputed is None else True
        model.elementwise = EAGER
        use_linear_layers(model, Linear if adds else torch.nn.Linear)
        if variant.fp8:
            model.kernels.use_fp8(model)
        started = time.perf_counter()
        if compiled:
            compile_layers(model)
        compiling = time.perf_counter() - started
        self.work.reset_peak()
        # Fewer than planned if memory runs out in it, for the rest too, as in train.py.
        limit = self._step(self.batches[0], plan.micro_batch_tokens).micro_batch_tokens
        parts = self._timed_parts(self.batches[1], limit)
        packer, seconds, losses = Packer(self.batches), [], []
        for step in range(len(self.batches) - 1):
            started = self.work.time()
            result = self._step(packer.batch(step), limit, packer)  # it packs the next one, too
            seconds.append(self.work.time() - started)
            losses.append(result.nats / result.num_labels)
            limit = result.micro_batch_tokens
        self.micro_batch_tokens = limit
        batches, seconds, kernels = self.batches[1:-1], seconds[1:], model.kernels
        tokens = sum(map(tokens_of, batches))
        largest = max(one.num_tokens for each in self.batches for one in pack(each, limit, kernels))
        flop_per_s = sum(flops(model, batch) for batch in batches) / sum(seconds)
        shares = {"TFLOP_per_s": flop_per_s / 1e12, "share_of_peak": flop_per_s / PEAK_FLOPS}
        self.tokens_per_s = tokens / sum(seconds)
        self.work.results.write(
            "training",
            method=self.recipe.method,
            micro_batch_tokens=limit,
            planned_micro_batch_tokens=plan.micro_batch_tokens,
            recomputed=model.recomputed_blocks,
            recomputes_parts=model.recomputes_parts,
            compiled=compiled,
            s_compiling=compiling,
            adds_gradients=adds,
            fp8=variant.fp8,
            tokens_per_s=self.tokens_per_s,
            expected_tokens_per_s=self._expected_speed(plan, compiled),
            **(shares if self.recipe.method == FULL else {}),
            steps=len(seconds),
            seconds=sum(seconds),
            loss=sum(losses) / len(losses),
            **parts,
            planned_GiB=self._counted_bytes(plan, plan.micro_batch_tokens) / 2**30,
            counted_GiB=self._counted_bytes(plan, largest) / 2**30,
            **self.work.peak_gib(),
        )

    def _plan(self, variant: Variant) -> Plan:
        here, wishes = Device("", self.free_memory), Wishes(variant.tokens)
        recipe = replace(self.recipe, fp8=variant.fp8)
        return choose(self.shape, recipe, self.model.kernels, self.rows, here, wishes)

    def _counted_bytes(self, plan: Plan, tokens: int) -> int:
        """By the plan, for micro-batches of ``tokens``; those of a step are seldom full."""
        recomputation = Recomputation(self.model.recomputed_blocks, self.model.recomputes_parts)
        counted = min(tokens, most_in_a_step(self.rows, 1))
        shape, recipe, kernels = self.shape, Recipe(**plan.recipe), self.model.kernels
        return footprint(shape, recipe, kernels, self.rows, counted, recomputation).total

    def _expected_speed(self, plan: Plan, compiled: bool) -> float:
        """Tokens a second at best, by the card's data sheet; as `train.py --plan` says it."""
        recomputation = Recomputation(self.model.recomputed_blocks, self.model.recomputes_parts)
        device = self.model.device
        card = card_of(device, kind(device), self.free_memory)
        recipe, tokens = Recipe(**plan.recipe), plan.micro_batch_tokens
        how = recipe, self.rows, card, tokens, recomputation, compiled
        return expected_step(self.shape, *how).tokens_per_second

    def _timed_parts(self, batch: list[Example], micro_batch_tokens: int) -> dict[str, object]:
        """A step with a pause after each of its parts."""
        model, work = self.model, self.work
        ends = [work.time()]
        micro_batches = pack(batch, micro_batch_tokens, model.kernels)
        ends.append(work.time())
        *_, norm = train.accumulate_gradients(model, micro_batches, 1.0)
        ends.append(work.time())
        self.optimizer.step()
        ends.append(work.time())
        self.optimizer.zero_grad(set_to_none=model.kernels.frees_gradients)
        ends.append(work.time())
        names = "packing", "gradients", "optimizer", "clearing"
        seconds = [end - start for start, end in pairwise(ends)]
        return {
            "micro_batches": len(micro_batches),
            "s_of_parts": dict(zip(names, seconds, strict=True)),
            "grad_norm": norm,
        }

    def _step(
        self, batch: list[Example], micro_batch_tokens: int, packer: Packer = NOT_AHEAD
    ) -> StepResult:
        """As train.py makes it."""
        return train.train_step(
            self.model, self.optimizer, batch, 0.0, micro_batch_tokens, 1.0, packer
        )

    def profiled_step(self) -> None:
        """Of the variant that was measured last."""
        self._step(self.batches[0][:40], self.micro_batch_tokens)


def use_linear_layers(model: Llama, kind: type[torch.nn.Linear]) -> None:
    for layer in model.modules():
        if type(layer) in (torch.nn.Linear, Linear, Fp8Linear):
            layer.__class__ = kind


def measure_optimizer(work: Work, name: str) -> None:
    """A step of one bfloat16 weight, as large as Llama-2-7B's embedding."""
    size = 2**13 if work.is_dry else 32000 * 4096
    weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=work.device))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer([weight], 2e-5, (0.9, 0.999), 1e-8, 0.0, name)
    make_state(optimizer)
    work.reset_peak()
    milliseconds = work.milliseconds(optimizer.step)
    work.results.write(
        "optimizer",
        name=name,
        ms_per_1e9=milliseconds / size * 1e9,
        bytes_per_parameter=training_bytes(weight.dtype, name),
        **work.peak_gib(),
    )
