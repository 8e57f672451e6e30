"""States of MXNet 2.0's own optimizers: the rule that is named for them goes on as MXNet did, or it is said what differs."""
from pathlib import Path

import numpy as np
import pytest

import gluon_optim as go
from gluon_optim import rules
from gluon_optim.states.mxnet_files import mxnet2
from gluon_optim.states.mxnet_files.writer import write_states

# written by MXNet 2.0.0b1, see legacy/make_continued.py
CONTINUED = np.load(Path(__file__).parent / 'legacy/2.0.0b1/continued.npz')
CASES = sorted({key.rpartition('/')[0] for key in CONTINUED.files} - {''})
CLIP_AND_DECAY = ('adam', 'adamax', 'ftml', 'nadam', 'rmsprop-centered')


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
