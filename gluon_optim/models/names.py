"""Gluon's and PyTorch's names for the arrays of a layer."""
import itertools
import re
from typing import Optional, Tuple

from .gluon import Source
from .plan import GATES, Plan, Rnn, Take, channels_first, unpacked
from .pytorch import Target

__all__ = ['SUGGEST', 'conventional', 'rnn_like', 'split', 'torch_leaf']

SUGGEST = 'Write a draft of a map with suggest_names, correct what differs, and pass it as names='
VECTORS = ('parameters', 'rnn_param')  # names of packed parameters

# MXNet 1.x writes a layer's `l0_i2h_weight` as `_unfused.0.i2h_weight`, or `_unfused.0.l_cell.i2h_weight` if it is bidirectional
_RECURRENT = (r'(?:_unfused\.(?P<old>\d+)\.(?:(?P<side>[lr])_cell\.)?|(?P<way>[lr])(?P<new>\d+)_)?'
              r'(?P<gate>i2h|h2h|h2r)_(?P<kind>weight|bias)')
_PLAIN = {'gamma': 'weight', 'beta': 'bias', 'alpha': 'weight', 'moving_mean': 'running_mean', 'moving_var': 'running_var'}
_LEAVES = '|'.join([_RECURRENT, *_PLAIN, 'running_mean', 'running_var', 'weight', 'bias', 'parameters', 'rnn_param'])
_DOTTED = re.compile(rf'(?P<prefix>(?:.+?\.)??)(?P<leaf>{_LEAVES})')
_FULL = re.compile(rf'(?P<prefix>(?:.+?_)??)(?P<leaf>{_LEAVES})')
_GATES = {'i2h': 'ih', 'h2h': 'hh', 'h2r': 'hr'}


def split(name: str, dotted: bool) -> Tuple[str, str]:
    """A parameter's layer as PyTorch writes it, '' or ending in a dot, and Gluon's name for the array.

    ``dotted`` distinguishes structural names (``features.1.gamma``) from full names, as in symbols (``batchnorm0_gamma``).

    >>> split('features.1.gamma', dotted=True), split('lstm0_l0_i2h_weight', dotted=False)
    (('features.1.', 'gamma'), ('lstm0.', 'l0_i2h_weight'))
    >>> split('decoder.embed_weight', dotted=True)
    ('decoder.', 'embed_weight')
    """
    match = (_DOTTED if dotted else _FULL).fullmatch(name)
    if match is None:
        place, dot, leaf = name.rpartition('.')
        return place + dot, leaf
    prefix = match['prefix']
    return (prefix if dotted or not prefix else f'{prefix[:-1]}.'), match['leaf']


def torch_leaf(leaf: str) -> str:
    """PyTorch's name for the array.

    >>> torch_leaf('gamma'), torch_leaf('r1_h2h_bias'), torch_leaf('i2h_weight')
    ('weight', 'bias_hh_l1_reverse', 'weight_ih')
    """
    match = re.fullmatch(_RECURRENT, leaf)
    if match is None:
        return _PLAIN.get(leaf, leaf)
    layer, side = match['old'] or match['new'], match['side'] or match['way']
    return f'{match["kind"]}_{_GATES[match["gate"]]}' + (f'_l{layer}' if layer else '') + ('_reverse' if side == 'r' else '')


def conventional(found: Source, target: Optional[Target], draft: bool = False) -> Plan:
    """Each array under PyTorch's name for it. Packed vectors must be known from the net or from ``target``."""
    plan: Plan = {}
    ones, last = set(found.facts.ones), set(found.facts.channels_last)
    for name, array in found.arrays.items():
        prefix, leaf = split(name, bool(found.dotted))
        if leaf in VECTORS and array.ndim == 1:
            rnn = found.facts.packed.get(name) or rnn_like(target, prefix)
            if rnn is None and target is not None:
                plan[f'{prefix}*'] = Take(name)
                continue
            if rnn is None and draft:
                rnn = Rnn('lstm', hidden=0)  # to be filled in
                plan[f'{prefix}*'] = Take(name, rnn=rnn)
                continue
            if rnn is None:
                raise ValueError(f'{name!r} of {found.what} is the packed vector of a recurrent layer, without its sizes. '
                                 f'Pass like=, or a map with "{prefix}*": {{"from": "{name}", "rnn": "lstm", "hidden": ..., '
                                 '"layers": ..., "bidirectional": ...}.')
            parts = unpacked(prefix, Take(name, rnn=rnn), array.size)
        else:
            parts = {prefix + torch_leaf(leaf): _known(found, name, name in last, name in ones)}
        twice = [part for part in parts if part in plan]
        if twice:
            raise ValueError(f'{twice[0]!r} would be both {plan[twice[0]].source!r} and {name!r} of {found.what}. {SUGGEST}.')
        plan.update(parts)
    return plan


def _known(found: Source, name: str, last: bool, ones: bool) -> Take:
    """How the net itself says that an array is to be converted."""
    return Take(name, transpose=channels_first(found.arrays[name].ndim) if last else None, ones=ones)


def rnn_like(target: Optional[Target], prefix: str) -> Optional[Rnn]:
    """The sizes of the recurrent layer of PyTorch at ``prefix``, if there is one."""
    shapes = {} if target is None else target.shapes
    first, projected = shapes.get(prefix + 'weight_hh_l0'), shapes.get(prefix + 'weight_hr_l0')
    if first is None or prefix + 'bias_hh_l0' not in shapes:
        return None
    hidden = projected[1] if projected else first[1]
    mode = {rows: mode for mode, rows in reversed(list(GATES.items()))}.get(first[0] // max(hidden, 1))
    layers = next(k for k in itertools.count() if f'{prefix}weight_hh_l{k}' not in shapes)
    both = f'{prefix}weight_hh_l0_reverse' in shapes
    return None if mode is None else Rnn(mode, hidden, layers, both, projected[0] if projected else None)
