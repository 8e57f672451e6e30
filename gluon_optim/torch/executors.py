"""Where an update runs: in compiled kernels on PyTorch's memory, all parameters of a kind in one launch, or parameter by
parameter in PyTorch's own operations.

`KERNELS` says which devices have kernels. Parameters that a kernel does not take (a strided view, a tensor subclass, a
gradient of another type than its parameter) are updated by operations, next to those in kernels, with the same numbers but for
the last digit of PyTorch's own square root.
"""
import contextlib
import functools
import importlib
import itertools
import logging
import operator
from typing import Any, Callable, ContextManager, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import torch

from ..lowering.plan import GRADIENT, HALF, Storage
from ..rules.base import KernelKey, Rule, scalars
from ..rules.compensated import COMPENSATION, compensated, slot_type, with_compensation
from ..rules.graph import WEIGHT
from ..rules.runtimes import runs_on
from ..schema import Slot, Values, compute_type, same_objects

__all__ = ['HALVES', 'KERNELS', 'MOST_UPDATES', 'Group', 'Launches', 'Namespace', 'apply', 'capturing', 'key_of', 'kernels_on',
           'not_a_count']

log = logging.getLogger('gluon_optim')

HALVES = (torch.float16, torch.bfloat16)
MOST_UPDATES = 2 ** 24   # where counting in float32 stays

#: type of device -> the module of the `Batch` that launches kernels there, and the package that it needs
KERNELS: Mapping[str, Tuple[str, str]] = {
    'cpu': ('gluon_optim.lowering.numba', 'numba'),
    'cuda': ('gluon_optim.torch.triton_batch', 'triton'),
}


class Group(NamedTuple):
    """The parameters of a param group that have a gradient, and what holds for all of them."""

    h: Values
    static: KernelKey
    multi_precision: Any
    params: List[torch.Tensor]
    gradients: List[torch.Tensor]


class Namespace:
    """The array namespace of rules on PyTorch: Python numbers may replace tensors; single-precision sums are done in double."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def sum(x: torch.Tensor) -> torch.Tensor:
        wide = x.dtype if x.device.type == 'mps' else torch.float64  # Apple's GPUs have no float64
        return torch.sum(x, dtype=wide).to(x.dtype)

    @staticmethod
    def half(x: torch.Tensor) -> torch.Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def bfloat(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().to(x.dtype)

    @staticmethod
    def minimum(x: Any, y: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.minimum(x, y)
        return torch.clamp(x, max=y) if isinstance(x, torch.Tensor) else torch.clamp(y, max=x)

    @staticmethod
    def maximum(x: Any, y: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.maximum(x, y)
        return torch.clamp(x, min=y) if isinstance(x, torch.Tensor) else torch.clamp(y, min=x)

    @staticmethod
    def single(x: torch.Tensor) -> torch.Tensor:
        return x.float().to(x.dtype)

    def where(self, condition: torch.Tensor, x: Any, y: Any) -> torch.Tensor:
        if not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
            x = torch.full((), x, dtype=self.dtype, device=condition.device)  # two numbers would give the default type
        return torch.where(condition, x, y)


NAMESPACES = {dtype: Namespace(dtype) for dtype in (torch.float32, torch.float64)}


class Numbers:
    """The namespace of coefficients for counts that are on a device: in float64, and any argument may be a Python number."""

    def __init__(self, device: torch.device):
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        function = getattr(NAMESPACES[torch.float64], name)

        def on_tensors(*arguments: Any) -> torch.Tensor:
            result: torch.Tensor = function(*map(self.tensor, arguments))
            return result
        return on_tensors

    def tensor(self, x: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x
        # filled there: a copy from here would wait
        return torch.full((), x, dtype=torch.bool if isinstance(x, bool) else torch.float64, device=self.device)


def key_of(slot: Slot) -> str:
    """Where the state of a parameter has ``slot``."""
    return slot.torch or slot.name


def kernels_on(device: str, rule: Type[Rule]) -> Any:
    """The module that launches kernels of ``rule`` on that type of device; None where there is none. Says once what is missing."""
    if device not in KERNELS or not runs_on(rule, 'kernels'):
        return None
    return _module(*KERNELS[device])


@functools.lru_cache(maxsize=None)
def _module(path: str, package: str) -> Any:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        log.warning('The optimizers of gluon_optim.torch run in PyTorch operations, several times slower: %s. '
                    '`pip install %s` makes them fast.', error, package)
        return None


def apply(rule: Type[Rule], static: KernelKey, coefficients: Mapping[str, Any], param: torch.Tensor, gradient: torch.Tensor,
          state: Mapping[str, Any]) -> None:
    """The update of one parameter, in PyTorch's operations."""
    dtype: torch.dtype = getattr(torch, compute_type(param.dtype))
    weight = state['master'] if 'master' in state else param.to(dtype)
    rule, static = _kept(rule, static, param, state)
    slots = {slot.name: state[key_of(slot)] for slot in static.slots}
    new, new_slots = rule.apply(NAMESPACES[dtype], static, coefficients, weight, gradient.to(dtype), slots)
    for name, value in new_slots.items():  # before the weight, which a rule may return as a slot
        slots[name].copy_(value)
    weight.copy_(new)
    if weight is not param:
        param.copy_(weight)


