"""How PyTorch's arrays are made from Gluon's: the plan of a conversion."""
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy

__all__ = ['ENTRY', 'GATES', 'RNN_ENTRY', 'Plan', 'Rnn', 'Shape', 'Take', 'channels_first', 'pointwise', 'unpacked']

Shape = Tuple[int, ...]
ENTRY = ('view', 'transpose', 'repeat', 'shape', 'ones', 'zeros')  # what a map may say about an array besides 'from'
RNN_ENTRY = ('rnn', 'hidden', 'layers', 'bidirectional', 'projection')  # and of a packed vector
GATES = {'lstm': 4, 'gru': 3, 'rnn_tanh': 1, 'rnn_relu': 1}


class Rnn(NamedTuple):
    """What is needed to unpack the vector in which MXNet's ``RNN`` operator keeps all parameters of its layers."""

    mode: str                        # 'lstm', 'gru', 'rnn_tanh', 'rnn_relu'
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    projection: Optional[int] = None

    def parts(self, size: int, name: str) -> List[Tuple[str, int, Shape]]:
        """PyTorch's name, position and shape of each array in a vector of ``size`` elements: all weights, then all biases.

        Both frameworks use the same order of gates: input, forget, cell, output; reset, update, new.

        >>> Rnn('gru', hidden=2).parts(3 * 2 * (5 + 2) + 2 * 6, 'gru_parameters')[:2]
        [('weight_ih_l0', 0, (6, 5)), ('weight_hh_l0', 30, (6, 2))]
        """
        no_size = (f'The vector {name!r} must have as many elements as {self.words()} has parameters. Received: {size}, which no '
                   'number of inputs makes. Is the mode, "hidden", "layers" or "bidirectional" another?')
        rows, out, ways = GATES.get(self.mode, 0) * self.hidden, self.projection or self.hidden, 2 if self.bidirectional else 1
        if min(rows, out, self.layers) < 1 or 2 * rows * ways * self.layers > size:  # fewer than its biases
            raise ValueError(no_size)

        def layout(inputs: int) -> List[Tuple[str, Shape]]:
            arrays: List[Tuple[str, Shape]] = []
            for kind in ('weight', 'bias'):
                for layer in range(self.layers):
                    for end in ('', '_reverse')[:ways]:
                        widths = {'ih': inputs if layer == 0 else ways * out, 'hh': out}
                        arrays += [(f'{kind}_{gate}_l{layer}{end}', (rows, width) if kind == 'weight' else (rows,))
                                   for gate, width in widths.items()]
                        if self.projection and kind == 'weight':
                            arrays.append((f'weight_hr_l{layer}{end}', (out, self.hidden)))
            return arrays

        rest = size - sum(math.prod(shape) for _, shape in layout(0))
        inputs = rest // (rows * ways)
        if rest <= 0 or inputs * rows * ways != rest:
            raise ValueError(no_size)
        found, begin = [], 0
        for leaf, shape in layout(inputs):
            found.append((leaf, begin, shape))
            begin += math.prod(shape)
        return found

    def words(self) -> str:
        way = 'bidirectional ' if self.bidirectional else ''
        return f'a {way}{self.mode} of {self.layers} layer(s) of {self.hidden}'


class Take(NamedTuple):
    """Which of Gluon's arrays one of PyTorch's comes from, and how its layout changes."""

    source: str
    begin: int = 0                        # of the part of a packed vector that has the shape `view`
    view: Optional[Shape] = None
    transpose: Optional[Shape] = None
    repeat: int = 1
    shape: Optional[Shape] = None
    ones: bool = False
    zeros: bool = False                   # the bias of a layer that has none in Gluon: one for each row of its weight
    rnn: Optional[Rnn] = None

    def of(self, array: numpy.ndarray) -> numpy.ndarray:
        """The array in its new layout, without a copy if possible."""
        if self.zeros:
            return numpy.zeros(array.shape[:1], array.dtype)
        if self.rnn is not None:
            array = array.reshape(-1)[self.begin:self.begin + math.prod(self.view or ())]
        if self.view is not None:
            array = array.reshape(self.view)
        if self.transpose is not None:
            array = array.transpose(self.transpose)
        if self.repeat > 1:
            array = array.repeat(self.repeat)
        if self.shape is not None:
            array = array.reshape(self.shape)
        return numpy.ones_like(array) if self.ones else array

    def words(self) -> str:
        """What happens to the array, in words."""
        if self.rnn is not None:
            return f'elements {self.begin} to {self.begin + math.prod(self.view or ())} of the vector of {self.rnn.words()}'
        if self.zeros:
            return 'zeros, for a layer without bias'
        words = [f'seen as {list(self.view)}'] if self.view is not None else []
        words += [f'transposed {list(self.transpose)}'] if self.transpose is not None else []
        words += [f'each repeated {self.repeat} times'] if self.repeat > 1 else []
        words += [f'shaped {list(self.shape)}'] if self.shape is not None else []
        words += ['ones, for fix_gamma'] if self.ones else []
        return ', '.join(words) or 'unchanged'

    def entry(self) -> Any:
        """Its entry in a map."""
        if self.rnn is not None:
            layer = dict(self.rnn._asdict(), rnn=self.rnn.mode)
            return {'from': self.source, **{key: layer[key] for key in ('rnn', 'hidden', 'layers', 'bidirectional', 'projection')
                                            if layer[key] is not None}}
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in self._asdict().items()
                 if key in ENTRY and value != self._field_defaults[key]}
        return {'from': self.source, **given} if given else self.source


Plan = Dict[str, Take]


def channels_first(ndim: int) -> Shape:
    """The axes of a weight of a channels-last convolution, in PyTorch's order.

    >>> channels_first(4)
    (0, 3, 1, 2)
    """
    return (0, ndim - 1, *range(1, ndim - 1))


def pointwise(shape: Optional[Shape], other: Optional[Shape]) -> bool:
    """Whether one shape is that of the weight of a linear layer, and the other of a convolution with a kernel of one.

    >>> pointwise((10, 3, 1, 1), (10, 3)), pointwise((10, 3), (10, 3, 1)), pointwise((10, 3), (10, 3, 2))
    (True, True, False)
    """
    if shape is None or other is None:
        return False
    linear, convolution = sorted((shape, other), key=len)
    return len(linear) == 2 < len(convolution) and (*linear, *(1,) * (len(convolution) - 2)) == tuple(convolution)


def unpacked(prefix: str, take: Take, size: int) -> Plan:
    """PyTorch's arrays of the recurrent layer at ``prefix``, from the packed vector that ``take`` names."""
    parts = take.rnn.parts(size, take.source) if take.rnn else []
    return {prefix + leaf: take._replace(begin=begin, view=shape) for leaf, begin, shape in parts}
