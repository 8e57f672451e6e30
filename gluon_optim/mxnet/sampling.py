"""Samples of a posterior: `Chain` keeps those that a trainer with the optimizer sgld or psgld draws, `Samples` predicts with them.

    chain = go.sampling.Chain(trainer, 'chain', burn_in=1000, thin=50, net=net)
    ...
    chain.step(batch_size, dataset_size)                                    # after backward, in place of trainer.step
    mean, std = go.sampling.Samples('chain').predict(net, x)                # in any process

docs/SAMPLING.md has the formulas, and says what is exact.

>>> import tempfile, gluon_optim as go
>>> with tempfile.TemporaryDirectory() as folder:
...     go.sampling.Samples(folder).steps()
[]
"""
import contextlib
import logging
import os
import re
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy
from mxnet import autograd
from mxnet.ndarray.ndarray import NDArray
from mxnet.ndarray.ndarray import array as nd_array

from ..rules.base import TEMPERATURE
from ..rules.runtimes import draws_itself, needs
from ..schema import check_int, one_of, some_of
from ..states import atomic, container
from ..states.errors import StateFileError
from ..states.model import OptimizerStates, Run
from .checkpoint import check_initialized, no_states, parameters, plan_part, weights_of
from .native import adapted
from .trainer import check_trainer, contexts_of, name_of, start
from .typing import BlockLike, TrainerLike
from .weights import remember

__all__ = ['Chain', 'Samples']

log = logging.getLogger('gluon_optim')
_NAME = re.compile(r'sample-(0|[1-9][0-9]{0,15})\.safetensors')


