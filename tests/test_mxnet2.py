"""MXNet 2.0's own optimizers: the variants of rules that compute what they do, and their states. The rule that is named for
them goes on as MXNet did, or it is said what differs."""
import sys
from pathlib import Path

import numpy as np
import pytest

import gluon_optim as go
from gluon_optim import rules
from gluon_optim.rules.base import scalars
from gluon_optim.rules.mx import DROP_INS
from gluon_optim.rules.mx.base import VARIANT
from gluon_optim.states.mxnet_files import mxnet2
from gluon_optim.states.mxnet_files.builtins import BUILTINS
from gluon_optim.states.mxnet_files.writer import write_states

sys.path.insert(0, str(Path(__file__).parent))
import reference

# written by MXNet 2.0.0b1, see legacy/make_continued.py
CONTINUED = np.load(Path(__file__).parent / 'legacy/2.0.0b1/continued.npz')
CASES = sorted({key.rpartition('/')[0] for key in CONTINUED.files} - {''})
CLIP_AND_DECAY = ('adam', 'adamax', 'ftml', 'nadam', 'rmsprop-centered')


# under the names of MXNet 2.0, none at its default
MOMENTS = dict(beta1=0.8, beta2=0.9, epsilon=0.02)
SETTINGS = {
    'adam': [MOMENTS], 'adamax': [MOMENTS], 'nadam': [dict(MOMENTS, schedule_decay=0.2)], 'ftml': [MOMENTS],
    'adagrad': [dict(epsilon=0.02)], 'adadelta': [dict(rho=0.8, epsilon=0.02)],
    'rmsprop': [dict(rho=0.8, epsilon=0.02, clip_weights=1.5),
                dict(rho=0.8, momentum=0.7, centered=True, epsilon=0.02, clip_weights=1.5)],
    'dcasgd': [dict(momentum=0.8, lamda=0.4), dict(lamda=0.4)], 'nag': [dict(momentum=0.8), dict(momentum=0.0)],
    'signum': [dict(momentum=0.8, wd_lh=0.3), dict(momentum=0.0, wd_lh=0.3)],
}
BASE = dict(wd=0.25, clip_gradient=0.75, rescale_grad=0.5)
VARIANTS = [pytest.param(name, own, id=f'{name}-{k}') for name, settings in SETTINGS.items() for k, own in enumerate(settings)]


def states_of(case, folder):
    (folder / 'x.states').write_bytes(CONTINUED[case + '/states'].tobytes())
    return go.read_states(folder / 'x.states')


def error(states, case):
    """The largest difference to MXNet's weights, over what the weights were moved."""
    rule = rules.get(states.optimizer)
    h = rule.hyperparameters(**states.hypers)
    weight, slots, moved, worst = CONTINUED[case + '/weight'], states.slots['0'], 0.0, 0.0
    for t, (gradient, wanted) in enumerate(zip(CONTINUED['gradients'], CONTINUED[case + '/weights']), states.counts['0'] + 1):
        new, slots = rule.run(np, h, t, weight, gradient, slots)
        moved, weight = moved + np.abs(new - weight), new
        worst = max(worst, np.abs(weight - wanted).max())
    return worst / moved.max()


def rule_trajectory(name, own, w0, gradients, rates, variant):
    """[(weight, slots) after update 1, 2, ...] of the rule, on hyper-parameters as they are."""
    rule, names = rules.get(name), BUILTINS[name].names_2
    own = {names.get(key, key): value for key, value in own.items()}
    weight, slots, updates = w0, None, []
    for t, (gradient, rate) in enumerate(zip(gradients, rates), 1):
        h = rule.hyperparameters(learning_rate=rate, variant=variant, **BASE, **own)
        weight, slots = rule.run(np, h, t, weight, gradient, slots, exact=True)
        updates.append((weight, slots))
    return updates


@pytest.mark.parametrize('name, own', VARIANTS)
def test_the_variant_computes_what_mxnet_2_does(name, own):
    """Against MXNet 2.0's formulas written down once more; and it is another formula than that of MXNet 1.x."""
    random = np.random.RandomState(4)
    w0, rates = random.standard_normal((3, 4)), [0.5, 0.5, 0.2, 0.2, 0.8, 0.3]
    gradients = random.standard_normal((6, 3, 4)) * np.array([1, 0.1, 4, 0.5, 2, 0.3])[:, None, None]
    expected = reference.trajectory(name, {**BASE, **own}, w0, gradients, rates, reference.MXNET_2)
    found = rule_trajectory(name, own, w0, gradients, rates, '2.x')
    for (weight, kept), (ours, slots) in zip(expected, found):
        np.testing.assert_allclose(ours, weight, rtol=0, atol=1e-12 * np.abs(weight - w0).max())
        assert sorted(slots) == sorted(kept)
        for slot in slots:
            np.testing.assert_allclose(slots[slot], kept[slot], rtol=0, atol=1e-12 * np.abs(kept[slot]).max(), err_msg=slot)
    if (name, own.get('momentum', 0) > 0) in [('nag', False), ('signum', True)]:
        return  # the versions differ with, and without momentum only
    old = rule_trajectory(name, own, w0, gradients, rates, '1.x')
    assert np.abs(old[-1][0] - found[-1][0]).max() > 1e-3 * np.abs(found[-1][0] - w0).max()


