"""From notebooks to the pages of the site: documentation of names, folds, links, search.

No test stands here. nbdev calls the classes `document`, `fold` and `link`, which settings.ini lists
under `procs`. `python tests/pages.py` has nbdev and Quarto build the site, here and in
.github/workflows/docs.yml, and adds the names to its search; with `--card` it draws
nbs/social.png. The documentation of a name is read from the cell that defines it: nothing is
imported, and no cell is run. It is in tests/ because only those who develop letkd need it;
tests/test_site.py tests it.
"""
import ast
import html
import io
import json
import posixpath
import re
import sys
import tokenize
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.doclinks import patch_name
from nbdev.process import Processor

WIDTH = 88  # columns of a signature
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


# Reading a definition

@cache
def comments(source):
    "line -> its comment, and the lines that hold nothing else"
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        found[token.start[0]] = token.string.lstrip('#').strip()
        if not token.line[:token.start[1]].strip(): alone.add(token.start[0])
    return found, alone


def written(node): return '' if node is None else ast.unparse(node)


def arguments(call):
    """(name, type, default, first line, last line) of each argument of a function; names have their
    stars, and `*` and `/` stand alone."""
    def one(arg, default=None, stars=''):
        return (stars + arg.arg, written(arg.annotation), written(default),
                arg.lineno, (default or arg).end_lineno)
    a = call.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    for i, pair in enumerate(zip(plain, defaults), 1):
        yield one(*pair)
        if i == len(a.posonlyargs): yield '/', '', '', 0, 0
    if a.vararg: yield one(a.vararg, stars='*')
    elif a.kwonlyargs: yield '*', '', '', 0, 0
    yield from map(one, a.kwonlyargs, a.kw_defaults)
    if a.kwarg: yield one(a.kwarg, stars='**')


def has_fields(node):
    "Is it a data class or a named tuple, whose fields are its arguments?"
    marks = {written(n).partition('(')[0].rpartition('.')[2]
             for n in getattr(node, 'bases', []) + node.decorator_list}
    return isinstance(node, ast.ClassDef) and bool(marks & {'dataclass', 'NamedTuple'})


def default(value):
    "What a field is when nothing is given for it."
    if written(getattr(value, 'func', None)) != 'field': return written(value)
    given = {k.arg: written(k.value) for k in value.keywords}
    if 'default_factory' not in given: return given.get('default', '')
    make = given['default_factory']
    return {'dict': '{}', 'list': '[]'}.get(make, f'{make}()')


def fields(cls):
    "The same of the public fields of a class."
    return [(n.target.id, written(n.annotation), default(n.value), n.lineno, n.end_lineno)
            for n in cls.body if isinstance(n, ast.AnnAssign) and n.target.id[0] != '_']


def caller(node):
    "What takes the arguments: a function, the `__init__` of a class, or a class with fields."
    if isinstance(node, FUNCTIONS) or has_fields(node): return node
    return next((n for n in node.body if getattr(n, 'name', '') == '__init__'), None)


def parts(node):
    "The arguments of a function or class as it is called, and the node of what it returns."
    call = caller(node)
    if call is None: return [], None
    if isinstance(call, ast.ClassDef): return fields(call), None
    method = call is not node or patch_name(node) != node.name  # the first argument is `self`
    return list(arguments(call))[method:], call.returns


