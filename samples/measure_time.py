"""Measure what evaluations take, and fit doodle.py's `COSTS` to it.

    python samples/measure_time.py [N]

With N only of the first N kinds of run. Each evaluation, of pictures of noise by random numbers in the shapes of VGG19,
is timed on one core, in turn with a matrix product. Prints the seconds of both, and what `COSTS` say; then the costs,
by least squares of the relative errors, for which the optimiser's step and the convolutions are timed alone, too. All
times are of the processor, so that other programs disturb little. On a quiet core it takes two minutes.
"""
import argparse
import os
import sys
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'                                     # before NumPy is imported
import numpy as np  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import doodle  # noqa: E402

GATYS, LI_WAND = '--method=gatys', '--method=li-wand'
# Options, and the sizes of content and style.
RUNS = [
    ([], [(128, 96), (256, 192), (512, 384)]),
    (['--matching=near'], [(256, 192), (512, 384)]),
    ([GATYS], [(256, 192), (512, 384)]),
    ([GATYS, '--style-layers=1_1', '--content-layers=1_1'], [(512, 384)]),
    ([GATYS, '--style-layers=2_1', '--content-layers=2_1'], [(512, 384)]),
    ([LI_WAND, '--rotations=0', '--scales=0'], [(384, 288)]),
    ([LI_WAND, '--rotations=1', '--scales=1'], [(192, 144)]),
]


def random_weights():
    """Random numbers in the shapes of VGG19."""
    rng, names = np.random.default_rng(0), doodle.layer_names('vgg19')
    return doodle.Weights('vgg19', {name: (
        rng.standard_normal((doodle.filters(name), before, 3, 3), np.float32) * np.float32(2 / 9 / before) ** .5,
        np.zeros(doodle.filters(name), np.float32)) for before, name in zip([3, *map(doodle.filters, names)], names)},
        '', '')


def took(function, *arguments):
    """Seconds of the processor."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def network(weights, names):
    """The compiled function of the convolutions there and back, of an image (3, H, W)."""
    x = doodle.T.tensor3()
    f = doodle.features(doodle.build_network(weights, names, True), x, names)
    return doodle.theano.function([x], doodle.theano.grad(sum(doodle.T.sum(output) for output in f.values()), x))


def measured(objective, convolve, size, rounds=3):
    """Seconds of an evaluation with its step, of the step, of convolutions, and of a product: medians, in turn."""
    rng, square = np.random.default_rng(0), np.ones((2048, 2048), np.float32)
    picture, style = rng.uniform(0, 255, (2, 3, *size[::-1]))
    semantic = rng.integers(0, 2, (64, 64, 3)) if objective.semantic else None
    for near in (False, True):                                          # its first phase is exact
        objective.set_phase(picture, style, semantic, semantic, size, None, near)
        minimiser = doodle.Minimiser(style if near else picture)
        objective(minimiser.ask())
        if objective.options.matching == 'exact':
            break
    doodle.return_freed_memory(picture[0].size)                         # as in a phase of a run
    times = []
    for _ in range(rounds):
        start = time.process_time()
        evaluation = objective(minimiser.ask())
        evaluated = time.process_time() - start
        step = took(minimiser.tell, evaluation.total, evaluation.gradient)
        times.append((evaluated + step, step, took(convolve, np.float32(style)), took(np.matmul, square, square)))
    return np.median(times, axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('count', metavar='N', nargs='?', type=doodle.parse_natural)
    count = parser.parse_args().count
    doodle.prepare_process()
    doodle.import_pillow()
    doodle.import_theano('cpu')
    doodle.NEAR_PAIRS = 1
    weights, rows, ratios = random_weights(), [], []
    print('evaluation  product  by COSTS')
    for arguments, sizes in RUNS[:count]:
        options = doodle.parse_options(['--style=-', '--content=-', *arguments])
        objective = doodle.Objective(weights, options, True, doodle.style_term(options).reads_maps, True)
        convolve = network(weights, objective.layers)
        for size in sizes:
            seconds, step, convolutions, product = measured(objective, convolve, size)
            amounts = doodle.work(size, size, options, phase=1)
            for part, took_part in ((('pixels',), step), (('products', 'transforms'), convolutions),
                                    (doodle.COSTS, seconds)):
                rows.append([amounts[name] * (name in part) for name in doodle.COSTS])
                ratios.append(took_part / product * 2048 ** 3)
            said = np.dot(rows[-1], list(doodle.COSTS.values())) / 2048 ** 3 * product
            print(f'{seconds:8.3f} s {product:6.3f} s {said:7.3f} s ({said / seconds - 1:+.0%})', *arguments, *size,
                  flush=True)
    A = np.array(rows) / np.array(ratios)[:, None]
    scale = np.maximum(A.max(axis=0), 1e-30)                            # a cost that no run has: 0
    fit, _ = nnls(A / scale, np.ones(len(A)))
    print('\nFitted: ' + ', '.join(f'{name!r}: {value:.3g}' for name, value in zip(doodle.COSTS, fit / scale)))
    print('Relative errors of the fit: ' + ', '.join(f'{error:+.0%}' for error in A / scale @ fit - 1))


if __name__ == '__main__':
    main()
