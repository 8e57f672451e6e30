"""The documentation: what each public name's docstring says, and the pages that tools/docs makes of it. Needs no Sphinx."""
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import gluon_optim as go

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

import docs_pages  # noqa: E402

PACKAGE = docs_pages.PACKAGE
DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def importable(module):
    """A public module, or None where the framework that it is for is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def public():
    """Every public name that can be had in this environment: (module, name)."""
    modules = [PACKAGE, *(f'{PACKAGE}.{name}' for name in docs_pages.MODULES)]
    return [(module, name) for module in modules if importable(module) for name in docs_pages.public_names(module)]


def value_of(module, name):
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize('module, name', public())
def test_a_public_name_has_an_example_and_says_what_it_raises(module, name):
    value = value_of(module, name)
    if not callable(value):
        return  # its page shows it
    text = inspect.getdoc(value)
    assert '>>> ' in text, 'no example'
    assert re.search('[Rr]aise', text), 'nothing about errors'


@pytest.mark.parametrize('module, name', public())
def test_a_public_name_says_what_its_parameters_are(module, name):
    """Its docstring does, or that of a function to which it refers."""
    value = value_of(module, name)
    if not callable(value):
        return
    text = inspect.getdoc(value)
    missing = {each for each in inspect.signature(value).parameters if not re.search(rf'\b{each}\b', text)}
    for other in re.findall(r'(?<!`)`(\w+)`(?!`)', text) if missing else ():
        text = inspect.getdoc(getattr(importlib.import_module(module), other, None)) or ''
        missing -= {each for each in missing if re.search(rf'\b{each}\b', text)}
    assert not missing


@pytest.mark.parametrize('name', docs_pages.MODULES)
def test_a_public_module_has_an_example(name):
    module = importable(f'{PACKAGE}.{name}')
    if module is None:
        pytest.skip(f'{name} is not installed')
    assert '>>> ' in module.__doc__


def test_every_public_name_has_a_page():
    if not all(importable(f'{PACKAGE}.{name}') for name in docs_pages.MODULES):
        pytest.skip('not all frameworks are installed')
    paths = [path for path, _ in docs_pages.pages()]
    assert len(paths) == len(set(paths))
    for module, name in public():
        assert f'api/{module}.{name}.rst' in paths
    for name in go.list_optimizers():
        assert f'optimizers/{name}.md' in paths


def test_the_page_of_a_function_shows_what_it_returns():
    pytest.importorskip('mxnet')
    text = docs_pages.api_page(PACKAGE, 'load_checkpoint')
    assert '.. autofunction:: load_checkpoint' in text
    assert 'Restored' in text  # not public: described where it is returned


@pytest.mark.parametrize('name', go.list_optimizers())
def test_the_page_of_an_optimizer(name):
    """Formula, arguments, state, errors, and an example that was run."""
    pytest.importorskip('mxnet')
    pytest.importorskip('torch')
    text = docs_pages.optimizer_page(name)
    info = go.optimizer_info(name)
    formula = info.formula.splitlines()[0]
    assert f'    {formula}\n' in text
    for hyper in info.hypers:
        assert f'| `{hyper.name}` | `{hyper.default!r}` |' in text
    for slot in info.slots:
        assert f'| `{slot.name}` | ' in text
    assert 'ValueError: `' in text and 'TypeError: ' in text
    example = text.partition('## Example')[2]
    assert '>>> trainer = gluon.Trainer(' in example
    assert re.search(r'>>> net\.weight\.data\(\)\.asnumpy\(\)\narray\(', example)
    assert re.search(r'states\.slots\[.weight.\]\n\(3, ', example)


def test_an_example_that_fails_is_an_error():
    assert docs_pages.executed('Two:\n\n>>> 1 + 1\n\nThen:\n\n>>> x = 2\n') == (
        'Two:\n\n```pycon\n>>> 1 + 1\n2\n```\n\nThen:\n\n```pycon\n>>> x = 2\n```')
    with pytest.raises(RuntimeError, match='ZeroDivisionError'):
        docs_pages.executed('>>> 1 / 0\n')


def test_every_command_has_sessions():
    assert set(docs_pages.commands()) == set(docs_pages.SESSIONS)


def test_the_page_of_a_command():
    pytest.importorskip('mxnet')
    text = docs_pages.command_page('inspect')
    assert 'usage: gluon-optim inspect' in text
    assert re.search(r'\$ gluon-optim inspect run/step-20\.safetensors\nrun/step-20\.safetensors: checkpoint', text)
    with pytest.raises(RuntimeError, match='failed with code 2'):
        docs_pages.session('gluon-optim inspect not-there.states')


def test_pages_of_names_that_are_gone_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_pages, 'pages', lambda: [('api/index.rst', lambda: 'new\n')])
    (tmp_path / 'api').mkdir()
    (tmp_path / 'api/gone.rst').write_text('old\n')
    docs_pages.write(tmp_path)
    assert [path.name for path in tmp_path.rglob('*.rst')] == ['index.rst']


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    """As a repository host shows them; the site's own pages do not exist there."""
    for link in re.findall(r'\]\((?!https?:|reference/)([^)#\s]*)(?:#[^)]*)?\)', document.read_text(encoding='utf-8')):
        assert (document.parent / link).exists(), link


def test_the_lines_on_the_first_page_run(tmp_path, monkeypatch):
    pytest.importorskip('mxnet')
    monkeypatch.chdir(tmp_path)
    text = (ROOT / 'docs/index.md').read_text(encoding='utf-8')
    code = re.search('## Ten lines\n\n```python\n(.*?)```', text, re.DOTALL).group(1)
    exec(compile(code, 'docs/index.md', 'exec'), {})  # noqa: S102
    assert (tmp_path / 'run/step-300.safetensors').exists()


def test_the_notebook_holds_what_it_printed():
    """tools/docs runs it anew; here only that the committed one was run from its first cell to its last."""
    cells = json.loads((ROOT / 'docs/notebooks/digits.ipynb').read_text(encoding='utf-8'))['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell['outputs']]
    assert not [output for output in outputs if output['output_type'] == 'error']
    assert 'same weights:  True' in ''.join(''.join(output.get('text', '')) for output in outputs)
