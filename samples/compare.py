#!/usr/bin/env python3
"""The three systems of the post side by side: Gatys, Li & Wand, Champandard, on one pair of faces.

    python3 samples/compare.py                        the sample pair, in some minutes

makes one labelled picture and prints a table. Each method has its own default weights; all results are measured by the
same losses, with features scaled by `BALANCE`:

    own part   share of the 3x3 patches whose best style patch, by the features alone, lies in the same part of the map
    content    mean (f - g)^2 at conv4_2, g of the content picture
    patches    mean (patch of f - best patch of g)^2 at conv3_1 and conv4_1, g of the style picture
    Gram       1 / (4 C^2) sum (G - A)^2, the mean of conv1_1, 2_1, 3_1, 4_1, 5_1
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import doodle  # noqa: E402

TITLES = {'gatys': 'Gatys', 'li-wand': 'Li & Wand', 'champandard': 'Champandard'}
PATCHES, GRAMS, CONTENT = ['3_1', '4_1'], doodle.METHODS['gatys'][1]['style_layers'].split(','), '4_2'


def part_of(labels, shape, layer):
    """Classes of a map (H', W') at the centres of a layer's patches, row by row; `shape` is the layer's."""
    k = doodle.stride(layer)
    return labels[k // 2::k, k // 2::k][1:shape[0] - 1, 1:shape[1] - 1].ravel()


def measures(weights):
    """Compiled functions: picture, style (3, H, W), content's f -> losses, matches, shapes; and picture -> its f."""
    theano, T, square = doodle.theano, doodle.T, {k: s ** 2 for k, s in doodle.balance(weights.kind).items()}
    x, y, target = T.tensor3(), T.tensor3(), T.tensor3()
    names = list(dict.fromkeys([*GRAMS, *PATCHES, CONTENT]))
    network = doodle.build_network(weights, names, fast=True)
    f, g = doodle.features(network, x, names), doodle.features(network, y, names)
    j = [doodle.fast_match(doodle.unit(f[layer]), doodle.unit(g[layer]))[0] for layer in PATCHES]
    content = square[CONTENT] * doodle.content_loss(f[CONTENT], target)
    patches = [square[layer] * doodle.style_loss(f[layer], g[layer], matches) for layer, matches in zip(PATCHES, j)]
    grams = sum(square[layer] ** 2 * doodle.gram_loss(f[layer], doodle.gram(g[layer])) for layer in GRAMS) / len(GRAMS)
    shapes = [part[layer].shape for layer in PATCHES for part in (f, g)]
    return (theano.function([x, y, target], [content, *patches, grams, *j, *shapes]),
            theano.function([x], f[CONTENT]))


def table(rows, style, content, maps, weights):
    """Lines of Markdown, one for each of `rows`, {title: (H, W, 3) picture}."""
    measure, features = measures(weights)
    y, target = doodle.np.float32(doodle.to_planes(style)), features(doodle.np.float32(doodle.to_planes(content)))
    lines = ['| | own part, conv3_1 | own part, conv4_1 | content | patches, conv3_1 | patches, conv4_1 | Gram |',
             '|---|---|---|---|---|---|---|']
    for title, picture in rows.items():
        x = doodle.np.float32(doodle.to_planes(picture))
        loss, *patches, gram, j3, j4, f3, g3, f4, g4 = measure(x, y, target)
        shares = [100 * doodle.np.mean(part_of(maps.labels[0], f, layer) == part_of(maps.labels[1], g, layer)[j])
                  for layer, j, f, g in zip(PATCHES, (j3, j4), (f3, f4), (g3, g4))]
        cells = [f'{share:.0f} %' for share in shares] + [f'{max(0, each):,.0f}' for each in (loss, *patches)]
        lines.append(f'| {" | ".join([title, *cells, f"{gram:.1e}"])} |')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--content', type=doodle.parse_path, default=f'{ROOT}/samples/hopper.png',
                        help='with its map beside it')
    parser.add_argument('--style', type=doodle.parse_path, default=f'{ROOT}/samples/astronaut.png',
                        help='with its map beside it')
    parser.add_argument('--max-size', default='256', help='the longer side (default: 256)')
    parser.add_argument('--phases', default='3', help='(default: 3)')
    parser.add_argument('--iterations', default='100', help='in each phase (default: 100)')
    parser.add_argument('--rotations', default='1', help="Li & Wand's, 2 in the paper (default: 1)")
    parser.add_argument('--scales', default='1', help="Li & Wand's, 3 in the paper (default: 1)")
    parser.add_argument('--random-seed', default='1', help='(default: 1)')
    parser.add_argument('--weights', type=doodle.parse_path, help='as of doodle.py')
    parser.add_argument('--output', type=doodle.parse_path, default='comparison.jpg', help='(default: comparison.jpg)')
    a = parser.parse_args()
    common = [f'--{name.replace("_", "-")}={value}' for name, value in vars(a).items()
              if value and name not in ('output', 'rotations', 'scales')] + ['--save-every=0']
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in TITLES:
            copies = [f'--rotations={a.rotations}', f'--scales={a.scales}'] if method == 'li-wand' else []
            output, log = os.path.join(folder, method + '.png'), os.path.join(folder, method + '.json')
            subprocess.run([sys.executable, str(ROOT / 'doodle.py'), f'--method={method}', *common, *copies,
                            f'--output={output}', f'--log={log}'], check=True)
            doodle.import_pillow()
            results[method] = doodle.read_picture(output).pixels
            with open(log) as file:
                header, *evaluations = map(json.loads, file)
            seconds = sum(entry.get('seconds', 0) for entry in evaluations)             # none of what was skipped
            print(f'{TITLES[method]}: {seconds:.0f} s in all evaluations\n', flush=True)

    options = doodle.parse_options(['--method=champandard', *common, f'--output={a.output}'])
    with mock.patch.dict(os.environ):
        doodle.import_theano('cpu')
    content, style = (doodle.limited(doodle.read_picture(path).pixels, options.max_size, doodle.Image.LANCZOS)
                      for path in (a.content, a.style))
    pictures = (a.content, content), (a.style, style)
    maps = doodle.classify_maps([doodle.find_map(path, '_sem.png') for path, _ in pictures], pictures)
    panels = {TITLES[method]: picture for method, picture in results.items()}
    weights, _ = doodle.read_weights(header['weights']['path'])
    print('\n'.join(table({'the content itself': content, **panels}, style, content, maps, weights)))
    inputs = {'content': content, 'style': style, 'map of the content': maps.maps[0], 'map of the style': maps.maps[1]}
    figure = doodle.import_beside('samples/figure.py', 'compare.py')
    figure.labelled(inputs | panels, 4).save(a.output, quality=90)
    print(f'\nThe picture is {a.output}.')


if __name__ == '__main__':
    try:
        main()
    except doodle.UserError as error:
        sys.exit('ERROR: {}\n  FIX: {}.'.format(*error.args))
    except subprocess.CalledProcessError as error:                      # doodle.py has said why
        sys.exit(error.returncode)
