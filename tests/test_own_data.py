"""Data of one's own by the command line: class folders of photos, from the first run to the table
and back."""
import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from letkd.cli import main

NAME = 'folder/resnet8-resnet8x0.5'
SMALL = ['--device', 'cpu', '--quiet',
         *(w for s in ('epochs=1', 'teacher_epochs=1', 'batch_size=8', 'num_prototypes=16')
           for w in ('--set', s))]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three classes of 12 photos with names of people, in a folder with a space; the process stands
    beside it."""
    noise = np.random.default_rng(0)
    for i in range(36):
        path = tmp_path/'my photos'/f'класс {i % 3}'/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise.integers(0, 100, (12, 20, 3))
                         + 50 * (i % 3)).astype(np.uint8)).save(path)
    monkeypatch.setenv('LETKD_DATA', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    return tmp_path/'my photos'


def records(out): return sorted(out.rglob('record.json'))


def test_a_folder_runs_is_tabulated_and_reproduced_elsewhere(photos, tmp_path, monkeypatch, capsys):
    run = ['run', f'{NAME}/letkd2', *SMALL, '--set', 'resolution=16', '--set', 'data=my photos',
           '--out', str(tmp_path/'runs')]
    assert main(run) == 0, capsys.readouterr().err
    first = records(tmp_path/'runs')
    assert len(first) == 2 and json.loads(first[0].read_text())['settings']['data'] == 'my photos'
    assert main(['table', 'folder', '--out', str(tmp_path/'runs')]) == 0
    assert 'data=my photos' in (said := capsys.readouterr().out) and 'letkd2' in said

    shutil.move(photos, tmp_path/'elsewhere'/'moved')
    monkeypatch.chdir(tmp_path/'elsewhere')
    assert main([*run[:-3], 'data=moved', *run[-2:]]) == 0 and records(tmp_path/'runs') == first, 'the same photos find the same run'
    record = next(path for path in first if 'letkd2' in path.parts)
    again = ['reproduce', str(record), '--out', 'again', '--device', 'cpu', '--quiet']
    assert main(again) == 2 and 'my photos: found no such folder' in capsys.readouterr().err
    assert main([*again, '--data', 'moved']) == 0
    assert 'equal to the last bit' in capsys.readouterr().out

    shutil.copy(next((tmp_path/'elsewhere'/'moved').rglob('*.png')),
                tmp_path/'elsewhere'/'moved'/'класс 1'/'new.png')
    assert main([*run[:-3], 'data=moved', *run[-2:]]) == 0
    assert len(records(tmp_path/'runs')) == 4, 'one photo more is other data, for the teacher too'


@pytest.mark.parametrize('settings, says', [
    ([], 'data: found None; expected the path of the data for folder'),
    (['data=nowhere'], 'nowhere: found no such folder'),
    (['data=my photos'], 'found 20 x 12 pixels; expected a square, or a resolution'),
    (['data=my photos', 'resolution=16', 'num_prototypes=4096'],
     'expected at least num_prototypes = 4096'),
    (['data=my photos', 'resolution=16', 'train_size=64'],
     'size: found 64; expected 1 .. 30 images'),
])
def test_a_slip_is_met_before_anything_is_trained(settings, says, photos, tmp_path, capsys):
    pairs = [word for setting in settings for word in ('--set', setting)]
    assert main(['run', f'{NAME}/letkd1', *SMALL, *pairs, '--out', str(tmp_path/'runs')]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith('letkd: ') and error.count('\n') == 1
    assert not records(tmp_path/'runs') and not list(tmp_path.rglob('checkpoint-*'))


@pytest.mark.parametrize('classes', [2, 10])
def test_few_classes_are_enough_for_letkd2(classes, photos, tmp_path, capsys):
    "LDA keeps one dimension less than there are classes."
    from letkd.runs.experiments import Experiment
    from letkd.runs.running import load_run
    shutil.rmtree(photos)
    noise = np.random.default_rng(0)
    for i in range(6 * classes):
        (photos/str(i % classes)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (16, 16),
                                       dtype=np.uint8)).save(photos/str(i % classes)/f'{i}.png')
    settings = dict(epochs=1, teacher_epochs=1, batch_size=8, num_prototypes=16, data='my photos')
    pairs = [word for item in settings.items() for word in ('--set', '{}={}'.format(*item))]
    assert main(['run', f'{NAME}/letkd2+dkd', '--device', 'cpu', '--quiet', *pairs, '--out',
                 'runs']) == 0, capsys.readouterr().err
    distiller = load_run(Experiment.named(f'{NAME}/letkd2+dkd', **settings), 'runs', 'cpu')
    assert distiller.terms[1].supervision.projection.shape[1] == classes - 1


def test_a_run_is_watched(photos, tmp_path, capsys):
    "Where TensorBoard is not installed, nothing is trained."
    run = ['run', 'folder/resnet8x0.5', *SMALL[:5], '--set', 'batch_size=8', '--set',
           'data=my photos', '--set', 'resolution=16', '--log', 'tensorboard']
    if importlib.util.find_spec('tensorboard') is None:
        assert main(run) == 2 and 'pip install tensorboard' in capsys.readouterr().err and not (tmp_path/'runs').exists()
        return
    assert main(run) == 0, capsys.readouterr().err
    assert len(list((tmp_path/'runs').rglob('events.out.tfevents.*'))) == 1
