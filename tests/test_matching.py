"""Pairing saved parameters with present ones by name."""
import pytest
import work

from gluon_optim.states.matching import match
from gluon_optim.states.model import ParameterInfo


def infos(*names, shapes=None, full=None):
    shapes, full = shapes or [(2,)] * len(names), full or names
    return [ParameterInfo(name, full[i], shapes[i], 'float32') for i, name in enumerate(names)]


def test_names_go_before_positions():
    saved, present = infos('a', 'b', 'c'), infos('c', 'a', 'd')
    assert match(saved, present) == ({0: 2, 1: 0}, '')


def test_places_go_before_full_names_unless_these_pair_more():
    saved = infos('0.weight', '1.weight', full=('x_weight', 'y_weight'))
    swapped = infos('0.weight', '1.weight', full=('y_weight', 'x_weight'))
    assert match(saved, swapped).pairs == {0: 0, 1: 1}
    other = infos('0.weight', 'body.1.weight', full=('y_weight', 'x_weight'))
    assert match(saved, other).pairs == {0: 1, 1: 0}
    assert match(saved, infos('x_weight', 'y_weight')).pairs == {0: 0, 1: 1}  # saved with net=, loaded without


def test_full_names_that_repeat_pair_with_nothing():
    saved = infos('0.weight', '1.weight', '2.weight', full=('weight', 'weight', 'w'))
    present = infos('a', 'b', 'c', full=('weight', 'weight', 'w'))
    assert match(saved, present).pairs == {2: 2}


def test_automatic_numbers_are_paired_in_the_order_of_creation():
    """A trainer sorts names as text: dense10 before dense9, but dense1 before dense2."""
    saved = infos('dense0_bias', 'dense0_weight', 'dense1_bias', 'dense1_weight')
    present = infos('dense10_bias', 'dense10_weight', 'dense9_bias', 'dense9_weight')
    pairs, note = match(saved, present)
    assert pairs == {0: 2, 1: 3, 2: 0, 3: 1}
    assert 'dense' in note
    nested = match(infos('net0_conv0_weight', 'net0_conv1_weight'), infos('net3_conv0_weight', 'net3_conv1_weight'))
    assert nested.pairs == {0: 0, 1: 1}


@pytest.mark.parametrize('present', [
    infos('dense2_weight', 'dense3_weight', shapes=[(2,), (3,)]),       # another shape
    infos('dense2_weight', 'conv0_weight'),                             # another kind
    infos('dense2_weight', 'dense2_bias'),
    infos('dense2_weight'),
    infos('u', 'v'),
])
def test_nothing_in_common_is_an_error_with_both_sides(present):
    saved = infos('dense0_weight', 'dense1_weight')
    with pytest.raises(ValueError) as caught:
        match(saved, present)
    for name in [p.name for p in saved + present]:
        assert repr(name) in str(caught.value)


def test_numbers_are_positions():
    pairs, note = match(infos('0', '1', '2'), infos('dense0_bias', 'dense0_weight'))
    assert pairs == {0: 0, 1: 1} and 'position' in note
    assert match(infos('1', '0'), infos('0', '1')) == ({0: 1, 1: 0}, '')


def test_nothing_to_pair():
    assert match([], infos('a')) == ({}, '')
    assert match(infos('a'), []) == ({}, '')


def test_many_names_take_linear_time():
    def of(count):
        names = [f'l{i}.weight' for i in range(count)]
        mine, theirs = infos(*names), infos(*reversed(names))
        return lambda: match(mine, theirs).pairs

    assert len(of(20000)()) == 20000
    work.assert_linear(of, 20000)


def test_numbers_are_positions_in_the_trainer_also_with_gaps():
    assert match(infos('0', '2', '7'), infos('a', 'b', 'c')).pairs == {0: 0, 2: 1}
