"""The commands that examine files: inspect, diff, verify."""
import json
import sys
from argparse import Namespace
from typing import Any, Dict, List, Optional, Sequence

from ..display import of_part
from ..schema import one_of
from ..states import inspection
from ..states.files import Kind
from ..states.model import NO_OPTIMIZER, STATISTICS, digest
from ..transfer.names import read_params
from ..transfer.read import READABLE
from ..transfer.refused import refusing
from .options import NAMELESS_FILES, add_command, add_common, check_used, opened, read_all
from .paths import PICTURES, check_picture, keep_apart, write_whole
from .text import dumps, in_options, pairs, say, say_json, shape_text, short, table

__all__ = ['add_commands']

_ARRAYS = {Kind.PARAMS: 'parameters of MXNet', Kind.NPZ: 'arrays of NumPy, or parameters of MXNet 2',
           Kind.MODEL: 'weights of a model'}


def add_commands(commands: Any) -> None:
    """Add the commands to an ``argparse`` parser's ``commands``."""
    command = add_command(commands, 'inspect', _inspect, 'show the contents of a file of states, parameters or a checkpoint')
    command.add_argument('--plot', metavar='FILE', help='also write a picture of the magnitudes of each slot, layer by layer '
                         f'({", ".join(PICTURES)})')

    command = commands.add_parser('diff', help='compare two files',
                                  description='Compare two files: exit code 0 if they are equal, 1 if not.')
    command.add_argument('a', help=READABLE)
    command.add_argument('b', help='likewise, of any kind')
    add_common(command)
    command.set_defaults(run=_diff)

    add_command(commands, 'verify', _verify, 'check that a file is intact and complete',
             f'{NAMELESS_FILES}. For other files: the parameters that must be present')


def _inspect(options: Namespace) -> int:
    check_picture(options.plot)
    keep_apart({'--plot': options.plot}, {'the input': options.file, '--params': options.params})
    with opened(options.file) as file:
        check_used(options, file)
        parts = read_all(file, options, read_params(options.params))
    if options.plot:
        from ..states.picture import draw
        if len(parts) > 1:
            raise ValueError(f'--plot draws one net and trainer. Received: {options.file!r}, which holds {one_of(parts)}. '
                             f'Pass --part {next(iter(parts))}, for example.')
        contents, = parts.values()
        with refusing():
            write_whole(options.plot, lambda path: draw(contents, path))
        say(f'picture: {options.plot}', sys.stderr)
    if options.json:
        described = {name: _described(contents) for name, contents in parts.items()}
        say_json(described.get('', {'path': options.file, 'parts': described}))
        return 0
    for name, contents in parts.items():
        if name:
            say(f'== {name}')
        _show(contents)
    return 0


def _described(contents: inspection.Contents) -> Dict[str, Any]:
    """For `say_json`, which makes the dictionaries of rows one at a time."""
    return dict(contents.about(), arrays=[row._asdict for row in inspection.rows(contents) if row.array is not None])


def _show(contents: inspection.Contents) -> None:
    for line in _about(contents):
        say(line)
    mults = _multipliers(contents)
    table([('parameter', 'shape', 'dtype', 'updates', *mults, 'array', 'norm', 'zeros', 'non-finite')] + [
        (row.parameter, shape_text(row.shape, row.array is not None), row.dtype, '' if row.updates is None else str(row.updates),
         *(mult.get(row.parameter, '') for mult in mults.values()), *_measured(row)) for row in inspection.rows(contents)])


def _multipliers(contents: inspection.Contents) -> Dict[str, Dict[str, str]]:
    """'lr_mult' and 'wd_mult' of each parameter, if not all are 1, and 'grad_req', if not all are trained."""
    infos = contents.states.parameters if contents.states else []
    found = {key: {info.name: f'{getattr(info, key):g}' for info in infos} for key in ('lr_mult', 'wd_mult')
             if any(getattr(info, key) != 1 for info in infos)}
    known = {info.name: info.grad_req for info in infos if info.grad_req is not None and not info.name.endswith(STATISTICS)}
    return {**{key: mults for key, mults in found.items() if set(mults.values()) - {'1'}},
            **({'grad_req': known} if set(known.values()) - {'write'} else {})}


def _measured(row: inspection.Row) -> Sequence[str]:
    return ('-', '', '', '') if row.array is None else (row.array, f'{row.norm:.6g}', f'{row.zeros:.1%}', f'{row.nonfinite:.1%}')


