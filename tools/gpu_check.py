#!/usr/bin/env python
"""Check optimizers on this machine's GPU, and measure them. Needs PyTorch with CUDA, Triton and NumPy; not MXNet.

    python tools/gpu_check.py                        all rules, then the timings; a few minutes
    python tools/gpu_check.py --rules adamw novograd --no-timing
    python tools/gpu_check.py --json figures.json    also writes what it prints as JSON

For every rule that has a mirror, and each type of weights (float32, float64, float16 and bfloat16 with masters, and these two with
compensations, multi_precision='kahan'), it takes eight steps by kernels and checks

    rule      the same steps by the rule in NumPy, in float64: the distance in units of the way that the weights have gone
    plain     and by PyTorch's operations on the GPU, likewise
    again     a second run gives the same bits
    waits     no step synchronises with the host (torch.cuda.set_sync_debug_mode)
    launches  as many kernels of ours in a step as the plan has passes
    graph     with capturable=True, replays of a CUDA graph do what steps do
    resumed   a state_dict through a file and on, bit for bit

Then the CUDA kernels that MXNet launches: by MXNet, where its wheel runs on this GPU (up to compute capability 8.6), else the same
source by NVRTC and the CUDA driver, on PyTorch's memory. It says which. They are held to rule and again, and timed; sgld and
psgld, which have no mirror, among them. Their noise must be NumPy's: bit for bit in float32, to rounding in float64.

Exit codes: 0 all hold, 1 one does not, 2 there is no GPU to use.
"""
import argparse
import fnmatch
import importlib.util
import io
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy
import torch
from bench_competitors import resnet50
from cuda_check import KEY, MXNetSteps, TorchSteps, mxnet_runs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gluon_optim import list_optimizers, rules
from gluon_optim.rules.base import initial_slot, scalars
from gluon_optim.rules.mx.base import MXRule
from gluon_optim.rules.noise import Noise, normals
from gluon_optim.rules.runtimes import mirrored, runs_on
from gluon_optim.schema import compute_type
from gluon_optim.torch import create

SHAPES = ((64, 3, 7, 7), (64,), (), (1000, 129), (9001,), (1,))
STEPS = 8
SAMPLERS = ('sgld', 'psgld')
TYPES = ('float32', 'float64', 'float16', 'bfloat16', 'kahan-float16', 'kahan-bfloat16')
# of the way that a weight has gone: single and double precision, several operations and a sum of many numbers
LIMITS = {kind: 1e-12 if kind == 'float64' else 2e-5 for kind in TYPES}
# of a weight, what a step may lose of it: a weight and its compensation have that many digits
LOST = {'kahan-float16': 2.0 ** -23, 'kahan-bfloat16': 2.0 ** -17}
NOISE_LIMITS = {'float32': 0.0, 'float64': 1e-14}
# MXNet's own compute 1 - beta^t in single precision, and a graph, on the device, in double
GRAPH_LIMIT = 5e-4
USUAL = dict(momentum=0.8, wd=0.05, epsilon=2e-3, beta1=0.8, beta2=0.97, trust_coefficient=0.5)


def hypers_of(name):
    """A large rate, and what the rule allows of `USUAL`."""
    rule, given = rules.get(name), dict(clip_gradient=1.5, rescale_grad=0.5)
    for key, value in dict(USUAL, learning_rate=0.1, noise='philox').items():
        try:
            rule.hyperparameters(**given, **{key: value})
            given[key] = value
        except (TypeError, ValueError):
            continue
    return given


class Data:
    """Weights, and gradients for each step; ``kind`` is one of `TYPES`."""

    def __init__(self, kind):
        self.kind, (kahan, _, dtype) = kind, kind.rpartition('-')
        self.multi_precision = kahan or True
        self.dtype, random = getattr(torch, dtype), numpy.random.default_rng(1)
        self.weights = [torch.tensor(random.normal(size=shape)).to(self.dtype) for shape in SHAPES]
        self._gradients = [[torch.tensor(random.normal(size=shape) * 10.0 ** -(t % 3)).to(self.dtype) for shape in SHAPES]
                           for t in range(2 * STEPS)]
        self.gradients = [[g.double().numpy() for g in gradients] for gradients in self._gradients]


