"""`gluon-optim convert` to every program and back: nothing changes on the way, what cannot be is refused, and little memory."""
import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import conversion_runs
import numpy as np
import pytest
from commands import refused
from conversion_runs import CASES, NAMES, half_trained

from gluon_optim import cli, rules
from gluon_optim.cli import options as cli_options
from gluon_optim.mapping import optax_file
from gluon_optim.states import container, inspection
from gluon_optim.states.errors import StateFileError
from gluon_optim.states.files import Kind, kind_of, open_once
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight, digest
from gluon_optim.states.mxnet_files import reader as legacy
from gluon_optim.states.mxnet_files import writer
from gluon_optim.states.protobuf import NUMBERS, WHOLE, Place, header, skim, varint
from gluon_optim.transfer import verify
from gluon_optim.transfer.names import Params, read_params
from gluon_optim.transfer.programs import PROGRAMS
from gluon_optim.transfer.read import read

ROOT = Path(__file__).resolve().parent.parent
OLD = ROOT / 'tests' / 'legacy' / '1.9.1'
PACKAGES = {'torch': ['torch'], 'onnx': ['onnx', 'onnxruntime'], 'optax': ['jax', 'optax']}
ENDINGS = {'torch': '.pt', 'onnx': '.onnx', 'optax': '.npz'}


def need(target, running=False):
    """Skip without the packages that writing for ``target`` needs, or ``running`` what was written."""
    for package in PACKAGES[target] if running or target == 'torch' else PACKAGES[target][:1] if target == 'onnx' else ():
        pytest.importorskip(package)


def checkpoint(path, states, weights):
    container.write(path, states, Run([Weight(info.name, info.full_name, [weights[info.name]]) for info in states.parameters],
                                      step=states.num_update))


@pytest.fixture
def adamw(tmp_path):
    """A checkpoint of adamw: `run.safetensors`. Returns its states and weights."""
    states, weights = half_trained('adamw', 'usual')
    checkpoint(tmp_path / 'run.safetensors', states, weights)
    return states, weights


# There and back

@pytest.mark.parametrize('target', ENDINGS)
@pytest.mark.parametrize('name, which', CASES)
def test_there_and_back(run, tmp_path, name, which, target):
    need(target)
    states, weights = half_trained(name, which, 'float16' if which == 'usual' else 'float32')
    checkpoint(tmp_path / 'run.safetensors', states, weights)
    there = 'run' + ENDINGS[target]
    assert run('convert', 'run.safetensors', '--to', target)[0] == 0
    names = [] if which == 'usual' or target != 'torch' else ['--params', write_params(tmp_path / 'run.params', weights)]
    assert run('convert', there, '--to', 'mxnet', '-o', 'back', *names)[0] == 0
    back = container.read(tmp_path / 'back')
    assert digest(back) == digest(states) and back.hypers == states.hypers
    assert [(info.name, info.lr_mult, info.wd_mult * states.hypers['wd']) for info in back.parameters] == [
        (info.name, info.lr_mult, info.wd_mult * states.hypers['wd']) for info in states.parameters]
    if target != 'torch':  # whose state_dict keeps neither schedulers nor the names of trainers
        assert back.parameters == states.parameters
    found = json.loads(run('inspect', there, '--json', *names)[1])
    assert found['digest'] == digest(states) and run('verify', there, *names)[0] == 0


def write_params(path, weights):
    """A .params file, as numpy can write it for MXNet 2: an .npz."""
    with open(path, 'wb') as file:
        np.savez(file, **weights)
    return path


def whole_run():
    """All that states can hold: masters, multipliers, different counts, a parameter without state, a scheduler."""
    states, weights = half_trained('adamw', 'usual', 'float16', 4)
    for part in (states.slots, states.master):
        del part['one']
    states.counts.update(one=0, bias=3)
    states.num_update = 9
    states.scheduler = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {'base_lr': 0.25, 'step': 3}}
    states.loss_scaler = {'loss_scale': 2.0}
    states.hypers.update(rescale_grad=0.125, clip_gradient=2.0)
    return states, weights


