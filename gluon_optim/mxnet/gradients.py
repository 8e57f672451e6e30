"""What happens to gradients between `backward` and the update: clipping, NaN and inf, loss scaling, accumulation.

A gradient is used as the Trainer holds it after `allreduce_grads`: the sum over the batch and over all devices. Each call waits
for the devices once, for all parameters together.

>>> import mxnet as mx, gluon_optim as go
>>> net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False, prefix='dense_')
>>> net.initialize()
>>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
>>> with mx.autograd.record():
...     loss = net(mx.nd.array([[300, 400]])).sum()
>>> loss.backward()
>>> trainer.allreduce_grads()
>>> go.gradients.find_nonfinite(trainer)
{}
>>> go.gradients.clip_by_global_norm(trainer, 1.0)
500.0
>>> print(net.weight.grad().asnumpy().round(6))
[[0.6 0.8]]
>>> trainer.update(batch_size=1)

docs/GRADIENTS.md has the loops.
"""
import functools
import logging
import math
import warnings
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy
from mxnet import autograd, gluon
from mxnet import ndarray as nd

from ..schema import Hyper, check_int, compute_type, one_of, some_of
from ..states.model import ACCUMULATED, BATCHES_PER_UPDATE, OptimizerStates, ParameterInfo
from .gradient_arrays import Gradient, add, all_finite, clip, fetch_kinds, fetch_norms, fetch_sums, is_sparse, multiply
from .trainer import check_trainer, contexts_of, start
from .typing import ParameterLike, TrainerLike

__all__ = ['Accumulate', 'NonfiniteGradients', 'Scaler', 'clip_by_global_norm', 'clip_by_norm', 'clip_by_value', 'find_nonfinite']

log = logging.getLogger('gluon_optim')
_POLICIES = ('skip', 'raise', 'ignore')


class NonfiniteGradients(ValueError):
    """Gradients hold NaN or inf; ``parameters`` names them: name -> 'nan' or 'inf'. Raised by `Scaler.step`.

    >>> error = NonfiniteGradients({'dense0_weight': 'nan', 'dense0_bias': 'inf'}, 65536.0)
    >>> print(error)
    The gradients must be finite. Received: NaN in 'dense0_weight', inf in 'dense0_bias', at loss scale 65536. Nothing was updated.
    >>> error.parameters['dense0_bias']
    'inf'
    """

    def __init__(self, parameters: Mapping[str, str], scale: float = 1.0):
        at = '' if scale == 1 else f', at loss scale {scale:g}'
        super().__init__(f'The gradients must be finite. Received: {_named(parameters)}{at}. Nothing was updated.')
        self.parameters = dict(parameters)


def _named(nonfinite: Mapping[str, str]) -> str:
    kinds = {word: [name for name, kind in nonfinite.items() if kind == word.lower()] for word in ('NaN', 'inf')}
    return ', '.join(f'{word} in {some_of(names)}' for word, names in kinds.items() if names)


# Clipping

def clip_by_value(trainer: TrainerLike, low: float, high: float, batch_size: Optional[float] = None) -> None:
    """Clip every element of the gradients to [low, high]: g = min(max(g, low), high).

    Parameters
    ----------
    trainer : gluon.Trainer
        After `backward` and `allreduce_grads`, before `update`; see `clip_by_global_norm`.
    low, high : float
        ``-inf`` or ``inf`` leaves that side open.
    batch_size : float, optional
        As for `clip_by_global_norm`.

    NaN stays NaN, but an infinite element becomes a bound: look for it first, with `find_nonfinite` or `Scaler.unscale`.

    Raises ValueError for ``low > high``, NaN, a row_sparse gradient where 0 is not in [low, high], and as `clip_by_global_norm`.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.array([[3, -0.5]])).sum()
    >>> loss.backward()
    >>> go.gradients.clip_by_value(trainer, -1, 1)
    >>> print(net.weight.grad().asnumpy())
    [[ 1.  -0.5]]
    """
    if not _number(low) or not _number(high) or not low <= high:
        raise ValueError(f'`low` and `high` must be numbers with low <= high. Received: low={low!r}, high={high!r}.')
    unit = unit_of(trainer, batch_size)
    gradients = _reduced(trainer)
    sparse = [gradient.name for gradient in gradients if is_sparse(gradient.arrays[0]) and not low <= 0 <= high]
    if sparse:
        raise ValueError(f'0 must be in [low, high] for row_sparse gradients, of which most elements are 0. Received: low={low!r}, '
                         f'high={high!r} for {some_of(sparse)}.')
    with autograd.pause():
        if len(gradients[0].arrays) > 1:
            fetch_sums(gradients)  # only to see that they are the same on all devices
        for gradient in gradients:
            for array in gradient.arrays:
                clip(array, low / unit, high / unit)


