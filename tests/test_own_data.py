"Data of one's own by the command line: class folders of photos, from a run to the table and back."
import importlib.util
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from letkd.cli import main
from lives import kept, one_line, sets

NAME = 'folder/resnet8-resnet8x0.5'
SMALL = dict(epochs=1, teacher_epochs=1, batch_size=8, num_prototypes=16)
CPU = ['--device', 'cpu', '--quiet', '--out']


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three classes of 12 photos with names of people, in a folder with a space; the process stands
    beside it."""
    noise = np.random.default_rng(0)
    for i in range(36):
        path = tmp_path/'my photos'/f'класс {i % 3}'/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 100, (12, 20, 3)) + 50 * (i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    monkeypatch.setenv('LETKD_DATA', str(tmp_path/'cache'))
    monkeypatch.chdir(tmp_path)
    return tmp_path/'my photos'


def test_a_folder_runs_is_tabulated_and_reproduced_elsewhere(photos, tmp_path, monkeypatch, capsys):
    runs = tmp_path/'runs'
    run = lambda data: main(['run', f'{NAME}/letkd2', *CPU, str(runs),
                             *sets(**SMALL, resolution=16, data=data)])
    assert run('my photos') == 0, capsys.readouterr().err
    first = kept(runs, 'record.json')
    assert len(first) == 2 and json.loads(first[0].read_text())['settings']['data'] == 'my photos'
    assert main(['table', 'folder', '--out', str(runs)]) == 0
    assert 'data=my photos' in (said := capsys.readouterr().out) and 'letkd2' in said

    shutil.move(photos, tmp_path/'elsewhere'/'moved')
    monkeypatch.chdir(tmp_path/'elsewhere')
    assert run('moved') == 0
    assert kept(runs, 'record.json') == first, 'the same photos find the same run'
    record, = kept(runs, 'record.json', 'letkd2')
    again = ['reproduce', str(record), *CPU, 'again']
    assert main(again) == 2
    one_line(capsys, 'my photos: found no such folder')
    assert main([*again, '--data', 'moved']) == 0
    assert 'equal to the last bit' in capsys.readouterr().out

    moved = tmp_path/'elsewhere'/'moved'
    shutil.copy(next(moved.rglob('*.png')), moved/'класс 1'/'new.png')
    assert run('moved') == 0
    assert len(kept(runs, 'record.json')) == 4, 'one photo more is other data, for the teacher too'


def test_photos_are_known_by_what_they_are(photos, tmp_path, capsys):
    "One seed before they have moved and one behind: one row, in the table and in a study."
    chosen = lambda data: sets(epochs=1, teacher_epochs=1, batch_size=8, resolution=16, data=data)
    alone = lambda seed, data: main(['run', 'folder/resnet8x0.5', '--seed', seed, *CPU, 'runs',
                                     *chosen(data)])
    assert alone('0', 'my photos') == 0, capsys.readouterr().err
    for path in (tmp_path/'cache').rglob('*.safetensors'):
        assert path.stat().st_mode & 0o44 == 0o44, 'others may read what was decoded'
    shutil.copytree(photos, tmp_path/'others')
    shutil.move(photos, tmp_path/'moved')
    assert alone('1', 'moved') == 0
    assert alone('1', './moved') == 0  # the same run
    capsys.readouterr()
    assert main(['table', 'folder']) == 0
    said = capsys.readouterr().out
    assert 'data=moved' in said and 'data=my photos' not in said and '(2)' in said
    study = ['table', 'ablation/naive', '--dataset', 'folder', '--pair', 'resnet8-resnet8x0.5']
    assert main([*study, *chosen('./moved')]) == 0
    assert '(2)' in capsys.readouterr().out

    next((tmp_path/'others').rglob('*.png')).unlink()
    record, *_ = kept(tmp_path/'runs', 'record.json')
    again = ['reproduce', str(record.parent), *CPU, 'again', '--data', 'others']
    assert main(again) == 2
    one_line(capsys, 'found other images in others')
    (tmp_path/'moved'/'класс 3').symlink_to(tmp_path/'nowhere')
    assert alone('2', 'moved') == 2
    one_line(capsys, 'found a link to')


@pytest.mark.parametrize('settings, says', [
    ({}, 'data: found None; expected the path of the data for folder'),
    (dict(data='nowhere'), 'nowhere: found no such folder'),
    (dict(data='my photos'), 'found 20 x 12 pixels; expected a square, or a resolution'),
    (dict(data='my photos', resolution=16, num_prototypes=4096),
     'expected at least num_prototypes = 4096'),
    (dict(data='my photos', resolution=16, train_size=64),
     'size: found 64; expected 1 .. 30 images'),
])
def test_a_slip_is_met_before_anything_is_trained(settings, says, photos, tmp_path, capsys):
    assert main(['run', f'{NAME}/letkd1', *CPU, 'runs', *sets(**SMALL | settings)]) == 2
    one_line(capsys, says)
    assert not [p for name in ('record.json', 'checkpoint-*') for p in tmp_path.rglob(name)]


@pytest.mark.parametrize('classes', [2, 10])
def test_few_classes_are_enough_for_letkd2(classes, photos, tmp_path, capsys):
    "LDA keeps one dimension less than there are classes."
    from letkd.runs.experiments import Experiment
    from letkd.runs.running import load_run
    shutil.rmtree(photos)
    noise = np.random.default_rng(0)
    for i in range(6 * classes):
        path = photos/str(i % classes)/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    settings = SMALL | dict(data='my photos')
    run = ['run', f'{NAME}/letkd2+dkd', *CPU, 'runs', *sets(**settings)]
    assert main(run) == 0, capsys.readouterr().err
    distiller = load_run(Experiment.named(f'{NAME}/letkd2+dkd', **settings), 'runs', 'cpu')
    assert distiller.terms[1].supervision.projection.shape[1] == classes - 1


def test_a_run_is_watched(photos, tmp_path, capsys):
    "Where TensorBoard is not installed, nothing is trained."
    run = ['run', 'folder/resnet8x0.5', *CPU, 'runs', '--log', 'tensorboard',
           *sets(epochs=1, batch_size=8, data='my photos', resolution=16)]
    if importlib.util.find_spec('tensorboard') is None:
        assert main(run) == 2
        one_line(capsys, 'pip install tensorboard')
        assert not (tmp_path/'runs').exists()
        return
    assert main(run) == 0, capsys.readouterr().err
    assert len(list((tmp_path/'runs').rglob('events.out.tfevents.*'))) == 1
