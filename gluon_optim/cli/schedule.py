"""The command that shows a learning-rate schedule: schedule."""
import inspect
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import numpy

from ..schedules import Schedule, rate, record, schedule_of
from ..schedules.base import Count, Numbers, Steps, Wrapper
from ..schedules.catalog import SCHEDULES
from ..schedules.plateau import Plateau
from ..schedules.wrappers import Scaled, Warmup
from ..schema import REQUIRED, Hyper, check_int
from ..transfer.refused import refusing
from .paths import PICTURES, check_picture, write_whole
from .text import dumps, say, table

__all__ = ['add_commands']

AROUND: Tuple[Tuple[str, Type[Schedule]], ...] = (('warmup', Warmup), ('', Scaled))  # prefix of the options, schedule
ROWS = 12       # of the table, about
STEPS = 1000    # shown of a schedule without an end
MOST = 10 ** 6  # updates that are drawn, or printed


def add_commands(commands: Any) -> None:
    """Add the command to an ``argparse`` parser's ``commands``."""
    command = commands.add_parser(
        'schedule', help='learning rates of a schedule',
        description='Learning rates of a schedule, at some updates or as a picture. Without a name: the names of all.')
    command.set_defaults(run=_names, json=False)
    command.add_argument('--json', action='store_true', default=SUPPRESS, help='for machines')
    names = command.add_subparsers(dest='schedule', metavar='NAME')
    for schedule in SCHEDULES:
        if not issubclass(schedule, Wrapper):
            _add(names, schedule)


def _add(names: Any, schedule: Type[Schedule]) -> None:
    formula = inspect.cleandoc(schedule.__doc__ or '').replace('``', '')
    command: ArgumentParser = names.add_parser(_spelled(schedule.name), help=schedule.summary, description=formula,
                                               formatter_class=RawDescriptionHelpFormatter)
    for hyper in schedule.hypers:
        _add_option(command, hyper, hyper.name, hyper.default is REQUIRED)
    if schedule is Plateau:
        command.add_argument('--metrics', type=_list_of(float), metavar='M,M,...', default=[], help='what is observed')
        command.add_argument('--every', type=int, metavar='N', default=100, help='updates between them (default: 100)')
    for prefix, around in AROUND:
        group = command.add_argument_group('warmed up' if prefix else 'scaled by the batch size', around.summary)
        for hyper in around.hypers[1:]:
            _add_option(group, hyper, f'{prefix}_{hyper.name}' if prefix else hyper.name, False)
    command.add_argument('--steps', type=int, metavar='N', help=f'updates to show (default: up to its end, or {STEPS})')
    command.add_argument('--at', type=_list_of(int), metavar='T,T,...', help='the updates in the table')
    command.add_argument('--plot', metavar='FILE', help=f'also write a picture of the rates ({", ".join(PICTURES)})')
    command.add_argument('--json', action='store_true', default=SUPPRESS,
                         help='for machines: the record, as files hold it, and the rates')
    command.set_defaults(run=_show, of=schedule)


def _add_option(command: Any, hyper: Hyper, name: str, required: bool) -> None:
    """The option for an argument. Its value is checked where the schedule is made, with all others."""
    default = '' if hyper.default is REQUIRED else f' (default: {hyper.default!r})'
    text = f'{hyper.doc}; {hyper.allowed}{default}'.replace('%', '%%')
    named: Dict[str, Any] = dict(dest=name, required=required, default=SUPPRESS, help=text)
    if hyper.is_switch and not isinstance(hyper.default, bool):
        command.add_argument(f'--{_spelled(name)}', choices=hyper.domain, **{**named, 'help': f'{hyper.doc}{default}'})
    elif hyper.is_switch:
        command.add_argument(f'--{_spelled(name)}', action='store_true', **{**named, 'help': hyper.doc})
    else:
        one = int if isinstance(hyper, (Count, Steps)) else float
        several = isinstance(hyper, (Steps, Numbers))
        letter = 'N' if one is int else 'X'
        command.add_argument(f'--{_spelled(name)}', type=_list_of(one) if several else one,
                             metavar=f'{letter},{letter},...' if several else letter, **named)


def _spelled(name: str) -> str:
    return name.replace('_', '-')


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], List[Any]]:
    def parse(text: str) -> List[Any]:
        try:
            return [kind(item) for item in text.split(',')]
        except ValueError:
            raise ArgumentTypeError(f'must be numbers with commas between them. Received: {text!r}') from None
    return parse


def _names(options: Namespace) -> int:
    if options.json:
        print(dumps({schedule.name: schedule.summary for schedule in SCHEDULES}))
        return 0
    width = max(len(schedule.name) for schedule in SCHEDULES)
    for schedule in SCHEDULES:
        how = {'warmup': ': --warmup-steps', 'scaled': ': --batch-size', 'chain': '; in Python only'}.get(schedule.name, '')
        say(f'{_spelled(schedule.name):{width}}  {schedule.summary}{how}')
    return 0


def _show(options: Namespace) -> int:
    check_picture(options.plot)
    made = _made(options)
    schedule, h = schedule_of(made)
    length = schedule.length(h)
    steps = check_int('--steps', _default_steps(length) if options.steps is None else options.steps, 1)
    if steps > MOST and options.plot:
        raise ValueError(f'--plot draws at most {MOST} updates. Received: {steps}. Pass --steps.')
    updates = _spread(steps) if options.at is None else [check_int('--at', update, 1) for update in options.at]
    rates = [rate(made, update) for update in updates]
    if options.plot:
        from ..schedules.picture import draw
        line = rate(made, numpy.arange(1, steps + 1)).tolist()
        with refusing():
            write_whole(options.plot, lambda path: draw({options.of.name: line}, path))
        say(f'picture: {options.plot}', sys.stderr)
    if options.json:
        print(dumps({'schedule': made, 'updates': updates, 'rates': rates}))
        return 0
    table([('update', 'rate'), *((str(update), f'{value:.6g}') for update, value in zip(updates, rates))])
    return 0


def _made(options: Namespace) -> Dict[str, Any]:
    """The record of the schedule that the options describe."""
    given = vars(options)
    schedule: Type[Schedule] = options.of
    made = record(schedule.name, **{hyper.name: given[hyper.name] for hyper in schedule.hypers if hyper.name in given})
    if schedule is Plateau:
        every = check_int('--every', options.every, 1)
        for number, metric in enumerate(options.metrics, 1):
            made['attributes'].update(Plateau.observed(schedule_of(made)[1], metric, number * every))
    for prefix, around in AROUND:
        names = {hyper.name: f'{prefix}_{hyper.name}' if prefix else hyper.name for hyper in around.hypers[1:]}
        arguments = {name: given[option] for name, option in names.items() if option in given}
        needed = next(iter(names))
        if needed in arguments:
            made = record(around.name, schedule=made, **arguments)
        elif arguments:
            raise ValueError(f'--{_spelled(names[next(iter(arguments))])} goes with --{_spelled(names[needed])}, which is missing.')
    return made


def _default_steps(length: Optional[int]) -> int:
    """A little more than the schedule, if it has an end."""
    return STEPS if length is None or length == 1 else length + length // 10


def _spread(steps: int) -> Sequence[int]:
    """About `ROWS` updates from the first to the last."""
    return sorted({1, *(round(steps * k / ROWS) for k in range(1, ROWS + 1))} - {0})
