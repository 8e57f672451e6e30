"""MXNet's own files, read without MXNet: recorded files of five versions, files of the MXNet that is installed, and bad ones.

The recorded files in tests/legacy were written by `make_fixtures.py` there; ``expected.npz`` is what MXNet read from them.
"""
import collections
import copyreg
import functools
import json
import operator
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import work
from mutate import mutated

from gluon_optim.states.file_part import SMALL
from gluon_optim.states.files import Kind, kind_of
from gluon_optim.states.mxnet_files import inert_pickle, ndarray_format
from gluon_optim.states.mxnet_files import reader as legacy
from gluon_optim.states.mxnet_files.reader import UnreadableFile, read_params, read_states

FILES = Path(__file__).parent / 'legacy'
VERSIONS = ['0.9.5', '0.11.0', '1.5.1', '1.9.1', '2.0.0b1']
RECORDED = sorted(path for version in VERSIONS for path in (FILES / version).glob('*.[ps]*s'))

# What each place in a state holds, as the sources of MXNet's optimizers say; written down apart from the table under test.
PLACES = {
    **{name: {'': 'momentum'} for name in ('sgd', 'nag', 'signum', 'lars', 'lbsgd')},
    'adagrad': {'': 'history'}, 'sgld': {}, 'dcasgd': {'0': 'momentum', '1': 'previous_weight'},
    'rmsprop': {'': 'n', '0': 'n', '1': 'g', '2': 'delta'}, 'adadelta': {'0': 'acc_g', '1': 'acc_delta'},
    'ftrl': {'0': 'z', '1': 'n'}, 'ftml': {'0': 'd', '1': 'v', '2': 'z'},
    **{name: {'0': 'mean', '1': 'var'} for name in ('adam', 'adamax', 'nadam', 'lamb', 'lans', 'adamw', 'adabelief')},
}
BUILTINS = ['adadelta', 'adagrad', 'adam', 'adamax', 'dcasgd', 'ftml', 'ftrl', 'lamb', 'lars', 'lbsgd', 'nadam', 'nag',
            'rmsprop', 'sgd', 'sgld', 'signum']
ARGUMENTS = {'sgd': {'momentum': 0.9}, 'nag': {'momentum': 0.9}, 'lars': {'momentum': 0.9},
             'lbsgd': {'momentum': 0.9, 'batch_scale': 2, 'updates_per_epoch': 4, 'begin_epoch': 2}}


def named(name, flat, version, master):
    """What a state's arrays, known by their places, are called; written down apart from the code under test."""
    if not master:
        return {PLACES[name][place]: array for place, array in flat.items()}
    at = '1' if version[0] == '1' and name in ('sgd', 'nag', 'lars') else '0'
    rest = {place[1:]: array for place, array in flat.items() if place[0] != at}
    return {'master': flat[at], **{PLACES[name][place]: array for place, array in rest.items()}}


def arrays_of(states, name):
    return {**states.slots[name], **({'master': states.master[name]} if name in states.master else {})}


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        np.testing.assert_array_equal(found[key], array, key)


def bfloat16(bits):
    return np.left_shift(bits.astype('uint32'), 16).view('float32')


@functools.lru_cache(maxsize=None)
def expected(version):
    with np.load(FILES / version / 'expected.npz') as data:
        return dict(data)


def wanted(path):
    """The recorded arrays of one file, by the rest of their keys."""
    start = path.name + '/'
    return {key[len(start):]: array for key, array in expected(path.parent.name).items() if key.startswith(start)}


def write(tmp_path, data, name='file'):
    path = tmp_path / name
    path.write_bytes(data)
    return path


# Recorded files

def test_every_version_is_recorded():
    for version in VERSIONS:
        provenance = json.loads((FILES / version / 'provenance.json').read_text())
        assert provenance['mxnet'].replace('beta', 'b') == version
    assert len(RECORDED) > 90
    assert {path.name[:-7] for path in RECORDED if path.suffix == '.states' and path.parent.name == '1.9.1'} >= {
        name + form for name in BUILTINS for form in ('', '-master')}


@pytest.mark.parametrize('path', [p for p in RECORDED if p.suffix == '.params'], ids=lambda p: f'{p.parent.name}/{p.name}')
def test_recorded_parameters(path):
    arrays = {re.sub('^(arg|aux):', '', name): array for name, array in wanted(path).items()}
    if 'bfloat16' in path.name:
        arrays = {name: bfloat16(array) for name, array in arrays.items()}
    assert arrays
    assert_equal(read_params(path), arrays)
    is_zip = path.name.startswith('npx') or (path.name == 'net.params' and path.parent.name == '2.0.0b1')
    assert kind_of(path) is (Kind.NPZ if is_zip else Kind.PARAMS)


@pytest.mark.parametrize('version', ['1.9.1', '2.0.0b1'])
def test_recorded_network(version):
    """Which state belongs to which of 11 equal layers: 1.9 sorts by dense10_ before dense1_, 2.0 by 1. before 10."""
    path = FILES / version / 'net.params'
    assert kind_of(path) is (Kind.PARAMS if version == '1.9.1' else Kind.NPZ)
    for params in (path, {name: array.shape for name, array in read_params(path).items()}):
        states = read_states(path.with_suffix('.states'), params)
        assert len(states.names) == 22 if version == '1.9.1' else 26
        assert_equal({name: slots['momentum'] for name, slots in states.slots.items()}, wanted(path.with_suffix('.states')))
    assert states.names[2] == ('10.bias' if version == '1.9.1' else '1.bias')
    assert all(states.counts[name] == (name in states.slots) for name in states.names)


@pytest.mark.parametrize(
    'path', [p for p in RECORDED if p.suffix == '.states' and p.stem != 'net'], ids=lambda p: f'{p.parent.name}/{p.name}')
def test_recorded_states(path):
    version, name = path.parent.name, re.split('[-.]', path.name)[0]
    states, arrays = read_states(path), wanted(path)
    flat = collections.defaultdict(dict)
    for key, array in arrays.items():
        index, place = key.split('/')
        flat[int(index)][place] = array
    bare = states.optimizer == ''
    assert bare == (version[0] == '0' or 'bare' in path.name)
    assert states.names == (['0', '1'] if bare else ['a_weight', 'b_bias'])
    for index, parameter in enumerate(states.parameters):
        if bare:
            assert_equal(states.slots[parameter.name], flat[index])
        elif name == 'rmsprop' and len(flat[index]) == 3 and version[0] == '2':
            assert_equal(states.slots[parameter.name], dict(zip(['g', 'n', 'delta'], (flat[index][place] for place in '012'))))
        else:
            assert_equal(arrays_of(states, parameter.name), named(name, flat[index], version, 'master' in path.name))
        assert parameter.shape == ((2, 3), (4,))[index] or name == 'sgld'
        if not bare:
            assert parameter.dtype == ('float16' if 'master' in path.name else 'float32')
    if not bare:
        steps = 1 if 'centered' in path.name or 'unfused' in path.name else 4 if 'scheduled' in path.name else 3
        begin = 7 if 'scheduled' in path.name else 0
        assert states.optimizer == ('mxnet.adamw' if name == 'adamw' else name)
        assert states.counts == dict.fromkeys(states.names, steps) and states.num_update == begin + steps
        assert states.producer == {'mxnet': version[0] + '.x'}
        assert set(states.hypers) >= {'learning_rate', 'wd', 'rescale_grad', 'clip_gradient'}
    assert kind_of(path) is Kind.MXNET_STATES


@pytest.mark.parametrize('path', [FILES / '1.9.1/rmsprop-centered.states', FILES / '2.0.0b1/rmsprop-centered.states',
                                  FILES / '2.0.0b1/rmsprop-unfused.states'], ids=lambda p: f'{p.parent.name}/{p.name}')
