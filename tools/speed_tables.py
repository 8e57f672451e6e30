"""The tables of README.md and docs/speed.md that show figures of tools/bench.py, from docs/speed.json, and of tools/gpu_check.py,
from docs/speed_gpu.json.

tools/make_tables.py writes them.
"""
import json
import textwrap
from pathlib import Path
from statistics import median

from bench_competitors import kind

DOCS = Path(__file__).resolve().parent.parent / 'docs'
OURS = ('gluon_optim:novograd', 'gluon_optim:adamw', 'gluon_optim:sgd_torch', 'gluon_optim:lamb')
MXNETS = ('mxnet:adam', 'mxnet:sgd', 'mxnet:nadam', 'mxnet:lamb')
FUSED = ('torch_fused:sgd', 'torch_fused:adam', 'torch_fused:adamw')
TITLES = {'mxnet': 'MXNet', 'torch': 'PyTorch', 'jax': 'JAX', 'onnx': 'ONNX Runtime'}
CASES = {'resnet50': 'ResNet-50', '2000': '2000 tensors', '200': '200 tensors'}
FUSED_ADAMW = 'torch_fused:adamw', None
WIDTH = 120  # of text between the tables


def figures(file='speed.json'):
    return json.loads((DOCS / file).read_text(encoding='utf-8'))


def rows_of(case, dtype='float32', framework='mxnet'):
    """{(name, route): row} of one table of tools/bench.py."""
    found = next(one for one in figures()['cases'] if (one['framework'], one['case'], one['dtype']) == (framework, case, dtype))
    return {(row['name'], row['route']): row for row in found['rows']}


def digits(value):
    return f'{value:.0f}' if value >= 30 else f'{value:.1f}' if value >= 10 else f'{value:.2f}'


def cell(rows, key):
    """The figures ``key`` of some rows, as one cell."""
    values = [row['ms']['median'] if key == 'ms' else row[key] for row in rows]
    if key != 'ms' and len(values) > 3:
        return f'{digits(min(values))} to {digits(max(values))}'
    return ' / '.join(map(digits, values)) if None not in values else ''


def line(label, rows, *keys):
    return f'| {label} | ' + ' | '.join(cell(rows, key) for key in keys) + ' |'


def other_novograds(rows):
    """From the fastest to the slowest."""
    found = [row for (name, _), row in rows.items() if name.endswith(':novograd') and not name.startswith('gluon_optim')]
    return sorted(found, key=lambda row: row['ms']['median'])


def machine():
    """What was measured where, and when."""
    facts, others = figures()['facts'], figures()['cases'][0]['other_versions']
    load = '' if facts['load'] is None else f', load {facts["load"]:.1f} at the start'
    elsewhere = ''.join(f'; and, for what that lacks, {versions(other)}' for other in others)
    yield from textwrap.wrap(
        f'{facts["cpu"]}, {facts["cores"]} cores{load}; {facts["date"]}. All tables but that of the GPU are of one run, by '
        f'{versions(facts["versions"])}{elsewhere}.', WIDTH)


def versions(found):
    words = dict(TITLES, python='Python', onnx='ONNX', onnxruntime='ONNX Runtime', numpy='NumPy')
    return ', '.join(f'{words.get(package, package)} {version}' for package, version in found.items() if package != 'gluon_optim')


def speed():
    """ResNet-50, in short."""
    keys = 'ms', 'times_floor', 'times_torch_fused_adamw'
    rows, torch = rows_of('resnet50'), rows_of('resnet50', framework='torch')
    yield '| | ms | x bandwidth floor | x torch fused AdamW |'
    yield '|---|---|---|---|'
    for rule in ('novograd', 'adamw'):
        yield line(f'`{rule}` in MXNet', [rows[f'gluon_optim:{rule}', 'Trainer']], *keys)
    for rule in ('novograd', 'adamw'):
        yield line(f'`{rule}` in PyTorch', [torch[f'gluon_optim.torch:{rule}', None]], *keys)
    yield line('torch fused AdamW', [rows[FUSED_ADAMW]], *keys)
    best = other_novograds(rows)[0]
    yield line(f'best NovoGrad elsewhere ({best["name"].split(":")[0]})', [best], *keys)
    yield line('MXNet adam / sgd / nadam / lamb', [rows[name, 'Trainer'] for name in MXNETS], *keys)


def resnet50():
    """ResNet-50 in MXNet."""
    keys = 'ms', 'times_floor', 'times_torch_fused_adamw', 'times_best_other'
    rows = rows_of('resnet50')
    yield '| ResNet-50, float32, in MXNet | ms | x floor | x torch fused AdamW | x best other of its kind |'
    yield '|---|---|---|---|---|'
    for name in OURS:
        yield line(f'**{name.split(":")[1]}**, Trainer', [rows[name, 'Trainer']], *keys)
    yield line('torch fused SGD / Adam / AdamW', [rows[name, None] for name in FUSED], *keys)
    others = other_novograds(rows)
    yield line(' / '.join(row['name'].split(':')[0] for row in others) + ' NovoGrad', others, *keys)
    yield line('MXNet adam / sgd / nadam / lamb, Trainer', [rows[name, 'Trainer'] for name in MXNETS], *keys)


