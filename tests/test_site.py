"""The pages as Quarto gets them: documentation, folds, links; and the search as it leaves it.
Quarto itself is not needed."""
import ast
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import pages
import readme
from conftest import NBS, NOTEBOOKS, ROOT, copy_project


FOLD = '<details class="code-fold">\n<summary>Tests</summary>\n<b>assert</b> a &lt; 1\n</details>'
ENTRY = dict(objectID='matching.html', href='matching.html', title='The KD layer as a function',
             section='', text='Begin.\n\n\nTests\nassert a &lt; 1\n\n\nSource\nassert a &lt; 1',
             crumbs=['The story', 'The KD layer as a function'])


@pytest.fixture(scope='module')
def built(tmp_path_factory, files):
    "The project's folder after the command, where Quarto has made a single page."
    tree = copy_project(files, tmp_path_factory.mktemp('site'))
    quarto = tree/'bin'/'quarto'  # in the place of Quarto, which would make pages of the notebooks
    docs = tree/'bin'/'_docs'
    docs.mkdir(parents=True)
    (docs/'matching.html').write_text(FOLD + FOLD.replace('<details', '<details open=""')
                                      .replace('Tests', 'Source'))
    (docs/'search.json').write_text(json.dumps([ENTRY]))
    quarto.write_text(f"#!/bin/sh\ncp -r '{docs}' .\n")
    quarto.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    env['PATH'] = f"{quarto.parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run([sys.executable, 'tests/pages.py'], cwd=tree, env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tree/'_docs').is_dir(), done.stdout[-3000:]
    same = (tree/'README.md').read_bytes() == (ROOT/'README.md').read_bytes()
    assert same, 'nbdev has written README.md, which is of tests/readme.py'
    return tree


@pytest.fixture(scope='module')
def site(built):
    "notebook -> its cells as Quarto gets them"
    load = lambda path: json.loads(path.read_text(encoding='utf-8'))['cells']
    out = built/'_proc'
    return {p.relative_to(out).as_posix(): load(p) for p in out.rglob('*.ipynb')}


def sources(cells, kind): return [readme.text(c['source']) for c in cells if c['cell_type'] == kind]


def page(cells): return '\n\n'.join(sources(cells, 'markdown'))


def exported(name):
    "The cells of a notebook that are exported and shown, and the public names that they define."
    for cell in json.loads((NBS/name).read_text(encoding='utf-8'))['cells']:
        source = readme.text(cell['source'])
        if cell['cell_type'] == 'code' and re.search(r'^#\|\s*exports?\s*$', source, re.M):
            yield source, [n for n in pages.defined(ast.parse(source).body)
                           if pages.is_public(n) and pages.says(n, source)]


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
    maps: dict = field(default_factory=dict, hash=False) # by tap
    seed: int = field(default=3, repr=False)
    _cache: dict = None
