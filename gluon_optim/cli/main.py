"""`main`, which runs one command; `EXIT_CODES` says what it returns."""
import argparse
import difflib
import importlib
import os
import re
import sys
from typing import Any, List, NoReturn, Optional, Sequence

from .. import __version__
from ..schema import error_text
from ..transfer.refused import Refused
from . import catalog, completion, convert, inspect, plan, schedule
from .text import escaped, in_options, say

__all__ = ['main']

EXIT_CODES = ('Exit codes. 0: done. 1: refused, and nothing was written; or the answer is no (diff: different, verify: incomplete, '
              'list: no such name). 2: options or a file that cannot be used. Errors go to standard error.')


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _import(options.modules)
        code: int = options.run(options)
        if sys.stdout is not None:  # a shell has closed it: >&-
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, TypeError, OSError, ImportError, MemoryError) as error:
        message = in_options(error_text(error), reading=not isinstance(error, Refused) or error.reading)
        if sys.stderr is not None:
            say('gluon-optim: ' + ' '.join(message.split()), sys.stderr)
        return int(getattr(error, 'exit_code', 2))
    except KeyboardInterrupt:
        return 130


def _import(modules: Sequence[str]) -> None:
    """Import modules of the user's, also from the folder where the command runs, as ``python -m`` does."""
    if modules and '' not in sys.path:
        sys.path.insert(0, '')
    for module in modules:
        importlib.import_module(module)


class _Parser(argparse.ArgumentParser):
    """Options are spelled in full, errors suggest what is near, and what is printed is escaped: arguments can be names of files."""

    def __init__(self, **options: Any):
        super().__init__(**{**options, 'allow_abbrev': False})

    def error(self, message: str) -> NoReturn:
        super().error(message + self._suggestion(message))

    def _suggestion(self, message: str) -> str:
        """The option, command or value that the user may have meant."""
        unknown = re.match(r'unrecognized arguments: (--[^\s=]+)', message)
        if unknown:
            return _near(unknown[1], self._of_command(sys.argv[1:]))
        choice = re.match(r"argument (?:.*): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        return _near(choice[1], re.findall(r'[\w-]+', choice[2])) if choice else ''

    def _of_command(self, arguments: Sequence[str]) -> List[str]:
        """All options of the command that ``arguments`` name, or of this parser."""
        commands = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        for name, command in (commands[0] if commands else {}).items():
            if name in arguments:
                return list(command._of_command(arguments))
        return list(self._option_string_actions)

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message('\n'.join(map(escaped, message.split('\n'))), file)


def _near(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return f'. Did you mean {" or ".join(found)}?' if found else ''


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='gluon-optim', description='Optimizers for MXNet Gluon, and their states.')
    parser.add_argument('--version', action='version', version=f'gluon-optim {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for group in (catalog, schedule, plan, inspect, convert):
        group.add_commands(commands)
    completion.add_commands(commands, parser)
    for command in commands.choices.values():
        command.add_argument('--import', metavar='MODULE', dest='modules', action='append', default=[],
                             help='import a module of your own first, which registers rules; its code is run. May be repeated')
    for each in (parser, *commands.choices.values()):
        each.epilog = EXIT_CODES
    return parser
