"""The file format's versions: the first one is readable for ever, and what the second one adds comes back as it was."""
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_container import assert_same, example, forge, split

from gluon_optim.states import container, inspection
from gluon_optim.states.errors import StateFileError
from gluon_optim.states.model import Run, Weight, digest
from gluon_optim.states.nesting import DEPTH, leaves, put_together, take_apart

FIRST = Path(__file__).parent / 'format1'
EXPECTED = json.loads((FIRST / 'expected.json').read_text())['files']
FACTS = {'fix_gamma': ['1.bias'], 'epsilon': {'1.bias': 2e-5}, 'momentum': {'1.bias': 0.5}, 'channels_last': ['net/0.weight'],
         'packed': {'2.empty': {'mode': 'lstm', 'hidden': 3, 'layers': 2, 'bidirectional': True, 'projection': None}},
         'shared': {'3.weight': 'net/0.weight'}, 'unknown': ['größe 😀.γ']}


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'run.safetensors'


# Version 1

@pytest.mark.parametrize('name', sorted(EXPECTED))
def test_files_of_version_1(name):
    expected = EXPECTED[name]
    states, run = container.read_checkpoint(FIRST / name)
    assert container.read_manifest(FIRST / name)['version'] == 1
    assert digest(states) == expected['digest']
    for key in ('optimizer', 'num_update', 'counts', 'hypers', 'scheduler', 'loss_scaler'):
        assert getattr(states, key) == expected[key], key
    assert {f'{parameter}/{slot}': float(array.astype('float64').sum()) for parameter, slots in states.slots.items()
            for slot, array in slots.items()} == expected['sums']
    assert (states.trees, states.attributes, states.facts) == ({}, {}, None)  # it could not say
    assert all(info.grad_req is None for info in states.parameters)
    assert (run is None) == (expected['run'] is None)
    if run is not None:
        assert {weight.name: [float(array.astype('float64').sum()) for array in weight.copies]
                for weight in run.weights} == expected['run']['weights']
        assert all(weight.grad_req is None for weight in run.weights)
    if name != 'example.safetensors':  # which is made to be strange
        assert inspection.missing(states) == []


def test_a_file_of_version_1_is_written_again_as_version_2(path):
    states = container.read(FIRST / 'example.safetensors')
    assert_same(states, example())
    container.write(path, states)
    assert container.read_manifest(path)['version'] == 2
    assert_same(container.read(path), states)
    assert digest(container.read(path)) == EXPECTED['example.safetensors']['digest']


# Version 2

def nested():
    """States of an optimizer without a rule."""
    states = example()
    values = {'net/0.weight': (np.ones((3, 5), 'float32'), (None, np.zeros(3, 'float32'))), '1.bias': np.ones(7, 'float32'),
              '2.empty': None, 'größe 😀.γ': [np.zeros((2, 2)), {'k': np.ones(1), 7: 1.5}]}
    states.optimizer, states.slots, states.master = 'stranger', {}, {}
    for name, value in values.items():
        states.trees[name], states.slots[name] = take_apart(value, np.ndarray)
    states.attributes = {'seen': take_apart({0: math.inf, 'a': (1, 2)}, np.ndarray)[0]}
    states.attributes['total'], arrays = take_apart([np.ones(2), np.float32(0.1)], np.ndarray)
    states.variables.update({f'total:{place}': np.asarray(array) for place, array in arrays.items()})
    return states


def full():
    """States and a run with all that version 2 adds."""
    states = nested()
    for info, req in zip(states.parameters, ('write', 'add', 'null', None, 'null')):
        info.grad_req = req
    states.facts = FACTS
    weights = [Weight('net/0.weight', 'w', [np.zeros((3, 5), 'float16')], 'null'), Weight('x', 'x', [np.zeros(2)])]
    return states, Run(weights, step=3)


def test_what_version_2_adds_comes_back(path):
    states, run = full()
    container.write(path, states, run)
    back, again = container.read_checkpoint(path)
    assert_same(back, states)
    assert (back.trees, back.attributes, back.facts) == (states.trees, states.attributes, FACTS)
    assert [info.grad_req for info in back.parameters] == ['write', 'add', 'null', None, 'null']
    assert [weight.grad_req for weight in again.weights] == ['null', None]
    weight = put_together(back.trees['net/0.weight'], lambda place, kind: back.slots['net/0.weight'][place])
    assert type(weight) is tuple and type(weight[1]) is tuple and weight[1][0] is None and weight[1][1].shape == (3,)
    assert put_together(back.trees['1.bias'], lambda place, kind: (place, kind)) == ('0', 'array')
    assert put_together(back.trees['2.empty'], None) is None
    strange = put_together(back.trees['größe 😀.γ'], lambda place, kind: back.slots['größe 😀.γ'][place])
    assert list(strange[1]) == ['k', 7] and strange[1][7] == 1.5 and type(strange) is list
    assert put_together(back.attributes['seen'], None) == {0: math.inf, 'a': (1, 2)}
    assert inspection.missing(back) == []  # slots of any shape


