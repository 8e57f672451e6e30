#!/usr/bin/env python
"""Measure how long one update takes: our optimizers in MXNet, PyTorch, JAX and ONNX Runtime, beside those of others.

    python tools/bench.py                                       in MXNet; minutes
    python tools/bench.py --framework torch                     go.torch.create; needs no MXNet
    python tools/bench.py --framework jax onnx                  go.optax.create, and the step that go.onnx.export_step writes
    python tools/bench.py --framework all --dtype float32 float16 bfloat16 --peer-python other/bin/python --json docs/speed.json
    python tools/bench.py --case resnet50 --rounds 30
    python tools/bench.py --case 2000 --optimizers novograd --peers 'torch_fused:*' '*:novograd'
    python tools/bench.py --case layouts --nets cnn             Trainer.step with every kvstore, on one context and two
    python tools/bench.py --dtype float16 --json figures.json --plot figures.png
    python tools/bench.py --framework mxnet torch --case first_step     from import to the end of the first update

All competitors of a table are measured together, round by round in changing order, each with its own arrays. A competitor
runs in this environment, or in the first of `--peer-python` that has what it needs. Every round also measures the bandwidth of
an in-place addition: `floor` is the time that the bytes an optimizer must move would take at that rate. It reads the gradient,
and reads and writes the weight and each slot of the weight's size (for weights of half precision with float32 masters: the
weight is written, the master read and written). Of what an optimizer of ours reads again, when it knows a norm, the floor
counts what exceeds the last cache (bench_floor.py).

Exit codes: 0 measured, 1 a competitor did not update its weights, 2 unusable arguments, or a framework is not installed.
"""
import argparse
import datetime
import fnmatch
import importlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import bench_floor
import bench_peers
import numpy
from bench_competitors import Competitor, Data, arguments_of, kind, resnet50
from bench_peers import FRAMEWORKS
from tqdm import tqdm

import gluon_optim as go

REFERENCE = 'torch_fused:adamw'
HALF_PEERS = (REFERENCE, 'mxnet:nothing', 'mxnet:adam', 'mxnet:sgd')  # beside weights of half precision
PAUSE = 0.005  # seconds before each turn: the threads of the previous one are still spinning
BYTES = {'float32': 4, 'float16': 2, 'bfloat16': 2}

CASES = {
    'resnet50': resnet50(),
    '2000': [(1000,)] * 2000,
    '200': [(1000,)] * 200,
    'one': [(5000, 5000)],
    'tiny': [(1000,), (30, 7), (1,)],  # to check that everything runs
}
# cases that are no lists of tensors: the frameworks of which one must be here, and a module with measure(options), which returns
# what --json writes, and table(of that)
OTHER_CASES = {'layouts': (('mxnet',), 'bench_layouts'), 'first_step': (('mxnet', 'torch'), 'bench_first')}


# Measuring

class Bandwidth:
    """An in-place addition over as many bytes as NovoGrad keeps, on all of numba's threads."""

    def __init__(self, elements):
        self._array, add_one = numpy.zeros(3 * elements, numpy.float32), addition()
        self._competitor = Competitor(lambda: add_one(self._array), None, 0)
        self._competitor.step()

    def turn(self):
        """Bytes per second of a few additions."""
        return [2 * self._array.nbytes / seconds for seconds in self._competitor.turn()]


