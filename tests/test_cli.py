"""The command gluon-optim on files: what it prints, what it writes, and its exit codes."""
import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import work
from commands import refused

from gluon_optim import cli
from gluon_optim.cli import options as cli_options
from gluon_optim.cli import text as cli_text
from gluon_optim.mapping.classes import FOREIGN
from gluon_optim.states import container
from gluon_optim.states.files import Kind, kind_of
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight, digest
from gluon_optim.states.mxnet_files import reader as legacy
from gluon_optim.states.progress import watched
from gluon_optim.transfer.read import read

ROOT = Path(__file__).resolve().parent.parent
OLD = ROOT / 'tests' / 'legacy' / '1.9.1'
HYPERS = {'learning_rate': 0.1, 'wd': 0.01, 'beta1': 0.9, 'beta2': 0.999, 'epsilon': 1e-8, 'amsgrad': False, 'rescale_grad': 0.125,
          'clip_gradient': None}


def example():
    """Two parameters of adamw, one in float16 with a master, and the run that they belong to."""
    random = np.random.RandomState(0)
    infos = [ParameterInfo('0.weight', 'dense0_weight', (3, 2), 'float16'), ParameterInfo('0.bias', 'dense0_bias', (3,), 'float32')]
    slots = {info.name: {slot: random.rand(*info.shape).astype('f4') for slot in ('mean', 'var')} for info in infos}
    master = random.randn(3, 2).astype('f4')
    states = OptimizerStates('adamw', dict(HYPERS), 7, infos, {'0.weight': 7, '0.bias': 6}, slots, {'0.weight': master},
                             producer={'gluon_optim': '0.1.0', 'mxnet': '1.9.1'})
    run = Run([Weight('0.weight', 'dense0_weight', [master.astype('f2')]), Weight('0.bias', 'dense0_bias', [np.zeros(3, 'f4')])],
              step=7, epoch=1, batch=2, metrics={'loss': 0.5}, extra={'note': 'ä'})
    return states, run


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'run.safetensors'
    container.write(path, *example())
    return path


# inspect

def test_inspect(run, saved):
    code, out, err = run('inspect', saved)
    assert code == 0 and err == ''
    lines = [line.split() for line in out.splitlines()]
    assert ': checkpoint, written by gluon_optim 0.1.0' in out and 'adamw at update 7' in out
    assert 'step 7, epoch 1, batch 2, loss 0.5' in out and '"ä"' in out
    rows = {(line[0], line[4]): line for line in lines if line[0].startswith('0.')}
    assert len(rows) == 7
    slots = example()[0].slots['0.weight']
    _, shape, dtype, updates, _, norm, zeros, nonfinite = rows['0.weight', 'mean']
    assert (shape, dtype, updates, zeros, nonfinite) == ('3x2', 'float32', '7', '0.0%', '0.0%')
    assert math.isclose(float(norm), np.linalg.norm(slots['mean'].astype('f8')), rel_tol=1e-5)
    assert rows['0.weight', 'weight'][2] == 'float16' and rows['0.bias', 'weight'][6] == '100.0%'


def test_inspect_counts_what_is_not_finite_and_prints_strict_json(run, tmp_path):
    states, _ = example()
    states.slots['0.bias']['mean'][:] = [np.nan, np.inf, 2]
    states.hypers['clip_gradient'] = None
    container.write(tmp_path / 's', states)
    code, out, _ = run('inspect', tmp_path / 's', '--json')
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    row = next(row for row in found['arrays'] if (row['parameter'], row['array']) == ('0.bias', 'mean'))
    assert code == 0 and row['norm'] == 2 and row['zeros'] == 0 and math.isclose(row['nonfinite'], 2 / 3)
    assert found['digest'] == digest(states) and found['optimizer'] == 'adamw' and found['hypers'] == states.hypers


def test_json_of_many_parameters_takes_no_more_memory_than_a_table(tmp_path):
    """It is printed piece by piece."""
    infos = [ParameterInfo(f'block{k}.weight', f'net0_dense{k}_weight', (2,), 'float32') for k in range(2000)]
    slots = {info.name: {'mean': np.ones(2, 'float32'), 'var': np.ones(2, 'float32')} for info in infos}
    path = str(tmp_path / 'many.states')
    container.write(path, OptimizerStates('adamw', {}, 3, infos, {info.name: 3 for info in infos}, slots))

    def inspect(*options):
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
            assert cli.main(['inspect', path, *options]) == 0

    inspect()   # imports
    assert work.memory_of(lambda: inspect('--json')) < 1.1 * work.memory_of(inspect)


def test_inspect_old_files(run):
    code, out, _ = run('inspect', OLD / 'adam.states', '--params', 'w,b')
    assert code == 0 and 'adam at update 3' in out and '\n  w ' in out and '\n  b ' in out
    code, out, _ = run('inspect', OLD / 'dict.params', '--json')
    found = json.loads(out)
    assert code == 0 and found['kind'] == 'parameters' and {row['dtype'] for row in found['arrays']} >= {'float16', 'int32'}


@pytest.mark.parametrize('params', ['list.json', 'lines.txt', 'w , b'])
def test_names_for_old_files(run, tmp_path, params):
    (tmp_path / 'list.json').write_text('["w", "b"]')
    (tmp_path / 'lines.txt').write_text('w\n\nb\n')
    assert '\n  w ' in run('inspect', OLD / 'adam.states', '--params', params)[1]


