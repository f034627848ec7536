"""Several processes of one job: how they agree, and how they end together."""

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import torch
from conftest import PROMPT, write_model
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from engine import ranks, sharding
from engine.agreement import check_same_on_all
from engine.footprint import gathered_bytes
from engine.joining import part_of_this_start
from engine.llama import Llama
from engine.loading import load_model
from engine.masking import Masking
from engine.measure import measure
from engine.optimizer import build_optimizer
from engine.packing import Example, Packer
from engine.ranks import ALONE, Ranks, job
from engine.recipe import Recipe
from engine.shape import ModelShape
from engine.sharding import shard, slice_of, whole
from engine.together import gather_on_main, gathered_model
from engine.tokenizer import Tokenizer
from grading.dataset import Problem
from run.checkpoint import set_damaged_aside
from run.common import check_same_folder, common_settings, go_on_together
from run.config import CONFIG_FILE, load_config
from run.errors import Stopped, UserError
from run.method import Adapter
from run.progress import Progress
from run.script import run_script

CPU = torch.device("cpu")


def talk(sizes: list[int]) -> None:
    with job(CPU) as here:
        print("heard")
        assert here.size in sizes and here.is_main == (here.rank == 0)
        each = [{"rank": rank, "text": "é" * rank} for rank in range(here.size)]
        assert here.gather(each[here.rank]) == each
        assert here.broadcast(here.rank) == 0
        assert here.once(lambda: [1.5, None]) == [1.5, None]
        assert here.sum(torch.tensor([here.rank, 1.0])).tolist() == [sum(range(here.size)), 3]
        dealt = here.gather(list(here.share(range(7))))
        assert sorted(item for share in dealt for item in share) == list(range(7))
        here.wait()


def test_ranks_agree_and_only_the_first_one_prints(tmp_path: Path) -> None:
    ended = jobs.run(3, tmp_path, run_script, talk, [3])
    assert [each.out for each in ended] == ["heard\n", "", ""]


def start_late(ranks: list[int], sizes: list[int]) -> None:
    """`talk`, in some ranks later than in others, on machines that counted other restarts."""
    number = int(os.environ["RANK"])
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    time.sleep(0.2 * (number in ranks))
    run_script(talk, sizes)


@pytest.mark.parametrize("late", [[0], [1, 2]])
def test_processes_of_a_restart_find_each_other(tmp_path: Path, late: list[int]) -> None:
    """Guards against torchrun's count of restarts, which each machine has for itself, and against
    what the processes before left in the store."""
    before = jobs.Job(3, tmp_path / "before", fail, "mistake", 1)
    assert {each.code for each in before.end()} == {2}
    again = jobs.Job(3, tmp_path / "again", start_late, late, [3], before=before)
    ended = again.end(20)
    assert [each.code for each in ended] == [0, 0, 0], ended
    assert [each.out for each in ended] == ["heard\n", "", ""]


def test_a_rank_0_that_does_not_answer_is_waited_for_no_longer_than_was_said() -> None:
    """Guards against a process that goes on in the part of the store of an earlier start."""
    store = jobs.new_store()
    store.add("starts", 1)
    with pytest.raises(RuntimeError, match="rank 0 does not answer rank 1"):
        part_of_this_start(store, 1, 2, timedelta(seconds=0.2))


def test_rows_with_other_labels_alone_are_other_rows() -> None:
    def of(row: Example) -> str:
        said: list[dict[str, str]] = []
        ranks = SimpleNamespace(size=2, check_same=said.append)
        check_same_on_all(SimpleNamespace(ranks=ranks, pretrained=torch.nn.Module()), [row])
        return said[0]["rows"]

    rows = [Example([1, 5, 2], [-100, 5, 2]), Example([1, 5, 2], [-100, -100, 2])]
    rows.append(Example([1, 6, 2], [-100, 5, 2]))
    assert len(set(map(of, rows))) == 3


