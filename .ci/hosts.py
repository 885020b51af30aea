"""One network on two hosts, tried for real: `python .ci/hosts.py`, or some checks by name: `python .ci/hosts.py killed cable`.

The hosts are namespaces of Linux: each has its own network, disk, name and process numbers, and a cable joins them. This
takes root. Where it is not allowed, two folders of one machine stand in for the hosts; then no cable can be cut. The
checks run for about half an hour on two cores; each prints its figures.
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = 'gpu1', 'gpu2'
ADDRESSES = '10.77.0.1', '10.77.0.2'
FILES = {'.lock', 'best.safetensors', 'config.json', 'last.pt', 'log.jsonl', 'model.json', 'scores.json', 'tensorboard',
         'train.ipynb'}


class Failed(Exception):
    pass


def holds(truth, *what):
    if not truth:
        raise Failed(' '.join(map(str, what)))


# ---------------------------------------------------------------- hosts
class Host:
    "A folder that stands for a machine; commands run in it"
    def __init__(self, box, number):
        self.number, self.name, self.disk = number, NAMES[number], box/NAMES[number]
        self.disk.mkdir(exist_ok=True)
        self.address, self.here, self.prefix, self.started = '127.0.0.1', self.disk, [], []

    def start(self, words, log, **env):
        "Start a command; its output goes to a file of the host"
        out = (self.disk.parent/f'{self.name}-{log}.txt').open('w+')
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1', **env}
        env.pop('IN_TEST', None)
        process = subprocess.Popen([*self.prefix, *map(str, words)], cwd=self.disk, env=env, stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        process.said = lambda: (out.flush(), Path(out.name).read_text(errors='replace'))[1]
        self.started.append(process)
        return process

    def kill(self):
        "SIGKILL to all that was started here, and all that they started"
        import psutil
        for process in self.started:
            if process.poll() is None:
                for p in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    p.kill()

    close = kill

    def cut(self):
        raise Failed('no cable to cut: the hosts are folders of one machine')


class Namespace(Host):
    "A host with its own network, disk, name and process numbers"
    def __init__(self, box, number):
        super().__init__(box, number)
        self.address, self.here = ADDRESSES[number], box/'disk'
        self.here.mkdir(exist_ok=True)
        ways = '--net', '--mount', '--uts', '--pid', '--fork', '--mount-proc', '--kill-child'
        self.first = subprocess.Popen(['unshare', *ways, 'sleep', 'infinity'], stderr=subprocess.DEVNULL)
        self.init = wait_for(lambda: child_of(self.first.pid))
        self.prefix = ['nsenter', '-t', str(self.init), '-n', '-m', '-u', '-p', '--']
        (box/'hosts').write_text(''.join(f'{a} {n}\n' for a, n in zip(ADDRESSES, NAMES)) + '127.0.0.1 localhost\n')
        self.run('hostname', self.name)
        self.run('mount', '--bind', self.disk, self.here)
        self.run('mount', '--bind', box/'hosts', '/etc/hosts')
        self.run('ip', 'link', 'set', 'lo', 'up')
        self.prefix += ['env', '-C', str(self.here)]

    def run(self, *words):
        subprocess.run([*self.prefix, *map(str, words)], check=True)

    def kill(self):
        os.kill(self.init, signal.SIGKILL)  # the first process of a host takes all others along
        self.first.wait()

    def close(self):
        if self.first.poll() is None:
            self.kill()

    def cut(self):
        self.run('ip', 'link', 'set', 'eth0', 'down')


def wait_for(find, seconds=10):
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(.05)
    raise Failed('waited in vain')


def child_of(pid):
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return int(children[0]) if children else None


def lay_cable(hosts):
    "Join two namespaces by a pair of virtual network cards"
    ends = f'sr{os.getpid()}a', f'sr{os.getpid()}b'
    subprocess.run(['ip', 'link', 'add', ends[0], 'type', 'veth', 'peer', 'name', ends[1]], check=True)
    for host, end in zip(hosts, ends):
        subprocess.run(['ip', 'link', 'set', end, 'netns', str(host.init)], check=True)
        host.run('ip', 'link', 'set', end, 'name', 'eth0')
        host.run('ip', 'addr', 'add', f'{host.address}/24', 'dev', 'eth0')
        host.run('ip', 'link', 'set', 'eth0', 'up')


def namespaces_allowed():
    words = ['unshare', '--net', '--mount', '--uts', '--pid', '--fork', 'ip', 'link', 'add', 'x', 'type', 'veth', 'peer', 'name', 'y']
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        return False


# ---------------------------------------------------------------- what runs on them
PORT = 29500


def torchrun(hosts, host, first=0):
    "The launcher's part of a command: node numbers count from host `first`"
    global PORT
    node = (host.number-first) % 2
    return [sys.executable, '-m', 'torch.distributed.run', '--nnodes', 2, '--node-rank', node, '--nproc-per-node', 1,
            '--rdzv-endpoint', f'{hosts[first].address}:{PORT}', '-m', '--']


def accelerate(hosts, host):
    return [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_machines', 2, '--machine_rank', host.number,
            '--num_processes', 2, '--main_process_ip', hosts[0].address, '--main_process_port', PORT,
            '--mixed_precision', 'no', '--dynamo_backend', 'no', '-m']


def train_words(run='runs/two', **settings):
    given = dict(dict(epochs=2, batch_size=16, device='cpu', packs='packs', run=run), **settings)
    return ['sportsreid.command', 'train', *(f'--{k}={v}' for k, v in given.items())]


def start_all(hosts, log, words, launcher=torchrun, data=None, **how):
    "Start one command on all hosts"
    global PORT
    PORT += 1
    data = data or DATA
    return [h.start([*launcher(hosts, h, **how), *(words[h.number] if isinstance(words, tuple) else words)], log,
                    SPORTSREID_DATA=data[h.number]) for h in hosts]


def ends(processes, seconds=600):
    "Wait for all; seconds after which each has ended"
    start, ended = time.monotonic(), {}
    while len(ended) < len(processes):
        for i, p in enumerate(processes):
            if i not in ended and p.poll() is not None:
                ended[i] = time.monotonic()-start
        if time.monotonic()-start > seconds:
            raise Failed(f'still running after {seconds} s: {[p.said()[-1500:] for p in processes if p.poll() is None]}')
        time.sleep(.1)
    return [ended[i] for i in range(len(processes))]


def well(processes, seconds=900):
    taken = ends(processes, seconds)
    for p in processes:
        holds(p.returncode == 0, p.said()[-3000:])
    return taken


def sentence(process):
    "The line that says why a command stopped"
    lines = [line for line in process.said().splitlines() if line.startswith(('05_train stopped', 'sportsreid_run:'))]
    holds(lines, 'no sentence in:', process.said()[-3000:])
    return lines[-1]


def files(folder):
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


def content(folder):
    return hashlib.sha256((folder/'best.safetensors').read_bytes()).hexdigest()


def state(folder):
    "Steps that are in last.pt"
    said = subprocess.run([sys.executable, '-c', f'from sportsreid.checkpoints import read_progress as r; print(r({str(folder)!r}).step)'],
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True)
    return int(said.stdout.split()[-1])


# ---------------------------------------------------------------- checks
def numbers(box, hosts):
    "Two hosts compute what one process computes on the whole batch"
    words = [str(Path(__file__).resolve()), 'worker', 'equal.json']
    launch = lambda hosts, h: torchrun(hosts, h)[:-2]
    well(start_all(hosts, 'numbers', words, launch))
    found = json.loads((hosts[0].disk/'equal.json').read_text())
    holds(found['gradient'] < 1e-9 and found['weights'] < 1e-9 < found['alone'], found)
    return (f'largest relative difference to one process: gradient {found["gradient"]:.1e}, weights after 20 steps '
            f'{found["weights"]:.1e}; without the other host\'s crops {found["alone"]:.1e}')


def trained(box, hosts):
    "The recipe on two hosts ends as on one host with two ranks; the second host keeps packs and nothing else"
    taken = well(start_all(hosts, 'trained', train_words()))
    holds(files(hosts[0].disk/'runs/two') == FILES, files(hosts[0].disk/'runs/two'))
    holds(files(hosts[1].disk) == {'packs', 'other-place'}, files(hosts[1].disk))
    one = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m', '--']
    well([hosts[0].start([*one, *train_words('runs/one')], 'one-host', SPORTSREID_DATA=DATA[0])])
    folders = [hosts[0].disk/'runs'/name for name in ('one', 'two')]
    holds(content(folders[0]) == content(folders[1]), 'other weights than with two ranks on one host')
    scores = [json.loads((f/'scores.json').read_text()) for f in folders]
    holds(scores[0] == scores[1], scores)
    return f'weights and scores bit-equal to two ranks on one host; {taken[0]:.0f} s'


def again(box, hosts):
    "A finished run is not trained again, though the second host has no folder to see that by"
    if not (hosts[0].disk/'runs/two').exists():
        well(start_all(hosts, 'trained', train_words()))
    before = content(hosts[0].disk/'runs/two')
    processes = start_all(hosts, 'again', train_words())
    taken = well(processes)
    holds('is finished' in processes[0].said() and content(hosts[0].disk/'runs/two') == before, processes[0].said()[-2000:])
    return f'{taken[0]:.0f} s'


def accelerated(box, hosts):
    "accelerate launch with machine ranks ends with the same weights"
    if not (hosts[0].disk/'runs/two').exists():
        well(start_all(hosts, 'trained', train_words()))
    well(start_all(hosts, 'accelerated', train_words('runs/accelerated'), accelerate))
    holds(not (hosts[1].disk/'runs').exists(), 'the second host trained alone')
    holds(content(hosts[0].disk/'runs/accelerated') == content(hosts[0].disk/'runs/two'), 'other weights than torchrun')
    return 'bit-equal to torchrun'


def refuse(hosts, log, *said, words=None, on=(0, 1), **how):
    "Start a run that must be refused on all hosts; seconds from the end of one host to that of the other"
    processes = start_all(hosts, log, words or train_words('runs/refused'), **how)
    taken = ends(processes, 200)
    holds(all(p.returncode for p in processes), 'a host ended well')
    for i in on:
        for part in said:
            holds(part in sentence(processes[i]), f'{hosts[i].name} does not say {part!r}:', sentence(processes[i]))
    holds(not (hosts[1].disk/'runs/refused').exists(), 'the second host made a folder')
    print(f'        {sentence(processes[on[-1]])}')
    return f'{max(taken)-min(taken):.1f} s from the first end to the last'


def other_data(box, hosts):
    "Other data on the second host: both refuse, with one sentence that names both"
    said = 'fingerprint is', 'rank 0 on', 'rank 1 on', 'world', 'less'
    return refuse(hosts, 'other-data', *said, data=[DATA[0], OTHER])


def no_data(box, hosts):
    "No data on the second host: both say so"
    return refuse(hosts, 'no-data', 'nowhere', data=[DATA[0], 'nowhere'])


def clash(box, hosts):
    "The first host refuses the run folder: both stop"
    config = hosts[0].disk/'runs/clash/config.json'
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('{"arch": "vit_l16"}')
    return refuse(hosts, 'clash', "other parameters (K: None there", words=train_words('runs/clash'))


def no_recipe(box, hosts):
    "The first host refuses its command before the ranks join: the second does not wait"
    return refuse(hosts, 'no-recipe', 'no recipe', words=(train_words(recipe='mine.yaml'), train_words()))


def turned(box, hosts):
    "The hosts are started in the other order: the run folder is not begun anew on the second"
    config = hosts[0].disk/'runs/half/config.json'
    config.parent.mkdir(parents=True, exist_ok=True)
    if not config.exists():
        config.write_text('{}')
    said = refuse(hosts, 'turned', 'runs/half', 'not by the first rank', words=train_words('runs/half', **LONG), first=1)
    holds(not (hosts[1].disk/'runs').exists(), 'the second host made a folder')
    return said


LONG = dict(epochs=400, valid_every=400)


def begin(hosts, log, run):
    "Start a long run, and wait until some of its steps are saved"
    processes = start_all(hosts, log, train_words(run, **LONG))
    end = time.monotonic()+400
    while not (hosts[0].disk/run/'last.pt').exists():
        holds(time.monotonic() < end and all(p.poll() is None for p in processes), processes[0].said()[-2000:])
        time.sleep(.2)
    time.sleep(2)
    return processes


def kill_one(hosts, processes, gone):
    "Kill a host; the other says who is gone: how many seconds that took, and its sentence"
    hosts[gone].kill()
    other = processes[1-gone]
    taken = ends([other], 120)
    said = sentence(other)
    holds(f'rank {gone} on' in said, said)
    print(f'        {said}')
    return taken[0], said


def killed(box, hosts):
    "The second host is killed: the first says so and keeps the state; it goes on alone"
    taken, said = kill_one(hosts, begin(hosts, 'killed', 'runs/half'), 1)
    holds('last.pt is the state after step' in said, said)
    saved = state(hosts[0].disk/'runs/half')
    holds(f'after step {saved};' in said, saved, said)
    alone = hosts[0].start([sys.executable, '-m', *train_words('runs/half', **LONG)], 'alone', SPORTSREID_DATA=DATA[0])
    wait_for(lambda: f'after step {saved}' in alone.said() or alone.poll() is not None, 200)
    holds('continuing in epoch' in alone.said(), alone.said()[-2000:])
    wait_for(lambda: state(hosts[0].disk/'runs/half') > saved, 100)
    return f'{taken:.1f} s after the kill; one host goes on from step {saved}'


def first_killed(box, hosts):
    "The first host is killed: the second says so"
    taken, _ = kill_one(hosts, begin(hosts, 'first-killed', 'runs/first'), 0)
    return f'{taken:.1f} s after the kill'


def cable(box, hosts):
    "The cable is cut: both hosts end"
    processes = begin(hosts, 'cable', 'runs/cable')
    hosts[1].cut()
    taken = ends(processes, 300)
    for p in processes:
        holds('was lost: nothing heard of it for' in sentence(p), sentence(p))
        print(f'        {sentence(p)}')
    return f'{taken[0]:.0f} s and {taken[1]:.0f} s after the cut'


def validating(box, hosts):
    "An error of the first rank in its own work, here a folder that cannot be written, ends the second"
    processes = begin(hosts, 'validating', 'runs/spoilt')
    folder = hosts[0].disk/'runs/spoilt'
    folder.rename(folder.with_name('moved'))
    taken = ends(processes, 120)
    said = sentence(processes[1])
    holds('rank 0 on' in said and 'No such file' in said, said)
    print(f'        {said}')
    return f'{max(taken):.1f} s after the folder went away'


CHECKS = [numbers, trained, again, accelerated, other_data, no_data, clash, no_recipe, validating, killed, turned, first_killed, cable]


def worker(out):
    "On each rank of `numbers`: compare with one process that has all crops"
    import torch
    sys.path.insert(0, str(ROOT))
    from sportsreid.ranks import joined, said_by_all
    from sportsreid.toy import gradient_gaps, weight_gaps
    torch.set_num_threads(1)
    gradients, weights = gradient_gaps(), weight_gaps()
    found = said_by_all(dict(gradient=gradients['gathered'], weights=weights['gathered'], alone=weights['alone']))
    if joined()[0] == 0:
        Path(out).write_text(json.dumps({k: max(f[k] for f in found) for k in found[0]}))
    torch.distributed.destroy_process_group()


def make_worlds(box):
    "The data of both hosts, at another path on each, and other data"
    code = ('from sportsreid.simulate import simulate_broadcast as s\n'
            f's({str(box/"world")!r}, train=12, valid=3, test=3, challenge=0)\n'
            f's({str(box/"less")!r}, train=11, valid=3, test=3, challenge=0)')
    subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=True)


def put_worlds(box, hosts):
    global DATA, OTHER
    places = hosts[0].disk/'world', hosts[1].disk/'other-place/world'
    for place in places:
        shutil.copytree(box/'world', place, dirs_exist_ok=True)
    shutil.copytree(box/'less', hosts[1].disk/'other-place/less', dirs_exist_ok=True)
    DATA = [str(h.here/p.relative_to(h.disk)) for h, p in zip(hosts, places)]
    OTHER = str(hosts[1].here/'other-place/less')


def main():
    names = sys.argv[1:]
    if names[:1] == ['worker']:
        return worker(names[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))  # so that the hosts are closed
    real = namespaces_allowed() and '--folders' not in names
    print('two hosts as namespaces, with a cable' if real else
          'NOTE: namespaces are not allowed here; two folders of one machine stand for the hosts, and no cable is cut')
    wanted = [c for c in CHECKS if c.__name__ in names] or [c for c in CHECKS if real or c is not cable]
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        box = Path(tmp)
        make_worlds(box)
        for check in wanted:
            hosts, start = [(Namespace if real else Host)(box, i) for i in (0, 1)], time.monotonic()
            try:
                if real:
                    lay_cable(hosts)
                put_worlds(box, hosts)
                line = f'PASS {check.__doc__}: {check(box, hosts)}'
            except (Failed, OSError, subprocess.SubprocessError) as e:
                failed.append(check.__name__)
                line = f'FAIL {check.__doc__}\n{e}'
            finally:
                for host in hosts:
                    host.close()
            print(f'{line} ({time.monotonic()-start:.0f} s in all)', flush=True)
    print(f'{len(wanted)-len(failed)} passed, {len(failed)} failed: {", ".join(failed) or "none"}')
    sys.exit(bool(failed))


if __name__ == '__main__':
    main()