@pytest.mark.parametrize('value', [None, 1, True, 'x', 0.5, -math.inf, (), [], {}, (None, [(1,), {'a': (2.5,)}]),
                                   {3: {}, '3': None}])
def test_a_tree_gives_the_value_back(value):
    tree, arrays = take_apart(value, np.ndarray)
    assert repr(put_together(json.loads(json.dumps(tree)), None)) == repr(value) and not arrays and not leaves(tree)


@pytest.mark.parametrize('value, words', [
    ((1, object()), 'Received: object at 1'), (lambda: 0, 'Received: function'), ({1.5: 0}, 'dictionaries with texts'),
    ({(1, 2): 0}, 'for keys'), (1j, 'complex'), ({1}, 'set'), (type('Pair', (tuple,), {})((1, 2)), 'Pair')])
def test_what_no_tree_can_hold(value, words):
    with pytest.raises(TypeError, match=words):
        take_apart(value, np.ndarray)


def test_a_list_in_itself():
    value = []
    value.append(value)
    with pytest.raises(TypeError, match='nested at most'):
        take_apart(value, np.ndarray)


def edit(old, new):
    def apply(text):
        assert old in text, text
        return text.replace(old, new, 1)
    return apply


def quoted(text):
    return text.replace('"', '\\"').encode()


DEEP = '{"list":[' * (DEPTH + 1) + '"none"' + ']}' * (DEPTH + 1)


@pytest.mark.parametrize('old, new, words', [
    ('"grad_req":"write"', '"grad_req":"read"', 'write, add, null'),
    ('"grad_req":"write",', '', 'grad_req'),
    ('"tree":"array"', '"tree":"none"', 'arrays of its tree'),
    ('"tree":"array"', '"tree":null,"more":0', 'more'),
    ('"tree":"array"', '"tree":"arrays"', 'must be .none'),
    ('"tree":"array"', '"tree":7', 'must be .none'),
    ('"tree":"array"', '"tree":{"tuple":["array"],"list":[]}', 'one key'),
    ('"tree":"array"', '"tree":{"set":["array"]}', 'content of .set'),
    ('"tree":"array"', '"tree":{"tuple":"array"}', 'content of .tuple'),
    ('"tree":"array"', '"tree":{"value":[1]}', 'content of .value'),
    ('"tree":"array"', '"tree":{"float":"1e5"}', 'content of .float'),
    ('"tree":"array"', '"tree":{"dict":[["a","array"],["a","none"]]}', 'content of .dict'),
    ('"tree":"array"', '"tree":{"dict":[[true,"array"]]}', 'content of .dict'),
    ('"tree":"array"', '"tree":{"dict":[["a"]]}', 'content of .dict'),
    ('"tree":"array"', f'"tree":{DEEP}', 'deep'),
    ('"attributes":{"seen":{', '"attributes":{"seen":{"tuple":[],', 'one key'),
    ('"attributes":{"seen":', '"attributes":{"a/b":"none","seen":', 'without a slash'),
    ('"attributes":{"seen":', '"attributes":{"new":"array","seen":', 'variables'),
    ('"attributes":{"seen":', f'"attributes":{{"new":{DEEP},"seen":', 'deep'),
    ('"facts":{"fix_gamma"', '"facts":{"fix_beta"', 'facts'),
    ('"fix_gamma":["1.bias"]', '"fix_gamma":["../x"]', 'facts'),
    ('"epsilon":{"1.bias":2e-05}', '"epsilon":{"1.bias":"small"}', 'facts'),
    ('"hidden":3', '"hidden":0', 'facts'),
    ('"mode":"lstm"', '"mode":"mamba"', 'facts'),
    ('"projection":null', '"projection":null,"more":1', 'facts'),
    ('"shared":{"3.weight":"net/0.weight"}', '"shared":{"3.weight":3}', 'facts'),
    ('"unknown":[', '"unknown":[[],', 'facts'),
])
def test_forged_files_of_version_2_are_refused(path, old, new, words):
    states, run = full()
    container.write(path, states, run)
    text, data = split(path.read_bytes())
    path.write_bytes(forge(edit(quoted(old), quoted(new))(text), data))
    with pytest.raises(StateFileError, match=words):
        container.read_checkpoint(path)


@pytest.mark.parametrize('spoil, words', [
    (lambda states: states.trees.update(nobody='none'), 'nobody'),
    (lambda states: states.trees.update({'1.bias': 'none'}), 'arrays of its tree'),
    (lambda states: states.parameters[0].__setattr__('grad_req', 'maybe'), 'grad_req'),
    (lambda states: states.facts.update(more=1), 'facts'),
    (lambda states: states.attributes.update(new='array'), 'variables'),
])
def test_what_version_2_cannot_hold_is_not_written(path, spoil, words):
    states, run = full()
    states.facts = copy.deepcopy(FACTS)
    spoil(states)
    with pytest.raises(StateFileError, match=words):
        container.write(path, states, run)
    assert not path.exists()
