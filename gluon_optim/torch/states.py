"""States of a Gluon run as the ``state_dict`` of a PyTorch optimizer, and back."""
import importlib
import reprlib
from typing import Any, Dict, Iterable, List, Mapping, Optional

import numpy
import torch

from .. import rules
from ..mapping import classes
from ..mapping.classes import Foreign
from ..mapping.losses import what_is_lost, what_to_say
from ..mapping.selection import normalize, select
from ..mapping.state_dict import from_state_dict, to_state_dict
from ..schema import one_of
from ..states.model import OptimizerStates

__all__ = ['from_torch', 'to_torch']


def to_torch(states: OptimizerStates, target: str = 'mirror', params: Optional[Iterable[str]] = None, allow_lossy: bool = False,
             copy: bool = True) -> Dict[str, Any]:
    """The state of a Gluon run as ``state_dict`` of a PyTorch optimizer; `torch.load(weights_only=True)` reads it.

    Parameters
    ----------
    states : OptimizerStates
    target : str
        'mirror' for what `create` makes: every optimizer, exactly. 'torch', 'timm', 'torch_optimizer' or 'apex' for a class of
        ``torch.optim`` or of these packages that computes the same; docs/CONVERSIONS.md has the list. The first line in the
        report says whether the conversion is exact, equal at constant learning rate, or approximate.
    params : list of str, optional
        Names in the order of the PyTorch optimizer's parameters; left out, all of them in trainer order.
    allow_lossy : bool
        Convert although something is lost.
    copy : bool
        Whether the tensors are copies. Without, most share the memory of ``states``: save them, do not train with them.

    PyTorch matches parameters by position. Where parameters have several values of lr_mult or wd_mult there is one group for
    each, ids still number the parameters in the order above, and `param_groups` builds the optimizer's groups to match.
    What was lost and what is to be done by hand is appended to ``states.report``.

    Raises
    ------
    ValueError
        Where the target has no such class, the states do not fit the rule, or something would be lost.

    >>> import gluon_optim as go
    >>> from gluon_optim.torch import create
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = create('novograd', [weight])
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> states = go.from_torch(optimizer.state_dict(), params={'weight': weight})
    >>> go.to_torch(states)['state'][0]['exp_avg_sq']
    tensor(25.)
    >>> print(states.report[0])
    gluon_optim.torch.create('novograd'): exact; 1 parameters, update 1; in this order: weight
    """
    states, rule, h = normalize(states, allow_lossy)
    foreign, chosen = classes.find(rule, target, states.hypers), select(states, params)
    lost = what_is_lost(foreign, rule, h, states, chosen)
    if lost and not allow_lossy:
        mirror = ", or target='mirror', which keeps everything" * (target != 'mirror' and classes.mirrored(rule))
        raise ValueError(f"target={target!r} would lose {'; '.join(lost)}. Pass allow_lossy=True to go on without{mirror}.")
    converted = to_state_dict(foreign, rule, h, states, chosen)
    groups = [_complete(foreign, group, states, chosen) for group in converted['param_groups']]
    state = {position: {key: _tensor(array, copy) for key, array in entry.items()}
             for position, entry in converted['state'].items()}
    lines = ['lost: ' + line for line in lost] + what_to_say(foreign, h, states, chosen)
    states.report.extend(line for line in lines if line not in states.report)
    return {'state': state, 'param_groups': groups}


