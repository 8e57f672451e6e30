"""Gradients on their devices: norms, NaN and inf, products and sums.

Whatever is asked of all gradients is fetched at once, so that Python waits for the devices once.
"""
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy
from mxnet import ndarray as nd

from ..schema import compute_type, some_of

__all__ = ['Gradient', 'add', 'all_finite', 'clip', 'fetch_kinds', 'fetch_norms', 'fetch_sums', 'is_sparse', 'multiply']

_PIECE = 1 << 16        # elements summed, or copied from float16, at once: a float32 sum of more loses digits
_SHRINK = {numpy.float32: 2.0 ** -64, numpy.float64: 2.0 ** -600}  # bring values to where their squares do not overflow
_AT_ONCE = 200          # arrays that MXNet's multi_all_finite takes: more end the process
_ALIKE = 1e-3           # how much sums of squares of the same gradient may differ between devices


class Gradient(NamedTuple):
    """The gradient of a parameter."""

    name: str
    arrays: List[Any]       # one for each device


def is_sparse(array: Any) -> bool:
    return bool(array.stype != 'default')


def fetch_norms(gradients: Sequence[Gradient], same: bool = False, nonfinite: bool = False) -> numpy.ndarray:
    """The norm of each gradient, which must be the same on all devices.

    ``same``: they are known to be. ``nonfinite``: some are known to be NaN or inf. Otherwise an infinite square is computed again,
    from a smaller value: only that takes a second synchronisation.
    """
    sums = fetch_sums(gradients, 1 if same else None)
    norms: numpy.ndarray = numpy.sqrt(sums[0])
    for dtype, factor in () if nonfinite else _SHRINK.items():
        large = [i for i, gradient in enumerate(gradients) if numpy.isinf(norms[i]) and gradient.arrays[0].dtype == dtype
                 and not is_sparse(gradient.arrays[0])]
        if large:
            norms[large] = numpy.sqrt(_fetch([gradients[i] for i in large], 1, factor)[0][0]) / factor
    return norms


def fetch_sums(gradients: Sequence[Gradient], devices: Optional[int] = None) -> numpy.ndarray:
    """The sum of squares of each gradient on each of the first ``devices``, by default all.

    Raises ValueError unless they are the same on all of them, as they are after `allreduce_grads`.
    """
    sums, _ = _fetch(gradients, devices or len(gradients[0].arrays))
    alike = numpy.isclose(sums, sums[0], rtol=_ALIKE, atol=0, equal_nan=True).all(axis=0)
    if not alike.all():
        wrong = [gradient.name for gradient, same in zip(gradients, alike) if not same]
        raise ValueError(f'Gradients must be summed over the devices first. Received: different ones of {some_of(wrong)}. Call '
                         'trainer.allreduce_grads(), and trainer.update(batch_size) afterwards.')
    return sums


def fetch_kinds(gradients: Sequence[Gradient]) -> Dict[str, str]:
    """The names of those with NaN or inf on any device, and which: 'nan' or 'inf'."""
    sums, finite = _fetch(gradients, len(gradients[0].arrays), flags=True)
    return {gradient.name: 'nan' if numpy.isnan(of_devices).any() else 'inf'
            for gradient, of_devices, flags in zip(gradients, sums.T, finite.T) if not flags.all()}


def _fetch(gradients: Sequence[Gradient], devices: int, factor: float = 1.0, flags: bool = False
           ) -> Tuple[numpy.ndarray, numpy.ndarray]:
    """Of each device and gradient the sum of squares, and with ``flags`` whether all elements are finite: one synchronisation."""
    rows, owners, n = [], [], len(gradients)
    for k in range(devices):
        scratch = _Scratch(gradients[0].arrays[k].context)
        pieces: Dict[Any, List[Tuple[int, Any]]] = {numpy.float32: [], numpy.float64: []}
        for i, gradient in enumerate(gradients):
            array = gradient.arrays[k]
            of_dtype = pieces[numpy.float64 if array.dtype == numpy.float64 else numpy.float32]
            of_dtype += [(i, one) for one in _squares(array, factor, scratch)]
            if flags:
                of_dtype += [(n + i, one) for one in _nonfinite(array, scratch)]
        for found in pieces.values():
            if found:
                row = nd.concat(*(one for _, one in found), dim=0).astype('float64')
                rows.append(row.as_in_context(gradients[0].arrays[0].context))
                owners += [2 * n * k + i for i, _ in found]
    values = nd.concat(*rows, dim=0).asnumpy()
    sums = numpy.bincount(owners, values, 2 * n * devices).reshape(devices, 2, n)
    return sums[:, 0], sums[:, 1] == 0