@pytest.mark.parametrize('target', ['onnx', 'optax'])
def test_everything_in_the_states_comes_back(run, tmp_path, target):
    need(target)
    states, weights = whole_run()
    checkpoint(tmp_path / 'run.safetensors', states, weights)
    assert run('convert', 'run.safetensors', '--to', target)[0] == 0
    assert run('convert', 'run' + ENDINGS[target], '--to', 'mxnet', '-o', 'back')[0] == 0
    back = container.read(tmp_path / 'back')
    assert digest(back) == digest(states) and back.parameters == states.parameters and back.hypers == states.hypers
    assert (back.scheduler, back.loss_scaler, back.num_update) == (states.scheduler, states.loss_scaler, 9)


def test_from_any_file_to_any_other(run, adamw):
    """Each in turn, and the states are the same at the end."""
    states, _ = adamw
    targets = [target for target in ENDINGS if all(readers_can_read(target))]
    for chain in ([*targets, 'mxnet'], [*reversed(targets), 'mxnet']):
        source = 'run.safetensors'
        for k, target in enumerate(chain):
            output = f'{k}' + ENDINGS.get(target, '')
            assert run('convert', source, '--to', target, '-o', output, '--force')[0] == 0
            source = output
        assert digest(container.read(source)) == digest(states)


def readers_can_read(target):
    for package in PACKAGES[target][:1] if target != 'optax' else ():
        try:
            __import__(package)
        except ImportError:
            yield False


@pytest.mark.parametrize('version', ['1.9.1', '2.0.0b1'])
@pytest.mark.parametrize('file', ['adam.states', 'adam-master.states'])
def test_old_files_of_mxnet(run, version, file):
    """MXNet's own .states, without MXNet: through each target and back into a .states file."""
    path = OLD.parent / version / file
    original = legacy.read_states(path, ['w', 'b'])
    for target in ENDINGS:
        try:
            need(target)
        except pytest.skip.Exception:
            continue
        assert run('convert', path, '--params', 'w,b', '--to', target, '-o', 'x' + ENDINGS[target])[0] == 0
        code, _, err = run('convert', 'x' + ENDINGS[target], '--to', 'mxnet', '--mxnet-version', version[0], '-o', 'back.states',
                           '--params', 'w,b', '--force')
        assert (code, err) == (0, '')
        back = legacy.read_states('back.states', ['w', 'b'])
        assert digest(back) == digest(original)


# The file for JAX

def test_the_file_for_optax_is_read_by_numpy_alone(run, tmp_path):
    states, weights = whole_run()
    checkpoint(tmp_path / 'run.safetensors', states, weights)
    assert run('convert', 'run.safetensors', '--to', 'optax')[0] == 0
    with np.load(tmp_path / 'run.npz', allow_pickle=False) as file:
        about = json.loads(file['gluon_optim.json'].tobytes())
        assert about['optimizer'] == 'adamw' and about['arguments']['epsilon'] == 1e-3
        assert about['arguments']['wd_mult'] == {'weight': 1.0, 'bias': 0.0, 'one': 1.0, 'number': 1.0}
        assert about['arguments']['rescale_grad'] == 1.0
        assert {name: int(file['counts/' + name]) for name in states.names} == states.counts
        for name, slots in states.slots.items():
            assert file['master/' + name].tobytes() == states.master[name].tobytes()
            for slot, array in slots.items():
                assert file[f'slots/{slot}/{name}'].tobytes() == array.tobytes()
        assert not file['slots/mean/one'].any() and file['master/one'].tobytes() == weights['one'].astype('f4').tobytes()
    first = (tmp_path / 'run.npz').read_bytes()
    assert run('convert', 'run.safetensors', '--to', 'optax', '-o', 'again.npz')[0] == 0
    assert (tmp_path / 'again.npz').read_bytes() == first


def test_arrays_that_were_trained_elsewhere_come_back(run, adamw, tmp_path):
    """numpy.savez is enough to write the file."""
    assert run('convert', 'run.safetensors', '--to', 'optax')[0] == 0
    with np.load(tmp_path / 'run.npz') as file:
        arrays = dict(file)
    arrays['count'] = arrays['count'] + 5
    arrays['slots/mean/weight'] = arrays['slots/mean/weight'] * 2
    np.savez(tmp_path / 'later.npz', **arrays)
    assert run('convert', 'later.npz', '--to', 'mxnet', '-o', 'back')[0] == 0
    back = container.read(tmp_path / 'back')
    assert set(back.counts.values()) == {15} and back.num_update == 15
    np.testing.assert_array_equal(back.slots['weight']['mean'], 2 * adamw[0].slots['weight']['mean'])


