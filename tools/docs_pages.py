"""Write the documentation's reference pages: one for each public name, optimizer and command.

    python tools/docs_pages.py docs/reference

docs/conf.py does this at each build. Everything is taken from the declarations, and the examples are run.
"""
import argparse
import contextlib
import doctest
import importlib
import inspect
import io
import os
import re
import shlex
import tempfile
import textwrap
import traceback
import typing
from pathlib import Path
from types import ModuleType
from unittest import mock

from make_tables import FOREIGN, conversion, memory, reason

import gluon_optim as go
from gluon_optim import cli, rules

PACKAGE = go.__name__
MODULES = sorted(go._MODULES.values())  # within the package, where their names there may be shorter


# Public names

def public_names(module=PACKAGE):
    """The names in a module that get a page: those in its ``__all__`` that the package itself does not export."""
    if module == PACKAGE:
        return sorted(go._PUBLIC)
    names = getattr(importlib.import_module(module), '__all__', ())
    return sorted(name for name in names if not f'{PACKAGE}.{go._PUBLIC.get(name, "")}.'.startswith(f'{module}.'))


def homes(path):
    """The public modules, the package included, that hold the module ``path``; the nearest first."""
    return [name for name in (*(f'{PACKAGE}.{name}' for name in MODULES), PACKAGE) if f'{path}.'.startswith(f'{name}.')]


def shown(path):
    """The path of a module, or of a name in it, as users write it after ``go.``."""
    for name, module in go._MODULES.items():
        if f'{path}.'.startswith(f'{PACKAGE}.{module}.'):
            return name + path[len(f'{PACKAGE}.{module}'):]
    return path[len(PACKAGE) + 1:]


def has_page(cls):
    """Whether a class is public, in the package or in its own module."""
    return any(cls.__name__ in public_names(module) for module in homes(cls.__module__))


def first_sentence(value):
    """The first sentence of a docstring; of a value that is neither class nor function, nor a module, its type."""
    if not (isinstance(value, ModuleType) or callable(value)):
        return f'a {type(value).__name__}'
    paragraph = ' '.join((inspect.getdoc(value) or '').split('\n\n')[0].split())
    return re.split(r'(?<=\.) ', paragraph)[0].rstrip(':.')


def own_classes(value, found=()):
    """The classes of this package in what a function returns, ``Tuple`` and ``Optional`` looked into."""
    for part in typing.get_args(value) or [value]:
        if typing.get_args(part):
            found = own_classes(part, found)
        elif isinstance(part, type) and part.__module__.startswith(PACKAGE + '.'):
            found = (*found, part)
    return found


def api_page(module, name):
    """One public name: its docstring, and those of the classes that it returns where they have no page of their own."""
    value = getattr(importlib.import_module(module), name)
    lines = [title(shown(f'{module}.{name}'), '='), f'.. currentmodule:: {module}\n']
    if inspect.isclass(value):
        lines.append(described(name, value))
    elif not callable(value):
        lines.append(f'.. data:: {name}\n\n   {", ".join(map(repr, value))}\n')
    else:
        lines.append(f'.. autofunction:: {name}\n')
        classes = own_classes(inspect.signature(value).return_annotation)
        lines += [described(f'{cls.__module__}.{cls.__qualname__}', cls) for cls in classes if not has_page(cls)]
    return '\n'.join(lines)


def described(path, cls):
    """A class with its public methods; the fields of a NamedTuple are told by its docstring."""
    fields = ', '.join(getattr(cls, '_fields', ()))
    return f'.. autoclass:: {path}\n   :members:\n' + (f'   :exclude-members: {fields}\n' if fields else '')


def module_page(name):
    """A public module: its docstring, and what it exports."""
    module = importlib.import_module(f'{PACKAGE}.{name}')
    lines = [title(shown(module.__name__), '='), f'.. automodule:: {module.__name__}\n']
    pages = [(f'{module.__name__}.{each}', getattr(module, each)) for each in public_names(module.__name__)]
    elsewhere = [each for each in getattr(module, '__all__', ()) if each not in public_names(module.__name__)]
    if pages:
        lines += [entries(pages), toctree([path for path, _ in pages], maxdepth=1, hidden=True)]
    if elsewhere:
        lines.append('Also here: ' + ', '.join(f':doc:`{each} <{PACKAGE}.{each}>`' for each in elsewhere) + '.\n')
    return '\n'.join(lines)


def api_index():
    """The list of all public names."""
    names = [(f'{PACKAGE}.{name}', getattr(go, name)) for name in public_names()]
    modules = [(f'{PACKAGE}.{name}', importlib.import_module(f'{PACKAGE}.{name}')) for name in MODULES]
    return '\n'.join([title('Python API', '='), '``import gluon_optim as go``. Every name has a page; its example is run by the '
                      'tests.\n', entries(names), title('Modules', '-'),
                      'Loaded when they are first used; the packages that they need are extras.\n', entries(modules),
                      toctree([path for path, _ in names + modules], maxdepth=1, hidden=True)])


