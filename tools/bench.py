#!/usr/bin/env python
"""Measure how long one update takes: our optimizers, MXNet's own, PyTorch's, and other packages' NovoGrads.

    python tools/bench.py                                       all cases, some minutes
    python tools/bench.py --case resnet50 --rounds 30
    python tools/bench.py --case 2000 --optimizers novograd --peers 'torch_fused:*' '*:novograd'
    python tools/bench.py --case layouts --nets cnn             Trainer.step with every kvstore, on one context and two
    python tools/bench.py --dtype float16 --json figures.json --plot figures.png
    python tools/bench.py --peer-python other/bin/python        runs peers that this environment lacks under that one

All competitors are measured in one run, round by round in changing order, each with its own arrays. Every round also
measures the bandwidth of an in-place addition: `floor` is the time that the bytes an optimizer must move would take at that
rate. It reads the gradient, and reads and writes the weight and each slot of the weight's size (for float16 weights with
masters: the float16 weight is written, the float32 master read and written). Of what an optimizer of ours reads again, when
it knows a norm, the floor counts what exceeds the last cache (bench_floor.py).

Exit codes: 0 measured, 1 a competitor did not update its weights, 2 unusable arguments.
"""
import argparse
import fnmatch
import json
import os
import platform
import random
import shutil
import sys
import time
from pathlib import Path

import bench_floor
import bench_layouts
import bench_peers
import mxnet as mx
import numba
import numpy
from bench_peers import Competitor, Data, resnet50
from mxnet import gluon
from tqdm import tqdm

import gluon_optim as go

# so that each optimizer keeps its usual state, and none has less to compute than its peers
ARGUMENTS = {name: dict(momentum=0.9) for name in ('sgd', 'nag', 'signum', 'lars', 'lbsgd', 'sgd_torch')}
ARGUMENTS['novograd'] = dict(wd=bench_peers.DECAY)

MXNET = ('nothing', 'adam', 'sgd', 'lamb', 'nadam', 'adamax', 'ftml', 'adagrad', 'adadelta', 'rmsprop', 'nag', 'signum', 'ftrl',
         'lars')
REFERENCE = 'torch_fused:adamw'
PAUSE = 0.005  # seconds before each turn: the threads of the previous one are still spinning


CASES = {
    'resnet50': resnet50(),
    '2000': [(1000,)] * 2000,
    '200': [(1000,)] * 200,
    'one': [(5000, 5000)],
    'tiny': [(1000,), (30, 7), (1,)],  # to check that everything runs; left out unless requested
}


# Competitors in MXNet

class Nothing(mx.optimizer.Optimizer):
    """Updates nothing: what is left is the cost of MXNet's own lists."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.aggregate_num = 2 ** 31 - 1

    def create_state_multi_precision(self, index, weight):
        return ()

    def update_multi_precision(self, index, weight, grad, state):
        pass


def in_mxnet(optimizer, data, dtype):
    """{route: Competitor} of one optimizer, on the same parameters."""
    parameters = []
    for i, (weight, gradient) in enumerate(zip(data.weights(), data.gradients())):
        parameter = gluon.Parameter(f'parameter{i}', shape=weight.shape, dtype=dtype)
        parameter.initialize(mx.init.Zero())
        parameter.set_data(mx.nd.array(weight, dtype=dtype))
        parameter.grad()[:] = mx.nd.array(gradient, dtype=dtype)
        parameters.append(parameter)
    trainer = gluon.Trainer(parameters, optimizer)
    mark_fresh(parameters)
    trainer.update(1)
    mx.nd.waitall()
    updater = trainer._updaters[0]
    lists = list(range(len(parameters))), [p.grad() for p in parameters], [p.data() for p in parameters]

    def by_trainer():
        trainer.update(1)
        mx.nd.waitall()

    def by_updater():
        updater(*lists)
        mx.nd.waitall()

    slots = count_slots(updater.states[0], parameters[0].shape, dtype)
    first = lambda: parameters[0].data().asnumpy()  # noqa: E731
    return {'Trainer': Competitor(by_trainer, first, slots, lambda: mark_fresh(parameters)),
            'Updater': Competitor(by_updater, first, slots)}


def mark_fresh(parameters):
    """Mark the gradients as fresh, as a backward pass does: `Trainer.update` refuses stale ones."""
    for parameter in parameters:
        for data in parameter.list_data():
            data._fresh_grad = True


def count_slots(state, shape, dtype):
    """The number of arrays of the weight's size in a state, not counting its master."""
    arrays, pending = 0, [state]
    while pending:
        one = pending.pop()
        if isinstance(one, (tuple, list)):
            pending.extend(one)
        elif one is not None:
            arrays += one.shape == shape
    return max(arrays - (dtype == 'float16'), 0)


