"""What all tests share: where the project is, a copy of it to change, and repeatable runs."""
import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')  # before anything imports matplotlib

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb')
                   if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts))
STORY = [name for name in NOTEBOOKS if re.match(r'\d\d_', name)]
GENERATED = ('.git', '__pycache__', '*.pyc', '*.egg-info', 'build', 'dist', '.venv',
             '.pytest_cache', '.hypothesis',
             '.ipynb_checkpoints', '.last_checked', '.quarto', '_proc', '_docs', 'nbdev.yml',
             'PKG-INFO', 'setup.cfg')

# The same examples in every run, and no deadline: the machine may be busy.
settings.register_profile('repeatable', deadline=None, derandomize=True, database=None)
settings.load_profile('repeatable')


def project_files():
    """The files of the project: those that git tracks, or would; in an unpacked sdist all that no
    tool has made."""
    if (ROOT/'.git').exists() and shutil.which('git'):
        cmd = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
        names = subprocess.run(cmd, cwd=ROOT, check=True, capture_output=True,
                               text=True).stdout.split('\0')
        paths = [Path(n) for n in names if n]
    else: paths = [p.relative_to(ROOT) for p in ROOT.rglob('*')]
    made = lambda p: any(fnmatch(part, pattern) for part in p.parts for pattern in GENERATED)
    return sorted(p for p in paths if (ROOT/p).is_file() and not made(p))


@pytest.fixture(scope='session')
def files(): return project_files()


@pytest.fixture(scope='session')
def server():
    "Starts processes in a moment, see lives.py."
    import lives
    return lives.server()


def copy_project(files, to):
    for path in files:
        (to/path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/path, to/path)
    return to


@pytest.fixture
def tree(tmp_path, files):
    "A copy of the project that a test may change."
    return copy_project(files, tmp_path)