def test_slots_have_the_names_of_what_they_hold(path):
    # after one update g = 0.1 gradient and n = 0.1 gradient^2; MXNet 2 keeps them in another order
    for slots in read_states(path).slots.values():
        np.testing.assert_allclose(slots['n'] * 0.1, slots['g'] ** 2, rtol=1e-5)


def test_hyper_parameters_scheduler_and_multipliers():
    states = read_states(FILES / '1.9.1/adam-scheduled.states')
    assert states.hypers == {'learning_rate': 0.25, 'wd': 1e-4, 'rescale_grad': 1.0, 'clip_gradient': 2.0, 'beta1': 0.9,
                             'beta2': 0.999, 'epsilon': 1e-8, 'lazy_update': True}
    assert states.scheduler['class'] == 'mxnet.lr_scheduler.MultiFactorScheduler'
    assert states.scheduler['attributes'] == {
        'base_lr': 0.0625, 'warmup_steps': 1, 'warmup_final_lr': 0.01, 'warmup_begin_lr': 0, 'warmup_mode': 'linear',
        'step': [2, 5], 'cur_step_ind': 2, 'factor': 0.5, 'count': 5}
    assert [p.wd_mult for p in states.parameters] == [1.0, 0.0]  # MXNet: no decay on what is called bias
    assert states.report == []


def test_arguments_keep_the_names_of_their_version():
    old, new = (read_states(FILES / version / 'adagrad.states').hypers for version in ('1.9.1', '2.0.0b1'))
    assert old['eps'] == 1e-7 and 'epsilon' not in old and new['epsilon'] == 1e-6 and 'eps' not in new
    assert read_states(FILES / '1.9.1/lbsgd.states').hypers['begin_epoch'] == 2
    # 2.0 turns this number into an array
    assert read_states(FILES / '2.0.0b1/adamw.states').hypers['rescale_grad'] == 1.0


def test_variables_of_the_whole_optimizer():
    nadam = read_states(FILES / '1.9.1/nadam.states').variables
    assert set(nadam) == {'m_schedule'} and 0 < nadam['m_schedule'] < 0.1
    lars = read_states(FILES / '1.9.1/lars.states').variables
    assert {name: float(value) for name, value in lars.items()} == {'last_lr': 0.01, 'cur_lr': 0.01}
    lbsgd = read_states(FILES / '1.9.1/lbsgd.states').variables
    assert set(lbsgd) == {'cum_grad:a_weight', 'num_cums:a_weight', 'cum_grad:b_bias', 'num_cums:b_bias'}
    assert lbsgd['cum_grad:a_weight'].shape == (2, 3) and lbsgd['num_cums:a_weight'] == 11


def test_any_device(tmp_path):
    data = (FILES / '1.9.1/dict.params').read_bytes()
    on_cpu, on_gpu = struct.pack('<ii', 1, 0), struct.pack('<ii', 2, 7)
    shape = struct.pack('<iqq', 2, 2, 3)
    moved = data.replace(shape + on_cpu, shape + on_gpu)
    assert moved.count(on_gpu) == 5
    assert_equal(read_params(write(tmp_path, moved)), wanted(FILES / '1.9.1/dict.params'))


def test_kinds(tmp_path):
    header = json.dumps({'__metadata__': {}}).encode()
    assert kind_of(write(tmp_path, struct.pack('<Q', len(header)) + header)) is Kind.SAFETENSORS
    assert kind_of(write(tmp_path, b'')) is kind_of(write(tmp_path, b'{"a": 1}' * 9)) is Kind.UNKNOWN
    pickles = [pickle.dumps({0: None}, protocol) for protocol in range(6 if sys.version_info >= (3, 8) else 5)]
    assert {kind_of(write(tmp_path, data)) for data in pickles} == {Kind.MXNET_STATES}
    with pytest.raises(OSError):
        kind_of(tmp_path / 'absent')
    with pytest.raises(UnreadableFile, match='must be a file'):
        read_params(tmp_path)
    with pytest.raises(UnreadableFile, match='must be a file'):
        read_states(os.devnull)


def test_errors_say_what_the_file_is():
    with pytest.raises(UnreadableFile, match='at byte 0: .* use read_params'):
        read_states(FILES / '1.9.1/dict.params')
    with pytest.raises(UnreadableFile, match='at byte 0: .* use read_states'):
        read_params(FILES / '1.9.1/adam.states')


@pytest.mark.parametrize('protocol', range(6))
def test_every_protocol(tmp_path, protocol):
    data = (FILES / '1.9.1/adam-scheduled.states').read_bytes()
    assert_same(read_states(write(tmp_path, repickled(data, protocol))), read_states(FILES / '1.9.1/adam-scheduled.states'))


def assert_same(found, wanted):
    for info in wanted.parameters:
        info.grad_req = None  # which MXNet does not save
    assert (found.optimizer, found.hypers, found.num_update, found.counts, found.scheduler, found.parameters) == (
        wanted.optimizer, wanted.hypers, wanted.num_update, wanted.counts, wanted.scheduler, wanted.parameters)
    for name in wanted.names:
        assert_equal(arrays_of(found, name), arrays_of(wanted, name))
    assert_equal(found.variables, wanted.variables)


def repickled(data, protocol):
    """The same pickle in another protocol: with stand-ins for MXNet's classes, as MXNet need not be installed."""
    made = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if not module.startswith('mxnet'):
                return super().find_class(module, name)
            if (module, name) not in made:
                members = {'__module__': module, '__qualname__': name}
                if name == 'NDArray':
                    members.update(__init__=lambda self, handle: None,
                                   __reduce__=lambda self: (type(self), (None,), self.__dict__))
                made[module, name] = type(name, (), members)
            return made[module, name]

    import io
    value = Reader(io.BytesIO(data)).load()
    parts = [module.split('.') for module, _ in made]
    modules = {'.'.join(names[:i]): type(sys)('.'.join(names[:i])) for names in parts for i in range(1, len(names) + 1)}
    for (module, name), cls in made.items():
        setattr(modules[module], name, cls)
    saved = {module: sys.modules.get(module) for module in modules}
    sys.modules.update(modules)
    try:
        return pickle.dumps(value, protocol)
    finally:
        for module, old in saved.items():
            sys.modules.pop(module)
            if old is not None:
                sys.modules[module] = old


# Names

def states_file(tmp_path, shapes, optimizer=False):
    """A bare `.states` file of 'adam' with arrays of these shapes, by hand."""
    return write(tmp_path, b'\x80\x04}(' + b''.join(
        key(index) + b'(' + nd_array(shape) + nd_array(shape) + b't' for index, shape in shapes.items()) + b'u.', 'made.states')


def key(index):
    return b'K%c' % index if isinstance(index, int) else b'\x8c%c' % len(index) + index.encode()


def nd_bytes(shape, value=0.0):
    data = np.full(shape, value, '<f4').tobytes()
    return struct.pack(f'<Iii{len(shape)}qiii', 0xF993FAC9, 0, len(shape), *shape, 1, 0, 0) + data


def nd_array(shape, value=0.0):
    data = nd_bytes(shape, value)
    return (b'cmxnet.ndarray.ndarray\nNDArray\nN\x85R}\x8c\x06handlecbuiltins\nbytearray\nB' + struct.pack('<I', len(data)) + data
            + b'\x85Rsb')


def test_names_in_the_order_of_a_list(tmp_path):
    path = states_file(tmp_path, {0: (3,), 2: (3, 2)})
    states = read_states(path, ['bias', 'frozen', 'weight'])
    assert states.names == ['bias', 'weight'] and states.slots['weight']['0'].shape == (3, 2)
    assert [p.shape for p in states.parameters] == [(3,), (3, 2)]


