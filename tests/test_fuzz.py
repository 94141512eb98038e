"""Files and command lines of strangers.

Whatever is in them, there is success or one clear error, soon, and no half-written file. Every run
tries a few thousand mutated inputs, the same ones each time; `LETKD_FUZZ=100000 pytest
tests/test_fuzz.py` tries so many. What fails is printed as a call of `attempt` or `command`, which
does it again.
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import tarfile
import traceback
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from letkd.runs.checkpoints import Checkpoints, _sum
from letkd.cli import main
from letkd.data import imagenet, tiny_imagenet
from letkd.data.cifar import CIFAR100, cifar100
from letkd.data.batches import Batches, Images
from letkd.data.files import digest, md5_of, read_tensors
from letkd.distiller import Distiller
from letkd.runs.recipes import DATASETS
from letkd.runs.experiments import Experiment
from letkd.runs.records import cached, read_record, save_module
from letkd.runs.running import load_run, run
from letkd.layer import KDLayer
from letkd.methods import METHODS, CrossEntropy
from letkd.models.zoo import create_model, load_weights, read_checkpoint
from letkd.prototypes import KernelPrototypes, KMeansPrototypes
from letkd.subclasses import SubClasses
from letkd.taps import insert
from letkd.results.tables import STYLES, format_table, read_records, summary
from letkd.runs.training import Training

LIMIT = 60  # seconds for one input, on a busy machine; it needs milliseconds
CLEAR = (ValueError, OSError, KeyError)  # the errors of a loader


class Hang(BaseException): "An input that took too long."


@contextlib.contextmanager
def soon():
    def ring(*_): raise Hang(f'more than {LIMIT} s')
    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# Mutations

NUMBERS = [0, 1, -1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62,
           2**63 - 1, -2**63]
RUNS = [b'\0', b'\xff', b'9', b'[', b'{"a":', b'../', b'(', b' ', b'\n', b'A']
VALUES = [None, True, -1, 0, 10**400, 1e308, float('nan'), float('inf'), '', 'x', '../../x',
          '/etc/passwd', '\0', '\ud800', 'a' * 5000, [], {}, [[]], [None],
          {'a': 1}, [float('nan')], '1', 'NaN', 2**63, .5]


def piece(data, rng):
    i = rng.randrange(len(data) + 1)
    return data[i:i + rng.choice((1, 4, 16, 200))]


def mutated(data: bytes, rng) -> bytes:
    """Bit flips, other bytes, numbers at their limits, cuts, repetitions, runs, or nothing but
    noise."""
    data = bytearray(data)
    if rng.random() < .02: return rng.randbytes(rng.choice((0, 1, 10, 1000)))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        i, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        if kind == 0 and i < len(data): data[i] ^= 1 << rng.randrange(8)
        if kind == 1 and i < len(data): data[i] = rng.randrange(256)
        if kind == 2:
            data[i:i + 8] = struct.pack('<Q' if rng.random() < .5 else '>Q',
                                        rng.choice(NUMBERS) % 2**64)[:rng.choice((2, 4, 8))]
        if kind == 3: del data[i:i + rng.choice((1, 4, 100))]
        if kind == 4: data[i:i] = piece(data, rng)
        if kind == 5: data[i:i + 16] = piece(data, rng)
        if kind == 6: data[i:i] = rng.choice(RUNS) * rng.choice((3, 100, 3000))
        if kind == 7 and rng.random() < .3: del data[i:]
    return bytes(data)


def places(value, path=()):
    "Where in nested dicts and lists something may be put."
    yield path
    items = (value.items() if isinstance(value, dict)
             else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items: yield from places(inner, (*path, key))


def mutated_json(data: bytes, rng) -> bytes:
    "Another value, a missing or a new key, at any depth; or other bytes."
    if rng.random() < .3: return mutated(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        path = rng.choice(list(places(value)))
        if not path: continue
        inner = functools.reduce(lambda v, k: v[k], path[:-1], value)
        kind = rng.randrange(4)
        if kind == 0: del inner[path[-1]]
        elif kind == 1 and isinstance(inner, dict):
            inner[rng.choice(['x', '', '../x', 'settings', 'options'])] = rng.choice(VALUES)
        else: inner[path[-1]] = rng.choice(VALUES)
    return json.dumps(value).encode()


def mutated_inside(pack, members: dict):
    "Of an archive: as it is, or one of its members, its name, and packed again."
    def change(data, rng):
        if rng.random() < .4: return mutated(data, rng)
        changed, name = dict(members), rng.choice(list(members))
        content = changed.pop(name)
        kind = rng.randrange(6)
        if kind == 0:
            name = rng.choice(('../evil', '/etc/evil', 'C:\\evil', 'a/../../evil', name + '\0',
                               name + '\n', 'a' * 300, name[5:]))
        if kind != 1: changed[name] = mutated(content, rng) if kind > 1 else content
        return pack(changed)
    return change


def tar_of(members: dict, mode='w') -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(members: dict) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter('ignore')
        for name, data in members.items(): archive.writestr(name, data)
    return file.getvalue()


# Loaders: small valid files, how to mutate one of them, and how they are read

def photo(number, size=(64, 64), kind='JPEG', mode='RGB', **options):
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size)
    image = (Image.fromarray(np.asarray(image.convert('L')).astype(np.uint16) * 257)
             if mode == 'I;16' else image.convert(mode))
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


class Cifar:
    def __init__(self):
        rng = np.random.default_rng(0)
        records = lambda n: b''.join(bytes([0, i % 4]) + rng.bytes(3072) for i in range(n))
        self.members = {'cifar-100-binary/train.bin': records(8),
                        'cifar-100-binary/test.bin': records(4),
                        'cifar-100-binary/fine_label_names.txt': b'a\nb\nc\nd\n'}
        self.path = CIFAR100.archive

    def files(self): return {self.path: tar_of(self.members, 'w:gz')}

    def mutate(self, name, data, rng):
        return mutated_inside(tar_of if rng.random() < .8 else lambda m: tar_of(m, 'w:gz'),
                              self.members)(tar_of(self.members), rng)

    def load(self, folder):
        about = replace(CIFAR100, md5=md5_of(folder/self.path), per_class=(2, 1))
        for split in ('train', 'test'):
            assert isinstance(cifar100(split, root=folder, about=about), Images)


class Tiny:
    def __init__(self):
        wnids = ('n01', 'n02')
        boxes = [f'val_{i}.JPEG\t{wnids[i % 2]}\t0\t0\t63\t63\n' for i in range(4)]
        self.members = {'wnids.txt': '\n'.join(wnids).encode(),
                        'words.txt': b'n01\tcat\nn02\tdog, hound\n',
                        'val/val_annotations.txt': ''.join(boxes).encode()}
        self.members |= {f'train/{w}/images/{w}_0.JPEG': photo(i) for i, w in enumerate(wnids)}
        self.members |= {f'val/images/val_{i}.JPEG': photo(i) for i in range(4)}
        self.members = {f'{tiny_imagenet.NAME}/{name}': data for name, data in self.members.items()}

    def files(self): return {f'{tiny_imagenet.NAME}.zip': zip_of(self.members)}
    def mutate(self, name, data, rng): return mutated_inside(zip_of, self.members)(data, rng)

    def load(self, folder):
        made = folder/f'{tiny_imagenet.NAME}.safetensors'
        try:
            md5 = md5_of(made.with_suffix('.zip'))
            images = tiny_imagenet.tiny_imagenet('valid', root=folder, md5=md5)
            assert images.images.shape[1:] == (3, 64, 64)
            assert read_tensors(made)[0].keys() >= {'train.images', 'val.labels'}
        finally: made.unlink(missing_ok=True)


class TinyFolder(Tiny):
    def files(self): return self.members
    def mutate(self, name, data, rng): return mutated(data, rng)

    def load(self, folder):
        made = folder/f'{tiny_imagenet.NAME}.safetensors'
        try: tiny_imagenet.tiny_imagenet('valid', root=folder)
        finally: made.unlink(missing_ok=True)


class TinyTensors:
    def files(self):
        tensors = {f'{split}.{name}': v for split in ('train', 'val') for name, v in (
            ('images', torch.zeros(2, 3, 64, 64).byte()), ('labels', torch.arange(2)))}
        about = json.dumps(dict(classes=['a', 'b'], mean=[.5, .5, .5], std=[.2, .2, .2]))
        data = save(tensors, dict(format=tiny_imagenet._FORMAT, about=about))
        return {f'{tiny_imagenet.NAME}.safetensors': data}

    def mutate(self, name, data, rng):
        begin = 8 + int.from_bytes(data[:8], 'little')
        return (mutated(data[:begin], rng) + data[begin:] if rng.random() < .8
                else mutated(data, rng))

    def load(self, folder): assert len(tiny_imagenet.tiny_imagenet('valid', root=folder)) >= 1


class ImageNet:
    def files(self):
        kinds = [dict(), dict(kind='PNG'), dict(kind='WEBP'), dict(mode='CMYK'),
                 dict(kind='PNG', mode='I;16'), dict(mode='L', progressive=True),
                 dict(kind='PNG', mode='P')]
        photos = {f'imagenet/train/n0{i % 2}/{i}.JPEG': photo(i, (20, 17), **kind)
                  for i, kind in enumerate(kinds)}
        return photos | {f'imagenet/val/n0{i}/{i}.JPEG': photo(i) for i in range(2)}

    def mutate(self, name, data, rng):
        return mutated(data, rng) if rng.random() < .97 else b'A text.\n'

    def load(self, folder):
        imagenet._listing.cache_clear()
        photos = imagenet.imagenet('train', root=folder)
        for i in range(len(photos)): assert photos.read(i).shape[0] == 3


class Checkpoint:
    "A checkpoint of the field, old and new."
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))

    def __init__(self):
        torch.manual_seed(0)
        self.state = {k: v.clone() for k, v in self.network.state_dict().items()}

    def files(self):
        torch.save(dict(epoch=3, model=self.state, optimizer=dict(lr=.1)), new := io.BytesIO())
        torch.save({f'module.{k}': v for k, v in self.state.items()}, old := io.BytesIO(),
                   _use_new_zipfile_serialization=False)
        return {'new.pth': new.getvalue(), 'old.pth': old.getvalue()}

    def mutate(self, name, data, rng):
        if name == 'old.pth' or rng.random() < .5: return mutated(data, rng)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {n: archive.read(n) for n in archive.namelist()}
        pickle, = (n for n in members if n.endswith('data.pkl'))
        members[pickle] = mutated(members[pickle], rng)
        with zipfile.ZipFile(file := io.BytesIO(), 'w') as archive:
            for n, content in members.items(): archive.writestr(n, content)
        return file.getvalue()

    def load(self, folder):
        before = {k: v.clone() for k, v in self.network.state_dict().items()}
        for path in folder.glob('*.*'):
            try: load_weights(self.network, read_checkpoint(path), path)
            except CLEAR:
                now = self.network.state_dict()
                assert all(v.equal(before[k]) for k, v in now.items()), 'loaded in part'
                raise
            assert all(v.isfinite().all() for v in self.network.state_dict().values())
            self.network.load_state_dict(before)


class Safetensors(Checkpoint):
    def files(self): return {'new.safetensors': save(self.state)}
    def mutate(self, name, data, rng): return TinyTensors.mutate(self, name, data, rng)


class Renamed(Checkpoint):
    "Under names of the file's own, which are taken in their order."
    def files(self):
        names = {'0': 'enter', '1': 'norm', '3': 'end'}
        torch.save({f'{names[k[0]]}{k[1:]}': v for k, v in self.state.items()
                    if 'tracked' not in k}, file := io.BytesIO())
        return {'words.pth': file.getvalue()}

    def mutate(self, name, data, rng): return super().mutate('', data, rng)

    def load(self, folder):
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*taken in their order')
            super().load(folder)


class Student:
    "With KD layers, whose alpha its file says: whatever is wrong with it, no other network comes."
    def __init__(self):
        torch.manual_seed(0)
        self.images, self.student = torch.randn(2, 3, 8, 8), create_model('resnet8x0.5', 5)
        for tap, layer in {'layer3.0': KDLayer(32, 4, .5), 'layer3': KDLayer(32, 3, 2.),
                           'layer2': KDLayer(16, 2, 0),
                           'layer1@BCHW': KDLayer(8, 3, 1.)}.items():
            insert(self.student, tap, layer)

    def files(self):
        (folder := Path(os.environ['PYTEST_TMP'])/'student').mkdir(exist_ok=True)
        save_module(self.student, folder/'student.safetensors', model='resnet8x0.5')
        return {'student.safetensors': (folder/'student.safetensors').read_bytes()}

    def mutate(self, name, data, rng):
        if rng.random() < .5: return TinyTensors.mutate(self, name, data, rng)
        state = {k: v.clone() for k, v in self.student.state_dict().items()}
        at = rng.choice(('layer3.kd_layer', 'layer2.kd_layer', 'layer1.kd_layer',
                         'layer1.kd_layer.layer', 'fc.kd_layer_input'))
        parts = 'templates', 'semantics', 'scale', 'norm.weight', 'x', '0.weight'
        key = f'{at}.{rng.choice(parts)}'
        state[key] = rng.choice([torch.ones(()), torch.ones(3), torch.ones(3, 0), torch.ones(0, 3),
                                 torch.ones(2, 16, 1), torch.full((4, 32), torch.nan)])
        if rng.random() < .3: del state[key]
        alpha = {'layer3.kd_layer': 2., 'layer3.0.kd_layer': .5, 'layer1.kd_layer.layer': 1.}
        layout = {'layer1.kd_layer': 'BCHW'}
        if rng.random() < .5:
            wrong = rng.choice([None, 0., 1, '2', math.nan, math.inf, True, []])
            alpha = rng.choice([None, 1, [], 'x', {}, alpha | {rng.choice(list(alpha)): wrong}])
        if rng.random() < .3:
            wrong = rng.choice([None, 1, [], '', 'raw', 'BCH', '0x0', '@', '9' * 5000])
            layout = rng.choice([None, [], 'x', {}, {'layer1.kd_layer': wrong}])
        return save(state, dict(about=json.dumps(dict(alpha=alpha, layout=layout))))

    def load(self, folder):
        model = create_model('resnet8x0.5', 5, folder/'student.safetensors').eval()
        assert model(self.images).isfinite().all()
        layers = {at: m.alpha for at, m in model.named_modules() if isinstance(m, KDLayer)}
        keys = read_tensors(folder/'student.safetensors')[0]
        assert set(layers) == {k.rpartition('.')[0] for k in keys if k.endswith('.templates')}


def record(name='digit_pairs/resnet14-resnet8x0.5/letkd2', **more):
    e = Experiment.named(name)
    values = dict(name=e.name, method=e.method, seed=e.seed, dataset=e.dataset, teacher=e.teacher,
                  student=e.student, eval_split=e.eval_split, settings=e.__dict__,
                  top1_last=50., top1_best=51., epoch_best=1, top5_last=90., curve=[51., 50.],
                  target_perplexity=dict(layer3=3.5), parameters=1000, seconds=9.,
                  time='2026-01-01T00:00:00Z')
    return json.loads(json.dumps(values | more))


class Record:
    def files(self):
        return {'a/record.json': json.dumps(record()).encode(),
                'b/record.json': json.dumps(record('digit_pairs/resnet8x0.5')).encode()}
    def mutate(self, name, data, rng): return mutated_json(data, rng)

    def load(self, folder):
        table = summary(read_records(folder))
        for style in STYLES: assert 'nan' not in format_table(table, style)


class Supervision:
    "Three of them, fitted; the cache's files, of which each says what it holds."
    def __init__(self):
        torch.manual_seed(0)
        rows, labels = torch.randn(60, 6), torch.arange(60) % 3
        self.made = {}
        for make in (lambda: KMeansPrototypes(4), KernelPrototypes, lambda: SubClasses(2, 2)):
            self.made[type(make()).__name__] = make, make().fit([(rows, labels)])
        self.rows, self.labels = rows, labels

    def files(self):
        (folder := Path(os.environ['PYTEST_TMP'])/'cache').mkdir(exist_ok=True)
        for name, (_, fitted) in self.made.items():
            save_module(fitted, folder/f'{digest(name)}.safetensors', key=json.dumps(name))
        return {path.name: path.read_bytes() for path in folder.glob('*.safetensors')}

    def mutate(self, name, data, rng):
        if rng.random() < .5:  # as strangers may make it: no hash
            data = save({k: v.clone() for k, v in self.forged(name, rng).items()})
        return TinyTensors.mutate(self, name, data, rng) if rng.random() < .7 else data

    def forged(self, name, rng):
        fitted, = (f for n, (_, f) in self.made.items() if digest(n) in name)
        state = fitted.state_dict()
        key = rng.choice(list(state))
        v = state[key]
        state[key] = rng.choice([v.double(), v.long(), v[..., None], v.flatten(), v * torch.nan,
                                 v.reshape(-1)[:1], torch.zeros(0), v.new_zeros(3, 2), v.bool()])
        return state

    def load(self, folder):
        for name, (make, _) in self.made.items():
            def build(): raise AssertionError('fitted again')
            module = make()
            cached(folder, name, module, build)
            p = module.target(self.rows, self.labels).tile(0, len(self.rows))
            assert p.isfinite().all() and (p.sum(1) - 1).abs().max() < 1e-3
            assert len(p) == len(self.rows)


class Supervisions(Supervision):
    "The same, by hand: `load_state_dict` of what a file holds."
    def load(self, folder):
        for name, (make, _) in self.made.items():
            module = make()
            try: module.load_state_dict(read_tensors(folder/f'{digest(name)}.safetensors')[0])
            except RuntimeError as e: raise ValueError(f'{folder}: {e}') from None  # torch's own
            p = module.target(self.rows, self.labels).tile(0, len(self.rows))
            assert p.isfinite().all() and p.min() >= 0


class Run:
    "A run's checkpoint, damaged, and as somebody may forge it: its name says the right checksum."
    def training(self):
        torch.manual_seed(0)
        images = Images(torch.zeros(8, 3, 4, 4).byte(), torch.arange(8) % 2, mean=(0, 0, 0),
                        std=(1, 1, 1))
        student = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(),
                                nn.Linear(32, 2))
        return Training(Distiller(student, None, [CrossEntropy()]),
                        Batches(images, 4, shuffle=True), 2)

    def files(self):
        torch.save(self.training().state_dict(), file := io.BytesIO())
        return {'state.pt': file.getvalue()}

    def mutate(self, name, data, rng): return Checkpoint.mutate(self, name, data, rng)

    def load(self, folder):
        data, run = (folder/'state.pt').read_bytes(), folder/'run'
        run.mkdir()
        try:
            (run/f'checkpoint-00000001-{_sum(data)}.pt').write_bytes(data)
            (run/f'checkpoint-00000002-{_sum(b"another")}.pt').write_bytes(data)
            with contextlib.redirect_stderr(io.StringIO()): self.training().resume(Checkpoints(run))
        finally: shutil.rmtree(run)


LOADERS = dict(cifar=(Cifar, 600), tiny_zip=(Tiny, 250), tiny_folder=(TinyFolder, 100),
               tiny_tensors=(TinyTensors, 400), imagenet=(ImageNet, 300), pth=(Checkpoint, 400),
               safetensors=(Safetensors, 500), renamed=(Renamed, 150), student=(Student, 150),
               record=(Record, 250), cache=(Supervision, 200), supervision=(Supervisions, 200),
               run=(Run, 200))
COMMANDS = 500
LONG = int(os.environ.get('LETKD_FUZZ', 0))


def share(count) -> int: # of inputs
    if not LONG: return count
    return -(-count * LONG // (COMMANDS + sum(count for _, count in LOADERS.values())))


def tree(folder):
    return {p.relative_to(folder): p.stat().st_size for p in folder.rglob('*') if p.is_file()}


def said(error) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def attempt(name, index, folder, loader=None, files=None) -> str:
    "Read one mutated input; returns what came out."
    loader = loader or LOADERS[name][0]()
    files = files or lay_out(loader, folder)
    rng = random.Random(f'{name} {index}')
    chosen = rng.choice(list(files))
    (folder/chosen).write_bytes(loader.mutate(chosen, files[chosen], rng))
    before = tree(folder)
    try:
        with soon(): loader.load(folder)
        outcome = 'read'
    except CLEAR as e:
        text = said(e)
        assert 10 < len(text) < 1500 and text.count('\n') < 7, \
            f'not one clear error: {text[:2000]!r}'
        assert type(e) is not KeyError and folder.name in text, \
            f'it does not say which file: {text[:500]!r}'
        outcome = type(e).__name__
    finally:
        after = tree(folder)
        (folder/chosen).write_bytes(files[chosen])
    assert after == before, f'left behind: {sorted(map(str, after.keys() ^ before.keys()))}'
    return outcome


def lay_out(loader, folder):
    files = loader.files()
    for path, data in files.items():
        (folder/path).parent.mkdir(parents=True, exist_ok=True)
        (folder/path).write_bytes(data)
    return files


@pytest.mark.parametrize('name', LOADERS)
def test_a_damaged_file_is_one_clear_error(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PYTEST_TMP', str(tmp_path))
    make, count = LOADERS[name]
    loader, folder = make(), tmp_path/f'{name}-files'
    files, failures, outcomes = lay_out(loader, folder), {}, {}
    loader.load(folder)
    for index in range(share(count)):
        if LONG and index % 1000 == 0: print(name, index, outcomes, flush=True)
        try: outcome = attempt(name, index, folder, loader, files)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            failures.setdefault((type(e).__name__, where.filename, where.lineno, str(e)[:60]),
                                f'attempt({name!r}, {index}, folder): '
                                f'{"".join(traceback.format_exception(e))[-1500:]}')
        else: outcomes[outcome] = outcomes.get(outcome, 0) + 1
    with capsys.disabled() if LONG else contextlib.nullcontext():
        print(f'\n{name}: {outcomes}, {len(failures)} failures')
    assert not failures, '\n\n'.join(failures.values())
    assert outcomes.get('ValueError', 0) > 10, f'the mutations do no damage: {outcomes}'


# Programs

class Program:
    "Its pickle creates a file when it is opened."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def evil(path, kind) -> bytes:
    state = {'model': {'fc.weight': torch.zeros(10, 64), 'fc.bias': Program(path)}}
    if kind == 'plain': return pickle.dumps(state, protocol=2)
    torch.save(state, file := io.BytesIO(), _use_new_zipfile_serialization=kind == 'zip')
    return file.getvalue()


MINI = dict(epochs=1, train_size=200, batch_size=100, eval_split='valid')


@pytest.mark.parametrize('kind', ['zip', 'old', 'plain'])
def test_no_program_is_run(kind, tmp_path):
    "Wherever a checkpoint, a cached supervision, a decoded data set or a student may lie."
    run_it, bad = tmp_path/'was run', evil(tmp_path/'was run', kind)
    for name in ('a.pth', 'a.safetensors', 'ckpt', f'{tiny_imagenet.NAME}.safetensors', 'a.json'):
        (tmp_path/name).write_bytes(bad)
    e = Experiment.named('digit_pairs/resnet8-resnet8x0.5/kd',
                         teacher_checkpoint=str(tmp_path/'a.pth'), **MINI)
    alone = Experiment.named('digit_pairs/resnet8x0.5', **MINI)
    done = tmp_path/'runs'/alone.folder
    done.mkdir(parents=True)
    mark = hashlib.sha256(bad).hexdigest()[:16]
    for name in (f'checkpoint-00000001-{mark}.pt', 'student.safetensors'):
        (done/name).write_bytes(bad)
    ways = [lambda: read_checkpoint(tmp_path/'a.pth'),
            lambda: read_checkpoint(tmp_path/'a.safetensors'),
            lambda: create_model('resnet8', 10, tmp_path/'ckpt'),
            lambda: create_model('resnet34', 10, tmp_path/'a.pth'),
            lambda: tiny_imagenet.tiny_imagenet('test', root=tmp_path),
            lambda: run(e, tmp_path/'runs', quiet=True),
            lambda: run(alone, tmp_path/'runs', quiet=True),
            lambda: load_run(alone, tmp_path/'runs'), lambda: read_record(tmp_path/'a.json')]
    for way in ways:
        with pytest.raises(ValueError, match=str(tmp_path)): way()
    assert not run_it.exists()
    if kind != 'plain': torch.load(io.BytesIO(bad), weights_only=False)
    else: pickle.loads(bad)
    assert run_it.exists(), 'it is no program'


@pytest.mark.parametrize('number', [math.nan, math.inf])
def test_weights_that_are_no_numbers_do_not_teach(number, tmp_path):
    state = create_model('resnet8', 100).state_dict()
    state['layer2.0.conv1.weight'][0, 0, 0, 0] = number
    path = tmp_path/'teacher.safetensors'
    path.write_bytes(save({k: v.contiguous() for k, v in state.items()}))
    e = Experiment.named('digit_pairs/resnet8-resnet8x0.5/kd', teacher_checkpoint=str(path), **MINI)
    with pytest.raises(ValueError, match='no finite numbers: layer2.0.conv1.weight'):
        run(e, tmp_path/'runs', quiet=True)
    assert not list(tmp_path.rglob('*.json'))


# Command lines

NETWORKS = ['resnet8', 'resnet14', 'resnet8x0.5', 'resnet20', 'wrn_16_1', 'shufflenetv1', 'vgg8',
            'torchvision/resnet18', 'timm/vit', 'resnet9', 'resnet', '', '..', '-', 'resnet8x',
            'resnet999999992']
WORDS = ['run', 'table', 'sweep', 'demo', '--set', '--seed', '--out', '--device', '--quiet',
         '--seeds', '--dataset', '--pair', '--markdown', '--names', '--help', '--version', '--',
         '-h', '-1', '=', '', ' ', '\n', '\0', '\udcff', 'nowhere', '0', '-0', '1e9', '9' * 5000,
         'a' * 300, 'x' * 100_000, '٣', '½', 'cifar100', 'ablation/layers', 'ablation/',
         'ablation/x', 'reproduce', 'bench', '--json', '--checkpoint-every', '--deterministic',
         '--figure']
TEXTS = ['', '0', '-1', '1', '2', '1e999', '-1e999', 'nan', 'inf', '1e-400', 'None', 'True',
         'false', '()', '(', '(' * 10_000, '[' * 1000 + ']' * 1000, '9' * 5000, '1_0', '0x10',
         "'a'", "'", '{}', '{1: 2}', '1j', 'b"x"', '(.5, 2)', '("a", "b")', "('layer3', 3)",
         '__import__("os")', '1+1', '-' * 3000 + '1', '\0', '\ud800', '../../x', 'valid', 'test',
         'a' * 10_000, '.5', '1e18', '0.1', '3.0']
KEYS = [*Experiment.__dataclass_fields__, 'num_prototypes', 'tau', 'alpha_penultimate', 'per_class',
        'temperature', 'stages', 'kernels', 'x', '', 'a' * 1000, '__class__', 'self', 'name', 'cls',
        'options']
STUDIES = ['cifar100', 'imagenet', 'ablation/layers', 'ablation/capacity', 'ablation/subclasses',
           'ablation/probe', 'ablation/cost', 'ablation/', 'x']


def experiment_name(rng) -> str:
    networks = '-'.join(rng.choices(NETWORKS[:5] if rng.random() < .8 else NETWORKS,
                                    k=rng.choice((1, 2, 2, 3))))
    dataset = rng.choice([*DATASETS] * 3 + ['', '..', '/', 'cifar10', 'digit_pairs/..'])
    method = rng.choice([*METHODS, 'ce', 'student', 'teacher', 'kd+letkd2', 'kd+kd', '+', '',
                         '..', 'kd/..'])
    return '/'.join([dataset, networks, method][:rng.choice((1, 2, 3, 3, 3, 3))])


def words(rng) -> list:
    "A command line that may mean something, with some slips."
    settings = [w for _ in range(rng.choice((0, 0, 1, 2)))
                for w in ('--set', rng.choice(KEYS) + rng.choice(('=',) * 9 + ('', '=='))
                          + rng.choice(TEXTS))]
    line = rng.choice([['run', experiment_name(rng), *settings],
                       ['run', experiment_name(rng), *settings],
                       ['table', rng.choice([*DATASETS, 'x'])],
                       [rng.choice(['sweep', 'table']), rng.choice(STUDIES), *settings],
                       ['reproduce', rng.choice(['record.json', 'nowhere.json', '', '.'])],
                       ['demo', '--seeds', rng.choice(['1', '2', '0', *TEXTS])],
                       ['bench', '--parts', rng.choice(['layer', 'x'])]])
    out = rng.choice(['', ' ', '\n', '\0', '\udcff', '9' * 5000, 'a' * 300, 'nowhere'])
    line += rng.choice([[], [], ['--quiet'], ['--out', out], ['--seed', rng.choice(TEXTS)],
                        ['--device', rng.choice(TEXTS)]])
    for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
        i = rng.randrange(len(line) + 1)
        word = (rng.choice(WORDS) if rng.random() < .7 or not line[i:] else
                mutated(line[i].encode('utf-8', 'surrogatepass'), rng).decode('utf-8',
                                                                              'surrogateescape'))
        line[i:i + rng.randrange(2)] = [word]
    return line


def command(index, folder) -> str:
    "Parse and obey one command line, with `run` replaced; returns what came out."
    rng, out, err = random.Random(f'command {index}'), io.StringIO(), io.StringIO()
    line, before = words(rng), tree(folder)
    try:
        with soon(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(line)
    except SystemExit as left: code = left.code  # argparse
    said = err.getvalue()
    assert code in (0, 2), f'{line!r:.300}: exit code {code}'
    usage = said.startswith('usage: ') and 'error: ' in said  # argparse has its own words
    if code and not usage:
        assert said.startswith('letkd: ') and said.count('\n') < 7, f'{line}: {said[:2000]}'
        assert len(said) < 2000 + len(''.join(line)), f'{line}: {said[:2000]}'
    assert tree(folder) == before, f'{line} has written'
    return 'done' if code == 0 else 'usage' if usage else 'refused'


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    "What would train only looks at where it would write."
    def run(e, out='runs', device=None, quiet=False, checkpoint_every='5m', log=None,
            wait=False):
        folder, out = Path(os.path.normpath(Path(out)/e.folder)), Path(os.path.normpath(out))
        assert folder.is_relative_to(out) and folder != out, e.folder
        assert '\0' not in e.folder and len(e.folder) < 250, e.folder
        assert e == Experiment(**e.__dict__) and json.loads(json.dumps(e.__dict__))
        return record(e.name) | dict(settings=json.loads(json.dumps(e.__dict__)), seed=e.seed)
    monkeypatch.setattr('letkd.runs.running.run', run)
    monkeypatch.setattr('letkd.results.probes.probe_run', run)
    monkeypatch.setattr('letkd.cli.demo_figures', lambda *_: [])
    monkeypatch.setattr('letkd.cli._side_by_side', lambda *_: {})  # --jobs: none failed
    for name in ('_costs', 'bench_command'):
        monkeypatch.setattr(f'letkd.cli.{name}', lambda *_, **__: None)
    (tmp_path/'record.json').write_text(json.dumps(record()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_any_command_line_ends_well_or_says_why(nothing_runs, capsys):
    failures, outcomes = {}, {}
    for index in range(share(COMMANDS)):
        if LONG and index % 1000 == 0: print('command', index, outcomes, flush=True)
        try: outcome = command(index, nothing_runs)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            failures.setdefault((type(e).__name__, where.filename, where.lineno),
                                f'command({index}, folder): '
                                f'{words(random.Random(f"command {index}"))!r:.2000} '
                                f'{"".join(traceback.format_exception(e))[-1500:]}')
        else: outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(f'\ncommand: {outcomes}, {len(failures)} failures')
    assert not failures, '\n\n'.join(failures.values())
    assert min(outcomes.get(k, 0) for k in ('done', 'refused', 'usage')) > 20, outcomes