def test_names_of_all_kinds(tmp_path):
    names = ['a/b', 'mean/x', 'ä b', 'x.npy', 'x', '0', 'master/x']
    infos = [ParameterInfo(name, name, (2,), 'float32') for name in names]
    random = np.random.RandomState(0)
    slots = {name: {slot: random.rand(2).astype('f4') for slot in ('mean', 'var')} for name in names}
    states = OptimizerStates('adamw', rules.get('adamw').hyperparameters().asdict(), 3, infos, dict.fromkeys(names, 3), slots)
    optax_file.write(tmp_path / 'x.npz', states, infos)
    assert digest(optax_file.read(tmp_path / 'x.npz')[0]) == digest(states)


# Damaged files

@pytest.mark.parametrize('target', ENDINGS)
def test_damaged_files_are_unreadable_and_nothing_worse(run, adamw, tmp_path, target):
    need(target)
    assert run('convert', 'run.safetensors', '--to', target, '-o', 'x')[0] == 0
    data = (tmp_path / 'x').read_bytes()
    path = tmp_path / ('broken' + ENDINGS[target])
    random = np.random.RandomState(0)
    for size in (0, 1, 17, len(data) // 3, len(data) - 1):
        path.write_bytes(data[:size])
        refused(run('convert', path.name, '--to', 'mxnet', '-o', 'back'), 2, path.name)
    for place in random.randint(0, len(data), 60):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << random.randint(8)]) + data[place + 1:])
        code, _, err = run('convert', path.name, '--to', 'mxnet', '-o', 'back')
        assert code in (0, 1, 2) and 'Traceback' not in err
        assert (code == 0) == (tmp_path / 'back').exists()
        if code == 0:
            (tmp_path / 'back').unlink()
    assert sorted(os.listdir(tmp_path)) == sorted(['x', 'run.safetensors', path.name])


def test_a_file_of_another_kind(run, tmp_path):
    np.savez(tmp_path / 'params.npz', weight=np.zeros(2))
    refused(run('convert', 'params.npz', '--to', 'mxnet', '-o', 'x'), 1, 'only parameters')
    np.savez(tmp_path / 'x.npz', **{'gluon_optim.json': np.frombuffer(b'{"version": 9}', 'u1')})
    refused(run('convert', 'x.npz', '--to', 'mxnet', '-o', 'x'), 2, 'version must be 1. Received: 9')
    np.savez(tmp_path / 'x.npz', **{'gluon_optim.json': np.frombuffer(b'[]', 'u1')})
    refused(run('convert', 'x.npz', '--to', 'mxnet', '-o', 'x'), 2, 'must be present and complete')


def test_protocol_buffers():
    assert varint(0) == b'\0' and varint(1 << 35).hex() == '808080808001'
    inner = header(9, 5) + b'hello' + b'\x08\x07'
    data = b'\x08\x2a' + header(5, len(inner)) + inner + b'\x1d1234' + b'\x2112345678' + header(5, 2) + b'\x08\x01'
    fields = {1: WHOLE, 3: WHOLE, 5: {1: NUMBERS, 9: None}}  # and not 4
    found = []
    rest = skim(io.BytesIO(b'..' + data), Place(2, len(data)), fields, found)
    assert rest == b'\x08\x2a' + header(5, 2) + b'\x08\x07' + b'\x1d1234' + header(5, 2) + b'\x08\x01'
    assert [place and io.BytesIO(b'..' + data).getvalue()[place.begin:sum(place)] for place in found] == [b'hello', None]
    for damaged in (data[:-1], b'\xff' * 12, b'\x0b', b'\x2a\x7f', b'\x08', b'\x0a\x7fabc', b'\x09123', b'\x02\x01x'):
        with pytest.raises(StateFileError):
            skim(io.BytesIO(damaged), Place(0, len(damaged)), fields, [])
    for large in (header(5, 0) * 50_001, header(5, (4 << 20) + 5) + header(1, 4 << 20) + bytes(4 << 20)):
        with pytest.raises(StateFileError, match='too many parts'):
            skim(io.BytesIO(large), Place(0, len(large)), fields, [])