class Run(Data):
    """Some steps of one optimizer on the GPU."""

    def __init__(self, name, kind, **options):
        super().__init__(kind)
        self.params = [torch.nn.Parameter(weight.cuda()) for weight in self.weights]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.optimizer = create(name, self.params, multi_precision=self.multi_precision, **hypers_of(name), **options)
        self._on_device = [[g.cuda() for g in gradients] for gradients in self._gradients]

    def feed(self, t):
        for p, gradient in zip(self.params, self._on_device[t]):
            p.grad.copy_(gradient)

    def steps(self, begin, end):
        for t in range(begin, end):
            self.feed(t)
            self.optimizer.step()
        return self

    def exact(self):
        """The weights that count: masters where there are some, and weights with their compensations."""
        return [exact_weight(p, self.optimizer.state[p]).double().cpu().numpy() for p in self.params]

    def all(self):
        return [tensor.detach().cpu().clone() for p in self.params for tensor in (p, *self.optimizer.state[p].values())]


def exact_weight(param, state):
    if 'compensation' in state:
        return param.detach().float() + state['compensation'].float()
    return state.get('master', param).detach()


def is_rounded(weight, state):
    """Whether ``weight`` is the exact one, rounded: what is lost is half of the last digit at most."""
    if 'compensation' not in state:
        return torch.equal(weight, state.get('master', weight).to(weight.dtype))
    facts = torch.finfo(weight.dtype)
    return bool((state['compensation'].abs() <= facts.eps / 2 * weight.abs().clamp(min=facts.smallest_normal).float()).all())


def by_rule(name, run):
    """Weights after `STEPS` steps by the rule in float64, and the way that each has gone, and what rounding takes of it besides."""
    rule, results = rules.get(name), []
    h = rule.hyperparameters(**hypers_of(name))
    if run.kind == 'float16':
        rule = rule.on_masters()
    for i, weight in enumerate(run.weights):
        w, way = weight.double().numpy(), 0.0
        slots = {slot.name: initial_slot(slot, w) for slot in rule.slots(h)}
        for t in range(STEPS):
            c = rule.all_coefficients(rule.numbers(scalars, compute_type(run.dtype)), h, t + 1)
            new, slots = rule.apply(Noise(numpy, KEY, i, t + 1), rule.static(h), c, w, run.gradients[t][i], slots)
            way, w = way + numpy.abs(new - w).max(), new
        rounding = STEPS * LOST.get(run.kind, 0.0) * numpy.abs(w).max()
        results.append((w, way + rounding / LIMITS[run.kind]))
    return results


def check(name, dtype):
    """What one rule does for one type, as a row of figures."""
    run = Run(name, dtype, fused=True).steps(0, 1)   # compiles
    torch.cuda.synchronize()
    row = dict(name=name, dtype=dtype)
    for t in range(1, STEPS):
        run.feed(t)
        torch.cuda.set_sync_debug_mode('error')
        try:
            run.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    expected = by_rule(name, run)
    row['rule'] = max(distance(w, e, way) for w, (e, way) in zip(run.exact(), expected))
    plain = Run(name, dtype, fused=False).steps(0, STEPS)
    row['plain'] = max(distance(w, p, way) for w, p, (_, way) in zip(run.exact(), plain.exact(), expected))
    again = Run(name, dtype, fused=True).steps(0, STEPS)
    row['again'] = all(map(torch.equal, run.all(), again.all()))
    row['stored'] = all(is_rounded(p.detach(), run.optimizer.state[p]) for p in run.params)
    row['passes'], row['launches'] = launches(again)
    row['graph'] = graph(name, dtype)
    row['resumed'] = resumed(name, dtype, run)
    limit = GRAPH_LIMIT if issubclass(rules.get(name), MXRule) else LIMITS[dtype]
    right = row['rule'] <= LIMITS[dtype] or (name == 'signum' and dtype != 'float64')  # the sign of a sum that cancels
    row['holds'] = bool(right and row['plain'] <= LIMITS[dtype] and row['again'] and row['stored']
                        and row['launches'] == row['passes'] and row['graph'] <= limit and row['resumed'])
    return row


def distance(a, b, way):
    return float(numpy.abs(a - b).max() / max(way, 1e-300)) if numpy.isfinite(a).all() else math.inf


