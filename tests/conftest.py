"""For all tests: none runs for ever; and how a command is run."""
import faulthandler
import os

import pytest

from gluon_optim import cli

KILL = 900  # seconds; protects the machine from what never ends, and judges no test: those that take long take a tenth of it


def pytest_configure(config):
    global stderr
    stderr = os.dup(2)  # pytest captures the other one


@pytest.fixture(autouse=True)
def kill_what_never_ends():
    faulthandler.dump_traceback_later(KILL, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err
    return call
