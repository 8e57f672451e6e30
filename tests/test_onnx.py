"""The ONNX step models against the rules in NumPy, on ONNX Runtime and on onnx's own evaluator; states into ONNX and back."""
import math
import subprocess
import sys

import conversion_runs
import numpy as np
import pytest
from conversion_runs import LIMITS, SHAPES, STEPS, cases, rate, run_rule, settings, weights_and_gradients

from gluon_optim import rules
from gluon_optim.states.model import OptimizerStates, ParameterInfo, digest

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
from gluon_optim.onnx import export_step, from_onnx, initial_slots, read, to_onnx, unpack, write  # noqa: E402

STANDARD = {'Abs', 'Add', 'Cast', 'Constant', 'Div', 'Equal', 'Exp', 'Greater', 'GreaterOrEqual', 'Identity', 'Less', 'LessOrEqual',
            'Log', 'Max', 'Min', 'Mul', 'Neg', 'Not', 'ReduceSum', 'Sign', 'Sqrt', 'Sub', 'Tanh', 'Where'}


def session(model):
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])


def run_model(model, arrays, gradients, begin=0, counted=False):
    """Feed outputs back as inputs; ``counted`` models count for themselves."""
    runtime, arrays = session(model), dict(arrays)
    known = {x.name for x in runtime.get_inputs()}
    for t, gradient in enumerate(gradients, begin + 1):
        feeds = {**arrays, **{key + '/grad': g for key, g in gradient.items()}, 'learning_rate': np.array(rate(t))}
        if not counted:
            feeds['t'] = np.array(t)
        new = runtime.run(None, {key: array for key, array in feeds.items() if key in known})
        arrays = {output.name[:-len('/new')]: array for output, array in zip(runtime.get_outputs(), new)}
    return arrays


def assert_near(found, expected, travelled, limit):
    for key, weight in expected.items():
        assert found[key].shape == weight.shape and found[key].dtype == weight.dtype
        rounding = np.spacing(np.abs(weight).max())  # short ways are not longer than a few of these
        assert np.abs(found[key] - weight).max() <= max(limit * travelled[key], rounding) and travelled[key] > 1e-3


def states_of(name, hypers, dtype='float32', steps=10, **options):
    """States as a run of ``steps`` updates leaves them, computed with NumPy, and the weights."""
    weights, gradients = weights_and_gradients(dtype, steps)
    weights, slots, _ = run_rule(name, hypers, weights, gradients)
    slots = {key: {slot: np.asarray(value, dtype) for slot, value in own.items()} for key, own in slots.items()}
    infos = [ParameterInfo(key, 'net0_' + key, w.shape, dtype) for key, w in weights.items()]
    hypers = rules.get(name).hyperparameters(**hypers).asdict()
    return OptimizerStates(name, hypers, steps, infos, dict.fromkeys(weights, steps), slots, **options), weights


# -- the step model ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('name, extra', list(cases()))
def test_equals_the_rule(name, extra, dtype):
    hypers = settings(name, extra)
    model = export_step(name, SHAPES, dtype, **hypers)
    assert {node.op_type for node in model.graph.node} <= STANDARD and {x.domain for x in model.opset_import} == {''}
    weights, gradients = weights_and_gradients(dtype)
    expected, slots, travelled = run_rule(name, hypers, weights, gradients)
    found = run_model(model, {**weights, **initial_slots(name, weights, **hypers)}, gradients)
    assert_near(found, expected, travelled, LIMITS[dtype])
    for key, own in slots.items():
        for slot, value in own.items():
            np.testing.assert_allclose(found[f'{key}/{slot}'], value, rtol=10 * LIMITS[dtype], atol=10 * LIMITS[dtype])
            assert found[f'{key}/{slot}'].dtype == dtype