def from_torch(state_dict: Mapping[str, Any], optimizer: Optional[str] = None, target: str = 'mirror',
               params: Any = None, num_update: Optional[int] = None, allow_lossy: bool = False,
               copy: bool = True) -> OptimizerStates:
    """A PyTorch optimizer's ``state_dict`` as `OptimizerStates`: the inverse of `to_torch`.

    Parameters
    ----------
    state_dict : dict
    optimizer : str, optional
        The registered name; a mirror's state knows its own.
    target : str
        Whose state it is, as in `to_torch`.
    params : dict, list or None
        The parameters in trainer order: a dictionary of names to tensors or arrays of the weights' shape and type
        (``dict(model.named_parameters())``), a list of `ParameterInfo`, which knows lr_mult and wd_mult too, or a list of
        names. They are matched with the ``param_names`` of the state; where it has none, or none of these, by their ids,
        which number the parameters of all groups. Without shapes those of the slots are taken, and the report says so.
    num_update : int, optional
        What MXNet's schedulers shall see; left out, the largest number of updates.
    allow_lossy : bool
        Convert although the steps will not be quite the same.
    copy : bool
        Whether the arrays are copies. Without, most share the memory of ``state_dict``, which must not change any more.

    Raises
    ------
    ValueError, TypeError
        Where the state is not that of ``optimizer``, is incomplete, or does not fit ``params``.

    >>> import gluon_optim as go
    >>> from gluon_optim.torch import create
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = create('novograd', [weight])
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> states = go.from_torch(optimizer.state_dict(), params={'weight': weight})
    >>> states.optimizer, states.counts, states.slots['weight']['norm_sq']
    ('novograd', {'weight': 1}, array(25., dtype=float32))
    """
    groups = _checked_groups(state_dict)
    name = optimizer or groups[0].get('optimizer')
    if name is None:
        raise ValueError('`optimizer` must be a registered name where the state is not that of a mirror. Received: None. '
                         "Pass e.g. optimizer='adamw'.")
    rule = rules.get(name)
    arrays = {key: {word: _array(value) for word, value in entry.items()} for key, entry in state_dict['state'].items()}
    groups = [{key: value.item() if getattr(value, 'shape', None) == () else _array(value) for key, value in group.items()}
              for group in groups]
    foreign = classes.find(rule, target, groups[0])
    given = {'state': arrays, 'param_groups': groups}
    states = from_state_dict(foreign, rule, given, params, num_update, allow_lossy, copy)
    states.producer['torch'] = str(torch.__version__)
    return states


def _checked_groups(state_dict: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The param groups of what must be the state_dict of an optimizer."""
    state, groups = (state_dict.get(key) if isinstance(state_dict, Mapping) else None for key in ('state', 'param_groups'))
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise ValueError('`state_dict` must be that of an optimizer, with a dictionary of dictionaries as its state. Received: '
                         f'{type(state).__name__}. Pass optimizer.state_dict().')
    if not isinstance(groups, (list, tuple)) or not groups or not all(
            isinstance(group, Mapping) and isinstance(group.get('params'), (list, tuple)) for group in groups):
        raise ValueError('`state_dict` must be that of an optimizer, with one param group or more, dictionaries that have '
                         f'`params`. Received: {reprlib.repr(groups)}. Pass optimizer.state_dict().')
    if not all(isinstance(key, (int, str)) for group in groups for key in group['params']):
        raise ValueError('`state_dict` must have numbers for the parameters of its param groups. Received: '
                         f'{reprlib.repr(groups)}. Pass optimizer.state_dict().')
    return list(groups)


def _complete(foreign: Foreign, group: Dict[str, Any], states: OptimizerStates, chosen: List[Any]) -> Dict[str, Any]:
    """A param group with all that its class expects: for PyTorch's own whatever options the installed version has."""
    if foreign.target == 'mirror':
        no_master = [info.name for info in chosen
                     if info.dtype == 'float16' and info.name in states.slots and info.name not in states.master]
        return dict(group, optimizer=foreign.rule, multi_precision=not no_master,
                    param_names=[chosen[position].name for position in group['params']])
    module, _, name = (foreign.path if foreign.cls is None else foreign.cls).rpartition('.')
    if not module:
        return {key: _tensor(value) for key, value in group.items()}
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f'target={foreign.target!r} needs {module}.{name} at hand, whose options differ between versions: '
                          f"pip install {module.split('.')[0]}. Importing it failed with: {error}") from error
    fresh = cls([torch.zeros(1)], lr=max(group['lr'], 0) or 1.0).state_dict()['param_groups'][0]
    unknown = [key for key in foreign.keys if key not in fresh]
    if unknown:
        raise ValueError(f'{foreign.path} must have {one_of(unknown)}, which the installed version lacks. Install a newer one.')
    switches = [key for key in foreign.fixed if key not in fresh]  # of later versions
    return dict(fresh, **{key: _tensor(value) for key, value in group.items() if key not in switches})


def _tensor(value: Any, copy: bool = True) -> Any:
    """An array, also in a list, as tensor, of its own or where possible in the same memory; other things as they are."""
    if isinstance(value, list):
        return [_tensor(item, copy) for item in value]
    if not hasattr(value, 'dtype'):
        return value
    return torch.from_numpy(numpy.array(value, order='C') if copy else numpy.require(value, requirements=['C', 'W']))


def _array(value: Any) -> Any:
    """A tensor on any device as NumPy array (bfloat16, which NumPy lacks, as float32), of a CPU in the same memory; other things
    as they are."""
    if isinstance(value, list):
        return [_array(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
