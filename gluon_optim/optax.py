"""optax: every registered optimizer as a ``GradientTransformation`` for JAX, and states of a Gluon run into JAX and back.

>>> import gluon_optim.optax, optax, jax.numpy as jnp
>>> optimizer = gluon_optim.optax.create('sgd_torch', learning_rate=0.5, momentum=0.9)
>>> params = {'weight': jnp.ones(2)}
>>> state = optimizer.init(params)
>>> updates, state = optimizer.update({'weight': jnp.array([1.0, 2.0])}, state, params)
>>> optax.apply_updates(params, updates)['weight'].tolist(), state.slots['momentum_buffer']['weight'].tolist()
([0.5, 0.0], [1.0, 2.0])

Works with JAX 0.4.13 and optax 0.1.5, and later, with and without ``jax_enable_x64``.
"""
import dataclasses
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import numpy

from . import conversions, optax_states, rules
from .optax_states import MULTIPLIERS
from .rules import Rule
from .schema import Hyper, Slot, Values, check_known, one_of
from .states.neutral import OptimizerStates, ParameterInfo

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    raise ImportError("gluon_optim.optax needs JAX and optax: pip install 'gluon-optim[optax]'") from error

__all__ = ['RuleState', 'arguments', 'create', 'from_optax', 'load', 'save', 'to_optax']

MULTI_PRECISION = Hyper('multi_precision', True, (False, True), 'keep float32 masters of float16 and bfloat16 parameters')
SCHEDULED = ('learning_rate', 'wd')  # may be functions of the number of updates, or JAX arrays
TYPES = ('float16', 'bfloat16', 'float32', 'float64')


class RuleState(NamedTuple):
    """The state of an optimizer of `create`.

    ``count``   the number of updates, int32; where parameters have seen different numbers, a pytree like the parameters
    ``slots``   the rule's name of a slot -> pytree like the parameters; shape () where the rule keeps one number
    ``master``  pytree like the parameters: float32 weights of half-precision parameters, None for others; None if there are none

    Raises nothing; `create` makes and reads it.

    >>> import gluon_optim as go, jax.numpy as jnp
    >>> state = go.optax.create('sgd_torch', momentum=0.9).init({'weight': jnp.zeros(2)})
    >>> int(state.count), state.slots['momentum_buffer']['weight'].tolist(), state.master
    (0, [0.0, 0.0], None)
    """

    count: Any
    slots: Dict[str, Any]
    master: Any