def half():
    """Weights of half precision with float32 masters, wherever they were measured."""
    keys = 'ms', 'times_floor', 'times_torch_fused_adamw'
    yield '| ResNet-50 in half precision, float32 masters | weights | ms | x floor | x torch fused AdamW in float32 |'
    yield '|---' * 5 + '|'
    for found in figures()['cases']:
        if found['dtype'] == 'float32' or found['case'] != 'resnet50':
            continue
        for row in found['rows']:
            shown = row['route'] != 'Updater' and 'operations' not in row['name']
            if shown and row['bytes'] and row['dtype'] == found['dtype']:
                where = '' if row['name'].startswith('mxnet:') else f' in {TITLES[found["framework"]]}'
                yield line(f'{label(row["name"])}{where} | {found["dtype"]}', [row], *keys)


def label(name):
    """A competitor as the tables name it: ours in bold type."""
    family, _, rule = name.partition(':')
    if family == 'gluon_optim.torch_operations':
        return f'{rule}, `fused=False`'
    return f'**{rule}**' if family.startswith('gluon_optim') else f'{TITLES.get(family, family)} {rule}'


def tensors():
    """2000 small tensors."""
    keys = 'ms', 'times_torch_fused_adamw'
    rows = rows_of('2000')
    yield '| 2000 tensors of 1000, in MXNet | ms | x torch fused AdamW |'
    yield '|---|---|---|'
    for name in (*OURS, 'mxnet:nothing', 'mxnet:adam'):
        title = 'nothing' if name == 'mxnet:nothing' else label(name)
        yield line(f'{title}, Updater / Trainer', [rows[name, 'Updater'], rows[name, 'Trainer']], *keys)
    yield line('torch fused AdamW', [rows[FUSED_ADAMW]], *keys)
    for best in other_novograds(rows)[:1]:
        yield line(f'best NovoGrad elsewhere ({best["name"].split(":")[0]})', [best], *keys)


def layouts():
    """`Trainer.step` in every layout."""
    heads = ['net', 'kvstore', 'updated there', 'contexts', 'adam, MXNet / ours', 'ratio', 'sgd, MXNet / ours', 'ratio',
             'novograd / adam', 'adamw / adam']
    yield '| ' + ' | '.join(heads) + ' |'
    yield '|---' * len(heads) + '|'
    for row in figures()['layouts']:
        ms, ratios = row['ms'], row['ratios']
        cells = [row['net'], row['kvstore'] or 'None', 'yes' if row['update_on_kvstore'] else 'no', str(row['contexts'])]
        for name in ('adam', 'sgd'):
            theirs, ours = 'mxnet:' + name, 'gluon_optim:' + name
            cells += [f'{digits(ms[theirs])} / {digits(ms[ours])}', f'{ratios[ours]:.2f}']
        cells += [f'{ratios[name]:.2f}' for name in ('gluon_optim:novograd', 'gluon_optim:adamw')]
        yield '| ' + ' | '.join(cells) + ' |'


def pytorch():
    """PyTorch on the CPU: our kernels, our operations, and others'."""
    def times_best(row, rows):
        return cell([row], 'times_best_other')

    yield from framework_table('torch', ('resnet50', '2000'), {'x best other of its kind': times_best})


def jax():
    """JAX on the CPU: our transformations, and optax's."""
    def times_optax(row, rows):
        own = rows.get(('optax:' + kind(row['name']), None))
        return digits(row['ms']['median'] / own['ms']['median']) if own else ''

    yield from framework_table('jax', ('resnet50', '200'), {'x optax': times_optax})


def onnx():
    """ONNX Runtime on the CPU: the exported step."""
    yield from framework_table('onnx', ('resnet50', '200'), {})


def framework_table(framework, cases, more):
    """All float32 figures of one framework, ordered by what is computed, ours first.

    ``more`` are columns: the head -> a function of (row, all rows) that returns the cell.
    """
    columns = {'ms': lambda row, rows: cell([row], 'ms'),
               'x torch fused AdamW': lambda row, rows: cell([row], 'times_torch_fused_adamw'), **more}
    tables = [rows_of(case, framework=framework) for case in cases]
    heads = [f'{CASES[case]}: {" | ".join(columns)}' for case in cases]
    yield f'| {TITLES[framework]}, CPU | {" | ".join(heads)} |'
    yield '|---' * (1 + len(columns) * len(cases)) + '|'
    names = dict.fromkeys(name for rows in tables for name, _ in rows)
    for name in sorted(names, key=lambda name: (kind(name), not name.startswith('gluon_optim'))):
        cells = [text(rows[name, None], rows) if (name, None) in rows else '' for rows in tables for text in columns.values()]
        yield f'| {label(name)} | ' + ' | '.join(cells) + ' |'


