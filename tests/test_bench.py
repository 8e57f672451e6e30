"""tools/bench.py runs, and its figures are what they are called."""
import datetime
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / 'tools'

pytest.importorskip('numba')
pytest.importorskip('tqdm')

# tools/bench.py in an environment that lacks the modules named first
WITHOUT = '''
import runpy, sys
sys.path.insert(0, sys.argv[2])
sys.modules.update(dict.fromkeys(sys.argv[1].split()))  # importing one raises ImportError, as where it is missing
sys.argv[:] = [sys.argv[2] + '/bench.py', *sys.argv[3:]]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def run(*arguments, without='', expect=0, **variables):
    """Standard output and standard error of tools/bench.py."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), **variables)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', WITHOUT, without, str(TOOLS), *arguments], env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize('tool', ['bench.py', 'bench_first.py', 'cluster.py', 'docs_pages.py', 'gpu_check.py', 'make_tables.py'])
def test_help_of_tools(tool):
    if tool == 'gpu_check.py':
        pytest.importorskip('torch')
    environment = dict(os.environ, PYTHONPATH=str(TOOLS.parent))   # where this package is not installed
    done = subprocess.run([sys.executable, str(TOOLS / tool), '--help'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment)
    assert done.returncode == 0 and done.stdout.startswith('usage: ') and not done.stderr, done.stderr


@pytest.fixture(scope='module')
def bench():
    sys.path.insert(0, str(TOOLS))
    try:
        import bench
        yield bench
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope='module')
def figures():
    pytest.importorskip('mxnet')
    output, _ = run('--case', 'tiny', '--rounds', '2', '--optimizers', 'novograd', 'adamw', 'sgd_torch', 'adam',
                    '--peers', 'mxnet:nothing', 'mxnet:adam', 'mxnet:sgd', 'torch_fused:*', 'torch_default:adamw', '*:novograd',
                    '--json', '-')
    return json.loads(output)


def rows(figures):
    return {(row['name'], row['route']): row for row in figures['cases'][0]['rows']}


def needs(framework, bench):
    for package in bench.FRAMEWORKS[framework].needs:
        pytest.importorskip(package)


def test_resnet50_has_its_161_tensors(bench):
    shapes = bench.CASES['resnet50']
    assert len(shapes) == 161
    assert sum(int(numpy.prod(shape)) for shape in shapes) == 25_557_032  # as PyTorch's model counts
    assert shapes[0] == (64, 3, 7, 7) and shapes[-2:] == [(1000, 2048), (1000,)]
    assert sum(len(shape) == 4 for shape in shapes) == 53


def test_json_has_facts_and_figures(figures):
    facts = figures['facts']
    assert facts['cores'] >= 1 and facts['versions']['mxnet'] and datetime.date.fromisoformat(facts['date'])
    case = figures['cases'][0]
    assert (case['case'], case['tensors'], case['elements']) == ('tiny', 3, 1211)
    assert case['gigabytes_per_second']['median'] > 0
    for row in case['rows']:
        low, high = row['ms']['range']
        assert 0 < low <= row['ms']['median'] <= high and row['ms']['samples'] >= 2


def test_ours_and_mxnets_are_measured_both_ways(figures):
    found = rows(figures)
    for name in ('gluon_optim:novograd', 'gluon_optim:adam', 'mxnet:nothing', 'mxnet:adam'):
        assert {route for other, route in found if other == name} == {'Trainer', 'Updater'}


def test_bytes_are_those_that_must_move(figures):
    """Gradient read; weight and each slot read and written."""
    found = {name: row['bytes'] / 1211 for (name, _), row in rows(figures).items()}
    assert found['gluon_optim:novograd'] == 4 * (1 + 2 + 2)
    assert found['gluon_optim:adamw'] == found['mxnet:adam'] == found['gluon_optim:adam'] == 4 * (1 + 2 + 4)
    assert found['gluon_optim:sgd_torch'] == found['mxnet:sgd'] == 4 * (1 + 2 + 2)
    assert found['mxnet:nothing'] == 0


def test_ratios_are_of_medians(figures):
    pytest.importorskip('torch')
    found = rows(figures)
    case, ours, reference = figures['cases'][0], found['gluon_optim:novograd', 'Trainer'], found['torch_fused:adamw', None]
    assert reference['times_torch_fused_adamw'] == 1
    assert ours['times_torch_fused_adamw'] == pytest.approx(ours['ms']['median'] / reference['ms']['median'])
    floor = ours['bytes'] / case['gigabytes_per_second']['median'] / 1e6
    assert ours['times_floor'] == pytest.approx(ours['ms']['median'] / floor)


def test_a_missing_package_is_named_not_hidden(figures):
    measured = {name for name, _ in rows(figures)}
    for package, name in (('torch_optimizer', 'torch_optimizer:novograd'), ('optax', 'optax:novograd'), ('timm', 'timm:novograd')):
        assert (name in measured) != (name in figures['cases'][0]['missing']), package
        if importlib.util.find_spec(package) is None:
            assert package in figures['cases'][0]['missing'][name] or 'jax' in figures['cases'][0]['missing'][name]


@pytest.fixture(scope='module')
def layouts(tmp_path_factory):
    pytest.importorskip('mxnet')
    path = tmp_path_factory.mktemp('bench') / 'figures.json'
    output, _ = run('--case', 'layouts', '--nets', 'cnn', '--rounds', '1', '--json', str(path))
    return output, json.loads(path.read_text())['layouts']


def test_every_layout_is_measured(layouts):
    found = [(row['kvstore'], row['update_on_kvstore'], row['contexts']) for row in layouts[1]]
    assert len(found) == len(set(found)) == 10
    assert set(found) == {(None, False, 1), (None, False, 2)} | {
        (kvstore, there, contexts) for kvstore in ('local', 'device') for there in (False, True) for contexts in (1, 2)}


def test_layouts_compare_ours_with_mxnets_and_the_others_with_adam(layouts):
    output, rows = layouts
    for row in rows:
        ms = row['ms']
        assert set(ms) == {'mxnet:adam', 'mxnet:sgd', *(f'gluon_optim:{name}' for name in ('adam', 'sgd', 'novograd', 'adamw'))}
        assert row['ratios'] == {
            'gluon_optim:adam': ms['gluon_optim:adam'] / ms['mxnet:adam'],
            'gluon_optim:sgd': ms['gluon_optim:sgd'] / ms['mxnet:sgd'],
            'gluon_optim:novograd': ms['gluon_optim:novograd'] / ms['gluon_optim:adam'],
            'gluon_optim:adamw': ms['gluon_optim:adamw'] / ms['gluon_optim:adam']}
        line = next(line.split() for line in output.splitlines() if line.split()[:4] == [
            'cnn', str(row['kvstore']), 'yes' if row['update_on_kvstore'] else 'no', str(row['contexts'])])
        assert line[4:7] == [f'{x:.2f}' for x in (ms['mxnet:adam'], ms['gluon_optim:adam'], row['ratios']['gluon_optim:adam'])]


def test_first_updates_are_measured_in_new_processes(tmp_path):
    pytest.importorskip('numba')
    path, elsewhere = tmp_path / 'figures.json', tmp_path / 'cache'
    frameworks = [name for name in ('mxnet', 'torch') if importlib.util.find_spec(name)]
    if not frameworks:
        pytest.skip('needs MXNet or PyTorch')
    output, _ = run('--framework', *frameworks, '--case', 'first_step', '--optimizers', 'sgd_torch', 'dcasgd', '--json', str(path),
                    GLUON_OPTIM_CACHE=str(elsewhere))
    found = {(row['framework'], row['rule']): row for row in json.loads(path.read_text())['first_step']}
    assert set(found) == {(framework, rule) for framework in frameworks for rule in ('sgd_torch', 'dcasgd')}
    for (framework, rule), row in found.items():
        parts = [row[state][part] for state in ('cold', 'warm') for part in ('framework', 'ours')]
        assert min(part[unit] for part in parts for unit in ('seconds', 'cpu')) > 0
        line = next(line for line in output.splitlines() if line.startswith(f'{framework} {rule} '))
        assert f'{row["cold"]["ours"]["seconds"]:.2f} (' in line
    assert not elsewhere.exists()  # the user's own cache is neither used nor filled
    cold, warm = (found[frameworks[0], 'sgd_torch'][state]['ours']['cpu'] for state in ('cold', 'warm'))
    assert cold > warm


def test_float16_counts_masters(tmp_path):
    pytest.importorskip('mxnet')
    output, _ = run('--case', 'tiny', '--rounds', '1', '--dtype', 'float16', '--optimizers', 'novograd', '--peers', 'mxnet:adam',
                    'mxnet:sgd', '--json', str(tmp_path / 'figures.json'))
    assert 'mxnet, tiny, float16: 3 tensors' in output and 'gluon_optim:novograd Trainer' in output
    found = {name: row['bytes'] / 1211 for (name, _), row in rows(json.loads((tmp_path / 'figures.json').read_text())).items()}
    assert found == {'gluon_optim:novograd': 2 + 2 + 8 + 8, 'mxnet:adam': 2 + 2 + 8 + 16, 'mxnet:sgd': 2 + 2 + 8 + 8}


def test_without_mxnet_pytorch_is_measured():
    """In every type of weights; and what a half-precision step must move."""
    pytest.importorskip('torch')
    output, _ = run('--framework', 'torch', '--case', 'tiny', '--rounds', '1', '--dtype', 'float32', 'bfloat16',
                    '--optimizers', 'adamw', '--peers', 'torch_fused:adamw', 'torch_foreach:adamw', '--json', '-', without='mxnet')
    figures = json.loads(output)
    assert [(case['framework'], case['dtype'], case['missing']) for case in figures['cases']] == [
        ('torch', 'float32', {}), ('torch', 'bfloat16', {})]
    single, half = ({row['name']: row for row in case['rows']} for case in figures['cases'])
    ours, reference = single['gluon_optim.torch:adamw'], single['torch_fused:adamw']
    assert ours['bytes'] == single['gluon_optim.torch_operations:adamw']['bytes'] == reference['bytes'] == 1211 * 4 * (1 + 2 + 4)
    assert ours['times_torch_fused_adamw'] == ours['ms']['median'] / reference['ms']['median']
    others = [reference['ms']['median'], single['torch_foreach:adamw']['ms']['median']]
    assert ours['times_best_other'] == ours['ms']['median'] / min(others)
    assert half['gluon_optim.torch:adamw']['bytes'] == 1211 * (2 + 2 + 8 + 16)
    assert (half['torch_fused:adamw']['dtype'], half['torch_fused:adamw']['bytes']) == ('float32', reference['bytes'])


@pytest.mark.parametrize('framework', ['jax', 'onnx'])
def test_other_frameworks_are_measured(framework, bench):
    needs(framework, bench)
    output, _ = run('--framework', framework, '--case', 'tiny', '--rounds', '1', '--dtype', 'float32', 'float16', '--optimizers',
                    'adamw', 'sgld', '--json', '-')
    family, = bench.FRAMEWORKS[framework].ours
    for case, bytes_per_element in zip(json.loads(output)['cases'], (4 * (1 + 2 + 4), 2 + 2 + 8 + 16)):
        found = {row['name']: row for row in case['rows']}
        assert found[f'{family}:adamw']['bytes'] == 1211 * bytes_per_element
        assert f'{family}:sgld' in case['missing'] and f'{family}:sgld' not in found
        assert any(name.startswith('optax:') for name in found) == (framework == 'jax' and case['dtype'] == 'float32')


@pytest.mark.parametrize('rule', ['adamw', 'novograd', 'sgd_torch', 'lamb'])
def test_what_is_measured_is_the_same_update_everywhere(rule, bench):
    """After three steps the weights agree, in whatever frameworks are here; ONNX Runtime's two sets of arrays too."""
    data, weights = bench.Data([(20, 3), (5,)]), {}
    for family in bench.bench_peers.OURS:
        routes, why = bench.bench_peers.build(f'{family}:{rule}', data)
        if why:
            assert 'No module named' in why or 'is not installed' in why
            continue
        competitor = next(iter(routes.values()))
        # one step so far; but Trainer and Updater share weights: a step each, after one that made the states
        for _ in range(0 if 'Trainer' in routes else 2):
            competitor.prepare()
            competitor.step()
        weights[family] = competitor.weight()
    first, *rest = weights.values()
    update = numpy.abs(first - data.weights()[0]).max()
    assert update > 0
    for other in rest:
        numpy.testing.assert_allclose(other, first, rtol=0, atol=1e-3 * update)


def test_peers_of_another_python_take_turns(tmp_path, bench):
    """The server is this very Python: peers behave there as here, and an unknown one says why it is missing."""
    pytest.importorskip('torch')
    data = bench.Data([(20, 3), (5,)])
    server = bench.bench_peers.Server(sys.executable, data)
    try:
        assert server.versions['numpy'] == numpy.__version__
        routes, why = server.build('torch_default:sgd')
        competitor, = routes.values()
        assert why == '' and (competitor.slots, competitor.dtype) == (1, 'float32')
        assert competitor.problem(None) == 'the weights have not changed'  # not since it was built
        assert all(seconds > 0 for seconds in competitor.turn())
        assert competitor.problem(None) == ''
        assert server.build('nobody:novograd') == ({}, "KeyError: 'nobody:novograd'")
        ours, _ = server.build('gluon_optim.torch_operations:adamw', 'bfloat16')
        assert (ours[None].slots, ours[None].dtype) == (2, 'bfloat16')
    finally:
        server.close()


def test_a_competitor_that_does_nothing_or_diverges_is_found(bench):
    weight = numpy.ones(3)
    competitor = bench.Competitor(lambda: None, lambda: weight.copy(), 0)
    assert 'not changed' in competitor.problem(competitor.weight())
    before = competitor.weight()
    weight[0] = numpy.nan
    assert 'not finite' in competitor.problem(before)


def test_a_python_that_stops_is_named(bench):
    with pytest.raises(SystemExit, match='The peers under false have stopped'):
        bench.bench_peers.Server('false', bench.Data([(2,)]))


def test_a_framework_that_is_missing_is_one_clear_error():
    _, message = run('--framework', 'torch', '--case', 'tiny', without='torch', expect=2)
    assert f'--framework torch needs torch. Received: {sys.executable}, which lacks torch. Install what is missing, or' in message
    assert 'Traceback' not in message
    _, message = run('--case', 'layouts', '--framework', 'torch', without='torch', expect=2)
    assert 'needs torch' in message


def test_another_environment_may_have_the_framework(bench):
    """The other one is this very Python, which has not been told that torch is missing."""
    pytest.importorskip('torch')
    output, _ = run('--framework', 'torch', '--case', 'tiny', '--rounds', '1', '--optimizers', 'adamw', '--peers', '--peer-python',
                    sys.executable, '--json', '-', without='torch')
    case, = json.loads(output)['cases']
    assert {row['name'] for row in case['rows']} == {'gluon_optim.torch:adamw', 'gluon_optim.torch_operations:adamw'}
    assert case['other_versions'][0]['torch'] and case['missing'] == {}


def test_default_peers_are_those_that_a_framework_is_compared_with(bench):
    for framework, known in bench.FRAMEWORKS.items():
        for case in known.cases:
            peers = bench.peers_of(framework, case, 'float32')
            assert bench.REFERENCE in peers
            assert bench.peers_of(framework, case, 'bfloat16') == [name for name in peers if name in bench.HALF_PEERS]
    beside = bench.peers_of('mxnet', 'resnet50', 'float32')
    assert {'optax:novograd', 'timm:novograd', 'torch_optimizer:lamb', 'mxnet:adam'} <= set(beside)
    assert not any(name.startswith('optax') for name in bench.peers_of('torch', '2000', 'float32'))
    assert 'optax:adamw' in bench.peers_of('jax', '2000', 'float32')


@pytest.mark.parametrize('arguments, message', [
    (['--dtype', 'bfloat16'], '--dtype bfloat16 is no type of weights in mxnet. It is in torch, jax: pass --framework.'),
    (['--optimizers', 'novgrad'], "nothing matches 'novgrad'"),
    (['--peers', 'jax:*'], "nothing matches 'jax:*'"),
    (['--peer-python', 'no/such/python'], "--peer-python must be an executable Python. Received: 'no/such/python'."),
    (['--rounds', '0'], '--rounds must be at least 1. Received: 0.'),
    (['--json', 'no/such/folder.json'], "--json must be a file in a folder that exists. Received: 'no/such/folder.json'."),
])
def test_bad_arguments(bench, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        bench.arguments(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_plot(bench, figures, tmp_path):
    pytest.importorskip('matplotlib')
    bench.plot(figures['cases'], tmp_path / 'figures.png')
    assert (tmp_path / 'figures.png').read_bytes().startswith(b'\x89PNG')