class Namespace:
    """JAX as rules see arrays; single-precision sums are carried in double where JAX has it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def sum(x: Any) -> Any:
        return jnp.sum(x, dtype=_widest()).astype(x.dtype)

    @staticmethod
    def half(x: Any) -> Any:
        """``x`` rounded to float16."""
        return x.astype(jnp.float16).astype(x.dtype)

    @staticmethod
    def single(x: Any) -> Any:
        """``x`` rounded to float32."""
        return x.astype(jnp.float32).astype(x.dtype)


NAMESPACE = Namespace()


def create(name: str, lr_mult: Any = None, wd_mult: Any = None, multi_precision: bool = True, **hypers: Any
           ) -> optax.GradientTransformation:
    """The registered optimizer ``name`` for JAX.

    Parameters
    ----------
    name : str
        As in `gluon_optim.list_optimizers`.
    lr_mult, wd_mult : pytree of numbers, optional
        Like the parameters: factors on learning rate and decay of each, as a Gluon ``Parameter`` has them.
    multi_precision : bool
        Keep float32 masters of float16 and bfloat16 parameters.
    **hypers
        The optimizer's hyper-parameters by MXNet's names, ``rescale_grad`` and ``clip_gradient`` included. ``learning_rate``
        and ``wd`` may also be schedules (functions of the number of updates done, 0 at the first) or JAX arrays, as in
        ``optax.inject_hyperparams(lambda learning_rate: create('adamw', learning_rate=learning_rate))(learning_rate=0.1)``.

    Returns
    -------
    optax.GradientTransformation
        ``update`` needs ``params``. Its updates are the new weights minus the old ones: `optax.apply_updates` gives exactly the
        rule's new weight where that is between half and twice the old one, and nearly always elsewhere; it is never further off
        than the spacing of numbers at the larger of weight and update, the limit of any sum. Masters are not rounded so.
        Put it last in an ``optax.chain``.

    Without ``jax_enable_x64`` coefficients are computed in single precision, from forms that lose no digits there.

    Raises
    ------
    ValueError, TypeError
        For an unknown name or argument, a value out of range, parameters that are not floating-point arrays.

    >>> create('novograd', beta=0.9)
    Traceback (most recent call last):
      ...
    TypeError: Unknown argument of novograd 'beta'. Did you mean 'beta2' or 'beta1'? Known: 'amsgrad', 'beta1', 'beta2', ...
    """
    rule = rules.get(name)
    if not conversions.mirrored(rule):
        raise ValueError(f'{rule.name!r} cannot be a GradientTransformation: its update is more than elementwise functions, sums '
                         'and the state of one parameter. Continue in PyTorch, or with another optimizer.')
    traced = {key: hypers[key] for key in SCHEDULED if callable(hypers.get(key)) or isinstance(hypers.get(key), jax.Array)}
    h = rule.hyperparameters(**{key: value for key, value in hypers.items() if key not in traced})
    for key in traced:
        check_known('argument', key, h.asdict(), owner=rule.name)
    mults = dict(zip(MULTIPLIERS, (lr_mult, wd_mult)))
    transformation = Transformation(rule, h, traced, mults, MULTI_PRECISION.check(multi_precision))
    return optax.GradientTransformation(transformation.init, transformation.update)


class Transformation:
    """What ``init`` and ``update`` of an optimizer share."""

    def __init__(self, rule: Type[Rule], h: Values, traced: Mapping[str, Any], mults: Mapping[str, Any], multi_precision: bool):
        self.rule, self.h, self.traced, self.mults, self.multi_precision = rule, h, traced, mults, multi_precision
        self.static = rule.static(h)

    def init(self, params: Any) -> RuleState:
        """The state before the first update."""
        leaves, tree = jax.tree_util.tree_flatten(params)
        leaves = [_parameter(leaf) for leaf in leaves]
        masters = [leaf.astype(jnp.float32) if self.multi_precision and _is_half(leaf) else None for leaf in leaves]
        slots = {slot.name: tree.unflatten([_initial(slot, leaf) for leaf in leaves]) for slot in self.static.slots}
        return RuleState(jnp.zeros((), jnp.int32), slots, _masters(tree, masters))

    def update(self, updates: Any, state: RuleState, params: Any = None) -> Tuple[Any, RuleState]:
        """``updates`` are the gradients. Returns what to add to ``params``, and the next state."""
        if params is None:
            raise ValueError(f'{self.rule.name} needs the parameters: the update depends on them. Received: params=None. '
                             'Call update(gradients, state, params).')
        gradients, tree = jax.tree_util.tree_flatten(updates)
        weights = [_parameter(leaf) for leaf in tree.flatten_up_to(params)]
        masters = [None] * len(weights) if state.master is None else tree.flatten_up_to(state.master)
        slots = [dict(zip(state.slots, own)) for own in zip(*map(tree.flatten_up_to, state.slots.values()))] or [{}] * len(weights)
        coefficients = self._coefficients(tree, state.count)
        done = [self._one(*args) for args in zip(weights, gradients, masters, slots, coefficients)]
        new_slots = {name: tree.unflatten([new[name] for _, new, _ in done]) for name in state.slots}
        count = jax.tree_util.tree_map(lambda x: x + 1, state.count)
        new_masters = _masters(tree, [master for _, _, master in done])
        return tree.unflatten([update for update, _, _ in done]), RuleState(count, new_slots, new_masters)

    def _one(self, weight: Any, gradient: Any, master: Any, slots: Mapping[str, Any], coefficients: Mapping[str, Any]
             ) -> Tuple[Any, Dict[str, Any], Any]:
        """Update, new slots and new master of one parameter."""
        dtype = _compute_type(weight)
        c = {name: jnp.asarray(value, dtype) for name, value in coefficients.items()}
        old = weight.astype(dtype) if master is None else master
        rule = self.rule.on_masters() if master is not None and weight.dtype == jnp.float16 else self.rule
        new, new_slots = rule.apply(NAMESPACE, self.static, c, old, gradient.astype(dtype), slots)
        new_slots = {name: value.astype(slots[name].dtype) for name, value in new_slots.items()}
        rounded = new.astype(weight.dtype).astype(dtype)
        return rounded - weight.astype(dtype), new_slots, None if master is None else new

    def _coefficients(self, tree: Any, count: Any) -> List[Dict[str, Any]]:
        """Of each parameter; computed once for all that share count and multipliers."""
        several = not hasattr(count, 'shape')
        counts = tree.flatten_up_to(count) if several else [count] * tree.num_leaves
        latest = jnp.stack(counts).max() if several else count
        rates = {key: value(latest) if callable(value) else value for key, value in self.traced.items()}
        mults = [tree.flatten_up_to(mult) if mult is not None else [1.0] * tree.num_leaves for mult in self.mults.values()]
        known: Dict[Tuple[Any, ...], Dict[str, Any]] = {}
        found = []
        for own, *factors in zip(counts, *mults):
            key = (id(own), *map(float, factors))
            if key not in known:
                known[key] = self._computed(own, rates, factors)
            found.append(known[key])
        return found

    def _computed(self, count: Any, rates: Mapping[str, Any], factors: Sequence[float]) -> Dict[str, Any]:
        values = {name: rates.get(name, getattr(self.h, name)) for name in SCHEDULED}
        values = {name: _wide(value) * factor if name in rates else value * factor
                  for (name, value), factor in zip(values.items(), factors)}
        return self.rule.all_coefficients(self.rule.numbers(NAMESPACE, ''), self.h.replace(**values), _wide(count + 1))


def _widest() -> Any:
    """The type of sums and coefficients: double where JAX has it."""
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def _wide(x: Any) -> Any:
    return jnp.asarray(x).astype(_widest())


def _masters(tree: Any, masters: Sequence[Any]) -> Any:
    return tree.unflatten(masters) if any(master is not None for master in masters) else None


def _is_half(weight: Any) -> bool:
    return str(weight.dtype) in ('float16', 'bfloat16')


def _compute_type(weight: Any) -> Any:
    """The type of a parameter's slots and of its update: double for double, single for all others."""
    return jnp.float64 if weight.dtype == jnp.float64 else jnp.float32


