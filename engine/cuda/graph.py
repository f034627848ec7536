"""One decoding step of a fixed number of rows, in fixed memory, captured once and replayed.

A step of a large model consists of hundreds of kernels that take microseconds each. If Python
launched them one by one, the device would wait for Python.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from engine.cuda.transfers import OWN, Row, to_device

if TYPE_CHECKING:
    from engine.cuda.cache import StaticCache
    from engine.llama import Llama
    from engine.sampling import Choose


@cache
def capturing_stream() -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace for each stream that was ever used.

    In some versions of PyTorch, a graph that is freed takes the workspace of its stream with it. So
    all graphs of a decoding live until its end.
    """
    return torch.cuda.Stream()


class StaticStep:
    """A decoding step: a CUDA graph on CUDA, the same computation without one elsewhere.

    It also chooses the next tokens, so that another step can start before the host knows them.

    Attributes:
        chosen: ``[rows]``, the next tokens, after a call.
    """

    def __init__(
        self,
        model: "Llama",
        cache: "StaticCache",
        rows: int,
        newest: torch.Tensor,
        choose: "Choose",
        pool: Any,
    ):
        """
        Args:
            newest: ``[slots + 1]``, the token chosen last for each slot. The last one is for rows
                that are left over.
            pool: of the graphs' memory, which all steps share.
        """
        self.model, self.cache, self.newest, self.choose = model, cache, newest, choose
        self._left_over = Row(0, 0, cache.nobodys, cache.slots)
        self._inputs = to_device([[number] * rows for number in self._left_over], newest.device)
        self._numbers = torch.zeros(rows, dtype=torch.float64, device=newest.device)
        # These RoPE variants read the positions on the host, which a graph can't do.
        rope_type = model.pretrained.model.rotary_emb.rope_type
        reads_positions = rope_type in ("dynamic", "longrope")
        is_captured = model.device.type == "cuda" and not reads_positions
        self._graph = self._capture(pool) if is_captured else None

    def __call__(self, rows: Sequence[Row], numbers: Sequence[float]) -> None:
        """``numbers``: a random one for each row; see `engine.sampling.Choose`."""
        left_over = [self._left_over] * (self._inputs.shape[1] - len(rows))
        columns = list(zip(*rows, *left_over, strict=True))
        device = self.newest.device
        self._inputs.copy_(to_device(columns, device))
        self._numbers[: len(rows)] = to_device(numbers, device, torch.float64)
        if self._graph:
            self._graph.replay()
        else:
            self._run()

    def _run(self) -> None:
        tokens, positions, starts, slots = self._inputs
        tokens = torch.where(tokens == OWN, self.newest[slots], tokens)
        attend = self.cache.step(positions, starts)
        logits = self.model.next_logits(tokens, positions, attend)
        self.chosen = self.choose(logits, self._numbers)
        self.newest[slots] = self.chosen

    def _capture(self, pool: Any) -> torch.cuda.CUDAGraph:
        # One run before capturing: what libraries initialise at their first call can't be captured.
        stream = capturing_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A thread that writes a checkpoint meanwhile does not disturb the capture.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            self._run()
        return graph