def said(node, source):
    """[(names, types, defaults, comment)], a row for each argument, or for those that share a
    comment; and the same of what is returned, or None. A comment stands behind its argument, or in
    lines of its own above it. At the end of a call it says what is returned, or where nothing tells
    that apart, what the arguments are."""
    (found, returns), call = parts(node), caller(node)
    if call is None: return [], None
    whole = isinstance(call, ast.ClassDef)  # of fields
    start = call.lineno
    end = call.end_lineno if whole else max(start, call.body[0].lineno - 1)
    comment, alone = comments(source)
    comment = {i: text for i, text in comment.items() if start <= i <= end}
    behind, alone = comment.keys() - alone, comment.keys() & alone
    last = max((arg[4] for arg in found), default=start - 1)
    tail = [] if whole else [i for i in comment if i > last
                             or i == last and returns and returns.lineno == last]
    back = tail if returns or behind & set(tail) else []
    rows = {}
    for name, kind, default, first, final in found:
        if name in '*/': continue
        lines = [i for i in range(first, final + 1) if i in behind and i not in back]
        if not lines:
            above = first
            while above - 1 in alone: above -= 1
            lines = list(range(above, first))
        if final == last and not back: lines = lines or tail
        key, text = (lines or [name])[0], ' '.join(comment[i] for i in lines)
        row = rows.setdefault(key, ([], [], [], text))
        for values, value in zip(row, (name, kind, default)):
            if value and value not in values: values.append(value)
    kinds = [written(returns)] if returns else []
    told = ' '.join(comment[i] for i in back)
    return list(rows.values()), ([], kinds, [], told) if kinds or told else None


def is_public(node): return not any(w[0] == '_' for w in patch_name(node).split('.'))


def says(node, source):
    "Does a definition say anything about itself?"
    rows, back = said(node, source)
    return bool(ast.get_docstring(node)) or any(row[3] for row in [*rows, back] if row)


# Writing its documentation

def signature(node):
    "The call, in lines of at most WIDTH columns."
    name, (found, returns) = patch_name(node), parts(node)
    if caller(node) is None:
        bases = ', '.join(map(written, node.bases))
        return f'class {name}({bases})' if bases else f'class {name}'
    if any(re.search(r'property|as_prop=True', written(d)) for d in node.decorator_list):
        return f'{name}: {written(returns)}' if returns else name
    calls = []
    for arg, kind, default, *_ in found:
        value = f' = {default}' if kind else f'={default}'
        calls.append(arg + (f': {kind}' if kind else '') + (value if default else ''))
    end = f' -> {written(returns)}' if returns else ''
    line = f"{name}({', '.join(calls)}){end}"
    if len(line) <= WIDTH: return line
    lines = ['']
    for call in calls:
        if lines[-1] and len(lines[-1]) + len(call) + 6 > WIDTH: lines.append('')
        lines[-1] += (' ' if lines[-1] else '') + call + ','
    return f'{name}(\n' + ''.join(f'    {line}\n' for line in lines) + f'){end}'


def plain(text):
    "Plain text as Markdown: only what stands in backticks is marked up."
    return re.sub(r'(`[^`\n]+`)|(--|[\\*_<>\[\]$~^|@#])',
                  lambda m: m[1] or ''.join('\\' + c for c in m[2]), text)


def code(texts): return ', '.join(f'`{text}`' for text in texts)


def table(node, source):
    "The arguments of a call with what their comments say; nothing where there is no comment."
    rows, back = said(node, source)
    if not any(row[3] for row in [*rows, back] if row): return ''
    rows = [(*map(code, row[:3]), plain(row[3])) for row in rows]
    if back: rows.append(('*returns*', code(back[1]), '', plain(back[3])))
    head = ['Field' if has_fields(node) else 'Argument', 'Type', 'Default', 'Meaning']
    used = [i for i in range(4) if any(row[i] for row in rows)]
    # Pandoc gives the columns the shares of these dashes
    wide = [min(max(len(row[i]) for row in [head, *rows]), 60 if i == 3 else 24) for i in used]
    line = lambda cells: '| ' + ' | '.join(cells[i] for i in used) + ' |'
    dashes = '|' + '|'.join('-' * (n + 2) for n in wide) + '|'
    return '\n'.join([line(head), dashes, *map(line, rows)])


def paragraphs(text):
    return '\n\n'.join(plain(' '.join(p.split())) for p in re.split(r'\n\s*\n', text))


