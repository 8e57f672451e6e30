"""A rule as ``optax.GradientTransformation``."""
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple, Type

import jax
import jax.numpy as jnp
import optax

from .. import rules
from ..mapping.classes import mirrored
from ..mapping.optax_file import MULTIPLIERS
from ..rules import Rule
from ..rules.compensated import KAHAN
from ..schema import Hyper, Slot, Values, check_known, compute_type

__all__ = ['RuleState', 'create', 'masters_of', 'widest']

MULTI_PRECISION = Hyper('multi_precision', True, (False, True), 'keep float32 masters of float16 and bfloat16 parameters')
SCHEDULED = ('learning_rate', 'wd')  # may be functions of the number of updates or JAX arrays
TYPES = ('float16', 'bfloat16', 'float32', 'float64')


class RuleState(NamedTuple):
    """The state of an optimizer of `create`.

    ``count``   the number of updates, int32; a pytree like the parameters where parameters have seen different numbers
    ``slots``   the rule's name for a slot -> pytree like the parameters; shape () where the rule keeps one number
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
    """The array namespace of rules on JAX; single-precision sums are accumulated in double where JAX has it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def sum(x: Any) -> Any:
        return jnp.sum(x, dtype=widest()).astype(x.dtype)

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
        Structured like the parameters: each one's multipliers of learning rate and decay, as in a Gluon ``Parameter``.
    multi_precision : bool
        Keep float32 masters of float16 and bfloat16 parameters.
    **hypers
        The optimizer's hyper-parameters under MXNet's names, including ``rescale_grad`` and ``clip_gradient``. ``learning_rate``
        and ``wd`` may also be schedules (functions of the number of updates done, 0 at the first) or JAX arrays, as in
        ``optax.inject_hyperparams(lambda learning_rate: create('adamw', learning_rate=learning_rate))(learning_rate=0.1)``.

    Returns
    -------
    optax.GradientTransformation
        ``update`` needs ``params``. Its updates are the new weights minus the old ones: `optax.apply_updates` gives exactly the
        rule's new weight where that is between half and twice the old one, and nearly always elsewhere; it is never further off
        than the spacing of numbers at the larger of weight and update, the limit for any sum. Masters have no such rounding.
        Put it last in an ``optax.chain``.

    Without ``jax_enable_x64`` coefficients are computed in single precision, using formulas that lose no digits there.

    Raises
    ------
    ValueError, TypeError
        For an unknown name or argument, a value out of range, or parameters that are not floating-point arrays.

    >>> create('novograd', beta=0.9)
    Traceback (most recent call last):
      ...
    TypeError: Unknown argument of novograd 'beta'. Did you mean 'beta2' or 'beta1'? Known: 'amsgrad', 'beta1', 'beta2', ...
    """
    rule = rules.get(name)
    if not mirrored(rule):
        raise ValueError(f'{rule.name!r} cannot be a GradientTransformation: its update is more than elementwise functions, sums '
                         'and the state of one parameter. Continue in PyTorch, or with another optimizer.')
    traced = {key: hypers[key] for key in SCHEDULED if callable(hypers.get(key)) or isinstance(hypers.get(key), jax.Array)}
    h = rule.hyperparameters(**{key: value for key, value in hypers.items() if key not in traced})
    for key in traced:
        check_known('argument', key, h.asdict(), owner=rule.name)
    mults = dict(zip(MULTIPLIERS, (lr_mult, wd_mult)))
    if str(multi_precision) == KAHAN:
        raise ValueError('`multi_precision` must be True or False in optax, where updates are added to the weights, and rounded, '
                         f'after `update` has returned. Received: multi_precision={KAHAN!r}. Pass True, for float32 masters.')
    transformation = Transformation(rule, h, traced, mults, MULTI_PRECISION.check(multi_precision))
    return optax.GradientTransformation(transformation.init, transformation.update)


class Transformation:
    """What an optimizer's ``init`` and ``update`` share."""

    def __init__(self, rule: Type[Rule], h: Values, traced: Mapping[str, Any], mults: Mapping[str, Any], multi_precision: bool):
        self.rule, self.h, self.traced, self.mults, self.multi_precision = rule, h, traced, mults, multi_precision
        self.static = rule.static(h)

    def init(self, params: Any) -> RuleState:
        """The state before the first update."""
        leaves, tree = jax.tree_util.tree_flatten(params)
        leaves = [_parameter(leaf) for leaf in leaves]
        masters = [leaf.astype(jnp.float32) if self.multi_precision and _is_half(leaf) else None for leaf in leaves]
        slots = {slot.name: tree.unflatten([_initial(slot, leaf) for leaf in leaves]) for slot in self.static.slots}
        return RuleState(jnp.zeros((), jnp.int32), slots, masters_of(tree, masters))

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
        new_masters = masters_of(tree, [master for _, _, master in done])
        return tree.unflatten([update for update, _, _ in done]), RuleState(count, new_slots, new_masters)

    def _one(self, weight: Any, gradient: Any, master: Any, slots: Mapping[str, Any], coefficients: Mapping[str, Any]
             ) -> Tuple[Any, Dict[str, Any], Any]:
        """Update, new slots and new master of one parameter."""
        dtype = compute_type(weight.dtype)
        c = {name: jnp.asarray(value, dtype) for name, value in coefficients.items()}
        old = weight.astype(dtype) if master is None else master
        rule = self.rule.on_masters() if master is not None and weight.dtype == jnp.float16 else self.rule
        new, new_slots = rule.apply(NAMESPACE, self.static, c, old, gradient.astype(dtype), slots)
        new_slots = {name: value.astype(slots[name].dtype) for name, value in new_slots.items()}
        rounded = new.astype(weight.dtype).astype(dtype)
        return rounded - weight.astype(dtype), new_slots, None if master is None else new

    def _coefficients(self, tree: Any, count: Any) -> List[Dict[str, Any]]:
        """The coefficients for each parameter, computed once for all that share count and multipliers."""
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


def widest() -> Any:
    """The type of sums and coefficients: double where JAX has it."""
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def _wide(x: Any) -> Any:
    return jnp.asarray(x).astype(widest())


def masters_of(tree: Any, masters: Sequence[Any]) -> Any:
    return tree.unflatten(masters) if any(master is not None for master in masters) else None


def _is_half(weight: Any) -> bool:
    return str(weight.dtype) in ('float16', 'bfloat16')


def _initial(slot: Slot, weight: Any) -> Any:
    """What ``slot`` holds before the first update of ``weight``: always a separate array, or donation would fail."""
    dtype = compute_type(weight.dtype)
    if slot.init == 'weight':
        return jnp.array(weight, dtype, copy=True)
    return jnp.full(slot.shape(weight.shape), slot.init, dtype)


def _parameter(param: Any) -> Any:
    dtype = str(getattr(param, 'dtype', type(param).__name__))
    if dtype not in TYPES:
        raise ValueError(f"A parameter must be an array of {', '.join(TYPES)}. Received: {dtype}. "
                         'Leave it out with `optax.masked`, or convert it first.')
    return jnp.asarray(param)