def test_names_of_a_dictionary_go_by_shape(tmp_path):
    path = states_file(tmp_path, {0: (3,), 1: (3, 2), 3: (5,)})
    shapes = {'0.weight': (3, 2), '0.bias': (3,), '1.running_mean': (3,), '1.gamma': [5]}
    for params in (shapes, {name: np.zeros(shape, 'float16') for name, shape in shapes.items()}):
        with pytest.raises(ValueError, match='`params` must be the parameters .* index 3 has shape'):
            read_states(path, params)
    shapes['2.gamma'] = shapes.pop('1.gamma')  # now 0.bias, 0.weight, 1.running_mean, 2.gamma
    states = read_states(path, {name: np.zeros(shape, 'float16') for name, shape in shapes.items()})
    assert states.names == ['0.bias', '0.weight', '1.running_mean', '2.gamma']
    assert set(states.slots) == {'0.bias', '0.weight', '2.gamma'}
    assert states.slots['2.gamma']['0'].shape == (5,) and {p.dtype for p in states.parameters} == {'float16'}
    assert any('sorted names' in line for line in states.report)


def test_names_that_could_be_exchanged_are_refused(tmp_path):
    path = states_file(tmp_path, {0: (4, 4), 1: (4, 4)})
    assert read_states(path, {'a': (4, 4), 'b': (4, 4)}).names == ['a', 'b']  # given and sorted order agree
    with pytest.raises(ValueError, match="must settle .* 'a' and others .* Pass the names as a list"):
        read_states(path, {'b': (4, 4), 'a': (4, 4)})
    assert read_states(path, ['b', 'a']).names == ['b', 'a']


def test_places_in_the_net_do_not_tell_the_order_of_1_x(tmp_path):
    """There query, key and value may be dense0, dense1 and dense2."""
    path = states_file(tmp_path, {0: (4, 4), 1: (4, 4)})
    with pytest.raises(ValueError, match="of the same shape, 'key.weight' and 'query.weight'. Pass the names as a list"):
        read_states(path, {'key.weight': (4, 4), 'query.weight': (4, 4), 'norm.running_mean': (4,)})
    assert read_states(path, {'dense0_weight': (4, 4), 'dense1_weight': (4, 4)}).names == ['dense0_weight', 'dense1_weight']
    assert any('it was assumed' in line for line in read_states(path, {'0.weight': (4, 4), '1.weight': (4, 4)}).report)
    with pytest.raises(ValueError, match='of the same shape'):
        read_states(path, {'0.weight': (4, 4), '1.weight': (4, 4), '2.gamma': (4,)})


@pytest.mark.parametrize('params, error', [
    (['a'], 'the file has a state for index 1'), (['a', 'a'], 'distinct'), ([1, 2], 'distinct'), (3, 'must be a list'),
    ({'a': 5, 'b': 6}, 'must be arrays'), ({'a': (4, 4)}, 'index 1'), ({'a': (4, 4), 'b': (4, 4)}, 'has shape')])
def test_params_that_do_not_fit(tmp_path, params, error):
    with pytest.raises((TypeError, ValueError), match=error) as caught:
        read_states(states_file(tmp_path, {0: (4, 4), 1: (4, 5)}), params)
    assert not isinstance(caught.value, UnreadableFile)


def test_names_in_the_file(tmp_path):
    path = states_file(tmp_path, {'fc_weight': (4, 4), 'fc_bias': (4,)})
    assert read_states(path).names == ['fc_bias', 'fc_weight']
    assert read_states(path, {'fc_weight': (4, 4), 'fc_bias': (4,), 'bn_mean': (2,)}).names == ['fc_weight', 'fc_bias']
    with pytest.raises(ValueError, match="no 'fc_weight'"):
        read_states(path, ['fc_bias'])


def test_copies_of_several_devices(tmp_path):
    path = states_file(tmp_path, {0: (4, 4), 1: (4, 4), 2: (4,), 3: (4,)})
    states = read_states(path, ['weight', 'bias'])
    assert states.names == ['weight', 'bias'] and states.slots['bias']['0'].shape == (4,)
    assert any('2 devices' in line for line in states.report)


def test_a_params_file_gives_names(tmp_path):
    path = states_file(tmp_path, {0: (3,), 1: (2, 3)})
    states = read_states(path, FILES / '1.9.1/module.params')
    assert states.names == ['bn_moving_mean', 'fc_weight'] and states.slots['fc_weight']['1'].shape == (2, 3)


# Sparse arrays, memory

def sparse_file(tmp_path, shape, rows):
    data = struct.pack('<QQQIi', 0x112, 0, 1, 0xF993FAC9, 1)
    data += struct.pack('<iqqiqqiiiiiq', 2, len(rows), shape[1], 2, *shape, 1, 0, 0, 6, 1, len(rows))
    data += np.ones((len(rows), shape[1]), '<f4').tobytes() + np.array(rows, '<i8').tobytes()
    return write(tmp_path, data + struct.pack('<QQ', 1, 1) + b'w', 'sparse.params')


def test_sparse_arrays_may_not_grow_without_limit(tmp_path):
    array = read_params(sparse_file(tmp_path, (1000, 50), [3, 999]))['w']
    assert array.shape == (1000, 50) and array.sum() == 100 and array[3].all() and array[999].all()
    large = sparse_file(tmp_path, (10 ** 6, 50), [3, 999])
    with pytest.raises(UnreadableFile, match='larger `limit`'):
        read_params(large)
    assert read_params(large, limit=10 ** 9)['w'].shape == (10 ** 6, 50)
    for shape, rows in [((1000, 50), [3, 1000]), ((1000, 50), [-1, 2]), ((2 ** 62, 50), [1])]:
        with pytest.raises(UnreadableFile):
            read_params(sparse_file(tmp_path, shape, rows), limit=10 ** 9)


@pytest.mark.parametrize('what, data', [
    ('array', struct.pack('<QQQ', 0x112, 0, 1) + struct.pack('<IiiQiii', 0xF993FAC9, 0, 1, 10 ** 6, 1, 0, 0)),
    ('arrays', struct.pack('<QQQ', 0x112, 0, 2 ** 40)),
    ('dimensions', struct.pack('<QQQ', 0x112, 0, 1) + struct.pack('<Iii', 0xF993FAC9, 0, 2 ** 30)),
    ('old dimensions', struct.pack('<QQQ', 0x112, 0, 1) + struct.pack('<I', 32)),
    ('name', struct.pack('<QQQ', 0x112, 0, 1) + nd_bytes((1,)) + struct.pack('<QQ', 1, 2 ** 24)),
    ('empty', struct.pack('<QQQ', 0x112, 0, 1) + struct.pack('<IiiQQiii', 0xF993FAC9, 0, 2, 0, 2 ** 62, 1, 0, 0) + bytes(8)),
    ('negative', struct.pack('<QQQ', 0x112, 0, 1) + struct.pack('<Iiiqqiii', 0xF993FAC9, 0, 2, -1, -4, 1, 0, 0) + bytes(24))])
def test_claims_are_checked_before_memory_is_taken(tmp_path, what, data):
    path = write(tmp_path, data + bytes(100 if what in ('arrays', 'array', 'dimensions') else 0))

    def refused():
        with pytest.raises(UnreadableFile, match='should take|claims|dimensions|unknown shape|possible size'):
            read_params(path)
    assert work.memory_of(refused) < 10 ** 6


@pytest.mark.parametrize('change', [
    lambda data: data + b'\0', lambda data: data[:8] + b'\1' + data[9:], lambda data: data.replace(b'b', b'a'),
    lambda data: data[:-1] + b'\xff', lambda data: data.replace(struct.pack('<ii', 1, 0), struct.pack('<ii', 4, 0))])
def test_damaged_parameters(tmp_path, change):
    data = struct.pack('<QQQ', 0x112, 0, 2) + 2 * nd_bytes((3,)) + struct.pack('<QQ1sQ1s', 2, 1, b'a', 1, b'b')
    assert set(read_params(write(tmp_path, data))) == {'a', 'b'}
    with pytest.raises(UnreadableFile):
        read_params(write(tmp_path, change(data)))


