"""Measure the automatic maps of pictures against their painted ones.

    python samples/measure_maps.py                                       # all portraits with painted maps
    python samples/measure_maps.py a.png b.png [--parts=4,6,8]           # two pictures, by clustering
    python samples/measure_maps.py a.png b.png --swap                    # where the patches of a swap come from

For portraits: the accuracy of the pixels, and for each part the intersection over union with the painted one (a collar
counts as clothes, ears as skin). Beside it the accuracy of clustering, whose parts are given the names that suit best.

For two pictures: the adjusted Rand index within each picture, and the agreement between them, both ways: the share of
one picture's area whose automatic label is the majority label of the same painted part in the other one. The baseline
is k-means on the colours of each picture alone, with labels matched by the nearest colour.

For a swap: the share of the patches whose match lies in the same painted part, with painted and with automatic maps.
"""
import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

SAMPLES = Path(__file__).resolve().parent
sys.path[:0] = [str(SAMPLES.parent), str(SAMPLES)]
HELD_OUT = 'biden', 'morisot'                                           # nothing was tuned to these


# ---- portraits -------------------------------------------------------------------------------------------------------

def part_labels(colours):
    """The numbers of `automaps.NAMES` of a map (H, W, 3) in the colours of `doodle.PARTS`."""
    import doodle
    merged = dict(collar='clothes', ears='skin')
    names = doodle.import_automaps().NAMES
    codes, labels = doodle.colour_codes(colours), np.full(colours.shape[:2], -1)
    for name, colour in doodle.PARTS.items():
        labels[codes == int(doodle.colour_codes(np.array(colour)))] = names.index(merged.get(name, name))
    return labels


def overlaps(labels, painted):
    """Of each painted part the intersection over union, {number: 0 .. 1}."""
    return {int(part): ((labels == part) & (painted == part)).sum() / ((labels == part) | (painted == part)).sum()
            for part in np.unique(painted)}


def best_named(labels, painted):
    """Labels of other parts, each as the painted one that it covers most."""
    named = np.zeros_like(painted)
    for label in np.unique(labels):
        named[labels == label] = np.bincount(painted[labels == label]).argmax()
    return named


def measure_portraits(weights):
    """Print a table of all portraits in this folder that have painted maps."""
    import doodle
    automaps = doodle.import_automaps()
    paths = [path for path in sorted([*SAMPLES.glob('*'), *SAMPLES.glob('portraits/*')])
             if path.suffix in ('.png', '.jpg') and Path(doodle.map_path(str(path), '_sem.png')).is_file()]
    pictures = {path.stem: doodle.read_picture(str(path)).pixels for path in paths}
    painted = {path.stem: part_labels(doodle.read_picture(doodle.map_path(str(path), '_sem.png')).pixels)
               for path in paths}
    portraits = [name for name, labels in painted.items() if labels.min() >= 0 and automaps.CLOTHES in labels]
    names, rows = [name for name in automaps.NAMES if name != 'ears'], {}
    print(f'{"":<20}{"clustering":>11}{"accuracy":>9}' + ''.join(f'{name[:10]:>11}' for name in names))
    for name in portraits:
        other = next(other for other in portraits[::-1] if other != name)
        maps = automaps.clustered_maps([pictures[name], pictures[other]], [None, None], automaps.COUNT, weights, True)
        clustered = best_named(doodle.colour_codes(maps[0]), painted[name])
        labels = automaps.portrait_parts(pictures[name], automaps.faces.find_faces(pictures[name])[0].points)
        labels[labels == automaps.EARS] = automaps.SKIN
        found = overlaps(labels, painted[name])
        row = [(clustered == painted[name]).mean(), (labels == painted[name]).mean(),
               *(found.get(automaps.NAMES.index(part), np.nan) for part in names)]
        rows[name] = row
        print_row(name + ' (held out)' * (name in HELD_OUT), row)
    print_row('mean', np.nanmean(list(rows.values()), axis=0))


def print_row(name, values):
    """One line of the table of portraits; a part that is not there is a dash."""
    cells = ['-' if np.isnan(value) else f'{value:.2f}' for value in values]
    print(f'{name:<20}{cells[0]:>11}{cells[1]:>9}' + ''.join(f'{cell:>11}' for cell in cells[2:]), flush=True)


# ---- two pictures, by clustering -------------------------------------------------------------------------------------

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


