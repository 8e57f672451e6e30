"""`go.module_checkpoint` and `go.load_module_checkpoint`: a Module that is killed and resumed is the one that never stopped."""
import json
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip('mxnet')

import gluon_optim as go  # noqa: E402
from gluon_optim import cli  # noqa: E402
from gluon_optim.states import container  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import module_runs as runs  # noqa: E402
from contract_nets import ROOT, environment  # noqa: E402
from test_failing_loads import COPIES, FailAt, OutOfMemory, generators  # noqa: E402

CASES = {
    'adamw': dict(optimizer='adamw'),
    'adamw, two contexts': dict(optimizer='adamw', contexts=2),
    'adamw, two contexts, device': dict(optimizer='adamw', contexts=2, kvstore='device'),
    'adamw, each context on its own': dict(optimizer='adamw', contexts=2, kvstore=None),
    'adamw, float16': dict(optimizer='adamw', contexts=2, dtype='float16'),
    'adamw, three contexts': dict(optimizer='adamw', contexts=3),
    'novograd': dict(optimizer='novograd', kvstore=None),
    'novograd, two contexts': dict(optimizer='novograd', contexts=2),
    'sgd, drop-in': dict(optimizer='sgd', arguments={'momentum': 0.9}, accelerate=True, contexts=2),
    'nadam, drop-in': dict(optimizer='nadam', accelerate=True, schedule=False),
    "MXNet's adam": dict(optimizer='adam', kvstore=None),
    "MXNet's adam, two contexts": dict(optimizer='adam', contexts=2),
    "MXNet's adam, each context on its own": dict(optimizer='adam', contexts=2, kvstore=None),
    "MXNet's sgd, float16": dict(optimizer='sgd', arguments={'momentum': 0.9}, dtype='float16', contexts=2, kvstore='device'),
    "MXNet's sgld": dict(optimizer='sgld', arguments={'learning_rate': 1e-3}),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What `Module.fit` logs of a Module that is bound, and warns of one that has parameters."""
    monkeypatch.setattr(logging.getLogger(), 'disabled', True)


# In processes of their own

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    command = [sys.executable, str(Path(runs.__file__)), str(tmp_path_factory.mktemp('runs')), json.dumps([*CASES.values()])]
    out = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert out.returncode == 0, out.stderr
    return dict(zip(CASES, json.loads(out.stdout)))


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL') or not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
@pytest.mark.parametrize('case', CASES)
def test_a_run_that_was_killed_in_the_third_epoch_ends_as_the_straight_one(found, case):
    run = found[case]
    assert run['killed'] and run['begin'] == 2
    assert run['straight']['num_update'] == runs.EPOCHS * runs.BATCHES
    assert run['resumed'] == run['straight']


def test_the_facts_notice_what_a_checkpoint_brings_back(tmp_path):
    """Without the load, with the weights alone, or with MXNet's own files the same comparison fails."""
    straight = runs.facts(runs.fit(runs.make(), tmp_path / 'straight'))
    runs.fit(runs.make(), tmp_path / 'x', epochs=2)
    fresh = runs.fit(runs.make(seed=5), tmp_path / 'fresh', begin=2)
    weights = runs.make(seed=5)
    _, *parameters = mx.model.load_checkpoint(str(tmp_path / 'x'), 2)
    weights.set_params(*parameters)
    for module in (fresh, runs.fit(weights, tmp_path / 'weights', begin=2)):
        different = {name.split()[0] for name, value in straight.items() if runs.facts(module)[name] != value}
        assert {'fc1_weight', 'state', 'count', 'num_update', 'rate', 'noise'} <= different


# Here

def trained(tmp_path, epochs=2, name='x', **case):
    """A Module after some epochs, and its checkpoints."""
    return runs.fit(runs.make(**case), tmp_path / name, epochs), str(tmp_path / name)


def test_the_files_are_mxnets_own_and_ours(tmp_path):
    module, prefix = trained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        'x-0001.params', 'x-0001.safetensors', 'x-0002.params', 'x-0002.safetensors', 'x-symbol.json']
    symbol, arguments, auxiliary = mx.model.load_checkpoint(prefix, 2)
    assert symbol.tojson() == module.symbol.tojson()
    loaded = mx.mod.Module.load(prefix, 2, label_names=['label'])
    loaded.bind(runs.data().provide_data, runs.data().provide_label, for_training=False)
    for given, own in zip(module.get_params(), (arguments, auxiliary)):
        assert sorted(given) == sorted(own)
        for name, value in given.items():
            assert value.dtype == own[name].dtype and (value.asnumpy() == own[name].asnumpy()).all()
    np.testing.assert_array_equal(*(each.predict(runs.data()).asnumpy() for each in (module, loaded)))
    mx.callback.do_checkpoint(str(tmp_path / 'mxnet'))(1, module.symbol, *module.get_params())
    assert (tmp_path / 'mxnet-0002.params').read_bytes() == (tmp_path / 'x-0002.params').read_bytes()
    states, run = go.read_checkpoint(f'{prefix}-0002.safetensors')
    assert run.epoch == 2 and {weight.name: weight.grad_req for weight in run.weights}['norm_moving_mean'] == 'null'
    assert states.counts['fc1_weight'] == 6 and {info.name: info.wd_mult for info in states.parameters}['fc1_bias'] == 0
    assert states.facts['epsilon'] == {'norm_gamma': 0.001} and states.facts['fix_gamma'] == []


