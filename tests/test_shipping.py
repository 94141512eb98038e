"""What a colleague opens: the guide's own cells, in a process in which this library cannot be
imported."""
import json
import os
import re
import subprocess
import sys

import pytest

import readme

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
