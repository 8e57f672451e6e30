"""Files that are no files, claim too much, or are of a form that nobody has thought of: our error, soon, and little memory."""
import importlib.util
import io
import json
import os
import pickle
import signal
import struct
import zipfile

import numpy as np
import pytest
import work
from commands import refused

import gluon_optim as go
from gluon_optim import models, rules
from gluon_optim.mapping import optax_file
from gluon_optim.models import matching
from gluon_optim.models.pytorch import target_of
from gluon_optim.states import container, json_text, mxnet_files, torch_files
from gluon_optim.states.errors import StateFileError
from gluon_optim.states.file_part import SMALL
from gluon_optim.states.files import Kind, kind_of, open_once
from gluon_optim.states.model import OptimizerStates, ParameterInfo
from gluon_optim.transfer.names import read_params
from gluon_optim.transfer.read import read

NET = {'0.weight': np.ones((2, 3), 'float32'), '0.bias': np.ones(2, 'float32')}


@pytest.fixture(autouse=True)
def stop():
    """What waits for a pipe is interrupted; no test comes near this."""
    def too_late(*_):
        raise AssertionError('a reader has not returned')
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(120)
    yield
    signal.alarm(0)


def example():
    slots = {'w': {'mean': np.ones((2, 3), 'float32'), 'var': np.ones((2, 3), 'float32')}}
    return OptimizerStates('adam', rules.get('adam').hyperparameters().asdict(), 3, [ParameterInfo('w', 'w', (2, 3), 'float32')],
                           {'w': 3}, slots)


def params_file(path, names):
    array = struct.pack('<Iiiqiii4x', 0xF993FAC9, 0, 1, 1, 1, 0, 0)
    path.write_bytes(struct.pack('<QQQ', 0x112, 0, len(names)) + array * len(names) + struct.pack('<Q', len(names))
                     + b''.join(struct.pack('<Q', len(name)) + name.encode() for name in names))
    return path


# What is no file

def symbol_beside(path):
    beside = params_file(path.parent / 'net.params', ['a'])
    symbol = path.parent / 'net-symbol.json'
    if path.exists() or path.is_symlink():
        symbol.symlink_to(path)
        return models.model_to_torch(beside)
    raise FileNotFoundError  # there need not be one


READERS = {
    'read_states': go.read_states, 'container.read': container.read, 'read_checkpoint': container.read_checkpoint,
    'read_manifest': container.read_manifest, 'mxnet_files.read_states': mxnet_files.read_states,
    'mxnet_files.read_params': mxnet_files.read_params, 'optax': optax_file.read, 'json': lambda path: json_text.read(path, 'it'),
    'read': read, '--params': lambda path: read_params(str(path)), 'kind_of': kind_of,
    'model_to_torch': models.model_to_torch, 'like': lambda path: models.model_to_torch(NET, like=path),
    'names': lambda path: models.model_to_torch(NET, names=path), 'suggest_names': models.suggest_names, 'symbol': symbol_beside,
}
if importlib.util.find_spec('onnx'):
    from gluon_optim import onnx
    READERS['onnx'] = onnx.read


def no_file(folder, what, ending=''):
    path = folder / ('it' + ending)
    if what == 'pipe':
        os.mkfifo(path)
    elif what == 'device':
        path.symlink_to('/dev/zero')
    elif what == 'folder':
        path.mkdir()
    elif what == 'empty':
        path.write_bytes(b'')
    return path


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
@pytest.mark.parametrize('what', ['pipe', 'device', 'folder', 'empty', 'missing'])
@pytest.mark.parametrize('reader', READERS)
def test_what_is_no_file_is_refused(tmp_path, reader, what):
    path = no_file(tmp_path, what)
    if (reader, what) == ('kind_of', 'empty'):
        assert kind_of(path) is Kind.UNKNOWN
        return
    with pytest.raises(FileNotFoundError if what == 'missing' else ValueError):
        READERS[reader](path)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