# --verify

@pytest.mark.parametrize('target', ENDINGS)
@pytest.mark.parametrize('name, dtype', [('novograd', 'float32'), ('adam', 'float16'), ('ftml', 'float32'), ('asgd', 'float32'),
                                         ('sgd', 'float32'), ('lamb', 'float16')])
def test_verified(run, tmp_path, name, dtype, target):
    need(target, running=True)
    states, weights = half_trained(name, 'usual', dtype)
    checkpoint(tmp_path / 'run.safetensors', states, weights)
    code, out, err = run('convert', 'run.safetensors', '--to', target, '--verify', 20, '--report', 'r.json')
    assert (code, err) == (0, '') and 'verified: 20 steps in ' in out and 'from the weights of the run' in out
    outcome = json.loads((tmp_path / 'r.json').read_text())['verified']
    assert outcome['steps'] == 20 and (outcome['difference'] <= 1e-6 or outcome['rounding']) and outcome['limit'] == 1e-6
    assert sorted(os.listdir(tmp_path)) == ['r.json', 'run' + ENDINGS[target], 'run.safetensors']


def test_verified_from_random_weights_and_in_double(run, tmp_path):
    need('torch', running=True)
    states, _ = half_trained('adamw', 'other', 'float64')
    container.write(tmp_path / 'run', states)
    code, out, _ = run('convert', 'run', '--to', 'torch', '-o', 'x.pt', '--verify', 7, '--json')
    outcome = json.loads(out)['verified']
    assert code == 0 and outcome['weights'] == 'from random weights' and outcome['limit'] == 1e-12
    assert outcome['difference'] <= 1e-12


@pytest.mark.parametrize('to, options', [('mxnet', ['-o', 'x']), ('mxnet', ['--mxnet-version', '1']),
                                         ('mxnet', ['--mxnet-version', '2'])])
def test_files_for_mxnet_are_read_again(run, adamw, to, options, monkeypatch):
    assert run('convert', 'run.safetensors', '--to', 'optax')[0] == 0
    code, out, err = run('convert', 'run.npz', '--to', to, *options, '--verify', 1)
    assert (code, err) == (0, '') and 'verified: read again and equal bit for bit' in out
    changed = writer.write_states, container.write

    def other(write):
        def wrong(path, states, *rest):
            states = half_trained('adamw', 'usual', updates=9)[0]
            write(path, states, *rest)
        return wrong
    monkeypatch.setattr(writer, 'write_states', other(changed[0]))
    monkeypatch.setattr(container, 'write', other(changed[1]))
    output = options[1] if options[0] == '-o' else f'run.mxnet{options[1]}.states'
    for path in (output, 'run.npz.x'):
        if os.path.exists(path):
            os.unlink(path)
    refused(run('convert', 'run.npz', '--to', to, *options, '--verify', 1), 1, 'does not hold the same states')
    assert sorted(os.listdir('.')) == ['run.npz', 'run.safetensors']


@pytest.mark.parametrize('change', ['epsilon', 'slots', 'count', 'decay'])
@pytest.mark.parametrize('target', ENDINGS)
def test_a_file_that_goes_on_differently_is_not_kept(run, adamw, tmp_path, target, change, monkeypatch):
    """What is written is not what is in the states: the replay must tell, for every way in which it may be wrong."""
    need(target, running=True)
    write = PROGRAMS[target].write

    def wrong(job, path):
        states = container.read(tmp_path / 'run.safetensors')
        if change == 'epsilon':
            states.hypers['epsilon'] *= 1.01
        if change == 'decay':
            states.hypers['wd'] *= 1.001
        if change == 'count':
            states.counts = {name: count + 1 for name, count in states.counts.items()}
        if change == 'slots':
            states.slots['bias']['var'] *= 1.001
        write(job._replace(states=states), path)

    monkeypatch.setitem(PROGRAMS, target, PROGRAMS[target]._replace(write=wrong))
    refused(run('convert', 'run.safetensors', '--to', target, '--verify', '20'), 1, 'of the sum of its updates', 'was not kept')
    assert os.listdir(tmp_path) == ['run.safetensors']


