"""What tests of loading share: what was warned of, and an end for what would not return."""
import signal
import warnings

import pytest


@pytest.fixture
def killed_after_a_minute():
    """Loads that never return shall fail, and not hold up the others."""
    def kill(*_):
        raise RuntimeError('still running')
    previous = signal.signal(signal.SIGALRM, kill)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def told(load):
    """What was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        load()
    return [str(warning.message) for warning in caught if warning.category is UserWarning]