def clip_by_global_norm(trainer: TrainerLike, max_norm: float, batch_size: Optional[float] = None) -> float:
    """Scale all gradients by the same factor, so that their common norm is at most ``max_norm``:

        norm = sqrt(sum over parameters and elements of g^2)
        g = g * min(1, max_norm / norm)

    Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, arXiv:1211.5063, algorithm 1; in PyTorch
    ``clip_grad_norm_``, which divides by norm + 1e-6.

    Parameters
    ----------
    trainer : gluon.Trainer
        After `backward` and, with several devices, `allreduce_grads`; before `update`. Create it with
        ``update_on_kvstore=False`` if it has several devices. Each parameter counts once, by its sum over the devices. Those
        with ``grad_req='null'``, and those without a new gradient since the last update, are left out.
    max_norm : float
        More than 0, in units of what is summed in ``grad()``: the sum over samples if the loss is. ``inf`` only measures.
    batch_size : float, optional
        The number that `Trainer.update` will get. With it gradients are taken as the optimizer will see them: g stands for
        ``rescale_grad * grad / batch_size``, so for the mean over samples if the loss is summed.

    Under a loss scale g is the gradient without it; `Scaler.unscale` comes first. Squares of float16 are summed in float32.

    Returns
    -------
    float
        The norm before clipping. If it is NaN or inf nothing is clipped, with a warning unless a `Scaler` handles the step.

    Raises ValueError for a ``max_norm`` that is not a number above 0, a trainer that updates on its kvstore, gradients that
    differ between devices because they have not been summed yet, and when there is no gradient at all.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.array([[3, 4], [3, 4]])).sum()
    >>> loss.backward()
    >>> go.gradients.clip_by_global_norm(trainer, 2.0)
    10.0
    >>> go.gradients.clip_by_global_norm(trainer, 0.5, batch_size=2)      # the mean over both samples has norm 1
    1.0
    """
    _check_max_norm(max_norm)
    unit = unit_of(trainer, batch_size)
    gradients = _reduced(trainer)
    with autograd.pause():
        norms = _norms(trainer, gradients)
        norm = math.hypot(*norms) * unit
        if not numpy.isfinite(norms).all():
            norm = float(norms.sum())
            _warn_of_nonfinite(trainer, gradients, norms)
        elif norm > max_norm:
            for gradient in gradients:
                multiply(gradient.arrays, max_norm / norm)
    return norm


def clip_by_norm(trainer: TrainerLike, max_norm: float, batch_size: Optional[float] = None) -> Dict[str, float]:
    """Scale the gradient of each parameter so that its norm is at most ``max_norm``: g = g * min(1, max_norm / |g|).

    ``trainer``, ``max_norm`` and ``batch_size`` as for `clip_by_global_norm`, whose errors are raised too (ValueError).

    Returns
    -------
    dict of str to float
        The norm of each gradient before clipping, by parameter. A gradient whose norm is NaN or inf is left as it is.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=2, prefix='dense_')
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.array([[3, 4]])).sum()
    >>> loss.backward()
    >>> go.gradients.clip_by_norm(trainer, 2.5)
    {'dense_bias': 1.0, 'dense_weight': 5.0}
    >>> print(net.weight.grad().asnumpy(), net.bias.grad().asnumpy())
    [[1.5 2. ]] [1.]
    """
    _check_max_norm(max_norm)
    unit = unit_of(trainer, batch_size)
    gradients = _reduced(trainer)
    with autograd.pause():
        norms = _norms(trainer, gradients) * unit
        if not numpy.isfinite(norms).all():
            _warn_of_nonfinite(trainer, gradients, norms)
        for gradient, norm in zip(gradients, norms):
            if math.isfinite(norm) and norm > max_norm:
                multiply(gradient.arrays, max_norm / norm)
    return {gradient.name: float(norm) for gradient, norm in zip(gradients, norms)}


def find_nonfinite(trainer: TrainerLike) -> Dict[str, str]:
    """The parameters with gradients that hold NaN or inf: name -> 'nan', or 'inf' where there is inf but no NaN.

    Parameters
    ----------
    trainer : gluon.Trainer
        After `backward`. All devices are looked at, before `allreduce_grads` or after it, and gradients that were used already.

    Names are those of `Parameter.name`, in the trainer's order; ``{}`` if all gradients are finite. Under a loss scale gradients
    are looked at as they are in memory.

    Raises ValueError when no parameter has a gradient.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=2, prefix='dense_')
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.array([[1, float('inf')]])).sum()
    >>> loss.backward()
    >>> go.gradients.find_nonfinite(trainer)
    {'dense_weight': 'inf'}
    """
    gradients = _gradients(trainer)
    with autograd.pause():
        return fetch_kinds(gradients)


# The gradients of a trainer

def _gradients(trainer: TrainerLike, fresh_only: bool = False) -> List[Gradient]:
    """The gradients of all parameters that have one; ``fresh_only``: that have a new one since the last update."""
    check_trainer(trainer)
    trained = [parameter for parameter in trainer._params if parameter.grad_req != 'null']
    if not trained:
        raise ValueError('A parameter must have a gradient. Received: a trainer of which all parameters have grad_req="null".')
    found = [parameter for parameter in trained if parameter._data is not None and (not fresh_only or _is_fresh(parameter))]
    if not found:
        why = ('since the last update' if any(parameter._data is not None for parameter in trained)
               else 'because the shapes of parameters are not known yet')
        raise ValueError(f'There must be gradients. Received: a trainer without any, {why}. Call backward() of a loss first.')
    return [Gradient(parameter.name, _grad(parameter)) for parameter in found]