def test_picture(run, saved, tmp_path):
    pytest.importorskip('matplotlib')
    code, out, _ = run('inspect', saved, '--plot', 'picture.png')
    data = (tmp_path / 'picture.png').read_bytes()
    assert code == 0 and 'adamw' in out and data.startswith(b'\x89PNG') and len(data) > 10000
    # three panels of two parameters, and one of the masters
    code, _, _ = run('inspect', saved, '--plot', 'picture.svg')
    svg = (tmp_path / 'picture.svg').read_text()
    assert svg.count('<g id="axes_') == 4
    refused(run('inspect', saved, '--plot', 'picture.nothing'), 2, "'.png', '.svg', '.pdf'", 'nothing')
    refused(run('inspect', saved, '--plot', 'no/folder/picture.png'), 1, "No such file or directory: 'no/folder/picture.png'")
    assert sorted(os.listdir(tmp_path)) == ['picture.png', 'picture.svg', 'run.safetensors']


def test_parameters_without_state_and_multipliers(run, tmp_path):
    states, _ = example()
    states.parameters.append(ParameterInfo('1.running_mean', 'batchnorm0_running_mean', (3,), 'float32'))
    states.parameters[1].wd_mult = 0.0
    states.counts['1.running_mean'] = 0
    container.write(tmp_path / 's', states)
    _, out, _ = run('inspect', 's')
    lines = [line.split() for line in out.splitlines()]
    assert ['parameter', 'shape', 'dtype', 'updates', 'wd_mult', 'array', 'norm', 'zeros', 'non-finite'] in lines
    assert ['1.running_mean', '3', 'float32', '0', '1', '-'] in lines and 'lr_mult' not in out
    assert [line[4] for line in lines if line[0] == '0.bias'] == ['0', '0']
    found = json.loads(run('inspect', 's', '--json')[1])
    assert [(p['name'], p['lr_mult'], p['wd_mult'], p['updates']) for p in found['parameters']] == [
        ('0.weight', 1, 1, 7), ('0.bias', 1, 0, 6), ('1.running_mean', 1, 1, 0)]
    assert {row['parameter'] for row in found['arrays']} == {'0.weight', '0.bias'}


def test_optimizers_without_state_have_rows_too(run):
    _, out, _ = run('inspect', OLD / 'sgld.states')
    assert [line.split() for line in out.splitlines()[-2:]] == [
        ['a_weight', 'float32', '3', '1', '-'], ['b_bias', 'float32', '3', '0', '-']]


# diff

def test_equal_files(run, saved, tmp_path):
    states, other = example()
    states.producer = {'gluon_optim': '9'}  # who wrote it makes no difference
    container.write(tmp_path / 'b', states, other)
    assert run('diff', saved, tmp_path / 'b') == (0, 'equal\n', '')
    code, out, _ = run('diff', saved, saved, '--json')
    assert code == 0 and json.loads(out) == {'equal': True, 'differences': []}


def test_differences(run, saved, tmp_path):
    states, other = example()
    states.slots['0.weight']['mean'][0, 0] += np.float32(0.25)
    states.slots['0.bias']['var'][1] = np.nan
    states.master['0.weight'][2, 1] *= -1
    states.counts['0.bias'] = 7
    states.hypers['wd'] = 0.02
    other.weights[1].copies[0][0] = -0.0  # another bit, the same number
    other.epoch = 2
    container.write(tmp_path / 'b', states, other)
    code, out, _ = run('diff', saved, tmp_path / 'b', '--json')
    found = {d['what']: d for d in json.loads(out)['differences']}
    assert code == 1 and set(found) == {'hypers.wd', '0.bias: updates', 'epoch', '0.weight/mean', '0.bias/var', '0.weight/master',
                                        '0.bias/weight'}
    assert (found['hypers.wd']['a'], found['hypers.wd']['b']) == (0.01, 0.02)
    assert found['0.weight/mean']['elements'] == 1 and math.isclose(found['0.weight/mean']['largest'], 0.25, rel_tol=1e-6)
    assert found['0.bias/var']['largest'] is None and found['0.bias/weight']['largest'] == 0
    code, out, _ = run('diff', saved, tmp_path / 'b')
    assert code == 1 and '0.weight/mean' in out and '0.25' in out


def test_files_of_other_parameters_differ(run, saved, tmp_path):
    states, other = example()
    del states.slots['0.bias'], states.parameters[1], states.counts['0.bias'], other.weights[1]
    states.slots['0.weight']['mean'] = np.zeros(5, 'f4')
    container.write(tmp_path / 'b', states, other)
    code, out, _ = run('diff', saved, tmp_path / 'b')
    lines = {line.split('  ')[1]: line for line in out.splitlines()}
    assert code == 1 and lines['0.bias/mean'].split()[-2:] == ['float32[3]', '-'] and 'float32[5]' in lines['0.weight/mean']


# verify