@pytest.mark.parametrize('period', [1, 2, 3])
def test_the_period_is_that_of_mxnet(tmp_path, period):
    module, theirs = runs.make(), mx.callback.do_checkpoint(str(tmp_path / 'b'), period)
    mine = go.module_checkpoint(module, tmp_path / 'new' / 'a', period)
    for epoch in range(5):
        mine(epoch)
        theirs(epoch, module.symbol, *module.get_params())
    saved = {path.stem[2:] for path in (tmp_path / 'new').glob('*.safetensors')}
    assert saved == {path.stem[2:] for path in tmp_path.glob('b-*.params')} and len(saved) == 5 // period


def test_a_new_run_begins_at_0_and_a_certain_epoch_can_be_chosen(tmp_path):
    module = runs.make()
    before = runs.facts(module, draw=False)
    assert go.load_module_checkpoint(module, tmp_path / 'none' / 'x') == 0 and runs.facts(module, draw=False) == before
    _, prefix = trained(tmp_path, 3)
    (tmp_path / 'x-y-0009.safetensors').write_text('of another prefix')
    (tmp_path / 'x-0009.safetensors').mkdir()
    assert [go.load_module_checkpoint(runs.make(seed=2), prefix, epoch) for epoch in (None, 1, 2)] == [3, 1, 2]
    with pytest.raises(ValueError, match=r'`epoch` must have a checkpoint .*Received: epoch=4. Available: 1, 2, 3'):
        go.load_module_checkpoint(module, prefix, 4)
    with pytest.raises(ValueError, match='epoch'):
        go.load_module_checkpoint(module, prefix, 0)
    with pytest.warns(UserWarning, match='has checkpoints of later epochs, 2, 3: load_module_checkpoint will load 3, not epoch 1'):
        go.module_checkpoint(module, prefix)(0)


def test_a_damaged_one_is_skipped(tmp_path, caplog):
    _, prefix = trained(tmp_path, 3)
    path = Path(f'{prefix}-0003.safetensors')
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with caplog.at_level('WARNING', 'gluon_optim'):
        assert go.load_module_checkpoint(runs.make(seed=2), prefix) == 2
    assert 'skipping a damaged checkpoint' in caplog.text
    with pytest.raises(container.StateFileError, match='CRC-32'):
        go.load_module_checkpoint(runs.make(seed=2), prefix, 3)


