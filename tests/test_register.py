"""Rules of one's own, and arguments that are slips: said when they are registered and given, with and without MXNet."""
import importlib.util

import pytest

import gluon_optim as go
from gluon_optim import rules

MXNET = importlib.util.find_spec('mxnet') is not None
REGISTERS = [rules.register, *([go.register] if MXNET else [])]
RATES = (go.Hyper('learning_rate', 0.1, '[0, inf)'), go.Hyper('wd', 0.0, '[0, inf)'))


def rule(**changes):
    """A class that is a rule but for the changes; None takes an attribute away."""
    body = dict(summary='', hypers=RATES, slots=lambda h: (go.Slot('mean'), go.Slot('norm', 'scalar')),
                coefficients=lambda xp, h, t: dict(lr=h.learning_rate, wd=h.wd),
                step=lambda xp, h, c, w, g, s: (w - c.lr * (g + c.wd * w), dict(mean=s.mean + g, norm=xp.sum(g * g))))
    body.update(changes)
    return type('Tried', (go.Rule,), {key: value for key, value in body.items() if value is not None})


def in_place(xp, h, c, w, g, s):
    w -= c.lr * g
    return w, {}


def no_slots(step, **more):
    return dict(slots=lambda h: (), step=step, **more)


@pytest.mark.parametrize('register', REGISTERS, ids=lambda register: register.__module__)
@pytest.mark.parametrize('changes, words', [
    (dict(hypers=None), '`hypers` .* must be a tuple of Hypers.* Received: None'),
    (dict(hypers=RATES[:1]), "including 'learning_rate' and 'wd' but not"),
    (dict(hypers=('learning_rate', 'wd')), 'a tuple of Hypers'),
    (dict(hypers=RATES + RATES[1:]), 'with different names'),
    (dict(hypers=(*RATES, go.Hyper('rescale_grad', 1.0, '(0, 1]'))), "but not 'clip_gradient', 'rescale_grad'"),
    (dict(hypers=(*RATES, go.Hyper('beta1', 1.0, '[0, 1)'))), r'defaults that are allowed.*`beta1` must be in \[0, 1\)'),
    (dict(slots=None), '`slots` .* must be a function. Received: None'),
    (dict(slots=lambda: ()), '`slots` .* a function of h .* Received: TypeError'),
    (dict(slots=lambda h: go.Slot('mean')), 'returns a tuple of Slots'),
    (dict(slots=lambda h: [go.Slot('mean')]), 'returns a tuple of Slots'),
    (dict(slots=lambda h: (go.Slot('mean'), go.Slot('mean'))), 'returns a tuple of Slots'),
    (dict(slots=lambda h: (go.Slot('master'),)), "other than 'weight', 'master', 'compensation'"),
    (dict(slots=lambda h: (go.Slot('a', like='tensor'),)), "like='weight' or 'scalar'"),
    (dict(coefficients=None), '`coefficients` .* must be a function'),
    (dict(coefficients=lambda xp, h, t: h.learning_rate), 'a dictionary of names and numbers, .* Received: 0.1'),
    (dict(coefficients=lambda xp, h, t: dict(lr=h.learning_rat)), 'Received: AttributeError: no `learning_rat`'),
    (dict(coefficients=lambda xp, h, t: dict(lr=h.learning_rate, wd=h.wd, **({'m': 0.9} if t > 1 else {}))),
     "the same names for every t. Received: 'lr', 'wd' for t=1, 'lr', 'wd', 'm' for t=2"),
    (dict(coefficients=lambda xp, h, t: dict(lr=h.learning_rate, **({'wd': h.wd} if t < 50 else {}))), "for t=1, 'lr' for t=50"),
    (dict(coefficients=lambda xp, h, t: dict(lr=h.learning_rate, wd=h.wd if t < 50 else None)), "{'lr': 0.1, 'wd': None}"),
    (dict(step=None), '`step` .* must be a function'),
    (no_slots(lambda xp, h, c, w, g, s: w - g), r'returns the new weight and a dictionary.*it returned ndarray'),
    (no_slots(lambda xp, h, c, w, g, s: None), 'it returned NoneType'),
    (no_slots(lambda xp, h, c, w, g, s: (xp.sum(w), {})), r"it returned {'the weight': \(\)}"),
    (no_slots(lambda xp, h, c, w, g, s: (w, {'mean': g})), "'mean': "),
    (no_slots(lambda xp, h, c, w, g, s: (w - c.rate * g, {})), 'no `rate` here; available: '),
    (no_slots(in_place), 'read-only.*nothing may work in place'),
    (no_slots(lambda xp, h, c, w, g, s: (w if g > 0 else -w, {})), 'ambiguous.*or branch on values'),
    (no_slots(lambda xp, h, c, w, g, s: (w - c.lr * g ** 2, {})), 'for \\*\\*.*arrays have'),
    (no_slots(lambda xp, h, c, w, g, s: (w - c.lr * xp.mean(g), {})), "'mean'.*xp has sum"),
    (no_slots(lambda xp, h, c, w, g, s: (w - c.lr * c.wd * g, {})), 'Combine them in `coefficients`'),
])
def test_what_is_no_rule_is_refused_at_once(register, changes, words):
    with pytest.raises(TypeError, match=words) as caught:
        register('tried')(rule(**changes))
    assert "'tried'" in str(caught.value) and 'tried' not in rules.names()
    if MXNET:
        with pytest.raises(ValueError, match='Unknown optimizer'):
            go.create('tried')


