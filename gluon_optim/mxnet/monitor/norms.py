"""Norms of weights, gradients and updates, parameter by parameter."""
from types import TracebackType
from typing import Any, Dict, List, NamedTuple, Optional, Type

import numpy
from mxnet import optimizer as mx_optimizer

from ...display import Columns, clipped
from ...rules.compensated import KAHAN, mode_of
from ...schema import check_int
from ...states.atomic import Path
from ..native import Stranger, adapted
from ..trainer import contexts_of
from ..typing import BlockLike, TrainerLike
from .rows import RowFile
from .watched import ScalarWriter, Watched, check_writer, fetched, number, plain, square, update_number, watched

__all__ = ['Norm', 'Norms']

COLUMNS = ('update', 'parameter', 'weight_norm', 'gradient_norm', 'update_norm', 'update_ratio')


class Norm(NamedTuple):
    """Euclidean norms over all elements of a parameter: of its weight before an update, its gradient, and what the update added;
    ``update_ratio`` is update_norm/weight_norm, None where the weight was 0.

    Raises nothing.

    >>> import gluon_optim as go
    >>> go.monitor.Norm(weight_norm=2.0, gradient_norm=1.0, update_norm=0.5, update_ratio=0.25).update_ratio
    0.25
    """

    weight_norm: float
    gradient_norm: float
    update_norm: float
    update_ratio: Optional[float]


class Norms:
    """Norms of weights, gradients and updates, and the ratio of update and weight, around `Trainer.step`.

        weight_norm   = |w_old|
        gradient_norm = |g| rescale_grad        as the update sees it: the sum over devices, divided by the batch size, before
                                                weight decay and the optimizer's own clipping
        update_norm   = |w_new - w_old|
        update_ratio  = |w_new - w_old| / |w_old|

        with norms:
            trainer.step(batch_size)

    Norms are Euclidean, over all elements of a parameter, computed in float64. Of float16 weights with ``multi_precision`` the
    float32 master is looked at, or the weight with its compensation, which move where the rounded weight does not (not of an
    optimizer that is neither ours nor MXNet's: there it is the float16 weight). Where devices have weights of their own, without
    a kvstore, those of the first.

    Parameters
    ----------
    trainer : gluon.Trainer
    net : gluon.Block, optional
        With it, parameters go by their structural names (``0.weight``); otherwise by ``Parameter.name``.
    writer : optional
        Anything with ``add_scalar(tag, value, step)``, such as a ``SummaryWriter`` of tensorboardX, torch.utils.tensorboard or
        mxboard; gets ``weight_norm/NAME``, ``gradient_norm/NAME``, ``update_norm/NAME`` and ``update_ratio/NAME``.
    path : str or os.PathLike, optional
        A CSV file that gets a row for each parameter, after those that it has: the number of the update, the parameter, and the
        four figures. A resumed run cuts off the rows of updates that it makes again.
        Its folder is made if need be.
    every : int
        Look at each update with a number that this divides; others cost nothing.
    params : str, optional
        A pattern of `fnmatch` (``*``, ``?``, ``[seq]``): only the parameters with names that it matches, such as ``'*weight'``.
        Frozen ones are left out.

    ``latest`` has the figures by parameter, `table` shows them. An update that is looked at needs memory for a copy of the
    weights (``params`` limits it), and waits for the device once. There is no state to save: the number of an update is the
    trainer's. An update that the trainer leaves out, because of an overflow say, is not looked at.

    Raises TypeError or ValueError for arguments that are not allowed, and ValueError for updates that servers make, or a trainer
    without a parameter to look at; OSError where ``path`` cannot be written.

    >>> import gluon_optim as go
    >>> import mxnet as mx
    >>> net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
    >>> net.initialize(mx.init.One())
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.5})
    >>> norms = go.monitor.Norms(trainer, net)
    >>> with mx.autograd.record():
    ...     loss = net(mx.nd.ones((4, 2))).sum()
    >>> loss.backward()
    >>> with norms:
    ...     trainer.step(batch_size=4)
    >>> norms.table()
    Norms at update 1
      parameter  weight_norm  gradient_norm  update_norm  update_ratio
      weight         1.41421        1.41421     0.707107           0.5
    """

    def __init__(self, trainer: TrainerLike, net: Optional[BlockLike] = None, writer: Optional[ScalarWriter] = None,
                 path: Optional[Path] = None, every: int = 1, params: Optional[str] = None):
        watched(trainer, net, params)  # raises
        check_writer(writer)
        self.trainer, self.net, self.writer, self.params = trainer, net, writer, params
        self.every = check_int('every', every, 1)
        self._file = None if path is None else RowFile(path, COLUMNS, once=True)
        self._begun: Optional[_Update] = None
        self.update = 0                         # the number of the one that was looked at last
        self.latest: Dict[str, Norm] = {}

    def table(self) -> Columns:
        """The figures of the update that was looked at last, as text, or in a notebook as a table."""
        title = f'Norms at update {self.update}' if self.latest else 'Norms: no update yet'
        return Columns(title, COLUMNS[1:], [(clipped(name, 60), *(number(value, '-') for value in norm))
                                            for name, norm in self.latest.items()])

    def __repr__(self) -> str:
        if not self.latest:
            return '<Norms: no update yet>'
        return f'<Norms of {len(self.latest)} parameter{"s" * (len(self.latest) > 1)} at update {self.update}>'

    def __enter__(self) -> 'Norms':
        done = update_number(self.trainer)
        self._begun = None
        if (done + 1) % self.every == 0:
            self._begun = _Update(self.trainer, done, watched(self.trainer, self.net, self.params))
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        begun, self._begun = self._begun, None
        if begun is None:
            return
        begun.end()
        update = update_number(self.trainer)
        if kind is not None or update == begun.done:
            return  # it failed, or was left out by the trainer
        if update != begun.done + 1:
            raise ValueError(f'There must be one update in a `with norms:` block. Received: {update - begun.done}. Put a block '
                             'around each.')
        self.update, self.latest = update, begun.norms()
        if self._file:
            self._file.write(update, [(name, *norm) for name, norm in self.latest.items()])
        if self.writer:
            for name, norm in self.latest.items():
                for key, value in zip(Norm._fields, norm):
                    if value is not None:
                        self.writer.add_scalar(f'{key}/{name}', value, update)


