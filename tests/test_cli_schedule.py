"""gluon-optim schedule: tables, records and pictures of learning rates, without MXNet."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import refused

import gluon_optim as go
from gluon_optim.schedules.base import Wrapper
from gluon_optim.schedules.catalog import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
GIVEN = {'inverse_time': ['--base-lr', '0.4', '--decay', '1', '--steps-per-epoch', '50'],
         'interval_inverse_time': ['--base-lr', '0.4', '--decay', '1', '--interval', '50'], 'step': ['--step', '50'],
         'multi_step': ['--step', '50,80'], 'exponential': ['--factor', '0.99'], 'polynomial': ['--max-update', '100'],
         'linear': ['--max-update', '100'], 'cosine': ['--max-update', '100'], 'cosine_restarts': ['--step', '40'],
         'one_cycle': ['--max-update', '100'], 'piecewise': ['--step', '50', '--factor', '1,0.5'],
         'plateau': ['--metrics', '3,2,2,2,nan', '--every', '20', '--patience', '0']}
DRAWN = [schedule for schedule in SCHEDULES if not issubclass(schedule, Wrapper)]


def test_the_list(run):
    code, out, err = run('schedule')
    assert (code, err) == (0, '')
    assert [line.split()[0] for line in out.splitlines()] == [schedule.name.replace('_', '-') for schedule in SCHEDULES]
    assert json.loads(run('schedule', '--json')[1]) == {schedule.name: schedule.summary for schedule in SCHEDULES}


@pytest.mark.parametrize('schedule', DRAWN, ids=lambda schedule: schedule.name)
def test_every_schedule_and_all_of_its_arguments(run, schedule):
    """What is printed is the record that Python takes, with the rates of its updates."""
    name = schedule.name.replace('_', '-')
    code, out, err = run('schedule', name, *GIVEN.get(schedule.name, []), '--json')
    assert (code, err) == (0, '')
    said = json.loads(out)
    assert said['rates'] == [go.rate(said['schedule'], t) for t in said['updates']]
    assert said['updates'][0] == 1 and sorted(set(said['updates'])) == said['updates'] and len(said['updates']) in (12, 13)
    code, out, _ = run('schedule', name, *GIVEN.get(schedule.name, []))
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ['update', 'rate'] and [int(line[0]) for line in table[1:]] == said['updates']
    assert [float(line[1]) for line in table[1:]] == pytest.approx(said['rates'], rel=1e-5)
    with pytest.raises(SystemExit):
        run('schedule', name, '--help')


def test_help_has_the_formula_and_every_argument(run, capsys):
    with pytest.raises(SystemExit):
        run('schedule', 'one-cycle', '--help')
    said = capsys.readouterr().out
    assert 'b + (a - b) (1 + cos(pi s)) / 2' in said and '``' not in said
    for option in ('--max-update N', '--base-lr X', '--pct-start X', '--anneal-strategy {cos,linear}', '--three-phase',
                   '--warmup-steps N', '--warmup-kind {linear,constant,power2,sqrt}', '--batch-size N', '--reference N'):
        assert option in said


def test_values_arrive(run):
    given = ['--max-update', '50', '--base-lr', '0.8', '--pct-start', '0.4', '--anneal-strategy', 'linear', '--div-factor', '5',
             '--final-div-factor', '7', '--three-phase', '--warmup-steps', '4', '--warmup-begin', '0.01', '--warmup-kind', 'sqrt',
             '--batch-size', '6', '--reference', '2']
    scaled = json.loads(run('schedule', 'one-cycle', *given, '--json')[1])['schedule']
    warm = scaled['attributes'].pop('schedule')
    cycle = warm['attributes'].pop('schedule')
    assert scaled['class'].endswith('.Scaled') and scaled['attributes'] == dict(batch_size=6, reference=2)
    assert warm['class'].endswith('.Warmup') and warm['attributes'] == dict(steps=4, begin=0.01, kind='sqrt')
    assert cycle['attributes'] == dict(max_update=50, base_lr=0.8, pct_start=0.4, anneal_strategy='linear', div_factor=5.0,
                                       final_div_factor=7.0, three_phase=True)


def test_the_updates_of_the_table(run):
    assert json.loads(run('schedule', '--json', 'constant', '--at', '7,3,1000000')[1])['updates'] == [7, 3, 1000000]
    assert json.loads(run('schedule', 'constant', '--steps', '3', '--json')[1])['updates'] == [1, 2, 3]
    assert json.loads(run('schedule', 'cosine', '--max-update', '100', '--json')[1])['updates'][-1] == 111


@pytest.mark.parametrize('arguments, words', [
    (['cosine', '--max-update', '-3'], ['`max_update`', '1 or more', '-3']),
    (['cosine', '--max-update', '9', '--base-lr', '-1'], ['`base_lr`', '[0, inf)']),
    (['multi-step', '--step', '5,3'], ['`step`', '5 before 3']), (['constant', '--at', '0'], ['--at', '1 or more']),
    (['constant', '--steps', '0'], ['--steps', '1 or more']), (['constant', '--warmup-kind', 'sqrt'], ['--warmup-steps']),
    (['constant', '--reference', '2'], ['--batch-size']), (['constant', '--plot', 'x.txt'], ["'.png', '.svg', '.pdf'"]),
    (['constant', '--steps', '10000000', '--plot', 'x.png'], ['1000000']), (['plateau', '--every', '0'], ['--every']),
    (['cosine', '--max-update', '9', '--warmup-steps', '5', '--warmup-begin', '-0.2'], ['`begin`', '[0, inf)']),
    (['plateau', '--metrics=-inf'], ['metric'])])
def test_what_cannot_be_shown_is_refused(run, arguments, words):
    refused(run('schedule', *arguments), 2, *words)


@pytest.mark.parametrize('arguments, said', [
    (['cosin'], 'Did you mean cosine?'), (['cosine'], '--max-update'), (['cosine', '--max-update', 'x'], "'x'"),
    (['multi-step', '--step', '5,x'], "Received: '5,x'"), (['constant', '--base-rl', '1'], 'Did you mean --base-lr?'),
    (['warmup'], "invalid choice: 'warmup'")])
def test_options_that_are_none(arguments, said):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'gluon_optim.cli', 'schedule', *arguments], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (2, '') and said in done.stderr


def test_a_picture(run, tmp_path):
    pytest.importorskip('matplotlib')
    code, out, err = run('schedule', 'cosine', '--max-update', '100', '--plot', 'rates.png')
    assert code == 0 and err == 'picture: rates.png\n' and out.startswith('  update  rate')
    assert (tmp_path / 'rates.png').read_bytes().startswith(b'\x89PNG')
    assert run('schedule', 'cosine', '--max-update', '100', '--plot', 'rates.svg')[0] == 0
    assert (tmp_path / 'rates.svg').read_text().count('<g id="axes_') == 1
    refused(run('schedule', 'constant', '--plot', 'no/folder/x.png'), 1, "No such file or directory: 'no/folder/x.png'")
    (tmp_path / 'folder.png').mkdir()
    refused(run('schedule', 'constant', '--plot', 'folder.png'), 1, "Is a directory: 'folder.png'")


def test_it_works_without_mxnet_and_matplotlib(tmp_path):
    code = ("import sys\nfor name in ('mxnet', 'matplotlib'): sys.modules[name] = None\n"
            'from gluon_optim import cli\nsys.exit(cli.main(sys.argv[1:]))')

    def process(*arguments):
        return subprocess.run([sys.executable, '-c', code, 'schedule', *arguments], cwd=str(tmp_path), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env={'PYTHONPATH': str(ROOT)})

    assert 'inverse-time' in process().stdout
    assert process('constant', '--steps', '2').stdout == '  update  rate\n  1       0.01\n  2       0.01\n'
    done = process('constant', '--plot', 'x.png')
    assert done.returncode == 1 and "pip install '.[plot]'" in done.stderr


def test_a_record_is_made_by_any_spelling_of_the_name():
    record = go.schedules.record
    assert record('CosineRestarts', step=3) == record('cosine_restarts', step=3) == record('cosine-restarts', step=3)
    for name, error, said in (('cosin', ValueError, "Did you mean 'cosine'"), (3, TypeError, 'must be a string')):
        with pytest.raises(error, match=said):
            record(name)
    for arguments, error, said in ((dict(), TypeError, "needs the arguments 'max_update'"),
                                   (dict(max_update=0), ValueError, '`max_update`'),
                                   (dict(max_update=9, pwr=2), TypeError, "Unknown argument of cosine 'pwr'")):
        with pytest.raises(error, match=said):
            record('cosine', **arguments)
    warm = record('warmup', schedule=record('multi_step', step=[3, 5]), steps=4)
    assert json.loads(json.dumps(warm)) == warm
    assert go.rate(warm, np.array([1, 4, 6, 7, 8])).round(5).tolist() == [0.0025, 0.01, 0.01, 0.001, 0.001]