def launches(run):
    """How many passes the plans have, and how many kernels of ours a step launches."""
    passes = sum(len(bucket._batch.kernel.passes) for bucket in run.optimizer._launches._batches)
    run.feed(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.optimizer.step()
        torch.cuda.synchronize()
    return passes, sum('pass_' in event.name and event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def graph(name, dtype):
    """The distance of replays of a CUDA graph to steps without one, in units of the way gone."""
    run = Run(name, dtype, fused=True, capturable=True)
    run.feed(0)
    replay = graphed(run.optimizer)   # two steps
    for t in range(2, STEPS):
        run.feed(t)
        replay()
    plain = Run(name, dtype, fused=True)
    for t in (0, 0, *range(2, STEPS)):
        plain.steps(t, t + 1)
    ways = [way for _, way in by_rule(name, run)]
    return max(distance(a, b, way) for a, b, way in zip(run.exact(), plain.exact(), ways))


def whole_graph():
    """The largest distance of a net trained by a CUDA graph, in which its gradients are made, to one trained without."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 20, device='cuda'), torch.randn(64, 1, device='cuda')

    def net():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).cuda()
        return model, create('novograd', model.parameters(), lr=torch.tensor(0.05, device='cuda'), capturable=True)

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()

    (one, optimizer), (other, by_hand) = net(), net()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(one, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step(one, optimizer)
    for t in range(3, 20):
        optimizer.param_groups[0]['lr'].fill_(0.05 / t)   # a schedule: replays read it
        captured.replay()
    for t in range(20):
        by_hand.param_groups[0]['lr'].fill_(0.05 if t < 3 else 0.05 / t)
        step(other, by_hand)
    return max(float((a - b).abs().max()) for a, b in zip(one.parameters(), other.parameters()))


def resumed(name, dtype, straight):
    """Whether a run that went through a file ends where the straight one does."""
    first = Run(name, dtype, fused=True).steps(0, STEPS)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    second = Run(name, dtype, fused=True)
    for mine, theirs in zip(second.params, first.params):
        mine.data.copy_(theirs.data)
    second.optimizer.load_state_dict(torch.load(file, weights_only=True))
    straight.steps(STEPS, 2 * STEPS)
    second.steps(STEPS, 2 * STEPS)
    return all(map(torch.equal, straight.all(), second.all()))


# The CUDA kernels of MXNet's GPU contexts


def check_kernels(kind, name, dtype, device=None):
    """What steps of the class ``kind`` do, as a row of figures."""
    def steps():
        made = kind(rules.get(name), rules.get(name).hyperparameters(**hypers_of(name)), data.weights, device, data.multi_precision)
        for t in range(STEPS):
            made.step(t + 1, data._gradients[t])
        return made

    data = Data(dtype)
    first, second = steps(), steps()
    far = max(distance(w, e, way) for w, (e, way) in zip(first.exact(), by_rule(name, data)))
    again = all(map(numpy.array_equal, first.exact(), second.exact()))
    right = far <= LIMITS[dtype] or (name == 'signum' and dtype != 'float64')
    return dict(name=name, dtype=dtype, by=first.by, rule=far, again=again, launches=first.launches(), holds=bool(right and again))


def check_noise(kind, dtype, device=None):
    """The noise of a step of sgld that adds nothing else to weights of 0."""
    rule, weights = rules.get('sgld'), [torch.zeros(size, dtype=getattr(torch, dtype)) for size in (300_000, 1, 64)]
    steps = kind(rule, rule.hyperparameters(learning_rate=1.0, noise='philox'), weights, device)
    steps.step(1)
    far = max(abs(w - normals(KEY, i, 1, 0, w.size, dtype)).max() for i, w in enumerate(steps.exact()))
    return dict(name='noise', dtype=dtype, by=steps.by, rule=float(far), holds=bool(far <= NOISE_LIMITS[dtype]))


def measure_kernels(kind, name, case):
    """Milliseconds of a step with float32 weights; with MXNet those of the host, which waits for all of several steps."""
    weights = [torch.randn(shape) * 0.1 for shape in CASES[case]]
    steps = kind(rules.get(name), rules.get(name).hyperparameters(learning_rate=1e-4), weights)
    steps.step(1)
    if kind is TorchSteps:
        return statistics.median(timed(lambda: steps.step(2)) for _ in range(ROUNDS)) * 1e3
    steps.nd.waitall()
    start = time.perf_counter()
    for t in range(ROUNDS):
        steps.step(t + 2)
    steps.nd.waitall()
    return (time.perf_counter() - start) / ROUNDS * 1e3


def mxnet_has(name, dtype):
    """MXNet has no bfloat16, and the states of its own optimizers hold no compensations."""
    return 'bfloat16' not in dtype and not (dtype.startswith('kahan') and issubclass(rules.get(name), MXRule))


def mxnet_kernels(names, options):
    """Rows of both, printed too."""
    kind = MXNetSteps if mxnet_runs() else TorchSteps
    print(f"\nthe CUDA kernels of MXNet's GPU contexts, by {kind.by}")
    checked, timings = [], []
    for dtype in () if options.no_check else NOISE_LIMITS:
        checked.append(check_noise(kind, dtype))
        print(f'{"noise":<20}{dtype:<16}{checked[-1]["rule"]:9.1e}{"" if checked[-1]["holds"] else "   DOES NOT HOLD"}', flush=True)
    for name in () if options.no_check else names:
        for dtype in options.dtypes:
            if kind is MXNetSteps and not mxnet_has(name, dtype):
                continue
            try:
                row = check_kernels(kind, name, dtype)
                print(f'{name:<20}{dtype:<16}{row["rule"]:9.1e}  {row["again"]!s:5} {row["launches"]} launches'
                      f'{"" if row["holds"] else "   DOES NOT HOLD"}', flush=True)
            except Exception as error:
                row = dict(name=name, dtype=dtype, by=kind.by, holds=False, error=f'{type(error).__name__}: {error}')
                print(f'{name:<20}{dtype:<16}{row["error"][:300]}', flush=True)
            checked.append(row)
    for case in () if options.no_timing else options.cases:
        for name in options.optimizers:
            timings.append(dict(case=case, optimizer=name, by=kind.by, ms=measure_kernels(kind, name, case)))
            print(f'{case:<10}{name:<20}{timings[-1]["ms"]:8.3f} ms', flush=True)
    return checked, timings


# Timings

CASES = {'resnet50': resnet50(), '2000': [(1000,)] * 2000, 'one': [(16384, 16384)]}
ROUNDS = 40


def competitors(shapes, dtype, ours):
    """{label: (a step, the bytes that it must move)}."""
    def parameters():
        made = [torch.nn.Parameter(torch.randn(shape, device='cuda').to(dtype) * 0.1) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p) * 1e-3
        return made

    few, elements, size = len(shapes) < 1000, sum(math.prod(shape) for shape in shapes), torch.finfo(dtype).bits // 8
    theirs = {'torch fused': lambda: torch.optim.AdamW(parameters(), lr=1e-4, fused=True)}
    if few:
        theirs['torch foreach'] = lambda: torch.optim.AdamW(parameters(), lr=1e-4, foreach=True)
    if importlib.util.find_spec('optimi'):
        optimi = importlib.import_module('optimi')
        theirs['optimi, Triton'] = lambda: optimi.AdamW(parameters(), lr=1e-4, triton=True)
    if importlib.util.find_spec('apex'):
        apex = importlib.import_module('apex.optimizers')
        theirs['Apex'] = lambda: apex.FusedAdam(parameters(), lr=1e-4)
    found = {f'adamw ({label})': (make().step, elements * 7 * size) for label, make in theirs.items()}
    if few:
        compiled = torch.compile(torch.optim.AdamW(parameters(), lr=torch.tensor(1e-4), capturable=True, foreach=True).step)
        found['adamw (torch.compile)'] = compiled, elements * 7 * size
    for name in ours:
        arguments = dict(momentum=0.9) if name == 'sgd_torch' else {}
        slots = sum(slot.like == 'weight' for slot in rules.get(name).slots(rules.get(name).hyperparameters(**arguments)))
        moved = elements * ((3 * size if dtype in (torch.float32, torch.float64) else 2 * size + 8) + 8 * slots)
        found[name] = create(name, parameters(), lr=1e-4, fused=True, **arguments).step, moved
        if few:
            found[f'{name} in a CUDA graph'] = graphed(create(name, parameters(), lr=1e-4, capturable=True, **arguments)), moved
    if few:
        found['adamw in operations'] = create('adamw', parameters(), lr=1e-4, fused=False).step, found['adamw'][1]
    return found


def graphed(optimizer):
    """A step as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        optimizer.step()

    def replay():
        captured.replay()
        return optimizer   # which owns what the graph reads
    return replay


def bandwidth():
    """Bytes per second of a copy within the device, read and written."""
    a = torch.empty(2 ** 28, device='cuda')
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a)) for _ in range(10))