def _kept(rule: Type[Rule], static: KernelKey, param: torch.Tensor, state: Mapping[str, Any]) -> Tuple[Type[Rule], KernelKey]:
    """The rule that updates ``param``: with what its state keeps of the digits that the type of the parameter does not have."""
    if COMPENSATION.torch in state:
        return compensated(rule, _name(param.dtype)), static._replace(slots=with_compensation(static.slots))
    return rule.on_masters() if 'master' in state and param.dtype == torch.float16 else rule, static


def _name(dtype: torch.dtype) -> str:
    return str(dtype).partition('.')[2]


class Launches:
    """All parameters that have a gradient, arranged in launches; kept from step to step while nothing but numbers changes.

    Parameters
    ----------
    rule : Rule
    groups : list of Group
    states : list of dict
        The state of each parameter of all groups, complete.
    entries : list of dict
        The states of all parameters of the optimizer, as `takes` will get them.
    fused : bool or None
        None: kernels where there are some. True: raise where there are none. False: PyTorch's operations.
    others : list of Launches
        Those that will be used too: the tensors in which they count stay.

    Where the counts of updates are on a device, as ``capturable`` has it, all parameters must be there and have kernels.
    """

    _tensors: Tuple[List[torch.Tensor], List[torch.Tensor]]   # counts, and slots and masters

    def __init__(self, rule: Type[Rule], groups: Sequence[Group], states: Sequence[Dict[str, Any]],
                 entries: Sequence[Dict[str, Any]], fused: Optional[bool], others: Sequence['Launches'] = ()):
        self._rule, self._states, self._entries = rule, states, entries
        self._kinds = [(group.static, group.multi_precision, len(group.params)) for group in groups]
        self._params, self._group = _flat(group.params for group in groups), _numbered([len(group.params) for group in groups])
        gradients = _flat(group.gradients for group in groups)
        self._gradients = _kinds(gradients)
        for param, state in zip(self._params, states):
            if _is_dense(param):   # slots lie as the weight does, also where it or they came in another layout
                state.update((key, _laid_out(value, param.stride())) for key, value in state.items()
                             if isinstance(value, torch.Tensor) and value.shape == param.shape)
        self._counts: Optional[torch.Tensor] = None   # other processes count in shared memory, other launches in theirs
        counted = {id(step) for other in others for step in other._tensors[0]}
        if not any(id(step) in counted or step.is_shared() for step in (state['step'] for state in states)
                   if step.device.type == 'cpu'):
            with torch.inference_mode(False):   # steps outside of it count on
                self._counts = torch.stack([state['step'] for state in states]) if states else torch.zeros(0)
                for state, count in zip(states, self._counts.unbind()):
                    state['step'] = count   # a view: one operation counts for all of them
        held = [(state, key) for state in states for key, value in state.items()
                if isinstance(value, torch.Tensor) and key != 'step']
        self._held = [state for state, _ in held], [key for _, key in held]
        self._tensors = self._found()
        self._places = _places(*self._tensors, self._params)
        buckets: Dict[Any, List[int]] = {}
        self._alone: List[int] = []   # parameters without a kernel
        for i, (param, gradient, state) in enumerate(zip(self._params, gradients, states)):
            own, static = _kept(rule, groups[self._group[i]].static, param, state)
            if fused is not False and kernels_on(param.device.type, rule) is not None and _takes(param, gradient, state, static):
                storage = Storage(_name(param.dtype), 'master' in state)
                buckets.setdefault((param.device, storage, own, static), []).append(i)
            elif fused or state['step'].device.type != 'cpu':
                raise ValueError(_refused(rule, param, gradient))
            else:
                self._alone.append(i)
        self._batches = [_Bucket(own, groups[self._group[members[0]]].h, storage, static, [self._params[i] for i in members],
                                 [states[i] for i in members], members)
                         for (_, storage, own, static), members in buckets.items()]

    def takes(self, groups: Sequence[Group], entries: Sequence[Dict[str, Any]]) -> bool:
        """Whether `run` can update these: the parameters, states and types of last time."""
        params = groups[0].params if len(groups) == 1 else _flat(group.params for group in groups)
        if not (same_objects(self._params, params) and same_objects(self._entries, entries)
                and self._kinds == [(group.static, group.multi_precision, len(group.params)) for group in groups]):
            return False
        return (all(map(same_objects, self._tensors, self._found())) and self._places == _places(*self._tensors, self._params)
                and self._gradients == _kinds(_flat(group.gradients for group in groups)))

    def _found(self) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """What the states hold: counts, and slots and masters. None for what is no longer there."""
        return list(map(_get, self._states, itertools.repeat('step'))), list(map(_get, *self._held))

    def stays(self, groups: Sequence[Group], entries: Sequence[Dict[str, Any]]) -> bool:
        """Whether it may be used again, for other parameters than these or some of these."""
        own = {id(param) for group in groups for param in group.params}
        return same_objects(self._entries, entries) and not own.issuperset(map(id, self._params))

    def run(self, groups: Sequence[Group]) -> None:
        gradients = groups[0].gradients if len(groups) == 1 else _flat(group.gradients for group in groups)
        steps = torch.stack(self._tensors[0]) if self._counts is None else self._counts
        if steps.device.type != 'cpu':
            return self._run_there(groups, gradients, steps)
        _check_counts(self._params, steps)
        counts = (steps + 1).long().tolist()
        memory: Dict[Any, Dict[str, float]] = {}

        def coefficients(group: int, precision: str, t: int) -> Dict[str, float]:
            key = group, precision, t
            if key not in memory:
                memory[key] = self._rule.all_coefficients(self._rule.numbers(scalars, precision), groups[group].h, t)
            return memory[key]

        for i in self._alone:  # first: an operation can still fail
            param, group = self._params[i], self._group[i]
            apply(self._rule, groups[group].static, coefficients(group, compute_type(param.dtype), counts[i]), param, gradients[i],
                  self._states[i])
        for bucket in self._batches:
            bucket.run(gradients, self._group, counts, coefficients)
        if self._counts is None:
            torch._foreach_add_(self._tensors[0], 1)
        else:
            self._counts += 1

    def _run_there(self, groups: Sequence[Group], gradients: Sequence[torch.Tensor], steps: torch.Tensor) -> None:
        """`run` with counts on the device: coefficients are computed there too, so a CUDA graph can repeat the step."""
        steps += 1
        numbers = Numbers(steps.device)
        for bucket in self._batches:
            parts = []
            for group, (first, last) in bucket.ranges(self._group):
                t = steps[bucket.order[first:last]].double()
                c = self._rule.all_coefficients(self._rule.numbers(numbers, bucket.precision), groups[group].h, t)
                parts.append({name: numbers.tensor(value).expand(last - first) for name, value in c.items()})
            bucket.run_there(gradients, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class _Bucket:
    """Parameters that one launch updates: of one device, one type and one computation. ``members`` are their numbers."""

    def __init__(self, rule: Type[Rule], h: Values, storage: Storage, static: KernelKey, params: Sequence[torch.Tensor],
                 states: Sequence[Mapping[str, Any]], members: Sequence[int]):
        self.members, self._params = members, params
        backend = kernels_on(params[0].device.type, rule)
        names = tuple(rule.all_coefficients(scalars, h, 1))
        kernel = backend.kernel(rule, static, names, storage)
        self._device = params[0].device
        with _current(self._device):
            self._batch = backend.Batch(kernel, [param.numel() for param in params])
        held: Dict[str, Sequence[torch.Tensor]] = {slot.name: [state[key_of(slot)] for state in states] for slot in static.slots}
        held.update({WEIGHT: [state['master'] for state in states], HALF: params} if storage.master else {WEIGHT: params})
        for role, tensors in held.items():
            self._batch.addresses[kernel.roles.index(role)] = list(map(_pointer, tensors))
        self._gradients = kernel.roles.index(GRADIENT)
        self._strides = _strides(params)
        self.precision = storage.precision
        self.order = torch.tensor(members, device=states[0]['step'].device)

    def run(self, gradients: Sequence[torch.Tensor], groups: Sequence[int], counts: Sequence[int],
            coefficients: Callable[[int, str, int], Dict[str, float]]) -> None:
        pointed_at = self._point_at(gradients)
        # pairs pass one by one: thousands at once would start Python's garbage collection at each step
        groups, counts = [groups[i] for i in self.members], [counts[i] for i in self.members]
        rows = {kind: row for row, kind in enumerate(dict.fromkeys(zip(groups, counts)))}
        table = [coefficients(group, self.precision, t) for group, t in rows]
        names = self._batch.kernel.coefficients
        self._batch.threads = torch.get_num_threads()
        with _current(self._device):
            self._batch.run([[c[name] for name in names] for c in table], list(map(rows.__getitem__, zip(groups, counts))))
        del pointed_at
        _mark_written(self._params)

    def ranges(self, group: Sequence[int]) -> List[Tuple[int, Tuple[int, int]]]:
        """For each param group its first and last + 1 member; ``group`` has the group of each parameter."""
        own = [group[i] for i in self.members]
        return [(number, (own.index(number), len(own) - own[::-1].index(number))) for number in dict.fromkeys(own)]

    def run_there(self, gradients: Sequence[torch.Tensor], coefficients: Mapping[str, torch.Tensor]) -> None:
        """`run` with coefficients on the device, a number for each member."""
        pointed_at = self._point_at(gradients)
        table = torch.stack([coefficients[name] for name in self._batch.kernel.coefficients], 1)
        with _current(self._device):
            self._batch.run_there(table.to(getattr(torch, self.precision)), range(len(self.members)))
        del pointed_at
        _mark_written(self._params)

    def _point_at(self, gradients: Sequence[torch.Tensor]) -> List[torch.Tensor]:
        """Put the gradients' addresses into the table; what is returned must live until they have been read."""
        mine = [gradients[i] for i in self.members]
        if _strides(mine) != self._strides:
            mine = [_laid_out(gradient, param.stride()) for gradient, param in zip(mine, self._params)]
        self._batch.addresses[self._gradients] = list(map(_pointer, mine))
        return mine


def _lies_so(tensor: torch.Tensor, strides: Tuple[int, ...]) -> bool:
    """Whether the elements lie as the strides say; that of an axis of length 1 says nothing."""
    return all(mine == other or size == 1 for mine, other, size in zip(tensor.stride(), strides, tensor.shape))


def _laid_out(tensor: torch.Tensor, strides: Tuple[int, ...]) -> torch.Tensor:
    """``tensor``, or a copy of it that lies so."""
    if _lies_so(tensor, strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _check_counts(params: Sequence[torch.Tensor], steps: torch.Tensor) -> None:
    """Refuse what users may have written into counts, at each step: all of them at once."""
    whole = steps.clamp(0, MOST_UPDATES).floor()
    if not torch.equal(whole, steps):   # NaN does not equal itself
        wrong = (whole != steps).tolist().index(True)
        raise ValueError(not_a_count(params[wrong], steps[wrong].item()))


def not_a_count(param: torch.Tensor, step: Any) -> str:
    return (f"'step' in the state of a parameter of shape {tuple(param.shape)} must be a number of updates: a whole number from 0 "
            f'to 2**24, up to which float32 counts. Received: {step!r}. Nothing was updated. Put back what the optimizer had '
            'there, or load a state with `load_state_dict`.')


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> ContextManager[Any]:
    return torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()


def _takes(param: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, Any], static: KernelKey) -> bool:
    """Whether a kernel can update ``param``: all its tensors are dense and lie in the same order."""
    held = [(state[key_of(slot)], slot.like, slot_type(slot, _name(param.dtype)), slot.shape(param.shape)) for slot in static.slots]
    held += [(state['master'], 'weight', 'float32', param.shape)] if 'master' in state else []
    return (type(param) in (torch.Tensor, torch.nn.Parameter) and not param.is_neg() and _is_dense(param)
            and type(gradient) is torch.Tensor and gradient.shape == param.shape and gradient.dtype == param.dtype
            and gradient.device == param.device and not gradient.is_neg()
            and all(type(x) is torch.Tensor and not x.is_neg() and x.device == param.device and x.dtype == getattr(torch, dtype)
                    and x.shape == shape and (like != 'weight' or _lies_so(x, param.stride())) for x, like, dtype, shape in held)
            and all(x.data_ptr() or not x.numel() for x in (param, gradient, *(x for x, *_ in held))))


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory, in any order of the axes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _refused(rule: Type[Rule], param: torch.Tensor, gradient: torch.Tensor) -> str:
    where = ' or '.join(f'{device} with {package}' for device, (_, package) in KERNELS.items())
    return (f'fused=True needs a kernel: the rule must be one of elementwise functions and sums, on {where}, and parameters dense, '
            f'of the type of their gradients. Received: {rule.name}, a parameter {tuple(param.shape)} of {param.dtype} on '
            f'{param.device} with a gradient of {gradient.dtype}. Pass fused=None and capturable=False to use kernels where there '
            'are some.')


def _flat(lists: Iterable[List[Any]]) -> List[Any]:
    return list(itertools.chain.from_iterable(lists))


def _numbered(lengths: Sequence[int]) -> List[int]:
    """The number of its list, for each entry of lists of these lengths."""
    return [number for number, length in enumerate(lengths) for _ in range(length)]


# functions of C, for lists of thousands
_pointer, _numel, _is_contiguous = torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.is_contiguous
_get: Callable[[Dict[str, Any], str], Any] = dict.get
_KIND = type, operator.attrgetter('dtype'), torch.Tensor.get_device, _numel, torch.Tensor.is_neg


def _places(counts: List[torch.Tensor], slots: List[torch.Tensor], params: List[torch.Tensor]) -> List[List[Any]]:
    """Where tensors lie, and how: users change `.data`, and resize."""
    return [list(map(_pointer, counts + slots + params)), list(map(_numel, slots + params)), _strides(params)]


def _strides(tensors: Sequence[torch.Tensor]) -> List[Any]:
    """How each of them lies: its strides, or True for most, as thousands of tuples would start Python's garbage collection."""
    return [contiguous or tensor.stride() for contiguous, tensor in zip(map(_is_contiguous, tensors), tensors)]


def _kinds(gradients: Sequence[torch.Tensor]) -> List[List[Any]]:
    """What gradients are, besides where and in which layout: class, type, device, size, and whether they are read as negated."""
    return [list(map(what, gradients)) for what in _KIND]


_TAKES_LISTS = torch.__version__ >= '2.5'  # PyTorch compares versions


def _mark_written(tensors: Sequence[torch.Tensor]) -> None:
    """Tell autograd, which did not see the kernels write."""
    if _TAKES_LISTS:
        torch.autograd.graph.increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)
