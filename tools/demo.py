"""The demonstration run by tools/demo: uninterrupted, killed, resumed elsewhere, continued in PyTorch, and a picture."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, 'examples/train_digits.py', '--optimizer', 'novograd', '--epochs', '15', '--dropout', '0']
CONTINUE = [sys.executable, 'examples/continue_in_pytorch.py']
KILL_AT = 110  # of 330 steps, between two checkpoints
INDENT = ' ' * 3


class Failed(Exception):
    """The demonstration did not show what it should."""


def records(log):
    """The complete lines of a log; the last one of a killed process may be torn."""
    text = log.read_text() if log.exists() else ''
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]


def losses(log):
    """{step: loss}"""
    return {record['step']: record['loss'] for record in records(log) if 'loss' in record}


def run(command, log):
    """Run to the end and show the output, indented. Progress bars go to the terminal, if there is one."""
    done = subprocess.run([*command, '--log', str(log)], stdout=subprocess.PIPE, check=False)
    for line in done.stdout.decode().splitlines():
        print(textwrap.fill(line, 130, initial_indent=INDENT, subsequent_indent=INDENT + '  ', break_on_hyphens=False))
    if done.returncode:
        raise Failed(f'{" ".join(command)} ended with code {done.returncode}')
    return done.stdout.decode()


def run_and_kill(command, log, step):
    """Start, and kill -9 once the log shows ``step``. Returns the step at which the process died."""
    process = subprocess.Popen([*command, '--log', str(log)])
    while process.poll() is None:
        if max(losses(log), default=0) >= step:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    if process.wait() != -signal.SIGKILL:
        raise Failed(f'the run to be killed ended on its own with code {process.returncode}')
    if sys.stderr.isatty():
        print(file=sys.stderr)  # its progress bar was cut off
    return max(losses(log))


def picture(path, logs, killed_at, resumed_from):
    """Losses of the four runs, one above another, and how far each is from the uninterrupted one."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    straight = losses(logs['straight'])
    runs = [('straight', 'straight run on mx.cpu(0)', '#444444'),
            ('killed', f'second run, killed with SIGKILL at step {killed_at}', '#0072b2'),
            ('resumed', f'resumed from the checkpoint of step {resumed_from} on mx.cpu(2)', '#d55e00'),
            ('torch', 'the same checkpoint continued in PyTorch', '#009e73')]
    figure, rows = pyplot.subplots(5, 1, sharex=True, figsize=(10, 9), height_ratios=(2, 2, 2, 2, 3), layout='constrained')
    figure.suptitle('Training on handwritten digits with NovoGrad: killed, resumed, and carried over to PyTorch', fontsize=14)

    for axes, (name, label, color) in zip(rows, runs):
        run = losses(logs[name])
        axes.plot(*zip(*straight.items()), color='#cfcfcf', linewidth=5)
        axes.plot(*zip(*run.items()), color=color, linewidth=1.3)
        axes.text(0.99, 0.88, label, color=color, fontsize=12, ha='right', va='top', transform=axes.transAxes)
        axes.set(yscale='log', ylabel='batch loss', ylim=(5e-4, 9), yticks=(1e-3, 1e-1))
        axes.minorticks_off()
    rows[1].plot(killed_at, losses(logs['killed'])[killed_at], 'X', color=runs[1][2], markersize=12, markeredgecolor='white')

    for name, _, color in runs[1:]:
        run = losses(logs[name])
        rows[4].plot(list(run), [abs(run[step] - straight[step]) for step in run], color=color, linewidth=1.5)
    rows[4].set_yscale('symlog', linthresh=1e-8)
    rows[4].set(ylim=(-2e-9, 9), yticks=(0, 1e-6, 1e-4, 1e-2, 1), xlabel='training step', ylabel='|loss - straight|')
    rows[4].text(0.99, 0.12, 'killed and resumed: 0, the same bits', color=runs[2][2], fontsize=12, ha='right',
                 transform=rows[4].transAxes)
    rows[4].text(0.99, 0.85, 'PyTorch: rounding of float32', color=runs[3][2], fontsize=12, ha='right', transform=rows[4].transAxes)
    for axes in rows:
        axes.axvline(resumed_from, color='#888888', linewidth=0.8, linestyle=':')
        axes.spines[['top', 'right']].set_visible(False)
        axes.set_xlim(0, max(straight) * 1.01)
    figure.align_ylabels()
    figure.savefig(path, dpi=110)


def demonstrate(folder):
    logs = {name: folder / f'{name}.jsonl' for name in ('straight', 'killed', 'resumed', 'torch')}
    checkpoints = folder / 'checkpoints'

    print('1. Train with NovoGrad, uninterrupted, on mx.cpu(0).')
    run(TRAIN, logs['straight'])

    print('2. Train again; kill the process with SIGKILL in the middle.')
    killed_at = run_and_kill([*TRAIN, '--checkpoint-dir', str(checkpoints)], logs['killed'], KILL_AT)
    print(f'{INDENT}killed after step {killed_at}')

    newest = max(checkpoints.glob('step-*.safetensors'), key=os.path.getmtime)
    shutil.copy(newest, folder)  # for PyTorch: the resumed run keeps only its last three

    print('3. Resume from the last checkpoint, on another device: mx.cpu(2).')
    said = run([*TRAIN, '--checkpoint-dir', str(checkpoints), '--resume', '--device', '2'], logs['resumed'])
    resumed_from = int(re.search(r'at step (\d+)', said).group(1))
    ends = [records(logs[name])[-1]['parameters'] for name in ('straight', 'resumed')]
    if ends[0] != ends[1]:
        raise Failed(f'the parameters differ: SHA-256 {ends[0]} of the uninterrupted run, {ends[1]} of the resumed one')
    print(f'{INDENT}parameters equal those of the uninterrupted run bit for bit: SHA-256 {ends[0]}')

    print(f'4. Continue the same checkpoint in PyTorch, from step {resumed_from} on the same batches.')
    run([*CONTINUE, str(folder / newest.name)], logs['torch'])
    straight, torch = losses(logs['straight']), losses(logs['torch'])
    for last in range(resumed_from + 20, max(torch) + 1, 70):
        means = [sum(run[step] for step in range(last - 19, last + 1)) / 20 for run in (straight, torch)]
        print(f'{INDENT}mean loss of steps {last - 19} to {last}: {means[0]:.5f} in MXNet, {means[1]:.5f} in PyTorch')
    picture(folder / 'resume.png', logs, killed_at, resumed_from)
    print(f'{INDENT}the picture: {folder / "resume.png"}')


def main():
    os.chdir(ROOT)
    folder = Path('demo')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = time.monotonic()
    try:
        demonstrate(folder)
    except Failed as error:
        print(f'FAILED: {error}', file=sys.stderr)
        return 1
    print(f'Done in {time.monotonic() - start:.0f} s.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
