"""What the tests of resuming and of several processes run in processes of their own.

A fork server has everything imported once; a process then starts in a moment, and may be killed as often as one likes.
"""
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

PAIR = 'digit_pairs/resnet8-resnet8x0.5'
SMALL = dict(epochs=5, teacher_epochs=1, train_size=600, eval_split='valid')
OPTIONS = dict(letkd2=dict(num_prototypes=16, num_dims=10, per_class=2), crd=dict(num_negatives=32),
               ab=dict(alone=.5), ce={})
MAY_DIFFER = ('seconds', 'time', 'commit', 'dirty')


def arguments(method, out, *more, **settings):
    "The words behind `letkd` for a small run."
    settings = SMALL | OPTIONS[method] | settings
    return ['run', f'{PAIR}/{method}', '--out', str(out), '--quiet', *more,
            *(word for k, v in settings.items() for word in ('--set', f'{k}={v}'))]


def server():
    "A context whose processes have everything imported and the images made, and one thread each."
    context, before = multiprocessing.get_context('forkserver'), dict(os.environ)
    context.set_forkserver_preload(['letkd.cli', 'letkd.results.tables', 'lives', 'pytest'])
    os.environ |= dict(OMP_NUM_THREADS='1', LIVES='warm',
                       PYTHONPATH=os.pathsep.join([str(Path(__file__).parent),
                                                   *filter(None, sys.path)]))
    try: forkserver.ensure_running()
    finally: os.environ.clear(), os.environ.update(before)
    return context


def warm():
    from letkd.runs.experiments import Experiment
    e = Experiment.named(f'{PAIR}/kd', **SMALL)
    for split in ('train', 'valid'): e.load(split)


if os.environ.pop('LIVES', None): warm()  # in the server


def call(module, name, *args, **options):
    "A function of a test module; pytest gives these names that another process cannot import."
    getattr(importlib.import_module(module.rpartition('.')[2]), name)(*args, **options)


def command(args, said=os.devnull, place=None, largest_file=None):
    """The command `letkd`, as a process that leaves with the command's code. What it says on stderr
    is added to the file `said`."""
    import torch
    from letkd.cli import main
    torch.set_num_threads(1)
    if place: os.environ |= place
    if largest_file:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with open(said, 'a') as err, redirect_stdout(io.StringIO()), redirect_stderr(err):
        code = main(args)
    os._exit(code)


def places(count):
    "What torchrun tells each of some processes."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    return [dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1',
                 MASTER_PORT=str(port)) for i in range(count)]


def result(folder):
    "Everything that a run leaves and that a kill must not change."
    folder = Path(folder)
    record = json.loads((folder/'record.json').read_text())
    rows = [json.loads(line) for line in (folder/'metrics.jsonl').read_text().splitlines()]
    without = lambda d: {k: v for k, v in d.items() if k not in MAY_DIFFER}
    student = hashlib.sha256((folder/'student.safetensors').read_bytes()).hexdigest()
    return dict(student=student, record=without(record), metrics=list(map(without, rows)))


def folder_of(method, out):
    return next(p.parent for p in Path(out).rglob('config.json') if method in p.parts)