def without(package, *arguments):
    """Run a command in a process that cannot import ``package``."""
    code = f'import sys; sys.modules[{package!r}] = None\nfrom gluon_optim import cli\nsys.exit(cli.main(sys.argv[1:]))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *arguments], env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('target, package', [('torch', 'torch'), ('onnx', 'onnxruntime'), ('optax', 'jax')])
def test_what_runs_the_file_must_be_there(run, adamw, tmp_path, target, package):
    need(target)
    done = without(package, 'convert', 'run.safetensors', '--to', target, '--verify', '3')
    refused(done, 1, f"pip install '.[{target}]'")
    assert os.listdir(tmp_path) == ['run.safetensors']


def test_a_number_of_steps(capsys):
    for steps in ('0', '-1', 'many', '10001'):
        with pytest.raises(SystemExit):
            cli.main(['convert', 'x', '--to', 'onnx', '--verify', steps])
        assert 'must be a number of steps' in capsys.readouterr().err


def test_replays_of_nothing():
    """A rate of 0 moves nothing; not-a-number on both sides is no difference."""
    states, weights = half_trained('ftml', 'usual')
    states.parameters[0].lr_mult = 0.0
    one = verify._Own(verify.Replay(states, states.parameters, weights, 'mirror', [0.1]), states.parameters[0], 'float32')
    with np.errstate(all='ignore'):
        one.step(0.1, np.ones((4, 3), 'f4'))
    assert np.isnan(one.weight).all() and one.compared(one, one.weight, 'x', 1, '').equal
    assert not one.compared(one, np.zeros((4, 3)), 'x', 1, '').equal


# PyTorch's files

def test_a_state_of_torch_itself(run, adamw, tmp_path):
    torch = pytest.importorskip('torch')
    states, weights = adamw
    assert run('convert', 'run.safetensors', '--to', 'torch', '--target', 'torch', '--verify', '20')[0] == 0
    refused(run('convert', 'run.pt', '--to', 'mxnet', '-o', 'back'), 1, '--optimizer ')
    refused(run('convert', 'run.pt', '--to', 'mxnet', '-o', 'back', '--optimizer', 'novograd'), 1, 'novograd')
    write_params(tmp_path / 'run.params', weights)
    arguments = ['--optimizer', 'adamw', '--params', 'run.params']
    assert run('convert', 'run.pt', '--to', 'mxnet', '-o', 'back', *arguments)[0] == 0
    back = container.read(tmp_path / 'back')
    assert back.names == states.names
    for name, own in states.slots.items():
        assert all(back.slots[name][slot].tobytes() == array.tobytes() for slot, array in own.items())
    # inside a checkpoint of the user's own making
    state_dict = torch.load(tmp_path / 'run.pt', weights_only=True)
    torch.save({'model': {'w': torch.zeros(2)}, 'optimizer': state_dict, 'epoch': 3}, tmp_path / 'all.pt')
    assert run('convert', 'all.pt', '--to', 'mxnet', '-o', 'again', *arguments)[0] == 0
    assert (tmp_path / 'again').read_bytes() == (tmp_path / 'back').read_bytes()
    torch.save({'model': {'w': torch.zeros(2)}}, tmp_path / 'none.pt')
    refused(run('convert', 'none.pt', '--to', 'mxnet', '-o', 'x'), 2, 'none.pt', 'of one optimizer')


def test_a_class_that_writes_to_its_gradients_is_replayed(run, tmp_path):
    pytest.importorskip('torch')
    pytest.importorskip('torch_optimizer')
    states, _ = half_trained('novograd', 'usual')
    container.write(tmp_path / 'run', states)
    code, out, err = run('convert', 'run', '--to', 'torch', '--target', 'torch_optimizer', '-o', 'x.pt', '--verify', '20',
                         '--params', 'weight,one')
    assert (code, err) == (0, '') and 'verified: 20 steps in PyTorch' in out


def test_a_file_that_would_run_code(run, tmp_path):
    torch = pytest.importorskip('torch')

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)
    torch.save({'state': {}, 'param_groups': [Evil()]}, tmp_path / 'evil.pt')
    refused(run('convert', 'evil.pt', '--to', 'mxnet', '-o', 'x'), 2, 'evil.pt')
    assert os.listdir(tmp_path) == ['evil.pt']