@pytest.mark.parametrize('what', ['pipe', 'device', 'folder'])
@pytest.mark.parametrize('words', [
    'inspect IT', 'verify IT', 'diff run IT', 'diff IT run', 'convert IT --to torch', 'convert IT.onnx --to mxnet',
    'convert net.params --to safetensors --like IT', 'convert net.params --to safetensors --like IT.pt',
    'convert net.params --to safetensors --map IT', 'convert run --to optax --params IT', 'convert run --to optax -o IT',
    'convert run --to optax -o x.npz --report IT'])
def test_no_command_waits_for_a_pipe(run, tmp_path, words, what):
    container.write(tmp_path / 'run', example())
    params_file(tmp_path / 'net.params', ['a'])
    names = [word for word in words.split() if word.startswith('IT')]
    path = no_file(tmp_path, what, names[0][2:])
    there = sorted(os.listdir(tmp_path))
    code, out, err = run(*(path.name if word in names else word for word in words.split()))
    assert code in (1, 2) and out == '' and err.count('\n') == 1
    assert 'must be a file' in err or 'a folder, a pipe or a device' in err
    assert sorted(os.listdir(tmp_path)) == there


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
def test_a_trainer_waits_for_no_pipe(tmp_path):
    mx = pytest.importorskip('mxnet')
    path = no_file(tmp_path, 'pipe')
    net = mx.gluon.nn.Dense(2, in_units=3)
    net.initialize()
    trainer = mx.gluon.Trainer(net.collect_params(), 'adam')
    for load in (lambda: go.load_states(trainer, path), lambda: go.load_checkpoint(path, net=net, trainer=trainer)):
        with pytest.raises(StateFileError, match='must be a file. Received: a pipe'):
            load()


# JSON

DEEP = b'[' * 200_000 + b']' * 200_000
JSONS = {
    'deep lists': DEEP, 'deep objects': b'{"a":' * 200_000 + b'1' + b'}' * 200_000, 'digits': b'{"a": ' + b'9' * 4_000_000 + b'}',
    'a key 40000 times': b'{' + b','.join([b'"a": "0.weight"'] * 40_000) + b'}', 'infinite': b'{"a": Infinity}',
    'huge': b'{"a": 1e999}', 'NaN': b'{"a": NaN}', 'half of a pair': b'{"a": "\\ud800"}',
    'no UTF-8': b'{"a": "\xff"}', 'cut off': b'{"a": ', 'empty': b' ',
    'many lists': b'[' + b','.join([b'[]'] * 3_000_000) + b']', 'many objects': b'[' + b','.join([b'{"a":0}'] * 800_000) + b']',
    'wide': b'{"a": "' + b'a' * 17_000_000 + '\U0001f600"}'.encode(), 'long': b' ' * (json_text.LONGEST + 1),
}


@pytest.mark.parametrize('what', JSONS)
def test_json_is_bounded(tmp_path, what):
    path = tmp_path / 'it.json'
    path.write_bytes(JSONS[what])

    def refuse():
        with pytest.raises(StateFileError, match=r'it\.json'):
            json_text.read(path, 'it')
    assert work.memory_of(refuse) < 2 * len(JSONS[what]) + SMALL


def test_json_that_is_read(tmp_path):
    value = {'ü': [1, -2.5, None, True, {'a': '\U0001f600'}]}
    assert json_text.loads(json.dumps(value).encode(), 'it') == value
    assert json_text.loads(b'[' * 101 + b']' * 101, 'it') and json_text.loads(b'[]', 'it') == []
    with pytest.raises(StateFileError, match='nested up to 100'):
        json_text.loads(b'[' * 102 + b']' * 102, 'it')


