"The command line as a user meets it."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest

from lives import (PAIR, SMALL, arguments, checkpoints, finished, kept, one_line, sets, start,
                   wait_for)

NAME = f'{PAIR}/letkd1'
LETKD = [sys.executable, '-m', 'letkd.cli']


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "One small run, as the command line leaves it in a process of its own."
    out = tmp_path_factory.mktemp('runs')
    done = subprocess.run([*LETKD, *arguments('letkd1', out, eval_split='valid')],
                          capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert 'Record: ' in done.stdout
    return out


@pytest.fixture
def record(out):
    "The student's; the teacher has one too."
    path, = kept(out, 'record.json', 'letkd1')
    return path, json.loads(path.read_text())


def test_run_leaves_a_complete_folder(out, record):
    path, record = record
    names = 'config.json', 'metrics.jsonl', 'student.safetensors', 'record.json'
    assert {p.name for p in path.parent.iterdir()} >= set(names)
    rows = path.with_name('metrics.jsonl').read_text().splitlines()
    assert len(rows) == record['epochs'] == SMALL['epochs']
    assert record['name'] == NAME and record['changed']['train_size'] == 600
    assert record['target_perplexity']['layer3'] >= 1 and record['versions']['torch']
    assert 1 <= len(checkpoints(out, 'letkd1')) <= 2
    assert not [p for p in out.rglob('*') if p.name.endswith('.part')]


def test_a_run_that_is_done_is_not_done_again(out, record, capsys):
    from letkd.cli import main
    path, _ = record
    before = path.stat().st_mtime_ns
    assert main(arguments('letkd1', out, eval_split='valid')) == 0
    assert path.stat().st_mtime_ns == before and 'done before' in capsys.readouterr().out


def test_a_student_leaves_for_others(out, record, tmp_path, capsys):
    "From its own file alone, at another place, with no data and no record there."
    import torch
    from letkd.cli import main
    path, _ = record
    shutil.copy(path.with_name('student.safetensors'), tmp_path)
    for run, to, more in ((path.parent, 'a.ts', []), (path, 'b.safetensors', []),
                          (tmp_path/'student.safetensors', 'c.ts', ['--pixels'])):
        assert main(['export', str(run), '--to', str(tmp_path/to), *more]) == 0
        assert '13 classes the same' in capsys.readouterr().out
    pixels = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    with torch.no_grad(): assert torch.jit.load(tmp_path/'c.ts')(pixels).shape == (7, 100)
    for run, to, says in ((out, 'd.ts', 'found no student'),
                          (path, 'd.pt', 'expected one of .pt2, .onnx'),
                          (path, 'd', "found the ending ''")):
        assert main(['export', str(run), '--to', str(tmp_path/to)]) == 2
        one_line(capsys, says)
    assert {p.name for p in tmp_path.iterdir()} == {'student.safetensors', 'a.ts',
                                                    'b.safetensors', 'c.ts'}


def test_a_student_with_parts_of_its_teacher_leaves_too(out, tmp_path, capsys):
    from letkd.cli import main
    settings = sets(**dict(SMALL, epochs=1, eval_split='valid'))
    assert main(['run', f'{PAIR}/simkd', '--out', str(out), '--quiet', *settings]) == 0
    path, = kept(out, 'student.safetensors', 'simkd')
    assert main(['export', str(path.parent), '--to', str(tmp_path/'a.ts')]) == 0
    assert '13 classes the same' in capsys.readouterr().out
    shutil.copy(path, tmp_path)
    # no teacher there
    assert main(['export', str(tmp_path/path.name), '--to', str(tmp_path/'b.ts')]) == 2
    one_line(capsys, 'only its maker knows')


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'letkd', '--version'], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith('letkd ')


@pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                    reason='torch.compile needs a C++ compiler here')
def test_the_teacher_may_run_compiled(server, tmp_path):
    losses = []
    for compiled in False, True:  # the second finds the teacher of the first
        args, said = arguments('letkd1', tmp_path, epochs=1, compile=compiled), tmp_path/'said'
        assert finished(server, args, said) == 0, said.read_text()
        path, = (p for p in kept(tmp_path, 'record.json', 'letkd1')
                 if json.loads(p.read_text())['settings']['compile'] is compiled)
        row = json.loads(path.with_name('metrics.jsonl').read_text())
        losses.append([value for key, value in row.items()
                       if key not in ('seconds', 'top1', 'top5', 'train_top1')])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_second_process_in_the_same_folder_is_refused(server, tmp_path, capsys):
    from letkd.cli import main
    args, said = arguments('letkd1', tmp_path, epochs=400), tmp_path/'said'
    process = start(server, args, said)
    try:
        assert wait_for(lambda: checkpoints(tmp_path, 'letkd1'), process), said.read_text()
        assert main(args) == 2
        one_line(capsys, 'in use by another process')
    finally:
        process.kill()
        process.join()