def _grad(parameter: ParameterLike) -> List[Any]:
    """The gradient on each device, also where it is one of `mx.np`, as an array for the operators of `mx.nd`."""
    arrays: List[Any] = parameter._check_and_get(parameter._grad, list)  # type: ignore[attr-defined]
    return [array if is_sparse(array) else array.as_nd_ndarray() for array in arrays]


def _is_fresh(parameter: ParameterLike) -> bool:
    """Whether `backward` has run since the last update: MXNet keeps a flag for each device, and updates no other parameter."""
    return any(data._fresh_grad for data in parameter._data or ())


def _set_fresh(parameter: ParameterLike, fresh: bool) -> None:
    for data in parameter._data or ():
        data._fresh_grad = fresh


def _reduced(trainer: TrainerLike) -> List[Gradient]:
    """The gradients that the next update will use, after `allreduce_grads`. ValueError where there are none, or cannot be."""
    gradients = _gradients(trainer, fresh_only=True)
    _check_own_update(trainer)
    scaler = _scaler(trainer)
    if scaler is not None and scaler._phase == 'scaled':
        raise ValueError('`unscale` must be called before gradients are clipped. Received: gradients of a scaled loss. Call '
                         'scaler.unscale() first.')
    return gradients


def _check_own_update(trainer: TrainerLike) -> None:
    if not trainer._kv_initialized:
        start(trainer)
    if trainer._kvstore and trainer._update_on_kvstore:
        raise ValueError('The gradients must be in the trainer before the update. Received: a trainer that updates on its kvstore. '
                         'Create it with update_on_kvstore=False.')


def _sums(trainer: Any) -> bool:
    """Whether `allreduce_grads` adds something up: the gradients of several devices, workers, or processes of Horovod."""
    return len(contexts_of(trainer)) > 1 or bool(trainer._distributed) or (
        type(trainer)._allreduce_grads is not gluon.Trainer._allreduce_grads)


def _scaler(trainer: TrainerLike) -> Optional['Scaler']:
    scaler = getattr(trainer, '_amp_loss_scaler', None)
    return scaler if isinstance(scaler, Scaler) else None


def unit_of(trainer: TrainerLike, batch_size: Optional[float]) -> float:
    """What a gradient in memory is multiplied by to be in the units of the caller: without the loss scale, whether that is
    AMP's or ours, and as the optimizer will see it if the caller gives a batch size."""
    check_trainer(trainer)
    trainer_: Any = trainer
    if batch_size is None:
        return float(trainer_._scale / getattr(trainer, '_amp_original_scale', trainer_._scale))
    if not _number(batch_size) or not 0 < batch_size < math.inf:
        raise ValueError(f'`batch_size` must be a number above 0. Received: batch_size={batch_size!r}. Pass the one for `update`.')
    return float(trainer_._scale / batch_size)


def _norms(trainer: TrainerLike, gradients: Sequence[Gradient]) -> numpy.ndarray:
    """The norm of each gradient in memory; a Scaler that has looked at them already knows something about them."""
    scaler = _scaler(trainer)
    known = scaler is not None and scaler._phase == 'unscaled'
    return fetch_norms(gradients, same=known, nonfinite=known and not scaler._finite)  # type: ignore[union-attr]


def _check_max_norm(max_norm: float) -> None:
    if not _number(max_norm) or not max_norm > 0:
        raise ValueError(f'`max_norm` must be a number above 0. Received: max_norm={max_norm!r}.')


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, numpy.integer, numpy.floating)) and not isinstance(value, bool) and not math.isnan(value)


def _warn_of_nonfinite(trainer: TrainerLike, gradients: Sequence[Gradient], norms: numpy.ndarray) -> None:
    scaler: Any = getattr(trainer, '_amp_loss_scaler', None)
    if scaler is None or (isinstance(scaler, Scaler) and scaler._phase != 'unscaled'):  # else the scaler leaves the step out
        kinds = {g.name: 'nan' if math.isnan(norm) else 'inf' for g, norm in zip(gradients, norms) if not math.isfinite(norm)}
        warnings.warn(f'Gradients that are not finite are not clipped: {_named(kinds)}. The next update makes the weights NaN: '
                      'leave it out, or use go.gradients.Scaler.', stacklevel=3)


# Loss scaling

_HYPERS = (
    Hyper('init_scale', 2.0 ** 16, '(0, inf)'),
    Hyper('scale_factor', 2.0, '[1, inf)'),
    Hyper('backoff_factor', 0.5, '(0, 1]'),
    Hyper('max_scale', 2.0 ** 24, '(0, inf)'),
    Hyper('min_scale', 2.0 ** -14, '(0, inf)'),
)
# what a file calls our attributes, where that is not the attribute itself: AMP's words
_KEYS = {'loss_scale': 'loss_scale', 'unskipped': 'unskipped', 'scale_factor': 'scale_factor', 'backoff_factor': 'backoff_factor',
         'scale_seq_len': 'scale_window', 'max_loss_scale': 'max_scale', 'min_loss_scale': 'min_scale'}
_PROGRESS = ('loss_scale', 'unskipped')  # the rest are settings


