"""A decoding step of fixed shape, captured once and replayed."""

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from engine.cache import StaticCache
from engine.llama import forward


class StaticStep:
    """One decoding step of all slots, in fixed memory; on CUDA captured as a graph and replayed.

    A step of a large model is hundreds of kernels of microseconds each: launched one by one from
    Python, they would wait for it.
    """

    def __init__(self, model: LlamaForCausalLM, cache: StaticCache):
        self.model, self.cache = model, cache
        self.token_ids, self.positions = (torch.zeros_like(cache.slots) for _ in range(2))
        # These read the positions on the host, which a graph can't.
        by_host = model.model.rotary_emb.rope_type in ("dynamic", "longrope")
        self._replay = self._capture() if model.device.type == "cuda" and not by_host else self._run

    def __call__(self, slots: list[int], newest: list[int], positions: list[int]) -> torch.Tensor:
        """The logits ``[n, vocabulary]`` after token ``newest`` at ``positions`` of n ``slots``."""
        inputs = torch.zeros(2, len(self.token_ids), dtype=torch.long)
        inputs[:, slots] = torch.tensor([newest, positions])
        inputs = inputs.to(self.token_ids.device)
        self.token_ids.copy_(inputs[0])
        self.positions.copy_(inputs[1])
        self._replay()
        return self.logits[slots]

    def _run(self) -> None:
        hidden = forward(
            self.model, self.token_ids, self.positions, self.cache.step(self.positions)
        )
        self.logits = self.model.lm_head(hidden)

    def _capture(self) -> Callable[[], None]:
        # What libraries set up at their first call must not happen while capturing.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph.replay
