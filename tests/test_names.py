"""What `import gluon_optim` offers, in every kind of install; and what it says where something is missing."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gluon_optim as go

NEEDS = {'torch': ['torch', 'to_torch', 'from_torch'], 'onnx': ['onnx', 'to_onnx', 'from_onnx'],
         'jax': ['optax', 'to_optax', 'from_optax'],
         'mxnet': [name for name, home in {**go._PUBLIC, **go._MODULES}.items()
                   if home.startswith('mxnet.') and name != 'register']}
LOOK = '''
import pydoc, sys, warnings
warnings.simplefilter('ignore')
import gluon_optim
for when in ('before', 'after'):  # what needs no import is known before, the rest after
    names = [name for name in dir(gluon_optim) if not name.startswith('__')]
    text = pydoc.render_doc(gluon_optim, renderer=pydoc.plaintext)
star = {}
exec('from gluon_optim import *', star)
print(sorted(name for name in star if not name.startswith('__')) == names == sorted(names), 'list_optimizers' in text, *names)
'''
# MXNet uses np.bool, which NumPy 1.24 has no longer: what happens there happens here
NEWER_NUMPY = "import numpy; numpy.__deprecated_attrs__.pop('bool')\n"
mxnet_here = pytest.mark.skipif(tuple(map(int, np.__version__.split('.')[:2])) >= (1, 24), reason='a NumPy that MXNet takes')


def python(code, *options):
    done = subprocess.run([sys.executable, *options, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def looked_at(before=''):
    same, helped, *names = python(before + LOOK).split()
    assert (same, helped) == ('True', 'True')
    return set(names)


@pytest.mark.parametrize('without', [[], ['mxnet'], list(NEEDS)], ids='-'.join)
def test_help_dir_and_star_show_the_names_that_work_here(without):
    names = looked_at(f'import sys\nfor name in {without}: sys.modules[name] = None\n')
    public = {*go._PUBLIC, *go._MODULES}
    assert names <= public
    for package in without:
        assert names.isdisjoint(NEEDS[package])
    assert names >= public - {name for needed in NEEDS.values() for name in needed}  # `register` is among these
    installed = [package for package in NEEDS if package not in without and importlib.util.find_spec(package)]
    assert names >= {name for package in installed for name in NEEDS[package]}


@mxnet_here
def test_mxnet_under_a_newer_numpy():
    pytest.importorskip('mxnet')
    assert looked_at(NEWER_NUMPY).isdisjoint(NEEDS['mxnet'])


@pytest.mark.parametrize('before', ["import sys; sys.modules['mxnet'] = None\n",
                                    pytest.param(NEWER_NUMPY, marks=mxnet_here)], ids=['missing', 'newer NumPy'])
def test_every_way_to_mxnet_says_what_to_install(before):
    if 'numpy' in before:
        pytest.importorskip('mxnet')
    said = python(before + f'''
import importlib, warnings
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter('always', RuntimeWarning)
    import gluon_optim as go
ours = [str(each.message) for each in warned if 'gluon_optim.mxnet' in str(each.message)]
print(ours[0] if ours else '-')
for name in {NEEDS['mxnet']}:
    try:
        getattr(go, name)
    except ImportError as error:
        print(error)
try:
    from gluon_optim import save_states
except ImportError as error:
    print(error)
try:
    import gluon_optim.mxnet.trainer
except ImportError as error:
    print(error)
hypers = go.Hyper('learning_rate', 1.0, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)')
go.register(type('Mine', (go.Rule,), {{
    'name': 'mine', 'summary': 'mine', 'hypers': hypers, 'slots': staticmethod(lambda h: ()),
    'coefficients': staticmethod(lambda xp, h, t: {{'lr': h.learning_rate, 'wd': h.wd}}),
    'step': staticmethod(lambda xp, h, c, w, g, s: (w - c.lr * (g + c.wd * w), {{}}))}}))
print('mine' in go.list_optimizers())
''').splitlines()
    assert said[0] == '-' if 'None' in before else said[0].endswith('The parts that do not need MXNet still work.')
    assert len(said) == len(NEEDS['mxnet']) + 4 and said[-1] == 'True'
    for line in said[1:-1]:
        assert line.startswith('gluon_optim.mxnet needs MXNet, and importing it failed: '), line
        assert line.endswith('MXNet 1.9.1 needs Python 3.8 to 3.11 and NumPy below 1.24: pip install mxnet==1.9.1 "numpy<1.24".')


@pytest.mark.parametrize('room, package, extra', [('torch', 'torch', 'torch'), ('onnx', 'onnx', 'onnx'), ('optax', 'jax', 'optax')])
def test_the_cause_of_a_failing_import_is_shown(tmp_path, room, package, extra):
    """As chex, which optax needs, imports typing_extensions, which nothing brings."""
    (tmp_path / f'{package}.py').write_text('import package_that_nothing_brings\n')
    said = python(f'import sys; sys.path.insert(0, {str(tmp_path)!r})\ntry:\n    import gluon_optim.{room}\n'
                  'except ImportError as error:\n    print(error)', '-W', 'ignore')
    assert "No module named 'package_that_nothing_brings'" in said and f"pip install '.[{extra}]'" in said


def test_python_without_docstrings(tmp_path):
    """MXNet itself cannot be imported under -OO; all that needs no MXNet works, and errors and `info` say as much as they can."""
    saved = Path(__file__).parent / 'legacy/1.9.1/adam-scheduled.states'
    said = python(f'''
import warnings
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter('always', RuntimeWarning)
    import gluon_optim as go
print(all('use -O.' in str(each.message) for each in warned if 'gluon_optim.mxnet' in str(each.message)))
from gluon_optim import cli
from gluon_optim.states.container import TENSOR
from gluon_optim.states.manifest import check_record
print([cli.main(command) for command in (['list'], ['info', 'novograd'], ['inspect', {str(saved)!r}], ['verify', {str(saved)!r}],
                                         ['convert', {str(saved)!r}, '--to', 'mxnet', '-o', {str(tmp_path / 'new')!r}])])
try:
    check_record(dict.fromkeys(TENSOR), TENSOR, 'a tensor')
except ValueError as error:
    print(error)
''', '-OO')
    assert said.startswith('True\n') and '[0, 0, 0, 0, 0]' in said and 'docstrings' in said
    assert ' of a tensor must be ' in said and 'must be .' not in said