def documentation(node, source, address='', above=3):
    """The Markdown of a definition: heading, link to its source, call, docstring, table. `above` is
    the level of the heading before it; a method stands below its class."""
    name = patch_name(node)
    link = f'[source]({address}){{.source-link target="_blank"}}' if address else ''
    level = min(4, above + 1) if '.' in name else 3
    blocks = [f"{'#' * level} {name}", link, f'```python\n{signature(node)}\n```',
              paragraphs(ast.get_docstring(node) or ''), table(node, source)]
    return '\n\n'.join(filter(None, blocks))


# What nbdev calls

def parsed(cell):
    "The statements of a cell; none where it is no Python."
    try: return ast.parse(cell.source).body
    except SyntaxError: return []


def defined(body): return [n for n in body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]


def is_code(cell): return cell.cell_type == 'code' and bool(cell.get('source'))


def is_exported(cell): return bool({'export', 'exports'} & cell.directives_.keys())


@cache
def lines_of(module):
    "name -> the line where a module of the library defines it"
    text = (get_config().lib_path.parent/module).read_text(encoding='utf-8')
    return {patch_name(n): n.lineno for n in defined(ast.parse(text).body)}


class document(Processor):
    "Before each exported cell, the documentation of the public names it defines, in their order."
    def begin(self):
        modules = [c.directives_['default_exp'][0] for c in self.nb.cells
                   if 'default_exp' in c.get('directives_', ())]
        if not modules: return
        cfg, cells, above = get_config(), [], 1
        path = f"{cfg.lib_path.name}/{modules[0].replace('.', '/')}.py"
        for cell in self.nb.cells:
            if is_code(cell) and is_exported(cell) and 'hide' not in cell.directives_:
                for node in defined(parsed(cell)):
                    if not is_public(node) or not says(node, cell.source): continue
                    line = lines_of(path)[patch_name(node)]
                    address = f'{cfg.git_url}/blob/{cfg.branch}/{path}#L{line}'
                    doc = documentation(node, cell.source, address, above)
                    cells.append(mk_cell(doc, 'markdown'))
                    cells[-1].directives_, above = {}, doc.index(' ')
            if cell.cell_type == 'markdown':
                prose = re.sub(r'^```[\s\S]*?^```', '', cell.source, flags=re.M)
                above = ([len(h) for h in re.findall('^#+(?= )', prose, re.M)] or [above])[-1]
            cells.append(cell)
        self.nb.cells = cells


def leaves(body):
    "The statements of a cell, those inside loops and `with` in their place."
    for node in body:
        if isinstance(node, (ast.For, ast.With)): yield from leaves(node.body)
        else: yield node


def refuses(body):
    "Does a cell show nothing but what is refused?"
    tests = [n for n in leaves(body) if not isinstance(n, (ast.Assign, *FUNCTIONS))]
    return bool(tests) and all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
                               and getattr(n.value.func, 'id', '') == 'test_fail' for n in tests)


def shows(cell):
    "What the output of a cell is, in a word."
    kinds = {kind for output in cell.get('outputs', ()) for kind in output.get('data', ())}
    if any(kind.startswith('image/') for kind in kinds): return 'figure'
    return 'table' if kinds & {'text/html', 'text/markdown'} else None


def summary(cell, before, closed=False):
    """The words under which a cell is folded, and whether it begins so; None: it is not folded.
    On a page whose code is `closed` every cell is."""
    body = parsed(cell)
    if re.search(r'^#\|\s*(code-summary|echo)\s*:', cell.source, re.M): return None
    if body and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body):
        return 'Imports', True
    if 'exports' in cell.directives_:
        names = defined(body)
        helper = names and not any(map(is_public, names)) and before.cell_type == 'code'
        if not helper: return 'Source', closed
        return 'Helper: ' + ', '.join(n.name for n in names), True
    if refuses(body) and not cell.get('outputs'): return 'What is refused', True
    if closed: return (f"The {what}'s code" if (what := shows(cell)) else 'Code'), True


BEGIN = '<details class="code-fold">\n<summary>Solution</summary>'  # as Quarto begins a fold