def test_a_terminal_without_the_signs_of_a_table(tmp_path):
    found = subprocess.run([*LETKD, 'table', 'cifar100', '--out', tmp_path],
                           capture_output=True, env=dict(os.environ, PYTHONIOENCODING='cp1252'))
    assert found.returncode == 0 and b'resnet56 ? resnet20' in found.stdout, found.stderr


def test_bench_looks_at_its_file_first(tmp_path, capsys):
    from letkd.cli import main
    assert main(['bench', '--quick', '--json', str(tmp_path)]) == 2
    one_line(capsys, 'is a folder; expected the name of a file')


def test_table_of_what_was_run(out, record, capsys):
    from letkd.cli import main
    assert main(['table', 'digit_pairs', '--out', str(out)]) == 0
    table = capsys.readouterr().out
    assert 'letkd1' in table and 'teacher' in table
    assert f'{record[1]["top1_last"]:.1f}' in table


@pytest.mark.parametrize('args, says', [
    (['run', 'digit_pair/resnet20'], 'digit_pairs'),
    (['run', 'digit_pairs/resnet56-resnet21/kd'], '14, 20'),
    (['run', 'digit_pairs/resnet56-resnet20/letkd3'], 'letkd2'),
    (['run', 'digit_pairs/resnet20', '--set', 'epoch=3'], 'epochs'),
    (['run', 'digit_pairs/resnet20', '--set', 'epochs'], 'key=value'),
    (['run', 'digit_pairs/resnet20', '--set', 'epochs=many'], 'expected int'),
    (['run', 'digit_pairs/resnet20', '--set', 'epochs=0'], 'at least 1'),
    (['run', '../../etc/passwd'], 'expected a name'),
    (['run', NAME, '--set', "penultimate=('layer4', 'layer3')"], "nearest: 'layer3'"),
    (['run', PAIR], 'without a method; expected one behind it'),
    (['table', 'cifar'], 'cifar100'),
    (['table', 'ablation/layer'], 'ablation/layers'),
    (['sweep', 'ablation/costs'], 'ablation/cost'),
    (['sweep', 'ablation/cost', '--dataset', 'birds'], "data set: found 'birds'"),
    (['sweep', 'ablation/cost', '--seeds', '2'], '--seeds: found ablation/cost'),
    (['sweep', 'ablation/cost', '--set', 'epochs=3'], '--set: found ablation/cost'),
    (['table', 'ablation/cost', '--figure', 'a.png'], '--figure: found ablation/cost'),
    (['run', 'digit_pairs/resnet14-resnet8/letkd1+layer'], 'each place holds one'),
    (['sweep', 'ablation/layers', '--set', 'epoch=1'], 'epochs'),
    (['run', 'digit_pairs/resnet20', '--checkpoint-every', 'often'],
     'a number of steps such as 200'),
    (['sweep', 'ablation/layers', '--jobs', '0'], '--jobs: found 0'),
    (['demo', '--jobs', '-1'], '--jobs: found -1'),
    (['reproduce', 'nowhere.json'], 'nowhere.json'),
    (['run', 'digit_pairs/my_nets:tiny'], 'letkd --import my_nets.py'),
    (['table', 'digit_pairs', '--out', 'nowhere'], 'nowhere'),
    (['table', 'cifar100', '--out', 'rnus'], 'no folder rnus'),
    (['table', 'claims/main', '--out', 'rnus'], 'no folder rnus'),
    (['table', 'cifar100', '--pair', 'resnet56-resnet20'], 'belongs to a study'),
    (['table', 'cifar100', '--set', 'epochs=3'], 'belongs to a study'),
    (['table', 'cifar100', '--figure', 'figures/'], '--figure: found figures/; expected a file'),
    (['table', 'cifar100', '--figure', 'table.v2'], 'expected a file that ends in'),
])
def test_a_slip_is_one_clear_line(args, says, tmp_path, capsys):
    from letkd.cli import main
    where = [] if '--out' in args else ['--out', str(tmp_path)]
    assert main([*args, *where]) == 2
    one_line(capsys, says)
    assert not list(tmp_path.rglob('*')), 'nothing is written for a wrong name'


