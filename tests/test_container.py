"""The container of optimizer states: exact, complete or invisible, and closed to anything damaged or forged."""
import errno
import hashlib
import itertools
import json
import os
import random
import re
import signal
import stat
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import work

from gluon_optim import cli
from gluon_optim.states import atomic, container
from gluon_optim.states.errors import StateFileError
from gluon_optim.states.files import kind_of
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight, digest

safetensors_numpy = pytest.importorskip('safetensors.numpy')


def example(seed=0):
    """States with all that a file can hold: every type, a scalar, an empty array, views, names that need care."""
    rng = np.random.default_rng(seed)
    weights = {'net/0.weight': ('float16', (3, 5)), '1.bias': ('float32', (7,)), 'größe 😀.γ': ('float64', (2, 1, 3)),
               '2.empty': ('float32', (0, 4)), 'frozen"\\': ('float32', (2,))}
    slots = {
        'net/0.weight': {'mean': rng.random((3, 5), 'float32'), 'norm_sq': np.array(1.5, 'float32')},
        '1.bias': {'mean': rng.random(14, 'float32')[::2], 'steps': np.arange(-3, 4, dtype='>i8')},
        'größe 😀.γ': {'mean': np.asfortranarray(rng.random((2, 1, 3))), 'bits': np.array([1, 255], 'uint8')},
        '2.empty': {'mean': np.zeros((0, 4), 'float32')},
    }
    return OptimizerStates(
        optimizer='novograd',
        hypers={'learning_rate': 0.1 + seed, 'wd': 1e-300, 'clip_gradient': None, 'variant': 'paper', 'amsgrad': False},
        num_update=112,
        parameters=[ParameterInfo(name, f'net0_{i}', shape, dtype, 0.5, 2.0)
                    for i, (name, (dtype, shape)) in enumerate(weights.items())],
        counts={'net/0.weight': 12, '1.bias': 11, 'größe 😀.γ': 12, '2.empty': 1, 'frozen"\\': 0},
        slots=slots,
        master={'net/0.weight': rng.random((3, 5), 'float32')},
        scheduler={'class': 'mxnet.lr_scheduler.MultiFactorScheduler', 'attributes': {'step': [5, 10], 'base_lr': 0.1 / 3}},
        variables={'m_schedule': np.array(0.75)},
        loss_scaler={'loss_scale': 65536.0, 'unskipped': 3},
        producer={'gluon_optim': '0.1.0', 'mxnet': '1.9.1'},
    )


def plain(x):
    """Nested lists and types: what == means for states."""
    if isinstance(x, np.ndarray):
        return (x.dtype.newbyteorder('=').name, x.shape, x.tolist())
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return x


def assert_same(a, b):
    for field in ('optimizer', 'hypers', 'num_update', 'parameters', 'names', 'counts', 'slots', 'master', 'scheduler', 'variables',
                  'loss_scaler', 'producer'):
        assert plain(getattr(a, field)) == plain(getattr(b, field)), field


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'run.states'


@pytest.fixture(scope='module')
def intact(tmp_path_factory):
    """The bytes of a whole file."""
    file = tmp_path_factory.mktemp('intact') / 'run.states'
    container.write(file, example())
    return file.read_bytes()


def read_bytes(path, data):
    path.write_bytes(data)
    return container.read(path)


def split(data):
    """Header text without its padding, and the data."""
    length = struct.unpack('<Q', data[:8])[0]
    return data[8:8 + length].rstrip(b' '), data[8 + length:]


def forge(text, data, length=None):
    """A file of the given header text with a correct signature, where the text has a place for one."""
    start = text.find(b'header_sha256\\":\\"') + 18
    head = struct.pack('<Q', len(text) if length is None else length) + text[:start]
    sha = hashlib.sha256(head + b'0' * 64 + text[start + 64:]).hexdigest().encode()
    return head + sha + text[start + 64:] + data


# What is written

def test_round_trip(path):
    states = example()
    container.write(path, states)
    back = container.read(path)
    assert_same(back, states)
    assert digest(back) == digest(states)
    assert back.slots['1.bias']['mean'].flags.writeable and back.slots['1.bias']['mean'].flags.aligned
    container.write(path, back)
    assert_same(container.read(path), states)


