"""README.md says what nbs/index.ipynb says: `python tests/readme.py` writes it.

No test stands here. Whoever changes nbs/index.ipynb calls it; tests/test_repository.py compares the
two and takes its functions for reading notebooks from here. Neither nbdev nor Quarto is needed.
"""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT/'nbs'/'index.ipynb', ROOT/'README.md'
NOTE = '<!-- Written from nbs/index.ipynb by `python tests/readme.py`: edit the notebook. -->'


def text(source): return source if isinstance(source, str) else ''.join(source)


def is_hidden(cell):
    return bool(re.search(r'^#\|\s*(hide|exporti?|default_exp|include:\s*false)\b',
                          text(cell['source']), re.M))


def outputs(cell):
    "The text that a code cell has stored, as Markdown."
    for out in cell.get('outputs', ()):
        data = out.get('data', {})
        if 'text/markdown' in data: yield text(data['text/markdown'])
        elif found := text(out.get('text', data.get('text/plain', ''))):
            yield re.sub(r'^(?=.)', '    ', found.rstrip(), flags=re.M)


def blocks(notebook):
    "The Markdown of each cell that a reader sees."
    for cell in notebook['cells']:
        source = text(cell['source'])
        if cell['cell_type'] == 'markdown': yield re.sub(r'\s*\{#[\w-]+\}', '', source)
        elif cell['cell_type'] == 'code' and not is_hidden(cell):
            if not re.search(r'^#\| echo: false$', source, re.M):
                yield '```python\n' + re.sub(r'^#\|.*\n', '', source, flags=re.M).strip() + '\n```'
            yield from outputs(cell)


def render(notebook):
    "A README for the root of the repository: relative links lead into nbs/."
    body = '\n\n'.join(b.strip('\n') for b in blocks(notebook) if b.strip())
    body = re.sub(r'\]\((?![a-z]+:|#|/)([^)\s]+)\)', r'](nbs/\1)', body)
    title, _, rest = body.partition('\n')
    return f'{title}\n\n{NOTE}\n{rest}\n'


def code(markdown):
    "The fenced code of a page, block by block."
    return [m.strip() for m in re.findall(r'^```.*\n([\s\S]*?)^```', markdown, re.M)]


def words(markdown):
    "The words of a page, whatever its marks, its line breaks and the place its links lead to."
    plain = re.sub(r'<!--[\s\S]*?-->|^```.*$', ' ', markdown, flags=re.M)
    return re.findall(r'\w+', re.sub(r'\]\([^)]*\)', ']', plain))


def links(markdown):
    "Where the links of a page lead, seen from the root."
    return {re.sub(r'^nbs/', '', u) for u in re.findall(r'\]\(([^)\s]+)\)', markdown)}


if __name__ == '__main__':
    README.write_text(render(json.loads(INDEX.read_text(encoding='utf-8'))), encoding='utf-8')
    print(f'{README.name} written from {INDEX.relative_to(ROOT)}')