def test_what_a_killed_writer_left_is_removed_and_another_prefixs_stays(tmp_path):
    trained(tmp_path, 1)
    left, other = (tmp_path / f'.{name}.0123456789abcdef.tmp' for name in ('x-0002.params', 'y-0002.params'))
    left.touch()
    other.touch()
    trained(tmp_path, 1)
    assert not left.exists() and other.exists()


# Other shapes of the same

def test_a_bucketing_module(tmp_path):
    """Buckets of two lengths, which share their parameters; one has only been seen by one of the two runs."""
    def make(seed=1):
        def bucket(length):
            net = mx.sym.sum(mx.sym.Embedding(mx.sym.var('data'), input_dim=7, output_dim=4, name='embed'), axis=1)
            net = mx.sym.FullyConnected(net, num_hidden=3, name='fc')
            return mx.sym.SoftmaxOutput(net, name='softmax'), ['data'], ['softmax_label']

        mx.random.seed(seed)
        module = mx.mod.BucketingModule(bucket, 8, context=[mx.cpu(0), mx.cpu(1)])
        module.bind([('data', (4, 8))], [('softmax_label', (4,))])
        module.init_params(mx.init.Uniform(0.5))
        module.init_optimizer(optimizer='adamw')
        return module

    def train(module, steps):
        for step in steps:
            length, random = (8, 5)[step % 2], np.random.RandomState(step)
            texts, labels = mx.nd.array(random.randint(0, 7, (4, length))), mx.nd.array(random.randint(0, 3, 4))
            batch = mx.io.DataBatch([texts], [labels], bucket_key=length, provide_data=[('data', (4, length))],
                                    provide_label=[('softmax_label', (4,))])
            module.forward(batch)
            module.backward()
            module.update()
        return {name: value.asnumpy() for name, value in module.get_params()[0].items()}

    first = make()
    train(first, range(4))
    go.module_checkpoint(first, tmp_path / 'x')(0)
    straight = train(first, range(4, 8))
    second = make(seed=2)
    assert go.load_module_checkpoint(second, tmp_path / 'x') == 1
    for name, value in train(second, range(4, 8)).items():
        np.testing.assert_array_equal(value, straight[name])
    assert mx.model.load_checkpoint(str(tmp_path / 'x'), 1)[0].list_arguments()[-1] == 'softmax_label'


def test_frozen_parameters_stay_so_and_have_no_state(tmp_path):
    module, prefix = trained(tmp_path, fixed=['fc1_weight'])
    states, run = go.read_checkpoint(f'{prefix}-0002.safetensors')
    assert 'fc1_weight' not in states.slots and 'fc1_bias' in states.slots
    assert {info.name for info in states.parameters if info.grad_req == 'null'} == {
        'fc1_weight', 'norm_moving_mean', 'norm_moving_var'} == {weight.name for weight in run.weights if weight.grad_req == 'null'}
    other = runs.make(seed=2, fixed=['fc1_weight'])
    assert go.load_module_checkpoint(other, prefix) == 2
    assert runs.facts(other, draw=False) == runs.facts(module, draw=False)