@pytest.mark.parametrize('name', SETTINGS)
def test_every_coefficient_of_a_variant_is_felt(name, monkeypatch):
    """The comparison can fail: 1 % more of any one coefficient shows with some of the settings."""
    rule, right = rules.get(name), rules.get(name).all_coefficients
    random = np.random.RandomState(4)
    w0, gradients, rates = random.standard_normal((3, 4)), 2 * random.standard_normal((4, 3, 4)), [0.5, 0.2, 0.4, 0.3]

    def arrays():
        return [array for own in SETTINGS[name] for weight, slots in rule_trajectory(name, own, w0, gradients, rates, '2.x')
                for array in (weight, *slots.values())]

    expected = arrays()
    names = {key for own in SETTINGS[name] for key in right(scalars, rule.hyperparameters(
        variant='2.x', **BASE, **{BUILTINS[name].names_2.get(key, key): value for key, value in own.items()}), 1)}
    for coefficient in names - ({'b1'} if name == 'ftml' else set()):  # z is -d w, so that what b1 multiplies is 0
        def wrong(xp, h, t, coefficient=coefficient):
            return {key: 1.01 * x if key == coefficient else x for key, x in right(xp, h, t).items()}

        monkeypatch.setattr(rule, 'all_coefficients', staticmethod(wrong))
        assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(expected, arrays())), coefficient


def test_variants_are_declared_where_the_versions_differ():
    """Those of lamb and lars concern float16 only: test_dropins_2.py has them."""
    assert {name for name, rule in DROP_INS.items() if VARIANT in rule.hypers} == {*SETTINGS, 'lamb', 'lars'}


@pytest.mark.parametrize('case', [case for case in CASES if not case.startswith(('adamw/', 'adabelief/', 'lans/'))])
def test_a_drop_in_goes_on_exactly_as_mxnet_2_did(case, tmp_path):
    """What MXNet 2.0 saved and how it went on, with decay and clipping together too."""
    states = mxnet2.as_drop_in(states_of(case, tmp_path))
    assert states.optimizer == case.split('-')[0].split('/')[0]
    assert mxnet2.not_in_rule(states) == [] and mxnet2.as_rule(states) is states
    assert error(states, case) < 2e-6


@pytest.mark.parametrize('case', [case for case in CASES if not case.startswith(('adamw/', 'adabelief/', 'lans/'))])
def test_states_of_a_drop_in_are_converted_as_those_of_mxnet_2(case, tmp_path):
    """Where that is exact; where it is not, the rule stays the one that is."""
    native = states_of(case, tmp_path)
    saved = mxnet2.as_drop_in(native)
    written = mxnet2.as_written(saved)
    if 'variant' not in saved.hypers or mxnet2.not_in_rule(native):
        assert written is saved
    else:
        assert written.hypers == native.hypers and written.optimizer == native.optimizer
        assert error(mxnet2.as_rule(written), case) < 2e-6


@pytest.mark.parametrize('case', [case for case in CASES if not case.startswith(('adamw', 'nadam'))])
def test_the_rule_goes_on_as_mxnet_2_did_or_says_what_it_does_otherwise(case, tmp_path):
    states = states_of(case, tmp_path)
    assert mxnet2.wrote(states)
    lost, found = mxnet2.not_in_rule(states), error(mxnet2.as_rule(states, allow_lossy=True), case)
    if lost:
        assert states.report[-len(lost):] == ['lost: ' + line for line in lost]
        with pytest.raises(ValueError, match='of MXNet 1.x, which would lose'):
            mxnet2.as_rule(states)
        assert found > 1e-4, lost  # else there is nothing to say
    else:
        assert found < 2e-6
    optimizer, setting = case.split('/')
    assert bool(lost) == (optimizer == 'adamax' or (optimizer in CLIP_AND_DECAY and setting == 'wd+clip')
                          or (optimizer in ('nag', 'dcasgd') and 'wd' in setting))


def test_what_has_no_rule(tmp_path):
    with pytest.raises(ValueError, match="MXNet 2.x's adamw is not supported"):
        mxnet2.as_rule(states_of('adamw/wd', tmp_path))


def test_states_of_others_are_left_alone(tmp_path):
    states = states_of('adagrad/wd', tmp_path)
    states.producer['mxnet'] = '1.x'
    assert mxnet2.as_rule(states) is states and mxnet2.not_in_rule(states) == []


@pytest.mark.parametrize('case, words', [('adagrad/clip', 'epsilon=0.001'), ('rmsprop/clip', 'epsilon=0.001'),
                                         ('nag/wd', 'wd=0.05'), ('adadelta/clip', 'learning rate'), ('adam/wd+clip', 'clips')])
def test_the_other_version_would_go_on_otherwise(case, words, tmp_path):
    with pytest.raises(ValueError, match='MXNet 1.x would lose .*' + words):
        write_states(tmp_path / 'y.states', states_of(case, tmp_path), 1)
    assert not (tmp_path / 'y.states').exists()


def test_in_pytorch(tmp_path):
    """AdaGrad of MXNet 2.0 goes on as its own code went on."""
    torch = pytest.importorskip('torch')
    states = states_of('adagrad/wd+clip', tmp_path)
    weight = torch.nn.Parameter(torch.tensor(CONTINUED['adagrad/wd+clip/weight']))
    optimizer = go.torch.create('adagrad_torch', [weight])
    optimizer.load_state_dict(go.to_torch(states))
    assert "MXNet 2.x's adagrad computes what 'adagrad_torch' does here" in states.report
    for gradient, wanted in zip(CONTINUED['gradients'], CONTINUED['adagrad/wd+clip/weights']):
        weight.grad = torch.tensor(gradient) * np.float32(states.hypers['rescale_grad'])
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match='1.x, which would lose the meaning of wd=0.05'):
        go.to_torch(states_of('nag/wd', tmp_path))