# reStructuredText

def title(text, line):
    return f'{text}\n{line * len(text)}\n'


def entries(pages):
    """A table of links to pages, and what is on them."""
    rows = ''.join(f'   * - :doc:`{shown(path)} <{path}>`\n     - {plain(first_sentence(value))}\n'
                   for path, value in pages)
    return f'.. list-table::\n   :widths: 30 70\n\n{rows}'


def plain(text):
    """Text in which reStructuredText sees no markup except ``code``."""
    return ''.join(part if part.startswith('`') else re.sub(r'([*|_\\])', r'\\\1', part) for part in re.split('(`+[^`]+`+)', text))


def toctree(names, maxdepth=2, hidden=False):
    options = f'   :maxdepth: {maxdepth}\n' + '   :hidden:\n' * hidden
    return f'.. toctree::\n{options}\n' + ''.join(f'   {name}\n' for name in names)


# Optimizers

EXAMPLE = """
>>> import mxnet as mx
>>> from mxnet import autograd, gluon
>>> import gluon_optim as go
>>> net = gluon.nn.Dense(1, in_units=3, use_bias=False)
>>> net.initialize(mx.init.One())
>>> trainer = gluon.Trainer(net.collect_params(), {optimizer})
>>> for step in range(3):
...     with autograd.record():
...         loss = gluon.loss.L2Loss()(net(mx.nd.array([[1, 2, 3]])), mx.nd.zeros((1, 1)))
...     loss.backward()
...     trainer.step(batch_size=1)
>>> net.weight.data().asnumpy()

The state, as it is saved:

>>> go.save_states(trainer, 'trainer.states', net=net)
>>> states = go.read_states('trainer.states')
>>> states.num_update, states.slots['weight']
"""
IN_PYTORCH = """
And for PyTorch:

>>> go.to_torch(states)['state'].get(0)
"""


def optimizer_page(name):
    """One optimizer: formula, arguments, state, relatives, and an example with its output."""
    info, rule = go.optimizer_info(name), rules.get(name)
    forms = [form for form in FOREIGN if form.rule == name]
    mirrored = 'torch' in info.runtimes
    builtin = any(peer.startswith('mxnet.optimizer.') for peer in info.equals)
    parts = [f'# {name}', f'{sentence(info.summary)}', f'Source: {linked(info.paper)}.', '## Formula', specification(rule, info)]
    handled = '' if 'rescale_grad' in info.formula else ' (rescaled and, with `clip_gradient`, clipped)'
    parts.append(f'w is the weight, g its gradient{handled}, t = 1, 2, ... the update number of this parameter.')
    parts += ['## Arguments', table(['name', 'default', 'allowed', 'meaning'], [
        [f'`{h.name}`', f'`{h.default!r}`', allowed(h), h.doc] for h in info.hypers])]
    parts.append("Also MXNet's `lr_scheduler`, `begin_num_update`, `multi_precision` and `param_dict`.")
    parts += ['## State', state(info)]
    parts += ['## Errors', errors(rule)]
    if info.exceptions:
        parts += ['## Exceptions', '\n'.join(f'* {what}: {why}' for what, why in info.exceptions.items())]
    parts += ['## The same elsewhere', f'Runs on: {", ".join(info.runtimes)}.',
              'Computes the same, as tests show: ' + (', '.join(f'`{peer}`' for peer in info.equals) or 'none known') + '.']
    if forms:
        parts += ['Classes of other projects that take its state, by [`to_torch`](../api/gluon_optim.to_torch.rst):',
                  table(['`target`', 'class', 'result', 'conditions'], [conversion(form)[1:] for form in forms]),
                  'What these words mean: [CONVERSIONS](../../CONVERSIONS.md).']
    else:
        parts.append(f'No class of another project takes its state: {reason(rule)}.'
                     + (" `target='mirror'` does." if mirrored else ''))
    optimizer = f'go.create({name!r})' if builtin else repr(name)
    parts += ['## Example', executed(EXAMPLE.format(optimizer=optimizer) + (IN_PYTORCH if mirrored else ''))]
    if builtin:
        parts.append(f"The name {name!r} in a Trainer is MXNet's own optimizer, until "
                     f'[`go.accelerate({name!r})`](../api/gluon_optim.accelerate.rst) replaces it by this one.')
    return '\n\n'.join(parts) + '\n'


