"""From notebooks to the pages of the site: nbdev calls what settings.ini lists under `procs`.

`python tests/pages.py` builds the site, for which Quarto must be there; `python tests/pages.py --card` draws nbs/social.png.
The documentation of a name is read from the cell that defines it; nothing is imported and no cell is run.
"""
import ast
import io
import posixpath
import re
import sys
import textwrap
import tokenize
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell
from fastcore.basics import AttrDict
from nbdev.config import get_config
from nbdev.doclinks import patch_name
from nbdev.process import Processor

WIDTH = 88  # columns of a signature
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


# Reading a definition

def comments(source):
    "line -> its comment, and the lines that hold nothing else"
    found, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT: continue
        found[token.start[0]] = token.string.lstrip('#').strip()
        if not token.line[:token.start[1]].strip(): alone.add(token.start[0])
    return found, alone


def arguments(call):
    "(name, type, default, first line, last line) of each argument of a function, with stars; `*` and `/` stand alone."
    def one(arg, default=None, stars=''):
        show = lambda node: '' if node is None else ast.unparse(node)
        return stars + arg.arg, show(arg.annotation), show(default), arg.lineno, (default or arg).end_lineno
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


def is_fields(node):
    "Is it a data class or a named tuple, whose fields are its arguments?"
    marks = getattr(node, 'bases', []) + node.decorator_list
    return isinstance(node, ast.ClassDef) and bool({re.split(r'[.(]', ast.unparse(n))[0] for n in marks} & {'dataclass', 'NamedTuple'})


def fields(cls):
    "The same of the fields of a data class or a named tuple; nothing for other classes."
    for node in cls.body if is_fields(cls) else ():
        if not isinstance(node, ast.AnnAssign) or node.target.id[0] == '_': continue
        yield (node.target.id, ast.unparse(node.annotation), '' if node.value is None else ast.unparse(node.value),
               node.lineno, node.end_lineno)


def is_property(node): return any('property' in d or 'as_prop=True' in d for d in map(ast.unparse, node.decorator_list))


def parts(node):
    "The arguments of a function or class as it is called, the node of what it returns, and the word for an argument."
    if isinstance(node, FUNCTIONS):
        found = list(arguments(node))
        return (found[1:] if patched(node) else found), node.returns, 'Argument'
    init = next((n for n in node.body if isinstance(n, FUNCTIONS) and n.name == '__init__'), None)
    return (list(arguments(init))[1:], None, 'Argument') if init else (list(fields(node)), None, 'Field')


def patched(node):
    "Is it a method that stands outside its class?"
    return patch_name(node) != node.name


def said(node, source):
    """[(names, types, defaults, comment)], a row for each argument, or for those that share a comment; and the same of what
    is returned. A comment stands behind its argument, or in lines of its own above it; at the end of a call it says what is
    returned, or where nothing tells that apart, what the arguments are."""
    (found, returns, _), (comment, alone) = parts(node), comments(source)
    call = next((n for n in getattr(node, 'body', ()) if getattr(n, 'name', '') == '__init__'), node)
    start, end = call.lineno, call.end_lineno if is_fields(node) else max(call.lineno, call.body[0].lineno - 1)
    comment = {i: text for i, text in comment.items() if start <= i <= end}
    behind = comment.keys() - alone
    last = max((arg[4] for arg in found), default=start - 1)
    tail = [i for i in comment if i > last or i == last and returns and returns.lineno == last]
    back = [] if is_fields(node) or not (returns or behind & set(tail)) else tail
    rows = {}
    for name, kind, default, first, final in found:
        if name in '*/': continue
        lines = [i for i in range(first, final + 1) if i in behind and i not in back]
        while not (lines and lines[-1] in behind) and first - 1 - len(lines) in alone & comment.keys(): lines.insert(0, first - 1 - len(lines))
        if final == last and not back and not is_fields(node): lines = lines or tail
        row = rows.setdefault(lines[0] if lines else name, ([], [], [], ' '.join(comment[i] for i in lines)))
        for values, value in zip(row, (name, kind, default)):
            if value and value not in values: values.append(value)
    told = [ast.unparse(returns)] if returns else []
    return list(rows.values()), ([], told, [], ' '.join(comment[i] for i in back)) if told or back else None


# Writing its documentation

