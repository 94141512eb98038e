"The command line as a user meets it: in processes of its own."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = dict(epochs=2, teacher_epochs=1, train_size=600, eval_split='valid', num_prototypes=16)
NAME = 'digit_pairs/resnet8-resnet8x0.5/letkd1'


def command(*args, **settings):
    pairs = [word for item in settings.items() for word in ('--set', '{}={}'.format(*item))]
    return [sys.executable, '-m', 'letkd.cli', *map(str, args), *pairs]


def letkd(*args, **settings):
    return subprocess.run(command(*args, **settings), capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL)


def record_of(out):  # the student's; the teacher has one too
    path, = (p for p in Path(out).rglob('record.json') if 'letkd1' in p.parts)
    return path, json.loads(path.read_text())


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "One small run, as the command line leaves it."
    out = tmp_path_factory.mktemp('runs')
    done = letkd('run', NAME, '--out', out, **SMALL)
    assert done.returncode == 0, done.stderr
    return out


def test_run_leaves_a_complete_folder(out):
    path, record = record_of(out)
    assert {p.name for p in path.parent.iterdir()} >= {'config.json', 'metrics.jsonl',
                                                       'student.safetensors', 'record.json'}
    assert len((path.parent/'metrics.jsonl').read_text().splitlines()) == record['epochs'] == 2
    assert record['name'] == NAME and record['changed']['train_size'] == 600
    assert record['target_perplexity']['layer3'] >= 1 and record['versions']['torch']
    assert 1 <= len(list(path.parent.glob('checkpoint-*.pt'))) <= 2
    assert not [p for p in out.rglob('*') if p.name.endswith('.part')]


def test_a_run_that_is_done_is_not_done_again(out):
    path, _ = record_of(out)
    before = path.stat().st_mtime_ns
    again = letkd('run', NAME, '--out', out, **SMALL)
    assert again.returncode == 0 and path.stat().st_mtime_ns == before
    assert 'epoch' not in again.stdout.replace('last epoch', '')


