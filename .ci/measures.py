"""How a page reads, counted. `python .ci/measures.py` prints every finding; exit status 1 where there are more than LIMITS allow.

wide    lines of code over 120 columns
long    code cells over 30 lines
params  functions of more than 7 parameters (self apart)
runs    more than two cells of definitions in a row, with no cell between that uses them
title   first cells that hold more than a title and one line: nbdev drops the rest from the docs
strings programs inside strings: more than 8 lines in one literal
small   stored pictures less than 480 pixels wide
module  exported modules over 320 lines
private names with an underscore imported from another module
links   links in pages and in files such as README.md that lead to no file, or to no heading of a page
"""
import ast
import base64
import json
import re
import struct
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = dict(wide=60, long=4, params=4, runs=3, title=0, strings=0, small=0, module=0, private=0, links=0)


def source(cell):
    return ''.join(cell['source'])


def lines_of(text):
    return [line for line in text.splitlines() if line.strip()]


def parsed(text):
    "The syntax tree of a cell, without IPython's magics; None where it is no Python"
    try:
        return ast.parse(re.sub(r'^\s*[%!].*$', 'pass', text, flags=re.M))
    except SyntaxError:
        return None


def only_defines(tree):
    "Whether a cell holds nothing but definitions"
    kinds = ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign
    return all(isinstance(n, kinds) for n in tree.body) and any(isinstance(n, kinds[:2]) for n in tree.body)


def n_parameters(function):
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([n for n in names if n not in ('self', 'cls')])


def is_program(value):
    return isinstance(value, str) and value.count('\n') > 8 and ('import ' in value or 'def ' in value)


def jpeg_width(data):
    "Width in pixels: from the first frame header, a segment that begins with FF C0 to FF C3"
    at = 2
    while at+9 < len(data):
        marker, length = data[at+1], struct.unpack('>H', data[at+2:at+4])[0]
        if 0xC0 <= marker <= 0xC3:
            return struct.unpack('>H', data[at+7:at+9])[0]
        at += 2+length
    return None


def picture_width(output):
    "Width in pixels of a stored PNG or JPEG, or None"
    pictures = output.get('data', {})
    if png := pictures.get('image/png'):
        data = base64.b64decode(''.join(png))
        return struct.unpack('>I', data[16:20])[0] if data[:4] == b'\x89PNG' else None
    if jpeg := pictures.get('image/jpeg'):
        return jpeg_width(base64.b64decode(''.join(jpeg)))
    return None


def measure_cell(cell, found):
    "Add what one code cell goes over"
    name, text = cell.get('id', '?'), source(cell)
    lines = lines_of(text)
    found['wide'] += [f'{name} ({len(line)})' for line in lines if len(line) > 120]
    if len(lines) > 30 and 'parameters' not in cell.get('metadata', {}).get('tags', []):
        found['long'].append(f'{name} ({len(lines)})')
    widths = [picture_width(o) for o in cell.get('outputs', [])]
    found['small'] += [f'{name} ({w})' for w in widths if w and w < 480]
    for node in ast.walk(parsed(text) or ast.Module([], [])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and n_parameters(node) > 7:
            found['params'].append(f'{name} {node.name} ({n_parameters(node)})')
        if isinstance(node, ast.Constant) and is_program(node.value):
            found['strings'].append(name)


def measure_page(path):
    "What a notebook goes over: measure -> places"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    found, run = defaultdict(list), []
    title = [line for line in lines_of(source(cells[0])) if not line.lstrip().startswith('- ')]
    if cells[0]['cell_type'] == 'markdown' and len(title) > 2:
        found['title'].append(cells[0]['id'])
    for cell in cells:
        if cell['cell_type'] != 'code' or not lines_of(source(cell)):
            continue
        measure_cell(cell, found)
        tree = parsed(source(cell))
        if tree is None:
            continue
        if tree.body and only_defines(tree):
            run.append(cell['id'])
            continue
        if len(run) > 2:
            found['runs'].append(f'{run[0]}..{run[-1]} ({len(run)})')
        run = []
    return found


def measure_module(path):
    "What an exported module goes over"
    text, found = path.read_text(encoding='utf-8'), defaultdict(list)
    n = len(text.splitlines())
    if n > 320:
        found['module'].append(f'{path.name} ({n})')
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found['private'] += [f'{path.name} {a.name}' for a in node.names if a.name.startswith('_')]
    return found


def headings(text):
    "Anchors of the headings in Markdown, as pandoc names them"
    found = set()
    for title in re.findall(r'^#+ +(.+)$', text, flags=re.M):
        plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', title)
        words = re.sub(r'[^\w\s.-]', '', plain).lower().split()
        found.add(re.sub(r'^[^a-z]+', '', '-'.join(words)))
    return found


def prose(path):
    "The Markdown of a page or file, by cell"
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb':
        return {'': text}
    return {c.get('id', '?'): source(c) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown'}


def leads_nowhere(path, link):
    "Whether a link in a file leads to no file, or to no heading of a page"
    name, _, anchor = link.partition('#')
    target = path.parent/name if name else path
    if not target.exists():
        return True
    pages = target.suffix in ('.ipynb', '.md')
    return bool(anchor) and pages and anchor not in headings('\n'.join(prose(target).values()))


def measure_links(path):
    "Links of a page or file that lead nowhere; code is not read"
    found = defaultdict(list)
    for name, text in prose(path).items():
        text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
        links = re.findall(r'\]\(([^)\s]+)|(?:src|href)="([^"]+)"', text)
        links = [a or b for a, b in links if not re.match(r'[a-z]+:', a or b)]
        found['links'] += [f'{name} {link}'.strip() for link in links if leads_nowhere(path, link)]
    return found


def measure_all(root=ROOT):
    "Every finding: measure -> page -> places"
    total = {k: {} for k in LIMITS}
    pages = sorted((root/'nbs').glob('[!_.]*.ipynb'))
    modules = sorted((root/'sportsreid').glob('[!_]*.py'))
    for path in (*pages, *modules):
        found = measure_page(path) if path.suffix == '.ipynb' else measure_module(path)
        for measure, places in found.items():
            total[measure][path.name] = places
    for path in (*pages, *sorted(root.glob('*.md'))):
        total['links'][path.name] = measure_links(path)['links']
    return total


def main():
    over = []
    for measure, pages in measure_all().items():
        n = sum(map(len, pages.values()))
        print(f'{measure}: {n} (at most {LIMITS[measure]})')
        for page, places in pages.items():
            if places:
                print(f'  {page}: {", ".join(places)}')
        if n > LIMITS[measure]:
            over.append(measure)
    if over:
        sys.exit(f'over the measures: {", ".join(over)}')


if __name__ == '__main__':
    main()