@mx.optimizer.register
class OfSomebody(mx.optimizer.Optimizer):
    """Without a rule: states nested in its own way, and something that it keeps for all parameters."""

    def __init__(self, learning_rate=0.1, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.total = mx.nd.zeros(1)

    def create_state(self, index, weight):
        return [mx.nd.zeros_like(weight), (mx.nd.ones(1), None)]

    def update(self, index, weight, grad, state):
        self._update_count(index)
        state[0][:] = 0.9 * state[0] + grad
        self.total += state[0].sum().as_in_context(self.total.context)
        weight -= self._get_lr(index) * state[0] * mx.nd.tanh(self.total).as_in_context(weight.context)


@pytest.mark.parametrize('contexts, kvstore', [(1, 'local'), (2, 'local'), (2, None)])
@pytest.mark.parametrize('optimizer, arguments', [
    ('ofsomebody', {}), ('lbsgd', {'batch_scale': 2, 'momentum': 0.9}), ('lars', {'momentum': 0.9}), ('dcasgd', {})])
def test_other_optimizers(tmp_path, optimizer, arguments, contexts, kvstore):
    case = dict(optimizer=optimizer, arguments=arguments, contexts=contexts, kvstore=kvstore)
    if (optimizer, contexts, kvstore) == ('lbsgd', 2, None):
        with pytest.raises(ValueError, match='lbsgd on several contexts with kvstore=None'):
            trained(tmp_path, 1, **case)
        return
    straight = runs.facts(trained(tmp_path, 4, 'straight', **case)[0])
    _, prefix = trained(tmp_path, 2, **case)
    module = runs.make(**dict(case, seed=2))
    assert go.load_module_checkpoint(module, prefix) == 2
    assert runs.facts(runs.fit(module, prefix, begin=2)) == straight


@pytest.mark.parametrize('optimizer', ['adamw', 'adam'])
def test_a_kvstore_that_only_adds_gradients_up(tmp_path, monkeypatch, optimizer):
    monkeypatch.setenv('MXNET_UPDATE_ON_KVSTORE', '0')
    straight = trained(tmp_path, 4, 'straight', optimizer=optimizer, contexts=2)[0]
    assert straight._kvstore and not straight._update_on_kvstore and sorted(straight._updater.states) == list(range(12))
    straight = runs.facts(straight)
    _, prefix = trained(tmp_path, 2, optimizer=optimizer, contexts=2)
    assert sorted(go.read_states(f'{prefix}-0002.safetensors').slots) == sorted(
        ['fc1_weight', 'fc1_bias', 'fc2_weight', 'fc2_bias', 'norm_gamma', 'norm_beta'])
    module = runs.make(seed=2, optimizer=optimizer, contexts=2)
    assert go.load_module_checkpoint(module, prefix) == 2
    assert runs.facts(runs.fit(module, prefix, begin=2)) == straight


@pytest.mark.parametrize('here, there', [(1, 2), (2, 1)])
def test_on_another_number_of_devices(tmp_path, here, there):
    """With a kvstore, or one device: the same weights, states and counts."""
    module, prefix = trained(tmp_path, contexts=there)
    other = runs.make(contexts=here, seed=2)
    assert go.load_module_checkpoint(other, prefix) == 2
    for name, value in module.get_params()[0].items():
        assert (other.get_params()[0][name].asnumpy() == value.asnumpy()).all()
    assert runs.updater_of(other).optimizer.num_update == 6
    again, name = runs.fit(other, tmp_path / 'again', 3, 2), str(tmp_path / 'again')
    assert go.read_states(f'{name}-0003.safetensors').counts['fc1_weight'] == 9 and again is other


# Refused

def test_a_module_that_is_not_ready(tmp_path):
    _, prefix = trained(tmp_path, 1)
    module = mx.mod.Module(runs.symbol(), label_names=['label'])
    for call, words in ((lambda: module.bind(runs.data().provide_data, runs.data().provide_label), 'bound. Call module.bind'),
                        (lambda: module.init_params(mx.init.One()), r'initialized. Call module.init_params'),
                        (module.init_optimizer, 'given an optimizer. Call module.init_optimizer')):
        for refused in (lambda: go.load_module_checkpoint(module, prefix), lambda: go.module_checkpoint(module, prefix)(0)):
            with pytest.raises(ValueError, match=rf'`module` must be bound, .*Received: one that was not {words}'):
                refused()
        call()
    for refused in (lambda: go.load_module_checkpoint(None, prefix), lambda: go.module_checkpoint('x', prefix)):
        with pytest.raises(TypeError, match=r'`module` must be an mx.mod.Module or a BucketingModule. Received: (NoneType|str)'):
            refused()
    for period in (0, -1):
        with pytest.raises(ValueError, match='period'):
            go.module_checkpoint(module, prefix, period)


def other_net():
    module = mx.mod.Module(mx.sym.LinearRegressionOutput(mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=3, name='fc1'),
                                                         mx.sym.var('label')), label_names=['label'])
    module.bind(runs.data().provide_data, runs.data().provide_label)
    module.init_params()
    module.init_optimizer(optimizer='adamw', optimizer_params={'lr_scheduler': mx.lr_scheduler.FactorScheduler(2)})
    return module