@pytest.mark.parametrize('text', [DEEP, b'{"a":' * 200_000 + b'1' + b'}' * 200_000, b'{"a": 1e999}', b'{"a": 1, "a": 1}'])
def test_wherever_there_is_json_it_is_bounded(run, tmp_path, text):
    container.write(tmp_path / 'run', example())
    params_file(tmp_path / 'net.params', ['a'])
    (tmp_path / 'map.json').write_bytes(text)
    (tmp_path / 'like.safetensors').write_bytes(struct.pack('<Q', len(text)) + text)
    np.savez(tmp_path / 'x.npz', **{'gluon_optim.json': np.frombuffer(text, 'u1')})
    (tmp_path / 'names').write_bytes(b'[' + text)
    (tmp_path / 'beside.params').write_bytes((tmp_path / 'net.params').read_bytes())
    (tmp_path / 'beside-symbol.json').write_bytes(text)
    for words in ('convert net.params --to safetensors --map map.json',
                  'convert net.params --to safetensors --like like.safetensors', 'inspect x.npz',
                  'convert run --to optax -o y.npz --params names', 'convert beside.params --to safetensors',
                  'inspect like.safetensors'):
        if text[:1] == b'[' and 'safetensors' in words.split()[-1] and 'like' in words:
            continue  # does not begin like one
        refused(run(*words.split()), 2, next(word for word in ('map.', 'like.', 'x.', 'names', 'beside') if word in words))


# Maps

@pytest.mark.parametrize('entry', [
    {'from': 'v', 'rnn': 'lstm', 'hidden': 1, 'layers': 10**9}, {'from': 'v', 'rnn': 'lstm', 'hidden': 10**18},
    {'from': 'v', 'rnn': 'gru', 'hidden': 1, 'projection': 10**18}])
def test_sizes_in_a_map_are_compared_with_the_vector(tmp_path, entry):
    (tmp_path / 'map.json').write_text(json.dumps({'lstm.*': entry}))  # of 71 bytes
    with pytest.raises(ValueError, match='as many elements'):
        models.model_to_torch({'v': np.ones(40, 'float32')}, names=tmp_path / 'map.json')


@pytest.mark.parametrize('entries', [
    {'a': {'from': 'v', 'repeat': 10**9}, 'b': {'from': 'w', 'ones': True}},
    {**{f'a{k}': {'from': 'v', 'repeat': 10**4} for k in range(2000)}, 'b': 'w'}])
def test_a_map_cannot_make_arrays_without_end(entries):
    def refuse():
        with pytest.raises(ValueError, match='twice the memory'):
            models.model_to_torch({'v': np.ones(100, 'float32'), 'w': np.ones(1, 'float32')}, names=entries)
    assert work.memory_of(refuse) < SMALL


def checks(size):
    """How many names are looked at while a map of so many entries is read, checked and followed."""
    class Name(str):
        seen = 0

        def __eq__(self, other):
            Name.seen += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    arrays = {Name(f'{k}.weight'): np.full(1, k, 'float32') for k in range(size)}
    names = {Name(f'layer{k}.weight'): Name(f'{k}.weight') for k in range(size)}
    like = {Name(f'layer{k}.weight'): np.ones(1, 'float32') for k in range(size)}
    assert len(models.model_to_torch(arrays, names=names, like=like).weights) == size
    return Name.seen


def test_a_map_costs_linear_time():
    assert checks(2000) <= 2.5 * checks(1000)


def tries(monkeypatch, size, found, wanted):
    """How many pairs of layers are compared to match so many with as many, or to say why they do not match."""
    count = [0]

    def counted(*arguments, fit=matching._fit_layer):
        count[0] += 1
        return fit(*arguments)
    monkeypatch.setattr(matching, '_fit_layer', counted)
    arrays, like = ({f'{prefix}{k}.weight': np.zeros(shape(k), 'float32') for k in range(number)}
                    for prefix, number, shape in (('layer', size, found), ('x', size + 1, wanted)))
    for names in (like, {name: like[name] for name in list(like)[::-1]}, {name: like[name] for name in list(like)[:-1]}):
        try:
            models.model_to_torch(arrays, like=names)
        except ValueError as error:
            assert len(str(error)) < 10_000
        draft = models.suggest_names(arrays, like=names)
        assert all(len(entry['choose']) <= 100 for entry in draft.values() if 'choose' in entry)
    monkeypatch.undo()
    return count[0]


