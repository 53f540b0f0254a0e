#!/usr/bin/env python3
# /// script
# requires-python = "==3.11.*"
# dependencies = [
#   "Theano==1.0.5",
#   "Lasagne==0.1",
#   "numpy==1.26.4",
#   "scipy==1.16.3",
#   "Pillow==13.0.0",
#   "scikit-image==0.26.0",
#   "h5py==3.16.0",
#   "tqdm==4.70.1",
#   "scipy-openblas32==0.3.34.0.0",
#   "six==1.17.0",
#   "setuptools==65.5.0",
# ]
# ///
"""Neural Doodle: paint one picture with the patches of another, eyes from eyes and skin from skin.

First the method: options, images and maps, network, matching, losses, objective, optimisation, run.
Then the machinery: weights, devices, engine, files, and the engine's C++.

Names kept to everywhere:

    x       the image being painted, (3, H, W), blue green red, 0..255
    f, g    features of the image and of the style picture at one layer, (H, W, C) and (h, w, C)
    m, n    maps of the image and of the style picture at that layer, (H, W, K) and (h, w, K)
    u, v    what is matched: features and maps, each of length one at every pixel
    i, j    numbers of 3x3 patches, row by row, of the image and of the style picture
    S       S(i, j), how well patch i of the image fits patch j of the style picture
    w       semantic weight, of the maps against the features

Papers:

    [SZ14]  Simonyan, Zisserman: Very Deep Convolutional Networks. arXiv 1409.1556
    [LW16]  Li, Wand: Combining Markov Random Fields and Convolutional Neural Networks. arXiv 1601.04589
    [GEB16] Gatys, Ecker, Bethge: Image Style Transfer Using Convolutional Neural Networks. CVPR 2016
    [C16]   Champandard: Semantic Style Transfer and Turning Two-Bit Doodles into Fine Artworks. arXiv 1603.01768
    [LG15]  Lavin, Gray: Fast Algorithms for Convolutional Neural Networks. arXiv 1509.09308
    [MV15]  Mahendran, Vedaldi: Understanding Deep Image Representations. arXiv 1412.0035
    [BLNZ95] Byrd, Lu, Nocedal, Zhu: A Limited Memory Algorithm for Bound Constrained Optimization
"""
import argparse
import bisect
import bz2
import contextlib
import ctypes
import fcntl
import fnmatch
import hashlib
import http.client
import importlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import pickle
import pwd
import re
import secrets
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
import urllib.parse
import urllib.request
import warnings
import zlib
from collections import namedtuple


# ---- options ---------------------------------------------------------------------------------------------------------

SAMPLE = 'python3 doodle.py --style samples/astronaut.png --content samples/hopper.png --output swap.png'


class UserError(Exception):
    """What the person at the keyboard can mend: ``UserError(problem, fix)``, each one line of plain words."""


def natural(text):
    """A whole number from 1 on."""
    return whole(text, least=1)


def whole(text, least=0):
    """A whole number from `least` on."""
    if not re.fullmatch('[0-9]{1,9}', text) or int(text) < least:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {least} on')
    return int(text)


def one_of(*choices):
    """The option type of a few words or numbers."""
    def chosen(text):
        if text not in map(str, choices):
            raise argparse.ArgumentTypeError(f'{text!r} is none of {", ".join(map(str, choices))}')
        return type(choices[0])(text)
    return chosen


def number(text):
    """What a decimal number says, or NaN: float() by itself also reads 1_0, infinity and the digits of all scripts."""
    return float(text) if re.fullmatch(r'[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]+)?', text) else math.nan


def up_to(most):
    """The option type of a weight: 0, or from 1e-6, below which float32 sees no step of the optimiser, to `most`."""
    def chosen(text):
        value = number(text)
        if value and not 1e-6 <= value <= float(most):
            raise argparse.ArgumentTypeError(f'{text!r} is neither 0 nor a number from 1e-6 to {most}')
        return value
    return chosen


def path(text):
    """A path, with its ~ expanded, which a shell leaves as it is after an =."""
    if not text:
        raise argparse.ArgumentTypeError(f'{text!r} is no path')
    user, _, rest = text.partition('/')
    if user.startswith('~') and mounts() is not None:
        home = '$HOME' if user == '~' else f'/home/{user[1:]}'
        raise UserError(f'{text!r}: ~ in a container is not your home.',
                        f'mount that, -v "{home}:{home}", and give the path as "{home}/{rest}"')
    expanded = os.path.expanduser(text)
    if expanded.startswith('~') and not os.path.lexists(text):
        raise UserError(f'{text!r}: there is no such user.', f'for a name that begins with ~ give ./{text}')
    return expanded


def seed(text):
    """``noise``, ``content``, or the path of a picture."""
    if (text not in ('', 'noise', 'content') and not os.path.exists(text) and
            not (re.search('[./~]', text) and math.isnan(number(text)))):
        raise UserError(f'--seed {text!r} is neither noise, content, nor the path of a picture.',
                        'give one of these; a number, which repeats a run, goes to --random-seed')
    return path(text)


def layers(text):
    """Names of VGG layers, ``'3_1,4_1'`` -> ``['3_1', '4_1']``."""
    names = text.split(',')
    for name in names:
        if name not in layer_names('vgg19'):
            raise argparse.ArgumentTypeError(f'{name!r} is no layer of the network: 1_1 .. 5_4, with commas between')
    return sorted(set(names), key=names.index)


def size(text):
    """``'WIDTHxHEIGHT'`` -> (width, height)."""
    match = re.fullmatch('([1-9][0-9]{0,5})x([1-9][0-9]{0,5})', text)
    if not match:
        raise argparse.ArgumentTypeError(f'{text!r} is not a size like 640x480')
    return tuple(map(int, match.groups()))


def colours(text):
    """``'16:240'`` -> (16.0, 240.0), within 0..255."""
    try:
        low, high = map(number, text.split(':'))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 255:
        raise argparse.ArgumentTypeError(f'{text!r} is not a range of colours like 16:240, within 0..255')
    return low, high