def test_stateless_and_empty(path):
    """A parameter without state and one whose optimizer keeps no slots are different things, and both come back."""
    info = [ParameterInfo(name, name, (2,), 'float32') for name in 'ab']
    states = OptimizerStates('sgd_torch', {}, 5, info, {'a': 5, 'b': 0}, {'a': {}})
    container.write(path, states)
    assert_same(container.read(path), states)
    container.write(path, OptimizerStates('adamw', {}, 0, [], {}, {}))
    assert container.read(path).names == []


def test_safetensors_reads_it(path):
    states = example()
    container.write(path, states)
    tensors = safetensors_numpy.load_file(str(path))
    expected = {f'{name}/{slot}': array for name, slots in states.slots.items() for slot, array in slots.items()}
    expected['net/0.weight/master'] = states.master['net/0.weight']
    expected['_optimizer/m_schedule'] = states.variables['m_schedule']
    assert plain(tensors) == plain(expected)


def test_every_byte_is_covered_as_documented(intact):
    """A reader written from docs/FORMAT.md alone, with the standard library."""
    length = struct.unpack('<Q', intact[:8])[0]
    header = intact[:8 + length]
    tensors = json.loads(header[8:])
    manifest = json.loads(tensors.pop('__metadata__')['gluon_optim'])
    signature = manifest['header_sha256']
    assert header.count(signature.encode()) == 1
    assert hashlib.sha256(header.replace(signature.encode(), b'0' * 64)).hexdigest() == signature
    covered = 8 + length
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1]['data_offsets']):
        begin, end = tensor['data_offsets']
        assert begin == covered - 8 - length
        assert f'{zlib.crc32(intact[8 + length + begin:8 + length + end]):08x}' == manifest['crc32'][key]
        covered += end - begin
    assert covered == len(intact)
    assert (8 + length) % 8 == 0
    assert [p['name'] for p in manifest['parameters']] == example().names
    assert manifest['parameters'][0] == {
        'name': 'net/0.weight', 'full_name': 'net0_0', 'shape': [3, 5], 'dtype': 'float16', 'lr_mult': 0.5, 'wd_mult': 2.0,
        'grad_req': None, 'count': 12, 'slots': ['mean', 'norm_sq'], 'tree': None, 'master': True}


def test_numpy_scalars_and_tuples_become_json(path):
    states = example()
    states.hypers = {'learning_rate': np.float32(0.1), 'steps': (np.int64(3), 4)}
    container.write(path, states)
    assert container.read(path).hypers == {'learning_rate': float(np.float32(0.1)), 'steps': [3, 4]}


def change(**fields):
    def apply(states):
        for field, value in fields.items():
            setattr(states, field, value)
    return apply


def rename(name):
    def apply(states):
        states.parameters[-1].name = name
        states.counts = {}
    return apply


@pytest.mark.parametrize('spoil, words', [
    (change(hypers={'lr': float('nan')}), 'hypers.lr must be a finite number'),
    (change(hypers={'lr': float('inf')}), 'finite'),
    (change(hypers={'lr': object()}), 'Received: <object'),
    (change(hypers={'big': 2**70}), '64 bits'),
    (change(hypers={'text': '\ud800'}), 'surrogates'),
    (change(scheduler={'class': 'x', 'attributes': {'table': {1: 2}}}), 'scheduler.attributes.table .*string keys'),
    (change(scheduler={'class': 'x'}), "'scheduler' of the manifest"),
    (change(num_update=-1), "'num_update'"),
    (change(counts={'nobody': 3}), 'nobody'),
    (change(slots={'1.bias': {'master': np.zeros(7)}}), 'master'),
    (change(slots={'1.bias': {'a/b': np.zeros(7)}}), 'slash'),
    (change(slots={'1.bias': {'c': np.zeros(7, 'complex64')}}), 'complex64'),
    (change(master={'1.bias': np.zeros(8, 'float32')}), 'shape'),
    (change(optimizer=''), "'optimizer'"),
    (change(variables={'a/b': np.zeros(1)}), 'slash'),
    (rename('1.bias'), 'twice'),
    (rename('_optimizer'), '_optimizer'),
    (rename('../../etc/passwd'), r"'\.\.'"),
    (rename('/etc/passwd'), 'between slashes'),
    (rename('a\n'), 'printable'),
    (rename(''), 'printable'),
])
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(path, spoil, words):
    container.write(path, example(1))
    before = path.read_bytes()
    states = example()
    spoil(states)
    with pytest.raises(StateFileError, match=words):
        container.write(path, states)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_nesting_without_end_is_refused(path):
    states = example()
    states.hypers = {}
    states.hypers['self'] = states.hypers
    with pytest.raises(StateFileError):
        container.write(path, states)
    assert not path.exists()


