"""The commands of `gluon-optim` that read files of states: inspect, diff, verify, convert."""
import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
import textwrap
from typing import Any, Callable, Collection, Dict, Iterator, List, Optional, Sequence

from . import cli_models, convert, readers
from .schema import one_of
from .states import atomic, inspection, legacy
from .states.neutral import NO_OPTIMIZER, digest
from .states.progress import watched

__all__ = ['add_commands', 'table']

DELAY = 0.5  # seconds before a progress bar is worth while
PICTURES = ('.png', '.svg', '.pdf')
# options that only some kinds of files have a use for
SPECIAL = {'params': (readers.NAMELESS, "files without names, MXNet's .states and PyTorch's optimizer states"),
           'optimizer': (('PyTorch states',), "PyTorch's optimizer states, which may not say it"),
           'source': (('PyTorch states',), "PyTorch's optimizer states, which may not say it"),
           'allow': (('states',), "MXNet's .states, which name classes")}
NAMES = "a .params or .npz file, a JSON list, a text file with one a line, or a,b,c (one name alone: 'a,')"
NAMELESS = f"names for a file without, MXNet's .states or PyTorch's, in the order of the trainer: {NAMES}"


def add_commands(commands: Any) -> None:
    """Add the commands to an ``argparse`` parser's ``commands``."""
    command = _command(commands, 'inspect', _inspect, 'what is in a file of states, parameters or a checkpoint')
    command.add_argument('--plot', metavar='FILE', help='also write a picture of the magnitudes of each slot, layer by layer '
                         f'({", ".join(PICTURES)})')

    command = commands.add_parser('diff', help='compare two files',
                                  description='Compare two files: exit code 0 if all is equal, 1 if not.')
    command.add_argument('a', help=inspection.READABLE)
    command.add_argument('b', help='likewise, of any kind')
    _add_common(command)
    command.set_defaults(run=_diff)

    _command(commands, 'verify', _verify, 'check that a file is sound and complete',
             f'{NAMELESS}. For other files: the parameters that must be there')

    command = _command(
        commands, 'convert', _convert, 'write states, or a model, for another program',
        f'{NAMELESS}. For states with names, a list chooses parameters and gives their order in the new file (--mxnet-version: the '
        'order of the trainer), and a .params or .npz file gives the weights where they are needed: --to onnx, --verify, --like, '
        '--map, and parameters without state')
    add_conversion(command)


def add_conversion(command: argparse.ArgumentParser) -> None:
    """The options of ``convert`` besides its file."""
    command.add_argument('--to', required=True, choices=sorted({*convert.TARGETS, *cli_models.TARGETS}),
                         help="the program that shall read it; safetensors: a model's weights, "
                         'mxnet: states, in a file of gluon_optim')
    command.add_argument('-o', '--output', metavar='FILE',
                         help='default: beside the input, with the ending of its kind; must not exist then')
    command.add_argument('--target', metavar='CLASS', help="whose class shall go on: 'mirror' keeps everything (default). "
                         f'--to torch: {one_of(convert.CLASSES)}, where torch is the class of torch.optim computing the same, and '
                         "the last are other projects'; --to onnx: 'mirror', 'preview', which are ONNX's own Adam, Momentum and "
                         'Adagrad. docs/CONVERSIONS.md says which optimizers have which')
    command.add_argument('--mxnet-version', type=int, choices=(1, 2), help="--to mxnet: write MXNet's own .states of 1.x or 2.x; "
                         'left out, a file of gluon_optim')
    command.add_argument('--verify', type=_steps, default=0, metavar='N',
                         help='replay N steps on both sides, and write nothing if they differ; needs what runs the file '
                         '(--to mxnet: read it again, whatever N)')
    command.add_argument('--allow-lossy', action='store_true', help='convert although something is lost, and say what')
    command.add_argument('--report', metavar='FILE', help='write what was converted, assumed and lost to FILE, as JSON')
    cli_models.add_options(command)


def _steps(text: str) -> int:
    steps = int(text) if text.isdigit() else 0
    if not 1 <= steps <= 10_000:
        raise argparse.ArgumentTypeError(f'must be a number of steps, 1 to 10000. Received: {text}')
    return steps


def _command(commands: Any, name: str, run: Any, summary: str, params: str = NAMELESS) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + '.')
    command.add_argument('file', help=inspection.READABLE)
    _add_common(command, params)
    command.set_defaults(run=run)
    return command


def _add_common(command: argparse.ArgumentParser, params: str = NAMELESS) -> None:
    command.add_argument('--params', metavar='NAMES', help=params)
    command.add_argument('--allow', metavar='CLASS', action='append', default=[],
                         help="of MXNet's .states: the import path of a class of your own in it, a scheduler's say; its "
                         'attributes are read, nothing is imported. May be repeated')
    command.add_argument('--optimizer', metavar='NAME', help='of a PyTorch file that does not say: the name in `gluon-optim list`')
    command.add_argument('--source', metavar='CLASS', choices=convert.CLASSES,
                         help=f'of a PyTorch file: whose class wrote it, one of {one_of(convert.CLASSES)}')
    command.add_argument('--json', action='store_true', help='for machines')


