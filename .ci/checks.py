"""The checks of a change, by name, in two jobs. `.ci/run` calls this with the machine's own Python: standard library only.

A check is a function: its docstring says what holds, and it raises `Failed` where it does not. The jobs:

quick       install as the README says, run every test, and hold the tree against its notebooks
end-to-end  run the recipes as people do, kill one, install a wheel without the repository
"""
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measures  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT/'.venv/bin'
START = time.monotonic()
EPOCHS = 8  # of the small runs: enough that one can be killed half-way


class Failed(Exception):
    "What a check says when something does not hold"


def run(*command, cwd=ROOT, timeout=900, ok=(0,), quiet=True, **environment):
    "Run a program; return what it printed, raise `Failed` where its exit status is not among `ok`"
    done = subprocess.run(list(map(str, command)), cwd=cwd, timeout=timeout, env={**os.environ, **environment},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    if done.returncode not in ok:
        raise Failed(f'{" ".join(map(str, command))[:200]} ended with {done.returncode}:\n{tail(done.stdout)}')
    if not quiet:
        print(done.stdout, flush=True)
    return done.stdout


def tail(text, n=40):
    return '\n'.join(text.splitlines()[-n:])


def python(code, **kwargs):
    return run(BIN/'python', '-c', code, **kwargs)


def tree():
    "What git would show: states of all files, and the content of those that are not ignored"
    files = run('git', 'ls-files', '-co', '--exclude-standard', '-z').split('\0')
    digests = {f: hashlib.sha1((ROOT/f).read_bytes()).hexdigest() for f in files if f and (ROOT/f).is_file()}
    return run('git', 'status', '--porcelain'), digests


def unchanged(before, by):
    "Raise `Failed` where the tree is not as it was"
    after = tree()
    names = sorted(k for k in {*before[1], *after[1]} if before[1].get(k) != after[1].get(k))
    if before != after:
        raise Failed(f'{by} changed the tree: {", ".join(names) or after[0]}')


def holds(folder, *names):
    lost = [n for n in names if not (folder/n).is_file() or not (folder/n).stat().st_size]
    if lost:
        raise Failed(f'{folder.name} holds no {", ".join(lost)}')


def digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha1(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}


# ---------------------------------------------------------------- quick: the tree
def readme_line(end):
    "The README's command that installs and ends in `end`"
    lines = [line.strip() for line in (ROOT/'README.md').read_text(encoding='utf-8').splitlines()]
    found = [line for line in lines if line.startswith('python -m venv ') and line.endswith(end)]
    if not found:
        raise Failed(f'README.md has no line that installs and ends in {end}')
    return found[0]


def with_python(folder):
    "An environment in which `python` is this machine's Python 3, whatever it is called"
    env = dict(os.environ)
    if not shutil.which('python'):
        (folder/'python').symlink_to(sys.executable)
        env['PATH'] = f'{folder}{os.pathsep}{env["PATH"]}'
    return env


def readme_commands(box):
    "The README's commands install into a fresh environment, and every notebook passes"
    readme_line('/papermill nbs/05_train.ipynb out.ipynb')
    line = readme_line('/nbdev_test')
    print(line, flush=True)
    log = box/'test.log'
    with log.open('w') as f:
        done = subprocess.run(['bash', '-c', f'{line} --timing'], cwd=ROOT, env=with_python(box), stdin=subprocess.DEVNULL,
                              stdout=f, stderr=subprocess.STDOUT)
    said = log.read_text(errors='replace')
    times = re.findall(r'^(\S+\.ipynb): (\d+) secs$', said, flags=re.M)
    print('seconds of each notebook: '+(', '.join(f'{n[:-6]} {s}' for n, s in times) or 'not measured, since one failed'))
    if done.returncode or not re.search(r'^Success\.$', said, flags=re.M):
        raise Failed(tail(said.rpartition('Successfully installed')[2], 80))  # of pip only what it said last


def nothing_left(box):
    "The tests leave nothing behind in the tree"
    if status := run('git', 'status', '--porcelain'):
        raise Failed(status)


def export(box):
    "nbdev_export changes nothing"
    before = tree()
    run(BIN/'nbdev_export')
    unchanged(before, 'nbdev_export')


def clean(box):
    "nbdev_clean changes nothing"
    before = tree()
    run(BIN/'nbdev_clean')
    unchanged(before, 'nbdev_clean')


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']


def modules(box):
    "Each module has its one notebook, and no two notebooks export one module"
    owners = {}
    for path in sorted((ROOT/'nbs').glob('[!_.]*.ipynb')):
        for cell in code_cells(path):
            for name in re.findall(r'^#\| *default_exp +(\S+)', measures.source(cell), flags=re.M):
                owners.setdefault(name, []).append(path.name)
    twice = {k: v for k, v in owners.items() if len(v) > 1}
    orphans = [p.name for p in (ROOT/'sportsreid').glob('[!_]*.py') if p.stem not in owners]
    if twice or orphans:
        raise Failed(f'exported twice: {twice or "none"}; from no notebook: {orphans or "none"}')


def executed(box):
    "No notebook that papermill executed lies in nbs/, and git would show it there"
    tags = lambda cell: cell.get('metadata', {}).get('tags', [])
    bad = [p.name for p in (ROOT/'nbs').glob('*.ipynb') if any('injected-parameters' in tags(c) for c in code_cells(p))]
    if bad:
        raise Failed(f'{", ".join(bad)}: the next export would take it for a source; move it to the run folder')
    if hidden := run('git', 'check-ignore', 'nbs/out.ipynb', 'nbs/out-1.ipynb', ok=(0, 1)).split():
        raise Failed(f'.gitignore hides {", ".join(hidden)}, which the next export would take for a source')


def page_measures(box):
    "The pages keep to the measures of measures.py: no introduction is dropped, no program stands in a string"
    run(BIN/'python', '.ci/measures.py', quiet=False)


def readme(box):
    "README.md is as nbs/index.ipynb has it"
    run(BIN/'python', '.ci/readme.py', '--check')


DOCS = """
import os
from nbdev.serve import proc_nbs
proc_nbs(force=True, n_workers=0)
os._exit(0)  # else every page's shell collects the garbage of all others, which takes twice as long as the pages
"""


def docs(box):
    "nbdev processes the docs, and the sidebar lists each page once"
    python(DOCS)
    made = {p.stem for p in (ROOT/'_proc').glob('*.ipynb')}
    lost = {p.stem for p in (ROOT/'nbs').glob('[!_.]*.ipynb')}-made
    shutil.rmtree(ROOT/'_proc', ignore_errors=True)
    listed = re.findall(r'\w+\.ipynb', (ROOT/'nbs/sidebar.yml').read_text(encoding='utf-8'))
    pages = [p.name for p in (ROOT/'nbs').glob('[!_.]*.ipynb')]
    if lost or sorted(listed) != sorted(pages):
        raise Failed(f'no page for {lost or "none"}; the sidebar and nbs/ differ in {sorted({*listed} ^ {*pages})}')


def shown_text(path):
    "Sources and text outputs of a notebook, without its pictures; the whole of any other file"
    if path.suffix != '.ipynb':
        return path.read_text(encoding='utf-8')
    found = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        found.append(measures.source(cell))
        for output in cell.get('outputs', []):
            data = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/')}
            found += [''.join(output.get('text', '')), json.dumps(data)]
    return '\n'.join(found)


def machine_paths(box):
    "No path of a machine is stored"
    files = [*(ROOT/'nbs').glob('*.ipynb'), *ROOT.glob('*.md')]
    found = {p.name: re.search(r'/(home|Users|root|work|tmp)/\S{0,40}', shown_text(p)) for p in files}
    bad = [f'{name}: {match[0]}' for name, match in found.items() if match]
    if bad:
        raise Failed('; '.join(bad))


def names(box):
    "ruff finds no undefined or unused name, in the package and in the notebooks"
    run(BIN/'ruff', 'check', '--select', 'F821,F401', 'sportsreid')
    run(BIN/'ruff', 'check', '--select', 'F401,F811', 'nbs')


# ---------------------------------------------------------------- quick: the slow cells and the start
def parity(box):
    "All six published networks equal the original, and each takes a step"
    run(BIN/'nbdev_test', '--path', 'nbs/04b_weights.ipynb', '--flags', 'slow', '--n_workers', '1')


def light(box):
    "The command line starts at once: it imports neither torch nor papermill to give help"
    heavy = "{'torch', 'pandas', 'papermill', 'matplotlib', 'timm'}"
    said = python(f'import sys, sportsreid.command; print(sorted({heavy} & set(sys.modules)))')
    if said.strip() != '[]':
        raise Failed(f'importing sportsreid.command also imports {said}')
    run(BIN/'sportsreid_run', '--help')


# ---------------------------------------------------------------- end-to-end
COUNTS = 'train=24, valid=6, test=12, challenge=0'


def recipe(folder, notebook, environment={}, source=ROOT/'nbs', **parameters):
    "Execute a recipe with papermill; its run folders land in folder/runs, since that is outside the project"
    folder.mkdir(parents=True, exist_ok=True)
    given = [word for k, v in parameters.items() for word in ('-p', k, str(v))]
    command = [BIN/'papermill', '--no-progress-bar', source/f'{notebook}.ipynb', f'{notebook}.ipynb']
    return run(*command, *given, cwd=folder, **environment)


def train(box, folder, seed):
    return recipe(box/folder, '05_train', data=box/'broadcast', arch='tiny', epochs=EPOCHS, seed=seed)


def broadcast(box):
    "A small broadcast is drawn"
    python(f"from sportsreid.simulate import simulate_broadcast as s; s({str(box/'broadcast')!r}, {COUNTS}, seed=7)")


RUN_FILES = 'config.json', 'log.jsonl', 'last.pt', 'best.safetensors', 'model.json', 'scores.json', 'train.ipynb'


def sweep(box):
    "sportsreid_run sweep trains two seeds side by side and ends in soups"
    (box/'whole').mkdir()
    run(BIN/'sportsreid_run', 'sweep', '--data', box/'broadcast', '--arch', 'tiny', '--epochs', EPOCHS,
        '--seeds', 1, 2, '--jobs', 2, cwd=box/'whole')
    for seed in (1, 2):
        holds(box/f'whole/runs/tiny-s{seed}', *RUN_FILES)
    soups = box/'whole/runs/tiny-soup'
    holds(soups, 'table.csv', 'soup.ipynb', 'uniform/best.safetensors', 'uniform/model.json', 'greedy/model.json')


def program(box):
    "05_train shows its first picture within eight code cells, and stores no error"
    cells = code_cells(box/'whole/runs/tiny-s1/train.ipynb')
    pictures = [i for i, c in enumerate(cells, 1) for o in c['outputs'] if 'image/png' in o.get('data', {}) or 'image/jpeg' in o.get('data', {})]
    if not pictures or pictures[0] > 8:
        raise Failed(f'its first picture is that of code cell {pictures[0] if pictures else "none"}')


def again(box):
    "A finished run is not trained again"
    folder = box/'whole/runs/tiny-s1'
    before = digests(folder)
    train(box, 'whole', 1)
    if digests(folder) != before:
        raise Failed('its files changed')


def evaluate(box):
    "06_evaluate scores two splits in one go, says what made the results, and draws whatever MPLBACKEND says"
    recipe(box/'whole', '06_evaluate', dict(MPLBACKEND='Agg'), data=box/'broadcast', run='runs/tiny-s1', split='valid+test')
    files = [f'{kind}_{split}.json' for kind in ('ranking', 'scores', 'made_by') for split in ('valid', 'test')]
    holds(box/'whole/runs/tiny-s1', *files)
    outputs = [o for c in code_cells(box/'whole/06_evaluate.ipynb') for o in c['outputs']]
    pictures = sum('image/png' in o.get('data', {}) or 'image/jpeg' in o.get('data', {}) for o in outputs)
    if pictures < 7:
        raise Failed(f'it holds {pictures} pictures, not a score plot, a curve, a breakdown and four ranked lists')


def apart(box):
    "Results of other settings lie apart, and those of the run stay as they are"
    folder = box/'whole/runs/tiny-s1'
    before = {k: v for k, v in digests(folder).items() if '/' not in k}
    recipe(box/'whole', '06_evaluate', data=box/'broadcast', run='runs/tiny-s1', flip='false', rerank='no', also='runs/tiny-s2')
    recipe(box/'whole', '06_evaluate', data=box/'broadcast', run='runs/tiny-s1', flip='YES', temperature=.1)
    holds(folder, 'evaluate-flip-temperature-0.1/scores_test.json')
    if not list((box/'whole/runs').glob('tiny-s1+1-*/scores_test.json')):
        raise Failed('the ensemble has no folder')
    if before != {k: v for k, v in digests(folder).items() if '/' not in k}:
        raise Failed("the run's own files changed")


CHECKPOINT = """
import torch
from sportsreid.models import create_model
state = create_model('osnet_x0_25', 751, pretrained=False).state_dict()
torch.save(dict(state_dict={'module.'+k.removeprefix('backbone.'): v for k,v in state.items()}, epoch=40), 'model.pth.tar')
"""


def published(box):
    "06_evaluate reads a checkpoint with the original's names"
    python(CHECKPOINT, cwd=box)
    recipe(box/'whole', '06_evaluate', data=box/'broadcast', checkpoint=box/'model.pth.tar', arch='osnet_x0_25', split='test')
    holds(box/'whole/runs/osnet_x0_25-model', 'ranking_test.json', 'best.safetensors')


def unknown(box):
    "An unknown parameter is refused in one line, and nothing is written"
    folder = box/'wrong'
    folder.mkdir()
    said = run(BIN/'sportsreid_run', 'train', '--data', box/'broadcast', '--no_such_thing', 1, cwd=folder, ok=(1, 2))
    if 'no_such_thing' not in said or 'Traceback' in said or len(said.splitlines()) > 5 or list(folder.iterdir()):
        raise Failed(said)


NO_WARNINGS = """
import importlib, json, pkgutil, sys, warnings
from IPython.core.interactiveshell import InteractiveShell
import sportsreid
for module in pkgutil.iter_modules(sportsreid.__path__):
    importlib.import_module(f'sportsreid.{module.name}')
shell = InteractiveShell.instance()
notebook, given = sys.argv[1:]
strict = 'import warnings; warnings.simplefilter("error"); warnings.filterwarnings("ignore", "The image decoding and encoding")'
for cell in json.load(open(notebook, encoding='utf-8'))['cells']:
    if cell['cell_type'] != 'code':
        continue
    done = shell.run_cell(strict+'\\n'+''.join(cell['source']))
    if not done.success:
        sys.exit(f'cell {cell["id"]}: {done.error_in_exec!r}')
    if 'parameters' in cell['metadata'].get('tags', []):
        shell.user_ns.update(json.loads(given))
"""


def warnings(box):
    "Importing every module and a short training give no warning, but torchvision's that its decoders will move to TorchCodec"
    given = dict(data=str(box/'broadcast'), steps=8, run='runs/quiet')
    words = [BIN/'python', '-W', 'error', '-c', NO_WARNINGS, ROOT/'nbs/05_train.ipynb', json.dumps(given)]
    run(*words, cwd=box/'whole', MPLBACKEND='Agg')
    holds(box/'whole/runs/quiet', 'scores.json')


def kill_tree(pid):
    python(f'import psutil; p = psutil.Process({pid}); [o.kill() for o in [*p.children(recursive=True), p]]')


def killed(box):
    "A run that is killed at its first checkpoint ends with the same bytes when it is started again"
    half, whole = box/'halved/runs/tiny-s1', box/'whole/runs/tiny-s1'
    (box/'halved').mkdir()
    given = ['-p', 'data', box/'broadcast', '-p', 'arch', 'tiny', '-p', 'epochs', EPOCHS, '-p', 'seed', 1]
    command = [BIN/'papermill', '--no-progress-bar', ROOT/'nbs/05_train.ipynb', 'out.ipynb', *given]
    first = subprocess.Popen(list(map(str, command)), cwd=box/'halved', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (half/'last.pt').exists():
        time.sleep(.1)
    if first.poll() is None:
        kill_tree(first.pid)
    first.wait()
    holds(half, 'last.pt')
    if (half/'scores.json').exists():
        raise Failed('it was over before it could be killed: give it more epochs')
    train(box, 'halved', 1)
    for name in ('best.safetensors', 'scores.json'):
        if (half/name).read_bytes() != (whole/name).read_bytes():
            raise Failed(f'{name} is not that of the uninterrupted run')


def faults(box):
    "A run that is killed at random, in the middle of a write, interrupted, and left without room ends like its twin"
    run(BIN/'python', '.ci/faults.py', '--random', 1, '--chosen', 1, '--signals', 1, '--disk', 1, quiet=False)


def ranks(box):
    "The recipe trains one network on two processes"
    run(BIN/'nbdev_test', '--path', 'nbs/05c_devices.ipynb', '--flags', 'slow', '--n_workers', '1')


def tour(box):
    "The tour and the README's example run from top to bottom, training included, of which the tour has two epochs here"
    page = (ROOT/'nbs/00_tour.ipynb').read_text(encoding='utf-8')
    epochs = 'history,epochs = [],20'
    if page.count(epochs) != 1:
        raise Failed(f'00_tour does not say {epochs}, which this check would shorten')
    (box/'short').mkdir()
    (box/'short/00_tour.ipynb').write_text(page.replace(epochs, 'history,epochs = [],2'), encoding='utf-8')
    recipe(box/'tour', '00_tour', source=box/'short')
    recipe(box/'tour', 'index')


def wheel(box):
    "An installed wheel runs the recipes and the shipped weights without the repository"
    run(BIN/'python', '-m', 'pip', '-q', 'wheel', '--no-deps', '-w', box/'wheel', ROOT)
    site = box/'site'
    package = next((box/'wheel').glob('*.whl'))
    run(BIN/'python', '-m', 'pip', '-q', 'install', '--no-deps', '--target', site, package)
    away = box/'away'
    away.mkdir()
    env = f'import sys; sys.path.insert(0, {str(site)!r})'
    python(f'{env}; import sportsreid; assert {str(site)!r} in sportsreid.__file__', cwd=away)
    command = f"{env}; import os; os.environ['PYTHONPATH'] = {str(site)!r}; from sportsreid.command import main"
    given = ['train', '--data', str(box/'broadcast'), '--steps', '4', '--run', 'runs/wheel']
    python(f'{command}; main({given!r})', cwd=away)
    holds(away/'runs/wheel', *RUN_FILES)


def extras(box):
    "With the extras export and track installed, their pages pass with the real packages"
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT/'settings.ini')
    needed = [word for extra in ('export', 'track') for word in config['DEFAULT'][f'{extra}_requirements'].split()]
    run(BIN/'python', '-m', 'pip', '-q', 'install', *needed, timeout=1800)  # not the project again: the other lane runs it
    python('import onnx, onnxruntime, onnxscript')
    pages = ['09c_export', '09d_identify', '09g_trackers']
    opens = python('try: import cv2\nexcept ImportError as e: print(e)')
    if 'libGL' in opens:  # OpenCV, which trackers need, wants a system library that a bare container lacks
        print(f'NOTE: 09g_trackers is not tried here: {opens.strip()}', flush=True)
        pages.remove('09g_trackers')
    else:
        python('import deep_sort_realtime, norfair, supervision, trackers')
    for page in pages:
        run(BIN/'nbdev_test', '--path', f'nbs/{page}.ipynb', '--n_workers', '0')


def benchmark(box):
    "10_benchmark runs at a hundredth of its size"
    recipe(box/'bench', '10_benchmark', scale=.01, networks='tiny', soup_of='tiny')


# The lanes of a job run two at a time, the checks of a lane one after the other. The first lane of the second job is
# its longest; the others, longest first, follow one another beside it.
JOBS = {
    'quick': [[readme_commands, nothing_left, modules, executed, export, clean, page_measures, readme, docs,
               machine_paths, names, light]],
    'end-to-end': [[broadcast, sweep, program, again, evaluate, apart, published, unknown, warnings, killed, wheel],
                   [benchmark], [parity], [ranks], [tour], [extras], [faults]],
}


def install():
    "The README's installation, where the quick job has not run it"
    line = readme_line('/nbdev_test')
    if not (BIN/'nbdev_test').exists():
        run('bash', '-c', line.rsplit('&&', 1)[0], timeout=3600)


def attempt(check, box):
    "Run one check; its failure as text, or None"
    try:
        check(box)
    except (Failed, OSError, subprocess.SubprocessError) as e:
        return str(e)


def lane(checks, box):
    "Run checks one after the other: a line for each, and the reason where it failed"
    results = []
    for check in checks:
        start = time.monotonic()
        why = attempt(check, box)
        results.append((f'{"FAIL" if why else "PASS"} {time.monotonic()-start:6.0f} s  {check.__doc__}', why))
        print('\n'.join(filter(None, results[-1])), flush=True)
    return results


def main():
    jobs = sys.argv[1:] or list(JOBS)
    for name in ('IN_TEST', 'SPORTSREID_DATA'):  # the first silences nbdev_export, the second would replace the data made here
        os.environ.pop(name, None)
    os.environ.setdefault('PIP_COMPILE', '0')  # modules are compiled when they are imported, and most never are
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        for job in jobs:
            print(f'=== {job}', flush=True)
            if job != 'quick':
                install()
                os.environ['OMP_NUM_THREADS'] = '1'  # runs share the cores; resume is exact for one number of threads
            before = tree()
            lanes = JOBS[job]
            with ThreadPoolExecutor(2) as pool:
                for done in pool.map(lane, lanes, [Path(tmp)]*len(lanes)):
                    results += done
            if tree() != before:
                results.append((f'FAIL          {job} leaves the tree as it was', 'git status shows what it changed'))
    failed = [(line, why) for line, why in results if why]
    summary = '\n'.join(['', *(line for line, why in results), f'in {time.monotonic()-START:.0f} s'])
    print(summary)
    for line, why in failed:  # again: a log is read from its end
        print(f'\n{line}\n{tail(why, 25)}')
    if target := os.environ.get('GITHUB_STEP_SUMMARY'):
        Path(target).write_text(f'```{summary}\n```\n')
    print(f'{len(results)-len(failed)} passed, {len(failed)} failed')
    sys.exit(bool(failed) or not results)


if __name__ == '__main__':
    main()
