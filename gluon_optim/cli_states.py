"""The commands of `gluon-optim` that read files of states: inspect, diff, verify, convert."""
import argparse
import contextlib
import json
import os
import sys
from typing import Any, Dict, Iterator, List

from . import cli_models, convert, readers
from .states import atomic, inspection, legacy
from .states.neutral import digest
from .states.progress import watched

__all__ = ['add_commands', 'table']

DELAY = 0.5  # seconds before a progress bar is worth while


def add_commands(commands: Any) -> None:
    """Add the commands to an ``argparse`` parser's ``commands``."""
    command = _command(commands, 'inspect', _inspect, 'what is in a file of states, parameters or a checkpoint')
    command.add_argument('--plot', metavar='FILE',
                         help='also write a picture of the magnitudes of each slot, layer by layer (.png, .svg, .pdf)')

    command = commands.add_parser('diff', help='compare two files',
                                  description='Compare two files: exit code 0 if all is equal, 1 if not.')
    command.add_argument('a')
    command.add_argument('b')
    _add_common(command)
    command.set_defaults(run=_diff)

    _command(commands, 'verify', _verify, 'check that a file is sound and complete')

    command = _command(commands, 'convert', _convert, 'write states, or a model, for another program')
    add_conversion(command)


def add_conversion(command: argparse.ArgumentParser) -> None:
    """The options of ``convert`` besides its file."""
    command.add_argument('--to', required=True, choices=sorted({*convert.TARGETS, *cli_models.TARGETS}),
                         help='the program that shall read it')
    command.add_argument('-o', '--output', metavar='FILE',
                         help='default: beside the input, with the ending of its kind; must not exist then')
    command.add_argument('--target', default='mirror', help="class of that program: 'mirror' keeps everything (default); "
                         "'torch' is the class of torch.optim computing the same, 'preview' ONNX's own Adam, Momentum and Adagrad")
    command.add_argument('--mxnet-version', type=int, choices=(1, 2), help="--to mxnet: write MXNet's own .states of 1.x or 2.x; "
                         'left out, a file of gluon_optim')
    command.add_argument('--verify', type=_steps, default=0, metavar='N',
                         help='replay N steps on both sides, and write nothing if they differ; needs what runs the file')
    command.add_argument('--allow-lossy', action='store_true', help='convert although something is lost, and say what')
    command.add_argument('--report', metavar='FILE', help='write what was converted, assumed and lost to FILE, as JSON')
    cli_models.add_options(command)


def _steps(text: str) -> int:
    steps = int(text) if text.isdigit() else 0
    if not 1 <= steps <= 10_000:
        raise argparse.ArgumentTypeError(f'must be a number of steps, 1 to 10000. Received: {text}')
    return steps


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + '.')
    command.add_argument('file')
    _add_common(command)
    command.set_defaults(run=run)
    return command


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument('--params', metavar='NAMES',
                         help="names for MXNet's .states, which has none, in the order of the trainer: a .params file, "
                         'a JSON list, a text file with one a line, or a,b,c')
    command.add_argument('--optimizer', metavar='NAME', help='of a PyTorch file that does not say: the name in `gluon-optim list`')
    command.add_argument('--source', metavar='CLASS', help='of a PyTorch file: the class that wrote it, as for --target')
    command.add_argument('--json', action='store_true', help='for machines')


# Commands

def _inspect(options: Any) -> int:
    contents = read(options.file, options)
    if options.plot:
        from .states.picture import draw
        with _refusing():
            _whole(options.plot, lambda path: draw(contents, path))
    rows = list(inspection.rows(contents))
    if options.json:
        print(_dumps(dict(contents.about(), arrays=[row._asdict() for row in rows])))
        return 0
    for line in _about(contents):
        print(line)
    table([('parameter', 'shape', 'dtype', 'updates', 'array', 'norm', 'zeros', 'non-finite')] + [
        (row.parameter, 'x'.join(map(str, row.shape)) or '()', row.dtype, '' if row.updates is None else str(row.updates),
         row.array, f'{row.norm:.6g}', f'{row.zeros:.1%}', f'{row.nonfinite:.1%}') for row in rows])
    return 0


def _diff(options: Any) -> int:
    a, b = read(options.a, options), read(options.b, options)
    differences = inspection.compare(a, b)
    if options.json:
        print(_dumps({'equal': not differences, 'differences': [difference._asdict() for difference in differences]}))
    elif not differences:
        print('equal')
    else:
        table([('what', 'a', 'b', 'elements', 'largest difference')] + [
            (d.what, _short(d.a), _short(d.b), '' if d.elements is None else str(d.elements),
             '' if d.largest is None else f'{d.largest:.6g}') for d in differences])
    return 1 if differences else 0


def _verify(options: Any) -> int:
    contents = read(options.file, options)
    states = contents.states
    params, names = convert.names_of(options.params)
    if isinstance(params, str):
        names = list(legacy.read_params(params))
    found = [] if states is None else inspection.missing(states, names)
    checked = contents.kind in ('checkpoint', 'states', 'optax states')
    facts = {'file': options.file, 'kind': contents.kind, 'every_byte_checked': checked, 'complete': not found, 'missing': found,
             'digest': None if states is None else digest(states), 'parameters': len(inspection.arrays_of(contents))}
    if options.json:
        print(_dumps(facts))
    else:
        how = 'every byte has its checksum' if checked else 'it can be read as a whole; files of this kind have no checksums'
        print(f'{contents.kind}: {how}')
        print(f'{facts["parameters"]} parameters' + (f', digest {facts["digest"]}' if facts['digest'] else ''))
        for line in found:
            print('incomplete: ' + line)
    return 1 if found else 0