def specification(rule, info):
    """The docstring of a rule without its first line. Blocks that are indented in it are code in Markdown, too."""
    text = inspect.cleandoc(rule.__doc__).partition('\n')[2].strip('\n')
    if text.startswith('    '):
        return text
    return textwrap.indent(text if text else info.formula, '    ')  # a formula alone, which has lost its indentation


def sentence(text):
    return text[0].upper() + text[1:] + '.'


def linked(paper):
    return re.sub(r'arXiv:(\d+\.\d+)', r'[arXiv:\1](https://arxiv.org/abs/\1)', paper)


def allowed(hyper):
    """The values that an argument takes."""
    if not hyper.is_switch:
        return f'`{hyper.domain}`' + (' or `None`' if hyper.optional else '')
    if len(hyper.domain) > 9:
        return 'the other optimizers of this package'
    return ', '.join(f'`{value!r}`' for value in hyper.domain)


SHAPES = {'weight': 'that of the weight', 'scalar': 'one number: (1,)', 'rows': 'the first axis of the weight',
          'columns': 'the other axes of the weight'}


def state(info):
    if not info.slots:
        return 'None with the default arguments.'
    rows = [[f'`{slot.name}`', SHAPES[slot.like], 'the weight' if slot.init == 'weight' else f'{slot.init:g}', slot.doc,
             f'`{slot.torch or slot.name}`'] for slot in info.slots]
    return (f'With the default arguments: {info.memory}. Slots are float32, and float64 for float64 weights; `multi_precision` '
            "adds float32 masters of float16 weights, or with `'kahan'` their rounding errors, in float16.\n\n"
            + table(['slot', 'shape', 'at first', 'meaning', 'in PyTorch'], rows))


def errors(rule):
    """What all optimizers refuse, and this one's messages."""
    def message(call):
        try:
            call()
        except (TypeError, ValueError) as error:
            return f'{type(error).__name__}: {error}'
        raise AssertionError('this was to be refused')

    rate = rule.hypers[0].name
    lines = [message(lambda: rule.hyperparameters(**{rate: float('nan')})), message(lambda: rule.hyperparameters(**{rate: 'fast'})),
             message(lambda: rule.hyperparameters(momentun=0.9))]
    block = '\n'.join(textwrap.fill(line, 110, subsequent_indent='    ') for line in lines)
    combinations = '' if rule.check is go.Rule.check else ' or for values that no implementation combines'
    return (f'ValueError for a value out of range{combinations}, TypeError for one of another type and for an unknown argument:\n\n'
            f'```text\n{block}\n```')


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(re.sub(r'(?<!\\)\|', r'\\|', str(cell)) for cell in line) + ' |' for line in lines)


def optimizers_index():
    """The list of all optimizers."""
    names = go.list_optimizers()
    rows = [[f'[{name}]({name}.md)', go.optimizer_info(name).summary, memory(go.optimizer_info(name).slots)] for name in names]
    text = ('Each is a string for `gluon.Trainer` after `import gluon_optim`, except those that MXNet has too: they are made by '
            '[`go.create`](../api/gluon_optim.create.rst), or by their names after '
            '[`go.accelerate()`](../api/gluon_optim.accelerate.rst).')
    return '\n\n'.join(['# Optimizers', text, table(['name', 'what it does', 'state per float32 weight'], rows),
                        '```{toctree}\n:hidden:\n\n' + '\n'.join(names) + '\n```']) + '\n'


# Examples

def executed(text):
    """The text with the output of its examples, which are run in sequence in an empty folder."""
    names, parts = {}, []
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        for part in doctest.DocTestParser().parse(text.strip() + '\n'):
            if isinstance(part, str):
                parts.append(('text', part.strip()))
            else:
                source = ''.join(('... ' if number else '>>> ') + line for number, line in enumerate(part.source.splitlines(True)))
                parts.append(('code', source + printed(part.source, names)))
    blocks = []
    for kind, part in parts:
        if kind == 'code' and blocks and blocks[-1].endswith('\n```'):
            blocks[-1] = blocks[-1][:-len('```')] + part + '```'
        elif part:
            blocks.append(f'```pycon\n{part}```' if kind == 'code' else part)
    return '\n\n'.join(blocks)