def test_verify(run, saved):
    code, out, _ = run('verify', saved)
    assert code == 0 and 'every byte matches its checksum' in out and f'states digest {digest(example()[0])}' in out
    code, out, _ = run('verify', OLD / 'adam.states')
    assert code == 0 and 'no checksums' in out
    facts = json.loads(run('verify', saved, '--json')[1])
    assert facts['complete'] and facts['every_byte_checked'] and facts['parameters'] == 2


def test_variables_are_no_parameters(run):
    for command in ('verify', 'inspect'):
        code, out, _ = run(command, OLD / 'nadam.states', '--json')
        found = json.loads(out)
        assert code == 0 and (found['parameters'] if command == 'verify' else len(found['parameters'])) == 2
    assert '\n2 parameters, states digest' in run('verify', OLD / 'nadam.states')[1]


def test_names_that_must_be_there(run):
    code, out, _ = run('verify', OLD / 'dict.params', '--params', 'float32,absent')
    assert code == 1 and 'incomplete: absent is not in the file' in out


def test_every_damaged_byte_is_found(run, saved, tmp_path):
    data = saved.read_bytes()
    for place in [*range(0, len(data), 97), len(data) - 1]:
        (tmp_path / 'x').write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1:])
        refused(run('verify', tmp_path / 'x'), 2, 'Cannot read')
    (tmp_path / 'x').write_bytes(data[:-1])
    refused(run('verify', tmp_path / 'x'), 2, 'truncated')


def test_what_is_missing_is_named(run, tmp_path, saved):
    states, _ = example()
    del states.slots['0.weight']['var'], states.master['0.weight'], states.slots['0.bias']
    states.slots['0.weight']['mean'] = np.zeros((2, 3), 'f4')
    container.write(tmp_path / 's', states)
    code, out, _ = run('verify', tmp_path / 's')
    assert code == 1
    for line in ("0.weight must have the slots ['mean', 'var'], but has ['mean']",
                 '0.weight/mean has the shape [2, 3], but the weight has [3, 2]', '0.bias has seen 6 updates but has no state'):
        assert 'incomplete: ' + line in out
    code, out, _ = run('verify', saved, '--params', '0.weight,0.bias,1.weight')
    assert code == 1 and 'incomplete: 1.weight is not in the file' in out
    code, out, _ = run('verify', OLD / 'adam-bare.states')
    assert code == 1 and 'the optimizer is not in the file' in out


# convert

def test_to_torch(run, saved, tmp_path):
    torch = pytest.importorskip('torch')
    code, out, err = run('convert', saved, '--to', 'torch', '--report', 'report.json')
    assert code == 0 and err == '' and out.startswith('run.pt: adamw at update 7, 2 parameters\n')
    state = torch.load(tmp_path / 'run.pt', weights_only=True)
    np.testing.assert_array_equal(state['state'][0]['exp_avg'].numpy(), example()[0].slots['0.weight']['mean'])
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['lost'] == [] and [p['name'] for p in report['parameters']] == ['0.weight', '0.bias'] and report['report']
    # in another order, into the class of torch.optim, which has no masters
    refused(run('convert', saved, '--to', 'torch', '--target', 'torch', '-o', 'b.pt'), 1, 'would lose', 'Pass --allow-lossy')
    code, out, _ = run('convert', saved, '--to', 'torch', '--target', 'torch', '-o', 'b.pt', '--allow-lossy', '--params',
                       '0.bias,0.weight', '--json')
    assert code == 0 and json.loads(out)['lost'] != []
    np.testing.assert_array_equal(torch.load(tmp_path / 'b.pt', weights_only=True)['state'][0]['exp_avg'].numpy(),
                                  example()[0].slots['0.bias']['mean'])
    refused(run('convert', saved, '--to', 'torch'), 1, 'run.pt', 'exists')
    refused(run('convert', saved, '--to', 'torch', '--target', 'keras', '-o', 'c.pt'), 2, "'mirror' or 'torch'", "'keras'")


def test_between_mxnets_and_ours(run, saved, tmp_path):
    for version in (1, 2):
        code, out, _ = run('convert', saved, '--to', 'mxnet', '--mxnet-version', version)
        assert code == 0 and out.startswith(f'run.mxnet{version}.states: ')
        names = '0.weight,0.bias' if version == 1 else '0.bias,0.weight'  # trainers of 2.x sort these
        code, out, _ = run('convert', f'run.mxnet{version}.states', '--to', 'mxnet', '-o', 'back', '--params', names, '--force')
        back = container.read(tmp_path / 'back')
        for name, slots in example()[0].slots.items():
            for slot, array in slots.items():
                np.testing.assert_array_equal(back.slots[name][slot], array)
        hypers = dict(HYPERS, bias_correction=True)  # a pickled optimizer has all of them
        assert (back.optimizer, back.num_update, back.counts, back.hypers) == ('adamw', 7, {'0.weight': 7, '0.bias': 6}, hypers)
        np.testing.assert_array_equal(back.master['0.weight'], example()[0].master['0.weight'])
    refused(run('convert', tmp_path / 'back', '--to', 'mxnet', '-o', 'x'), 1, 'already a gluon_optim file', '--mxnet-version')
    code, _, _ = run('convert', OLD / 'adam.states', '--to', 'mxnet', '--mxnet-version', '2', '-o', 'two.states')
    assert code == 0 and legacy.read_states(tmp_path / 'two.states').producer == {'mxnet': '2.x'}
    code, _, _ = run('convert', saved, '--to', 'mxnet', '-o', 'states')  # out of a checkpoint
    assert code == 0 and container.read_checkpoint(tmp_path / 'states')[1] is None


