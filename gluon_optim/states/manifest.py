"""The manifest of a state file: made from states, turned back into states, and checked."""
import collections
import math
import reprlib
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy

from .errors import StateFileError
from .model import Array, OptimizerStates, ParameterInfo, Parts, Run, Weight
from .nesting import leaves

__all__ = ['CHECKPOINT', 'CODES', 'DAMAGED', 'DTYPES', 'Entry', 'FORMAT', 'INFO', 'METADATA', 'PARTS', 'RECORD', 'TENSOR',
           'UNSIGNED', 'VERSION', 'VERSIONS', 'check', 'check_name', 'check_record', 'key_in', 'manifest_of', 'parts_of', 'plain',
           'run_record', 'show', 'weight_keys']

FORMAT = 'gluon_optim.states'
CHECKPOINT = 'gluon_optim.checkpoint'
PARTS = 'gluon_optim.checkpoint.parts'  # a checkpoint of several nets or trainers, each under a name
VERSION = 2           # that is written
VERSIONS = (1, 2)     # that are read
DTYPES = {'F16': 'float16', 'F32': 'float32', 'F64': 'float64', 'I8': 'int8', 'I16': 'int16', 'I32': 'int32',
           'I64': 'int64', 'U8': 'uint8', 'U16': 'uint16', 'U32': 'uint32', 'U64': 'uint64'}
CODES = {name: code for code, name in DTYPES.items()}
_WEIGHT_DTYPES = (*CODES, 'bool', 'bfloat16')  # types of weights, which are not in the file: whatever frameworks support
DAMAGED = 'The file is damaged or was edited: use another copy of it.'
UNSIGNED = '0' * 64  # replaces the signature while it is computed

Entry = Tuple[str, Tuple[int, ...], int, int]  # one array: dtype, shape, begin, end


def weight_keys(name: str, copies: int) -> List[str]:
    """The keys of a parameter's value, and of those on further devices."""
    return [f'_copies/{k}/{name}' if k else f'_parameters/{name}' for k in range(copies)]


def key_in(part: str, key: str) -> str:
    """The key of an array in a file, from its key in its part."""
    return f'{part}/{key}' if part else key


def manifest_of(parts: Parts, arrays: Mapping[str, Array]) -> Dict[str, Any]:
    """The manifest without its signature and the checksums of ``arrays``. StateFileError for anything JSON cannot hold."""
    manifests = {name: _manifest_of_one(states, run, arrays) for name, (states, run) in parts.items()}
    if '' in manifests:
        return manifests['']
    first = next(iter(manifests.values()))
    return {
        **{key: first[key] for key in _COMMON},
        'format': PARTS,
        'parts': {name: {**{key: value for key, value in manifest.items() if key not in _MANIFEST_PARTS},
                         'weights': manifest['run']['weights']} for name, manifest in manifests.items()},
        'run': {key: value for key, value in first['run'].items() if key != 'weights'},
    }


def _manifest_of_one(states: OptimizerStates, run: Optional[Run], arrays: Iterable[str]) -> Dict[str, Any]:
    strangers = sorted({*states.counts, *states.slots, *states.master, *states.trees} - set(states.names))
    if strangers:
        raise StateFileError(f'counts, slots, trees and masters must belong to parameters. Received: {strangers!r}, '
                             f'which are not among the names {states.names!r}.')
    return {
        'header_sha256': UNSIGNED,
        'format': CHECKPOINT if run else FORMAT,
        'version': VERSION,
        'producer': dict(states.producer),
        'optimizer': states.optimizer,
        'hypers': plain(states.hypers, 'hypers'),
        'num_update': plain(states.num_update, 'num_update'),
        'scheduler': plain(states.scheduler, 'scheduler'),
        'loss_scaler': plain(states.loss_scaler, 'loss_scaler'),
        'parameters': [{
            'name': p.name,
            'full_name': p.full_name,
            'shape': plain(p.shape, p.name),
            'dtype': p.dtype,
            'lr_mult': plain(p.lr_mult, p.name),
            'wd_mult': plain(p.wd_mult, p.name),
            'grad_req': p.grad_req,
            'count': plain(states.counts.get(p.name, 0), p.name),
            'slots': list(states.slots[p.name]) if p.name in states.slots else None,
            'tree': plain(states.trees.get(p.name), p.name),
            'master': p.name in states.master,
        } for p in states.parameters],
        'variables': list(states.variables),
        'attributes': plain(states.attributes, 'attributes'),
        'facts': plain(states.facts, 'facts'),
        'crc32': dict.fromkeys(arrays, '0' * 8),
        **({'run': run_record(run)} if run else {}),
    }


