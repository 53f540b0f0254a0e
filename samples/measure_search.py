"""Measure what `--line-search=held` gains: the loss against the evaluations and against the seconds.

    python samples/measure_search.py --weights=VGG19 [--runs=faces,painting] [--sizes=96,160] [--seeds=1,2]
                                     [--phases=2] [--iterations=400] [--pictures=FOLDER]

For each run, size and seed one phase after the other, with new matches at each step and with matches held, in turn in
one process. Each row is of the last phase: the run, its longer side, the seed, the evaluation; then for fresh and for
held the loss over 1000 of the image that would be the result, with new matches in both, and the processor's seconds in
all evaluations so far; last what held gains in the loss, in percent, at as many evaluations and at as many seconds.
With --pictures the results are written side by side.
"""
import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(SAMPLES.parent))
import doodle  # noqa: E402

BOTH = '--style={}', '--content={}', '--content-weight=10', '--style-weight=10'
RUNS = {                                                              # name: (pictures, options)
    'faces': (('astronaut.png', 'hopper.png'), BOTH), 'faces-back': (('hopper.png', 'astronaut.png'), BOTH),
    'painting': (('auvers.png', 'church.jpg'), BOTH), 'without-maps': (('auvers.png', 'church.jpg'), (
        *BOTH, '--semantic-weight=0')),
    'animals': (('cat.jpg', 'raccoon.jpg'), BOTH), 'li-wand': (('astronaut.png', 'hopper.png'), (
        *BOTH[:2], '--method=li-wand', '--rotations=0', '--scales=0')),
    'doodle': (('auvers.png', 'my_village.png'), ('--style={}', '--output={}')),
    'texture': (('gravel.png',), ('--style={}', '--semantic-weight=0')),
}
TOLD = 25, 50, 100, 150, 200, 300, 400, 600, 800, 1000                # evaluations


def painted(objective, inputs, options, seed):
    """Paint; the result, and for each evaluation of the last phase (number, loss of the image so far, seconds)."""
    losses, rows, spent, since = {}, [], 0, time.process_time()       # losses with new matches, by image

    def record(at, x, evaluation, _):
        nonlocal spent, since
        spent += time.process_time() - since
        if not at.minimiser.held():
            losses[np.float32(x).tobytes()] = evaluation.total
        if at.phase == options.phases - 1:
            rows.append((at.evaluation, losses[np.float32(at.minimiser.image).tobytes()], spent))
        since = time.process_time()
    journal = SimpleNamespace(record=record, begin=lambda *_: losses.clear(), warn=print, keep=lambda _: None,
                              save=lambda *_, **__: None)
    at = doodle.Checkpoint({'random_seed': seed})
    doodle.paint(objective, inputs, options, at, journal, SimpleNamespace(heard=contextlib.nullcontext))
    return doodle.to_pixels(at.minimiser.image, inputs.size), rows


def gain(fresh, held):
    """What `held` gains on `fresh` in the loss, in percent, at each evaluation's seconds."""
    seconds, losses = ([row[k] for row in fresh] for k in (2, 1))
    return [100 * (1 - loss / np.interp(spent, seconds, losses)) for _, loss, spent in held]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('runs', ','.join(RUNS)), ('sizes', '96,160,240'), ('seeds', '1,2'), ('phases', '2'),
                          ('iterations', '400'), ('weights', None), ('pictures', None)):
        parser.add_argument(f'--{name}', default=default)
    given = parser.parse_args()
    doodle.import_pillow()
    doodle.import_theano('cpu')
    print(f'{"run":<13}size seed    at   fresh (s)          held (s)          gain: evaluations seconds')
    for name in given.runs.split(','):
        pictures, arguments = RUNS[name]
        arguments = [text.format(SAMPLES / picture) for text, picture in zip(arguments, pictures)] + list(
            arguments[len(pictures):])
        for size in given.sizes.split(','):
            objectives = {}
            for seed in map(int, given.seeds.split(',')):
                found = {}
                for search in ('fresh', 'held'):
                    options = doodle.parse_options([
                        *arguments, f'--max-size={size}', f'--phases={given.phases}', f'--line-search={search}',
                        f'--iterations={given.iterations}', '--stop-when-converged=0',
                        *[f'--weights={given.weights}'] * bool(given.weights)])
                    inputs, _ = doodle.read_inputs(options)
                    if search not in objectives:
                        objectives[search] = doodle.Remembered(doodle.Objective(
                            doodle.find_weights(options)[0], options, inputs.content is not None,
                            inputs.style_map is not None, True, inputs.style_alpha is not None), options, 1e9)
                    found[search] = painted(objectives[search], inputs, options, seed)
                (picture, fresh), (other, held) = found.values()
                for row, held_row, by_seconds in zip(fresh, held, gain(fresh, held)):
                    if row[0] not in TOLD:
                        continue
                    print(f'{name:<13}{size:>4} {seed:>4} {row[0]:>5}   ' + '   '.join(
                        f'{loss / 1000:8.2f} {spent:6.1f}' for _, loss, spent in (row, held_row)) +
                        f'   {100 * (1 - held_row[1] / row[1]):+6.2f}   {by_seconds:+6.2f}', flush=True)
                if given.pictures:
                    os.makedirs(given.pictures, exist_ok=True)
                    doodle.Image.fromarray(np.hstack([picture, other])).save(
                        os.path.join(given.pictures, f'{name}_{size}_{seed}.png'))


if __name__ == '__main__':
    main()
