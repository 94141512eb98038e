"""What a colleague opens: the guide's own cells, in a process in which this library cannot be
imported."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import letkd
import readme
from letkd.layer import KDLayer
from letkd.taps import insert

GUIDE = readme.ROOT/'nbs'/'guides'/'shipping.ipynb'
BLOCK = '''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'letkd': raise ImportError('letkd is blocked')
sys.meta_path.insert(0, Blocked())
'''


def cells(*sides):
    "The guide's code cells that one of these words marks, # theirs or # both; None: no word."
    sources = [readme.text(c['source'])
               for c in json.loads(GUIDE.read_text(encoding='utf-8'))['cells']
               if c['cell_type'] == 'code']
    side = lambda source: (re.match(r'# (theirs|both)$', source, re.M) or [None, None])[1]
    return [source for source in sources if side(source) in sides]


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    "What our side of the guide writes."
    folder, here = tmp_path_factory.mktemp('shipping'), os.getcwd()
    ours = [source for source in cells('both', None) if not re.search(r'^#\|\s*hide', source, re.M)]
    os.chdir(folder)
    try: exec('\n'.join(ours), dict(__name__='ours'))
    finally: os.chdir(here)
    return folder


def test_a_colleague_opens_every_form_without_the_library(shipped):
    theirs = '\n'.join(cells('both', 'theirs'))
    for name in ('.pt2', '.onnx', '.ts', '.safetensors'): assert f"'student{name}'" in theirs
    code = f'{BLOCK}\n{theirs}\nassert "letkd" not in sys.modules'
    done = subprocess.run([sys.executable, '-c', code], cwd=shipped, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "['cat', 'dog', 'owl']" in done.stdout and 'stage.kd_layer' in done.stdout


def test_the_library_is_blocked_there(shipped):
    done = subprocess.run([sys.executable, '-c', f'{BLOCK}\nimport letkd'], cwd=shipped,
                          capture_output=True, text=True)
    assert done.returncode and 'letkd is blocked' in done.stderr


class Blocks(nn.Module):
    "Patches of an image as a map, as tokens behind a class token, and as a map again."
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.last, self.flat, self.series = (nn.Linear(12, 12) for _ in range(3))
        self.tokens = nn.Sequential(nn.Linear(12, 12), nn.GELU())
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.flat(self.last(self.patch(x).movedim(1, -1)).flatten(1, 2))
        x = self.tokens(torch.cat([x.mean(1, keepdim=True), x], 1))
        return self.head(self.series(x)[:, 0] + x.amax(1))


def test_the_guides_class_serves_layers_of_every_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student, images = Blocks(), torch.randn(8, 3, 16, 16)
    taps = dict(patch='BCHW', last='BHWC', flat='4x4', tokens='1+4x4', series='BNC')
    for path, layout in taps.items():
        insert(student, path if layout in ('BCHW', 'BNC') else f'{path}@{layout}', KDLayer(12, 8))
    for _ in range(3): student(images)  # running statistics
    letkd.export(student, 'student.safetensors', images)

    build, = [source for source in cells('theirs') if 'network.load_state_dict(state)' in source]
    layer, = [source for source in cells('theirs') if 'class FoldedKDLayer' in source]
    start = ('import json, torch\nfrom torch import nn\nfrom safetensors import safe_open\n'
             'from safetensors.torch import load_file\n')
    theirs = dict(Small=Blocks, check=dict(images=images), same=lambda logits: None)
    exec('\n'.join([start, layer, build]), theirs)
    assert theirs['about']['folded'] == {f'{path}.kd_layer': v for path, v in taps.items()}
    with torch.no_grad():
        expected, plain = student.eval()(images), theirs['network'](images)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
