"""States of a Gluon run as the state of an optimizer made by `create`, and back; also from and to files."""
import dataclasses
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy

from .. import rules
from ..mapping import optax_file, scheduling
from ..mapping.optax_file import MULTIPLIERS
from ..mapping.selection import groups, select
from ..mapping.state_dict import from_state_dict
from ..schema import check_known, one_of
from ..states.model import OptimizerStates, ParameterInfo
from .optimizer import RuleState, masters_of, widest
from .schedules import Schedule

__all__ = ['arguments', 'from_optax', 'load', 'save', 'to_optax']


def to_optax(states: OptimizerStates, target: str = 'mirror', params: Any = None, weights: Optional[Mapping[str, Any]] = None,
             allow_lossy: bool = False) -> RuleState:
    """The state of a Gluon run as the state of an optimizer that ``create(states.optimizer, **arguments(states))`` makes.

    Parameters
    ----------
    states : OptimizerStates
    target : str
        'mirror', the optimizers made by `create`.
    params : pytree of names, optional
        Structured like the parameters in JAX: ``{'dense': {'kernel': 'dense0.weight'}}``; by default ``{name: name}`` for all
        but frozen ones without a state, which optax would train. Arrays keep MXNet's shapes: a Dense weight is
        (out, in).
    weights : dict, optional
        Name -> weight; needed for parameters without any update if their state starts from the weight.
    allow_lossy : bool
        Convert even if something is lost.

    What was lost and what you need to do by hand is appended to ``states.report``.

    Raises
    ------
    ValueError
        If the states do not fit the rule, something would be lost, or JAX would round float64.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> state = go.to_optax(states)
    >>> int(state.count), state.slots['mean']['weight'].tolist()
    (1, [0.6000000238418579, 0.800000011920929])
    """
    check_known('target', target, ['mirror'], ValueError)
    tree, chosen = _select(states, params)
    doubles = [info.name for info in chosen if info.dtype == 'float64']
    if doubles and widest() != jnp.float64:
        raise ValueError(f'JAX must have float64 enabled, or it rounds {one_of(doubles)}. Received: jax_enable_x64=False. '
                         "Call jax.config.update('jax_enable_x64', True) first.")
    packed = optax_file.pack(states, chosen, weights, allow_lossy)
    counts = packed.counts
    count = jnp.int32(counts[0]) if len(set(counts)) == 1 else tree.unflatten(list(map(jnp.int32, counts)))
    slots = {name: tree.unflatten(list(map(jnp.array, arrays))) for name, arrays in packed.slots.items()}
    return RuleState(count, slots, masters_of(tree, [None if master is None else jnp.array(master) for master in packed.masters]))


def arguments(states: OptimizerStates, params: Any = None) -> Dict[str, Any]:
    """What to pass to `create`, besides the name, so that it continues from ``states``; ``params`` as in `to_optax`.

    ``rescale_grad`` is 1: use gradients of the mean loss. ``learning_rate`` is a `schedule` if Gluon had a scheduler whose rates
    are known here.

    Raises ValueError as `to_optax` does.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.model import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> go.optax.arguments(states)['beta1']
    0.95
    """
    tree, chosen = _select(states, params)
    found = optax_file.arguments(states, chosen)
    carried = scheduling.carried_states(states, chosen)
    if carried is not None and scheduling.continues(states) and 'learning_rate' in found:
        found['learning_rate'] = Schedule(carried)
    return {key: tree.unflatten(value) if key in MULTIPLIERS else value for key, value in found.items()}


def load(path: Any, params: Any = None) -> Tuple[RuleState, Dict[str, Any]]:
    """The state in a file of ``gluon-optim convert --to optax``, and the arguments of `create`, including ``name``:

        state, arguments = gluon_optim.optax.load('run.npz')
        optimizer = gluon_optim.optax.create(**arguments)

    ``params`` as in `to_optax`. Raises StateFileError (a ValueError) for a damaged file or a different kind of file, and what
    `to_optax` raises.

    >>> import tempfile, gluon_optim as go, jax.numpy as jnp
    >>> params = {'weight': jnp.zeros(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = folder + '/run.npz'
    ...     go.optax.save(path, go.optax.create('adamw', wd=0.1).init(params), 'adamw', params, wd=0.1)
    ...     state, arguments = go.optax.load(path)
    >>> int(state.count), arguments['name'], arguments['wd']
    (0, 'adamw', 0.1)
    """
    states, _ = optax_file.read(path)
    return to_optax(states, params=params), dict(arguments(states, params), name=states.optimizer)


def save(path: Any, state: RuleState, optimizer: str, params: Any = None, names: Any = None, num_update: Optional[int] = None,
         **hypers: Any) -> None:
    """Write a state as `load` and ``gluon-optim convert`` read it: the way back to MXNet. Arguments as in `from_optax`.

    ``path`` is the file, an ``.npz``. Raises what `from_optax` raises, and OSError where the file system refuses.

    >>> import tempfile, gluon_optim as go, jax.numpy as jnp
    >>> params = {'weight': jnp.zeros(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     go.optax.save(folder + '/run.npz', go.optax.create('adamw').init(params), 'adamw', params)
    ...     int(go.optax.load(folder + '/run.npz')[0].count)
    0
    """
    states = from_optax(state, optimizer, params, names, num_update, **hypers)
    optax_file.write(path, states, states.parameters)