def gpu():
    """PyTorch on a GPU, as tools/gpu_check.py measured it."""
    found = figures('speed_gpu.json')
    cases = 'resnet50', '2000', 'one'
    heads = [f'PyTorch {found["torch"].partition("+")[0]}, {found["card"]}', *(f'{case}: ms | x torch' for case in cases)]
    yield '| ' + ' | '.join(heads) + ' |'
    yield '|---' * (1 + 2 * len(cases)) + '|'
    rows = {(row['case'], row['optimizer']): row for row in found['timings'] if row['dtype'] == 'float32'}
    for label in dict.fromkeys(label for _, label in rows):
        own = [rows.get((case, label)) for case in cases]
        cells = [f'{digits(row["ms"])} | {row["times_torch"]:.2f}' if row else ' | ' for row in own]
        yield f'| {label if "(" in label else f"**{label}**"} | ' + ' | '.join(cells) + ' |'


def first_step():
    """From `import` to the end of the first update."""
    yield '| seconds | rules | framework alone | cold: median | slowest | warm: median | slowest |'
    yield '|---' * 7 + '|'
    rows = figures('speed_first.json')['first_step']
    for framework, label in (('mxnet', 'MXNet'), ('torch', 'PyTorch')):
        mine = [row for row in rows if row['framework'] == framework]
        cells = [str(len(mine)), digits(median(row['cold']['framework']['seconds'] for row in mine))]
        for state in ('cold', 'warm'):
            seconds = {row['rule']: row[state]['ours']['seconds'] for row in mine}
            slowest = max(seconds, key=seconds.get)
            cells += [digits(median(seconds.values())), f'{digits(seconds[slowest])} (`{slowest}`)']
        yield f'| {label} | ' + ' | '.join(cells) + ' |'


def pytorch_in_short():
    """One sentence on PyTorch."""
    def ratio(case):
        return rows_of(case, framework='torch')['gluon_optim.torch:adamw', None]['times_torch_fused_adamw']

    found = figures('speed_gpu.json')
    there = {(row['case'], row['optimizer']): row['times_torch'] for row in found['timings'] if row['dtype'] == 'float32'}
    card = found['card'].split()[1]
    here = f'{ratio("resnet50"):.2f} on ResNet-50 and {ratio("2000"):.2f} on 2000 small tensors'
    eager = f'{there["resnet50", "adamw"]:.2f} and {there["2000", "adamw"]:.2f}'
    graph = f'{there["resnet50", "adamw in a CUDA graph"]:.2f} on ResNet-50'
    yield f'''In PyTorch, `go.torch.create` runs the same kernels on CPUs, and Triton's on GPUs. In units of torch's fused AdamW,
`adamw` takes {here} on these two cores; on an {card} {eager}, in a CUDA graph
{graph} ([all figures](docs/speed.md#in-pytorch)).'''


def elsewhere_in_short():
    """One sentence each on JAX and ONNX Runtime."""
    jax, onnx = (rows_of('resnet50', framework=framework) for framework in ('jax', 'onnx'))

    def ratio(rule):
        ours, own = (jax[f'{family}:{rule}', None]['ms']['median'] for family in ('gluon_optim.optax', 'optax'))
        return digits(ours / own)

    slow = [row['times_torch_fused_adamw'] for (name, _), row in onnx.items() if name.startswith('gluon_optim')]
    units = f'`adamw` takes {ratio("adamw")}, `novograd` {ratio("novograd")} and `lamb` {ratio("lamb")}'
    longer = f'{digits(min(slow))} to {digits(max(slow))}'
    yield from textwrap.wrap(
        "In JAX, XLA compiles the transformations of `go.optax.create` as it compiles optax's own: on ResNet-50 and in units of "
        f'those, {units}. The model that `go.onnx.export_step` writes consists of standard operators. ONNX Runtime executes one '
        f"after the other, which takes {longer} times as long as torch's fused AdamW.", WIDTH)


def accelerated():
    """One sentence on what `accelerate` brings."""
    ratios = [row['ratios']['gluon_optim:' + name] for row in figures()['layouts'] for name in ('adam', 'sgd')]
    yield f'''After `go.accelerate()`, MXNet's own names create optimizers that compute the same. In every layout measured (no
kvstore, 'local' or 'device'; weights updated there or not; one CPU context or two; four nets) a `Trainer.step` with
adam or sgd takes {min(ratios):.2f} to {max(ratios):.2f} of the time of MXNet's.'''
