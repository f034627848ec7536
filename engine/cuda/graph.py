"""One decoding step of all slots, in fixed memory, captured once and replayed.

A step of a large model consists of hundreds of kernels that take microseconds each. If Python
launched them one by one, the device would wait for Python.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from engine.cuda.cache import StaticCache
    from engine.llama import Llama


class StaticStep:
    """A decoding step: a CUDA graph on CUDA, the same computation without one elsewhere."""

    def __init__(self, model: "Llama", cache: "StaticCache"):
        self.model, self.cache = model, cache
        self.token_ids, self.positions = (torch.zeros_like(cache.slots) for _ in range(2))
        # These RoPE variants read the positions on the host, which a graph can't do.
        rope_type = model.pretrained.model.rotary_emb.rope_type
        reads_positions = rope_type in ("dynamic", "longrope")
        is_captured = model.device.type == "cuda" and not reads_positions
        self._replay = self._capture() if is_captured else self._run

    def __call__(self, slots: list[int], newest: list[int], positions: list[int]) -> torch.Tensor:
        """The logits ``[n, vocabulary]`` after the ``newest`` tokens of ``slots``."""
        inputs = torch.zeros(2, len(self.token_ids), dtype=torch.long)
        inputs[:, slots] = torch.tensor([newest, positions])
        inputs = inputs.to(self.token_ids.device)
        self.token_ids.copy_(inputs[0])
        self.positions.copy_(inputs[1])
        self._replay()
        return self.logits[slots]

    def _run(self) -> None:
        attend = self.cache.step(self.positions)
        self.logits = self.model.next_logits(self.token_ids, self.positions, attend)

    def _capture(self) -> Callable[[], None]:
        # One run before capturing: what libraries initialise at their first call can't be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph.replay