@pytest.mark.parametrize('words', ['', 'demo', 'run', 'sweep', 'reproduce', 'table', 'taps',
                                   'export', 'bench'])
def test_help(words, capsys):
    from letkd.cli import main
    with pytest.raises(SystemExit) as left: main([*words.split(), '--help'])
    assert left.value.code == 0 and len(capsys.readouterr().out) > 200


def test_names_need_no_name(capsys):
    from letkd.cli import main
    assert main(['run', '--names']) == 0
    assert 'letkd2' in (said := capsys.readouterr().out) and 'weight_decay' in said


def test_help_does_not_wait_for_torch():
    code = ('import sys; from letkd.cli import parser; parser().format_help(); '
            'sys.exit("torch" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', code], timeout=60).returncode == 0


def test_more_prototypes_than_pixels_are_refused_with_both_numbers(tmp_path, capsys):
    "Before a teacher is trained."
    from letkd.cli import main
    assert main(arguments('letkd1', tmp_path, num_prototypes=10**6)) == 2
    one_line(capsys, 'found 9600 rows', 'num_prototypes = 1000000')
    assert not list(tmp_path.rglob('*'))


@pytest.mark.parametrize('settings, says', [
    (dict(colour='red'), "found settings ['colour']"),
    (dict(dataset='cifar1000'), 'found the record of digit_pairs'),
    (dict(method='a|b'), "found the name 'a|b'"),
    (None, 'not a record of this version'),
])
def test_a_record_of_another_version_is_named(settings, says, record, tmp_path, capsys):
    from letkd.cli import main
    other = dict(record[1])
    if settings is None: del other['settings']
    else: other['settings'] = other['settings'] | settings
    (tmp_path/'record.json').write_text(json.dumps(other))
    assert main(['table', 'digit_pairs', '--out', str(tmp_path)]) == 2
    one_line(capsys, says, 'record.json')


def renamed(record, **settings):
    "A record as somebody else may have it, under names that are not known here."
    s = record['settings'] | settings
    parts = {k: s[k] for k in ('dataset', 'teacher', 'student', 'method')}
    name = '{dataset}/{teacher}-{student}/{method}'.format(**parts)
    return record | parts | dict(name=name, settings=s)


@pytest.mark.parametrize('settings, note', [
    (dict(method='letkd7'), 'the method letkd7'),
    (dict(method='mine+kd', options=dict(scale=2.)), 'the method mine+kd'),
    (dict(options=dict(taus=1.)), 'nearest: tau'),
    (dict(student='my_nets:tiny'), 'the student my_nets:tiny'),
    (dict(teacher='resnet7'), 'the teacher resnet7'),
    (dict(dataset='birds'), 'the data set birds'),
    (dict(teacher='timm/nothing', method='mine'), 'the teacher timm/nothing, the method mine'),
])
def test_a_strange_record_is_shown_among_the_others(settings, note, out, record, tmp_path, capsys):
    from letkd.cli import main
    runs = shutil.copytree(out, tmp_path/'runs', ignore=shutil.ignore_patterns('*.pt'))
    strange = renamed(record[1], **settings)
    (runs/'strange.json').write_text(json.dumps(strange))
    figures = (['--figure', str(tmp_path/name)] for name in ('figure', 'f.svg'))
    for style in [], ['--markdown'], *figures:
        assert main(['table', strange['dataset'], '--out', str(runs), *style]) == 0
        said = capsys.readouterr().out
        assert 'Not known here' in said and note in said and strange['method'] in said
        assert f'{strange["top1_last"]:.1f} (1)' in said and 'nan' not in said
    for file in 'figure.png', 'f.svg': assert (tmp_path/file).stat().st_size > 5000
    for study in 'cifar100', 'ablation/layers':
        assert main(['table', study, '--out', str(runs)]) == 0
    assert main(['reproduce', str(runs/'strange.json'), '--out', str(tmp_path/'again')]) == 2
    assert not (tmp_path/'again').exists()


