"""MXNet's own `.states`, written without MXNet: what was recorded from a real one comes back, and a real one goes on from it."""
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gluon_optim.states import container
from gluon_optim.states.errors import StateFileError
from gluon_optim.states.model import OptimizerStates, ParameterInfo
from gluon_optim.states.mxnet_files import reader as legacy
from gluon_optim.states.mxnet_files import writer as legacy_writer

LEGACY = Path(__file__).parent / 'legacy'
FOLDERS = {1: LEGACY / '1.9.1', 2: LEGACY / '2.0.0b1'}
FILES = [(version, path) for version, folder in FOLDERS.items() for path in sorted(folder.glob('*.states'))
         if path.stem not in ('adam-bare', 'net')]
ONLY_IN = {1: ('lbsgd',), 2: ('mxnet.adamw',)}


def assert_same(found, wanted):
    assert (found.optimizer, found.num_update, found.counts, found.scheduler) == (
        wanted.optimizer, wanted.num_update, wanted.counts, wanted.scheduler)
    for name in wanted.names:
        assert {key: (x.dtype, x.tolist()) for key, x in found.slots[name].items()} == {
            key: (x.dtype, x.tolist()) for key, x in wanted.slots[name].items()}
    assert {name: x.tolist() for name, x in found.master.items()} == {name: x.tolist() for name, x in wanted.master.items()}


@pytest.mark.parametrize('target', [1, 2])
@pytest.mark.parametrize('version, path', FILES, ids=[f'{version}-{path.stem}' for version, path in FILES])
def test_recorded_files_come_back(tmp_path, version, path, target):
    states = legacy.read_states(path)
    out = tmp_path / 'out.states'
    if states.optimizer in ONLY_IN[version] and target != version:
        with pytest.raises(ValueError, match=f'MXNet {target}.x must have the optimizer'):
            legacy_writer.write_states(out, states, target)
        assert not out.exists()
        return
    legacy_writer.write_states(out, states, target, allow_lossy=True)
    back = legacy.read_states(out, params=states.names)
    assert_same(back, states)
    if version == target:
        assert back.hypers == states.hypers and back.producer == states.producer
        assert {key: x.tolist() for key, x in back.variables.items()} == {key: x.tolist() for key, x in states.variables.items()}
        assert [(p.lr_mult, p.wd_mult) for p in back.parameters] == [(p.lr_mult, p.wd_mult) for p in states.parameters]
    allowed = {'mxnet.ndarray.ndarray NDArray', 'builtins bytearray'}
    for opcode, argument, _ in pickletools.genops(out.read_bytes()):
        if opcode.name == 'GLOBAL':
            assert argument in allowed or argument.startswith(
                ('mxnet.optimizer.', 'mxnet.lr_scheduler ', 'gluon_optim.mxnet.registry '))


def states_of(optimizer, hypers, mxnet='1.9.1', **fields):
    return OptimizerStates(optimizer, hypers, 5, [ParameterInfo('a', 'net0_a', (2,), 'float32')], {'a': 5},
                           {'a': {}}, producer={'mxnet': mxnet}, **fields)


@pytest.mark.parametrize('optimizer, hypers, target, lost', [
    ('lars', {'momentum_correction': True}, 2, ['momentum_correction=True']), ('lars', {'momentum_correction': False}, 2, []),
    ('adadelta', {}, 2, ['the meaning of the learning rate']), ('adadelta', {}, 1, []),
    ('nag', {'wd': 0.1}, 2, ['the meaning of wd=0.1']), ('nag', {'wd': 0.0}, 2, []),
    ('sgd', {'wd': 0.1, 'clip_gradient': 1.0}, 2, []), ('adam', {'wd': 0.1}, 2, []),
    ('adam', {'wd': 0.1, 'clip_gradient': 1.0}, 2, ['the meaning of wd=0.1']),
    ('novograd', {'variant': 'paper'}, 1, []), ('novograd', {'variant': 'paper'}, 2, []),
])
def test_what_is_lost(tmp_path, optimizer, hypers, target, lost):
    states = states_of(optimizer, hypers)
    found = legacy_writer.what_is_lost(states, target)
    assert len(found) == len(lost) and all(text.startswith(start) for text, start in zip(found, lost))
    if lost:
        with pytest.raises(ValueError, match=f'MXNet {target}.x would lose '):
            legacy_writer.write_states(tmp_path / 'x', states, target)
        assert os.listdir(tmp_path) == []
        legacy_writer.write_states(tmp_path / 'x', states, target, allow_lossy=True)
        assert 'lost: ' + found[0] in states.report


def test_a_users_scheduler_and_the_loss_scaler_are_lost():
    states = states_of('sgd', {}, scheduler={'class': 'mine.Half', 'attributes': {}}, loss_scaler={'loss_scale': 8.0})
    assert [line.split(':')[0] for line in legacy_writer.what_is_lost(states, 1)] == [
        'the scheduler mine.Half', 'the state of the AMP loss scaler']


