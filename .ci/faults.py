"""Kill a training run at random and at chosen moments, interrupt it, fill its disk; then let it go on, and hold what it ends with
against a run that nobody disturbed. On demand, with the Python that has the package: `python .ci/faults.py`, or a short one:
`python .ci/faults.py --random 3 --chosen 0 --signals 0 --disk 0`. Each attempt is a forked child, so that torch is imported once.
"""
import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

os.environ['OMP_NUM_THREADS'] = '1'  # a child of a process whose OpenMP threads run must not compute; and resume is exact
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import sportsreid.checkpoints  # noqa: E402
import sportsreid.runs  # noqa: E402
import sportsreid.weights  # noqa: E402
from sportsreid.checkpoints import Reporter, read_state  # noqa: E402
from sportsreid.learner import Learner  # noqa: E402
from sportsreid.sampler import EpochSampler  # noqa: E402
from sportsreid.simulate import simulate_broadcast  # noqa: E402
from sportsreid.train import RunWriter  # noqa: E402
from sportsreid.weights import load_model  # noqa: E402

COUNTS = dict(train=8, valid=3, test=2, challenge=0)  # actions of the simulated broadcast
SETTINGS = dict(arch='tiny', epochs=4, batch_size=32, K=2, accumulate=2, ema=0.9, device='cpu')
WRITERS = {}  # child: what writes down what it says


class Failed(Exception):
    "What a fault says that was not survived"


# ---------------------------------------------------------------- the run, in a child
def train(box):
    "What 05_train does"
    RunWriter.save_every, Reporter.every = .1, .05
    run = sportsreid.runs.prepare(dict(SETTINGS, data=str(box.parent/'data'), run=str(box/'run'), packs=str(box/'packs')))
    sportsreid.runs.train_run(run)
    sportsreid.runs.score_run(run)


def start(box, *patches):
    "Fork a child that trains with some functions replaced; its number. What it prints goes to box/said.txt"
    box.mkdir(exist_ok=True)
    with (box/'said.txt').open('wb') as file:  # by way of a pipe, which has room when files have none
        writer = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=file)
    child = os.fork()
    if child:
        writer.stdin.close()
        WRITERS[child] = writer
        return child
    status = 70
    try:
        os.dup2(writer.stdin.fileno(), 1)
        os.dup2(writer.stdin.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.ExitStack() as around:
            for patch in patches:
                around.enter_context(patch)
            train(box)
        status = 0
    except BaseException as e:
        print(f'{type(e).__name__}: {e}', flush=True)
        status = 1
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def wait(child, seconds=300):
    "The status of a child; a child that does not end is a fault of its own"
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            WRITERS.pop(child).wait()
            return os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise Failed('it hung')


def finish(box):
    "Let the run go on to its end"
    if status := wait(start(box)):
        raise Failed(f'it does not go on: status {status}, {said(box)}')


def said(box):
    lines = (box/'said.txt').read_text(errors='replace').strip().splitlines()
    return lines[-1] if lines else ''


# ---------------------------------------------------------------- what a run leaves
def sound(box):
    "Raise `Failed` where a file of a run that was cut short is not whole"
    run = box/'run'
    try:
        for path in run.glob('*.json'):
            json.loads(path.read_text())
        if (run/'last.pt').exists():
            read_state(run)
        if (run/'model.json').exists():
            load_model(run)
        if (run/'log.jsonl').exists():
            for line in (run/'log.jsonl').read_text().split('\n')[:-1]:
                json.loads(line)
    except Exception as e:
        raise Failed(f'a file is not whole: {type(e).__name__}: {e}') from e


def tensors(state, name=''):
    "Every tensor and number of a state, by name"
    if isinstance(state, torch.Tensor):
        yield name, state.numpy().tobytes()
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f'{name}.{key}')
    elif isinstance(state, (list, tuple)):
        yield from tensors(dict(enumerate(state)), name)
    else:
        yield name, repr(state).encode()


def digests(box):
    "A hash of everything that a finished run must share with its twin"
    run = box/'run'
    state = hashlib.sha1()
    for name, value in sorted(tensors(read_state(run))):
        state.update(name.encode()+value)
    log = [json.loads(line) for line in (run/'log.jsonl').read_text().splitlines()]
    names = 'best.safetensors', 'model.json', 'scores.json'
    found = {name: hashlib.sha1((run/name).read_bytes()).hexdigest() for name in names}
    return dict(found, **{'last.pt': state.hexdigest()}, validations=[row for row in log if 'mAP' in row])


def compare(box, whole):
    "Raise `Failed` where a finished run is not its twin, or has left something"
    got = digests(box)
    if unlike := [name for name in whole if got[name] != whole[name]]:
        raise Failed(f'{", ".join(unlike)} differ from those of the run that nobody disturbed')
    left = [str(p.relative_to(box)) for p in box.rglob('*.tmp')]
    if left:
        raise Failed(f'left behind: {", ".join(left)}')