@pytest.mark.parametrize('name', [name for name in rules.names(drop_ins=True) if name not in rules.names()])
def test_rules_of_mxnet_are_exported_or_refused(name):
    weights, gradients = weights_and_gradients()
    hypers = {'wd': 0.1} if any(hyper.name == 'wd' for hyper in rules.get(name).hypers) else {}
    try:
        model = export_step(name, SHAPES, 'float64', **hypers)
    except ValueError as error:
        assert str(error).startswith(f'{name!r} cannot be written in ONNX operators')
        return
    found = run_model(model, {**weights, **initial_slots(name, weights, **hypers)}, gradients)
    expected, _, travelled = run_rule(name, hypers, weights, gradients)
    for key, weight in expected.items():
        assert np.abs(found[key] - weight).max() <= 1e-12 * max(travelled[key], 1e-3)


@pytest.mark.parametrize('name', ['novograd', 'radam', 'rprop', 'larc', 'nadam_torch', 'adamw'])
def test_another_runtime_agrees(name):
    reference = pytest.importorskip('onnx.reference')
    hypers = settings(name, {})
    weights, gradients = weights_and_gradients()
    for arrays in (weights, *gradients):
        del arrays['number']  # which onnx 1.13 sums up to shape (1,)
    model = export_step(name, {key: w.shape for key, w in weights.items()}, 'float64', **hypers)
    evaluator, arrays = reference.ReferenceEvaluator(model), {**weights, **initial_slots(name, weights, **hypers)}
    for t, gradient in enumerate(gradients[:5], 1):
        feeds = {**arrays, **{key + '/grad': g for key, g in gradient.items()}}
        feeds.update(learning_rate=np.array(rate(t)), t=np.array(t))
        arrays = {key[:-len('/new')]: x for key, x in zip(evaluator.output_names, evaluator.run(None, feeds))}
    expected, _, travelled = run_rule(name, hypers, weights, gradients[:5])
    assert_near({key: np.asarray(arrays[key]) for key in weights}, expected, travelled, 1e-12)


def test_coefficients_keep_their_digits():
    weights, gradients = {'w': np.zeros(1)}, [{'w': np.ones(1)}]
    for beta2 in (0.999, 1 - 1e-7, 0.0):
        model = export_step('adamw', {'w': (1,)}, 'float64', wd=0, beta2=beta2, epsilon=0)
        for t in (1, 1000, 10 ** 9):
            arrays = {'w': np.zeros(1), 'w/mean': np.ones(1), 'w/var': np.ones(1)}
            found = run_model(model, arrays, gradients, t - 1)['w'][0]
            h = rules.get('adamw').hyperparameters(wd=0, beta2=beta2, epsilon=0, learning_rate=rate(t))
            expected, _ = rules.get('adamw').run(np, h, t, weights['w'], gradients[0]['w'], {'mean': np.ones(1), 'var': np.ones(1)})
            assert abs(found / expected[0] - 1) < 1e-14


def test_sums_are_accumulated_in_double():
    size = 1 << 16
    model = export_step('novograd', {'w': (size + 1,)}, beta2=0.0)
    gradient = np.full(size + 1, 2.0 ** -12, 'float32')
    gradient[0] = 2.0 ** 4
    start = {'w': np.zeros(size + 1, 'float32'), **initial_slots('novograd', {'w': gradient})}
    found = run_model(model, start, [{'w': gradient}])
    assert found['w/norm_sq'] == np.float32(2.0 ** 8 + size * 2.0 ** -24)


@pytest.mark.parametrize('name', ['novograd', 'adamw', 'asgd', 'larc'])
def test_half_weights_follow_their_masters(name):
    weights, gradients = weights_and_gradients('float16', 5)
    model = export_step(name, SHAPES, 'float16')
    found = run_model(model, initial_slots(name, weights), gradients)
    singles = {key: w.astype('float32') for key, w in weights.items()}
    expected = run_model(export_step(name, SHAPES), {**singles, **initial_slots(name, singles)},
                         [{key: g.astype('float32') for key, g in gradient.items()} for gradient in gradients])
    for key in weights:
        assert found[key].dtype == np.float16 and found[key].tobytes() == found[key + '/master'].astype('float16').tobytes()
        assert found[key + '/master'].tobytes() == expected[key].tobytes()


