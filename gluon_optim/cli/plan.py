"""The command that says what a training run takes: plan."""
import ast
from argparse import ArgumentTypeError, Namespace
from typing import Any, Dict, List, Optional, Tuple

from ..display import Columns
from ..rules import registry
from ..rules.compensated import KAHAN
from ..rules.planning import BYTES, Plan, Process, Setting, plan
from .text import dumps, say

__all__ = ['add_commands']

TENSORS = 100
BOUND = 1000000  # MXNet's


def add_commands(commands: Any) -> None:
    """Add the command to an ``argparse`` parser's ``commands``."""
    command = commands.add_parser(
        'plan', help='memory and traffic of a training run, before there is one',
        description='Bytes of arrays in each process and on disk, and what is sent in each step, from what the optimizer declares.')
    command.add_argument('--params', type=_count, metavar='N', required=True,
                         help='elements of all parameters together, such as 1e9')
    command.add_argument('--optimizer', metavar='NAME', required=True, help='a name in `gluon-optim list`')
    command.add_argument('--set', type=_argument, metavar='NAME=VALUE', dest='given', action='append', default=[],
                         help='an argument of the optimizer that changes its states, such as momentum=0.9. May be repeated')
    command.add_argument('--tensors', type=_count, metavar='K',
                         help=f'in how many tensors of equal size the parameters are (default: {TENSORS}, or N if that is less)')
    command.add_argument('--dtype', choices=tuple(BYTES), default='float32',
                         help='type of weights and gradients (default: float32)')
    command.add_argument('--multi-precision', nargs='?', const=True, default=False, type=_kahan, metavar=KAHAN,
                         help=f"keep float32 masters of float16 weights, or with '{KAHAN}' rounding errors: servers keep masters")
    command.add_argument('--workers', type=_count, metavar='W', default=1, help='default: 1')
    command.add_argument('--servers', type=_count, metavar='S', default=0, help='default: 0, a single process')
    command.add_argument('--update-on-kvstore', choices=('yes', 'no'), help='whether servers update the weights (default: yes)')
    command.add_argument('--bigarray-bound', type=_count, metavar='N',
                         help='MXNET_KVSTORE_BIGARRAY_BOUND: tensors of so many elements are cut in parts, one for each server '
                         f'(default: {BOUND})')
    command.add_argument('--json', action='store_true', help='for machines, in bytes')
    command.set_defaults(run=_plan)


def _count(text: str) -> int:
    """A whole number, also as 1e9."""
    try:
        number = int(text) if text.strip('+-').isdigit() else float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise ArgumentTypeError(f'must be a whole number, such as 1000 or 1e9. Received: {text!r}')


def _kahan(text: str) -> str:
    if text != KAHAN:
        raise ArgumentTypeError(f'takes {KAHAN!r}, or nothing for masters. Received: {text!r}')
    return text


def _argument(text: str) -> Tuple[str, Any]:
    name, equals, value = text.partition('=')
    if not equals:
        raise ArgumentTypeError(f'must be NAME=VALUE, such as momentum=0.9. Received: {text!r}')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word: base=sgd


def _plan(options: Namespace) -> int:
    setting = _setting(options)
    found = plan(setting)
    if options.json:
        print(dumps(_described(setting, found)))
        return 0
    for line in repr(Columns(_title(setting), *_table(setting, found))).splitlines():
        say(line)
    least, most = found.elements
    if least != most:
        say(f'Servers hold {least} to {most} elements; the figures are those of the fullest.')
    return 0