def run_record(run: Run) -> Dict[str, Any]:
    """A run as JSON values, without its arrays. StateFileError for anything JSON cannot hold."""
    record = {name: plain(getattr(run, name), name) for name in ('step', 'epoch', 'batch', 'metrics', 'random', 'extra')}
    return dict(record, weights=[{'name': w.name, 'full_name': w.full_name, 'copies': len(w.copies), 'grad_req': w.grad_req}
                                 for w in run.weights])


def plain(value: Any, where: str) -> Any:
    """``value`` in plain JSON types, or an error that names the attribute JSON cannot hold."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise StateFileError(f'{where} must be a finite number. Received: {value!r}.')
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(x, where) for x in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(x, f'{where}.{key}') for key, x in value.items()}
    raise StateFileError(f'{where} must consist of numbers, strings, lists and dictionaries with string keys. '
                         f'Received: {value!r} of type {type(value).__name__}.')


def parts_of(manifest: Mapping[str, Any], arrays: Mapping[str, numpy.ndarray]) -> Parts:
    """What a checked manifest describes."""
    return {name: (_states_of(own, found), _run_of(own, found)) for name, own, found in _separate(manifest, arrays)}


def _separate(manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> List[Tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each part's name, its manifest as if it were alone in the file, and those of ``arrays`` that belong to it."""
    if manifest['format'] != PARTS:
        return [('', manifest, arrays)]

    def by_part(values: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
        found: Dict[str, Dict[str, Any]] = {name: {} for name in manifest['parts']}
        for key, value in values.items():
            name, _, own = key.partition('/')
            found[name][own] = value
        return found

    common = {**{key: manifest[key] for key in _COMMON}, 'format': CHECKPOINT}
    checksums, found = by_part(manifest['crc32']), by_part(arrays)
    return [(name, {**{key: value for key, value in record.items() if key != 'weights'}, **common, 'crc32': checksums[name],
                    'run': {**manifest['run'], 'weights': record['weights']}}, found[name])
            for name, record in manifest['parts'].items()]


def _states_of(manifest: Mapping[str, Any], arrays: Mapping[str, numpy.ndarray]) -> OptimizerStates:
    """The states that a checked manifest of one part describes."""
    records = manifest['parameters']
    return OptimizerStates(
        optimizer=manifest['optimizer'],
        hypers=manifest['hypers'],
        num_update=manifest['num_update'],
        parameters=[ParameterInfo(r['name'], r['full_name'], tuple(r['shape']), r['dtype'], r['lr_mult'], r['wd_mult'],
                                  r.get('grad_req')) for r in records],
        counts={r['name']: r['count'] for r in records},
        slots={r['name']: {slot: arrays[f'{r["name"]}/{slot}'] for slot in r['slots']}
               for r in records if r['slots'] is not None},
        master={r['name']: arrays[f'{r["name"]}/master'] for r in records if r['master']},
        scheduler=manifest['scheduler'],
        variables={variable: arrays[f'_optimizer/{variable}'] for variable in manifest['variables']},
        loss_scaler=manifest['loss_scaler'],
        producer=manifest['producer'],
        trees={r['name']: r['tree'] for r in records if r.get('tree') is not None},
        attributes=manifest.get('attributes', {}),
        facts=manifest.get('facts'),
    )


def _run_of(manifest: Mapping[str, Any], arrays: Mapping[str, numpy.ndarray]) -> Optional[Run]:
    """The run of a checkpoint, or None for a state file."""
    if 'run' not in manifest:
        return None
    record = dict(manifest['run'])
    record['weights'] = [Weight(w['name'], w['full_name'], [arrays[key] for key in weight_keys(w['name'], w['copies'])],
                                w.get('grad_req')) for w in record['weights']]
    return Run(**record)


# The checks of a manifest: done by the reader, and by the writer before anything is written

def check(manifest: Any, entries: Mapping[str, Entry]) -> None:
    """Refuse a manifest with missing, unknown or impossible contents, or one that lists arrays other than ``entries``."""
    if manifest['format'] == PARTS:
        _check_parts(manifest, entries)
    for name, own, found in _separate(manifest, entries):
        try:
            _check_one(own, found)
        except StateFileError as error:
            raise StateFileError(f'of the part {name!r}, {error}' if name else str(error)) from None


def _check_parts(manifest: Any, entries: Mapping[str, Entry]) -> None:
    """What the parts of a file have in common, and that each array belongs to one of them."""
    check_record(manifest, _MANIFEST_PARTS, 'the manifest')
    check_record(manifest['run'], {key: check for key, check in _RUN.items() if key != 'weights'}, 'the run')
    wanted = {key: check for key, check in _MANIFEST[VERSION].items() if key not in _MANIFEST_PARTS}
    for name, record in manifest['parts'].items():
        check_record(record, {**wanted, 'weights': _list}, f'the part {show(name)}')
    odd = sorted(key for key in {*entries, *manifest['crc32']} if key.split('/')[0] not in manifest['parts'])
    if odd:
        raise StateFileError(f'the arrays in the file must be those of its parts. Received: {show(odd)}. {DAMAGED}')


def check_name(name: Any) -> None:
    """Raise ValueError for what cannot be the name of a part."""
    if not _part(name):
        raise ValueError(f'The name of a net or trainer in a checkpoint must be {_part.__doc__}. Received: {name!r}.')


def _check_one(manifest: Any, entries: Mapping[str, Entry]) -> None:
    version = manifest['version']
    check_record(manifest, (_CHECKPOINT if manifest['format'] == CHECKPOINT else _MANIFEST)[version], 'the manifest')
    listed = [f'_optimizer/{variable}' for variable in manifest['variables']]
    _check_attributes(manifest.get('attributes', {}), manifest['variables'])
    for record in manifest['parameters']:
        check_record(record, _PARAMETER[version], 'a parameter of the manifest')
        if record.get('tree') is not None and list(leaves(record['tree'])) != record['slots']:
            raise StateFileError(f'the slots of {show(record["name"])} must be the arrays of its tree. {DAMAGED}')
        listed += [f'{record["name"]}/{slot}' for slot in record['slots'] or ()]
        if record['master']:
            listed.append(f'{record["name"]}/master')
            _, shape, _, _ = entries.get(listed[-1], (None, None, 0, 0))
            if shape is not None and shape != tuple(record['shape']):
                raise StateFileError(f'{show(listed[-1])} must have the shape of its parameter, {record["shape"]}. '
                                     f'Received: {list(shape)}.')
    listed += _check_run(manifest['run'], version, entries) if 'run' in manifest else []
    for what, keys in (('names of parameters', [r['name'] for r in manifest['parameters']]), ('arrays of the manifest', listed)):
        if len(set(keys)) < len(keys):
            repeated = [key for key, number in collections.Counter(keys).items() if number > 1]
            raise StateFileError(f'the {what} must be unique. Received twice: {show(repeated)}.')
    wanted = set(listed)
    for what, given in (('checksums', manifest['crc32'].keys()), ('arrays in the file', entries.keys())):
        if given != wanted:
            odd = sorted(given ^ wanted)
            raise StateFileError(f'the {what} must be those listed in the manifest. In only one of the two: {show(odd)}.')


def _check_attributes(attributes: Mapping[str, Any], variables: List[str]) -> None:
    """The arrays in the attributes of an optimizer without a rule must be variables: each is called ``attribute:place``."""
    known = set(variables)
    for attribute, tree in attributes.items():
        missing = [place for place in leaves(tree) if f'{attribute}:{place}' not in known]
        if missing:
            raise StateFileError(f'the arrays of the attribute {show(attribute)} must be variables. Received: none for the place '
                                 f'{missing[0]}. {DAMAGED}')


def _check_run(run: Any, version: int, entries: Mapping[str, Entry]) -> List[str]:
    """The keys of the arrays listed by a checkpoint's run."""
    check_record(run, _RUN, 'the run')
    listed: List[str] = []
    for record in run['weights']:
        check_record(record, _WEIGHT[version], 'a weight of the manifest')
        if len(listed) + record['copies'] > len(entries):
            raise StateFileError(f'the weights must be arrays in the file. Received: more than its {len(entries)}. {DAMAGED}')
        keys = weight_keys(record['name'], record['copies'])
        if len({entries[key][:2] for key in keys if key in entries}) > 1:
            raise StateFileError(f'the copies of {show(record["name"])} must have the same shape and type. {DAMAGED}')
        listed += keys
    return listed


Check = Callable[[Any], bool]
show = reprlib.Repr().repr  # a corrupt value can have any size


def _must_be(words: str) -> Callable[[Check], Check]:
    """What a check asks for, as errors say it: its docstring, also under python -OO."""
    def say(check: Check) -> Check:
        check.__doc__ = words
        return check
    return say


def check_record(record: Any, schema: Mapping[str, Check], where: str) -> None:
    if not isinstance(record, dict) or set(record) != set(schema):
        received = (f'without {show(sorted(set(schema) - set(record)))}, with the others {show(sorted(set(record) - set(schema)))}'
                    if isinstance(record, dict) else type(record).__name__)
        raise StateFileError(f'{where} must have the keys {sorted(schema)} and no others. Received: {received}.')
    for key, check in schema.items():
        if not check(record[key]):
            raise StateFileError(f'{key!r} of {where} must be {check.__doc__}. Received: {show(record[key])}.')


def _one_of(values: Any) -> Check:
    return _must_be(f'one of {", ".join(values)}')(lambda x: isinstance(x, str) and x in values)


def _optional(check: Check) -> Check:
    return _must_be(f'{check.__doc__} or null')(lambda x: x is None or check(x))


@_must_be('text')
def _text(x: Any) -> bool:
    return isinstance(x, str)


@_must_be('printable text')
def _word(x: Any) -> bool:
    return isinstance(x, str) and x.isprintable() and x != ''


@_must_be("printable text; no part between slashes may be empty, '.' or '..', and the first must not be '_optimizer' or similar")
def _name(x: Any) -> bool:
    return _word(x) and not {'', '.', '..'} & set(x.split('/')) and x.split('/')[0] not in _RESERVED


@_must_be("printable text without a slash, other than '.', '..', '_optimizer' and similar")
def _part(x: Any) -> bool:
    return _name(x) and '/' not in x


@_must_be('an object of one or more parts under their names')
def _parts(x: Any) -> bool:
    return isinstance(x, dict) and x != {} and all(map(_part, x))


@_must_be('printable text without a slash')
def _key(x: Any) -> bool:
    return _word(x) and '/' not in x


@_must_be('a list of printable texts without a slash')
def _keys(x: Any) -> bool:
    return isinstance(x, list) and all(map(_key, x))


@_must_be("a list of printable texts without a slash, none of them 'master'")
def _slots(x: Any) -> bool:
    return _keys(x) and 'master' not in x


@_must_be('an object of numbers')
def _numbers(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_number, x.values()))