# Options that do not go together, or with the file: they would be ignored

def _check_used(options: Any, *paths: str, names: Collection[str] = tuple(SPECIAL)) -> None:
    """Refuse those of the options ``names`` that none of the files has a use for."""
    kinds = {readers.kind(path) for path in paths}
    for name in names:
        users, what = SPECIAL[name]
        if getattr(options, name) not in (None, []) and not kinds & {*users, 'unknown'}:
            raise ValueError(f'--{name} is for {what}. Received: {" and ".join(map(repr, paths))}. Leave it out.')


def _check_conversion(options: Any, model: bool) -> None:
    if model:
        for name in ('target', 'mxnet_version', 'verify', *SPECIAL):
            if getattr(options, name):
                raise ValueError(f'--{name.replace("_", "-")} is for optimizer states. Received: a model to be written. Leave it '
                                 'out, or give --what optimizer if the file holds both.')
        return
    classes = convert.TARGETS[options.to].classes
    if options.target is not None and options.target not in classes:
        raise ValueError(f'--target must be {" or ".join(map(repr, classes))} with --to {options.to}. '
                         f'Received: {options.target!r}.')
    if options.mxnet_version and options.to != 'mxnet':
        raise ValueError(f'--mxnet-version goes with --to mxnet. Received: --to {options.to}. Leave it out.')
    _check_used(options, options.file, names=('optimizer', 'source', 'allow'))
    if options.to == 'mxnet' and not (options.mxnet_version and convert.names_of(options.params)[1]):
        _check_used(options, options.file, names=('params',))


# Commands

def _inspect(options: Any) -> int:
    _check_used(options, options.file)
    if options.plot and os.path.splitext(options.plot)[1].lower() not in PICTURES:
        raise ValueError(f'--plot must end in one of {one_of(PICTURES)}. Received: {options.plot!r}.')
    convert.keep_apart({'--plot': options.plot}, {'the input': options.file, '--params': options.params})
    contents = read(options.file, options)
    if options.plot:
        from .states.picture import draw
        with _refusing():
            _whole(options.plot, lambda path: draw(contents, path))
    rows = list(inspection.rows(contents))
    if options.json:
        print(_dumps(dict(contents.about(), arrays=[row._asdict() for row in rows if row.array is not None])))
        return 0
    for line in _about(contents):
        print(line)
    mults = _multipliers(contents)
    table([('parameter', 'shape', 'dtype', 'updates', *mults, 'array', 'norm', 'zeros', 'non-finite')] + [
        (row.parameter, _shape(row.shape, row.array is not None), row.dtype, '' if row.updates is None else str(row.updates),
         *(mult.get(row.parameter, '') for mult in mults.values()), *_measured(row)) for row in rows])
    return 0


def _multipliers(contents: inspection.Contents) -> Dict[str, Dict[str, str]]:
    """'lr_mult' and 'wd_mult' of each parameter, where not all are 1."""
    infos = contents.states.parameters if contents.states else []
    found = {key: {info.name: f'{getattr(info, key):g}' for info in infos} for key in ('lr_mult', 'wd_mult')}
    return {key: mults for key, mults in found.items() if set(mults.values()) - {'1'}}


def _shape(shape: Sequence[int], known: bool) -> str:
    return 'x'.join(map(str, shape)) or ('()' if known else '')


def _measured(row: inspection.Row) -> Sequence[str]:
    return ('-', '', '', '') if row.array is None else (row.array, f'{row.norm:.6g}', f'{row.zeros:.1%}', f'{row.nonfinite:.1%}')


def _diff(options: Any) -> int:
    _check_used(options, options.a, options.b)
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
    _check_used(options, options.file, names=('optimizer', 'source', 'allow'))
    contents = read(options.file, options)
    states = contents.states
    params, names = convert.names_of(options.params)
    if isinstance(params, str):
        names = list(legacy.read_params(params))
    found = inspection.missing(states, names) if states else [
        f'{name} is not in the file' for name in names or () if name not in contents.parameters]
    checked = contents.kind in ('checkpoint', 'states', 'optax states')
    facts = {'file': options.file, 'kind': contents.kind, 'every_byte_checked': checked, 'complete': not found, 'missing': found,
             'digest': None if states is None else digest(states), 'parameters': len(inspection.names_in(contents))}
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
    model = cli_models.asked(options)
    _check_conversion(options, model)
    output = options.output or (cli_models.output_for(options) if model else convert.output_for(
        options.file, options.to, options.mxnet_version))
    mapped = None if options.map == cli_models.SUGGEST else options.map
    convert.keep_apart({'--output': output, '--report': options.report}, {
        'the input': options.file, '--params': options.params, '--map': mapped, '--like': options.like})
    with _reporting(options.report) as write:
        report = _convert_model(options, output) if model else _convert_states(options, output)
        write(report)
    if options.json:
        print(_dumps(report))
    else:
        _tell(report)
    return 0


