"""Rules as the optimizers of the ONNX standard, ``ai.onnx.preview.training``: Adam, Momentum and Adagrad.

One node for each parameter, as plain tuples like those of `operators`. No runtime in our tests has kernels for them, but
the standard's own evaluator (``onnx.reference``) does. Nothing here imports onnx.
"""
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple, Type

import numpy

from ..rules.base import Rule
from ..schema import Values, one_of
from .operators import Operator, Parameter, Step

__all__ = ['DOMAIN', 'PREVIEW', 'PreviewStep', 'inexact']

DOMAIN = 'ai.onnx.preview.training'


class Preview(NamedTuple):
    """How the standard stores a rule: ``attributes`` of the node, and the ``first`` value of its count T."""

    op: str
    first: int
    attributes: Callable[[Values], Dict[str, Any]]
    refused: Callable[[Values], str] = lambda h: ''


PREVIEW: Dict[str, Preview] = {
    'adam': Preview('Adam', 1, lambda h: dict(alpha=h.beta1, beta=h.beta2, epsilon=h.epsilon)),
    'sgd_torch': Preview('Momentum', 0, lambda h: dict(alpha=h.momentum, beta=1 - h.dampening,
                                                       mode='nesterov' if h.nesterov else 'standard'),
                         lambda h: '' if h.momentum else 'it keeps no momentum buffer with momentum=0'),
    'sgd_ema': Preview('Momentum', 1, lambda h: dict(alpha=h.momentum, beta=1 - h.momentum, mode='standard'),
                       lambda h: 'its nesterov weights the gradient differently' if h.nesterov
                       else 'Momentum has no bias_correction' if h.bias_correction else ''),
    'adagrad_torch': Preview('Adagrad', 0, lambda h: dict(decay_factor=h.lr_decay, epsilon=h.epsilon)),
}
NEARLY = {
    'adam_torch': 'it adds epsilon after bias correction, Adam adds it before',
    'adamw': "its decay is multiplied by the learning rate, Adam's is not",
    'adagrad': 'it adds eps inside the root, Adagrad adds it outside',
    'sgd': "the learning rate is inside its momentum, but outside Momentum's",
    'nag': "the learning rate is inside its momentum, but outside Momentum's",
}


def check(rule: Type[Rule], h: Values) -> Preview:
    """How the standard stores ``rule``; ValueError with the reason if it cannot."""
    preview = PREVIEW.get(rule.name)
    reason = NEARLY.get(rule.name, 'none of those computes it') if preview is None else preview.refused(h)
    if preview is not None and not reason and h.clip_gradient is not None:
        reason = 'they have no clip_gradient'
    if preview is None or reason:
        raise ValueError(f"{rule.name!r} is not one of the optimizers of {DOMAIN} (Adam, Momentum, Adagrad): {reason}. "
                         f"Available: {one_of(PREVIEW)}. Pass target='mirror', which takes every optimizer.")
    return preview


def inexact(rule: Type[Rule], h: Values, parameters: Sequence[Parameter]) -> List[str]:
    """The hyper-parameters for which the node, with its float32 attributes, has too few digits: one line each."""
    limit = 1e-12 if any(p.computed == 'float64' for p in parameters) else 1e-6
    numbers = {name: value for name, value in check(rule, h).attributes(h).items() if not isinstance(value, str)}
    lines = []
    for name, value in {**numbers, 'norm_coefficient': h.wd}.items():
        held = float(numpy.float32(value))
        error = abs(held - value) / (abs(value) or 1.0)
        if name in ('alpha', 'beta') and rule.name == 'adam':  # the node computes 1 - value
            error = max(error, abs(held - value) / (1 - value))
        if error > limit:
            lines.append(f'digits of {name}={value!r}, which {DOMAIN} stores as float32: updates are off by up to {error:.1e} of '
                         'their size')
    return lines


class PreviewStep(Step):
    """The update as one node of ``ai.onnx.preview.training`` for each parameter; names as in `Step`."""

    def __init__(self, rule: Type[Rule], h: Values, parameters: Sequence[Parameter]):
        self.preview = check(rule, h)
        super().__init__(rule, h, parameters)

    def _coefficients(self, lr_mult: float, wd_mult: float, offset: int) -> Tuple[Dict[str, Any], Any]:
        rate = 'learning_rate'
        if lr_mult != 1:
            rate = self.add('Mul', [rate, self.constant(lr_mult, 'float64')], 'coefficient')
        behind = offset + self.preview.first - 1
        count = self.add('Add', ['t', self.constant(behind, 'int64')], 'coefficient') if behind else 't'
        attributes = dict(self.preview.attributes(self.h), norm_coefficient=self.h.wd * wd_mult)
        return {'rate': rate, 'count': count, 'attributes': attributes}, None

    def _update(self, p: Parameter) -> None:
        found, _ = self._groups[p[-3:]]
        rate = self._once((found['rate'], p.computed), lambda: self._cast(found['rate'], 'float64', p.computed, 'coefficient'))
        weight = p.name + '/master' if p.master else self._cast(p.name, p.dtype, p.computed, p.name)
        gradient = self._cast(p.name + '/grad', p.dtype, p.computed, p.name)
        if self.h.rescale_grad != 1:
            gradient = self.add('Mul', [gradient, self.constant(self.h.rescale_grad, p.computed)], p.name)
        slots = [f'{p.name}/{slot.name}' for slot in self.static.slots]
        new = weight + '/new' if p.master or p.dtype == p.computed else f'{p.name}:new'
        self.operators.append(Operator(self.preview.op, (rate, found['count'], weight, gradient, *slots),
                                       (new, *(slot + '/new' for slot in slots)), found['attributes'], DOMAIN))
        if new != p.name + '/new':
            self.add('Cast', [new], output=p.name + '/new', to=p.dtype)