def state_of(box):
    "How far a run is, for the report"
    run = box/'run'
    if not (run/'last.pt').exists():
        return 'before its first state'
    at = read_state(run)['progress']
    return 'when it was trained' if at['epoch'] == SETTINGS['epochs'] else f'in epoch {at["epoch"]+1}'


# ---------------------------------------------------------------- faults
def die():
    os.kill(os.getpid(), signal.SIGKILL)


def calls(owner, name, before=lambda n: None, after=lambda n: None):
    "Replace a function by itself, with something done before and after its n-th call"
    real, n = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        n[0] += 1
        mine = n[0]
        before(mine)
        result = real(*args, **kwargs)
        after(mine)
        return result
    return mock.patch.object(owner, name, wrapped)


def kill_at(owner, name, nth, late=False):
    "Die before the n-th call of a function, or just after it"
    def moment(n):
        if n == nth:
            die()
    return calls(owner, name, **{'after' if late else 'before': moment})


def half_of(owner, name, nth, where):
    "Die when the n-th call of a function that writes a file has written half of it; `where` is its argument"
    def cut(n, target):
        file = open(target, 'r+b') if isinstance(target, (str, os.PathLike)) else target
        file.flush()
        os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size//2)
        die()
    real, n = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        n[0] += 1
        if n[0] == nth:
            cut(nth, args[where])
        return result
    return mock.patch.object(owner, name, wrapped)


def half_line(nth):
    "Die in the middle of the n-th line of the log"
    def moment(n):
        if n == nth:
            with (Path(moment.box)/'run/log.jsonl').open('a') as f:
                f.write('{"step": 7, "lo')
            die()
    patch = calls(sportsreid.checkpoints, 'write_log', before=moment)
    patch.moment = moment
    return patch


def count_calls(box):
    "How often the undisturbed run syncs and renames a file, and ranks a split"
    counts = dict(fsync=0, replace=0, rank_crops=0)

    def note(name):
        def more(n):
            counts[name] = n
            (box/'counts.json').write_text(json.dumps(counts))
        return more
    return [calls(sportsreid.runs if name == 'rank_crops' else os, name, after=note(name)) for name in counts]


def chosen_faults(counts, rng, most):
    "Moments in every kind of work and every write: name -> patch"
    every = {}
    for name in ('fsync', 'replace'):
        for nth in range(1, counts[name]+1):
            every[f'before os.{name} {nth}'] = kill_at(os, name, nth)
            every[f'after os.{name} {nth}'] = kill_at(os, name, nth, late=True)
    kinds = {
        'sampling': kill_at(EpochSampler, 'rows', 3),
        'a step, before its gradient': kill_at(Learner, 'gradient', 20),
        'a step, before its update': kill_at(Learner, 'update', 9),
        'a step, after its update': kill_at(Learner, 'update', 9, late=True),
        'validation': kill_at(sportsreid.runs, 'rank_crops', 2),
        'the last scores': kill_at(sportsreid.runs, 'rank_crops', counts['rank_crops']),
        'half a state': half_of(torch, 'save', 2, 1),
        'half a state, later': half_of(torch, 'save', 5, 1),
        'half the best weights': half_of(sportsreid.weights, 'save_file', 1, 1),
        'half a line of the log': half_line(3),
    }
    names = list(every)
    picked = names if most >= len(names) else rng.sample(names, max(0, most-len(kinds)))
    return {**dict(list(kinds.items())[:most]), **{name: every[name] for name in picked}}


@contextlib.contextmanager
def files_below(most):
    "No file may grow beyond so many bytes"
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    yield


@contextlib.contextmanager
def small_disk(folder, size):
    "A disk of so many bytes, or None where nobody may mount one"
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True)
    try:
        yield None if done.returncode else folder
    finally:
        if not done.returncode:
            subprocess.run(['umount', str(folder)], check=True)


# ---------------------------------------------------------------- trials
def random_kill(box, rng, seconds):
    "SIGKILL at a random moment, sometimes twice"
    moments = []
    for _ in range(rng.choice((1, 1, 2))):
        child = start(box)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        wait(child)
        sound(box)
        moments.append(state_of(box))
    return moments


def one_error(box, child):
    "A full disk ends a run with one sentence that says what to do"
    if not wait(child):
        return False
    last = said(box)
    if not last.startswith('OSError: ') or 'Traceback' in (box/'said.txt').read_text(errors='replace'):
        raise Failed(f'no sentence: {last}')
    sound(box)
    return True


