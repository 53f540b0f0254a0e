"""Damage and forge checkpoints at random, resume from each in a process of its own, and count what comes of it.

    python tests/fuzz_checkpoints.py [--count=2000] [--seed=0]

What is damaged must be refused, or paint what the whole one paints. What is forged has a right checksum: if all its
values are possible, nobody can tell it from a true one, but it may neither crash the program nor write beyond an array.
"""
import argparse
import collections
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import doodle

HEIGHT, WIDTH = 12, 10
DAMAGES = ('zeroed', 'swapped', 'cut', 'flipped', 'grown', 'moved')
VALUES = -1, -2**31, 2**31 - 1, 2**20, 1, 0, 5, 6, 1e300, -1e300, float('nan'), float('inf'), 1e-320
WORDS = None, True, '', '\033[31m', '../..', -1, 10**30, 1.5, [], {}, [[1]], float('nan')


def loss(x):
    """A loss with many line searches, and its gradient."""
    y = (x - 100) / 50
    difference = y[:, 1:] - y[:, :-1] ** 2
    gradient = np.zeros_like(y)
    gradient[:, 1:] += 200 * difference
    gradient[:, :-1] -= 400 * difference * y[:, :-1] - 2 * (y[:, :-1] - 1)
    return float((100 * difference ** 2).sum() + ((y[:, :-1] - 1) ** 2).sum()), gradient / 50


def go_on(minimiser):
    """The images of the next evaluations, as bytes."""
    images = []
    for _ in range(12):
        images.append(minimiser.ask().tobytes())
        try:
            minimiser.tell(*loss(minimiser.ask()))
        except FloatingPointError as error:
            try:
                minimiser.recover(error)
            except FloatingPointError:
                break
    return images


def made(folder):
    """Header, path and next images of a run stopped after so many evaluations."""
    doodle.import_pillow()
    doodle.lbfgsb = __import__('scipy.optimize', fromlist=['_lbfgsb'])._lbfgsb
    options = doodle.parse_options(['--style=-', '--phases=2', '--iterations=40', f'--frames={folder}', '--cache=1'])
    picture = np.zeros((2 * HEIGHT, 2 * WIDTH, 3), np.uint8)
    inputs = doodle.Inputs(picture, None, picture, None, None, (2 * WIDTH, 2 * HEIGHT), None, None)
    header = doodle.provenance(inputs, doodle.Weights('vgg16', {}, 'a file', 'its checksum'), options)
    header['random_seed'] = 3
    for number in (1, 2, 4, 9, 25, 40):
        minimiser = doodle.Minimiser(np.random.default_rng(number).uniform(0, 255, (3, HEIGHT, WIDTH)))
        for _ in range(number):
            minimiser.tell(*loss(minimiser.ask()))
        matches = {'matches 3_1': np.arange(9), 'history 3_1': np.zeros(7, np.float32), 'fresh': np.array(False)}
        path = os.path.join(folder, str(number))
        losses, restarts = [(k, 3., 2., 1.) for k in range(number)], {minimiser.restart() or '': [1, 9.]}
        doodle.write_checkpoint(path, doodle.Checkpoint(header, 0, number, number, 9., folder, minimiser, matches,
                                                        losses, restarts, starts=[0]))
        more = {'iterations': 40 + number % 2}                          # what some go on with
        yield header | {'options': header['options'] | more}, path, go_on(minimiser)


