"""For all tests: what one registers, the next does not see; and how a command is run."""
import sys

import pytest

from gluon_optim import cli, rules


@pytest.fixture(autouse=True)
def forget_registered_rules():
    known = dict(rules._RULES)
    yield
    for name in set(rules._RULES) - set(known):
        del rules._RULES[name]
        registry = sys.modules.get('gluon_optim.mxnet.registry')
        if registry is not None:
            registry._CLASSES.pop(name, None)
            registry.Optimizer.opt_registry.pop(name, None)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err
    return call
