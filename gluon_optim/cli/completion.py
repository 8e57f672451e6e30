"""The command that prints a completion script for a shell: completion."""
from argparse import ArgumentParser, Namespace
from typing import Any

from ..requirements import missing

__all__ = ['add_commands']

FILES = ('file', 'a', 'b', 'output', 'report', 'params', 'like', 'map', 'plot')  # arguments that are completed with names of files


def add_commands(commands: Any, parser: ArgumentParser) -> None:
    """Add the command to the ``commands`` of ``parser``, which the script is about."""
    command = commands.add_parser(
        'completion', help='print a completion script for a shell',
        description='Print a completion script. For bash: gluon-optim completion bash > '
                    '~/.local/share/bash-completion/completions/gluon-optim')
    command.add_argument('shell', choices=('bash', 'zsh', 'tcsh'))
    command.set_defaults(run=lambda options: _complete(parser, commands, options))


def _complete(parser: ArgumentParser, commands: Any, options: Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise missing('completion', 'shtab', 'completion', error) from None
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in FILES:
                action.complete = shtab.FILE
    print(shtab.complete(parser, shell=options.shell))
    return 0