def from_optax(state: RuleState, optimizer: str, params: Any = None, names: Any = None, num_update: Optional[int] = None,
               **hypers: Any) -> OptimizerStates:
    """The state of an optimizer made by `create` as `OptimizerStates`: the inverse of `to_optax`.

    Parameters
    ----------
    state : RuleState
    optimizer : str
        The name passed to `create`.
    params : pytree, optional
        The parameters, or `ParameterInfo` in their place, which also holds lr_mult and wd_mult. Without it, shapes and types are
        taken from the slots, and the report says so.
    names : pytree of str, optional
        Their names; by default those of `ParameterInfo`, or the path in the pytree, joined by dots.
    num_update : int, optional
        The update number for MXNet's schedulers; by default the largest number of updates, plus ``begin_num_update``, which
        a `schedule` knows.
    **hypers
        As passed to `create`. ``learning_rate`` may be what `schedule` returned, which gives MXNet its scheduler back; in place of
        any other function pass a number.

    Raises
    ------
    ValueError, TypeError
        If the state is not one of ``optimizer`` with these hyper-parameters, or does not fit ``params``.

    >>> import gluon_optim as go, jax.numpy as jnp
    >>> params = {'weight': jnp.ones(2)}
    >>> optimizer = go.optax.create('novograd', learning_rate=0.1)
    >>> updates, state = optimizer.update({'weight': jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    >>> states = go.from_optax(state, 'novograd', params, learning_rate=0.1)
    >>> states.counts, states.slots['weight']['norm_sq']
    ({'weight': 1}, array(25., dtype=float32))
    """
    if not isinstance(state, RuleState):
        raise TypeError(f'`state` must be the state of an optimizer made by `create`. Received: {type(state).__name__}. '
                        "Take it out of the chain's state.")
    rule, followed = rules.get(optimizer), hypers.get('learning_rate')
    if isinstance(followed, Schedule):
        hypers = {key: value for key, value in hypers.items() if key != 'learning_rate'}
    h = rule.hyperparameters(**hypers)
    foreign = optax_file.as_foreign(rule, h)
    shown = next((x for x in (params, names, *state.slots.values()) if x is not None), None)
    paths, tree = jax.tree_util.tree_flatten_with_path(shown)
    likes: List[Any] = [like if params is not None else None for _, like in paths]
    known = tree.flatten_up_to(names) if names is not None else [getattr(like, 'name', None) or _dotted(path)
                                                                 for like, (path, _) in zip(likes, paths)]
    several = not hasattr(state.count, 'shape')
    parts = {**state.slots, 'master': state.master, 'step': state.count if several else None}
    parts = {key: part for key, part in parts.items() if part is not None}
    entries = [{key: numpy.array(value) for key, value in zip(parts, own) if value is not None}
               for own in zip(*map(tree.flatten_up_to, parts.values()))] or [{} for _ in likes]
    for entry in entries if not several else ():
        entry['step'] = numpy.array(state.count)
    infos = all(isinstance(like, ParameterInfo) for like in likes) and bool(likes)
    split = groups(likes) if infos else {(1.0, 1.0): list(range(len(likes)))}
    param_groups = [dict(foreign.group(h.replace(learning_rate=h.learning_rate * lr_mult, wd=h.wd * wd_mult)), params=positions)
                    for (lr_mult, wd_mult), positions in split.items()]
    given = [dataclasses.replace(like, name=name) for like, name in zip(likes, known)] if infos else dict(zip(known, likes))
    state_dict = {'state': dict(enumerate(entries)), 'param_groups': param_groups}
    states = from_state_dict(foreign, rule, state_dict, given, num_update)
    states.producer['jax'] = jax.__version__
    if isinstance(followed, Schedule):
        if num_update is None:
            states.num_update += followed.carried.begin
        scheduling.restore(states, followed.carried)
    return states


def _select(states: OptimizerStates, params: Any) -> Tuple[Any, List[ParameterInfo]]:
    """The structure of the parameters in JAX, and the parameters themselves."""
    if params is None:
        params = {info.name: info.name for info in select(states, frozen=False)}
    names, tree = jax.tree_util.tree_flatten(params)
    strangers = [name for name in names if not isinstance(name, str)]
    if strangers:
        raise TypeError(f'`params` must be a pytree of names. Received: {type(strangers[0]).__name__} in it. '
                        "Put names where JAX has the parameters, e.g. {'kernel': 'dense0.weight'}.")
    return tree, select(states, names)


def _dotted(path: Sequence[Any]) -> str:
    return '.'.join(str(next((getattr(key, word) for word in ('key', 'name', 'idx') if hasattr(key, word)), key)) for key in path)
