"""The model can be sharded over processes: its blocks are called as modules."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from engine.llama import Llama
from engine.packing import Example, collate

PROCESSES = 2


def compare(rank: int, file: str, recompute: bool) -> None:
    """In one of the processes: a sharded model against the same model in one piece."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=PROCESSES
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=100, num_hidden_layers=2, **shape)
    pretrained = LlamaForCausalLM(config)
    plain, sharded = (Llama(copy.deepcopy(pretrained)).train() for _ in range(2))
    sharded.recomputed_blocks = len(sharded.blocks) if recompute else 0
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    examples = [Example([*range(n, n + 20)], [-100] * 5 + [*range(n + 5, n + 20)]) for n in (1, 40)]
    micro_batch = collate(examples, plain.kernels)
    losses = [model(micro_batch) for model in (plain, sharded)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    pairs = list(zip(plain.parameters(), sharded.parameters(), strict=True))
    assert all(ours.to_local().numel() < whole.numel() for whole, ours in pairs if whole.dim() > 1)
    for whole, ours in pairs:
        torch.testing.assert_close(ours.grad.full_tensor(), whole.grad)
    distributed.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_sharded_model_has_the_same_loss_and_gradients(tmp_path: Path, recompute: bool) -> None:
    """Guards against a weight that is read outside of the call of the module that holds it."""
    arguments = str(tmp_path / "rendezvous"), recompute
    multiprocessing.start_processes(compare, arguments, nprocs=PROCESSES, start_method="forkserver")