def test_names_and_types():
    model = export_step('asgd', {'w': (2, 3)}, 'float64')
    kinds = {x.name: (x.type.tensor_type.elem_type, [d.dim_value for d in x.type.tensor_type.shape.dim])
             for x in [*model.graph.input, *model.graph.output]}
    double, whole = onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64
    state = {'w': [2, 3], 'w/average': [2, 3], 'w/eta': [], 'w/mu': []}
    assert kinds == {'learning_rate': (double, []), 't': (whole, []), 'w/grad': (double, [2, 3]),
                     **{key: (double, shape) for key, shape in state.items()},
                     **{key + '/new': (double, shape) for key, shape in state.items()}}
    assert model.producer_name == 'gluon_optim' and model.opset_import[0].version == 17


@pytest.mark.parametrize('error, message, arguments, hypers', [
    (ValueError, "Unknown optimizer 'novogard'", ('novogard', SHAPES), {}),
    (TypeError, "Unknown argument of adamw 'beta'", ('adamw', SHAPES), {'beta': 1}),
    (ValueError, '`beta1` must be in', ('adamw', SHAPES), {'beta1': 1.0}),
    (ValueError, '`dtype` must be one of', ('adamw', SHAPES, 'bfloat16'), {}),
    (TypeError, '`shapes` must be a dictionary', ('adamw', [(2, 3)]), {}),
    (TypeError, '`shapes` must be a dictionary', ('adamw', {}), {}),
    (ValueError, "shape of 'w' must be", ('adamw', {'w': (2.5,)}), {}),
    (ValueError, "shape of 'w' must be", ('adamw', {'w': (-1,)}), {}),
    (ValueError, "shape of 'w' must be", ('adamw', {'w': 3}), {}),
    (ValueError, "Received: 'w/mean' twice", ('adamw', {'w': (2,), 'w/mean': (2,)}), {}),
    (ValueError, "Received: 't' twice", ('adamw', {'t': (2,)}), {}),
    (ValueError, "Received: 'w/new' twice", ('adamw', {'w': (2,), 'w/new': (2,)}), {}),
])
def test_refusals(error, message, arguments, hypers):
    with pytest.raises(error) as caught:
        export_step(*arguments, **hypers)
    assert message in str(caught.value)


def test_rules_that_cannot_be_traced_are_refused():
    class Matrix(rules.get('sgd_torch')):
        name, lowerable = 'matrix', False

    class Power(rules.get('sgd_torch')):
        name = 'power'

        @staticmethod
        def coefficients(xp, h, t):
            return dict(lr=math.exp(t), wd=0.0)

    for rule in (Matrix, Power):
        rules.add(rule)
        try:
            with pytest.raises(ValueError, match=f"'{rule.name}' cannot be written in ONNX operators"):
                export_step(rule.name, SHAPES)
        finally:
            del rules.registry.RULES[rule.name]


def test_without_onnx_there_is_one_line_that_says_what_to_do():
    code = ("import sys; sys.modules['onnx'] = None\nimport gluon_optim\nimport gluon_optim.mapping.state_dict\n"
            "try:\n    import gluon_optim.onnx\nexcept ImportError as error:\n    print(error)")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout.startswith('gluon_optim.onnx needs the package onnx, and importing failed: ')
    assert done.stdout.endswith(". In a checkout of gluon_optim, pip install '.[onnx]'\n")


# -- states into ONNX and back -----------------------------------------------------------------------------------------