def measure_clustering(names, counts, weights):
    """Print a line for each number of parts, and one for a map completed from the other."""
    import doodle
    automaps = doodle.import_automaps()
    pictures = [doodle.read_picture(str(SAMPLES / name)).pixels for name in names]
    painted = [doodle.read_picture(doodle.map_path(str(SAMPLES / name), '_sem.png')).pixels for name in names]
    codes = [doodle.colour_codes(colours) for colours in painted]
    print('               ARI     ARI  agreement       mean')

    def line(name, values):
        print(f'{name:<12}' + ''.join(f'{value:8.2f}' for value in (*values, (values[2] + values[3]) / 2)), flush=True)
    for count in counts:
        maps = automaps.clustered_maps(pictures, [None, None], count, weights, True)
        line(f'{count} parts', figures([doodle.colour_codes(colours) for colours in maps], codes))
        line('  baseline', np.mean([figures(by_colour(pictures, count, seed), codes) for seed in range(5)], axis=0))
    for k, parts in ((0, automaps.COUNT), (0, 'auto'), (1, automaps.COUNT), (1, 'auto')):
        given = [painted[0], None] if k == 0 else [None, painted[1]]
        done = automaps.automatic_maps(names, pictures, given, parts, lambda: (weights, True))
        right = (doodle.colour_codes(done.maps[1 - k]) == codes[1 - k]).mean()
        print(f'{names[1 - k]} completed from the map of {names[k]}, --auto-maps={parts}: {right:.2f} as painted')


# ---- a swap ----------------------------------------------------------------------------------------------------------

def right_patches(options, painted, weights):
    """The share of the patches at each style layer whose match lies in the same painted part, after a run.

    Parameters
    ----------
    options : argparse.Namespace
        Of the run, whose output is there.
    painted : list of two (H, W) int arrays
        The parts of content and style.
    """
    import compare
    import doodle
    inputs, _ = doodle.read_inputs(options)
    objective = doodle.Objective(weights, options, True, True, True)
    planes = [doodle.to_planes(picture) for picture in (inputs.content, inputs.style)]
    objective.set_phase(*planes, inputs.content_map, inputs.style_map, inputs.size)
    objective(doodle.to_planes(doodle.read_picture(options.output).pixels))
    shares = []
    for layer, term in objective.style.items():
        content, style = (compare.part_of(labels, [side // doodle.stride(layer) for side in labels.shape], layer)
                          for labels in painted)
        shares.append((content == style[term.matches.get_value()]).mean())
    return shares


def measure_swap(names, weights, weights_path):
    """Print the shares of right patches of a swap with painted and with automatic maps."""
    import doodle
    for kind in ('painted', 'automatic'):
        with tempfile.TemporaryDirectory() as folder:
            files = [shutil.copy(SAMPLES / name, folder) for name in names]
            maps = [doodle.map_path(str(SAMPLES / name), '_sem.png') for name in names]
            if kind == 'painted':
                for path in maps:
                    shutil.copy(path, folder)
            arguments = [f'--content={files[0]}', f'--style={files[1]}', f'--output={folder}/out.png', '--auto-maps',
                         f'--weights={weights_path}', '--max-size=240', '--iterations=50', '--random-seed=1',
                         '--save-every=0', '--print-every=0']
            if doodle.main(arguments):
                sys.exit(1)
            options = doodle.parse_options(arguments)
            size = [doodle.limited_size(doodle.read_picture(path).pixels.shape[1::-1], 240) for path in files]
            painted = [part_labels(doodle.resized(doodle.read_picture(path).pixels, side, 0))
                       for path, side in zip(maps, size)]
            print(f'{kind}: ' + ', '.join(f'{share:.3f}' for share in right_patches(options, painted, weights)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('pictures', nargs='*', metavar='PICTURE', help='two pictures of this folder with painted maps')
    parser.add_argument('--parts', default='4,5,6,8,10', help='numbers of parts (default: %(default)s)')
    parser.add_argument('--swap', action='store_true', help='make a swap, and tell where its patches come from')
    parser.add_argument('--weights', type=os.path.expanduser, default=str(SAMPLES.parent / 'vgg16.npz'))
    options = parser.parse_args()
    if len(options.pictures) not in (0, 2):
        parser.error('give two pictures, or none')
    import doodle
    doodle.import_pillow()
    doodle.import_theano('cpu')
    weights, _ = doodle.read_weights(options.weights)
    if options.swap:
        measure_swap(options.pictures, weights, options.weights)
    elif options.pictures:
        measure_clustering(options.pictures, map(int, options.parts.split(',')), weights)
    else:
        measure_portraits(weights)


if __name__ == '__main__':
    main()