def test_a_net_alone(run, tmp_path):
    weights = [Weight('weight', 'dense0_weight', [np.ones((2, 3), 'float32')])]
    container.write(tmp_path / 'net', OptimizerStates('none', {}, 0, [], {}, {}), Run(weights))
    assert 'a net alone, without an optimizer' in run('inspect', 'net')[1]
    assert run('verify', 'net')[1] == 'checkpoint: every byte matches its checksum\n1 parameters\n'
    assert 'digest' in json.loads(run('verify', 'net', '--json')[1])
    refused(run('convert', 'net', '--to', 'torch', '-o', 'x.pt'), 1, 'a net alone', '--what model')
    code, out, _ = run('convert', 'net', '--to', 'safetensors', '-o', 'x.safetensors')
    assert code == 0 and '1 parameters' in out


def test_parameters_without_state_are_no_fault_of_the_file(run, tmp_path):
    states, _ = example()
    states.parameters.append(ParameterInfo('1.running_mean', 'batchnorm0_running_mean', (3,), 'float32'))
    states.counts['1.running_mean'] = 0
    container.write(tmp_path / 'saved', states)
    for version in (1, 2):
        code, out, _ = run('convert', 'saved', '--to', 'mxnet', '--mxnet-version', version, '--verify', 1, '-o', f'out{version}')
        assert code == 0 and 'equal bit for bit' in out


def test_numbers_of_pytorch_are_no_indices_of_gluon(run, tmp_path):
    torch = pytest.importorskip('torch')
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / 'x.pt')
    refused(run('convert', 'x.pt', '--to', 'mxnet', '--optimizer', 'adamw', '-o', 'y'), 1, 'no parameter names', '--params')
    assert run('convert', 'x.pt', '--to', 'mxnet', '--optimizer', 'adamw', '-o', 'y', '--params', 'w,')[0] == 0


def test_what_is_refused_leaves_no_file_and_an_old_one_as_it_was(run, saved, tmp_path):
    (tmp_path / 'out').write_text('precious')
    scheduled = OLD / 'adam-scheduled.states'
    refused(run('convert', scheduled, '--to', 'mxnet', '--mxnet-version', '2', '-o', 'out', '--force'), 1, 'would lose',
            '--allow-lossy')
    refused(run('convert', OLD / 'adam-bare.states', '--to', 'mxnet', '-o', 'out', '--force'), 1, 'does not contain its optimizer')
    refused(run('convert', OLD / 'dict.params', '--to', 'mxnet', '-o', 'out', '--force'), 1, 'only parameters')
    refused(run('convert', saved, '--to', 'mxnet', '--mxnet-version', '1', '--params', 'a,b', '-o', 'out', '--force'), 1,
            "'0.bias', '0.weight'")
    assert (tmp_path / 'out').read_text() == 'precious' and sorted(os.listdir(tmp_path)) == ['out', 'run.safetensors']
    code, out, _ = run('convert', scheduled, '--to', 'mxnet', '--mxnet-version', '2', '-o', 'out', '--force', '--allow-lossy',
                       '--json')
    assert code == 0 and len(json.loads(out)['lost']) == 1 and kind_of(tmp_path / 'out') is Kind.MXNET_STATES


def test_output_that_cannot_be_written(run, saved, tmp_path):
    refused(run('convert', saved, '--to', 'mxnet', '--mxnet-version', '1', '-o', 'no/folder/out'), 1, 'No such file',
            'no/folder/out')
    refused(run('convert', saved, '--to', 'mxnet', '--mxnet-version', '1', '-o', tmp_path), 1, 'must be a file')


@pytest.mark.parametrize('options', [
    ['-o', 'run.safetensors'], ['-o', './run.safetensors'], ['-o', 'link'], ['-o', 'hard'], ['-o', 'names'],
    ['-o', 'new', '--report', 'new'], ['-o', 'new', '--report', 'run.safetensors'], ['-o', 'new', '--report', 'names'],
    ['--report', 'run.npz'],
    ['-o', 'like', '--like', 'like'], ['-o', 'new', '--map', 'map', '--report', 'map']])
def test_no_file_that_is_read_or_written_is_overwritten(run, saved, tmp_path, options):
    (tmp_path / 'link').symlink_to('run.safetensors')
    os.link(saved, tmp_path / 'hard')
    for name, text in (('names', '0.weight\n0.bias\n'), ('like', 'x'), ('map', '{}')):
        (tmp_path / name).write_text(text)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    to = 'torch' if {'--like', '--map'} & set(options) else 'optax'
    refused(run('convert', saved, '--to', to, '--params', 'names', *options), 1, 'must be a different file from',
            options[-1].strip('./'))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_picture_is_no_input(run, saved, tmp_path):
    saved.rename(tmp_path / 'run.png')
    before = (tmp_path / 'run.png').read_bytes()
    refused(run('inspect', 'run.png', '--plot', 'run.png'), 1, '--plot must be a different file from the input')
    assert (tmp_path / 'run.png').read_bytes() == before