def test_processes_may_have_paths_of_their_own_and_nothing_else() -> None:
    """Guards against paths that must be the same on all machines, and a mixture of two runs."""
    first = common_settings(load_config(CONFIG_FILE, {}))
    own = {"model": "/other", "dataset": "/other", "output_dir": "/other"}
    own |= {"wandb_mode": "disabled", "wandb_project": "other"}
    assert common_settings(load_config(CONFIG_FILE, own)) == first
    for key, value in {"seed": "5", "run_name": "other", "micro_batch_tokens": "2048"}.items():
        assert common_settings(load_config(CONFIG_FILE, {key: value})) != first


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_looks_for_the_file_of_rank_0_while_it_is_there(tmp_path: Path, rank: int) -> None:
    """Guards against a folder that is refused because one rank is faster than the other."""
    mark = tmp_path / ".seen.00000000.staged"
    waits: list[bool] = []

    def wait() -> None:
        waits.append(mark.exists())
        if rank:
            mark.touch()

    here = {"size": 2, "rank": rank, "is_main": not rank, "wait": wait}
    check_same_folder(tmp_path, SimpleNamespace(**here, broadcast=lambda _: mark.name))
    assert waits == ([False, True] if rank else [True, True])
    assert mark.exists() == bool(rank)  # rank 0 removes it


def test_all_processes_go_on_as_rank_0_does(tmp_path: Path) -> None:
    """Guards against a damaged best that each of them moves, or that one of them still counts."""
    best, last = (tmp_path / name for name in ("best", "last"))
    best.mkdir()
    said: list[dict[str, Any]] = []

    def once(function: Any, *arguments: Any) -> None:  # on a rank that only waits
        assert (function, *arguments) == (set_damaged_aside, tmp_path, last)
        best.rename(tmp_path / "aside")

    def broadcast(progress: dict[str, Any]) -> dict[str, Any]:
        said.append(progress)
        return progress | {"fitting": [512, 256]}

    ranks = SimpleNamespace(once=once, broadcast=broadcast)
    found = go_on_together(tmp_path, last, Progress(step=7, best_loss=1.5), ranks)
    assert said[0]["best_loss"] is None and (tmp_path / "aside").exists()
    assert found == Progress(step=7, fitting=[512, 256]) and found.budget(512) == 256