def outcome(path, header, images):
    """What comes of resuming in a process of its own: refused, identical, another, or how it died."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        signal.alarm(60)
        try:
            with np.errstate(all='ignore'):
                at, _ = doodle.find_checkpoint(path, header, True)
                found = go_on(at.minimiser)
            np.zeros(1 << 20).sum()                                     # a heap that is broken shows itself
            os._exit(1 if found == images else 2)
        except doodle.UserError as error:
            os._exit(0 if all(part.isprintable() for part in error.args) else 3)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(4)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f'died of signal {os.WTERMSIG(status)}'
    return ('refused', 'identical', 'another', 'not printable', 'traceback')[os.WEXITSTATUS(status)]


def damaged(whole, draw):
    """The bytes of a checkpoint after an accident."""
    kind, size = draw.choice(DAMAGES), len(whole)
    at, other, length = draw.randrange(size), draw.randrange(size), draw.choice((1, 8, 512, 4096))
    length = min(length, size - max(at, other))
    block, second = whole[at:at + length], whole[other:other + length]
    if kind == 'zeroed':
        return whole[:at] + bytes(length) + whole[at + length:]
    if kind == 'swapped' and abs(at - other) >= length:
        (at, first), (other, last) = sorted(((at, second), (other, block)))
        return whole[:at] + first + whole[at + length:other] + last + whole[other + length:]
    if kind == 'flipped':
        return whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:]
    if kind == 'grown':
        return whole[:at] + draw.randbytes(length) + whole[at:]
    if kind == 'moved':
        return whole[:at] + whole[at + length:] + block
    return whole[:at]


def forged(whole, draw):
    """The bytes of a checkpoint of which somebody changed some fields, and made the checksum right."""
    head, line, rest = whole.split(b'\n', 2)
    numbers, arrays, place = json.loads(line), {}, 0
    for name, (kind, shape) in numbers['arrays'].items():
        arrays[name] = np.frombuffer(rest, kind, int(np.prod(shape)), place).reshape(shape).copy()
        place += arrays[name].nbytes
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        name = draw.choice(list(arrays))
        array = arrays[name]
        way = draw.randrange(5)
        if way == 0:
            place = numbers
            for _ in range(draw.randrange(3)):
                inner = [value for value in place.values() if isinstance(value, dict) and value]
                place = draw.choice(inner or [numbers])
            key = draw.choice(list(place))
            place[key] = draw.choice(WORDS)
            if draw.random() < .3:
                del place[key]
        elif way == 1:
            with np.errstate(all='ignore'):
                other = array.astype(draw.choice(('f4', 'i8', 'f8', 'i4', 'u1', '>f8')))
            arrays[name] = draw.choice((array[:-1], np.concatenate([array, array]), array[None], array.ravel(), other,
                                        array[:0]))
        elif array.size:
            spot = draw.randrange(array.size) if way < 4 else slice(None)
            with np.errstate(all='ignore'):
                array.ravel()[spot] = np.array(draw.choice(VALUES)).astype(array.dtype)
    if isinstance(numbers.get('arrays'), dict):
        numbers['arrays'] = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        if draw.random() < .1:
            numbers['arrays'][name] = draw.choice((('|O', [3]), ('<f8', [-1]), ('<f8', [2**62]), ('<f8', []),
                                                   ('<f8', 1), ('<f8', ['1']), ('<f8', [1.5]), None, ('<U9', [1])))
    rest = json.dumps(numbers).encode() + b'\n' + b''.join(array.tobytes() for array in arrays.values())
    return head.rsplit(b' ', 1)[0] + f' {doodle.hashlib.sha256(rest).hexdigest()}\n'.encode() + rest


def fuzz(count, seed):
    """Counts of outcomes, of `count` damaged and of `count` forged checkpoints."""
    draw, counts = random.Random(seed), {'damaged': collections.Counter(), 'forged': collections.Counter()}
    with tempfile.TemporaryDirectory() as folder:
        wholes = [(header, open(path, 'rb').read(), images) for header, path, images in made(folder)]
        path = os.path.join(folder, 'checkpoint')
        for _ in range(count):
            header, whole, images = draw.choice(wholes)
            for change in (damaged, forged):
                with open(path, 'wb') as file:
                    file.write(change(whole, draw))
                counts[change.__name__][outcome(path, header, images)] += 1
    return SimpleNamespace(**counts)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--count', type=int, default=2000)
    parser.add_argument('--seed', type=int, default=0)
    given = parser.parse_args()
    for changed, found in vars(fuzz(given.count, given.seed)).items():
        print(f'{given.count} {changed}: ' + ', '.join(f'{number} {what}' for what, number in found.most_common()))