# Refusals: exit code 1, who and what to do; no output

def other_shape(states, weights, tmp_path):
    write_params(tmp_path / 'p.params', {name: np.ascontiguousarray(array.T) for name, array in weights.items()})


def one_missing(states, weights, tmp_path):
    write_params(tmp_path / 'p.params', {name: array for name, array in weights.items() if name != 'bias'})


def with_variables(states, weights, tmp_path):
    states.variables['m_schedule'] = np.ones(1)


def of_sgld(states, weights, tmp_path):
    states.optimizer, states.slots = 'sgld', {name: {} for name in states.names}
    states.hypers = {name: states.hypers[name] for name in ('learning_rate', 'wd', 'rescale_grad', 'clip_gradient')}


def another_optimizer(states, weights, tmp_path):
    states.optimizer, states.hypers = 'novograd', rules.get('novograd').hyperparameters().asdict()


def incomplete(states, weights, tmp_path):
    del states.slots['bias']['var']


def transposed(states, weights, tmp_path):
    states.slots['weight']['mean'] = states.slots['weight']['mean'].T


def nothing(states, weights, tmp_path):
    pass


ALL = ('torch', 'onnx', 'optax')


@pytest.mark.parametrize('change, options, targets, words', [
    (nothing, ['--params', 'weight,bios'], ALL, ["Unknown parameter 'bios'", "Did you mean 'bias'"]),
    (nothing, ['--params', 'weight,weight'], ALL, ["Received twice: 'weight'"]),
    (other_shape, ['--params', 'p.params'], ('onnx',), ["'weight' must be float32 of shape (4, 3)", '(3, 4)']),
    (other_shape, ['--params', 'p.params', '--verify', '2'], ('torch', 'optax'), ["'weight'", 'shape (4, 3)', '(3, 4)']),
    (one_missing, ['--params', 'p.params'], ('onnx',), ["none for 'bias'", 'Add it']),
    (with_variables, [], ALL, ["'m_schedule'", 'would lose', '--allow-lossy']),
    (of_sgld, [], ALL, ["'sgld' has no mirror"]),
    (another_optimizer, [], ALL, ["'weight'", "'mean', 'norm_sq'", 'belong to other hyper-parameters?']),
    (incomplete, [], ALL, ["'bias' must hold", 'Does the state belong to another optimizer']),
    (transposed, [], ALL, ["of 'weight' must have shape (4, 3)", '(3, 4)']),
    (nothing, ['--target', 'preview'], ('onnx',), ["'adamw' is not one of the optimizers", "--target 'mirror'"]),
    (nothing, ['-o', 'no/folder/x'], (*ALL, 'mxnet'), ['No such file or directory', 'no/folder/x']),
    (nothing, ['--params', 'weight,bias', '--mxnet-version', '1'], ('mxnet',), ["'number'"]),
])
def test_what_does_not_fit_is_refused(run, tmp_path, change, options, targets, words):
    states, weights = half_trained('adamw', 'usual')
    change(states, weights, tmp_path)
    checkpoint(tmp_path / 'run.safetensors', states, weights)
    before = sorted(os.listdir(tmp_path))
    for target in targets:
        try:
            need(target, '--verify' in options) if target in PACKAGES else None
        except pytest.skip.Exception:
            continue
        refused(run('convert', 'run.safetensors', '--to', target, *options), 1, *words)
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize('names, words', [('w', ['Received: 1 parameters', 'index 1']), ('b,w', ['index 0', "'b'"])])
def test_names_that_do_not_fit_an_old_file(run, tmp_path, names, words):
    (tmp_path / 'shapes').write_text('x')
    write_params(tmp_path / 'p.params', {'w': np.zeros((7, 5), 'f4'), 'b': np.zeros(9, 'f4')})
    refused(run('convert', OLD / 'adam.states', '--to', 'optax', '--params', 'p.params', '-o', 'x'), 1, 'do not fit', 'index 0')
    if names == 'w':
        names = write_names(tmp_path, names)
        refused(run('convert', OLD / 'adam.states', '--to', 'optax', '--params', names, '-o', 'x'), 1, *words)
    assert not (tmp_path / 'x').exists()


def write_names(tmp_path, names):
    (tmp_path / 'names.json').write_text(json.dumps(names.split(',')))
    return 'names.json'