class NoCopies(TorchDispatchMode):
    """Operators that copy from the host to another device are errors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [each for each in (*args, found) if isinstance(each, torch.Tensor)]
        assert len({each.device for each in tensors}) <= 1, function
        return found


def test_a_sum_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a copy to a GPU, for which the next batch would be packed too late."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    numbers = torch.zeros(3, device="meta")
    with NoCopies():
        assert Ranks(1, 2).sum(numbers).device == numbers.device


def test_a_process_alone_needs_no_other() -> None:
    with job(CPU) as here:
        assert here is ALONE and (here.rank, here.size) == (0, 1)
        assert here.once(lambda: 3) == here.broadcast(3) == 3 and here.gather(4) == [4]
        assert here.share([1, 2, 3]) == [1, 2, 3] and here.sum(torch.ones(2)).tolist() == [1, 1]
        here.wait()
    assert not torch.distributed.is_initialized()


def fail(how: str, at: int) -> None:
    run_script(failing, how, at)


NO_SHARED_MEMORY = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run "
    "with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. "
    "socket, malloc) or external library call failed or device error.\nLast error:\nError while "
    "creating shared memory segment /dev/shm/nccl-WU88OE (size 9637888), error: No space left on "
    "device (28)"
)


def failing(how: str, at: int) -> None:
    with job(CPU) as here:
        print(f"rank {here.rank} is here")
        here.wait()
        if how == "stopped":  # by the same signal, on all
            raise Stopped(signal.SIGTERM, "as agreed")
        if here.rank == at:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {
                "mistake": UserError("x: is wrong: mend it"),
                "bug": ZeroDivisionError("a bug"),
                "full": OSError(28, "No space left on device", "/full"),
                "unread": SystemExit(141),  # as `check_printed` does
                "nccl": torch.distributed.DistBackendError(NO_SHARED_MEMORY),
            }[how]
        here.wait()


@pytest.mark.parametrize(
    ("how", "at", "codes", "line"),
    [
        ("mistake", 0, {2}, "error: x: is wrong: mend it\n"),
        ("mistake", 2, {2}, "error: x: is wrong: mend it\n"),
        ("full", 1, {2}, "error: /full: No space left on device: make room there"),
        ("unread", 0, {141, 2}, ""),
        ("stopped", 0, {143}, "stopped: as agreed\n"),
        ("nccl", 1, {2}, "error: NCCL failed, or another process of this job was killed or no "),
        ("nccl", 1, {2}, "(Error while creating shared memory segment /dev/shm/nccl-WU88OE (size "),
        ("bug", 1, {1, 2}, "ZeroDivisionError: a bug\n"),
        ("killed", 0, {2, -9}, "error: another process of this job was killed or no longer answ"),
        ("killed", 2, {2, -9}, "error: another process of this job was killed or no longer answ"),
    ],
)
def test_a_failing_process_ends_all_with_one_line(
    tmp_path: Path, how: str, at: int, codes: set[int], line: str
) -> None:
    """Guards against processes that wait for a dead one, and one line from each of them."""
    ended = jobs.Job(3, tmp_path, fail, how, at).end()
    assert {each.code for each in ended} == codes, ended
    written = "".join(each.err for each in ended)
    assert line in written, ended
    assert how == "bug" or written.count("\n") == bool(line), ended
    assert [each.out for each in ended] == ["rank 0 is here\n", "", ""]


def fail_as_torchrun_ends_the_others() -> None:
    """Each rank but the first that reports gets SIGTERM while it finds out that it is not that."""
    is_first = ranks._is_first

    def signalled(store: torch.distributed.Store) -> bool:
        if os.environ["RANK"] != "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return is_first(store)

    ranks._is_first = signalled
    fail("mistake", 1)


def test_a_process_that_ends_after_another_is_not_said_to_be_stopped(tmp_path: Path) -> None:
    """Guards against a second line, since torchrun ends the others as soon as one has ended."""
    ended = jobs.Job(3, tmp_path, fail_as_torchrun_ends_the_others).end()
    assert [each.code for each in ended] == [2, 2, 2], ended
    assert "".join(each.err for each in ended) == "error: x: is wrong: mend it\n", ended


def end_as_a_script_does(how: str) -> None:
    try:
        run_script(leave, how)
    finally:
        print("the interpreter shuts down", file=sys.stderr)


def leave(how: str) -> None:
    with job(CPU) as here:
        here.wait()
        if how == "missing":
            raise FileNotFoundError(2, "No such file or directory", "/missing")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "unread":  # as `check_printed` does
        sys.exit(141)


@pytest.mark.parametrize(
    ("how", "codes"), [("done", {0}), ("missing", {1}), ("bug", {1}), ("unread", {141})]
)
def test_no_process_of_several_shuts_its_interpreter_down(
    tmp_path: Path, how: str, codes: set[int]
) -> None:
    """Guards against gloo's threads that then abort: "terminate called without an active
    exception". It takes a thread that waits for the interpreter's lock at that moment."""
    ended = jobs.Job(2, tmp_path, end_as_a_script_does, how).end()
    assert {each.code for each in ended} == codes, ended
    written = "".join(each.err for each in ended)
    name = {"missing": "FileNotFoundError", "bug": "ZeroDivisionError"}.get(how, "")
    assert name in written and bool(written) == bool(name) and "shuts down" not in written, ended


# ---------------------------------------------------------------- training


BUDGET = 160
STEPS = 5


@dataclass(frozen=True)
class Case:
    """Settings of a few steps. None of them changes a result."""

    batch_size: int = 8
    shard_over: int | None = None
    reshards: bool = True
    reduces_each: bool = False
    recomputed_blocks: int = 0
    dtype: torch.dtype = torch.float64
    learning_rate: float = 1e-2
    adapter: Adapter | None = None
    masking: Masking | None = None


# 29 rows: the last batch of 8 has 5. A batch of 1 leaves all ranks but one with nothing.
CASES = [
    Case(),
    Case(1),
    Case(3, reshards=False),
    Case(29, reduces_each=True, recomputed_blocks=1),
    Case(adapter=Adapter("base", "float64", False, 4, 8, False, 0.0, 0, None)),
    Case(masking=Masking(0.4, 1.0, range(420))),
]
# In 5 steps, no weight moves by half the distance to the next one.
HALF = Case(dtype=torch.bfloat16, learning_rate=2e-5)
TWO_COPIES = [
    Case(shard_over=2),
    Case(3, shard_over=2, reduces_each=True),
    Case(shard_over=1),
]
Found = dict[tuple[int, Adapter | None, Masking | None], tuple[list[float], list[torch.Tensor]]]