def asked(box, rng, seconds, number):
    "Ctrl-C or SIGTERM at a random moment ends in one sentence and a state, or the run has ended before"
    child = start(box)
    step = time.monotonic()+seconds
    while not (box/'run/tensorboard').exists() and time.monotonic() < step:
        time.sleep(.01)
    time.sleep(rng.uniform(0, seconds/2))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    status = wait(child)
    over = state_of(box) == 'when it was trained'  # and only the last scores were missing
    if status and not over and not said(box).startswith('KeyboardInterrupt: Stopped after step'):
        raise Failed(f'status {status}: {said(box)}')
    sound(box)
    return [state_of(box)]


class Trials:
    "Counts what was survived"
    def __init__(self, root, whole):
        self.root, self.whole, self.failed, self.survived = root, whole, [], {}

    def __call__(self, kind, name, fault):
        box = self.root/f'box{sum(map(len, self.survived.values()))+len(self.failed)}'
        try:
            moments = fault(box)
            finish(box)
            compare(box, self.whole)
            self.survived.setdefault(kind, []).extend(moments)
        except Failed as e:
            self.failed.append(name)
            print(f'FAIL {kind}, {name}: {e}', flush=True)
        shutil.rmtree(box, ignore_errors=True)

    def report(self):
        for kind, moments in self.survived.items():
            places = {place: moments.count(place) for place in sorted({*moments})}
            print(f'{kind}: {len(moments)} survived ({", ".join(f"{n} {place}" for place, n in places.items())})')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(random=30, chosen=1000, signals=6, disk=8, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        with contextlib.redirect_stdout(io.StringIO()):
            simulate_broadcast(root/'data', **COUNTS, seed=7, n_workers=1)
        begun = time.monotonic()
        twin = root/'whole'
        twin.mkdir()
        if wait(start(twin, *count_calls(twin))):
            raise SystemExit(f'the undisturbed run fails: {said(twin)}')
        seconds = time.monotonic()-begun
        counts = json.loads((twin/'counts.json').read_text())
        size = sum(p.stat().st_size for p in twin.rglob('*') if p.is_file())
        print(f'undisturbed: {seconds:.1f} s, {counts["replace"]} files renamed, {size/1e6:.1f} MB', flush=True)
        trials = Trials(root, digests(twin))
        run_trials(trials, args, rng, seconds, counts, size)
        trials.report()
        print(f'{len(trials.failed)} failed, in {time.monotonic()-begun:.0f} s')
    sys.exit(bool(trials.failed))


def run_trials(trials, args, rng, seconds, counts, size):
    "All faults that were asked for"
    left = args.random
    while left > 0:
        before = len(trials.survived.get('SIGKILL at random', []))+len(trials.failed)
        trials('SIGKILL at random', f'{args.random-left}', lambda box: random_kill(box, rng, seconds))
        left -= max(1, len(trials.survived.get('SIGKILL at random', []))+len(trials.failed)-before)
    for name, patch in (chosen_faults(counts, rng, args.chosen) if args.chosen else {}).items():
        trials('SIGKILL at a chosen moment', name, lambda box: killed_at(box, patch))
    for i in range(args.signals):
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        trials(number.name, str(i), lambda box: asked(box, rng, seconds, number))
    largest = max((p.stat().st_size for p in (trials.root/'whole/run').iterdir() if p.is_file()))
    for i in range(args.disk):
        most = int(largest*rng.random()**2)
        trials('files too large', f'{most} bytes', lambda box: limited(box, most))
    for i in range(args.disk):
        share = rng.random()
        trials('a full disk', f'{share:.2f} of what a run takes', lambda box: filled(box, size, share))


def killed_at(box, patch):
    "SIGKILL at a chosen moment"
    if hasattr(patch, 'moment'):
        patch.moment.box = box
    if wait(start(box, patch)) != -signal.SIGKILL:
        raise Failed(f'the moment did not come: {said(box)}')
    sound(box)
    return [state_of(box)]


def limited(box, most):
    "Files that may not grow beyond a size"
    return [state_of(box) if one_error(box, start(box, files_below(most))) else 'that fit']


def filled(box, size, share):
    "A disk with room for a share of what a run takes; then there is room again"
    box.mkdir()
    disk = box/'run'
    disk.mkdir()
    with small_disk(disk, int(2*size)) as mounted:
        if mounted is None:
            return []
        free = shutil.disk_usage(disk).free
        (disk/'.ballast').write_bytes(bytes(max(0, int(free-share*size))))
        ended = one_error(box, start(box))
        (disk/'.ballast').unlink()
        moments = [state_of(box) if ended else 'that fit']
        finish(box)
        shutil.copytree(disk, box/'kept')
    shutil.rmtree(disk)
    (box/'kept').rename(disk)
    return moments


if __name__ == '__main__':
    main()