class Scaler:
    """Dynamic loss scaling: small gradients are kept from becoming 0 in float16, and steps that overflow are left out.

        scaled loss = loss_scale * loss           so that every gradient in memory is loss_scale * g
        update with g = gradient / loss_scale     the division is part of ``rescale_grad``, in float32
        after a step with NaN or inf              loss_scale = loss_scale * backoff_factor
        after scale_window steps without          loss_scale = min(loss_scale * scale_factor, max_scale)

    Micikevicius et al., Mixed precision training, arXiv:1710.03740, section 3.2. The order is that of PyTorch's GradScaler:

        with autograd.record():
            loss = loss_fn(net(x), y)
        scaler.scale(loss).backward()                              # any number of losses
        scaler.unscale()                                           # sums over devices, looks for NaN and inf
        go.gradients.clip_by_global_norm(trainer, 1.0)             # of the gradients without the scale
        scaler.step(batch_size)                                    # instead of trainer.step
        scaler.update()

    Parameters
    ----------
    trainer : gluon.Trainer
        It keeps the Scaler, in the place of AMP's: `save_states` and `save_checkpoint` save its state, `amp.scale_loss` works with
        it, and a step of the trainer itself does what `step` and `update` do. With several devices it must have been created
        with ``update_on_kvstore=False``.
    init_scale : float
        The first loss scale. Powers of two change no digits of a gradient.
    scale_factor, backoff_factor : float
        What it is multiplied by. AMP's are 2 and 1/2; 1 and 1 keep it constant. PyTorch: ``growth_factor, backoff_factor``.
    scale_window : int
        After how many steps without NaN and inf it grows. PyTorch: ``growth_interval``.
    max_scale, min_scale : float
        It grows to ``max_scale`` at most. `update` raises an error where it would fall below ``min_scale``: then the gradients
        are not finite for another reason.

    `unscale` leaves the arrays as they are, so that no digits of float16 gradients are lost: `Parameter.grad` holds
    ``loss_scale * g`` until the next `backward`. The clipping functions take that into account.

    Raises ValueError for values out of range, a trainer that updates on its kvstore, float16 losses, and methods that are
    called in another order; TypeError for other types.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> scaler = go.gradients.Scaler(trainer, init_scale=1024)
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.array([[3, 4]])).sum()
    >>> scaler.scale(loss).backward()
    >>> scaler.unscale()
    >>> go.gradients.clip_by_global_norm(trainer, 1.0)
    5.0
    >>> scaler.step(batch_size=1)
    True
    >>> scaler.update()
    >>> scaler.loss_scale, scaler.state_dict()['unskipped']
    (1024.0, 1)
    """

    def __init__(self, trainer: TrainerLike, init_scale: float = 2.0 ** 16, scale_factor: float = 2.0, backoff_factor: float = 0.5,
                 scale_window: int = 2000, max_scale: float = 2.0 ** 24, min_scale: float = 2.0 ** -14):
        check_trainer(trainer)
        given = dict(init_scale=init_scale, scale_factor=scale_factor, backoff_factor=backoff_factor, max_scale=max_scale,
                     min_scale=min_scale)
        h = {hyper.name: hyper.check(given[hyper.name]) for hyper in _HYPERS}
        if not h['min_scale'] <= h['init_scale'] <= h['max_scale']:
            raise ValueError('`init_scale` must be from min_scale to max_scale. Received: '
                             f'min_scale={min_scale!r}, init_scale={init_scale!r}, max_scale={max_scale!r}.')
        if trainer._kvstore_params['update_on_kvstore'] and len(contexts_of(trainer)) > 1:
            raise ValueError('A step can only be left out if the trainer updates on its own. Received: a trainer with '
                             'update_on_kvstore=True. Create it with update_on_kvstore=False.')
        self._loss_scale = h['init_scale']
        self._unskipped = 0
        self._scale_factor, self._backoff_factor = h['scale_factor'], h['backoff_factor']
        self._scale_window = check_int('scale_window', scale_window, 1)
        self._max_scale, self._min_scale = h['max_scale'], h['min_scale']
        self._trainer: Any = trainer
        self._phase = 'idle'    # then 'scaled', 'unscaled', 'stepped'; 'updating' while the trainer updates
        self._finite = True     # the gradients of this step
        self._summed = False    # over the devices, in this step
        self._register()

    def _register(self) -> None:
        trainer = self._trainer
        if not hasattr(trainer, '_amp_original_scale'):
            trainer._amp_original_scale = trainer._scale
        trainer._amp_loss_scaler = self

        def allreduce_grads() -> None:
            if self._phase == 'unscaled' and _sums(trainer):
                raise ValueError('Gradients must be summed over the devices once. Received: a second call, after '
                                 'scaler.unscale(), which has done it. Call scaler.step(batch_size) next.')
            type(trainer)._allreduce_grads(trainer)
            self._summed = True

        trainer._allreduce_grads = allreduce_grads

    def __repr__(self) -> str:
        return f'<Scaler: loss_scale={self._loss_scale:g}, {self._unskipped} of {self._scale_window} steps>'

    @property
    def loss_scale(self) -> float:
        """The present factor."""
        return float(self._loss_scale)

    def scale(self, loss: Any) -> Any:
        """``loss_scale * loss``; of a list or tuple each. It is recorded, so that `backward` can follow outside of `record`."""
        self._require('scale', 'idle', 'scaled')
        several = isinstance(loss, (list, tuple))
        losses = list(loss) if several else [loss]
        for one in losses:
            if not isinstance(one, nd.NDArray):
                raise TypeError(f'`loss` must be an array of MXNet, or a list of them. Received: {type(one).__name__}.')
            if one.dtype not in (numpy.float32, numpy.float64):
                raise ValueError(f'`loss` must be float32 or float64. Received: {numpy.dtype(one.dtype).name}, in which a scaled '
                                 "loss overflows. Compute it from net(x).astype('float32').")
        self._begin_step()
        with autograd.record(autograd.is_training()):
            losses = [one * self._loss_scale for one in losses]
        return type(loss)(losses) if several else losses[0]

    def _begin_step(self) -> None:
        if self._phase == 'idle':
            self._summed = False
            self._trainer._scale = self._trainer._amp_original_scale / self._loss_scale
            self._phase = 'scaled'

    def unscale(self) -> None:
        """Sum the gradients over the devices, unless that was done, and look for NaN and inf: one synchronisation.

        Once per step, after `backward` and before clipping. `step` does it where it was not done.
        """
        self._require('unscale', 'scaled')
        _check_own_update(self._trainer)
        gradients = _gradients(self._trainer, fresh_only=True)
        if not self._summed:
            self._trainer.allreduce_grads()
        with autograd.pause():
            self._finite = all_finite([gradient.arrays[0] for gradient in gradients])
        self._phase = 'unscaled'

    def step(self, batch_size: float, nonfinite: str = 'skip', ignore_stale_grad: bool = False) -> bool:
        """Update the weights, unless there are gradients with NaN or inf. Returns whether they were updated.

        Parameters
        ----------
        batch_size, ignore_stale_grad
            As for `Trainer.step`.
        nonfinite : 'skip', 'raise' or 'ignore'
            What to do with a step in which a gradient is not finite. 'skip': nothing is updated or counted, and the schedule
            stands still. 'raise': the same, with `NonfiniteGradients`, which names the parameters; then `update` may follow.
            'ignore': update as if nothing were wrong.
        """
        if nonfinite not in _POLICIES:
            raise ValueError(f'`nonfinite` must be one of {one_of(_POLICIES)}. Received: nonfinite={nonfinite!r}.')
        accumulate = getattr(self._trainer, '_accumulate', None)
        if accumulate is not None:
            accumulate._require_none_waiting()
        if self._phase != 'unscaled':
            self._require('step', 'scaled')
            self.unscale()
        if self._finite or nonfinite == 'ignore':
            self._phase = 'updating'
            try:
                self._trainer.update(batch_size, ignore_stale_grad)
            except BaseException:
                self._phase = 'unscaled'
                raise
            self._end_step()
            if _number(batch_size):  # so that nothing saved contains the scale
                self._trainer._optimizer.rescale_grad = self._trainer._scale / batch_size
            return True
        kinds = find_nonfinite(self._trainer) if nonfinite == 'raise' else {}
        self._end_step()
        if nonfinite == 'raise':
            raise NonfiniteGradients(kinds, self._loss_scale)
        return False

    def update(self) -> None:
        """Adapt the loss scale to what the step found. Once per step, after `step`."""
        self._require('update', 'stepped')
        self._phase, before = 'idle', self._loss_scale
        self._loss_scale, self._unskipped = self._next()
        if not self._finite and before * self._backoff_factor < self._min_scale:
            raise ValueError(f'The loss scale must not fall below min_scale={self._min_scale:g}. Received: gradients that are not '
                             f'finite at {before:g} either. Look for the reason in the net: '
                             'go.gradients.find_nonfinite(trainer) names the parameters.')
        if self._loss_scale != before:
            log.info('loss scale %g -> %g%s', before, self._loss_scale, '' if self._finite else ': gradients were not finite')

    def _next(self) -> Tuple[float, int]:
        """Scale and number of good steps after this one."""
        if not self._finite:
            return max(self._loss_scale * self._backoff_factor, self._min_scale), 0
        if self._unskipped + 1 < self._scale_window:
            return self._loss_scale, self._unskipped + 1
        return max(min(self._loss_scale * self._scale_factor, self._max_scale), self._loss_scale), 0  # loaded, it may be above

    def _end_step(self) -> None:
        if not self._finite:
            for parameter in self._trainer._params:
                if parameter.grad_req != 'null':
                    _set_fresh(parameter, False)  # or ignore_stale_grad would use it in the next step
        self._trainer._scale = self._trainer._amp_original_scale
        self._phase = 'stepped'

    def _require(self, method: str, *phases: str) -> None:
        if getattr(self._trainer, '_amp_loss_scaler', None) is not self:
            raise ValueError('The trainer has another loss scaler by now. Received: a Scaler that it no longer has. Use the last '
                             'one that was made for it, and leave out amp.init_trainer.')
        if self._phase not in phases:
            after = {'idle': 'update() or nothing', 'scaled': 'scale()', 'unscaled': 'unscale()', 'stepped': 'step()',
                     'updating': 'step(), which has not ended'}[self._phase]
            raise ValueError('The order of a step is scale, backward, unscale, clip, step, update. Received: '
                             f'{method}() after {after}.')

    def has_overflow(self, params: Any) -> bool:
        """What `Trainer.update` asks AMP's scaler, too: whether to leave the update out. ``params`` are the trainer's.

        Where `trainer.step` was called instead of `step`, with gradients of a scaled loss, this does what `step` and `update` do.
        """
        trainer = self._trainer
        if self._phase == 'updating' or (self._phase in ('idle', 'stepped') and trainer._scale == trainer._amp_original_scale):
            return False
        _check_own_update(trainer)
        if self._phase != 'unscaled':
            with autograd.pause():
                self._finite = all_finite([gradient.arrays[0] for gradient in _gradients(trainer, fresh_only=True)])
        self._end_step()
        self.update()
        return not self._finite

    # -- saved state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> Dict[str, float]:
        """Numbers by name, as a checkpoint has them. Between `step` and `update`: as they will be after `update`.

        The names are those of AMP's scaler where it has the same: ``loss_scale, next_loss_scale, scale_seq_len`` (scale_window),
        ``max_loss_scale, unskipped`` (good steps since the last change); and ``scale_factor, backoff_factor, min_loss_scale``.
        """
        found = {key: getattr(self, '_' + name) for key, name in _KEYS.items()}
        if self._phase == 'stepped':
            found['loss_scale'], found['unskipped'] = self._next()
        return dict(found, next_loss_scale=found['loss_scale'])

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from what `state_dict` returned, or AMP's scaler had. ValueError for anything else: nothing is changed."""
        vars(self).update(self.read_state(state, 'file')[0])

    def read_state(self, state: Mapping[str, Any], hyperparameters: str) -> Tuple[Dict[str, Any], List[str]]:
        """The attributes that follow from the saved ``state``, and one sentence for each setting that differs. ValueError for
        one that is not a scaler's."""
        missing, unknown = {'loss_scale', 'unskipped'} - set(state), set(state) - set(_KEYS) - {'next_loss_scale'}
        if missing or unknown:
            raise ValueError(f'The state of a loss scaler must have {one_of([*_KEYS, "next_loss_scale"])}. Received: '
                             f'{one_of(sorted(state))}.')
        state = dict(state, loss_scale=state.get('next_loss_scale', state['loss_scale']))  # AMP's decision for the next step
        whole = ('unskipped', 'scale_seq_len')
        wrong = [key for key, value in state.items() if not _number(value) or not 0 <= value < math.inf
                 or (key != 'unskipped' and value == 0) or (key in whole and type(value) is not int)]
        if wrong:
            raise ValueError('The state of a loss scaler must be positive numbers, of steps whole ones. Received: '
                             f'{ {key: state[key] for key in wrong} }.')
        here = {key: getattr(self, '_' + name) for key, name in _KEYS.items() if key not in _PROGRESS}
        kept = 'file' if hyperparameters == 'file' else 'trainer'
        notes = [f'{_KEYS[key]} of the loss scaler is {value!r} in the trainer and {state[key]!r} in the file: '
                 f"the {kept}'s applies." for key, value in here.items() if state.get(key, value) != value]
        taken = _KEYS if hyperparameters == 'file' else _PROGRESS
        attributes = {'_' + _KEYS[key]: state[key] for key in taken if key in state}
        return {**attributes, '_phase': 'idle', '_finite': True, '_summed': False}, notes


