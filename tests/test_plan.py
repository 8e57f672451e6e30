"""gluon-optim plan: figures found by hand, what it prints and what it refuses. Needs no MXNet; test_plan_measured.py does."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import refused

from gluon_optim import rules
from gluon_optim.rules.planning import Process, Setting, plan
from gluon_optim.schema import Slot


def setting(name='adamw', params=1000, tensors=10, given=None, **options):
    rule = rules.get(name)
    return Setting(rule, rule.hyperparameters(**given or {}), params, tensors, **options)


@pytest.mark.parametrize('name, given, options, states', [
    ('adamw', {}, {}, {'slots': 8000}),
    ('adamw', {'amsgrad': True}, {}, {'slots': 12000}),
    ('novograd', {}, {}, {'slots': 4040}),                              # one number for each of 10 tensors
    ('sgd_torch', {}, {}, {}),
    ('sgd_torch', {'momentum': 0.9}, {}, {'slots': 4000}),
    ('adamw', {}, {'dtype': 'float16'}, {'slots': 8000}),
    ('adamw', {}, {'dtype': 'float16', 'multi_precision': True}, {'slots': 8000, 'masters': 4000}),
    ('adamw', {}, {'dtype': 'float16', 'multi_precision': 'kahan'}, {'slots': 8000, 'compensation': 2000}),
    ('adam', {}, {'dtype': 'float16', 'multi_precision': True}, {'slots': 8000, 'masters': 4000}),
])
def test_one_process(name, given, options, states):
    found = plan(setting(name, given=given, **options))
    size = 2000 if 'dtype' in options else 4000
    assert found.worker == Process({'weights': size, 'gradients': size, **states})
    assert found.checkpoint == {'weights': size, **states}
    assert found.server is None


def test_every_optimizer_has_a_plan():
    for name in rules.list_optimizers():
        rule = rules.get(name)
        h = rule.hyperparameters()
        arrays = rule.run(np, h, 1, np.ones(50, 'float32'), np.ones(50, 'float32'),
                          {slot.name: np.ones(slot.shape((50,)), 'float32') for slot in rule.slots(h)}
                          )[1] if rule.lowerable and not rule.needs and not rule.supplied else None
        found = plan(setting(name, 50, 1)).checkpoint.get('slots', 0)
        assert arrays is None or found == 4 * sum(np.size(array) for array in arrays.values()), name


def test_servers_that_have_whole_tensors():
    """Four tensors of 10: the keys 0 to 3 are on the servers 0, 1, 2 and 0 of three, for 9973 % 3 is 1."""
    found = plan(setting('novograd', 40, 4, workers=2, servers=3, bound=100))
    assert found.elements == (10, 20)
    assert found.worker == Process({'weights': 160, 'gradients': 160}, in_flight=160, messages=2 * (4 + 3), sent=160,
                                   received=160 + 3 * 396)
    assert found.server == Process({'weights': 80, 'sums of gradients': 80, 'slots': 80 + 2 * 4}, in_flight=2 * 2 * 80,
                                   messages=2 * 2 * (2 + 1), sent=2 * (80 + 396), received=2 * 80)
    assert found.checkpoint == {'weights': 160, 'slots': 160 + 4 * 4}


def test_servers_that_have_parts():
    """Four tensors of 250 are cut in 83, 84 and 83."""
    options = dict(params=1000, tensors=4, workers=2, servers=3, bound=250)
    found = plan(setting(**options))
    assert found.elements == (332, 336)
    assert found.server.kept == {'weights': 1344, 'sums of gradients': 1344, 'slots': 2688}
    assert (found.worker.messages, found.server.messages) == (2 * (12 + 3), 2 * 2 * (4 + 1))
    half = plan(setting(**options, dtype='float16', multi_precision=True))
    assert half.server.kept == {'weights': 672, 'sums of gradients': 1344, 'a converted gradient': 1344, 'slots': 2688,
                                'masters': 1344}
    assert half.worker.kept == {'weights': 2000, 'gradients': 2000}
    assert half.checkpoint == {'weights': 2000, 'slots': 8000, 'masters': 4000}
    assert (half.worker.sent, half.worker.received) == (2000, 2000 + 3 * 4 * 249)
    assert plan(setting(**options, dtype='float16', multi_precision='kahan')) == half
    alone = plan(setting(**dict(options, workers=1), dtype='float16', multi_precision=True))
    assert 'a converted gradient' not in alone.server.kept


def test_servers_that_add_up_gradients_only():
    found = plan(setting(tensors=4, workers=2, servers=2, bound=100, updates=False, dtype='float16', multi_precision=True))
    assert found.worker == Process({'weights': 2000, 'gradients': 2000, 'slots': 8000, 'masters': 4000}, in_flight=2000,
                                   messages=2 * 8, sent=2000, received=2000)
    assert found.server == Process({'weights': 1000, 'sums of gradients': 1000}, in_flight=4000, messages=2 * 2 * 4, sent=2000,
                                   received=2000)


def test_a_billion_parameters_on_64_servers():
    found = plan(setting(params=10 ** 9, tensors=100, workers=16, servers=64, dtype='float16', multi_precision=True))
    assert found.elements == (15625000, 15625000)
    assert sum(found.server.kept.values()) == 22 * 15625000
    assert found.server.received == 16 * 2 * 15625000


def test_json_has_what_the_table_shows(run):
    arguments = ('plan', '--params', '1e9', '--optimizer', 'AdamW', '--dtype', 'float16', '--multi-precision', '--workers', '16',
                 '--servers', '64')
    code, out, err = run(*arguments, '--json')
    assert (code, err) == (0, '')
    said = json.loads(out)
    assert said['setting']['rule'] == 'adamw' and said['setting']['params'] == 10 ** 9 and said['setting']['tensors'] == 100
    assert said['server']['kept'] == {'weights': 31250000, 'sums of gradients': 62500000, 'a converted gradient': 62500000,
                                      'slots': 125000000, 'masters': 62500000, 'together': 343750000}
    assert said['worker']['messages'] == 2 * (100 * 64 + 64) and said['worker']['sent'] == 2 * 10 ** 9
    assert said['elements'] == {'least': 15625000, 'most': 15625000}
    assert said['checkpoint']['together'] == 14 * 10 ** 9
    code, out, err = run(*arguments)
    assert (code, err) == (0, '')
    lines = [line.rsplit('  ') for line in out.splitlines()]
    assert lines[0][0] == 'adamw, 1000000000 parameters in 100 tensors, float16 with masters; 16 workers, 64 servers'
    cells = {words[0]: words[1:] for words in ([word.strip() for word in line if word.strip()] for line in lines[2:])}
    assert cells['together'] == ['4.0 GB', '343.8 MB', '14.0 GB']
    assert cells['masters'] == ['62.5 MB', '4.0 GB'] and cells['messages in a step'] == ['12928', '3232']


def test_the_documentation_shows_what_is_printed(run):
    text = (Path(__file__).resolve().parent.parent / 'docs/DISTRIBUTED.md').read_text(encoding='utf-8')
    command = re.search('^gluon-optim (plan .*)$', text, re.MULTILINE)[1]
    assert ''.join(f'    {line}\n' for line in run(*command.split())[1].splitlines()) in text


def test_a_table_of_one_process_has_no_traffic(run):
    code, out, err = run('plan', '--params', '10', '--optimizer', 'sgd_torch', '--set', 'momentum=0.9')
    assert (code, err) == (0, '')
    assert [line.split() for line in out.splitlines()[1:]] == [
        ['process', 'on', 'disk'], ['weights', '40', 'B', '40', 'B'], ['gradients', '40', 'B'], ['slots', '40', 'B', '40', 'B'],
        ['together', '120', 'B', '80', 'B']]


def test_a_table_says_which_server_it_shows(run):
    out = run('plan', '--params', '40', '--tensors', '4', '--optimizer', 'adamw', '--servers', '3')[1]
    assert out.splitlines()[-1] == 'Servers hold 10 to 20 elements; the figures are those of the fullest.'


@pytest.mark.parametrize('arguments, words', [
    (['--params', '0'], ['--params must be 1 or more', 'Received: 0.']),
    (['--tensors', '1001'], ['--tensors must be at most --params', '1001 and 1000']),
    (['--tensors', '0'], ['--tensors must be 1 or more', 'Received: 0.']),
    (['--workers', '2'], ['--workers above 1 go with --servers', 'Pass --servers 1']),
    (['--workers', '0', '--servers', '1'], ['--servers go with --workers']),
    (['--workers', '-1'], ['--workers must be 0 or more', 'Received: -1.']),
    (['--update-on-kvstore', 'no'], ['--update-on-kvstore goes with --servers']),
    (['--bigarray-bound', '100'], ['--bigarray-bound goes with --servers']),
    (['--servers', '2', '--bigarray-bound', '32'], ['--bigarray-bound must be 33 or more', 'Received: 32.']),
    (['--multi-precision'], ['--multi-precision is for float16', 'float32']),
    (['--optimizer', 'adam', '--dtype', 'float16'], ['float32 masters only', 'no masters', 'Pass --multi-precision.']),
    (['--optimizer', 'novogard'], ["Did you mean 'novograd'"]),
    (['--set', 'beta1=2'], ['`beta1` must be in', '2']),
    (['--set', 'beta1=0.5', '--set', 'beta1=0.9'], ['--set beta1 must be given once', '0.5, 0.9']),
    (['--set', 'momentum=0.9'], ["Unknown argument of adamw 'momentum'"]),
    (['--optimizer', 'nadam', '--servers', '1'], ['one schedule of the momentum', 'Pass --update-on-kvstore no']),
    (['--optimizer', 'novograd', '--servers', '2', '--bigarray-bound', '50', '--tensors', '10'],
     ['takes norms of whole parameters', '2 servers, a bound of 50', 'MXNET_KVSTORE_BIGARRAY_BOUND=101']),
])
def test_what_is_refused(run, arguments, words):
    given = {'--params': '1000', '--optimizer': 'adamw'}
    defaults = [word for option, value in given.items() if option not in arguments for word in (option, value)]
    refused(run('plan', *defaults, *arguments), 2, *words)


@pytest.mark.parametrize('arguments, words', [
    (['--params', '1.5'], "must be a whole number, such as 1000 or 1e9. Received: '1.5'"),
    (['--params', 'inf'], "Received: 'inf'"),
    (['--params', '1', '--set', 'momentum'], 'must be NAME=VALUE'),
    (['--params', '1', '--multi-precision', 'yes'], "takes 'kahan', or nothing for masters"),
])
def test_what_cannot_be_read(run, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        run('plan', '--optimizer', 'adamw', *arguments)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_slots_that_depend_on_shapes_are_refused():
    class Rows(rules.get('sgd_torch')):
        slots = staticmethod(lambda h: (Slot('each', like='rows'),))

    with pytest.raises(ValueError, match="'each' has one number for each of the rows"):
        plan(setting()._replace(rule=Rows))