class _Update:
    """An update that is looked at: what was before it, and by what it multiplies gradients."""

    def __init__(self, trainer: TrainerLike, done: int, chosen: Dict[str, Watched]):
        """``done``: the number of updates before."""
        self.trainer, self.done, self.chosen = trainer, done, chosen
        self.before = {name: weight.copy() for name, weight in _weights(trainer, chosen).items()}
        self.rescale = float(trainer._optimizer.rescale_grad)
        rescale_grad = trainer._check_and_rescale_grad
        self._attribute = vars(trainer).get('_check_and_rescale_grad')

        def recording(scale: float) -> None:  # the optimizer's may be another one afterwards, when a loss scale has been taken out
            rescale_grad(scale)
            self.rescale = scale

        trainer._check_and_rescale_grad = recording

    def end(self) -> None:
        if self._attribute is None:
            del vars(self.trainer)['_check_and_rescale_grad']  # what remains is the method
        else:
            self.trainer._check_and_rescale_grad = self._attribute
        if type(self.trainer._optimizer) is mx_optimizer.AdaDelta and not self.trainer._update_on_kvstore:
            self.rescale = 1.0  # MXNet's own has multiplied the gradient itself

    def norms(self) -> Dict[str, Norm]:
        scalars: List[Any] = []
        for name, weight in _weights(self.trainer, self.chosen).items():
            gradient = _gradient(self.trainer, self.chosen[name])
            scalars += [square(self.before[name]), square(gradient), square(weight - self.before[name])]
        roots = numpy.sqrt(numpy.array(fetched(scalars)).reshape(-1, 3)) * [1, abs(self.rescale), 1]
        return {name: Norm(weight, gradient, update, update / weight if weight else None)
                for name, (weight, gradient, update) in zip(self.chosen, roots.tolist())}


def _weights(trainer: TrainerLike, chosen: Dict[str, Watched]) -> Dict[str, Any]:
    """The weights on the first device, of float16 ones what the optimizer knows of them in float32."""
    exact = _exact(trainer, chosen)
    return {name: plain(exact.get(name, each.parameter.list_data()[0])) for name, each in chosen.items()}


def _exact(trainer: TrainerLike, chosen: Dict[str, Watched]) -> Dict[str, Any]:
    """The float32 masters that there are, or weights with their compensations: the first update makes them."""
    halves = {name: each for name, each in chosen.items() if numpy.dtype(each.parameter.dtype) == numpy.float16}
    if not (halves and trainer._optimizer.multi_precision and trainer._kv_initialized):
        return {}
    optimizer = adapted(trainer._optimizer, contexts_of(trainer))
    if isinstance(optimizer, Stranger):
        return {}
    updater = trainer._kvstore._updater if trainer._update_on_kvstore else trainer._updaters[0]
    h, mode = optimizer.hyperparameters(), mode_of(optimizer.multi_precision, 'float16')
    found = {}
    for name, each in halves.items():
        if each.place in updater.states:
            slots, master = optimizer.split_state(updater.states[each.place], h, mode)
            weight = each.parameter.list_data()[0]
            found[name] = weight.astype('float32') + slots[-1].astype('float32') if mode == KAHAN else master
    return found


def _gradient(trainer: TrainerLike, each: Watched) -> Any:
    """The gradient of which the update was made."""
    gradients = [plain(gradient) for gradient in each.parameter.list_grad()]
    if not trainer._update_on_kvstore:
        return gradients[0]  # there is one, or each is the sum
    first = gradients[0]
    for gradient in gradients[1:]:
        first = first + gradient.as_in_context(first.context)
    return first
