"""The noise of gradients, and the batch size and learning rate that follow from it (McAllester's lecture on SGD)."""
import csv
import math
import warnings
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union

import numpy

from ...display import Columns, clipped
from ...requirements import missing
from ...schema import Hyper, check_int, some_of
from ...states.atomic import Path
from ...states.matching import match
from ...states.model import ParameterInfo
from ..trainer import contexts_of, shape_of
from ..typing import BlockLike, TrainerLike
from .rows import RowFile
from .watched import (
    ScalarWriter,
    Watched,
    check_fresh,
    check_writer,
    fetched,
    named,
    number,
    plain,
    square,
    update_number,
    watched,
)

__all__ = ['Noise', 'NoiseScale']

AVERAGING = Hyper('averaging', 0.05, '[0, 1]', 'smallest weight of a new batch in the running means')
CURVATURE = Hyper('curvature', 1.0, '(0, inf)', 'bound on the second derivative of the loss')
REDUCTION = Hyper('reduction', 'sum', ('sum', 'mean'), 'what the gradient of a part is, over its examples')
FIGURES = ('sigma_sq', 'g_sq', 'g_sq_error', 'b_star', 'eta_star', 'eta_1')
HIDDEN = 'unknown'  # stands for a figure in tables, where the noise hides the mean
MEANS = ('count', 'weight_sq', 'sigma_sq', 'g_sq', 'g_sq_sq')


class Noise(NamedTuple):
    """The noise of one parameter's gradient, or of all. None where the noise hides the mean: where the estimate of g^2 is not
    above 0.

    ``sigma_sq`` is the variance of the gradient of one example, summed over the elements; ``g_sq`` the squared norm of the mean
    gradient, ``g_sq_error`` its standard error if batches are independent (None before the second); ``b_star`` the batch size
    16 sigma^2/g^2, in examples; ``eta_star`` and ``eta_1`` learning rates, of a batch of B* and of one example. Without any noise
    ``b_star`` is 0 and ``eta_1`` infinite.

    Raises nothing.

    >>> import gluon_optim as go
    >>> go.monitor.Noise(sigma_sq=4.0, g_sq=2.0, g_sq_error=None, b_star=32.0, eta_star=0.5, eta_1=0.015625).b_star
    32.0
    """

    sigma_sq: float
    g_sq: Optional[float]
    g_sq_error: Optional[float]
    b_star: Optional[float]
    eta_star: float
    eta_1: Optional[float]


