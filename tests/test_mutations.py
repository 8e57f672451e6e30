"""Damaged files of every kind: each is read or refused with our error, and little is made of it.

GLUON_OPTIM_MUTATIONS=10000 tries so many of each kind; GLUON_OPTIM_WORST=1 prints the longest time and the most memory.
"""
import io
import json
import os
import random
import signal
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from mutate import mutated

from gluon_optim import models, rules
from gluon_optim.mapping import optax_file
from gluon_optim.models.pytorch import target_of
from gluon_optim.states import container
from gluon_optim.states.file_part import SMALL
from gluon_optim.states.inspection import rows
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight
from gluon_optim.states.mxnet_files import read_params, writer
from gluon_optim.transfer.read import read

COUNT = int(os.environ.get('GLUON_OPTIM_MUTATIONS', 250))
NUMBERS = [b'\xff' * 8, b'\xff' * 4, b'\0' * 8, b'\0\0\0\x80', b'\xff\xff\xff\x7f', b'\xff' * 7 + b'\x7f', b'\0' * 7 + b'\1', b'\1',
           b'(', b'.', b'\x80\x80\x80\x80\x08',
           b'K\xff', b'J\xff\xff\xff\x7f', b'N', b']', b'}', b'\x85', b'h\0', b'Q', b'R', b'b', b's',
           b'u']
WORDS = [b'{', b'}', b'[', b']', b'"', b',', b':', b'null', b'true', b'NaN', b'Infinity', b'-1', b'1e400', b'9' * 25, b'9' * 400,
         b'0.5', b'"a"', b'\\ud800', b'\xff', b'[[[[[[[[', b'{"a":', b'"repeat": 1000000000,', b'"layers": 1000000000,',
         b'"ones": true,', b'"rnn": "lstm",', b'[4611686018427387904, 4]', b'[]', b'{}', b'\\u001b']
NET = {'0.weight': np.ones((4, 3), 'float32'), '0.bias': np.ones(4, 'float32'), '1.gamma': np.ones(2, 'float32'),
       'v': np.arange(40, dtype='float32')}
MAP = {'a.weight': {'from': '0.weight', 'transpose': [1, 0], 'view': [4, 3], 'shape': [12]}, 'a.bias': '0.bias',
       'b.weight': {'from': '1.gamma', 'repeat': 2},
       'c.*': {'from': 'v', 'rnn': 'lstm', 'hidden': 2, 'layers': 1, 'bidirectional': False}}
PLAIN = {name: NET[name] for name in ('0.weight', '0.bias')}


def states():
    infos = [ParameterInfo(name, name, shape, 'float32') for name, shape in (('0.weight', (4, 3)), ('0.bias', (4,)))]
    slots = {info.name: {slot: np.full(info.shape, 0.5, 'float32') for slot in ('mean', 'var')} for info in infos}
    scheduler = {'class': 'mxnet.lr_scheduler.FactorScheduler',
                 'attributes': {'step': 10, 'factor': 0.5, 'base_lr': 0.1, 'count': 0}}
    return OptimizerStates('adam', rules.get('adam').hyperparameters().asdict(), 3, infos, {info.name: 3 for info in infos}, slots,
                           scheduler=scheduler)


def make_container(path):
    container.write(path, states(), Run([Weight(name, name, [value]) for name, value in PLAIN.items()], 3, extra={'a': [1]}))


def make_params(path):
    array = struct.pack('<Iiiqqiii', 0xF993FAC9, 0, 2, 2, 3, 1, 0, 0) + bytes(24)
    path.write_bytes(struct.pack('<QQQ', 0x112, 0, 2) + 2 * array + struct.pack('<QQ4sQ4s', 2, 4, b'0.aa', 4, b'0.bb'))


def make_torch(path, like=False):
    torch = pytest.importorskip('torch')
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    torch.save(module.state_dict() if like else optimizer.state_dict(), path, _use_new_zipfile_serialization=path.suffix != '.pth')


def make_onnx(path):
    pytest.importorskip('onnx')
    from gluon_optim import onnx
    onnx.write(path, states(), weights=NET)


def all_of(contents):
    """What `inspect` does with it."""
    json.dumps(contents.about(), default=str)
    return list(rows(contents))


