"""Launches Triton kernels on PyTorch's memory: a launch per pass, without waiting for the device."""
from typing import Any, List, Sequence

import numpy
import torch

from ..lowering.triton import BLOCK, ITEM, Kernel, kernel

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
        self._placed: Any = None         # addresses and rows on the device, and what they were made from
        self._known: List[Any] = []

    def run(self, coefficients: Any, rows: Sequence[int]) -> None:
        """Update all tensors; tensor i uses row ``rows[i]`` of ``coefficients``, rows of numbers in the kernel's order."""
        self.launch(_sent(numpy.asarray(coefficients, self.kernel.precision)), rows)

    def launch(self, table: torch.Tensor, rows: Sequence[int]) -> None:
        """The same with a table that is on the device."""
        if not self._known or not numpy.array_equal(self._known[0], self.addresses) or self._known[1] != rows:
            self._known = [self.addresses.copy(), list(rows)]
            self._placed = _sent(self.addresses), _sent(numpy.asarray(rows, numpy.int64)), not (self.addresses % 16).any()
        addresses, row, aligned = self._placed
        for function, per_tensor in self.kernel.passes:
            programs = self._tensors if per_tensor else self._pieces
            if programs:
                function[(programs,)](addresses, self._items, self._first_item, self._partial, self._kept, table, row,
                                      self._tensors, self._pieces, ALIGNED=aligned, BLOCK=SCALARS if per_tensor else BLOCK,
                                      enable_fp_fusion=False)


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'   # without a GPU, Triton's interpreter


def _sent(array: numpy.ndarray) -> torch.Tensor:
    """A copy of ``array`` on the current device; nothing waits for it: the pinned memory is not used again before it is read."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to('cuda', non_blocking=True) if torch.cuda.is_available() else tensor.clone()