def test_many_names(tmp_path):
    def of(names):
        data = struct.pack('<QQQ', 0x112, 0, len(names)) + nd_bytes((1,)) * len(names) + struct.pack('<Q', len(names))
        data += b''.join(struct.pack('<Q5s', 5, b'%05d' % name) for name in names)
        return write(tmp_path, data, f'names-{len(names)}-{names[-1]}')

    def distinct(count):
        path = of(range(count))
        return lambda: read_params(path)

    def one_twice(count):
        path = of([*range(count - 1), 0])

        def refused():
            with pytest.raises(UnreadableFile, match="'00000' occur twice"):
                read_params(path)
        return refused

    assert len(distinct(ndarray_format.MAX_ARRAYS)()) == ndarray_format.MAX_ARRAYS
    work.assert_linear(distinct, ndarray_format.MAX_ARRAYS)
    work.assert_linear(one_twice, ndarray_format.MAX_ARRAYS)


def test_memory_of_large_files(tmp_path):
    """Not the file and the arrays, only the arrays."""
    array = np.zeros((1 << 21,), '<f4')
    path = states_file(tmp_path, {i: array.shape for i in range(3)})
    size = path.stat().st_size
    assert work.memory_of(lambda: read_states(path)) < 1.05 * size
    data = struct.pack('<QQQ', 0x112, 0, 3) + 3 * nd_bytes(array.shape) + struct.pack('<Q', 0)
    path = write(tmp_path, data, 'large.params')
    assert work.memory_of(lambda: read_params(path)) < 1.05 * len(data)
    text = repickled(states_file(tmp_path, {i: (1 << 18,) for i in range(3)}).read_bytes(), 0)
    path = write(tmp_path, text, 'text.states')
    assert work.memory_of(lambda: read_states(path)) < 1.5 * len(text)


# Zip files