@pytest.mark.parametrize('target', ['torch', 'onnx'])
def test_the_package_of_a_target_must_be_there(run, adamw, tmp_path, target):
    need(target)
    assert run('convert', 'run.safetensors', '--to', target)[0] == 0
    for arguments in (['run.safetensors', '--to', target, '-o', 'x'], ['run' + ENDINGS[target], '--to', 'mxnet', '-o', 'x']):
        refused(without(target, 'convert', *arguments), 1, f"pip install '.[{target}]'")
    assert not (tmp_path / 'x').exists()


# Progress and memory

def test_progress_of_writing_is_shown(adamw, tmp_path, monkeypatch):
    pytest.importorskip('tqdm')
    monkeypatch.setattr(cli_options, 'DELAY', 0)
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', stream)
    assert cli.main(['convert', str(tmp_path / 'run.safetensors'), '--to', 'optax', '-o', str(tmp_path / 'x.npz')]) == 0
    assert 'reading run.safetensors' in stream.getvalue() and 'writing x.npz' in stream.getvalue()


MEASURE = """
import importlib, os, sys
from gluon_optim import cli
from gluon_optim.mapping import optax_file
if sys.argv[1]:
    importlib.import_module(sys.argv[1])

def status(key):
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

before = status('VmRSS')
try:
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # forget the peak
except OSError:
    sys.exit(77)
code = cli.main(['convert', *sys.argv[2:]])
print(code, status('VmHWM') - before)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='needs Linux')
@pytest.mark.parametrize('target', [*ENDINGS, 'mxnet'])
def test_memory_stays_below_1_3_times_the_file(tmp_path, target):
    if target in PACKAGES:
        need(target)
    infos = [ParameterInfo(f'{k}', f'{k}', (1024, 1024), 'float32') for k in range(12)]
    slots = {info.name: {slot: np.full(info.shape, 0.5, 'f4') for slot in ('mean', 'var')} for info in infos}
    states = OptimizerStates('adamw', rules.get('adamw').hyperparameters().asdict(), 3, infos, dict.fromkeys(slots, 3), slots)
    container.write(tmp_path / 'run', states)
    size = os.path.getsize(tmp_path / 'run')  # 96 MiB
    del slots, states
    there = 'x' + ENDINGS.get(target, '.states')
    module = f'gluon_optim.{target}' if target in ('torch', 'onnx') else ''
    version = ['--mxnet-version', '1'] if target == 'mxnet' else []
    for arguments in (['run', '--to', target, '-o', there, *version], [there, '--to', 'mxnet', '-o', 'back']):
        done = subprocess.run([sys.executable, '-c', MEASURE, module, *arguments], cwd=str(tmp_path), stdout=subprocess.PIPE,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True)
        if done.returncode == 77:
            pytest.skip('this system does not tell')
        code, peak = map(int, done.stdout.splitlines()[-1].split())
        assert code == 0 and peak <= 1.3 * size, peak / size
    if target != 'mxnet':  # which names them by number only, as here
        assert (tmp_path / 'back').stat().st_size > 0


def test_arrays_are_given_their_names_without_their_values():
    array = Params(arrays={'a': np.zeros((3, 4), 'f2')}).naming()['a']
    assert array.shape == (3, 4) and array.dtype == np.float16 and array.strides == (0, 0)


def test_readers_know_kinds(tmp_path):
    (tmp_path / 'x.onnx').write_bytes(b'\x08\x08')
    (tmp_path / 'x').write_bytes(b'\x08\x08')
    assert kind_of(tmp_path / 'x.onnx') is Kind.ONNX and kind_of(OLD / 'adam.states') is Kind.MXNET_STATES
    assert kind_of(OLD / 'dict.params') is Kind.PARAMS and kind_of(tmp_path / 'x') is Kind.UNKNOWN
    assert isinstance(read(OLD / 'adam.states', ['w', 'b']), inspection.Contents)
    options = argparse.Namespace(optimizer=None, source=None, allow=[], part=None)
    with open_once(OLD / 'adam.states') as file:
        assert cli_options.read_contents(file, options, read_params('w,b')).states.names == ['w', 'b']
    assert len(NAMES) > 20 and conversion_runs.STEPS == 20