def test_without_its_report_nothing_is_written(run, saved, tmp_path):
    refused(run('convert', saved, '--to', 'optax', '--report', 'no/folder/r.json'), 1, 'No such file', 'r.json')
    (tmp_path / 'r.json').write_text('precious')
    refused(run('convert', OLD / 'adam-bare.states', '--to', 'optax', '-o', 'x', '--report', 'r.json'), 1, 'its optimizer')
    assert sorted(os.listdir(tmp_path)) == ['r.json', 'run.safetensors'] and (tmp_path / 'r.json').read_text() == 'precious'


def test_indices_in_place_of_names_are_said(run):
    code, out, _ = run('convert', OLD / 'net.states', '--to', 'mxnet', '-o', 'x')
    assert code == 0 and 'indices' in out and 'Convert with --params' in out and 'params=' not in out
    code, out, _ = run('convert', OLD / 'net.states', '--to', 'mxnet', '-o', 'y', '--params', OLD / 'net.params')
    assert code == 0 and 'indices' not in out


def test_names_of_a_trainer_with_frozen_parameters(run, tmp_path):
    states, _ = example()
    del states.slots['0.bias']
    states.counts['0.bias'] = 0
    states.parameters.reverse()
    container.write(tmp_path / 's', states)
    run('convert', 's', '--to', 'mxnet', '--mxnet-version', '1', '--params', '0.bias,0.weight', '-o', 'x.states')
    for target in ('optax', 'mxnet'):  # the names of the whole trainer, of which the file has some
        code, out, err = run('convert', 'x.states', '--to', target, '--params', 'b,w', '-o', target)
        assert (code, err) == (0, '') and ', 1 parameters\n' in out
    assert container.read(tmp_path / 'mxnet').names == ['w']


def test_an_optimizer_of_ones_own_is_converted_in_python(run, tmp_path):
    states, other = example()
    states.optimizer = 'lion'
    container.write(tmp_path / 's', states, other)
    for target in ('torch', 'onnx', 'optax'):
        refused(run('convert', 's', '--to', target), 1, "'lion'", '--import MODULE')


def test_those_that_are_chosen_are_counted(run, saved):
    assert ', 1 parameters\n' in run('convert', saved, '--to', 'optax', '--params', '0.bias,')[1]


def test_without_the_package_of_the_target(run, saved, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'torch', None)
    monkeypatch.delitem(sys.modules, 'gluon_optim.torch', raising=False)
    refused(run('convert', saved, '--to', 'torch'), 1, "pip install '.[torch]'")
    assert os.listdir(tmp_path) == ['run.safetensors']


def test_to_onnx(run, saved, tmp_path):
    onnx = pytest.importorskip('onnx')
    code, _, _ = run('convert', saved, '--to', 'onnx')
    assert code == 0
    onnx.checker.check_model(onnx.load(str(tmp_path / 'run.onnx')))


# Errors

@pytest.mark.parametrize('command', [['inspect'], ['verify'], ['convert', '--to', 'torch'], ['inspect', '--json']])
def test_unusable_input(run, tmp_path, command):
    (tmp_path / 'empty').write_bytes(b'')
    (tmp_path / 'text').write_text('hello\nworld')
    (tmp_path / 'evil').write_bytes(b'\x80\x04cos\nsystem\n(X\x04\x00\x00\x00trueltR.')
    (tmp_path / 'weights').write_bytes(b'\x02\0\0\0\0\0\0\0{]')
    kinds = ['states and checkpoints of gluon_optim', '.params files of MXNet', '.onnx']
    for name, words in (('nothing', ["No such file or directory: 'nothing'"]), ('empty', ["'empty'", 'an empty file', *kinds]),
                        ('text', ["'text'", "b'hello", *kinds]), ('weights', ['header']), ('.', ['must be a file']),
                        ('evil', ['os.system'])):
        refused(run(command[0], name, *command[1:]), 2, *words)


def test_names_that_cannot_be_used(run, tmp_path):
    (tmp_path / 'bad.json').write_text('[1, 2]')
    old = OLD / 'adam.states'
    (tmp_path / 'cut.json').write_text('["w"')
    (tmp_path / 'empty').write_text('')
    (tmp_path / 'zeros').write_bytes(bytes(20))
    for command in (['inspect'], ['verify'], ['convert', '--to', 'optax', '-o', 'x']):
        refused(run(*command, old, '--params', 'absent.json'), 2, "'absent.json'", 'end a single name with a comma')
        for name, words in (('bad.json', 'a list containing non-strings'), ('cut.json', 'looks like JSON'), ('empty', 'no name'),
                            (',', 'no name'), ('.', 'a folder'), (str(old), 'a .states file'), ('zeros', 'an unknown kind')):
            refused(run(*command, old, '--params', name), 2, '--params must be a .params or .npz file', repr(name), words)
    refused(run('inspect', old, '--params', 'a,'), 2, 'do not fit')
    refused(run('inspect', old, '--params', 'a,a'), 2, 'distinct names')