@_must_be('an integer from 1 to 2**53')
def _positive(x: Any) -> bool:
    return _natural(x) and x > 0


@_must_be('an integer from 0 to 2**53')
def _natural(x: Any) -> bool:
    return type(x) is int and 0 <= x <= 2**53


@_must_be('an object of whole numbers from 0 to 2**53')
def _naturals(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_natural, x.values()))


@_must_be('a number')
def _number(x: Any) -> bool:
    return type(x) in (int, float)


@_must_be('true or false')
def _flag(x: Any) -> bool:
    return type(x) is bool


@_must_be('up to 32 integers')
def _shape(x: Any) -> bool:
    # the product of the nonzero sizes must also be one that NumPy can count
    return isinstance(x, list) and len(x) <= 32 and all(map(_natural, x)) and math.prod(max(n, 1) for n in x) <= 2**53


@_must_be('two integers')
def _range(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(_natural, x))


@_must_be('an object')
def _mapping(x: Any) -> bool:
    return isinstance(x, dict)


@_must_be('an object of printable texts')
def _texts(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_word, x)) and all(map(_word, x.values()))


@_must_be('a list')
def _list(x: Any) -> bool:
    return isinstance(x, list)


@_must_be("an object with the two keys 'class', a printable text, and 'attributes', an object")
def _scheduler(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == {'class', 'attributes'} and _word(x['class']) and _mapping(x['attributes'])


@_must_be('64 lower-case hexadecimal digits')
def _signature(x: Any) -> bool:
    return isinstance(x, str) and len(x) == 64 and set(x) <= set('0123456789abcdef')


@_must_be('an object of texts with 8 lower-case hexadecimal digits each')
def _checksums(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(v, str) and len(v) == 8 and set(v) <= set('0123456789abcdef') for v in x.values())


@_must_be('an object of trees under printable texts without a slash')
def _trees(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_key, x))  # the trees themselves: `_check_attributes`


