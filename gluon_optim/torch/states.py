"""States of a Gluon run as the ``state_dict`` of a PyTorch optimizer, and back."""
import importlib
import reprlib
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy
import torch

from .. import rules
from ..mapping import classes, loss_scalers, scheduling
from ..mapping.classes import Foreign
from ..mapping.losses import what_is_lost, what_to_say
from ..mapping.scheduling import Carried, carried, file_entry, next_rate, rate_at, restore
from ..mapping.selection import normalize, own_hypers, select
from ..mapping.state_dict import from_state_dict, to_state_dict
from ..mapping.torch_schedulers import in_pytorch
from ..rules.compensated import COMPENSATION, KAHAN, is_compensated
from ..schedules import schedule_of
from ..schema import Values, one_of
from ..states.model import OptimizerStates, ParameterInfo

__all__ = ['from_torch', 'to_torch']


def to_torch(states: OptimizerStates, target: str = 'mirror', params: Optional[Iterable[str]] = None, allow_lossy: bool = False,
             copy: bool = True) -> Dict[str, Any]:
    """The state of a Gluon run as a PyTorch optimizer's ``state_dict``; `torch.load(weights_only=True)` can read it.

    Parameters
    ----------
    states : OptimizerStates
    target : str
        'mirror' for what `create` makes: every optimizer, exactly. 'torch', 'timm', 'torch_optimizer' or 'apex' for a class of
        ``torch.optim`` or of these packages that computes the same; docs/CONVERSIONS.md lists them. The first line of the
        report says whether the conversion is exact, equal at constant learning rate, or approximate.
    params : list of str, optional
        Names in the order of the PyTorch optimizer's parameters; by default, all of them in trainer order.
    allow_lossy : bool
        Convert even if something is lost.
    copy : bool
        Whether the tensors are copies. If not, most share memory with ``states``: save them, but do not train with them.

    PyTorch matches parameters by position. If parameters differ in lr_mult or wd_mult there is one group for each pair; ids
    still number the parameters in the order above, and `param_groups` builds the optimizer's groups to match.
    Beside 'state' and 'param_groups', the scheduler is under 'scheduler', for `scheduler`, and AMP's loss scaler under
    'loss_scaler', for ``GradScaler.load_state_dict``; ``load_state_dict`` of the optimizer does not look at them.
    What was lost and what you need to do by hand is appended to ``states.report``.

    Raises
    ------
    ValueError
        If the target has no such class, the states do not fit the rule, or something would be lost.

    >>> import torch, gluon_optim as go
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
    states, rule, h = normalize(states, allow_lossy, target)
    foreign, chosen = classes.find(rule, target, states.hypers), select(states, params)
    lost = what_is_lost(foreign, rule, h, states, chosen)
    if lost and not allow_lossy:
        mirror = ", or target='mirror', which keeps everything" * (target != 'mirror' and classes.mirrored(rule))
        raise ValueError(f"target={target!r} would lose {'; '.join(lost)}. Pass allow_lossy=True to convert anyway{mirror}.")
    converted = to_state_dict(foreign, rule, h, states, chosen)
    groups = [dict(_complete(foreign, group, states, chosen), **_scheduled(foreign, h, states, chosen[group['params'][0]]))
              for group in converted['param_groups']]
    state = {position: {key: _tensor(array, copy) for key, array in entry.items()}
             for position, entry in converted['state'].items()}
    lines = ['lost: ' + line for line in lost] + what_to_say(foreign, h, states, chosen) + _say(foreign, states, chosen)
    states.report.extend(line for line in lines if line not in states.report)
    return {'state': state, 'param_groups': groups, **_beside(foreign, states, chosen)}


def from_torch(state_dict: Mapping[str, Any], optimizer: Optional[str] = None, target: str = 'mirror',
               params: Any = None, num_update: Optional[int] = None, allow_lossy: bool = False,
               copy: bool = True, scheduler: Any = None) -> OptimizerStates:
    """A PyTorch optimizer's ``state_dict`` as `OptimizerStates`: the inverse of `to_torch`.

    Parameters
    ----------
    state_dict : dict
    optimizer : str, optional
        The registered name; not needed for a mirror's state, which contains it.
    target : str
        The kind of state, as in `to_torch`.
    params : dict, list or None
        The parameters in trainer order: a dictionary of names to tensors or arrays of the weights' shape and type
        (``dict(model.named_parameters())``), a list of `ParameterInfo`, which also hold lr_mult and wd_mult, or a list of
        names. They are matched with the state's ``param_names``; if it has none, or none of these, by their ids, which
        number the parameters of all groups. Without shapes those of the slots are used, and the report says so.
    num_update : int, optional
        The update number for MXNet's schedulers; by default that of the scheduler, else the largest number of updates.
    allow_lossy : bool
        Convert even if the steps will not be exactly the same.
    copy : bool
        Whether the arrays are copies. If not, most share memory with ``state_dict``, which must not change afterwards.
    scheduler : optional
        What `scheduler` made, its ``state_dict()``, or anything else that `scheduler` takes: MXNet's scheduler continues there. By
        default ``state_dict['scheduler']``, where `to_torch` put it.

    Raises
    ------
    ValueError, TypeError
        If the state is not one of ``optimizer``, is incomplete, or does not fit ``params``.

    >>> import torch, gluon_optim as go
    >>> from gluon_optim.torch import create
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = create('novograd', [weight])
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> states = go.from_torch(optimizer.state_dict(), params={'weight': weight})
    >>> states.optimizer, states.counts, states.slots['weight']['norm_sq']
    ('novograd', {'weight': 1}, array(25., dtype=float32))
    """
    groups: Sequence[Mapping[str, Any]] = _checked_groups(state_dict)
    given = state_dict.get('scheduler') if scheduler is None else scheduler
    followed = None if given is None else carried(given.state_dict() if hasattr(given, 'state_dict') else given)
    name = optimizer or groups[0].get('optimizer')
    if name is None:
        raise ValueError('`optimizer` must be a registered name unless the state is that of a mirror. Received: None. '
                         "Pass e.g. optimizer='adamw'.")
    rule = rules.get(name)
    _check_compensations(state_dict['state'])
    arrays = {key: {word: _array(value) for word, value in entry.items()} for key, entry in state_dict['state'].items()}
    groups = [{key: value.item() if getattr(value, 'shape', None) == () else _array(value) for key, value in group.items()}
              for group in groups]
    foreign = classes.find(rule, target, groups[0])
    lr_mults = None
    if followed is not None:
        counts = [int(entry['step']) for entry in arrays.values() if 'step' in entry]
        num_update = followed.at(counts) if num_update is None else num_update
        groups, lr_mults = _at_the_last_rate(foreign, groups, followed, num_update)
    given = {'state': arrays, 'param_groups': groups}
    states = from_state_dict(foreign, rule, given, params, num_update, allow_lossy, copy, lr_mults)
    states.producer['torch'] = str(torch.__version__)
    if followed is not None:
        if not foreign.counts:
            states.counts = {name: max(count - followed.begin, 0) for name, count in states.counts.items()}
        restore(states, followed)
    states.loss_scaler = loss_scalers.from_torch(state_dict.get('loss_scaler') or {})
    return states


def _at_the_last_rate(foreign: Foreign, groups: Sequence[Mapping[str, Any]], followed: Carried, num_update: int
                      ) -> Tuple[Sequence[Mapping[str, Any]], Optional[List[float]]]:
    """The groups with the rates of the last update, not the next one, and their multipliers: from rates of 0 nothing follows."""
    if 'learning_rate' not in foreign.held or not all('lr_mult' in group for group in groups):
        return groups, None
    last = rate_at(followed.record, max(num_update, 1))
    scale = last if last and foreign.divisors else 1.0
    return ([dict(group, lr=scale * group['lr_mult']) for group in groups],
            [foreign.hypers(dict(group, lr=group['lr_mult']))['learning_rate'] for group in groups])


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


def _check_compensations(state: Mapping[Any, Mapping[str, Any]]) -> None:
    found = [key for key, entry in state.items() if getattr(entry.get(COMPENSATION.torch), 'dtype', None) == torch.bfloat16]
    if found:
        raise ValueError('Compensations must be float16 in MXNet and NumPy, which have no bfloat16. Received: bfloat16 for '
                         f'parameter {found[0]!r}. Make the parameters float32, param.data = param.float() + compensation.float(), '
                         "and remove 'compensation' from the state.")


def _say(foreign: Foreign, states: OptimizerStates, chosen: List[ParameterInfo]) -> List[str]:
    """What becomes of what is not the optimizer's: lines for the report."""
    lines = loss_scalers.what_becomes_of_it(states.loss_scaler, to_pytorch=True)
    if states.scheduler and 'learning_rate' not in foreign.held:
        return [*lines, f"the scheduler {states.scheduler.get('class')} has no effect: {foreign.rule} has no learning rate"]
    how = ("scheduler = go.torch.scheduler(optimizer, checkpoint['scheduler']), where checkpoint is this state_dict, and "
           'scheduler.step() after each optimizer.step()')
    known = next_rate(states) is not None and schedule_of(states.scheduler)
    lines += scheduling.what_becomes_of_it(states, how, "set 'lr' of the param groups at each step",
                                           metrics=bool(known and known[0].history))
    if known and foreign.target != 'mirror':
        alone = in_pytorch(*known, states.num_update, multipliers=len({info.lr_mult for info in chosen}) > 1)
        lines += [f'without gluon_optim, after optimizer.load_state_dict: {alone}'] if alone else []
    return lines


