"""What a worker does for a store whose servers update the weights."""
import pickle
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy
from mxnet import ndarray as nd
from mxnet.base import py_str

from ... import __version__
from ...rules.servers import check_servers
from .protocol import ServerError, bound, introduction, number_of_servers, read_status, status_keys, status_size
from .server import Command

__all__ = ['Session', 'send', 'send_optimizer', 'session']

_SET_OPTIMIZER, _SET_MULTI_PRECISION = 0, 1  # MXNet's numbers of its commands
_COUNTED = ('num_update', '_index_update_count', '_all_index_update_counts', '_restored_counts', 'lr_scheduler')
_FIXED = ('multi_precision', 'begin_num_update', 'idx2name', 'sym_info', 'allow_np_array', 'use_fused_step', 'aggregate_num')


def session(store: Any) -> Optional['Session']:
    """What goes on between this worker and the servers of ``store``; None where they run no optimizer of this package."""
    # not in a table of stores: it knows the trainer, which has the store, so that none of them would ever be freed
    found: Optional[Session] = vars(store).get('gluon_optim')
    return found


def send_optimizer(store: Any, optimizer: Any) -> None:
    """In place of `KVStore.set_optimizer`: send the servers of ``store`` an optimizer of this package, with its multipliers.

    Raises ValueError, and sends nothing, where servers would compute something else than one process.
    """
    parameters = list(optimizer.param_dict.values())  # none in a Module
    status_size(bound())
    new = Session(store, optimizer)
    new.check({parameter.name: parameter for parameter in parameters if parameter.grad_req != 'null'})
    send(store, 'optimizer', optimizer.for_servers())
    if optimizer.multi_precision:
        store._send_command_to_servers(_SET_MULTI_PRECISION, '')
    store.gluon_optim = new
    trainer = getattr(parameters[0], '_trainer', None) if parameters else None
    if trainer is not None and trainer._optimizer is optimizer:
        _let_batch_sizes_change(trainer)


def send(store: Any, kind: str, *arguments: Any) -> None:
    """Have a command executed on all servers."""
    store._send_command_to_servers(_SET_OPTIMIZER, py_str(pickle.dumps(Command(kind, *arguments), 0)))


def _let_batch_sizes_change(trainer: Any) -> None:
    """MXNet's way is a UserWarning, raised: it cannot tell the servers."""
    def rescale(scale: float) -> None:
        trainer._optimizer.rescale_grad = scale
    trainer._check_and_rescale_grad = rescale