def test_order_of_parameters(tmp_path):
    """Files know places only; trainers of 2.x sort the names of places in the net, and 10 comes before 2 there."""
    infos = [ParameterInfo(f'{i}.weight', f'dense{i}_weight', (i + 1,), 'float32') for i in (0, 2, 10)]
    states = OptimizerStates('sgd', {'momentum': 0.9}, 1, infos, {info.name: 1 for info in infos},
                             {info.name: {'momentum': np.ones(info.shape, 'f4')} for info in infos}, producer={'mxnet': '1.9.1'})

    def sizes(version, names=None):
        states.report.clear()
        legacy_writer.write_states(tmp_path / 'x', states, version, names)
        back = legacy.read_states(tmp_path / 'x')
        return [back.slots[name]['momentum'].size for name in sorted(back.slots, key=int)]

    assert sizes(1) == [1, 3, 11] and states.report == []
    assert sizes(2) == [1, 11, 3] and 'sorted by structural name' in states.report[0]
    assert sizes(1, ['10.weight', '0.weight', '2.weight']) == [11, 1, 3]
    with pytest.raises(ValueError, match="`names` must list all parameters, each once. Missing or repeated: '2.weight'"):
        sizes(1, ['10.weight', '0.weight'])


def test_indices_of_an_old_file_stay(tmp_path):
    """Parameters that are not trained have an index and no state."""
    states = states_of('sgd', {'momentum': 0.9})
    states.parameters = [ParameterInfo(name, name, (2,), 'float32') for name in ('1', '4')]
    states.counts, states.slots = {'1': 5, '4': 5}, {name: {'momentum': np.ones(2, 'f4')} for name in ('1', '4')}
    legacy_writer.write_states(tmp_path / 'x', states, 1)
    assert legacy.read_states(tmp_path / 'x').names == ['1', '4']


def test_unknown_optimizers_are_refused(tmp_path):
    bare = legacy.read_states(FOLDERS[1] / 'adam-bare.states')
    for states in (bare, states_of('mine', {})):
        with pytest.raises(ValueError, match='MXNet 1.x must have the optimizer'):
            legacy_writer.write_states(tmp_path / 'x', states, 1)
    with pytest.raises(ValueError, match='`version` must be 1 or 2'):
        legacy_writer.write_states(tmp_path / 'x', states_of('sgd', {}), 3)
    assert os.listdir(tmp_path) == []


# With a real MXNet

@pytest.fixture(scope='module')
def mx():
    return pytest.importorskip('mxnet')


def continued(mx, data, steps=3):
    """The weights after some more updates from the states in ``data``."""
    _, optimizer = pickle.loads(data)
    updater = mx.optimizer.get_updater(optimizer)
    updater.set_states(data)
    random = np.random.RandomState(3)
    mx.random.seed(1)
    weights = [mx.nd.array(random.randn(*shape), dtype='float16' if optimizer.multi_precision else 'float32')
               for shape in ((2, 3), (4,))]
    for _ in range(steps):
        gradients = [mx.nd.array(random.randn(*weight.shape), dtype=weight.dtype) for weight in weights]
        for i, weight in enumerate(weights):
            updater(i, gradients[i], weight)
    return [weight.asnumpy().tobytes() for weight in weights], optimizer.num_update


@pytest.mark.parametrize('path', [path for _, path in FILES], ids=[f'{version}-{path.stem}' for version, path in FILES])
def test_the_installed_mxnet_goes_on_as_from_its_own_file(mx, tmp_path, path):
    version = int(mx.__version__[0])
    if path.parent != FOLDERS[version]:
        pytest.skip('of another version of MXNet')
    states = legacy.read_states(path)
    legacy_writer.write_states(tmp_path / 'out', states, version)
    own = path.read_bytes()
    if states.optimizer == 'lars':  # it looks at the names that MXNet's Module gives, and Gluon does not
        arrays, optimizer = pickle.loads(own)
        optimizer.idx2name = {}
        own = pickle.dumps((arrays, optimizer))
    assert continued(mx, (tmp_path / 'out').read_bytes()) == continued(mx, own)


def test_ours_and_drop_ins_load_natively(mx, tmp_path):
    """A container, made into MXNet's own file, by Trainer.load_states in a new trainer."""
    if mx.__version__.startswith('2'):
        pytest.skip('nets of 1.x')
    sys.path.insert(0, str(Path(__file__).parent))
    import checkpoint_runs as runs

    import gluon_optim as go
    from gluon_optim import rules

    def go_on(net, trainer):
        mx.random.seed(5)
        np.random.seed(5)  # noqa: NPY002  training draws its data there
        random.seed(5)
        runs.train(net, trainer, 2)
        return runs.facts(net, trainer, noise=False)

    for name in rules.names(drop_ins=True, samplers=True):
        if name == 'lbsgd':
            continue  # keeps gradients on the optimizer
        momentum = {'momentum': 0.9} if name in ('sgd', 'nag', 'lars', 'signum', 'dcasgd') else {}
        for half in (False, True):
            arguments = {'wd': 0.0 if name == 'rprop' else 0.01, 'multi_precision': True, **momentum}
            config = {'optimizer': name, 'half': half, 'arguments': arguments,
                      'scheduler': ['FactorScheduler', {'step': 2, 'factor': 0.5, 'base_lr': 0.02}]}
            net, trainer = runs.make(config)
            runs.train(net, trainer, 3)
            go.save_states(trainer, str(tmp_path / 'ours'), net)
            net.save_parameters(str(tmp_path / 'params'))
            before = runs.facts(net, trainer, noise=False)
            legacy_writer.write_states(tmp_path / 'native', container.read(tmp_path / 'ours'), 1)
            other, other_trainer = runs.make(config)
            other.load_parameters(str(tmp_path / 'params'))
            other_trainer.load_states(str(tmp_path / 'native'))
            assert runs.facts(other, other_trainer, noise=False) == before, (name, half)
            assert go_on(other, other_trainer) == go_on(net, trainer), (name, half)


