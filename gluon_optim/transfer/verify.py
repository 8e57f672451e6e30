"""Check that a converted file continues as the run would have: steps on both sides, from random gradients.

Our side is the rule in NumPy, in the precision of the weights; the other side reads the written file and runs in its own
runtime: PyTorch, ONNX Runtime or JAX.
"""
import importlib
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy

from .. import rules
from ..mapping.classes import find
from ..mapping.scheduling import continues
from ..requirements import missing
from ..rules.base import initial_slot
from ..rules.compensated import COMPENSATION, compensated, is_compensated
from ..schedules import rate as rate_of
from ..schema import compute_type
from ..states.model import OptimizerStates, ParameterInfo

__all__ = ['LIMITS', 'Outcome', 'Replay', 'rates', 'replay', 'scheduled_rates', 'weights_of', 'worst']

LIMITS = {'float32': 1e-6, 'float64': 1e-12}  # of the sum of updates, by the type in which a parameter is computed
ROUNDINGS = 4  # tolerance, in multiples of our own rounding error measured against float64

Arrays = Dict[str, numpy.ndarray]


class Replay(NamedTuple):
    """What is replayed: the parameters ``chosen``, from their ``weights``, with one of ``rates`` for each step."""

    states: OptimizerStates
    chosen: List[ParameterInfo]
    weights: Arrays                # of the parameters' own types; float16 ones follow their masters
    target: str                    # the class in the other framework
    rates: Sequence[float]
    scheduled: bool = False        # whether the other side finds the rates on its own, by the scheduler in the file


class Outcome(NamedTuple):
    """``difference`` is the largest, of the ``parameter``, relative to the sum of its updates; ``rounding`` says whether
    it is no more than the rounding of weights."""

    steps: int
    runtime: str
    difference: float
    parameter: str
    limit: float
    rounding: bool
    weights: str

    @property
    def equal(self) -> bool:
        return self.difference <= self.limit or self.rounding

    def __str__(self) -> str:
        if not self.steps:
            return self.weights
        text = (f'{self.steps} steps in {self.runtime}: at most {self.difference:.2g} of the sum of updates apart '
                f'({self.parameter}), {self.weights}')
        return text + ('; that is the rounding of the weights' if self.rounding and self.difference > self.limit else '')


def rates(count: int, constant: bool, rate: float) -> List[float]:
    """A rate for each step: the run's own where it must stay, else others, so large that steps show beside roundings."""
    return [rate] * count if constant else [0.05 * (1 + float(numpy.cos(k))) + 0.01 for k in range(count)]


def scheduled_rates(states: OptimizerStates, count: int) -> List[float]:
    """The rates of the next updates, none where no scheduler continues."""
    first = states.num_update + 1
    return rate_of(states.scheduler, numpy.arange(first, first + count)).tolist() if continues(states) else []


def weights_of(states: OptimizerStates, chosen: Sequence[ParameterInfo], known: Mapping[str, Any]) -> Tuple[Arrays, str]:
    """Initial weights, and their origin: masters, those of the run, or random ones. ValueError for another shape."""
    random, found, invented = numpy.random.RandomState(0), {}, 0
    for info in chosen:
        value = states.master.get(info.name, known.get(info.name))
        if value is None:
            value, invented = 0.1 * random.normal(size=info.shape), invented + 1
        if numpy.shape(value) != tuple(info.shape):
            raise ValueError(f'The weight {info.name!r} must be of shape {tuple(info.shape)}, as in the states. Received: one of '
                             f'shape {numpy.shape(value)}. Pass the weights of the same run as params=.')
        found[info.name] = numpy.asarray(value).astype(info.dtype)
    whose = 'from random weights' if invented == len(chosen) else 'from the weights of the run'
    return found, whose + (f' and {invented} random ones' if 0 < invented < len(chosen) else '')