def timed(step):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(case, dtype, ours):
    found = competitors(CASES[case], dtype, ours)
    device, host = ({label: [] for label in found} for _ in range(2))
    for turn in range(ROUNDS + 5):
        for label, (step, _) in found.items():
            start = time.perf_counter()
            seconds = timed(step)
            if turn >= 5:
                device[label].append(seconds)
                host[label].append(time.perf_counter() - start)
    rate, reference = bandwidth(), statistics.median(device['adamw (torch fused)'])
    return [dict(case=case, dtype=str(dtype)[6:], optimizer=label, ms=statistics.median(device[label]) * 1e3,
                 host_ms=statistics.median(host[label]) * 1e3, times_torch=statistics.median(device[label]) / reference,
                 times_floor=statistics.median(device[label]) * rate / moved, gigabytes_per_second=rate / 1e9)
            for label, (_, moved) in found.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rules', nargs='*', default=['*'], metavar='PATTERN', help='rules to check (default: all)')
    parser.add_argument('--dtypes', nargs='*', default=TYPES, choices=TYPES, help='types of weights (default: all)')
    parser.add_argument('--optimizers', nargs='*', default=['adamw', 'novograd', 'lamb', 'sgd_torch'], help='rules to measure')
    parser.add_argument('--cases', nargs='*', default=list(CASES), choices=list(CASES), help='what to measure (default: all)')
    parser.add_argument('--no-timing', action='store_true', help='only check')
    parser.add_argument('--no-check', action='store_true', help='only measure')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there')
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print('gpu_check needs a GPU: torch.cuda.is_available() is False.', file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    print(f'{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}')
    chosen = [name for name in (*list_optimizers(), *SAMPLERS) if any(fnmatch.fnmatch(name, pattern) for pattern in options.rules)]
    names = [name for name in chosen if mirrored(rules.get(name)) and runs_on(rules.get(name), 'kernels')]
    print(f'{"rule":<20}{"weights":<16}{"rule":>9}{"plain":>9}{"graph":>9}  again resumed launches/passes')
    checked, timings = [], []
    for name in () if options.no_check else names:
        for dtype in options.dtypes:
            try:
                row = check(name, dtype)
            except Exception as error:  # the others are still of interest
                row = dict(name=name, dtype=dtype, holds=False, error=f'{type(error).__name__}: {error}')
                print(f'{name:<20}{dtype:<16}{row["error"][:300]}', flush=True)
            else:
                holds = '' if row['holds'] else '   DOES NOT HOLD'
                print(f'{name:<20}{dtype:<16}{row["rule"]:9.1e}{row["plain"]:9.1e}{row["graph"]:9.1e}  {row["again"]!s:5} '
                      f'{row["resumed"]!s:7} {row["launches"]}/{row["passes"]}{holds}', flush=True)
            checked.append(row)
    if not options.no_check:
        far = whole_graph()
        print(f'a net in a CUDA graph: {far:.1e}')
        checked.append(dict(name='a net in a CUDA graph', distance=far, holds=far < 1e-5))
    for case in () if options.no_timing else options.cases:
        for dtype in (torch.float32, torch.bfloat16):
            rows = measure(case, dtype, options.optimizers)
            print(f'\n{case}, {str(dtype)[6:]}, copies {rows[0]["gigabytes_per_second"]:.0f} GB/s\n'
                  f'{"":30}{"ms":>8}{"x torch":>9}{"x floor":>9}{"host ms":>9}')
            for row in rows:
                print(f'{row["optimizer"]:<30}{row["ms"]:8.3f}{row["times_torch"]:9.2f}{row["times_floor"]:9.2f}'
                      f'{row["host_ms"]:9.3f}', flush=True)
            timings += rows
            torch.cuda.empty_cache()
    more, kernel_timings = mxnet_kernels([*names, *(name for name in SAMPLERS if name in chosen)], options)
    checked += more
    failed = [row for row in checked if not row['holds']]
    print(f'\n{len(checked) - len(failed)} of {len(checked)} hold')
    if options.json:
        figures = dict(card=card, torch=torch.__version__, checked=checked, timings=timings, mxnet_kernels=kernel_timings)
        Path(options.json).write_text(json.dumps(figures, indent=1))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