def test_go_load_states_takes_old_files(mx, tmp_path):
    """By index, in the trainer's order; frozen parameters and running statistics have none."""
    if mx.__version__.startswith('2'):
        pytest.skip('nets of 1.x')
    sys.path.insert(0, str(Path(__file__).parent))
    import resume as run

    import gluon_optim as go
    for config in ({'optimizer': 'adamw', 'half': True, 'arguments': {'multi_precision': True, 'begin_num_update': 10}},
                   {'optimizer': 'sgd_torch'},
                   {'scheduler': ['CosineScheduler', {'max_update': 2, 'base_lr': 0.1, 'final_lr': 0.02}]}):
        net, trainer = run.make(config)
        net[4].bias.grad_req = 'null'
        run.train(net, trainer, 0, 3)
        trainer.save_states(str(tmp_path / 'native'))
        net.save_parameters(str(tmp_path / 'params'))
        before = run.facts(net, trainer)
        for named in (True, False):
            other, other_trainer = run.make({**config, 'contexts': [2]})
            other[4].bias.grad_req = 'null'
            other.load_parameters(str(tmp_path / 'params'), ctx=mx.cpu(2))
            report = go.load_states(other_trainer, str(tmp_path / 'native'), other if named else None)
            assert run.facts(other, other_trainer) == before
            assert str(report).endswith(f'parameters at step {before["num_update"]}') and not report.missing
    with pytest.raises(ValueError, match='in the trainer only: 4.weight'):
        grown, grown_trainer = run.make({'optimizer': 'novograd', 'arguments': {}})
        frozen, frozen_trainer = run.make({'optimizer': 'novograd', 'arguments': {}})
        frozen[4].weight.grad_req = 'null'
        run.train(frozen, frozen_trainer, 0, 1)
        frozen_trainer.save_states(str(tmp_path / 'native'))
        go.load_states(grown_trainer, str(tmp_path / 'native'), grown)
    with pytest.raises(ValueError, match='saved without its optimizer'):
        go.load_states(grown_trainer, str(FOLDERS[1] / 'adam-bare.states'))
    with pytest.raises(ValueError, match="states are of 'adam'"):
        go.load_states(grown_trainer, str(FOLDERS[1] / 'adam.states'), strict=False)


def test_mxnet_2_goes_on_as_from_its_own_file(tmp_path):
    """With GLUON_OPTIM_MXNET2=/path/to/python of an environment that has MXNet 2.0."""
    python = os.environ.get('GLUON_OPTIM_MXNET2')
    if not python:
        pytest.skip('GLUON_OPTIM_MXNET2 names no Python with MXNet 2')
    jobs = []
    for version, path in FILES:
        if version == 2:
            states = legacy.read_states(path)
            legacy_writer.write_states(tmp_path / path.name, states, 2)
            jobs.append([str(path), str(tmp_path / path.name)])
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT_2)
    out = subprocess.run([python, str(script)], input=json.dumps(jobs), stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(out.stdout) == [True] * len(jobs)


SCRIPT_2 = '''
import json, pickle, sys
import mxnet as mx, numpy as np

def continued(path):
    states, optimizer = pickle.load(open(path, 'rb'))
    optimizer.idx2name = {}
    updater = mx.optimizer.get_updater(optimizer)
    updater.set_states(pickle.dumps((states, optimizer)))
    random = np.random.RandomState(3)
    mx.random.seed(1)
    dtype = 'float16' if optimizer.multi_precision else 'float32'
    weights = [mx.nd.array(random.randn(*shape), dtype=dtype) for shape in ((2, 3), (4,))]
    for _ in range(3):
        for i, weight in enumerate(weights):
            gradient = mx.nd.array(random.randn(*weight.shape), dtype=weight.dtype)
            if updater.aggregate_updates:
                updater([i], [gradient], [weight])
            else:
                updater(i, gradient, weight)
    return [weight.asnumpy().tolist() for weight in weights], optimizer.num_update

print(json.dumps([continued(a) == continued(b) for a, b in json.load(sys.stdin)]))
'''


def test_a_foreign_file_is_no_old_file(mx, tmp_path):
    (tmp_path / 'x').write_bytes(b'nothing of the kind')
    sys.path.insert(0, str(Path(__file__).parent))
    import resume as run

    import gluon_optim as go
    with pytest.raises(StateFileError, match='not a gluon_optim file'):
        go.load_states(run.make({})[1], str(tmp_path / 'x'))
