"""The command that converts states or a model for another program: convert."""
import contextlib
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import Any, Callable, Dict, Iterator, Optional, TextIO

from ..schema import one_of
from ..states import atomic
from ..states.files import OpenFile
from ..transfer import job
from ..transfer.names import Params, read_params
from ..transfer.programs import CLASS_TARGETS, PROGRAMS, Job
from ..transfer.read import NAMELESS
from ..transfer.refused import Refused, refusing
from . import models
from .options import NAMELESS_FILES, add_command, check_used, opened, progress, read_contents
from .paths import STANDARD, check_absent, keep_apart, output_for, standard_output
from .text import dumps, in_options, say, shape_text, table

__all__ = ['add_commands', 'add_conversion']

ALIASES = {'pytorch': 'torch', 'jax': 'optax', 'gluon': 'mxnet'}  # other words for what --to takes


def add_commands(commands: Any) -> None:
    """Add the command to an ``argparse`` parser's ``commands``."""
    command = add_command(
        commands, 'convert', _convert, 'convert states or a model for another program',
        f'{NAMELESS_FILES}. For states with names, a list chooses parameters and gives their order in the new file '
        '(--mxnet-version: the order of the trainer), and a .params or .npz file gives the weights if they are needed: for '
        '--to onnx, --verify, --like, --map, and parameters without state')
    add_conversion(command)


def add_conversion(command: ArgumentParser) -> None:
    """The options of ``convert`` besides its file."""
    command.add_argument('--to', required=True, type=lambda name: ALIASES.get(name, name),
                         choices=sorted({*PROGRAMS, *models.ENDINGS}),
                         help="target program; safetensors: a model's weights, "
                         'mxnet: states, in a gluon_optim file')
    command.add_argument('-o', '--output', metavar='FILE',
                         help="'-' for standard output; default: in this folder, called as the input, with the extension of "
                         'its kind')
    command.add_argument('--force', action='store_true', help='replace the output if it exists')
    command.add_argument('--target', metavar='CLASS', help="the class that continues: 'mirror' keeps everything (default). "
                         f'--to torch: {one_of(CLASS_TARGETS)}, where torch is the class of torch.optim computing the same, and '
                         "the last are other projects'; --to onnx: 'mirror', 'preview', which are ONNX's own Adam, Momentum and "
                         'Adagrad. docs/CONVERSIONS.md says which optimizers have which')
    command.add_argument('--mxnet-version', type=int, choices=(1, 2), help="--to mxnet: write MXNet's own .states of 1.x or 2.x; "
                         'default: a gluon_optim file')
    command.add_argument('--verify', type=_steps, default=0, metavar='N',
                         help='replay N steps on both sides, and write nothing if they differ; needs the runtime for the file '
                         '(--to mxnet: read it again, for any N)')
    command.add_argument('--allow-lossy', action='store_true', help='convert even if something is lost, and say what')
    command.add_argument('--as', metavar='NAME', dest='as_rule',
                         help='of the states of an optimizer that has no rule here: the name in `gluon-optim list` of the one that '
                         'computes the same')
    command.add_argument('--report', metavar='FILE', help='write what was converted, assumed and lost to FILE, as JSON')
    models.add_options(command)


def _steps(text: str) -> int:
    steps = int(text) if text.isdigit() else 0
    if not 1 <= steps <= 10_000:
        raise ArgumentTypeError(f'must be a number of steps, 1 to 10000. Received: {text}')
    return steps


def _check_conversion(options: Namespace, file: OpenFile, model: bool, params: Params) -> None:
    """Refuse options that do not fit together, or do not fit the file: they would be ignored."""
    if model:
        for name in ('target', 'mxnet_version', 'verify', 'params', 'optimizer', 'source', 'allow', 'as_rule'):
            if getattr(options, name):
                option = name.replace('_rule', '').replace('_', '-')
                raise ValueError(f'--{option} is for optimizer states. Received: a model to write. Leave it '
                                 'out, or pass --what optimizer if the file holds both.')
        return
    classes = PROGRAMS[options.to].classes
    if options.target is not None and options.target not in classes:
        raise ValueError(f'--target must be {" or ".join(map(repr, classes))} with --to {options.to}. '
                         f'Received: {options.target!r}.')
    if options.mxnet_version and options.to != 'mxnet':
        raise ValueError(f'--mxnet-version goes with --to mxnet. Received: --to {options.to}. Leave it out.')
    check_used(options, file, names=('optimizer', 'source', 'allow'))
    if options.to == 'mxnet' and not (options.mxnet_version and params.names):
        check_used(options, file, names=('params',))