@pytest.mark.parametrize('make, words', [
    (lambda: runs.make('novograd'), "The states are of 'adamw', the module runs 'novograd'. Create the module"),
    (lambda: runs.make('adam'), "The states are of 'adamw', the module runs 'adam'"),
    (other_net, r'The checkpoint must have the same parameters. Received: .*norm_gamma is in the file only; .*; fc1_weight is '
                r'float32\[3, 5\], in the file float32\[6, 5\]'),
    (lambda: runs.make(dtype='float16'), r'fc1_weight is float16\[6, 5\], in the file float32'),
    (lambda: runs.make(contexts=2, kvstore=None), 'The module must have the contexts of the one that was saved, one or with a '
                                                  'kvstore, .*Received: 2 without a kvstore'),
])
def test_one_that_does_not_fit_stays_as_it_is(tmp_path, make, words):
    _, prefix = trained(tmp_path, 1)
    module = make()
    runs.fit(module, tmp_path / 'other', 1)
    before, seeds = runs.facts(module, draw=False), generators()
    with pytest.raises(ValueError, match=words):
        go.load_module_checkpoint(module, prefix)
    assert runs.facts(module, draw=False) == before and generators() == seeds


def test_those_of_contexts_on_their_own_need_as_many(tmp_path):
    _, prefix = trained(tmp_path, 1, contexts=2, kvstore=None)
    for case in (dict(contexts=3, kvstore=None), dict(contexts=2)):
        with pytest.raises(ValueError, match='the one that was saved, 2 without a kvstore, because'):
            go.load_module_checkpoint(runs.make(**case), prefix)
    go.save_checkpoint(tmp_path / 'gan-0001.safetensors', net={'g': mx.gluon.nn.Block(), 'd': mx.gluon.nn.Block()})
    with pytest.raises(ValueError, match="the one that was saved, 'g', 'd'"):
        go.load_module_checkpoint(runs.make(), tmp_path / 'gan')


def test_differences_are_said(tmp_path):
    _, prefix = trained(tmp_path, 1, arguments={'wd': 0.01})
    module = runs.make(seed=2, arguments={'wd': 0.02, 'rescale_grad': 0.125})
    with pytest.warns(UserWarning) as caught:
        go.load_module_checkpoint(module, prefix)
    said = sorted(str(each.message) for each in caught)
    assert said == ["rescale_grad is 0.125 in the module and 0.25 in the file, as for another batch size: the module's applies.",
                    "wd is 0.02 in the module and 0.01 in the file: the file's applies."]
    assert module._optimizer.wd == 0.01 and module._optimizer.rescale_grad == 0.125


@pytest.mark.parametrize('copying', COPIES, ids=lambda each: each[1])
@pytest.mark.parametrize('case', [dict(), dict(contexts=2), dict(contexts=2, kvstore=None), dict(contexts=2, dtype='float16')],
                         ids=['one context', 'kvstore', 'on their own', 'float16'])
def test_failing_at_the_kth_copy_for_every_k(tmp_path, monkeypatch, case, copying):
    saved, prefix = trained(tmp_path, 2, **case)
    module = runs.fit(runs.make(**dict(case, seed=2)), tmp_path / 'other', 1)
    before, (owner, name) = runs.facts(module, draw=False), copying
    original = getattr(owner, name)
    for k in range(1, 1000):
        seeds, failing = generators(), FailAt(original, k)
        monkeypatch.setattr(owner, name, failing)
        try:
            go.load_module_checkpoint(module, prefix)
            break
        except OutOfMemory:
            pass
        finally:
            monkeypatch.setattr(owner, name, original)
        assert generators() == seeds and runs.facts(module, draw=False) == before
    assert failing.calls < k and (k > 4 or name in ('broadcast', 'push'))
    assert runs.facts(module, draw=False) == runs.facts(saved, draw=False)


