"""Kill a run at random moments, resume it each time, and count what was lost.

    python tests/kill.py [--kills=50] [--seed=0] [--every=3] [other options of doodle.py]

After each SIGKILL every picture in the folder must open, the checkpoint must load, and the log must not be ahead of it
by more than `every` evaluations. At the end every loss and the picture must be those of a run that nobody killed.
"""
import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FACES = ['--style=face_style.png', '--content=face_content.png', '--network=vgg16', '--variety=0.1', '--output=o.png',
         '--log=log', '--random-seed=5', '--stop-when-converged=0', '--resume']


def start(folder, arguments):
    """The program as a process, which writes to `out`."""
    with open(folder / 'out', 'a') as out:
        return subprocess.Popen([sys.executable, ROOT / 'doodle.py', *FACES, *arguments], cwd=folder, stdout=out,
                                stderr=out)


def logged(folder):
    """(phase, evaluation, loss) of the log's whole lines, without its first."""
    lines = (folder / 'log').read_text().splitlines(keepends=True)[1:] if (folder / 'log').exists() else []
    entries = [json.loads(line) for line in lines if line.endswith('\n')]
    return [(entry['phase'], entry['evaluation'], entry['total']) for entry in entries]


def checkpoint(folder):
    """How many evaluations are in the checkpoint; it loads, or there is none."""
    path = folder / 'o.png.checkpoint'
    if not path.exists():
        return 0
    with open(path, 'rb') as file:
        checksum, rest = file.readline().split()[-1].decode(), file.read()
    assert hashlib.sha256(rest).hexdigest() == checksum
    return json.loads(rest.split(b'\n', 1)[0])['number']


def check_whole(folder):
    """Every picture opens; returns how many temporary files the kill left."""
    names = [path for path in folder.rglob('*') if path.is_file()]
    hidden = [path for path in names if path.name.startswith('.')]
    for path in set(names) - set(hidden):
        if path.suffix == '.png':
            Image.open(path).load()
    return len(hidden)


def kills(count, seed, every, arguments, folder, say=print):
    """Kill `count` times after evaluations drawn at random, and finish; what was lost each time, and the losses."""
    draw, arguments = random.Random(seed), [*arguments, f'--save-every={every}']
    for path in (ROOT / 'tests/golden').glob('face*.png'):
        shutil.copy(path, folder)
    lost, ended = [], False
    for number in range(count):
        before, since = len(logged(folder)), time.time()
        process = start(folder, arguments)
        wanted, late = draw.randint(0, 3 * every), draw.random() * draw.choice([.02, .2])
        early = draw.random() * 4 if draw.random() < .2 else None              # while it starts, with nothing done
        while process.poll() is None:
            done = logged(folder)
            if early is not None and time.time() - since > early or len(done) > checkpoint(folder) + every + 1:
                break
            if early is None and time.time() - since > .5 and len(done) != before and len(done) - before >= wanted:
                time.sleep(late)
                break
            if len(done) < before:                                             # it cut the log: it goes on
                before = len(done)
            time.sleep(.002)
        process.kill()
        ended = process.wait() == 0
        if ended:
            say(f'It ended before kill {number + 1}.')
            break
        left = check_whole(folder)
        lost.append(len(logged(folder)) - checkpoint(folder))
        say(f'kill {number + 1:>3} at {time.time() - since:5.1f}s: {len(logged(folder)):>4} evaluations, '
            f'{lost[-1]} lost, {left} temporary files left')
        assert 0 <= lost[-1] <= every, f'{lost[-1]} evaluations lost'
    if not ended:
        assert start(folder, arguments).wait() == 0, (folder / 'out').read_text()
    return SimpleNamespace(lost=lost, log=logged(folder), left=check_whole(folder))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--every', type=int, default=3)
    options, arguments = parser.parse_known_args()
    arguments = arguments or ['--phases=2', '--iterations=300']
    with tempfile.TemporaryDirectory() as killed, tempfile.TemporaryDirectory() as whole:
        result = kills(options.kills, options.seed, options.every, arguments, Path(killed))
        reference = kills(0, 0, options.every, arguments, Path(whole))
        pictures = [(Path(folder) / 'o.png').read_bytes() for folder in (killed, whole)]
    print(f'{len(result.lost)} kills: at most {max(result.lost)} evaluations lost at once, {sum(result.lost)} in all; '
          f'{result.left} temporary files left.')
    assert result.log == reference.log, 'other losses than without kills'
    assert pictures[0] == pictures[1], 'another picture than without kills'
    print(f'All {len(result.log)} losses and the picture are those of a run without kills.')


if __name__ == '__main__':
    main()