# Complete or invisible

def test_permissions(path):
    old = os.umask(0o027)
    try:
        container.write(path, example())
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        container.write(path, example())
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(old)


def test_links_keep_pointing(path):
    target = path.parent / 'elsewhere' / 'run-7.states'
    target.parent.mkdir()
    path.symlink_to(target)
    container.write(path, example())
    assert path.is_symlink() and container.read(target).num_update == 112
    assert os.listdir(target.parent) == [target.name]


def test_only_files_are_written_or_read(path):
    os.mkfifo(path)
    for call in (lambda: container.read(path), lambda: container.write(path, example()),
                 lambda: container.read(path.parent), lambda: container.write(path.parent, example())):
        with pytest.raises(StateFileError, match='must be a file'):
            call()
    with pytest.raises(FileNotFoundError):
        container.read(path.parent / 'absent')
    with pytest.raises(FileNotFoundError):
        container.write(path.parent / 'absent' / 'run.states', example())
    assert os.listdir(path.parent) == [path.name]


class Failing:
    """An array that cannot be copied to the end, as when a device is lost."""
    shape, dtype = (4,), np.dtype('float32')

    def __init__(self, error):
        self.error = error

    def chunks(self):
        yield np.zeros(2, 'float32')
        if self.error:
            raise self.error


@pytest.mark.parametrize('error, expected', [(RuntimeError('lost'), RuntimeError), (KeyboardInterrupt(), KeyboardInterrupt),
                                             (None, StateFileError)])
def test_failure_in_the_middle_leaves_the_old_file(path, error, expected):
    container.write(path, example())
    before = path.read_bytes()
    states = example(1)
    states.slots['frozen"\\'] = {'mean': Failing(error)}
    with pytest.raises(expected):
        container.write(path, states)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


WRITER = """
import sys, numpy
sys.modules['mxnet'] = None  # as where it is not installed: it takes a second to import
from gluon_optim.states import container
from gluon_optim.states.model import OptimizerStates, ParameterInfo
def states(n):
    return OptimizerStates('adamw', {}, n, [ParameterInfo('w', 'w', (1 << 18,), 'float32')], {'w': n},
                           {'w': {'mean': numpy.full(1 << 18, n, 'float32'), 'var': numpy.full(1 << 18, -n, 'float32')}})
"""


def run(script, *args, **kwargs):
    root = str(Path(container.__file__).parents[2])
    return subprocess.Popen([sys.executable, '-c', WRITER + script, *map(str, args)], env={**os.environ, 'PYTHONPATH': root},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_killed_while_writing(path):
    """SIGKILL at random instants: what is found is always a complete file, the newest that was reported or its successor."""
    script = """
n = int(sys.argv[2])
while True:
    n += 1
    container.write(sys.argv[1], states(n))
    print(n, flush=True)
"""
    chance = random.Random(0)
    newest = 0
    for _ in range(8):
        process = run(script, path, newest)
        newest = int(process.stdout.readline())  # the interpreter is up and one file is complete
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.communicate()[0].split()]
        newest = (reported or [newest])[-1]
        found = container.read(path)
        assert found.num_update in (newest, newest + 1)
        assert (found.slots['w']['var'] == -found.num_update).all()
        newest = found.num_update
    assert newest > 8


def test_no_space_left(path):
    """The file system refuses in the middle (here by a limit on the size of files): an OSError, the old file, no remains."""
    container.write(path, example())
    before = path.read_bytes()
    process = run("""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    container.write(sys.argv[1], states(1))
except OSError as error:
    print('refused', error.errno)
""", path)
    out, err = process.communicate()
    assert out.startswith('refused'), err
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_memory_while_writing(path):
    """128 MB in four arrays, two of them awkward views: no more than 64 MB are needed beyond them."""
    process = run("""
import resource
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
a = numpy.ones((4, 8 << 20), 'float32')
big = OptimizerStates('adamw', {}, 1, [ParameterInfo('w', 'w', (8 << 20,), 'float32')], {'w': 1},
                      {'w': {'a': a[0], 'b': a[1][::-1], 'c': a[2], 'd': a[3].reshape(2048, -1).T}})
container.write(sys.argv[1], states(1))
before = peak()
container.write(sys.argv[1], big)
print(peak() - before)
""", path)
    out, err = process.communicate()
    assert int(out) < 64, err