def test_hostile_files(tmp_path):
    """The reader is that of all checkpoints; the name of the file decides nothing but which is the newest."""
    module = runs.make()
    for number, data in enumerate([b'', b'x' * 100, b'\x80\x04N.', (tmp_path / 'none').name.encode() * 4000]):
        (tmp_path / f'x-{number + 1:04d}.safetensors').write_bytes(data)
    before = runs.facts(module, draw=False)
    with pytest.raises(container.StateFileError, match='Received: 4 damaged ones'):
        go.load_module_checkpoint(module, tmp_path / 'x')
    if hasattr(os, 'mkfifo'):
        os.mkfifo(tmp_path / 'x-0005.safetensors')
        assert go.load_module_checkpoint(module, tmp_path / 'y') == 0
        with pytest.raises(ValueError, match='epoch=5'):
            go.load_module_checkpoint(module, tmp_path / 'x', 5)
    assert runs.facts(module, draw=False) == before


# On the command line and elsewhere

def test_the_command_line_reads_them(tmp_path, capsys):
    _, prefix = trained(tmp_path, 2)
    path = f'{prefix}-0002.safetensors'
    for command in (['inspect', path], ['verify', path], ['diff', f'{prefix}-0001.safetensors', path]):
        assert cli.main(command) in (0, 1)
        assert capsys.readouterr().out


def test_it_continues_in_pytorch(tmp_path):
    torch = pytest.importorskip('torch')
    _, prefix = trained(tmp_path, 2)
    states = go.read_states(f'{prefix}-0002.safetensors')
    record = go.to_torch(states, 'torch')
    names = [name for name in states.names if name in states.slots]
    assert [record['state'][k]['step'] for k in range(len(names))] == [6] * len(names)
    shapes = {info.name: info.shape for info in states.parameters}
    parameters = {name: torch.nn.Parameter(torch.zeros(shapes[name])) for name in names}
    optimizer = torch.optim.AdamW(go.torch.param_groups(record, parameters.values()))
    optimizer.load_state_dict(record)
    np.testing.assert_array_equal(optimizer.state[parameters[names[0]]]['exp_avg'].numpy(), states.slots[names[0]]['mean'])
    assert cli.main(['convert', f'{prefix}-0002.safetensors', '--to', 'torch', '-o', str(tmp_path / 'x.pt')]) == 0
    assert (tmp_path / 'x.pt').exists()


def test_it_says_what_it_does(tmp_path, caplog):
    module, prefix = trained(tmp_path, 1)
    with caplog.at_level('INFO', 'gluon_optim'), warnings.catch_warnings():
        warnings.simplefilter('error')
        go.module_checkpoint(module, prefix)(1)
        go.load_module_checkpoint(module, prefix)
    assert [record.getMessage().split(' in ')[0].split(' from ')[0] for record in caplog.records] == [
        'saved epoch 2', 'restored 6 of 6 parameters at step 3', 'restored epoch 2']


def test_the_code_in_the_documentation_runs_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, = re.findall('```python\n(.*?)```', (ROOT / 'docs/CHECKPOINTS.md').read_text(encoding='utf-8'), re.DOTALL)
    for begin, epochs in ((0, 5), (5, 7)):
        names = {}
        with pytest.warns(UserWarning, match='Parameters already initialized'):
            exec(compile(code.replace('num_epoch=5', f'num_epoch={epochs}'), 'docs/CHECKPOINTS.md', 'exec'), names)  # noqa: S102
        assert names['begin'] == begin and names['module']._optimizer.num_update == 4 * epochs
    assert len(list(tmp_path.glob('model-000[1-7].params'))) == 7
