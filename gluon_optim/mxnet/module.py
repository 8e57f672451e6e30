"""Checkpoints of an `mx.mod.Module`, beside the files that MXNet's own callbacks write.

    begin = go.load_module_checkpoint(module, 'run/model')     # 0 where there is none yet
    module.fit(data, num_epoch=100, begin_epoch=begin, epoch_end_callback=go.module_checkpoint(module, 'run/model'))

docs/CHECKPOINTS.md says what is guaranteed. A Module becomes a `ModuleTrainer`, from then on it goes the way of a `gluon.Trainer`.
"""
import contextlib
import logging
import os
import re
import time
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy
from mxnet.module import BucketingModule, Module
from mxnet.optimizer import LBSGD

from ..models.gluon import facts_of_symbol
from ..schema import check_int, one_of
from ..states import atomic, container
from ..states.model import Array, Parts
from ..states.mxnet_files.writer import write_params
from .checkpoint import called, checked_run, newest_intact, restore, take
from .trainer import Pieces, StandIn
from .weights import send_weights

__all__ = ['load_module_checkpoint', 'module_checkpoint']

log = logging.getLogger('gluon_optim')


def module_checkpoint(module: Any, prefix: container.Path, period: int = 1) -> Callable[..., None]:
    """A callback that saves, at the end of each ``period``-th epoch, everything that `Module.fit` needs to continue.

    Parameters
    ----------
    module : mx.mod.Module or mx.mod.BucketingModule
        The one that is trained.
    prefix : str or os.PathLike
        As for `mx.callback.do_checkpoint`, which this replaces: after the first epoch ``prefix-symbol.json``
        and ``prefix-0001.params`` are MXNet's, for `mx.model.load_checkpoint` and `Module.load`. ``prefix-0001.safetensors`` has
        weights, auxiliary states, the optimizer's states and counts, its schedule and the random state. It is written last:
        where it is, all are. The folder is created.
    period : int
        How many epochs to wait before saving.

    Returns
    -------
    callback : function
        For ``epoch_end_callback`` of `Module.fit`.

    Raises TypeError for anything but a Module, and ValueError for a ``period`` below 1 or a Module that has its states on parameter
    servers. The callback raises what `save_checkpoint` does, ValueError for a Module that is not bound or has no optimizer, and
    warns if there are later epochs under ``prefix``.

    >>> import logging, tempfile, gluon_optim as go, mxnet as mx
    >>> def train(epochs, prefix):
    ...     net = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=1, name='fc')
    ...     module = mx.mod.Module(mx.sym.LinearRegressionOutput(net, mx.sym.var('label')), label_names=['label'],
    ...                            logger=logging.getLogger('quiet'))
    ...     data = mx.io.NDArrayIter(mx.nd.ones((8, 2)), mx.nd.ones((8, 1)), 4, label_name='label')
    ...     module.bind(data.provide_data, data.provide_label)
    ...     module.init_params()
    ...     module.init_optimizer(optimizer='adamw')
    ...     begin = go.load_module_checkpoint(module, prefix)
    ...     module.fit(data, eval_metric='mse', num_epoch=epochs, begin_epoch=begin,
    ...                epoch_end_callback=go.module_checkpoint(module, prefix))
    ...     return begin, module._optimizer.num_update
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     train(2, f'{folder}/model'), train(3, f'{folder}/model')  # two epochs of two batches, and the third
    ((0, 4), (2, 6))
    """
    _check_module(module)
    if module.optimizer_initialized:  # else it is asked when the callback is called
        _check_place(module)
    checkpoints, period, asked = _Checkpoints(prefix), check_int('period', period, 1), False

    def callback(epoch: int, symbol: Any = None, arg_params: Any = None, aux_params: Any = None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            checkpoints.look_around(epoch + 1)
        if (epoch + 1) % period == 0:
            checkpoints.save(module, epoch + 1)

    return callback


def load_module_checkpoint(module: Any, prefix: container.Path, epoch: Optional[int] = None) -> int:
    """Bring a Module back to the end of an epoch that `module_checkpoint` saved, bit for bit.

    Everything is checked first. A Module that does not fit, or a load that fails, leaves it unchanged.

    Parameters
    ----------
    module : mx.mod.Module or mx.mod.BucketingModule
        Bound, with parameters and an optimizer, as for a new run: after `bind`, `init_params` and `init_optimizer`.
    prefix : str or os.PathLike
        As for `module_checkpoint`.
    epoch : int, optional
        Which one. By default the newest that is complete and intact; damaged ones are skipped, with a warning logged to
        'gluon_optim'.

    Returns
    -------
    epoch : int
        The number of epochs that have been trained, to be passed to `Module.fit` as ``begin_epoch``; 0 where there is no checkpoint
        yet and ``epoch`` is None.

    Raises ValueError for a Module that is not bound, has no optimizer, or has its states on parameter servers, if there is no
    checkpoint of ``epoch``, and where parameters, shapes or the optimizer differ; StateFileError (a ValueError) for a damaged
    file, or if all are; OSError if one cannot be read; TypeError for anything but a Module.

    >>> import tempfile, gluon_optim as go, mxnet as mx
    >>> net = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=1, name='fc')
    >>> module = mx.mod.Module(mx.sym.LinearRegressionOutput(net, mx.sym.var('label')), label_names=['label'])
    >>> module.bind([('data', (4, 2))], [('label', (4, 1))])
    >>> module.init_params()
    >>> module.init_optimizer(optimizer='novograd')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     begin = go.load_module_checkpoint(module, f'{folder}/model')
    ...     go.module_checkpoint(module, f'{folder}/model')(epoch=0)
    ...     begin, go.load_module_checkpoint(module, f'{folder}/model')
    (0, 1)
    """
    subject, checkpoints = _subject(module), _Checkpoints(prefix)
    if epoch is not None:
        path = checkpoints.path(check_int('epoch', epoch, 1))
        if epoch not in checkpoints.epochs():
            raise ValueError(f'`epoch` must have a checkpoint with the prefix {checkpoints.prefix!r}. Received: epoch={epoch}. '
                             f'Available: {", ".join(map(str, checkpoints.epochs())) or "none"}.')
        parts = container.read_parts(path)
    else:
        newest = newest_intact(map(checkpoints.path, reversed(checkpoints.epochs())), f'{checkpoints.prefix}-*.safetensors')
        if newest is None:
            return 0
        path, parts = newest
    _check_devices(path, parts, subject)
    restored = restore(path, parts, None, subject, True, 'file')
    return int(os.path.basename(path)[:-len('.safetensors')].rpartition('-')[2]) if restored.epoch is None else restored.epoch


class _Checkpoints:
    """The files of one prefix."""

    def __init__(self, prefix: container.Path):
        self.prefix = os.fspath(prefix)
        self.folder, self.name = os.path.split(self.prefix)
        self._pattern = re.compile(re.escape(self.name) + r'-([0-9]{4,15})\.safetensors')

    def path(self, epoch: int) -> str:
        return f'{self.prefix}-{epoch:04d}.safetensors'

    def epochs(self) -> List[int]:
        """The epochs with checkpoints, in ascending order."""
        try:
            names = os.listdir(self.folder or os.curdir)
        except FileNotFoundError:
            return []
        epochs = [int(match[1]) for match in map(self._pattern.fullmatch, names) if match]
        return sorted(epoch for epoch in epochs if os.path.isfile(self.path(epoch)))

    def look_around(self, epoch: int) -> None:
        later = [other for other in self.epochs() if other > epoch]
        if later:
            numbers = ', '.join(map(str, later))
            warnings.warn(f'{self.prefix!r} has checkpoints of later epochs, {numbers}: load_module_checkpoint will '
                          f'load {later[-1]}, not epoch {epoch}, which ends now. Delete them, or give each run its own prefix.',
                          stacklevel=3)

    def save(self, module: Any, epoch: int) -> None:
        begun = time.monotonic()
        subject, run = _subject(module), checked_run(None, epoch, None, None, None)
        trainers = list(subject.values()) if isinstance(subject, dict) else [subject]
        trainers[0].pull()
        parts = take(run, None, subject, Pieces, True)
        os.makedirs(self.folder or os.curdir, exist_ok=True)
        own = re.compile(re.escape(self.name) + r'-([0-9]{4,15}\.(safetensors|params)|symbol\.json)')
        atomic.remove_leftovers(self.folder or os.curdir, own)
        with atomic.replacing(f'{self.prefix}-symbol.json') as file:
            file.write(trainers[0].symbol.tojson(remove_amp_cast=True).encode())
        write_params(f'{self.prefix}-{epoch:04d}.params', _as_params(parts, trainers[0].auxiliary))
        container.write_parts(self.path(epoch), parts)
        log.info('saved %s in %.2f s: %s', called(run), time.monotonic() - begun, self.path(epoch))


def _as_params(parts: Parts, auxiliary: List[str]) -> Dict[str, Array]:
    """The weights under MXNet's names. It saves the mean where devices differ."""
    copies: Dict[str, List[Array]] = {}
    for _, run in parts.values():
        for weight in run.weights if run else ():
            copies.setdefault(weight.name, []).extend(weight.copies)
    return {f'{"aux" if name in auxiliary else "arg"}:{name}': arrays[0] if len(arrays) == 1 else _mean(arrays)
            for name, arrays in copies.items()}


def _mean(copies: List[Any]) -> numpy.ndarray:
    arrays = [copy.array.asnumpy() for copy in copies]
    same = all(array.tobytes() == arrays[0].tobytes() for array in arrays)
    return arrays[0] if same else numpy.mean(arrays, axis=0).astype(arrays[0].dtype)


# A Module in the words of a Trainer

def _check_module(module: Any) -> None:
    if not isinstance(module, (Module, BucketingModule)):
        raise TypeError(f'`module` must be an mx.mod.Module or a BucketingModule. Received: {type(module).__name__}.')


def _subject(module: Any) -> Any:
    """What is saved and restored: one `ModuleTrainer`, or one for each device where each trains on its own."""
    _check_module(module)
    for there, what, call in ((module.binded, 'bound', 'bind'), (module.params_initialized, 'initialized', 'init_params'),
                              (module.optimizer_initialized, 'given an optimizer', 'init_optimizer')):
        if not there:
            raise ValueError(f'`module` must be bound, and have parameters and an optimizer. Received: one that was not {what}. '
                             f'Call module.{call}(...) first.')
    if not module.for_training:
        raise ValueError('`module` must be bound for training. Received: one with for_training=False.')
    _check_place(module)
    devices = len(_inner(module)._context)
    if devices > 1 and _inner(module)._kvstore is None:
        if isinstance(_inner(module)._optimizer, LBSGD):
            raise ValueError('The states must be those of one device, or the same on all. Received: lbsgd on several contexts with '
                             'kvstore=None, which keeps the gradients of all of them together. Pass a kvstore to init_optimizer.')
        return {f'device{k}': ModuleTrainer(module, [k]) for k in range(devices)}
    return ModuleTrainer(module, range(devices))


def _check_place(module: Any) -> None:
    """A Module calls what is on servers by names, of which MXNet makes numbers of its own."""
    inner = _inner(module)
    if inner._update_on_kvstore and 'dist' in inner._kvstore.type:
        raise ValueError(f'The states of a Module must be in this process. Received: kvstore {inner._kvstore.type!r}, which '
                         'keeps them on its servers. Set MXNET_UPDATE_ON_KVSTORE=0 in the environment of the workers.')


def _inner(module: Any) -> Any:
    """The Module that holds all parameters."""
    return module._buckets[module._default_bucket_key] if isinstance(module, BucketingModule) else module


def _check_devices(path: str, parts: Parts, subject: Any) -> None:
    here, there = list(subject) if isinstance(subject, dict) else [''], list(parts)
    if here != there:
        raise ValueError(f'The module must have the contexts of the one that was saved, {_contexts_in_words(there)}, because '
                         f'without a kvstore each trains on its own. Received: {_contexts_in_words(here)}, for {path!r}. '
                         'Nothing was changed.')


def _contexts_in_words(parts: List[str]) -> str:
    if parts == ['']:
        return 'one or with a kvstore'
    return f'{len(parts)} without a kvstore' if all(re.fullmatch('device[0-9]+', part) for part in parts) else one_of(parts)


class ModuleTrainer(StandIn):
    """A Module, or some of its ``devices``, with the attributes of a `gluon.Trainer`."""

    word = 'module'

    def __init__(self, module: Any, devices: Any):
        inner = _inner(module)
        group, store = inner._exec_group, inner._kvstore
        self._module, self._devices_of_it, self._all = module, list(devices), len(inner._context)
        self.symbol, self.auxiliary = inner._symbol, list(group.aux_names)
        self._optimizer, self._kvstore, self._update_on_kvstore = inner._optimizer, store, bool(inner._update_on_kvstore)
        self._updaters = [inner._updater] * len(self._devices_of_it)
        self._contexts = self._devices = [inner._context[k] for k in self._devices_of_it]
        self._distributed, self._kv_initialized = bool(store and 'dist' in store.type), True
        self._params_to_init: List[Any] = []
        arguments = zip(group.param_names, group.param_arrays)
        self._params = [self._parameter(name, arrays, group.grad_req.get(name, 'null')) for name, arrays in arguments]
        self._arguments = len(self._params)
        self._params += [self._parameter(name, arrays, 'null') for name, arrays in zip(group.aux_names, group.aux_arrays)]
        for index, parameter in enumerate(self._params):
            parameter.lr_mult, parameter.wd_mult = (self._multiplier(which, index) for which in ('lr_mult', 'wd_mult'))
        self._reset_kvstore = self._init_kvstore = self._init_params = lambda: None  # see `weights_written`

    def _parameter(self, name: str, arrays: List[Any], grad_req: str) -> 'ModuleParameter':
        return ModuleParameter(name, [arrays[k] for k in self._devices_of_it], grad_req)

    def _multiplier(self, which: str, index: int) -> float:
        """As `Optimizer._get_lrs` and `_get_wds` find it."""
        key, table, names = self.keys(index)[0], getattr(self._optimizer, which), self._optimizer.idx2name
        return float(table[key] if key in table else table.get(names.get(key), 1.0))

    def keys(self, index: int) -> List[Any]:
        """A name in a kvstore's updater; in that of all devices a number for each of them."""
        if self._update_on_kvstore:
            return [self._params[index].name]
        return [index * self._all + k for k in self._devices_of_it]

    def facts(self) -> Dict[str, Any]:
        return facts_of_symbol(self.symbol).record()

    def pull(self) -> None:
        """Let all devices have the weights of the kvstore: `Module.fit` has written their mean, which may be rounded."""
        for parameter in self._stored():
            self._kvstore.pull(parameter.name, parameter._data)

    def weights_written(self, undo: contextlib.ExitStack) -> None:
        """Make all copies that MXNet keeps of the weights those on the devices."""
        self._module._params_dirty = _inner(self._module)._params_dirty = True  # those on the host are read from them when needed
        stored = {parameter.name: parameter._data[0].copy() for parameter in self._stored()}
        for name, array in stored.items():
            self._kvstore.pull(name, array)
        if stored:
            undo.callback(send_weights, self._kvstore, stored.items())
            send_weights(self._kvstore, [(parameter.name, parameter._data[0]) for parameter in self._stored()])

    def _stored(self) -> List['ModuleParameter']:
        """The parameters of which a kvstore has a copy, which it updates."""
        return self._params[:self._arguments] if self._update_on_kvstore else []


class ModuleParameter:
    """An argument of a Module, or an auxiliary state, with the attributes of a `gluon.Parameter`."""

    lr_mult = wd_mult = 1.0
    _deferred_init = ()
    _trainer = None

    def __init__(self, name: str, arrays: List[Any], grad_req: str):
        self.name, self._data, self.grad_req = name, arrays, grad_req
        self.shape: Tuple[int, ...] = tuple(arrays[0].shape)
        self.dtype, self._stype = arrays[0].dtype, arrays[0].stype

    def list_ctx(self) -> List[Any]:
        return [array.context for array in self._data]

    def list_data(self) -> List[Any]:
        return self._data

    def _check_and_get(self, arrays: Any, context: Any) -> Any:
        return arrays