def create(name, dtype):
    """A name such as 'gluon_optim:novograd' or 'mxnet:adam' as an optimizer."""
    family, name = name.split(':')
    arguments = dict(ARGUMENTS.get(name, {}), learning_rate=bench_peers.RATE, multi_precision=dtype == 'float16')
    if name == 'nothing':
        return Nothing()
    return go.create(name, **arguments) if family == 'gluon_optim' else mx.optimizer.create(name, **arguments)


# Measuring

class Bandwidth:
    """An in-place addition over as many bytes as NovoGrad keeps, on all of numba's threads."""

    def __init__(self, elements):
        self._array = numpy.zeros(3 * elements, numpy.float32)
        self._competitor = Competitor(lambda: add_one(self._array), None, 0)
        self._competitor.step()

    def turn(self):
        """Bytes per second of a few additions."""
        return [2 * self._array.nbytes / seconds for seconds in self._competitor.turn()]


@numba.njit(parallel=True)
def add_one(array):
    lanes = numba.get_num_threads()
    for lane in numba.prange(lanes):
        part = array[lane * array.size // lanes:(lane + 1) * array.size // lanes]
        for i in range(part.size):
            part[i] += numpy.float32(1)


def bytes_per_element(slots, dtype):
    return (2 + 2 + 8 if dtype == 'float16' else 4 + 8) + 8 * slots


def measure(case, dtype, ours, peers, rounds, pythons):
    """All figures of one case, as `--json` writes them."""
    data = Data(CASES[case])
    servers = []
    try:
        with tqdm(desc=f'{case}: preparing', disable=None, leave=False, bar_format='{desc} {postfix}') as bar:
            servers += [bench_peers.Server(python, data) for python in pythons]
            competitors, information, missing = prepare(data, dtype, ours, peers, servers, bar.set_postfix_str)
        seconds, bandwidth = take_turns(case, competitors, Bandwidth(data.elements), rounds)
    finally:
        for server in servers:
            server.close()
    rate = float(numpy.median(bandwidth))
    rows = [dict(information[label], ms=spread(seconds[label], 1e3), floor_ms=information[label]['bytes'] / rate * 1e3)
            for label in competitors]
    return dict(case=case, dtype=dtype, tensors=len(data.shapes), elements=data.elements, rounds=rounds,
                gigabytes_per_second=spread(bandwidth, 1e-9), rows=add_ratios(rows), missing=missing,
                other_versions={server.python: server.versions for server in servers})


def prepare(data, dtype, ours, peers, servers, say):
    """({label: competitor}, {label: its name, route, dtype and bytes}, {name: why it is not measured}).

    A peer runs here, or under the first of the other Pythons that has it.
    """
    competitors, information, missing = {}, {}, {}

    def enter(name, competitor, route=None, storage='float32'):
        label = f'{name} {route}' if route else name
        competitors[label] = competitor
        per_element = 0 if name == 'mxnet:nothing' else bytes_per_element(competitor.slots, storage)
        least = per_element * data.elements
        if name.startswith('gluon_optim:') and name.split(':')[1] in go.list_optimizers():
            name_of_rule = name.split(':')[1]
            least = bench_floor.least_bytes(name_of_rule, ARGUMENTS.get(name_of_rule, {}), storage,
                                            [int(numpy.prod(shape)) for shape in data.shapes])
        information[label] = dict(name=name, route=route, dtype=storage, bytes=least)

    for name in [f'gluon_optim:{name}' for name in ours] + peers:
        say(name)
        if name.startswith(('gluon_optim:', 'mxnet:')):
            for route, competitor in in_mxnet(create(name, dtype), data, dtype).items():
                enter(name, competitor, route, dtype)
            continue
        competitor, why = bench_peers.build(name, data)
        for server in servers:
            if competitor is None:
                competitor, reason = server.build(name)
                why += f'; under {server.python} {reason}'
        if competitor is None:
            missing[name] = why
        else:
            enter(name, competitor)
    return competitors, information, missing


def take_turns(case, competitors, bandwidth, rounds):
    """({label: seconds of all steps}, bytes per second of all additions)."""
    before = {label: competitor.weight() for label, competitor in competitors.items()}
    seconds, rates = {label: [] for label in competitors}, []
    order = list(competitors)
    shuffle = random.Random(0).shuffle
    with tqdm(total=rounds * len(order), desc=case, disable=None, leave=False) as bar:
        for _ in range(rounds):
            rates += bandwidth.turn()
            shuffle(order)  # so that none always follows the same one
            for label in order:
                time.sleep(PAUSE)
                seconds[label] += competitors[label].turn()
                bar.update()
    for label, competitor in competitors.items():
        problem = '' if label.startswith('mxnet:nothing') else competitor.problem(before[label])
        if problem:
            raise SystemExit(f'{label}: {problem}. Its figures are meaningless.')
    return seconds, rates


def spread(values, unit):
    low, first, median, third, high = (float(q) * unit for q in numpy.percentile(values, [0, 25, 50, 75, 100]))
    return dict(median=median, quartiles=[first, third], range=[low, high], samples=len(values))


def add_ratios(rows):
    """Each row with how its median compares; None where there is nothing to compare with."""
    def median(row):
        return row['ms']['median']

    reference = [median(row) for row in rows if row['name'] == REFERENCE]
    novograds = [median(row) for row in rows if row['name'].endswith(':novograd') and not row['name'].startswith('gluon_optim')]
    return [dict(row,
                 times_floor=median(row) / row['floor_ms'] if row['floor_ms'] else None,
                 times_torch_fused_adamw=median(row) / reference[0] if reference else None,
                 times_best_other_novograd=median(row) / min(novograds) if novograds else None) for row in rows]


# Reporting

def facts():
    """The machine and the versions that figures depend on."""
    return dict(
        cpu=processor(), system=platform.platform(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        threads=dict(numba=numba.get_num_threads(), OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', 'unset')),
        versions=dict(python=platform.python_version(), gluon_optim=go.__version__,
                      **bench_peers.versions(('mxnet', 'numba', *bench_peers.PACKAGES))))


def in_words(facts):
    load = '' if facts['load'] is None else f', load {facts["load"]:.1f}'
    return '\n'.join([f'{facts["cpu"]}, {facts["cores"]} cores{load}; {facts["system"]}',
                      'threads: ' + ', '.join(f'{what} {count}' for what, count in facts['threads'].items()),
                      ', '.join(f'{package} {version}' for package, version in facts['versions'].items())])


def processor():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(figures):
    """The figures as text."""
    rate = figures['gigabytes_per_second']
    lines = [f"{figures['case']}, {figures['dtype']}: {figures['tensors']} tensors, {figures['elements']:,} elements; "
             f"in-place addition {rate['median']:.1f} GB/s ({rate['quartiles'][0]:.1f} to {rate['quartiles'][1]:.1f})",
             f'{"":42}{"ms":>9}  {"quartiles":>17}  {"x floor":>8}  {"x torch":>8}  {"x best other":>12}',
             f'{"":42}{"":>9}  {"":>17}  {"":>8}  {"fused":>8}  {"NovoGrad":>12}',
             f'{"":42}{"":>9}  {"":>17}  {"":>8}  {"AdamW":>8}']
    for row in sorted(figures['rows'], key=lambda row: (not row['name'].startswith('gluon_optim:'), row['ms']['median'])):
        ratios = [('-' if row[key] is None else f'{row[key]:.2f}') for key in
                  ('times_floor', 'times_torch_fused_adamw', 'times_best_other_novograd')]
        quartiles = '{:.2f} to {:.2f}'.format(*row['ms']['quartiles'])
        lines.append(f'{label_of(row, figures["dtype"]):42}{row["ms"]["median"]:9.2f}  {quartiles:>17}  '
                     f'{ratios[0]:>8}  {ratios[1]:>8}  {ratios[2]:>12}')
    lines += [f'not measured: {name} ({why})' for name, why in figures['missing'].items()]
    lines += [f'{python}: ' + ', '.join(f'{package} {version}' for package, version in versions.items())
              for python, versions in figures['other_versions'].items()]
    return '\n'.join(lines)


def label_of(row, dtype):
    storage = '' if row['dtype'] == dtype else f' {row["dtype"]}'
    return f'{row["name"]}{" " + row["route"] if row["route"] else ""}{storage}'


def plot(cases, path):
    """Horizontal bars of the ratio to the floor, one panel per case."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    panels = [sorted((row for row in figures['rows'] if row['times_floor']), key=lambda row: -row['times_floor'])
              for figures in cases]
    heights = [1.2 + 0.24 * len(rows) for rows in panels]
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(9, sum(heights)), squeeze=False, gridspec_kw=dict(height_ratios=heights))
    for axis, rows, figures in zip(axes[:, 0], panels, cases):
        ratios = [row['times_floor'] for row in rows]
        colours = ['tab:orange' if row['name'].startswith('gluon_optim:') else 'tab:blue' if row['name'].startswith('mxnet:')
                   else 'tab:gray' for row in rows]
        bars = axis.barh([label_of(row, figures['dtype']) for row in rows], ratios, color=colours)
        axis.bar_label(bars, [f'{digits(row["times_floor"])} ({digits(row["ms"]["median"])} ms)' for row in rows],
                       padding=3, fontsize=8)
        axis.axvline(1, color='black', linewidth=1, zorder=0)
        axis.set_xscale('log')
        axis.set_xlim(min(0.8, *ratios), 3 * max(ratios))  # room for the labels
        axis.xaxis.set_major_formatter(FuncFormatter('{:g}'.format))
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.tick_params(labelsize=8)
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_title(f"{figures['case']}, {figures['dtype']}: {figures['tensors']} tensors, {figures['elements']:,} elements",
                       fontsize=10, loc='left')
        axis.set_xlabel(f"times the floor ({figures['gigabytes_per_second']['median']:.0f} GB/s), logarithmic", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def digits(value):
    return f'{value:.0f}' if value >= 100 else f'{value:.1f}' if value >= 10 else f'{value:.2f}'


# Command line

def chosen(parser, option, patterns, known):
    """The names that match; an error where a pattern matches none."""
    found = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            parser.error(f'{option}: nothing matches {pattern!r}. Known: {", ".join(known)}.')
    return found


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*CASES, 'layouts']
    parser.add_argument('--case', nargs='+', choices=known, default=[case for case in known if case != 'tiny'],
                        help='which tensors, or the layouts of kvstores and contexts (default: all but tiny)')
    parser.add_argument('--nets', nargs='+', choices=list(bench_layouts.NETS), default=['cnn', 'mobilenet', '56x3000'],
                        help='the nets of the case layouts (default: %(default)s)')
    parser.add_argument('--dtype', choices=('float32', 'float16'), default='float32',
                        help='type of weights and gradients in MXNet; float16 has float32 masters, and peers run in float32')
    parser.add_argument('--optimizers', nargs='*', default=['novograd', 'adamw', 'sgd_torch'], metavar='PATTERN',
                        help='ours, as names or patterns (default: %(default)s)')
    parser.add_argument('--peers', nargs='*', metavar='PATTERN',
                        default=['mxnet:nothing', 'mxnet:adam', 'mxnet:sgd', 'mxnet:lamb', 'mxnet:nadam', 'gluon_optim.torch:*',
                                 'torch_fused:*', 'torch_default:*', '*:novograd'], help='the others (default: %(default)s)')
    parser.add_argument('--peer-python', action='append', default=[], metavar='PATH',
                        help='the Python of another environment, for peers that this one lacks; may be repeated')
    parser.add_argument('--rounds', type=int, default=15, help='turns of each competitor (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write all figures; - is standard output, instead of the tables')
    parser.add_argument('--plot', metavar='FILE', help='draw the ratios to the floor')
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error(f'--rounds must be at least 1. Received: {options.rounds}.')
    for python in options.peer_python:
        if shutil.which(python) is None:
            parser.error(f'--peer-python must be an executable Python. Received: {python!r}.')
    options.optimizers = chosen(parser, '--optimizers', options.optimizers, sorted({*go.list_optimizers(), *MXNET} - {'nothing'}))
    options.peers = chosen(parser, '--peers', options.peers, [f'mxnet:{name}' for name in MXNET] + list(bench_peers.PEERS))
    return options


def main(given=None):
    options = arguments(given)
    cases, layouts, start = [], [], facts()
    show = print if options.json != '-' else lambda *text, **how: None
    show(in_words(start))
    for case in options.case:
        if case == 'layouts':
            layouts = bench_layouts.measure(options.nets, options.rounds)
            show('\n' + bench_layouts.table(layouts), flush=True)
        else:
            cases.append(measure(case, options.dtype, options.optimizers, options.peers, options.rounds, options.peer_python))
            show('\n' + table(cases[-1]), flush=True)
    if options.json:
        text = json.dumps(dict(facts=start, cases=cases, layouts=layouts), indent=1) + '\n'
        if options.json == '-':
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.plot and cases:
        plot(cases, options.plot)


if __name__ == '__main__':
    main()
