"""Launches Triton kernels on PyTorch's memory: a launch per pass, without waiting for the device."""
from typing import Any, List, Sequence

import numpy
import torch

from ..lowering.triton import BLOCK, ITEM, Kernel, kernel
from .executors import capturing

__all__ = ['Batch', 'kernel']

SCALARS = 128   # partial sums that a program of a pass over scalars adds at a time


class Batch:
    """A list of tensors on the current device, ready to be updated by ``kernel``.

    Fill ``addresses`` (one row per role, one column per tensor), then `run`.
    """

    def __init__(self, kernel: Kernel, sizes: Sequence[int]):
        self.kernel, self._tensors = kernel, len(sizes)
        self.addresses = numpy.zeros((len(kernel.roles), len(sizes)), numpy.int64)
        counts = [-(-size // ITEM) for size in sizes]
        pieces = [(i, start, min(ITEM, size - start)) for i, size in enumerate(sizes) for start in range(0, size, ITEM)]
        self._pieces = len(pieces)
        self._items = _sent(numpy.array(pieces, numpy.int64).reshape(-1, 3).T.copy())
        self._first_item = _sent(numpy.concatenate([[0], numpy.cumsum(counts)]).astype(numpy.int64))
        exact = getattr(torch, kernel.precision)
        self._partial = torch.empty(max(len(pieces), 1), max(kernel.sums, 1), dtype=torch.float64, device=_device())
        self._kept = torch.empty(len(sizes), max(kernel.kept, 1), dtype=exact, device=_device())
        self._known: Any = None          # addresses and rows of the last launch, and
        self._placed: Any = None         # where they are on the device
        self._recorded = False           # whether a graph is to put them there
        self._spare: List[Any] = []      # memory for those of a launch that is captured
        self._captured: List[Any] = []   # and what captured launches read: it must stay

    def run(self, coefficients: Any, rows: Sequence[int]) -> None:
        """Update all tensors; tensor i uses row ``rows[i]`` of ``coefficients``, rows of numbers in the kernel's order."""
        self._launch(_sent(numpy.asarray(coefficients, self.kernel.precision)), rows)

    def run_there(self, table: torch.Tensor, rows: Sequence[int]) -> None:
        """`run` with coefficients that are on the device; a CUDA graph may capture it after a first call without one."""
        self._launch(table, rows)
        if capturing():
            self._captured.append(self._placed)
        elif not self._spare and torch.cuda.is_available():
            spare = torch.empty(self.addresses.size + len(rows), dtype=torch.int64, device='cpu')
            self._spare = [(spare.pin_memory(), spare.to('cuda'))]

    def _launch(self, table: torch.Tensor, rows: Sequence[int]) -> None:
        words = numpy.concatenate([self.addresses.ravel(), numpy.asarray(rows, numpy.int64)])
        # a captured copy has been recorded, not made: it waits for a replay of its graph
        if self._recorded or self._known is None or not numpy.array_equal(self._known, words):
            self._recorded = capturing()
            self._known, self._placed = words, self._place(words) if self._recorded else _sent(words)
        addresses, row = self._placed[:self.addresses.size], self._placed[self.addresses.size:]
        for function, per_tensor in self.kernel.passes:
            programs = self._tensors if per_tensor else self._pieces
            if programs:
                function[(programs,)](addresses, self._items, self._first_item, self._partial, self._kept, table, row,
                                      self._tensors, self._pieces, BLOCK=SCALARS if per_tensor else BLOCK, enable_fp_fusion=False)

    def _place(self, words: numpy.ndarray) -> torch.Tensor:
        """``words`` on the device while a graph is captured, which can copy but not allocate: each replay copies them again."""
        if not self._spare:
            raise RuntimeError('A CUDA graph can capture a step after one without a graph, and once while the gradients are where '
                               'they are. Call `step` outside the graph first.')
        here, there = self._spare.pop()
        here.numpy()[:] = words
        self._captured.append(here)
        placed: torch.Tensor = there.copy_(here, non_blocking=True)
        return placed


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'   # without a GPU, Triton's interpreter


def _sent(array: numpy.ndarray) -> torch.Tensor:
    """A copy of ``array`` on the current device; nothing waits for it: the pinned memory is not used again before it is read."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to('cuda', non_blocking=True) if torch.cuda.is_available() else tensor.clone()