class Session:
    """Keeps the optimizer on the servers of a store like ``optimizer``, the one here.

    Before each step all weights of the last one have arrived, so that all updates are done: what a worker sends then holds from
    the next one on, which cannot be made before this worker has pushed its gradients.
    """

    def __init__(self, store: Any, optimizer: Any):
        self.optimizer = optimizer
        self.steps = 0                          # that were begun here
        self._asynchronous = 'async' in store.type
        before = session(store)                 # keys can be initialised only once
        self._keys: List[Any] = before._keys if before is not None else []      # of what each server says
        self._statuses: List[Any] = before._statuses if before is not None else []
        self.note()
        self._slots = optimizer.rule.slots(optimizer.hyperparameters())

    def note(self) -> None:
        """The servers have the optimizer as it is here."""
        scheduler = self.optimizer.lr_scheduler
        self._sent, self._scheduler, self._sent_of_scheduler = (
            _attributes(self.optimizer), scheduler, _attributes_of_scheduler(scheduler))

    def check(self, weights: Mapping[str, Any]) -> None:
        """ValueError where servers would not update ``weights``, parameters or arrays, as one process does. Asked once."""
        if not self.steps:
            optimizer = self.optimizer
            check_servers(optimizer.rule, optimizer.hyperparameters(), optimizer.multi_precision,
                          {name: int(numpy.prod(weight.shape)) for name, weight in weights.items()},
                          {numpy.dtype(weight.dtype).name for weight in weights.values()},
                          number_of_servers(), bound())

    def before_push(self, store: Any, weights: Sequence[Any], named: bool) -> None:
        """To be called before the gradients of each step are pushed. ``weights`` were pulled in the last one.

        Raises ServerError where a server has failed, ValueError or TypeError for changes that cannot be made.
        """
        if not self._keys:
            self._open(store, named)
        for weight in weights:
            weight.wait_to_read()
        self._check(store)
        self._send_changes(store)
        self.steps += 1

    def _open(self, store: Any, named: bool) -> None:
        size = status_size(bound())
        keys = status_keys(number_of_servers(), named)
        first = nd.zeros((size,))
        first._sync_copyfrom(introduction(size))
        store.init(keys, [first] * len(keys))
        store.push(keys, [nd.zeros((size,))] * len(keys))
        self._keys, self._statuses = keys, [nd.zeros((size,)) for _ in keys]

    def _check(self, store: Any) -> None:
        store.pull(self._keys, self._statuses)
        for number, array in enumerate(self._statuses):
            status = read_status(array.asnumpy())
            if status is None:
                raise ServerError(f'Parameter server {number} of {len(self._keys)} does not run gluon_optim {__version__}: its '
                                  'standard error says why. Install it there, in the Python that starts the server, or pass '
                                  'update_on_kvstore=False.')
            if status['version'] != __version__:
                raise ServerError(f'Workers and servers must run the same gluon_optim. Received: {__version__} here, '
                                  f'{status["version"]} on server {status["server"]}.')
            # others may have made a wrong change for the step that begins: all must make it, and stop before the next
            if status['error'] and (self._asynchronous or status['step'] <= self.steps):
                raise ServerError(f'The optimizer failed on parameter server {status["server"]}, which updates no more weights: '
                                  f'{status["error"]}')

    def _send_changes(self, store: Any) -> None:
        scheduler = self.optimizer.lr_scheduler
        attributes, of_scheduler = _attributes(self.optimizer), _attributes_of_scheduler(scheduler)
        changed = _difference(self._sent, attributes)
        changed_in_scheduler: Mapping[str, bytes] = {}
        if scheduler is not self._scheduler:
            changed['lr_scheduler'] = pickle.dumps(scheduler)
        else:
            changed_in_scheduler = _difference(self._sent_of_scheduler, of_scheduler)
        if changed or changed_in_scheduler:
            self._check_changes(changed)
            send(store, 'change', self.steps + 1, store.rank, changed, changed_in_scheduler)
            self._sent, self._scheduler, self._sent_of_scheduler = attributes, scheduler, of_scheduler

    def _check_changes(self, changed: Mapping[str, bytes]) -> None:
        fixed = sorted(set(changed).intersection(_FIXED))
        if fixed:
            raise ValueError(f'`{fixed[0]}` cannot be changed once the servers have the optimizer. Received: '
                             f'{getattr(self.optimizer, fixed[0])!r:.100}. Set it before the first step.')
        h = self.optimizer.hyperparameters()
        if self.optimizer.rule.slots(h) != self._slots:
            raise ValueError(f'A change may not alter which states {self.optimizer.rule.name} keeps, once servers have them. '
                             f'Received: {h}. Set it before the first step.')


def _attributes(optimizer: Any) -> Dict[str, bytes]:
    """What may be changed by hand, pickled: two are compared, and are no longer what may change."""
    state = optimizer.__getstate__()  # with the parameters' multipliers
    left_out = {*_COUNTED, *optimizer.shared_state()}
    found = {name: pickle.dumps(value) for name, value in state.items() if name not in left_out}
    found['_skips'] = pickle.dumps(optimizer._skips)
    return found


def _attributes_of_scheduler(scheduler: Any) -> Dict[str, bytes]:
    """Those of the scheduler here, which only the user changes: it is asked on the servers."""
    return {name: pickle.dumps(value) for name, value in getattr(scheduler, '__dict__', {}).items()}


def _difference(before: Mapping[str, bytes], now: Mapping[str, bytes]) -> Dict[str, bytes]:
    return {name: value for name, value in now.items() if before.get(name) != value}