def _convert(options: Any) -> int:
    if cli_models.asked(options):
        return _convert_model(options)
    with convert.refusing(reading=True):
        contents = read(options.file, options)
    if contents.states is None:
        raise convert.Refused(f'{options.file!r} holds parameters only, no optimizer states. Convert the file of the states, and '
                              'give this one as --params.')
    params, names = convert.names_of(options.params)
    if isinstance(params, str) and (options.like or options.map
                                    or convert.needs_weights(contents.states, options.to, options.verify)):
        with convert.refusing():
            contents.parameters = legacy.read_params(params)
    states = cli_models.followed(options, contents) or contents.states
    output = options.output or convert.output_for(options.file, options.to, options.mxnet_version)
    job = convert.Job(contents, states, output, options.target, names, options.mxnet_version, options.allow_lossy,
                      options.verify)
    with _progress(f'writing {os.path.basename(output)}', convert.size_of(job), 'write'):
        report = convert.convert(job, options.to)
    if _reported(options, report):
        return 0
    print(f'{output}: {report["optimizer"]} at update {report["num_update"]}, {len(report["parameters"])} parameters')
    for line in [*('lost: ' + line for line in report['lost']), *report['report']]:
        print('  ' + line)
    return 0


def _convert_model(options: Any) -> int:
    with _progress(f'reading {os.path.basename(options.file)}', os.path.getsize(options.file), 'read'):
        report = cli_models.report_of(options)
    if _reported(options, report):
        return 0
    print(f'{report["output"]}: {report["what"]}, {len(report["parameters"])} parameters')
    table([('in PyTorch', 'in Gluon', 'shape', 'dtype', 'how')] + [
        (row['name'], row['from'] or '', 'x'.join(map(str, row['shape'])) or '()', row['dtype'], row['how'])
        for row in report['parameters']])
    for line in report['report']:
        print('  ' + line)
    return 0


def _reported(options: Any, report: Dict[str, Any]) -> bool:
    """Write the report where the options want it; True if nothing else is to be printed."""
    if options.report:
        with _refusing(), atomic.replacing(options.report) as file:
            file.write((_dumps(report) + '\n').encode())
    if options.json:
        print(_dumps(report))
    return bool(options.json)


# Reading and printing

def read(path: str, options: Any) -> inspection.Contents:
    """`readers.read`, with a progress bar on a terminal if tqdm is there."""
    with _progress(f'reading {os.path.basename(path)}', os.path.getsize(path) if os.path.isfile(path) else 0, 'read'):
        kind = readers.kind(path)
        params = convert.names_of(options.params)[0] if kind in ('states', 'PyTorch states') else None
        if isinstance(params, str):
            params = {name: convert.outline(array) for name, array in legacy.read_params(params).items()}
        return readers.read(path, params, options.optimizer, options.source, getattr(options, 'allow_lossy', False))


@contextlib.contextmanager
def _progress(what: str, size: int, way: str) -> Iterator[None]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return
    with tqdm(desc=what, total=size, unit='B', unit_scale=True, leave=False, delay=DELAY,
              disable=None if sys.stderr.isatty() else True) as bar, watched(bar.update, way):
        yield


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What goes wrong inside is no fault of the input."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise convert.Refused(str(error)) from error


def _whole(path: str, write: Any) -> None:
    """``write`` to another name with the same ending, and give it its own when it is complete."""
    root, ending = os.path.splitext(path)
    partial = f'{root}.{os.getpid()}.partial{ending}'
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def _about(contents: inspection.Contents) -> List[str]:
    states = contents.states
    if states is None:
        return [f'{contents.path}: parameters of MXNet']
    producer = ', '.join(f'{name} {version}' for name, version in states.producer.items())
    lines = [f'{contents.path}: {contents.kind}' + (f', written by {producer}' if producer else ''),
             f'{states.optimizer or "unknown optimizer"} at update {states.num_update}: ' + _pairs(states.hypers)]
    if states.scheduler:
        lines.append(f'scheduler {states.scheduler["class"]}: ' + _pairs(states.scheduler['attributes']))
    if states.loss_scaler:
        lines.append('loss scaler: ' + _pairs(states.loss_scaler))
    if contents.run is not None:
        run = contents.run
        lines.append('run: ' + _pairs({'step': run.step, 'epoch': run.epoch, 'batch': run.batch, **run.metrics}))
        if run.extra:
            lines.append('extra: ' + json.dumps(run.extra, ensure_ascii=False))
    return lines + [convert.in_options(line) for line in states.report]


def _pairs(values: Dict[str, Any]) -> str:
    return ', '.join(f'{name} {value!r}' for name, value in values.items() if value is not None)


def _short(value: Any) -> str:
    text = '-' if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + '...'


def _dumps(value: Any) -> str:
    """Strict JSON: infinities and NaN, which it does not have, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value.item() if hasattr(value, 'item') and getattr(value, 'size', 2) == 1 else value


def table(rows: List[Any]) -> None:
    """Print columns; the first row are headings if there are more."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))] if rows else []
    for row in rows:
        print('  ' + '  '.join(f'{cell:{width}}' for cell, width in zip(row, widths)).rstrip())
