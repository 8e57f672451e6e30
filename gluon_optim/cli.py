"""The command `gluon-optim`; `EXIT_CODES` says what it returns."""
import argparse
import json
import os
import sys
from typing import Any, List, Optional

from . import __version__, catalog, convert
from .cli_states import add_commands
from .cli_states import table as _table

__all__ = ['main']

EXIT_CODES = ('Exit codes. 0: done. 1: refused, and nothing was written; or the answer is no (diff: not equal, verify: incomplete, '
              'list: no such name). 2: options or a file that cannot be used. Errors go to standard error.')


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        if sys.stdout is not None:  # a shell has closed it: >&-
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, TypeError, OSError, ImportError, MemoryError) as error:
        message = convert.in_options(convert.words(error), reading=True)
        if sys.stderr is not None:
            print('gluon-optim: ' + ' '.join(message.split()), file=sys.stderr)
        return getattr(error, 'exit_code', 2)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='gluon-optim', description='Optimizers for MXNet Gluon, and their states.')
    parser.add_argument('--version', action='version', version=f'gluon-optim {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    command = commands.add_parser('list', help='names of all optimizers', description='Names of all optimizers.')
    command.add_argument('pattern', nargs='?', default='*', help="shell pattern, e.g. '*adam*'")
    command.add_argument('--json', action='store_true', help='for machines')
    command.set_defaults(run=_list)

    command = commands.add_parser('info', help='what one optimizer computes', description='What one optimizer computes.')
    command.add_argument('name')
    command.add_argument('--json', action='store_true', help='for machines')
    command.set_defaults(run=_info)
    add_commands(commands)
    for each in (parser, *commands.choices.values()):
        each.epilog = EXIT_CODES
    return parser


def _list(options: Any) -> int:
    names = catalog.list_optimizers(options.pattern)
    if options.json:
        print(json.dumps(names))
        return 0 if names else 1
    if not names:
        raise convert.Refused(f'No optimizer matches {options.pattern!r}. `gluon-optim list` has them all.')
    width = max(map(len, names))
    for name in names:
        print(f'{name:{width}}  {catalog.optimizer_info(name).summary}')
    return 0


def _info(options: Any) -> int:
    info = catalog.optimizer_info(options.name)
    if options.json:
        print(json.dumps(info.asdict(), indent=2))
        return 0
    print(f'{info.name}: {info.summary}\n{info.paper}\n')
    print('\n'.join('    ' + line if line else '' for line in info.formula.splitlines()))
    print('\nArguments')
    _table([(h.name, repr(h.default), h.allowed, h.doc) for h in info.hypers])
    print(f'\nState: {info.memory}')
    _table([(slot.name, 'as the weight' if slot.like == 'weight' else 'one number', slot.doc) for slot in info.slots])
    print('\nRuns on: ' + ', '.join(info.runtimes))
    if info.equals:
        print('Equals: ' + ', '.join(info.equals))
    for what, why in info.exceptions.items():
        print(f'Exception: {what}: {why}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
