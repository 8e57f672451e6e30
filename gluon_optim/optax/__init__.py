"""optax: every registered optimizer as a ``GradientTransformation`` for JAX, and the states of a Gluon run to and from JAX.

>>> import gluon_optim.optax, optax, jax.numpy as jnp
>>> optimizer = gluon_optim.optax.create('sgd_torch', learning_rate=0.5, momentum=0.9)
>>> params = {'weight': jnp.ones(2)}
>>> state = optimizer.init(params)
>>> updates, state = optimizer.update({'weight': jnp.array([1.0, 2.0])}, state, params)
>>> optax.apply_updates(params, updates)['weight'].tolist(), state.slots['momentum_buffer']['weight'].tolist()
([0.5, 0.0], [1.0, 2.0])

Works with JAX 0.4.13, optax 0.1.5 and later, with and without ``jax_enable_x64``.
"""
from ..requirements import missing

try:
    import jax as jax  # `from gluon_optim.optax import jax` says what to install
    import optax as optax
except ImportError as error:
    raise missing('gluon_optim.optax', 'JAX and optax', 'optax', error) from error

from .optimizer import RuleState, create
from .schedules import Schedule, schedule
from .states import arguments, from_optax, load, save, to_optax

__all__ = ['RuleState', 'Schedule', 'arguments', 'create', 'from_optax', 'load', 'save', 'schedule', 'to_optax']
