"""A picture of learning rates over the updates of a run."""
from typing import Any, Mapping, Sequence

from ..requirements import missing

__all__ = ['draw']

COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#000000')


def draw(rates: Mapping[str, Sequence[float]], path: str) -> None:
    """Write a picture of the rates of updates 1, 2, ..., a line for each name, in the format that the extension of ``path`` says.

    Raises ValueError for an unknown extension, ImportError without matplotlib, OSError where the file system refuses.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing('a picture', 'matplotlib', 'plot', error) from None
    figure = Figure(figsize=(8.0, 4.0), layout='constrained')
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for k, (name, line) in enumerate(rates.items()):
        axes.plot(range(1, len(line) + 1), line, color=COLORS[k % len(COLORS)], linewidth=1.8, label=name)
    axes.set_xlabel('update')
    axes.set_ylabel('learning rate')
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(color='#dddddd', linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