@pytest.mark.parametrize('arguments, words', [
    (['convert', 'OURS', '--to', 'torch', '--mxnet-version', '1'], ['--mxnet-version goes with --to mxnet']),
    (['convert', 'OURS', '--to', 'mxnet', '--mxnet-version', '1', '--target', 'torch'], ["--target must be 'mirror'", "'torch'"]),
    (['convert', 'OURS', '--to', 'torch', '--target', 'adamw'], ["'mirror' or 'torch' or 'timm'", "'apex'", "'adamw'"]),
    (['convert', 'OURS', '--to', 'torch', '--target', ''], ["Received: ''"]),
    (['convert', 'OURS', '--to', 'onnx', '--target', 'torch'], ["'mirror' or 'preview'"]),
    (['convert', 'OURS', '--to', 'optax', '--target', 'nowhere'], ['nowhere']),
    (['convert', 'OURS', '--to', 'mxnet', '--params', 'a,b'], ['--params is for files without names']),
    (['convert', 'OURS', '--to', 'mxnet', '--mxnet-version', '1', '--params', 'PARAMS'], ['--params is for files without names']),
    (['convert', 'OURS', '--to', 'optax', '--optimizer', 'sgd'], ["--optimizer is for PyTorch's"]),
    (['convert', 'OURS', '--to', 'torch', '--what', 'model', '--target', 'torch'], ['--target is for optimizer states']),
    (['convert', 'PARAMS', '--to', 'safetensors', '--params', 'a,b'], ['--params is for optimizer states']),
    (['inspect', 'OURS', '--params', 'a,b'], ['--params is for files without names']),
    (['inspect', 'PARAMS', '--params', 'a,b'], ['--params is for files without names']),
    (['inspect', 'OLD', '--source', 'torch'], ["--source is for PyTorch's"]),
    (['verify', 'OURS', '--optimizer', 'sgd'], ["--optimizer is for PyTorch's"]),
    (['verify', 'OURS', '--allow', 'lions.Lion'], ["--allow is for MXNet's .states"]),
    (['diff', 'OURS', 'OURS', '--params', 'a,b'], ['--params is for files without names']),
])
def test_options_that_would_be_ignored(run, saved, tmp_path, arguments, words):
    paths = {'OURS': saved, 'OLD': OLD / 'adam.states', 'PARAMS': OLD / 'dict.params'}
    refused(run(*(paths.get(argument, argument) for argument in arguments)), 2, *words)
    assert os.listdir(tmp_path) == ['run.safetensors']


def test_names_for_one_of_two_files(run, tmp_path):
    run('convert', OLD / 'adam.states', '--to', 'mxnet', '--params', 'w,b', '-o', 'x')
    assert run('diff', OLD / 'adam.states', 'x', '--params', 'w,b') == (0, 'equal\n', '')


def test_classes_of_ones_own(run, tmp_path):
    data = (OLD / 'adam-scheduled.states').read_bytes()
    assert data.count(b'mxnet.lr_scheduler') == 1
    (tmp_path / 'x.states').write_bytes(data.replace(b'mxnet.lr_scheduler', b'my_own.lr_schedule'))
    for command in (['inspect'], ['verify'], ['diff', 'x.states'], ['convert', '--to', 'mxnet', '-o', 'y']):
        result = run(*command, 'x.states')
        name = result[2].partition('--allow ')[2].split()[0]
        refused(result, 2, 'my_own.lr_schedule.')
        assert name.startswith('my_own.lr_schedule.')
        assert run(*command, 'x.states', '--allow', 'some.Other', '--allow', name)[0] == 0


def test_usage(capsys):
    for arguments in ([], ['inspect'], ['convert', 'x'], ['convert', 'x', '--to', 'cobol'], ['frobnicate']):
        with pytest.raises(SystemExit) as info:
            cli.main(arguments)
        assert info.value.code == 2 and 'usage:' in capsys.readouterr().err


# As processes