def combined(model):
    """The model that the standard defines for a training step: the algorithm appended to the graph."""
    training, graph = model.training_info[0], onnx.GraphProto()
    graph.CopyFrom(model.graph)
    graph.MergeFrom(training.algorithm)
    graph.name = 'combined'
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('name', rules.names())
def test_states_into_onnx_and_back(name, dtype, tmp_path):
    hypers = dict(settings(name, {}), rescale_grad=1.0)
    states, weights = states_of(name, hypers, dtype, scheduler={'class': 'a.b', 'attributes': {'base_lr': 0.25, 'step': 3}})
    onnx.save(to_onnx(states, weights=weights), str(tmp_path / 'states.onnx'))
    model = onnx.load(str(tmp_path / 'states.onnx'))
    onnx.checker.check_model(model, full_check=True)
    session(combined(model))  # it is checked and loads
    back = from_onnx(model)
    assert digest(back) == digest(states)
    assert (back.parameters, back.hypers, back.scheduler) == (states.parameters, states.hypers, states.scheduler)

    training = model.training_info[0]
    held = {x.name for x in [*model.graph.initializer, *training.algorithm.initializer]}
    produced = {x.name for x in training.algorithm.output}
    assert {x.key: x.value for x in training.update_binding} == {key: key + '/new' for key in held}
    assert produced == {key + '/new' for key in held} and held >= {'t', *weights}

    step, arrays = unpack(model)
    for key, weight in weights.items():
        assert arrays[key].tobytes() == weight.tobytes()
    _, gradients = weights_and_gradients(dtype, seed=2)
    expected, _, travelled = run_rule(name, hypers, weights, gradients, 10, states.slots)
    found = run_model(step, arrays, gradients, 10, counted=True)
    assert_near(found, expected, travelled, LIMITS[dtype])

    for tensor in [*model.graph.initializer, *training.algorithm.initializer]:  # as a training runtime does
        tensor.CopyFrom(onnx.numpy_helper.from_array(found[tensor.name], tensor.name))
    later = from_onnx(model)
    assert later.num_update == 30 and set(later.counts.values()) == {30}
    for key, own in later.slots.items():
        assert all(array.tobytes() == found[f'{key}/{slot}'].tobytes() for slot, array in own.items())


def test_counts_multipliers_masters_and_fresh_parameters():
    weights, gradients = weights_and_gradients('float16', 8)
    infos = [ParameterInfo('weight', 'w', (4, 3), 'float16', 0.5, 1.0), ParameterInfo('bias', 'b', (3,), 'float16', 1.0, 0.0),
             ParameterInfo('one', 'o', (1,), 'float16'), ParameterInfo('number', 'n', (), 'float16')]
    rule, masters, slots, counts = rules.get('adamw'), {}, {}, {'weight': 3, 'bias': 5, 'one': 0, 'number': 3}

    def advance(key, times, begin):
        info = next(info for info in infos if info.name == key)
        masters.setdefault(key, weights[key].astype('float32'))
        for t in range(begin + 1, begin + times + 1):
            h = rule.hyperparameters(wd=0.1 * info.wd_mult, learning_rate=rate(5 - counts[key] + t) * info.lr_mult)
            gradient = gradients[(t - 1) % 8][key].astype('float32')
            w, own = rule.run(np, h, t, masters[key], gradient, slots.get(key))
            masters[key], slots[key] = np.asarray(w, 'float32'), {k: np.asarray(v, 'float32') for k, v in own.items()}

    for key in ('weight', 'bias', 'number'):
        advance(key, counts[key], 0)
    hypers = rule.hyperparameters(wd=0.1).asdict()
    states = OptimizerStates('adamw', hypers, 7, infos, dict(counts), dict(slots), dict(masters))
    with pytest.raises(ValueError, match="'one' has not been updated yet, and its state starts from its weight. Pass `weights`"):
        to_onnx(states)
    model = to_onnx(states, weights=weights)
    back = from_onnx(model)
    assert digest(back) == digest(states) and back.parameters == infos and 'one' not in back.slots
    step, arrays = unpack(model)
    assert arrays['weight'].tobytes() == masters['weight'].astype('float16').tobytes()
    assert {x.name for x in step.graph.input} >= set(arrays)  # all that comes out can be fed again
    by_count = [{key: gradients[(counts[key] + k) % 8][key] for key in weights} for k in range(4)]
    found = run_model(step, arrays, by_count, 5, counted=True)
    for key in weights:
        advance(key, 4, counts[key])
        np.testing.assert_allclose(found[key + '/master'], masters[key], rtol=3e-7)
        assert found[key].tobytes() == found[key + '/master'].astype('float16').tobytes()


