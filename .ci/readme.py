"Write README.md from nbs/index.ipynb; with --check, say whether it is up to date instead"
import json, re, sys
from pathlib import Path

import nbformat
from execnb.nbio import NbCell
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, insert_warning, rm_export, rm_header_dash, strip_ansi
from traitlets.config import Config

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'
config = Config(  # text before HTML, which a README shows badly; pictures beside the notebook
    NbConvertBase={'display_data_priority': ['text/markdown','image/svg+xml','image/png','image/jpeg','text/plain']},
    ExtractOutputPreprocessor={'output_filename_template': 'images/index_{cell_index}_{index}{extension}'})

def show_or_not(cell:NbCell):
    "Obey `#| echo: false`, `#| output: false` and `#| include: false`, and drop all such lines"
    if cell.cell_type!='code': return
    off = {k.rstrip(':') for k,v in cell.directives_.items() if v==['false']}
    if off & {'output','include'}: cell['outputs'] = []
    if off & {'echo','include'}: cell.metadata['transient'] = {'remove_source': True}
    cell['source'] = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)

def from_root(
    md:str,        # Markdown whose links start at nbs/
    names:set=(),  # files in nbs/ that are yet to be written
)->str:  # the same with links that start at the root
    "Let links to files beside the notebook work in the README"
    def fix(m):
        if m[1] in names or not m[1].startswith('../') and (nbs/m[1]).is_file(): return f'](nbs/{m[1]}'
        return f']({m[1][3:]}' if m[1].startswith('../') else m[0]
    return re.sub(r'\]\(([^)\s#:]+)', fix, md)

def render()->dict[Path,bytes]:  # content of each file
    "README.md and the pictures it shows"
    procs = [show_or_not, strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_, insert_warning]
    cells = NBProcessor(nbs/'index.ipynb', procs=procs, process=True).nb.cells
    keys = 'cell_type','metadata','source','outputs','execution_count'
    nb = dict(nbformat=4, nbformat_minor=4, metadata={'language_info': {'name':'python'}},
              cells=[{k:c[k] for k in keys if k in c} for c in cells if c.cell_type!='raw'])
    md,found = MarkdownExporter(config=config).from_notebook_node(nbformat.reads(json.dumps(nb), as_version=4))
    md = re.sub(r'\n\s*\n(?=\n)', '\n', re.sub(r'^[ \t]+$', '', from_root(md, set(found['outputs'])), flags=re.M))
    return {root/'README.md': (md.strip()+'\n').encode(), **{nbs/name:data for name,data in found['outputs'].items()}}

def main():
    files = render()
    gone  = set(nbs.glob('images/index_*'))-set(files)
    stale = [p for p,data in files.items() if not p.is_file() or p.read_bytes()!=data]
    names = ', '.join(str(p.relative_to(root)) for p in [*stale,*sorted(gone)])
    if '--check' in sys.argv[1:] and names: sys.exit(f'Not as nbs/index.ipynb has it: {names}. Run `python .ci/readme.py`.')
    for p in stale: p.parent.mkdir(exist_ok=True); p.write_bytes(files[p])
    for p in gone: p.unlink()
    print(f'written: {names}' if names else 'README.md is up to date')

if __name__=='__main__': main()