def _convert(options: Namespace) -> int:
    with opened(options.file) as file:
        model = models.writes_model(options, file)
        params = Params() if model else read_params(options.params)
        _check_conversion(options, file, model, params)
        output = _output(options, model)
        mapped = None if options.map == models.SUGGEST else options.map
        keep_apart({'--output': output, '--report': options.report}, {
            'the input': options.file, '--params': options.params, '--map': mapped, '--like': options.like})
        if not options.force:
            check_absent(output)
        with contextlib.ExitStack() as stack:
            write = stack.enter_context(_reporting(options.report))
            path = stack.enter_context(standard_output()) if output == STANDARD else output
            report = models.report_of(options, file, path) if model else _convert_states(options, file, params, path)
            report['output'] = output
            write(report)
    stream = sys.stderr if output == STANDARD else None
    if options.json:
        print(dumps(report), file=stream)
    else:
        _tell(report, stream)
    return 0


def _output(options: Namespace, model: bool) -> str:
    """Where the result goes."""
    if options.output is not None:
        return str(options.output)
    if model:
        return models.default_output(options)
    ending = PROGRAMS[options.to].ending
    return output_for(options.file, f'.mxnet{options.mxnet_version}.states' if options.mxnet_version else ending)


def _convert_states(options: Namespace, file: OpenFile, params: Params, output: str) -> Dict[str, Any]:
    with refusing(reading=True):
        contents = read_contents(file, options, params)
    if contents.states is None:
        raise Refused(f'{options.file!r} holds only parameters, no optimizer states. Convert the state file, and '
                      'pass this one as --params.')
    if options.as_rule is not None:
        with refusing():
            contents.states = contents.states.as_rule(options.as_rule)
    names = params.names
    if names and options.to != 'mxnet' and file.kind in NAMELESS:  # names of all in the trainer
        names = [name for name in names if name in contents.states.names]
    if params.arrays is not None and (options.like or options.map
                                      or job.needs_weights(contents.states, options.to, options.verify)):
        contents.parameters = contents.states.under_own_names(params.arrays)
    states = models.states_in_torch_order(options, contents) or contents.states
    task = Job(contents, states, output, options.target or 'mirror', names, options.mxnet_version, options.allow_lossy,
               options.verify)
    with progress(f'writing {os.path.basename(output)}', job.size_of(task), 'write'):
        report = job.convert(task, options.to)
    return {**report, **{key: [in_options(line) for line in report[key]] for key in ('lost', 'report')}}


@contextlib.contextmanager
def _reporting(path: Optional[str]) -> Iterator[Callable[[Dict[str, Any]], Any]]:
    """Yields a function that writes the report. Its file is opened before the conversion, so that both exist or neither."""
    with contextlib.ExitStack() as stack:
        with refusing():
            file = stack.enter_context(atomic.replacing(path)) if path else None
        yield lambda report: file and file.write((dumps(report) + '\n').encode())


def _tell(report: Dict[str, Any], stream: Optional[TextIO] = None) -> None:
    number = f'{len(report["parameters"])} parameters'
    if 'what' in report:
        say(f'{report["output"]}: {report["what"]}, {number}', stream)
        table([('in PyTorch', 'in Gluon', 'shape', 'dtype', 'how')] + [
            (row['name'], row['from'] or '', shape_text(row['shape'], bool(row['dtype'])), row['dtype'], row['how'])
            for row in report['parameters']], stream)
    else:
        say(f'{report["output"]}: {report["optimizer"]} at update {report["num_update"]}, {number}', stream)
    for line in [*('lost: ' + line for line in report['lost']), *report['report']]:
        say('  ' + line, stream)