def addition():
    """A compiled function that adds 1 to an array."""
    import numba

    @numba.njit(parallel=True)
    def add_one(array):
        lanes = numba.get_num_threads()
        for lane in numba.prange(lanes):
            part = array[lane * array.size // lanes:(lane + 1) * array.size // lanes]
            for i in range(part.size):
                part[i] += numpy.float32(1)
    return add_one


def bytes_per_element(slots, dtype):
    """What an update must move for each element of a weight; 0 for one that updates nothing."""
    if slots is None:
        return 0
    half = BYTES[dtype] < 4
    return BYTES[dtype] + (BYTES[dtype] if half else 0) + 8 + 8 * slots


def least_bytes(name, competitor, data):
    """What an update of all tensors must move."""
    rule = name.partition(':')[2]
    if is_ours(name) and rule in go.list_optimizers() and competitor.slots is not None:
        sizes = [int(numpy.prod(shape)) for shape in data.shapes]
        return bench_floor.least_bytes(rule, arguments_of(rule), competitor.dtype, sizes)
    return bytes_per_element(competitor.slots, competitor.dtype) * data.elements


def measure(framework, case, dtype, names, rounds, pythons):
    """The figures of one table, as `--json` writes them."""
    data = Data(CASES[case])
    servers = []
    try:
        with tqdm(desc=f'{framework} {case}: preparing', disable=None, leave=False, bar_format='{desc} {postfix}') as bar:
            servers += [bench_peers.Server(python, data) for python in pythons]
            competitors, information, missing = prepare(data, dtype, names, servers, bar.set_postfix_str)
        seconds, bandwidth = take_turns(f'{framework} {case} {dtype}', competitors, Bandwidth(data.elements), rounds)
    finally:
        for server in servers:
            server.close()
    rate = float(numpy.median(bandwidth))
    rows = [dict(information[label], ms=spread(seconds[label], 1e3), floor_ms=information[label]['bytes'] / rate * 1e3)
            for label in competitors]
    return dict(framework=framework, case=case, dtype=dtype, tensors=len(data.shapes), elements=data.elements, rounds=rounds,
                gigabytes_per_second=spread(bandwidth, 1e-9), rows=add_ratios(rows), missing=missing,
                other_versions=[server.versions for server in servers])


def prepare(data, dtype, names, servers, say):
    """({label: competitor}, {label: its name, route, dtype and bytes}, {name: why it is not measured}).

    A competitor runs here, or under the first of the other Pythons that has it.
    """
    competitors, information, missing = {}, {}, {}
    for name in names:
        say(name)
        routes, why = bench_peers.build(name, data, dtype)
        for number, server in enumerate(servers, 1):
            if not routes:
                routes, reason = server.build(name, dtype)
                why += f'; with --peer-python {number} {reason}'
        if not routes:
            missing[name] = why
        for route, competitor in routes.items():
            label = f'{name} {route}' if route else name
            competitors[label] = competitor
            information[label] = dict(name=name, route=route, dtype=competitor.dtype, bytes=least_bytes(name, competitor, data))
    return competitors, information, missing


def take_turns(title, competitors, bandwidth, rounds):
    """({label: seconds of all steps}, bytes per second of all additions)."""
    before = {label: competitor.weight() for label, competitor in competitors.items()}
    seconds, rates = {label: [] for label in competitors}, []
    order = list(competitors)
    shuffle = random.Random(0).shuffle
    with tqdm(total=rounds * len(order), desc=title, disable=None, leave=False) as bar:
        for _ in range(rounds):
            rates += bandwidth.turn()
            shuffle(order)  # so that none always follows the same one
            for label in order:
                time.sleep(PAUSE)
                seconds[label] += competitors[label].turn()
                bar.update()
    for label, competitor in competitors.items():
        problem = competitor.problem(before[label])
        if problem:
            raise SystemExit(f'{label}: {problem}. Its figures are meaningless.')
    return seconds, rates


def spread(values, unit):
    low, first, median, third, high = (float(q) * unit for q in numpy.percentile(values, [0, 25, 50, 75, 100]))
    return dict(median=median, quartiles=[first, third], range=[low, high], samples=len(values))


def is_ours(name):
    return name.startswith('gluon_optim')


def add_ratios(rows):
    """Each row with how its median compares; None where there is nothing to compare with."""
    def median(row):
        return row['ms']['median']

    reference = [median(row) for row in rows if row['name'] == REFERENCE]
    others = {}  # the best that is not ours
    for row in rows:
        if row['bytes'] and not is_ours(row['name']):
            others[kind(row['name'])] = min(median(row), others.get(kind(row['name']), float('inf')))
    return [dict(row,
                 times_floor=median(row) / row['floor_ms'] if row['floor_ms'] else None,
                 times_torch_fused_adamw=median(row) / reference[0] if reference else None,
                 times_best_other=median(row) / others[kind(row['name'])] if kind(row['name']) in others else None)
            for row in rows]


# Reporting

def facts():
    """The date, the machine and the versions that figures depend on."""
    import numba
    return dict(
        date=datetime.date.today().isoformat(), cpu=processor(), system=platform.platform(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        load=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
        threads=dict(numba=numba.get_num_threads(), OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', 'unset')),
        versions=dict(bench_peers.versions(), gluon_optim=go.__version__))


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
    lines = [f"{figures['framework']}, {figures['case']}, {figures['dtype']}: {figures['tensors']} tensors, "
             f"{figures['elements']:,} elements; in-place addition {rate['median']:.1f} GB/s "
             f"({rate['quartiles'][0]:.1f} to {rate['quartiles'][1]:.1f})",
             f'{"":42}{"ms":>9}  {"quartiles":>17}  {"x floor":>8}  {"x torch":>8}  {"x best":>8}',
             f'{"":42}{"":>9}  {"":>17}  {"":>8}  {"fused":>8}  {"other of":>8}',
             f'{"":42}{"":>9}  {"":>17}  {"":>8}  {"AdamW":>8}  {"its kind":>8}']
    for row in sorted(figures['rows'], key=lambda row: (not is_ours(row['name']), row['ms']['median'])):
        ratios = [('-' if row[key] is None else f'{row[key]:.2f}') for key in
                  ('times_floor', 'times_torch_fused_adamw', 'times_best_other')]
        quartiles = '{:.2f} to {:.2f}'.format(*row['ms']['quartiles'])
        lines.append(f'{label_of(row, figures["dtype"]):42}{row["ms"]["median"]:9.2f}  {quartiles:>17}  '
                     f'{ratios[0]:>8}  {ratios[1]:>8}  {ratios[2]:>8}')
    lines += [f'not measured: {name} ({why})' for name, why in figures['missing'].items()]
    lines += [f'--peer-python {number}: ' + ', '.join(f'{package} {version}' for package, version in versions.items())
              for number, versions in enumerate(figures['other_versions'], 1)]
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
        colours = ['tab:orange' if is_ours(row['name']) else 'tab:blue' if row['name'].startswith('mxnet:')
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
        axis.set_title(f"{figures['framework']}, {figures['case']}, {figures['dtype']}: {figures['tensors']} tensors, "
                       f"{figures['elements']:,} elements", fontsize=10, loc='left')
        axis.set_xlabel(f"times the floor ({figures['gigabytes_per_second']['median']:.0f} GB/s), logarithmic", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def digits(value):
    return f'{value:.0f}' if value >= 100 else f'{value:.1f}' if value >= 10 else f'{value:.2f}'


# Command line

def names_of(framework, case, dtype, options):
    """The competitors of one table."""
    ours = [f'{family}:{rule}' for family in FRAMEWORKS[framework].ours for rule in options.optimizers]
    return ours + (peers_of(framework, case, dtype) if options.peers is None else options.peers)


def peers_of(framework, case, dtype):
    """The peers of one table unless ``--peers`` names others."""
    left_out = 'optax:*' if case == '2000' and framework != 'jax' else ''  # XLA would compile for 40 s
    return [name for name in bench_peers.OTHERS if matches(name, FRAMEWORKS[framework].beside)
            and (dtype == 'float32' or name in HALF_PEERS) and not matches(name, [left_out])]


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def chosen(parser, option, patterns, known):
    """The names that match; an error where a pattern matches none."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            parser.error(f'{option}: nothing matches {pattern!r}. Known: {", ".join(known)}.')
    return [name for name in known if matches(name, patterns)]


def check_installed(parser, framework, pythons):
    """Some environment must have it."""
    needs = FRAMEWORKS[framework].needs
    lacking = [package for package in needs if util.find_spec(package) is None]
    if lacking and all(lacks(python, needs) for python in pythons):
        parser.error(f'--framework {framework} needs {" and ".join(needs)}. Received: {sys.executable}, which lacks '
                     f'{" and ".join(lacking)}. Install what is missing, or name the Python of an environment that has all: '
                     '--peer-python PATH.')


def lacks(python, packages):
    program = 'import importlib.util as util, sys; sys.exit(any(util.find_spec(name) is None for name in sys.argv[1:]))'
    return subprocess.run([python, '-c', program, *packages], stderr=subprocess.DEVNULL).returncode != 0


def tables(options):
    """What is to be measured: (framework, case, dtype); all cases in float32, of other types the first one unless requested."""
    for framework in options.framework:
        known = FRAMEWORKS[framework]
        for dtype in options.dtype:
            for case in options.case or (known.cases if dtype == 'float32' else known.cases[:1]):
                if dtype in known.dtypes and case in CASES:
                    yield framework, case, dtype


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--framework', nargs='+', choices=[*FRAMEWORKS, 'all'], default=['mxnet'],
                        help='where our optimizers run (default: mxnet)')
    parser.add_argument('--case', nargs='+', choices=[*CASES, *OTHER_CASES],
                        help='which tensors, the layouts of kvstores and contexts in MXNet, or first_step: one update in each of '
                             'two new processes (default: '
                             + '; '.join(f'{name}: {", ".join(one.cases)}' for name, one in FRAMEWORKS.items()) + ')')
    parser.add_argument('--nets', nargs='+', metavar='PATTERN', default=['cnn', 'mobilenet', '56x3000', '56x100000'],
                        help='the nets of the case layouts (default: %(default)s)')
    parser.add_argument('--dtype', nargs='+', choices=list(BYTES), default=['float32'],
                        help='type of weights and gradients (bfloat16: PyTorch and JAX); those of half precision have float32 '
                             'masters, and peers outside MXNet run in float32')
    parser.add_argument('--optimizers', nargs='*', default=['novograd', 'adamw', 'sgd_torch', 'lamb'], metavar='PATTERN',
                        help='ours, as names or patterns (default: %(default)s)')
    parser.add_argument('--peers', nargs='*', metavar='PATTERN',
                        help='the others, of any framework (default: '
                             + '; '.join(f'{name}: {", ".join(one.beside)}' for name, one in FRAMEWORKS.items()) + ')')
    parser.add_argument('--peer-python', action='append', default=[], metavar='PATH',
                        help='the Python of another environment, for competitors that this one lacks; may be repeated')
    parser.add_argument('--rounds', type=int, default=15, help='turns of each competitor (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write all figures; - is standard output, instead of the tables')
    parser.add_argument('--plot', metavar='FILE', help='draw the ratios to the floor')
    options = parser.parse_args(given)
    check(parser, options)
    return options


def check(parser, options):
    """Errors for what cannot be measured; patterns become names."""
    if options.rounds < 1:
        parser.error(f'--rounds must be at least 1. Received: {options.rounds}.')
    for python in options.peer_python:
        if shutil.which(python) is None:
            parser.error(f'--peer-python must be an executable Python. Received: {python!r}.')
    for option, path in ('--json', options.json), ('--plot', options.plot):   # before an hour of measuring
        if path not in (None, '-') and not Path(path).absolute().parent.is_dir():
            parser.error(f'{option} must be a file in a folder that exists. Received: {path!r}.')
    if options.plot and util.find_spec('matplotlib') is None:
        parser.error(f'--plot needs matplotlib, which {sys.executable} lacks. Install it, or leave --plot out.')
    options.framework = list(FRAMEWORKS) if 'all' in options.framework else list(dict.fromkeys(options.framework))
    options.optimizers = chosen(parser, '--optimizers', options.optimizers, sorted({*go.list_optimizers(), 'psgld'}))
    if options.peers is not None:
        options.peers = chosen(parser, '--peers', options.peers, list(bench_peers.OTHERS))
    for dtype in options.dtype:
        if not any(dtype in FRAMEWORKS[name].dtypes for name in options.framework):
            parser.error(f'--dtype {dtype} is no type of weights in {" or ".join(options.framework)}. It is in '
                         f'{", ".join(name for name, one in FRAMEWORKS.items() if dtype in one.dtypes)}: pass --framework.')
    if util.find_spec('numba') is None:
        parser.error(f'The rate of memory is measured with numba, which {sys.executable} lacks. Install numba.')
    for framework in options.framework:
        check_installed(parser, framework, options.peer_python)
    options.other_cases = other_cases(parser, options)


def other_cases(parser, options):
    """{case: its module}; they run in this environment."""
    requested = options.case or [case for name in options.framework for case in FRAMEWORKS[name].cases]
    modules = {}
    for case in requested:
        if case in OTHER_CASES:
            frameworks, module = OTHER_CASES[case]
            if not any(name in options.framework and util.find_spec(name) for name in frameworks):
                parser.error(f'--case {case} needs --framework {" or ".join(frameworks)}, in the environment of tools/bench.py. '
                             f'Received: --framework {" ".join(options.framework)} with {sys.executable}. Name other cases, or run '
                             'it under another Python.')
            modules[case] = importlib.import_module(module)
    if 'layouts' in modules:
        options.nets = chosen(parser, '--nets', options.nets, list(modules['layouts'].NETS))
    return modules


def main(given=None):
    options = arguments(given)
    cases, others, start = [], {}, facts()
    show = print if options.json != '-' else lambda *text, **how: None
    show(in_words(start))
    for framework, case, dtype in tables(options):
        names = names_of(framework, case, dtype, options)
        cases.append(measure(framework, case, dtype, names, options.rounds, options.peer_python))
        show('\n' + table(cases[-1]), flush=True)
    for case, module in options.other_cases.items():
        others[case] = module.measure(options)
        show('\n' + module.table(others[case]), flush=True)
    if options.json:
        text = json.dumps(dict(facts=start, cases=cases, **others), indent=1) + '\n'
        if options.json == '-':
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    if options.plot and cases:
        plot(cases, options.plot)


if __name__ == '__main__':
    main()