def train_steps(model_folder: Path, rows: list[Example], cases: list[Case], file: Path) -> None:
    """In each process of a job: train as each case says, and write the losses and weights."""
    with job(CPU) as here:
        found = [train_case(model_folder, rows, case, here) for case in cases]
        if here.is_main:
            torch.save(found, file)


def train_case(
    model_folder: Path, rows: list[Example], case: Case, here: Ranks
) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(here.rank)  # nothing may depend on it
    model = load_model(model_folder, case.dtype, CPU, None, case.adapter, here)
    model.recomputed_blocks = case.recomputed_blocks
    shard(model, case.shard_over, case.reshards, case.reduces_each)
    rate = case.learning_rate
    optimizer = build_optimizer(model.trained, rate, (0.9, 0.999), 1e-8, 0.1)
    packer = Packer(data.Batches(rows, case.batch_size, 0, case.masking), here)
    numbers = []
    for number in range(STEPS):
        batch = packer.batch(number)
        result = train.train_step(model, optimizer, batch, rate, BUDGET, 0.5, packer)
        numbers += [result.loss, result.grad_norm]
    numbers.append(measure(model, rows[:5], BUDGET).loss)
    assert here.size == 1 or all(
        slice_of(weight).numel() < weight.numel() or case.shard_over == 1
        for weight in model.parameters()
    )
    return numbers, [exactly(weight, optimizer) for weight in model.parameters()]


@torch.no_grad()
def exactly(weight: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """The whole weight, with what Kahan summation keeps of its rounding."""
    rounded_away = optimizer.state.get(weight, {}).get("kahan_comp")
    kept = 0 if rounded_away is None else whole(rounded_away).double()
    return whole(weight).double() + kept


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer, problems: list[Problem]) -> list[Example]:
    chosen = enumerate([*problems[:20], *problems[-9:]], start=1)
    # Each draws its own masks, which depend on the line.
    return data.encode(tokenizer, [replace(row, line=line) for line, row in chosen], PROMPT)


@pytest.fixture(scope="module")
def of_one(model_folder: Path, rows: list[Example]) -> Found:
    """By batch size, adapter and masking: what one process finds."""
    return {
        (case.batch_size, case.adapter, case.masking): train_case(model_folder, rows, case, ALONE)
        for case in CASES + TWO_COPIES
    }


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_train_as_one_process_does(
    tmp_path: Path, model_folder: Path, rows: list[Example], of_one: Found, size: int
) -> None:
    """Guards against a mean over ranks, labels counted on one, and a rank that computes nothing."""
    cases = CASES + (TWO_COPIES if size == 4 else [])
    jobs.run(size, tmp_path, train_steps, model_folder, rows, cases, tmp_path / "found")
    found = torch.load(tmp_path / "found", weights_only=True)
    for case, (numbers, weights) in zip(cases, found, strict=True):
        expected_numbers, expected_weights = of_one[case.batch_size, case.adapter, case.masking]
        torch.testing.assert_close(numbers, expected_numbers, rtol=0, atol=1e-10, msg=str(case))
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-10, msg=str(case))


def count_whole_gradients(model_folder: Path, rows: list[Example]) -> None:
    """Between two micro-batches, each rank keeps whole gradients, or none, as the plan counts."""
    with job(CPU) as here:
        for dtype, reduces_each in product((torch.float32, torch.bfloat16), (False, True)):
            model = load_model(model_folder, dtype, CPU, ranks=here)
            shard(model, None, True, reduces_each)
            packer = Packer(data.Batches(rows, 29, seed=0), here)
            micro_batches = packer.pack(packer.batch(0), BUDGET, model.kernels)
            assert len(micro_batches) > 1
            turns = model.in_turn(micro_batches)
            model(next(turns)).backward()
            kept = 0
            for module in (model, *model.blocks):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    for each in group.fsdp_params:
                        gradients = each.unsharded_accumulated_grad, each._unsharded_param.grad
                        kept += sum(one.nbytes for one in gradients if one is not None)
            shape = ModelShape(model.config, dtype)
            counted = [
                gathered_bytes(shape, Recipe(devices=2, reduces_each=each), accumulates=True)
                for each in (False, True)
            ]
            assert kept == (0 if reduces_each else counted[0] - counted[1]), (dtype, reduces_each)


