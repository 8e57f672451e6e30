"""Draw docs/architecture.png: the rooms by floor, and three journeys through them.

    python tools/draw_architecture.py            # needs matplotlib: pip install '.[plot]'
"""
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
# room: (column, floor, width, what it holds)
ROOMS = {
    'schema': (0, 0, 12, 'Hyper, Slot, ranges, error texts'),
    'rules': (0, 1, 6, 'one optimizer, one file; trace'),
    'schedules': (6, 1, 6, 'rates as functions of t'),
    'lowering': (0, 2, 4, 'plan; numba prints it'),
    'states': (4, 2, 8, "OptimizerStates, our container, MXNet's files, open_once"),
    'mapping': (3, 3, 4.5, 'which slot is which elsewhere'),
    'models': (7.5, 3, 4.5, 'weights and names of nets'),
    'mxnet': (0, 4, 4, 'optimizer, trainer, checkpoints'),
    'torch': (4, 4, 2.67, 'mirror, states'),
    'onnx': (6.67, 4, 2.67, 'step model, states'),
    'optax': (9.33, 4, 2.67, 'mirror, states'),
    'transfer': (3, 5, 9, 'read, programs, job, verify'),
    'cli': (3, 6, 9, 'gluon-optim'),
}
JOURNEYS = {
    'a gradient': ('#d55e00', [('mxnet', .15, .75), ('mxnet', .15, .25), ('rules', .08, .7), ('lowering', .15, .08),
                               ('lowering', .85, .08), ('mxnet', .72, .78)]),
    'a checkpoint': ('#0072b2', [('mxnet', .85, .75), ('mxnet', .85, .25), ('states', .1, .75), ('states', .1, .25)]),
    '.states to a state_dict': ('#009e73', [('cli', .35, .5), ('transfer', .35, .5), ('states', .6, .75), ('mapping', .9, .75),
                                            ('torch', .85, .75), ('transfer', .12, .5)]),
}


def draw(path):
    """Write the picture to ``path``."""
    figure = Figure(figsize=(11, 7.2), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (x, floor, width, holds) in ROOMS.items():
        axes.add_patch(FancyBboxPatch((x + .08, floor + .1), width - .16, .72, boxstyle='round,pad=0,rounding_size=0.08',
                                      facecolor='#f4f4f1', edgecolor='#888888', linewidth=1))
        axes.text(x + width / 2, floor + .6, name, ha='center', va='center', fontsize=12, fontweight='bold', color='#222222')
        axes.text(x + width / 2, floor + .3, holds, ha='center', va='center', fontsize=8.5, color='#444444')
    for label, (color, stops) in JOURNEYS.items():
        points = [(ROOMS[room][0] + u * ROOMS[room][2], ROOMS[room][1] + .1 + v * .72) for room, u, v in stops]
        for (x, y), (u, v) in zip(points, points[1:]):
            axes.annotate('', (u, v), (x, y), arrowprops=dict(arrowstyle='-|>', color=color, linewidth=1.8, alpha=.75,
                                                              shrinkA=6, shrinkB=6, connectionstyle='arc3,rad=0.08'))
        for k, (x, y) in enumerate(points, 1):
            axes.plot(x, y, 'o', color=color, markersize=13)
            axes.text(x, y, str(k), color='white', ha='center', va='center_baseline', fontsize=8, fontweight='bold')
        axes.plot([], [], 'o-', color=color, label=label)
    axes.legend(loc='upper left', fontsize=9.5, frameon=False, bbox_to_anchor=(0, .995))
    axes.set_xlim(-.1, 12.1)
    axes.set_ylim(-.05, 7)
    axes.axis('off')
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    draw(ROOT / 'docs' / 'architecture.png')