def test_without_weights_they_are_inputs():
    states, weights = states_of('sgd_torch', {'momentum': 0.9})
    model = to_onnx(states, params=['one', 'weight'])
    onnx.checker.check_model(model, full_check=True)
    assert not model.graph.initializer
    step, arrays = unpack(model)
    assert [x.name for x in model.training_info[0].algorithm.input] == ['learning_rate', 'one', 'one/grad', 'weight', 'weight/grad']
    found = run_model(step, {**arrays, 'one': weights['one'], 'weight': weights['weight']},
                      [{key: weights[key] for key in ('one', 'weight')}], 10, counted=True)
    assert set(found) == {'t', 'one', 'one/momentum_buffer', 'weight', 'weight/momentum_buffer'} and found['t'] == 12
    assert from_onnx(model).names == ['one', 'weight']


def test_the_report_says_what_to_do():
    scheduler = {'class': 'mxnet.lr_scheduler.FactorScheduler', 'attributes': {}}
    states, weights = states_of('novograd', {'rescale_grad': 0.5, 'learning_rate': 0.25}, scheduler=scheduler)
    to_onnx(states, weights=weights)
    report = '\n'.join(states.report)
    assert 'the ONNX model: exact; 4 parameters, update 10' in report and 'rescale_grad=0.5 is not carried over' in report
    assert 'feed `learning_rate` at each step, starting with update 11' in report and 'FactorScheduler' in report
    assert '0.25' in report and 'param_groups' not in report
    h = rules.get('novograd').hyperparameters(**dict(states.hypers, rescale_grad=1.0))
    step, arrays = unpack(to_onnx(states, weights=weights))
    found = run_model(step, arrays, [weights], 10, counted=True)
    w, h = weights['one'], h.replace(learning_rate=rate(11))
    new, _ = rules.get('novograd').run(np, h, 11, w, w, states.slots['one'])
    np.testing.assert_allclose(found['one'], new, rtol=1e-6)


@pytest.mark.parametrize('message, change', [
    ("Unknown target 'torch'", lambda s, w: dict(target='torch')),
    ("Unknown parameter 'wieght'", lambda s, w: dict(params=['wieght'])),
    ("none for 'number'", lambda s, w: dict(weights={key: w[key] for key in w if key != 'number'})),
    ("'weight' must be float32 of shape (4, 3)", lambda s, w: dict(weights=dict(w, weight=w['weight'].T))),
    ("'one' must be float32", lambda s, w: dict(weights=dict(w, one=w['one'].astype('float64')))),
    ("'mean' of 'bias' must have shape (3,)", lambda s, w: s.slots['bias'].update(mean=np.zeros(4, 'float32'))),
    ("must hold 'mean'", lambda s, w: s.slots['bias'].pop('mean') * 0),
    ('ONNX would lose the variables', lambda s, w: s.variables.update(x=np.ones(1))),
])
def test_states_that_do_not_fit_are_refused(message, change):
    states, weights = states_of('adamw', {})
    changed = change(states, weights)
    with pytest.raises(ValueError) as caught:
        to_onnx(states, **(changed if isinstance(changed, dict) else {}))
    assert message in str(caught.value) and not states.report


def test_foreign_models_are_refused():
    model = export_step('adamw', SHAPES)
    for function in (from_onnx, unpack):
        with pytest.raises(ValueError, match='must (be made by `to_onnx`|have training_info)'):
            function(model)
    states, weights = states_of('adamw', {})
    model = to_onnx(states, weights=weights)
    del model.training_info[0].algorithm.initializer[0]
    with pytest.raises(ValueError, match="the arrays 'weight/mean' must be there"):
        from_onnx(model)


