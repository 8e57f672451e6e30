"""`main`, which runs one command; `EXIT_CODES` says what it returns."""
import argparse
import os
import sys
from typing import Any, List, Optional

from .. import __version__
from ..schema import error_text
from ..transfer.refused import Refused
from . import catalog, convert, inspect
from .text import escaped, in_options, say

__all__ = ['main']

EXIT_CODES = ('Exit codes. 0: done. 1: refused, and nothing was written; or the answer is no (diff: not equal, verify: incomplete, '
              'list: no such name). 2: options or a file that cannot be used. Errors go to standard error.')


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        if sys.stdout is not None:  # a shell has closed it: >&-
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, TypeError, OSError, ImportError, MemoryError) as error:
        message = in_options(error_text(error), reading=not isinstance(error, Refused) or error.reading)
        if sys.stderr is not None:
            say('gluon-optim: ' + ' '.join(message.split()), sys.stderr)
        return int(getattr(error, 'exit_code', 2))
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Arguments can be names of files too."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message('\n'.join(map(escaped, message.split('\n'))), file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog='gluon-optim', description='Optimizers for MXNet Gluon, and their states.')
    parser.add_argument('--version', action='version', version=f'gluon-optim {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for group in (catalog, inspect, convert):
        group.add_commands(commands)
    for each in (parser, *commands.choices.values()):
        each.epilog = EXIT_CODES
    return parser
