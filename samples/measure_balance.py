"""Measure the factors on VGG16's features that bring its losses to the size of VGG19's.

    python samples/measure_balance.py VGG19 [--vgg16=PATH]

Prints for each layer the root of the ratio of VGG19's loss terms to VGG16's, the geometric mean over the `FIT`:
content and style terms at noise, and style terms at the content, at two sizes, without maps and with them. These are
doodle.py's `BALANCE`. Then the content's share of the loss at the first evaluation, in percent: of VGG19, of VGG16 as
it is, and of VGG16 scaled, for two choices of weights. The pairs left out of the fit come last. The bundled VGG16 ends
at conv5_1; for all 13 layers give the path of a whole one. On one core it takes six minutes.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np

SAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(SAMPLES.parent))
import doodle  # noqa: E402

# Pairs of content and style, from here, from the tests and from what scikit-image brings along.
FIT = [('hopper.png', 'astronaut.png'), ('astronaut.png', 'hopper.png'), ('church.jpg', 'auvers.png'),
       ('face_content.png', 'face_style.png'), ('auvers.png', 'coffee.png'), ('coffee.png', 'auvers.png'),
       ('astronaut.png', 'gravel.png'), ('rocket.jpg', 'hubble_deep_field.jpg')]
LEFT_OUT = [('raccoon.jpg', 'cat.jpg'), ('motorcycle_left.png', 'retina.jpg')]
SIZES = 120, 240                                                      # longest sides
WEIGHTS = (10, 25), (10, 10)                                          # of content and style: the defaults, the post's


def found(name):
    """The path of a picture, by its name."""
    from skimage import data
    folders = SAMPLES, SAMPLES.parent / 'tests/golden', Path(data.data_dir)
    return next(str(folder / name) for folder in folders if (folder / name).exists())


def evaluations(weights, names, maps, size):
    """{(pair, maps, size): evaluations at noise and at the content}, all weights 1, of the pairs that have `maps`."""
    layers = ','.join(names)
    options = doodle.parse_options(['--style=-', f'--content-layers={layers}', f'--style-layers={layers}',
                                    '--content-weight=1', '--style-weight=1'])
    objective, terms = doodle.Objective(weights, options, True, maps, True), {}
    for pair in FIT + LEFT_OUT:
        paths = [doodle.map_path(found(name), '_sem.png') for name in pair]
        if maps and not all(map(os.path.exists, paths)):
            continue
        pictures = [(found(name), doodle.limited(doodle.read_picture(found(name)).pixels, size, doodle.Image.LANCZOS))
                    for name in pair]
        channels = None, None
        if maps:
            classes, colours, labels, _ = doodle.classify_maps(paths, pictures)
            channels, _ = doodle.map_channels(colours, classes, labels)
        content, style = (doodle.to_planes(pixels) for _, pixels in pictures)
        objective.set_phase(content, style, *channels, content.shape[:0:-1])
        noise = np.random.default_rng(1).uniform(16, 240, content.shape)
        terms[pair, maps, size] = [objective(x) for x in (noise, content)]
    return terms


def ratio(ours, theirs, name):
    """The geometric mean of a layer's loss terms in one network over those in the other."""
    ratios = [getattr(ours[key][k], term)[name] / getattr(theirs[key][k], term)[name] for key in ours
              for term, k in (('content', 0), ('style', 0), ('style', 1))
              if key[0] in FIT and name in ours[key][0].style]
    return np.exp(np.mean(np.log(ratios)))


def share(evaluation, scales, content_weight, style_weight):
    """The content's share of the loss at `evaluation`, in percent, its terms scaled."""
    content = content_weight * scales.get('4_2', 1) ** 2 * evaluation.content['4_2']
    style = style_weight * sum(scales.get(name, 1) ** 2 * evaluation.style[name] for name in ('3_1', '4_1'))
    return 100 * content / (content + style + evaluation.smooth)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('vgg19')
    parser.add_argument('--vgg16', default=str(SAMPLES.parent / 'vgg16.npz'))
    options = parser.parse_args()
    doodle.import_pillow()
    doodle.import_theano('cpu')
    networks = [doodle.read_weights(path)[0] for path in (options.vgg19, options.vgg16)]
    doodle.BALANCE['vgg16'] = 13 * (1,)
    names, terms = list(networks[1].layers), ({}, {})
    for size in SIZES:
        deep = [name for name in names if size == SIZES[0] or name > '3']               # the others take too long
        for maps in (False, True):
            for weights, known in zip(networks, terms):
                known |= evaluations(weights, deep, maps, size)
    scales = {name: np.sqrt(ratio(*terms, name)) for name in names}
    print(', '.join(f'{name} {scale:.2f}' for name, scale in scales.items()))
    print('\n' + 12 * ' ' + ''.join(f'{f"content {c}, style {s}":<26}' for c, s in WEIGHTS))
    print('size  maps  ' + 2 * '  VGG19  VGG16 scaled    ')
    for key in sorted(terms[0], key=lambda key: (key[0] in LEFT_OUT, key[2], key[1])):
        first = [known[key][0] for known in terms]
        shares = [[share(e, s, *weights) for e, s in zip((*first, first[1]), ({}, {}, scales))] for weights in WEIGHTS]
        print(f'{key[2]:4}  {"with" if key[1] else "none"}  ' + '    '.join(
            '{:7.1f}{:7.1f}{:7.1f}'.format(*three) for three in shares), '  ' + ' in the style of '.join(key[0]))


if __name__ == '__main__':
    main()