def signature(node):
    "The call, in lines of at most WIDTH columns."
    found, returns, _ = parts(node)
    name, end = patch_name(node), f' -> {ast.unparse(returns)}' if returns else ''
    if isinstance(node, FUNCTIONS) and is_property(node): return name + end.replace(' ->', ':')
    if isinstance(node, ast.ClassDef) and not found:
        return f'class {name}' + (f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else '')
    spaced = lambda kind, default: (f': {kind}' if kind else '') + (f' = {default}' if kind and default else f'={default}' if default else '')
    calls = [arg + spaced(kind, default) for arg, kind, default, *_ in found]
    line = f"{name}({', '.join(calls)}){end}"
    if len(line) <= WIDTH: return line
    lines = ['']
    for call in calls:
        if lines[-1] and len(lines[-1]) + len(call) + 6 > WIDTH: lines.append('')
        lines[-1] += (' ' if lines[-1] else '') + call + ','
    return f'{name}(\n' + ''.join(f'    {line}\n' for line in lines) + f'){end}'


def plain(text):
    "Plain text as Markdown: only what stands in backticks is marked up."
    return re.sub(r'(`[^`\n]+`)|(--|[\\*_<>\[\]$~^|@#])', lambda m: m[1] or ''.join('\\' + c for c in m[2]), text)


def code(texts): return ', '.join(f'`{text}`' for text in texts)


def table(node, source):
    "The arguments of a call with what their comments say; nothing where there is no comment."
    rows, back = said(node, source)
    if not any(row[3] for row in rows) and not (back and back[3]): return ''
    rows = [(*map(code, row[:3]), plain(row[3])) for row in rows]
    if back: rows.append(('*returns*', code(back[1]), '', plain(back[3])))
    head = [parts(node)[2], 'Type', 'Default', 'Meaning']
    used = [i for i in range(4) if any(row[i] for row in rows)]
    wide = {i: min(max(len(row[i]) for row in [head, *rows]), 60 if i == 3 else 24) for i in used}
    line = lambda cells: '| ' + ' | '.join(cells[i] for i in used) + ' |'
    return '\n'.join([line(head), '|' + '|'.join('-' * (wide[i] + 2) for i in used) + '|', *map(line, rows)])


def paragraphs(text): return '\n\n'.join(plain(' '.join(p.split())) for p in re.split(r'\n\s*\n', text) if p.strip())


def documentation(node, source, address=''):
    "The Markdown of a definition: heading, link to its source, call, docstring, table."
    name = patch_name(node)
    doc = ast.get_docstring(node) or ''
    link = f'[source]({address}){{.source-link target="_blank"}}' if address else ''
    level = '####' if '.' in name else '###'
    blocks = [f'{level} {name}', link, f'```python\n{signature(node)}\n```', paragraphs(doc), table(node, source)]
    return '\n\n'.join(filter(None, blocks))


# What nbdev calls

@cache
def lines_of(module):
    "name -> the line where a module of the library defines it"
    text = (get_config().lib_path.parent/module).read_text(encoding='utf-8')
    return {patch_name(n): n.lineno for n in ast.parse(text).body if isinstance(n, (*FUNCTIONS, ast.ClassDef))}


def definitions(cell): return [n for n in ast.parse(cell.source).body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]


def is_public(node): return not any(word.startswith('_') for word in patch_name(node).split('.'))


def says(node, source):
    "Does a definition say anything about itself?"
    rows, back = said(node, source)
    return bool(ast.get_docstring(node)) or any(row[3] for row in [*rows, back] if row)


def is_shown(cell): return cell.cell_type == 'code' and bool(cell.get('source')) and 'hide' not in cell.directives_


class document(Processor):
    "Before each exported cell, the documentation of the public names that it defines, in their order."
    def begin(self):
        module = next((c.directives_['default_exp'][0] for c in self.nb.cells if 'default_exp' in c.get('directives_', {})), None)
        if not module: return
        cfg, cells = get_config(), []
        path = f"{cfg.lib_path.name}/{module.replace('.', '/')}.py"
        for cell in self.nb.cells:
            if is_shown(cell) and {'export', 'exports'} & cell.directives_.keys():
                for node in definitions(cell):
                    if not is_public(node) or not says(node, cell.source): continue
                    address = f'{cfg.git_url}/blob/{cfg.branch}/{path}#L{lines_of(path)[patch_name(node)]}'
                    cells.append(mk_cell(documentation(node, cell.source, address), 'markdown'))
                    cells[-1].directives_ = {}
            cells.append(cell)
        self.nb.cells = cells


def parsed(cell):
    "The syntax tree of a cell, an empty one where it is no Python."
    try: return ast.parse(cell.source)
    except SyntaxError: return ast.parse('')


def leaves(body):
    "The statements of a cell, those inside loops and `with` in their place."
    for node in body:
        if isinstance(node, (ast.For, ast.With)): yield from leaves(node.body)
        else: yield node


