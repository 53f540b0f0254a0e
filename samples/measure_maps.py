"""Measure the automatic maps of sample pictures against their painted ones.

    python samples/measure_maps.py astronaut.png hopper.png [--parts=4,6,8] [--weights=PATH]

Prints for each number of parts the adjusted Rand index within each picture, and the agreement between them, both ways:
the share of one picture's area whose automatic label is the majority label of the same painted part in the other one.
The baseline is k-means on the colours of each picture alone, with labels matched by the nearest colour.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

SAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(SAMPLES.parent))


def rand_index(a, b):
    """The adjusted Rand index of two labellings of the same pixels (Hubert, Arabie 1985)."""
    _, a = np.unique(a.ravel(), return_inverse=True)
    _, b = np.unique(b.ravel(), return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    together, first, second, all_pairs = ((n * (n - 1) / 2).sum() for n in (
        table, table.sum(axis=1), table.sum(axis=0), table.sum()))
    expected = first * second / all_pairs
    return (together - expected) / ((first + second) / 2 - expected)


def agreement(labels, painted):
    """The share of picture 1 whose label is the majority label of the same painted part in picture 0."""
    right = area = 0
    for part in np.intersect1d(*painted):
        values, counts = np.unique(labels[0][painted[0] == part], return_counts=True)
        found = labels[1][painted[1] == part]
        right, area = right + (found == values[counts.argmax()]).sum(), area + found.size
    return right / area


def by_colour(pictures, count, seed=0):
    """The baseline: k-means on the Lab colours of each picture alone, labels matched by the nearest colour."""
    from skimage import color
    labels, centres = [], []
    for picture in pictures:
        lab = color.rgb2lab(picture).reshape(-1, 3)
        rng = np.random.default_rng(seed)
        centre, _ = kmeans2(lab[rng.choice(len(lab), 10_000)], count, minit='++', iter=50, seed=rng)
        labels.append(cdist(lab, centre).argmin(axis=1).reshape(picture.shape[:2]))
        centres.append(centre)
    return labels[0], cdist(centres[1], centres[0]).argmin(axis=1)[labels[1]]


def figures(labels, painted):
    """Rand index of picture 0 and 1, agreement from 0 to 1 and from 1 to 0."""
    return [rand_index(a, b) for a, b in zip(labels, painted)] + [
        agreement(labels, painted), agreement(labels[::-1], painted[::-1])]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('pictures', nargs=2)
    parser.add_argument('--parts', default='4,5,6,8,10')
    parser.add_argument('--weights', type=os.path.expanduser, default=str(SAMPLES.parent / 'vgg16.npz'))
    options = parser.parse_args()
    import doodle
    doodle.import_pillow()
    doodle.import_theano('cpu')
    automaps = doodle.import_automaps()
    weights, _ = doodle.read_weights(options.weights)
    pictures = [doodle.read_picture(SAMPLES / name).pixels for name in options.pictures]
    painted = [doodle.read_picture(doodle.map_path(SAMPLES / name, '_sem.png')).pixels for name in options.pictures]
    codes = [doodle.colour_codes(colours) for colours in painted]
    print('               ARI     ARI  agreement       mean')

    def line(name, values):
        print(f'{name:<12}' + ''.join(f'{value:8.2f}' for value in (*values, (values[2] + values[3]) / 2)), flush=True)
    for count in map(int, options.parts.split(',')):
        maps = automaps.automatic_maps(pictures, [None, None], count, weights, True)
        line(f'{count} parts', figures([doodle.colour_codes(colours) for colours in maps], codes))
        line('  baseline', np.mean([figures(by_colour(pictures, count, seed), codes) for seed in range(5)], axis=0))
    for k in (0, 1):
        given = [painted[0], None] if k == 0 else [None, painted[1]]
        maps = automaps.automatic_maps(pictures, given, 0, weights, True)
        print(f'{options.pictures[1 - k]} completed from the map of {options.pictures[k]}: '
              f'{(doodle.colour_codes(maps[1 - k]) == codes[1 - k]).mean():.2f} as painted')


if __name__ == '__main__':
    main()
