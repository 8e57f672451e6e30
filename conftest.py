"""For all tests and doctests: what one registers, the next does not see."""
import sys

import pytest

from gluon_optim.rules import registry


@pytest.fixture(autouse=True)
def forget_registered_rules():
    known = dict(registry.RULES)
    yield
    for name in set(registry.RULES) - set(known):
        del registry.RULES[name]
        mxnet_registry = sys.modules.get('gluon_optim.mxnet.registry')
        if mxnet_registry is not None:
            mxnet_registry._CLASSES.pop(name, None)
            mxnet_registry.Optimizer.opt_registry.pop(name, None)