@pytest.mark.parametrize('weights', [False, True])
def test_memory_while_reading_many_small_arrays(path, weights):
    """The header is most of such a file. With 20,000 parameters and the same share that is less than twice the file and 32 MiB."""
    names = [f'features.{k}.weight' for k in range(4000)]
    run = Run([Weight(name, f'net0_{k}', [np.zeros(4, 'float32')]) for k, name in enumerate(names)], step=1)
    container.write(path, OptimizerStates(
        'adamw', {}, 5, [ParameterInfo(name, f'net0_{k}', (4,), 'float32', grad_req='write') for k, name in enumerate(names)],
        dict.fromkeys(names, 5), {name: {slot: np.zeros(4, 'float32') for slot in ('mean', 'var')} for name in names}),
        run if weights else None)
    assert work.memory_of(lambda: container.read_checkpoint(path)) < 5 * os.path.getsize(path)


# What is read

@pytest.mark.parametrize('data, words', [
    (b'', 'not a gluon_optim file'),
    (b'\x10', 'not a gluon_optim file'),
    (b'\x80\x02}q\x00.', 'not a gluon_optim file'),
    (struct.pack('<Q', 2) + b'{}', 'not a gluon_optim file'),
    (safetensors_numpy.save({'a': np.zeros(2)}), 'not a gluon_optim file'),
])
def test_other_files(path, data, words):
    with pytest.raises(StateFileError, match=words):
        read_bytes(path, data)
    assert not kind_of(path).is_ours


def test_ours_are_known_by_their_first_bytes(path, intact):
    path.write_bytes(intact[:200])
    assert kind_of(path).is_ours


def edit(old, new, times=1):
    def apply(text):
        assert old in text
        return text.replace(old, new, times)
    return apply


