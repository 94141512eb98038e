"""The pages as Quarto gets them: documentation, folds, links. Quarto itself is not needed."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pages
import readme
from conftest import ROOT, copy_project

NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb')
                   if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts))


@pytest.fixture(scope='module')
def site(tmp_path_factory, files):
    "notebook -> its cells as Quarto gets them"
    tree = copy_project(files, tmp_path_factory.mktemp('site'))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'PYTHONPATH': str(tree/'tests')}
    done = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)'], cwd=tree, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return {p.relative_to(tree/'_proc').as_posix(): json.loads(p.read_text(encoding='utf-8'))['cells']
            for p in (tree/'_proc').rglob('*.ipynb')}


def sources(cells, kind): return [readme.text(c['source']) for c in cells if c['cell_type'] == kind]


def page(cells): return '\n\n'.join(sources(cells, 'markdown'))


def exported(name):
    "The cells of a notebook that are exported and shown, and the public names that they define."
    for cell in json.loads((NBS/name).read_text(encoding='utf-8'))['cells']:
        source = readme.text(cell['source'])
        if cell['cell_type'] == 'code' and re.search(r'^#\|\s*exports?\s*$', source, re.M):
            yield source, [n for n in ast.parse(source).body
                           if isinstance(n, (*pages.FUNCTIONS, ast.ClassDef)) and pages.is_public(n) and pages.says(n, source)]


# The documentation of a name

EXAMPLE = '''
def scale(
    x: Tensor,            # B x C, the `rows`
    # a factor, p**2
    by: float|int = 1., bias=None,
    *, low=0, high=1,      # bounds
) -> Tensor: # B x C
    """Rows times **by**, as in
    sum_k x_k.

    Twice <b>."""
'''


def test_documentation_of_a_function():
    assert pages.documentation(ast.parse(EXAMPLE).body[0], EXAMPLE) == r'''
### scale

```python
scale(x: Tensor, by: float | int = 1.0, bias=None, *, low=0, high=1) -> Tensor
```

Rows times \*\*by\*\*, as in sum\_k x\_k.

Twice \<b\>.

| Argument | Type | Default | Meaning |
|---------------|---------------|---------------|-------------------|
| `x` | `Tensor` |  | B x C, the `rows` |
| `by`, `bias` | `float | int` | `1.0`, `None` | a factor, p\*\*2 |
| `low`, `high` |  | `0`, `1` | bounds |
| *returns* | `Tensor` |  | B x C |
'''.strip()


def test_documentation_of_classes():
    fields = """
@dataclass
class Batch:
    "What the loop hands over."
    images: Tensor      # B x 3 x H x W
    # B, or
    # B x Y
    labels: Optional[Tensor] = None
    _cache: dict = None