def test_whole_gradients_are_kept_as_the_plan_counts(
    tmp_path: Path, model_folder: Path, rows: list[Example]
) -> None:
    """Guards against a plan that fills memory with what no rank has, or forgets what each has."""
    jobs.run(2, tmp_path, count_whole_gradients, model_folder, rows)


def gather(model_folder: Path, adapter: Adapter, expected: dict[str, torch.Tensor]) -> None:
    with job(CPU) as here:
        model = load_model(model_folder, torch.float64, CPU, None, adapter, here)
        shard(model, None, True)
        found = gathered_model(model).pretrained.state_dict()
        assert found.keys() == expected.keys() and any("lora_A" in name for name in found)
        torch.testing.assert_close(dict(found), expected, rtol=0, atol=0)


def test_adapters_are_gathered_with_their_base(tmp_path: Path, model_folder: Path) -> None:
    """Guards against completions of a base without its adapters."""
    adapter = Adapter("base", "float64", False, 4, 8, False, 0.0, 0, None)
    alone = load_model(model_folder, torch.float64, CPU, None, adapter)
    jobs.run(2, tmp_path, gather, model_folder, adapter, dict(alone.pretrained.state_dict()))


def gather_tied(folder: Path) -> None:
    with job(CPU) as here:
        model = load_model(folder, torch.float64, CPU, ranks=here)
        shard(model, None, True)
        gathered: list[torch.Tensor] = []
        sharding.whole = lambda tensor: gathered.append(tensor) or whole(tensor)
        saved = gather_on_main(here, model.stored.state_dict())
        assert not saved or saved["lm_head.weight"] is saved["model.embed_tokens.weight"]
        decoding = gathered_model(model).pretrained
        assert decoding.lm_head.weight is decoding.model.embed_tokens.weight
        assert len(gathered) == 2 * len([*model.parameters()])


def test_a_gathered_model_decodes_as_the_one_that_it_was_made_of(model: Llama) -> None:
    """Guards against samples with dropout, or that go on after an EOS that the base lists."""
    model.pretrained.generation_config.eos_token_id = [2, 5]
    plain = gathered_model(model.train())
    assert plain.pretrained.generation_config.eos_token_id == [2, 5]
    assert not plain.training and not plain.pretrained.training
    assert plain.pretrained is not model.pretrained


def test_a_tied_head_is_gathered_once(tmp_path: Path, tokenizer: Tokenizer, make_llama) -> None:
    """Guards against a checkpoint of several processes that has the head a second time, for which
    no room was counted."""
    tied = make_llama(len(tokenizer), tie_word_embeddings=True)
    folder = write_model(tmp_path / "model", tokenizer, tied)
    jobs.run(2, tmp_path / "printed", gather_tied, folder)


def test_ranks_train_in_bfloat16(tmp_path: Path, model_folder: Path, rows: list[Example]) -> None:
    """Guards against an optimizer that takes no spread weights, or loses what was rounded away."""
    jobs.run(2, tmp_path, train_steps, model_folder, rows, [HALF], tmp_path / "found")
    [(numbers, weights)] = torch.load(tmp_path / "found", weights_only=True)
    expected_numbers, expected_weights = train_case(model_folder, rows, HALF, ALONE)
    # Products of other numbers of rows round differently: by 7e-5 of the first norm.
    torch.testing.assert_close(numbers, expected_numbers, rtol=1e-3, atol=0)
    before = load_model(model_folder, torch.bfloat16, CPU).parameters()
    moved = [now - then.double() for now, then in zip(expected_weights, before, strict=True)]
    apart = [one - other for one, other in zip(weights, expected_weights, strict=True)]
    assert mean_size(apart) < 0.01 * mean_size(moved)


def mean_size(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).abs().mean()