class _Scratch:
    """Memory of one piece, for each type, on a device. Pieces that share it are computed one after the other: with memory of
    their own MXNet might make all of them at once."""

    def __init__(self, context: Any):
        self._context, self._arrays = context, {}  # type: Any, Dict[str, Any]

    def like(self, piece: Any, name: str) -> Any:
        """An array of the size of ``piece``: in float32, or float64 for float64."""
        dtype = compute_type(numpy.dtype(piece.dtype).name)
        key = f'{name} {dtype}'
        if key not in self._arrays:
            self._arrays[key] = nd.zeros((_PIECE,), ctx=self._context, dtype=dtype)
        return self._arrays[key][:piece.size]

    def cast(self, piece: Any) -> Any:
        """``piece``, or if it is float16 its float32 copy."""
        return piece if piece.dtype != numpy.float16 else nd.cast(piece, dtype='float32', out=self.like(piece, 'copy'))


def _squares(array: Any, factor: float, scratch: _Scratch) -> Iterator[Any]:
    """Sums of squares of ``factor`` times the array, each of shape (1,)."""
    if is_sparse(array):
        yield nd.square(nd.norm(array))
        return
    for piece in _pieces(array):
        piece = scratch.cast(piece)
        if factor != 1:
            piece = nd._internal._mul_scalar(piece, scalar=factor, out=scratch.like(piece, 'copy'))
        yield nd.dot(piece, piece)


def _nonfinite(array: Any, scratch: _Scratch) -> Iterator[Any]:
    """Numbers of shape (1,), all of them 0 if all elements are finite."""
    if is_sparse(array):
        yield nd.norm(array) * 0
    elif array.dtype == numpy.float64:  # all_finite would look at them in float32
        for piece in _pieces(array):
            yield nd.dot(piece, scratch.like(piece, 'zeros'))
    else:
        yield 1 - nd.all_finite(array)


def _pieces(array: Any) -> Iterator[Any]:
    """Views of at most `_PIECE` elements."""
    flat = array.reshape(-1)
    if flat.size <= _PIECE:
        yield flat
    else:
        for i in range(0, flat.size, _PIECE):
            yield flat[i:i + _PIECE]


def all_finite(arrays: Sequence[Any]) -> bool:
    """Whether all elements are finite: one synchronisation, and fewer operations than `_fetch`."""
    scratch, flags = _Scratch(arrays[0].context), []
    alike: Dict[Any, List[Any]] = {numpy.float16: [], numpy.float32: []}
    for array in arrays:
        if is_sparse(array) or array.dtype not in alike or array.size > _PIECE:  # one operator for all small ones
            flags += list(_nonfinite(array, scratch))
        else:
            alike[array.dtype].append(array)
    for dense in alike.values():
        for i in range(0, len(dense), _AT_ONCE):
            some = dense[i:i + _AT_ONCE]
            flags.append(1 - nd.multi_all_finite(*some, num_arrays=len(some)))
    return bool((nd.concat(*(flag.astype('float32') for flag in flags), dim=0).asnumpy() == 0).all())


def multiply(arrays: Sequence[Any], factor: float) -> None:
    for array in arrays:
        if array.dtype == numpy.float16 and float(numpy.float16(factor)) != factor:
            scratch = _Scratch(array.context)
            for piece in _pieces(array):  # float16 would round the factor to 11 bits, or to 0
                single = scratch.cast(piece)
                nd.cast(nd._internal._mul_scalar(single, scalar=factor, out=single), dtype='float16', out=piece)
        else:
            nd._internal._mul_scalar(array, scalar=factor, out=array)


def add(total: Any, array: Any) -> None:
    """total += array, which may be float16 where ``total`` is float32."""
    scratch = _Scratch(array.context)
    for sums, piece in zip(_pieces(total), _pieces(array)):
        nd.elemwise_add(sums, scratch.cast(piece), out=sums)


def clip(array: Any, low: float, high: float) -> None:
    if array.dtype == numpy.float64:  # nd.clip rounds its bounds to float32
        nd._internal._maximum_scalar(array, scalar=low, out=array)
        nd._internal._minimum_scalar(array, scalar=high, out=array)
    else:
        nd.clip(array, low, high, out=array)