def device(text):
    """``cpu``, ``gpuN``, or Theano's own ``cudaN`` and ``openclN:M``; ``gpuN`` means Theano's ``cudaN``."""
    if not re.fullmatch('cpu|(gpu|cuda)[0-9]*|opencl[0-9]+:[0-9]+', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no device: cpu, gpu0, gpu1, .., cuda0, .., opencl0:0')
    return re.sub(r'^gpu', 'cuda', text)


# What a method takes in place of Champandard's defaults, which stand in OPTIONS; None: it has no such option. The
# papers weigh sums over a picture; we weigh means, which suit every size. Gatys' content term, 1/2 sum (f - g)^2, is
# H W C / 2 times ours: content to style as 10 to 0.1 is 1e-4 at 512x512 pixels, and 100 to 0.1 is 1e-3, the range of
# [GEB16]. Li and Wand's copies are those of [LW16]; the weights are for means, found by trial. The code they released
# differs: no copies, content at 4_1, and 20 as its weight, 1e-4 the style's, 1e-3 the smoothness'.
METHODS = {
    'champandard': dict(),
    'li-wand': dict(content_weight='10.0', style_weight='10.0', smoothness='10.0', rotations='2', scales='3',
                    semantic_weight=None),
    'gatys': dict(content_weight='10.0', style_weight='0.1', style_layers='1_1,2_1,3_1,4_1,5_1', smoothness='0.0',
                  semantic_weight=None, rotations=None, scales=None, variety=None, cache=None),
}

method, network, switch = one_of(*METHODS), one_of('vgg19', 'vgg16'), one_of(0, 1)
parts, steps = one_of(0, *range(2, 17)), one_of(*range(13))           # 12 steps are 90 degrees, or a factor of 0.4
weight, bias = up_to('1e20'), up_to('1e6')                            # so losses are finite, and features told apart

OPTIONS = {
    'pictures': (
        # option            type     default       value     meaning
        ('--style',           path,    None,         'PATH',   'style picture, whose patches are used (needed)'),
        ('--content',         path,    None,         'PATH',   'content picture, which is painted anew'),
        ('--output',          path,    'output.png', 'PATH',   'the result; without --content, its map is the doodle'),
        ('--output-size',     size,    None,         'WxH',    'width and height for texture synthesis'),
        ('--max-size',        natural, None,         'N',      'shrink pictures with a longer side, maps with them'),
        ('--semantic-ext',    str,     '_sem.png',   'EXT',    'the map of dir/name.jpg is dir/name + this'),
        ('--auto-maps',       parts,   '0',          'N',      'paint the maps that are missing, with N parts'),
        ('--seed',            seed,    'noise',      'SEED',   'start from noise, content, or the picture at a path'),
        ('--seed-range',      colours, '16:240',     'LO:HI',  'range of the colours of noise'),
        ('--random-seed',     whole,   None,         'N',      'repeats a run; drawn and printed when not given'),
    ),
    'losses': (
        ('--method',          method,  'champandard', 'NAME',  'champandard, or without maps li-wand or gatys'),
        ('--content-weight',  weight,  '10.0',       'X',      'weight of the content loss'),
        ('--content-layers',  layers,  '4_2',        'LAYERS', 'layers of the content loss'),
        ('--style-weight',    weight,  '25.0',       'X',      'weight of the style loss'),
        ('--style-layers',    layers,  '3_1,4_1',    'LAYERS', 'layers of the style loss'),
        ('--smoothness',      weight,  '1.0',        'X',      'weight of the smoothness prior'),
    ),
    'matching': (
        ('--semantic-weight', bias,    '10.0',       'X',      'weight of the maps against the features; 0: no maps'),
        ('--variety',         bias,    '0.0',        'X',      'bias toward style patches that are used little'),
        ('--rotations',       steps,   '0',          'N',      'style copies, turned by 7.5 degrees N times each way'),
        ('--scales',          steps,   '0',          'N',      'style copies, rescaled by 0.05 N times each way'),
        ('--slices',          natural, None,         'N',      'batches of matching on a GPU; else its memory decides'),
        ('--cache',           switch,  '0',          '0|1',    '1: find the matches once a phase only'),
    ),
    'optimisation': (
        ('--phases',          natural, '3',          'N',      'number of scales, each twice the one before'),
        ('--iterations',      natural, '100',        'N',      'evaluations of the loss in each phase'),
    ),
    'machine and files': (
        ('--device',          device,  'cpu',        'DEVICE', 'cpu, gpu0, gpu1, ..; also cuda0, opencl0:0'),
        ('--network',         network, None,         'NAME',   'vgg19 or vgg16; by default the best that can be had'),
        ('--weights',         path,    None,         'PATH',   'the network: vgg19_conv.pkl.bz2, a Keras .h5, or .npz'),
        ('--print-every',     whole,   '10',         'N',      'print a line every N evaluations; 0: never'),
        ('--save-every',      whole,   '10',         'N',      'write a frame every N evaluations; 0: never'),
        ('--frames',          path,    'frames',     'DIR',    'folder of the frames'),
        ('--log',             path,    None,         'PATH',   'write every evaluation as a line of JSON'),
        ('--check',           bool,    False,        None,     'tell what would be done, and what is odd in the maps'),
        ('--resume',          bool,    False,        None,     'go on from the checkpoint of a run that did not end'),
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors in the program's own form."""

    def error(self, message):
        raise UserError(message, 'see doodle.py --help')


class Once(argparse.Action):
    """Of most options the last one given counts; of these no two different ones are taken."""

    def __call__(self, parser, options, value, flag=None):
        before = getattr(options, self.dest)
        if before not in (None, value):
            raise UserError(f'{flag} is given twice, as {before!r} and as {value!r}.', 'leave one of them out')
        setattr(options, self.dest, value)


def attribute(flag):
    """``'--max-size'`` -> ``'max_size'``."""
    return flag[2:].replace('-', '_')


def parse_options(arguments):
    """The options of a run.

    Parameters
    ----------
    arguments : list of str
        The command line without the program's name.

    Returns
    -------
    argparse.Namespace
        One attribute for each row of `OPTIONS`.

    Raises
    ------
    UserError
        A value is not of its kind, or the style picture is missing.
    """
    parser = Parser(prog='doodle.py', description='Paint one picture with the patches of another.',
                    epilog=f'A first run: {SAMPLE}')
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, kind, default, value, meaning in rows:
            others = ''.join(f'; {name}: {own[attribute(flag)]}' for name, own in METHODS.items()
                             if own.get(attribute(flag)))
            how = dict(action='store_true') if kind is bool else dict(type=kind, default=default, metavar=value)
            how |= dict(action=Once) if flag in ('--style', '--content') else {}
            group.add_argument(flag, **how, help=meaning + others + (f' (default: {default})' if default else ''))
    own = METHODS[parser.parse_args(arguments).method]
    parser.set_defaults(**{name: default or 0 for name, default in own.items()})
    options = parser.parse_args(arguments)
    for name, default in own.items():
        if default is None and getattr(options, name):
            raise UserError(f'--method={options.method} has no --{name.replace("_", "-")}.', 'leave one of them out')
    if not options.style:
        raise UserError('No style picture was given.', f'add --style PATH; to see one at work: {SAMPLE}')
    return options


def copy_count(options):
    """How many copies of the style picture are matched: turned and rescaled ones, and itself."""
    return (1 + 2 * options.rotations) * (1 + 2 * options.scales)


# ---- images and maps -------------------------------------------------------------------------------------------------

# The program's inputs, read and checked: pictures are (H, W, 3) uint8 RGB, maps (H, W, K) uint8, or None; so is
# `style_alpha`, (h, w, 1), which is there only where some of the style picture is wholly transparent.
Inputs = namedtuple('Inputs', 'content content_map style style_map seed size style_alpha')


def read_inputs(options):
    """Read and check all that a run needs, before anything slow begins.

    Parameters
    ----------
    options : argparse.Namespace

    Returns
    -------
    inputs : Inputs
    remarks : list of str
        What was loaded, a line each.

    Raises
    ------
    UserError
        Whatever is missing, broken, or does not fit together.
    """
    remarks, seed_path = [], None if options.seed in ('noise', 'content') else options.seed
    maps = map_paths(options)                                           # before the output finds another place
    previews = map(preview_path, maps) if options.auto_maps else ()
    check_written(options, [options.content, options.style, seed_path, *maps, *previews, options.weights])
    for flag, path in (('--frames', options.frames if options.save_every else None), ('--log', options.log)):
        if path and mounts() is not None and not mount_of(path):
            remarks.append(bold(f'WARNING: {flag} {path!r} is on no mounted folder, and is lost with the container. '
                                f'FIX: -v "$PWD:/nd", or another {flag}.'))

    content = seed = content_map = style_map = None
    if options.content:
        content, _, lines = read_picture(options.content)
        content = limited(content, options.max_size, Image.LANCZOS)
        remarks += [f'Loading `{options.content}` for content data.', *lines]
    style, style_alpha, lines = read_picture(options.style)
    style = limited(style, options.max_size, Image.LANCZOS)
    remarks += [f'Loading `{options.style}` for style data.', *lines]
    if style_alpha is not None:
        style_alpha = limited(style_alpha[:, :, None], options.max_size, Image.BOX)         # (h, w, 1)
        style_alpha = None if style_alpha.all() else style_alpha

    if not missing_maps(options):                                       # else they are painted and read later
        content_map, style_map, lines = read_maps(options, maps, content, style)
        remarks += lines
    if options.rotations or options.scales:
        count = copy_count(options)
        remarks.append(f'{count} copies of the style picture, so matching takes some {count} times as long; '
                       'fewer by --rotations and --scales.')

    shape = content if content is not None else content_map
    if options.output_size and shape is not None:
        raise UserError('--output-size is for texture synthesis; here the content or its map gives the size.',
                        'leave --output-size out')
    if options.seed == 'content' and content is None:
        raise UserError('--seed=content needs a content picture.', 'add --content, or use --seed=noise')
    if seed_path:
        seed, _, lines = read_picture(seed_path)
        remarks += lines
    if content is None:
        remarks.append('No content picture: the result depends on style, map and seed only.')
    size = options.output_size or (style if shape is None else shape).shape[1::-1]

    # A layer whose patches are matched needs one of 3x3, any other one pixel, in the smallest phase.
    patched = [] if options.method == 'gatys' else options.style_layers
    least, layer = max((stride(layer) * (3 if layer in patched else 1), layer)
                       for layer in options.style_layers + (options.content_layers if content is not None else []))
    for name, (width, height) in (('result', size), ('style picture', style.shape[1::-1])):
        if min(phase_size((width, height), 0, options.phases)) < least:
            fits = int(math.log2(max(1, min(width, height) / least))) + 1
            raise UserError(f'The {name}, {width}x{height}, is too small for conv{layer} in the first of '
                            f'{options.phases} phases, where its sides must be {least} or more.',
                            f'--phases={fits}' if min(width, height) >= least else 'use a larger picture')
    for phase, layer in itertools.product(range(options.phases), () if style_alpha is None else options.style_layers):
        if not pooled_map(style_alpha, phase_size(style.shape[1::-1], phase, options.phases), layer).any():
            raise UserError(f'All of {options.style!r} is transparent, as conv{layer} sees it in phase {phase}.',
                            'use a style picture that shows something')
    return Inputs(content, content_map, style, style_map, seed, size, style_alpha), remarks


def read_maps(options, paths, content, style):
    """The maps at `paths` of both pictures, (H, W, K) uint8 arrays, or None where none are wanted; and remarks."""
    if options.method != 'champandard':
        return None, None, [f'Method {options.method}, which reads no semantic maps.']
    pictures = {'content': (options.content, content), 'style': (options.style, style)}
    paths = dict(zip(pictures, paths))
    found = [name for name in paths if options.semantic_weight and is_there(paths[name])]
    if not found:
        return None, None, ['No semantic maps: patches are matched by their features alone.']
    if len(found) == 1:
        missing = paths['style' if found == ['content'] else 'content']
        raise UserError(f'{paths[found[0]]!r} is a map, but {missing!r} is not there.', 'paint that map too, ' +
                        'say --auto-maps=6, ' * bool(options.content) + 'or leave maps unread with --semantic-weight=0')
    if options.content and len(set(paths.values())) == 1 and not same_file(options.content, options.style):
        raise UserError(f'{options.content!r} and {options.style!r} would share the map {paths["style"]!r}.',
                        'rename one of the pictures, and give each a map of its own')
    classes, maps, labels, warned = classify_maps(
        list(paths.values()), [picture if picture[0] else None for picture in pictures.values()], options.max_size)
    remarks = []
    for name, path in paths.items():
        unread = ', '.join(f'`{other}`' for other in other_endings(path, pictures[name][0] or ''))
        remarks.append(f'Adding `{path}` as semantic map' + (f', and not {unread}.' if unread else '.'))
    remarks += legend(classes, dict(zip(paths, maps)), dict(zip(paths, labels))) + warned
    (content_map, style_map), remark = map_channels(maps, classes, labels)
    return content_map, style_map, remarks + [remark] * bool(remark)


def legend(classes, maps, labels):
    """What each class covers of the maps, and what in them is likely a painting mistake, in lines.

    Parameters
    ----------
    classes : (K, 3) array
    maps, labels : dict of str to (H, W, 3) uint8 and (H, W) int arrays
        By the name of their picture, ``'content'`` and ``'style'``.
    """
    names, codes = list(maps), colour_codes(classes.astype(np.int32))
    shares = np.array([np.bincount(labels[name].ravel(), minlength=len(classes)) / labels[name].size for name in names])
    lines = [f'{swatch(colour)}#{code:06x}  ' + '  '.join(f'{name} {share:6.1%}' for name, share in zip(names, covered))
             for colour, code, covered in zip(classes.astype(int), codes, shares.T)]

    most, owner = [], np.zeros(1 << 24, np.int16)                       # of each map: the commonest colour of a class
    for name in names:
        code = colour_codes(maps[name])
        counts, owner[code] = np.bincount(code.ravel(), minlength=1 << 24), labels[name]
        found = np.flatnonzero(counts)
        found = found[np.argsort(counts[found], kind='stable')]
        most.append(dict(zip(owner[found].tolist(), found.tolist())))   # of several the last stays
    order = np.argsort(-shares.sum(axis=0), kind='stable').tolist()
    pairs = [f'#{most[0][k]:06x} and #{most[-1][k]:06x}' for k in order
             if all(k in colours for colours in most) and most[0][k] != most[-1][k]]
    if pairs:
        lines.append(f'One class, though not quite one colour in the {" and the ".join(names)}: {examples(pairs, 8)}.')

    odd, alone = [], []
    for k in order:
        present = [name for name, share in zip(names, shares[:, k]) if share >= LEAST]
        if len(present) == 1 < len(names):
            alone.append(f'#{codes[k]:06x} in the map of the {present[0]} only ({shares[:, k].max():.1%})')
    if alone:
        odd.append(f'Colours without a counterpart: {examples(alone)}. FIX: paint each part in both maps')
    if len(classes) > 16:
        odd.append(f'The maps have {len(classes)} colours. FIX: a few large parts, each of one colour')
    if 'style' in labels and (shares[names.index('style')] > 0).sum() == 1:
        odd.append('The map of the style has a single class, so that maps make no difference. FIX: paint its parts')
    return lines + [bold(f'WARNING: {text}.') for text in odd]


def map_channels(maps, classes, labels):
    """Maps as channels whose cosine tells one class from another.

    The colours themselves serve where no class is black and no two classes have a cosine above 0.99 (scaled colours
    are one class to a cosine, and so are all greys). Otherwise each class becomes a channel of its own.

    Parameters
    ----------
    maps : list of (H, W, 3) uint8 arrays
    classes, labels
        As `map_classes` gives them.

    Returns
    -------
    channels : list of (H, W, K) uint8 arrays
    remark : str or None
        Says so when the classes became channels.
    """
    def cosines(a, b):
        return a @ b.T / np.maximum(np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)), 1e-9)

    alike = (cosines(classes, classes) > 0.99)[~np.eye(len(classes), dtype=bool)].any()
    for k in np.flatnonzero(np.linalg.norm(classes, axis=1) <= NEAR):   # black, or so dark that slips turn it
        for colours, label in zip(maps, labels):
            own = code_colours(np.unique(colour_codes(colours[label == k])))
            own = own[np.linalg.norm(own - classes[k], axis=1) <= NEAR]
            alike |= (cosines(own, classes[[k]]) <= 0.99).any()
    if not alike:
        return maps, None
    one_hot = np.eye(len(classes), dtype=np.uint8) * np.uint8(255)
    return [one_hot[label] for label in labels], (
        f'{len(classes)} map colours, some black or shades of each other: each is a class of its own.')


def pooled_map(channels, size, layer):
    """A map as a layer of the network sees it: at the phase's size, averaged over 1, 2, 4, 8 or 16 pixels.

    Parameters
    ----------
    channels : (H, W, K) array
    size : (width, height) of the phase
    layer : str
        ``'3_1'`` averages over 4x4 pixels; a remainder is dropped, as by the network's pooling.

    Returns
    -------
    (H', W', K) float32 array
    """
    scaled = resized(channels.astype(np.float32), size, Image.BOX)
    k = stride(layer)
    height, width = scaled.shape[0] // k, scaled.shape[1] // k
    return scaled[:height * k, :width * k].reshape(height, k, width, k, -1).mean(axis=(1, 3))


def resized(pixels, size, method):
    """`pixels` (H, W, K), uint8 or float, resampled channel by channel to `size` = (width, height)."""
    if pixels.shape[1::-1] == tuple(size):
        return pixels
    planes = [Image.fromarray(plane).resize(size, method, reducing_gap=None) for plane in np.moveaxis(pixels, 2, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def limited(pixels, longest, method):
    """`pixels` (H, W, K), shrunk where their long side is more than `longest` (or None)."""
    return resized(pixels, limited_size(pixels.shape[1::-1], longest), method)


def limited_size(size, longest):
    """`size` = (width, height), shrunk where the long side is more than `longest` (or None)."""
    shrink = min(1, (longest or math.inf) / max(size))
    return tuple(max(1, round(side * shrink)) for side in size)


def phase_size(size, phase, phases):
    """(width, height) in a phase: each has twice the scale of the one before, and the last is at scale 1."""
    return tuple(side >> phases - 1 - phase for side in size)


def planes(pixels):
    """(H, W, 3) RGB -> (3, H, W) BGR float64."""
    return np.moveaxis(pixels[:, :, ::-1], 2, 0).astype(np.float64)


def pixels(x, size):
    """The image `x` (3, H, W) BGR as (height, width, 3) uint8 RGB, at `size` = (width, height)."""
    return resized(np.moveaxis(np.clip(x, 0, 255).astype(np.uint8)[::-1], 0, 2), size, Image.BICUBIC)


# ---- network ---------------------------------------------------------------------------------------------------------

BLOCKS = {'vgg19': (2, 2, 4, 4, 4), 'vgg16': (2, 2, 3, 3, 3)}         # convolutions between poolings, [SZ14] table 1
WIDTHS = (64, 128, 256, 512, 512)                                     # their filters

MEAN = (103.939, 116.779, 123.680)                                    # of blue, green, red over ImageNet


def stride(layer):
    """Pixels of the picture, along a side, for each of a layer's: 1, 2, 4, 8 or 16."""
    return 2 ** (int(layer[0]) - 1)


def filters(layer):
    """How many filters a layer has, and so channels its features."""
    return WIDTHS[int(layer[0]) - 1]


def layer_names(kind, needed=None):
    """``'1_1', '1_2', '2_1', ...`` of ``'vgg19'`` or ``'vgg16'``, all or only as deep as the deepest of `needed`."""
    names = [f'{block}_{k}' for block, count in enumerate(BLOCKS[kind], 1) for k in range(1, count + 1)]
    return names[:max(map(names.index, needed)) + 1] if needed else names


def convolution(x, W, **_):
    """The 'same' 3x3 convolution for Lasagne 0.1, which would pad by copying."""
    return T.nnet.conv2d(x, W, border_mode=1, filter_flip=False)


def build_network(weights, names, fast=False):
    """The convolutions of VGG, only as deep as the deepest of `names`.

    Each is 3x3 with padding 1 and rectified; between the blocks the papers advise the average of 2x2 over caffe's
    maximum [LW16].

    Parameters
    ----------
    weights : Weights
    names : collection of str
    fast : bool
        With the engine's convolution.

    Returns
    -------
    dict of str to lasagne.layers.Layer
        Takes (1, 3, H, W) BGR less `MEAN`, gives (1, C, H', W').
    """
    network, layer = {}, lasagne.layers.InputLayer((1, 3, None, None))
    for name in layer_names(weights.kind, names):
        (W, b), pool = weights.layers[name], name.endswith('_1') and name != '1_1'
        if fast:
            unused = theano.shared(np.zeros((1, 1, 1, 1), np.float32))
            how = dict(W=unused, b=None, nonlinearity=None, convolution=fast_convolution(W, b, pool))
        else:
            how = dict(W=np.ascontiguousarray(W), b=b, convolution=convolution)
            layer = lasagne.layers.Pool2DLayer(layer, 2, mode='average_inc_pad') if pool else layer
        layer = network[name] = lasagne.layers.Conv2DLayer(layer, len(W), 3, **how)
    return network


def features(network, x, names):
    """Symbolic features {name: (H, W, C)} of the image `x` (3, H, W)."""
    image = (x - np.float32(MEAN)[:, None, None]).dimshuffle('x', 0, 1, 2)
    outputs = lasagne.layers.get_output([network[name] for name in names], image)
    return {name: T.addbroadcast(output, 0).dimshuffle(2, 3, 1) for name, output in zip(names, outputs)}


# ---- matching --------------------------------------------------------------------------------------------------------

def unit(f):
    """Vectors of length one along the last axis; zero stays zero, so that its cosine with anything is 0."""
    length = T.sqrt(T.sum(f ** 2, axis=-1, keepdims=True))
    return f * T.switch(length > 0, 1 / length, 0)


def matching_key(f, m, w):
    """What is matched at each pixel: [f / |f|, sqrt(w) m / |m|], whose products are cos(f, g) + w cos(m, n) [C16].

    Parameters
    ----------
    f : symbolic (H, W, C)
    m : symbolic (H, W, K) or None
    w : symbolic scalar
        Semantic weight.
    """
    return unit(f) if m is None else T.concatenate([unit(f), T.sqrt(w) * unit(m)], axis=2)


def patch_scale(f):
    """3 / |P_i| of every 3x3 patch P_i of f (H, W, C), or 0: the lengths that normalise whole patches [LW16 eq. 3]."""
    (H, W), squares = (f.shape[0], f.shape[1]), T.sum(f ** 2, axis=2)
    total = sum(squares[y:H - 2 + y, x:W - 2 + x] for y in range(3) for x in range(3)).flatten()
    return T.switch(total > 0, 3 / T.sqrt(total), 0)


def match(u, v, slices, variety=None, history=None, scale=None):
    """For every 3x3 patch i of the image the style patch j with the largest score [LW16 eq. 3, C16 eq. 2].

        S(i, j) = 1/9 a(i) b(j) sum_d u(i + d) . v(j + d),        less variety * h(j)

    Either u and v have length one at every pixel [C16] and there are no a and b; or they are raw, and a and b are their
    `patch_scale`: the cosine of whole patches [LW16].

    The sum over the offsets d is taken over nine diagonal shifts of the products of single pixels, so that these cost
    a ninth of the products of patches, and no patch is ever stored.

    Parameters
    ----------
    u : symbolic (H, W, D)
    v : symbolic (h, w, D)
    slices : int
        Rows of style patches are taken in so many batches, one after the other; any number gives the same matches.
    variety : symbolic scalar
    history : symbolic ((h - 2) (w - 2),)
        h(j), the best score that j had for any i in the evaluation before.
    scale : symbolic ((H - 2) (W - 2),) and ((h - 2) (w - 2),)
        a(i) and b(j); where b is 0 there is no patch j.

    Returns
    -------
    matches : symbolic int64 ((H - 2) (W - 2),)
        Numbers j, the first of equals.
    history : symbolic ((h - 2) (w - 2),) or None
        The new h, where there was one.
    """
    (H, W, D), (h, w) = (u.shape[k] for k in range(3)), (v.shape[0], v.shape[1])
    best, matches, best_of = np.float32(-np.inf), np.int64(0), history
    for k in range(slices):
        above, below = (h - 2) * k // slices, ((h - 2) * (k + 1) + slices - 1) // slices    # at least one row
        if k:                           # waits for the batch before, else Theano would hold the scores of all at once
            above = T.opt.Assert()(above, *(T.neq(done[0], -1) for done in (matches, best_of) if done is not None))
        rows = below - above
        products = T.dot(u.reshape((H * W, D)), v[above:below + 2].reshape(((rows + 2) * w, D)).T)
        products = products.reshape((H, W, rows + 2, w))
        S = sum(products[y:H - 2 + y, x:W - 2 + x, y:rows + y, x:w - 2 + x] for y in range(3) for x in range(3)) / 9
        S = S.reshape(((H - 2) * (W - 2), rows * (w - 2)))                                  # (i, j)
        batch = slice(above * (w - 2), below * (w - 2))
        if scale:
            S *= scale[0][:, None] * scale[1][batch]
        if history is not None:
            best_of = T.set_subtensor(best_of[batch], T.max_and_argmax(S.T, axis=1)[0])
            S -= variety * history[batch]
        if scale:
            S = T.switch(scale[1][batch] > 0, S, np.float32(-np.inf))
        score, j = T.max_and_argmax(S, axis=1)
        better = T.gt(score, best)
        matches, best = T.switch(better, j + above * (w - 2), matches), T.switch(better, score, best)
    return matches, best_of


def style_copies(picture, rotations, scales, resample):
    """The style picture, and its copies turned by steps of 7.5 degrees and rescaled by steps of 5 % each way [LW16].

    Of a turned picture the largest part of the same proportions is kept that has no corner outside.

    Parameters
    ----------
    picture : (K, h, w) array
    rotations, scales : int
        Steps each way. The paper's are 2 and 3, which makes 35 copies; the authors' released code has none.
    resample : Pillow's filter

    Returns
    -------
    list of (K, h', w') float32 arrays
        First the picture itself.
    """
    (h, w), result = picture.shape[1:], []
    for turn in sorted(range(-rotations, rotations + 1), key=abs):
        for step in sorted(range(-scales, scales + 1), key=abs):
            c, s, scale = math.cos(math.radians(7.5 * turn)), math.sin(math.radians(7.5 * turn)), 1 + 0.05 * step
            part = min(w / (w * c + h * abs(s)), h / (w * abs(s) + h * c))
            W, H, c, s = max(1, int(w * part * scale)), max(1, int(h * part * scale)), c / scale, s / scale
            back = c, -s, (w - c * W + s * H) / 2, s, c, (h - s * W - c * H) / 2            # copy -> picture
            result.append(np.stack([Image.fromarray(plane).transform((W, H), Image.AFFINE, back, resample)
                                    for plane in np.float32(picture)]).clip(0, 255))
    return result


def sheet(copies):
    """Features of several pictures below each other as those of one, and which of its 3x3 patches lie in one picture.

    Parameters
    ----------
    copies : list of (h_k, w_k, C) arrays

    Returns
    -------
    g : (sum of h_k, largest w_k, C) array
        Zero to the right of narrower pictures.
    whole : ((h - 2) (w - 2),) float32 array
        1 for a patch, 0 over a seam or in the margin.
    """
    w = max(g.shape[1] for g in copies)
    sheet = [np.pad(g, [(0, 0), (0, w - g.shape[1]), (0, 0)]) for g in copies]
    whole = [np.outer(np.arange(len(g)) < len(g) - 2, np.arange(w) < g.shape[1] - 2) for g in copies]
    return np.concatenate(sheet, dtype=np.float32), np.float32(np.concatenate(whole)[:-2, :-2].ravel())


# ---- losses ----------------------------------------------------------------------------------------------------------

def content_loss(f, g):
    """mean (f - g)^2, both (H, W, C) [C16 eq. 3]."""
    return T.mean((f - g) ** 2)


def style_loss(f, g, matches):
    """The mean over patches, offsets and channels of (patch of f - matched patch of g)^2 [LW16 eq. 2].

    A sum of squares is never negative and is 0 where f and g are the same, which a form of fewer sums that cancel would
    not keep. Its gradient at a pixel, 2 sum (f - g) over the up to nine patches that cover it, is summed in one array,
    where Theano by itself would take nine.

    Parameters
    ----------
    f : symbolic (H, W, C)
    g : symbolic (h, w, C)
    matches : symbolic int ((H - 2) (W - 2),)
    """
    (H, W, C), (h, w) = (f.shape[k] for k in range(3)), (g.shape[0], g.shape[1])
    corner = (matches // (w - 2)) * w + matches % (w - 2)               # style pixel at the top left of each match
    pixels, slope, total = g.reshape((h * w, C)), T.zeros((H, W, C)), 0.
    for y in range(3):
        for x in range(3):
            matched = pixels[corner + y * w + x].reshape((H - 2, W - 2, C))
            difference = theano.gradient.disconnected_grad(f[y:H - 2 + y, x:W - 2 + x] - matched)
            slope = T.inc_subtensor(slope[y:H - 2 + y, x:W - 2 + x], difference)
            total += T.sum(difference ** 2)
    total += T.sum(2 * slope * (f - theano.gradient.disconnected_grad(f)))              # adds 0, and the gradient
    return total / T.cast(9 * (H - 2) * (W - 2) * C, 'float32')


def gram(f):
    """G = F F^T / N of the features f (H, W, C), with F their C x N matrix: (C, C)."""
    F = f.reshape((f.shape[0] * f.shape[1], f.shape[2])).T
    return T.dot(F, F.T) / T.cast(F.shape[1], 'float32')


def gram_loss(f, A):
    """E = 1 / (4 C^2) sum (G - A)^2 of f (H, W, C), with A the `gram` of the style picture [GEB16 eq. 4].

    The paper's equation has G = F F^T and 1 / (4 N^2 C^2); here each picture has its own N, so that sizes may differ.
    The paper also scales the network's filters to a mean activation of one, and the code its authors released later
    divides by another C^2. Here the network is VGG as it is, so that conv4_1 weighs most of the paper's five layers.
    """
    return T.mean((gram(f) - A) ** 2) / 4


def smoothness_loss(x, power=1.25):
    """mean (dx^2 + dy^2)^power over neighbouring pixels of the image (3, H, W): 1.25 [MV15 eq. 4] or 1 [LW16]."""
    dy, dx = x[:, 1:, :-1] - x[:, :-1, :-1], x[:, :-1, 1:] - x[:, :-1, :-1]                 # (3, H - 1, W - 1)
    return T.mean((dx ** 2 + dy ** 2) ** np.float32(power))


# ---- objective -------------------------------------------------------------------------------------------------------

# A factor for the features of each layer in the losses, whose weights are made for VGG19: it gives the loss terms of
# Oxford's VGG16 the size that VGG19's have, on average over eight pairs of pictures (samples/measure_balance.py).
BALANCE = {'vgg19': 16 * (1,),
           'vgg16': (0.94, 0.87, 0.74, 0.63, 0.53, 0.51, 0.80, 2.59, 4.00, 5.98, 2.24, 2.29, 5.32)}


def balance(kind):
    """`BALANCE` of ``'vgg19'`` or ``'vgg16'``, {layer: factor}."""
    return dict(zip(layer_names(kind), BALANCE[kind]))


# All that is known of an image: loss terms as weighted, content and style by layer, gradient (3, H, W).
Evaluation = namedtuple('Evaluation', 'total content style smooth gradient seconds matching_seconds')


class Objective:
    """The total loss of an image and its gradient, compiled once and set anew for each phase.

    Parameters
    ----------
    weights : Weights
    options : argparse.Namespace
        Layers, weights of the losses and of the maps, variety, cache, slices.
    content, semantic : bool
        Whether there is a content picture, and whether there are maps.
    fast : bool
        With the engine, which is for the CPU; without it by the formulas as they stand.
    transparent : bool
        Whether some of the style picture is.
    """

    def __init__(self, weights, options, content, semantic, fast=False, transparent=False):
        def array(dimensions, kind='float32'):
            return theano.shared(np.zeros((0,) * dimensions, dtype=kind))
        self.options, self.fast, self.balance = options, fast, balance(weights.kind)
        self.content_layers = options.content_layers if content and options.content_weight else []
        self.style_layers = options.style_layers if options.style_weight else []
        self.layers = list(dict.fromkeys(self.content_layers + self.style_layers)) or ['1_1']

        # Numbers are variables too, so that the same compiled code serves all their values.
        self.numbers = {name: theano.shared(np.float32(0)) for name in ('smoothness', 'semantic_weight', 'variety')}
        self.weights = {(term, layer): theano.shared(np.float32(0)) for term, layers in
                        (('content', self.content_layers), ('style', self.style_layers)) for layer in layers}
        self.gatys, self.li_wand = options.method == 'gatys', options.method == 'li-wand'
        patched = [] if self.gatys else self.style_layers
        scaled = self.li_wand or options.rotations or options.scales or transparent
        self.target = {layer: array(3) for layer in self.content_layers}                    # f of content, (H, W, C)
        self.style = {layer: array(2 if self.gatys else 3) for layer in self.style_layers}  # g, (h, w, C); A, (C, C)
        self.keys = self.style if self.li_wand else {layer: array(3) for layer in patched}    # v, (h, w, C + K)
        self.maps = {layer: array(3) if semantic else None for layer in patched}            # m, (H, W, K)
        self.scale = {layer: array(1) if scaled else None for layer in patched}             # b(j)
        self.history = {layer: array(1) if options.variety else None for layer in patched}  # h(j)
        self.matches = {layer: array(1, 'int64') for layer in patched}                      # j of each i

        x, g, n = T.tensor3('x'), T.tensor3('g'), T.tensor3('n') if semantic else None
        w = self.numbers['semantic_weight']
        f = features(build_network(weights, self.layers, fast), x, self.layers)
        self.features = theano.function([x], list(f.values()))
        if self.gatys:
            self.gram = theano.function([g], gram(g))
        elif self.li_wand:
            self.style_scale = theano.function([g], patch_scale(g))
        else:
            self.style_key = theano.function([g, n] if semantic else [g], matching_key(g, n, w))
        matches, updates = {}, []
        for layer in patched:
            u = f[layer] if self.li_wand else matching_key(f[layer], self.maps[layer], w)
            u = theano.gradient.disconnected_grad(u)
            scale = scaled and (patch_scale(u) if self.li_wand else T.ones_like(patch_scale(u)), self.scale[layer])
            matches[layer], history = (fast_match if fast else match)(
                u, self.keys[layer], options.slices or 1, self.numbers['variety'], self.history[layer], scale)
            updates += [(self.matches[layer], matches[layer])]
            updates += [(self.history[layer], history)] if options.variety else []
        self.matching = self.compiled(x, f, matches, updates)
        self.cached = self.compiled(x, f, self.matches, []) if options.cache else self.matching

    def compiled(self, x, f, matches, updates):
        """The function x -> loss terms and the gradient of their sum, the matches held fixed."""
        weight = self.weights
        terms = [self.numbers['smoothness'] * smoothness_loss(x, 1 if self.li_wand else 1.25)]
        terms += [weight['style', layer] * (gram_loss(f[layer], g) / np.float32(len(self.style)) if self.gatys else
                                            style_loss(f[layer], g, matches[layer])) for layer, g in self.style.items()]
        terms += [weight['content', layer] * content_loss(f[layer], target) for layer, target in self.target.items()]
        profile = theano.compile.ProfileStats(atexit_print=False, flag_time_thunks=True) if self.fast else False
        mode = theano.Mode(theano.gof.vm.VM_Linker(use_cloop=True, schedule=depth_first))
        return theano.function([x], terms + [theano.grad(sum(terms), x)], updates=updates, profile=profile, mode=mode)

    def set_phase(self, content, style, content_map, style_map, size, style_alpha=None):
        """Compute what stays the same during a phase.

        Parameters
        ----------
        content, style : (3, H, W) and (3, h, w) arrays
            BGR, 0..255; `content` may be None.
        content_map, style_map : arrays (H', W', K) of any size, or None
        size : (width, height) of the image
        style_alpha : array (h', w', 1) of any size, or None
            Where it is 0 there is no style: patches that see nothing else are not matched, and a Gram matrix is of the
            other pixels.
        """
        for name, variable in self.numbers.items():
            variable.set_value(np.float32(getattr(self.options, name)))
        for (term, layer), variable in self.weights.items():
            degree = 4 if self.gatys and term == 'style' else 2         # in the features
            variable.set_value(np.float32(getattr(self.options, f'{term}_weight') * self.balance[layer] ** degree))
        if self.target:
            f = dict(zip(self.layers, self.features(np.float32(content))))
            for layer, target in self.target.items():
                target.set_value(f[layer])
        steps = self.options.rotations, self.options.scales
        pictures = style_copies(style, *steps, Image.BICUBIC)
        maps, alphas = [[] if channels is None else style_copies(np.moveaxis(channels, 2, 0), *steps, Image.BILINEAR)
                        for channels in (style_map, style_alpha)]

        def pooled(copies, layer):
            return sheet([pooled_map(np.moveaxis(copy, 0, 2), picture.shape[:0:-1], layer)
                          for copy, picture in zip(copies, pictures)])[0]
        copies = [{name: g for name, g in zip(self.layers, self.features(picture)) if name in self.style}
                  for picture in pictures]
        for layer in self.style_layers:
            g, whole = sheet([copy.pop(layer) for copy in copies])
            seen = pooled(alphas, layer)[:, :, 0] > 0 if alphas else None                   # (h, w)
            if self.gatys:
                self.style[layer].set_value(self.gram(g[seen][None] if alphas else g))
                continue                                                # it has neither keys nor maps
            self.style[layer].set_value(g)
            if alphas:
                whole *= np.lib.stride_tricks.sliding_window_view(seen, (3, 3)).any(axis=(2, 3)).ravel()
            n = []
            if self.maps[layer] is not None:
                n = [pooled(maps, layer)]
                self.maps[layer].set_value(pooled_map(content_map, size, layer))
            if not self.li_wand:
                self.keys[layer].set_value(self.style_key(g, *n))
            if self.scale[layer] is not None:
                self.scale[layer].set_value(whole * self.style_scale(g) if self.li_wand else whole)
            if self.history[layer] is not None:
                self.history[layer].set_value(np.zeros_like(whole))
        self.fresh = True

    def describe(self, layer):
        """What there is of the style at a layer: a Gram matrix, or so many patches of so many channels."""
        g = self.style[layer].get_value(borrow=True)
        if self.gatys:
            return f'{g.shape} Gram matrix in {g.nbytes // 1000:,}kb'
        v, scale = self.keys[layer].get_value(borrow=True), self.scale[layer]
        count = (v.shape[0] - 2) * (v.shape[1] - 2) if scale is None else np.count_nonzero(scale.get_value(borrow=True))
        size = g.nbytes + (0 if self.li_wand else v.nbytes)             # where the keys are the features themselves
        return f'{(count, v.shape[2], 3, 3)} patches in {size // 1000:,}kb'

    def __call__(self, x):
        """The `Evaluation` of the image `x` (3, H, W).

        Raises
        ------
        FloatingPointError
            The loss or its gradient is not finite.
        """
        start, matched, x = time.perf_counter(), self.matching_seconds(), np.float32(x)
        if self.fresh and self.options.variety and not self.options.cache:
            self.matching(x)                                            # to know which patches are used much
        *terms, gradient = (self.matching if self.fresh else self.cached)(x)
        self.fresh = not np.isfinite(terms).all() or not np.isfinite(gradient).all()         # then none of it is kept
        if self.fresh:
            raise FloatingPointError('the loss or its gradient is not finite')
        smooth, *losses = terms = list(map(float, terms))
        content, style = dict(zip(self.target, losses[len(self.style):])), dict(zip(self.style, losses))
        return Evaluation(sum(terms), content, style, smooth, np.float64(gradient), time.perf_counter() - start,
                          self.matching_seconds() - matched if self.fast else None)

    def matching_seconds(self):
        """Time that the engine spent in matching so far."""
        return self.fast and sum(seconds for node, seconds in self.matching.profile.apply_time.items()
                                 if isinstance(node.op, Matching))


# ---- optimisation ----------------------------------------------------------------------------------------------------

class Minimiser:
    """L-BFGS-B over the pixels within 0..255 [BLNZ95]; its attributes are all that it knows.

    The routine is the one under `scipy.optimize.fmin_l_bfgs_b`, which keeps them to itself: with them a run goes on
    from a checkpoint as if it had never ended.

    Parameters
    ----------
    image : (3, H, W) array
        Where to start; later the last image that a line search accepted.
    """

    CORRECTIONS = 5

    def __init__(self, image):
        self.image, self.limit, self.failed = np.float64(image), math.inf, False
        self.start()

    def start(self):
        """Begin at the image, without memory."""
        n, m = self.image.size, self.CORRECTIONS
        self.x, self.loss, self.gradient = self.image.flatten(), 0., np.zeros(n)
        self.work, self.indices = np.zeros((2 * m + 5) * n + (11 * m + 8) * m), np.zeros(3 * n, 'i4')
        self.task, self.line_task, self.logicals, self.integers = (np.zeros(count, 'i4') for count in (2, 2, 4, 44))
        self.doubles = np.zeros(29)

    def run(self, evaluate, evaluations, say=print):
        """Go on for exactly so many evaluations.

        Parameters
        ----------
        evaluate : callable
            x -> (loss, gradient), arrays of the shape of the image.
        evaluations : int
            One whose loss is no number does not count.
        say : callable
            Is given the line that tells of a new start.

        Raises
        ------
        FloatingPointError
            The loss was no number, or a million times the least, and so again after a new start from the last accepted
            image.
        """
        n, shape, (NEW_X, EVALUATE) = self.x.size, self.image.shape, (1, 3)
        bounds = np.zeros(n), np.full(n, 255.), np.full(n, 2, 'i4')     # 2: a pixel has both
        while True:
            if self.task[0] == EVALUATE and not evaluations:
                return
            if self.task[0] == EVALUATE:
                try:
                    loss, gradient = evaluate(self.x.reshape(shape))
                    evaluations -= 1
                    if not loss <= self.limit:
                        raise FloatingPointError('the loss blew up')
                    self.loss, self.gradient = loss, gradient.ravel()
                    self.limit = min(self.limit, 1e6 * max(1, loss))
                except FloatingPointError as error:
                    if self.failed:
                        raise
                    self.failed = True
                    self.start()
                    say(bold(f'WARNING: {one_line(error)}: going on from the last good image.'))
            elif self.task[0] == NEW_X:
                self.image = self.x.reshape(shape).copy()
            elif self.task[0]:                                          # a line search found nothing
                self.start()
            # Without tolerances (0., 0.) it never ends by itself; a line search has 20 evaluations at most, like SciPy.
            lbfgsb.setulb(self.CORRECTIONS, self.x, *bounds, self.loss, self.gradient, 0., 0., self.work, self.indices,
                          self.task, self.logicals, self.integers, self.doubles, 20, self.line_task)


def first_image(inputs, options, size, random_seed):
    """The image from which the first phase starts, (3, H, W)."""
    if options.seed == 'noise':
        return np.random.default_rng(random_seed).uniform(*options.seed_range, (3, *size[::-1]))
    if options.seed == 'content':
        return planes(resized(inputs.content, size, Image.LANCZOS))
    return planes(resized(inputs.seed, size, Image.BICUBIC))


def enlarged(x, size):
    """The image `x` (3, H, W), bicubically enlarged in floating point for the next phase, within 0..255."""
    return np.clip(np.moveaxis(resized(np.moveaxis(np.float32(x), 0, 2), size, Image.BICUBIC), 2, 0), 0, 255)


def paint(objective, inputs, options, random_seed, journal):
    """Minimise the loss phase by phase, from a small scale to the full one.

    Parameters
    ----------
    objective : Objective
    inputs : Inputs
    options : argparse.Namespace
    random_seed : int
    journal : Journal
        Is told of every phase and evaluation; knows where a checkpoint goes on.
    """
    for phase in range(journal.phase, options.phases):
        size = phase_size(inputs.size, phase, options.phases)
        style = resized(inputs.style, phase_size(inputs.style.shape[1::-1], phase, options.phases), Image.LANCZOS)
        objective.set_phase(
            None if inputs.content is None else planes(resized(inputs.content, size, Image.LANCZOS)),
            planes(style), inputs.content_map, inputs.style_map, size, inputs.style_alpha)
        if not journal.state:                                           # else the checkpoint had it
            journal.minimiser = Minimiser(first_image(inputs, options, size, random_seed) if journal.minimiser is None
                                          else enlarged(journal.minimiser.image, size))
        journal.begin(phase, size, objective)
        journal.minimiser.run(journal.evaluate, options.iterations - journal.evaluation, journal.say)
        journal.settle()
        journal.save(last=phase == options.phases - 1)


# ---- run -------------------------------------------------------------------------------------------------------------

def run(arguments):
    """The program, from options to result; returns the exit code."""
    options = parse_options(arguments)
    os.environ.setdefault('OMP_NUM_THREADS', str(allowed_cores()))      # NumPy's BLAS reads it when it is imported
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')                 # a thread that waits leaves its core to others
    return_freed_memory()
    import_pillow()
    if options.auto_maps:
        import_skimage()                                                # or tell at once that it is not there
    say(bold('Neural Doodle') + ' for semantic style transfer.')
    inputs, remarks = read_inputs(options)
    missing = missing_maps(options)
    if options.check:
        remarks += [f'`{path}` is not there: it will be painted.' for path in missing]
        for line in remarks + plan(inputs, options):
            say(f'  - {line}')
    style_size = inputs.style.shape[1::-1]
    if options.device == 'cpu':
        check_memory(inputs.size, style_size, options)
    if options.check:
        return 0
    weights, remark = find_weights(options)
    notes = [remark or f'Network {weights.kind} from `{weights.path}`.']
    if set(BALANCE[weights.kind]) != {1}:
        notes.append(f"Losses of {weights.kind} are scaled, layer by layer, to the size of vgg19's, as measured with "
                     "Oxford's weights.")
    random_seed, checkpoint = options.random_seed, None
    if os.path.exists(options.checkpoint):
        if options.resume:
            checkpoint = read_checkpoint(options.checkpoint, explained(inputs, weights, options, random_seed))
            random_seed = checkpoint[0]['header']['random_seed']
        else:
            notes.append(f'`{options.checkpoint}` of a run that did not end will be replaced; --resume would go on.')
    elif options.resume:
        notes.append(f'There is no `{options.checkpoint}` to resume from: starting anew.')
    random_seed = secrets.randbelow(10 ** 9) if random_seed is None else random_seed
    used, trouble = import_theano(options.device)
    if trouble:
        say(bold('WARNING: {} Computing on the CPU instead. FIX: {}.'.format(*trouble.args)))
        check_memory(inputs.size, style_size, options)
    say(f'  - Using device {described(used)} for processing the images.')
    if used != 'cpu':                                                   # where the engine needs no slices
        style_size = math.ceil(style_size[0] * (1 + 0.05 * options.scales)), style_size[1] * copy_count(options)
        options.slices = options.slices or fitting_slices(
            inputs.size, style_size, options.style_layers, theano.gpuarray.get_context(None).free_gmem)
    if missing:
        paint_maps(options, missing, weights, used == 'cpu')
        content_map, style_map, lines = read_maps(options, map_paths(options), inputs.content, inputs.style)
        inputs, remarks = inputs._replace(content_map=content_map, style_map=style_map), remarks + lines
    elif options.auto_maps:
        remarks.append('Both maps are there: nothing to paint.')
    for line in remarks + notes + [f'Random seed {random_seed}.']:
        say(f'  - {line}')
    say('  - Compiling, which takes a minute the first time..')
    objective = Objective(weights, options, inputs.content is not None, inputs.style_map is not None, used == 'cpu',
                          inputs.style_alpha is not None)
    header = dict(explained(inputs, weights, options, random_seed), device=used)
    journal = Journal(options, inputs.size, header, checkpoint)
    del weights, checkpoint                                             # network and journal have their own
    start = time.time()
    try:
        handle_signals(journal.interrupt)
        with contextlib.ExitStack() as end:
            end.callback(handle_signals, signal.SIG_IGN)                # what follows only saves
            end.callback(journal.bar.close)
            if journal.number:
                journal.say(f'  - Going on from `{options.checkpoint}`, after {journal.number} evaluations.')
            paint(objective, inputs, options, random_seed, journal)
    except KeyboardInterrupt as interruption:
        saved = 'there is nothing to save' if not journal.number else 'the image so far could be written nowhere'
        if journal.save():
            saved = f'the image so far is in {kept(options)}; --resume goes on from there'
        journal.write_checkpoint()
        say(f'\n{bold("Interrupted")} after {journal.number} evaluations on device `{used}`: {saved}.')
        return 128 + interruption.args[0]
    except FloatingPointError:
        saved = f'the last good image is in {kept(options)}' if journal.save() else 'nothing was saved'
        raise UserError(f'The loss is no longer a number after {journal.number} evaluations; {saved}.',
                        'try smaller weights, or another --random-seed') from None
    except Exception:                                                   # there may be no more memory, for one
        if journal.save():
            say(f'\nAfter {journal.number} evaluations the image so far is in {kept(options)}.')
        raise
    if journal.saved is None:
        raise UserError('The result could not be written anywhere.', 'make room, and --resume')
    with contextlib.suppress(OSError):
        os.unlink(options.checkpoint)
    say(f'\n{bold("Optimization finished")} in {time.time() - start:.1f}s, average pixel error {journal.error:.1f}, '
        f'on device `{used}`: {kept(options)}.')
    return 0


def main(arguments):
    """Run the program; errors become one clear line and an exit code."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))  # None: closed
    handle_signals(interrupt)
    try:
        if sys.version_info[:2] != (3, 11):
            raise UserError(f'This is Python {sys.version_info[0]}.{sys.version_info[1]}, and the program needs 3.11.',
                            'run it with python3.11, in docker, or with uv run')
        return run(arguments)
    except UserError as error:
        problem, fix = error.args
    except ImportError as error:
        problem, fix = f'{one_line(error)}.', 'install the packages: pip install -r requirements.txt'
    except OSError as error:
        problem = f'{error.filename or "A file"}: {error.strerror or one_line(error)}.'
        fix = 'check the disk and its permissions'
    except Exception as error:  # Theano's convolutions and libgpuarray have errors of their own for a lack of memory
        if not isinstance(error, MemoryError) and not re.search('out of memory|failed to alloc', str(error), re.I):
            raise
        problem, fix = 'There is not enough memory.', 'a smaller --max-size; on a GPU also more --slices'
    except KeyboardInterrupt as interruption:
        say(f'\n{bold("Interrupted")} before the first evaluation: there is nothing to save.')
        return 128 + interruption.args[0]
    print(f'ERROR: {problem}\n  FIX: {fix}.', file=sys.stderr)
    return 2


# ---- automatic maps --------------------------------------------------------------------------------------------------

# What tells parts apart, and its weight: features, colours, the way to the four borders, height in the picture.
MAP_WEIGHTS = {'4_1': 0.5, '5_1': 0.7, 'colour': 0.3, 'borders': 1.0, 'height': 0.5}
MAP_SIDE, MAP_SEGMENTS = 384, 600                                     # longest side, superpixels
MAP_LEAST = 0.03, 0.002                                               # of both pictures: a main part, a detail


def import_skimage():
    """What automatic maps need, and nothing else does."""
    global color, csgraph, distance, hierarchy, segmentation, sparse
    from scipy import sparse
    from scipy.cluster import hierarchy
    from scipy.sparse import csgraph
    from scipy.spatial import distance
    from skimage import color, segmentation


def preview_path(path):
    """``dir/name_sem.png`` -> ``dir/name_sem_preview.jpg``."""
    return os.path.splitext(path)[0] + '_preview.jpg'


def missing_maps(options):
    """The pictures whose maps are to be painted, {map's path: picture's path}; UserError where that cannot be done."""
    if not options.auto_maps:
        return {}
    if not options.content or not options.semantic_weight or not options.semantic_ext.lower().endswith('.png'):
        raise UserError('--auto-maps needs a content picture, maps that are read, and maps that end in .png.',
                        'add --content, leave out --semantic-weight=0 or --method, or let --semantic-ext end in .png')
    pictures = dict(zip(map_paths(options), (options.content, options.style)))
    if len(pictures) == 1:
        raise UserError(f'{options.content!r} and {options.style!r} would have one map.', 'rename one of them')
    missing = {path: picture for path, picture in pictures.items() if not is_there(path)}
    for path in missing:
        check_folder(os.path.dirname(path) or '.', '--auto-maps', 'copy the picture into a folder of your own')
    return missing


def map_colours(count):
    """(count, 3) uint8: of the colours with a channel at 255 and the others at 0, 128 or 255, each the one whose
    direction is farthest from those before."""
    colours = np.array([colour for colour in np.ndindex(3, 3, 3) if max(colour) == 2]) * 127.5
    directions = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    chosen = [1]                                                        # (0, 0, 255)
    while len(chosen) < count:
        chosen.append((directions @ directions[chosen].T).max(axis=1).argmin())
    return np.uint8(colours[chosen] + .5)


def scaled(X):
    """`X` (n, d) about its mean, with vectors of length one on average (root mean square)."""
    X = X - X.mean(axis=0)
    return X / max(np.sqrt((X ** 2).sum(axis=1).mean()), 1e-12)


def segment_means(segments, values):
    """Means of `values` (h, w, C), brought to the size of `segments` (H, W), over each of the segments, (n, C)."""
    count, segments = segments.max() + 1, segments[::2, ::2]            # every other pixel tells enough
    values = resized(np.float32(values), segments.shape[::-1], Image.BILINEAR).reshape(segments.size, -1)
    cover = sparse.csr_matrix((np.ones(segments.size), (segments.ravel(), np.arange(segments.size))),
                              (count, segments.size))
    return cover @ values / np.maximum(cover.sum(axis=1).A, 1)


def border_ways(segments, X):
    """How much changes on the best way from each segment to the four borders, (n, 4): geodesic distances.

    A step between neighbours costs what it is above 0.7 of the median: within a part there is nothing to pay, however
    long the way. The idea is from geodesic saliency, Wei, Wen, Zhu, Sun (2012).

    Parameters
    ----------
    segments : (H, W) int array
    X : (n, d) array
    """
    pairs = [np.stack([a.ravel(), b.ravel()]) for a, b in ((segments[1:], segments[:-1]),
                                                           (segments[:, 1:], segments[:, :-1]))]
    a, b = np.unique(np.sort(np.concatenate(pairs, axis=1), axis=0), axis=1)
    a, b = a[a != b], b[a != b]
    steps = np.linalg.norm(X[a] - X[b], axis=1)
    steps = np.maximum(steps / max(np.median(steps), 1e-12) - 0.7, 1e-3)
    graph = sparse.csr_matrix((steps, (a, b)), shape=(len(X), len(X)))
    borders = segments[0], segments[-1], segments[:, 0], segments[:, -1]
    ways = np.stack([csgraph.dijkstra(graph, directed=False, indices=np.unique(border), min_only=True)
                     for border in borders], axis=1)
    return ways / ways.mean()


def describe(pictures, weights, fast):
    """Both pictures cut into superpixels, and what is known of each.

    Features and colours are taken about their mean in each picture, since pictures differ in light and style.

    Parameters
    ----------
    pictures : list of two (H, W, 3) uint8 arrays
    weights : Weights
    fast : bool
        With the engine.

    Returns
    -------
    segments : list of two (h, w) int arrays
        Superpixels by SLIC, Achanta et al. (2012), numbered on through both pictures.
    X : (n, d) array
        All that `MAP_WEIGHTS` names.
    f : (n, e) array
        The network's part of it: 32 principal components of each layer.
    """
    names = [name for name in weights.layers if name in MAP_WEIGHTS] or list(weights.layers)[-1:]
    x = T.tensor3('x')
    network = theano.function([x], list(features(build_network(weights, names, fast), x, names).values()))
    segments, known = [], []
    for picture in pictures:
        scale = MAP_SIDE / max(picture.shape)
        small = resized(picture, [max(16, round(side * scale)) for side in picture.shape[1::-1]], Image.LANCZOS)
        cut = segmentation.slic(small, n_segments=MAP_SEGMENTS, compactness=10, sigma=0.5, start_label=0)
        height = np.linspace(-1, 1, len(cut))[:, None, None].repeat(cut.shape[1], axis=1)
        lab = segment_means(cut, color.rgb2lab(small))
        layers = [segment_means(cut, f / np.maximum(np.linalg.norm(f, axis=2, keepdims=True), 1e-6))
                  for f in network(np.float32(planes(small)))]
        known.append([X - X.mean(axis=0) for X in (lab / np.maximum(lab.std(axis=0), 1e-6), *layers)] +
                     [segment_means(cut, height)])
        segments.append(cut)
    split = segments[0].max() + 1
    colours, *layers, height = map(np.concatenate, zip(*known))
    layers = [scaled(f @ np.linalg.eigh(f.T @ f)[1][:, -32:]) for f in layers]
    f = np.hstack([MAP_WEIGHTS.get(name, 1) * layer for name, layer in zip(names, layers)])
    ways = map(border_ways, segments, np.split(np.hstack([f, scaled(colours)]), [split]))
    X = np.hstack([f, MAP_WEIGHTS['colour'] * scaled(colours), MAP_WEIGHTS['height'] * height * np.sqrt(3),
                   MAP_WEIGHTS['borders'] * scaled(np.concatenate(list(ways)))])
    return [segments[0], segments[1] + split], X, f


def shared_split(X, shares, least):
    """Cut a part in two, each of which both pictures have.

    Goes down Ward's tree to the first such fork; branches that only one picture has go with the nearer of the two.

    Parameters
    ----------
    X : (n, d) array
    shares : (n, 2) array
        Each superpixel's share of the first and of the second picture.
    least : float
        Share of each picture that a half must have.

    Returns
    -------
    gain : float
        By how much the cut lowers the sum of squares; 0 where there is none.
    side : (n,) bool array
    """
    n, left, side = len(X), [], np.zeros(len(X), dtype=bool)
    if n < 4:
        return 0, side
    tree, nodes = hierarchy.to_tree(hierarchy.ward(X), rd=True)
    both = [shares[node.pre_order()].sum(axis=0).min() >= least for node in nodes]
    while not tree.is_leaf():
        children = sorted((tree.left, tree.right), key=lambda node: both[node.id])
        if both[children[0].id]:
            halves = [child.pre_order() for child in children]
            centres = [X[half].mean(axis=0) for half in halves]
            side[halves[1]] = True
            for branch in left:
                a, b = (np.linalg.norm(X[branch].mean(axis=0) - centre) for centre in centres)
                side[branch] = b < a
            return tree.dist ** 2 / 2, side
        left.append(children[0].pre_order())
        tree = children[1]
    return 0, side


def joint_parts(X, f, shares, count):
    """Part of each superpixel, 0 .. count - 1, by cutting again and again what both pictures have.

    First the part whose cut lowers the sum of squares the most, by all that is known. When no part can be cut any more
    the most detailed one is, by its features alone and about their mean in each picture: eyes from skin.

    Parameters
    ----------
    X, f, shares : arrays
        As from `describe` and for `shared_split`.
    count : int

    Returns
    -------
    (n,) int array
        With fewer parts where there is nothing left to cut.
    """
    parts, cuts = np.zeros(len(X), dtype=int), [None]
    for detailed in (False, True):
        def split(k):
            part = np.flatnonzero(parts == k)
            Y, images = (f if detailed else X)[part].copy(), shares[part] > 0
            for image in images.T if detailed else ():
                Y[image] -= Y[image].mean(axis=0)
            gain, side = shared_split(Y, shares[part], MAP_LEAST[detailed])
            return gain / (len(part) if detailed else 1), part[side]
        cuts = [split(k) for k in range(len(cuts))]
        while len(cuts) < count and max(gain for gain, _ in cuts):
            k = max(range(len(cuts)), key=lambda k: cuts[k][0])
            parts[cuts[k][1]] = len(cuts)
            cuts[k] = split(k)
            cuts.append(split(len(cuts)))
    return parts


def painted_parts(segments, X, painted, k):
    """Parts of the superpixels as in a painted map (H, W, 3) of picture `k`, and the colours of these parts.

    A superpixel is of the class whose three nearest examples are nearest.
    """
    colours, nearest = np.unique(colour_codes(resized(painted, segments[k].shape[::-1], Image.NEAREST)),
                                 return_inverse=True)
    colours, nearest = code_colours(colours), nearest.reshape(segments[k].shape)            # (K, 3), (h, w)
    own = np.unique(segments[k])
    cover = segment_means(segments[k] - own[0], np.eye(len(colours))[nearest])              # (n, K)
    classes = cover.argmax(axis=1)
    best, seen = cover.argmax(axis=0), cover.any(axis=0)                # the smallest have an example, too, where
    classes[best[seen]] = np.flatnonzero(seen)                          # no other of them has the same
    used = np.unique(classes)
    distances = [np.sort(distance.cdist(X, X[own][classes == c]), axis=1)[:, :3].mean(axis=1) for c in used]
    return used[np.argmin(distances, axis=0)], np.uint8(colours)


def automatic_maps(pictures, maps, count, weights, fast):
    """Maps of two pictures in which a colour means the same thing.

    Parameters
    ----------
    pictures : list of two (H, W, 3) uint8 arrays
    maps : list of two (H, W, 3) uint8 arrays or None
        A painted map gives its parts and colours to the other picture; without any, `count` parts are found.
    count : int
    weights : Weights
    fast : bool
        With the engine, which is for the CPU.

    Returns
    -------
    list of two (H, W, 3) uint8 arrays
    """
    segments, X, f = describe(pictures, weights, fast)
    if maps[0] is None and maps[1] is None:
        shares = np.stack([np.bincount(cut.ravel(), minlength=len(X)) / cut.size for cut in segments], axis=1)
        parts, colours = joint_parts(X, f, shares, count), map_colours(count)
    else:
        k = int(maps[0] is None)
        parts, colours = painted_parts(segments, X, maps[k], k)
    return [resized(colours[parts[cut]], picture.shape[1::-1], Image.NEAREST)
            for cut, picture in zip(segments, pictures)]


def paint_maps(options, missing, weights, fast):
    """Paint and write the maps that are `missing`, each with a preview, and say so."""
    paths, targets = (options.content, options.style), map_paths(options)
    pictures = [read_picture(path).pixels for path in paths]
    maps = []
    for target, path, picture in zip(targets, paths, pictures):
        painted = None if target in missing else classify_maps([target], [(path, picture)])
        maps.append(painted and np.uint8(painted.classes)[painted.labels[0]])
    for target, picture, colours in zip(targets, pictures, automatic_maps(
            pictures, maps, options.auto_maps, weights, fast)):
        if target in missing:
            written = {target: colours, preview_path(target): np.uint8((picture.astype(int) + colours) // 2)}
            written = {path: pixels for path, pixels in written.items() if not os.path.exists(path)}
            for path, pixels in written.items():
                write_picture(pixels, path)
            parts = len(np.unique(colour_codes(colours)))
            say(f'  - Painted {parts} parts: ' + ', '.join(f'`{path}`' for path in written))
    say('  - Maps can be mended by hand in a paint program: run again, and they are kept.')


# ---- weights ---------------------------------------------------------------------------------------------------------

FIRST = {'vgg19': (0.341195, 0.339992, -0.0448442),                   # the first row of conv1_1, as correlation on BGR,
         'vgg16': (0.4294706, 0.3734670, -0.0613601)}                 # tells how the colours and filters of a file lie

# VGG19 as Keras publishes it. Hosts vanish: a file is known by its size and checksum, not by its address.
KERAS = {'file': 'vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5', 'bytes': 80_134_624,
         'md5': '253f8cb515780f3b799900260a226db6'}
ADDRESSES = ('https://storage.googleapis.com/tensorflow/keras-applications/vgg19/',
             'https://github.com/fchollet/deep-learning-models/releases/download/v0.1/')
PATIENCE = 10                                                         # seconds without a word, then the next address

# A pre-trained network: its kind, {'1_1': (W, b), ...} as cross-correlation on BGR, where it is from, its checksum.
Weights = namedtuple('Weights', 'kind layers path sha256')


class ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays and nothing else: a pickle could run any code."""

    def find_class(self, module, name):
        admitted = {'ndarray': np.ndarray, 'dtype': np.dtype, '_frombuffer': np.core.numeric._frombuffer,
                    '_reconstruct': np.core.multiarray._reconstruct}
        if module.split('.')[0] == 'numpy' and name in admitted:
            return admitted[name]
        if (module, name) == ('_codecs', 'encode'):                   # how protocol 2 spells bytes
            return lambda text, encoding: text.encode('latin1')
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, which no array needs')


def read_pickle(path):
    """The original's format: a (bz2) pickle of [W, b, W, b, ...] from conv1_1 on, filters for true convolution."""
    with (bz2.open if path.endswith('.bz2') else open)(path, 'rb') as file:
        arrays = ArrayUnpickler(file, encoding='latin1').load()
    kinds = {2 * sum(blocks): kind for kind, blocks in BLOCKS.items()}
    if not isinstance(arrays, list) or len(arrays) not in kinds:
        raise ValueError('it is not a list of 32 arrays (VGG19) or 26 (VGG16)')
    names = layer_names(kinds[len(arrays)])
    return {name: (W[:, :, ::-1, ::-1], b) for name, W, b in zip(names, arrays[::2], arrays[1::2])}


def read_h5(path):
    """Keras' format: groups ``block1_conv1`` ..., filters (height, width, in, out) for cross-correlation."""
    import h5py
    layers = {}
    with h5py.File(path, 'r') as file:
        for group in file:
            match = re.fullmatch(r'block(\d)_conv(\d)', group)
            if match:
                arrays = []
                file[group].visititems(lambda name, item: arrays.append(item[()]) if hasattr(item, 'shape') else None)
                W, b = sorted(arrays, key=np.ndim, reverse=True)
                layers['_'.join(match.groups())] = W.transpose(3, 2, 0, 1), b
    return layers


def read_npz(path):
    """Our own format: ``conv1_1.W`` (out, in, 3, 3) for cross-correlation on BGR and ``conv1_1.b``, and so on."""
    with np.load(path, allow_pickle=False) as file:
        return {name[4:-2]: (file[name], file[name[:-1] + 'b']) for name in file.files if name.endswith('.W')}


def read_weights(path):
    """A pre-trained network, with its filters turned and its colours ordered as we use them.

    Parameters
    ----------
    path : str
        ``.pkl`` or ``.pkl.bz2`` as the original's, ``.h5`` as Keras', or ``.npz`` as our own.

    Returns
    -------
    weights : Weights
        float32; the layers that the file has, in the network's order.
    remark : str or None
        What was mended, or that the network is unknown.

    Raises
    ------
    UserError
        The file is missing or broken, or an array has the wrong shape.
    """
    fix = 'use the original vgg19_conv.pkl.bz2, the Keras .h5 of VGG19 or VGG16, or leave --weights out'
    if not is_there(path) or not os.path.isfile(path):
        raise UserError(f'{path!r} is no file with weights.', fix)
    reader = {'.npz': read_npz, '.h5': read_h5, '.hdf5': read_h5}.get(os.path.splitext(path)[1], read_pickle)
    try:
        layers = {name: tuple(np.asarray(array, dtype=np.float32) for array in pair)
                  for name, pair in reader(path).items()}
    except PermissionError:
        raise forbidden(path) from None
    except Exception as error:  # a broken file can raise anything in the libraries that read it
        raise UserError(f'{path!r} cannot be read as weights: {one_line(error)}.', fix) from None

    kind = 'vgg19' if '3_4' in layers else 'vgg16'
    names = layer_names(kind)
    names = names[:max([names.index(name) + 1 for name in layers if name in names], default=1)]
    for before, name in zip([3, *map(filters, names)], names):
        shapes = [(filters(name), before, 3, 3), (filters(name),)]
        found = [array.shape for array in layers.get(name, ())] or 'nothing'
        if found != shapes:
            raise UserError(f'{path!r}: conv{name} should have arrays of {shapes}, but there is {found}.', fix)

    remark = f'{path!r} is not a known VGG network: its colours and filters are taken as they lie.'
    first = layers['1_1'][0]
    for order, colours in (('BGR', slice(None)), ('RGB', slice(None, None, -1))):
        for turned, step in (('', 1), (', filters turned', -1)):
            if np.allclose(first[0, colours][0, ::step, ::step][0], FIRST[kind], atol=1e-3):
                layers = {name: (W[:, :, ::step, ::step], b) for name, (W, b) in layers.items()}
                layers['1_1'] = layers['1_1'][0][:, colours], layers['1_1'][1]
                remark = f'{path!r} lies as {order}{turned}: mended.' if order == 'RGB' or turned else None
    with open(path, 'rb') as file:
        checksum = hashlib.file_digest(file, 'sha256').hexdigest()
    return Weights(kind, {name: layers[name] for name in names}, path, checksum), remark


def download(address, part):
    """Fetch the Keras file to `part`, going on where an earlier attempt broke off; OSError if it is not that file."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    if have < KERAS['bytes']:
        request = urllib.request.Request(address, headers={'Range': f'bytes={have}-'} if have else {})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            have = have if response.status == 206 else 0
            with open(part, 'ab' if have else 'wb') as file, tqdm(
                    total=KERAS['bytes'], initial=have, unit='B', unit_scale=True, desc='VGG19', disable=None) as bar:
                while file.tell() <= KERAS['bytes'] and (piece := response.read(1 << 16)):
                    bar.update(file.write(piece))
    if os.path.getsize(part) < KERAS['bytes']:
        raise OSError('the connection broke off')                       # what came is kept for the next attempt
    with open(part, 'rb') as file:
        if hashlib.file_digest(file, 'md5').hexdigest() != KERAS['md5']:
            os.unlink(part)
            raise OSError('it sent something else')


def fetch_vgg19():
    """The path of VGG19 as .npz in the cache folder, fetched and converted the first time.

    ``DOODLE_ADDRESSES`` may name more folders on the net, with spaces between, which are tried first.

    Raises
    ------
    OSError
        No address gave the file; the message tells why, for each.
    """
    folder = os.path.join(os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache'), 'neural-doodle')
    path, part = os.path.join(folder, 'vgg19.npz'), os.path.join(folder, KERAS['file'] + '.part')
    if os.path.exists(path):
        return path
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                                # of several runs at once one fetches
        troubles = []
        if os.path.exists(path):
            return path
        for address in (*os.environ.get('DOODLE_ADDRESSES', '').split(), *ADDRESSES):
            say(f'  - Fetching VGG19 from {address} ..')
            try:
                download(address + KERAS['file'], part)
            except (OSError, ValueError, http.client.HTTPException) as error:   # ValueError: it is no address
                troubles.append(f'{urllib.parse.urlsplit(address).netloc}: {error}')
                continue
            arrays = {f'conv{name}.{kind}': array for name, pair in read_h5(part).items()
                      for kind, array in zip('Wb', pair)}
            with written_whole(path) as file:
                np.savez(file, **arrays)
            os.unlink(part)
            return path
    raise OSError('; '.join(troubles))


def find_weights(options):
    """The weights asked for with --weights or --network, else the best there are.

    These are the original's file beside the script or in this folder, VGG19 from the cache or the net, and at last the
    bundled VGG16.

    Returns
    -------
    weights : Weights
    remark : str or None
    """
    here = os.path.dirname(os.path.abspath(__file__))
    path, trouble = options.weights, None
    if not path and options.network != 'vgg16':
        path = next(filter(os.path.exists, (os.path.join(here, 'vgg19_conv.pkl.bz2'), 'vgg19_conv.pkl.bz2')), None)
        try:
            path = path or fetch_vgg19()
        except OSError as error:
            trouble = f'VGG19 cannot be fetched ({error})'
            if options.network == 'vgg19':
                raise UserError(trouble + '.', f"put {KERAS['file']} here and name it with --weights") from None
    bundled = os.path.join(here, 'vgg16.npz')
    weights, remark = read_weights(path or bundled)
    if options.network not in (None, weights.kind):
        raise UserError(f'{weights.path!r} is {weights.kind}, not {options.network}.', 'change --weights or --network')
    for layer in options.style_layers + options.content_layers:
        if layer not in weights.layers:
            raise UserError(f'{weights.path!r} has no conv{layer}: it ends at conv{list(weights.layers)[-1]}.',
                            'choose other layers, or a larger network with --weights')
    if trouble:
        remark = bold(f'WARNING: {trouble}: using the bundled VGG16. FIX: --weights PATH, or --network=vgg16.')
    return weights, remark


# ---- devices ---------------------------------------------------------------------------------------------------------

def cgroup(kind, unified, *legacy):
    """The numbers in a file of this process's cgroup and of each above it: v2, or v1, which has several files."""
    groups = []
    with contextlib.suppress(OSError), open('/proc/self/cgroup') as file:
        groups = [line.rstrip('/\n').split(':', 2) for line in file]
    for _, kinds, path in groups:                                       # a container sees its own as /
        folder, files = (f'/{kind}', legacy) if kinds else ('', [unified])
        for depth in range(path.count('/') + 1 if kind in kinds.split(',') or not kinds else 0):
            with contextlib.suppress(OSError, ValueError):              # no such file; 'max', which is no number
                above = path.rsplit('/', depth)[0]
                texts = [open(f'/sys/fs/cgroup{folder}{above}/{file}').read() for file in files]
                yield [int(number) for number in ' '.join(texts).split()]


def allowed_cores():
    """How many cores this process may use: those of its CPU set, or fewer by the quota of its cgroup."""
    quotas = cgroup('cpu', 'cpu.max', 'cpu.cfs_quota_us', 'cpu.cfs_period_us')
    return min([len(os.sched_getaffinity(0))] + [math.ceil(quota / period) for quota, period in quotas if quota > 0])


def memory_limit():
    """Bytes that this process may fill: what the machine has to spare, or less by the limit of a cgroup."""
    with open('/proc/meminfo') as file:
        free = dict(re.findall(r'(\w+): +(\d+) kB', file.read()))
    limits = cgroup('memory', 'memory.max', 'memory.limit_in_bytes')
    return min([1024 * (int(free['MemAvailable']) + int(free['SwapFree']))] + [limit for limit, in limits])


def memory_needed(size, style_size, options):
    """Bytes at the peak of a run on the CPU: samples/measure_memory.py fits the numbers to measured peaks.

    The peak is where the network is compiled, or where the features and keys of all copies of the style are made, or
    where the image is painted.
    """
    def floats(names):                                                  # bytes a pixel of the picture
        return sum(4 * filters(name) / stride(name) ** 2 for name in names)
    names = layer_names('vgg19', options.style_layers + (options.content_layers if options.content else []))
    weights = sum(4 * 9 * before * filters(name) for before, name in zip([3, *map(filters, names)], names))
    style = floats(options.style_layers)
    matched = style * {'champandard': 2, 'li-wand': 1, 'gatys': 0}[options.method]          # features and keys
    area, style_area, copies = math.prod(size), math.prod(style_size), copy_count(options)
    making = 250 * style_area + (1.66 * style + 0.62 * matched) * copies * style_area
    painting = (1.46 * floats(names) + 1.29 * style) * area + 0.98 * matched * copies * style_area
    return max(254e6 + 11 * weights, 281e6 + 6.9 * weights + max(making, painting))


def check_memory(size, style_size, options):
    """Refuse a run that would not fit, with the size that would."""
    def sizes(longest):
        shrunk = [[math.ceil(side * min(1, longest / max(size))) for side in size] for size in (size, style_size)]
        return (shrunk[0], style_size) if options.output_size else shrunk
    limit, needed = memory_limit(), memory_needed(size, style_size, options)
    if needed <= limit:
        return
    longest = bisect.bisect(range(max(size + style_size)), limit, key=lambda n: memory_needed(*sizes(n), options)) - 1
    fix = '--output-size={}x{}'.format(*sizes(longest)[0]) if options.output_size else f'--max-size={longest}'
    fix = fix if longest >= 64 else 'close other programs, or use a machine with more memory'
    raise UserError(f'{size[0]}x{size[1]} pixels in the style of {style_size[0]}x{style_size[1]} need about '
                    f'{needed / 1e9:.1f} GB of memory, and there are {limit / 1e9:.1f} GB.', fix)


def operations(size, style_size, layers, patched):
    """Multiplications and additions of an evaluation, in direct form: the network, there and back, and the matching."""
    def area(size, name):
        return math.prod(side // stride(name) for side in size)
    names = layer_names('vgg19', layers)
    network = sum(2 * 2 * 9 * before * filters(name) * area(size, name)
                  for before, name in zip([3, *map(filters, names)], names))
    return network, sum(2 * filters(name) * area(size, name) * area(style_size, name) for name in patched)


def plan(inputs, options):
    """The run that would be, in lines: phases, patches, memory, and the time on this CPU, by its speed in NumPy."""
    style_size, total, lines = inputs.style.shape[1::-1], 0, []
    layers = options.style_layers + (options.content_layers if inputs.content is not None else [])
    patched = options.style_layers if options.method != 'gatys' and options.style_weight else []
    square = np.ones((2048, 2048), np.float32)
    square @ square                                                     # wakes the cores
    start = time.perf_counter()
    square @ square
    rate = 2 * 2048 ** 3 / (time.perf_counter() - start)
    for phase in range(options.phases):
        size, other = (phase_size(whole, phase, options.phases) for whole in (inputs.size, style_size))
        network, matching = operations(size, other, layers, patched)
        # The engine's network reaches NumPy's rate, counted so, and its matching half of it.
        matching *= 2 * copy_count(options) / (options.iterations if options.cache else 1)
        seconds = (network + matching) / rate
        total += seconds * options.iterations
        patches = [f'{name} {copy_count(options) * math.prod(side // stride(name) - 2 for side in other):,}'
                   for name in patched]
        lines.append('Phase #{}: {}x{}, {} evaluations of about {:,.2f} s{}'.format(
            phase, *size, options.iterations, seconds, ', style patches ' + ', '.join(patches) if patches else ''))
    return lines + [f'On this CPU about {total / 60:.0f} minutes and '
                    f'{memory_needed(inputs.size, style_size, options) / 1e9:.1f} GB in all.']


def fitting_slices(image, style, layers, memory):
    """The number of slices with which the scores of `match` fit into a share of a GPU's memory.

    Parameters
    ----------
    image, style : (width, height) of the two pictures
    layers : list of str
        Style layers.
    memory : int
        Free bytes. A quarter is for the scores, and 4 GB at most: the network needs more, and few slices gain nothing.
    """
    needed = [1]
    for layer in layers:
        W, H, w, h = (side // stride(layer) for side in (*image, *style))
        # Three such arrays are alive: products, their sum, and one to spare. Two more rows of pixels than patches.
        row = 3 * 4 * H * W * w
        needed.append(min(h - 2, math.ceil((h - 2) / max(1, min(memory / 4, 1 << 32) // row - 2))))
    return max(needed)


def check_compiler():
    """Theano compiles C: without a compiler it would run, a hundred times slower, without a word."""
    if not shutil.which('g++') and 'cxx=' not in os.environ.get('THEANO_FLAGS', ''):
        raise UserError('There is no g++, which compiles the network.', 'install g++ (Debian: apt-get install g++)')
    if not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')):
        raise UserError("Python's headers are missing.", 'install them (Debian: apt-get install python3-dev)')


def blas_flags():
    """Theano's flags for a fast BLAS: the system's OpenBLAS, else the one in the package scipy-openblas32."""
    if os.path.isabs(subprocess.check_output(['g++', '-print-file-name=libopenblas.so'], text=True).strip()):
        return {'blas.ldflags': '-lopenblas'}
    folder = importlib.import_module('scipy_openblas32').get_lib_dir()
    if re.search(r'[\s,]', folder):
        raise UserError(f'Theano cannot link from {folder!r}, which has a space or comma in its name.',
                        'make the virtual environment elsewhere, or install libopenblas-dev')
    # The package's symbols carry a prefix; these are the routines that Theano's C code calls.
    routines = [kind + routine for kind in 'sd' for routine in ('gemm', 'gemv', 'ger', 'dot')]
    return {'blas.ldflags': f'-L{folder} -lscipy_openblas',
            'gcc.cxxflags': ' '.join(f'-D{routine}_=scipy_{routine}_' for routine in routines)}


class NoProps(tuple):
    """An empty ``__props__`` that is true: for Theano a false one has no version and is compiled at each start."""

    def __bool__(self):
        return True

    def __reduce__(self):
        return tuple, ()


def return_freed_memory():
    """Let glibc give back what is freed at once, where by itself it keeps blocks of up to 32 MB and their gaps."""
    with contextlib.suppress(OSError, AttributeError):                  # other C libraries do
        ctypes.CDLL('libc.so.6').mallopt(-3, 4 << 20)                   # M_MMAP_THRESHOLD


def keep_compiled_code():
    """Let Theano find all that it compiled in an earlier process, where by itself it compiles some Ops each time."""
    ops = [theano.gof.Op]
    for op in ops:
        ops += op.__subclasses__()
        if vars(op).get('__props__') == ():
            op.__props__ = NoProps()
    # Theano's is hash(), another in each process.
    theano.gof.op.COp.c_code_cache_version = lambda op: (zlib.crc32(''.join(op.func_codes).encode()),)


def compile_quickly():
    """Let g++ read the headers of Theano's C++ once only, which take most of its time, and leave debug symbols out."""
    compiler, header = theano.gof.cmodule.GCC_compiler, os.path.join(theano.config.compiledir, 'headers.h')
    compile_str = compiler.compile_str

    def compiled(*arguments, preargs, **named):
        if not os.path.exists(header + '.gch'):
            with written_whole(header) as file:
                file.write(b'#include <Python.h>\n#include <iostream>\n#include <vector>\n#include <algorithm>\n'
                           b'#include "theano_mod_helper.h"\n#include <math.h>\n#include <numpy/arrayobject.h>\n'
                           b'#include <numpy/arrayscalars.h>\n')
            # Where it does not fit g++ passes over it, and where it cannot be made things just take longer.
            with contextlib.suppress(OSError, subprocess.SubprocessError), written_whole(header + '.gch') as file:
                flags = '-shared', '-g0', '-O3', '-fno-math-errno', '-fvisibility=hidden', *compiler.compile_args()
                folders = ('-I' + folder for folder in theano.gof.cmodule.std_include_dirs())
                subprocess.run([theano.config.cxx, *flags, *folders, '-x', 'c++-header', header, '-o', file.name],
                               check=True, capture_output=True)
        return compile_str(*arguments, preargs=[*preargs, '-g0', '-include', header], **named)
    compiler.compile_str = staticmethod(compiled)


def integers(count, function, *arguments):
    """The integers that a C function of CUDA's writes, or None where it fails."""
    numbers = [ctypes.c_int() for _ in range(count)]
    return None if function(*map(ctypes.byref, numbers), *arguments) else tuple(number.value for number in numbers)


def check_cuda(device):
    """Refuse, in plain words, what libgpuarray would answer with a number or a crash.

    Raises
    ------
    UserError
        There is no driver, it is older than the compiler (whose code it cannot read), or the card is too new.
    """
    try:
        cuda = ctypes.CDLL('libcuda.so.1')
    except OSError:
        fix = 'install the driver, and see that nvidia-smi finds the card'
        raise UserError("Nvidia's driver (libcuda.so.1) is not there.",
                        fix if mounts() is None else 'start the container with --gpus all') from None
    version, compiler = integers(1, cuda.cuDriverGetVersion), integers(2, ctypes.CDLL('libnvrtc.so').nvrtcVersion)
    driver = version and divmod(version[0] // 10, 100)                                      # 12040 is CUDA 12.4
    if driver and compiler and driver < compiler:
        raise UserError("Nvidia's driver is too old: it is for CUDA {}.{}, and the compiler (nvrtc) for {}.{}.".format(
            *driver, *compiler), 'install a newer driver')
    card = None if cuda.cuInit(0) else integers(1, cuda.cuDeviceGet, int(device[4:] or 0))
    capability = card and integers(2, cuda.cuDeviceComputeCapability, *card)
    if capability and capability > (9, 0):                              # libgpuarray would take 12.0 for 1.2
        raise UserError('the card is too new: its compute capability is {}.{}, and libgpuarray knows them up to 9.0.'
                        .format(*capability), 'use an older card, or --device=cpu')


def described(device):
    """A device in words: a GPU with its name, memory and driver."""
    if device == 'cpu':
        return '`cpu`'
    gpu, driver = theano.gpuarray.get_context(None), ''
    with contextlib.suppress(OSError):
        driver = ', driver ' + re.search(r'\d+\.[\d.]+', open('/proc/driver/nvidia/version').read()).group()
    return f'`{device}` ({gpu.devname}, {gpu.total_gmem / 1e9:.1f} GB{driver})'


def import_theano(device):
    """Import Theano 1.0.5 and Lasagne 0.1 on a Python they were not made for, and open the device.

    Parameters
    ----------
    device : str
        ``cpu``, ``cudaN`` or ``openclN:M``. A ``device`` in the user's THEANO_FLAGS wins, and so does any other key.

    Returns
    -------
    device : str
        The device really used.
    trouble : UserError or None
        Why it is not the one asked for.
    """
    global theano, T, lasagne, lbfgsb
    check_compiler()
    user = dict(flag.strip().split('=', 1) for flag in os.environ.get('THEANO_FLAGS', '').split(',') if '=' in flag)
    device = re.sub('^gpu', 'cuda', user.pop('device', device))
    if user.get('floatX', 'float32') != 'float32':
        raise UserError(f"THEANO_FLAGS asks for floatX={user['floatX']}, and the program computes in float32.",
                        'leave floatX out of THEANO_FLAGS')
    flags = {'floatX': 'float32', 'device': 'cpu', 'dnn.enabled': 'False', 'print_active_device': 'False'}
    if 'blas.ldflags' not in user:
        flags.update(blas_flags())
    if 'gcc.cxxflags' in user:                                         # adds to ours, without which BLAS has no names
        user['gcc.cxxflags'] = f"{flags.get('gcc.cxxflags', '')} {user['gcc.cxxflags']}".strip()
    if not os.access(os.path.expanduser('~'), os.W_OK):
        flags['base_compiledir'] = os.path.join(tempfile.gettempdir(), f'theano-{os.getuid()}')
    os.environ['THEANO_FLAGS'] = ','.join(f'{key}={value}' for key, value in {**flags, **user}.items())

    logging.getLogger('theano').setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        np.bool, np.complex = bool, complex                           # gone from NumPy 1.24
        sys.modules['theano.scan_module.scan_perform_ext'] = None     # does not compile here; scan loops in Python
        import theano
        import theano.tensor as T
        from theano.tensor.signal import pool
        downsample = types.ModuleType('theano.tensor.signal.downsample')  # Lasagne 0.1 knows pool by its old name
        downsample.max_pool_2d = lambda x, ds, ignore_border, st, padding, mode: pool.pool_2d(
            x, ws=ds, ignore_border=ignore_border, stride=st, pad=padding, mode=mode)
        sys.modules[downsample.__name__] = theano.tensor.signal.downsample = downsample
        import lasagne
        define_ops()
        keep_compiled_code()
        compile_quickly()
        from scipy.optimize import _lbfgsb as lbfgsb
        if device == 'cpu':
            return device, None
        try:
            import pygpu  # noqa: F401, first, since what Theano says of its absence helps nobody
            if device.startswith('cuda'):
                check_cuda(device)
            import theano.gpuarray
            theano.gpuarray.use(device, force=True)
            return device, None
        except UserError as error:
            problem, fix = error.args
        except Exception as error:  # libgpuarray's own errors, and whatever loading it may raise
            problem, fix = one_line(error) + '.', 'see README, Troubleshooting, or use --device=cpu'
    return 'cpu', UserError(f'{device} cannot be used: {problem}', fix)


# ---- engine ----------------------------------------------------------------------------------------------------------

def winograd(W):
    """Filters (K, C, 3, 3) for `Convolution`: G W G^T of [LG15], 36 matrices C x K in panels of 64 columns."""
    G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
    K, C = W.shape[:2]
    U = (np.kron(G, G) @ W.transpose(2, 3, 1, 0).reshape(9, C * K)).reshape(36, C, K)       # G W G^T, 36 at a time
    U = np.pad(U, [(0, 0), (0, 0), (0, -K % 16)])
    panels = [U[:, :, k:k + 64].reshape(36, -1) for k in range(0, U.shape[2], 64)]
    return np.concatenate(panels, axis=1, dtype=np.float32)


def define_ops():
    """The two Ops, as soon as there is Theano to derive them from; once, since they are pickled by name."""
    global Convolution, Matching
    if 'Matching' in globals():
        return

    class Compiled(theano.Op):
        """An Op on float32 arrays, whose code is compiled with OpenMP; OMP_NUM_THREADS and the CPU set are heeded."""

        __props__ = ()

        def apply(self, inputs, dimensions, outputs):
            """The node, once its inputs are known to have these dimensions."""
            inputs = [T.as_tensor_variable(variable) for variable in inputs]
            for variable, ndim in zip(inputs, dimensions):
                if variable.dtype != 'float32' or variable.ndim != ndim:
                    raise TypeError(f'{self}: {variable} should be float32 with {ndim} dimensions')
            return theano.Apply(self, inputs, outputs)

        def c_support_code(self):
            return COMMON + self.code

        def c_code_cache_version(self):
            return zlib.crc32(self.c_support_code().encode()), 1          # not hash(), which differs in every process

        def c_compile_args(self):
            return ['-fopenmp']

        def call(self, function, arguments, sub):
            """C code that calls a function and fails where it throws."""
            return f'if (!guarded([&] {{ {function}({", ".join(arguments)}); }})) {sub["fail"]}'

    class Convolution(Compiled):
        """The rectified 'same' convolution with 3x3 filters, or its gradient, by Winograd's F(4x4, 3x3) [LG15].

        A tile of 4x4 pixels is made of 6x6 pixels of the input; that takes 36 products of (tiles, C) and (C, K)
        matrices where it would be 144. The gradient, with respect to the input alone, is the convolution with
        transposed and turned filters.

        Parameters
        ----------
        pool : bool
            Average the input over 2x2 pixels first.
        backward : bool
            Be the gradient.
        """

        __props__ = ('pool', 'backward')
        code = CONVOLUTION

        def __init__(self, pool=False, backward=False):
            self.pool, self.backward = pool, backward

        def make_node(self, *inputs):
            """Forward x (H, W, C), filters, bias (K,), turned filters; backward dy, y (H, W, K), turned filters, x."""
            return self.apply(inputs, (3, 3, 2, 3) if self.backward else (3, 2, 1, 2), [T.ftensor3()])

        def L_op(self, inputs, outputs, gradients):
            x, *_, turned = inputs
            dx = Convolution(self.pool, True)(gradients[0], outputs[0], turned, x)
            return [dx] + [theano.gradient.grad_undefined(self, k, inputs[k]) for k in (1, 2, 3)]

        def c_code(self, node, name, inputs, outputs, sub):
            function, inputs = ('backward', inputs) if self.backward else ('forward', inputs[:3])
            return self.call(f'{function}<{int(self.pool)}>', [*inputs, f'&{outputs[0]}'], sub)

    class Matching(Compiled):
        """For every 3x3 patch i of u (H, W, D) the patch j of v (h, w, D) with the largest score, the first of equals.

            S(i, j) = a(i) b(j) sum_d u(i + d) . v(j + d),        less penalty(j)

        Where a and b are empty they are 1; where b(j) is 0 there is no patch j. The sum over the offsets d is taken
        over shifted products of single pixels: they cost a ninth of the products of patches, no patch is ever stored,
        and of the products only a few rows at a time.
        """

        code = MATCHING

        def make_node(self, u, v, a, b, *penalty):
            """With `penalty` ((h - 2) (w - 2),) there is a second output: the largest S(i, j) of each j, without it."""
            return self.apply((u, v, a, b, *penalty), (3, 3, 1, 1, 1), [T.lvector()] + [T.fvector() for _ in penalty])

        def c_code(self, node, name, inputs, outputs, sub):
            missing = ['NULL'] * (5 - len(inputs))
            return self.call('matching', [*inputs, *missing, *(f'&{output}' for output in outputs), *missing], sub)

    # Theano keeps compiled code by the pickled name of its Op, which is the same for the script and its tests.
    sys.modules.setdefault('doodle', sys.modules[__name__])
    Convolution.__module__ = Matching.__module__ = 'doodle'


def fast_convolution(W, b, pool):
    """`Convolution` for Lasagne, with bias, rectifier and pooling in it, of (1, C, H, W) that lie as (H, W, C).

    Parameters
    ----------
    W : (K, C, 3, 3) array
        Filters for cross-correlation.
    b : (K,) array
    pool : bool
        Average over 2x2 pixels before.
    """
    turned = W[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    constants = [theano.shared(np.float32(array)) for array in (winograd(W), b, winograd(turned))]
    return lambda x, *_, **__: Convolution(pool)(x.dimshuffle(2, 3, 1), *constants).dimshuffle('x', 2, 0, 1)


def fast_match(u, v, slices, variety=None, history=None, scale=None):
    """What `match` gives; of the products only three rows by one row are alive at a time, so there are no slices."""
    a, b = scale or 2 * [np.zeros(0, np.float32)]
    if history is None:
        return Matching()(u, v, a, b), None
    matches, best = Matching()(u, v, a, b, np.float32(9) * variety * history)
    return matches, best / np.float32(9)


def depth_first(graph):
    """The order in which Theano runs a graph's nodes, each value just before its use: its own keeps more alive."""
    order, stack = {}, [variable.owner for variable in reversed(graph.outputs) if variable.owner]
    before = graph.orderings()                                          # who reads what a node overwrites
    while stack:
        needed = [variable.owner for variable in stack[-1].inputs] + list(before.get(stack[-1], ()))
        needed = [node for node in needed if node and node not in order]
        if not needed:
            order[stack.pop()] = True
        stack += needed[::-1]
    return list(order)


# ---- files: pictures -------------------------------------------------------------------------------------------------

# A picture as it is seen: (H, W, 3) uint8 RGB, its alpha (H, W) uint8 or None, what there is to say of it, in lines.
Picture = namedtuple('Picture', 'pixels alpha remarks')

# Pictures that Pillow decodes by itself, here: not those for which it starts a program (EPS), of which it knows the
# name only (WMF), that hold files of any format (ICO, IPTC), or that take a microsecond a pixel (DDS, QOI).
FORMATS = 'PNG', 'JPEG', 'TIFF', 'WEBP', 'AVIF', 'GIF', 'BMP', 'PPM', 'JPEG2000', 'PSD', 'SGI', 'PCX', 'TGA'
PIXEL_BYTES = 26                                                      # at most to read a pixel: JPEG2000; others 22
SMALLER = 'make a smaller copy with a paint program'
MOST_SCANS = 100                                                      # of a JPEG; programs make 10, and each takes time


def import_pillow():
    """NumPy, Pillow and tqdm, once the options are known to be right: ``--help`` answers without them."""
    global np, Image, ImageCms, ImageOps, tqdm
    import numpy as np
    from PIL import Image, ImageCms, ImageOps
    from tqdm import tqdm
    Image.MAX_IMAGE_PIXELS = None                                       # `check_pixels` knows better


def is_there(path):
    """Whether there is anything at `path`; UserError where this user may not know."""
    try:
        os.stat(path)
    except PermissionError:
        raise forbidden(path) from None
    except (OSError, ValueError):
        return False
    return True


def forbidden(path):
    """The `UserError` that names what keeps this user from reading a file: a folder on the way, or its own bits."""
    def name(user):
        with contextlib.suppress(KeyError):
            user = pwd.getpwuid(user).pw_name
        return user
    parts = os.path.realpath(path).split('/')
    folders = ['/'.join(parts[:k]) or '/' for k in range(1, len(parts))]
    place = next((folder for folder in folders if not os.access(folder, os.X_OK)), '/'.join(parts))
    found = os.stat(place)
    return UserError(f'{path!r} may not be read by user {name(os.geteuid())}: {place!r} is '
                     f'{stat.filemode(found.st_mode)} and of {name(found.st_uid)}.',
                     f'let all read it: chmod a+{"x" if place in folders else "r"} {shlex.quote(place)}')


def tiff_tag(image, number, default):
    """The (first) number that a TIFF has under a tag; else, and for what is no TIFF, `default`."""
    return np.ravel(getattr(image, 'tag_v2', {}).get(number, default))[0]


def check_pixels(file, path):
    """Refuse a picture, opened but not yet decoded, that would not fit or is a bomb.

    A small file may claim any size, and flat pictures and maps are small files: 2**26 pixels are always read, 2**28
    where there are at most 8192 to a byte of the file, all that deflate can, and more where there are at most 64, as in
    photographs.
    """
    size, tile = os.path.getsize(path), [int(tiff_tag(file, tag, 0)) for tag in (322, 323)]
    pixels = max(math.prod(file.size), math.prod(tile))
    most, where = min((memory_limit() // PIXEL_BYTES, 'the free memory'),
                      (max(1 << 26, min(size << 13, 1 << 28), size << 6), f'a file of {size:,} bytes'))
    if pixels > most:
        raise UserError(f'{path!r} says that it has {pixels / 1e6:,.0f} million pixels, and {where} is good for '
                        f'{most / 1e6:,.0f} million.', SMALLER)


def scan_count(path):
    """How many scans the (first) JPEG at `path` has: each is decoded over all of its pixels."""
    marker, count, place = re.compile(rb'\xff([\xc0-\xcf\xd9-\xfe])'), 0, 0        # the others have no length
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while (match := marker.search(content, place)) and match[1] != b'\xd9':             # end of the image
            count, place = count + (match[1] == b'\xda'), match.end()
            place += int.from_bytes(content[place:place + 2], 'big')
    return count


@contextlib.contextmanager
def unheard():
    """A block in which what libraries say of themselves on stderr, in Python or in C, reaches nobody."""
    with contextlib.ExitStack() as end:
        end.enter_context(warnings.catch_warnings())
        warnings.simplefilter('ignore')
        with contextlib.suppress(OSError):                              # it may be closed
            stderr = os.dup(2)
            end.callback(os.close, stderr)
            end.callback(os.dup2, stderr, 2)
            with open(os.devnull, 'w') as null:
                os.dup2(null.fileno(), 2)
        yield


def decoded(path):
    """The picture or map at `path` as it lies in its file, turned upright by its EXIF orientation.

    Parameters
    ----------
    path : str
        One of `FORMATS`; of what moves it is the first image.

    Returns
    -------
    PIL.Image.Image
        In the file's own mode, with what the file says of it (profile, transparency) in ``info``.

    Raises
    ------
    UserError
        There is no such file, this user may not read it, it is no picture, or it asks for too much memory or time.
    """
    if not is_there(path) or not os.path.isfile(path):
        name = os.path.basename(path)
        fix = f'check the path; to see a sample at work: {SAMPLE}'
        if name.startswith(('gollum', 'jim_carrey')):
            fix = f'the pictures of the post are yours to bring; to see a sample at work: {SAMPLE}'
        if mounts() is not None:
            fix = f'mount its folder, -v "$PWD:/nd"; looked for {os.path.abspath(path)}, and mounted is {mounted()}'
        raise UserError(f'{path!r} is ' + ('not a file.' if os.path.exists(path) else 'not there.'), fix)
    if os.path.getsize(path) > memory_limit() / 4:                      # some formats are read as a whole
        raise UserError(f'{path!r} has {os.path.getsize(path) / 1e9:.1f} GB, too much for the free memory.', SMALLER)
    try:
        with unheard(), Image.open(path, formats=FORMATS) as file:
            check_pixels(file, path)
            if file.format in ('JPEG', 'MPO') and (scans := scan_count(path)) > MOST_SCANS:
                raise ValueError(f'it has {scans} scans, where {MOST_SCANS} are more than any program makes')
            key = file.info.get('transparency') if file.format == 'PNG' else None
            if key is not None and file.tile[0].args == 'RGB;16B':      # Pillow leaves it as it is, unlike the pixels
                file.info['transparency'] = tuple(value >> 8 for value in key)
            elif key is not None and file.tile[0].args in ('L;2', 'L;4'):
                file.info['transparency'] = key * (85 if file.tile[0].args == 'L;2' else 17)
            ImageOps.exif_transpose(file, in_place=True)
            return file
    except UserError:
        raise
    except PermissionError:
        raise forbidden(path) from None
    except Exception as error:  # Pillow's plugins raise whatever broken files make them raise
        long = 'a text or a profile in it is too long' if 'MAX_TEXT' in str(error) else None
        raise UserError(f'{path!r} cannot be read as a picture: {long or one_line(error)}.',
                        'open it and save it again as PNG') from None


def alpha(image):
    """How opaque the pixels of a Pillow image are, as one of mode L; None where all of them are, wholly."""
    if not image.has_transparency_data:
        return None
    if image.mode[0] == 'I':                                            # has no way to RGBA
        opaque = Image.fromarray(np.uint8(255) * (np.asarray(image) != image.info['transparency']))
    else:
        opaque = image.convert('RGBA').getchannel('A')
    return opaque if opaque.getextrema()[0] < 255 else None


def grey_bytes(image, path):
    """A Pillow image of deep greys as one of mode L.

    16 bits mean 0..65535, and 12 bits of a TIFF 0..4095. Of 32 bits, whole or floating, nobody says what is white: it
    is the least of 255, 65535 and 2**32 - 1, or of 1, 255 and 65535, that all but a thousandth of the pixels keep to;
    brighter ones become white, and darker ones than 0 black.

    Parameters
    ----------
    image : PIL.Image.Image
        Of a mode I or F, or a TIFF of signed bytes.
    path : str

    Returns
    -------
    image : PIL.Image.Image
        Of mode L.
    remark : str or None
        What was taken for white, or that it is nearly black.

    Raises
    ------
    UserError
        There are values that are no numbers, or below 0, or none of these whites suits.
    """
    def some(which):                                                    # more than a few hot pixels
        return np.count_nonzero(which) > max(1, which.size // 1000)
    values, bits, kind = np.asarray(image), tiff_tag(image, 258, 16), tiff_tag(image, 339, 1)
    values = values.view({('L', 8, 2): 'i1', ('I', 32, 1): 'u4'}.get((image.mode, bits, kind), values.dtype))
    whites = [1, 255, 65535] if image.mode == 'F' else [255, 65535, 2 ** 32 - 1]
    if image.mode.startswith('I;16') or image.format == 'PPM' and image.mode == 'I':
        whites = [4095 if bits == 12 else 65535]
    greys = f'has greys from {values.min():g} to {values.max():g}'
    white = next((white for white in whites if not some(values > white)), None)
    dark = white and not some(values > white / 16)
    if not np.isfinite(values).all() or some(values < 0) or not white or dark and white != whites[0]:
        raise UserError(f'{path!r} {greys}, and none of them can be told to be black or white.',
                        'save it again with 8 or 16 bits')
    remark = f'`{path}` {greys}: {white} is white.' if len(whites) > 1 else None
    if dark and white != 255:
        remark = bold(f'WARNING: `{path}` {greys}, and {white} is white: it is nearly black. '
                      'FIX: raise its levels in a paint program.')
    values = np.multiply(values, 255 / white, dtype=np.float32)
    if tiff_tag(image, 262, 1) == 0:                                    # white is zero
        np.subtract(255, values, out=values)
    values += .5
    return Image.fromarray(np.uint8(np.clip(values, 0, 255, out=values))), remark


def to_srgb(image, profile, path):
    """A picture in the colours of sRGB, with perceptual intent, as is usual for photographs.

    Parameters
    ----------
    image : PIL.Image.Image
        Of mode L, RGB, CMYK or LAB.
    profile : bytes or None
        ICC profile. None is a broken one, and one that changes no colour by more than a step is sRGB: the image stays
        as it is, bit for bit.
    path : str

    Returns
    -------
    image : PIL.Image.Image
    remark : str or None
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b''))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile('sRGB'), image.mode, 'RGB')
        name = ' '.join(ImageCms.getProfileDescription(source).split())
    except Exception as error:  # not this mode's; a Pillow without LittleCMS raises an ImportError
        return image, f'The colour profile of `{path}` cannot be used, and its colours are taken as they lie: ' \
                      f'{one_line(error)}.'
    colours = np.stack(np.mgrid[:256:15, :256:15, :256:15], axis=3).reshape(18, 18 * 18, 3)
    colours = Image.fromarray(np.uint8(colours)).convert(image.mode)
    before, after = (np.int16(colours) for colours in (colours.convert('RGB'), transform.apply(colours)))
    if np.abs(after - before).max() <= 1:
        return image, None
    return transform.apply(image), f'The colours of `{path}` are converted to sRGB from {name}.'


def read_picture(path):
    """A picture of any mode as it is seen: in the colours of sRGB, and where it is transparent on white.

    Parameters
    ----------
    path : str

    Returns
    -------
    Picture

    Raises
    ------
    UserError
        As by `decoded`, and by `grey_bytes` for deep greys.
    """
    image = decoded(path)
    info, opaque, remarks = image.info, alpha(image), []
    info.pop('transparency', None)                                      # it is in `opaque`
    if image.mode[0] in 'IF' or tiff_tag(image, 339, 1) == 2:           # 2: signed bytes
        image, remark = grey_bytes(image, path)
        remarks.append(remark)
    image = image.convert({'1': 'L', 'L': 'L', 'LA': 'L', 'CMYK': 'CMYK', 'LAB': 'LAB'}.get(image.mode, 'RGB'))
    if 'icc_profile' in info:
        image, remark = to_srgb(image, info['icc_profile'], path)
        remarks.append(remark)
    image = image.convert('RGB')
    if opaque:
        image, seen = Image.new('RGB', image.size, 'white'), image
        image.paste(seen, mask=opaque)
        opaque = np.asarray(opaque)
        share = np.count_nonzero(opaque < 255) / opaque.size
        remarks.append(f'{100 * share:.3g}% of `{path}` is transparent: it is laid on white.')
    return Picture(np.asarray(image), opaque, list(filter(None, remarks)))


# ---- files: painted maps ---------------------------------------------------------------------------------------------

# Colours no farther apart than this in RGB, 0..255, are one: slips of the brush, near-blacks, the noise of a JPEG.
NEAR = 24
NOISE = 8                                                             # per channel, within a flat area of a noisy map
LEAST = 0.001                                                         # of a map: what less than that covers is no class


def map_pixels(images):
    """Maps as their colours. Greys of more than 8 bits are labels, which mean the same in any mode.

    Where all are whole numbers up to 255 they are taken as they are, and multiples of 257 are divided by it. Else up to
    256 values, of all grey maps together, are numbered from 0 on; more are scaled, 16 bits by 1/257, any others from
    the lowest to the highest.

    Parameters
    ----------
    images : list of PIL.Image.Image

    Returns
    -------
    maps : list of (H, W, 3) uint8 arrays
        RGB, alpha dropped.
    numbered : list of bool
        Which maps have numbers in place of their greys.

    Raises
    ------
    UserError
        A grey is no finite number.
    """
    greys = {k: np.asarray(image.convert('L') if image.mode == 'LA' else image) for k, image in enumerate(images)
             if image.mode in ('L', 'LA') or image.mode[0] in 'IF'}
    levels = {k: np.unique(grey) for k, grey in greys.items()}
    deep = [k for k, values in levels.items() if not np.isin(values, np.arange(256)).all()]
    numbered = [False] * len(images)
    if deep:
        known = np.unique(np.concatenate(list(levels.values())))
        if not np.isfinite(known).all():
            raise UserError('A map has greys that are no finite numbers.', 'save the maps as PNG')
        if all(np.isin(levels[k], 257 * np.arange(256)).all() for k in deep):
            greys |= {k: greys[k] / 257 for k in deep}
        elif len(known) <= 256:
            greys = {k: np.searchsorted(known, grey) for k, grey in greys.items()}
            numbered = [k in greys for k in range(len(images))]
        else:
            words = (known == known.round()).all() and 0 <= known[0] and 255 < known[-1] <= 65535
            low, high = (0, 65535) if words else (float(known[0]), float(known[-1]))
            greys |= {k: (greys[k] - low) / (high - low) * 255 + 0.5 for k in deep}
    return [np.repeat(np.uint8(greys[k])[:, :, None], 3, axis=2) if k in greys else
            np.asarray(image.convert('RGBA').convert('RGB')) for k, image in enumerate(images)], numbered


def colour_codes(pixels):
    """(H, W, 3) uint8 RGB -> (H, W) numbers 0xRRGGBB, which sort faster than triples."""
    return pixels @ np.array([1 << 16, 1 << 8, 1], np.int32)


def code_colours(codes):
    """The inverse: (N,) numbers -> (N, 3) float64."""
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.float64)


def even_pixels(colours, tolerance):
    """Which pixels of (H, W, 3) lie in a square of 2x2 whose channels differ by `tolerance` at most, (H, W) bool."""
    low = high = np.pad(colours, [(1, 1), (1, 1), (0, 0)], 'edge')      # (H + 2, W + 2, 3)
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        low, high = np.minimum(low[a], low[b]), np.maximum(high[a], high[b])
    even = (high - low).max(axis=2) <= tolerance                        # (H + 1, W + 1), squares
    return even[1:, 1:] | even[1:, :-1] | even[:-1, 1:] | even[:-1, :-1]


def is_index_map(colours):
    """Whether a lossless map (H, W, 3) holds numbers of classes as greys, as segmentation tools write them.

    It has at most 64 levels, some nearer than `NEAR`; most have an inside, a square of 2x2; and no two levels that
    lie farther apart meet over different values in between, as at the blended borders of a painted map.
    """
    grey = colours[:, :, 0]
    levels = np.unique(grey)
    if (colours != grey[:, :, None]).any() or not 2 <= len(levels) <= 64 or np.diff(levels).min() > NEAR:
        return False
    inside = np.bincount(grey.ravel(), even_pixels(colours, 0).ravel(), 256)[levels]
    thin = levels[inside < np.bincount(grey.ravel())[levels] / 4]
    between = set()                                                     # (low, thin level between, high)
    for g in (grey, grey.T):
        sides = np.sort([g[:, :-2], g[:, 2:]], axis=0).astype(int)      # (2, H, W - 2)
        blend = (sides[0] < g[:, 1:-1]) & (g[:, 1:-1] < sides[1]) & (sides[1] - sides[0] > NEAR)
        between |= {(*ends, level) for *ends, level in zip(*sides[:, blend], g[:, 1:-1][blend]) if level in thin}
    borders = [ends for *ends, _ in between]
    return len(thin) <= len(levels) / 2 and not any(borders.count(ends) > 1 for ends in borders)


def surroundings(labels, count):
    """The classes around each pixel that has none: the first one in each of 16 directions.

    Only those no farther away than the shortest line through the pixel, from one class to another, is long: along a
    border a ray sees what has nothing to do with it.

    Parameters
    ----------
    labels : (H, W) int array
        0 .. count - 1, or -1.

    Returns
    -------
    (n,) uint64 array
        The classes as bits, for the pixels of -1, row by row.
    """
    padded = np.pad(labels, 2, constant_values=count)                   # `count`: nothing is seen there
    unknown = np.flatnonzero(padded < 0)
    n, spot = len(unknown), padded.ravel().astype(np.int32)
    spot += n
    spot[unknown] = np.arange(n, dtype=np.int32)                        # < n: look further from there; else n + class
    ends, lengths, shortest = [], [], np.full(n, np.inf, np.float32)
    for x, y in ((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2), (2, -1), (1, -2)):
        for step in (y * padded.shape[1] + x, -y * padded.shape[1] - x):
            ahead = np.append(spot[unknown + step], np.arange(n, n + count + 1, dtype=np.int32))
            steps = np.float32(np.arange(len(ahead)) < n)
            while (ahead < n).any():
                steps, ahead = steps + steps[ahead], ahead[ahead]       # twice as far each time
            ends.append(np.uint8(ahead[:n] - n))
            lengths.append(steps[:n] * np.float32(math.hypot(x, y)))
        a, b = ends[-2:]
        line = (a != b) & (np.maximum(a, b) < count)
        shortest[line] = np.minimum(shortest, lengths[-2] + lengths[-1])[line]
    bits, around = np.append(np.uint64(1) << np.arange(count, dtype=np.uint64), np.uint64(0)), np.zeros(n, np.uint64)
    for end, length in zip(ends, lengths):
        around |= np.where(length <= shortest, bits[end], np.uint64(0))
    return around


def pairwise_distances(points, others):
    """How far each of the points (n, d) is from each of the others (k, d), (n, k)."""
    from scipy.spatial.distance import cdist                            # not before there are maps to judge
    return cdist(points, others)


def hull_distance(points, corners):
    """How far each of the points (n, d) lies from the convex hull of the corners (k, d), by Frank and Wolfe's way."""
    nearest = corners[pairwise_distances(points, corners).argmin(axis=1)]
    for _ in range(8 if len(corners) > 2 else 1):                       # a line takes one step
        towards = corners[((points - nearest) @ corners.T).argmax(axis=1)] - nearest
        t = ((points - nearest) * towards).sum(axis=1) / np.maximum((towards ** 2).sum(axis=1), 1e-9)
        nearest = nearest + t.clip(0, 1)[:, None] * towards
    return np.linalg.norm(points - nearest, axis=1)


YCBCR = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)            # of RGB, as in a JPEG


def blended(points, corners):
    """Which colours (n, 3) lie between others (k, 3), within `NEAR`: in RGB, or in brightness and in chroma, which a
    JPEG blends apart."""
    inner, outer = (colours @ np.array(YCBCR).T for colours in (points, corners))           # (n, 3), (k, 3)
    y, ends = inner[:, 0], outer[:, 0]
    apart = (hull_distance(inner[:, 1:], outer[:, 1:]) <= NEAR) & (abs(y - y.clip(ends.min(), ends.max())) <= NEAR)
    return apart | (hull_distance(points, corners) <= NEAR)


def groups(colours, shares):
    """Colours (N, 3) gathered around the largest, again and again.

    Parameters
    ----------
    shares : (N, maps) array
        Of each map, by colour.

    Yields
    ------
    centre : int
        Number of the largest colour that is left.
    ways : (N,) array
        How far all colours are from it.
    group : (N,) bool array
        What is left within `NEAR`.
    """
    left, size = shares.any(axis=1), shares.sum(axis=1)
    for _ in range(256):
        if shares[left].sum(axis=0).max(initial=0) < LEAST:
            return
        centre = np.where(left, size, -1).argmax()
        ways = pairwise_distances(colours, colours[[centre]])[:, 0]
        yield centre, ways, left & (ways <= NEAR)
        left &= ways > NEAR


def peaks(colours, flat, exact):
    """Numbers of the colours (N, 3) that have flat areas of their own, 64 at most.

    Most of what is near such a colour is very near, or exactly of it. A ramp has no peaks.

    Parameters
    ----------
    flat, exact : (N, maps) arrays
        Share of each map, by colour, that lies in areas of nearly and of exactly one colour.
    """
    found = []
    for centre, ways, group in groups(colours, flat):
        k = flat[group].sum(axis=0).argmax()
        around, near = flat[ways <= NEAR, k].sum(), flat[ways <= NEAR / 3, k].sum()
        if flat[group, k].sum() >= LEAST and (near > around / 2 or exact[centre, k] > near / 4):
            found.append(centre)
    return found[:64]


def painted_classes(maps):
    """The classes of maps painted by hand, and of each pixel the class that it belongs to.

    A class is gathered around a colour of its own: one that has flat areas, or covers `LEAST` by itself. What lies
    between the classes around it is a blend (anti-aliasing, a soft brush, a scaled map) and belongs to the nearest of
    these, however much there is of it.

    Parameters
    ----------
    maps : list of (H, W, 3) uint8 arrays

    Returns
    -------
    classes : (K, 3) float64 array
        RGB; 64 at most.
    labels : list of (H, W) int arrays
    """
    codes = [colour_codes(colours) for colours in maps]
    table = np.zeros(1 << 24, np.int32)                                 # of all colours; faster than to sort the pixels
    for code in codes:
        table[code] = 1
    known = np.flatnonzero(table)
    table[known] = np.arange(len(known))
    numbers, colours = [table[code] for code in codes], code_colours(known)                 # (H, W), (N, 3)
    even = [even_pixels(pixels, NOISE) for pixels in maps]

    def shares(where):                                                  # of each map, by colour, (N, maps)
        return np.stack([np.bincount(number[w], minlength=len(known)) / number.size
                         for number, w in zip(numbers, where)], axis=1)

    flat, exact = shares(even), shares([even_pixels(pixels, 0) for pixels in maps])
    flat[flat.sum(axis=1) < shares([code >= 0 for code in codes]).sum(axis=1) / 4] = 0
    classes = colours[peaks(colours, flat, exact)]
    for _ in range(8):
        labels, ways = zip(*(sides(number, colours, classes, e) for number, e in zip(numbers, even)))
        rest = [label < 0 for label in labels]
        left, inside = shares(rest), shares([r & e for r, e in zip(rest, even)])
        far = pairwise_distances(colours, classes).min(axis=1, initial=np.inf) > NEAR
        found = {}
        for centre, _, group in groups(colours, left * far[:, None]):
            k = left[group].sum(axis=0).argmax()
            around = left[group, k].sum()
            thin = left[centre, k] >= max(LEAST, around / 2)            # most of it is exactly of one colour
            area = around >= 0.75 * LEAST and inside[group, k].sum() >= around / 5          # with a noisy border
            if thin or area or around >= 0.05 or not len(classes):
                found[centre] = max(way[centre] for way in ways)
        if not found or len(classes) == 64:
            break
        # Of the ends of a ramp and its middle the ends come first: what is left between them then is a blend.
        chosen = list(found) if len(found) > 16 else [max(found, key=found.get)]
        classes = np.append(classes, colours[chosen], axis=0)[:64]
    nearest = pairwise_distances(colours, classes).argmin(axis=1)
    return classes, [np.where(label < 0, nearest[number], label) for label, number in zip(labels, numbers)]


def sides(number, colours, classes, even):
    """The class of each pixel of a map: in flat areas that of its colour, in a blend the nearest around it.

    Parameters
    ----------
    number : (H, W) int array
        Of each pixel's colour.
    colours, classes : (N, 3) and (K, 3) arrays
    even : (H, W) bool array

    Returns
    -------
    labels : (H, W) int array
        -1 where it is neither.
    ways : (N,) array
        How far each colour is, on average, from the nearest class around it, where it is no blend.
    """
    if not len(classes):
        return np.full(number.shape, -1, np.int8), np.zeros(len(colours))
    distances = pairwise_distances(colours, classes)                                        # (N, K)
    own = np.where(distances.min(axis=1) <= NEAR / 3, distances.argmin(axis=1), -1).astype(np.int8)
    labels = np.where(even, own[number], np.int8(-1))
    ways, unknown = np.zeros(len(colours)), labels < 0
    seen, view = np.unique(surroundings(labels, len(classes)), return_inverse=True)
    kinds, index, counts = np.unique(view * len(colours) + number[unknown], return_inverse=True, return_counts=True)
    label, way = np.full(len(kinds), -1, np.int8), np.full(len(kinds), 1e3)
    for place, bits in enumerate(seen):
        around = np.flatnonzero([int(bits) >> k & 1 for k in range(len(classes))])
        kind = slice(*np.searchsorted(kinds, (place * len(colours), (place + 1) * len(colours))))
        found = kinds[kind] - place * len(colours)                      # numbers of the colours seen from there
        if len(around):
            way[kind] = distances[found][:, around].min(axis=1)
        if len(around) > 1:
            nearest = around[distances[found][:, around].argmin(axis=1)]
            label[kind] = np.where(blended(colours[found], classes[around]), nearest, -1)
    odd = label < 0
    np.add.at(ways, kinds[odd] % len(colours), counts[odd] * way[odd])
    total = np.bincount(kinds[odd] % len(colours), counts[odd], len(colours))
    labels[unknown] = label[index]
    return labels, ways / np.maximum(total, 1)


def map_classes(maps, index):
    """The classes of colours that several maps have together, and the class of each pixel.

    Parameters
    ----------
    maps : list of (H, W, 3) uint8 arrays
    index : list of bool
        Which of them are index maps: each of their levels is a class, and is the same in another map only exactly.

    Returns
    -------
    classes : (K, 3) float64 array
        RGB, ordered as numbers 0xRRGGBB.
    labels : list of (H, W) int arrays
    """
    painted = [colours for colours, levels in zip(maps, index) if not levels]
    classes, labels = painted_classes(painted) if painted else (np.zeros((0, 3)), [])
    classes, labels = colour_codes(classes.astype(np.int32)), iter(labels)
    codes = [colour_codes(colours) if levels else None for colours, levels in zip(maps, index)]
    known = np.unique(np.concatenate([classes, *(np.unique(code) for code in codes if code is not None)]))
    number = np.searchsorted(known, classes)
    return code_colours(known), [number[next(labels)] if code is None else np.searchsorted(known, code)
                                 for code in codes]


def map_path(path, extension):
    """``dir/name.jpg`` -> ``dir/name_sem.png``."""
    return os.path.splitext(path)[0] + extension


def map_paths(options):
    """Where the maps are to be found: of the content, or else of the output, which is a doodle, and of the style."""
    return [find_map(path, options.semantic_ext) for path in (options.content or options.output, options.style)]


MAP_ENDINGS = '.png', '.tif', '.tiff', '.webp', '.bmp', '.gif', '.tga', '.ppm', '.jpg', '.jpeg'  # the better come first


def other_endings(path, picture_path):
    """The files with the name of the map at `path` but another ending of a picture's, and not that of its picture."""
    stem, ending = os.path.splitext(path)
    folder, name = os.path.split(stem)
    found = []
    with contextlib.suppress(OSError):
        for stem_there, other in map(os.path.splitext, os.listdir(folder or '.')):
            if stem_there == name and other != ending and other.lower() in MAP_ENDINGS:
                found.append((MAP_ENDINGS.index(other.lower()), stem + other))
    return [other for _, other in sorted(found)] if stem != os.path.splitext(picture_path)[0] else []


def find_map(path, extension):
    """The map of the picture at `path`: its name + `extension`, or where that is not there, with another ending."""
    exact = map_path(path, extension)
    return exact if os.path.lexists(exact) else next(iter(other_endings(exact, path)), exact)


def orientation(path):
    """How the file at `path` says that its picture is turned: 1 not at all, 2 .. 8 by EXIF."""
    with unheard(), Image.open(path, formats=FORMATS) as file:
        return file.getexif().get(0x0112, 1)


def check_map_size(path, image, picture_path, size):
    """Refuse a map of another shape than its picture's; returns a warning where that cannot be told, or None.

    Parameters
    ----------
    path, picture_path : str
    image : PIL.Image.Image
        The map, upright.
    size : (width, height)
        Of the picture, upright.
    """
    turned = orientation(picture_path) if orientation(path) == 1 else 1
    (w, h), (width, height) = image.size, size

    def fits(w, h):                                                     # but for rounding, or 3 % of the proportions
        return abs(h * width - w * height) <= max(w, h, width, height, 0.03 * w * height, 0.03 * h * width)

    if fits(w, h):
        if turned == 1 or turned >= 5 and not fits(h, w):
            return None
        return (f'{picture_path!r} is turned by EXIF, its map {path!r} is not: look whether they lie alike. '
                'FIX: paint on a copy that was saved upright')
    problem = f'{path!r} is {w}x{h} but its picture {picture_path!r} is {width}x{height}'
    if turned >= 5 and fits(h, w):
        raise UserError(f'{problem}, turned by EXIF, which its map is not.', 'turn the map as the picture is turned')
    raise UserError(problem + '.', f'paint the map on a copy of the picture, or bring it to {width}x{height} by the '
                    'nearest pixel')


# Maps of the size of their pictures: classes (K, 3), then by map its colours, (H, W, 3), and its labels, (H, W).
Classified = namedtuple('Classified', 'classes maps labels warnings')


def classify_maps(paths, pictures, longest=None):
    """Read maps and find their classes, in the files' own pixels; then bring them to the size of their pictures.

    That is done by the nearest pixel, so that the colours stay those that were painted.

    Parameters
    ----------
    paths : list of str
    pictures : list of (str, (H, W, 3) array), or of None
        The path and the pixels of the picture of each map; None for a doodle, which has the map's size.
    longest : int or None
        The longer side of a doodle at most.

    Returns
    -------
    Classified
    """
    images, sizes, warned = [decoded(path) for path in paths], [], []
    for path, image, picture in zip(paths, images, pictures):
        sizes.append(limited_size(image.size, longest) if picture is None else picture[1].shape[1::-1])
        if picture is not None:
            warned.append(check_map_size(path, image, picture[0], sizes[-1]))
        opaque = alpha(image)
        clear = 0 if opaque is None else (np.asarray(opaque) == 0).mean()
        if clear > 0.01:
            warned.append(f'{clear:.0%} of {path!r} are transparent: the colours under it count as painted. '
                              'FIX: save the map without transparency')
    maps, numbered = map_pixels(images)
    index = [number or image.format not in ('JPEG', 'MPO') and is_index_map(colours)
             for number, image, colours in zip(numbered, images, maps)]
    classes, labels = map_classes(maps, index)
    maps = [resized(colours, size, Image.NEAREST) for colours, size in zip(maps, sizes)]
    labels = [resized(np.int32(label)[:, :, None], size, Image.NEAREST)[:, :, 0] for label, size in zip(labels, sizes)]
    return Classified(classes, maps, labels, [bold(f'WARNING: {text}.') for text in filter(None, warned)])


# ---- files: what a run writes ----------------------------------------------------------------------------------------

def same_file(a, b):
    """Whether two paths, there already or not, name one file."""
    return os.path.realpath(a) == os.path.realpath(b) or all(map(os.path.exists, (a, b))) and os.path.samefile(a, b)


def mounts():
    """The folders mounted into our container and where on the host they come from, {path: source}; outside it None."""
    if 'DOODLE_CONTAINER' not in os.environ:
        return None
    with open('/proc/self/mountinfo') as file:
        lines = [[re.sub(r'\\040', ' ', part) for part in line.split()] for line in file]
    return {point: source for _, _, _, source, point, *_ in lines
            if os.path.isdir(point) and not re.match('/(dev|etc|opt|proc|run|sys|tmp|usr|var)?(/|$)', point)}


def mount_of(path):
    """The mounted folder on which `path` lies, or None."""
    path = os.path.realpath(path) + '/'
    return max((point for point in mounts() or () if path.startswith(point + '/')), key=len, default=None)


def mounted():
    """What is mounted, in words."""
    def entries(folder):
        return f'{len(os.listdir(folder))} entries' if os.access(folder, os.R_OK) else 'not readable'
    return ', '.join(f'{point} from {source} ({entries(point)})' for point, source in mounts().items()) or 'nothing'


def place_output(options):
    """Where the output would be lost with the container, choose a copy on a mounted folder: ``options.copy``, or None.

    Where it could not even be written (a read-only container), the copy becomes the output. The checkpoint lies beside
    what is kept.
    """
    options.copy = None
    if mounts() is not None and not mount_of(options.output):
        folders = [folder for folder in (mount_of(options.frames), *mounts())
                   if folder and os.access(folder, os.W_OK)]
        if folders:
            options.copy = os.path.join(folders[0], os.path.basename(options.output))
            if not os.access(os.path.dirname(options.output) or '.', os.W_OK):
                options.output, options.copy = options.copy, None
    options.checkpoint = (options.copy or options.output) + '.checkpoint'


def kept(options):
    """The output's path, and in our container whether it outlives it."""
    path = options.copy or options.output
    if mounts() is None:
        return f'`{path}`'
    mount = mount_of(path)
    return f'`{path}`, ' + (f'on the mounted folder {mount}' if mount else 'which no mounted folder keeps')


def check_written(options, read):
    """Refuse what would overwrite an input or could not be written at the end; make the missing folders."""
    folders = {'--frames': options.frames} if options.save_every else {}
    place_output(options)
    outputs = list(filter(None, (options.output, options.copy, options.checkpoint)))
    for flag, path in [('--output', path) for path in outputs] + [('--log', options.log)] * bool(options.log):
        if any(same_file(path, other) for other in read if other):
            raise UserError(f'{flag} {path!r} is one of the inputs and would overwrite it.', f'choose another {flag}')
        if os.path.isdir(path):
            raise UserError(f'{flag} {path!r} is a folder.', 'add a file name to it')
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)                                               # a name may be too long
        folders[flag] = os.path.dirname(path) or '.'
    if options.log and any(same_file(options.log, path) for path in outputs):
        raise UserError('--log is the same file as the output or its checkpoint.', 'choose another --log')
    image_format(options.output)
    for flag, folder in folders.items():
        if os.path.isdir(folder) or not options.check:                  # which leaves nothing behind
            check_folder(folder, flag, f'choose another {flag}')


def check_folder(folder, flag, fix):
    """Make a folder where it is missing, and refuse one that cannot be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f'{flag}: the folder {folder!r} cannot be written: {error.strerror}.', fix) from None


def image_format(path):
    """Pillow's name of the format that the ending of `path` stands for."""
    name = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    try:
        Image.new('RGB', (1, 1)).save(io.BytesIO(), format=name)
    except (KeyError, ValueError, OSError):
        raise UserError(f'{path!r} does not end like a picture that can be written.',
                        'end it in .png or .jpg') from None
    return name


UMASK = os.umask(0)
os.umask(UMASK)


@contextlib.contextmanager
def written_whole(path):
    """A binary file that appears at `path` whole, at the end of the block, or not at all."""
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)                                  # it may have vanished since it was checked
    prefix = f'.doodle-{zlib.crc32(os.fsencode(os.path.abspath(path))):08x}-'
    names = fnmatch.filter(os.listdir(folder), prefix + '*') if os.access(folder, os.R_OK) else ()
    for name in names:
        with contextlib.suppress(OSError), open(os.path.join(folder, name)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)            # no run holds it: one that was killed left it
            os.unlink(file.name)
    while True:
        temporary = tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, delete=False)
        with contextlib.suppress(OSError):                              # not on every file system
            fcntl.flock(temporary, fcntl.LOCK_EX)
        if os.path.exists(temporary.name):                              # else it was taken for one of those
            break
        temporary.close()
    try:
        with temporary as file:
            yield file
            file.flush()
            os.chmod(temporary.name, 0o666 & ~UMASK)                    # temporary files are for their owner alone
            os.replace(temporary.name, path)                            # while it is held
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary.name)
        raise


def write_picture(pixels, path):
    """Write (H, W, 3) uint8 pixels, in the format that the ending of `path` stands for."""
    with written_whole(path) as file:
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, format=image_format(path), quality=95)


def claim_frames(folder):
    """A folder for this run's frames: `folder` itself, or the first of its ``run-2``, ``run-3``, ... that is new.

    A run takes a folder by making ``command.txt`` in it, which says what the frames are of.
    """
    for number in itertools.count(1):
        place = folder if number == 1 else os.path.join(folder, f'run-{number}')
        os.makedirs(place, exist_ok=True)
        if not any(re.fullmatch(r'\d{4,}\.png', name) for name in os.listdir(place)):
            command = os.path.join(place, 'command.txt')
            with contextlib.suppress(FileExistsError), open(command, 'x', errors='surrogateescape') as file:
                file.write(' '.join(sys.argv) + '\n')
                return place


# Options that change nothing in the picture, or whose files are compared instead.
FREE = {'style', 'content', 'output', 'copy', 'semantic_ext', 'random_seed', 'slices', 'device', 'network', 'weights',
        'auto_maps', 'print_every', 'save_every', 'frames', 'log', 'resume', 'checkpoint', 'check'}


def explained(inputs, weights, options, random_seed):
    """What explains a run, as JSON: the log's first line, and what `--resume` compares."""
    checksums = {name: None if array is None else hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
                 for name, array in inputs._asdict().items() if name != 'size'}
    return json.loads(json.dumps(dict(
        device=options.device, network=weights.kind, weights=dict(path=weights.path, sha256=weights.sha256),
        random_seed=random_seed, options=vars(options), inputs=checksums,
        shapes=dict(output=inputs.size[::-1], style=inputs.style.shape[:2],
                    map_channels=0 if inputs.style_map is None else inputs.style_map.shape[2]))))


# What a checkpoint has of a `Journal`.
STATE = 'header', 'number', 'phase', 'evaluation', 'error', 'frames'


def read_checkpoint(path, header):
    """What the run of this `header` left at `path`: state, minimiser, arrays by name; UserError if another run did."""
    try:
        with open(path, 'rb') as file:
            state = json.loads(str(np.load(file)))
            state = {name: state[name] for name in (*STATE, 'fresh', 'arrays')}
            arrays = {name: np.load(file) for name in state['arrays']}
        minimiser = Minimiser(arrays['image'])
        vars(minimiser).update((name, arrays.pop(name)) for name in tuple(vars(minimiser)))
        then, now = state['header'], header
        inputs, noisy = now['inputs'], now['options']['seed'] == 'noise'
        same = (then['inputs'], then['shapes']) == (inputs, now['shapes'])
        idle = {'max_size': same, 'output_size': same, 'seed': inputs['seed'], 'seed_range': not noisy,
                'content_weight': same and not inputs['content'], 'content_layers': same and not inputs['content'],
                'semantic_weight': same and not inputs['style_map']}    # not used, or what they change is compared
        seed = then['random_seed'] if now['random_seed'] is None or not noisy else now['random_seed']
        pairs = {'--' + name.replace('_', '-'): (then['options'][name], value)
                 for name, value in now['options'].items() if name not in FREE and not idle.get(name)}
        pairs |= {f'the picture `{name}`': (then['inputs'].get(name), inputs[name]) for name in inputs}
        pairs |= {'the size': (then['shapes'], now['shapes']),
                  'the file of weights': (then['weights']['sha256'], now['weights']['sha256']),
                  '--random-seed': (then['random_seed'], seed)}
    except Exception as error:  # a broken file can raise anything
        raise UserError(f'{path!r} cannot be read as a checkpoint: {one_line(error)}.',
                        'delete it, or leave --resume out, to start anew') from None
    for name, (before, after) in pairs.items():
        if before != after:
            values = f': {before} then, {after} now' if name.startswith('--') else ''
            raise UserError(f'{path!r} is of a run in which {name} was another{values}.',
                            'resume with what it was, or leave --resume out to start anew')
    return state, minimiser, arrays


def remembered(objective):
    """The variables in which an objective keeps what it knows from one evaluation to the next, by name."""
    return {f'{kind} {layer}': variable for kind in ('history', 'matches')
            for layer, variable in getattr(objective, kind).items() if variable is not None}


def memory(objective):
    """The arrays in these variables, by name."""
    return {name: variable.get_value() for name, variable in remembered(objective).items()}


def remember(objective, arrays, fresh):
    """Put an objective back to where its memory was these arrays; `fresh` says that its next matches are the first."""
    for name, variable in remembered(objective).items():
        variable.set_value(arrays[name])
    objective.fresh = fresh


class Journal:
    """What a run tells and leaves behind: lines, progress, frames, the log, the checkpoint, the result.

    What cannot be written never ends a run: the person watching is told why, once.

    Parameters
    ----------
    options : argparse.Namespace
    size : (width, height) of the result
    header : dict
        The log's first line: what explains the run.
    checkpoint : (dict, Minimiser, dict of str to array) or None
        What `read_checkpoint` gives of the run to go on with.
    """

    def __init__(self, options, size, header, checkpoint=None):
        self.options, self.size, self.header, self.saved, self.told = options, size, header, None, set()
        self.state, self.minimiser, self.arrays = checkpoint or ({}, None, {})
        self.number, self.phase = self.state.get('number', 0), self.state.get('phase', 0)
        self.objective, self.frames, self.settled, self.signal = None, None, True, None
        if self.state and self.state['header']['options']['frames'] == options.frames:
            self.frames = self.state['frames']
        self.bar = tqdm(total=options.phases * options.iterations, initial=self.number, disable=None, leave=False)
        self.log, self.unwritten, kept = None, b'', 0
        if self.state and options.log and os.path.isfile(options.log):
            with open(options.log, 'rb') as file:
                kept = sum(map(len, itertools.takewhile(self.is_before, file)))
        if options.log:
            self.log = open(options.log, 'ab' if kept else 'wb', buffering=0)
            if kept:
                self.log.truncate(kept)
            else:
                self.write_log(header)

    def is_before(self, line):
        """Whether a line of the log is whole, and its header or of an evaluation that the checkpoint knows."""
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            known = self.phase, self.state['evaluation']
            return line.endswith(b'\n') and ('inputs' in entry or (entry['phase'], entry['evaluation']) < known)
        return False

    @contextlib.contextmanager
    def spared(self, path):
        """A block in which what cannot be written at `path` is told, the first time, and the run goes on."""
        try:
            yield
        except OSError as error:
            if path not in self.told:
                self.say(bold(f'WARNING: `{path}` cannot be written: {error.strerror or one_line(error)}. '
                              'The run goes on. FIX: make room, or let the folder be written.'))
            self.told.add(path)

    def write_log(self, entry):
        """Append one line of JSON."""
        if self.log:
            self.unwritten += json.dumps(entry).encode() + b'\n'
            with self.spared(self.options.log):
                while self.unwritten:
                    self.unwritten = self.unwritten[self.log.write(self.unwritten):]

    def write_checkpoint(self):
        """Write what `--resume` needs to go on."""
        if self.objective is None or not self.number:                   # nothing was done since an earlier one
            return
        arrays = vars(self.minimiser) | memory(self.objective)
        state = {name: getattr(self, name) for name in STATE} | dict(fresh=self.objective.fresh, arrays=list(arrays))
        with self.spared(self.options.checkpoint), written_whole(self.options.checkpoint) as file:
            for array in (json.dumps(state), *arrays.values()):         # no .npz: zipfile has words of its own for a
                np.save(file, array)                                    # full disk

    def interrupt(self, number, frame):
        """Signal handler: `interrupt`, but not before objective, minimiser and journal know of the same evaluations."""
        self.signal = number
        if self.settled:
            interrupt(number, frame)

    def settle(self):
        """They have: a signal that came meanwhile is heard."""
        self.settled = True
        if self.signal:
            self.interrupt(self.signal, None)

    def say(self, text):
        """A line above the progress bar."""
        self.bar.clear()
        say(text)

    def begin(self, phase, size, objective):
        """A phase starts."""
        self.settled, self.phase, self.objective = False, phase, objective
        self.error, self.evaluation = self.state.get('error', 255.), self.state.get('evaluation', 0)
        if self.state:
            remember(objective, self.arrays, self.state['fresh'])
        self.state = {}
        scale = 1 / 2 ** (self.options.phases - 1 - phase)
        self.say(f'\n{bold(f"Phase #{phase}")}: resolution {size[0]}x{size[1]}  scale {scale}')
        for layer in objective.style_layers:
            self.say(f'  - Style layer {layer}: {objective.describe(layer)}.')
        for layer, target in objective.target.items():
            features = target.get_value(borrow=True)
            self.say(f'  - Content layer conv{layer}: {features.shape[2]} features in {features.nbytes // 1000:,}kb.')
        self.say('')
        self.since = time.time()

    def evaluate(self, x):
        """Loss and gradient of the image `x`, all that belongs to an evaluation done; what fails leaves no trace."""
        self.settle()
        if self.number % min(self.options.save_every or 10, 10) == 0:
            self.write_checkpoint()
        known, fresh = memory(self.objective), self.objective.fresh
        try:
            evaluation = self.objective(x)
            self.settled = False
        except BaseException as error:                                  # a signal may find the matches new already
            diverged = isinstance(error, FloatingPointError)
            remember(self.objective, known, fresh or diverged)
            self.settled = not diverged                                 # else until the minimiser has begun anew
            raise
        self.record(x, evaluation)
        return evaluation.total, evaluation.gradient

    def record(self, x, evaluation):
        """An evaluation is done: its line, its frame, its entry in the log."""
        largest = float(np.abs(evaluation.gradient).max())
        self.error = 0.9 * self.error + 0.1 * min(largest, 255)
        every = self.options.print_every
        if every and self.number % every == 0:
            self.say(progress_line(self.number, evaluation, self.error, time.time() - self.since))
            self.since = time.time()
        last = (self.phase, self.evaluation) == (0, self.options.iterations - 1)
        if last and (remark := lost_content(evaluation, self.options)):
            self.say(remark)
        if self.options.save_every and self.number % self.options.save_every == 0:
            with self.spared(self.options.frames):
                self.frames = self.frames or claim_frames(self.options.frames)
                write_picture(pixels(x, x.shape[:0:-1]), os.path.join(self.frames, f'{self.number:04d}.png'))
        self.write_log(dict(
            phase=self.phase, evaluation=self.evaluation, total=evaluation.total, content=evaluation.content,
            style=evaluation.style, smooth=evaluation.smooth, gradient_l2=float(np.linalg.norm(evaluation.gradient)),
            gradient_max=largest, seconds=evaluation.seconds, matching_seconds=evaluation.matching_seconds))
        self.number, self.evaluation = self.number + 1, self.evaluation + 1
        self.bar.update()

    def save(self, last=True):
        """Write the last accepted image as the result, the last time where it can be; False if there is none."""
        if not self.number or self.saved is self.minimiser.image:
            return self.number > 0
        options, picture, done = self.options, pixels(self.minimiser.image, self.size), False
        for path in filter(None, (options.output, options.copy)):
            done = False
            with self.spared(path):
                write_picture(picture, path)
                done = True
        for folder in (options.frames, '.', '~', tempfile.gettempdir(), '/dev/shm') if last and not done else ():
            name = f'doodle-{secrets.token_hex(4)}-{os.path.basename(options.output)}'
            path = os.path.join(os.path.expanduser(folder), name)
            with contextlib.suppress(OSError):
                write_picture(picture, path)
                options.output, options.copy, done = path, None, True
                break
        self.saved = self.minimiser.image if done else None
        return done


# ---- files: what a run says ------------------------------------------------------------------------------------------

def one_line(error):
    """What an exception says, in one line without a full stop."""
    return ' '.join(str(error).split()).rstrip('.') or type(error).__name__


def say(text=''):
    """A line for the person watching, in whatever characters the terminal has."""
    encoding = sys.stdout.encoding or 'utf-8'
    try:
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)
    except OSError:                                                     # nobody watches any more: the picture is wanted
        sys.stdout = open(os.devnull, 'w')


def bold(text):
    """`text` in bold on a terminal, unless NO_COLOR is set."""
    return f'\033[1m{text}\033[0m' if sys.stdout.isatty() and not os.environ.get('NO_COLOR') else text


def swatch(colour):
    """A patch of an RGB colour on a terminal, unless NO_COLOR is set."""
    return '\033[48;2;{};{};{}m    \033[0m '.format(*colour) if bold('') else ''


def examples(items, count=4):
    """The first items of a list in words, and how many more there are."""
    return ', '.join(items[:count]) + (f' and {len(items) - count} more' if len(items) > count else '')


def progress_line(number, evaluation, error, seconds):
    """The line of an evaluation: losses divided by 1000, and how far the gradient has fallen."""
    def by_layer(kind, losses):
        terms = '  '.join(f'{layer} {loss / 1000:.2e}' for layer, loss in losses.items())
        return f'   {kind} {terms}' if losses else ''
    return (f'{number:>3}   loss {evaluation.total / 1000:.2e}' + by_layer('content', evaluation.content) +
            by_layer('style', evaluation.style) + f'   quality {100 - 100 * math.sqrt(error / 255):>4.1f}%'
            f'   time {seconds:.1f}s')


def lost_content(evaluation, options):
    """What to say where the content is less than 1 % of the loss, or None; who asks for a weight below 1 has it so."""
    content = sum(evaluation.content.values())
    if options.method == 'gatys' or options.content_weight < 1 or not 0 < content < 0.01 * evaluation.total:
        return None
    weight = options.content_weight * (evaluation.total / content - 1)  # would make it half of this loss
    return bold(f'WARNING: after the first phase the content is {100 * content / evaluation.total:.1g} % of the loss, '
                f'and hardly to be seen. FIX: --content-weight={float(f"{weight:.0e}"):.0f}.')


def handle_signals(handler):
    """Have Ctrl-C and `docker stop` handled so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number, frame):
    """Signal handler: leave whatever runs, to save what there is, once."""
    handle_signals(signal.SIG_IGN)
    raise KeyboardInterrupt(number)                                     # itself: a subclass Theano would wrap


# ---- engine in C++ ---------------------------------------------------------------------------------------------------

# The same numbers as the formulas above, an order of magnitude cheaper on the CPU: two Theano Ops in C++. Images lie as
# (H, W, C): the channels of a pixel are neighbours in memory, and all inner loops run over them.

# What both Ops share. The product beats a BLAS on these narrow matrices, and needs neither its library nor its threads.
COMMON = r'''
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>
#include <omp.h>

#if defined(__AVX512F__)                                  /* floats in a register, and how many of these lie abreast */
enum { LANES = 16, ABREAST = 4 };
#elif defined(__AVX__)
enum { LANES = 8, ABREAST = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, ABREAST = 4 };
#else
enum { LANES = 4, ABREAST = 2 };
#endif
enum { PANEL = 64 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline long padded(long n) { return (n + 15) / 16 * 16; }

/* R rows and C registers of the product, summed over the depth without leaving the registers */
template <int R, int C>
static inline void sums(long depth, const float *A, long lda, const float *B, long ldb, float *out, long ldo) {
    vec sum[R][C] = {};
    for (long d = 0; d < depth; d++)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) sum[r][c] += A[r * lda + d] * load(B + d * ldb + c * LANES);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * ldo + c * LANES, sum[r][c]);
}

template <int C>
static void strip(long rows, long depth, const float *A, long lda, const float *B, long ldb, float *out, long ldo) {
    long r = 0;
    for (; r + 6 <= rows; r += 6) sums<6, C>(depth, A + r * lda, lda, B, ldb, out + r * ldo, ldo);
    for (; r < rows; r++) sums<1, C>(depth, A + r * lda, lda, B, ldb, out + r * ldo, ldo);
}

/* out (rows, columns) = A (rows, depth) B (depth, columns), on one thread. The columns are a multiple of 16, and B lies
   in panels of 64 of them, each (depth, 64), the last narrower. */
static void product(long rows, long columns, long depth, const float *A, long lda, const float *B, float *out,
                    long ldo) {
    for (long p = 0; p < columns; p += PANEL) {
        long width = std::min<long>(PANEL, columns - p);
        for (long c = 0, left; (left = (width - c) / LANES) > 0; c += LANES * std::min<long>(left, ABREAST)) {
            auto f = left >= ABREAST ? strip<ABREAST> : left == 3 ? strip<3> : left == 2 ? strip<2> : strip<1>;
            f(rows, depth, A, lda, B + p * depth + c, width, out + p + c, ldo);
        }
    }
}

/* Working memory, kept from call to call: to get fresh pages costs more than what is done in them. All Ops share it, by
   its visibility, though each is a library of its own. */
__attribute__((visibility("default"))) inline float *workspace(size_t floats) {
    static std::vector<float> kept;
    if (kept.size() < floats + 16) {
        std::vector<float>().swap(kept);
        kept.resize(floats + 16);
    }
    return (float *)(((size_t)kept.data() + 63) / 64 * 64);
}

/* an array as contiguous floats, copied only where it is not */
struct Array {
    PyArrayObject *array;
    Array(PyArrayObject *a) : array(a ? PyArray_GETCONTIGUOUS(a) : NULL) {
        if (a && !array) throw std::bad_alloc();
    }
    ~Array() { Py_XDECREF(array); }
    operator float *() const { return array ? (float *)PyArray_DATA(array) : NULL; }
    long size(int k) const { return PyArray_DIM(array, k); }
};

/* the memory of an output, in its old array where that fits */
static void *allocate(PyArrayObject **out, int ndim, npy_intp *shape, int type) {
    if (!*out || !PyArray_CompareLists(PyArray_DIMS(*out), shape, ndim) || !PyArray_IS_C_CONTIGUOUS(*out)) {
        Py_XDECREF(*out);
        *out = (PyArrayObject *)PyArray_EMPTY(ndim, shape, type, 0);
        if (!*out) throw std::bad_alloc();
    }
    return PyArray_DATA(*out);
}

/* Whether a signal's handler raised. Work is done in pieces, which ask before they begin, so that Ctrl-C need not wait
   for all of it: the first thread of a team is Python's own and may run its handlers. */
static volatile bool interrupted;
static bool leave() {
    if (!interrupted && omp_get_thread_num() == 0 && PyErr_CheckSignals()) interrupted = true;
    return interrupted;
}

/* runs what may throw; false, with Python's exception set, where it did */
template <typename F>
static bool guarded(F f) {
    interrupted = false;
    try { f(); return !interrupted; }
    catch (std::invalid_argument &error) { PyErr_SetString(PyExc_ValueError, error.what()); }
    catch (std::exception &) { PyErr_NoMemory(); }
    return false;
}
'''

CONVOLUTION = r'''
struct Picture { const float *data, *mask; long H, W, C, width; };    /* width: W before it is averaged */

/* B^T d and A^T m of [LG15], on one column or row, whose elements are s apart */
static inline void spread(vec *d, int s) {
    vec p = d[4*s] - 4 * d[2*s], q = d[3*s] - 4 * d[s], r = d[4*s] - d[2*s], t = 2 * (d[3*s] - d[s]);
    d[0] = 4 * d[0] - 5 * d[2*s] + d[4*s];
    d[5*s] = 4 * d[s] - 5 * d[3*s] + d[5*s];
    d[s] = p + q; d[2*s] = p - q; d[3*s] = r + t; d[4*s] = r - t;
}
static inline void gather(vec *m, int s) {
    vec p = m[s] + m[2*s], q = m[s] - m[2*s], r = m[3*s] + m[4*s], t = m[3*s] - m[4*s];
    m[0] += p + r; m[s] = q + 2 * t; m[2*s] = p + 4 * r; m[3*s] = q + 8 * t + m[5*s];
}

/* V (36, C) of the tile whose first pixel is (y, x): B^T d B of 6x6 pixels, which are zero outside the picture and
   where the mask is not positive, and averages of 2x2 where pooled */
template <bool MASK, bool POOL>
static void tile_in(const Picture &in, long y, long x, const float *zeros, float *V, long ldV) {
    const float *data[36], *mask[36];
    long right = in.C, down = in.width * in.C;
    for (int i = 0; i < 36; i++) {
        long v = y + i / 6 - 1, u = x + i % 6 - 1;
        bool inside = v >= 0 && u >= 0 && v < in.H && u < in.W;
        data[i] = inside ? in.data + (POOL ? 2 * (v * in.width + u) : v * in.W + u) * in.C : zeros;
        mask[i] = inside ? in.mask + (v * in.W + u) * in.C : zeros;
    }
    for (long c = 0; c < in.C; c += LANES) {
        vec d[36];
        int n = std::min<long>(LANES, in.C - c);
        auto at = [=](const float *p) {
            vec v = {};
            if (n == LANES) return load(p + c);
            for (int l = 0; l < n; l++) v[l] = p[c + l];
            return v;
        };
        #pragma GCC unroll 36
        for (int i = 0; i < 36; i++) {
            d[i] = at(data[i]);
            if (POOL) d[i] = .25f * ((d[i] + at(data[i] + right)) + (at(data[i] + down) + at(data[i] + down + right)));
            if (MASK) d[i] = at(mask[i]) > 0 ? d[i] : vec{};
        }
        #pragma GCC unroll 6
        for (int i = 0; i < 6; i++) spread(d + i, 6);
        #pragma GCC unroll 6
        for (int i = 0; i < 6; i++) spread(d + 6 * i, 1);
        #pragma GCC unroll 36
        for (int i = 0; i < 36; i++) store(V + i * ldV + c, d[i]);
    }
}

/* The tile's 4x4 pixels of out from M (36, K): A^T m A, with the bias and rectified where there is one. Where `turn`,
   a quarter of each goes to 2x2 pixels of an output of width `turn`, as the gradient of their average. */
static void tile_out(const float *M, long ldM, const float *bias, long y, long x, long H, long W, long K, long turn,
                     float *out) {
    for (long k = 0; k < K; k += LANES) {
        vec m[36];
        int n = std::min<long>(LANES, K - k);
        #pragma GCC unroll 36
        for (int i = 0; i < 36; i++) m[i] = load(M + i * ldM + k);
        #pragma GCC unroll 6
        for (int i = 0; i < 6; i++) gather(m + i, 6);
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) gather(m + 6 * i, 1);
        #pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            long v = y + i / 4, u = x + i % 4;
            if (v >= H || u >= W) continue;
            vec value = m[i / 4 * 6 + i % 4];
            if (bias) {
                value += load(bias + k);
                value = value < 0 ? vec{} : value;                    /* NaN stays NaN */
            }
            for (int j = 0; j < (turn ? 4 : 1); j++) {
                float *p = out + (turn ? (2 * v + j / 2) * turn + 2 * u + j % 2 : v * W + u) * K + k;
                vec part = turn ? .25f * value : value;
                if (n == LANES) store(p, part);
                else for (int l = 0; l < n; l++) p[l] = part[l];
            }
        }
    }
}

/* out (H, W, K) = the picture's convolution, a block of tiles at a time: few stay in cache, many pay for filters that
   do not */
template <bool MASK, bool POOL>
static void convolve(const Picture &in, const float *U, const float *bias, float *out, long K, long turn) {
    long across = (in.W + 3) / 4, tiles = across * ((in.H + 3) / 4), threads = omp_get_max_threads();
    if (!tiles) return;
    long C = padded(in.C), N = padded(K), zeros = padded((POOL ? in.width + 2 : 1) * in.C + LANES);
    long most = (C * N > 1 << 16 ? 96 : 24) * threads, blocks = (tiles + most - 1) / most * threads;
    long block = (tiles + blocks - 1) / blocks;
    long ldV = block * C + 16, ldM = block * N + 16;                  /* 16 more, lest all fall into one cache set */
    float *none = workspace(zeros + N + threads * 36 * (ldV + ldM)), *b = none + zeros, *space = b + N;
    std::fill(none, space, 0.f);
    if (bias) std::copy(bias, bias + K, b);
    #pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long first = 0; first < tiles; first += block) {
        if (leave()) continue;
        long last = std::min(first + block, tiles);
        float *V = space + omp_get_thread_num() * 36 * (ldV + ldM), *M = V + 36 * ldV;
        for (long t = first; t < last; t++)
            tile_in<MASK, POOL>(in, t / across * 4, t % across * 4, none, V + (t - first) * C, ldV);
        for (int i = 0; i < 36; i++) product(last - first, N, in.C, V + i * ldV, C, U + i * in.C * N, M + i * ldM, N);
        for (long t = first; t < last; t++)
            tile_out(M + (t - first) * N, ldM, bias ? b : NULL, t / across * 4, t % across * 4, in.H, in.W, K, turn,
                     out);
    }
}

/* forward: the rectified convolution of x */
template <bool POOL>
static void forward(PyArrayObject *input, PyArrayObject *filters, PyArrayObject *biases, PyArrayObject **out) {
    Array x(input), U(filters), b(biases);
    npy_intp shape[] = {x.size(0) >> POOL, x.size(1) >> POOL, b.size(0)};
    if (U.size(0) != 36 || U.size(1) != x.size(2) * padded(shape[2]))
        throw std::invalid_argument("Convolution: the filters do not fit the picture or the bias");
    float *y = (float *)allocate(out, 3, shape, NPY_FLOAT32);
    convolve<false, POOL>({x, NULL, shape[0], shape[1], x.size(2), x.size(1)}, U, b, y, shape[2], 0);
}

/* backward: the gradient with respect to x, from that with respect to y */
template <bool POOL>
static void backward(PyArrayObject *gradient, PyArrayObject *output, PyArrayObject *filters, PyArrayObject *input,
                     PyArrayObject **out) {
    Array dy(gradient), y(output), U(filters);
    npy_intp *shape = PyArray_DIMS(input), H = shape[0], W = shape[1], C = shape[2];
    if (!PyArray_CompareLists(PyArray_DIMS(dy.array), PyArray_DIMS(y.array), 3) || y.size(0) != H >> POOL ||
        y.size(1) != W >> POOL || U.size(0) != 36 || U.size(1) != y.size(2) * padded(C))
        throw std::invalid_argument("Convolution: the gradient does not fit the picture or the filters");
    float *dx = (float *)allocate(out, 3, shape, NPY_FLOAT32);
    for (long r = 0; POOL && r < H; r++)                              /* a row and a column that no average saw */
        if (H % 2 && r == H - 1) std::fill(dx + r * W * C, dx + (r + 1) * W * C, 0.f);
        else if (W % 2) std::fill(dx + ((r + 1) * W - 1) * C, dx + (r + 1) * W * C, 0.f);
    convolve<true, false>({dy, y, y.size(0), y.size(1), y.size(2), 0}, U, NULL, dx, C, POOL ? W : 0);
}
'''

MATCHING = r'''
enum { RING = 1 << 18 };                                              /* floats of products that a thread keeps */

/* B for product() from a row of w pixels of v, each a column */
static void pack(const float *v, long w, long D, float *B) {
    for (long q = 0; q < padded(w); q++) {
        long p = q / PANEL * PANEL, width = std::min<long>(PANEL, padded(w) - p);
        for (long d = 0; d < D; d++) B[p * D + d * width + q - p] = q < w ? v[q * D + d] : 0;
    }
}

/* The scores of a row of patches i with one of patches j, from the products P[y] (W, ld) of their rows of pixels. best,
   match and a belong to the i, history, penalty and b to the j, of which `first` is the first; penalty ends in
   infinity. */
template <bool SCALED>
static void score(const float *const *P, long W, long w, long ld, float *space, const float *penalty, long first,
                  float *best, npy_int64 *match, float *history, const float *a, const float *scale) {
    float *column[3], *S = space + 3 * (ld + LANES);                  /* column: summed over y; S: and over x */
    for (int k = 0; k < 3; k++) column[k] = space + k * (ld + LANES);
    for (long x = 0; x < W; x++) {
        std::rotate(column, column + 1, column + 3);
        for (long q = x * ld, b = 0; b < ld; b += LANES)
            store(column[2] + b, load(P[0] + q + b) + load(P[1] + q + b) + load(P[2] + q + b));
        if (x < 2) continue;
        vec top = vec{} - INFINITY;
        for (long b = 0; b < ld; b += LANES) {
            vec s = load(column[0] + b) + load(column[1] + b + 1) + load(column[2] + b + 2);
            if (SCALED) s *= a[x - 2] * load(scale + b);
            if (history) store(history + b, larger(s, load(history + b)));
            s -= load(penalty + b);
            store(S + b, s);
            top = larger(s, top);
        }
        float most = top[0];
        for (int l = 1; l < LANES; l++) most = std::max(most, top[l]);
        if (most >= best[x - 2]) {                                    /* seldom */
            npy_int64 j = first + (std::find(S, S + w - 3, most) - S);
            if (most > best[x - 2] || j < match[x - 2]) match[x - 2] = j;
            best[x - 2] = most;
        }
    }
}

/* Pairs of pixel rows, y of u and a of v, with the same y - a make a diagonal. The scores of two rows of patches need
   the products of three pairs that follow on a diagonal: going along it, each product is made once and three are kept.
   A thread takes G diagonals at a time. */
template <bool SCALED>
static void match(const float *u, long H, long W, const float *v, long h, long w, long D, const float *penalty,
                  const float *a_of, const float *b_of, npy_int64 *matches, float *history) {
    long ld = padded(w), patches = (H - 2) * (W - 2), style = history ? (h - 2) * ld : 0;
    long G = std::max<long>(1, std::min<long>(8, RING / (3 * W * ld))), bands = (H + h - 2 + G) / G;
    long threads = omp_get_max_threads(), row = 4 * (ld + LANES), each = 3 * G * W * ld + row + patches + style;
    float *B = workspace(h * ld * D + (h - 2) * ld * (1 + SCALED) + threads * each), *limits = B + h * ld * D;
    float *scale = limits + (h - 2) * ld * SCALED, *space = scale + (h - 2) * ld;
    std::vector<npy_int64> found(threads * patches);
    #pragma omp parallel num_threads(threads)
    {
        long team = omp_get_num_threads(), self = omp_get_thread_num();
        float *ring = space + self * each, *sums = ring + 3 * G * W * ld, *best = sums + row, *most = best + patches;
        npy_int64 *match = found.data() + self * patches;
        std::fill(sums, sums + row, 0.f);
        std::fill(best, ring + each, -INFINITY);
        #pragma omp for
        for (long a = 0; a < h; a++) {
            pack(v + a * w * D, w, D, B + a * ld * D);
            for (long b = 0; a < h - 2 && b < ld; b++) {
                long j = a * (w - 2) + b;
                if (SCALED) scale[a * ld + b] = b < w - 2 ? b_of[j] : 0;
                limits[a * ld + b] = b >= w - 2 || (SCALED && b_of[j] == 0) ? INFINITY : penalty ? penalty[j] : 0;
            }
        }
        #pragma omp for schedule(dynamic)
        for (long band = 0; band < bands; band++) {
            if (leave()) continue;
            long shift = band * G - h + 1;                            /* y - a of the band's first diagonal */
            for (long a = std::max(0L, 1 - G - shift); a < std::min(h, H - shift); a++) {
                long y = std::max(0L, a + shift), end = std::min(H, a + shift + G);
                auto at = [=](long a, long y) { return ring + (a % 3 * G + y - a - shift) * W * ld; };
                product((end - y) * W, ld, D, u + y * W * D, D, B + a * ld * D, at(a, y), ld);
                for (y = std::max(2L, y); a >= 2 && y < end; y++) {
                    const float *P[] = {at(a - 2, y - 2), at(a - 1, y - 1), at(a, y)};
                    long i = (y - 2) * (W - 2);
                    score<SCALED>(P, W, w, ld, sums, limits + (a - 2) * ld, (a - 2) * (w - 2), best + i, match + i,
                                  history ? most + (a - 2) * ld : NULL, a_of + i, scale + (a - 2) * ld);
                }
            }
        }
        #pragma omp for
        for (long i = 0; i < patches; i++) {                          /* the best of all threads, the first of equals */
            std::pair<float, npy_int64> first(INFINITY, 0);
            for (long k = 0; k < team; k++)
                first = std::min(first, std::make_pair(-best[(k - self) * each + i], match[(k - self) * patches + i]));
            matches[i] = first.second;
        }
        #pragma omp for
        for (long j = 0; j < (history ? (h - 2) * (w - 2) : 0); j++) {
            history[j] = -INFINITY;
            for (long k = 0; k < team; k++)
                history[j] = std::max(history[j], most[(k - self) * each + j / (w - 2) * ld + j % (w - 2)]);
        }
    }
}

static void matching(PyArrayObject *image, PyArrayObject *style, PyArrayObject *of_image, PyArrayObject *of_style,
                     PyArrayObject *penalties, PyArrayObject **matches, PyArrayObject **history) {
    Array u(image), v(style), a(of_image), b(of_style), penalty(penalties);
    npy_intp H = u.size(0), W = u.size(1), h = v.size(0), w = v.size(1), M = (H - 2) * (W - 2), N = (h - 2) * (w - 2);
    bool scaled = a.size(0) || b.size(0);
    if (std::min(std::min(H, W), std::min(h, w)) < 3 || u.size(2) != v.size(2) || (penalty && penalty.size(0) != N) ||
        (scaled && (a.size(0) != M || b.size(0) != N)))
        throw std::invalid_argument("Matching: the pictures have no 3x3 patch, or do not fit each other");
    npy_int64 *numbers = (npy_int64 *)allocate(matches, 1, &M, NPY_INT64);
    float *scores = history ? (float *)allocate(history, 1, &N, NPY_FLOAT32) : NULL;
    (scaled ? match<true> : match<false>)(u, H, W, v, h, w, u.size(2), penalty, a, b, numbers, scores);
}
'''


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
