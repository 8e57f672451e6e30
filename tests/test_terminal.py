"""Names in files may hold anything; nothing of it reaches the terminal as it is."""
import io
import json
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from gluon_optim import cli
from gluon_optim.states import container
from gluon_optim.states.model import OptimizerStates, ParameterInfo, Run, Weight

EVIL = ['\x1b]0;pwned\x07\x1b[2J\x1b[31mweight', 'a\nfake  row  1x1', '\x9b31m', '\u202eabc', 'x\rOK', '\x7f', '\u2028', 'größe']
SEEN = [r'\x1b]0;pwned\x07\x1b[2J\x1b[31mweight', r'a\nfake', r'\x9b31m', r'\u202eabc', r'x\rOK', r'\x7f', r'\u2028', 'größe']
UNSAFE = re.compile('[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]')


def params(path, names):
    array = struct.pack('<Iiiqiii4x', 0xF993FAC9, 0, 1, 1, 1, 0, 0)
    names = [name.encode() for name in names]
    path.write_bytes(struct.pack('<QQQ', 0x112, 0, len(names)) + array * len(names) + struct.pack('<Q', len(names))
                     + b''.join(struct.pack('<Q', len(name)) + name for name in names))
    return path


@pytest.mark.parametrize('command', [
    ['inspect', 'evil.params'], ['inspect', '--json', 'evil.params'], ['diff', 'evil.params', 'plain.params'],
    ['diff', '--json', 'evil.params', 'plain.params'], ['verify', 'plain.params', '--params', 'evil.params'],
    ['convert', 'evil.params', '--to', 'safetensors'], ['convert', 'evil.params', '--to', 'safetensors', '--map', 'suggest']])
def test_names_of_parameters(run, tmp_path, command):
    params(tmp_path / 'evil.params', EVIL)
    params(tmp_path / 'plain.params', ['a'])
    _, out, err = run(*command)
    assert not UNSAFE.search(out + err)
    shown = out + err if '--json' not in command else json.dumps(json.loads(out)).replace('\\\\', '\\')
    wanted = EVIL if '--json' in command else SEEN
    assert all((json.dumps(name)[1:-1] if '--json' in command else name) in shown for name in wanted)
    if '--json' not in command:
        assert not any(line.split()[:2] == ['fake', 'row'] for line in out.splitlines())


def test_names_in_errors_and_paths(run, tmp_path):
    for words in (['inspect', params(tmp_path / 'twice.params', EVIL[:1] * 2)], ['inspect', tmp_path / 'no\n\x1b[31mfile'],
                  ['inspect', params(tmp_path / 'f\x1b[31m.params', ['a'])], ['list', '\x1b[31m'], ['info', '\x9b31m']):
        _, out, err = run(*words)
        assert (out + err).strip() and not UNSAFE.search(out + err), words
    name = os.fsdecode(b'bad\xff.params')
    try:
        params(tmp_path / name, ['a'])
    except OSError:
        pytest.skip('a file system whose names are UTF-8')
    assert run('inspect', name)[:2][1].startswith(r'bad\udcff.params: ')


def test_arguments_that_are_refused_are_escaped_too(capsys):
    with pytest.raises(SystemExit):
        cli.main(['inspect', 'a', 'b\x1b[31m'])
    assert r'b\x1b[31m' in capsys.readouterr().err


def test_what_a_run_says_of_itself(run, tmp_path):
    states = OptimizerStates(
        'sgd', {'learning_rate': 0.1, 'note': '\x1b[31m'}, 3, [ParameterInfo('w', 'w', (1,), 'float32')], {'w': 3},
        {'w': {'momentum': np.zeros(1, 'float32')}}, scheduler={'class': 'mine.S', 'attributes': {'\x1b[2J': 1}},
        loss_scaler={'\x9b': 2})
    container.write(tmp_path / 'a', states, Run([Weight('w', 'w', [np.zeros(1, 'float32')])], extra={'\u202e': '\r'},
                                                metrics={'\x1b[0m': 1.0}))
    code, out, _ = run('inspect', 'a')
    assert code == 0 and not UNSAFE.search(out) and all(word in out for word in (r'\x1b[2J', r'\x9b', r'\u202e', r'\x1b[0m'))


def test_a_terminal_of_ascii(tmp_path, monkeypatch):
    path = params(tmp_path / 'a.params', ['größe'])
    stream = io.TextIOWrapper(io.BytesIO(), 'ascii')
    monkeypatch.setattr(sys, 'stdout', stream)
    assert cli.main(['inspect', str(path)]) == 0
    stream.flush()
    assert rb'gr\xf6\xdfe' in stream.buffer.getvalue()


def test_all_printing_goes_through_it():
    """`say` and `table` escape, `dumps` is ASCII; nothing else is printed."""
    for path in Path(cli.__file__).parent.glob('*.py'):
        for line in re.findall(r'.*(?<!\w)print\(.*', path.read_text()):
            assert re.search(r'dumps\(|print\(escaped\(|shtab\.complete\(', line), line
