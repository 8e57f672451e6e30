"""The tables of README.md and docs/speed.md that show figures of tools/bench.py and tools/gpu_check.py: from docs/speed*.json,
which these wrote.

tools/make_tables.py writes them.
"""
import json
from pathlib import Path
from statistics import median

DOCS = Path(__file__).resolve().parent.parent / 'docs'
OURS = ('gluon_optim:novograd', 'gluon_optim:adamw', 'gluon_optim:sgd_torch')
MXNETS = ('mxnet:adam', 'mxnet:sgd', 'mxnet:nadam', 'mxnet:lamb')
FUSED = ('torch_fused:sgd', 'torch_fused:adam', 'torch_fused:adamw')


def figures(file='speed.json'):
    return json.loads((DOCS / file).read_text(encoding='utf-8'))


def rows_of(case, dtype='float32', file='speed.json'):
    """{(name, route): row} of one case."""
    found = next(one for one in figures(file)['cases'] if (one['case'], one['dtype']) == (case, dtype))
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


def speed():
    """ResNet-50, in short."""
    keys = 'ms', 'times_floor', 'times_torch_fused_adamw'
    rows = rows_of('resnet50')
    yield '| | ms | x bandwidth floor | x torch fused AdamW |'
    yield '|---|---|---|---|'
    for name in OURS[:2]:
        yield line(f'`{name.split(":")[1]}`', [rows[name, 'Trainer']], *keys)
    yield line('torch fused AdamW', [rows['torch_fused:adamw', None]], *keys)
    best = other_novograds(rows)[0]
    yield line(f'best NovoGrad elsewhere ({best["name"].split(":")[0]})', [best], *keys)
    yield line('MXNet adam / sgd / nadam / lamb', [rows[name, 'Trainer'] for name in MXNETS], *keys)


def resnet50():
    """ResNet-50, everybody."""
    keys = 'ms', 'times_floor', 'times_torch_fused_adamw', 'times_best_other_novograd'
    rows = rows_of('resnet50')
    yield '| ResNet-50, float32 | ms | x floor | x torch fused AdamW | x best other NovoGrad |'
    yield '|---|---|---|---|---|'
    for name in OURS:
        yield line(f'**{name.split(":")[1]}**, Trainer', [rows[name, 'Trainer']], *keys)
    yield line('torch fused SGD / Adam / AdamW', [rows[name, None] for name in FUSED], *keys)
    others = other_novograds(rows)
    yield line(' / '.join(row['name'].split(':')[0] for row in others) + ' NovoGrad', others, *keys)
    yield line('torch default AdamW', [rows['torch_default:adamw', None]], *keys)
    yield line('MXNet adam / sgd / nadam / lamb, Trainer', [rows[name, 'Trainer'] for name in MXNETS], *keys)


def half():
    """float16 weights with float32 masters."""
    rows = rows_of('resnet50', 'float16')
    yield '| ResNet-50, float16 with masters | ms | x floor |'
    yield '|---|---|---|'
    for name in OURS:
        yield line(f'**{name.split(":")[1]}**, Trainer', [rows[name, 'Trainer']], 'ms', 'times_floor')
    yield line('MXNet adam, Trainer', [rows['mxnet:adam', 'Trainer']], 'ms', 'times_floor')


def tensors():
    """2000 small tensors."""
    keys = 'ms', 'times_torch_fused_adamw'
    rows = rows_of('2000')
    yield '| 2000 tensors of 1000 | ms | x torch fused AdamW |'
    yield '|---|---|---|'
    for name in (*OURS[:2], 'mxnet:nothing', 'mxnet:adam'):
        ours = name.startswith('gluon_optim:')
        label = f'**{name.split(":")[1]}**' if ours else name.replace('mxnet:nothing', 'nothing').replace('mxnet:', 'MXNet ')
        yield line(f'{label}, Updater / Trainer', [rows[name, 'Updater'], rows[name, 'Trainer']], *keys)
    yield line('torch fused AdamW', [rows['torch_fused:adamw', None]], *keys)
    yield line('optax NovoGrad', [rows['optax:novograd', None]], *keys)


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
    cases = {case: rows_of(case, file='speed_torch.json') for case in ('resnet50', '2000')}
    yield '| PyTorch, CPU | ' + ' | '.join(f'{case}: ms | x torch fused AdamW' for case in ('ResNet-50', '2000 tensors')) + ' |'
    yield '|---' * 5 + '|'
    names = dict.fromkeys(name for rows in cases.values() for name, _ in rows if not name.startswith('gluon_optim:'))
    for name in sorted(names, key=lambda name: (name.split(':')[1], not name.startswith('gluon_optim'))):
        family, _, rule = name.partition(':')
        label = {'gluon_optim.torch': f'**{rule}**', 'gluon_optim.torch_operations': f'{rule}, `fused=False`'}.get(
            family, f'{family} {rule}')
        cells = [[rows[name, None]] if (name, None) in rows else [] for rows in cases.values()]
        yield f'| {label} | ' + ' | '.join(cell(row, key) for row in cells for key in ('ms', 'times_torch_fused_adamw')) + ' |'


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
        return rows_of(case, file='speed_torch.json')['gluon_optim.torch:adamw', None]['times_torch_fused_adamw']

    found = figures('speed_gpu.json')
    there = {(row['case'], row['optimizer']): row['times_torch'] for row in found['timings'] if row['dtype'] == 'float32'}
    card = found['card'].split()[1]
    here = f'{ratio("resnet50"):.2f} on ResNet-50 and {ratio("2000"):.2f} on 2000 small tensors'
    eager = f'{there["resnet50", "adamw"]:.2f} and {there["2000", "adamw"]:.2f}'
    graph = f'{there["resnet50", "adamw in a CUDA graph"]:.2f} on ResNet-50'
    yield f'''In PyTorch, `go.torch.create` runs the same kernels on CPUs, and Triton's on GPUs. In units of torch's fused AdamW,
`adamw` takes {here} on these two cores; on an {card} {eager}, in a CUDA graph
{graph} ([all figures](docs/speed.md#in-pytorch)).'''


def accelerated():
    """One sentence on what `accelerate` brings."""
    ratios = [row['ratios']['gluon_optim:' + name] for row in figures()['layouts'] for name in ('adam', 'sgd')]
    yield f'''After `go.accelerate()`, MXNet's own names create optimizers that compute the same. In every layout measured (no
kvstore, 'local' or 'device'; weights updated there or not; one CPU context or two; four nets) a `Trainer.step` with
adam or sgd takes {min(ratios):.2f} to {max(ratios):.2f} of the time of MXNet's.'''