def _diff(options: Namespace) -> int:
    with opened(options.a) as one, opened(options.b) as other:
        check_used(options, one, other)
        params = read_params(options.params)
        a, b = read_all(one, options, params), read_all(other, options, params)
    if ('' in a) != ('' in b):
        raise ValueError(f'Both files must hold several nets or trainers, or neither. Received: {options.a!r} with '
                         f'{_names(a)}, {options.b!r} with {_names(b)}.')
    differences = []
    for name in {**a, **b}:
        if name in a and name in b:
            differences += [found._replace(what=of_part(name, found.what)) for found in inspection.compare(a[name], b[name])]
        else:
            differences.append(inspection.Difference(name, name in a, name in b))
    if options.json:
        print(dumps({'equal': not differences, 'differences': [difference._asdict() for difference in differences]}))
    elif not differences:
        say('equal')
    else:
        table([('what', 'a', 'b', 'elements', 'largest difference')] + [
            (d.what, short(d.a), short(d.b), '' if d.elements is None else str(d.elements),
             '' if d.largest is None else f'{d.largest:.6g}') for d in differences])
    return 1 if differences else 0


def _names(parts: Dict[str, inspection.Contents]) -> str:
    return 'one' if '' in parts else one_of(parts)


def _verify(options: Namespace) -> int:
    with opened(options.file) as file:
        check_used(options, file, names=('optimizer', 'source', 'allow', 'part'))
        params = read_params(options.params)
        parts = read_all(file, options, params)
    names = params.names if params.arrays is None else list(params.arrays)
    if names and len(parts) > 1:
        raise ValueError(f'--params goes with one net and trainer. Received: {options.file!r}, which holds {one_of(parts)}. '
                         f'Pass --part {next(iter(parts))}, for example.')
    found = {name: _facts(options.file, contents, names) for name, contents in parts.items()}
    complete = all(facts['complete'] for facts in found.values())
    if options.json:
        print(dumps(found.get('', {'file': options.file, 'complete': complete, 'parts': found})))
        return 0 if complete else 1
    for name, facts in found.items():
        how = ('every byte matches its checksum' if facts['every_byte_checked']
               else 'all of it can be read; files of this kind have no checksums')
        say(of_part(name, f'{facts["kind"]}: {how}'))
        states = parts[name].states
        # of the optimizer's states: one for a net alone would be the same for all weights
        has_digest = states is not None and states.optimizer != NO_OPTIMIZER
        say(of_part(name, f'{facts["parameters"]} parameters' + (f', states digest {facts["digest"]}' if has_digest else '')))
        for line in facts['missing']:
            say(of_part(name, 'incomplete: ' + line))
    return 0 if complete else 1


def _facts(path: str, contents: inspection.Contents, names: Optional[List[str]]) -> Dict[str, Any]:
    states = contents.states
    found = inspection.missing(states, names) if states else [
        f'{name} is not in the file' for name in names or () if name not in contents.parameters]
    return {'file': path, 'kind': contents.kind.value, 'every_byte_checked': contents.kind in (
                Kind.CHECKPOINT, Kind.STATES, Kind.OPTAX), 'complete': not found, 'missing': found,
            'digest': None if states is None else digest(states), 'parameters': len(inspection.names_in(contents))}


def _about(contents: inspection.Contents) -> List[str]:
    states = contents.states
    if states is None:
        return [f'{contents.path}: {_ARRAYS[contents.kind]}']
    producer = ', '.join(f'{name} {version}' for name, version in states.producer.items())
    lines = [f'{contents.path}: {contents.kind.value}' + (f', written by {producer}' if producer else ''),
             'a net alone, without an optimizer' if states.optimizer == NO_OPTIMIZER else
             f'{states.optimizer or "unknown optimizer"} at update {states.num_update}: ' + pairs(states.hypers)]
    if states.scheduler:
        lines.append(f'scheduler {states.scheduler["class"]}: ' + pairs(states.scheduler['attributes']))
    if states.loss_scaler:
        lines.append('loss scaler: ' + pairs(states.loss_scaler))
    if contents.run is not None:
        run = contents.run
        position = {'step': run.step, 'epoch': run.epoch, 'batch': run.batch, **run.metrics}
        lines.append('run: ' + (pairs(position) or 'no step given'))
        if run.extra:
            text = json.dumps(run.extra, ensure_ascii=False)
            more = f' ({len(text)} characters; --json prints all of them)' * (len(text) > 200)
            lines.append(f'extra: {short(text, 200)}{more}')
    return lines + [in_options(line) for line in states.report]