@pytest.mark.parametrize('found, wanted', [
    (lambda k: (2, 2), lambda k: (2, 2)), (lambda k: (2, k + 1), lambda k: (k + 1, 2)),
    (lambda k: (2, k + 1), lambda k: (2, k + 1)), (lambda k: (2, 3, 4, 5), lambda k: (2, 4, 5, 3)),
    (lambda k: (k + 1,), lambda k: (k + 2,))])
def test_a_match_costs_linear_time(monkeypatch, found, wanted):
    assert tries(monkeypatch, 400, found, wanted) <= 2.5 * tries(monkeypatch, 200, found, wanted)


def test_symbols_are_bounded(tmp_path):
    params_file(tmp_path / 'net.params', ['a'])
    for layers in ('9' * 10**6, '1' + '0' * 12, '-1', '0', 'x', ''):
        node = {'op': 'RNN', 'name': 'rnn', 'attrs': {'mode': 'lstm', 'state_size': '1', 'num_layers': layers},
                'inputs': [[0, 0, 0], [1, 0, 0]]}
        variables = [{'op': 'null', 'name': name, 'inputs': []} for name in ('data', 'a')]
        (tmp_path / 'net-symbol.json').write_text(json.dumps({'nodes': [*variables, node]}))
        model_of = params_file(tmp_path / 'net.params', ['a'])
        if layers in ('9' * 10**6, 'x', ''):
            with pytest.raises(ValueError, match='Repair it'):
                models.model_to_torch(model_of)
    with pytest.raises(ValueError, match='as many elements'):
        models.plan.Rnn('lstm', 1, 10**12).parts(100, 'a')


# PyTorch's files

torch_only = pytest.mark.skipif(not importlib.util.find_spec('torch'), reason='needs PyTorch')


def adam(tmp_path, **options):
    torch = pytest.importorskip('torch')
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / 'it.pt', **options)
    return torch, optimizer.state_dict()


def same(a, b):
    assert type(a) in (type(b), np.ndarray)
    if isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            same(a[key], b[key])
    elif hasattr(b, 'numpy'):
        np.testing.assert_array_equal(a, b.detach().float().numpy() if str(b.dtype) == 'torch.bfloat16' else b.detach().numpy())
        assert a.shape == tuple(b.shape)
    else:
        assert a == b


@pytest.mark.parametrize('options', [{}, {'_use_new_zipfile_serialization': False}, {'pickle_protocol': 4}])
def test_torch_files_are_read_as_torch_reads_them(tmp_path, options):
    torch, state_dict = adam(tmp_path, **options)
    base = torch.arange(24.).reshape(4, 6)
    value = {'optimizer': state_dict, 'views': {
        'part': base[1:3, 2:5], 'turned': base.t(), 'one': base[2, 3], 'expanded': base[:1].expand(5, 6), 'none': torch.zeros(0, 3),
        'bf16': torch.ones(3).bfloat16(), 'half': torch.ones(3).half(), 'long': torch.arange(3), 'bool': torch.ones(2).bool(),
        'parameter': torch.nn.Parameter(base)}, 'size': tuple(base.shape), 'none': None, 'flag': True, 'list': [1, 2.5, 'x']}
    torch.save(value, tmp_path / 'it.pt', **options)
    with open_once(tmp_path / 'it.pt') as file:
        assert file.kind is Kind.PYTORCH
        same(torch_files.arrays(torch_files.read(file), file), value)
    assert read(tmp_path / 'it.pt', optimizer='adam_torch').states.names == ['0', '1']


@torch_only
def test_torch_state_dicts_as_the_likeness_of_a_model(tmp_path):
    import torch
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(3, 2))
    module[2].weight = module[0].weight
    for name, options in (('new.pt', {}), ('old.pt', {'_use_new_zipfile_serialization': False})):
        torch.save(module.state_dict(), tmp_path / name, **options)
        target = target_of(tmp_path / name)
        assert target.shapes == {key: tuple(value.shape) for key, value in module.state_dict().items()}
        assert target.tied == {'2.weight': '0.weight'} and not target.halves
    torch.save(module.half().to('meta').state_dict(), tmp_path / 'meta.pt')
    assert target_of(tmp_path / 'meta.pt').shapes == target.shapes and '0.weight' in target_of(tmp_path / 'meta.pt').halves


