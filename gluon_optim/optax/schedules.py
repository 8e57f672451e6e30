"""A schedule of Gluon as a function of optax's count."""
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy

from ..mapping import scheduling
from ..schedules import rate, schedule_of
from .optimizer import widest

__all__ = ['Schedule', 'schedule']

TRACES_DOUBLES = jax.__version_info__ >= (0, 7)  # before, single and double precision could not be in one program
enable_x64: Any = vars(jax if hasattr(jax, 'enable_x64') else importlib.import_module('jax.experimental'))['enable_x64']


class Schedule:
    """What `schedule` makes: the rate as a function of the number of updates done.

    ``carried`` holds the scheduler's record and ``begin_num_update``, which `from_optax` takes back to MXNet.

    Raises nothing; `schedule` checks what it gets.

    >>> import gluon_optim as go
    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=20, base_lr=0.1, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> go.optax.schedule(half)
    gluon_optim.optax.schedule('mxnet.lr_scheduler.FactorScheduler')
    """

    def __init__(self, carried: scheduling.Carried):
        self.carried = carried

    def __repr__(self) -> str:
        return f'gluon_optim.optax.schedule({self.carried.record["class"]!r})'

    def __call__(self, count: Any) -> Any:
        """The rate after ``count`` updates, computed in double precision and rounded once."""
        count, dtype = jnp.asarray(count), widest()
        if dtype == jnp.float32 and not TRACES_DOUBLES:
            return jax.pure_callback(self._on_the_host, jax.ShapeDtypeStruct(count.shape, dtype), count)
        with enable_x64(True):
            found, h = schedule_of(self.carried.record)
            t = count.astype(jnp.float64) + (1.0 + self.carried.begin)
            return jnp.broadcast_to(found.rate(jnp, h, t), count.shape).astype(dtype)

    def _on_the_host(self, count: Any) -> Any:
        t = numpy.asarray(count, 'int64') + (1 + self.carried.begin)
        return numpy.asarray(rate(self.carried.record, t), 'float32')


def schedule(schedule: Any) -> Schedule:
    """The learning rate as a function of optax's count, the number of updates done: for ``learning_rate`` of `create`, and of
    optax's own optimizers.

        schedule(count) = go.rate(schedule, count + 1)

    Parameters
    ----------
    schedule
        A scheduler of MXNet or of `gluon_optim.lr_scheduler`; its record, as in `OptimizerStates.scheduler`; or `OptimizerStates`,
        from which also MXNet's ``begin_num_update`` is known: count + 1 + begin_num_update is then the number of the update.

    The function can be traced (``jax.jit``, ``jax.lax.scan``, ``jax.grad``) and takes counts of any shape, 0 or more. It computes
    in double precision also where ``jax_enable_x64`` is False, and rounds the rate to float32 then: for this JAX before 0.7 asks
    the host (``jax.pure_callback``).

    Raises
    ------
    ValueError, TypeError
        For a scheduler of a class that is not known here, attributes that are not those of one, states without a scheduler, or one
        that depends on a metric (Plateau).

    >>> half = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': dict(
    ...     step=10, factor=0.5, stop_factor_lr=1e-8, count=20, base_lr=0.1, warmup_steps=0, warmup_begin_lr=0,
    ...     warmup_final_lr=0.4, warmup_mode='linear')}
    >>> jax.jit(schedule(half))(jnp.arange(8, 22, 4)).tolist()
    [0.4000000059604645, 0.20000000298023224, 0.20000000298023224, 0.10000000149011612]
    """
    found = scheduling.carried(schedule)
    scheduling.function_of_time(found)  # raises an error for others
    return Schedule(found)