def printed(source, names):
    """What a statement prints at the prompt."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(source, '<example>', 'single'), names)  # noqa: S102
        except Exception:
            raise RuntimeError(f'An example failed:\n{source}\n{traceback.format_exc()}') from None
    return out.getvalue()


@contextlib.contextmanager
def working_in(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# Commands

SESSIONS = {
    'list': ["gluon-optim list '*adam*'"],
    'info': ['gluon-optim info sngd'],
    'schedule': ['gluon-optim schedule', 'gluon-optim schedule cosine --max-update 900 --base-lr 0.4 --warmup-steps 100'],
    'plan': ['gluon-optim plan --params 1e9 --optimizer adamw --dtype float16 --multi-precision --workers 16 --servers 64'],
    'inspect': ['gluon-optim inspect run/step-20.safetensors', 'gluon-optim inspect old.states --params net.params'],
    'diff': ['gluon-optim diff run/step-10.safetensors run/step-20.safetensors'],
    'verify': ['gluon-optim verify run/step-20.safetensors'],
    'convert': ['gluon-optim convert run/step-20.safetensors --to torch --verify 20',
                'gluon-optim convert old.states --params net.params --to torch --target torch -o optimizer.pt',
                'gluon-optim convert net.params --to torch'],
    'completion': [],  # prints a script
}
# what the sessions read: a checkpoint of ours, and the files of a run with MXNet's own SGD
FILES = """
>>> import mxnet as mx
>>> from mxnet import autograd, gluon
>>> import gluon_optim as go
>>> mx.random.seed(0)
>>> net = gluon.nn.HybridSequential(prefix='net_')
>>> with net.name_scope():
...     net.add(gluon.nn.Dense(4, in_units=3, activation='relu'), gluon.nn.Dense(1, in_units=4))
>>> net.initialize()
>>> ours = gluon.Trainer(net.collect_params(), 'novograd')
>>> old = gluon.Trainer(net.collect_params(), 'sgd', {'momentum': 0.9})
>>> for step in range(1, 41):
...     with autograd.record():
...         loss = gluon.loss.L2Loss()(net(mx.nd.ones((8, 3))), mx.nd.ones((8, 1)))
...     loss.backward()
...     if step <= 20:
...         old.step(8)
...     else:
...         ours.step(8)
...         _ = go.CheckpointManager('run', save_every=10).save(step - 20, net=net, trainer=ours)
>>> old.save_states('old.states')
>>> net.collect_params().save('net.params')
"""


def commands():
    """The names of the commands, as `gluon-optim --help` lists them."""
    return re.findall(r'^    (\w+)(?:  |$)', run_command(['--help'])[1], re.MULTILINE)


def run_command(arguments):
    """Exit code and output of a command, 100 columns wide."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS='100'), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # argparse, after --help
            code = stop.code
    return code, out.getvalue()


def command_page(name):
    """One command: its help, and its output for files made for this page."""
    with tempfile.TemporaryDirectory() as folder, working_in(folder):
        executed_here = {}
        for example in doctest.DocTestParser().get_examples(FILES):
            printed(example.source, executed_here)
        sessions = [f'$ {line}\n{session(line)}' for line in SESSIONS[name]]
    parts = [f'# gluon-optim {name}', '```text\n' + run_command([name, '--help'])[1] + '```']
    if sessions:
        parts += ['## Example', '```text\n' + '\n'.join(sessions) + '```']
    return '\n\n'.join(parts) + '\n'


def session(line):
    code, text = run_command(shlex.split(line)[1:])
    if code not in (0, 1):
        raise RuntimeError(f'An example failed with code {code}: {line}\n{text}')
    return text


def commands_index():
    names = commands()
    rows = [[f'[gluon-optim {name}]({name}.md)', run_command([name, '--help'])[1].split('\n\n')[1].rstrip('.')] for name in names]
    return '\n\n'.join(['# Commands', '```text\n' + run_command(['--help'])[1] + '```', table(['command', 'what it does'], rows),
                        '```{toctree}\n:hidden:\n\n' + '\n'.join(names) + '\n```']) + '\n'


# All of them

def pages():
    """Path -> function that returns its text."""
    yield 'api/index.rst', api_index
    for name in public_names():
        yield f'api/{PACKAGE}.{name}.rst', lambda name=name: api_page(PACKAGE, name)
    for module in MODULES:
        yield f'api/{PACKAGE}.{module}.rst', lambda module=module: module_page(module)
        path = f'{PACKAGE}.{module}'
        for name in public_names(path):
            yield f'api/{path}.{name}.rst', lambda path=path, name=name: api_page(path, name)
    yield 'optimizers/index.md', optimizers_index
    for name in go.list_optimizers():
        yield f'optimizers/{name}.md', lambda name=name: optimizer_page(name)
    yield 'commands/index.md', commands_index
    for name in commands():
        yield f'commands/{name}.md', lambda name=name: command_page(name)
    yield 'changelog.md', lambda: '```{include} ../../CHANGELOG.md\n```\n'


def write(folder):
    """Write all pages, and delete those of names that are gone. An unchanged page keeps its timestamp."""
    texts = {folder / path: text() for path, text in pages()}
    for path in [*folder.rglob('*.md'), *folder.rglob('*.rst')]:
        if path not in texts:
            path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding='utf-8') != text:
            path.write_text(text, encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    write(parser.parse_args().folder.resolve())


if __name__ == '__main__':
    main()