def _beside(foreign: Foreign, states: OptimizerStates, chosen: List[ParameterInfo]) -> Dict[str, Any]:
    """What is not the optimizer's, under keys that ``load_state_dict`` of PyTorch's optimizers does not look at."""
    entries = {'scheduler': file_entry(states, chosen) if 'learning_rate' in foreign.held else {},
               'loss_scaler': loss_scalers.to_torch(states.loss_scaler)}
    return {key: entry for key, entry in entries.items() if entry}


def _scheduled(foreign: Foreign, h: Values, states: OptimizerStates, info: ParameterInfo) -> Dict[str, float]:
    """What the scheduler, if its rates are known, makes of a group's ``lr``: the rate of the next update; the schedule's first
    one, from which PyTorch's schedulers compute every other; and how often a rate of the schedule the group gets."""
    now = next_rate(states)
    if now is None or 'learning_rate' not in foreign.held:
        return {}
    rates = dict(lr=now, initial_lr=schedule_of(states.scheduler)[1].base_lr, lr_mult=1.0)
    return {key: foreign.group(own_hypers(h.replace(learning_rate=value), info))['lr'] for key, value in rates.items()}


def _complete(foreign: Foreign, group: Dict[str, Any], states: OptimizerStates, chosen: List[Any]) -> Dict[str, Any]:
    """A param group with everything its class expects: for PyTorch's own, all options of the installed version."""
    if foreign.target == 'mirror':
        kept = {info.name for info in chosen if is_compensated(states.slots.get(info.name, {}))}
        no_master = [info.name for info in chosen if info.dtype == 'float16' and info.name in states.slots
                     and info.name not in states.master and info.name not in kept]
        kahan = any(chosen[position].name in kept for position in group['params'])
        return dict(group, optimizer=foreign.rule, multi_precision=KAHAN if kahan else not no_master,
                    param_names=[chosen[position].name for position in group['params']])
    module, _, name = (foreign.path if foreign.cls is None else foreign.cls).rpartition('.')
    if not module:
        return {key: _tensor(value) for key, value in group.items()}
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f'target={foreign.target!r} needs {module}.{name} installed: its options differ between versions. '
                          f"pip install {module.split('.')[0]}. Importing it failed with: {error}") from error
    fresh = cls([torch.zeros(1)], lr=max(group['lr'], 0) or 1.0).state_dict()['param_groups'][0]
    unknown = [key for key in foreign.keys if key not in fresh]
    if unknown:
        raise ValueError(f'{foreign.path} must have {one_of(unknown)}, which the installed version lacks. Install a newer one.')
    switches = [key for key in foreign.fixed if key not in fresh]  # of later versions
    return dict(fresh, **{key: _tensor(value) for key, value in group.items() if key not in switches})


def _tensor(value: Any, copy: bool = True) -> Any:
    """An array, or a list of arrays, as tensors, copied or where possible in the same memory; other things unchanged."""
    if isinstance(value, list):
        return [_tensor(item, copy) for item in value]
    if not hasattr(value, 'dtype'):
        return value
    return torch.from_numpy(numpy.array(value, order='C') if copy else numpy.require(value, requirements=['C', 'W']))


def _array(value: Any) -> Any:
    """A tensor on any device as a NumPy array (bfloat16, which NumPy lacks, as float32), sharing memory if on the CPU; other
    things unchanged."""
    if isinstance(value, list):
        return [_array(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
