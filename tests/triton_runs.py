"""Steps by Triton's interpreter beside the same steps by numba's kernels, one JSON object per line. Run by test_triton.py in a
process of its own: TRITON_INTERPRET must be set before Triton is imported.

    python triton_runs.py float32|float64|float16|kahan-float16|kahan-bfloat16|counts|compile|noise [NAME ...]
"""
import json
import os
import sys

if __name__ == '__main__' and sys.argv[1] != 'compile':  # pytest imports this file too
    os.environ['TRITON_INTERPRET'] = '1'

import torch
import triton
import triton.language as tl
from conversion_runs import NAMES, hyper_sets, rate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

from gluon_optim import rules
from gluon_optim.lowering import triton as lowering
from gluon_optim.rules.base import scalars
from gluon_optim.rules.compensated import compensated
from gluon_optim.torch import create, executors, triton_batch

SHAPES = [(5, 3), (7,), (), (40, 9), (1,)]
CONVERT = interpreter._convert_float


def convert_float(data, source, target, mode):
    """Triton's interpreter cuts off what bfloat16 lacks. GPUs round to nearest even."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return CONVERT(data, source, target, mode)
    numbers = torch.frombuffer(bytearray(data.tobytes()), dtype=torch.float32)
    return numbers.bfloat16().view(torch.int16).numpy().view('uint16').reshape(data.shape)


interpreter._convert_float = convert_float
KERNELS = {'triton': {'cpu': ('gluon_optim.torch.triton_batch', 'triton')},
           'numba': {'cpu': ('gluon_optim.lowering.numba', 'numba')}}
# several items, several blocks in an item, and neither a divisor of the other
triton_batch.ITEM, triton_batch.BLOCK, triton_batch.SCALARS = 96, 32, 4


def run(name, hypers, dtype, backend, capturable=False, number=float):
    """Parameters and their states after four steps."""
    executors.KERNELS = KERNELS[backend]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    groups = [{'params': params[:2]}, {'params': params[2:]}]
    optimizer = create(name, groups, fused=True, capturable=capturable, **hypers)
    for t in range(1, 5):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype) * 10.0 ** -(t % 3)
        for group in optimizer.param_groups:
            group['lr'] = number(rate(t), dtype=torch.float64) if number is torch.tensor else rate(t)
        optimizer.step()
    return params, [optimizer.state[p] for p in params]


def exact(param, state):
    """A parameter, with its compensation where it has one, and the rest of its state."""
    compensation = state.get('compensation', 0.0)
    return [param.detach().float() + compensation, *(value for key, value in state.items() if key != 'compensation')]


def compare(name, dtype, **options):
    """The largest difference of anything, in units of the largest number."""
    hypers = dict(hyper_sets(name)['other'], **options)
    (params, states), (others, theirs) = (run(name, hypers, dtype, backend) for backend in ('triton', 'numba'))
    pairs = [(state[key], other[key]) for state, other in zip(states, theirs) for key in state]
    pairs += [(p.detach(), q.detach()) for p, q in zip(params, others)]
    near = pairs if not options else [
        pair for p, s, q, r in zip(params, states, others, theirs) for pair in zip(exact(p, s), exact(q, r))]
    far = max(float((a.double() - b.double()).abs().max() / max(float(b.double().abs().max()), 1e-30)) for a, b in near)
    return dict(name=name, dtype=str(dtype)[6:], far=far, equal=all(torch.equal(a, b) for a, b in pairs))


def compare_counts(name):
    """The same for counts and coefficients on the device, as ``capturable`` has them, and for a rate that is a tensor there."""
    hypers = hyper_sets(name)['other']
    usual = run(name, hypers, torch.float64, 'triton')
    executors.Launches.run = lambda launches, groups: launches._run_there(
        groups, [gradient for group in groups for gradient in group.gradients], launches._counts)
    there = [run(name, hypers, torch.float64, 'triton', True), run(name, hypers, torch.float64, 'triton', True, torch.tensor)]
    far = max(float((p - q).abs().max()) for other in there for p, q in zip(usual[0], other[0]))
    return dict(name=name, dtype='counts', far=far, step=[int(state['step']) for state in there[0][1]])


def compare_noise(name, dtype):
    """The same steps of a rule that draws noise, in both: on tensors of several items, of one element, and of none."""
    from gluon_optim.lowering import numba
    from gluon_optim.lowering.plan import NOISE
    rule = rules.get(name)
    h = rule.hyperparameters(learning_rate=0.1, temperature=1.7, wd=0.07)
    names = tuple(rule.all_coefficients(scalars, h, 1))
    precision = 'float64' if dtype == 'float64' else 'float32'
    results = []
    for module in (triton_batch, numba):
        random = torch.Generator().manual_seed(0)
        kernel = module.kernel(rule, rule.static(h), names, numba.Storage(dtype, dtype == 'float16'))
        sizes = (300, 1, 64, 65, 0)
        batch = module.Batch(kernel, sizes)
        types = {role: getattr(torch, dtype if role in ('gradient', 'half') else precision)
                 for role in kernel.roles if role not in NOISE}
        tensors = {role: [torch.rand(size, generator=random).to(one) for size in sizes] for role, one in types.items()}
        numbers = dict(noise_key=[2 ** 53 - 5] * 5, noise_stream=[0, 1, 2, 2 ** 32 - 1, 4], noise_update=[1, 2, 2 ** 31, 4, 5])
        for role, row in zip(kernel.roles, batch.addresses):
            row[:] = numbers[role] if role in NOISE else [tensor.data_ptr() for tensor in tensors[role]]
        c = rule.all_coefficients(scalars, h, 1)
        batch.run([[c[one] for one in names]], [0] * 5)
        results.append([tensor for role in tensors for tensor in tensors[role]])
    pairs = [(a, b) for a, b in zip(*results) if a.numel()]
    return dict(name=name, dtype=dtype, equal=all(torch.equal(a, b) for a, b in pairs),
                far=max(float((a.double() - b.double()).abs().max()) for a, b in pairs))


def compile_for(name, capability):
    """What Triton makes of a rule's passes for a GPU: that needs none."""
    rule = rules.get(name)
    h = rule.hyperparameters(**(hyper_sets(name)['other'] if name in NAMES else {}))
    coefficients = tuple(rule.all_coefficients(scalars, h, 1))
    around = compensated(rule, 'bfloat16')
    kernels = [lowering.kernel(rule, rule.static(h), coefficients, lowering.Storage('bfloat16', True)),
               lowering.kernel(around, around.static(h), coefficients, lowering.Storage('bfloat16'))]
    pointers = dict.fromkeys(('addresses', 'items', 'first_item', 'rows'), '*i64')
    signature = dict(pointers, partial='*fp64', kept='*fp32', table='*fp32', n='i32', n_items='i32', BLOCK='constexpr')
    for function, _ in (one for kernel in kernels for one in kernel.passes):
        source = ASTSource(fn=function, signature=signature, constexprs={'BLOCK': 1024})
        made = triton.compile(source, target=GPUTarget('cuda', capability, 32), options={'enable_fp_fusion': False})
        yield made.asm['ptx']


def main(mode, *names):
    if mode == 'compile':
        for name in names:
            for capability in (80, 90):
                for ptx in compile_for(name, capability):
                    approximate = [one for one in ('fma.rn.f32', 'div.full', 'div.approx', 'sqrt.approx') if one in ptx]
                    print(json.dumps(dict(name=name, capability=capability, approximate=approximate)))
        return
    if mode == 'noise':
        for name in names:
            for dtype in ('float32', 'float64', 'float16'):
                print(json.dumps(compare_noise(name, dtype)), flush=True)
        return
    for name in names or NAMES:
        if mode == 'counts':
            print(json.dumps(compare_counts(name)), flush=True)
            continue
        kahan, _, dtype = mode.rpartition('-')
        print(json.dumps(compare(name, getattr(torch, dtype), **({'multi_precision': kahan} if kahan else {}))), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
