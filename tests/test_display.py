"""What objects show of themselves fits a screen, and nothing in a file becomes HTML."""
import numpy as np
import pytest

import gluon_optim as go
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight

NAMES = [f'features.{k}.<script>' for k in range(300)]
INFOS = [ParameterInfo(name, name, (3, 4), 'float32') for name in NAMES]
WEIGHT = np.zeros((3, 4), 'float32')


def load_report():
    trainer = pytest.importorskip('gluon_optim.mxnet.trainer')
    return trainer.LoadReport(300, 7, NAMES, NAMES, NAMES, [f'{name} differs' for name in NAMES], NAMES, ['a warning'] * 300)


def param_groups():
    groups = pytest.importorskip('gluon_optim.mxnet.groups')
    return groups.ParamGroups([groups.Group(0.5 ** k, 1.0, tuple(NAMES[:50]), tuple(NAMES), 10) for k in range(60)])


OBJECTS = {
    'groups': param_groups,
    'states': lambda: OptimizerStates('adamw', {f'hyper{k}': k for k in range(100)}, 3, INFOS, {}, {
        name: {'mean': WEIGHT} for name in NAMES}, report=['line'] * 300),
    'run': lambda: Run([Weight(name, name, [WEIGHT]) for name in NAMES], step=3, extra={'x': list(range(10000))}),
    'model': lambda: go.model_to_torch({f'{k}.gamma': WEIGHT[0] + k for k in range(300)}),
    'report': load_report,
    **{name: lambda name=name: go.optimizer_info(name) for name in ('novograd', 'adam', 'lbsgd')},
}


@pytest.mark.parametrize('name', OBJECTS)
def test_it_fits_a_screen(name):
    if name in ('groups', 'report'):
        pytest.importorskip('mxnet')
    shown = OBJECTS[name]()
    lines = repr(shown).splitlines()
    assert 1 <= len(lines) <= 20 and max(map(len, lines)) <= 180, repr(shown)
    html = shown._repr_html_()
    assert html.startswith('<div><b>') and html.count('<tr>') <= 20 and '<script>' not in html and len(html) < 6000


def test_what_is_known_at_a_glance():
    assert repr(OBJECTS['states']()) == '<OptimizerStates: adamw at update 3, 300 parameters>'
    assert repr(OBJECTS['run']()).startswith('<Run: 300 weights>\n  position  step 3\n  extra     {')
    assert 'paper      arXiv:1905.11286' in repr(go.optimizer_info('novograd'))
    assert '300 arrays' in repr(OBJECTS['model']()) and 'the dictionary' in repr(OBJECTS['model']())