class NoiseScale:
    """Running estimates of the noise of gradients, and of the batch size and learning rates that follow from it.

        g     = ghat +- 2 sigma/sqrt(B)          ghat: the gradient of a batch of B examples; g: of all
        B*    = 16 sigma^2 / g^2                 the batch size with the most progress per example
        eta*  = 1 / (2 L)                        its learning rate; L is ``curvature``
        eta_1 = eta*/B* = g^2 / (32 sigma^2 L)   the learning rate for one example; eta_B = B eta_1 for B up to B*

    A batch comes in n parts with b_i examples and mean gradients m_i; B = sum b_i, m = sum b_i m_i / B. For independent examples
    E|m_i|^2 = g^2 + sigma^2/b_i and E|m|^2 = g^2 + sigma^2/B, so that these are unbiased, for parts of any sizes:

        sigma^2 = sum b_i |m_i - m|^2 / (n - 1)       as sum b_i |m_i - m|^2 = sum b_i |m_i|^2 - B |m|^2
        g^2     = |m|^2 - sigma^2/B

    Both are averaged over batches apart, before the quotient is taken: x += max(averaging, 1/t) (new - x) at the t-th batch, an
    ordinary mean at first, without a bias towards 0. The parts are the gradients of several devices before they are summed, or of
    several backward passes, or both.

    Parameters
    ----------
    trainer : gluon.Trainer
    net : gluon.Block, optional
        With it, parameters go by their structural names (``0.weight``); otherwise by ``Parameter.name``.
    averaging : float
        Smallest weight of a new batch in the running means: 0.05 looks back on about 20 to 40 batches, 0 on all.
    curvature : float
        The lecture's L, a bound on the second derivative of the loss in any direction, such as the largest eigenvalue of its
        Hessian. B* does not depend on it, rates are proportional to 1/L. Also an attribute, which can be set later.
    params : str, optional
        A pattern of `fnmatch` (``*``, ``?``, ``[seq]``): only the parameters with names that it matches, such as ``'*weight'``.
        Frozen ones are left out.
    reduction : 'sum' or 'mean'
        What the gradient of a part is: of the sum of its losses, as ``loss.backward()`` makes it for ``trainer.step(batch_size)``,
        or of their mean, as ``loss.mean().backward()`` does for ``trainer.step(1)``.
    path : str or os.PathLike, optional
        A CSV file that gets a row for each batch, after those that it has: the number of the update for which the gradients are,
        the batch size, and the figures, empty where unknown. A resumed run cuts off the rows of batches that it makes again.
        Its folder is made if need be.
    writer : optional
        Anything with ``add_scalar(tag, value, step)``, such as a ``SummaryWriter`` of tensorboardX, torch.utils.tensorboard or
        mxboard; gets the figures that are known, under ``noise/``.

    ``b_star``, ``eta_star`` and ``eta_1`` are those over all parameters, ``total`` has these and the variances, ``parameters``
    the same by name, and ``batches`` and ``skipped`` count.

    Examples are taken for independent. Drawn without replacement from N of them, ``g_sq`` is too small by sigma^2/N. On servers,
    each worker sees the parts of its own.

    Raises TypeError or ValueError for arguments that are not allowed, ValueError for a trainer without a parameter to look at,
    OSError where ``path`` cannot be written.

    >>> import gluon_optim as go
    >>> import mxnet as mx
    >>> net = mx.gluon.nn.Dense(1, in_units=2, use_bias=False)
    >>> net.initialize(mx.init.One())
    >>> trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    >>> noise = go.monitor.NoiseScale(trainer, net)
    >>> parts = [mx.nd.array([[1, 2], [3, 2]]), mx.nd.array([[2, 2], [4, 4]])]
    >>> for part in parts:
    ...     with mx.autograd.record():
    ...         loss = net(part).sum()
    ...     loss.backward()
    ...     noise.observe(batch_size=2, last=part is parts[-1])
    >>> noise.table()
    NoiseScale after 1 batch: B* = 2.66667, eta* = 0.5, eta_1 = 0.1875
      parameter  sigma^2      g^2  +-       B*   eta_1
      weight           2       12   -  2.66667  0.1875
      all              2       12   -  2.66667  0.1875
    """

    def __init__(self, trainer: TrainerLike, net: Optional[BlockLike] = None, averaging: float = 0.05, curvature: float = 1.0,
                 params: Optional[str] = None, reduction: str = 'sum', path: Optional[Path] = None,
                 writer: Optional[ScalarWriter] = None):
        watched(trainer, net, params)  # raises
        self.trainer, self.net, self.params = trainer, net, params
        self.averaging: float = AVERAGING.check(averaging)
        self.curvature = curvature
        self.reduction: str = REDUCTION.check(reduction)
        check_writer(writer)
        self.writer = writer
        self._file = None if path is None else RowFile(path, ('update', 'batch_size', *FIGURES), once=False)
        self._means: Dict[str, _Means] = {}
        self._total = _Means()
        self._open: Optional[_Batch] = None
        self._interrupted = False               # whether what comes is the rest of a batch that began before a restore
        self.skipped = 0

    # -- what is known ----------------------------------------------------------------------------------------------

    @property
    def curvature(self) -> float:
        return self._curvature

    @curvature.setter
    def curvature(self, value: float) -> None:
        self._curvature: float = CURVATURE.check(value)

    @property
    def batches(self) -> int:
        """The number of batches in the estimates over all parameters."""
        return self._total.count

    @property
    def total(self) -> Optional[Noise]:
        """Over all parameters; None before the first batch."""
        return self._total.noise(self.curvature) if self.batches else None

    @property
    def parameters(self) -> Dict[str, Noise]:
        """By parameter, in the order of the net, or of the trainer."""
        return {name: means.noise(self.curvature) for name, means in self._means.items()}

    @property
    def b_star(self) -> Optional[float]:
        """B* = 16 sigma^2/g^2, the batch size with the most progress per example; None where it is not known."""
        return self.total.b_star if self.total else None

    @property
    def eta_star(self) -> float:
        """eta* = 1/(2 L), the learning rate of a batch of B*."""
        return 0.5 / self.curvature

    @property
    def eta_1(self) -> Optional[float]:
        """eta_1 = eta*/B*, the learning rate of a batch of one example; None where it is not known."""
        return self.total.eta_1 if self.total else None

    def table(self) -> Columns:
        """The estimates of each parameter and over all, as text, or in a notebook as a table."""
        return Columns(self._summary(), ('parameter', 'sigma^2', 'g^2', '+-', 'B*', 'eta_1'), [
            (clipped(name, 60), number(noise.sigma_sq, ''), number(noise.g_sq, HIDDEN), number(noise.g_sq_error, '-'),
             number(noise.b_star, HIDDEN), number(noise.eta_1, HIDDEN))
            for name, noise in [*self.parameters.items(), *([('all', self.total)] if self.total else [])]])

    def _summary(self) -> str:
        skipped = f', {self.skipped} left out as not finite' if self.skipped else ''
        if self.total is None:
            return f'NoiseScale: no batch yet{skipped}'
        batches = f'NoiseScale after {self.batches} batch{"es" * (self.batches > 1)}{skipped}'
        if self.b_star is None:
            return f'{batches}: B* unknown (noise hides the mean), eta* = {self.eta_star:.6g}'
        return f'{batches}: B* = {self.b_star:.6g}, eta* = {self.eta_star:.6g}, eta_1 = {number(self.eta_1, HIDDEN)}'

    def __repr__(self) -> str:
        return f'<{self._summary()}>'

    # -- observing --------------------------------------------------------------------------------------------------

    def observe(self, batch_size: Union[int, Sequence[int]], last: bool = True) -> None:
        """Look at the gradients after a backward pass, before `Trainer.step`, `allreduce_grads` or anything that changes them.

        Parameters
        ----------
        batch_size : int or list of int
            How many examples the pass had. On several devices a list, how many each had, unless all had the same number.
        last : bool
            Whether the batch ends here. Of a batch in several passes, pass False for all but the last one. The weights must not
            change within a batch.

        The gradients stay as they are. With ``grad_req='add'`` they must be zero before the first pass, and what a pass adds is a
        part. Until the batch ends a copy of them is kept on the first device, of those with 'add' on each. At its end the host
        waits for the device, once. A batch with gradients that are not finite changes nothing but ``skipped``. Warns where those of
        all parts are the same, which have most likely been observed twice, or after they were summed.

        Raises ValueError for sizes that do not fit the devices, a batch that ends with a single part, and a parameter without
        a new gradient; nothing has changed then. A step within a batch is a ValueError too, and the batch is dropped.
        """
        sizes = self._sizes(batch_size)
        if self._interrupted:
            self._interrupted = not last
            return
        chosen = watched(self.trainer, self.net, self.params)
        updates = self.trainer._optimizer.num_update
        batch = self._open or _Batch(chosen, contexts_of(self.trainer)[0], updates)
        if batch.updates != updates:
            self._open = None
            raise ValueError('The weights must not change within a batch. Received: a part after a step, of a batch with '
                             f'{batch.parts} parts from before it, which are dropped. Pass last=True with the last part.')
        if last and batch.parts + len(sizes) < 2:
            raise ValueError(f'A batch must have two parts at least, to see how far they are apart. Received: one, of {sizes[0]} '
                             'examples. Split it, call observe after the backward pass of each part, and pass last=False for all '
                             'but the last part.')
        if batch.chosen != chosen:
            raise ValueError('The parameters that are trained must be the same for all parts of a batch. Received: '
                             f'{some_of(sorted(set(batch.chosen) ^ set(chosen)))}, frozen or not in between. Call observe with '
                             'last=True before that.')
        check_fresh(chosen)
        update = update_number(self.trainer) + 1 if self._file or self.writer else 0  # raises
        batch.add(sizes, self.reduction == 'mean', last)
        self._open = None if last else batch
        if last:
            self._close(batch, update)

    def _sizes(self, batch_size: Union[int, Sequence[int]]) -> List[int]:
        devices = len(contexts_of(self.trainer))
        if isinstance(batch_size, (list, tuple)):
            sizes = [check_int('batch_size', size, 1) for size in batch_size]
        else:
            size, left = divmod(check_int('batch_size', batch_size, 1), devices)
            sizes = [] if left else [size] * devices
        if len(sizes) == devices:
            return sizes
        raise ValueError(f'`batch_size` must be a list of {devices} numbers, one for each device, or a number that is the same on '
                         f'each. Received: batch_size={batch_size!r}.')

    def _close(self, batch: '_Batch', update: int) -> None:
        estimates = batch.estimates(self.trainer._scale)
        sums = [sum(each) for each in zip(*estimates.values())]
        if not all(map(math.isfinite, sums)):
            self.skipped += 1
            return
        if sums[0] == 0 < sums[1]:
            cause = ('on all devices after allreduce_grads. Call observe before it, and before Trainer.step.'
                     if len(contexts_of(self.trainer)) > 1 else
                     'where observe is called again without another backward(). Call it once after each backward pass.')
            warnings.warn(f'The gradients of all parts are the same, as they are {cause}', stacklevel=3)
        for name, estimate in estimates.items():
            self._means.setdefault(name, _Means()).add(self.averaging, *estimate)
        self._total.add(self.averaging, *sums)
        self._means = {**{name: self._means[name] for name in batch.chosen}, **self._means}  # in their order, also after a load
        noise = self.total
        if self._file:
            self._file.write(update, [(batch.examples, *(noise or ()))])
        if self.writer:
            for key, value in zip(FIGURES, noise or ()):
                if value is not None and math.isfinite(value):
                    self.writer.add_scalar(f'noise/{key}', value, update)

    # -- plotting ---------------------------------------------------------------------------------------------------

    def plot(self, path: Path) -> None:
        """Draw the rows of the CSV file over updates, to ``path``, in the format of its extension.

        Raises ValueError without a CSV file or rows in it, or where the extension is unknown, ImportError without matplotlib.
        """
        if self._file is None:
            raise ValueError('A picture is drawn from the CSV file. Received: a NoiseScale without one. Create it with path=.')
        with open(self._file.path, newline='') as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError(f'Nothing to draw: {self._file.path!r} has no rows. Call observe first.')
        _draw({key: [float(row[key] or 'nan') for row in rows] for key in rows[0]}, path)

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> Dict[str, Any]:
        """The estimates as JSON can hold them, for ``extra=`` of `save_checkpoint`.

        Without the parts of a batch that has not ended: a run that is resumed there leaves out what comes until it ends. Save
        between batches for estimates that are those of a run without interruption.
        """
        present = {info.name: info for info in self._infos()}
        interrupted = self._interrupted or self._open is not None
        rows = list(self._file.end) if self._file and self._file.end else None
        return {'skipped': self.skipped, 'interrupted': interrupted, 'rows': rows, 'total': self._total.record(), 'parameters': [
            {'name': name, 'full_name': present[name].full_name, 'shape': list(present[name].shape), **means.record()}
            for name, means in self._means.items()]}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; parameters are matched as `load_states` does it.

        Raises ValueError for anything else, and for parameters that this trainer does not have; nothing has changed then.
        """
        try:
            skipped, interrupted = check_int('skipped', state['skipped']), bool(state['interrupted'])
            rows = state.get('rows')  # [update, how many of it]; None without a CSV file
            end = None if rows is None else (check_int('update', rows[0]), check_int('rows', rows[1]))
            total = _Means.of(state['total'])
            saved = [ParameterInfo(each['name'], each['full_name'], tuple(each['shape']), '') for each in state['parameters']]
            means = [_Means.of(each) for each in state['parameters']]
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f'The state must be one that state_dict() returned. Received: {clipped(state)}, in which '
                             f'{type(error).__name__}: {error}.') from None
        present = self._infos()
        pairs = match(saved, present).pairs
        if len(pairs) < len(saved):
            unknown = [info.name for j, info in enumerate(saved) if j not in pairs.values()]
            raise ValueError(f'The state must be of parameters of this trainer. Received: {some_of(unknown)}, which it does not '
                             f'have. It has {some_of([info.name for info in present])}.')
        self._means = {present[i].name: means[pairs[i]] for i in sorted(pairs)}
        self._total, self.skipped, self._open, self._interrupted = total, skipped, None, interrupted
        if self._file:
            self._file.restart(end)

    def _infos(self) -> List[ParameterInfo]:
        return [ParameterInfo(name, each.parameter.name, shape_of(each.parameter), '')
                for name, each in named(self.trainer, self.net).items()]


class _Means:
    """Running means of the estimates of one parameter, or of all."""

    def __init__(self) -> None:
        self.count = 0
        self.weight_sq = 0.0    # the sum of the squares of the weights of the batches: 1/count of an ordinary mean
        self.sigma_sq = self.g_sq = self.g_sq_sq = 0.0

    def add(self, averaging: float, sigma_sq: float, g_sq: float) -> None:
        self.count += 1
        share = max(averaging, 1 / self.count)
        self.weight_sq += share * (share * (1 + self.weight_sq) - 2 * self.weight_sq)  # (1 - share)^2 weight_sq + share^2
        self.sigma_sq += share * (sigma_sq - self.sigma_sq)
        self.g_sq += share * (g_sq - self.g_sq)
        self.g_sq_sq += share * (g_sq * g_sq - self.g_sq_sq)

    def noise(self, curvature: float) -> Noise:
        eta_star = 0.5 / curvature
        error = None
        if self.count > 1 and self.weight_sq < 1:
            error = math.sqrt(max(self.g_sq_sq - self.g_sq ** 2, 0.0) * self.weight_sq / (1 - self.weight_sq))
        b_star = 16 * self.sigma_sq / self.g_sq if self.g_sq > 0 else math.inf
        if not math.isfinite(b_star):
            return Noise(self.sigma_sq, None, error, None, eta_star, None)
        return Noise(self.sigma_sq, self.g_sq, error, b_star, eta_star, eta_star / b_star if b_star else math.inf)

    def record(self) -> Dict[str, float]:
        return {key: getattr(self, key) for key in MEANS}

    @classmethod
    def of(cls, record: Dict[str, Any]) -> '_Means':
        means = cls()
        for key in MEANS:
            value = record[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f'{key} is {value!r}')
            setattr(means, key, value)
        return means


class _Batch:
    """A batch of which some parts have been seen: the sum of their gradients, and how far they are apart."""

    def __init__(self, chosen: Dict[str, Watched], device: Any, updates: int):
        self.chosen, self.device, self.updates = chosen, device, updates
        self.parts = self.examples = 0
        self.sums: Dict[str, Any] = {}                      # of gradients over the parts, on ``device``
        self.added: Dict[str, List[Any]] = {}               # with 'add': what the gradients were after the pass before, on each
        self.apart: Dict[str, List[Any]] = {name: [] for name in chosen}  # |m_i - mean before|^2, on ``device``
        self.weights: List[float] = []                      # of these in the sum of squares

    def add(self, sizes: List[int], of_mean: bool, last: bool) -> None:
        """One backward pass. Each part is compared with the mean of those before it, so that nothing cancels:
        sum b_i |m_i - m|^2 grows by B b/(B + b) |m_b - m_B|^2 (Chan, Golub, LeVeque 1979)."""
        gradients = {name: each.parameter.list_grad() for name, each in self.chosen.items()}
        before, self.added = self.added, {}
        for k, size in enumerate(sizes):
            for name, arrays in gradients.items():
                part = plain(arrays[k])
                if self.chosen[name].parameter.grad_req == 'add':
                    if not last:
                        self.added.setdefault(name, []).append(part.copy())
                    part = part - before[name][k] if name in before else part
                self._add_part(name, part.as_in_context(self.device), size, size if of_mean else 1)
            if self.parts:
                self.weights.append(self.examples * size / (self.examples + size))
            self.parts += 1
            self.examples += size

    def _add_part(self, name: str, gradient: Any, size: int, factor: int) -> None:
        """``gradient * factor`` is the sum over the part."""
        if not self.parts:
            self.sums[name] = gradient * factor
            return
        self.apart[name].append(square(gradient * (factor / size) - self.sums[name] * (1 / self.examples)))
        self.sums[name] += gradient * factor

    def estimates(self, scale: float) -> Dict[str, Any]:
        """(sigma^2, g^2) of each parameter. The gradients times ``scale`` are those of the loss."""
        scalars = [scalar for name in self.chosen for scalar in (square(self.sums[name]), *self.apart[name])]
        values = numpy.array(fetched(scalars)).reshape(len(self.chosen), self.parts) * scale ** 2
        with numpy.errstate(invalid='ignore', over='ignore'):  # what is not finite is left out
            sigma_sq = values[:, 1:] @ self.weights / (self.parts - 1)
            g_sq = values[:, 0] / self.examples ** 2 - sigma_sq / self.examples
        return dict(zip(self.chosen, zip(sigma_sq.tolist(), g_sq.tolist())))


def _draw(rows: Dict[str, List[float]], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing('a picture', 'matplotlib', 'plot', error) from None
    figure = Figure(figsize=(8, 5.4), layout='constrained')
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    dots = dict(marker='.', markersize=3)
    above.plot(rows['update'], rows['sigma_sq'], color='#d55e00', **dots, label='$\\sigma^2$, variance of one gradient')
    above.plot(rows['update'], rows['g_sq'], color='#0072b2', **dots, label='$g^2$, squared mean gradient')
    below.plot(rows['update'], rows['b_star'], color='#009e73', **dots, label='$B^* = 16\\,\\sigma^2/g^2$')
    below.plot(rows['update'], rows['batch_size'], color='#555555', linestyle='--', label='batch size')
    below.set_ylabel('examples')
    below.set_xlabel('update')
    for axes in (above, below):
        axes.set_yscale('log')
        axes.grid(axis='y', color='#dddddd', linewidth=0.6)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