# kind -> ending, what makes a sound file, what reads it
KINDS = {
    'container': ('.safetensors', make_container, lambda path: all_of(read(path))),
    'states': ('.states', lambda path: writer.write_states(path, states(), 1), lambda path: all_of(read(path))),
    'params': ('.params', make_params, lambda path: (read_params(path), models.model_to_torch(path).rows)),
    'npz': ('.npz', lambda path: np.savez(path, **NET), lambda path: all_of(read(path))),
    'optax': ('.npz', lambda path: optax_file.write(path, states(), states().parameters), lambda path: all_of(read(path))),
    'pt': ('.pt', make_torch, lambda path: all_of(read(path, optimizer='adam_torch'))),
    'old pt': ('.pth', make_torch, lambda path: all_of(read(path, optimizer='adam_torch'))),
    'onnx': ('.onnx', make_onnx, lambda path: all_of(read(path))),
    'map': ('.json', lambda path: path.write_text(json.dumps(MAP)), lambda path: models.model_to_torch(NET, names=path).rows),
    'like pt': ('.pt', lambda path: make_torch(path, like=True), lambda path: (target_of(path), all_of(read(path)))),
    'like safetensors': ('.safetensors', lambda path: models.model_to_torch(PLAIN).save(path),
                         lambda path: (all_of(read(path)), models.model_to_torch(PLAIN, like=path).rows)),
}


def in_members(data, rng, folder):
    """A zip file, sound but for one of its members: else its directory and checksums find everything out."""
    (folder / 'old.zip').write_bytes(data)
    with zipfile.ZipFile(folder / 'old.zip') as old, zipfile.ZipFile(folder / 'new.zip', 'w') as new:
        names = old.namelist()
        chosen = rng.choice([name for name in names if name.endswith(('data.pkl', '.json.npy'))] or names)
        for name in names:
            member = old.read(name)
            if name == chosen:
                head = 128 if name.endswith('.npy') and rng.random() < 0.8 else 0  # of an array: its form
                member = member[:head] + mutated(member[head:], rng, WORDS if name.endswith('.npy') else NUMBERS)
                if head:
                    text = member[head:]
                    member = bytes_of_array(np.frombuffer(text, 'u1'))
            new.writestr(name, member)
    return (folder / 'new.zip').read_bytes()


def bytes_of_array(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def in_header(data, rng):
    """A container or safetensors file with another header, signed anew."""
    size = int.from_bytes(data[:8], 'little')
    text = data[8:8 + size]
    at = 120 if b'gluon_optim' in text[:40] else 1
    text = text[:at] + mutated(text[at:], rng, WORDS)
    header = struct.pack('<Q', len(text)) + text
    return (container._signed(header) if at == 120 else header) + data[8 + size:]


@pytest.mark.parametrize('kind', KINDS)
def test_mutations(tmp_path, kind, capsys):
    ending, make, use = KINDS[kind]
    path = tmp_path / ('it' + ending)
    make(path)
    use(path)  # it is sound
    intact, rng, refused = path.read_bytes(), random.Random(kind), 0
    worst = [0.0, 0]

    def too_late(*_):
        raise AssertionError('a reader has not returned')
    signal.signal(signal.SIGALRM, too_late)
    for k in range(COUNT):
        if kind in ('pt', 'like pt', 'optax', 'npz') and k % 2:
            data = in_members(intact, rng, tmp_path)
        elif 'safetensors' in ending and k % 2:
            data = in_header(intact, rng)
        else:
            data = mutated(intact, rng, WORDS if kind == 'map' or ending == '.safetensors' else NUMBERS)
        with open(path, 'r+b') as file:  # emptying a file before writing makes some file systems wait for the disk
            file.write(data)
            file.truncate()
        traced = k % 25 == 0  # tracing is slow
        if traced:
            tracemalloc.start()
        signal.alarm(60)
        begin = time.process_time()
        try:
            use(path)
        except (ValueError, OSError):
            refused += 1
        except Exception as error:
            (tmp_path / 'kept').write_bytes(data)
            raise AssertionError(f'mutation {k} of {kind}, kept as {tmp_path / "kept"}: {error!r}') from error
        finally:
            taken = time.process_time() - begin
            signal.alarm(0)
            peak = tracemalloc.get_traced_memory()[1] if traced else 0
            tracemalloc.stop()
        assert peak <= 2 * len(data) + SMALL, (kind, k)
        worst = [max(worst[0], 0 if traced else taken), max(worst[1], peak)]
    assert refused > COUNT // 5
    if 'GLUON_OPTIM_WORST' in os.environ:
        with capsys.disabled():
            print(f'\n{kind}: {COUNT} mutations of {len(intact)} bytes, {refused} refused, at most {worst[0]:.3f} s of CPU time, '
                  f'{worst[1] / 2**20:.1f} MiB')