@_must_be('a list of names of parameters')
def _names(x: Any) -> bool:
    return isinstance(x, list) and all(map(_name, x))


@_must_be('an object of numbers under names of parameters')
def _numbers_by_name(x: Any) -> bool:
    return _numbers(x) and all(map(_name, x))


@_must_be('an object of names under names')
def _names_by_name(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_name, x)) and all(map(_name, x.values()))


@_must_be('an object of recurrent layers under names of parameters')
def _layers(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_name, x)) and all(map(_layer, x.values()))


@_must_be("an object of the keys 'mode', 'hidden', 'layers', 'bidirectional' and 'projection'")
def _layer(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == set(_RECURRENT) and all(check(x[key]) for key, check in _RECURRENT.items())


@_must_be('an object of the facts in docs/FORMAT.md and no others')
def _facts(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == set(_FACTS) and all(check(x[key]) for key, check in _FACTS.items())


# Version 1, and what version 2 adds

_MANIFEST_1: Dict[str, Check] = {
    'header_sha256': _signature, 'format': _one_of([FORMAT]), 'version': _natural, 'producer': _texts, 'optimizer': _word,
    'hypers': _mapping, 'num_update': _natural, 'scheduler': _optional(_scheduler), 'loss_scaler': _optional(_mapping),
    'parameters': _list, 'variables': _keys, 'crc32': _checksums,
}
_PARAMETER_1: Dict[str, Check] = {
    'name': _name, 'full_name': _word, 'shape': _shape, 'dtype': _one_of(_WEIGHT_DTYPES), 'lr_mult': _number, 'wd_mult': _number,
    'count': _natural, 'slots': _optional(_slots), 'master': _flag,
}
_WEIGHT_1: Dict[str, Check] = {'name': _name, 'full_name': _word, 'copies': _positive}
_GRAD_REQ = _optional(_one_of(['write', 'add', 'null']))
_FACTS: Dict[str, Check] = {
    'fix_gamma': _names, 'epsilon': _numbers_by_name, 'momentum': _numbers_by_name, 'channels_last': _names, 'packed': _layers,
    'shared': _names_by_name, 'unknown': _names,
}
_RECURRENT: Dict[str, Check] = {
    'mode': _one_of(['lstm', 'gru', 'rnn_tanh', 'rnn_relu']), 'hidden': _positive, 'layers': _positive, 'bidirectional': _flag,
    'projection': _optional(_positive),
}
_MANIFEST = {1: _MANIFEST_1, 2: {**_MANIFEST_1, 'attributes': _trees, 'facts': _optional(_facts)}}
_PARAMETER = {1: _PARAMETER_1, 2: {**_PARAMETER_1, 'grad_req': _GRAD_REQ, 'tree': lambda tree: True}}
_WEIGHT = {1: _WEIGHT_1, 2: {**_WEIGHT_1, 'grad_req': _GRAD_REQ}}
_CHECKPOINT = {version: {**schema, 'format': _one_of([CHECKPOINT]), 'run': _mapping} for version, schema in _MANIFEST.items()}

_COMMON = ('header_sha256', 'format', 'version', 'producer', 'crc32')  # what a file with parts says once, besides its run
_MANIFEST_PARTS: Dict[str, Check] = {**{key: _MANIFEST_1[key] for key in _COMMON}, 'format': _one_of([PARTS]),
                                     'version': _must_be(str(VERSION))(lambda x: x == VERSION), 'parts': _parts, 'run': _mapping}

METADATA: Dict[str, Check] = {'gluon_optim': _text}
TENSOR: Dict[str, Check] = {'dtype': _one_of(DTYPES), 'shape': _shape, 'data_offsets': _range}
_RUN: Dict[str, Check] = {
    'step': _optional(_natural), 'epoch': _optional(_natural), 'batch': _optional(_natural), 'metrics': _numbers,
    'random': _optional(_mapping), 'extra': _mapping, 'weights': _list,
}
# what files of other formats say of states: see `record`
RECORD: Dict[str, Check] = {
    'optimizer': _word, 'hypers': _mapping, 'num_update': _natural, 'scheduler': _optional(_scheduler),
    'loss_scaler': _optional(_mapping), 'producer': _texts, 'parameters': _list, 'counts': _naturals, 'fresh': _list,
}
INFO: Dict[str, Check] = {
    'name': _text, 'full_name': _text, 'shape': _shape, 'dtype': _one_of(_WEIGHT_DTYPES), 'lr_mult': _number, 'wd_mult': _number,
    'grad_req': _GRAD_REQ,
}
_RESERVED = ('_optimizer', '_parameters', '_copies', '__metadata__')  # first parts of other keys
