"""What the original program was measured to compute (golden/README.md), for the tests.

    names('fake')              the runs: 'fake/default' and so on
    run('fake/default')        the numbers of one
    misses(evaluation, ...)    what is outside their tolerances
    options(argv)              its options, typed; `twin_options(argv)` as `Twin` takes them
    images(argv)               its input images and its start image
    weights('fake')            the weights, 'fake' or 'real'
"""
import functools
import hashlib
import json
import lzma
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from twin import fake_weights, load_pickle_weights

FOLDER = Path(__file__).with_name('golden')


@functools.cache
def load():
    with lzma.open(FOLDER / 'golden.json.xz') as file:
        return json.load(file)


def names(kind):
    """The runs with these weights, 'fake' or 'real'."""
    return [name for name in load()['runs'] if name.startswith(kind + '/')]


def run(name):
    """The numbers of one run, of its first phase.

    argv : list of str
    start_sha256 : of the start image, (H, W, 3) RGB bytes; or None
    evaluations : list of total, losses {name: value}, grad_l2, grad_linf, quality and
        rtol {name: relative tolerance}
    idx, gap, hist : {layer: list of arrays, one for each matching pass of the first evaluation}:
        matches (M,), best score minus second best (M,), match history after the pass (N,)
    sure_gap : matches are certain where their gap is larger
    gradient : (3, H, W) B, G, R of the first evaluation, or None
    """
    r = load()['runs'][name]

    def arrays(kind):
        return {layer: [np.array(a) for a in m[kind]] for layer, m in r['matches'].items() if kind in m}

    gradient = np.array(r['gradient']['steps']) * r['gradient']['step'] if 'gradient' in r else None
    return SimpleNamespace(name=name, argv=r['argv'], start_sha256=r['start_sha256'], idx=arrays('idx'),
                           gap=arrays('gap'), hist=arrays('hist'), sure_gap=r['sure_gap'], gradient=gradient,
                           evaluations=[SimpleNamespace(**e) for e in r['evaluations']])


def misses(expected, total, losses, gradient, at_least=0.):
    """A line for each number that is off an evaluation's by more than its rtol, and than `at_least`."""
    assert list(losses) == list(expected.losses)
    measured = {**losses, 'total': total, 'grad_l2': np.linalg.norm(gradient),
                'grad_linf': np.abs(gradient).max()}
    result = []
    for key, rtol in expected.rtol.items():
        golden = expected.losses[key] if key in expected.losses else getattr(expected, key)
        size = golden or 1e-6 * expected.total    # an image has no content loss against itself
        if abs(measured[key] - golden) > max(rtol, at_least) * size:
            result.append(f'{key}: {measured[key]:.9g}, golden {golden:.9g}, rtol {rtol:g}')
    return result


def options(argv):
    """['--style-layers=3_1', ...] -> {'style_layers': '3_1', ...}, numbers as numbers."""
    result = {}
    for option in argv:
        key, value = option[2:].split('=')
        number = value.replace('.', '', 1).isdigit()    # int('3_1') would be 31
        result[key.replace('-', '_')] = (float if '.' in value else int)(value) if number else value
    return result


def twin_options(argv):
    """The options that `Twin` takes, as it takes them."""
    known = {'content_weight', 'style_weight', 'semantic_weight', 'smoothness', 'variety', 'slices', 'cache',
             'content_layers', 'style_layers'}
    return {key: value.split(',') if key.endswith('_layers') else value
            for key, value in options(argv).items() if key in known}


def images(argv):
    """Inputs of the first phase, scaled as the original did, and its start image.

    Returns content, content_map, style, style_map : (H, W, 3) uint8 RGB or None, as `Twin` takes them;
    start : (3, H, W) float, planes B, G, R.
    """
    o = options(argv)
    shrink = 2 ** (o['phases'] - 1)

    def read(name):    # None if there is no such file
        return Image.open(FOLDER / name).convert('RGB') if (FOLDER / name).is_file() else None

    def read_map(name):
        return read(Path(name).stem + '_sem.png') if o.get('semantic_weight', 1) else None

    def scaled(image, size=None, filter=Image.LANCZOS):    # the original's filter for maps, too
        width, height = size or image.size
        return np.asarray(image.resize((width // shrink, height // shrink), filter))

    content, style = read(o.get('content', '')), read(o['style'])
    content_map, style_map = read_map(o.get('content', o['output'])), read_map(o['style'])
    width, height = (content or content_map or style).size
    if 'output_size' in o:    # meant to be WIDTHxHEIGHT, but the original took it for ROWSxCOLUMNS
        height, width = map(int, o['output_size'].split('x'))
    if o['seed'] == 'content':
        start = scaled(content)
    else:
        start = scaled(read(o['seed']), (width, height), Image.BICUBIC)
    return SimpleNamespace(start=start[:, :, ::-1].transpose(2, 0, 1).astype(float),
                           **{name: image and scaled(image) for name, image in (
                               ('content', content), ('content_map', content_map),
                               ('style', style), ('style_map', style_map))})


@functools.cache
def weights(kind):
    """The weights as `Twin` takes them; skips the test where the real ones are not at hand."""
    if kind == 'real' and not os.environ.get('DOODLE_VGG19'):
        pytest.skip('DOODLE_VGG19 does not name the file of the real weights')
    result = fake_weights() if kind == 'fake' else load_pickle_weights(os.environ['DOODLE_VGG19'])
    digest = hashlib.sha256()
    for w, b in result.values():
        digest.update(w[:, :, ::-1, ::-1].tobytes() + b.tobytes())
    if digest.hexdigest() != load()['weights_sha256'][kind]:
        (pytest.skip if kind == 'real' else pytest.fail)('not the weights that golden was measured with')
    return result
