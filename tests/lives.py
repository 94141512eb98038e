"""What tests of the command share: its words, processes that are at it, and what a run leaves.

A fork server has everything imported once; a process then starts in a moment, and may be killed as
often as one likes.
"""
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import socket
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import forkserver
from pathlib import Path

PAIR = 'digit_pairs/resnet8-resnet8x0.5'
SMALL = dict(epochs=5, teacher_epochs=1, train_size=600, eval_split='train')
OPTIONS = dict(letkd1=dict(num_prototypes=16), crd=dict(num_negatives=32), ab=dict(alone=.5), ce={},
               letkd2=dict(num_prototypes=16, num_dims=10, per_class=2))
MAY_DIFFER = ('seconds', 'time', 'commit', 'dirty')


def sets(**settings):
    "Settings as the command line has them."
    return [word for key, value in settings.items() for word in ('--set', f'{key}={value}')]


def arguments(method, out, *more, **settings):
    "The words behind `letkd` for a small run."
    return ['run', f'{PAIR}/{method}', '--out', str(out), '--quiet', *more,
            *sets(**SMALL | OPTIONS[method] | settings)]


def server():
    "A context whose processes have everything imported and the images made, and one thread each."
    context, before = multiprocessing.get_context('forkserver'), dict(os.environ)
    context.set_forkserver_preload(['letkd.cli', 'letkd.results.tables', 'lives', 'pytest'])
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    os.environ |= dict(OMP_NUM_THREADS='1', LIVES='warm', PYTHONPATH=path)
    try: forkserver.ensure_running()
    finally: os.environ.clear(), os.environ.update(before)
    return context


def warm():
    from letkd.runs.experiments import Experiment
    Experiment.named(f'{PAIR}/kd', **SMALL).load('train')


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


def start(server, *args, **options):
    "A process that is at the command, see `command`."
    process = server.Process(target=command, args=args, kwargs=options)
    process.start()
    return process


def finished(server, *args, **options):
    "Its exit code, when it has come to its end."
    process = start(server, *args, **options)
    process.join(300)
    return process.exitcode


def wait_for(condition, process=None, every=.002):
    "Does it hold before the process ends, and within two minutes? Looks every so many seconds."
    if process is None: ended = lambda: False
    elif hasattr(process, 'poll'): ended = lambda: process.poll() is not None
    else: ended = lambda: not process.is_alive()
    end = time.monotonic() + 120
    while not ended() and time.monotonic() < end:
        if condition(): return True
        time.sleep(every)
    return False


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def places(count):
    "What torchrun tells each of some processes."
    port = str(free_port())
    return [dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1',
                 MASTER_PORT=port) for i in range(count)]


def kept(out, name, method='*'):
    "The files of that name in the folders of all runs, or of one method's, sorted."
    return sorted(Path(out).glob(f'*/*/{method}/*/{name}'))


def checkpoints(out, method='*'): return kept(out, 'checkpoint-*.pt', method)


def result(out, method):
    "Everything that the run of a method leaves and that a kill must not change."
    path, = kept(out, 'record.json', method)
    rows = path.with_name('metrics.jsonl').read_text().splitlines()
    without = lambda d: {k: v for k, v in d.items() if k not in MAY_DIFFER}
    student = hashlib.sha256(path.with_name('student.safetensors').read_bytes()).hexdigest()
    return dict(student=student, record=without(json.loads(path.read_text())),
                metrics=[without(json.loads(row)) for row in rows])


def one_line(capsys, *says):
    "The command has said one line that says all of this; returns it."
    error = capsys.readouterr().err
    assert error.startswith('letkd: ') and error.count('\n') == 1, error
    for text in says: assert text in error
    return error