@pytest.mark.parametrize('change_header, words', [
    (edit(b'\\"version\\":2', b'\\"version\\":3'), 'format version must be 1 or 2. Received: 3'),
    (edit(b'\\"version\\":2', b'\\"version\\":true'), 'version'),
    (edit(b'\\"version\\":2', b'\\"version\\":1'), 'keys'),
    (edit(b'gluon_optim.states', b'other.states'), 'format'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":112,\\"num_update\\":112'), 'twice'),
    (edit(b'"dtype":"F32"', b'"dtype":"F32","dtype":"F32"'), 'twice'),
    (edit(b'"dtype":"F32"', b'"dtype":"F33"'), 'F33'),
    (edit(b'"dtype":"F32"', b'"dtype":["F32"]'), 'dtype'),
    (edit(b'"dtype":"F32"', b'"dtype":"I16"'), 'must be at'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":NaN'), 'NaN'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":1e999'), '1e999'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":' + b'9' * 4000), '64 bits'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":' + b'9' * 3000000), '64 bits'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":1.0'), 'num_update'),
    (edit(b'\\"num_update\\":112,', b''), 'keys'),
    (edit(b'\\"num_update\\":112', b'\\"num_update\\":112,\\"more\\":0'), 'more'),
    (edit(b'\\"hypers\\":{', b'\\"hypers\\":{\\"x\\":' + b'[' * 100000 + b']' * 100000 + b','), 'JSON'),
    (edit(b'\\"hypers\\":{', b'\\"hypers\\":{\\"x\\":\\"\\\\ud800\\",'), 'surrogates'),
    (edit(b'\\"novograd\\"', b'\\"novo\xff\\"'), 'UTF-8'),
    (edit(b'{"__metadata__":{', b'{"__metadata__":{"a":"b",'), 'not a gluon_optim file'),
    (edit(b'},"', b',"more":"x"},"'), 'no others'),
    (edit(b'\\"name\\":\\"1.bias\\"', b'\\"name\\":\\"../1.bias\\"'), "'..'"),
    (edit(b'\\"name\\":\\"1.bias\\"', b'\\"name\\":\\"net/0.weight\\"'), 'twice'),
    (edit(b'\\"slots\\":[\\"mean\\",\\"norm_sq\\"]', b'\\"slots\\":[\\"mean\\"]'), 'norm_sq'),
    (edit(b'\\"slots\\":[\\"mean\\",\\"norm_sq\\"]', b'\\"slots\\":[\\"mean\\",\\"norm_sq\\",\\"x\\"]'), '/x'),
    (edit(b'\\"slots\\":null', b'\\"slots\\":7'), 'slots'),
    (edit(b'\\"lr_mult\\":0.5', b'\\"lr_mult\\":\\"0.5\\"'), 'lr_mult'),
    (edit(b'\\"master\\":true', b'\\"master\\":false'), 'master'),
    (edit(b'\\"crc32\\":{\\"', b'\\"crc32\\":{\\"new\\":\\"00000000\\",\\"'), 'new'),
    (edit(b'"shape":[7]', b'"shape":[7,4611686018427387904,4]'), 'shape'),
    (edit(b'"shape":[0,4]', b'"shape":[0,1000000000,1000000000]'), 'shape'),
    (edit(b'"shape":[7]', b'"shape":[-7]'), 'shape'),
    (edit(b'"shape":[7]', b'"shape":[6]'), 'must be at'),
    (edit(b'"shape":[7]', b'"shape":[' + b','.join([b'1'] * 40) + b']'), 'shape'),
    (edit(b'"data_offsets":[0,', b'"data_offsets":[8,'), 'must be at bytes 0'),
    (edit(b'"data_offsets":[0,', b'"data_offsets":[0,0,'), 'data_offsets'),
    (lambda text: text[:-1], 'JSON'),
    (lambda text: text + b'{}', 'JSON'),
])
def test_forged_headers_are_refused(path, intact, change_header, words):
    """The signature is right each time, so the header itself must be looked at."""
    text, data = split(intact)
    assert_same(read_bytes(path, forge(text, data)), example())
    with pytest.raises(StateFileError, match=words) as caught:
        read_bytes(path, forge(change_header(text), data))
    assert len(str(caught.value)) < 3000 and str(path) in str(caught.value)


@pytest.mark.parametrize('length', [0, 1, 10**6, 2**31, 2**63, 2**64 - 1])
def test_claimed_header_sizes(path, intact, length):
    text, data = split(intact)
    with pytest.raises(StateFileError):
        read_bytes(path, forge(text, data, length))


def test_a_list_of_names_without_end_is_refused_in_time(path):
    """Checks over all names must not be quadratic."""
    parameter = json.dumps({'name': 'a', 'full_name': 'a', 'shape': [], 'dtype': 'int8', 'lr_mult': 1, 'wd_mult': 1, 'count': 0,
                            'grad_req': None, 'slots': None, 'tree': None, 'master': False}).replace('"', '\\"').encode()
    container.write(path, OptimizerStates('adamw', {}, 0, [], {}, {}))
    text, data = split(path.read_bytes())

    def of(count):
        forged = forge(text.replace(b'\\"parameters\\":[', b'\\"parameters\\":[' + b','.join([parameter] * count)), data)

        def refused():
            with pytest.raises(StateFileError, match='twice'):
                read_bytes(path, forged)
        return refused
    work.assert_linear(of, 30000)


@pytest.mark.parametrize('offsets, data, words', [
    (('[0,8]', '[8,16]'), 16, None),
    (('[0,8]', '[0,8]'), 8, "'w/b' .* must be at bytes 8 to 16 of the data. Received: 0 to 8"),     # the same bytes twice
    (('[0,8]', '[16,24]'), 24, "'w/b' .* must be at bytes 8 to 16 of the data. Received: 16 to 24"),  # bytes that nothing covers
    (('[8,16]', '[0,8]'), 16, None),                                                                 # another order is as good
    (('[0,8]', '[8,16]'), 15, 'the data must have 16 bytes. Received: 15. The file is truncated'),
    (('[0,8]', '[8,16]'), 17, 'the data must have 16 bytes. Received: 17. The file is longer'),
    (('[0,8]', '[8,16]'), 0, 'truncated'),
])
def test_the_data_are_covered_exactly(path, offsets, data, words):
    container.write(path, OptimizerStates('adamw', {}, 1, [ParameterInfo('w', 'w', (2,), 'float32')], {'w': 1},
                                          {'w': {'a': np.ones(2, 'float32'), 'b': np.ones(2, 'float32')}}))
    text, content = split(path.read_bytes())
    a, b = (f'"data_offsets":{offset}'.encode() for offset in ('[0,8]', '[8,16]'))
    first, second = (f'"data_offsets":{offset}'.encode() for offset in offsets)
    forged = forge(text.replace(a, b'A').replace(b, second).replace(b'A', first), (content * 2)[:data])
    if words is None:
        assert read_bytes(path, forged).slots['w']['b'].tolist() == [1, 1]
    else:
        with pytest.raises(StateFileError, match=words):
            read_bytes(path, forged)


# Mutations

TOKENS = [b'{', b'}', b'[', b']', b'"', b',', b':', b'\\"', b'null', b'true', b'NaN', b'-1', b'0', b'1e400', b'9' * 25,
          b'18446744073709551616', b'\\\\ud800', b'"F64"', b'\xff', b'\x00', b' ', b'[[[[', b'master', b'mean', b'../',
          b'_optimizer', b'__metadata__']


def mutate(chance, intact):
    """One damaged or forged file, and whether it must be refused whatever it says."""
    kind = chance.randrange(8)
    data = bytearray(intact)
    if kind == 0:
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data), bytes(data) != intact
    if kind == 1:
        return intact[:chance.randrange(len(intact))], True
    if kind == 2:
        return intact + bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20))), True
    if kind == 3:
        a, b = sorted(chance.randrange(len(data)) for _ in range(2))
        data[a:b] = bytes(chance.randrange(256) for _ in range(b - a)) if chance.random() < 0.5 else bytes(b - a)
        return bytes(data), bytes(data) != intact
    if kind == 4:
        length = chance.choice([chance.randrange(2 * len(data)), chance.randrange(2**64)])
        data[:8] = struct.pack('<Q', length)
        return bytes(data), bytes(data) != intact
    text, tail = split(intact)
    for _ in range(chance.choice([1, 1, 2, 4])):
        a = chance.randrange(120, len(text))
        b = min(len(text), a + chance.choice([0, 1, 1, 2, 5, 30]))
        if kind == 5:
            new = chance.choice(TOKENS)
        elif kind == 6:
            c = chance.randrange(120, len(text))
            new = text[c:c + chance.choice([1, 10, 100])]
        else:
            new = str(chance.choice([chance.randrange(10), 2**chance.randrange(70)])).encode()
            digits = [i for i in range(120, len(text)) if text[i:i + 1].isdigit()]
            a = chance.choice(digits)
            b = a + 1
        text = text[:a] + new + text[b:]
    return forge(text, tail), False