def _initial(slot: Slot, weight: Any) -> Any:
    """What ``slot`` holds before the first update of ``weight``: an array of its own, or donation would fail."""
    dtype = _compute_type(weight)
    if slot.init == 'weight':
        return jnp.array(weight, dtype, copy=True)
    return jnp.full(weight.shape if slot.like == 'weight' else (), slot.init, dtype)


def _parameter(param: Any) -> Any:
    dtype = str(getattr(param, 'dtype', type(param).__name__))
    if dtype not in TYPES:
        raise ValueError(f"A parameter must be an array of {', '.join(TYPES)}. Received: {dtype}. "
                         'Leave it out by `optax.masked`, or convert it first.')
    return jnp.asarray(param)


def to_optax(states: OptimizerStates, target: str = 'mirror', params: Any = None, weights: Optional[Mapping[str, Any]] = None,
             allow_lossy: bool = False) -> RuleState:
    """The state of a Gluon run as the state of an optimizer that ``create(states.optimizer, **arguments(states))`` makes.

    Parameters
    ----------
    states : OptimizerStates
    target : str
        'mirror', the optimizers of `create`.
    params : pytree of names, optional
        In the form of the parameters in JAX: ``{'dense': {'kernel': 'dense0.weight'}}``; left out, ``{name: name}``. Arrays keep
        MXNet's shapes: a Dense weight is (out, in).
    weights : dict, optional
        Name -> weight; needed for parameters that have seen no update where their state begins with the weight.
    allow_lossy : bool
        Convert although something is lost.

    What was lost and what is to be done by hand is appended to ``states.report``.

    Raises
    ------
    ValueError
        Where the states do not fit the rule, something would be lost, or JAX would round float64.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.neutral import ParameterInfo
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
    if doubles and _widest() != jnp.float64:
        raise ValueError(f'JAX must have float64 switched on, or it rounds {one_of(doubles)}. Received: jax_enable_x64=False. '
                         "Call jax.config.update('jax_enable_x64', True) first.")
    packed = optax_states.pack(states, chosen, weights, allow_lossy)
    counts = packed.counts
    count = jnp.int32(counts[0]) if len(set(counts)) == 1 else tree.unflatten(list(map(jnp.int32, counts)))
    slots = {name: tree.unflatten(list(map(jnp.array, arrays))) for name, arrays in packed.slots.items()}
    return RuleState(count, slots, _masters(tree, [None if master is None else jnp.array(master) for master in packed.masters]))


def arguments(states: OptimizerStates, params: Any = None) -> Dict[str, Any]:
    """What to pass to `create`, beside the name, so that it goes on from ``states``; ``params`` as in `to_optax`.

    ``rescale_grad`` is 1: give gradients of the mean loss. Replace ``learning_rate`` by a schedule where Gluon had one.

    Raises ValueError as `to_optax` does.

    >>> import numpy, gluon_optim as go
    >>> from gluon_optim.states.neutral import ParameterInfo
    >>> info = ParameterInfo('weight', 'dense0_weight', (2,), 'float32')
    >>> slots = {'mean': numpy.array([0.6, 0.8], 'float32'), 'norm_sq': numpy.array(25, 'float32')}
    >>> states = go.OptimizerStates('novograd', {}, 1, [info], {'weight': 1}, {'weight': slots})
    >>> go.optax.arguments(states)['beta1']
    0.95
    """
    tree, chosen = _select(states, params)
    found = optax_states.arguments(states, chosen)
    return {key: tree.unflatten(value) if key in MULTIPLIERS else value for key, value in found.items()}


def load(path: Any, params: Any = None) -> Tuple[RuleState, Dict[str, Any]]:
    """The state in a file of ``gluon-optim convert --to optax``, and the arguments of `create`, ``name`` included:

        state, arguments = gluon_optim.optax.load('run.npz')
        optimizer = gluon_optim.optax.create(**arguments)

    ``params`` as in `to_optax`. Raises StateFileError (a ValueError) for a file that is damaged or something else, else as
    `to_optax` does.

    >>> import tempfile, gluon_optim as go, jax.numpy as jnp
    >>> params = {'weight': jnp.zeros(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = folder + '/run.npz'
    ...     go.optax.save(path, go.optax.create('adamw', wd=0.1).init(params), 'adamw', params, wd=0.1)
    ...     state, arguments = go.optax.load(path)
    >>> int(state.count), arguments['name'], arguments['wd']
    (0, 'adamw', 0.1)
    """
    states, _ = optax_states.read(path)
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
    optax_states.write(path, states, states.parameters)


def from_optax(state: RuleState, optimizer: str, params: Any = None, names: Any = None, num_update: Optional[int] = None,
               **hypers: Any) -> OptimizerStates:
    """The state of an optimizer of `create` as `OptimizerStates`: the inverse of `to_optax`.

    Parameters
    ----------
    state : RuleState
    optimizer : str
        The name that `create` got.
    params : pytree, optional
        The parameters, or `ParameterInfo` in their place, which knows lr_mult and wd_mult too. Without it, shapes and types are
        those of the slots, and the report says so.
    names : pytree of str, optional
        Their names; left out, those of `ParameterInfo`, or the path in the pytree, joined by dots.
    num_update : int, optional
        What MXNet's schedulers shall see; left out, the largest number of updates.
    **hypers
        As `create` got them; a number for a schedule.

    Raises
    ------
    ValueError, TypeError
        Where the state is not that of ``optimizer`` with these hyper-parameters, or does not fit ``params``.

    >>> import gluon_optim as go, jax.numpy as jnp
    >>> params = {'weight': jnp.ones(2)}
    >>> optimizer = go.optax.create('novograd', learning_rate=0.1)
    >>> updates, state = optimizer.update({'weight': jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    >>> states = go.from_optax(state, 'novograd', params, learning_rate=0.1)
    >>> states.counts, states.slots['weight']['norm_sq']
    ({'weight': 1}, array(25., dtype=float32))
    """
    if not isinstance(state, RuleState):
        raise TypeError(f'`state` must be what an optimizer of `create` returns. Received: {type(state).__name__}. '
                        'Take it out of the state of the chain.')
    rule = rules.get(optimizer)
    h = rule.hyperparameters(**hypers)
    form = optax_states.form(rule, h)
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
    split = conversions.groups(likes) if infos else {(1.0, 1.0): list(range(len(likes)))}
    param_groups = [dict(form.group(h.replace(learning_rate=h.learning_rate * lr_mult, wd=h.wd * wd_mult)), params=positions)
                    for (lr_mult, wd_mult), positions in split.items()]
    given = [dataclasses.replace(like, name=name) for like, name in zip(likes, known)] if infos else dict(zip(known, likes))
    state_dict = {'state': dict(enumerate(entries)), 'param_groups': param_groups}
    states = conversions.from_state_dict(form, rule, state_dict, given, num_update)
    states.producer['jax'] = jax.__version__
    return states


def _select(states: OptimizerStates, params: Any) -> Tuple[Any, List[ParameterInfo]]:
    """The form of the parameters in JAX, and who they are."""
    names, tree = jax.tree_util.tree_flatten({name: name for name in states.names} if params is None else params)
    strangers = [name for name in names if not isinstance(name, str)]
    if strangers:
        raise TypeError(f'`params` must be a pytree of names. Received: {type(strangers[0]).__name__} in it. '
                        "Write names in the form of the parameters, e.g. {'kernel': 'dense0.weight'}.")
    return tree, conversions.select(states, names)


def _dotted(path: Sequence[Any]) -> str:
    return '.'.join(str(next((getattr(key, word) for word in ('key', 'name', 'idx') if hasattr(key, word)), key)) for key in path)
