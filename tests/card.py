"""A card made of cuda_on_cpu.cpp, and the program's numbers by device, on which `compare` gives a verdict.

    python tests/card.py cuda0 NUMBERS.npz            what `evaluations` computes there, for test_cuda.py and gpu_kit.py
"""
import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np

import twin

HERE = Path(__file__).resolve().parent
LIBRARIES = 'cuda', 'nvrtc', 'cublas'


def build(folder):
    """Put the libraries of the card into `folder`, which LD_LIBRARY_PATH has to name."""
    subprocess.run(['g++', '-std=gnu++17', '-O3', '-shared', '-fPIC', '-U_FORTIFY_SOURCE', '-Wl,-soname,libcuda.so.1',
                    '-o', folder / 'libcuda.so.1', HERE / 'cuda_on_cpu.cpp', '-ldl'], check=True)
    for name in LIBRARIES:
        (folder / f'lib{name}.so').symlink_to('libcuda.so.1')


# ---- the program's numbers -------------------------------------------------------------------------------------------

# {name: (options, what there is besides a style)}
LAYERS = '--content-layers=2_1 --style-layers=2_1,3_1 '
CASES = {'semantic': ('--content-layers=4_2', 'content maps'),
         'variety': (LAYERS + '--variety=0.3 --slices=3', 'content maps'),
         'cache': (LAYERS + '--variety=0.3 --cache=1', 'content maps'),
         'copies': (LAYERS + '--rotations=1 --scales=1 --variety=0.1 --slices=2', 'content maps transparent'),
         'no maps': (LAYERS + '--slices=2 --smoothness=0', 'content'),
         'no content': (LAYERS, 'maps'),
         'no style': (LAYERS + '--style-weight=0', 'content'),
         'li-wand': (LAYERS + '--method=li-wand --rotations=1 --scales=1', 'content'),
         'li-wand alone': (LAYERS + '--method=li-wand --rotations=0 --scales=0 --variety=1 --slices=2', 'transparent'),
         'gatys': ('--method=gatys', 'content'),
         'gatys transparent': (LAYERS + '--method=gatys', 'transparent')}
IMAGES = 3                                                              # evaluated one after the other in each case


def scores(doodle, objective, x):
    """{layer: S (j, i)} of the patches in the next evaluation, which is that of `x`."""
    T, options, result = doodle.T, objective.options, {}
    features = dict(zip(objective.layers, objective.features(x)))
    for layer, term in objective.style.items():
        if not term.patched:
            continue
        f = T.tensor3()
        u, a = doodle.theano.function([f], [term.key(f), term.image_scale(term.key(f))])(features[layer])
        planes = (np.moveaxis(keys, 2, 0) / 3. for keys in (term.keys.get_value(), u))
        S, b = twin.scores(*planes), term.scale and term.scale.get_value()
        if term.scale:
            S *= np.outer(b, a)
        if term.history:
            first = objective.fresh and not options.cache
            S -= options.variety * (S.max(axis=1) if first else term.history.get_value())[:, None]
        if term.scale:
            S[b == 0] = -np.inf
        result[layer] = S
    return result


def evaluations(doodle, on_card, turn=None):
    """Names and arrays of all cases: losses, gradient, matches, history; on the CPU also the scores.

    Parameters
    ----------
    doodle : the program, with its device open
    on_card : bool
    turn : callable or None
        Makes the card's threads run from the last to the first, `turn(1)`, or not: each case is done both ways.
    """
    weights, _ = doodle.read_weights(str(HERE.parent / 'vgg16.npz'))
    for name, (arguments, given) in CASES.items():
        options, rng = doodle.parse_options(['--style=-', *arguments.split()]), np.random.default_rng(0)
        deep = '4_1' in options.style_layers                            # where an image of 48 has 6 pixels
        side, style_side = ((48, 51), (50, 48)) if deep else ((30, 26), (33, 28))
        content, *xs = rng.uniform(0, 255, (1 + IMAGES, 3, *side)).astype(np.float32)
        style = rng.uniform(0, 255, (3, *style_side)).astype(np.float32)
        maps = [255. * rng.integers(0, 2, (*size, 2)) if 'maps' in given else None for size in (side, style_side)]
        alpha = np.ones((*style_side, 1)) if 'transparent' in given else None
        if alpha is not None:
            alpha[:style_side[0] // 2] = 0
        objective = doodle.Objective(weights, options, 'content' in given, 'maps' in given, False, alpha is not None,
                                     options.slices or 1)
        for reverse in (0, 1) if turn else (0,):
            if turn:
                turn(reverse)
            objective.set_phase(content if 'content' in given else None, style, *maps, side[::-1], alpha)
            for k, x in enumerate(xs):
                at = f'{name} {reverse} {k}'
                if not on_card and not (k and options.cache):
                    yield from ((f'{at} scores {layer}', S) for layer, S in scores(doodle, objective, x).items())
                found = objective(x)
                yield f'{at} losses', [*found.content.values(), *found.style.values(), found.smooth]
                yield f'{at} gradient', found.gradient
                yield from ((f'{at} {variable}', values) for variable, values in objective.state().items())


def compare(cpu, card, name):
    """How much the `evaluations` of a case differ on a CPU and a card.

    Returns
    -------
    losses, gradient : float
        Largest differences, relative to each loss and to the gradient's largest value, where all matches are the same.
    lack : float
        How much less than the best score a match of the card has: about 0 where it differs by a tie.
    compared : int
        Number of evaluations where all matches are the same.
    """
    losses = gradient = lack = compared = 0
    for at in (f'{name} 0 {k}' for k in range(IMAGES)):
        keys = [key for key in cpu if key.startswith(f'{at} matches')]
        for key in keys:
            if (S := cpu.get(key.replace('matches', 'scores'))) is not None:
                lack = max(lack, (S.max(axis=0) - S[card[key], np.arange(S.shape[1])]).max())
        if all((cpu[key] == card[key]).all() for key in keys):
            (a, g), (b, h) = ((arrays[f'{at} losses'], arrays[f'{at} gradient']) for arrays in (cpu, card))
            losses = max(losses, (abs(b - a) / np.maximum(abs(a), 1e-30)).max())
            gradient = max(gradient, abs(h - g).max() / abs(g).max())
            compared += 1
    return losses, gradient, lack, compared


if __name__ == '__main__':
    import doodle as program
    device, path = sys.argv[1:]
    program.import_pillow()
    assert program.import_theano(device) == (device, None), 'not this device'
    turn = device != 'cpu' and getattr(ctypes.CDLL('libcuda.so.1'), 'emu_reverse', None)    # a real card cannot turn
    np.savez(path, **dict(evaluations(program, device != 'cpu', turn)))