def test_reproduce_says_what_came_of_it(record, tmp_path, monkeypatch, capsys):
    "Of a run whose student is another, whether or not the records explain it."
    from letkd.cli import main
    path, known = tmp_path/'known.json', record[1] | dict(dirty=False)
    monkeypatch.setattr('letkd.runs.running.run', lambda *_: known)  # it was made again
    reproduce = lambda out: main(['reproduce', str(path), '--out', str(tmp_path/out)])
    for change, code, says in (({}, 0, 'equal to the last bit'),
                               (dict(student_hash='0' * 64), 2, 'nothing that the records say'),
                               (dict(student_hash='0' * 64, threads=64), 0, 'threads: 64, now'),
                               (dict(student_hash='0' * 64, instructions='SVE'), 0,
                                'instructions: SVE, now'),
                               (dict(student_hash='0' * 64, instructions=None), 0,
                                'instructions: not in the older record, now')):
        path.write_text(json.dumps(known | change))
        assert reproduce('new') == code
        said = capsys.readouterr()
        assert says in said.out and ('not reproduced' in said.err) == bool(code)
    done = tmp_path/'old'/record[0].relative_to(record[0].parents[4])
    done.parent.mkdir(parents=True)
    done.write_text('')
    assert reproduce('old') == 2
    one_line(capsys, 'found a record already')


OWN = """
import letkd
from letkd.models.resnet import resnet
from letkd.terms import KD

@letkd.methods.register(ce=.5)
def soft(setup, softness=2.):
    return [KD(softness)]

def slim(num_classes): return resnet(8, .25, num_classes=num_classes)
"""


def test_names_of_ones_own_from_the_first_word_to_the_record(server, tmp_path, capsys):
    "In processes of their own: a run, and the same run again; then once more without the file."
    from letkd.cli import main
    file, said = tmp_path/'my_own.py', tmp_path/'said'
    name = 'digit_pairs/my_own:slim-resnet8x0.5/soft'
    file.write_text(OWN)
    args = ['--import', str(file), 'run', name, '--out', str(tmp_path/'runs'), '--quiet',
            *sets(**dict(SMALL, epochs=1))]
    assert finished(server, args, said) == 0, said.read_text()
    path, = kept(tmp_path/'runs', 'record.json', 'soft')
    record = json.loads(path.read_text())
    assert ':' not in str(path.relative_to(tmp_path)) and record['teacher'] == 'my_own:slim'
    assert record['settings']['options'] == dict(softness=2.)
    assert record['imported'] == {'my_own.py': hashlib.sha256(file.read_bytes()).hexdigest()}
    assert record['command'].startswith(f'letkd --import {file} run {name}')
    again = ['reproduce', str(path), '--deterministic', '--quiet', '--out']
    assert finished(server, [*again, str(tmp_path/'again'), '--import', str(file)], said) == 0
    path, = kept(tmp_path/'again', 'record.json', 'soft')
    assert json.loads(path.read_text())['student_hash'] == record['student_hash']
    assert main([*again, str(tmp_path/'twice')]) == 2
    one_line(capsys, 'my_own.py, SHA-256', 'was not imported')
    assert not (tmp_path/'twice').exists()


@pytest.mark.parametrize('text, says', [
    ('x = 1\ny = z', "broken.py, line 2: NameError: name 'z' is not defined"),
    ('def f(:', 'broken.py, line 1: SyntaxError'),
    ('import letkd\n@letkd.methods.register("kd")\ndef f(setup): return []',
     "broken.py, line 2: ValueError: method 'kd': found the name taken"),
])
def test_a_file_that_cannot_be_imported_is_one_clear_line(text, says, tmp_path, capsys):
    from letkd.cli import main
    (tmp_path/'broken.py').write_text(text)
    assert main(['run', 'digit_pairs/resnet20', '--out', str(tmp_path/'runs'), '--import',
                 str(tmp_path/'broken.py')]) == 2
    assert one_line(capsys, says).startswith('letkd: --import')
    assert not (tmp_path/'runs').exists()


def test_a_network_of_the_wrong_kind_is_one_clear_line(tmp_path, capsys):
    from letkd.cli import main
    (tmp_path/'heads.py').write_text('''
from torch import nn
class Two(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.flat, self.fc = nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes)
    def forward(self, x): return self.fc(self.flat(x)), self.flat(x)
''')
    assert main(['--import', str(tmp_path/'heads.py'), 'run', 'digit_pairs/heads:Two', '--out',
                 str(tmp_path/'runs'), '--quiet', *sets(epochs=1, train_size=64)]) == 2
    one_line(capsys, 'or let the network return them alone')


def test_help_names_every_study():
    from letkd.cli import _STUDIES
    from letkd.results.published import ABLATIONS, CLAIMS, published
    named, kind = [], ''
    for word in _STUDIES.split(', '):
        before, slash, short = word.rpartition('/')
        kind = before or kind
        named.append(f'{kind}/{short}' if slash else word)
    ablations = [f'ablation/{a}' for a in (*ABLATIONS, 'cost')]
    assert named == [*published().dataset.unique(), *ablations,
                     *(f'claims/{c}' for c in CLAIMS)]