def test_too_large_a_file_is_refused_before_it_is_made(monkeypatch):
    import gluon_optim.onnx.states
    monkeypatch.setattr(gluon_optim.onnx.states, 'LARGEST', 100)
    states, weights = states_of('adamw', {})
    with pytest.raises(ValueError, match='must be below 2 GiB'):
        to_onnx(states, weights=weights)


# -- every optimizer, every step ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
@pytest.mark.parametrize('name, which', conversion_runs.CASES)
def test_a_run_goes_on_in_onnx_and_comes_back(name, which, dtype, tmp_path):
    states, weights = conversion_runs.half_trained(name, which, dtype)
    write(tmp_path / 'run.onnx', states, weights=weights)
    model = onnx.load(str(tmp_path / 'run.onnx'))
    back, held = read(tmp_path / 'run.onnx')
    assert digest(back) == digest(states) == digest(from_onnx(model)) and back.hypers == states.hypers
    assert back.parameters == states.parameters and {key: held[key].tobytes() for key in held} == {
        key: weights[key].tobytes() for key in weights}
    gradients = conversion_runs.gradients_of(dtype, STEPS, 2)
    found = run_model(*unpack(model), gradients, 10, counted=True)
    after, new, travelled = conversion_runs.advance(states, weights, gradients, 10)
    conversion_runs.assert_near({key: found.get(key + '/master', found[key]) for key in weights}, after, new, travelled)
    if dtype == 'float16':
        assert all(found[key].tobytes() == found[key + '/master'].astype('float16').tobytes() for key in weights)


@pytest.mark.parametrize('name', ['ftml', 'lamb', 'adam', 'adam_torch', 'radam', 'novograd', 'lans', 'nadam_torch', 'adabelief'])
def test_late_in_a_run(name):
    states, weights = conversion_runs.half_trained(name, 'usual')
    states = conversion_runs.late(states, 100_000)
    gradients = conversion_runs.gradients_of('float32', STEPS, 2)
    found = run_model(*unpack(to_onnx(states, weights=weights)), gradients, 10, counted=True)
    conversion_runs.assert_near(found, *conversion_runs.advance(states, weights, gradients, 10))


# -- the optimizers of the standard itself -----------------------------------------------------------------------------

EXACT = [  # numbers that float32 holds, as the attributes of these operators are
    ('adam', dict(beta1=0.875, beta2=0.96875, epsilon=2.0 ** -10, wd=0.125)), ('adam', dict(beta1=0.0, beta2=0.5, epsilon=0.25)),
    ('sgd_torch', dict(momentum=0.875, wd=0.125)), ('sgd_torch', dict(momentum=0.5, dampening=0.25, wd=0.125)),
    ('sgd_torch', dict(momentum=0.875, nesterov=True, wd=0.125)), ('sgd_ema', dict(momentum=0.875, wd=0.125)),
    ('adagrad_torch', dict(epsilon=2.0 ** -10, lr_decay=0.0625, initial_accumulator=0.5, wd=0.125)),
]


def evaluate(model, arrays, gradients, begin):
    """`run_model` on the evaluator that comes with the standard: ONNX Runtime has no kernels for these."""
    reference = pytest.importorskip('onnx.reference')
    onnx.checker.check_model(model)
    evaluator, arrays = reference.ReferenceEvaluator(model), dict(arrays)
    for t, gradient in enumerate(gradients, begin + 1):
        feeds = {**arrays, **{key + '/grad': g for key, g in gradient.items()}, 'learning_rate': np.array(rate(t))}
        arrays = {key[:-len('/new')]: np.asarray(x) for key, x in zip(evaluator.output_names, evaluator.run(None, feeds))}
    return arrays


def assert_as_after(found, after, new, travelled):
    """The evaluator may compute in double what it was given in single precision; its operators are written in another order."""
    found = {key: found.get(key + '/master', found[key]).astype(after.master.get(key, new[key]).dtype) for key in new}
    conversion_runs.assert_near(found, after, new, travelled)