def with_pickle(path, value, to):
    """The file of `torch.save` with another pickle in it, or its members as ``to`` makes them."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(to, 'w') as new:
        for name, data in members.items():
            new.writestr(name, value if name.endswith('data.pkl') else data)


def group(**changes):
    return {'lr': 0.1, 'betas': (0.9, 0.999), 'eps': 1e-8, 'weight_decay': 0, 'amsgrad': False, 'params': [0], **changes}


VALUES = {
    'state a list': {'state': [], 'param_groups': [group()]}, 'no groups': {'state': {}, 'param_groups': []},
    'groups a dictionary': {'state': {}, 'param_groups': {'a': group()}},
    'rate': {'state': {}, 'param_groups': [group(lr=10**400)]},
    'a rate of 19 digits': {'state': {}, 'param_groups': [group(lr=10**18, weight_decay=float('inf'))]},
    'no params': {'state': {}, 'param_groups': [{'lr': 0.1}]},
    'params a number': {'state': {}, 'param_groups': [group(params=3)]},
    'entries lists': {'state': {0: [1]}, 'param_groups': [group()]},
    'betas a number': {'state': {}, 'param_groups': [group(betas=3)]},
    'ids lists': {'state': {}, 'param_groups': [group(params=[[]])]}, 'text': {'state': 'x', 'param_groups': 'y'},
    'no state_dict': [1, 2], 'betas texts': {'state': {}, 'param_groups': [group(betas=('a', 'b'))]},
    'infinite': {'state': {}, 'param_groups': [group(lr=float('inf'))]},
    'slots texts': {'state': {0: {'exp_avg': 'x'}}, 'param_groups': [group()]},
}


@pytest.mark.parametrize('what', VALUES)
def test_state_dicts_of_an_unknown_form(run, tmp_path, what):
    adam(tmp_path)
    with_pickle(tmp_path / 'it.pt', pickle.dumps(VALUES[what], 2), tmp_path / 'x.pt')
    for words in ('inspect x.pt --optimizer adam_torch', 'convert x.pt --to mxnet --optimizer adam_torch -o y'):
        code, out, err = run(*words.split())
        assert code in (1, 2) and out == '' and err.count('\n') == 1 and 'Traceback' not in err, (code, out, err)
    with pytest.raises(ValueError):
        read(tmp_path / 'x.pt', optimizer='adam_torch')


def test_meta_tensors_have_no_values(run, tmp_path):
    torch, state_dict = adam(tmp_path)
    state_dict['state'][0]['exp_avg'] = state_dict['state'][0]['exp_avg'].to('meta')
    torch.save(state_dict, tmp_path / 'x.pt')
    refused(run('inspect', 'x.pt', '--optimizer', 'adam_torch'), 2, 'meta device')


def test_torch_zip_files_that_are_refused(run, tmp_path):
    """A compressed member is refused before it is touched, and so are members that reach into others."""
    torch, state_dict = adam(tmp_path)
    for entry in state_dict['state'].values():
        entry['exp_avg'] = torch.zeros(8 << 20)
    torch.save(state_dict, tmp_path / 'large.pt')
    with zipfile.ZipFile(tmp_path / 'large.pt') as old, zipfile.ZipFile(tmp_path / 'x.pt', 'w', zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert os.path.getsize(tmp_path / 'x.pt') < 1 << 20

    def inspect():
        refused(run('inspect', 'x.pt', '--optimizer', 'adam_torch'), 2, 'without compression')
    assert work.memory_of(inspect) < SMALL
    data = (tmp_path / 'it.pt').read_bytes()
    at = data.index(b'PK\1\2')
    for damaged in (data[:at + 6] + b'\xff\xff' + data[at + 8:], data.replace(b'PK\1\2\0\0\0\0', b'PK\1\2\xff\xff\xff\xff')):
        (tmp_path / 'x.pt').write_bytes(damaged)  # the version that is needed: nothing here depends on it
        assert run('inspect', 'x.pt', '--optimizer', 'adam_torch')[0] == 0
    where = data.rindex(b'PK\5\6')
    for damaged in (data[:at + 42] + struct.pack('<I', 1 << 20) + data[at + 46:],
                    data[:where + 8] + b'\xff\xff' * 2 + data[where + 12:-1], data + b'x',
                    data[:at + 20] + struct.pack('<II', 1 << 30, 1 << 30) + data[at + 28:]):
        (tmp_path / 'x.pt').write_bytes(damaged)
        code, out, err = run('inspect', 'x.pt', '--optimizer', 'adam_torch')
        assert (code, out, err.count('\n')) == (2, '', 1)


def test_tensors_cannot_be_larger_than_the_file(run, tmp_path):
    torch, state_dict = adam(tmp_path)
    small = torch.zeros(1)
    state_dict['state'][0]['exp_avg'] = small.expand(1 << 40)
    torch.save(state_dict, tmp_path / 'x.pt')
    refused(run('inspect', 'x.pt', '--optimizer', 'adam_torch'), 2, 'bytes of memory')
    state_dict['state'] = {k: {'exp_avg': small} for k in range(3)}
    torch.save(state_dict, tmp_path / 'x.pt')
    with zipfile.ZipFile(tmp_path / 'x.pt') as file:
        text = file.read('x/data.pkl')
    assert b'cpuq' in text
    shape = b'K\1\x85'  # (1,), as size and as stride
    with_pickle(tmp_path / 'x.pt', text.replace(shape, b'J\xff\xff\xff\x7f\x85', 1), tmp_path / 'y.pt')
    refused(run('inspect', 'y.pt', '--optimizer', 'adam_torch'), 2, 'reaches to element')


def test_nothing_in_torch_files_is_called(run, tmp_path, monkeypatch):
    adam(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'MARK'),)
    for value in (Evil(), {'state': {}, 'param_groups': [Evil()]}):
        with_pickle(tmp_path / 'it.pt', pickle.dumps(value, 2), tmp_path / 'x.pt')
        refused(run('inspect', 'x.pt', '--optimizer', 'adam_torch'), 2, 'Nothing was imported')
    assert not (tmp_path / 'MARK').exists()


# Records in files of other formats

RECORDS = [
    lambda r: r.update(optimizer=3), lambda r: r.update(hypers=[]), lambda r: r.update(num_update='x'),
    lambda r: r.update(num_update=-1), lambda r: r.update(num_update=2**60), lambda r: r.update(scheduler=3),
    lambda r: r.update(parameters={}), lambda r: r.update(fresh=[[]]), lambda r: r.update(counts={'w': 'x'}),
    lambda r: r.update(counts={}), lambda r: r.update(producer={'a': 1}), lambda r: r.pop('hypers'), lambda r: r.update(more=1),
    lambda r: r['parameters'].append(3), lambda r: r['parameters'][0].update(shape='x'),
    lambda r: r['parameters'][0].update(shape=[2**40, 2**40]), lambda r: r['parameters'][0].update(dtype='object'),
    lambda r: r['parameters'][0].update(lr_mult=None), lambda r: r['parameters'][0].pop('name'),
    lambda r: r['hypers'].update(beta1='x'),
]


@pytest.mark.parametrize('k', range(len(RECORDS)))
@pytest.mark.parametrize('to', ['optax', 'onnx'])
def test_records_of_an_unknown_form(run, tmp_path, to, k):
    if to == 'onnx':
        onnx_package = pytest.importorskip('onnx')
        onnx.write(tmp_path / 'x.onnx', example(), weights={'w': np.ones((2, 3), 'float32')})
        model = onnx_package.load(str(tmp_path / 'x.onnx'))
        about = json.loads(model.metadata_props[0].value)
        RECORDS[k](about)
        model.metadata_props[0].value = json.dumps(about)
        (tmp_path / 'x.onnx').write_bytes(model.SerializeToString())
        path = 'x.onnx'
    else:
        optax_file.write(tmp_path / 'x.npz', example(), example().parameters)
        arrays = dict(np.load(tmp_path / 'x.npz'))
        about = json.loads(arrays['gluon_optim.json'].tobytes())
        RECORDS[k](about['states'])
        arrays['gluon_optim.json'] = np.frombuffer(json.dumps(about).encode(), 'u1')
        np.savez(tmp_path / 'x.npz', **arrays)
        path = 'x.npz'
    code, out, err = run('inspect', path)
    assert (code, out, err.count('\n')) == (2, '', 1), (code, out, err)


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_infinite_numbers_are_not_written(tmp_path, value):
    states = example()
    states.hypers['learning_rate'] = value
    with pytest.raises(ValueError):
        optax_file.write(tmp_path / 'x.npz', states, states.parameters)
    assert os.listdir(tmp_path) == []


def test_external_data_of_onnx(tmp_path):
    onnx_package = pytest.importorskip('onnx')
    weights = {'w': np.arange(6, dtype='float32').reshape(2, 3)}
    onnx.write(tmp_path / 'x.onnx', example(), weights=weights)
    model = onnx_package.load(str(tmp_path / 'x.onnx'))
    (tmp_path / 'outside').write_bytes(bytes(24))
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'w.bin').write_bytes(b'1234' + weights['w'].tobytes())

    def saved(**entries):
        tensor = model.graph.initializer[0]
        tensor.ClearField('raw_data')
        tensor.ClearField('external_data')
        tensor.data_location = 1
        for key, entry in entries.items():
            tensor.external_data.add(key=key, value=entry)
        (tmp_path / 'in' / 'x.onnx').write_bytes(model.SerializeToString())
        return tmp_path / 'in' / 'x.onnx'
    np.testing.assert_array_equal(onnx.read(saved(location='w.bin', offset='4'))[1]['w'], weights['w'])
    np.testing.assert_array_equal(onnx.read(saved(location='w.bin', offset='4', length='24'))[1]['w'], weights['w'])
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path / 'in' / 'pipe')
    for entries in ({'location': '../outside'}, {'location': str(tmp_path / 'outside')}, {}, {'location': '..'},
                    {'location': 'pipe'}, {'location': 'w.bin'}, {'location': 'w.bin', 'offset': '5'},
                    {'location': 'w.bin', 'offset': '-4'},
                    {'location': 'w.bin', 'offset': '9' * 10**6}, {'location': 'w.bin', 'offset': 'x'}, {'location': '\0'}):
        with pytest.raises((ValueError, OSError)):
            onnx.read(saved(**entries))


def test_small_onnx_files_do_not_become_large(tmp_path):
    pytest.importorskip('onnx')
    for name, field in (('nodes', b'\x3a\x80\x80\x80\x01' + b'\x0a\0' * (1 << 20)),
                        ('tensors', b'\x3a\x80\x80\x80\x01' + b'\x2a\0' * (1 << 20)), ('properties', b'\x72\0' * (1 << 20))):
        (tmp_path / 'x.onnx').write_bytes(field)

        def refuse():
            with pytest.raises(StateFileError):
                onnx.read(tmp_path / 'x.onnx')
        assert work.memory_of(refuse) < 2 * len(field) + SMALL, name


def test_zip_directories_are_bounded(tmp_path):
    """A million members of nothing: the kind of the file is not looked for among them."""
    end = io.BytesIO()
    entry = struct.pack('<4s4x2H4x3I3H8xI', b'PK\1\2', 0, 0, 0, 0, 0, 0, 0, 0, 0)
    data = b'PK\3\4' + bytes(26) + entry * 600_000
    end.write(data + struct.pack('<4s4H2IH', b'PK\5\6', 0, 0, 0xffff, 0xffff, len(entry) * 600_000, 30, 0))
    (tmp_path / 'x.npz').write_bytes(end.getvalue())

    def refuse():
        assert kind_of(tmp_path / 'x.npz') is Kind.NPZ
        with pytest.raises(StateFileError):
            mxnet_files.read_params(tmp_path / 'x.npz')
    assert work.memory_of(refuse) < SMALL
