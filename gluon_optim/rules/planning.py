"""What training with a rule takes: bytes in each process and on disk, messages and bytes per step.

Bytes of arrays are counted, and nothing else that a process needs: no activations, no batches, not the interpreter. MXNet 1.9.1
keeps these, as its kvstore_dist.h and kvstore_dist_server.h say and tests/test_plan.py measures:

- A worker has weights and gradients. A gradient is sent from where it is, and what a server answers arrives in the same place, so
  there is no buffer for either on a CPU.
- A server has what it sends, in the weights' type, and the sum of the gradients that have come. Where it keeps float32 masters of
  float16 weights, the sum is float32, and from the second worker on a gradient is converted in one more float32 array.
- A server that updates has the slots. It updates vectors: of a parameter that is cut in parts, each has slots of its own.

What passes through is counted as ``in_flight``, the most that there can be at once: a worker sends all of its gradients without
waiting, so a server may have those of every worker, and as many answers.
"""
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type

from ..schema import Values
from .base import Rule
from .compensated import COMPENSATION, KAHAN, compensated, mode_of, slot_type
from .registry import DROP_INS
from .servers import check_servers

__all__ = ['Plan', 'Process', 'Setting', 'plan']

BYTES = {'float16': 2, 'float32': 4}
STATUS = 4 * 1024  # bytes that a worker asks of each server before a step


class Setting(NamedTuple):
    """What is planned: ``params`` elements in ``tensors`` of equal size, ``workers``, and ``servers`` or none.

    ``updates``: whether the servers update the weights, or add up gradients only. ``bound``: elements from which on a tensor is cut
    in parts, one for each server.
    """

    rule: Type[Rule]
    h: Values
    params: int
    tensors: int = 1
    dtype: str = 'float32'
    multi_precision: Any = False
    workers: int = 1
    servers: int = 0
    updates: bool = True
    bound: int = 1000000

    def sizes(self) -> List[int]:
        """The elements of each tensor."""
        return _divided(self.params, self.tensors)


class Process(NamedTuple):
    """What one process takes, in bytes, except ``messages``; ``sent`` and ``received`` are those of a step.

    ``kept``
        What stays between steps: what it is -> bytes.
    ``in_flight``
        What there is on top of that during a step, at most.
    """

    kept: Mapping[str, int]
    in_flight: int = 0
    messages: int = 0
    sent: int = 0
    received: int = 0


class Plan(NamedTuple):
    """A worker, the ``server`` that has most (None without servers), the elements on the one with least and with most, and what a
    checkpoint takes on disk without its header, which has some hundred bytes for each array."""

    worker: Process
    server: Optional[Process]
    elements: Tuple[int, int]
    checkpoint: Mapping[str, int]


def plan(setting: Setting) -> Plan:
    """What a setting takes. ValueError for one that a Trainer would refuse, or of which the rule does not say enough.

    >>> from gluon_optim import rules
    >>> adamw = rules.get('adamw')
    >>> plan(Setting(adamw, adamw.hyperparameters(), 1000)).worker.kept
    {'weights': 4000, 'gradients': 4000, 'slots': 8000}
    """
    s = setting
    size = BYTES[s.dtype]
    weights = size * s.params
    on_servers = s.servers > 0 and s.updates
    if on_servers:
        check_servers(s.rule, s.h, s.multi_precision, {f'tensor {key}': elements for key, elements in enumerate(s.sizes())},
                      s.dtype == 'float16', s.servers, s.bound)
    # servers know masters only: 'kahan' means the same there
    mode = bool(s.multi_precision) if on_servers and s.dtype == 'float16' else mode_of(s.multi_precision, s.dtype)
    states = _states(s, mode, s.params, s.tensors)
    kept = {'weights': weights, 'gradients': weights, **({} if on_servers else states)}
    checkpoint = {'weights': weights, **states}
    if not s.servers:
        return Plan(Process(kept), None, (0, 0), checkpoint)
    status = min(STATUS, 4 * (s.bound - 1)) if on_servers else 0
    held = _on_servers(s)
    parts = sum(count for _, count in held)
    worker = Process(kept, weights, 2 * (parts + s.servers * on_servers), weights, weights + s.servers * status)
    elements, count = max(held)
    through = s.workers * elements * size
    server = Process(_kept_by_server(s, bool(on_servers and mode), elements, count), 2 * through,
                     2 * s.workers * (count + on_servers), through + s.workers * status, through)
    return Plan(worker, server, (min(held)[0], elements), checkpoint)


def _states(s: Setting, mode: Any, elements: int, tensors: int) -> Dict[str, int]:
    """Bytes of the optimizer's state for ``tensors`` with so many ``elements`` together."""
    if s.rule.name in DROP_INS and s.dtype == 'float16' and mode is not True:
        raise ValueError(f"{s.rule.name} is MXNet's own: float16 weights are planned with float32 masters only. Received: "
                         f'{s.multi_precision or "no masters"}. Pass multi_precision=True.')
    slots = (compensated(s.rule, s.dtype) if mode == KAHAN else s.rule).slots(s.h)
    found: Dict[str, int] = {}
    for slot in slots:
        if slot.like not in ('weight', 'scalar'):
            raise ValueError(f'A plan needs slots of known size. Received: {s.rule.name}, of which {slot.name!r} has one number '
                             f'for each of the {slot.like} of a weight. Plan another optimizer.')
        name = slot.name if slot.name == COMPENSATION.name else 'slots'
        found[name] = found.get(name, 0) + BYTES[slot_type(slot, s.dtype)] * (elements if slot.like == 'weight' else tensors)
    if mode is True:
        found['masters'] = BYTES['float32'] * elements
    return found


def _kept_by_server(s: Setting, masters: bool, elements: int, parts: int) -> Dict[str, int]:
    single = BYTES['float32'] * elements
    kept = {'weights': BYTES[s.dtype] * elements, 'sums of gradients': single if masters else BYTES[s.dtype] * elements}
    if masters and s.workers > 1:
        kept['a converted gradient'] = single
    return {**kept, **(_states(s, masters, elements, parts) if s.updates else {})}


def _on_servers(s: Setting) -> List[Tuple[int, int]]:
    """Elements and parts on each server, as MXNet distributes the keys 0, 1, ... of a Trainer."""
    elements, parts = [0] * s.servers, [0] * s.servers
    for key, size in enumerate(s.sizes()):
        where = _divided(size, s.servers) if size >= s.bound else None
        for server in range(s.servers) if where else [key * 9973 % s.servers]:
            elements[server] += where[server] if where else size
            parts[server] += 1
    return list(zip(elements, parts))


def _divided(total: int, count: int) -> List[int]:
    """``total`` in ``count`` parts that differ by one at most, as MXNet rounds them."""
    ends = [int(total / count * (k + 1) + 0.5) for k in range(count)]
    return [end - begin for begin, end in zip([0, *ends], ends)]