def trained(name, hypers, dtype, updates=10):
    infos = [ParameterInfo(key, key, shape, dtype, *((0.5, 2.0) if key == 'bias' else ()))
             for key, shape in conversion_runs.SHAPES.items()]
    fresh = OptimizerStates(name, rules.get(name).hyperparameters(**hypers).asdict(), 0, infos, dict.fromkeys(SHAPES, 0), {})
    if not updates:
        return fresh, conversion_runs.weights_of(dtype)
    return conversion_runs.advance(fresh, conversion_runs.weights_of(dtype), conversion_runs.gradients_of(dtype, updates, 1), 0)[:2]


@pytest.mark.parametrize('updates', [0, 1, 10])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
@pytest.mark.parametrize('name, hypers', EXACT)
def test_the_optimizers_of_the_standard_compute_the_same(name, hypers, dtype, updates, tmp_path):
    states, weights = trained(name, hypers, dtype, updates)
    write(tmp_path / 'run.onnx', states, 'preview', weights=weights)
    model = onnx.load(str(tmp_path / 'run.onnx'))
    onnx.checker.check_model(model)
    assert digest(from_onnx(model)) == digest(states) and ': exact; 4 parameters' in states.report[0]
    nodes = [node for node in model.training_info[0].algorithm.node if node.domain == 'ai.onnx.preview.training']
    assert len(nodes) == 4 and {(x.domain, x.version) for x in model.opset_import} >= {('ai.onnx.preview.training', 1)}
    gradients = conversion_runs.gradients_of(dtype, STEPS, 2)
    found = evaluate(*unpack(model), gradients, updates)
    after, new, travelled = conversion_runs.advance(states, weights, gradients, updates, exact=True)
    assert_as_after(found, after, new, travelled)


def test_the_optimizers_of_the_standard_count_each_parameter():
    states, weights = trained('adam', EXACT[0][1], 'float32')
    states.counts.update(weight=3, one=7)
    gradients = conversion_runs.gradients_of('float32', 5, 2)
    found = evaluate(*unpack(to_onnx(states, 'preview', weights=weights)), gradients, 10)
    assert_as_after(found, *conversion_runs.advance(states, weights, gradients, 10))
    assert found['t'] == 16


@pytest.mark.parametrize('hypers, dtype, words', [
    (dict(beta2=0.999), 'float32', ['beta=0.999', 'off by up to 1.3e-05']), (dict(wd=0.1), 'float64', ['norm_coefficient=0.1']),
    (dict(epsilon=1e-8), 'float64', ['epsilon=1e-08']),
])
def test_digits_that_the_standard_cannot_hold_are_said(hypers, dtype, words):
    states, weights = trained('adam', dict(EXACT[0][1], **hypers), dtype)
    with pytest.raises(ValueError, match='ONNX would lose digits') as caught:
        to_onnx(states, 'preview', weights=weights)
    assert all(word in str(caught.value) for word in words) and not states.report
    to_onnx(states, 'preview', weights=weights, allow_lossy=True)
    assert ': approximate; ' in '\n'.join(states.report) and states.report[0].startswith('lost: digits')


@pytest.mark.parametrize('name, hypers, reason', [
    ('adam_torch', {}, 'epsilon after bias correction'), ('adamw', {}, 'decay is multiplied by the learning rate'),
    ('adagrad', {}, 'eps inside the root'), ('sgd', {'momentum': 0.5}, 'inside its momentum'), ('novograd', {}, 'none of those'),
    ('sgd_torch', {}, 'no momentum buffer'), ('adam', {'clip_gradient': 1.0}, 'no clip_gradient'),
    ('sgd_ema', {'nesterov': True}, 'nesterov weights'), ('sgd_ema', {'bias_correction': True}, 'bias_correction'),
])
def test_what_the_standard_does_not_compute_is_refused(name, hypers, reason):
    states, weights = trained(name, hypers, 'float32')
    with pytest.raises(ValueError, match='is not one of the optimizers of ai.onnx.preview.training') as caught:
        to_onnx(states, 'preview', weights=weights)
    assert reason in str(caught.value) and "target='mirror'" in str(caught.value)