class Samples:
    """The samples in a folder, ``sample-<step>.safetensors``, in the order in which they were drawn.

    Each is read when it is needed. It is a checkpoint without a trainer: `load_checkpoint` puts it into a net.

    Parameters
    ----------
    directory : str or os.PathLike
        That of a `Chain`, which may be running.

    Iterating yields ``(step, {name: array})``. Raises nothing here: a folder that is not there holds no samples.

    >>> import tempfile, gluon_optim as go
    >>> from mxnet import autograd, gluon, nd
    >>> net = gluon.nn.Dense(1, in_units=1)
    >>> net.initialize()
    >>> trainer = gluon.Trainer(net.collect_params(), 'sgld', {'learning_rate': 0.01})
    >>> x, y = nd.array([[0], [1], [2]]), nd.array([1, 3, 5])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chain = go.sampling.Chain(trainer, folder, burn_in=10, thin=5, net=net)
    ...     for _ in range(30):
    ...         with autograd.record():
    ...             loss = gluon.loss.L2Loss()(net(x), y)
    ...         loss.backward()
    ...         _ = chain.step(batch_size=3, dataset_size=3)
    ...     samples = go.sampling.Samples(folder)
    ...     print(samples.steps(), [sorted(weights) for step, weights in samples][0])
    ...     mean, std = samples.predict(net, nd.array([[3]]))
    [15, 20, 25, 30] ['bias', 'weight']
    >>> mean.shape, std.shape
    ((1, 1), (1, 1))
    """

    def __init__(self, directory: container.Path):
        self.directory = os.fspath(directory)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.directory!r}, {len(self)} samples)'

    def path(self, step: int) -> str:
        """The path of the sample of ``step``, whether or not it exists."""
        return os.path.join(self.directory, f'sample-{step}.safetensors')

    def steps(self) -> List[int]:
        """The numbers of the updates after which samples were kept, in ascending order."""
        return atomic.numbers_in(self.directory, _NAME)

    def __len__(self) -> int:
        return len(self.steps())

    def __iter__(self) -> Iterator[Tuple[int, Dict[str, numpy.ndarray]]]:
        for step in self.steps():
            _, run = self._read(step)
            yield step, {weight.name: weight.copies[0] for weight in run.weights}

    def predict(self, net: BlockLike, x: Any, output: Optional[Callable[[Any], Any]] = None) -> Tuple[NDArray, NDArray]:
        """Mean and standard deviation over all samples w of ``output(net_w(x))``: the posterior predictive mean and its spread.

        Parameters
        ----------
        net : gluon.Block
            Initialized. It computes with each sample in turn, in prediction mode; afterwards it has the weights that it had before.
        x : mx.nd.NDArray, or list or tuple of them
            The inputs of ``net``.
        output : callable, optional
            What is averaged, such as ``mx.nd.softmax``: the mean of probabilities is a probability, that of logits is not.

        Returns
        -------
        mean, std : mx.nd.NDArray
            Of the shape and type of the output. std is 0 where there is only one sample: it divides by their number.

        Raises ValueError if there are no samples, or if they do not fit ``net``; StateFileError for a damaged one.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f'There must be samples to predict with. Received: none in {self.directory!r}. Take more steps: '
                             'the first sample is kept after burn_in + thin of them.')
        inputs = x if isinstance(x, (list, tuple)) else (x,)
        with contextlib.ExitStack() as undo:
            remember(undo, (parameter for parameter in parameters(net, None).values() if parameter._data is not None))
            for count, step in enumerate(steps, 1):
                self._put_into(net, step, undo)
                with autograd.pause():
                    value = net(*inputs)  # type: ignore[operator]
                    value = value if output is None else output(value)
                if not isinstance(value, NDArray):
                    raise TypeError(f'What is averaged must be one array. Received: {type(value).__name__} of the net. Pass '
                                    'output=, a function that makes one of it.')
                new = value.asnumpy().astype('float64')
                if count == 1:
                    mean, squares = new, numpy.zeros_like(new)
                else:  # Welford: sums of squares would cancel
                    before = new - mean
                    mean = mean + before / count
                    squares += before * (new - mean)
        std = numpy.sqrt(squares / len(steps))
        return nd_array(mean, value.context, value.dtype), nd_array(std, value.context, value.dtype)

    def _read(self, step: int) -> Tuple[OptimizerStates, Run]:
        states, run = container.read_checkpoint(self.path(step))
        if run is None:
            raise StateFileError(f'{self.path(step)!r} must be a sample. Received: a file of optimizer states. Move it away.')
        return states, run

    def _put_into(self, net: BlockLike, step: int, undo: contextlib.ExitStack) -> None:
        states, run = self._read(step)
        plan = plan_part(self.path(step), states, run, net, None, strict=True, with_states=False)
        plan.weights.initialize(undo)
        plan.weights.apply()


class Chain(Samples):
    """Keeps samples of the parameters that ``trainer`` updates, one after every ``thin`` updates that follow the first ``burn_in``.

        U(w) = sum over all N examples of loss(w, example) + wd / 2 |w|^2
        p(w) ~ exp(-U(w) / temperature)

    With losses that are -log p(y | x, w), temperature 1 and a prior of mean 0 and variance 1 / wd, p is the posterior. The step
    `step` passes N / batch_size times the gradient of a batch to the optimizer, an estimate of the gradient of the whole sum.

    Parameters
    ----------
    trainer : gluon.Trainer
        With the optimizer 'sgld' or 'psgld', or a rule of your own that draws noise. Where parameters are on several devices and
        MXNet draws the noise, the kvstore must update them: otherwise each copy would get a noise of its own.
    directory : str or os.PathLike
        For this chain alone; created when the first sample is kept. A sample appears when it is complete.
    burn_in : int
        The number of updates after which the chain is taken to have forgotten where it began, 0 or more.
    thin : int
        Updates from one sample to the next, 1 or more: neighbours resemble each other.
    temperature : float
        Above 0. It becomes the trainer's, and is saved with its states. At 1 p is the posterior, towards 0 it concentrates
        around the minima of U; for 0 itself, which is gradient descent at half the rate, use 'sgd'.
    net : gluon.Block, optional
        With it samples have structural names, ``0.weight``, and hold parameters that the trainer does not have.

    The position in the chain is the trainer's number of updates. So a chain resumes with its trainer: restore a checkpoint, and
    step. Samples of later steps, from the run that was killed, are renamed to ``sample-<step>.safetensors.abandoned``, and drawn
    again: the same ones, bit for bit, if the checkpoint was saved with its random state, as it is by default.

    Raises TypeError or ValueError for a trainer that draws no noise, and for an argument out of range; the methods say what
    they raise.

    >>> import tempfile, gluon_optim as go
    >>> from mxnet import autograd, gluon, nd
    >>> net = gluon.nn.Dense(1, in_units=1)
    >>> net.initialize()
    >>> trainer = gluon.Trainer(net.collect_params(), 'psgld', {'learning_rate': 0.01, 'wd': 1.0})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     chain = go.sampling.Chain(trainer, folder, burn_in=2, thin=2, net=net)
    ...     for _ in range(6):
    ...         with autograd.record():
    ...             loss = gluon.loss.L2Loss()(net(nd.ones((4, 1))), nd.ones(4))
    ...         loss.backward()
    ...         print(chain.step(batch_size=4, dataset_size=100), end=' ')
    ...     chain.steps()
    False False False True False True [4, 6]
    """

    def __init__(self, trainer: TrainerLike, directory: container.Path, burn_in: int, thin: int, temperature: float = 1.0,
                 net: Optional[BlockLike] = None):
        super().__init__(directory)
        self.burn_in, self.thin = check_int('burn_in', burn_in), check_int('thin', thin, 1)
        temperature = TEMPERATURE.check(temperature)
        check_trainer(trainer)
        sampler = adapted(trainer._optimizer, contexts_of(trainer))
        if not (hasattr(sampler, 'rule') and 'noise' in needs(sampler.rule)):
            raise ValueError("The trainer must draw samples, with the optimizer 'sgld' or 'psgld'. Received: "
                             f"{name_of(sampler)!r}. Create it with gluon.Trainer(net.collect_params(), 'sgld').")
        for name, parameter in parameters(net, trainer).items():
            check_initialized(name, parameter)
        if hasattr(trainer._optimizer, 'temperature'):
            trainer._optimizer.temperature = temperature
        elif temperature != 1:
            raise ValueError(f"The trainer's {name_of(sampler)} has no temperature, it samples at 1. Received: temperature="
                             f"{temperature!r}. Create the trainer with go.create('sgld') or go.create('psgld').")
        self.trainer, self.net = trainer, net
        self._temperature = temperature
        self._optimizer_name = name_of(sampler)
        self._seen: Optional[int] = None  # the position at the last `keep`

    def __repr__(self) -> str:
        return (f'Chain({self.directory!r}, burn_in={self.burn_in}, thin={self.thin}, temperature={self.temperature!r}: '
                f'{len(self)} samples at update {self.position})')

    @property
    def position(self) -> int:
        """The trainer's number of updates."""
        return int(self.trainer._optimizer.num_update)

    @property
    def temperature(self) -> float:
        """The trainer's temperature."""
        return float(getattr(self.trainer._optimizer, 'temperature', 1.0))

    def step(self, batch_size: int, dataset_size: int, ignore_stale_grad: bool = False) -> bool:
        """One update from gradients that were summed over the examples of a batch, then `keep`.

        Parameters
        ----------
        batch_size : int
            The number of examples in this batch: 1 where the loss was already averaged over them.
        dataset_size : int
            N, the number of examples in the whole data set.
        ignore_stale_grad : bool
            As for `gluon.Trainer.step`.

        Returns whether a sample was kept; False if the update was skipped.

        Raises ValueError for sizes that are not 1 <= batch_size <= dataset_size, for copies of parameters that would drift
        apart, and what `keep` raises.
        """
        check_int('batch_size', batch_size, 1)
        if check_int('dataset_size', dataset_size, 1) < batch_size:
            raise ValueError(f'`dataset_size` must be at least `batch_size`. Received: batch_size={batch_size}, '
                             f'dataset_size={dataset_size}. Pass the number of examples in the batch, then in the whole data set.')
        self._check()
        position = self.position
        if self._seen is None or position < self._seen:  # at first, and where the trainer was taken back to an earlier checkpoint
            self._look_around(position + 1)
            self._seen = position
        self.trainer.step(batch_size / dataset_size, ignore_stale_grad)  # type: ignore[attr-defined]
        return self.keep()

    def keep(self) -> bool:
        """Keep a sample if one is due at the current position. Call it after each update where `step` is not used:

            trainer.allreduce_grads()
            ...
            trainer.update(batch_size / dataset_size)
            chain.keep()

        Returns whether it did.

        Raises ValueError for parameters that are NaN or infinite, a temperature that is not the chain's, samples of another chain
        in the folder; OSError if the file system refuses.
        """
        self._check()
        position = self.position
        if position == self._seen:
            return False
        if self._seen is None or position < self._seen:
            self._look_around(position)
        due = position > self.burn_in and (position - self.burn_in) % self.thin == 0
        if due:
            self._write(position)
        self._seen = position
        return due

    def _write(self, position: int) -> None:
        weights = weights_of(self.net, self.trainer, NDArray.asnumpy)
        bad = [weight.name for weight in weights if not all(numpy.isfinite(copy).all() for copy in weight.copies)]
        if bad:
            raise ValueError(f'A sample must be finite. Received: {some_of(bad)} with NaN or infinity after update {position}: the '
                             'chain has diverged. Resume from an earlier checkpoint with a smaller learning_rate.')
        os.makedirs(self.directory, exist_ok=True)
        run = Run(weights, step=position, extra=self._about())
        container.write_parts(self.path(position), {'': (no_states(self.net), run)})
        log.info('kept the sample of step %d', position)

    def _about(self) -> Dict[str, Any]:
        """What all samples of the folder must have in common."""
        return {'optimizer': self._optimizer_name, 'temperature': self._temperature}

    def _check(self) -> None:
        if self.temperature != self._temperature:
            raise ValueError(f'The temperature must stay that of the chain, {self._temperature!r}. Received: '
                             f'{self.temperature!r}, from the trainer. Make a chain with that temperature, in a folder of its own, '
                             "or load states with hyperparameters='current'.")
        start(self.trainer)
        contexts = contexts_of(self.trainer)
        optimizer: Any = self.trainer._optimizer
        alike = hasattr(optimizer, 'rule') and draws_itself(optimizer.rule, optimizer.hyperparameters())
        if len(contexts) > 1 and not self.trainer._update_on_kvstore and not alike:
            raise ValueError(f'The copies of a parameter must get the same noise. Received: parameters on {contexts}, each updated '
                             "where it is. Create the optimizer with noise='philox', or the trainer with update_on_kvstore=True.")

    def _look_around(self, position: int) -> None:
        """Before the first sample after a start or a resumption, which may be that of ``position``: what does the folder hold?"""
        steps = self.steps()
        earlier, later = [step for step in steps if step < position], [step for step in steps if step >= position]
        if earlier:
            self._check_sample(earlier[-1])
        if later:
            log.warning('%r holds the samples of the later steps %s: renamed to *.abandoned, to be drawn again', self.directory,
                        some_of(later))
            for step in later:
                atomic.set_aside(self.path(step))
        if os.path.isdir(self.directory):
            atomic.remove_leftovers(self.directory, _NAME)

    def _check_sample(self, step: int) -> None:
        about = self._read(step)[1].extra
        differing = [f'{name} {about.get(name)!r} there, {value!r} here' for name, value in self._about().items()
                     if about.get(name) != value]
        if differing:
            raise ValueError(f'{self.directory!r} must hold samples of this chain only. Received: others, {one_of(differing)}. '
                             'Give the chain a folder of its own.')