def replay(run: Replay, path: str, to: str, whose: str) -> Outcome:
    """Run the file at ``path`` in its runtime next to the rule. ImportError if the runtime is missing."""
    name, begin = RUNTIMES[to]
    step, result = begin(run, path)
    own = [(_Own(run, info, compute_type(info.dtype)), _Own(run, info, 'float64')) for info in run.chosen]
    random = numpy.random.RandomState(1)
    scales = numpy.geomspace(1e-3, 10, len(run.rates))
    random.shuffle(scales)
    for rate, scale in zip(run.rates, scales):
        gradients = {info.name: numpy.asarray(random.normal(size=info.shape) * scale, info.dtype) for info in run.chosen}
        step(rate, gradients)
        for parameter in (parameter for pair in own for parameter in pair):
            parameter.step(rate, gradients[parameter.info.name])
    found = result()
    return worst([parameter.compared(truth, found[parameter.info.name], name, len(run.rates), whose) for parameter, truth in own])


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    return max(outcomes, key=lambda outcome: (not outcome.equal, outcome.difference / outcome.limit))


class _Own:
    """One parameter, updated by the rule in NumPy, in one precision."""

    def __init__(self, run: Replay, info: ParameterInfo, dtype: str):
        states = run.states
        rule = rules.get(states.optimizer)
        held = states.slots.get(info.name)
        self.kahan = held is not None and is_compensated(held)
        self.rule = (compensated(rule, info.dtype) if self.kahan else rule.on_masters() if info.name in states.master else rule)
        self.info = info
        self.dtype = dtype
        self.as_given = run.target != 'mirror'  # others use beta2 as given, not as MXNet reads it
        h = self.rule.hyperparameters(**states.hypers)
        self.h = h.replace(wd=h.wd * info.wd_mult, rescale_grad=1.0)
        self.weight = numpy.array(states.master.get(info.name, run.weights[info.name]), self.dtype)
        self.slots = ({slot: numpy.array(array, dtype) for slot, array in held.items()} if held is not None else
                      {slot.name: initial_slot(slot, self.weight) for slot in self.rule.slots(h)})
        self.count, self.travelled = states.counts.get(info.name, 0), 0.0

    def step(self, rate: float, gradient: numpy.ndarray) -> None:
        self.count += 1
        h = self.h.replace(learning_rate=rate * self.info.lr_mult)
        new, slots = self.rule.run(numpy, h, self.count, self.weight, gradient.astype(self.dtype), self.slots,
                                   self.as_given)
        before = self.exact
        self.weight = numpy.asarray(new, self.dtype)
        self.slots = {slot: numpy.asarray(array, self.dtype) for slot, array in slots.items()}
        self.travelled += float(numpy.abs(self.exact - before).max(initial=0))

    @property
    def exact(self) -> numpy.ndarray:
        """The weight, with its compensation."""
        return self.weight + self.slots[COMPENSATION.name] if self.kahan else self.weight

    def compared(self, truth: '_Own', found: numpy.ndarray, runtime: str, steps: int, whose: str) -> Outcome:
        found = numpy.asarray(found, self.dtype)
        apart = numpy.where(numpy.isnan(found) & numpy.isnan(self.exact), 0.0, numpy.abs(found - self.exact))
        distance = float(numpy.nan_to_num(apart, nan=numpy.inf).max(initial=0))
        own = float(numpy.abs(truth.exact - self.exact).max(initial=0))
        rounding = ROUNDINGS * max(own, float(numpy.spacing(numpy.abs(self.exact).max(initial=0))))
        relative = distance / self.travelled if self.travelled > 0 else numpy.inf if distance else 0.0
        return Outcome(steps, runtime, relative, self.info.name, LIMITS[self.dtype], distance <= rounding, whose)


# Runtimes: each begins with a file and returns what makes a step, and what tells the weights, or masters, then

Begun = Tuple[Callable[[float, Arrays], None], Callable[[], Arrays]]


def _torch(run: Replay, path: str) -> Begun:
    from ..torch import create, param_groups, scheduler, torch
    state_dict = torch.load(path, weights_only=True)
    params = {info.name: torch.nn.Parameter(torch.from_numpy(run.weights[info.name].copy())) for info in run.chosen}
    groups = param_groups(state_dict, params.values())
    rule = rules.get(run.states.optimizer)
    h, foreign = rule.hyperparameters(**run.states.hypers), find(rule, run.target, run.states.hypers)
    if run.target == 'mirror':
        optimizer = create(rule.name, groups)
    elif run.target == 'apex':
        raise ImportError(f'{foreign.path} needs CUDA: its states cannot be verified here')
    else:
        optimizer = _class_at(foreign.path)(groups, lr=1.0, **foreign.made_with(h))
    optimizer.load_state_dict(state_dict)
    mults = [run.chosen[group['params'][0]].lr_mult for group in state_dict['param_groups']]
    following: Any = scheduler(optimizer, state_dict['scheduler']) if run.scheduled and 'scheduler' in state_dict else None

    def step(rate: float, gradients: Arrays) -> None:
        if following is None:
            for group, lr_mult in zip(optimizer.param_groups, mults):
                group['lr'] = foreign.group(h.replace(learning_rate=rate * lr_mult))['lr']
        for key, param in params.items():
            param.grad = torch.from_numpy(gradients[key].copy())  # some classes overwrite it
        optimizer.step()
        if following is not None:
            following.step()

    def result() -> Arrays:
        return {key: _exact(param.detach(), optimizer.state[param]).numpy() for key, param in params.items()}
    return step, result