def _convert_states(options: Any, output: str) -> Dict[str, Any]:
    params, names = convert.names_of(options.params)
    with convert.refusing(reading=True):
        contents = read(options.file, options)
    if contents.states is None:
        raise convert.Refused(f'{options.file!r} holds parameters only, no optimizer states. Convert the file of the states, and '
                              'give this one as --params.')
    if names and options.to != 'mxnet' and readers.kind(options.file) in readers.NAMELESS:  # names of all in the trainer
        names = [name for name in names if name in contents.states.names]
    if isinstance(params, str) and (options.like or options.map
                                    or convert.needs_weights(contents.states, options.to, options.verify)):
        with convert.refusing():
            contents.parameters = legacy.read_params(params)
    states = cli_models.followed(options, contents) or contents.states
    job = convert.Job(contents, states, output, options.target or 'mirror', names, options.mxnet_version, options.allow_lossy,
                      options.verify)
    with _progress(f'writing {os.path.basename(output)}', convert.size_of(job), 'write'):
        return convert.convert(job, options.to)


def _convert_model(options: Any, output: str) -> Dict[str, Any]:
    with _progress(f'reading {os.path.basename(options.file)}', os.path.getsize(options.file), 'read'):
        return cli_models.report_of(options, output)


@contextlib.contextmanager
def _reporting(path: Optional[str]) -> Iterator[Callable[[Dict[str, Any]], Any]]:
    """What writes the report. Its file is begun before the conversion, so that there are both or neither."""
    with contextlib.ExitStack() as stack:
        with _refusing():
            file = stack.enter_context(atomic.replacing(path)) if path else None
        yield lambda report: file and file.write((_dumps(report) + '\n').encode())


def _tell(report: Dict[str, Any]) -> None:
    number = f'{len(report["parameters"])} parameters'
    if 'what' in report:
        print(f'{report["output"]}: {report["what"]}, {number}')
        table([('in PyTorch', 'in Gluon', 'shape', 'dtype', 'how')] + [
            (row['name'], row['from'] or '', _shape(row['shape'], bool(row['dtype'])), row['dtype'], row['how'])
            for row in report['parameters']])
    else:
        print(f'{report["output"]}: {report["optimizer"]} at update {report["num_update"]}, {number}')
    for line in [*('lost: ' + line for line in report['lost']), *report['report']]:
        print('  ' + line)


# Reading and printing

def read(path: str, options: Any) -> inspection.Contents:
    """`readers.read`, with a progress bar on a terminal if tqdm is there."""
    with _progress(f'reading {os.path.basename(path)}', os.path.getsize(path) if os.path.isfile(path) else 0, 'read'):
        params = convert.names_of(options.params)[0] if readers.kind(path) in readers.NAMELESS else None
        if isinstance(params, str):
            params = {name: convert.outline(array) for name, array in legacy.read_params(params).items()}
        return readers.read(path, params, options.optimizer, options.source, getattr(options, 'allow_lossy', False), options.allow)


@contextlib.contextmanager
def _progress(what: str, size: int, way: str) -> Iterator[None]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return
    with tqdm(desc=what, total=size, unit='B', unit_scale=True, leave=False, delay=DELAY,
              disable=None if sys.stderr is not None and sys.stderr.isatty() else True) as bar, watched(bar.update, way):
        yield


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What goes wrong inside is no fault of the input."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise convert.Refused(convert.words(error)) from error


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
             'a net alone, without an optimizer' if states.optimizer == NO_OPTIMIZER else
             f'{states.optimizer or "unknown optimizer"} at update {states.num_update}: ' + _pairs(states.hypers)]
    if states.scheduler:
        lines.append(f'scheduler {states.scheduler["class"]}: ' + _pairs(states.scheduler['attributes']))
    if states.loss_scaler:
        lines.append('loss scaler: ' + _pairs(states.loss_scaler))
    if contents.run is not None:
        run = contents.run
        position = {'step': run.step, 'epoch': run.epoch, 'batch': run.batch, **run.metrics}
        lines.append('run: ' + (_pairs(position) or 'no step given'))
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


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns, wrapped at spaces to the width of the terminal, or to 100; the first row are headings if there are more."""
    widths = _widths(rows, shutil.get_terminal_size((100, 24)).columns)
    for row in rows:
        cells = [[cell] if len(cell) <= width else textwrap.wrap(cell, width) for cell, width in zip(row, widths)]
        for line in itertools.zip_longest(*cells, fillvalue=''):
            print('  ' + '  '.join(f'{cell:{width}}' for cell, width in zip(line, widths)).rstrip())


def _widths(rows: Sequence[Sequence[str]], room: int) -> List[int]:
    """Of each column. The widest give way, but no word is cut: names must stay whole."""
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    words = [max((len(word) for cell in column for word in cell.split()), default=1) for column in columns]
    while sum(widths) + 2 * len(widths) > room:
        wide = [k for k, width in enumerate(widths) if width > words[k]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return [max(width, 1) for width in widths]