def around(cell):
    "A solution that prints something, between cells that fold what it prints with its code."
    named = re.search(r'^#\|\s*code-summary:\s*"Solution"', cell.source or '', re.M)
    if not named or not cell.get('outputs'): return [cell]
    cell.source = re.sub(r'^#\|\s*code-(fold|summary)\s*:.*\n', '', cell.source, flags=re.M)
    begin, end = mk_cell(BEGIN, 'markdown'), mk_cell('</details>', 'markdown')
    begin.directives_ = end.directives_ = {}
    return [begin, cell, end]


class fold(Processor):
    """Fold imports, tests of errors, helpers that no prose introduces, all code of results and of
    checks, and solutions. What else is exported is open, unless its cell says otherwise, and a
    reader can fold it."""
    def begin(self):
        closed = Path(self.nb.path_).parent.name in ('experiments', 'checks')
        shown = [c for c in self.nb.cells if c.cell_type == 'markdown'
                 or is_code(c) and 'hide' not in c.directives_]
        for before, cell in zip([None, *shown], shown):
            if cell.cell_type != 'code' or not (found := summary(cell, before, closed)): continue
            state = '' if re.search(r'^#\|\s*code-fold\s*:', cell.source, re.M) else (
                f"#| code-fold: {'true' if found[1] else 'show'}\n")
            cell.source = f'{state}#| code-summary: "{found[0]}"\n{cell.source}'
        self.nb.cells = [part for cell in self.nb.cells for part in around(cell)]


# Links from names

@cache
def index():
    "name -> its addresses within the site, for each public name, with and without its module"
    found = {}
    text = (get_config().lib_path/'_modidx.py').read_text(encoding='utf-8')
    for module, names in ast.literal_eval(text.partition('d = ')[2])['syms'].items():
        for full, (address, _) in names.items():
            if '._' in full: continue
            for name in {full, full.removeprefix(module + '.')}:
                found.setdefault(name, set()).add(address)
    return found


def used(cells):
    """The names that a page imports from the library or exports to it, and those that its code
    uses for something else."""
    own, other = set(), set()
    for cell in cells:
        for node in (n for statement in parsed(cell) for n in ast.walk(statement)):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('letkd'):
                own |= {a.asname or a.name for a in node.names}
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                (own if is_exported(cell) else other).add(node.name)
            elif isinstance(node, (ast.arg, ast.keyword)): other.add(node.arg)
            elif isinstance(node, ast.Attribute):
                if getattr(node.value, 'id', '') != 'letkd': other.add(node.attr)
            elif isinstance(node, ast.Name):
                if isinstance(node.ctx, ast.Store): other.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                other.add(node.value)
    return own, other


def drawn(text):
    """A drawing that is a paragraph, as a figure whose caption is the first sentence of its
    description. Pandoc alone would print the whole description as the caption."""
    return re.sub(r'^!\[((.*?\.).*)\]\((\S*?([\w-]+)\.svg)\)$', r'![\2](\3){#fig-\4 fig-alt="\1"}',
                  text, flags=re.M)


class link(Processor):
    """Link a name in backticks to its documentation where it can mean nothing else: a class,
    `letkd.module.name`, or a function that the page itself imports or exports, unless its code has
    an argument, an attribute, a variable or a string of that name."""
    LINK = r'\[[^\]]*\]\([^)]*\)'
    SKIPPED = rf'^```[\s\S]*?^```|^~~~[\s\S]*?^~~~|^#+ .*$|\$\$[\s\S]*?\$\$|\$[^$\n]+\$|{LINK}'

    def begin(self):
        self.own, self.other = used(filter(is_code, self.nb.cells))
        root = get_config().nbs_path.resolve()
        self.folder = Path(self.nb.path_).resolve().relative_to(root).parent.as_posix()

    def address(self, name):
        found = index().get(name, set())
        alone = name not in self.other and (name in self.own or name[:1].isupper())
        if len(found) != 1 or not (alone or name.startswith('letkd.')): return None
        return posixpath.relpath(*found, self.folder)

    def cell(self, cell):
        if cell.cell_type != 'markdown': return
        def one(m):
            to = m['name'] and self.address(m['name'].removesuffix('()'))
            return f'[{m[0]}]({to})' if to else m[0]
        linked = re.sub(rf'{self.SKIPPED}|`(?P<name>[^`\n]+)`', one, cell.source, flags=re.M)
        cell.source = drawn(linked)