def tests_errors(body):
    "Does a cell show nothing but what is refused?"
    calls = [n for n in leaves(body) if not isinstance(n, (ast.Assign, *FUNCTIONS))]
    return bool(calls) and all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
                               and getattr(n.value.func, 'id', '') == 'test_fail' for n in calls)


def summary(cell, before):
    "The words under which a cell is folded, and whether it begins folded; None: it is not folded."
    if re.search(r'^#\|\s*(code-fold|echo)\s*:', cell.source, re.M): return None
    body = parsed(cell).body
    if body and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body): return 'Imports', True
    if 'exports' in cell.directives_:
        names = [n for n in body if isinstance(n, (*FUNCTIONS, ast.ClassDef))]
        helper = names and not any(map(is_public, names)) and before.cell_type == 'code'
        return ('Helper: ' + ', '.join(n.name for n in names), True) if helper else ('Source', False)
    if tests_errors(body) and not cell.get('outputs'): return 'What is refused', True


class fold(Processor):
    "Fold imports, tests of errors, and helpers that no prose introduces; what else is exported can be folded by the reader."
    def begin(self):
        shown = [c for c in self.nb.cells if c.cell_type == 'markdown' or is_shown(c)]
        for before, cell in zip([None, *shown], shown):
            if cell.cell_type != 'code' or not (found := summary(cell, before)): continue
            state = 'true' if found[1] else 'show'
            cell.source = f'#| code-fold: {state}\n#| code-summary: "{found[0]}"\n{cell.source}'


# Links from names

@cache
def index():
    "name -> {address within the site}, for each public name of the library, with and without its module"
    found = {}
    text = (get_config().lib_path/'_modidx.py').read_text(encoding='utf-8')
    for module, names in ast.literal_eval(text.partition('d = ')[2])['syms'].items():
        for full, (address, _) in names.items():
            if '._' in full: continue
            for name in {full, full.removeprefix(module + '.')}: found.setdefault(name, set()).add(address)
    return found


def used(cells):
    "The names that a page imports from the library or exports to it, and those that its code uses for something else."
    own, other = set(), set()
    for cell in cells:
        exports = {'export', 'exports'} & cell.directives_.keys()
        for node in ast.walk(parsed(cell)):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('letkd'): own |= {a.asname or a.name for a in node.names}
            elif isinstance(node, (*FUNCTIONS, ast.ClassDef)): (own if exports else other).add(node.name)
            elif isinstance(node, ast.arg | ast.keyword): other.add(node.arg)
            elif isinstance(node, ast.Attribute) and getattr(node.value, 'id', '') != 'letkd': other.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): other.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str): other.add(node.value)
    return own, other


class link(Processor):
    """Link a name in backticks to its documentation where it can mean nothing else: a class; `letkd.module.name`; a function
    that the page itself imports or defines, unless its code also has an argument, an attribute or a string of that name."""
    def begin(self):
        own, self.other = used([c for c in self.nb.cells if c.cell_type == 'code' and c.get('source')])
        self.known = own - self.other
        cfg = get_config()
        self.folder = Path(self.nb.path_).resolve().relative_to(cfg.nbs_path.resolve()).parent.as_posix()

    def address(self, name):
        found = index().get(name, set())
        means = name in self.known or name.startswith('letkd.') or name[:1].isupper() and name not in self.other
        return posixpath.relpath(next(iter(found)), self.folder) if means and len(found) == 1 else None

    def cell(self, cell):
        if cell.cell_type != 'markdown': return
        def one(m):
            to = m['name'] and self.address(m['name'].removesuffix('()'))
            return f"[{m[0]}]({to})" if to else m[0]
        skip = r'^(?:```|~~~)[\s\S]*?^(?:```|~~~)|^#+ .*$|\$\$[\s\S]*?\$\$|\[[^\]]*\]\([^)]*\)|\$[^$\n]+\$'
        cell.source = re.sub(skip + r'|`(?P<name>[^`\n]+)`', one, cell.source, flags=re.M)


# The command

def card(path):
    "The picture beside a shared link, 1200 x 630 pixels: a map whose pixels take the colour of the template they match."
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
    figure.text(.065, .3, 'Knowledge distillation layers\nfor any PyTorch network', size=22, color='white', linespacing=1.4)
    figure.savefig(path, facecolor=ground)


if __name__ == '__main__':
    if '--card' in sys.argv: card(Path(__file__).resolve().parents[1]/'nbs'/'social.png')
    else:
        from nbdev.quarto import nbdev_docs
        nbdev_docs()