@pytest.mark.parametrize('args, goes_on', [
    (['bench', '--quick'], False), (['run', 'digit_pairs/resnet8'], True)])
def test_only_what_keeps_a_checkpoint_promises_to_go_on(args, goes_on, monkeypatch, capsys):
    from letkd.cli import main
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr('letkd.cli._call', stop)
    assert main(args) == 130
    assert ('goes on' in capsys.readouterr().err) == goes_on


def test_the_cost_of_a_layer_needs_no_run(capsys):
    from letkd.cli import main
    assert main(['sweep', 'ablation/cost', '--dataset', 'digit_pairs', '--pair',
                 'resnet14-resnet8x0.5']) == 0
    assert 'penultimate' in (table := capsys.readouterr().out) and '+2.0 %' in table


def test_a_reader_may_leave_a_pipe(tmp_path):
    with subprocess.Popen([*LETKD, 'table', 'cifar100', '--out', tmp_path], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert 'published' in process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ('', 0)


@pytest.mark.parametrize('words', [['run', 'digit_pairs/resnet8x0.5'], ['sweep', 'ablation/naive']])
def test_a_training_that_nobody_reads_is_not_called_done(words, tmp_path):
    with subprocess.Popen([*LETKD, *words, '--device', 'cpu', '--out', tmp_path,
                           *sets(epochs=1, train_size=640)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=120) == 141 and 'goes on from the last checkpoint' in said
    assert not kept(tmp_path, 'record.json')


# Studies

def miniature(study, out, *more, pair='resnet14-resnet8', **settings):
    "The words of a sweep whose runs take a moment."
    small = dict(epochs=1, teacher_epochs=1, train_size=640, eval_split='train', num_prototypes=16)
    return ['sweep', study, '--dataset', 'digit_pairs', '--pair', pair, '--out', str(out), *more,
            *sets(**small | settings)]


@pytest.mark.parametrize('study, options', [
    ('cifar100', dict(num_negatives=32)),
    ('ablation/clusters', {}),
    ('ablation/layers', {}),
    ('ablation/capacity', dict(num_templates=16)),
    ('ablation/subclasses', {}),
    ('ablation/naive', {}),
    ('ablation/probe', {}),
])
def test_every_row_of_a_study_runs(study, options, tmp_path_factory, capsys):
    "On a pair of one width, because FSP wants that; one teacher, another network, serves all."
    from letkd.cli import main
    args = miniature(study, tmp_path_factory.getbasetemp()/'studies', **options)
    code, printed = main([*args, '--quiet']), capsys.readouterr()
    assert code == 0, printed.err
    if '/' not in study: return
    assert main(['table', *args[1:]]) == 0
    table = capsys.readouterr().out
    assert table in printed.out and 'published' in table and '(1)' in table


@pytest.mark.parametrize('jobs', [1, 2])
def test_students_of_a_teacher_that_failed_are_not_started(jobs, tmp_path, capsys):
    from letkd.cli import main
    from letkd.runs.experiments import Experiment
    teacher = Experiment.named('digit_pairs/resnet8', epochs=1, train_size=640, eval_split='train')
    wrong = hashlib.sha256(b'x').hexdigest()[:16]
    broken = tmp_path/teacher.folder/f'checkpoint-00000001-{wrong}.pt'
    broken.parent.mkdir(parents=True)
    broken.write_text('x')
    args = miniature('ablation/clusters', tmp_path, '--jobs', str(jobs), pair='resnet8-resnet8x0.5')
    assert main(args) == 2
    said = capsys.readouterr().err
    assert '1 of 6 runs failed, so 4 more did not start' in said
    assert f'{teacher.folder}: ' in said and said.count('delete it') == 1
    path, = kept(tmp_path, 'record.json')
    assert path.relative_to(tmp_path).parts[1:3] == ('resnet8x0.5', 'ce')


def test_a_sweep_waits_for_the_process_that_trains_its_teacher(tmp_path, monkeypatch):
    import letkd.cli as cli
    from filelock import FileLock
    from letkd.runs.experiments import Experiment
    teacher = Experiment.named('digit_pairs/resnet8', epochs=1, train_size=640, eval_split='train')
    place, said = tmp_path/teacher.folder, tmp_path/'said'
    place.mkdir(parents=True)
    words = partial(miniature, 'ablation/probe', pair='resnet8-resnet8x0.5')
    with FileLock(place/'.run.lock'), said.open('w') as err:
        process = subprocess.Popen([*LETKD, *words(tmp_path, '--quiet')], stderr=err,
                                   env=dict(os.environ, OMP_NUM_THREADS='1'))
        assert wait_for(lambda: f'at work in {place}' in said.read_text(), process, every=.05)
    assert process.wait(120) == 0 and len(kept(tmp_path, 'record.json')) == 3, said.read_text()
    class Asked(cli.Jobs):
        def run(self):
            waits = {job for job, (words, _) in self.waiting.items() if '--wait' in words}
            assert waits == {teacher.folder} and len(self.waiting) == 3
            return dict.fromkeys(self.waiting, 'asked')
    monkeypatch.setattr(cli, 'Jobs', Asked)
    assert cli.main(words(tmp_path/'jobs', '--jobs', '2')) == 2


def hashes(out):
    return {p.relative_to(out): json.loads(p.read_text())['student_hash']
            for p in kept(out, 'record.json')}


def is_free(folder):
    "Is nobody at work there?"
    from filelock import FileLock, Timeout
    try:
        with FileLock(folder/'.run.lock', timeout=0): return True
    except Timeout: return False


def test_many_runs_at_once_stop_together_and_end_as_one_by_one(server, tmp_path, capsys):
    """Killed, the parent leaves nobody behind; by Ctrl-C it ends in order. The same command then
    comes to its end, with the bits of one process that was never stopped."""
    from letkd.cli import main
    one, two, said = tmp_path/'one', tmp_path/'two', tmp_path/'said'
    sweep = partial(miniature, 'ablation/clusters', pair='resnet8-resnet8x0.5', epochs=6,
                    teacher_epochs=6)
    started = lambda: {p.parent for p in kept(two, '.run.lock') if not is_free(p.parent)}
    for number, code in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130):
        process = start(server, sweep(two, '--jobs', '2', '--quiet'), said)
        # the second lock is taken where the training begins
        training = lambda: {folder for folder in started() if (folder/'.lock').exists()}
        assert wait_for(lambda: len(training()) == 2, process, every=.02)
        at_work = training()
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == code and 'Traceback' not in said.read_text(), said.read_text()
        assert wait_for(lambda: not started(), every=.02)
        assert len(at_work) == 2 and all(list(folder.glob('checkpoint-*.pt')) for folder in at_work)
    assert 'stopped by SIGINT' in said.read_text() and 'goes on' in said.read_text()
    left = 6 - len(kept(two, 'record.json'))
    done = subprocess.run([*LETKD, *sweep(two, '--jobs', '2')], capture_output=True, text=True,
                          timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    assert done.stdout.index(f'{left}/{left}: ') < done.stdout.rindex('epoch 6/6')
    assert 'steps/s' in done.stdout
    assert finished(server, sweep(one, '--quiet')) == 0
    assert len(hashes(one)) == 6 and hashes(one) == hashes(two)
    assert main(['table', *sweep(one)[1:]]) == 0
    assert capsys.readouterr().out in done.stdout


def test_bench_in_miniature(tmp_path, capsys, monkeypatch):
    """The parts that compile, for a backend that generates no code; the notebook of the bench runs
    all. The file is JSON, and no record of a run."""
    import torch
    from letkd.cli import main
    from letkd.results import bench
    from letkd.results.tables import read_records
    monkeypatch.setattr('torch.compile', partial(torch.compile, backend='eager'))
    tiny = bench.Scale(0., 1, (64, 8, 32, 8), bench.PAIRS[:1], {}, 'resnet8', 'resnet8x0.5', 8, 16,
                       10, 32)
    monkeypatch.setattr(bench, 'QUICK', tiny)
    file = tmp_path/'bench.json'
    assert main(['bench', '--quick', '--device', 'cpu', '--json', str(file), '--parts', 'layer',
                 'step']) == 0
    record, said = json.loads(file.read_text()), capsys.readouterr().out
    assert record['kind'] == 'bench' and record['versions']['torch'] and record['threads'] == 1
    assert {row['part'] for row in record['rows']} == {'layer', 'inference', 'step'}
    assert 'compiled' in {row['form'] for row in record['rows']}
    assert all(row['seconds'] > 0 and row['low'] <= row['seconds'] <= row['high']
               for row in record['rows'])
    for word in ('letkd1 after', 'targets', 'layer: ', 'step: '): assert word in said, word
    assert read_records(tmp_path) == []