# Search

def documented():
    "(name, the same with its module, address, call and docstring) of each documented name"
    library = get_config().lib_path
    for path in sorted(library.rglob('*.py')):
        module = '.'.join(path.relative_to(library.parent).with_suffix('').parts)
        source = path.read_text(encoding='utf-8')
        for node in defined(ast.parse(source).body):
            name, call = patch_name(node), signature(node)
            full = f'{module}.{name}'
            if full in index() and says(node, source):
                yield name, full, *index()[full], f'{call}\n{ast.get_docstring(node) or ""}'.strip()


def escaped(text): return text.replace('<', '&lt;').replace('>', '&gt;')  # as Quarto's entries are


def folded(page):
    "The texts of the folds of a page that begin closed."
    for part in re.findall(r'<details class="code-fold">(.*?)</details>', page, re.S):
        yield escaped(html.unescape(re.sub('<[^>]*>', '', part)).strip())


def findable(entries, folds):
    """The entries of Quarto's search, one for each of its sections, without the texts `folds`; then
    one for each documented name, which is its title, so that it comes first when it is typed."""
    def shortened(text):
        for fold in folds: text = text.replace(fold, '')
        return re.sub(r'\s*\n\s*\n\s*', '\n', text)
    page = lambda address: address.partition('#')[0]
    crumbs = {page(entry['href']): entry.get('crumbs', []) for entry in entries}
    names = [dict(objectID=address, href=address, title=name, section=full, text=escaped(text),
                  crumbs=crumbs.get(page(address), []))
             for name, full, address, text in documented()]
    return [entry | dict(text=shortened(entry['text'])) for entry in entries] + names


def improve_search(site):
    "Rewrite the index of the site in this folder."
    path = site/'search.json'
    folds = [text for page in sorted(site.rglob('*.html'))
             for text in folded(page.read_text(encoding='utf-8'))]
    entries = findable(json.loads(path.read_text(encoding='utf-8')), folds)
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')


# The command

def card(path):
    """The picture beside a shared link, 1200 x 630 pixels: a map whose pixels take the colour of
    the template they match."""
    import matplotlib.pyplot as plt
    import numpy as np
    y, x = np.mgrid[-1:1:15j, -1:1:15j]
    templates = np.array([[-.5, -.5], [.55, -.2], [-.1, .6]])
    scores = -((np.stack([x, y], -1)[:, :, None] - templates) ** 2).sum(-1)
    match, seen = scores.argmax(-1), np.exp(4 * scores.max(-1, keepdims=True))
    colours = np.array([[140, 196, 255], [255, 209, 102], [120, 220, 170]]) / 255
    ground = np.array([11, 40, 80]) / 255
    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor=ground)
    axes = figure.add_axes([.56, .1, .42, .8])
    axes.imshow(seen * colours[match] + (1 - seen) * (ground + .08), interpolation='nearest')
    axes.set_axis_off()
    figure.text(.06, .6, 'letkd', size=84, weight='bold', color='white')
    figure.text(.065, .47, 'Let the student decide', size=32, color=colours[0])
    figure.text(.065, .3, 'Knowledge distillation layers\nfor any PyTorch network', size=22,
                color='white', linespacing=1.4)
    figure.savefig(path, facecolor=ground)


if __name__ == '__main__':
    if '--card' in sys.argv: card(Path(__file__).resolve().parents[1]/'nbs'/'social.png')
    else:
        from nbdev.quarto import nbdev_docs
        nbdev_docs(n_workers=0)  # without cells to run, one process will do
        improve_search(get_config().doc_path)