def _exact(param: Any, state: Mapping[str, Any]) -> Any:
    """What PyTorch's optimizer knows of a parameter."""
    compensation = state.get(COMPENSATION.torch)
    return state.get('master', param).detach() if compensation is None else param.float() + compensation.float()


def _onnx(run: Replay, path: str) -> Begun:
    from ..onnx import export_schedule, onnx, unpack
    whole = onnx.load(path)
    model, arrays = unpack(whole)
    known = {info.name for info in model.graph.input}
    arrays = {**{key: array for key, array in run.weights.items() if key in known}, **arrays}
    outputs = [info.name[:-len('/new')] for info in model.graph.output]
    evaluate = _evaluator(model, run.target)
    rate_at = _evaluator(export_schedule(whole), run.target) if run.scheduled else None

    def step(rate: float, gradients: Arrays) -> None:
        learning_rate = rate_at(None, {'t': arrays['t']})[0] if rate_at else numpy.array(rate)
        feeds = {**arrays, **{key + '/grad': gradient for key, gradient in gradients.items()}, 'learning_rate': learning_rate}
        new = evaluate(None, {key: value for key, value in feeds.items() if key in known})
        arrays.update(zip(outputs, new))

    def result() -> Arrays:
        return {info.name: arrays.get(info.name + '/master', arrays[info.name]) for info in run.chosen}
    return step, result


def _evaluator(model: Any, target: str) -> Callable[..., List[Any]]:
    """What runs an ONNX model: outputs from a dictionary of inputs."""
    found: Callable[..., List[Any]]
    if target == 'preview':  # ONNX Runtime has no kernels for it
        found = importlib.import_module('onnx.reference').ReferenceEvaluator(model).run
        return found
    try:
        runtime = importlib.import_module('onnxruntime')
    except ImportError as error:
        raise missing('to verify an ONNX model', 'ONNX Runtime', 'onnx', error) from error
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    found = runtime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider']).run
    return found


def _optax(run: Replay, path: str) -> Begun:
    from ..optax import RuleState, create, jax, load, optax
    jnp = jax.numpy
    if any(info.dtype == 'float64' for info in run.chosen):
        jax.config.update('jax_enable_x64', True)
    state, arguments = load(path, {info.name: info.name for info in run.chosen})
    params = {key: jnp.array(weight) for key, weight in run.weights.items()}
    start = max((run.states.counts.get(info.name, 0) for info in run.chosen), default=0)
    table = jnp.asarray(numpy.array(run.rates))
    optimizer = create(**arguments if run.scheduled else dict(arguments, learning_rate=lambda count: table[count - start]))

    def updated(params: Any, state: RuleState, gradients: Any) -> Tuple[Any, RuleState]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(updated)

    def step(rate: float, gradients: Arrays) -> None:
        nonlocal params, state
        params, state = compiled(params, state, gradients)

    def result() -> Arrays:
        master = state.master or {}
        return {key: numpy.asarray(weight if master.get(key) is None else master[key]) for key, weight in params.items()}
    return step, result


RUNTIMES: Dict[str, Tuple[str, Callable[[Replay, str], Begun]]] = {
    'torch': ('PyTorch', _torch), 'onnx': ('ONNX', _onnx), 'optax': ('JAX', _optax)}


def _class_at(path: str) -> Any:
    package, _, name = path.rpartition('.')
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        raise ImportError(f'to verify needs the package that has {path or "the class"}: pip install '
                          f'{package.split(".")[0]}. Importing it failed with: {error}') from error
