"""The recipes in JupyterLab, as a reader opens them: `python .ci/lab.py`, or some pages by name: `python .ci/lab.py 05_train`.

A copy of the tree is served by JupyterLab, a headless Chromium opens each page, runs all cells, and one line says how many
ran, which failed, how long it took, how high the page is and how many code cells scroll sideways. It is run on demand; the
tour, the training, its evaluation and following take about ten minutes on two cores. It needs Playwright for Python and a
Chromium (`pip install playwright`, then `playwright install chromium` or the one of the system), which may lie in another
environment than the project's: `--jupyter .venv/bin/jupyter` says where that is.
"""
import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = '00_tour', '05_train', '06_evaluate', '09_follow'
WIDTH, SCREEN = 1400, 900  # of the browser's window, in pixels
RUN_ALL = """
async seconds => {
    const app = window.jupyterapp, panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    const late = new Promise(done => setTimeout(() => done('late'), 1000*seconds));
    const run = app.commands.execute('notebook:run-all-cells').then(() => 'run');
    return await Promise.race([run, late]);
}
"""
LOOK = """
() => {
    const panel = window.jupyterapp.shell.currentWidget, notebook = panel.content;
    const code = notebook.model.sharedModel.toJSON().cells.filter(cell => cell.cell_type == 'code');
    const failed = code.flatMap(cell => cell.outputs.filter(o => o.output_type == 'error')
        .map(o => cell.id+': '+o.ename+': '+o.evalue));
    const scrollers = [...panel.node.querySelectorAll('.jp-CodeCell .jp-InputArea .cm-scroller')];
    return {cells: code.length, run: code.filter(cell => cell.execution_count).length, failed: failed,
            drawn: scrollers.length, sideways: scrollers.filter(s => s.scrollWidth > s.clientWidth+1).length,
            height: panel.node.querySelector('.jp-WindowedPanel-outer').scrollHeight};
}
"""


def copied_tree(folder):
    "The files of the tree, so that nothing is written to it"
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, names.stdout.split('\0')):
        if (ROOT/name).is_file():
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT/name, folder/name)
    return folder


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def settings(folder):
    "All cells are drawn, in sight or not, so that they can be measured"
    file = folder/'@jupyterlab/notebook-extension/tracker.jupyterlab-settings'
    file.parent.mkdir(parents=True)
    file.write_text('{"windowingMode": "none"}')
    return folder


def start_lab(jupyter, tree, box):
    "JupyterLab on 127.0.0.1, and its address"
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'SPORTSREID_DATA')}
    env |= dict(JUPYTERLAB_SETTINGS_DIR=str(settings(box/'settings')), PYTHONPATH=str(tree))
    words = [jupyter, 'lab', '--no-browser', '--allow-root', f'--port={port}', '--IdentityProvider.token=',
             f'--ServerApp.root_dir={tree}', '--LabApp.expose_app_in_browser=True', '--ServerApp.log_level=ERROR']
    lab = subprocess.Popen(words, env=env, cwd=tree, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(box/'lab.log').open('w'))
    address = f'http://127.0.0.1:{port}'
    for _ in range(120):
        try:
            urllib.request.urlopen(f'{address}/api', timeout=1)
            return lab, address
        except OSError:
            if lab.poll() is not None:
                break
            time.sleep(.5)
    lab.kill()
    sys.exit(f'JupyterLab did not start: {(box/"lab.log").read_text()[-500:]}')


def try_page(browser, address, name, patience, pictures):
    "Run a page from top to bottom; what was seen"
    page = browser.new_page(viewport=dict(width=WIDTH, height=SCREEN))
    page.goto(f'{address}/lab/tree/nbs/{name}.ipynb?reset')
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.content?.model', timeout=120_000)
    start = time.monotonic()
    ended = page.evaluate(RUN_ALL, patience)
    seen = page.evaluate(LOOK)
    seen |= dict(seconds=time.monotonic()-start, late=ended == 'late')
    if pictures:
        page.set_viewport_size(dict(width=WIDTH, height=min(seen['height']+200, 16_000)))
        page.evaluate("() => { document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0; }")
        page.wait_for_timeout(1000)
        page.screenshot(path=str(pictures/f'{name}.png'))
    page.evaluate('() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()')  # or its kernel would run on
    page.close()
    return seen


def say(name, seen):
    "A line on a page, and one for each cell that failed"
    print(f'{name}: {seen["run"]} of {seen["cells"]} code cells ran in {seen["seconds"]:.0f} s, {len(seen["failed"])} failed'
          f'{", and it was not done by then" if seen["late"] else ""}; {seen["height"]} pixels high '
          f'({seen["height"]/SCREEN:.1f} screens); {seen["sideways"]} of {seen["drawn"]} code cells scroll sideways', flush=True)
    for failed in seen['failed']:
        print(f'  {failed[:300]}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('pages', nargs='*', default=PAGES, help='names of pages; none: the tour, 05, 06 and 09_follow')
    parser.add_argument('--jupyter', default=shutil.which('jupyter') or '', help='of the environment that has the project')
    parser.add_argument('--chromium', default=shutil.which('chromium') or shutil.which('google-chrome') or '', help="'': Playwright's")
    parser.add_argument('--patience', type=int, default=1800, help='seconds that a page may take')
    parser.add_argument('--pictures', type=Path, help='folder for a picture of each page; none: no pictures')
    given = parser.parse_args()
    if not given.jupyter:
        sys.exit('there is no jupyter on the path; give that of the project with --jupyter .venv/bin/jupyter')
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sys.exit('this needs Playwright for Python: pip install playwright')
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
    wrong = []
    with tempfile.TemporaryDirectory(prefix='lab-', ignore_cleanup_errors=True) as tmp, sync_playwright() as play:
        box = Path(tmp)
        lab, address = start_lab(Path(given.jupyter).absolute(), copied_tree(box/'tree'), box)
        try:
            browser = play.chromium.launch(executable_path=given.chromium or None, args=['--no-sandbox'])
            for name in given.pages:
                seen = try_page(browser, address, name, given.patience, given.pictures)
                say(name, seen)
                if seen['failed'] or seen['late'] or not seen['run']:
                    wrong.append(name)
            browser.close()
        finally:
            lab.terminate()
            lab.wait(30)
    if wrong:
        sys.exit(f'not run from top to bottom: {", ".join(wrong)}')


if __name__ == '__main__':
    main()