def same_as_safetensors(path, states):
    tensors = safetensors_numpy.load_file(str(path))
    ours = {f'{name}/{slot}': array for name, slots in states.slots.items() for slot, array in slots.items()}
    ours.update((f'{name}/master', array) for name, array in states.master.items())
    ours.update((f'_optimizer/{name}', array) for name, array in states.variables.items())
    assert set(ours) == set(tensors)
    for key, array in ours.items():
        assert array.dtype == tensors[key].dtype and array.shape == tensors[key].shape and array.tobytes() == tensors[key].tobytes()


def fuzz(path, intact, number, seed=0):
    chance = random.Random(seed)
    read = 0
    path.write_bytes(intact)
    for i in range(number):
        data, refused = mutate(chance, intact)
        with open(path, 'r+b') as file:  # emptying a file before writing makes some file systems wait for the disk
            file.write(data)
            file.truncate()
        try:
            with work.counted() as spent:
                states = container.read(path)
        except StateFileError:
            states = None
        assert spent.calls <= 10 * len(data) + 3000 and spent.bytes <= 4 * len(data), spent
        if states is not None:
            assert not refused, f'mutation {i} was read'
            same_as_safetensors(path, states)
            read += 1
    return read


def test_mutations(path, intact):
    """Damaged files are refused with our error; forged ones with a right signature are refused or read as safetensors does."""
    read = fuzz(path, intact, int(os.environ.get('GLUON_OPTIM_MUTATIONS', 10000)))
    assert read > 10  # harmless forgeries, such as another rate: else the forging itself is broken


def temporaries(folder):
    return [name for name in os.listdir(folder) if name.endswith('.tmp')]