"""
    found = pages.documentation(ast.parse(fields).body[0], fields)
    assert '```python\nBatch(images: Tensor, labels: Optional[Tensor] = None)\n```' in found
    assert '| `images` | `Tensor` |  | B x 3 x H x W |\n| `labels` | `Optional[Tensor]` | `None` | B, or B x Y |' in found
    own = 'class Layer(nn.Module):\n    def __init__(self, channels: int): ...  # C\n    def forward(self, x): return x'
    assert '\nLayer(channels: int)\n' in pages.documentation(ast.parse(own).body[0], own)
    bare = 'class Stopped(Exception):\n    "By a signal."'
    assert '\nclass Stopped(Exception)\n' in pages.documentation(ast.parse(bare).body[0], bare)
    late = '@patch(as_prop=True)\ndef width(self: Layer) -> int: # channels\n    "As built."'
    assert '#### Layer.width\n' in (found := pages.documentation(ast.parse(late).body[0], late))
    assert '\nLayer.width: int\n' in found and '| *returns* | `int` | channels |' in found


def test_every_notebook_is_a_page(site): assert sorted(site) == NOTEBOOKS


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_names_are_documented_in_their_order(site, name):
    names = [pages.patch_name(n) for _, nodes in exported(name) for n in nodes]
    headings = re.findall(r'^###?# ([\w.]+)\n\n\[source\]', page(site[name]), re.M)
    assert headings == names


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_signatures_are_calls_and_comments_are_tables(site, name):
    text = page(site[name])
    calls = re.findall(r'^###?# [\w.]+\n\n\[source\].*\n\n```python\n([\s\S]*?)\n```', text, re.M)
    assert len(calls) == sum(len(nodes) for _, nodes in exported(name))
    for call in calls:
        assert not re.search(r'\]\(|#|\(\*args, \*\*kwargs\)', call), call
        assert all(len(line) <= pages.WIDTH for line in call.splitlines()), call
    for source, nodes in exported(name):
        for node in nodes:
            rows, back = pages.said(node, source)
            told = [row[3] for row in [*rows, back or [''] * 4]]
            lost = [c for c in signature_comments(node, source) if not any(c in t for t in told)]
            assert not lost, f'{node.name}: the page loses {lost}'
            for t in told: assert pages.plain(t) in unlinked(text), t


def signature_comments(node, source):
    "What stands behind # between a definition and its body."
    comment, _ = pages.comments(source)
    init = next((n for n in ast.walk(node) if getattr(n, 'name', '') == '__init__'), node)
    if fields := list(pages.fields(node)) if isinstance(init, ast.ClassDef) else []: first, last = fields[0][3], fields[-1][4]
    elif isinstance(init, ast.ClassDef): return []
    else: first, last = init.lineno, init.body[0].lineno - 1
    return [comment[i] for i in range(first, last + 1) if i in comment]


def unlinked(text): return re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', text)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_tables_are_whole(site, name):
    "A row has as many cells as its head; a bar inside backticks ends none."
    for table in re.findall(r'^(?:\|.*\|\n?)+', page(site[name]), re.M):
        cells = [len(re.split(r'(?<!\\)\|', re.sub(r'`[^`]*`', '', row))) for row in table.splitlines()]
        assert len(set(cells)) == 1, table


# Folds

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_imports_and_refusals_are_folded(site, name):
    for source in sources(site[name], 'code'):
        try: body = ast.parse(source).body
        except SyntaxError: continue
        imports = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
        assert '#| code-fold: ' in source or not imports and 'Exported' not in source, source
        if body and all(ast.unparse(n).startswith('test_fail(') for n in body): assert '#| code-fold: true\n' in source, source


def test_what_is_folded():
    cell = lambda source, kind='code', **marks: pages.mk_cell(source, kind) | dict(directives_=marks)
    fold = lambda source, before='markdown', **marks: pages.summary(pages.AttrDict(cell(source, **marks)), pages.AttrDict(cell('', before)))
    assert fold('import os\nfrom x import y') == ('Imports', True)
    assert fold('for bad in 1, 2:\n    test_fail(lambda: f(bad), contains="found")') == ('What is refused', True)
    assert fold('test_eq(f(1), 2)\ntest_fail(lambda: f(0))') is None
    assert fold('def _f(x): return x', 'markdown', exports=[]) == ('Source', False), 'prose introduces it'
    assert fold('def _f(x): return x', 'code', exports=[]) == ('Helper: _f', True)
    assert fold('def f(x): return x', 'code', exports=[]) == ('Source', False)
    assert fold('#| code-fold: false\nimport os') is None, 'the notebook has said so'


# Links

def test_names_that_mean_something_else_are_no_links(site):
    found = {(name, m) for name in NOTEBOOKS for m in re.findall(r'\[`([^`]+)`\]\(', page(site[name]))}
    for name, word in (('taps.ipynb', 'classifier'), ('07_distiller.ipynb', 'targets'), ('07_distiller.ipynb', 'kd_layer'),
                       ('models/folding.ipynb', 'channels_last')): assert (name, word) not in found
    assert ('04_layer.ipynb', 'KDLayer') in found


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_links_to_names_lead_to_their_documentation(site, name):
    homes = {Path(n).with_name(re.sub(r'^\d+_', '', Path(n).name)).with_suffix('.html').as_posix(): n for n in NOTEBOOKS}
    for word, to in re.findall(r'\[`([^`]+)`\]\(([^)\s]+\.html#[^)\s]+)\)', page(site[name])):
        path, _, anchor = to.partition('#')
        home = homes[os.path.normpath((Path(name).parent/path).as_posix())]
        assert re.search(rf'^#+ {re.escape(anchor)}$', page(site[home]), re.M | re.I), f'{word} leads to {to}'


# The site's own files

def test_files_of_the_site():
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert config['format']['html']['respect-user-color-scheme'] is True
    for path in (config['website']['favicon'], config['website']['image'], '404.qmd', config['format']['html']['css']):
        assert (NBS/path).stat().st_size < 60_000, path


def test_titles_differ(site):
    titles = {name: yaml.safe_load(re.sub('^---|---$', '', readme.text(cells[0]['source']).strip()))['title'] for name, cells in site.items()}
    assert len(set(titles.values())) == len(titles), sorted(titles.values())
