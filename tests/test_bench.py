"""tools/bench.py runs, and its figures are what they are called."""
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

pytest.importorskip('mxnet')
pytest.importorskip('tqdm')


def run(*arguments, expect=0, **variables):
    """Standard output and standard error of tools/bench.py."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), **variables)
    done = subprocess.run([sys.executable, '-W', 'ignore', str(TOOLS / 'bench.py'), *arguments], env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


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
    output, _ = run('--case', 'tiny', '--rounds', '2', '--optimizers', 'novograd', 'adamw', 'sgd_torch', 'adam',
                    '--peers', 'mxnet:nothing', 'mxnet:adam', 'mxnet:sgd', 'torch_fused:*', 'torch_default:adamw', '*:novograd',
                    '--json', '-')
    return json.loads(output)


def rows(figures):
    return {(row['name'], row['route']): row for row in figures['cases'][0]['rows']}


def test_resnet50_has_its_161_tensors(bench):
    shapes = bench.CASES['resnet50']
    assert len(shapes) == 161
    assert sum(int(numpy.prod(shape)) for shape in shapes) == 25_557_032  # as PyTorch's model counts
    assert shapes[0] == (64, 3, 7, 7) and shapes[-2:] == [(1000, 2048), (1000,)]
    assert sum(len(shape) == 4 for shape in shapes) == 53


def test_json_has_facts_and_figures(figures):
    assert figures['facts']['cores'] >= 1 and figures['facts']['versions']['mxnet']
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
    output, _ = run('--case', 'first_step', '--optimizers', 'sgd_torch', 'sgld', '--json', str(path),
                    GLUON_OPTIM_CACHE=str(elsewhere))
    found = {(row['framework'], row['rule']): row for row in json.loads(path.read_text())['first_step']}
    expected = {('mxnet', 'sgd_torch'), ('mxnet', 'sgld')}  # PyTorch has no such noise
    assert set(found) == (expected | {('torch', 'sgd_torch')} if importlib.util.find_spec('torch') else expected)
    for (framework, rule), row in found.items():
        parts = [row[state][part] for state in ('cold', 'warm') for part in ('framework', 'ours')]
        assert min(part[unit] for part in parts for unit in ('seconds', 'cpu')) > 0
        line = next(line for line in output.splitlines() if line.startswith(f'{framework} {rule} '))
        assert f'{row["cold"]["ours"]["seconds"]:.2f} (' in line
    assert not elsewhere.exists()  # the user's own cache is neither used nor filled
    cold, warm = (found['mxnet', 'sgd_torch'][state]['ours']['cpu'] for state in ('cold', 'warm'))
    assert cold > warm


def test_float16_counts_masters(tmp_path):
    output, _ = run('--case', 'tiny', '--rounds', '1', '--dtype', 'float16', '--optimizers', 'novograd', '--peers', 'mxnet:adam',
                    'mxnet:sgd', '--json', str(tmp_path / 'figures.json'))
    assert 'tiny, float16: 3 tensors' in output and 'gluon_optim:novograd Trainer' in output
    found = {name: row['bytes'] / 1211 for (name, _), row in rows(json.loads((tmp_path / 'figures.json').read_text())).items()}
    assert found == {'gluon_optim:novograd': 2 + 2 + 8 + 8, 'mxnet:adam': 2 + 2 + 8 + 16, 'mxnet:sgd': 2 + 2 + 8 + 8}


def test_peers_of_another_python_take_turns(tmp_path, bench):
    """The server is this very Python: peers behave there as here, and an unknown one says why it is missing."""
    pytest.importorskip('torch')
    data = bench.Data([(20, 3), (5,)])
    server = bench.bench_peers.Server(sys.executable, data)
    try:
        assert server.versions['numpy'] == numpy.__version__
        competitor, why = server.build('torch_default:sgd')
        assert why == '' and competitor.slots == 1
        assert competitor.problem(None) == 'the weights have not changed'  # not since it was built
        assert all(seconds > 0 for seconds in competitor.turn())
        assert competitor.problem(None) == ''
        assert server.build('nobody:novograd') == (None, "KeyError: 'nobody:novograd'")
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


@pytest.mark.parametrize('arguments, message', [
    (['--optimizers', 'novgrad'], "nothing matches 'novgrad'"),
    (['--peers', 'jax:*'], "nothing matches 'jax:*'"),
    (['--peer-python', 'no/such/python'], "--peer-python must be an executable Python. Received: 'no/such/python'."),
    (['--rounds', '0'], '--rounds must be at least 1. Received: 0.'),
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