def process(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], env={**os.environ, 'PYTHONPATH': str(ROOT)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(os.name == 'nt', reason='needs a shell of POSIX')
@pytest.mark.parametrize('arguments, closed, code', [('list', '>&-', 0), ('inspect no', '2>&-', 2), ('inspect no', '>&- 2>&-', 2)])
def test_closed_streams(arguments, closed, code):
    done = subprocess.run(f'{sys.executable} -W ignore -m gluon_optim.cli {arguments} {closed}', shell=True, cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, '', '')


def test_the_ending_of_a_picture_comes_first(saved):
    code = 'import sys; sys.modules["matplotlib"] = None\nfrom gluon_optim import cli\nsys.exit(cli.main(sys.argv[1:]))'
    done = process('-c', code, 'inspect', saved, '--plot', 'p.xyz')
    assert done.returncode == 2 and "'.png', '.svg', '.pdf'" in done.stderr and "'p.xyz'" in done.stderr
    done = process('-c', code, 'inspect', saved, '--plot', 'p.png')
    assert done.returncode == 1 and "pip install '.[plot]'" in done.stderr


def test_the_script_is_the_same_convert(saved, tmp_path):
    done = process(ROOT / 'tools' / 'convert_states.py', saved, '--to', 'mxnet', '--mxnet-version', '1', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '') and kind_of(tmp_path / 'run.mxnet1.states') is Kind.MXNET_STATES
    done = process(ROOT / 'tools' / 'convert_states.py', 'absent', '--to', 'mxnet', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


def test_a_reader_that_has_had_enough(saved):
    done = subprocess.run(f'{sys.executable} -m gluon_optim.cli inspect {saved} --json | head -c 1', shell=True, cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout == '{' and done.stderr == ''


@pytest.mark.skipif(not hasattr(os, 'openpty'), reason='needs a terminal')
def test_progress_is_shown_on_a_terminal_only(saved, monkeypatch):
    pytest.importorskip('tqdm')
    monkeypatch.setattr(cli_options, 'DELAY', 0)
    for terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, 'stderr', stream)
        with cli_options.opened(str(saved)) as file:
            cli_options.read_contents(file, argparse.Namespace(optimizer=None, source=None, allow=[], part=None))
        assert ('reading run.safetensors' in stream.getvalue()) == terminal


def test_watchers_see_every_byte(saved):
    for path in (saved, OLD / 'adam.states', OLD / 'dict.params'):
        seen = []
        with watched(seen.append):
            read(path)
        assert sum(seen) >= os.path.getsize(path)
    read(saved)
    assert sum(seen) < 2 * os.path.getsize(OLD / 'dict.params') + 8192


def test_options_in_messages():
    assert cli_text.in_options("Pass allow_lossy=True. Pass params= to name them. target='torch'") == (
        "Pass --allow-lossy. Pass --params to name them. --target 'torch'")


@pytest.mark.parametrize('message, reading, words', [
    ("Pass allow=['a.B'] to", False, 'Pass --allow a.B to'),
    ('Write a map with suggest_names, and pass it as names=.', False, 'Write a map with --map suggest, and pass it as --map.'),
    ('`names` must list all', False, '--params must list all'), ('Pass `weights`.', False, 'Pass --params.'),
    ("no equivalent in target='x'. Pass `optimizer` and `target`.", True,
     "no equivalent in --source 'x'. Pass --optimizer and --source."),
    ('param_names= `param_groups(state_dict, params)`', False, 'param_names= `param_groups(state_dict, params)`'),
    ('Pass like= the module or a .pt file', False, 'Pass --like a .pt file'),
])
def test_other_options_in_messages(message, reading, words):
    assert cli_text.in_options(message, reading) == words


# Tables and help

def test_tables_are_as_wide_as_the_terminal(capsys, monkeypatch):
    for width, name in ((100, 'larc'), (70, 'novograd'), (200, 'larc')):
        monkeypatch.setenv('COLUMNS', str(width))
        assert cli.main(['info', name]) == 0
        lines = capsys.readouterr().out.partition('Arguments')[2].partition('Runs on')[0].splitlines()
        assert max(map(len, lines)) <= width
    monkeypatch.setenv('COLUMNS', '30')
    cli_text.table([('parameter', 'what it is'), ('a.name.that.is.longer.than.the.terminal', 'three short words')])
    assert capsys.readouterr().out.split('\n')[2:4] == ['  ' + 'a.name.that.is.longer.than.the.terminal  three', ' ' * 43 + 'short']
    cli_text.table([])


def test_help_says_what_is_allowed(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '500')
    for command in ([], ['inspect'], ['diff'], ['verify'], ['convert'], ['list'], ['info']):
        with pytest.raises(SystemExit):
            cli.main([*command, '--help'])
        said = capsys.readouterr().out
        assert 'Exit codes. 0: done. 1: refused' in said
    assert [foreign.target for foreign in FOREIGN if repr(foreign.target) not in help_of('convert', capsys)] == []


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, '--help'])
    return capsys.readouterr().out


def test_a_name_that_matches_nothing(run):
    refused(run('list', 'nope'), 1, "'nope'", 'gluon-optim list')
    assert run('list', 'nope', '--json') == (1, '[]\n', '')


def test_states_are_printed_in_one_line():
    assert repr(example()[0]) == '<OptimizerStates: adamw at update 7, 2 parameters>'


# What programs and people expect of a command

def test_an_output_that_exists_is_replaced_by_force_alone(run, saved, tmp_path):
    (tmp_path / 'x').write_text('precious')
    refused(run('convert', saved, '--to', 'optax', '-o', 'x'), 1, "'x' exists", '--force')
    assert (tmp_path / 'x').read_text() == 'precious'
    assert run('convert', saved, '--to', 'optax', '-o', 'x', '--force')[0] == 0 and kind_of(tmp_path / 'x') is Kind.OPTAX


def test_results_go_to_the_folder_where_the_command_runs(run, saved, tmp_path, monkeypatch):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    code = cli.main(['convert', '../run.safetensors', '--to', 'optax'])
    assert code == 0 and os.listdir() == ['run.npz']


def test_model_and_optimizer_have_different_names(run, saved):
    pytest.importorskip('torch')
    for what in ('model', 'optimizer'):
        assert run('convert', saved, '--to', 'pytorch', '--what', what)[0] == 0
    assert {'run.model.pt', 'run.pt'} <= set(os.listdir())


