"""For all tests: what one registers, the next does not see."""
import sys

import pytest

from gluon_optim import rules


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