def zip_bytes(tmp_path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(tmp_path / 'made.zip', 'w', compression) as file:
        for name, data in entries:
            file.writestr(name, data)
    return (tmp_path / 'made.zip').read_bytes()


def npy(array):
    import io
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_zip_of_numpy(tmp_path):
    arrays = {'a': np.arange(6.).reshape(2, 3), 'b/c': np.array(1, 'int8'), 'flag': np.array([True, False])}
    np.savez(tmp_path / 'a.npz', **arrays)
    assert_equal(read_params(tmp_path / 'a.npz'), arrays)


def test_large_zip_files(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', 10)
    monkeypatch.setattr(zipfile, 'ZIP_FILECOUNT_LIMIT', 0)
    arrays = {'a': np.arange(6.), 'b': np.ones((2, 2), 'float16')}
    np.savez(tmp_path / 'a.npz', **arrays)
    assert b'PK\6\6' in (tmp_path / 'a.npz').read_bytes()
    assert_equal(read_params(tmp_path / 'a.npz'), arrays)


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize('what', [
    'compressed', 'twice', 'no array', 'object', 'overlapping', 'gap', 'prefix', 'checksum', 'fortran', 'comment'])
def test_zip_files_that_are_refused(tmp_path, what):
    one = npy(np.arange(4.))
    data = zip_bytes(tmp_path, [('a.npy', one), ('b.npy', one)])
    data = {
        'compressed': lambda: zip_bytes(tmp_path, [('a.npy', npy(np.zeros(10 ** 6)))], zipfile.ZIP_DEFLATED),
        'twice': lambda: zip_bytes(tmp_path, [('a.npy', one), ('a.npy', one)]),
        'no array': lambda: zip_bytes(tmp_path, [('a.txt', b'x')]),
        'object': lambda: zip_bytes(tmp_path, [('a.npy', npy(np.array([{}], object)))]),
        'overlapping': lambda: overlapping(data),
        'gap': lambda: with_gap(data, data.index(b'PK\1\2')),
        'prefix': lambda: with_gap(data, 0),
        'checksum': lambda: data.replace(one, one[:-1] + b'\1', 1),
        'fortran': lambda: zip_bytes(tmp_path, [('a.npy', npy(np.asfortranarray(np.ones((2, 3)))))]),
        'comment': lambda: data[:-2] + b'\1\0x',
    }[what]()
    with pytest.raises(UnreadableFile):
        read_params(write(tmp_path, data))


def overlapping(data):
    """Both entries of the directory point at the first member."""
    first, second = data.index(b'PK\1\2'), data.rindex(b'PK\1\2')
    return data[:second] + data[first:second] + data[second + (second - first):]


def with_gap(data, at):
    """Four bytes that belong to nothing; all offsets behind them are right."""
    data = bytearray(data)
    for entry, field in [(data.rindex(b'PK\5\6'), 16), *((m.start(), 42) for m in re.finditer(b'PK\1\2', data))]:
        offset, = struct.unpack_from('<I', data, entry + field)
        struct.pack_into('<I', data, entry + field, offset + 4 * (offset >= at))
    return bytes(data[:at] + b'PK\3\4' + data[at:])


# Hostile pickles

class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def named_call(module, name, arguments=b')'):
    """protocol 4: module.name(*arguments)"""
    return b'\x80\x04\x8c%c%b\x8c%c%b\x93%bR.' % (len(module), module.encode(), len(name), name.encode(), arguments)


NAMING = {  # files that name something else: the message must say what
    'os.system': (lambda p: pickle.dumps({0: Call(os.system, 'touch MARK')}, p), r"'(posix|nt)\.system'"),
    'subprocess': (lambda p: pickle.dumps(({}, Call(subprocess.Popen, ['touch', 'MARK'])), p), r"'(subprocess|commands)\.Popen'"),
    'eval': (lambda p: pickle.dumps({0: Call(eval, "open('MARK', 'w')")}, p), r"'(builtins|__builtin__)\.eval'"),
    'exec': (lambda p: pickle.dumps({0: Call(exec, "open('MARK', 'w')")}, p), r"'(builtins|__builtin__)\.exec'"),
    'open': (lambda p: pickle.dumps({0: Call(open, 'MARK', 'w')}, p), r"'_?io\.open'"),
    'getattr': (lambda p: pickle.dumps({0: Call(getattr, Call(__import__, 'os'), 'system')}, p), r"\.(getattr|__import__)'"),
    'import': (lambda p: pickle.dumps({0: Call(__import__, 'antigravity')}, p), r"\.__import__'"),
    'operator': (lambda p: pickle.dumps({0: Call(operator.attrgetter, 'system')}, p), r"'operator\.attrgetter'"),
    'partial': (lambda p: pickle.dumps({0: functools.partial(os.system, 'touch MARK')}, p), r"'functools\.partial'"),
    'numpy reconstruct': (lambda p: pickle.dumps({0: np.array([os.system], object)}, p), r"'numpy\.\w+(\.\w+)?\._reconstruct'"),
    'copyreg': (lambda p: pickle.dumps({0: Call(copyreg.add_extension, 'os', 'system', 1)}, p), r"'copy_?reg\.add_extension'"),
    'codecs': (lambda p: b'\x80\x02c_codecs\ndecode\n(U\3abcU\3zipt' + b'R.', r"'_codecs\.decode'"),
    'ordered': (lambda p: pickle.dumps(collections.OrderedDict(a=1), p), r"'collections\.OrderedDict'"),
    'own class': (lambda p: pickle.dumps(({}, Call(Call, 1)), p), r"'(\w+\.)*test_legacy\.Call'"),
    'mxnet function': (lambda p: named_call('mxnet.model', 'load_checkpoint'), r"'mxnet\.model\.load_checkpoint'"),
    'dotted': (lambda p: named_call('mxnet.optimizer.optimizer', 'pickle.loads'), r"'mxnet\.optimizer\.optimizer\.pickle\.loads'"),
    'dotted ours': (lambda p: named_call('gluon_optim.mxnet.registry', 'rules.add'), r"'gluon_optim\.mxnet\.registry\.rules\.add'"),
}

SGD = b'\x8c\x19mxnet.optimizer.optimizer\x8c\x03SGD\x93'
BYTES = b'\x8c\x08builtins\x8c\x09bytearray\x93'
DTYPE = b'\x8c\x05numpy\x8c\x05dtype\x93'
P4 = b'\x80\x04'
ARRAY = b'cmxnet.ndarray.ndarray\nNDArray\nN\x85R'
SCALAR = b'\x8c\x15numpy.core.multiarray\x8c\x06scalar\x93'
SCHEDULER = b'\x8c\x0clr_scheduler\x8c\x12mxnet.lr_scheduler\x8c\x0bLRScheduler\x93)\x81'
LAUGHS = b']]\x94(K\1ea' + b''.join(b']\x94(' + b'h%c' % i * 10 + b'ea' for i in range(50))  # each list is ten times the one before


def items(pairs):
    """Instructions that put so many pairs into a dictionary, 1000 at a time."""
    pairs = list(pairs)
    return b''.join(b'(' + b''.join(pairs[i:i + 1000]) + b'u' for i in range(0, len(pairs), 1000))


def numbered(value, count=60_000):
    return items(b'J' + struct.pack('<i', i + 1) + value for i in range(count))


def colliding(count):
    """Keys with one hash: so many take Python a minute."""
    return items(b'\x8a\x10' + (i * (2 ** 61 - 1)).to_bytes(16, 'little') + b'N' for i in range(count))


VALUES = {  # what no file of MXNet contains, as instructions that make one value
    'class is called': SGD + b')R',
    'class is called with arguments': SGD + b'\x8c\x01a\x85R',
    'class with arguments': SGD + b'\x8c\x01a\x85\x81',
    'class without a tuple': SGD + b']\x81',
    'instance of a function': BYTES + b')\x81',
    'text is called': b'\x8c\x05class\x8c\x01a\x85R',
    'our function': b'\x8c\x1agluon_optim.mxnet.registry\x8c\x06create\x93\x8c\1a\x85R',
    'array of a shape': b'cmxnet.ndarray.ndarray\nNDArray\nK\1\x85R',
    'bytearray of a size': BYTES + b'\x8a\x05\0\0\0\0\x10\x85R',
    'bytearray of a list': BYTES + b'](KKeK\1\x85R',
    'bytearray of text': BYTES + b'\x8c\1a\x85R',
    'bytearray in another codec': BYTES + b'\x8c\1a\x8c\5utf-8\x86R',
    'other codec': b'c_codecs\nencode\n(X\3\0\0\0abcU\5rot13tR',
    'dtype of objects': DTYPE + b'\x8c\x01O\x89\x88\x87R',
    'dtype of structures': DTYPE + b'](\x8c\x01a\x8c\x02f8\x86e\x89\x88\x87R',
    'dtype with metadata': DTYPE + b'\x8c\x02f8\x89\x88\x87R}b',
    'scalar of few bytes': SCALAR + DTYPE + b'\x8c\x02f8\x89\x88\x87RC\x04abcd\x86R',
    'scalar of many bytes': SCALAR + DTYPE + b'\x8c\x02f4\x89\x88\x87RC\x08abcdefgh\x86R',
    'scalar of no type': SCALAR + b'\x8c\x02f4C\x04abcd\x86R',
    'reconstructor of a foreign base': b'ccopy_reg\n_reconstructor\n(cmxnet.optimizer\nSGD\nc__builtin__\nbytearray\nNtR',
    'reconstructor of a function': b'ccopy_reg\n_reconstructor\n(c__builtin__\nbytearray\nc__builtin__\nobject\nNtR',
    'reconstructor with a state': b'ccopy_reg\n_reconstructor\n(cmxnet.optimizer\nSGD\nc__builtin__\nobject\nK\1tR',
    'persistent id': b'Pfile\n',
    'binary persistent id': b'K\1Q',
    'extension 1': b'\x82\1',
    'extension 2': b'\x83\1\1',
    'extension 4': b'\x84\1\1\0\0',
    'INST': b'(S"touch MARK"\nios\nsystem\n',
    'INST of an optimizer': b'(imxnet.optimizer\nSGD\n',
    'OBJ': b'(cos\nsystem\nS"touch MARK"\no',
    'OBJ of an optimizer': b'(' + SGD + b'o',
    'NEWOBJ_EX': SGD + b')}\x92',
    'buffers': b'\x97',
    'read-only': b'N\x98',
    'set': b'\x8f',
    'pop': b'NN0',
    'doubled': b'(N2t',
    'state of a number': b'K\1}b',
    'state of a class': SGD + b'}b',
    'state is no dictionary': SGD + b')\x81Nb',
    'state with other keys': SGD + b')\x81}K\1K\1sb',
    'second state': SGD + b')\x81}b}b',
    'append to an object': SGD + b')\x81Na',
    'items of an object': SGD + b')\x81K\1Ns',
    'array with another state': ARRAY + b'}\x8c\1aNsb',
    'list as key': b'}]Ns',
    'colliding keys': b'}' + colliding(20_000),
    'odd items': b'}(K\1u',
    'memo entry': b'Nr\xff\xff\xff\xff',
    'text memo entry': b'Np99999999999\n',
    'no memo entry': b'h\xf5',
    'digits': b'I' + b'9' * 10 ** 6 + b'\n',
    'long digits': b'L' + b'9' * 4000 + b'L\n',
    'wide integer': b'\x8a\xff' + b'\x01' * 255,
    'unlimited integer': b'\x8b\1\0\0\0\1',
    'escapes': b"S'\\x'\n",
    'no quotes': b'Sa\n',
    'utf-8': b'\x8c\1\xff',
    'protocol 9': b'\x80\x09N',
    'many steps': b']' + b'Na' * 10 ** 6,
    'many dictionaries': b']' + b'}a' * 10 ** 6,
    'deep tuples': b')' + b'\x85' * 600_000,
    'marks': b'(' * 10 ** 6 + b't' * 10 ** 6,
    'laughs of tuples as a key': b')\x94' + b''.join(b'(' + b'h%c' % i * 2 + b't\x94' for i in range(100)) + b'}h\x64Ns',
}
OPTIMIZER = b'}' + SGD + b')\x81}'  # no states, and an optimizer whose attributes follow
WHOLE = {  # files that cannot be what they say
    'laughs': P4 + LAUGHS + b'.',
    'laughs in a state': P4 + b'}K\0' + LAUGHS + b's.',
    'laughs in a scheduler': P4 + OPTIMIZER + SCHEDULER + b'}\x8c\1a' + LAUGHS + b'sbsb\x86.',
    'a list in itself': P4 + b'}K\0]\x94h\0as.',
    'scheduler in itself': P4 + OPTIMIZER + SCHEDULER + b'\x94}\x8c\1ah\0sbsb\x86.',
    'scheduler as the optimizer': P4 + b'}' + SCHEDULER[14:] + b'}b\x86.',
    'counts in counts': P4 + OPTIMIZER + b'\x8c\x18_all_index_update_counts}\x94(K\1h\0K\2h\0usb\x86.',
    'counts many times': P4 + OPTIMIZER + b'\x8c\x18_all_index_update_counts}(K\0}\x94' + numbered(b'K\1', 30_000) + b'u'
                         + numbered(b'h\0', 4000) + b'sb\x86.',
    'deep lists': P4 + b'}K\0' + b']' * 5000 + b'a' * 4999 + b's.',
    'deep states': P4 + b'}K\0)' + b'\x85' * 300_000 + b's.',
    'claims of bytes': P4 + b'B\xff\xff\xff\x7f.',
    'claims of 8': P4 + b'\x8e' + b'\xff' * 8,
    'claims of text': P4 + b'X\xff\xff\xff\xff',
    'claims of text 8': P4 + b'\x8d' + b'\xff' * 7 + b'\x7f',
    'claims of a bytearray': P4 + b'\x96' + b'\xff' * 7 + b'\x7f',
    'claims of a frame': P4 + b'\x95' + b'\xff' * 8 + b'}.',
    'two values': P4 + b'}}.',
    'nothing': P4 + b'.',
    'open mark': P4 + b'}(.',
    'underflow': P4 + b'}\x86.',
    'beyond the mark': P4 + b'}K\0(K\1s.',
    'follows': P4 + b'}.}',
    'keys of two kinds': P4 + b'}(K\0N\x8c\1aNu.',
    'negative index': P4 + b'}J\xff\xff\xff\xffNs.',
    'a number': P4 + b'K\1.',
    'not an optimizer': P4 + b'}K\1\x86.',
    'state is text': P4 + b'}K\0\x8c\1as.',
    'array of text': P4 + b'}K\0' + ARRAY + b'}\x8c\6handle\x8c\1asbs.',
    'array without data': P4 + b'}K\0' + ARRAY + b's.',
    'array without a handle': P4 + b'}K\0' + ARRAY + b'}\x8c\6handleNsbs.',
    'one array many times': P4 + b'}(K\0' + nd_array((10 ** 6,)) + b'\x94u' + numbered(b'h\0', 500) + b'.',
    'wide text': b"(dp0\nI0\n(cmxnet.ndarray\nNDArray\n(NtR(dS'handle'\nc__builtin__\nbytearray\n(V" + b'a' * 25_000_000
                 + b"\\U0001F600\nS'latin-1'\ntRsbs.",
    'tiny arrays many times': P4 + b'}(K\0' + nd_array((1,)) + b'\x94u' + numbered(b'h\0') + b'.',
}


def hostile(what):
    """The value as an attribute that no optimizer has, in a file that is otherwise fine."""
    return WHOLE[what] if what in WHOLE else P4 + OPTIMIZER + b'\x8c\1x' + VALUES[what] + b'sb\x86.'


def test_the_frame_of_hostile_values_is_read(tmp_path):
    assert read_states(write(tmp_path, P4 + OPTIMIZER + b'\x8c\1xNsb\x86.')).optimizer == 'sgd'


def refuse(path, match=None):
    """Reading must fail."""
    with pytest.raises(UnreadableFile, match=match) as caught:
        read_states(path)
    assert len(str(caught.value)) < 1500


def refuse_soon(path, match=None):
    """Reading must fail after some calls for each of the machine's steps, and without reading more than it may keep."""
    with work.counted() as spent:
        refuse(path, match)
    assert spent.calls <= 10 * inert_pickle.MAX_STEPS
    assert spent.bytes <= 2 * path.stat().st_size + SMALL


@pytest.mark.parametrize('what', NAMING)
@pytest.mark.parametrize('protocol', range(5))
def test_a_file_that_names_anything_else_is_refused(tmp_path, monkeypatch, what, protocol):
    monkeypatch.chdir(tmp_path)
    make, name = NAMING[what]
    path = write(tmp_path, make(protocol))
    if kind_of(path) is Kind.UNKNOWN:  # protocols 0 and 1 begin with anything
        path = write(tmp_path, b'(dp0\nI0\n' + make(protocol)[:-1] + b's.')
    refuse_soon(path, name)
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('what', [*VALUES, *WHOLE])
def test_hostile_pickles(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, hostile(what))
    refuse_soon(path)
    assert os.listdir(tmp_path) == ['file']
    if re.search('claims|dictionaries|one array|wide|memo|laughs|digits|marks|counts', what):  # tracing is slow
        assert work.memory_of(lambda: refuse(path)) < 2 * path.stat().st_size + SMALL * 5 // 4


GUARD = '''
import os, sys
from gluon_optim.states.mxnet_files import reader as legacy
legacy.read_states(sys.argv[1]), legacy.read_states(sys.argv[2])  # what reading itself imports, codecs for instance
allowed, seen = set(sys.argv[1:]), []
def hook(event, arguments):
    reading = not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if event == 'open' else False
    if reading and arguments[0] in allowed and arguments[1] in ('rb', 'r', None):
        return
    if event.split('.')[0] in ('import', 'exec', 'compile', 'open', 'os', 'subprocess', 'pickle', 'ctypes', 'socket', 'marshal'):
        seen.append((event, str(arguments)))
sys.addaudithook(hook)
for path in sys.argv[1:]:
    try:
        legacy.read_states(path)
    except legacy.UnreadableFile:
        pass
hook = None
print(seen)
'''


def test_nothing_is_imported_or_executed(tmp_path):
    """Python's own audit events, of good and hostile files."""
    good = [str(FILES / '1.9.1/adam-scheduled.states'), str(FILES / '1.5.1/adam-master.states')]
    makers = [make for make, _ in NAMING.values()]
    paths = [write(tmp_path, make(protocol), f'{i}-{protocol}') for i, make in enumerate(makers) for protocol in (2, 4)]
    others = map(hostile, [*VALUES, *WHOLE])
    paths += [write(tmp_path, data, f'other-{i}') for i, data in enumerate(others) if len(data) < 10 ** 5]
    out = subprocess.run([sys.executable, '-c', GUARD, *good, *map(str, paths)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, cwd=str(tmp_path), env={**os.environ, 'PYTHONPATH': str(Path(legacy.__file__).parents[3])})
    assert (out.returncode, out.stdout.strip()) == (0, '[]'), out.stdout + out.stderr
    assert not (tmp_path / 'MARK').exists()


def test_classes_can_be_allowed(tmp_path):
    data = P4 + b'}(K\0' + nd_array((2,), 3.0) + b'u\x8c\x04mine\x8c\x04Adam\x93)\x81}(\x8c\x02lrG?\xb9\x99\x99\x99\x99\x99\x9a' \
        b'\x8c\x05magicK\x07\x8c\x0clr_scheduler\x8c\x04mine\x8c\x05Sched\x93)\x81}\x8c\x01a](K\1K\2esbub\x86.'
    path = write(tmp_path, data)
    with pytest.raises(UnreadableFile, match=r"'mine.Adam'.*allow=\['mine.Adam'\]"):
        read_states(path)
    states = read_states(path, allow=['mine.Adam', 'mine.Sched'])
    assert (states.optimizer, states.hypers) == ('mine.Adam', {'learning_rate': 0.1, 'magic': 7})  # not MXNet's, who knows
    assert states.scheduler == {'class': 'mine.Sched', 'attributes': {'a': [1, 2]}}
    assert_equal(states.slots['0'], {'0': np.full(2, 3, 'float32')})
    assert any('mine.Adam is not an optimizer of MXNet' in line for line in states.report)
    with pytest.raises(UnreadableFile, match='calls something'):
        read_states(write(tmp_path, P4 + b'\x8c\x05posix\x8c\x06system\x93\x8c\x01a\x85R.'), allow=['posix.system'])


# Mutations

SPECIAL = [b'\xff' * 8, b'\xff' * 4, b'\0' * 8, b'\0\0\0\x80', b'\xff\xff\xff\x7f', b'\xff' * 7 + b'\x7f', b'\0' * 7 + b'\1', b'\1',
           b'(', b'.']


def check_mutations(tmp_path, count, seed):
    """Each is refused with our error or read into something sound; a zip file, which has checksums, into what it was."""
    rng = random.Random(seed)
    originals = {path: path.read_bytes() for path in RECORDED}
    originals.update({f'protocol {p}': repickled(originals[FILES / '1.9.1/adam-scheduled.states'], p) for p in (0, 2, 3, 5)})
    path, refused = tmp_path / 'mutated', 0
    for _ in range(count):
        name = rng.choice(list(originals))
        is_states = 'protocol' in name if isinstance(name, str) else name.suffix == '.states'
        data = mutated(originals[name], rng, SPECIAL)
        path.write_bytes(data)
        try:
            with work.counted() as spent:
                read = read_states(path) if is_states else read_params(path)
            if is_states:
                states = read
                arrays = [array for parameter in states.names for array in arrays_of(states, parameter).values()]
                assert set(states.counts) == set(states.names) == {p.name for p in states.parameters}
                json.dumps([states.hypers, states.scheduler, states.num_update])
            else:
                arrays = list(read.values())
                if kind_of(name) is Kind.NPZ and all(key in wanted(name) for key in read):
                    whole = {key: bfloat16(array) if 'bfloat16' in name.name else array for key, array in wanted(name).items()}
                    assert_equal(read, {key: whole[key] for key in read})
            assert sum(array.nbytes for array in arrays) <= max(2 * len(data), SMALL)
        except UnreadableFile as error:
            refused += 1
            assert 'Cannot read' in str(error)
        assert spent.calls <= 10 * len(data) + 3000 and spent.bytes <= 4 * len(data), (name, spent)
    return refused


def test_mutations(tmp_path):
    assert check_mutations(tmp_path, 2500, seed=1) > 1000


# Files of the MXNet that is installed

@pytest.fixture
def mx():
    module = pytest.importorskip('mxnet')
    if not module.__version__.startswith('1.'):
        pytest.skip('of 2.0 there are recorded files')
    return module


def make_trainer(mx, name, arguments, dtype='float32', contexts=1, seed=0, **kwargs):
    devices = [mx.cpu(i) for i in range(contexts)]
    rng = np.random.default_rng(seed)
    parameters = []
    for i, shape in enumerate([(2, 3), (4,), (1,)]):
        parameter = mx.gluon.Parameter(f'p{i}_weight', shape=shape, dtype=dtype)
        parameter.initialize(mx.init.Constant(0), ctx=devices)
        parameter.set_data(mx.nd.array(rng.standard_normal(shape), dtype=dtype))
        parameters.append(parameter)
    return parameters, mx.gluon.Trainer(parameters, name, dict(arguments), **kwargs)


def step(mx, parameters, trainer, steps, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        for parameter in parameters:
            for device in parameter.list_ctx():
                factor = mx.nd.array(rng.standard_normal(parameter.shape), dtype=parameter.dtype, ctx=device)
                with mx.autograd.record():
                    loss = (parameter.data(device) * factor).sum()
                loss.backward()
        trainer.step(2)


def flat(state, place=''):
    if isinstance(state, (tuple, list)):
        return {k: v for i, x in enumerate(state) for k, v in flat(x, place + str(i)).items()}
    return {} if state is None else {place: state.asnumpy()}


def mxnet_reads(mx, path):
    """States and optimizer as MXNet itself unpickles them."""
    value = pickle.loads(Path(path).read_bytes())
    return value if isinstance(value, tuple) else (value, None)


@pytest.mark.parametrize('name', BUILTINS)
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@pytest.mark.parametrize('contexts, on_kvstore', [(1, None), (2, True), (2, False)])
def test_what_mxnet_writes(mx, tmp_path, name, dtype, contexts, on_kvstore):
    arguments = {'learning_rate': 0.1, 'wd': 0.01, 'clip_gradient': 0.5, 'multi_precision': dtype == 'float16'}
    arguments.update(ARGUMENTS.get(name, {}))
    parameters, trainer = make_trainer(mx, name, arguments, dtype, contexts, update_on_kvstore=on_kvstore)
    step(mx, parameters, trainer, 3)
    path = str(tmp_path / 'trainer.states')
    trainer.save_states(path)
    names = [p.name for p in trainer._params]
    states, (held, optimizer) = read_states(path, names), mxnet_reads(mx, path)

    assert states.names == names and states.optimizer == name and states.num_update == 3
    assert states.counts == dict.fromkeys(names, 3)
    for index, parameter in enumerate(names):
        assert_equal(arrays_of(states, parameter), named(name, flat(held[index]), mx.__version__, dtype == 'float16'))
    attributes = {'learning_rate': 'lr', 'eps': 'float_stable_eps' if name == 'adagrad' else 'eps'}
    for argument, value in states.hypers.items():
        assert argument == 'begin_epoch' or value == getattr(optimizer, attributes.get(argument, argument)), argument
    accepted = mx.optimizer.create(name, **states.hypers)
    assert accepted.lr == 0.1 and accepted.wd == 0.01
    if name == 'lbsgd':
        for index, parameter in enumerate(names):
            table = optimizer.cumgrads[index]
            assert states.variables[f'num_cums:{parameter}'] == table['num_cums']
            if not isinstance(table['cum_grad'], int):
                np.testing.assert_array_equal(states.variables[f'cum_grad:{parameter}'], table['cum_grad'].asnumpy())
    if name == 'nadam':
        assert states.variables['m_schedule'] == optimizer.m_schedule

    bare = write(tmp_path, (trainer._kvstore._updater if trainer._update_on_kvstore else trainer._updaters[0]).get_states())
    states = read_states(bare, names)
    assert states.optimizer == '' and states.hypers == {} and 'does not contain its optimizer' in states.report[0]
    for index, parameter in enumerate(names):
        assert [x.tobytes() for x in states.slots[parameter].values()] == [x.tobytes() for x in flat(held[index]).values()]


@pytest.mark.parametrize('name, relation', [
    ('adam', lambda s: (s['var'] / 0.001, (s['mean'] / 0.1) ** 2)), ('lamb', lambda s: (s['var'] / 0.001, (s['mean'] / 0.1) ** 2)),
    ('nadam', lambda s: (s['var'] / 0.001, (s['mean'] / 0.1) ** 2)), ('adamax', lambda s: (s['var'], abs(s['mean'] / 0.1))),
    ('ftrl', lambda s: (s['n'], s['gradient'] ** 2)), ('adagrad', lambda s: (s['history'], s['gradient'] ** 2)),
    ('rmsprop', lambda s: (s['n'], 0.1 * s['gradient'] ** 2)), ('adadelta', lambda s: (s['acc_g'], 0.1 * s['gradient'] ** 2)),
    ('ftml', lambda s: (s['v'], 0.001 * s['gradient'] ** 2)), ('sgd', lambda s: (s['momentum'], -0.1 * s['gradient'])),
    ('dcasgd', lambda s: (s['previous_weight'], s['weight']))])
def test_slots_mean_what_they_are_called(mx, tmp_path, name, relation):
    """After the first update each slot is a known function of the gradient."""
    optimizer = mx.optimizer.create(name, learning_rate=0.1, **ARGUMENTS.get(name, {}))
    updater, gradient, weight = mx.optimizer.get_updater(optimizer), mx.nd.array([0.5, -1, 2]), mx.nd.array([3, 4, 5])
    before = weight.asnumpy()
    kept = gradient.asnumpy()
    updater(0, gradient, weight)
    slots = read_states(write(tmp_path, updater.get_states(dump_optimizer=True))).slots['0']
    found, wanted = relation({**slots, 'gradient': kept, 'weight': before})
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_counts_of_other_devices_and_begin(mx, tmp_path):
    parameters, trainer = make_trainer(mx, 'adam', {'begin_num_update': 100})
    step(mx, parameters, trainer, 5)
    trainer.save_states(str(tmp_path / 'a'))
    parameters[0].reset_ctx(mx.cpu(1)), parameters[1].reset_ctx(mx.cpu(1)), parameters[2].reset_ctx(mx.cpu(1))
    trainer.load_states(str(tmp_path / 'a'))
    step(mx, parameters, trainer, 2)  # MXNet begins to count again there
    trainer.save_states(str(tmp_path / 'b'))
    _, optimizer = mxnet_reads(mx, tmp_path / 'b')
    assert len(optimizer._all_index_update_counts) == 2
    states = read_states(tmp_path / 'b')
    assert states.counts == {'0': 5, '1': 5, '2': 5} and states.num_update == 105


def test_files_of_gluon(mx, tmp_path):
    """Names from a `.params` file, whose order is not the trainer's."""
    net = mx.gluon.nn.HybridSequential()
    for _ in range(12):
        net.add(mx.gluon.nn.Dense(4, in_units=4))
    net.add(mx.gluon.nn.BatchNorm(in_channels=4))
    net.initialize(mx.init.Normal())
    trainer = mx.gluon.Trainer(net.collect_params(), 'adam', {'learning_rate': 0.1})
    with mx.autograd.record():
        loss = (net(mx.nd.random.normal(shape=(8, 4))) ** 3).sum()
    loss.backward()
    trainer.step(1)
    trainer.save_states(str(tmp_path / 'a.states'))
    net.save_parameters(str(tmp_path / 'a.params'))

    held, _ = mxnet_reads(mx, tmp_path / 'a.states')
    places = {id(p): name for name, p in net._collect_params_with_prefix().items()}
    parameters = read_params(tmp_path / 'a.params')
    assert_equal(parameters, {name: p.data().asnumpy() for name, p in net._collect_params_with_prefix().items()})
    # batch norm's name sorts before dense in the trainer, after it in the file: only a list can tell
    for params in (tmp_path / 'a.params', parameters):
        with pytest.raises(ValueError, match='Pass the(ir)? names as a list'):
            read_states(tmp_path / 'a.states', params)
    states = read_states(tmp_path / 'a.states', [places[id(p)] for p in trainer._params])
    for index, parameter in enumerate(trainer._params):
        if index in held:
            assert_equal(states.slots[places[id(parameter)]], named('adam', flat(held[index]), mx.__version__, False))
    by_shape = {p.name: p for p in trainer._params}
    states = read_states(tmp_path / 'a.states', by_shape)
    assert states.names == [p.name for p in trainer._params] and states.counts[states.names[0]] == 1


@pytest.mark.parametrize('contexts, kvstore', [(1, None), (1, 'local'), (2, 'local'), (2, None)])
def test_files_of_module(mx, tmp_path, contexts, kvstore):
    symbol = mx.sym.FullyConnected(mx.sym.Variable('data'), num_hidden=3, name='fc1')
    symbol = mx.sym.SoftmaxOutput(mx.sym.BatchNorm(symbol, name='bn'), name='softmax')
    module = mx.mod.Module(symbol, context=[mx.cpu(i) for i in range(contexts)])
    data = mx.io.NDArrayIter(np.random.default_rng(0).standard_normal((8, 4)), np.zeros(8), 4)
    module.fit(data, num_epoch=2, optimizer='adam', kvstore=kvstore, initializer=mx.init.Normal())
    module.save_checkpoint(str(tmp_path / 'module'), 2, save_optimizer_states=True)
    arguments, auxiliary = module.get_params()
    parameters = read_params(tmp_path / 'module-0002.params')
    assert_equal(parameters, {k: v.asnumpy() for k, v in {**arguments, **auxiliary}.items()})

    path = tmp_path / 'module-0002.states'
    held, _ = mxnet_reads(mx, path)
    names = module._param_names
    states = read_states(path, names)
    assert sorted(states.names) == sorted(names)
    copies = contexts if kvstore is None else 1
    for i, name in enumerate(names):
        state = held[name] if name in held else held[i * copies]
        assert_equal(states.slots[name], flat(state))


def test_parameters_of_the_installed_mxnet(mx, tmp_path):
    types = 'float16', 'float32', 'float64', 'int8', 'int32', 'int64', 'uint8'
    arrays = {t: mx.nd.array(np.arange(6).reshape(2, 3), dtype=t) for t in types}
    arrays['rows'] = mx.nd.sparse.row_sparse_array((np.ones((2, 3)), [1, 4]), shape=(6, 3))
    arrays['csr'] = mx.nd.array(np.eye(3, 4)).tostype('csr')
    arrays['half'] = mx.nd.array([[0, 0], [1, 2]], dtype='float16').tostype('row_sparse')
    path = str(tmp_path / 'a.params')
    mx.nd.save(path, arrays)
    assert_equal(read_params(path), {name: array.asnumpy() for name, array in mx.nd.load(path).items()})


def test_sparse_states(mx, tmp_path):
    updater = mx.optimizer.get_updater(mx.optimizer.create('adam'))
    weight = mx.nd.ones((6, 3)).tostype('row_sparse')
    updater(0, mx.nd.sparse.row_sparse_array((np.ones((2, 3), 'float32'), [1, 4]), shape=(6, 3)), weight)
    state = updater.states[0]
    assert state[0].stype == 'row_sparse'
    states = read_states(write(tmp_path, updater.get_states(dump_optimizer=True)))
    assert_equal(states.slots['0'], {'mean': state[0].asnumpy(), 'var': state[1].asnumpy()})


# Optimizers of this package

@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
def test_native_files_of_our_optimizers(mx, tmp_path, dtype):
    go = pytest.importorskip('gluon_optim')
    scheduler = mx.lr_scheduler.PolyScheduler(10, 0.5)
    arguments = {'beta1': 0.9, 'amsgrad': True, 'multi_precision': True, 'lr_scheduler': scheduler, 'begin_num_update': 3}
    parameters, trainer = make_trainer(mx, 'novograd', arguments, dtype)
    step(mx, parameters, trainer, 4)
    trainer.save_states(str(tmp_path / 'native'))
    names = [p.name for p in trainer._params]
    go.save_states(trainer, str(tmp_path / 'ours'))
    found, wanted = read_states(tmp_path / 'native', {p.name: p for p in trainer._params}), go.read_states(str(tmp_path / 'ours'))
    assert_same(found, wanted)
    assert found.optimizer == 'novograd' and found.names == names
    assert set(found.slots[names[0]]) == {'mean', 'norm_sq', 'max_norm_sq'}
    assert found.slots[names[0]]['norm_sq'].shape == () and found.counts[names[0]] == 4 and found.num_update == 7


def test_a_rule_of_a_user(mx, tmp_path):
    go = pytest.importorskip('gluon_optim')

    @go.register
    class LegacySign(go.Rule):
        name, summary = 'legacy_sign', 'the sign of the gradient'
        hypers = (go.Hyper('learning_rate', 0.01, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'), go.Hyper('bend', 2.0, '[0, inf)'))
        slots = staticmethod(lambda h: (go.Slot('total'),))
        coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))

        @staticmethod
        def step(xp, h, c, w, g, s):
            return w - c.lr * xp.sign(g), {'total': s.total + g}

    LegacySign.__qualname__ = 'LegacySign'
    globals()['LegacySign'] = LegacySign  # where pickle looks for it
    parameters, trainer = make_trainer(mx, 'legacy_sign', {'bend': 3.0})
    step(mx, parameters, trainer, 2)
    path = str(tmp_path / 'native')
    trainer.save_states(path)
    with pytest.raises(UnreadableFile, match='LegacySign'):
        read_states(path)
    states = read_states(path, allow=[f'{LegacySign.__module__}.LegacySign'])
    assert states.optimizer == 'legacy_sign' and states.hypers['bend'] == 3.0 and set(states.slots['0']) == {'total'}


def test_limits_leave_room():
    """A network of some thousand parameters is far from every limit."""
    assert ndarray_format.MAX_ARRAYS >= 20_000


def test_full_names_in_a_file_are_sorted(mx, tmp_path):
    """Twelve layers of one shape: the file of collect_params() has the names that the trainer has sorted."""
    net = mx.gluon.nn.HybridSequential()
    for _ in range(12):
        net.add(mx.gluon.nn.Dense(2, in_units=2, use_bias=False))
    net.initialize(mx.init.Normal(1))
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'momentum': 0.9})
    with mx.autograd.record():
        loss = (net(mx.nd.ones((1, 2))) ** 2).sum()
    loss.backward()
    trainer.step(1)
    net.collect_params().save(str(tmp_path / 'full.params'))
    trainer.save_states(str(tmp_path / 'x.states'))
    states = read_states(tmp_path / 'x.states', tmp_path / 'full.params')
    held = (trainer._kvstore._updater if trainer._update_on_kvstore else trainer._updaters[0]).states
    for index, parameter in enumerate(trainer._params):
        np.testing.assert_array_equal(states.slots[parameter.name]['momentum'], held[index].asnumpy())
