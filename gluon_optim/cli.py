"""The command `gluon-optim`. Exit code 0: done; 1: refused, with the reason; 2: unusable input."""
import argparse
import json
import os
import sys
from typing import Any, List, Optional

from . import __version__, catalog
from .cli_states import add_commands
from .cli_states import table as _table

__all__ = ['main']


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, TypeError, OSError, ImportError, MemoryError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print('gluon-optim: ' + ' '.join(str(message or type(error).__name__).split()), file=sys.stderr)
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
    return parser


def _list(options: Any) -> int:
    names = catalog.list_optimizers(options.pattern)
    if options.json:
        print(json.dumps(names))
    else:
        width = max(map(len, names), default=0)
        for name in names:
            print(f'{name:{width}}  {catalog.optimizer_info(name).summary}')
    return 0 if names else 1


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
