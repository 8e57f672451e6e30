"""The commands that list and describe optimizers: list, info."""
import json
from argparse import Namespace
from typing import Any

from ..rules import catalog
from ..transfer.refused import Refused
from .text import say, table

__all__ = ['add_commands']


def add_commands(commands: Any) -> None:
    """Add the commands to an ``argparse`` parser's ``commands``."""
    command = commands.add_parser('list', help='names of all optimizers', description='Names of all optimizers.')
    command.add_argument('pattern', nargs='?', default='*', help="shell pattern, e.g. '*adam*'")
    command.add_argument('--json', action='store_true', help='for machines')
    command.set_defaults(run=_list)

    command = commands.add_parser('info', help='what one optimizer computes', description='What one optimizer computes.')
    command.add_argument('name')
    command.add_argument('--json', action='store_true', help='for machines')
    command.set_defaults(run=_info)


def _list(options: Namespace) -> int:
    names = catalog.list_optimizers(options.pattern)
    if options.json:
        print(json.dumps(names))
        return 0 if names else 1
    if not names:
        raise Refused(f'No optimizer matches {options.pattern!r}. `gluon-optim list` shows all names.')
    width = max(map(len, names))
    for name in names:
        say(f'{name:{width}}  {catalog.optimizer_info(name).summary}')
    return 0


def _info(options: Namespace) -> int:
    info = catalog.optimizer_info(options.name)
    if options.json:
        print(json.dumps(info.asdict(), indent=2))
        return 0
    formula = ['    ' + line if line else '' for line in info.formula.splitlines()]
    for line in (f'{info.name}: {info.summary}', info.paper, '', *formula, ''):
        say(line)
    say('Arguments')
    table([(h.name, repr(h.default), h.allowed, h.doc) for h in info.hypers])
    say()
    say(f'State: {info.memory}')
    table([(slot.name, 'like the weight' if slot.like == 'weight' else 'one number', slot.doc) for slot in info.slots])
    say()
    say('Runs on: ' + ', '.join(info.runtimes))
    if info.equals:
        say('Equals: ' + ', '.join(info.equals))
    for what, why in info.exceptions.items():
        say(f'Exception: {what}: {why}')
    return 0
