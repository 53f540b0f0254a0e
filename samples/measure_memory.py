"""Measure what runs take of memory at their peak, and fit doodle.py's `memory_needed` to it.

    python samples/measure_memory.py

Each run is the program in its own process, with random numbers in the shapes of VGG19 and pictures of noise. Prints
its peak and what `memory_needed` says, in MB; then the coefficients, by least squares of the relative errors. The peak
may be in three stages, and the runs are chosen so that it is known in which: the network is compiled, the features and
keys of all copies of the style are made, or the image is painted. On two cores it takes five minutes.
"""
import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SAMPLES = Path(__file__).resolve().parent
sys.path.insert(0, str(SAMPLES.parent))
import doodle  # noqa: E402

LI_WAND, GATYS, ONE = '--method=li-wand', '--method=gatys', ('--rotations=0', '--scales=0')
# The stage of the peak, width and height of content (None: a texture of 512x384) and style, options.
RUNS = [
    ('compile', (64, 48), (64, 48), ()), ('compile', (64, 48), (64, 48), (GATYS,)),
    ('compile', (64, 48), (64, 48), ('--style-layers=3_1', '--content-layers=3_1')),
    ('style', (64, 48), (1280, 960), ()), ('style', (64, 48), (1024, 768), (GATYS,)),
    ('style', (64, 48), (320, 240), (LI_WAND,)), ('style', (64, 48), (256, 192), ('--rotations=2', '--scales=3')),
    ('style', (64, 48), (320, 240), ('--rotations=1', '--scales=2')), ('style', (64, 48), (1280, 960), (LI_WAND, *ONE)),
    ('style', (64, 48), (1024, 768), (GATYS, '--style-layers=1_1,2_1')),
    ('paint', (512, 384), (128, 96), ()), ('paint', (640, 480), (320, 240), ()),
    ('paint', (512, 384), (128, 96), (GATYS,)), ('paint', (512, 384), (128, 96), (LI_WAND, *ONE)),
    ('paint', None, (96, 72), ('--style-layers=2_1',)),
    ('paint', (512, 384), (128, 96), ('--style-layers=5_1', '--content-layers=5_2')),
    ('paint', (512, 384), (96, 72), ('--style-layers=2_2,3_1,4_1',)),
    ('paint', (384, 288), (320, 240), ('--rotations=1', '--scales=1')),
    ('paint', (384, 288), (320, 240), (LI_WAND, '--rotations=1', '--scales=1')),
]
CHILD = '''
import sys, doodle
code = doodle.main(sys.argv[1:])
print(open('/proc/self/status').read())                                # its ru_maxrss might be the parent's
sys.exit(code)
'''


def save_weights(path):
    """Random numbers in the shapes of VGG19, as .npz."""
    rng, names = np.random.default_rng(0), doodle.layer_names('vgg19')
    arrays = {}
    for before, name in zip([3, *map(doodle.filters, names)], names):
        W = rng.standard_normal((doodle.filters(name), before, 3, 3), np.float32)
        arrays |= {f'conv{name}.W': W * np.float32(2 / 9 / before) ** .5, f'conv{name}.b': np.zeros(len(W), np.float32)}
    np.savez(path, **arrays)


def needed_and_peak(folder, content, style, *arguments, iterations=8):
    """Bytes that a run needs by `memory_needed`, and takes; `folder` has weights.npz. 7 evaluations fill L-BFGS."""
    for size in filter(None, (content, style)):
        picture = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
        doodle.Image.fromarray(picture).save(os.path.join(folder, '{}x{}.bmp'.format(*size)))
    given = '--content={}x{}.bmp'.format(*content) if content else '--output-size=512x384'
    arguments = ['--style={}x{}.bmp'.format(*style), given, '--weights=weights.npz', '--phases=1',
                 f'--iterations={iterations}', '--save-every=0', *arguments]
    done = subprocess.run([sys.executable, '-c', CHILD, *arguments], cwd=folder, capture_output=True, text=True,
                          check=True, env=os.environ | {'PYTHONPATH': str(SAMPLES.parent)})
    options = doodle.parse_options(arguments)
    return (doodle.memory_needed(content or options.output_size, style, options),
            1024 * int(re.search(r'VmHWM:\s+(\d+) kB', done.stdout)[1]), options)


def terms(stage, size, style_size, options):
    """{coefficient: what it is multiplied by} in this stage, as in `memory_needed`."""
    names = doodle.layer_names('vgg19', options.style_layers + (options.content_layers if options.content else []))
    weights = doodle.weight_bytes(names)
    if stage == 'compile':
        return {'compiler': 1, 'compiled weights': weights}
    network, style = map(doodle.feature_bytes, (names, options.style_layers))
    area, style_area = math.prod(size), math.prod(style_size)
    copied = doodle.copy_count(options) * style_area
    matched = style * doodle.style_term(options).arrays
    return {'program': 1, 'weights': weights} | {
        'style': {'style area': style_area, 'made style': style * copied, 'made matched': matched * copied},
        'paint': {'network': network * area, 'style': style * area, 'matched': matched * copied}}[stage]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    doodle.import_pillow()
    rows, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        save_weights(os.path.join(folder, 'weights.npz'))
        print(' peak  needed')
        for stage, content, style, arguments in RUNS:
            needed, peak, options = needed_and_peak(folder, content, style, *arguments,
                                                    iterations=8 if stage == 'paint' else 1)
            rows.append(terms(stage, content or options.output_size, style, options))
            peaks.append(peak)
            error = f'({needed / peak - 1:+.0%})'
            print(f'{peak / 1e6:5.0f}  {needed / 1e6:5.0f} {error:6} ', stage, content, style, *arguments, flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    A = np.array([[row.get(name, 0) for name in names] for row in rows]) / np.array(peaks)[:, None]
    scale = np.abs(A).max(axis=0)
    fit = np.linalg.lstsq(A / scale, np.ones(len(A)), rcond=None)[0] / scale
    print('\nFitted: ' + ', '.join(f'{name} {value:.3g}' for name, value in zip(names, fit)))
    print('Relative errors of the fit: ' + ', '.join(f'{error:+.0%}' for error in A @ fit - 1))


if __name__ == '__main__':
    main()
