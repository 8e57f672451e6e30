"""The competitors of tools/bench.py in ONNX Runtime: the step that `gluon_optim.onnx.export_step` writes.

There is nothing of ONNX Runtime's own beside it: its training package (onnxruntime-training) is no longer published.
"""
import numpy
from bench_competitors import Competitor, Framework, arguments_of, slots_of


def ours(name, data, dtype):
    """The exported step. It reads one set of arrays and writes another; at the next step they change places."""
    import onnxruntime

    from gluon_optim.onnx import export_step, initial_slots

    hypers = arguments_of(name)
    rate = hypers.pop('learning_rate')
    names = [f'parameter{i}' for i in range(len(data.shapes))]
    model = export_step(name, dict(zip(names, data.shapes)), dtype, **hypers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])

    value = onnxruntime.OrtValue.ortvalue_from_numpy
    weights = {key: weight.astype(dtype) for key, weight in zip(names, data.weights())}
    gradients = {f'{key}/grad': value(gradient.astype(dtype)) for key, gradient in zip(names, data.gradients())}
    inputs = {one.name for one in session.get_inputs()}
    arrays = {key: array for key, array in {**weights, **initial_slots(name, weights, **hypers)}.items()
              if key in inputs or key in weights}
    before = {key: value(numpy.array(array)) for key, array in arrays.items()}
    after = {key: value(numpy.array(array)) for key, array in arrays.items()}
    numbers = {key: value(array) for key, array in (('learning_rate', numpy.array(rate)), ('t', numpy.array(0))) if key in inputs}
    bindings = [bind(session, {**source, **gradients, **numbers}, target) for source, target in ((before, after), (after, before))]
    steps = 0

    def step():
        nonlocal steps
        steps += 1
        if 't' in numbers:
            numbers['t'].update_inplace(numpy.array(steps))
        session.run_with_iobinding(bindings[steps % 2 - 1])
    return Competitor(step, lambda: (after if steps % 2 else before)[names[0]].numpy().astype('float32'), slots_of(name), dtype)


def bind(session, source, target):
    """One set of arrays to read and one to write."""
    binding = session.io_binding()
    for one in session.get_inputs():
        binding.bind_ortvalue_input(one.name, source[one.name])
    for one in session.get_outputs():
        binding.bind_ortvalue_output(one.name, target[one.name[:-len('/new')]])
    return binding


FRAMEWORK = Framework(
    needs=('onnx', 'onnxruntime'), dtypes=('float32', 'float16'), cases=('resnet50', '200'),
    ours={'gluon_optim.onnx': ours}, others={}, beside=('torch_fused:adamw',))