def _setting(options: Namespace) -> Setting:
    rule = registry.get(options.optimizer)
    given = dict(options.given)
    for name in given:
        values = [value for other, value in options.given if other == name]
        if len(values) > 1:
            raise ValueError(f'--set {name} must be given once. Received: {", ".join(map(str, values))}.')
    h = rule.hyperparameters(**given)
    params = _at_least('--params', options.params, 1)
    tensors = _at_least('--tensors', min(TENSORS, params) if options.tensors is None else options.tensors, 1)
    if tensors > params:
        raise ValueError(f'--tensors must be at most --params, for each has an element. Received: {tensors} and {params}.')
    workers, servers = _at_least('--workers', options.workers, 0), _at_least('--servers', options.servers, 0)
    if servers and not workers:
        raise ValueError(f'--servers go with --workers, 1 or more. Received: {servers} servers, no worker.')
    if not servers:
        if workers > 1:
            raise ValueError(f'--workers above 1 go with --servers. Received: {workers} workers, no server. Pass --servers 1.')
        for option in ('update_on_kvstore', 'bigarray_bound'):
            if getattr(options, option) is not None:
                raise ValueError(f'--{option.replace("_", "-")} goes with --servers. Received: no server. Leave it out.')
    if options.multi_precision and options.dtype != 'float16':
        raise ValueError(f'--multi-precision is for float16 weights. Received: --dtype {options.dtype}. Leave it out.')
    bound = _at_least('--bigarray-bound', BOUND if options.bigarray_bound is None else options.bigarray_bound, 33)
    return Setting(rule, h, params, tensors, options.dtype, options.multi_precision, workers, servers,
                   options.update_on_kvstore != 'no', bound)


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f'{option} must be {least} or more. Received: {value}.')
    return value


def _title(s: Setting) -> str:
    kept = {KAHAN: ' with rounding errors', True: ' with masters'}.get(s.multi_precision, '')
    where = 'one process' if not s.servers else (
        f'{s.workers} {"worker" if s.workers == 1 else "workers"}, {s.servers} {"server" if s.servers == 1 else "servers"}'
        + ('' if s.updates else ', updates on the workers'))
    return f'{s.rule.name}, {s.params} parameters in {s.tensors} tensors, {s.dtype}{kept}; {where}'


def _table(s: Setting, found: Plan) -> Tuple[List[str], List[List[str]]]:
    """Heading and rows."""
    processes = {'worker' if s.servers else 'process': found.worker, **({'server': found.server} if found.server else {})}
    columns: Dict[str, Dict[str, str]] = {name: _column(process, bool(s.servers)) for name, process in processes.items()}
    columns['on disk'] = _sizes({**found.checkpoint, 'together': sum(found.checkpoint.values())})
    rows = list(dict.fromkeys(what for process in processes.values() for what in process.kept))
    rows += [what for what in found.checkpoint if what not in rows]
    rows += ['together', *(['in flight, up to', 'sent in a step', 'received in a step', 'messages in a step'] if s.servers else [])]
    return ['', *columns], [[what, *(column.get(what, '') for column in columns.values())] for what in rows]


def _column(process: Process, linked: bool) -> Dict[str, str]:
    sizes = {**process.kept, 'together': sum(process.kept.values())}
    if not linked:
        return _sizes(sizes)
    sizes.update({'in flight, up to': process.in_flight, 'sent in a step': process.sent, 'received in a step': process.received})
    return {**_sizes(sizes), 'messages in a step': str(process.messages)}


def _sizes(sizes: Dict[str, int]) -> Dict[str, str]:
    return {what: _size(count) for what, count in sizes.items()}


def _size(count: int) -> str:
    for unit, name in ((10 ** 12, 'TB'), (10 ** 9, 'GB'), (10 ** 6, 'MB'), (10 ** 3, 'kB')):
        if count >= unit:
            return f'{count / unit:.1f} {name}'
    return f'{count} B'


def _described(s: Setting, found: Plan) -> Dict[str, Any]:
    return {'setting': dict(s._asdict(), rule=s.rule.name, h=s.h.asdict()), 'worker': _process(found.worker),
            'server': _process(found.server), 'elements': dict(zip(('least', 'most'), found.elements)),
            'checkpoint': dict(found.checkpoint, together=sum(found.checkpoint.values()))}


def _process(process: Optional[Process]) -> Optional[Dict[str, Any]]:
    return process and {**process._asdict(), 'kept': dict(process.kept, together=sum(process.kept.values()))}