def test_a_private_file_is_private_while_it_is_written(path):
    container.write(path, example())
    path.chmod(0o600)
    seen = []

    class Watching(Failing):
        def chunks(self):
            seen.extend(stat.S_IMODE(os.stat(path.parent / name).st_mode) for name in temporaries(path.parent))
            yield np.zeros(4, 'float32')

    opened = os.open

    def watched(name, flags, mode=0o777, **options):
        descriptor = opened(name, flags, mode, **options)
        if str(name).endswith('.tmp'):
            seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    states = example(1)
    states.slots['frozen"\\'] = {'mean': Watching(None)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'open', watched)
        container.write(path, states)
    assert seen and set(seen) == {0o600} and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_cannot_be_synchronised(path):
    """The file is there: the error says so, and does not look like one of a file that was not written."""
    container.write(path, example())
    synchronise = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, 'Input/output error')
        synchronise(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        with pytest.raises(OSError, match='the file is in its place, whole, but its folder') as caught:
            container.write(path, example(1))
    assert caught.value.errno == errno.EIO and caught.value.filename == str(path)
    assert_same(container.read(path), example(1))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('when', ['before the claim', 'while it is claimed'])
def test_who_cleans_up_does_not_take_a_file_that_is_being_written(path, when):
    """Between its creation and its claim a temporary file looks like the leftover of a killed writer."""
    everything = re.compile('.*')
    claim, cleaned = atomic._claim, []

    def slow(descriptor):
        if not cleaned:
            cleaned.append(True)
            if when == 'before the claim':
                atomic.remove_leftovers(path.parent, everything)
            else:  # the other process holds the lock, and will delete the file in a moment
                name = temporaries(path.parent)[0]
                with open(path.parent / name, 'r+b') as file:
                    held, _ = claim(file.fileno())
                    found = claim(descriptor)
                    os.unlink(path.parent / name)
                os.close(held)
                return found
        return claim(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, '_claim', slow)
        container.write(path, example())
    assert cleaned
    assert_same(container.read(path), example())
    assert os.listdir(path.parent) == [path.name]


# Several nets and trainers in one file, where there is no MXNet

def parts():
    run = Run([], step=7, metrics={'score': 0.5}, extra={'fold': 1})
    weights = [Weight('net/0.weight', 'net0_0', [np.ones((3, 5), 'float16')]), Weight('1.bias', 'net0_1', [np.ones(7, 'float32')])]
    return {'größe': (example(1), replace(run, weights=weights[:1])), 'b c': (example(2), replace(run, weights=weights[1:])),
            'net alone': (OptimizerStates('none', {}, 0, [], {}, {}, producer=example().producer), replace(run, weights=weights))}


def test_parts_come_back(tmp_path):
    path = tmp_path / 'x'
    container.write_parts(path, parts())
    found = container.read_parts(path)
    assert list(found) == list(parts()) and kind_of(path).value == 'checkpoint'
    for name, (states, run) in parts().items():
        assert plain(vars(found[name][0])) == plain(vars(states)) and digest(found[name][0]) == digest(states)
        assert all(mine[:2] == theirs[:2] and plain(mine.copies[0]) == plain(theirs.copies[0])
                   for mine, theirs in itertools.zip_longest(found[name][1].weights, run.weights))
        assert replace(found[name][1], weights=[]) == replace(run, weights=[])
        assert digest(container.read(path, name)) == digest(states)
    assert container.read_manifest(path)['run']['metrics'] == {'score': 0.5}
    first = path.read_bytes()
    container.write_parts(path, found)
    assert path.read_bytes() == first


def test_reading_many_parts_takes_calls_in_proportion(tmp_path):
    def calls(number):
        path = tmp_path / 'x'
        container.write_parts(path, {str(k): (OptimizerStates('none', {}, 0, [], {}, {}), Run([Weight('w', 'w', [np.zeros(1)])]))
                                     for k in range(number)})
        with work.counted() as spent:
            container.read_parts(path)
        return spent.calls

    calls(1)  # the first read makes more of them
    assert calls(400) < 5 * calls(100)


def test_commands_name_the_parts(tmp_path, capsys):
    path = str(tmp_path / 'x')
    container.write_parts(path, parts())
    assert cli.main(['inspect', path]) == 0
    assert [line[3:] for line in capsys.readouterr().out.splitlines() if line.startswith('== ')] == list(parts())
    assert cli.main(['verify', path, '--json', '--part', 'b c']) == 1  # a state of the example has no such slot
    assert json.loads(capsys.readouterr().out)['digest'] == digest(parts()['b c'][0])
    assert cli.main(['verify', path]) == 1
    assert 'b c: incomplete: ' in capsys.readouterr().out