"""
    found = pages.documentation(ast.parse(fields).body[0], fields)
    assert ('```python\nBatch(images: Tensor, labels: Optional[Tensor] = None, maps: dict = {}, '
            'seed: int = 3)\n```') in found
    assert '| `maps` | `dict` | `{}` | by tap |' in found
    assert '| `images` | `Tensor` |  | B x 3 x H x W |\n' in found
    assert '| `labels` | `Optional[Tensor]` | `None` | B, or B x Y |' in found
    assert '_cache' not in found
    own = 'class Layer(nn.Module):\n    def __init__(self, channels: int): ...  # C\n    x = 1'
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
            told = [row[3] for row in [*rows, back] if row]
            lost = [c for c in signature_comments(node, source) if not any(c in t for t in told)]
            assert not lost, f'{node.name}: the page loses {lost}'
            for t in told: assert pages.plain(t) in unlinked(text), t


def signature_comments(node, source):
    "What stands behind # between a definition and its body."
    comment, _ = pages.comments(source)
    call = pages.caller(node)
    if call is None: return []
    if isinstance(call, ast.ClassDef): first, last = call.lineno, pages.fields(call)[-1][4]
    else: first, last = call.lineno, call.body[0].lineno - 1
    return [comment[i] for i in range(first, last + 1) if i in comment]


def unlinked(text): return re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', text)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_tables_are_whole(site, name):
    "A row has as many cells as its head; a bar inside backticks ends none."
    for table in re.findall(r'^(?:\|.*\|\n?)+', page(site[name]), re.M):
        rows = re.sub(r'`[^`\n]*`', '', table).splitlines()
        assert len({len(re.split(r'(?<!\\)\|', row)) for row in rows}) == 1, table


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_headings_go_down_by_one(site, name):
    "The title is the only one of the first level; a screen reader finds every level."
    text = re.sub(r'^```[\s\S]*?^```', '', page(site[name]), flags=re.M)
    levels = [1, *(len(h) for h in re.findall('^#+(?= )', text, re.M))]
    assert 1 not in levels[1:] and all(b <= a + 1 for a, b in zip(levels, levels[1:])), levels


# Folds

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_imports_and_refusals_are_folded(site, name):
    for source in sources(site[name], 'code'):
        try: body = ast.parse(source).body
        except SyntaxError: continue  # magics
        imports = all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
        refusals = all(ast.unparse(n).startswith('test_fail(') for n in body)
        if body and (imports or refusals): assert '#| code-fold: true\n' in source, source
        if body and imports: assert re.search('#\\| code-summary: .', source), source


def test_what_is_folded():
    def fold(source, before='markdown', **marks):
        cells = pages.mk_cell(source), pages.mk_cell('', before)
        cells[0].directives_ = marks
        return pages.summary(*cells)
    assert fold('import os\nfrom x import y') == ('Imports', True)
    refused = 'for bad in 1, 2:\n    test_fail(lambda: f(bad), contains="found")'
    assert fold(refused) == ('What is refused', True)
    assert fold('test_eq(f(1), 2)\ntest_fail(lambda: f(0))') is None
    private, public = 'def _f(x): return x', 'def f(x): return x'
    assert fold(private, 'markdown', exports=[]) == ('Source', False), 'prose introduces it'
    assert fold(private, 'code', exports=[]) == ('Helper: _f', True)
    assert fold(public, 'code', exports=[]) == ('Source', False)
    assert fold('#| code-summary: "Mine"\nimport os') is None, 'the notebook has said so'


@pytest.mark.parametrize('folder, state', [('checks', 'true'), ('data', 'show')])
def test_source_of_checks_is_folded(folder, state):
    cell = pages.mk_cell('def f(x): return x')
    cell.directives_ = dict(exports=[])
    pages.fold(SimpleNamespace(cells=[cell], path_=f'nbs/{folder}/term.ipynb')).begin()
    assert cell.source.startswith(f'#| code-fold: {state}\n#| code-summary: "Source"\n')


@pytest.mark.parametrize('kind, words', [
    ('image/png', "The figure's code"), ('text/html', "The table's code"),
    ('text/plain', 'Code'), (None, 'Code')])
def test_code_of_results_and_checks_is_folded(kind, words):
    cell = pages.mk_cell('plot(records)')
    cell.directives_, cell.outputs = {}, [dict(data={kind: ''})] if kind else []
    assert pages.summary(cell, None) is None
    assert pages.summary(cell, None, closed=True) == (words, True)


def test_a_fold_of_the_notebook_stays_as_it_is():
    cell = pages.mk_cell('#| code-fold: false\nimport os')
    cell.directives_ = {}
    pages.fold(SimpleNamespace(cells=[cell], path_='nbs/solver.ipynb')).begin()
    assert cell.source == '#| code-summary: "Imports"\n#| code-fold: false\nimport os'


def test_a_solution_is_folded_with_what_it_prints(site):
    head = '#| code-fold: true\n#| code-summary: "Solution"\n'
    quiet, loud = pages.mk_cell(head + 'x = 1'), pages.mk_cell(head + 'print(1)')
    loud.outputs = [dict(output_type='stream', name='stdout', text='1\n')]
    assert pages.around(quiet) == [quiet] and quiet.source == head + 'x = 1'
    begin, inside, end = pages.around(loud)
    assert inside is loud and loud.source == 'print(1)' and loud.outputs
    assert begin.source.endswith('<summary>Solution</summary>') and end.source == '</details>'
    for name, cells in site.items():
        texts, open_ = [readme.text(c['source']) for c in cells], 0
        for cell, text in zip(cells, texts):
            open_ += (text == pages.BEGIN) - (text == '</details>')
            said = 'code-summary: "Solution"' in text and cell.get('outputs')
            assert open_ in (0, 1) and not said, name
        assert not open_, name


# Drawings

def test_a_drawing_has_a_description_and_a_short_caption(site):
    found = pages.drawn('Two nets.\n\n![Two nets. One is small.](../a/two-nets.svg)\n\nEnd.')
    assert found == ('Two nets.\n\n![Two nets.](../a/two-nets.svg){#fig-two-nets '
                     'fig-alt="Two nets. One is small."}\n\nEnd.')
    for same in ('See ![a. b.](a.svg).', '![a. b.](a.png)'): assert pages.drawn(same) == same
    for name in ('index.ipynb', '01_distillation.ipynb'):
        assert '(images/letkd.svg){#fig-letkd fig-alt="' in page(site[name]), name


# Links

@pytest.mark.parametrize('name, word', [
    ('baselines/simkd.ipynb', 'classifier'), ('results/published.ipynb', 'study'),
    ('baselines/tdd.ipynb', 'rows'), ('taps.ipynb', 'kd_layer')])
def test_names_that_mean_something_else_are_no_links(site, name, word):
    "The page's code uses the word for something of its own, or has not imported the name."
    assert any(re.search(rf'^#+ {word}$', page(cells), re.M) for cells in site.values())
    assert f'`{word}`' in page(site[name]) and f'[`{word}`](' not in page(site[name])


def test_names_in_backticks_are_links(site):
    assert '[`KDLayer`](layer.html#kdlayer)' in page(site['04_layer.ipynb'])
    assert '[`Setup`](../distiller.html#setup)' in page(site['baselines/sp.ipynb'])
    nested = re.compile(r'\[\[[^\]]*\]\([^)]*\)\]\(')
    assert not [n for n in NOTEBOOKS if nested.search(page(site[n]))]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_links_to_names_lead_to_their_documentation(site, name):
    home = {re.sub(r'(^|/)\d+_', r'\1', n).replace('.ipynb', '.html'): n for n in NOTEBOOKS}
    for word, to in re.findall(r'\[`([^`]+)`\]\(([^)\s]+\.html#[^)\s]+)\)', page(site[name])):
        path, _, anchor = to.partition('#')
        text = page(site[home[posixpath.normpath(f'{Path(name).parent.as_posix()}/{path}')]])
        assert re.search(rf'^#+ {re.escape(anchor)}$', text, re.M | re.I), f'{word} leads to {to}'


# Search

def test_each_documented_name_is_found_by_itself(site):
    "By its name alone; the hit leads to the page that documents it."
    entries = pages.findable([ENTRY], [])[1:]
    address = lambda name: re.sub(r'(^|/)\d+_', r'\1', name).replace('.ipynb', '.html')
    headings = [(address(name), title) for name, cells in site.items() for title
                in re.findall(r'^###?# ([\w.]+)\n\n\[source\]', page(cells), re.M)]
    assert sorted((e['href'].partition('#')[0], e['title']) for e in entries) == sorted(headings)
    layer = next(e for e in entries if e['section'] == 'letkd.matching.kd_layer')
    assert layer['title'] == 'kd_layer' and layer['crumbs'] == ENTRY['crumbs']
    assert layer['href'] == 'matching.html#kd_layer'
    assert layer['text'].startswith('kd_layer(\n    x: Tensor, ') and '-&gt; tuple' in layer['text']


def test_closed_code_is_not_searched(built):
    first, *names = json.loads((built/'_docs'/'search.json').read_text(encoding='utf-8'))
    assert first == ENTRY | dict(text='Begin.\nSource\nassert a &lt; 1')
    assert 'kd_layer' in [e['title'] for e in names]


# The site's own files

def test_files_of_the_site():
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    html, site = config['format']['html'], config['website']
    assert html['respect-user-color-scheme'] is True
    assert int(html['grid']['body-width'].removesuffix('px')) >= 960, 'room for 100 columns of code'
    assert config['image'].startswith('/'), 'what is relative is looked for beside each page'
    for name in (site['favicon'], config['image'][1:], '404.qmd', html['css']):
        assert (NBS/name).stat().st_size < 60_000, name
    bar = [entry['href'] for side in ('left', 'right') for entry in site['navbar'].get(side, ())]
    assert all('://' in to for to in bar), 'Quarto would mark a page as the current one everywhere'


def brightness(colour):
    "Relative luminance, as WCAG 2 defines it."
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((.2126, .7152, .0722), parts))


def contrast(*colours):
    low, high = sorted(map(brightness, colours))
    return (high + .05) / (low + .05)


# The grounds of a page in the themes cosmo and darkly; #434343 is the bar on a telephone.
GROUNDS = ('light', '#ffffff'), ('dark', '#222222'), ('dark', '#434343')


@pytest.mark.parametrize('theme, ground', GROUNDS)
def test_links_can_be_read(theme, ground):
    "4.5:1 on the background of the theme."
    css = (NBS/'styles.css').read_text(encoding='utf-8')
    colours = re.findall(r'--\w+: (#\w{6})', re.search(rf'body\.quarto-{theme} *{{(.*?)}}', css)[1])
    assert len(colours) == 2
    for colour in colours: assert contrast(colour, ground) >= 4.5, colour


@pytest.mark.parametrize('what, colour, ground', [  # of the themes
    ('details > summary', '#6c757d', '#222222'), ('.nav-page a', '#6c757d', '#222222'),
    ('.quarto-page-breadcrumbs a', '#6c757d', '#222222'),
    ('.quarto-secondary-nav a', '#adadad', '#434343'),
    ('#quarto-back-to-top', '#6c757d', '#222222'), ('figcaption', '#6d7a86', '#ffffff')])
def test_what_the_themes_write_too_pale_is_quiet(what, colour, ground):
    assert contrast(colour, ground) < 4.5
    css = (NBS/'styles.css').read_text(encoding='utf-8')
    names = re.search(r'([^{}/]*){ color: var\(--quiet\) !important; }', css)[1]
    assert what in re.split(r',\s*', names.strip())


def test_titles_differ(site):
    head = {n: readme.text(cells[0]['source']).strip().strip('-') for n, cells in site.items()}
    titles = sorted(yaml.safe_load(text)['title'] for text in head.values())
    assert len(set(titles)) == len(titles), titles