def test_standard_input_and_output(saved):
    convert = [sys.executable, '-m', 'gluon_optim', 'convert', '-', '--to', 'optax', '-o', '-']
    done = subprocess.run(convert, input=saved.read_bytes(), cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          check=True)
    assert b'adamw at update 7' in done.stderr
    inspect = [sys.executable, '-m', 'gluon_optim', 'inspect', '-', '--json']
    found = subprocess.run(inspect, input=done.stdout, cwd=str(ROOT), stdout=subprocess.PIPE, check=True)
    assert json.loads(found.stdout)['kind'] == 'optax states'
    done = subprocess.run(convert[:-2], input=saved.read_bytes(), cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 2 and b'--output' in done.stderr


@pytest.mark.parametrize('arguments, words', [
    (['convert', 'x', '--to', 'torhc'], 'Did you mean torch?'), (['inspcet', 'x'], 'Did you mean inspect?'),
    (['convert', 'x', '--to', 'torch', '--allow-losy'], 'Did you mean --allow-lossy'),
    (['inspect', 'x', '--param', 'a,b'], '--params'),
    (['convert', 'x', '--to', 'torch', '--targ', 'torch'], '--target'),
])
def test_near_misses_are_named_and_nothing_is_abbreviated(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(sys, 'argv', ['gluon-optim', *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize('ending', ['.pt', '.safetensors'])
def test_weights_of_models_are_read(run, tmp_path, ending):
    arrays = {'1.weight': np.arange(6, dtype='f4').reshape(2, 3), '0.half': np.ones(3, 'f2'), 'steps': np.array(7, 'int64')}
    if ending == '.pt':
        torch = pytest.importorskip('torch')
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / 'net.pt')
    else:
        pytest.importorskip('safetensors.numpy').save_file(arrays, tmp_path / 'net.safetensors')
    code, out, err = run('inspect', 'net' + ending, '--json')
    assert (code, err) == (0, '') and json.loads(out)['kind'] == 'weights'
    assert {row['parameter']: row['shape'] for row in json.loads(out)['arrays']} == {'1.weight': [2, 3], '0.half': [3], 'steps': []}
    assert run('verify', 'net' + ending)[0] == 0 and run('diff', 'net' + ending, 'net' + ending)[1] == 'equal\n'
    data = (tmp_path / ('net' + ending)).read_bytes()
    (tmp_path / 'cut').write_bytes(data[:-1])
    assert run('inspect', 'cut')[0] == 2


def test_other_files_of_arrays_are_called_what_they_are(run, tmp_path):
    np.savez(tmp_path / 'x.npz', a=np.zeros(2))
    assert 'arrays of NumPy' in run('inspect', 'x.npz')[1]
    (tmp_path / 'pointer.params').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n')
    refused(run('inspect', 'pointer.params'), 2, 'Git LFS pointer', 'git lfs pull')
    (tmp_path / 'page.params').write_text('<!DOCTYPE html>\n<html><body>404</body></html>')
    refused(run('inspect', 'page.params'), 2, 'HTML page')


def test_a_rule_of_ones_own_on_the_command_line(run, tmp_path):
    (tmp_path / 'mine_for_cli.py').write_text(
        "import gluon_optim as go\n\n@go.register\nclass Lion(go.Rule):\n    name, summary = 'lion_for_cli', 'signs'\n"
        "    hypers = (go.Hyper('learning_rate', 1e-4, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'))\n"
        "    slots = staticmethod(lambda h: (go.Slot('mean'),))\n"
        "    coefficients = staticmethod(lambda xp, h, t: dict(lr=h.learning_rate))\n"
        "    step = staticmethod(lambda xp, h, c, w, g, s: (w - c.lr * xp.sign(g), dict(mean=s.mean + g)))\n")
    states, _ = example()
    states.optimizer, states.hypers = 'lion_for_cli', {'learning_rate': 0.1}
    states.slots = {name: {'mean': slots['mean']} for name, slots in states.slots.items()}
    states.master = {}
    states.parameters = [dataclasses.replace(info, dtype='float32') for info in states.parameters]
    container.write(tmp_path / 's', states)
    refused(run('convert', 's', '--to', 'optax', '-o', 'x'), 1, '--import MODULE')
    code, _, err = run('convert', 's', '--to', 'optax', '-o', 'x', '--import', 'mine_for_cli')
    assert (code, err) == (0, '')
    assert 'mean' in run('info', 'lion_for_cli', '--import', 'mine_for_cli')[1]


def test_parameters_are_listed_in_the_order_of_the_net(run, tmp_path):
    states, other = example()
    other.weights = [Weight(name, name, [np.zeros(2, 'f4')]) for name in ('z', '0.weight', '0.bias')]
    container.write(tmp_path / 's', states, other)
    rows = json.loads(run('inspect', 's', '--json')[1])['arrays']
    assert list(dict.fromkeys(row['parameter'] for row in rows))[:3] == ['z', '0.weight', '0.bias']


def test_a_shell_completes_commands_and_options(run, tmp_path):
    pytest.importorskip('shtab')
    code, script, err = run('completion', 'bash')
    assert (code, err) == (0, '')
    (tmp_path / 'script').write_text(script)
    ask = ('source ./script; COMP_WORDS=(gluon-optim convert --all); COMP_CWORD=2; _shtab_gluon_optim; echo "${COMPREPLY[@]}"; '
           'COMP_WORDS=(gluon-optim insp); COMP_CWORD=1; _shtab_gluon_optim; echo "${COMPREPLY[@]}"')
    done = subprocess.run(['bash', '-c', ask], cwd=str(tmp_path), stdout=subprocess.PIPE, text=True)
    assert {'--allow', '--allow-lossy', 'inspect'} <= set(done.stdout.split())
