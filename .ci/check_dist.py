"""Compare the distributions in a folder with the project: `python .ci/check_dist.py DIST`."""
import sys
import tarfile
import zipfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tests'))
from conftest import project_files

dist = Path(sys.argv[1])
(sdist,), (wheel,) = dist.glob('*.tar.gz'), dist.glob('*.whl')
project = {p.as_posix() for p in project_files()}
package = {p for p in project if p.startswith('letkd/')}

with tarfile.open(sdist) as f: packed = {m.name.partition('/')[2] for m in f if m.isfile()}
with zipfile.ZipFile(wheel) as f: wheeled = {n for n in f.namelist() if '.dist-info/' not in n}
added = {p for p in packed if p in ('PKG-INFO', 'setup.cfg') or p.startswith('letkd.egg-info/')}

problems = {f'{sdist.name} lacks': project - packed, f'{sdist.name} has in excess': packed - added - project,
            f'{wheel.name} lacks': package - wheeled, f'{wheel.name} has in excess': wheeled - package}
problems = {what: sorted(names) for what, names in problems.items() if names}
if problems: sys.exit('\n'.join(f'{what}: {names}' for what, names in problems.items()))
print(f'{sdist.name} holds all {len(project)} files of the project, {wheel.name} all {len(package)} of the package')