@pytest.mark.parametrize('register', REGISTERS, ids=lambda register: register.__module__)
def test_what_is_one_is_registered_under_its_class_if_it_has_no_name(register):
    made = register(rule(summary=None))
    assert rules.get('tried') is made and made.name == 'tried' and go.optimizer_info('tried').summary == ''
    register(rule())  # again, as in a notebook


def test_a_step_that_needs_other_operations_is_not_tried():
    """It says so, and may need arrays of MXNet."""
    rules.register(rule(**no_slots(lambda xp, h, c, w, g, s: (w - c.lr * g.norm(), {}), lowerable=False)))


@pytest.mark.parametrize('find', [rules.get, *([go.create] if MXNET else [])])
@pytest.mark.parametrize('name', [None, 3, ['adamw']], ids=repr)
def test_names_are_strings(find, name):
    with pytest.raises(TypeError, match="The name of the optimizer must be a string. Received: .*Known: .*'adamw'"):
        find(name)


@pytest.mark.parametrize('given, near', [
    ('lr', "'learning_rate'"), ('weight_decay', "'wd'"), ('eps', "'epsilon'"), ('betas', "'beta1' or 'beta2'")])
def test_words_of_other_frameworks(given, near):
    for make in (rules.get('adamw').hyperparameters, *([lambda **hypers: go.create('adamw', **hypers)] if MXNET else [])):
        with pytest.raises(TypeError, match=f'Did you mean {near}'):
            make(**{given: 0.1})


def test_errors_say_what_to_pass():
    hypers = rules.get('novograd').hyperparameters
    with pytest.raises(ValueError, match='clip_gradient=-1. Pass a number in that range, None to switch it off, or leave it out'):
        hypers(clip_gradient=-1)
    with pytest.raises(ValueError, match="Pass one of them, or leave it out for the default 'paper'"):
        hypers(variant='papier')


@pytest.mark.skipif(not MXNET, reason='optimizers of MXNet')
def test_repr_of_optimizers():
    assert repr(go.create('adamw', wd=0.5)).startswith('<AdamW: learning_rate=0.001, wd=0.5, beta1=0.9, ')
    assert repr(go.create('adam')).endswith('num_update=0>')
    import mxnet as mx
    assert 'lr_scheduler=CosineScheduler' in repr(go.create('sgd_torch', lr_scheduler=mx.lr_scheduler.CosineScheduler(4)))