# Accumulation

class Accumulate:
    """One update from the gradients of ``k`` batches, equal to one batch of them all but for rounding:

        accumulate = go.gradients.Accumulate(trainer, k=4)
        for x, y in batches:
            with autograd.record():
                loss = loss_fn(net(x), y)
            loss.backward()
            accumulate.step(len(x))                     # instead of trainer.step; updates at every fourth call

    Parameters
    ----------
    trainer : gluon.Trainer
        With several devices it must have been created with ``update_on_kvstore=False``: gradients are summed over devices once per
        update. Parameters with ``grad_req='add'`` get ``'write'``: the sums are kept here, in float32 for float16. MXNet's own
        'add' loses all batches but the last where a parameter is cast, as in nets that compute float16 weights in float32.
    k : int
        Batches per update.

    Counts and schedule advance by one per update. A checkpoint saved between two updates contains the sums so far, and
    continues from there, if the trainer that loads it has an Accumulate too; if that has another ``k``, it applies, with a
    warning.

    Raises ValueError for a ``k`` below 1, row_sparse gradients and trainers that update on their kvstore; where MXNet has not
    decided that yet, the first `step` raises it. While batches wait for their update, `Trainer.step` and `Scaler.step` raise it.

    >>> import mxnet as mx, gluon_optim as go
    >>> net = mx.gluon.nn.Dense(1, in_units=2)
    >>> net.initialize()
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'novograd')
    >>> accumulate = go.gradients.Accumulate(trainer, k=2)
    >>> for _ in range(4):
    ...     with mx.autograd.record():
    ...         loss = net(mx.nd.ones((8, 2))).sum()
    ...     loss.backward()
    ...     print(accumulate.step(8), end=' ')
    False True False True
    """

    def __init__(self, trainer: TrainerLike, k: int):
        check_trainer(trainer)
        self.k = check_int('k', k, 1)
        sparse = [parameter.name for parameter in trainer._params if getattr(parameter, '_grad_stype', 'default') != 'default']
        if sparse:
            raise ValueError(f'Accumulated gradients must be dense. Received: row_sparse ones of {some_of(sparse)}. Create the '
                             'layer with sparse_grad=False.')
        if trainer._kv_initialized:
            _check_own_update(trainer)  # otherwise in the first `step`: MXNet decides when parameters have their devices
        self._trainer: Any = trainer
        self._sums: Dict[int, List[Any]] = {}   # of each parameter that had a gradient, by its index: one for each device
        self._batches = 0
        self._size = 0.0        # sum of the batch sizes
        self._scale = 1.0       # the loss scale that the sums contain
        self._ready = False     # gradients are complete, for an update that has not succeeded yet
        for parameter in trainer._params:
            if parameter.grad_req == 'add':
                parameter.grad_req = 'write'
        vars(trainer)['_accumulate'] = self
        for name in ('step', 'update'):
            vars(trainer)[name] = self._guarded(name)

    def __repr__(self) -> str:
        return f'<Accumulate: {self._batches} of {self.k} batches>'

    def step(self, batch_size: float, before_update: Optional[Callable[[], Any]] = None, nonfinite: Optional[str] = None,
             ignore_stale_grad: bool = False) -> bool:
        """Add the gradients of a batch; at every ``k``-th update the weights. Returns whether they were updated.

        Parameters
        ----------
        batch_size : float
            Of this batch, as for `Trainer.step`: the update divides by the sum over the batches. With losses that are means
            pass 1.
        before_update : callable, optional
            Called before an update, when the gradients are complete: ``lambda: go.gradients.clip_by_global_norm(trainer, 1.0)``.
        nonfinite : 'skip', 'raise' or 'ignore', optional
            As for `Scaler.step`, if the trainer has a Scaler, of which only `scale` is left to call; otherwise leave it out.
        ignore_stale_grad : bool
            As for `Trainer.step`; a parameter is stale if none of the batches has a gradient for it.
        """
        if not _number(batch_size) or not 0 < batch_size < math.inf:
            raise ValueError(f'`batch_size` must be a number above 0. Received: batch_size={batch_size!r}.')
        self._check(nonfinite)
        if self._ready:
            raise ValueError('The update must be done first, which an error has stopped. Received: another batch. Call finish().')
        _check_own_update(self._trainer)
        scaler = _scaler(self._trainer)
        if scaler is not None:
            scaler._require('accumulate.step', 'scaled')
        _gradients(self._trainer, fresh_only=True)
        with autograd.pause():
            self._rescale()
            self._take()
        self._batches += 1
        self._size += batch_size
        return self._batches >= self.k and self.finish(before_update, nonfinite, ignore_stale_grad)

    def finish(self, before_update: Optional[Callable[[], Any]] = None, nonfinite: Optional[str] = None,
               ignore_stale_grad: bool = False) -> bool:
        """Update from the batches so far, as at the end of an epoch; arguments as for `step`. False where there are none."""
        self._check(nonfinite)
        if not self._batches:
            return False
        trainer, scaler = self._trainer, _scaler(self._trainer)
        if not self._ready:
            _check_own_update(trainer)
            if scaler is not None:
                scaler._begin_step()  # after a checkpoint was loaded no batch may have followed
            with autograd.pause():
                self._rescale()
                self._give()
            (trainer.allreduce_grads if scaler is None else scaler.unscale)()
            self._ready = True
        if before_update is not None:
            before_update()
        if scaler is None:
            trainer.update(self._size, ignore_stale_grad)
            self._reset()
            return True
        try:
            return scaler.step(self._size, nonfinite or 'skip', ignore_stale_grad)
        finally:
            if scaler._phase == 'stepped':
                self._reset()
                scaler.update()

    def _guarded(self, name: str) -> Callable[..., None]:
        """The method ``name`` of the trainer, with an error where it would leave out batches that wait for their update."""
        trainer, method = self._trainer, getattr(type(self._trainer), name)

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> None:
            self._require_none_waiting()
            method(trainer, *args, **kwargs)
        return guarded

    def _require_none_waiting(self) -> None:
        if self._batches and not self._ready:
            raise ValueError(f'An update must be from all batches so far. Received: one without the {self._batches} that are '
                             'accumulated. Call accumulate.step(batch_size) for each batch, or accumulate.finish() first. Nothing '
                             'was updated.')

    def _check(self, nonfinite: Optional[str]) -> None:
        if self._trainer._accumulate is not self:
            raise ValueError('The trainer has another Accumulate by now. Received: one that it no longer has. Use the last one.')
        if nonfinite is not None and _scaler(self._trainer) is None:
            raise ValueError(f'`nonfinite` is for trainers with a Scaler. Received: nonfinite={nonfinite!r} and none. Create '
                             'go.gradients.Scaler(trainer), with init_scale=1, scale_factor=1 and backoff_factor=1 for no scale.')

    def _rescale(self) -> None:
        """Bring the sums to the present loss scale: a checkpoint may have come from a run with another Scaler, or without."""
        scale = 1 / unit_of(self._trainer, None)
        if scale != self._scale:
            for totals in self._sums.values():
                multiply(totals, scale / self._scale)
            self._scale = scale

    def _take(self) -> None:
        """Add the new gradients to the sums."""
        for i, parameter in self._trained():
            if not _is_fresh(parameter):
                continue
            arrays = _grad(parameter)
            if i not in self._sums:
                self._sums[i] = [nd.zeros(array.shape, array.context, compute_type(numpy.dtype(array.dtype).name))
                                 for array in arrays]
            for total, array, data in zip(self._sums[i], arrays, parameter._data or ()):
                if data._fresh_grad:
                    add(total, array)
            _set_fresh(parameter, False)

    def _give(self) -> None:
        """Make the sums the gradients."""
        for i, parameter in self._trained():
            if i in self._sums:
                for array, total in zip(_grad(parameter), self._sums[i]):
                    nd.cast(total, dtype=numpy.dtype(array.dtype).name, out=array)
                _set_fresh(parameter, True)

    def _reset(self) -> None:
        self._sums, self._batches, self._size, self._scale, self._ready = {}, 0, 0.0, 1.0, False

    def _trained(self) -> List[Tuple[int, ParameterLike]]:
        return [(i, parameter) for i, parameter in enumerate(self._trainer._params)
                if parameter.grad_req != 'null' and parameter._data is not None]

    # -- saved state ------------------------------------------------------------------------------------------------

    def variables(self, copy: Callable[[Any], Any]) -> Dict[str, Any]:
        """What a checkpoint needs: ``k``, and if there are batches that no update has used, their number and size, the loss scale,
        and the sums on each device."""
        found: Dict[str, Any] = {BATCHES_PER_UPDATE: numpy.array(self.k)}
        if self._batches:
            found[ACCUMULATED] = numpy.array([self._batches, self._size, self._scale])
        for i, totals in self._sums.items():
            found.update((f'{ACCUMULATED}:{i}:{k}', copy(total)) for k, total in enumerate(totals))
        return found

    def read(self, states: OptimizerStates, pairs: Mapping[int, ParameterInfo]) -> Tuple[Dict[str, Any], List[str]]:
        """The attributes that follow from saved `variables`, on the devices of the trainer, and one sentence if ``k`` differs.
        ValueError for those that do not fit."""
        k = states.variables.get(BATCHES_PER_UPDATE, numpy.array(self.k))  # older files do not have it
        if k.shape != () or k.dtype.kind != 'i' or k < 1:
            raise ValueError(f'`k` of Accumulate must be a whole number, 1 or more. Received from the file: {k!r:.200}.')
        notes = [] if k == self.k else [f"k of Accumulate is {self.k} in the script and {k} in the file: the script's applies."]
        batches, size, scale = _checked_progress(states.variables.get(ACCUMULATED), self.k)
        saved, sums = {info.name: j for j, info in enumerate(states.parameters)}, {}
        for i, parameter in self._trained():
            copies = _saved_copies(states.variables, saved[pairs[i].name]) if i in pairs else []
            dtype = compute_type(numpy.dtype(parameter.dtype).name)
            arrays = _grad(parameter)
            if any(copy.shape != array.shape or copy.dtype != dtype for copy in copies for array in arrays):
                raise ValueError(f'The accumulated gradient of {parameter.name} must be {dtype}{list(arrays[0].shape)}. Received '
                                 f'from the file: {copies[0].dtype}{list(copies[0].shape)}.')
            if copies and len(copies) != len(arrays):  # they are summed over the devices later
                copies = [sum(copies), *(numpy.zeros_like(copies[0]) for _ in arrays[1:])]
            if copies:
                sums[i] = [nd.array(copy, array.context, dtype) for copy, array in zip(copies, arrays)]
        return {'_sums': sums, '_batches': batches, '_size': size, '_scale': scale, '_ready': False}, notes


def _checked_progress(saved: Optional[numpy.ndarray], k: int) -> Tuple[int, float, float]:
    if saved is None:
        return 0, 0.0, 1.0
    if saved.shape != (3,) or saved.dtype != numpy.float64 or not numpy.isfinite(saved).all() or not saved.min() > 0:
        raise ValueError('Accumulation must have three numbers: of batches, their size and the loss scale. Received from the file: '
                         f'{saved!r:.200}.')
    if saved[0] >= k:
        raise ValueError(f'The file has the gradients of {saved[0]:g} batches. Received: an Accumulate of k={k}, which would have '
                         'updated before. Create it with the same k as in the run that was saved.')
    return int(saved[0]), float(saved[1]), float(saved[2])


def _saved_copies(variables: Mapping[str, numpy.ndarray], j: int) -> List[numpy.ndarray]:
    """The accumulated gradient of the saved parameter ``j`` on each device."""
    copies: List[numpy.ndarray] = []
    while f'{ACCUMULATED}:{j}:{len(copies)}' in variables:
        copies.append(variables[f'{ACCUMULATED}:{j}:{len(copies)}'])
    return copies