def test_a_student_leaves_for_others(out, tmp_path, capsys):
    "From its own file alone, at another place, with no data and no record there."
    import torch
    from letkd.cli import main
    path, record = record_of(out)
    shutil.copy(path.with_name('student.safetensors'), tmp_path)
    for run, to, more in ((path.parent, 'a.ts', []), (path, 'b.safetensors', []),
                          (tmp_path/'student.safetensors', 'c.ts', ['--pixels'])):
        assert main(['export', str(run), '--to', str(tmp_path/to), *more]) == 0
        assert '13 classes the same' in capsys.readouterr().out
    with torch.no_grad():
        assert torch.jit.load(tmp_path/'c.ts')(torch.zeros(7, 3, 16, 16,
                                                           dtype=torch.uint8)).shape == (7, 100)
    for run, to, says in ((out, 'd.ts', 'found no student'),
                          (path, 'd.pt', 'expected one of .pt2, .onnx'),
                          (path, 'd', "found the ending ''")):
        assert main(['export', str(run), '--to', str(tmp_path/to)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.startswith('letkd: ') and error.count('\n') == 1
    assert {p.name for p in tmp_path.iterdir()} == {'student.safetensors', 'a.ts',
                                                    'b.safetensors', 'c.ts'}


def test_a_student_with_parts_of_its_teacher_leaves_too(out, tmp_path, capsys):
    from letkd.cli import main
    name, settings = NAME.replace('letkd1', 'simkd'), {k: v for k, v in SMALL.items()
                                                       if k != 'num_prototypes'}
    assert main(['run', name, '--out', str(out), '--quiet',
                 *(w for k, v in settings.items() for w in ('--set', f'{k}={v}'))]) == 0
    path, = Path(out, name).glob('*/student.safetensors')
    assert main(['export', str(path.parent), '--to', str(tmp_path/'a.ts')]) == 0
    assert '13 classes the same' in capsys.readouterr().out
    shutil.copy(path, tmp_path)
    # no teacher there
    assert main(['export', str(tmp_path/path.name), '--to', str(tmp_path/'b.ts')]) == 2
    assert 'only its maker knows' in capsys.readouterr().err


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'letkd', '--version'], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith('letkd ')


@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                    reason='torch.compile needs a C++ compiler here')
def test_the_teacher_may_run_compiled(tmp_path):
    losses = []
    for compiled in False, True:
        done = letkd('run', NAME, '--out', tmp_path/str(compiled), **dict(SMALL, epochs=1),
                     augment=True, compile=compiled)
        assert done.returncode == 0, done.stderr
        path, record = record_of(tmp_path/str(compiled))
        assert record['settings']['compile'] is compiled
        row = json.loads((path.parent/'metrics.jsonl').read_text())
        losses.append([value for key, value in row.items()
                       if key not in ('seconds', 'top1', 'top5', 'train_top1')])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    process = subprocess.Popen(command('run', NAME, '--out', tmp_path, **dict(SMALL, epochs=400)),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               stdin=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.rglob('letkd1/*/checkpoint-*.pt')) and time.time() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and 'goes on' in error and 'Traceback' not in error


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    settings = dict(SMALL, epochs=400)
    first = subprocess.Popen(command('run', NAME, '--out', tmp_path, **settings),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             stdin=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not list(tmp_path.rglob('letkd1/*/checkpoint-*.pt')) and time.time() < deadline:
            time.sleep(.02)
        second = letkd('run', NAME, '--out', tmp_path, **settings)
        assert second.returncode == 2 and 'in use by another process' in second.stderr
    finally:
        first.kill(); first.wait()


def test_a_terminal_without_the_signs_of_a_table(tmp_path):
    found = subprocess.run(command('table', 'cifar100', '--out', tmp_path/'none'),
                           capture_output=True,
                           env=dict(os.environ, PYTHONIOENCODING='cp1252'))
    assert found.returncode == 0 and b'resnet56 ? resnet20' in found.stdout, found.stderr


def test_bench_looks_at_its_file_first(tmp_path):
    found = letkd('bench', '--quick', '--json', tmp_path)
    assert found.returncode == 2 and 'is a folder; expected the name of a file' in found.stderr


def test_table_of_what_was_run(out):
    table = letkd('table', 'digit_pairs', '--out', out)
    assert table.returncode == 0, table.stderr
    assert 'letkd1' in table.stdout and 'teacher' in table.stdout
    _, record = (record_of(out) if len(list(out.rglob('letkd1/*/record.json'))) == 1
                 else (None, None))
    if record: assert f'{record["top1_last"]:.1f}' in table.stdout


@pytest.mark.parametrize('args, says', [
    (['run', 'digit_pair/resnet20'], 'digit_pairs'),
    (['run', 'digit_pairs/resnet56-resnet21/kd'], '14, 20'),
    (['run', 'digit_pairs/resnet56-resnet20/letkd3'], 'letkd2'),
    (['run', 'digit_pairs/resnet20', '--set', 'epoch=3'], 'epochs'),
    (['run', 'digit_pairs/resnet20', '--set', 'epochs'], 'key=value'),
    (['run', 'digit_pairs/resnet20', '--set', 'epochs=many'], 'expected int'),
    (['run', 'digit_pairs/resnet20', '--set', 'epochs=0'], 'at least 1'),
    (['run', '../../etc/passwd'], 'expected a name'),
    (['run', 'digit_pairs/resnet8-resnet8x0.5/letkd1', '--set', "penultimate=('layer4', 'layer3')"],
     "nearest: 'layer3'"),
    (['table', 'cifar'], 'cifar100'),
    (['table', 'ablation/layer'], 'ablation/layers'),
    (['sweep', 'ablation/costs'], 'ablation/cost'),
    (['sweep', 'ablation/layers', '--set', 'epoch=1'], 'epochs'),
    (['run', 'digit_pairs/resnet20', '--checkpoint-every', 'often'],
     'a number of steps such as 200'),
    (['sweep', 'ablation/layers', '--jobs', '0'], '--jobs: found 0'),
    (['demo', '--jobs', '-1'], '--jobs: found -1'),
    (['reproduce', 'nowhere.json'], 'nowhere.json'),
    (['run', 'digit_pairs/my_nets:tiny'], 'letkd --import my_nets.py'),
    (['table', 'digit_pairs', '--out', 'nowhere'], 'nowhere'),
])
def test_a_slip_is_one_clear_line(args, says, tmp_path, capsys):
    from letkd.cli import main
    where = [] if '--out' in args else ['--out', str(tmp_path)]
    assert main([*args, *where]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith('letkd: ') and error.count('\n') == 1
    assert not list(tmp_path.rglob('*')), 'nothing is written for a wrong name'


@pytest.mark.parametrize('args', [['--help'], ['demo', '--help'], ['run', '--help'],
                                  ['table', '--help'], ['reproduce', '--help'],
                                  ['export', '--help'], ['taps', '--help']])
def test_help(args, capsys):
    from letkd.cli import main
    with pytest.raises(SystemExit) as left: main(args)
    assert left.value.code == 0 and len(capsys.readouterr().out) > 200


def test_names_need_no_name(capsys):
    from letkd.cli import main
    assert main(['run', '--names']) == 0
    assert 'letkd2' in (said := capsys.readouterr().out) and 'weight_decay' in said


def test_help_does_not_wait_for_torch():
    code = ("import sys; from letkd.cli import parser; parser().format_help(); sys.exit('torch' in "
            "sys.modules)")
    assert subprocess.run([sys.executable, '-c', code], timeout=60).returncode == 0


def test_what_no_data_can_fill_is_refused_with_both_numbers(out, capsys):
    """The teacher is there; the prototypes would be more than its pixels, the sub-classes more than
    a class has."""
    from letkd.cli import main
    pairs = [word for item in dict(SMALL, num_prototypes=10**6).items()
             for word in ('--set', '{}={}'.format(*item))]
    assert main(['run', NAME, '--out', str(out), '--quiet', *pairs]) == 2
    assert 'found 9600 rows' in (error := capsys.readouterr().err) and 'num_prototypes = 1000000' in error


@pytest.mark.parametrize('change, says', [
    (dict(settings=dict(colour='red')), "found settings ['colour']"),
                                          (dict(settings=dict(dataset='cifar1000')),
                                           'found the record of digit_pairs'),
    (dict(settings=dict(method='a|b')), "found the name 'a|b'"),
                                          (dict(settings=None), 'not a record of this version')])
def test_a_record_of_another_version_is_named(change, says, out, tmp_path, capsys):
    from letkd.cli import main
    path, record = record_of(out)
    settings = change['settings']
    record = ({k: v for k, v in record.items() if k != 'settings'} if settings is None
              else dict(record, settings=record['settings'] | settings))
    (tmp_path/'record.json').write_text(json.dumps(record))
    assert main(['table', 'digit_pairs', '--out', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and 'record.json' in error and error.count('\n') == 1


def renamed(record, **settings):
    "A record as somebody else may have it, under names that are not known here."
    s = record['settings'] | settings
    name = '/'.join([s['dataset'], f"{s['teacher']}-{s['student']}", s['method']])
    return record | {k: s[k] for k in ('dataset', 'teacher', 'student',
                                       'method')} | dict(name=name, settings=s)


@pytest.mark.parametrize('settings, dataset, note', [
    (dict(method='letkd7'), 'digit_pairs', 'the method letkd7'),
                                                     (dict(method='mine+kd',
                                                           options=dict(scale=2.)), 'digit_pairs',
                                                      'the method mine+kd'),
    (dict(options=dict(taus=1.)), 'digit_pairs', 'nearest: tau'),
                                                     (dict(student='my_nets:tiny'), 'digit_pairs',
                                                      'the student my_nets:tiny'),
    (dict(teacher='resnet7'), 'digit_pairs', 'the teacher resnet7'),
                                                     (dict(dataset='birds'), 'birds',
                                                      'the data set birds'),
    (dict(teacher='timm/nothing', method='mine'), 'digit_pairs',
     'the teacher timm/nothing, the method mine')])
def test_a_strange_record_is_shown_among_the_others(settings, dataset, note, out, tmp_path, capsys):
    from letkd.cli import main
    shutil.copytree(out, tmp_path/'runs')
    _, record = record_of(out)
    (tmp_path/'runs'/'strange.json').write_text(json.dumps(renamed(record, **settings)))
    for style in [], ['--markdown'], ['--figure', str(tmp_path/'figure.png')]:
        assert main(['table', dataset, '--out', str(tmp_path/'runs'), *style]) == 0
        said = capsys.readouterr().out
        assert 'Not known here' in said and note in said and (settings.get('method',
                                                                           'letkd1')) in said
        assert (f'{record["top1_last"]:.1f} (1)' in said) and 'nan' not in said
    assert (tmp_path/'figure.png').stat().st_size > 5000
    for study in ('cifar100', 'ablation/layers'):
        assert main(['table', study, '--out', str(tmp_path/'runs')]) == 0
    assert main(['reproduce', str(tmp_path/'runs'/'strange.json'), '--out',
                 str(tmp_path/'again')]) == 2


OWN = """
import letkd
from letkd.distiller import KD
from letkd.models.resnet import resnet

@letkd.methods.register(ce=.5)
def soft(setup, softness=2.):
    return [KD(softness)]

def slim(num_classes): return resnet(8, .25, num_classes=num_classes)
"""


def test_names_of_ones_own_from_the_first_word_to_the_record(tmp_path, capsys):
    "In processes of their own: a run, and the same run again; then once more without the file."
    from letkd.cli import main
    (tmp_path/'my_own.py').write_text(OWN)
    file, where = tmp_path/'my_own.py', ['--out', tmp_path/'runs']
    settings = {k: v for k, v in SMALL.items() if k != 'num_prototypes'} | dict(epochs=1)
    done = letkd('--import', file, 'run', 'digit_pairs/my_own:slim-resnet8x0.5/soft', *where,
                 '--quiet', **settings)
    assert done.returncode == 0, done.stderr
    path, = (p for p in (tmp_path/'runs').rglob('record.json') if 'soft' in p.parts)
    record = json.loads(path.read_text())
    assert ':' not in str(path.relative_to(tmp_path)) and record['teacher'] == 'my_own:slim' and record['settings']['options'] == dict(softness=2.)
    assert list(record['imported']) == ['my_own.py'] and len(record['imported']['my_own.py']) == 64
    assert record['command'].startswith(f'letkd --import {file} run '
                                        'digit_pairs/my_own:slim-resnet8x0.5/soft')
    again = letkd('reproduce', path, '--out', tmp_path/'again', '--quiet', '--import', file)
    assert again.returncode == 0 and 'equal to the last bit' in again.stdout, again.stderr
    assert main(['reproduce', str(path), '--out', str(tmp_path/'twice')]) == 2
    error = capsys.readouterr().err
    assert 'my_own.py, SHA-256' in error and 'was not imported' in error and error.count('\n') == 1 and not (tmp_path/'twice').exists()


@pytest.mark.parametrize('text, says', [
    ('x = 1\ny = z', "broken.py, line 2: NameError: name 'z' is not defined"),
                                        ('def f(:', 'broken.py, line 1: SyntaxError'),
    ('import letkd\n@letkd.methods.register("kd")\ndef f(setup): return []',
     "broken.py, line 2: ValueError: method 'kd': found the name taken")])
def test_a_file_that_cannot_be_imported_is_one_clear_line(text, says, tmp_path, capsys):
    from letkd.cli import main
    (tmp_path/'broken.py').write_text(text)
    assert main(['run', 'digit_pairs/resnet20', '--out', str(tmp_path/'runs'), '--import',
                 str(tmp_path/'broken.py')]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith('letkd: --import') and error.count('\n') == 1 and not (tmp_path/'runs').exists()


def test_the_cost_of_a_layer_needs_no_run(capsys):
    from letkd.cli import main
    assert main(['sweep', 'ablation/cost', '--dataset', 'digit_pairs', '--pair',
                 'resnet14-resnet8x0.5']) == 0
    assert 'penultimate' in (table := capsys.readouterr().out) and '+2.0 %' in table


def test_a_reader_may_leave_a_pipe():
    with subprocess.Popen(command('table', 'cifar100', '--out', 'nowhere'), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          text=True) as process:
        assert 'published' in process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ('', 0)


@pytest.mark.parametrize('study, options', [
    ('cifar100', dict(num_prototypes=16, num_negatives=32)),
                                            ('ablation/clusters', dict(num_prototypes=16)),
    ('ablation/layers', dict(num_prototypes=16)), ('ablation/capacity',
                                                   dict(num_prototypes=16, num_templates=16)),
    ('ablation/subclasses', dict(num_prototypes=16)), ('ablation/naive', dict(num_prototypes=16)),
    ('ablation/probe', dict(num_prototypes=16))])
def test_every_row_of_a_study_runs(study, options, tmp_path_factory, capsys):
    """At a miniature scale, on a pair of one width, because FSP wants that; one teacher serves all
    studies."""
    from letkd.cli import main
    out = tmp_path_factory.getbasetemp()/'studies'
    settings = dict(options, epochs=1, teacher_epochs=1, train_size=1280)
    pairs = [word for item in settings.items() for word in ('--set', '{}={}'.format(*item))]
    where = ['--dataset', 'digit_pairs', '--pair', 'resnet14-resnet8', '--out', str(out), *pairs]
    code, printed = main(['sweep', study, *where, '--quiet']), capsys.readouterr()
    assert code == 0, printed.err
    if '/' not in study: return
    assert main(['table', study, *where]) == 0
    table = capsys.readouterr().out
    assert table in printed.out and 'published' in table and '(1)' in table


MINIATURE = ['--dataset', 'digit_pairs', '--pair', 'resnet14-resnet8',
             *(word for pair in ('num_prototypes=16', 'epochs=1', 'teacher_epochs=1',
                                 'train_size=1280') for word in ('--set', pair))]


def hashes(out):
    return {str(p.relative_to(out)): json.loads(p.read_text())['student_hash']
            for p in Path(out).rglob('record.json')}


def test_two_runs_at_once_are_the_same_runs(tmp_path_factory, tmp_path, capsys):
    "Those of one process, one by one, with as many threads."
    import torch
    from letkd.cli import main
    one, two = tmp_path_factory.getbasetemp()/'studies', tmp_path/'two'
    assert main(['sweep', 'ablation/clusters', '--out', str(one), '--quiet', *MINIATURE]) == 0
    done = subprocess.run(command('sweep', 'ablation/clusters', '--out', two, '--jobs', 2,
                                  *MINIATURE), capture_output=True, text=True,
                          timeout=600, env=dict(os.environ,
                                                OMP_NUM_THREADS=str(torch.get_num_threads())))
    assert done.returncode == 0, done.stderr
    assert capsys.readouterr().out.splitlines()[-9:-1] == done.stdout.splitlines()[-9:-1]
    found, expected = hashes(two), hashes(one)
    assert len(found) == 6 and found == {name: expected[name] for name in found}
    assert done.stdout.index('6/6: ') < done.stdout.rindex('epoch 1/1') and 'steps/s' in done.stdout


@pytest.mark.parametrize('jobs', [1, 2])
def test_students_of_a_teacher_that_failed_are_not_started(jobs, tmp_path, capsys):
    from letkd.cli import main
    from letkd.runs.experiments import Experiment
    teacher = Experiment.named('digit_pairs/resnet14', epochs=1, train_size=1280)
    broken = tmp_path/teacher.folder/f'checkpoint-00000001-{hashlib.sha256(b"x").hexdigest()[:16]}.pt'
    broken.parent.mkdir(parents=True)
    broken.write_text('x')
    assert main(['sweep', 'ablation/clusters', '--out', str(tmp_path), '--jobs', str(jobs),
                 *MINIATURE]) == 2
    said = capsys.readouterr().err
    assert '1 of 6 runs failed, so 4 more did not start' in said and said.count('delete it') == 1 and f'{teacher.folder}: ' in said
    assert [name.split('/')[1:3] for name in hashes(tmp_path)] == [['resnet8', 'ce']]


def free(folder):  # is nobody at work there?
    from filelock import FileLock, Timeout
    try:
        with FileLock(folder/'.run.lock', timeout=0): return True
    except Timeout: return False


def test_many_runs_stop_together_and_go_on(tmp_path):
    """Killed, the parent leaves nobody behind; by Ctrl-C it ends in order; the same command then
    comes to its end."""
    words = command('sweep', 'ablation/clusters', '--dataset', 'digit_pairs', '--pair',
                    'resnet8-resnet8x0.5', '--out', tmp_path, '--jobs', 2, '--quiet',
                    **dict(SMALL, epochs=6))
    started = lambda: [p for p in tmp_path.rglob('.run.lock') if not free(p.parent)]
    for number, code in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   text=True, stdin=subprocess.DEVNULL)
        deadline = time.time() + 120
        while len(started()) < 2 and time.time() < deadline: time.sleep(.02)
        before = {p.parent for p in started()}
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == code and 'Traceback' not in error, error
        if number == signal.SIGINT: assert 'stopped by SIGINT' in error and 'goes on' in error
        while started() and time.time() < deadline: time.sleep(.02)
        assert len(before) == 2 and not started() and all(list(folder.glob('checkpoint-*.pt'))
                                                          for folder in before)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(hashes(tmp_path)) == 6


def test_bench_in_miniature(tmp_path, capsys, monkeypatch):
    "Every part, in a few seconds; the file is JSON, and no record of a run."
    from letkd.results import bench
    from letkd.cli import main
    from letkd.results.tables import read_records
    tiny = bench.Scale(0., 1, (64, 8, 32, 8), bench.PAIRS[:1],
                       dict(base=(32, 8, 32), n=(32,), c=(8,), k=(16, 32)), 'resnet8',
                       'resnet8x0.5',
                       8, 16, 10, 32, (600, 8, 10), (1000, 12, 6), settings=('letkd',))
    monkeypatch.setattr(bench, 'QUICK', tiny)
    assert main(['bench', '--quick', '--device', 'cpu', '--json', str(tmp_path/'bench.json')]) == 0
    record, said = json.loads((tmp_path/'bench.json').read_text()), capsys.readouterr().out
    assert record['kind'] == 'bench' and record['versions']['torch'] and record['threads'] == 1
    assert all(row['seconds'] > 0 and row['low'] <= row['seconds'] <= row['high']
               for row in record['rows'])
    for word in (*bench.PARTS, 'letkd1 after', 'images/s', 'targets'): assert word in said, word
    assert read_records(tmp_path) == []
