#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#   "Theano==1.0.5",
#   "Lasagne==0.1",
#   "numpy==1.26.4; python_version < '3.12'",
#   "numpy==2.5.5; python_version >= '3.12'",
#   "scipy==1.16.3",
#   "Pillow==13.0.0",
#   "scikit-image==0.26.0",
#   "h5py==3.16.0",
#   "tqdm==4.70.1",
#   "scipy-openblas32==0.3.34.0.0",
#   "six==1.17.0",
#   "setuptools==80.10.2",
# ]
# [tool.uv]
# find-links = ["samples"]
# ///
"""Neural Doodle: paint one picture with the patches of another, eyes from eyes and skin from skin.

First the method: options, images and maps, network, matching, losses, objective, optimisation, run.
Then the machinery: weights, devices, engine, files, and the engine's C++.

Notation:
    x       the image being painted, (3, H, W), blue green red, 0..255
    f, g    features of the image and of the style picture at one layer, (H, W, C) and (h, w, C)
    m, n    maps of the image and of the style picture at that layer, (H, W, K) and (h, w, K)
    u, v    matching keys: features and maps, each normalised at every pixel, (H, W, C + K) and (h, w, C + K)
    i, j    indices of 3x3 patches, row by row, of the image and of the style picture
    S       S(i, j), how well patch i of the image fits patch j of the style picture
    w       semantic weight, of the maps against the features

Papers:

    [SZ14]  Simonyan, Zisserman: Very Deep Convolutional Networks. arXiv 1409.1556
    [LW16]  Li, Wand: Combining Markov Random Fields and Convolutional Neural Networks. arXiv 1601.04589
    [GEB16] Gatys, Ecker, Bethge: Image Style Transfer Using Convolutional Neural Networks. CVPR 2016
    [GBHS16] Gatys, Bethge, Hertzmann, Shechtman: Preserving Color in Neural Artistic Style Transfer. arXiv 1606.05897
    [C16]   Champandard: Semantic Style Transfer and Turning Two-Bit Doodles into Fine Artworks. arXiv 1603.01768
    [LG15]  Lavin, Gray: Fast Algorithms for Convolutional Neural Networks. arXiv 1509.09308
    [MV15]  Mahendran, Vedaldi: Understanding Deep Image Representations. arXiv 1412.0035
    [BSFG09] Barnes, Shechtman, Finkelstein, Goldman: PatchMatch. ACM Transactions on Graphics 28, 2009
    [BLNZ95] Byrd, Lu, Nocedal, Zhu: A Limited Memory Algorithm for Bound Constrained Optimization
"""
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 14):                      # before what other ones do not have
    print('ERROR: This is Python {}.{}, and the program needs one from 3.11 to 3.14.\n'
          '  FIX: install python3.11, python3.11-dev and python3.11-venv and use python3.11, or run it in docker, or '
          'with uv run.'.format(*sys.version_info), file=sys.stderr)
    sys.exit(2)

import argparse
import atexit
import base64
import bisect
import bz2
import configparser
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import fnmatch
import functools
import glob
import hashlib
import http.client
import importlib.util
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
import resource
import secrets
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sysconfig
import tempfile
import threading
import time
import types
import urllib.parse
import urllib.request
import warnings
import zipfile
import zlib
from collections import namedtuple

__version__ = '1.0.0'


# ---- options ---------------------------------------------------------------------------------------------------------

SAMPLE = 'python3 doodle.py --style samples/astronaut.png --content samples/hopper.png --output swap.png'


class UserError(Exception):
    """An error that the user can fix: ``UserError(problem, fix)``, each one line of plain words."""

    def __init__(self, problem, fix):
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix                           # Theano adds to `args`


def parse_natural(text):
    """A whole number from 1 on."""
    return parse_whole(text, least=1)


def parse_whole(text, least=0):
    """A whole number from `least` on."""
    if not re.fullmatch('[0-9]{1,9}', text) or int(text) < least:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number from {least} on')
    return int(text)


def one_of(*choices):
    """The parser of an option that takes one of `choices`, words or numbers."""
    def chosen(text):
        if text not in map(str, choices):
            raise argparse.ArgumentTypeError(f'{text!r} is none of {", ".join(map(str, choices))}')
        return type(choices[0])(text)
    return chosen


def parse_number(text):
    """A decimal number as float, else NaN: float() alone would accept 1_0, infinity and non-ASCII digits."""
    return float(text) if re.fullmatch(r'[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]+)?', text) else math.nan


def parse_scale(text):
    """A factor for the sides of a picture, 0.1 .. 10."""
    if not 0.1 <= parse_number(text) <= 10:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 0.1 to 10')
    return parse_number(text)


def up_to(most):
    """The parser of a weight: 0, or 1e-6 to `most`; below 1e-6 the optimiser's steps vanish in float32."""
    def chosen(text):
        value = parse_number(text)
        if value and not 1e-6 <= value <= float(most):
            raise argparse.ArgumentTypeError(f'{text!r} is neither 0 nor a number from 1e-6 to {most}')
        return value
    return chosen


def parse_path(text):
    """A path with ~ expanded, which shells do not do in ``--option=~/file``."""
    if not text:
        raise argparse.ArgumentTypeError(f'{text!r} is no path')
    return expanded(text)


def parse_seed(text):
    """``noise``, ``content``, or the path of a picture."""
    if (text not in ('', 'noise', 'content') and not os.path.exists(text) and
            not (re.search('[./~]', text) and math.isnan(parse_number(text)))):
        raise UserError(f'--seed {text!r} is neither noise, content, nor the path of a picture.',
                        'give one of these; a number, which repeats a run, goes to --random-seed')
    return parse_path(text)


def parse_layers(text):
    """Names of VGG layers, ``'3_1,4_1'`` -> ``['3_1', '4_1']``."""
    names = text.split(',')
    for name in names:
        if name not in layer_names('vgg19'):
            raise argparse.ArgumentTypeError(f'{name!r} is no layer of the network: 1_1 .. 5_4, with commas between')
    return sorted(set(names), key=names.index)


def parse_size(text):
    """``'WIDTHxHEIGHT'`` -> (width, height)."""
    found = re.fullmatch('([1-9][0-9]{0,5})x([1-9][0-9]{0,5})', text)
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} is not a size like 640x480')
    return tuple(map(int, found.groups()))


def parse_range(text):
    """``'16:240'`` -> (16.0, 240.0), within 0..255."""
    try:
        low, high = map(parse_number, text.split(':'))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high <= 255:
        raise argparse.ArgumentTypeError(f'{text!r} is not a range of colours like 16:240, within 0..255')
    return low, high


def parse_parts(text):
    """``auto`` or ``faces``, or a number of parts, 2 .. 16; 0: none."""
    return text if text in ('auto', 'faces') else one_of(0, 'auto', 'faces', *range(2, 17))(text)


def parse_device(text):
    """``cpu``, ``gpuN``, or Theano's own ``cudaN`` and ``openclN:M``; ``gpuN`` means Theano's ``cudaN``."""
    if not re.fullmatch('cpu|(gpu|cuda)[0-9]*|opencl[0-9]+:[0-9]+', text):
        raise argparse.ArgumentTypeError(f'{text!r} is no device: cpu, gpu0, gpu1, .., cuda0, .., opencl0:0')
    return re.sub(r'^gpu', 'cuda', text)


# {method: (class of its style terms, defaults that differ from those in OPTIONS)}; None: the method lacks the option.
# The papers weight sums over a picture; here weights are of means, which suit every size. Gatys' content term,
# 1/2 sum (f - g)^2, is H W C / 2 times ours: content to style as 10 to 0.1 is 1e-4 at 512x512 pixels, and 100 to 0.1 is
# 1e-3, the range of [GEB16]. Li and Wand's numbers of copies are those of [LW16], the weights were found by trial.
# Their released code has no copies, content at 4_1, and weights 20 for content, 1e-4 for style, 1e-3 for smoothness.
METHODS = {
    'champandard': ('PatchTerm', dict()),
    'li-wand': ('WholePatchTerm', dict(content_weight='10.0', style_weight='10.0', smoothness='10.0', rotations='2',
                                       scales='3', semantic_weight=None)),
    'gatys': ('GramTerm', dict(content_weight='10.0', style_weight='0.1', style_layers='1_1,2_1,3_1,4_1,5_1',
                               smoothness='0.0', semantic_weight=None, rotations=None, scales=None, variety=None,
                               cache=None)),
}

parse_method, parse_network, parse_switch = one_of(*METHODS), one_of('vgg19', 'vgg16'), one_of(0, 1)
parse_steps, parse_search = one_of(*range(13)), one_of('exact', 'near')  # 12 steps: 90 degrees, or a factor of 0.4
parse_line_search = one_of('fresh', 'held')
parse_weight, parse_bias = up_to('1e20'), up_to('1e6')                # keep losses finite, features above rounding

# Placeholders of values in --help.
VALUES = {parse_path: 'PATH', str: 'EXT', parse_size: 'WxH', parse_natural: 'N', parse_whole: 'N', parse_seed: 'SEED',
          parse_parts: 'N|faces', parse_range: 'LO:HI', parse_method: 'NAME', parse_weight: 'X', parse_layers: 'LAYERS',
          parse_scale: 'X', parse_bias: 'X', parse_steps: 'N', parse_switch: '0|1', parse_search: 'NAME',
          parse_device: 'DEVICE', parse_network: 'NAME', parse_line_search: 'NAME'}

SAME, MORE, FREE = 'same', 'more', 'free'      # on --resume: must be as before, or may be more, or may differ

OPTIONS = {'pictures': (
    # option              resume type           default        meaning
    ('--style',           FREE, parse_path,    None,          'style picture, whose patches are used (needed)'),
    ('--content',         FREE, parse_path,    None,          'content picture, which is painted anew'),
    ('--output',          FREE, parse_path,    'output.png',  'the result; without --content, its map is the doodle'),
    ('--output-size',     SAME, parse_size,    None,          'width and height for texture synthesis'),
    ('--max-size',        SAME, parse_natural, None,          'shrink pictures with a longer side, maps with them'),
    ('--style-scale',     SAME, parse_scale,   '1.0',         'enlarge style picture and map: larger strokes'),
    ('--keep-colors',     FREE, bool,          False,         "the result's luminance with the content's colours"),
    ('--semantic-ext',    FREE, str,           '_sem.png',    'the map of dir/name.jpg is dir/name + this'),
    ('--auto-maps',       FREE, parse_parts,   '0',           'paint the maps that are missing: faces, or N parts'),
    ('--seed',            SAME, parse_seed,    'noise',       'start from noise, content, or the picture at a path'),
    ('--seed-range',      SAME, parse_range,   '16:240',      'range of the colours of noise'),
    ('--random-seed',     FREE, parse_whole,   None,          'repeats a run; drawn and printed when not given'),
), 'losses': (
    ('--method',          SAME, parse_method,  'champandard', 'champandard, or without maps li-wand or gatys'),
    ('--content-weight',  SAME, parse_weight,  '10.0',        'weight of the content loss'),
    ('--content-layers',  SAME, parse_layers,  '4_2',         'layers of the content loss'),
    ('--style-weight',    SAME, parse_weight,  '25.0',        'weight of the style loss'),
    ('--style-layers',    SAME, parse_layers,  '3_1,4_1',     'layers of the style loss'),
    ('--smoothness',      SAME, parse_weight,  '1.0',         'weight of the smoothness prior'),
), 'matching': (
    ('--semantic-weight', SAME, parse_bias,    '10.0',        'weight of the maps against the features; 0: no maps'),
    ('--variety',         SAME, parse_bias,    '0.0',         'bias toward style patches that are used little'),
    ('--rotations',       SAME, parse_steps,   '0',           'style copies, turned by 7.5 degrees N times each way'),
    ('--scales',          SAME, parse_steps,   '0',           'style copies, rescaled by 0.05 N times each way'),
    ('--slices',          FREE, parse_natural, None,          'batches of matching on a GPU; else its memory decides'),
    ('--cache',           SAME, parse_switch,  '0',           '1: find the matches once a phase only'),
    ('--matching',        SAME, parse_search,  'exact',       'near: large pictures in linear time, nearly exact'),
), 'optimisation': (
    ('--phases',          SAME, parse_natural, '3',           'number of scales, each twice the one before'),
    ('--iterations',      MORE, parse_natural, '100',         'evaluations of the loss in each phase, at most'),
    ('--line-search',     SAME, parse_line_search, 'fresh',   'fresh, or held: few new matches in a line search'),
    ('--stop-when-converged', FREE, parse_switch, '1',        '0: go on also where a phase can only repeat itself'),
), 'machine and files': (
    ('--device',          FREE, parse_device,  'cpu',         'cpu, gpu0, gpu1, ..; also cuda0, opencl0:0'),
    ('--network',         FREE, parse_network, None,          'vgg19 or vgg16; without it VGG19, else the bundled one'),
    ('--weights',         FREE, parse_path,    None,          'the network: vgg19_conv.pkl.bz2, a Keras .h5, or .npz'),
    ('--print-every',     FREE, parse_whole,   '10',          'print a line every N evaluations; 0: never'),
    ('--save-every',      FREE, parse_whole,   '10',          'write a frame every N evaluations; 0: never'),
    ('--frames',          FREE, parse_path,    'frames',      'folder of the frames'),
    ('--log',             FREE, parse_path,    None,          'write every evaluation as a line of JSON'),
    ('--figure',          FREE, parse_path,    None,          'write inputs, maps, result and losses as one picture'),
    ('--animation',       FREE, parse_path,    None,          'write the frames as one .gif, .webp or .png'),
    ('--check',           FREE, bool,          False,         'tell what would be done, and likely painting mistakes'),
    ('--resume',          FREE, bool,          False,         'go on from a checkpoint, also with more --iterations'),
    ('--keep-checkpoint', FREE, bool,          False,         'keep the checkpoint when the run ends'),
    ('--version',         FREE, 'version',     None,          "tell the program's version"),
)}


class Parser(argparse.ArgumentParser):
    """argparse that reports errors as `UserError`."""

    def error(self, message):
        raise UserError(message, f'see {self.prog} --help')


class Once(argparse.Action):
    """Store the value of an option, and refuse a second, different one."""

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
        A value is invalid, or the style picture is missing.
    """
    parser = Parser(prog='doodle.py', description='Paint one picture with the patches of another.',
                    epilog=f'A first run: {SAMPLE}')
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for flag, _, kind, default, meaning in rows:
            others = ''.join(f'; {name}: {own[attribute(flag)]}' for name, (_, own) in METHODS.items()
                             if own.get(attribute(flag)))
            how = dict(type=kind, default=default, metavar=VALUES.get(kind))
            how = {bool: dict(action='store_true'), 'version': dict(action='version', version=f'%(prog)s {__version__}')
                   }.get(kind, how)
            how |= dict(nargs='?', const='auto') if kind is parse_parts else {}
            how |= dict(action=Once) if flag in ('--style', '--content') else {}
            group.add_argument(flag, **how, help=meaning + others + (f' (default: {default})' if default else ''))
    _, own = METHODS[parser.parse_args(arguments).method]
    parser.set_defaults(**{name: default or 0 for name, default in own.items()})
    options = parser.parse_args(arguments)
    for name, default in own.items():
        if default is None and getattr(options, name):
            raise UserError(f'--method={options.method} has no --{name.replace("_", "-")}.', 'leave one of them out')
    if options.matching == 'near' and (options.variety or not style_term(options).patched):
        raise UserError('--matching=near is for patches, and not for --variety, which needs all their scores.',
                        'leave one of them out')
    if options.line_search == 'held' and (options.variety or options.cache or options.matching == 'near' or
                                          not style_term(options).patched):
        raise UserError('--line-search=held is for matches that the image alone tells, which --variety, --cache=1, '
                        '--matching=near and --method=gatys do not have.', 'leave one of them out')
    if not options.style:
        raise UserError('No style picture was given.', f'add --style PATH; to see one at work: {SAMPLE}')
    return options


def copy_count(options):
    """Number of copies of the style picture that are matched: every rotation at every scale."""
    return (1 + 2 * options.rotations) * (1 + 2 * options.scales)


# ---- images and maps -------------------------------------------------------------------------------------------------

# The program's inputs, read and checked: pictures (H, W, 3) uint8 RGB, maps (H, W, K) uint8, alpha channels (H, W, 1)
# uint8. What is missing is None; so is `style_alpha` if no pixel of the style picture is fully transparent.
Inputs = namedtuple('Inputs', 'content content_map style style_map seed size style_alpha content_alpha')


def pooled_map(channels, size, layer):
    """A map at the resolution of a layer: resized to the phase's size, then averaged over stride x stride pixels.

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


def resized(values, size, method):
    """`values` (H, W, K), uint8 or float, or None, resampled channel by channel to `size` = (width, height)."""
    if values is None or values.shape[1::-1] == tuple(size):
        return values
    channels = [Image.fromarray(plane).resize(size, method, reducing_gap=None) for plane in np.moveaxis(values, 2, 0)]
    return np.stack([np.asarray(plane) for plane in channels], axis=2)


def limited(values, longest, method):
    """`values` (H, W, K) or None, shrunk where their long side is more than `longest` (or None)."""
    return None if values is None else resized(values, limited_size(values.shape[1::-1], longest), method)


def limited_size(size, longest):
    """`size` = (width, height), shrunk where the long side is more than `longest` (or None)."""
    shrink = min(1, (longest or math.inf) / max(size))
    return tuple(max(1, round(side * shrink)) for side in size)


def scaled_size(size, options):
    """(width, height) at which a style picture of `size` is used; UserError if that is too large for the memory."""
    result = tuple(max(1, round(side * options.style_scale)) for side in limited_size(size, options.max_size))
    if math.prod(result) * PIXEL_BYTES > memory_limit():
        raise UserError('--style-scale={:g} makes {}x{} pixels of {!r}, too many for the free memory.'.format(
            options.style_scale, *result, options.style), 'a smaller --style-scale, or --max-size')
    return result


def phase_size(size, phase, phases):
    """(width, height) in a phase: each has twice the scale of the one before, and the last is at scale 1."""
    return tuple(side >> phases - 1 - phase for side in size)


def to_planes(rgb):
    """(H, W, 3) RGB -> (3, H, W) BGR float64."""
    return np.moveaxis(rgb[:, :, ::-1], 2, 0).astype(np.float64)


def to_pixels(x, size):
    """The image `x` (3, H, W) BGR as (height, width, 3) uint8 RGB, at `size` = (width, height)."""
    return resized(np.moveaxis(np.clip(x, 0, 255).astype(np.uint8)[::-1], 0, 2), size, Image.BICUBIC)


def recolored(rgb, content):
    """The luminance of `rgb` with the colours of `content`, both (H, W, 3) uint8 [GBHS16 section 3].

    The colour space is YIQ of sRGB values. I and Q, kept here, are differences of colours, to which a grey adds
    nothing: the content, lighter or darker by the difference in Y, has the new Y and its own I and Q.
    """
    Y = [0.299, 0.587, 0.114]                                           # weights of red, green, blue
    shift = rgb @ Y - content @ Y                                       # (H, W)
    return np.uint8(np.clip(np.rint(content + shift[:, :, None]), 0, 255))


# ---- network ---------------------------------------------------------------------------------------------------------

BLOCKS = {'vgg19': (2, 2, 4, 4, 4), 'vgg16': (2, 2, 3, 3, 3)}         # convolutions between poolings, [SZ14] table 1
WIDTHS = (64, 128, 256, 512, 512)                                     # filters of each convolution of a block

MEAN = (103.939, 116.779, 123.680)                                    # of blue, green, red over ImageNet


def stride(layer):
    """Stride of a layer, in pixels of the picture: 1, 2, 4, 8 or 16."""
    return 2 ** (int(layer[0]) - 1)


def filters(layer):
    """Number of filters of a layer, which is that of its features' channels."""
    return WIDTHS[int(layer[0]) - 1]


def layer_names(kind, needed=None):
    """``'1_1', '1_2', '2_1', ...`` of ``'vgg19'`` or ``'vgg16'``, all or only as deep as the deepest of `needed`."""
    names = [f'{block}_{k}' for block, count in enumerate(BLOCKS[kind], 1) for k in range(1, count + 1)]
    return names[:max(map(names.index, needed)) + 1] if needed else names


def convolution(x, W, **_):
    """'Same' 3x3 convolution for Lasagne 0.1, whose own one would copy the input to pad it."""
    return T.nnet.conv2d(x, W, border_mode=1, filter_flip=False)


def build_network(weights, names, fast=False):
    """The convolutions of VGG, only as deep as the deepest of `names`.

    Each is 3x3 with padding 1 and rectified. Pooling between the blocks is the average of 2x2, which the papers prefer
    to VGG's maximum [LW16].

    Parameters
    ----------
    weights : Weights
    names : collection of str
    fast : bool
        Use the engine's convolution, on the CPU only; a GPU has its own.

    Returns
    -------
    dict of str to lasagne.layers.Layer
        Takes (1, 3, H, W) BGR less `MEAN`, gives (1, C, H', W').
    """
    network, layer = {}, lasagne.layers.InputLayer((1, 3, None, None))
    for name in layer_names(weights.kind, names):
        (W, b), pool = weights.layers[name], name.endswith('_1') and name != '1_1'
        if fast or on_gpu():
            convolve = fast_convolution if fast else gpu_convolution
            unused = theano.shared(np.zeros((1, 1, 1, 1), np.float32))
            how = dict(W=unused, b=None, nonlinearity=None, convolution=convolve(W, b, pool))
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
    """Keys [f / |f|, sqrt(w) m / |m|] of the pixels; the dot product of two keys is cos(f, g) + w cos(m, n) [C16].

    Parameters
    ----------
    f : symbolic (H, W, C)
    m : symbolic (H, W, K) or None
    w : symbolic scalar
        Semantic weight.
    """
    return unit(f) if m is None else T.concatenate([unit(f), T.sqrt(w) * unit(m)], axis=2)


def patch_scale(f):
    """Factors that normalise whole 3x3 patches P_i of f (H, W, C): 3 / |P_i|, or 0 if P_i is 0 [LW16 eq. 3]."""
    (H, W), squares = (f.shape[0], f.shape[1]), T.sum(f ** 2, axis=2)
    total = sum(squares[y:H - 2 + y, x:W - 2 + x] for y in range(3) for x in range(3)).flatten()
    return T.switch(total > 0, 3 / T.sqrt(total), 0)


def match(u, v, variety=None, history=None, scale=None):
    """For every 3x3 patch i of the image the style patch j with the largest score [LW16 eq. 3, C16 eq. 2].

        S(i, j) = 1/9 a(i) b(j) sum_d u(i + d) . v(j + d),        less variety * h(j)

    Either u and v have length one at every pixel [C16] and there are no a and b; or they are raw, and a and b are their
    `patch_scale`, for the cosine of whole patches [LW16]. The sum over the offsets d is one over nine diagonal shifts
    of the products of single pixels: a ninth of the work, and no patch is ever stored.

    Parameters
    ----------
    u : symbolic (H, W, D)
    v : symbolic (h, w, D)
    variety : symbolic scalar
    history : symbolic ((h - 2) (w - 2),)
        h(j), the largest score of j with any i in the evaluation before.
    scale : symbolic ((H - 2) (W - 2),) and ((h - 2) (w - 2),)
        a(i) and b(j); where b(j) is 0, patch j is never matched.

    Returns
    -------
    matches : symbolic int64 ((H - 2) (W - 2),)
        Indices j; of equal scores the first.
    history : symbolic ((h - 2) (w - 2),), the new h, or None
    """
    (H, W, D), (h, w) = (u.shape[k] for k in range(3)), (v.shape[0], v.shape[1])
    products = T.dot(u.reshape((H * W, D)), v.reshape((h * w, D)).T).reshape((H, W, h, w))
    S = sum(products[y:H - 2 + y, x:W - 2 + x, y:h - 2 + y, x:w - 2 + x] for y in range(3) for x in range(3)) / 9
    S = S.reshape(((H - 2) * (W - 2), (h - 2) * (w - 2)))                                   # (i, j)
    if scale:
        S *= scale[0][:, None] * scale[1]
    best = None if history is None else T.max(S, axis=0)
    if history is not None:
        S -= variety * history
    if scale:
        S = T.switch(scale[1] > 0, S, np.float32(-np.inf))
    return T.argmax(S, axis=1), best


def style_copies(picture, rotations, scales, resample):
    """The style picture, and its copies turned by steps of 7.5 degrees and rescaled by steps of 5 % each way [LW16].

    A turned picture is cropped to the largest centred part of the same proportions without empty corners.

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
    return [np.stack([Image.fromarray(plane).transform(size, Image.AFFINE, back, resample)
                      for plane in np.float32(picture)]).clip(0, 255)
            for size, back in copy_transforms(*picture.shape[1:], rotations, scales)]


def copy_transforms(h, w, rotations, scales):
    """Yield size (width, height) and affine transform, copy -> picture, of each of `style_copies` of h x w pixels."""
    for turn in sorted(range(-rotations, rotations + 1), key=abs):
        for step in sorted(range(-scales, scales + 1), key=abs):
            c, s, scale = math.cos(math.radians(7.5 * turn)), math.sin(math.radians(7.5 * turn)), 1 + 0.05 * step
            part = min(w / (w * c + h * abs(s)), h / (w * abs(s) + h * c))
            W, H, c, s = max(1, int(w * part * scale)), max(1, int(h * part * scale)), c / scale, s / scale
            back = c, -s, (w - c * W + s * H) / 2, s, c, (h - s * W - c * H) / 2
            yield (W, H), back


def sheet(copies):
    """Stack features of several pictures below each other, and mark the 3x3 patches that lie within one picture.

    Parameters
    ----------
    copies : list of (h_k, w_k, C) arrays

    Returns
    -------
    g : (sum of h_k, largest w_k, C) array
        Zero to the right of narrower pictures.
    whole : ((h - 2) (w - 2),) float32 array
        1 for a patch within one picture, 0 for one across a seam or in the margin.
    """
    w = max(g.shape[1] for g in copies)
    padded = [np.pad(g, [(0, 0), (0, w - g.shape[1]), (0, 0)]) for g in copies]
    whole = [np.outer(np.arange(len(g)) < len(g) - 2, np.arange(w) < g.shape[1] - 2) for g in copies]
    return np.concatenate(padded, dtype=np.float32), np.float32(np.concatenate(whole)[:-2, :-2].ravel())


# ---- losses ----------------------------------------------------------------------------------------------------------

def content_loss(f, g):
    """mean (f - g)^2, both (H, W, C) [C16 eq. 3]."""
    return T.mean((f - g) ** 2)


def style_loss(f, g, matches):
    """The mean over patches, offsets and channels of (patch of f - matched patch of g)^2 [LW16 eq. 2].

    The squares are not expanded: with rounding the cheaper form could be negative, or not 0 where f = g. The gradient
    at a pixel, 2 sum (f - g) over the up to nine patches that cover it, is summed in one array; Theano would take nine.

    Parameters
    ----------
    f : symbolic (H, W, C)
    g : symbolic (h, w, C)
    matches : symbolic int ((H - 2) (W - 2),)
    """
    (H, W, C), (h, w) = (f.shape[k] for k in range(3)), (g.shape[0], g.shape[1])
    corner = matches + 2 * (matches // (w - 2))                         # style pixel at the top left of each match
    style, slope, total = g.reshape((h * w, C)), T.zeros((H, W, C)), 0.
    for y in range(3):
        for x in range(3):
            matched = style[y * w + x:][corner].reshape((H - 2, W - 2, C))
            difference = theano.gradient.disconnected_grad(f[y:H - 2 + y, x:W - 2 + x] - matched)
            slope = T.inc_subtensor(slope[y:H - 2 + y, x:W - 2 + x], difference)
            total += T.sum(difference ** 2)
    total += T.sum(2 * slope * (f - theano.gradient.disconnected_grad(f)))              # 0, with the gradient 2 slope
    return total / T.cast(9 * (H - 2) * (W - 2) * C, 'float32')


def gram(f):
    """G = F F^T / N of the features f (H, W, C), with F their C x N matrix: (C, C)."""
    F = f.reshape((f.shape[0] * f.shape[1], f.shape[2])).T
    return T.dot(F, F.T) / T.cast(F.shape[1], 'float32')


def gram_loss(f, A):
    """E = 1 / (4 C^2) sum (G - A)^2 of f (H, W, C), with A the `gram` of the style picture [GEB16 eq. 4].

    The paper has G = F F^T and 1 / (4 N^2 C^2); here each G is divided by its own N, so that sizes may differ. The
    paper also scales the network's filters to a mean activation of one, and the code its authors released later divides
    by another C^2. Here VGG is unscaled, so that conv4_1 weighs most among the paper's five layers.
    """
    return T.mean((gram(f) - A) ** 2) / 4


def smoothness_loss(x, power=1.25):
    """mean (dx^2 + dy^2)^power over neighbouring pixels of the image (3, H, W): 1.25 [MV15 eq. 4] or 1 [LW16]."""
    dy, dx = x[:, 1:, :-1] - x[:, :-1, :-1], x[:, :-1, 1:] - x[:, :-1, :-1]                 # (3, H - 1, W - 1)
    return T.mean((dx ** 2 + dy ** 2) ** np.float32(power))


# ---- objective -------------------------------------------------------------------------------------------------------

# Factors on the features of each layer in the losses, whose default weights are for VGG19: they bring the loss terms of
# Oxford's VGG16 to the size of VGG19's, on average over eight pairs of pictures (samples/measure_balance.py).
BALANCE = {'vgg19': 16 * (1,),
           'vgg16': (0.94, 0.87, 0.74, 0.63, 0.53, 0.51, 0.80, 2.59, 4.00, 5.98, 2.24, 2.29, 5.32)}


def balance(kind):
    """`BALANCE` of ``'vgg19'`` or ``'vgg16'``, {layer: factor}."""
    return dict(zip(layer_names(kind), BALANCE[kind]))


# Evaluation of an image: weighted loss terms, content and style by layer; gradient (3, H, W) of their sum.
Evaluation = namedtuple('Evaluation', 'total content style smooth gradient seconds matching_seconds')


def shared(dimensions, kind='float32'):
    """A Theano shared variable with an empty array."""
    return theano.shared(np.zeros((0,) * dimensions, kind))


class PatchTerm:
    """The style loss of a layer by patches, matched by features and maps that are normalised at every pixel [C16].

    Parameters
    ----------
    options : argparse.Namespace
        Rotations, scales, variety, matching, random seed.
    numbers : dict of str to shared variable
        ``'semantic_weight'`` and ``'variety'``.
    semantic : bool
        Whether there are maps.
    transparent : bool
        Whether some of the style picture is fully transparent.
    slices : int
        Batches of a GPU's matching.
    fast : bool
        Use the engine.
    """

    degree = 2                                                          # of the loss as a polynomial in the features
    power = 1.25                                                        # exponent in `smoothness_loss`
    patched = reads_maps = True
    arrays = 2                                                          # kept, as large as the style's features

    def __init__(self, options, numbers, semantic, transparent, slices, fast):
        self.numbers, self.matches = numbers, shared(1, 'int64')        # j of each i
        self.match_patches = (functools.partial(fast_match, start=self.matches) if fast else
                              functools.partial(gpu_match, slices) if on_gpu() else match)
        self.style_loss = fast_style_loss if fast else style_loss
        self.features, self.keys = shared(3), shared(3)                 # g, (h, w, C); v, (h, w, C + K)
        self.maps = shared(3) if semantic else None                     # m, (H, W, K)
        partial = options.rotations or options.scales or transparent
        self.scale = shared(1) if partial else None                     # b(j)
        self.history = shared(1) if options.variety else None           # h(j)
        self.near = NearSearch(self.matches, options) if fast and options.matching == 'near' else None
        self.remembered = {'matches': self.matches} | ({'history': self.history} if self.history else {}) | (
            {'draws': self.near.draws} if self.near else {})

    @staticmethod
    def preparation(numbers, semantic):
        """The compiled function from the style's features and maps to keys."""
        g, n = T.tensor3('g'), T.tensor3('n') if semantic else None
        return theano.function([g, n] if semantic else [g], matching_key(g, n, numbers['semantic_weight']))

    def key(self, f):
        """u of the image's features f (H, W, C)."""
        return matching_key(f, self.maps, self.numbers['semantic_weight'])

    def image_scale(self, u):
        """a(i), of length ((H - 2) (W - 2))."""
        return T.ones_like(patch_scale(u))

    def match(self, f):
        """Symbolic matches of the image's features f (H, W, C), and updates of matches and history."""
        u = theano.gradient.disconnected_grad(self.key(f))
        scale = self.scale and (self.image_scale(u), self.scale)
        if self.near:
            return self.near.match(u, self.keys, scale)
        matches, history = self.match_patches(u, self.keys, self.numbers['variety'], self.history, scale)
        return matches, [(self.matches, matches)] + ([(self.history, history)] if self.history else [])

    def loss(self, f, matches):
        """Symbolic loss of the image's features f (H, W, C)."""
        return self.style_loss(f, self.features, matches)

    def set(self, prepare, g, whole, seen, m, n):
        """Set the style and the maps of a phase.

        Parameters
        ----------
        prepare : callable
            As `preparation` gives it.
        g : (h, w, C) array
            Features of the style picture and its copies, as `sheet` lays them out.
        whole : ((h - 2) (w - 2),) array
            1 for patches within one picture, else 0.
        seen : (h, w) bool array or None
            False where the style is fully transparent.
        m, n : (H, W, K) and (h, w, K) arrays or None
            Maps of the image and of the style.
        """
        if seen is not None:
            whole = whole * np.lib.stride_tricks.sliding_window_view(seen, (3, 3)).any(axis=(2, 3)).ravel()
        self.features.set_value(g)
        if self.maps:
            self.maps.set_value(m)
        self.set_keys(prepare, g, whole, n)
        if self.history:
            self.history.set_value(np.zeros_like(whole))

    def set_keys(self, prepare, g, whole, n):
        """v and b(j) from features and maps of the style."""
        self.keys.set_value(prepare(g) if n is None else prepare(g, n))
        if self.scale:
            self.scale.set_value(whole)

    def describe(self):
        """Number and shape of the style patches, and their memory, in words."""
        shapes = {id(array): array.get_value(borrow=True, return_internal_type=True).shape
                  for array in (self.features, self.keys)}
        height, width, channels = shapes[id(self.keys)]
        count = (height - 2) * (width - 2)
        if self.scale:
            count = np.count_nonzero(self.scale.get_value(borrow=True))
        size = 4 * sum(map(math.prod, shapes.values()))
        return f'({count}, {channels}, 3, 3) patches in {size // 1000:,}kb'


class WholePatchTerm(PatchTerm):
    """The style loss of a layer by patches that are normalised as a whole, matched by features alone [LW16]."""

    power, reads_maps, arrays = 1, False, 1

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.keys, self.scale = self.features, shared(1)

    @staticmethod
    def preparation(numbers, semantic):
        """The compiled function from the style's features to b(j)."""
        g = T.tensor3('g')
        return theano.function([g], patch_scale(g))

    def key(self, f):
        return f

    def image_scale(self, u):
        return patch_scale(u)

    def set_keys(self, prepare, g, whole, n):
        self.scale.set_value(whole * prepare(g))


class GramTerm:
    """The style loss of a layer by its Gram matrix, over the number of layers [GEB16]; used as `PatchTerm` is."""

    degree, power, patched, reads_maps, arrays, matches, near, remembered = 4, 1.25, False, False, 0, None, None, {}

    def __init__(self, options, numbers, semantic, transparent, slices, fast):
        self.gram, self.layers = shared(2), len(options.style_layers)   # A, (C, C)

    @staticmethod
    def preparation(numbers, semantic):
        """The compiled function from the style's features to A."""
        g = T.tensor3('g')
        return theano.function([g], gram(g))

    def match(self, f):
        return None, []

    def loss(self, f, matches):
        return gram_loss(f, self.gram) / np.float32(self.layers)

    def set(self, prepare, g, whole, seen, m, n):
        self.gram.set_value(prepare(g if seen is None else g[seen][None]))

    def describe(self):
        """Shape of the matrix, and its memory, in words."""
        A = self.gram.get_value(borrow=True)
        return f'{A.shape} Gram matrix in {A.nbytes // 1000:,}kb'


def style_term(options):
    """The class of the style terms of ``options.method``."""
    return globals()[METHODS[options.method][0]]


class Objective:
    """The total loss of an image and its gradient; compiled once, its data set for each phase.

    Parameters
    ----------
    weights : Weights
    options : argparse.Namespace
        Method, layers, weights of the losses and of the maps, variety, cache, matching, line search.
    content, semantic : bool
        Whether there is a content picture, and whether there are maps.
    fast : bool
        Use the engine, on the CPU only; a GPU has its own. Else the plain formulas.
    transparent : bool
        Whether some of the style picture is fully transparent.
    slices : int
        Batches of a GPU's matching.
    """

    def __init__(self, weights, options, content, semantic, fast=False, transparent=False, slices=1):
        self.options, self.fast, self.semantic, self.term = options, fast, semantic, style_term(options)
        self.balance = balance(weights.kind)
        content_layers = options.content_layers if content and options.content_weight else []
        style_layers = options.style_layers if options.style_weight else []
        self.layers = list(dict.fromkeys(content_layers + style_layers)) or ['1_1']

        # Shared variables, not constants: the compiled code is the same for all values.
        self.numbers = {name: theano.shared(np.float32(0)) for name in ('smoothness', 'semantic_weight', 'variety')}
        self.weights = {(kind, layer): theano.shared(np.float32(0)) for kind, layers in
                        (('content', content_layers), ('style', style_layers)) for layer in layers}
        self.target = {layer: shared(3) for layer in content_layers}                        # f of content, (H, W, C)
        self.style = {layer: self.term(options, self.numbers, semantic, transparent, slices, fast)
                      for layer in style_layers}
        self.prepare = self.term.preparation(self.numbers, semantic)
        self.remembered = {f'{name} {layer}': variable for layer, term in self.style.items()
                           for name, variable in term.remembered.items()}

        x = T.tensor3('x')
        f = features(build_network(weights, self.layers, fast), x, self.layers)
        self.features = theano.function([x], list(f.values()))
        found = {layer: term.match(f[layer]) for layer, term in self.style.items()}
        self.matching = self.compiled(x, f, {layer: matches for layer, (matches, _) in found.items()},
                                      [update for _, updates in found.values() for update in updates])
        self.cached = self.matching
        if options.cache or options.line_search == 'held':
            self.cached = self.compiled(x, f, {layer: term.matches for layer, term in self.style.items()}, [])

    def compiled(self, x, f, matches, updates):
        """The function x -> array of loss terms, and the gradient of their sum, the matches held fixed."""
        terms = [self.numbers['smoothness'] * smoothness_loss(x, self.term.power)]
        terms += [self.weights['style', layer] * term.loss(f[layer], matches[layer])
                  for layer, term in self.style.items()]
        terms += [self.weights['content', layer] * content_loss(f[layer], target)
                  for layer, target in self.target.items()]
        profile = theano.compile.ProfileStats(atexit_print=False, flag_time_thunks=True) if self.fast else False
        mode = theano.Mode(theano.gof.vm.VM_Linker(use_cloop=self.fast, schedule=depth_first))  # C ignores a schedule
        outputs = [T.concatenate([term.dimshuffle('x') for term in terms]), theano.grad(sum(terms), x)]
        return theano.function([x], outputs, updates=updates, profile=profile, mode=mode)

    def set_phase(self, content, style, content_map, style_map, size, style_alpha=None, near=False):
        """Set weights, targets and style terms, which are constant during a phase.

        Parameters
        ----------
        content, style : (3, H, W) and (3, h, w) arrays
            BGR, 0..255; `content` may be None.
        content_map, style_map : arrays (H', W', K) of any size, or None
        size : (width, height) of the image
        style_alpha : array (h', w', 1) of any size, or None
            Pixels of 0 are left out: patches that lie wholly in them are not matched, and Gram matrices omit them.
        near : bool
            With --matching=near: whether there is a phase before, whose matches are the first guess.
        """
        for name, variable in self.numbers.items():
            variable.set_value(np.float32(getattr(self.options, name)))
        for (kind, layer), variable in self.weights.items():
            degree = self.term.degree if kind == 'style' else 2
            variable.set_value(np.float32(getattr(self.options, f'{kind}_weight') * self.balance[layer] ** degree))
        if self.target:
            f = dict(zip(self.layers, self.features(np.float32(content))))
            for layer, target in self.target.items():
                target.set_value(f[layer])
        self.set_style(style, content_map, style_map, size, style_alpha, near)
        self.fresh, self.size = True, size

    def set_style(self, style, content_map, style_map, size, style_alpha, near):
        """The part of `set_phase` for the style terms."""
        steps = self.options.rotations, self.options.scales
        pictures = style_copies(style, *steps, Image.BICUBIC)
        maps, alphas = [[] if channels is None else style_copies(np.moveaxis(channels, 2, 0), *steps, Image.BILINEAR)
                        for channels in (style_map if self.semantic else None, style_alpha)]

        def pooled(copies, layer):                                      # (h, w, K), or None where there are none
            return sheet([pooled_map(np.moveaxis(copy, 0, 2), picture.shape[:0:-1], layer)
                          for copy, picture in zip(copies, pictures)])[0] if copies else None
        copies = [{name: g for name, g in zip(self.layers, self.features(picture)) if name in self.style}
                  for picture in pictures]
        for layer, term in self.style.items():
            if term.near:
                term.near.begin(size, layer, [copy[layer].shape[:2] for copy in copies], near)
            g, whole = sheet([copy.pop(layer) for copy in copies])
            seen = pooled(alphas, layer)
            m = pooled_map(content_map, size, layer) if self.semantic else None
            term.set(self.prepare, g, whole, None if seen is None else seen[:, :, 0] > 0, m, pooled(maps, layer))

    def __call__(self, x, held=False):
        """The `Evaluation` of the image `x` (3, H, W), with the matches as they are if they are to be `held`.

        Raises
        ------
        FloatingPointError
            The loss or its gradient is not finite.
        """
        start, matched, x = time.perf_counter(), self.matching_seconds(), np.float32(x)
        if self.fresh and self.options.variety and not self.options.cache:
            self.matching(x)                                            # for the first h(j)
        terms, gradient = (self.cached if held or self.options.cache and not self.fresh else self.matching)(x)
        if not np.isfinite(terms).all() or not np.isfinite(gradient).all():
            raise FloatingPointError('the loss or its gradient is not finite')
        self.fresh = False
        smooth, *losses = terms = list(map(float, terms))
        content, style = dict(zip(self.target, losses[len(self.style):])), dict(zip(self.style, losses))
        return Evaluation(sum(terms), content, style, smooth, np.float64(gradient), time.perf_counter() - start,
                          self.matching_seconds() - matched if self.fast else None)

    def matching_seconds(self):
        """Time that the engine spent in matching so far."""
        return self.fast and sum(seconds for node, seconds in self.matching.profile.apply_time.items()
                                 if isinstance(node.op, (Matching, NearMatching)))

    @property
    def pure(self):
        """Whether a phase's losses depend on the image alone, not on a history nor on the matches before."""
        return not self.options.variety and not any(term.near and term.near.sweeping() for term in self.style.values())

    def state(self):
        """Matches and histories of the last evaluation, as arrays by name; those of a GPU stay there."""
        return {name: variable.get_value(return_internal_type=True) for name, variable in self.remembered.items()} | {
            'fresh': np.array(self.fresh)}                              # whether the next matches are the phase's first

    def restore(self, state):
        """Restore a `state` of this phase; UserError if it is none, as from a checkpoint that was tampered with."""
        draws = {name: variable.get_value() for name, variable in self.remembered.items() if name.startswith('draws ')}
        state = draws | {name: array for name, array in state.items()   # a GPU has none, and may have been before
                         if name in draws or not name.startswith('draws ')}
        if state.keys() != {*self.remembered, 'fresh'} or (state['fresh'].dtype, state['fresh'].shape) != (bool, ()):
            raise foreign('matches')
        fresh = bool(state['fresh'])
        for name, variable in self.remembered.items():
            kind, layer = name.split()
            values, before = (np.asarray(array) for array in (state[name], variable.get_value(borrow=True)))
            height, width, _ = self.style[layer].keys.get_value(borrow=True, return_internal_type=True).shape
            if kind == 'matches':
                count = math.prod(side // stride(layer) - 2 for side in self.size)
                sound = values.size == count and 0 <= values.min() and values.max() < (height - 2) * (width - 2)
                # Those of a fresh state are read by sweeps only: they may be of the phase before.
                if not sound and fresh and not np.ravel(state.get(f'draws {layer}'))[:1].any():
                    values = state[name] = np.zeros(count, values.dtype)
                    sound = True
            else:
                sound = values.shape == before.shape and np.isfinite(values).all()
                sound &= kind != 'draws' or 0 <= values.min() and values[0] <= FIRST_SWEEPS
            if not sound or (values.dtype, values.ndim) != (before.dtype, 1):
                raise foreign('matches')
        self.put(state)

    def put(self, state):
        """Set a `state` of this phase that is known to be one."""
        self.fresh = bool(state['fresh'])
        for name, variable in self.remembered.items():
            variable.set_value(state[name])


# ---- optimisation ----------------------------------------------------------------------------------------------------

class Minimiser:
    """L-BFGS-B with pixels bounded to 0..255 [BLNZ95]: `ask` for an image, `tell` its loss and gradient, and so on.

    The routine is that of `scipy.optimize.fmin_l_bfgs_b`. Here its variables are attributes, saved in checkpoints, so
    that a resumed run takes exactly the steps of one that was not interrupted.

    Parameters
    ----------
    image : (3, H, W) array
        Where to start; later the last image that a line search accepted.
    """

    CORRECTIONS = 5                                                     # pairs of steps and gradient changes in memory
    NEW_X, EVALUATE = 1, 3                                              # values of `task[0]`
    FRESH = 2                                                           # evaluations of a line search not `held`
    TRIAL, BEFORE, SLOPE = 35, 1, 10    # places: a line search's evaluations in `integers`; loss and slope in `doubles`

    def __init__(self, image):
        self.image, self.limit, self.recovered, self.holds = np.float64(image), math.inf, False, False
        self.start()

    def start(self):
        """Start from `image`, with an empty memory."""
        n, m = self.image.size, self.CORRECTIONS
        self.x, self.loss, self.gradient = self.image.flatten(), 0., np.zeros(n)
        self.work, self.indices = np.zeros((2 * m + 5) * n + (11 * m + 8) * m), np.zeros(3 * n, 'i4')
        self.task, self.line_task, self.logicals, self.integers = (np.zeros(count, 'i4') for count in (2, 2, 4, 44))
        self.doubles = np.zeros(29)

    def advance(self):
        """Run the routine until it needs a loss; if a line search fails, restart from `image`."""
        n = self.x.size
        bounds = np.zeros(n), np.full(n, 255.), np.full(n, 2, 'i4')     # 2: two bounds
        while True:
            # Tolerances of 0: it never converges; 20: most evaluations of a line search.
            lbfgsb.setulb(self.CORRECTIONS, self.x, *bounds, self.loss, self.gradient, 0., 0., self.work, self.indices,
                          self.task, self.logicals, self.integers, self.doubles, 20, self.line_task)
            if self.task[0] == self.EVALUATE:
                return
            if self.task[0] == self.NEW_X:
                self.image = self.x.reshape(self.image.shape).copy()
                if self.holds and self.integers[self.TRIAL] > self.FRESH:
                    return
            else:
                self.start()

    def ask(self):
        """The image (3, H, W) to evaluate, a view of `x`, which `tell` changes."""
        if not self.task[0]:                                            # just started
            self.advance()
        return self.x.reshape(self.image.shape)

    def tell(self, loss, gradient):
        """Continue with the loss of that image and its gradient (3, H, W).

        Raises
        ------
        FloatingPointError
            The loss is not a number, or more than a million times the least so far.
        """
        if not loss <= self.limit:
            raise FloatingPointError('the loss blew up')
        self.limit = min(self.limit, 1e6 * max(1, loss))
        self.loss, self.gradient = loss, gradient.ravel()
        if self.task[0] == self.NEW_X:
            self.renew()
        self.advance()

    def renew(self):
        """Replace loss and slope of the image that is accepted, which the routine has with the matches held."""
        at = self.integers[12]                                          # the line search's direction
        self.doubles[self.SLOPE] = self.gradient @ self.work[at:at + self.x.size]
        # New matches may raise the loss above that before, and then the routine would end and lose its memory.
        self.doubles[self.BEFORE] = max(self.doubles[self.BEFORE], np.nextafter(self.loss, math.inf))

    def held(self):
        """Whether the matches of `image`, where this line search began, are to be held for the next evaluation."""
        return self.holds and self.task[0] == self.EVALUATE and self.integers[self.TRIAL] > self.FRESH

    def recover(self, error):
        """Restart from `image` after the first `FloatingPointError`; raise the second."""
        if self.recovered:
            raise error
        self.recovered = True
        self.start()

    def restart(self):
        """A checksum of all that determines what follows, where it has just started or restarted; else None."""
        if tuple(self.task) in ((0, 0), (3, 301)):
            return hashlib.sha256(self.image.tobytes() + repr((self.limit, self.recovered)).encode()).hexdigest()

    def state(self):
        """All attributes as arrays by name; not copied."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    def restore(self, state):
        """Restore a `state` of as many pixels.

        Raises
        ------
        ValueError
            It is not one that a run leaves: `setulb` would trust its indices, and write beyond its arrays.
        """
        self.start()
        for name, value in self.state().items():
            found = state[name]
            if (found.dtype, found.shape) != (value.dtype, value.shape):
                raise ValueError(f'its {name} has another shape or type')
            if not (np.isfinite(found).all() or name == 'limit' and found > 0):
                raise ValueError(f'its {name} is not finite')
        task, numbers, n, m = tuple(state['task']), state['integers'], self.x.size, self.CORRECTIONS
        sizes = m * n, m * m, 4 * m * m                                 # and where its arrays begin in `work`
        places = [*sizes, *itertools.accumulate([0, *sizes[:1] * 2, *sizes[1:2] * 3, *sizes[2:] * 2, *[n] * 5])]
        (head, columns, tail, _, updates), free = numbers[26:31], numbers[37]
        free_first, where, entering = state['indices'].reshape(3, n)
        started = task != (0, 0)
        known = (0, 0), (3, 301), (3, 302), *[(1, 0)] * bool(state['holds'])
        if not (task in known and (numbers[:16] == np.multiply(places, started)).all() and
                (state['logicals'][1:3] == started).all() and 0 <= head < m and 0 <= tail < m and
                0 <= columns == min(updates, m) and 0 <= free <= n and -3 <= where.min() and where.max() <= 3 and
                all(0 <= indices.min() and indices.max() < n for indices in (free_first, entering)) and
                all(abs(state[name] - 127.5).max() <= 128 for name in ('x', 'image')) and state['limit'] >= 1e6):
            raise ValueError('its optimiser is in a state that no run leaves')
        for name in vars(self):
            setattr(self, name, state[name] if np.ndim(state[name]) else state[name].item())


def first_image(inputs, options, size, random_seed):
    """The image from which the first phase starts, (3, H, W)."""
    if options.seed == 'noise':
        return np.random.default_rng(random_seed).uniform(*options.seed_range, (3, *size[::-1]))
    if options.seed == 'content':
        return to_planes(resized(inputs.content, size, Image.LANCZOS))
    return to_planes(resized(inputs.seed, size, Image.BICUBIC))


def enlarged(x, size):
    """The image `x` (3, H, W), bicubically enlarged in floating point for the next phase, within 0..255."""
    return np.clip(np.moveaxis(resized(np.moveaxis(np.float32(x), 0, 2), size, Image.BICUBIC), 2, 0), 0, 255)


def paint(objective, inputs, options, at, journal, signals):
    """Minimise the loss phase by phase, from a small scale to the full one.

    Parameters
    ----------
    objective : Objective
    inputs : Inputs
    options : argparse.Namespace
    at : Checkpoint
        Where to begin; updated after each evaluation.
    journal : Journal
        Records every phase and evaluation.
    signals : Signals
        May interrupt computations only.
    """
    for phase in range(at.phase, options.phases):
        size = phase_size(inputs.size, phase, options.phases)
        style = resized(inputs.style, phase_size(inputs.style.shape[1::-1], phase, options.phases), Image.LANCZOS)
        return_freed_memory()
        with signals.heard():
            objective.set_phase(
                None if inputs.content is None else to_planes(resized(inputs.content, size, Image.LANCZOS)),
                to_planes(style), inputs.content_map, inputs.style_map, size, inputs.style_alpha, phase > 0)
        return_freed_memory(math.prod(size))
        if at.minimiser and at.phase == phase:                          # a resumed run
            objective.restore(at.memory)
        elif at.minimiser:
            at.begin(phase, enlarged(at.minimiser.image, size), objective)
        else:
            at.begin(phase, first_image(inputs, options, size, at.header['random_seed']), objective)
        at.minimiser.holds = options.line_search == 'held'
        journal.begin(at, size, objective)
        while at.evaluation < options.iterations:
            journal.keep(at)
            if options.stop_when_converged and objective.pure:          # the image alone determines a loss
                at.skip(options.iterations, journal)
            try:
                evaluate(objective, at, journal, signals)
            except FloatingPointError as error:
                at.minimiser.recover(error)
                at.cycle = 0                                            # it does not repeat itself for ever
                journal.warn(f'{one_line(error)}: going on from the last good image')
        journal.save(at, last=phase == options.phases - 1)


def evaluate(objective, at, journal, signals):
    """One evaluation and optimiser step; after a signal or an error in the evaluation the objective is restored.

    Raises
    ------
    FloatingPointError
        The loss or its gradient is not finite, or the loss blew up.
    """
    x = at.minimiser.ask()
    try:
        with signals.heard():
            held = at.minimiser.held()
            evaluation = objective.held(x, at.minimiser.image) if held else objective(x)
        largest = float(np.abs(evaluation.gradient).max())
        at.count(largest)
        journal.record(at, x, evaluation, largest)
        at.minimiser.tell(evaluation.total, evaluation.gradient)
    except BaseException as error:                                      # matches may have been updated
        if isinstance(error, FloatingPointError):
            at.memory['fresh'] = np.array(True)                         # the restart needs new matches
        objective.restore(at.memory)
        raise
    at.memory = objective.state()


# ---- run -------------------------------------------------------------------------------------------------------------

def run(arguments):
    """The program, from options to result; returns the exit code."""
    options = parse_options(arguments)
    prepare_process()
    import_pillow()
    say(bold('Neural Doodle') + ' for semantic style transfer.')
    places = place_output(options)
    check_files(options, places)
    inputs, remarks = read_pictures(options)
    with contextlib.ExitStack() as locks:
        for path in () if options.check else filter(None, (places.copy or places.output, options.log)):
            remarks += locks.enter_context(locked(path))
        return run_alone(options, places, inputs, remarks)


def run_alone(options, places, inputs, remarks):
    """`run` from the maps on, while no other run has this output or this log."""
    network, device = None, None
    missing = import_automaps().missing_maps(options) if options.auto_maps else []
    if missing and options.check:
        remarks += [f'`{path}` is not there: it will be painted.' for path in missing]
    else:
        if missing:
            network, device = paint_maps(inputs, options)
        inputs, lines = read_maps(inputs, options)
        remarks += lines
    if options.check:
        at, lines = Checkpoint({}), ['--resume looks at the checkpoint once the maps are there.']
        if not (options.resume and missing):
            at, lines = find_checkpoint(places.checkpoint, provenance(inputs, UNKNOWN, options), options.resume)
        for line in remarks + lines + plan(inputs, options, at):
            say(f'  - {line}')
    if options.device == 'cpu' and not device:                          # else `paint_maps` did
        check_memory(inputs, options)
    if options.check:
        return 0
    if options.auto_maps and not missing:
        remarks.append('Both maps are there: nothing to paint.')
    weights, lines = network or find_weights(options)
    remarks += lines
    at, lines = find_checkpoint(places.checkpoint, provenance(inputs, weights, options), options.resume)
    device = device or open_device(options, inputs)
    options.random_seed = at.header['random_seed']
    remarks += matching_remarks(inputs, options, device, at)
    for line in remarks + lines + [f'Random seed {at.header["random_seed"]}.']:
        say(f'  - {line}')
    say('  - Compiling ..')
    at.compute_with(device=device, slices=choose_slices(inputs, options, device), threads=thread_count())
    objective = Objective(weights, options, inputs.content is not None, inputs.style_map is not None, device == 'cpu',
                          inputs.style_alpha is not None, at.header['slices'])
    objective = Remembered(objective, options, memory_needed(inputs.size, inputs.style.shape[1::-1], options))
    del weights, network                                                # free memory: the objective has copies
    return paint_and_save(objective, inputs, options, at, Journal(options, places, inputs, at))


# ---- weights ---------------------------------------------------------------------------------------------------------

# Fingerprint, which tells channel order and filter flip: the first row of conv1_1, as cross-correlation on BGR.
FIRST = {'vgg19': (0.341195, 0.339992, -0.0448442), 'vgg16': (0.4294706, 0.3734670, -0.0613601)}

# VGG19 as Keras publishes it, identified by size and checksum, since addresses may vanish.
KERAS = {'file': 'vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5', 'bytes': 80_134_624,
         'md5': '253f8cb515780f3b799900260a226db6'}
ADDRESSES = ('https://storage.googleapis.com/tensorflow/keras-applications/vgg19/',
             'https://github.com/fchollet/deep-learning-models/releases/download/v0.1/')
ORIGINAL = 'vgg19_conv.pkl.bz2'                                       # the original program's VGG19
PATIENCE = 20                 # seconds without data, then the next address: 16 kB of TLS come at once, or not at all
SLOWEST, PERIOD = 1000, 60                                           # bytes a second over so many: the next address

# A pre-trained network: its kind, {'1_1': (W, b), ...} for cross-correlation on BGR, path and checksum of its file.
Weights = namedtuple('Weights', 'kind layers path sha256')
UNKNOWN = Weights(None, None, None, None)                             # by --check, which fetches nothing


# An array in a file of weights, as the network has it, (out, in, 3, 3) or (out,): `read` reads its numbers.
Stored = namedtuple('Stored', 'shape dtype read')


class Bounded:
    """A file whose reads are bounded in number and bytes: those of VGG19 in float64 and the wordiest protocol fit."""

    def __init__(self, file):
        self.file, self.reads, self.bytes = file, 1 << 15, 1 << 29

    def take(self, method, size):
        """What `method` of the file reads, at most `size` bytes; ValueError if that is more than weights need."""
        self.reads -= 1
        if size > min(self.bytes, 1 << 27) or self.reads < 0:
            raise ValueError('it is larger than any file of weights')
        found = method(size)
        self.bytes -= len(found)
        return found

    def read(self, size):
        return self.take(self.file.read, size)

    def readline(self):
        line = self.take(self.file.readline, min(self.bytes, 1 << 27))
        if line[-1:] != b'\n':
            raise ValueError('it ends within a line, or has one longer than any file of weights')
        return line


class Recorded:
    """Stands for what a pickle names and calls: it records arguments and state, and does nothing."""

    def __init__(self, name, arguments=(), state=()):
        self.name, self.arguments, self.state = name, arguments, state

    def __setstate__(self, state):
        self.state = state


# The opcodes that pickles of arrays have, in protocols 0 to 5, from Python 2 and 3.
OPCODES = '''
    PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG
    LONG1 STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8
    BYTEARRAY8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT MEMOIZE
    GET BINGET LONG_BINGET
'''.split()


def latin1(load):
    """The opcode that loads a text, for texts of which every character takes a byte: others take four times that."""
    def load_latin1(self):
        load(self)
        self.stack[-1].encode('latin1')
    return load_latin1


class ArrayUnpickler(pickle._Unpickler):
    """Reads what a pickle says of NumPy arrays, and builds and calls nothing: a pickle could run any code.

    Its base is the unpickler in Python, since that in C reserves memory for whatever number a file names.
    """

    def find_class(self, module, name):
        if (module.split('.')[0] == 'numpy' and name in ('ndarray', 'dtype', '_frombuffer', '_reconstruct') or
                (module, name) == ('_codecs', 'encode')):             # how protocol 2 stores bytes
            return Recorded(name)
        raise pickle.UnpicklingError(f'it asks for {f"{module}.{name}"[:60]!r}, which no array needs')

    def load_reduce(self):
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(called, Recorded):
            raise pickle.UnpicklingError('it makes a call that no array needs')
        self.append(Recorded(called.name, arguments))

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in OPCODES)}
    dispatch |= {pickle.UNICODE[0]: latin1(pickle._Unpickler.load_unicode),
                 pickle.BINUNICODE[0]: latin1(pickle._Unpickler.load_binunicode),
                 pickle.REDUCE[0]: load_reduce, pickle.FRAME[0]: lambda self: self.read(8),
                 pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]]}   # the same bytes, but read before room is made


def pickled_array(array):
    """A `Recorded` array as `Stored`, its filters turned; ValueError if it is not NumPy's float32 or float64."""
    try:
        if array.name == '_frombuffer':
            numbers, kind, shape, order = array.arguments
        else:
            _, shape, kind, fortran, numbers = array.state
            order = 'F' if fortran else 'C'
        (size, *_), (_, ends, *_) = kind.arguments, kind.state
        if isinstance(numbers, Recorded):                             # a call of _codecs.encode
            numbers = numbers.arguments[0]
        if isinstance(numbers, str):
            numbers = numbers.encode('latin1')
        if (kind.state != (3, ends, None, None, None, -1, -1, 0) or ends not in ('<', '>') or size not in ('f4', 'f8')
                or not all(type(length) is int for length in shape) or not isinstance(numbers, bytes)):
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        raise ValueError('what should be an array of float32 or float64 is none') from None

    def read():
        values = np.frombuffer(numbers, ends + size).reshape(shape, order=order)
        return np.flip(values, (2, 3)) if values.ndim == 4 else values
    return Stored(tuple(shape), np.dtype(size), read)


@contextlib.contextmanager
def open_pickle(path):
    """The original's format: a (bz2) pickle of [W, b, W, b, ...] from conv1_1 on, filters for true convolution."""
    with (bz2.open if path.endswith('.bz2') else open)(path, 'rb') as file:
        try:
            arrays = ArrayUnpickler(Bounded(file), encoding='latin1').load()
        except (LookupError, AttributeError, TypeError):              # an unknown opcode, or one that lacks operands
            raise ValueError('it is no pickle of arrays') from None
    kinds = {2 * sum(blocks): kind for kind, blocks in BLOCKS.items()}
    if not isinstance(arrays, list) or len(arrays) not in kinds:
        raise ValueError('it is not a list of 32 arrays (VGG19) or 26 (VGG16)')
    arrays = [pickled_array(array) for array in arrays]
    yield dict(zip(layer_names(kinds[len(arrays)]), zip(arrays[::2], arrays[1::2])))


def h5_array(item):
    """An HDF5 dataset as `Stored`; ValueError if it is not plain floats in the file itself, packed to their size."""
    from h5py import h5d, h5t, h5z
    how, packed = item.id.get_create_plist(), h5z.FILTER_DEFLATE
    used = [how.get_filter(k)[0] for k in range(how.get_nfilters())]
    if (how.get_layout() == h5d.VIRTUAL or how.get_external_count() or len(set(used)) < len(used)
            or not {packed, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}.issuperset(used)
            or not item.id.get_type().equal(h5t.py_create(item.dtype))):
        raise ValueError(f'{item.name[:60]!r} has filters or types, or lies in other files, as no weights do')
    axes = (3, 2, 0, 1) if item.ndim == 4 else range(item.ndim)

    def read():
        if item.chunks:
            chunk = math.prod(item.chunks)
            if chunk > item.size or item.size > chunk << 12:
                raise ValueError(f'{item.name[:60]!r} is stored in pieces of strange sizes')
            for piece in item.iter_chunks() if packed in used else ():
                _, content = item.id.read_direct_chunk([part.start for part in piece])
                inflater = zlib.decompressobj()                       # HDF5's own would inflate it without a limit
                inflater.decompress(content, chunk * item.dtype.itemsize + 4)           # 4: a checksum
                if not inflater.eof:
                    raise ValueError(f'{item.name[:60]!r} is larger than it says')
        return item[()].transpose(*axes)
    return Stored(tuple(item.shape[axis] for axis in axes), item.dtype, read)


@contextlib.contextmanager
def open_h5(path):
    """Keras' format: groups ``block1_conv1`` ..., filters (height, width, in, out) for cross-correlation."""
    import h5py

    def arrays(group, name, depth=3):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f'{name[:60]!r} is a link to elsewhere')
        if isinstance(group[name], h5py.Dataset):
            return [h5_array(group[name])]
        return [array for inner in group[name] for array in arrays(group[name], inner, depth - 1)] if depth else []
    with h5py.File(path, 'r') as file:
        yield {f'{name[5]}_{name[-1]}': sorted(arrays(file, name), key=lambda array: -len(array.shape))
               for name in fnmatch.filter(file, 'block?_conv?')}


def npz_array(archive, name):
    """An array in an open .npz as `Stored`; ValueError if it is not as NumPy writes it, and of the size it says."""
    member, form = archive.getinfo(name + '.npy'), np.lib.format
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'{name[:60]!r} is packed in another way than NumPy does')
    with archive.open(member) as file:
        if form.read_magic(file) != (1, 0):
            raise ValueError(f'the header of {name[:60]!r} is longer than an array of numbers needs')
        shape, _, dtype = form.read_array_header_1_0(file)
        if member.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
            raise ValueError(f'{name[:60]!r} is of another size than it says')

    def read():
        with archive.open(member) as content:
            return form.read_array(content, allow_pickle=False)
    return Stored(shape, dtype, read)


@contextlib.contextmanager
def open_npz(path):
    """Our own format: ``conv1_1.W`` (out, in, 3, 3) for cross-correlation on BGR and ``conv1_1.b``, and so on."""
    with zipfile.ZipFile(path) as archive:
        names = fnmatch.filter(archive.namelist(), 'conv?_?.W.npy')
        yield {name[4:7]: tuple(npz_array(archive, name[:8] + kind) for kind in 'Wb') for name in names}


def read_weights(path, given=True):
    """Read a pre-trained network, and convert it to cross-correlation on BGR.

    Parameters
    ----------
    path : str
        ``.pkl`` or ``.pkl.bz2`` as the original's, ``.h5`` as Keras', or ``.npz`` as our own.
    given : bool
        Whether the user named it: what was only found must be a known network.

    Returns
    -------
    weights : Weights
        float32; the layers that the file has, in the network's order.
    remark : str or None
        What was converted, or that the network is unknown.

    Raises
    ------
    UserError
        The file is missing or broken, an array has the wrong shape, or the network was found and is unknown.
    """
    fix = ('use the original vgg19_conv.pkl.bz2, the Keras .h5 of VGG19 or VGG16, or leave --weights out' if given else
           'replace or remove this file, or name another with --weights')
    if not is_there(path) or not os.path.isfile(path):
        raise UserError(f'{path!r} is no file with weights.', fix)
    opened = {'.npz': open_npz, '.h5': open_h5, '.hdf5': open_h5}.get(os.path.splitext(path)[1], open_pickle)
    try:
        with opened(path) as stored, np.errstate(all='ignore'):
            kind = 'vgg19' if '3_4' in stored else 'vgg16'
            layers = {name: tuple(np.asarray(array.read(), dtype=np.float32) for array in pair)
                      for name, pair in known_layers(stored, kind).items()}
    except PermissionError:
        raise forbidden(path) from None
    except MemoryError:
        raise
    except Exception as error:  # a broken file can raise anything in the libraries that read it
        raise UserError(f'{path!r} cannot be read as weights: {one_line(error)[:300]}.', fix) from None
    layers, layout = mended(layers, kind)
    if not layout and not given:
        raise UserError(f'{path!r} was found, and is not the VGG network that its name says.',
                        f'remove it, or if you trust it, --weights {shlex.quote(path)}')
    remark = {None: f'{path!r} is not a known VGG network: BGR and cross-correlation are assumed.',
              'BGR': None}.get(layout, f'{path!r} is stored as {layout}: mended.')
    with open(path, 'rb') as file:
        checksum = hashlib.file_digest(file, 'sha256').hexdigest()
    return Weights(kind, layers, path, checksum), remark


def known_layers(layers, kind):
    """`Stored` layers in the network's order, up to the deepest; ValueError for one missing, misshapen or no floats."""
    names = layer_names(kind)
    names = names[:max([names.index(name) + 1 for name in layers if name in names], default=1)]
    for before, name in zip([3, *map(filters, names)], names):
        shapes = [(filters(name), before, 3, 3), (filters(name),)]
        found = [array.shape for array in layers.get(name, ())] or 'nothing'
        if found != shapes:
            raise ValueError(f'conv{name} should have arrays of {shapes}, but there is {found}')
        if any(array.dtype.kind != 'f' or array.dtype.itemsize > 8 for array in layers[name]):
            raise ValueError(f'conv{name} should have arrays of float16, float32 or float64')
    return {name: layers[name] for name in names}


def mended(layers, kind):
    """Layers for cross-correlation on BGR, and their layout in the file as told by `FIRST`, or None if unknown."""
    first = layers['1_1'][0]
    for order, channels in (('BGR', np.s_[:]), ('RGB', np.s_[::-1])):
        for flip, step in (('', 1), (', filters flipped', -1)):
            if np.allclose(first[0, channels][0, ::step, ::step][0], FIRST[kind], atol=1e-3):
                layers = {name: (W[:, :, ::step, ::step], b) for name, (W, b) in layers.items()}
                layers['1_1'] = layers['1_1'][0][:, channels], layers['1_1'][1]
                return layers, order + flip
    return layers, None


class Steady(io.RawIOBase):
    """Reads from a connection; OSError where less comes than `SLOWEST` over `PERIOD`, or more than the Keras file."""

    def __init__(self, connection):
        self.connection, self.waited, self.before, self.total = connection, 0, 0, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        start = time.monotonic()
        count = self.connection.readinto(buffer)
        self.waited += time.monotonic() - start
        self.total += count
        if self.total > KERAS['bytes'] + (1 << 20):                   # headers are less
            raise OSError('it sent something else')
        if self.waited > PERIOD:
            if self.total - self.before < SLOWEST * self.waited:
                raise OSError(f'it sent less than {SLOWEST / 1000:g} kB/s over {PERIOD} s')
            self.waited, self.before = 0, self.total
        return count

    def close(self):
        self.connection.close()
        super().close()


class SteadyResponse(http.client.HTTPResponse):
    """An answer that is read through `Steady`, from its first header on."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.fp = io.BufferedReader(Steady(self.fp.detach()))


class SteadyHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens addresses for answers by `SteadyResponse`."""

    def do_open(self, kind, request, **more):
        steady = type(kind.__name__, (kind,), {'response_class': SteadyResponse})
        return super().do_open(steady, request, **more)


def download(address, file):
    """Download the Keras file to `file`, after what that has; OSError if it is incomplete, or another and removed."""
    have = file.seek(0, os.SEEK_END)
    if have < KERAS['bytes']:
        request = urllib.request.Request(address, headers={'Range': f'bytes={have}-'} if have else {})
        with urllib.request.build_opener(SteadyHandler).open(request, timeout=PATIENCE) as response:
            have = have if response.status == 206 else 0
            file.truncate(file.seek(have))
            with tqdm(total=KERAS['bytes'], initial=have, unit='B', unit_scale=True, desc='VGG19', disable=None) as bar:
                while file.tell() <= KERAS['bytes'] and (piece := response.read1(1 << 16)):
                    bar.update(file.write(piece))
    if file.tell() < KERAS['bytes']:
        raise OSError('the connection broke off')                       # the file is kept for the next attempt
    file.seek(0)
    if hashlib.file_digest(file, 'md5').hexdigest() != KERAS['md5']:
        os.unlink(file.name)
        raise OSError('it sent something else')


def cached_vgg19():
    """Where VGG19 is kept once it was fetched, as Keras publishes it."""
    folder = os.path.expanduser(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    return os.path.join(folder, 'neural-doodle', KERAS['file'])


def is_vgg19(path):
    """Whether there is Keras' VGG19 at `path`, by size and checksum; UserError where it may not be read."""
    if not os.path.isfile(path) or os.path.getsize(path) != KERAS['bytes']:
        return False
    if not os.access(path, os.R_OK):
        raise forbidden(path)
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'md5').hexdigest() == KERAS['md5']


def fetch_vgg19(asked=True):
    """The path of VGG19 in the cache, to which it is fetched where it is missing or broken.

    ``DOODLE_ADDRESSES`` may hold further addresses of folders, separated by spaces, which are tried first;
    ``DOODLE_OFFLINE`` the reason why nothing is fetched unless it is `asked` for.

    Raises
    ------
    OSError
        No address has the file; the message tells why, for each.
    """
    path = cached_vgg19()
    if is_vgg19(path):
        return path
    if not asked and (reason := os.environ.get('DOODLE_OFFLINE')):
        raise OSError(reason)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(os.path.join(os.path.dirname(path), 'lock'), 'a', opener=opened_file) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)            # of concurrent runs only one fetches
        except BlockingIOError:
            say('  - Waiting for another run, which fetches VGG19 ..')
            fcntl.flock(lock, fcntl.LOCK_EX)
        troubles = []
        if is_vgg19(path):
            return path
        for address in (*os.environ.get('DOODLE_ADDRESSES', '').split(), *ADDRESSES):
            say(f'  - Fetching VGG19 from {address} ..')
            try:
                with open(path + '.part', 'a+b', opener=opened_file) as file:
                    download(address + KERAS['file'], file)
                os.replace(path + '.part', path)
                return path
            except (OSError, ValueError, http.client.HTTPException) as error:   # ValueError: no URL
                troubles.append(f'{urllib.parse.urlsplit(address).netloc}: {error}')
    raise OSError('; '.join(troubles))


def find_weights(options):
    """The weights named by --weights or --network, else VGG19, else the bundled VGG16.

    VGG19 is the original's file beside the script or in the working folder, else from the cache or downloaded.

    Returns
    -------
    weights : Weights
    remarks : list of str
    """
    path, found, trouble = options.weights, None, None
    if not path and options.network != 'vgg16':
        found = next(filter(os.path.exists, (beside(ORIGINAL), ORIGINAL)), None)
        try:
            path = None if found else fetch_vgg19(options.network == 'vgg19')
        except OSError as error:
            trouble = f'VGG19 cannot be fetched ({error})'
            if options.network == 'vgg19':
                raise UserError(trouble + '.', f"put {KERAS['file']} here and name it with --weights") from None
    weights, remark = read_weights(path or found or beside('vgg16.npz'), given=bool(path))
    if options.network not in (None, weights.kind):
        raise UserError(f'{weights.path!r} is {weights.kind}, not {options.network}.', 'change --weights or --network')
    for layer in options.style_layers + options.content_layers:
        if layer not in weights.layers:
            raise UserError(f'{weights.path!r} has no conv{layer}: it ends at conv{list(weights.layers)[-1]}.',
                            'choose other layers, or a larger network with --weights')
    if trouble:
        remark = bold(f'WARNING: {trouble}: using the bundled VGG16. FIX: --weights PATH, or --network=vgg16.')
    remarks = [remark or f'Network {weights.kind} from `{weights.path}`.']
    if found:
        remarks.append(f'{found!r} was found, not named by --weights; its sha256 is {weights.sha256}.')
    if set(BALANCE[weights.kind]) != {1}:
        remarks.append(f"Losses of {weights.kind} are scaled, layer by layer, to the size of vgg19's, as measured with "
                       "Oxford's weights.")
    return weights, remarks


# ---- devices ---------------------------------------------------------------------------------------------------------

def text_of(path):
    """The text of a file of the kernel's."""
    with open(path, errors='surrogateescape') as file:
        return file.read()


def cgroup(kind, unified, *legacy):
    """Yield the numbers in the file `unified` (v2) or files `legacy` (v1) of this process's cgroup and its parents."""
    lines = []
    with contextlib.suppress(OSError):
        lines = [line.rstrip('/').split(':', 2) for line in text_of('/proc/self/cgroup').splitlines()]
    for _, kinds, path in lines:                                        # in a container the path is /
        folder, files = (f'/{kind}', legacy) if kinds else ('', [unified])
        for depth in range(path.count('/') + 1 if kind in kinds.split(',') or not kinds else 0):
            with contextlib.suppress(OSError, ValueError):              # no such file; 'max', which is no number
                above = path.rsplit('/', depth)[0]
                texts = [text_of(f'/sys/fs/cgroup{folder}{above}/{file}') for file in files]
                yield [int(number) for number in ' '.join(texts).split()]


def allowed_cores():
    """Number of cores this process may use: those of its CPU set, or fewer by the quota of a cgroup."""
    quotas = cgroup('cpu', 'cpu.max', 'cpu.cfs_quota_us', 'cpu.cfs_period_us')
    return min([len(os.sched_getaffinity(0))] + [math.ceil(quota / period) for quota, period in quotas if quota > 0])


def thread_count():
    """Number of threads of BLAS and engine."""
    return int(os.environ.get('OMP_NUM_THREADS') or allowed_cores())    # as `prepare_process` has set it


def memory_limit():
    """Bytes available to this process: the machine's free memory and swap, or less by a cgroup or ulimit."""
    free = dict(re.findall(r'(\w+): +(\d+) kB', text_of('/proc/meminfo')))
    limits = cgroup('memory', 'memory.max', 'memory.limit_in_bytes')
    return min([1024 * (int(free['MemAvailable']) + int(free['SwapFree'])), *[limit for limit, in limits], *ulimits()])


def ulimits():
    """Bytes that `ulimit -v` and `ulimit -d` leave, without what libraries and threads reserve and never touch."""
    reserved = 400e6 + 32e6 * thread_count()                            # measured: 467 MB with 2 threads
    softs = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return [max(0, soft - reserved) for soft in softs if soft != resource.RLIM_INFINITY]


def feature_bytes(names):
    """Bytes of the features of these layers, for each pixel of the picture."""
    return sum(4 * filters(name) / stride(name) ** 2 for name in names)


def weight_bytes(names):
    """Bytes of the filters of these layers, which follow one another."""
    return sum(36 * before * filters(name) for before, name in zip([3, *map(filters, names)], names))


def memory_needed(size, style_size, options):
    """Bytes at the peak of a run on the CPU: samples/measure_memory.py fits the numbers to measured peaks.

    The peak is where the network is compiled, or where the features and keys of all copies of the style are made, or
    where the image is painted, or else where maps are, of whatever size.
    """
    names = layer_names('vgg19', options.style_layers + (options.content_layers if options.content else []))
    weights, style = weight_bytes(names), feature_bytes(options.style_layers)
    matched = style * style_term(options).arrays
    area, style_area, copies = math.prod(size), math.prod(style_size), copy_count(options)
    making = 250 * style_area + (1.66 * style + 0.57 * matched) * copies * style_area
    painting = (1.5 * feature_bytes(names) + 1.29 * style) * area + 0.85 * matched * copies * style_area
    needed = max(254e6 + 9.9 * weights, 281e6 + 6.9 * weights + max(making, painting), 950e6 * bool(options.auto_maps))
    return needed + min(REMEMBERED * evaluation_memory(size, options), needed / 20)         # see `Remembered`


def evaluation_memory(size, options):
    """Bytes in which `Remembered` keeps an evaluation, its gradient and its matches; 0 where it keeps none."""
    patched = options.style_layers if style_term(options).patched else []
    pixel = 3 * 4 + sum(8 / stride(name) ** 2 for name in patched)
    return 0 if options.variety or options.cache else pixel * math.prod(size)


MORE_MEMORY = 'raise docker run --memory, or on Docker Desktop the memory in its settings'


def gpu_memory_needed(size, style_size, options, slices=None):
    """Bytes at the peak of a run on a GPU, with matching in so many slices, or in as many as there can be.

    The peak is where features or keys of the style are made, or where the image is painted, or in its matching. The
    numbers are fitted to peaks on the tests' card; the last ones are for the BLAS, and for gaps between arrays.
    """
    content = options.content_layers if options.content else []
    names, style, term = layer_names('vgg19', options.style_layers + content), options.style_layers, style_term(options)
    area, style_area, copies = math.prod(size), math.prod(style_size), copy_count(options)
    constant = (weight_bytes(names) + feature_bytes(content) * area +
                feature_bytes(style) * term.arrays * copies * style_area)
    making = max(0.71 * feature_bytes(names) * style_area, 2.3 * feature_bytes(style) * copies * style_area)
    painting = (1.2 * feature_bytes(names) + feature_bytes(style)) * area
    products = 0                                                        # of the largest slice
    for layer in style if term.patched else []:
        W, H, w, h = (side // stride(layer) for side in (*size, *sheet_size(style_size, options)))
        rows = min(math.ceil((h - 2) / (slices or max(1, h))), (1 << 31) // max(1, H * W * w) - 2)
        products = max(products, 4 * H * W * w * (max(1, rows) + 2) if rows > 0 else math.inf)  # BLAS counts in 32 bits
    return 200e6 + 1.1 * (constant + max(making, painting, 1.06 * feature_bytes(names) * area + products))


def check_memory(inputs, options, device='cpu'):
    """Refuse a run that does not fit into the memory of the device, naming a size that does."""
    size, style_size = inputs.size, inputs.style.shape[1::-1]

    def sizes(longest):
        shrunk = [[math.ceil(side * min(1, scale * longest / max(size))) for side in size]
                  for size, scale in ((size, 1), (style_size, options.style_scale))]
        return (shrunk[0], style_size) if options.output_size else shrunk
    estimate, limit = memory_needed, memory_limit
    if device != 'cpu':
        estimate, limit = gpu_memory_needed, lambda: theano.gpuarray.get_context(None).free_gmem
    limit, needed = limit(), estimate(size, style_size, options)
    if needed <= limit:
        return
    longest = bisect.bisect(range(max(size + style_size)), limit, key=lambda n: estimate(*sizes(n), options)) - 1
    fix = '--output-size={}x{}'.format(*sizes(longest)[0]) if options.output_size else f'--max-size={longest}'
    more = 'close other programs, raise ulimit -v, or use a machine with more memory'
    if device != 'cpu':
        more = '--device=cpu, or a card with more memory'
    elif mounts() is not None:
        more = MORE_MEMORY
        fix += f', or {more}'
    fix = fix if longest >= 64 else more
    fix += ', or a smaller --style-scale' * (options.style_scale > 1)
    why = 'are more than its BLAS can multiply at once'
    if needed < math.inf:
        why = f'need about {needed / 1e9:.1f} GB of memory, and there are {limit / 1e9:.1f} GB'
    raise UserError(f'{size[0]}x{size[1]} pixels in the style of {style_size[0]}x{style_size[1]} {why}'
                    f'{"" if device == "cpu" else f" on {device}"}.', fix)


def check_sizes(inputs, options):
    """Refuse pictures too small for the layers, and a style fully transparent at a layer's resolution."""
    if options.output_size and (inputs.content is not None or inputs.content_map is not None):
        raise UserError('--output-size is for texture synthesis; here the content or its map gives the size.',
                        'leave --output-size out')
    # In the smallest phase a layer that is matched by patches needs 3x3 pixels, any other one.
    patched, style_size = options.style_layers if style_term(options).patched else [], inputs.style.shape[1::-1]
    least, layer = max((stride(layer) * (3 if layer in patched else 1), layer) for layer in
                       options.style_layers + (options.content_layers if inputs.content is not None else []))
    for name, (width, height) in (('result', inputs.size), ('style picture', style_size)):
        if min(phase_size((width, height), 0, options.phases)) < least:
            fits = int(math.log2(max(1, min(width, height) / least))) + 1
            raise UserError(f'The {name}, {width}x{height}, is too small for conv{layer} in the first of '
                            f'{options.phases} phases, where its sides must be {least} or more.',
                            f'--phases={fits}' if min(width, height) >= least else 'use a larger picture' +
                            ', or a larger --style-scale' * (options.style_scale < 1))
    cut_out = () if inputs.style_alpha is None else options.style_layers
    for phase, layer in itertools.product(range(options.phases), cut_out):
        if not pooled_map(inputs.style_alpha, phase_size(style_size, phase, options.phases), layer).any():
            raise UserError(f'All of {options.style!r} is transparent, as conv{layer} sees it in phase {phase}.',
                            'use a style picture that shows something')


# What each unit of `work` costs, as a number of multiply-adds of a large matrix product in NumPy on one core that take
# as long. samples/measure_time.py fits them to measured evaluations.
COSTS = {'products': 0.22, 'transforms': 78., 'byte scores': 0.43, 'scores': 1.16, 'near scores': 2.5, 'gram': 1.8,
         'features': 340., 'pixels': 7500., 'calls': 1e9}
ON_ONE_CORE = 'gram', 'features', 'pixels', 'calls'


def work(size, style_size, options, phase=0):
    """What an evaluation does, as {key of `COSTS`: amount}.

    Multiply-adds by the direct forms (products: of the convolutions, forward and backward; scores: of all pairs of
    patches, or where `Matching` bounds them by bytes, byte scores; near scores: of the patches that `NearMatching`
    tries; gram), floats (transforms: what the convolutions read and write; features: those of the style layers),
    pixels, and one call of the compiled function.

    Parameters
    ----------
    size, style_size : (width, height) in this phase
    options : argparse.Namespace
    phase : int
    """
    def area(name):
        return math.prod(side // stride(name) for side in size)
    names = layer_names('vgg19', options.style_layers + (options.content_layers if options.content else []))
    convolutions = [(before, filters(name), area(name)) for before, name in zip([3, *map(filters, names)], names)]
    found = dict.fromkeys(COSTS, 0) | {
        'products': sum(2 * 9 * C * K * pixels for C, K, pixels in convolutions),
        'transforms': sum(2 * (C + K) * pixels for C, K, pixels in convolutions), 'pixels': math.prod(size), 'calls': 1}
    exact = 'byte scores' if has_dot() and style_term(options).reads_maps and not options.variety else 'scores'
    for name in options.style_layers if options.style_weight else ():
        found['features'] += filters(name) * area(name)
        if not style_term(options).patched:
            found['gram'] += filters(name) ** 2 * area(name)
            continue
        copies = copy_transforms(*(side // stride(name) for side in reversed(style_size)), options.rotations,
                                 options.scales)
        widths, heights = zip(*(copy for copy, _ in copies))
        h, w = sum(heights), max(widths)
        if options.matching == 'near' and phase and area(name) * h * w >= NEAR_PAIRS:
            tried = LATER_SWEEPS * (16 + math.log2(max(h, w)))
            found['near scores'] += 9 * filters(name) * area(name) * tried
        else:
            found[exact] += filters(name) * area(name) * h * w / (options.iterations if options.cache else 1)
    return found


@functools.cache
def has_dot():
    """Whether the processor multiplies bytes as `Matching` needs it."""
    return bool(re.search(r'\b(avx512_vnni|asimddp)\b', text_of('/proc/cpuinfo')))


def efforts(inputs, options):
    """The effort of each phase's preparation and of its evaluations, [(preparation, evaluation), ...].

    It is counted in multiply-adds of a large matrix product, on all threads, that take as long.
    """
    def effort(amounts):
        return sum(COSTS[name] * amount * (thread_count() if name in ON_ONE_CORE else 1)
                   for name, amount in amounts.items())
    result = []
    for phase in range(options.phases):
        size, style_size = (phase_size(whole, phase, options.phases)
                            for whole in (inputs.size, inputs.style.shape[1::-1]))
        evaluation = work(size, style_size, options, phase)
        # Forward passes of the content and of all copies of the style.
        share = .5 + .5 * copy_count(options) * math.prod(style_size) / math.prod(size)
        passes = {name: share * evaluation[name] for name in ('products', 'transforms')}
        result.append((effort(passes), effort(evaluation)))
    return result


def total_effort(inputs, options, at):
    """The effort, as of `efforts`, of what a run has left to do from `at`, a `Checkpoint`."""
    return sum(preparation + left * evaluation for left, (preparation, evaluation) in
               list(zip(at.left(options), efforts(inputs, options)))[at.phase:])


def product_rate():
    """Multiply-adds a second of a large matrix product in NumPy, the best of three."""
    square, took = np.ones((2048, 2048), np.float32), []
    for _ in range(4):                                                  # the first is warm-up
        start = time.perf_counter()
        square @ square
        took.append(time.perf_counter() - start)
    return 2048 ** 3 / min(took[1:])


def in_words(seconds):
    """A time as minutes, one at least, or as hours."""
    minutes = max(1, round(seconds / 60))
    return f'{minutes} minute{"s" * (minutes > 1)}' if minutes < 120 else f'{seconds / 3600:.1f} hours'


STARTING = 7                                                          # seconds until the first phase, compiled before
LONG = 3e14                                                           # multiply-adds: 45 minutes on two cores


def plan(inputs, options, at):
    """Lines of --check: phases, patches, memory, and the time on this CPU, by the rate of a matrix product in NumPy.

    They are of what is left to do from `at`, a `Checkpoint`.
    """
    rate, lines, style_size = product_rate(), [], inputs.style.shape[1::-1]
    for phase, (left, (_, effort)) in enumerate(zip(at.left(options), efforts(inputs, options))):
        if not left:
            continue
        size, other = (phase_size(whole, phase, options.phases) for whole in (inputs.size, style_size))
        patches = [f'{name} {copy_count(options) * math.prod(side // stride(name) - 2 for side in other):,}'
                   for name in options.style_layers if style_term(options).patched and options.style_weight]
        lines.append('Phase #{}: {}x{}, {} evaluations of about {:,.2f} s{}'.format(
            phase, *size, left, effort / rate, ', style patches ' * bool(patches) + ', '.join(patches)))
    seconds = STARTING + total_effort(inputs, options, at) / rate
    most = 'at most ' * options.stop_when_converged
    return lines + [f'On this CPU {most}about {in_words(seconds)} and '
                    f'{memory_needed(inputs.size, style_size, options) / 1e9:.1f} GB in all.',
                    *advice(inputs, options, at, rate)]


def advice(inputs, options, at, rate=None):
    """A line on how long a run takes on this CPU, if exact matching makes it long, and what would make it shorter.

    Or that no match will be near where --matching=near asks for it. There is none where a run goes on from a
    checkpoint, which must match as before, nor with what --matching=near does not go with.
    """
    if at.number or options.variety or options.line_search == 'held' or not style_term(options).patched:
        return []
    exact, near = (total_effort(inputs, argparse.Namespace(**vars(options) | {'matching': matching}), at)
                   for matching in ('exact', 'near'))
    if options.matching == 'near':
        return ['All matches will be exact: near ones are for large pictures, after the first phase.'] * (near == exact)
    if exact < LONG or near > .7 * exact:
        return []
    exact, near = (in_words(effort / (rate or product_rate())) for effort in (exact, near))
    return [f'With exact matching this takes about {exact} on this CPU, with --matching=near about {near}.']


def matching_remarks(inputs, options, device, at):
    """What is to be said of --matching at the start of a run from `at`, a `Checkpoint`."""
    if device == 'cpu':
        return advice(inputs, options, at)
    return ['On a GPU all matches are exact: --matching=near is for the CPU.'] * (options.matching == 'near')


def sheet_size(style_size, options):
    """(width, height) of all copies of the style picture in a `sheet`, or somewhat more."""
    return math.ceil(style_size[0] * (1 + 0.05 * options.scales)), style_size[1] * copy_count(options)


def choose_slices(inputs, options, device):
    """Batches of matching: --slices, or as few as fit a GPU's free memory; the engine, on the CPU, needs none.

    A GPU's memory is taken as one block, from which libgpuarray cuts its arrays: of many blocks some would lie idle.
    """
    if device == 'cpu':
        return options.slices or 1
    check_memory(inputs, options, device)
    context, style_size = theano.gpuarray.get_context(None), inputs.style.shape[1::-1]
    free = context.free_gmem

    def needed(slices):
        return gpu_memory_needed(inputs.size, style_size, options, slices)
    slices = options.slices or 1 + bisect.bisect_left(
        range(1, sheet_size(style_size, options)[1]), -free, key=lambda count: -needed(count))
    theano.gpuarray.pygpu.empty(int(min(needed(slices) - 1e8, free - 1e8)), 'int8', context=context)
    return slices


def check_compiler(compiler='g++'):
    """Refuse to run without compiler or Python's headers: Theano would silently run a hundred times slower."""
    if not shutil.which(compiler):
        if compiler != 'g++':
            raise UserError(f'cxx={compiler} in THEANO_FLAGS or .theanorc is no compiler.', 'leave it out')
        raise UserError('There is no g++, which compiles the network.', 'install g++ (Debian: apt-get install g++)')
    if not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')):
        raise UserError("Python's headers are missing.", 'install them (Debian: apt-get install python3-dev)')


def blas_flags(compiler):
    """Theano's flags for a fast BLAS: the system's OpenBLAS, else the one in the package scipy-openblas32."""
    try:
        place = subprocess.check_output([compiler, '-print-file-name=libopenblas.so'], text=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f'The compiler {compiler} does not work: {one_line(error)}.', 'see that it runs') from None
    if os.path.isabs(place.strip()):
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
    """An empty but truthy ``__props__``: Ops with a falsy one have no version, and Theano recompiles them each time."""

    def __bool__(self):
        return True

    def __reduce__(self):
        return tuple, ()


def prepare_process():
    """Set the number of threads, which BLAS reads when NumPy is imported, and how glibc frees memory."""
    threads = os.environ.get('OMP_NUM_THREADS') or str(allowed_cores())
    found = re.fullmatch(r'\s*0*([1-9]\d{0,2})\s*(,.*)?', threads, re.ASCII)   # '2,1': loops within loops
    if not found:
        raise UserError(f'OMP_NUM_THREADS={threads!r} is not a number of threads from 1 to 999.',
                        'correct it, or unset it')
    os.environ['OMP_NUM_THREADS'] = found[1]                            # NumPy and Theano take a single number
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')                 # idle threads sleep, and do not spin
    if 0 in ulimits():                                                  # OpenBLAS would ask for memory for ever
        raise UserError('ulimit -v or -d leaves too little memory for the packages.', 'raise it: ulimit -v unlimited')
    return_freed_memory()


def allow_files():
    """Let 1024 files be open at once, or as many as may be; 64 are needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1024 if hard == resource.RLIM_INFINITY else min(hard, 1024)
    if most < 64:
        raise UserError(f'Only {most} files may be open at once.', 'raise it: ulimit -n 1024')
    if 0 <= soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def return_freed_memory(pixels=0):
    """Have glibc return free memory to the system, and from now on blocks from 4 MB on at once.

    In a phase of so many pixels it keeps instead what is freed: evaluations one after the other need the same blocks,
    and fresh pages for each would take a quarter of their time. Below a megapixel it keeps only what is smaller than
    the features of conv3, since larger blocks, and what works in between on arrays of other sizes, would leave gaps.
    """
    most = 40 * pixels if pixels < 1 << 20 else (1 << 31) - 1           # conv3 has 64 bytes a pixel
    with contextlib.suppress(OSError, AttributeError):                  # another C library
        libc = ctypes.CDLL('libc.so.6')
        libc.malloc_trim(0)
        libc.mallopt(-3, max(most, 4 << 20))                            # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1 if pixels else 128 << 10)                   # M_TRIM_THRESHOLD, or none


def keep_compiled_code():
    """Make Theano's compile cache work for all Ops; by default some are compiled anew in each process."""
    ops = [theano.gof.Op]
    for op in ops:
        ops += op.__subclasses__()
        if vars(op).get('__props__') == ():
            op.__props__ = NoProps()
    # Theano's version is the hash() of a string, which differs between processes.
    theano.gof.op.COp.c_code_cache_version = lambda op: (zlib.crc32(''.join(op.func_codes).encode()),)


def is_whole(path):
    """Whether a compiled module is as long as it says; one that was cut off can end in SIGBUS when it is loaded."""
    with open(path, 'rb') as file:
        header = file.read(64)
        if len(header) < 64:
            return False
        place, size, count = struct.unpack_from('<40xQ10xHH', header)   # the table of sections is at the end
        file.seek(place)
        table = file.read(size * count)
    return len(table) == size * count and any(table)


def remove_cut_modules(folder):
    """Remove the two modules of Theano's that it would load unseen, where they are cut off and nobody compiles."""
    for path in itertools.chain(*(glob.glob(f'{glob.escape(folder)}/{depth}_ext/*.so') for depth in ('*', '*/*'))):
        if not is_whole(path) and not os.path.exists(os.path.join(path, '../../lock_dir')):
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def check_modules():
    """Have Theano compile anew the modules in its cache that were cut off."""
    find = theano.gof.cmodule.module_name_from_dir

    def checked(*arguments, **named):
        path = find(*arguments, **named)
        if path and not is_whole(path):
            raise ValueError(f'{path} is cut off')                      # as if it were not there
        return path
    theano.gof.cmodule.module_name_from_dir = checked


FORGOTTEN = 60                                                        # seconds without a sign of life of a lock's owner


def is_alive(number, path):
    """Whether a process of this machine lives that began before the file at `path` was last written."""
    with contextlib.suppress(OSError, ValueError):
        state, *fields = text_of(f'/proc/{int(number)}/stat').rpartition(')')[2].split()
        began = int(fields[18]) / os.sysconf('SC_CLK_TCK') + time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return state not in 'XZ' and began < os.path.getmtime(path) + 1
    return False


def take_lock(folder, **_):
    """Take Theano's lock of the compile cache, a folder with a file that names its owner: process, number, host.

    It is waited for as long as its owner lives: on another host, as long as the file changes within 60 s.
    """
    path, before, start, told = os.path.join(folder, 'lock'), None, time.monotonic(), False
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            theano.gof.compilelock.refresh_lock(path)
            return
        owner = lock_owner(path) or before or ''                        # it may be empty while it is written
        if owner != before:
            before, since = owner, time.monotonic()
        now, (number, _, host) = time.monotonic(), (owner + '__').split('_', 2)
        host = host.removesuffix('__')
        here = host == theano.gof.compilelock.hostname
        if not is_alive(number, path) if here else now - since > FORGOTTEN:
            if lock_owner(path) == owner:                               # else another run has just taken it over
                say('  - The cache of compiled code was locked by a run that is gone: going on.')
                theano.gof.compilelock.Unlocker(folder).unlock(force=True)
        elif now - start > 1 and not told:
            told = True
            say(f'  - Waiting for another run that compiles: process {number or "unknown"} on {host or "this host"}.')
        time.sleep(.1)


def lock_owner(path):
    """The content of a lock's file; empty if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        return text_of(path).strip()
    return ''


@contextlib.contextmanager
def refreshed_lock():
    """A block in which Theano's lock, if this process has it, shows that its owner lives."""
    path, end = os.path.join(theano.config.compiledir, 'lock_dir', 'lock'), threading.Event()

    def refresh():
        while not end.wait(FORGOTTEN / 3):
            theano.gof.compilelock.refresh_lock(path)
    thread = threading.Thread(target=refresh, daemon=True)
    if getattr(theano.gof.compilelock.get_lock, 'n_lock', 0):
        thread.start()
    try:
        yield
    finally:
        end.set()
        if thread.is_alive():
            thread.join()


@contextlib.contextmanager
def compiling():
    """A block in which g++ may fail: a `UserError`, instead of what Theano prints, raises and leaves in /tmp."""
    before = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix='doodle-') as folder, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        try:
            tempfile.tempdir = folder
            yield
        except Exception as error:
            text = one_line(error)
            if not text.startswith('Compilation failed') and 'No space left' not in text:
                raise
            reason = re.search(r'error: (.+?)(\. |$)', text)
            raise UserError(f'The network cannot be compiled: {reason[1] if reason else text}.',
                            'make room in the temporary folder, or set TMPDIR to another' if 'No space' in text else
                            'see that g++ works, and what THEANO_FLAGS and .theanorc tell it') from None
        finally:
            tempfile.tempdir = before


def compile_quickly():
    """Precompile the headers of Theano's C++, which take g++ most of its time, and leave debug symbols out."""
    compiler, header = theano.gof.cmodule.GCC_compiler, os.path.join(theano.config.compiledir, 'headers.h')
    compile_str, told = compiler.compile_str, []

    def compiled(*arguments, preargs, **named):
        if not told:
            told.append(say('  - Some of it is new to this machine, which may take a minute the first time ..'))
        if not os.path.exists(header + '.gch'):
            with written_whole(header) as file:
                file.write(b'#include <Python.h>\n#include <iostream>\n#include <vector>\n#include <algorithm>\n'
                           b'#include "theano_mod_helper.h"\n#include <math.h>\n#include <numpy/arrayobject.h>\n'
                           b'#include <numpy/arrayscalars.h>\n')
            # g++ ignores a precompiled header that does not fit its flags; without one, compiling just takes longer.
            with contextlib.suppress(OSError, subprocess.SubprocessError), written_whole(header + '.gch') as file:
                flags = '-shared', '-g0', '-O3', '-fno-math-errno', '-fvisibility=hidden', *compiler.compile_args()
                folders = ('-I' + folder for folder in theano.gof.cmodule.std_include_dirs())
                subprocess.run([theano.config.cxx, *flags, *folders, '-x', 'c++-header', header, '-o', file.name],
                               check=True, capture_output=True)
        with refreshed_lock(), compiling():
            return compile_str(*arguments, preargs=[*preargs, '-g0', '-include', header], **named)
    compiler.compile_str = staticmethod(compiled)


def integers(count, function, *arguments):
    """The integers that a C function of CUDA writes to its first `count` arguments, or None if it fails."""
    numbers = [ctypes.c_int() for _ in range(count)]
    return None if function(*map(ctypes.byref, numbers), *arguments) else tuple(number.value for number in numbers)


def check_cuda():
    """Refuse drivers with which libgpuarray would fail by an error number or a crash.

    Raises
    ------
    UserError
        There is no driver, or it is older than the compiler, whose code it cannot read.
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


def capability_of(device):
    """The compute capability of a CUDA card, as (major, minor), or None where the driver finds no such card."""
    cuda = ctypes.CDLL('libcuda.so.1')
    card = None if cuda.cuInit(0) else integers(1, cuda.cuDeviceGet, int(device[4:] or 0))
    return card and integers(2, cuda.cuDeviceComputeCapability, *card)


# Answers for the driver where it is asked for the compute capability of a card: 9.0 for a newer one, since libgpuarray
# would take 12.0 for 1.2.
AT_MOST_9 = r'''
#include <dlfcn.h>
extern "C" int cuDeviceGetAttribute(int *value, int attribute, int card) {
    const int MAJOR = 75, MINOR = 76;
    auto driver = (int (*)(int *, int, int))dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "cuDeviceGetAttribute");
    int major = 0, error = driver(value, attribute, card);
    if (!error && (attribute == MAJOR || attribute == MINOR) && !driver(&major, MAJOR, card) && major > 9)
        *value = attribute == MAJOR ? 9 : 0;
    return error;
}'''


def adapt_to(capability):
    """Make libgpuarray work with a card of this compute capability, and keep its code apart from that of others.

    For a card newer than 9.0 code for 9.0 is made, which the driver compiles for what the card is. libgpuarray opens
    libcuda.so: that is then a library of ours, which is loaded under this name and passes on to the driver all else.
    """
    folder = os.path.join(theano.config.gpuarray.cache_path, '{}.{}'.format(*capability))
    type(theano.config.gpuarray).cache_path.val = folder                # Theano itself lets nobody change it
    if capability <= (9, 0):
        return
    driver = re.search(r'/.*/libcuda\.so.*', text_of('/proc/self/maps')).group()
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = os.path.join(folder, 'libcuda.so')
            made = subprocess.run([theano.config.cxx, '-shared', '-fPIC', '-Wl,--no-as-needed,-soname,libcuda.so', '-o',
                                   library, '-xc++', '-', '-xnone', driver, '-ldl'],
                                  input=AT_MOST_9, text=True, capture_output=True)
            if made.returncode:
                raise OSError(made.stderr)
            ctypes.CDLL(library)
    except OSError as error:
        raise UserError('the card has compute capability {}.{}, and the small library by which libgpuarray takes it '
                        'cannot be made: {}.'.format(*capability, one_line(error)),
                        'mend what g++ says, or use --device=cpu') from None
    say('  - The card has compute capability {}.{}: libgpuarray makes code for 9.0, and the driver compiles that for '
        'the card.'.format(*capability))


def described(device):
    """A device in words, a GPU with name, memory, driver and compute capability."""
    if device == 'cpu':
        return '`cpu`'
    gpu = theano.gpuarray.get_context(None)
    facts = [gpu.devname, f'{gpu.total_gmem / 1e9:.1f} GB']
    with contextlib.suppress(OSError):
        facts.append('driver ' + re.search(r'\d+\.[\d.]+', text_of('/proc/driver/nvidia/version')).group())
    if device.startswith('cuda'):
        facts.append('compute capability {}.{}'.format(*capability_of(device)))
    return f'`{device}` ({", ".join(facts)})'


def open_device(options, inputs=None):
    """Import Theano and open the device, or else the CPU, if a run of `inputs` fits its memory; returns the device."""
    used, trouble = import_theano(options.device)
    if trouble:
        say(bold('WARNING: {} Computing on the CPU instead. FIX: {}.'.format(*trouble.args)))
        if inputs:
            check_memory(inputs, options)
    say(f'  - Using device {described(used)} for processing the images.')
    return used


# Keys of Theano's configuration with which the program works in one way only.
FORCED = {'floatX': 'float32', 'mode': 'Mode', 'compute_test_value': 'off', 'compute_test_value_opt': 'off',
          'cast_policy': 'custom', 'int_division': 'int', 'warn_float64': 'ignore', 'numpy.seterr_all': 'ignore',
          'on_opt_error': 'warn', 'init_gpu_device': ''}


# What stands for names in Theano's C code that are gone from the headers of NumPy 2.0.
C_NAMES = {'NPY_PY3K': '1', 'NPY_TARGET_VERSION': '0x12',               # the API of NumPy 2.0, which knows ->elsize
           'PyInt_Check': 'PyLong_Check', 'PyInt_AsLong': 'PyLong_AsLong', 'PyInt_FromLong': 'PyLong_FromLong'}


def read_theanorc():
    """What .theanorc, or the files in THEANORC, say in their section [global]; UserError if they cannot be read."""
    parser = configparser.RawConfigParser()
    for path in map(os.path.expanduser, os.environ.get('THEANORC', '~/.theanorc').split(os.pathsep)):
        if is_there(path) and path != os.devnull:
            try:
                if not os.path.isfile(path):
                    raise ValueError('it is not a file')
                with open(path) as file:
                    parser.read_file(file)
            except (OSError, ValueError, configparser.Error) as error:
                raise UserError(f'{path!r}, which Theano reads, cannot be read: {one_line(error)}.',
                                'mend it, or set THEANORC to nothing') from None
    return dict(parser['global']) if 'global' in parser else {}


def split_flags(text):
    """THEANO_FLAGS as a dict, as Theano reads them: values may be quoted."""
    parts = shlex.shlex(text, posix=True)
    parts.whitespace, parts.whitespace_split = ',', True
    try:
        return dict(part.strip().split('=', 1) for part in parts if '=' in part)
    except ValueError as error:
        raise UserError(f'THEANO_FLAGS={text!r} cannot be read: {one_line(error)}.', 'correct it') from None


def set_theano_flags(device):
    """Add our flags to THEANO_FLAGS, where the user's win unless `FORCED`; returns the device, which may be theirs."""
    user, file = split_flags(os.environ.get('THEANO_FLAGS', '')), read_theanorc()
    device, compiler = user.pop('device', device), user.get('cxx', file.get('cxx', 'g++'))
    check_compiler(compiler)
    flags = {'device': 'cpu', 'dnn.enabled': 'False', 'print_active_device': 'False'}
    if 'blas.ldflags' not in user:
        flags.update(blas_flags(compiler))
    names = [f'-D{name}={old}' for name, old in C_NAMES.items()] if np.__version__ >= '2' else []
    names = [flags.get('gcc.cxxflags'), *names, user.pop('gcc.cxxflags', None)]             # BLAS, NumPy, the user's
    if any(names):
        flags['gcc.cxxflags'] = ' '.join(filter(None, names))
    if not {'compiledir', 'base_compiledir'} & (user.keys() | file.keys()):
        flags['base_compiledir'] = compile_cache()
    for key in {'compiledir', 'base_compiledir'} & (user | file | flags).keys():
        remove_cut_modules(os.path.expanduser((file | flags | user)[key]))
    flags |= user | FORCED | {'linker': 'cvm' if shutil.which('g++') else 'vm'}
    quoted = {key: shlex.quote(value) if re.search(r'[,#"\'\\]', value) else value for key, value in flags.items()}
    os.environ['THEANO_FLAGS'] = ','.join(map('='.join, quoted.items()))
    return re.sub('^gpu', 'cuda', device)


def compile_cache():
    """The folder of compiled code: one that nobody else can write, since what lies there is run."""
    home = os.path.expanduser('~')
    folder = os.path.join(home, '.theano') if os.access(home, os.W_OK) else os.path.join(
        tempfile.gettempdir(), f'theano-{os.getuid()}')
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if all(map(is_private, (folder, *glob.glob(os.path.join(glob.escape(folder), '*'))))):
        return folder
    fresh = tempfile.mkdtemp(prefix='theano-')
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    say(bold(f'WARNING: others can write in {folder!r}: all is compiled anew for this run. FIX: remove that folder.'))
    return fresh


def is_private(path):
    """Whether only this user and root can write to what is at `path`, and made the links that lead there."""
    found = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return {found.st_uid, os.lstat(path).st_uid} <= {0, os.getuid()} and not found.st_mode & 0o022


def put_back():
    """Put back what Theano 1.0.5 asks for and newer versions lack, each only where it is missing."""
    for name, substitute in (
            ('bool', bool), ('complex', complex),                       # gone from NumPy 1.24; 2.0 has its own bool
            ('product', np.prod),                                       # gone from NumPy 2.0
            ('sctype2char', lambda kind: np.dtype(kind).char)):         # gone from NumPy 2.0
        if not hasattr(np, name):
            setattr(np, name, substitute)
    if not importlib.util.find_spec('numpy.distutils'):                 # gone from Python 3.12
        np.distutils = sys.modules['numpy.distutils'] = types.ModuleType('numpy.distutils')
        np.distutils.misc_util = types.SimpleNamespace(get_numpy_include_dirs=lambda: [np.get_include()])


def import_theano(device):
    """Import Theano 1.0.5 and Lasagne 0.1, which are older than this Python, and open the device.

    Parameters
    ----------
    device : str
        ``cpu``, ``cudaN`` or ``openclN:M``. A ``device`` in the user's THEANO_FLAGS wins, and so does any other key.

    Returns
    -------
    device : str
        The device in use.
    trouble : UserError or None
        Why it is not the one asked for.
    """
    global theano, T, lasagne, lbfgsb
    device = set_theano_flags(device)
    logging.getLogger('theano').setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        put_back()
        sys.modules['theano.scan_module.scan_perform_ext'] = None     # does not compile here; scan loops in Python
        try:
            with compiling():
                import theano
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'Theano does not take its configuration: {one_line(error)}.',
                            'correct THEANO_FLAGS or .theanorc') from None
        import theano.tensor as T
        from theano.tensor.signal import pool
        downsample = types.ModuleType('theano.tensor.signal.downsample')  # Lasagne 0.1 knows pool by its old name
        downsample.max_pool_2d = lambda x, ds, ignore_border, st, padding, mode: pool.pool_2d(
            x, ws=ds, ignore_border=ignore_border, stride=st, pad=padding, mode=mode)
        sys.modules[downsample.__name__] = theano.tensor.signal.downsample = downsample
        import lasagne
        from scipy.optimize import _lbfgsb as lbfgsb
        define_ops()
        keep_compiled_code()
        compile_quickly()
        check_modules()
        theano.gof.compilelock.lock = take_lock
        trouble = open_gpu(device) if device != 'cpu' else None
    return 'cpu' if trouble else device, trouble


def open_gpu(device):
    """Make Theano use a GPU; returns None, or the `UserError` that tells why it cannot."""
    try:
        import pygpu  # noqa: F401, first, for its ImportError is clearer than Theano's message
        if device.startswith('cuda'):
            check_cuda()
            if capability := capability_of(device):                     # else pygpu says what there is not
                adapt_to(capability)
        import theano.gpuarray
        keep_compiled_code()                                            # of its Ops, too
        theano.gpuarray.elemwise.GpuCAReduceCuda.verbose = '0'          # the number would void its code's version
        theano.gpuarray.use(device, force=True)
        never_wait()
        return None
    except UserError as error:
        problem, fix = error.args
    except Exception as error:  # libgpuarray's own errors, and whatever loading it may raise
        problem, fix = one_line(error) + '.', 'see README, Troubleshooting, or use --device=cpu'
        if isinstance(error, ImportError) and mounts() is not None:
            fix = 'take the gpu image, docker build -t neural-doodle:gpu --target gpu, and docker run --gpus all'
    return UserError(f'{device} cannot be used: {problem}', fix)


def on_gpu():
    """Whether a GPU is open."""
    return 'theano.gpuarray' in sys.modules and bool(theano.gpuarray.type.list_contexts())


def never_wait():
    """Spare a GPU transfers and waits that Theano's Ops make at each call, and sums that keep one core of it busy."""
    from_host, reduction, gather = (getattr(theano.gpuarray.opt, f'Gpu{name}') for name in (
        'FromHost', 'CAReduceCuda', 'AdvancedSubtensor1'))

    class Kept(theano.Op):
        """A scalar or vector on the GPU, sent when it has changed: sizes and weights do so from phase to phase only."""
        value = None

        def make_node(self, numbers):
            copy = from_host(None)(numbers).type()
            copy.tag.indestructible = True                              # by Ops that work in place
            return theano.Apply(self, [numbers], [copy])

        def perform(self, node, inputs, outputs):
            if not np.array_equal(self.value, inputs[0]):
                self.value = np.array(inputs[0])
                self.array = theano.gpuarray.pygpu.array(self.value, context=node.outputs[0].type.context)
            outputs[0][0] = self.array

    @theano.gof.local_optimizer([from_host])
    def keep(node):
        return [Kept()(*node.inputs)] if isinstance(node.op, from_host) and node.inputs[0].ndim < 2 else None

    @theano.gof.local_optimizer([reduction])
    def reduce_in_stages(node):                                         # one block of threads would sum over all axes
        if isinstance(node.op, reduction) and all(node.op.reduce_mask) and node.inputs[0].ndim > 2:
            op, kinds = node.op, dict(dtype=node.op.dtype, acc_dtype=node.op.acc_dtype)
            rows = reduction(op.scalar_op, (node.inputs[0].ndim - 1,), pre_scalar_op=op.pre_scalar_op, **kinds)
            return [reduction(op.scalar_op, **kinds)(rows(*node.inputs))]
    for name, optimiser in dict(keep=keep, reduce_in_stages=reduce_in_stages).items():
        theano.compile.optdb.register(name, theano.gof.opt.in2out(optimiser), 72, 'fast_run', 'gpuarray')

    code = gather.c_code                                                # it waits for a check of the indices
    gather.c_code = lambda *arguments: code(*arguments).replace('->ga, 1)', '->ga, 0)')
    gather.c_code_cache_version = lambda self: (1, 0)


# ---- engine ----------------------------------------------------------------------------------------------------------

def winograd(W):
    """Filters (K, C, 3, 3) for `Convolution`: G W G^T of [LG15], 36 matrices C x K in panels of 64 columns."""
    G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24  # (6, 3)
    panels = []
    for k in range(0, len(W), 64):                                      # a few at a time, for float64 takes memory
        part = W[k:k + 64].transpose(2, 3, 1, 0)                        # (3, 3, C, k), k up to 64
        U = (np.kron(G, G) @ part.reshape(9, -1)).reshape(36, *part.shape[2:])              # G W G^T, (36, C, k)
        panels.append(np.float32(np.pad(U, [(0, 0), (0, 0), (0, -U.shape[2] % 16)])).reshape(36, -1))  # (36, C k)
    return np.concatenate(panels, axis=1)                               # (36, C K), K rounded up to 16s


class CompiledOp:
    """Base of the CPU's Ops: float32 inputs, and C++ with OpenMP, with as many threads as OMP_NUM_THREADS says."""

    props = ()

    def apply(self, inputs, kinds, outputs):
        """The Apply node; TypeError unless inputs are of these types."""
        inputs = [T.as_tensor_variable(variable) for variable in inputs]
        for variable, kind in zip(inputs, kinds):
            if (variable.dtype, variable.ndim) != (kind.dtype, kind.ndim):
                raise TypeError(f'{self}: {variable} should be {kind.dtype} with {kind.ndim} dimensions')
        return theano.Apply(self, inputs, outputs)

    def c_support_code(self):
        return COMMON + self.code()

    def c_code_cache_version(self):
        return zlib.crc32(self.c_support_code().encode()), 1            # hash() differs between processes

    def c_compile_args(self):
        return ['-fopenmp']

    def call(self, function, arguments, sub):
        """C code that calls a function, and fails as an Op if it throws."""
        return f'if (!guarded([&] {{ {function}({", ".join(arguments)}); }})) {sub["fail"]}'


class ConvolutionOp(CompiledOp):
    """The rectified 'same' convolution with 3x3 filters, or its gradient, by Winograd's F(4x4, 3x3) [LG15].

    A tile of 4x4 pixels is computed from 6x6 pixels of the input by 36 products of (tiles, C) and (C, K) matrices, not
    144. The gradient, of the input alone, is the convolution with transposed and turned filters.

    Parameters
    ----------
    pool : bool
        Average the input over 2x2 pixels first.
    backward : bool
        Compute the gradient.
    """

    props = 'pool', 'backward'

    def __init__(self, pool=False, backward=False):
        self.pool, self.backward = pool, backward

    def code(self):
        return CONVOLUTION

    def make_node(self, *inputs):
        """Forward x (H, W, C), filters, bias (K,), turned filters; backward dy, y (H, W, K), turned filters, x."""
        picture, matrix = T.ftensor3, T.fmatrix
        kinds = (picture, picture, matrix, picture) if self.backward else (picture, matrix, T.fvector, matrix)
        return self.apply(inputs, kinds, [picture()])

    def L_op(self, inputs, outputs, gradients):
        x, *_, turned = inputs
        dx = Convolution(self.pool, True)(gradients[0], outputs[0], turned, x)
        return [dx] + [theano.gradient.grad_undefined(self, k, inputs[k]) for k in (1, 2, 3)]

    def c_code(self, node, name, inputs, outputs, sub):
        function, inputs = ('backward', inputs) if self.backward else ('forward', inputs[:3])
        return self.call(f'{function}<{int(self.pool)}>', [*inputs, f'&{outputs[0]}'], sub)


class MatchingOp(CompiledOp):
    """For every 3x3 patch i of u (H, W, D) the patch j of v (h, w, D) with the largest score, of equal ones the first.

        S(i, j) = a(i) b(j) sum_d u(i + d) . v(j + d),        less penalty(j)

    Empty a and b stand for 1; where b(j) is 0, patch j is never matched. As in `match`, the sum over the offsets d is
    over shifted products of single pixels; only a few rows of these products are stored at a time.

    Where the processor multiplies bytes, it finds the same matches from those of a similar image about three times
    faster: products of bytes are upper bounds of the scores, and only where they reach the score of the known match is
    the score itself computed. That needs features that are not negative, and neither penalties nor factors but 0 and 1.
    """

    def code(self):
        return MATCHING

    def make_node(self, u, v, a, b, start, *penalty):
        """`start` are matches to begin with, of each i; all are ignored where one is no patch, or their number another.

        With `penalty` ((h - 2) (w - 2),) there is a second output: the largest S(i, j) of each j, without it.
        """
        return self.apply((u, v, a, b, start, *penalty), (*2 * [T.ftensor3], *2 * [T.fvector], T.lvector, T.fvector),
                          [T.lvector()] + [T.fvector() for _ in penalty])

    def c_code(self, node, name, inputs, outputs, sub):
        missing = ['NULL'] * (6 - len(inputs))
        return self.call('matching', [*inputs, *missing, *(f'&{output}' for output in outputs), *missing], sub)


class GpuOp:
    """Base of the Ops on a GPU: a few kernels of ours, and the GPU's BLAS."""

    props = ()

    def apply(self, inputs, outputs):
        """The Apply node with `outputs` of these kinds, (dtype, dimensions)."""
        ops = theano.gpuarray.basic_ops
        return theano.Apply(self, [ops.gpu_contiguous(ops.as_gpuarray_variable(variable, None)) for variable in inputs],
                            [ops.GpuArrayType(kind, dimensions * (False,))() for kind, dimensions in outputs])

    def perform(self, node, inputs, outputs):
        inputs = [array.copy() if array.offset else array for array in inputs]              # kernels take no offset
        for storage, result in zip(outputs, self.compute(*inputs)):
            storage[0] = result


def empty(like, *shape, kind='float32'):
    """A new array on the GPU where the array `like` is."""
    return theano.gpuarray.pygpu.empty(shape, kind, context=like.context)


def multiply(A, B, C, **how):
    """The product of matrices A and B, or with ``beta=1`` C and it, in place of C, all on a GPU."""
    theano.gpuarray.pygpu.blas.gemm(1, A, B, how.pop('beta', 0), C, overwrite_c=True, **how)


def launch(name, blocks, threads, *arguments):
    """Launch a kernel of `KERNELS` with arrays and numbers below 2^32."""
    arrays = sum(isinstance(argument, type(arguments[0])) for argument in arguments)
    kernel(arguments[0].context, name, arrays, len(arguments) - arrays)(*arguments, gs=blocks, ls=threads)


@functools.cache
def kernel(context, name, arrays, numbers):
    """A kernel of `KERNELS`, compiled."""
    pygpu = theano.gpuarray.pygpu.gpuarray
    return pygpu.GpuKernel(KERNELS, name, arrays * [pygpu.GpuArray] + numbers * ['uint32'], context=context)


STRIP = 1 << 23                                                       # numbers of a strip in `GpuConvolution`: 32 MB


class GpuConvolutionOp(GpuOp):
    """`Convolution` on a GPU: a sum of nine products, of shifted pixels and each a ninth of the filters.

    A strip of the image is stored with a border of zeros, so that a shift of its pixels is one of the rows of a matrix.
    The columns of im2col would take nine times the memory of the image.
    """

    props = 'pool', 'backward'

    def __init__(self, pool=False, backward=False):
        self.pool, self.backward = pool, backward

    def make_node(self, *inputs):
        """Forward x (H, W, C), filters (9, C, K), bias (K,); backward dy, y (H, W, K), filters, x."""
        return self.apply(inputs, [('float32', 3)])

    def L_op(self, inputs, outputs, gradients):
        x, ninths, _ = inputs
        dx = GpuConvolution(self.pool, True)(gradients[0], outputs[0], ninths, x)
        return [dx] + [theano.gradient.grad_undefined(self, k, inputs[k]) for k in (1, 2)]

    def compute(self, x, *others):
        (H, W, C), pool, back, ninths = x.shape, self.pool, self.backward, others[self.backward]
        if pool and not back:
            H, W = H // 2, W // 2
        y = empty(x, *(others[2].shape[:2] if back else (H, W)), ninths.shape[1 if back else 2])
        (height, width, K), double = y.shape, pool and back
        lines = max(1, min(H, STRIP // ((W + 2) * max(C, K))))
        padded, sums = empty(x, (lines + 2) * (W + 2) + 2, C), empty(x, lines * (W + 2), K)
        for top in range(0, H, lines):
            n = min(lines, H - top) * (W + 2)                           # pixels, with two of the border in each line
            launch('pad', n + 2 * (W + 2) + 2, 64, x, others[0], padded, top, H, W, C, x.shape[1], pool > back, back)
            for k in range(9):
                part, first = ninths[8 - k if back else k], k // 3 * (W + 2) + k % 3
                multiply(padded[first:first + n], part, sums[:n], trans_b=back, beta=k > 0)
            bottom = top + lines << double if top + lines < H else height
            blocks = (bottom - (top << double)) * width
            launch('crop', blocks, 64, sums, others[1], y, top, H, W, K, width, double, not back)
        return [y]


class GpuMatchingOp(GpuOp):
    """`Matching` on a GPU: products of pixels by its BLAS, and the best of their sums by a kernel.

    Parameters
    ----------
    slices : int
        Least number of batches into which rows of style patches are split, to save memory; matches do not depend on it.
    """

    props = 'slices',

    def __init__(self, slices):
        self.slices = slices

    def make_node(self, u, v, a, b, *penalty):
        """Inputs and outputs are those of `Matching`, on the GPU."""
        return self.apply((u, v, a, b, *penalty), [('int64', 1)] + [('float32', 1) for _ in penalty])

    def compute(self, u, v, a, b, *penalty):
        (H, W, D), (h, w, _) = u.shape, v.shape
        # A matrix has less than 2^31 numbers: cuBLAS counts them in 32 bits.
        rows = max(1, min(math.ceil((h - 2) / self.slices), ((1 << 31) - 1) // (H * W * w) - 2))
        count, u, v = (H - 2) * (W - 2), u.reshape((H * W, D)), v.reshape((h * w, D))
        products, best, matches = empty(u, H * W, (rows + 2) * w), empty(u, count), empty(u, count, kind='int64')
        history = [empty(u, (h - 2) * (w - 2)) for _ in penalty]
        for first in range(0, h - 2, rows):
            first = min(first, h - 2 - rows)                            # the last batch may overlap the one before
            multiply(u, v[first * w:(first + rows + 2) * w], products, trans_b=True)
            numbers = H, W, w, rows, first, a.size > 0
            launch('best_patch', count, 256, products, a, b, *(penalty or [b]), best, matches, *numbers, len(penalty))
            if history:
                launch('best_score', math.ceil(rows * w / 256), 256, products, a, b, *history, *numbers)
        return [matches, *history]


class NearMatchingOp(CompiledOp):
    """Nearly the matches of `Matching`, without a penalty, in linear time from a guess: PatchMatch [BSFG09].

    A sweep tries for every patch i of the image, besides the match j that it has:
    1. what the matches of others tell for it, each less its distance from i: those of the four neighbours of i, and of
       four patches drawn up to 8 pixels away;
    2. the eight neighbours of the best patch by then;
    3. patches drawn around the best by then: from all of the style, up to half its longer side away, and so on to 1.
    Scores are those of `Matching`, of equal ones the first j counts. All patches read the matches of the sweep before,
    and what is drawn depends on draws, i and the number of the draw alone: not on the order, nor on threads.
    """

    def code(self):
        return MATCHING + NEAR_MATCHING

    def make_node(self, u, v, a, b, guess, draws):
        """`guess` ((H - 2) (W - 2),), and `draws`: sweeps to make, 0 for exact matches, and those made; both int64."""
        return self.apply((u, v, a, b, guess, draws), 2 * (T.ftensor3,) + 2 * (T.fvector,), [T.lvector()])

    def c_code(self, node, name, inputs, outputs, sub):
        return self.call('near_matching', [*inputs, f'&{outputs[0]}'], sub)


class DifferencesOp(CompiledOp):
    """The differences f - g between all 3x3 patches of f (H, W, C) and their matches in g (h, w, C), offset by offset.

    Outputs are the sum of their squares, and for each pixel and channel of f the sum over the up to nine patches that
    cover it, half the gradient of the first.
    """

    def code(self):
        return DIFFERENCES

    def make_node(self, f, g, matches):
        return self.apply((f, g, matches), (T.ftensor3, T.ftensor3, T.lvector), [T.fscalar(), T.ftensor3()])

    def L_op(self, inputs, outputs, gradients):
        return [2 * gradients[0] * outputs[1]] + [theano.gradient.grad_undefined(self, k, inputs[k]) for k in (1, 2)]

    def c_code(self, node, name, inputs, outputs, sub):
        return self.call('differences', [*inputs, *(f'&{output}' for output in outputs)], sub)


REMEMBERED = 24                                                       # evaluations; a line search has at most 20


class Remembered:
    """An `Objective` that does not compute again what is among its last `REMEMBERED` evaluations in this phase.

    L-BFGS comes to the same images again when a line search fails, for then it starts anew. Losses, gradient and
    matches are the same, bit for bit. Nothing is remembered where the image alone does not determine them: with
    --variety and --matching=near they depend on the evaluation before, with --cache on the image from which the matches
    are.

    Parameters
    ----------
    objective : Objective
    options : argparse.Namespace
    memory : float
        Bytes that the run needs, of which a 21st, 5 % of the rest, is for this. Where that is too little for all, some
        are left out, and in a cycle always the same.
    """

    def __init__(self, objective, options, memory):
        self.objective, self.options, self.memory = objective, options, memory / 21

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def set_phase(self, *arguments):
        """`Objective.set_phase`, which makes all before invalid; its fifth argument is the size of the image."""
        self.kept, self.number, each = {}, 0, evaluation_memory(arguments[4], self.options)
        self.image, self.lately = None, []
        self.objective.set_phase(*arguments)
        self.room = self.objective.pure and each and min(REMEMBERED, int(self.memory / each))

    def __call__(self, x):
        """As `Objective.__call__`; `seconds` tell what was not computed."""
        if not self.room:
            return self.objective(x)
        start, x, self.number = time.perf_counter(), np.float32(x), self.number + 1
        key = hashlib.blake2b(x).digest()
        if key in self.kept:
            _, found, state = self.kept[key]
            self.objective.put(state)
            evaluation = found._replace(gradient=np.float64(found.gradient), seconds=time.perf_counter() - start,
                                        matching_seconds=found.matching_seconds and 0.)
        else:
            evaluation, state = self.objective(x), self.objective.state()
            found = evaluation._replace(gradient=np.float32(evaluation.gradient))        # Theano's is of float32
        self.kept[key] = self.number, found, state
        self.kept = {key: entry for key, entry in self.kept.items() if entry[0] > self.number - REMEMBERED}
        while len(self.kept) > self.room:
            del self.kept[min(self.kept)]
        self.lately = [*self.lately[-2:], (key, state)]                 # this line search's first ones
        return evaluation

    def held(self, x, image):
        """The `Evaluation` of `x` with the matches of `image`, where the line search began."""
        if self.image is not image:
            key = hashlib.blake2b(np.float32(image)).digest()
            self.image, self.matches = image, dict(self.lately).get(key)
            if not self.matches:                                        # the run was just resumed
                self.objective(image)
                self.matches = self.objective.state()
        self.objective.put(self.matches)
        return self.objective(x, held=True)


def define_ops():
    """Define the Ops of the CPU and of a GPU once Theano, which has their base class, is imported.

    Theano's compile cache uses the pickled name of an Op, so that the module is `doodle` also when it is __main__.
    """
    global Convolution, Matching, NearMatching, Differences, GpuConvolution, GpuMatching
    if 'Matching' not in globals():
        sys.modules.setdefault('doodle', sys.modules[__name__])
        Convolution, Matching, NearMatching, Differences, GpuConvolution, GpuMatching = (
            type(theano.Op)(kind.__name__[:-2], (kind, theano.Op), dict(__props__=kind.props, __module__='doodle'))
            for kind in (ConvolutionOp, MatchingOp, NearMatchingOp, DifferencesOp, GpuConvolutionOp, GpuMatchingOp))


def fast_convolution(W, b, pool):
    """`Convolution` with bias, rectifier and pooling for Lasagne: of (1, C, H, W) arrays, stored as (H, W, C).

    Parameters
    ----------
    W : (K, C, 3, 3) array
        Filters for cross-correlation.
    b : (K,) array
    pool : bool
        Average over 2x2 pixels before.
    """
    turned = W[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)                  # (C, K, 3, 3)
    constants = [theano.shared(np.float32(array)) for array in (winograd(W), b, winograd(turned))]
    return lambda x, *_, **__: Convolution(pool)(x.dimshuffle(2, 3, 1), *constants).dimshuffle('x', 2, 0, 1)


def gpu_convolution(W, b, pool):
    """`fast_convolution` on a GPU."""
    W = np.ascontiguousarray(W.transpose(2, 3, 1, 0).reshape(9, W.shape[1], -1))
    ninths, bias = (theano.shared(np.float32(array)) for array in (W, b))
    return lambda x, *_, **__: GpuConvolution(pool)(x.dimshuffle(2, 3, 1), ninths, bias).dimshuffle('x', 2, 0, 1)


def match_by(op, u, v, variety, history, scale):
    """`match` by an Op, whose scores are without the factor of a ninth."""
    a, b = scale or 2 * [np.zeros(0, np.float32)]
    if history is None:
        return op(u, v, a, b), None
    matches, best = op(u, v, a, b, np.float32(9) * variety * history)
    return matches, best / np.float32(9)


def fast_match(u, v, variety=None, history=None, scale=None, start=None):
    """`match` by the engine, faster with a `start`: the matches of a similar image; those of another size are left out.
    """
    start = np.zeros(0, np.int64) if start is None else start
    return match_by(lambda u, v, a, b, *penalty: Matching()(u, v, a, b, start, *penalty), u, v, variety, history, scale)


def fast_style_loss(f, g, matches):
    """`style_loss` by the engine."""
    (H, W, C), (squares, _) = (f.shape[k] for k in range(3)), Differences()(f, g, matches)
    return squares / T.cast(9 * (H - 2) * (W - 2) * C, 'float32')


def gpu_match(slices, u, v, variety=None, history=None, scale=None):
    """`match` on a GPU, in at least so many slices."""
    return match_by(GpuMatching(slices), u, v, variety, history, scale)


# Sweeps of `NearMatching` in the first search of a phase, and in each later one.
FIRST_SWEEPS, LATER_SWEEPS = 8, 2
# Below so many pairs of an image's and a style's patch, those of 400x400 pixels at conv3_1, matches are always exact.
NEAR_PAIRS = 10 ** 8


class NearSearch:
    """The matching of a style layer by `NearMatching`.

    Parameters
    ----------
    matches : shared variable, int64 ((H - 2) (W - 2),)
        Those of the evaluation before.
    options : argparse.Namespace
        Its random seed.
    """

    def __init__(self, matches, options):
        self.matches, self.grids = matches, None
        self.draws = theano.shared(np.array([0, (options.random_seed or 0) << 32]))

    def match(self, u, v, scale):
        """Symbolic matches, and updates, as `PatchTerm.match` returns them."""
        matches = NearMatching()(u, v, *(scale or 2 * [np.zeros(0, np.float32)]), self.matches, self.draws)
        draws = T.stack([T.minimum(self.draws[0], LATER_SWEEPS), T.sum(self.draws)])
        return matches, [(self.matches, matches), (self.draws, draws)]

    def sweeping(self):
        """Whether matches come from those before, in this phase."""
        return self.draws.get_value()[0] > 0

    def begin(self, size, layer, copies, near):
        """Begin a phase, `near` with the matches of the phase before as a guess, unless the pictures are small.

        Parameters
        ----------
        size : (width, height) of the image
        layer : str
        copies : list of (h, w), of the style picture's features and of its copies'
        near : bool
        """
        grids = tuple(side // stride(layer) for side in reversed(size)), copies
        if self.grids:                                                  # else a run begins, or is resumed
            self.matches.set_value(enlarged_matches(self.matches.get_value(), self.grids, grids))
        pairs = math.prod(side - 2 for side in grids[0]) * sum((h - 2) * (w - 2) for h, w in copies)
        self.grids = grids
        self.draws.set_value(np.array([FIRST_SWEEPS * (near and pairs >= NEAR_PAIRS), self.draws.get_value()[1]]))


def enlarged_matches(matches, old, new):
    """Matches of a phase, mapped to the next.

    Parameters
    ----------
    matches : int64 ((H - 2) (W - 2),) array
    old, new : ((H, W), [(h, w), ...])
        Sizes in both phases of the image's features, and of those of the pictures on the style's `sheet`.
    """
    (image, copies), (large_image, large_copies) = old, new
    corners, rest = [], []                                              # of patches, by rows and by columns
    for side, large in zip(image, large_image):
        middle = np.arange(large - 2) + 1.5                             # of the new patches
        corner = np.clip(np.int64(middle * side / large) - 1, 0, side - 3)
        corners.append(corner)
        rest.append(middle - (corner + 1.5) * large / side)
    j = matches.reshape([side - 2 for side in image])[np.ix_(*corners)]                     # (H' - 2, W' - 2)
    row, column = np.divmod(j, max(w for _, w in copies) - 2)
    tops, large_tops = (np.cumsum([0] + [h for h, _ in pictures]) for pictures in (copies, large_copies))
    copy = np.searchsorted(tops, row, 'right') - 1
    (h, w), (large_h, large_w) = (np.transpose(pictures)[:, copy] for pictures in (copies, large_copies))
    y = np.rint((row - tops[copy] + 1.5) * large_h / h - 1.5 + rest[0][:, None])
    x = np.rint((column + 1.5) * large_w / w - 1.5 + rest[1])
    y, x = np.clip(y, 0, large_h - 3) + large_tops[copy], np.clip(x, 0, large_w - 3)
    return np.int64(y * (max(w for _, w in large_copies) - 2) + x).ravel()


def depth_first(graph):
    """Schedule of a graph's nodes, the last output first: each just before its result is used, but sums at once.

    Theano's own order holds more arrays, such as the nine differences of `style_loss` until all are summed.
    """
    def add(node):
        order[node] = True
        for client in dict.fromkeys(client for variable in node.outputs for client, _ in variable.clients):
            if client != 'output' and isinstance(client.op, T.elemwise.CAReduce) and len(client.inputs) == 1:
                add(client)
    order, stack = {}, [variable.owner for variable in graph.outputs if variable.owner]
    before = graph.orderings()                                          # readers of what an in-place node overwrites
    while stack:
        needed = [variable.owner for variable in stack[-1].inputs] + list(before.get(stack[-1], ()))
        needed = [node for node in needed if node and node not in order]
        if not needed:
            add(stack.pop())
        stack += needed[::-1]
    return list(order)


# ---- files: pictures -------------------------------------------------------------------------------------------------

# A decoded picture: pixels (H, W, 3) uint8 sRGB, alpha (H, W, 1) uint8 or None, remarks for the user, a line each.
Picture = namedtuple('Picture', 'pixels alpha remarks')

# Formats that are read: not those for which Pillow starts a program (EPS), which it cannot decode on Linux (WMF), which
# embed files of any other format (ICO, IPTC), or which take it a microsecond for each pixel (DDS, QOI).
FORMATS = 'PNG', 'JPEG', 'TIFF', 'WEBP', 'AVIF', 'GIF', 'BMP', 'PPM', 'JPEG2000', 'PSD', 'SGI', 'PCX', 'TGA'
PIXEL_BYTES = 26                                                      # of memory for each pixel: JPEG2000; others 22
SMALLER = 'make a smaller copy with a paint program'
HEIC = rb'....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)'                    # how such a file begins
MOST_SCANS = 100                                                      # of a JPEG: each takes time; programs write 10


def import_pillow():
    """Import NumPy, Pillow and tqdm, after the options are parsed: ``--help`` needs none of them."""
    global np, Image, ImageCms, ImageOps, tqdm
    import numpy as np
    from PIL import Image, ImageCms, ImageOps
    from tqdm import tqdm
    Image.MAX_IMAGE_PIXELS = None                                       # `check_pixels` has its own
    with contextlib.suppress(ImportError):                              # for HEIC, of telephones
        import pillow_heif
        pillow_heif.register_heif_opener()


def is_there(path):
    """Whether `path` exists; UserError if a folder on the way is closed to this user."""
    try:
        os.stat(path)
    except PermissionError:
        raise forbidden(path) from None
    except (OSError, ValueError):
        return False
    return True


def rights(place):
    """Who this user is, and what the mode and owner of a file or folder are, in words."""
    def name(user):
        with contextlib.suppress(KeyError):
            user = pwd.getpwuid(user).pw_name
        return user
    found = os.stat(place)
    return f'by user {name(os.geteuid())}: {place!r} is {stat.filemode(found.st_mode)} and of {name(found.st_uid)}'


def allowing(fix):
    """What lets a file be used that this user may not: `fix`, or in a container what its start lacks."""
    label = ''
    with contextlib.suppress(OSError):
        label = text_of('/proc/self/attr/current')
    labelled = 'for SELinux :z at the end of the -v' if ':container_' in label else fix
    return fix if mounts() is None else f'--user "$(id -u):$(id -g)", or {labelled}'


def forbidden(path):
    """The `UserError` for a file that this user may not read; it names the folder or file whose mode forbids it."""
    parts = os.path.realpath(path).split('/')
    folders = ['/'.join(parts[:k]) or '/' for k in range(1, len(parts))]
    place = next((folder for folder in folders if not os.access(folder, os.X_OK)), '/'.join(parts))
    letter = 'x' if place in folders else 'r'
    return UserError(f'{path!r} may not be read {rights(place)}.',
                     allowing(f'let all read it: chmod a+{letter} {shlex.quote(place)}'))


def not_there(path):
    """The `UserError` for a picture that is not there, with what may have been meant."""
    folder, name = os.path.split(path)
    inside = [found for found in (os.path.join(point, path) for point in keeping()) if os.path.isfile(found)]
    near = []
    if (mounts() is None or mount_of(path)) and os.access(folder or '.', os.R_OK):
        near = difflib.get_close_matches(name, os.listdir(folder or '.'), 1, 0.8)
    problem, fix = 'not there', f'check the path; to see a sample at work: {SAMPLE}'
    if os.path.exists(path):
        problem = 'not a file'
    elif os.path.islink(path):
        problem, target = f'a link to {os.readlink(path)!r}, which is not there', os.path.realpath(path)
        fix = 'mend the link' if mounts() is None else 'mount the folder of its target, too: -v "{0}:{0}"'.format(
            os.path.dirname(target))
    elif '\\' in path:
        fix = 'use / in paths' + ('' if mounts() is None else f'; mounted is {mounted()}')
    elif inside or near:
        fix = f'it may be {(inside or [os.path.join(folder, *near)])[0]!r}'
    elif mounts() is not None:
        fix = f'mount its folder, -v "$PWD:/nd"; looked for {os.path.abspath(path)}, and mounted is {mounted()}'
    elif name.startswith(('gollum', 'jim_carrey')):
        fix = f'the pictures of the post are yours to bring; to see a sample at work: {SAMPLE}'
    return UserError(f'{path!r} is {problem}.', fix)


def tiff_tag(image, number, default):
    """The (first) number in a tag of a TIFF; `default` without that tag, and for other formats."""
    return np.ravel(getattr(image, 'tag_v2', {}).get(number, default))[0]


def check_pixels(file, path):
    """Refuse, before it is decoded, a picture that would not fit into memory, or is a decompression bomb.

    A small file may claim any size, but flat maps are small files, too. Accepted are 2**26 pixels from any file, 2**28
    at up to 8192 for each byte of the file (the most by deflate), and more at up to 64, as in photographs.
    """
    size, tile = os.path.getsize(path), [int(tiff_tag(file, tag, 0)) for tag in (322, 323)]
    claimed = max(math.prod(file.size), math.prod(tile))
    most, where = min((memory_limit() // PIXEL_BYTES, 'the free memory'),
                      (max(1 << 26, min(size << 13, 1 << 28), size << 6), f'a file of {size:,} bytes'))
    if claimed > most:
        raise UserError(f'{path!r} says that it has {claimed / 1e6:,.0f} million pixels, and {where} is good for '
                        f'{most / 1e6:,.0f} million.', SMALLER)


def scan_count(path):
    """Number of scans of the (first) JPEG at `path`, each of which is decoded over all pixels."""
    marker, count, place = re.compile(rb'\xff([\xc0-\xcf\xd9-\xfe])'), 0, 0        # others lack a length
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while (found := marker.search(content, place)) and found[1] != b'\xd9':             # end of the image
            count, place = count + (found[1] == b'\xda'), found.end()
            place += int.from_bytes(content[place:place + 2], 'big')
    return count


@contextlib.contextmanager
def unheard():
    """Silence warnings and stderr within a block, also those of C libraries."""
    with contextlib.ExitStack() as end:
        end.enter_context(warnings.catch_warnings())
        warnings.simplefilter('ignore')
        with contextlib.suppress(OSError):                              # stderr may be closed
            stderr = os.dup(2)
            end.callback(os.close, stderr)
            end.callback(os.dup2, stderr, 2)
            with open(os.devnull, 'w') as null:
                os.dup2(null.fileno(), 2)
        yield


def decoded(path):
    """Decode a picture or map in its file's own mode, turned upright by its EXIF orientation.

    Parameters
    ----------
    path : str
        One of `FORMATS`, or HEIC where pillow-heif is installed; of an animation the first frame is read.

    Returns
    -------
    PIL.Image.Image
        With the file's profile and transparency in ``info``.

    Raises
    ------
    UserError
        There is no such file, this user may not read it, it is no picture, or it asks for too much memory or time.
    """
    if not is_there(path) or not os.path.isfile(path):
        raise not_there(path)
    if os.path.getsize(path) > memory_limit() / 4:                      # some formats are read as a whole
        raise UserError(f'{path!r} has {os.path.getsize(path) / 1e9:.1f} GB, too much for the free memory.', SMALLER)
    try:
        with unheard(), Image.open(path, formats=formats()) as file:
            check_pixels(file, path)
            if file.format in ('JPEG', 'MPO') and (scans := scan_count(path)) > MOST_SCANS:
                raise ValueError(f'it has {scans} scans, where {MOST_SCANS} are more than any program makes')
            key = file.info.get('transparency') if file.format == 'PNG' else None
            if key is not None and file.tile[0].args == 'RGB;16B':      # Pillow scales the pixels to 8 bits, not this
                file.info['transparency'] = tuple(value >> 8 for value in key)
            elif key is not None and file.tile[0].args in ('L;2', 'L;4'):
                file.info['transparency'] = key * (85 if file.tile[0].args == 'L;2' else 17)
            ImageOps.exif_transpose(file, in_place=True)
            return file
    except UserError:
        raise
    except PermissionError:
        raise forbidden(path) from None
    except Exception as error:  # a broken file can raise anything in Pillow's plugins
        if 'HEIF' not in Image.OPEN and is_heic(path):
            raise UserError(f'{path!r} is a HEIC picture, and the package that reads these, pillow-heif, is missing.',
                            'save it as JPEG' + ', or pip install pillow-heif' * (mounts() is None)) from None
        long = 'a text or a profile in it is too long' if 'MAX_TEXT' in str(error) else None
        raise UserError(f'{path!r} cannot be read as a picture: {long or one_line(error)}.',
                        'open it and save it again as PNG') from None


def formats():
    """The formats that are read: `FORMATS`, and HEIC where pillow-heif is installed."""
    return FORMATS + ('HEIF',) * ('HEIF' in Image.OPEN)


def is_heic(path):
    """Whether a file begins as HEIC pictures do."""
    with open(path, 'rb') as file:
        return bool(re.match(HEIC, file.read(12), re.DOTALL))


def alpha(image):
    """The alpha channel of a Pillow image, of mode L; None if all pixels are fully opaque."""
    if not image.has_transparency_data:
        return None
    if image.mode[0] == 'I':                                            # Pillow cannot convert it to RGBA
        opaque = Image.fromarray(np.uint8(255) * (np.asarray(image) != image.info['transparency']))
    else:
        opaque = image.convert('RGBA').getchannel('A')
    return opaque if opaque.getextrema()[0] < 255 else None


def grey_bytes(image, path):
    """Convert a Pillow image with greys of more than 8 bits to mode L.

    16 bits span 0..65535, and 12 bits of a TIFF 0..4095. For 32 bits no format defines white: it is taken as the least
    of 255, 65535 and 2**32 - 1 for integers, or of 1, 255 and 65535 for floats, that at most a thousandth of the pixels
    exceed. Values outside are clipped.

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
        Values are not finite, or more than a few are below 0 or above all these whites.
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
    """Convert a picture to sRGB with perceptual intent, as is usual for photographs.

    Parameters
    ----------
    image : PIL.Image.Image
        Of mode L, RGB, CMYK or LAB.
    profile : bytes or None
        ICC profile; None counts as a broken one. One that changes no value by more than 1 counts as sRGB: the image is
        returned unchanged.
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
    except Exception as error:  # a profile of another mode; ImportError: Pillow lacks LittleCMS
        return image, f'The colour profile of `{path}` cannot be used, and sRGB is assumed: ' \
                      f'{one_line(error)}.'
    colours = np.stack(np.mgrid[:256:15, :256:15, :256:15], axis=3).reshape(18, 18 * 18, 3)
    colours = Image.fromarray(np.uint8(colours)).convert(image.mode)
    before, after = (np.int16(colours) for colours in (colours.convert('RGB'), transform.apply(colours)))
    if np.abs(after - before).max() <= 1:
        return image, None
    return transform.apply(image), f'The colours of `{path}` are converted to sRGB from {name}.'


def read_picture(path):
    """Read a picture of any mode as 8-bit sRGB, with transparent pixels laid on white.

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
    info.pop('transparency', None)                                      # `opaque` has it
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
        opaque = np.asarray(opaque)[:, :, None]
        share = np.count_nonzero(opaque < 255) / opaque.size
        remarks.append(f'{100 * share:.3g}% of `{path}` is transparent: it is laid on white.')
    return Picture(np.asarray(image), opaque, list(filter(None, remarks)))


def read_inputs(options):
    """`read_pictures`, then `read_maps`: the inputs, and the remarks of both."""
    inputs, remarks = read_pictures(options)
    inputs, lines = read_maps(inputs, options)
    return inputs, remarks + lines


def read_pictures(options):
    """Read and check the pictures of a run.

    Parameters
    ----------
    options : argparse.Namespace

    Returns
    -------
    inputs : Inputs
        Without maps. Without content, `size` is that of a texture; for a doodle `read_maps` sets it.
    remarks : list of str
        What was loaded, a line each.

    Raises
    ------
    UserError
        A picture is missing or broken, or does not fit the options or the layers.
    """
    content, content_alpha, seed, remarks = None, None, None, []
    if options.content:
        content, content_alpha, lines = read_picture(options.content)
        content = limited(content, options.max_size, Image.LANCZOS)
        content_alpha = limited(content_alpha, options.max_size, Image.BOX)
        remarks += [f'Loading `{options.content}` for content data.', *lines]
    elif options.seed == 'content':
        raise UserError('--seed=content needs a content picture.', 'add --content, or use --seed=noise')
    if content is None and options.keep_colors:
        raise UserError('--keep-colors needs a content picture, whose colours are kept.', 'add --content')
    style, style_alpha, lines = read_picture(options.style)
    scaled = scaled_size(style.shape[1::-1], options)
    style, style_alpha = resized(style, scaled, Image.LANCZOS), resized(style_alpha, scaled, Image.BOX)
    style_alpha = None if style_alpha is None or style_alpha.all() else style_alpha
    remarks += [f'Loading `{options.style}` for style data.', *lines]
    if options.style_scale != 1:
        remarks.append('The style picture is taken at {:g} times its size, {}x{}.'.format(options.style_scale, *scaled))
    if options.rotations or options.scales:
        count = copy_count(options)
        remarks.append(f'{count} copies of the style picture, so matching takes some {count} times as long; '
                       'fewer by --rotations and --scales.')
    if options.seed not in ('noise', 'content'):
        seed, _, lines = read_picture(options.seed)
        remarks += lines
    if content is None:
        remarks.append('No content picture: the result depends on style, map and seed only.')
    size = options.output_size or (style if content is None else content).shape[1::-1]
    inputs = Inputs(content, None, style, None, seed, size, style_alpha, content_alpha)
    if content is not None:
        check_sizes(inputs, options)
    return inputs, remarks


# ---- files: painted maps ---------------------------------------------------------------------------------------------

# Largest distance in RGB, 0..255, of colours that count as one: small slips, near-blacks, JPEG noise.
NEAR = 24
NOISE = 8                                                             # per channel, within a flat area of a noisy map
LEAST = 0.001                                                         # share of a map that a class must cover


def map_pixels(images):
    """Maps as RGB arrays. Greys of more than 8 bits are read as labels, the same in all modes.

    Whole numbers up to 255 are kept, and multiples of 257 divided by it. Other values, if all grey maps together have
    at most 256, are numbered from 0 on, else scaled to 0..255: 16 bits by 1/257, others by their minimum and maximum.

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


def colour_codes(rgb):
    """(H, W, 3) uint8 RGB -> (H, W) numbers 0xRRGGBB, which sort faster than triples."""
    return rgb @ np.array([1 << 16, 1 << 8, 1], np.int32)


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
    """Whether a lossless map (H, W, 3) holds class indices as greys, as segmentation tools write them.

    It has at most 64 levels, some within `NEAR` of each other; most cover squares of 2x2; and no two levels farther
    apart have several different levels in between along their borders, as blended borders of a painted map have.
    """
    grey = colours[:, :, 0]
    levels = np.unique(grey)
    if (colours != grey[:, :, None]).any() or not 2 <= len(levels) <= 64 or np.diff(levels).min() > NEAR:
        return False
    inside = np.bincount(grey.ravel(), even_pixels(colours, 0).ravel(), 256)[levels]
    thin = levels[inside < np.bincount(grey.ravel())[levels] / 4]
    between = set()                                                     # (low, thin level between, high)
    for g in (grey, grey.T):
        pairs = np.sort([g[:, :-2], g[:, 2:]], axis=0).astype(int)      # (2, H, W - 2)
        blend = (pairs[0] < g[:, 1:-1]) & (g[:, 1:-1] < pairs[1]) & (pairs[1] - pairs[0] > NEAR)
        between |= {(*ends, level) for *ends, level in zip(*pairs[:, blend], g[:, 1:-1][blend]) if level in thin}
    borders = [ends for *ends, _ in between]
    return len(thin) <= len(levels) / 2 and not any(borders.count(ends) > 1 for ends in borders)


def surroundings(labels, count):
    """The classes around each unlabelled pixel: the first labelled pixel on each of 16 rays from it.

    Two opposite rays that end in different classes cross a border. Ends farther away than the shortest such crossing
    is long are left out: a ray along a border ends in classes that do not meet there.

    Parameters
    ----------
    labels : (H, W) int array
        0 .. count - 1, or -1.

    Returns
    -------
    (n,) uint64 array
        Bit k is set for class k; for the pixels of -1, row by row.
    """
    padded = np.pad(labels, 2, constant_values=count)                   # `count`: outside the map
    unknown = np.flatnonzero(padded < 0)
    n, spot = len(unknown), padded.ravel().astype(np.int32)
    spot += n
    spot[unknown] = np.arange(n, dtype=np.int32)                        # < n: that unlabelled pixel; else n + class
    ends, lengths, shortest = [], [], np.full(n, np.inf, np.float32)
    for x, y in ((1, 0), (0, 1), (1, 1), (1, -1), (2, 1), (1, 2), (2, -1), (1, -2)):
        for step in (y * padded.shape[1] + x, -y * padded.shape[1] - x):
            ahead = np.append(spot[unknown + step], np.arange(n, n + count + 1, dtype=np.int32))
            steps = np.float32(np.arange(len(ahead)) < n)
            while (ahead < n).any():
                steps, ahead = steps + steps[ahead], ahead[ahead]       # pointer jumping: the step doubles
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
    """Euclidean distances (n, k) of points (n, d) from others (k, d)."""
    from scipy.spatial.distance import cdist  # imported for maps only
    return cdist(points, others)


def hull_distance(points, corners):
    """Distances (n,) of points (n, d) from the convex hull of corners (k, d), by the Frank-Wolfe algorithm."""
    nearest = corners[pairwise_distances(points, corners).argmin(axis=1)]
    for _ in range(8 if len(corners) > 2 else 1):                       # one step is exact for two corners
        towards = corners[((points - nearest) @ corners.T).argmax(axis=1)] - nearest
        t = ((points - nearest) * towards).sum(axis=1) / np.maximum((towards ** 2).sum(axis=1), 1e-9)
        nearest = nearest + t.clip(0, 1)[:, None] * towards
    return np.linalg.norm(points - nearest, axis=1)


YCBCR = (0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)            # of RGB, as in a JPEG


def blended(points, corners):
    """Which colours (n, 3) are blends of `corners` (k, 3), within `NEAR`: in RGB, or in luma and chroma separately."""
    inner, outer = (colours @ np.array(YCBCR).T for colours in (points, corners))           # (n, 3), (k, 3)
    y, ends = inner[:, 0], outer[:, 0]
    apart = (hull_distance(inner[:, 1:], outer[:, 1:]) <= NEAR) & (abs(y - y.clip(ends.min(), ends.max())) <= NEAR)
    return apart | (hull_distance(points, corners) <= NEAR)


def groups(colours, shares):
    """Group colours (N, 3) greedily: the largest one left, with all that are left within `NEAR` of it.

    Parameters
    ----------
    shares : (N, maps) array
        Share of each map that a colour covers.

    Yields
    ------
    centre : int
        Index of the largest colour left.
    ways : (N,) array
        Distances of all colours from it.
    group : (N,) bool array
        Colours left within `NEAR` of it.
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
    """Indices of the colours (N, 3) that are peaks of the histogram over flat areas, 64 at most.

    Most of the area within `NEAR` of a peak is within `NEAR / 3`, or much of it has the exact colour. Ramps have none.

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


def numbered_colours(maps):
    """Maps (H, W, 3) as indices (H, W) into a table of all their colours, and that table (N, 3)."""
    codes = [colour_codes(rgb) for rgb in maps]
    table = np.zeros(1 << 24, np.int32)                                 # of all colours; faster than to sort the pixels
    for code in codes:
        table[code] = 1
    known = np.flatnonzero(table)
    table[known] = np.arange(len(known))
    return [table[code] for code in codes], code_colours(known)


def painted_classes(maps):
    """Find the classes of maps painted by hand, and the class of each pixel.

    A class forms around a colour that has flat areas, or covers `LEAST` by itself. A pixel whose colour is a blend of
    the classes around it (anti-aliasing, a soft brush, a scaled map) belongs to the nearest of them; blends form no
    class, however large their area.

    Parameters
    ----------
    maps : list of (H, W, 3) uint8 arrays

    Returns
    -------
    classes : (K, 3) float64 array
        RGB; 64 at most.
    labels : list of (H, W) int arrays
    """
    numbers, colours = numbered_colours(maps)                           # (H, W), (N, 3)
    even = [even_pixels(m, NOISE) for m in maps]

    def shares(where):                                                  # of each map, by colour, (N, maps)
        return np.stack([np.bincount(number[w], minlength=len(colours)) / number.size
                         for number, w in zip(numbers, where)], axis=1)

    flat, exact = shares(even), shares([even_pixels(m, 0) for m in maps])
    flat[flat.sum(axis=1) < shares([number >= 0 for number in numbers]).sum(axis=1) / 4] = 0
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
        # The colour farthest from its surroundings first: once both ends of a ramp are classes, its middle is a blend.
        chosen = list(found) if len(found) > 16 else [max(found, key=found.get)]
        classes = np.append(classes, colours[chosen], axis=0)[:64]
    nearest = pairwise_distances(colours, classes).argmin(axis=1)
    return classes, [np.where(label < 0, nearest[number], label) for label, number in zip(labels, numbers)]


def sides(number, colours, classes, even):
    """Label the pixels of a map: in flat areas by their colour, in blends by the nearest of the classes around.

    Parameters
    ----------
    number : (H, W) int array
        Index of each pixel's colour.
    colours, classes : (N, 3) and (K, 3) arrays
    even : (H, W) bool array

    Returns
    -------
    labels : (H, W) int array
        -1 where neither applies.
    ways : (N,) array
        Mean distance of each colour from the nearest class around, over its pixels of label -1.
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
        found = kinds[kind] - place * len(colours)                      # indices of the colours there
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
    """The joint classes of several maps, and the class of each pixel.

    Parameters
    ----------
    maps : list of (H, W, 3) uint8 arrays
    index : list of bool
        Which maps hold class indices: each level is a class, and only exactly equal ones are one class.

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


def preview_path(path):
    """``dir/name_sem.png`` -> ``dir/name_sem_preview.jpg``."""
    return os.path.splitext(path)[0] + '_preview.jpg'


def map_paths(options):
    """Paths of the two maps: of the content, or of the output (a doodle) if there is none, and of the style.

    An automatic map of a picture whose folder cannot be written lies beside the output.
    """
    paths = [find_map(path, options.semantic_ext) for path in (options.content or options.output, options.style)]
    if options.auto_maps:
        places = place_output(options)
        own = os.path.dirname(places.copy or places.output)
        paths = [path if is_there(path) or can_be_written(os.path.dirname(path) or '.') else
                 os.path.join(own, os.path.basename(path)) for path in paths]
    return paths


MAP_ENDINGS = '.png', '.tif', '.tiff', '.webp', '.bmp', '.gif', '.tga', '.ppm', '.jpg', '.jpeg'  # by preference


def other_endings(path, picture_path):
    """Files named as the map at `path`, with other endings; none if the picture itself has that name."""
    stem, ending = os.path.splitext(path)
    folder, name = os.path.split(stem)
    found = []
    with contextlib.suppress(OSError):
        for stem_there, other in map(os.path.splitext, os.listdir(folder or '.')):
            if stem_there == name and other != ending and other.lower() in MAP_ENDINGS:
                found.append((MAP_ENDINGS.index(other.lower()), stem + other))
    return [other for _, other in sorted(found)] if stem != os.path.splitext(picture_path)[0] else []


def find_map(path, extension):
    """The map of the picture at `path`: its name + `extension`, or if that is missing, with another ending."""
    exact = map_path(path, extension)
    return exact if os.path.lexists(exact) else next(iter(other_endings(exact, path)), exact)


def orientation(path):
    """EXIF orientation of the picture at `path`: 1 upright, 2 .. 8 flipped or turned, None if it does not say."""
    with unheard(), Image.open(path, formats=formats()) as file:
        return file.getexif().get(0x0112)


def check_map_size(path, image, picture_path, size):
    """Refuse a map of other proportions than its picture; returns a warning if EXIF may misalign them, or None.

    Parameters
    ----------
    path, picture_path : str
    image : PIL.Image.Image
        The map, upright.
    size : (width, height)
        Of the picture, upright.
    """
    turned = 1 if orientation(path) else orientation(picture_path) or 1   # a map that says how it lies, lies upright
    (w, h), (width, height) = image.size, size

    def fits(w, h):                                                     # up to rounding, or 3 % of the proportions
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
    """Read maps, find their classes at full size, and resize them to their pictures by the nearest pixel.

    Parameters
    ----------
    paths : list of str
    pictures : list of (str, (H, W, 3) array), or of None
        The path and the pixels of the picture of each map; None for a doodle, which has the map's size.
    longest : int or None
        Largest longer side of a doodle.

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


def map_channels(maps, classes, labels):
    """Maps as channels in which classes differ by their cosine.

    RGB is kept unless a class is black or two classes have a cosine above 0.99, as all greys and shades of one colour
    have; then each class becomes a channel of its own (one-hot).

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
    for k in np.flatnonzero(np.linalg.norm(classes, axis=1) <= NEAR):   # black, or too dark for a direction
        for colours, label in zip(maps, labels):
            own = code_colours(np.unique(colour_codes(colours[label == k])))
            own = own[np.linalg.norm(own - classes[k], axis=1) <= NEAR]
            alike |= (cosines(own, classes[[k]]) <= 0.99).any()
    if not alike:
        return maps, None
    one_hot = np.eye(len(classes), dtype=np.uint8) * np.uint8(255)
    return [one_hot[label] for label in labels], (
        f'{len(classes)} map colours, some black or shades of each other: each is a class of its own.')


def read_maps(inputs, options):
    """Read the maps, if there are any and the method uses them: `inputs` with them, and remarks."""
    (content_map, style_map), remarks = map_pair(inputs, options)
    inputs = inputs._replace(content_map=content_map, style_map=style_map)
    if inputs.content is None:
        if content_map is not None:                                     # a doodle has the size of its map
            inputs = inputs._replace(size=content_map.shape[1::-1])
        check_sizes(inputs, options)
    return inputs, remarks


def map_pair(inputs, options):
    """The maps of both pictures, (H, W, K) uint8 arrays, or None twice if no maps are used; and remarks."""
    if not style_term(options).reads_maps:
        return (None, None), [f'Method {options.method}, which reads no semantic maps.']
    pictures = {'content': (options.content, inputs.content), 'style': (options.style, inputs.style)}
    paths = dict(zip(pictures, map_paths(options)))
    found = [name for name in paths if options.semantic_weight and is_there(paths[name])]
    if not found:
        return (None, None), ['No semantic maps: patches are matched by their features alone.']
    if len(found) == 1:
        missing = paths['style' if found == ['content'] else 'content']
        raise UserError(f'{paths[found[0]]!r} is a map, but {missing!r} is not there.', 'paint that map too, ' +
                        'say --auto-maps, ' * bool(options.content) + 'or leave maps unread with --semantic-weight=0')
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
    channels, remark = map_channels(maps, classes, labels)
    return channels, remarks + [remark] * bool(remark)


def import_automaps():
    """The module of automatic maps."""
    return import_beside('samples/automaps.py')


def require_beside(name, flags):
    """The path of a file of ``samples/`` beside this one; UserError if what `flags` need is not there."""
    if not os.path.isfile(beside(name)):
        raise UserError(f'{flags} needs {beside(name)!r}, which is not there.',
                        f'copy it there from where the script is from, or leave {flags} out')
    return beside(name)


@functools.cache
def import_beside(name, flags='--auto-maps'):
    """A script of ``samples/`` beside this one, as a module; it may import this one, too."""
    path = require_beside(name, flags)
    sys.modules['doodle'] = sys.modules[__name__]                       # not a second copy beside __main__
    spec = importlib.util.spec_from_file_location(os.path.basename(name)[:-3], path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The parts of a portrait, in the colours of the samples' maps and of automatic ones; a collar is in the samples' only.
PARTS = {'background': (0, 0, 255), 'skin': (255, 147, 0), 'eyes': (255, 255, 255), 'brows': (147, 0, 255),
         'nose': (147, 255, 0), 'mouth': (255, 0, 0), 'hair': (255, 0, 147), 'ears': (255, 110, 110),
         'neck': (0, 255, 0), 'clothes': (0, 147, 255), 'collar': (0, 255, 147)}


def part_names(classes):
    """The names of `classes` (K, 3), empty ones unless all are colours of `PARTS`, and some a person's alone."""
    names = {colour: name for name, colour in PARTS.items()}
    found = [names.get(tuple(colour), '') for colour in classes.astype(int).tolist()]
    person = all(found) and 'skin' in found and {'brows', 'neck', 'clothes'}.intersection(found)
    return found if person else [''] * len(found)


def legend(classes, maps, labels):
    """Lines with the share of each class in the maps, and warnings of likely painting mistakes.

    Parameters
    ----------
    classes : (K, 3) array
    maps, labels : dict of str to (H, W, 3) uint8 and (H, W) int arrays
        By the name of their picture, ``'content'`` and ``'style'``.
    """
    names, codes = list(maps), colour_codes(classes.astype(np.int32))
    shares = np.array([np.bincount(labels[name].ravel(), minlength=len(classes)) / labels[name].size for name in names])
    lines = []
    for colour, code, covered, part in zip(classes.astype(int), codes, shares.T, part_names(classes)):
        covered = [f'{name} {share:6.1%}' for name, share in zip(names, covered)]
        lines.append('  '.join([f'{swatch(colour)}#{code:06x}', *covered, part]).rstrip())

    most, owner = [], np.zeros(1 << 24, np.int16)                       # of each map: the commonest colour of a class
    for name in names:
        code = colour_codes(maps[name])
        counts, owner[code] = np.bincount(code.ravel(), minlength=1 << 24), labels[name]
        found = np.flatnonzero(counts)
        found = found[np.argsort(counts[found], kind='stable')]
        most.append(dict(zip(owner[found].tolist(), found.tolist())))   # commoner colours overwrite rarer ones
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


def paint_maps(inputs, options):
    """Paint the missing maps; returns the network and device used, as `find_weights` and `open_device` do."""
    if options.device == 'cpu':
        check_memory(inputs, options)
    automaps = import_automaps()
    known = automaps.read_known(options)
    network, device = find_weights(options), open_device(options, inputs)
    automaps.paint_maps(options, *known, lambda: (network[0], device == 'cpu'))
    return network, device


# ---- files: what a run writes ----------------------------------------------------------------------------------------

def expanded(path):
    """A path with its ~ expanded; UserError if there is no such user, or in a container."""
    user, _, rest = path.partition('/')
    if user.startswith('~') and mounts() is not None:
        home = '$HOME' if user == '~' else f'/home/{user[1:]}'
        raise UserError(f'{path!r}: ~ in a container is not your home.',
                        f'mount that, -v "{home}:{home}", and give the path as "{home}/{rest}"')
    found = os.path.expanduser(path)
    if found.startswith('~') and not os.path.lexists(path):
        raise UserError(f'{path!r}: there is no such user.', f'for a name that begins with ~ give ./{path}')
    return found


def beside(name):
    """The path of a file that lies beside the script, also if that is reached through a link."""
    return os.path.join(os.path.dirname(os.path.realpath(__file__)), name)


def same_file(a, b):
    """Whether two paths, existing or not, name one file."""
    return os.path.realpath(a) == os.path.realpath(b) or all(map(os.path.exists, (a, b))) and os.path.samefile(a, b)


# File systems of the kernel's own, in which nothing is kept.
KERNEL = {'autofs', 'binfmt_misc', 'bpf', 'cgroup', 'cgroup2', 'configfs', 'debugfs', 'devpts', 'devtmpfs', 'efivarfs',
          'fusectl', 'hugetlbfs', 'mqueue', 'nsfs', 'proc', 'pstore', 'securityfs', 'selinuxfs', 'sysfs', 'tracefs'}


def mounts():
    """What is mounted in the program's container, {path: source on the host}; None outside of one.

    The source is None where nothing outlives the container: its own root, the kernel's file systems, a tmpfs made for
    it (a folder of a host's tmpfs is seen by another root than /), single files, caches and secrets.
    """
    if 'DOODLE_CONTAINER' not in os.environ:
        return None
    own, found = (beside(''), os.environ['DOODLE_CONTAINER'] + '/', '/run/secrets/'), {}
    for line in text_of('/proc/self/mountinfo').splitlines():
        fields, (kind, *_) = [part.split() for part in line.split(' - ', 1)]
        root, point = (re.sub(r'\\([0-7]{3})', lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
        lost = point == '/' or kind in KERNEL or kind in ('tmpfs', 'ramfs') and root == '/'
        found[point] = None if lost or f'{point}/'.startswith(own) or not os.path.isdir(point) else root
    return found


def keeping():
    """Those of `mounts` that keep files, {path: source on the host}."""
    return {point: source for point, source in (mounts() or {}).items() if source}


def mount_of(path):
    """The mounted folder that keeps what is at `path`, or None."""
    path = os.path.realpath(path) + '/'
    point = max((point for point in mounts() or () if path.startswith(point.rstrip('/') + '/')), key=len, default=None)
    return point if point in keeping() else None


def mounted():
    """What is mounted, in words."""
    def words(folder):
        entries = f'{len(os.listdir(folder))} entries' if os.access(folder, os.R_OK) else 'not readable'
        return entries + ('' if os.access(folder, os.W_OK) else ', read-only' if is_read_only(folder) else
                          ', not to be written ' + rights(folder))
    return ', '.join(f'{point} from {source} ({words(point)})' for point, source in keeping().items()) or 'nothing'


def is_read_only(folder):
    """Whether a folder is mounted read-only."""
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def existing(folder):
    """`folder`, or the first folder above it that is there."""
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder) or '.'
    return folder


def is_kept(path):
    """Whether a file at `path` can be written and outlives the container, or there is none."""
    return mounts() is None or bool(mount_of(path)) and os.access(existing(os.path.dirname(path) or '.'), os.W_OK)


# Where a run writes its result, a copy that outlives the container or None, and its checkpoint.
Places = namedtuple('Places', 'output copy checkpoint')


def place_output(options):
    """The `Places` of a run.

    An output that would be lost with the container has a copy in a mounted folder; if its own cannot be written, the
    copy is the output. The checkpoint is beside the copy, or else the output. Frames that would be lost go there, too.
    """
    output, copy = options.output, None
    folders = [folder for folder in (mount_of(options.frames), *keeping()) if folder and os.access(folder, os.W_OK)]
    if folders and not is_kept(output):
        copy = os.path.join(folders[0], os.path.basename(output))
        if not os.access(os.path.dirname(output) or '.', os.W_OK):
            output, copy = copy, None
    if folders and not is_kept(options.frames):
        options.frames = os.path.join(os.path.dirname(copy or output), os.path.basename(options.frames))
    return Places(output, copy, (copy or output) + '.checkpoint')


def kept(places):
    """The result's path in words, and in a container whether it is on a mounted folder."""
    path = places.copy or places.output
    if mounts() is None:
        return f'`{path}`'
    mount = mount_of(path)
    return f'`{path}`, ' + (f'on the mounted folder {mount}' if mount else 'which no mounted folder keeps')


def check_files(options, places):
    """Refuse outputs that cannot be written or overwrite inputs."""
    maps = map_paths(options)
    read = [options.content, options.style, options.weights, *maps, __file__, cached_vgg19(), ORIGINAL,
            *map(beside, ('vgg16.npz', ORIGINAL, 'samples/automaps.py', 'samples/faces.py', 'samples/faces.npz',
                             'samples/figure.py', 'samples/watch.html'))]
    read += [] if options.seed in ('noise', 'content') else [options.seed]
    read += map(preview_path, maps) if options.auto_maps else []
    check_written(options, places, read)


FRAME, PAGE = r'\d{4,}\.png', r'watch\.(html|js)'                      # names in the folder of --frames
IN_FRAMES = rf'{FRAME}|command\.txt|run-\d+|{PAGE}'


def check_written(options, places, read):
    """Refuse outputs that would overwrite an input or each other, or cannot be written."""
    frames = [options.frames] if options.save_every else []
    outputs = [('--output', path) for path in filter(None, places)] + [
        (flag, getattr(options, attribute(flag))) for flag in ('--log', '--figure', '--animation')
        if getattr(options, attribute(flag))]
    for flag, path in outputs + [('--frames', path) for path in frames]:
        if any(same_file(path, other) for other in read if other):
            raise UserError(f'{flag} {path!r} is one of the inputs and would overwrite it.', f'choose another {flag}')
    for flag, path in outputs:
        if os.path.isdir(path):
            raise UserError(f'{flag} {path!r} is a folder.', 'add a file name to it')
        if is_special(path) and (flag != '--log' or not is_stream(path)):
            raise UserError(f'{flag} {path!r} is not a file.', f'choose another {flag}')
        if any(same_file(path, folder) or same_file(os.path.dirname(path) or '.', folder) and
               re.fullmatch(IN_FRAMES, os.path.basename(path)) for folder in frames):
            raise UserError(f'{flag} {path!r} has the name of a frame or of the folder of --frames.',
                            f'choose another {flag} or --frames')
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)                                               # a name may be too long
    for (flag, path), (other, place) in itertools.combinations(outputs, 2):
        if flag != other and same_file(path, place):
            what = 'the output or its checkpoint' if flag == '--output' else flag
            raise UserError(f'{other} is the same file as {what}.', f'choose another {other}')
    for path in filter(None, (places.output, options.figure)):
        image_format(path)
    check_drawings(options)
    folders = [(flag, os.path.dirname(given_target(path)) or '.') for flag, path in outputs if not is_special(path)]
    for flag, folder in folders + [('--frames', path) for path in frames]:
        if not options.check or mounts() is None:                       # a container's start has warned
            check_folder(folder, flag, f'choose another {flag}')


def check_drawings(options):
    """Refuse a figure or animation that cannot be drawn."""
    if options.figure or options.animation:
        require_beside('samples/figure.py', '--figure' if options.figure else '--animation')
    if options.animation and not re.search(r'\.(gif|webp|png)$', options.animation, re.IGNORECASE):
        raise UserError(f'--animation {options.animation!r} does not end like one.', 'end it in .gif, .webp or .png')
    if options.animation and not options.save_every:
        raise UserError('--animation is made of frames, and --save-every=0 leaves them out.', 'leave one of them out')


def is_special(path):
    """Whether `path` is a pipe, a device or a socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def is_stream(path):
    """Whether what is no file takes a log: a pipe, a terminal, /dev/null or /dev/full, and no other device."""
    found = os.stat(path)
    return stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode) and (
        os.major(found.st_rdev) in (4, 5, *range(136, 144)) or
        found.st_rdev in (os.makedev(1, 3), os.makedev(1, 7)))


def open_log(path, at):
    """Open a log: at the end of its lines before `at`, if there are any, and without waiting for a reader.

    Returns
    -------
    log : io.FileIO
        To a pipe or terminal that takes no more it writes nothing, and returns None.
    old : int
        Bytes of the lines that were kept.
    """
    for number in (1, 2) if os.path.isfile(path) else ():
        with contextlib.suppress(OSError):                              # it may be closed
            if os.path.samestat(os.stat(path), os.fstat(number)):       # /dev/stdout, a file: to share its position
                return open(os.dup(number), 'wb', buffering=0), 0
    if is_special(path):
        try:
            log = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            log = os.open(path, os.O_RDWR | os.O_NONBLOCK)              # a FIFO that nobody reads yet
        return open(log, 'wb', buffering=0), 0
    old = 0
    if at.number and os.path.isfile(path):
        with open(path, 'rb') as file:
            old = sum(map(len, itertools.takewhile(lambda line: is_before(line, at), file)))
    log = open(path, 'ab', buffering=0)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)                 # another run may have it by another name
    except BlockingIOError:
        log.close()
        raise UserError(f'--log {path!r} is being written by another run.', 'choose another --log') from None
    except OSError:                                                     # some file systems have no locks
        pass
    log.truncate(old)
    return log, old


def check_folder(folder, flag, fix):
    """Refuse a folder that cannot be written, or made; it is made by what writes there first."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)                                             # its name may be too long
        tempfile.TemporaryFile(dir=existing(folder)).close()
    except PermissionError:
        raise UserError(f'{flag}: the folder {folder!r} cannot be written: Permission denied, it may not be written '
                        f'{rights(existing(folder))}.', allowing(fix)) from None
    except OSError as error:
        raise UserError(f'{flag}: the folder {folder!r} cannot be written: {error.strerror}.', fix) from None


def can_be_written(folder):
    """Whether a file can be made in a folder."""
    try:
        check_folder(folder, '', '')
    except UserError:
        return False
    return True


TRANSPARENT = 'PNG', 'WEBP', 'TIFF', 'AVIF'                           # formats in which alpha is kept


def image_format(path):
    """Pillow's name of the format for the ending of `path`."""
    name = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    try:
        Image.new('RGB', (1, 1)).save(io.BytesIO(), format=name)
    except (KeyError, ValueError, OSError):
        raise UserError(f'{path!r} does not end like a picture that can be written.',
                        'end it in .png or .jpg') from None
    return name


UMASK = os.umask(0)
os.umask(UMASK)


def hidden(path):
    """How the names of temporary files and of the lock for `path` begin, all in its folder."""
    return f'.doodle-{zlib.crc32(os.fsencode(os.path.basename(path))):08x}-'


def given_target(path):
    """The file to write for `path`: where a symbolic link leads, which stays one, unless another user laid it there."""
    return os.path.realpath(path) if os.path.islink(path) and os.lstat(path).st_uid in (os.geteuid(), 0) else path


def opened_file(path, flags):
    """The descriptor of a file whose name the program made up; OSError if it is a link, a FIFO or the like."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, 'it is not a file', path)
    return descriptor


def is_at(path, file):
    """Whether the open `file` is still the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    return False


@contextlib.contextmanager
def locked(path):
    """A block in which no other run has `path` as output or log; gives remarks. A run that dies frees it.

    The lock is that of a file beside `path`, which holds process and host, and is removed at the end.

    Raises
    ------
    UserError
        Another run has it.
    """
    path, remarks, file = given_target(path), [], None
    if os.path.exists(path) and not os.path.isfile(path):               # a device or a pipe
        yield remarks
        return
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    place = os.path.join(os.path.dirname(path), hidden(path) + 'lock')
    with contextlib.ExitStack() as files:
        try:
            while not file or not is_at(place, file):                   # else its run removed it just now
                file = files.enter_context(open(opened_file(place, os.O_RDWR | os.O_CREAT), 'r+', errors='replace'))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), 0o666)                         # whoever may write here may find out
            file.truncate(0)
            file.write(f'{os.getpid()} {socket.gethostname()}\n')
            file.flush()
        except BlockingIOError:
            found = re.match(r'([0-9]{1,10}) (.*)', file.read(300))
            number, host = found.groups() if found else ('unknown', '')
            where = '' if host in ('', socket.gethostname()) else f' on host {host!r}'
            raise UserError(f'{path!r} is being written by another run, process {number}{where}.',
                            'wait until it ends, or choose another name') from None
        except OSError as error:
            remarks = [bold(f'WARNING: `{path}` cannot be locked: {error.strerror}. Two runs that write it would not '
                            'notice each other. FIX: start one at a time.')]
        if file:
            files.callback(remove, place, file)
        yield remarks


def remove(path, file):
    """Remove the open `file`, whose lock this process has, if it is still the one at `path`."""
    with contextlib.suppress(OSError):
        if is_at(path, file):
            os.unlink(path)


@contextlib.contextmanager
def written_whole(path, durable=False):
    """Write a binary file atomically: it appears at `path` at the end of the block, or not at all.

    A file that was there passes its mode on. What is `durable` survives a loss of power once it is there.
    """
    folder = os.path.dirname(path) or '.'
    os.makedirs(folder, exist_ok=True)                                  # it may have been removed since `check_folder`
    prefix = hidden(path)
    names = fnmatch.filter(os.listdir(folder), prefix + '*') if os.access(folder, os.R_OK) else ()
    for name in (os.path.join(folder, name) for name in names):
        with contextlib.suppress(OSError), open(name, opener=opened_file) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)            # unlocked: left by a killed run
            remove(name, file)
    while True:
        temporary = tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, delete=False)
        with contextlib.suppress(OSError):                              # some file systems have no locks
            fcntl.flock(temporary, fcntl.LOCK_EX)
        if is_at(temporary.name, temporary):                            # else a run removed it before it was locked
            break
        temporary.close()
    try:
        with temporary as file:
            yield file
            file.flush()
            before = os.path.isfile(path) and not os.path.islink(path)
            os.fchmod(file.fileno(), os.stat(path).st_mode & 0o777 if before else 0o666 & ~UMASK)    # it has 0600
            if durable:
                os.fsync(file.fileno())
            os.replace(temporary.name, path)                            # while it is locked
            if durable:
                sync_folder(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary.name)
        raise


def sync_folder(folder):
    """Have the disk know which files are in a folder; not all file systems can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_picture(rgb, path, durable=False, **options):
    """Write `rgb`, (H, W, 3) uint8 or with alpha (H, W, 4), in the format of the ending of `path`."""
    write_image(Image.fromarray(np.ascontiguousarray(rgb)), path, durable, quality=95, **options)


def write_image(image, path, durable=False, **options):
    """Write a Pillow image, in the format of the ending of `path`, with Pillow's `options`."""
    with written_whole(path, durable) as file:
        image.save(file, format=image_format(path), **options)


def claim_frames(folder):
    """A folder for this run's frames: `folder` itself, or the first of its ``run-2``, ``run-3``, ... that is new.

    A run claims a folder by creating ``command.txt`` in it, which holds the command line.
    """
    for number in itertools.count(1):
        place = folder if number == 1 else os.path.join(folder, f'run-{number}')
        if place != folder and os.path.islink(place):                   # another user may have laid it there
            continue
        os.makedirs(place, exist_ok=True)
        if not any(re.fullmatch(f'{FRAME}|{PAGE}', name) for name in os.listdir(place)):
            command = os.path.join(place, 'command.txt')
            with contextlib.suppress(FileExistsError), open(command, 'x', errors='surrogateescape') as file:
                file.write(' '.join(sys.argv) + '\n')
                return place


@dataclasses.dataclass
class Checkpoint:
    """The state of a run between two evaluations: all that `--resume` needs."""

    header: dict                                                        # its `provenance`
    phase: int = 0
    evaluation: int = 0                                                 # number of evaluations in this phase
    number: int = 0                                                     # and in all phases
    error: float = 255.                                                 # running mean of the largest |gradient|
    frames: str = None                                                  # the folder of `claim_frames`
    minimiser: Minimiser = None
    memory: dict = None                                                 # `Objective.state`
    losses: list = dataclasses.field(default_factory=list)              # (number, total, each term) by evaluation
    restarts: dict = dataclasses.field(default_factory=dict)            # {`Minimiser.restart`: [evaluation, error]}
    cycle: int = 0                                                      # evaluations that a converged phase repeats
    excess: float = 0.                # how far `error` still is from the value that the cycle brings it to
    starts: list = dataclasses.field(default_factory=list)              # `number` at the start of each phase so far

    def begin(self, phase, image, objective):
        """Start a phase from an image."""
        self.phase, self.evaluation, self.error = phase, 0, 255.
        self.minimiser, self.memory, self.restarts = Minimiser(image), objective.state(), {}
        self.cycle, self.excess, self.starts = 0, 0., [*self.starts, self.number]

    def compute_with(self, **what):
        """Note what a run computes with; where that was something else before, what repeated itself need not now."""
        if what != {name: self.header.get(name) for name in what}:
            self.cycle, self.restarts = 0, {}
        self.header |= what

    def left(self, options):
        """How many evaluations each phase still has to make: earlier ones may have had fewer than now are asked for."""
        later = [options.iterations] * (options.phases - self.phase - 1)
        return [0] * self.phase + [options.iterations - self.evaluation] + later

    def count(self, largest):
        """Count an evaluation, whose `largest` |gradient| of a pixel is known."""
        self.evaluation, self.number = self.evaluation + 1, self.number + 1
        self.error, self.excess = 0.9 * self.error + 0.1 * min(largest, 255), 0.9 * self.excess

    def skip(self, iterations, journal):
        """Count as done, and record, what is certain to repeat: whole cycles, but for the last evaluation of a phase.

        Where the minimiser starts anew as it did before, all between repeats itself for ever.
        """
        if not self.cycle and not self.memory['fresh'] and (state := self.minimiser.restart()):
            before, error = self.restarts.setdefault(state, [self.evaluation, self.error])
            if cycle := self.evaluation - before:                       # after each, `error` is nearer to a limit
                limit = (self.error - 0.9 ** cycle * error) / (1 - 0.9 ** cycle)
                self.cycle, self.excess = cycle, self.error - limit
        if skipped := self.cycle and (iterations - 1 - self.evaluation) // self.cycle * self.cycle:
            journal.skip(self, self.cycle, skipped)
            self.evaluation, self.number = self.evaluation + skipped, self.number + skipped
            limit, self.excess = self.error - self.excess, 0.9 ** skipped * self.excess
            self.error = min(max(0., limit + self.excess), 255.)


def provenance(inputs, weights, options):
    """Provenance of a run, as JSON: the log's first line, and what `--resume` compares."""
    checksums = {name: None if array is None else hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
                 for name, array in inputs._asdict().items() if name != 'size'}
    return json.loads(json.dumps(dict(
        version=__version__, device=options.device, network=weights.kind,
        weights=dict(path=weights.path, sha256=weights.sha256), random_seed=options.random_seed, options=vars(options),
        inputs=checksums, shapes=dict(output=inputs.size[::-1], style=inputs.style.shape[:2],
                                      map_channels=0 if inputs.style_map is None else inputs.style_map.shape[2]))))


FORMAT = 4                                                            # of checkpoints
HEAD = 'doodle.py {}, checkpoint of format {}, sha256 {}\n'            # their first line: checksum of the rest


def write_checkpoint(path, at):
    """Write a `Checkpoint`: the `HEAD`, its numbers as a line of JSON, then the bytes of its arrays."""
    state = at.minimiser.state() | at.memory | dict(losses=np.array(at.losses, np.float64))
    arrays = {name: value for name, value in state.items() if value.ndim}
    numbers = {field.name: getattr(at, field.name) for field in dataclasses.fields(at)
               if field.name not in ('minimiser', 'memory', 'losses')}
    numbers |= dict(state={name: value.item() for name, value in state.items() if not value.ndim},
                    arrays={name: (value.dtype.str, value.shape) for name, value in arrays.items()})
    parts = [json.dumps(numbers).encode() + b'\n', *map(np.ascontiguousarray, arrays.values())]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    with written_whole(path, durable=True) as file:
        file.writelines([HEAD.format(__version__, FORMAT, digest.hexdigest()).encode(), *parts])


def find_checkpoint(path, header, resume):
    """Where a run begins: the `Checkpoint` at `path` if it is to go on from there, else a new one; and remarks.

    Parameters
    ----------
    path : str
    header : dict
        `provenance` of the run. If it has no random seed, the checkpoint's is taken, or one is drawn.
    resume : bool
    """
    remarks = []
    if resume and os.path.exists(path):
        at = read_checkpoint(path, header)
        line = going_on(path, at, at.header['options']['iterations'], argparse.Namespace(**header['options']))
        at.header = header | {name: at.header.get(name) for name in ('random_seed', 'device', 'slices', 'threads')}
        return at, [line]
    if os.path.exists(path):
        remarks = [f'`{path}` of a run before will be replaced by the first of this run; --resume would go on.']
    elif resume:
        remarks = [f'There is no `{path}` to resume from: starting anew.']
    if header['random_seed'] is None:
        header = header | {'random_seed': secrets.randbelow(10 ** 9)}
    return Checkpoint(header), remarks


def going_on(path, at, before, options):
    """What is to be said of the `Checkpoint` at `path`, of a run with so many iterations `before`."""
    more = f', with {options.iterations} instead of {before} in phase #{at.phase}' + ' and later ones' * (
        at.phase < options.phases - 1)
    if not any(at.left(options)):
        return (f'The run of `{path}` has ended after {at.number} evaluations: nothing is left to do; it goes on with '
                f'--resume and more than --iterations={before}.')
    return f'Going on from `{path}`, after {at.number} evaluations{more * (options.iterations > before)}.'


def read_checkpoint(path, header):
    """The `Checkpoint` at `path`, from which the run of this `header` is to go on.

    Raises
    ------
    UserError
        It is broken, of another format, or of another run.
    """
    restart = 'leave --resume out, to start anew'
    try:
        with open(path, 'rb', opener=opened_file) as file:
            check_head(file, path, header, restart)
            numbers, state = read_state(file)
        at = Checkpoint(**numbers, losses=read_losses(state.pop('losses'), numbers['number']))
        differences = differing(at.header, header)
        if not differences:
            at.minimiser = check_progress(at, header)
            at.minimiser.restore(state)
            at.memory = {name: value for name, value in state.items() if name not in vars(at.minimiser)}
    except UserError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise UserError(f'{path!r} cannot be read as a checkpoint: {one_line(error)}.', f'delete it, or {restart}'
                        ) from None
    for name, before, after in differences:
        values = f': {before!r:.99} then, {after!r:.99} now' if name.startswith('--') else ''
        raise UserError(f'{path!r} is of a run in which {name} was another{values}.',
                        f'resume with what it was{" or more" * (name in flags_of(MORE))}, or {restart}')
    folder = os.path.realpath(header['options']['frames'])
    if (at.header['options'].get('frames') != header['options']['frames'] or not os.path.isdir(at.frames or '') or
            os.path.commonpath([os.path.realpath(at.frames), folder]) != folder):
        at.frames = None                                                # claim a folder anew
    return at


def foreign(what):
    """The error of a checkpoint that fits this run but for its `what`, as one that was tampered with."""
    return UserError(f'The checkpoint cannot be used: its {what} are not those of this run.',
                     'leave --resume out, to start anew')


def check_head(file, path, header, restart):
    """Refuse a checkpoint of another format, one too large for the run of `header`, or one that is damaged."""
    line = file.readline(200)
    head = re.fullmatch(HEAD.format(r'([\w.]{1,20})', r'(\d{1,9})', '([0-9a-f]{64})').encode(), line)
    if not head and b"NUMPY\x01\x00v\x00{'descr': '<U" not in line:   # a string: format 1
        raise ValueError('it does not begin like one')
    version, number, checksum = map(bytes.decode, head.groups()) if head else ('(an earlier one)', '1', None)
    if number != str(FORMAT):
        raise UserError(f'{path!r} is a checkpoint of format {number} by doodle.py {version}, and this is '
                        f'{__version__}, whose format is {FORMAT}.', f'resume with that version, or {restart}')
    pixels = math.prod(header['shapes']['output']) + copy_count(argparse.Namespace(**header['options'])) * math.prod(
        header['shapes']['style'])
    if os.fstat(file.fileno()).st_size > 5000 * pixels + 10 ** 7:       # ten times what this run could write
        raise ValueError('it is far larger than one of this run')
    place = file.tell()
    if hashlib.file_digest(file, 'sha256').hexdigest() != checksum:
        raise ValueError('it is damaged, as its checksum tells')
    file.seek(place)


def read_state(file):
    """What follows the `HEAD` of a checkpoint: its numbers, and the state of minimiser and objective."""
    numbers = json.loads(file.readline())
    kinds, state = numbers.pop('arrays'), {name: np.array(value) for name, value in numbers.pop('state').items()}
    counts = [math.prod(shape) for _, shape in kinds.values()]
    if any(kind not in ('<f8', '<f4', '<i8', '<i4') or min(shape) < 0 for kind, shape in kinds.values()):
        raise ValueError('it has arrays of another kind')
    if sum(count * int(kind[2]) for count, (kind, _) in zip(counts, kinds.values())) != (
            os.fstat(file.fileno()).st_size - file.tell()):
        raise ValueError('its arrays are not as long as they should be')
    for count, (name, (kind, shape)) in zip(counts, kinds.items()):
        state[name] = np.fromfile(file, kind, count).reshape(shape)
    return numbers, state


def read_losses(losses, count):
    """The rows of ``Checkpoint.losses`` from their array in a file, of a run of so many evaluations."""
    numbers = losses[..., 0]
    if not (losses.ndim == 2 and losses.dtype == np.float64 and np.isfinite(losses).all() and
            (numbers == numbers // 1).all() and (numbers[1:] > numbers[:-1]).all() and
            ((0 <= numbers) & (numbers < count)).all()):
        raise ValueError('its losses are none of a run')
    return [(int(number), *terms) for number, *terms in losses.tolist()]


def check_progress(at, header):
    """A `Minimiser` of the size of the phase that a checkpoint is in; ValueError if its numbers are none of a run's."""
    phases, iterations = header['options']['phases'], at.header['options']['iterations']
    if not (all(type(number) is int for number in (at.phase, at.evaluation, at.number, at.cycle, *at.starts)) and
            0 <= at.phase == len(at.starts) - 1 < phases and 0 <= at.evaluation <= iterations and
            0 == at.starts[0] < at.number == at.starts[-1] + at.evaluation and
            all(0 < after - before <= iterations for before, after in itertools.pairwise(at.starts)) and
            0 <= at.cycle <= at.evaluation and type(at.excess) is float and abs(at.excess) <= 256 and
            type(at.error) is float and 0 <= at.error <= 255 and type(at.frames) in (str, type(None)) and
            sound_restarts(at) and type(at.header['random_seed']) is int and 0 <= at.header['random_seed'] < 10 ** 9):
        raise ValueError('its numbers are none that a run counts')
    return Minimiser(np.zeros((3, *phase_size(header['shapes']['output'], at.phase, phases))))


def sound_restarts(at):
    """Whether the `restarts` of a checkpoint are of evaluations in its phase."""
    return type(at.restarts) is dict and all(
        type(evaluation) is int and 0 < evaluation <= at.evaluation and type(error) is float and 0 <= error <= 255
        for evaluation, error in at.restarts.values())


def flags_of(rule):
    """The options that follow a rule on --resume."""
    return [flag for rows in OPTIONS.values() for flag, resume, *_ in rows if resume == rule]


def differing(then, now):
    """Differences between the `provenance` of a checkpoint and that of this run, as (name, then, now)."""
    inputs, noisy = now['inputs'], now['options']['seed'] == 'noise'
    same = (then['inputs'], then['shapes']) == (inputs, now['shapes'])
    # Options without effect in this run, or whose effect on pictures and sizes is compared instead.
    unused = {'max_size': same, 'output_size': same, 'seed': inputs['seed'], 'seed_range': not noisy,
              'content_weight': same and not inputs['content'], 'content_layers': same and not inputs['content'],
              'semantic_weight': same and not inputs['style_map']}
    seed = then['random_seed'] if now['random_seed'] is None or not noisy else now['random_seed']
    checksum = now['weights']['sha256'] or then['weights']['sha256']    # --check knows none
    pairs = [(flag, then['options'][attribute(flag)], now['options'][attribute(flag)])
             for flag in flags_of(SAME) + flags_of(MORE) if not unused.get(attribute(flag))]
    pairs += [(f'the picture `{name}`', then['inputs'].get(name), inputs[name]) for name in inputs]
    pairs += [('the size', then['shapes'], now['shapes']),
              ('the file of weights', then['weights']['sha256'], checksum),
              ('--random-seed', then['random_seed'], seed)]
    return [(name, before, after) for name, before, after in pairs if before != after and not (
        name in flags_of(MORE) and type(before) is int and before < after)]


def is_before(line, at):
    """Whether a line of a log is complete, and is the header or an evaluation before the `Checkpoint`."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        entry = json.loads(line)
        known = at.phase, at.evaluation
        return line.endswith(b'\n') and ('inputs' in entry or (entry['phase'], entry['evaluation']) < known)
    return False


WAITING = 16 << 20                                                     # bytes of a log that its reader may let wait


class Journal:
    """The output of a run: lines, progress bar, frames, log, checkpoints, result.

    A file that cannot be written does not end a run, but is warned of, once for each path.

    Parameters
    ----------
    options : argparse.Namespace
    places : Places
    inputs : Inputs
        The content's colours and transparency may be kept.
    at : Checkpoint
        Where the run begins; a resumed run continues its log from there.
    """

    def __init__(self, options, places, inputs, at):
        self.options, self.places, self.inputs, self.saved, self.told = options, places, inputs, None, set()
        self.page, self.names = Page(options, inputs), None             # names of the losses, once a phase began
        self.safe = self.tried = at.number                              # evaluations in the run's checkpoint, or 0
        self.bar = tqdm(total=at.number + sum(at.left(options)), initial=at.number, disable=None, leave=False)
        self.log, self.unwritten = None, b''
        if options.log:
            self.log, old = open_log(options.log, at)
            if not old:
                self.write_log(at.header | dict(starts=at.starts))

    @contextlib.contextmanager
    def spared(self, path):
        """Turn an OSError in the block, which writes to `path`, into a warning, once for each path."""
        try:
            yield
        except OSError as error:
            if path not in self.told:
                self.warn(f'`{path}` cannot be written: {error.strerror or one_line(error)}. The run goes on. '
                          'FIX: make room, or let the folder be written')
            self.told.add(path)

    def say(self, text):
        """A line above the progress bar."""
        self.bar.clear()
        say(text)

    def warn(self, text):
        """A warning above the progress bar."""
        self.say(bold(f'WARNING: {text}.'))

    def begin(self, at, size, objective):
        """Describe the phase that begins; `size` is (width, height)."""
        scale = 1 / 2 ** (self.options.phases - 1 - at.phase)
        self.say(f'\n{bold(f"Phase #{at.phase}")}: resolution {size[0]}x{size[1]}  scale {scale}')
        for layer, term in objective.style.items():
            self.say(f'  - Style layer {layer}: {term.describe()}.')
        for layer, target in objective.target.items():
            shape = target.get_value(borrow=True, return_internal_type=True).shape
            self.say(f'  - Content layer conv{layer}: {shape[2]} features in {4 * math.prod(shape) // 1000:,}kb.')
        if at.cycle:
            self.say(f'  - Phase #{at.phase} has converged: it only repeats its last {at.cycle} evaluations.')
        self.say('')
        self.since = time.time()
        self.names = ['total', *(f'content conv{layer}' for layer in objective.target),
                      *(f'style conv{layer}' for layer in objective.style), 'smoothness']
        if at.losses and len(at.losses[0]) != 1 + len(self.names):
            raise foreign('losses')
        self.page.begin(at)

    def pixels(self, x, size):
        """The image `x` (3, H, W) as (height, width, 3) uint8 RGB, at `size`, in the content's colours if so wished."""
        rgb = to_pixels(x, size)
        return recolored(rgb, resized(self.inputs.content, size, Image.LANCZOS)) if self.options.keep_colors else rgb

    def record(self, at, x, evaluation, largest):
        """Write line, frame and log entry of the evaluation of `x` (3, H, W), which `at` has just counted."""
        number, every = at.number - 1, self.options.print_every         # counts from 0
        at.losses.append((number, evaluation.total, *evaluation.content.values(), *evaluation.style.values(),
                          evaluation.smooth))
        if every and number % every == 0:
            self.say(progress_line(number, evaluation, at.error, time.time() - self.since))
            self.since = time.time()
        if (at.phase, at.evaluation) == (0, self.options.iterations) and (
                remark := lost_content(evaluation, self.options)):
            self.say(remark)
        if self.options.save_every and number % self.options.save_every == 0:
            with self.spared(self.options.frames):
                at.frames = at.frames or claim_frames(self.options.frames)
                write_picture(self.pixels(x, x.shape[:0:-1]), os.path.join(at.frames, f'{number:04d}.png'))
        self.show(at, 'running')
        self.write_log(dict(
            phase=at.phase, evaluation=at.evaluation - 1, total=evaluation.total, content=evaluation.content,
            style=evaluation.style, smooth=evaluation.smooth, gradient_l2=float(np.linalg.norm(evaluation.gradient)),
            gradient_max=largest, seconds=evaluation.seconds,
            matching_seconds=evaluation.matching_seconds))
        self.bar.update()

    def show(self, at, state):
        """Renew the page beside the frames."""
        if self.names and at.frames and self.options.save_every:
            with self.spared(at.frames):
                self.page.show(at, self.names, state)

    def finish(self, at, state):
        """Once result and checkpoint are safe, the page's last state, and figure and animation where wished."""
        self.show(at, state)
        for path, draw in (self.options.figure, write_figure), (self.options.animation, write_animation):
            if self.names and path and at.losses:
                with self.spared(path):
                    self.say(draw(given_target(path), self, at))

    def write_log(self, entry):
        """Append one line of JSON, after those that could not be written before, of which 16 MB wait."""
        if self.log:
            line = json.dumps(entry).encode() + b'\n'
            if len(self.unwritten) + len(line) <= WAITING:
                self.unwritten += line
            else:
                self.lose_lines()
            self.write_on()

    def write_on(self):
        """Write what waits for the log, or as much as its reader takes now."""
        with self.spared(self.options.log):
            while self.unwritten and (written := self.log.write(self.unwritten)):
                self.unwritten = self.unwritten[written:]

    def lose_lines(self):
        """Say once that lines of the log are lost."""
        if 'lost lines' not in self.told:
            self.warn(f'`{self.options.log}` is read too slowly: lines are lost. FIX: read faster, or log to a file')
        self.told.add('lost lines')

    def close(self):
        """End progress bar and log."""
        self.bar.close()
        if self.log:
            self.write_on()
            if self.unwritten and self.options.log not in self.told:
                self.lose_lines()
            self.log.close()

    def skip(self, at, cycle, skipped):
        """Say that the phase only repeats its last `cycle` evaluations, and that `skipped` more are not made."""
        self.say(f'  - After {at.evaluation} evaluations this phase has converged: it would repeat the last {cycle} '
                 f'for ever, and skips {skipped}.')
        self.write_log(dict(phase=at.phase, evaluation=at.evaluation, cycle=cycle, skipped=skipped))
        self.page.first += skipped                                      # they take no time
        if not self.bar.disable:
            for name in 'initial', 'n', 'last_print_n':
                setattr(self.bar, name, getattr(self.bar, name) + skipped)
            self.bar.refresh()

    def keep(self, at):
        """Write a checkpoint every 10 evaluations, or as often as frames if that is more often."""
        every = min(self.options.save_every or 10, 10)
        passed = at.number // every > self.tried // every               # a multiple of 10, perhaps by a skip
        if at.number and (passed or at.number % every == 0):
            self.tried = at.number
            with self.spared(self.places.checkpoint):
                write_checkpoint(self.places.checkpoint, at)
                self.safe = at.number

    def keep_last(self, at):
        """Write a checkpoint as the run ends; if it cannot be written, say what there is. Whether it is written."""
        path = self.places.checkpoint
        try:
            write_checkpoint(path, at)
            return True
        except OSError as error:
            found = self.safe and os.path.exists(path)
            left = f'that of {self.safe} evaluations is kept' if found else 'this run leaves no checkpoint'
            self.warn(f'`{path}` cannot be written: {error.strerror or one_line(error)}; {left}. FIX: make room, or '
                      f'let the folder be written, and {"--resume" if found else "run it again"}')
            return False

    def save(self, at, last=True):
        """Save the last accepted image; at the `last` time to any folder that can be written. Whether it is saved."""
        if not at.number or self.saved is at.minimiser.image:
            return at.number > 0
        picture, done = self.pixels(at.minimiser.image, self.inputs.size), False
        if self.inputs.content_alpha is not None and image_format(self.places.output) in TRANSPARENT:
            picture = np.dstack([picture, self.inputs.content_alpha])
        for path in filter(None, (self.places.output, self.places.copy)):
            done = False
            with self.spared(path):
                write_picture(picture, given_target(path), durable=True)
                done = True
        for folder in (self.options.frames, '.', '~', tempfile.gettempdir(), '/dev/shm') if last and not done else ():
            name = f'doodle-{secrets.token_hex(4)}-{os.path.basename(self.places.output)}'
            path = os.path.join(os.path.expanduser(folder), name)
            with contextlib.suppress(OSError):
                write_picture(picture, path, durable=True)
                self.places, done = self.places._replace(output=path, copy=None), True
                break
        self.saved = at.minimiser.image if done else None
        return done


def frame_names(at):
    """Names of a run's frames so far, in order."""
    found = os.listdir(at.frames) if os.path.isdir(at.frames or '') else []
    numbers = {name: int(name[:-4]) for name in found if re.fullmatch(FRAME, name, re.ASCII)}
    return sorted((name for name, number in numbers.items() if number < at.number), key=numbers.get)


class Page:
    """The page beside a run's frames, which shows the run in a browser: ``watch.html``, and its data in ``watch.js``.

    Parameters
    ----------
    options : argparse.Namespace
    inputs : Inputs
    """

    POINTS = 1000                                                       # most evaluations of the curves

    def __init__(self, options, inputs):
        self.options, self.inputs, self.shown = options, inputs, 0
        self.costs = [evaluation for _, evaluation in efforts(inputs, options)]

    def begin(self, at):
        """A phase begins, or goes on."""
        self.start, self.first = time.time(), at.number

    def show(self, at, names, state):
        """Write what the page shows; while the run is 'running' at most every two seconds."""
        now, left = time.time(), at.left(self.options)
        if state == 'running' and now < self.shown + 2:
            return
        if not self.shown or not os.path.isfile(os.path.join(at.frames, 'watch.html')):
            self.write_page(at.frames)
        seconds = (now - self.start) / max(1, at.number - self.first)
        rest = sum(count * cost for count, cost in zip(left, self.costs)) / self.costs[at.phase]
        newest = next(reversed(frame_names(at)), None)
        write_text(os.path.join(at.frames, 'watch.js'), 'watch({})\n'.format(json.dumps(dict(
            state=state, time=now, number=at.number, total=at.number + sum(left), phase=at.phase,
            phases=self.options.phases, seconds=seconds, left=seconds * rest, names=names,
            frame=newest, losses=at.losses[::1 + len(at.losses) // self.POINTS]))))
        self.shown = now

    def write_page(self, folder):
        """Write ``watch.html`` from that in ``samples/``, where it is; pictures and names are inside it."""
        template = beside('samples/watch.html')
        if not os.path.isfile(template):
            return
        facts = dict(title=os.path.basename(self.options.output), size=self.inputs.size, before=None)
        if self.inputs.content is not None:
            small = io.BytesIO()
            Image.fromarray(limited(self.inputs.content, 640, Image.LANCZOS)).save(small, 'JPEG', quality=85)
            facts['before'] = 'data:image/jpeg;base64,' + base64.b64encode(small.getvalue()).decode()
        with open(template, encoding='utf-8') as file:                  # <: a name cannot end the script
            page = file.read().replace('FACTS</', json.dumps(facts).replace('<', r'\u003c') + '</')
        write_text(os.path.join(folder, 'watch.html'), page)


def write_text(path, text):
    """Write a text file atomically."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_figure(path, journal, at):
    """Write the run's figure; returns a line that says so."""
    figure, last = import_beside('samples/figure.py', '--figure'), at.losses[-1][0]
    panels = figure.panels_of(journal.inputs, journal.pixels(at.minimiser.image, journal.inputs.size))
    starts = [start for start in at.starts if start <= last]
    write_image(figure.figure(panels, journal.names, at.losses, starts), path)
    return f'  - Figure: `{path}`.'


def write_animation(path, journal, at):
    """Write the animation of the run's frames; returns a line that says so, or why not."""
    frames = [os.path.join(at.frames, name) for name in frame_names(at)]
    if not frames:
        return '  - There are no frames, and so no animation.'
    (first, *rest), durations = import_beside('samples/figure.py', '--figure').animation(frames, journal.inputs.size)
    write_image(first, path, save_all=True, append_images=rest, duration=durations, loop=0)
    return f'  - Animation: `{path}`.'


def paint_and_save(objective, inputs, options, at, journal):
    """Paint, and save the image also after an error or signal; returns the exit code."""
    start, device, places, begun = time.time(), at.header['device'], journal.places, at.number
    try:
        with contextlib.closing(journal), Signals() as signals:
            paint(objective, inputs, options, at, journal, signals)
    except KeyboardInterrupt as interruption:
        saved = 'there is nothing to save' if not at.number else 'the image so far could be written nowhere'
        if journal.save(at):
            saved = f'the image so far is in {kept(journal.places)}'
        if at.number and journal.keep_last(at):
            saved += '; --resume goes on from there'
        journal.finish(at, 'been interrupted')
        say(f'\n{bold("Interrupted")} after {at.number} evaluations on device `{device}`: {saved}.')
        return 128 + interruption.args[0]
    except FloatingPointError as error:
        saved = f'the last good image is in {kept(journal.places)}' if journal.save(at) else 'nothing was saved'
        journal.show(at, 'failed')
        problem = one_line(error)
        raise UserError(f'{problem[0].upper()}{problem[1:]} after {at.number} evaluations; {saved}.',
                        'try smaller weights, or another --random-seed') from None
    except UserError:                                                   # a checkpoint that was tampered with
        raise
    except Exception:                                                   # for example a lack of memory
        if journal.save(at):
            say(f'\nAfter {at.number} evaluations the image so far is in {kept(journal.places)}.')
        journal.show(at, 'failed')
        raise
    if journal.saved is None:
        raise UserError('The result could not be written anywhere.', 'make room, and --resume')
    if options.keep_checkpoint and journal.keep_last(at):
        say(f'  - Checkpoint: `{places.checkpoint}`; --resume with more --iterations goes on from there.')
    journal.finish(at, 'ended')
    if journal.safe and at.number > begun and not options.keep_checkpoint:              # else it is of a run before
        with contextlib.suppress(OSError):
            os.unlink(places.checkpoint)
    say(f'\n{bold("Optimization finished")} in {time.time() - start:.1f}s, average pixel error {at.error:.1f}, '
        f'on device `{device}`: {kept(journal.places)}.')
    return 0


# ---- files: what a run says ------------------------------------------------------------------------------------------

def one_line(error):
    """The message of an exception, or a text, in one line, without a full stop; libgpuarray's are bytes."""
    parts = getattr(error, 'args', ())
    text = b' '.join(parts).decode() if parts and type(parts[0]) is bytes else str(error)
    return ' '.join(text.split()).rstrip('.') or type(error).__name__


def say(text=''):
    """Print a line, with escapes for characters that the terminal lacks."""
    encoding = sys.stdout.encoding or 'utf-8'
    try:
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)
    except OSError:                                                     # the reader is gone: go on silently
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
    """The line of an evaluation: losses divided by 1000, quality (from the gradient, see `Checkpoint.error`), time."""
    def by_layer(kind, losses):
        terms = '  '.join(f'{layer} {loss / 1000:.2e}' for layer, loss in losses.items())
        return f'   {kind} {terms}' if losses else ''
    return (f'{number:>3}   loss {evaluation.total / 1000:.2e}' + by_layer('content', evaluation.content) +
            by_layer('style', evaluation.style) + f'   quality {100 - 100 * math.sqrt(error / 255):>4.1f}%'
            f'   time {seconds:.1f}s')


def lost_content(evaluation, options):
    """A warning if the content is less than 1 % of the loss; None if not, or if its weight is below 1 by choice."""
    content = sum(evaluation.content.values())
    if not style_term(options).patched or options.content_weight < 1 or not 0 < content < 0.01 * evaluation.total:
        return None
    weight = options.content_weight * (evaluation.total / content - 1)  # makes it half of this loss
    return bold(f'WARNING: after the first phase the content is {100 * content / evaluation.total:.1g} % of the loss, '
                f'and hardly to be seen. FIX: --content-weight={float(f"{weight:.0e}"):.0f}.')


# Ctrl-C, `docker stop`, and a terminal that closes; what the caller has ignored stays so, as by nohup.
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
           if signal.getsignal(number) != signal.SIG_IGN]


def handle_signals(handler):
    """Set the handler of `SIGNALS`."""
    for number in SIGNALS:
        signal.signal(number, handler)


def interrupt(number, frame):
    """Signal handler: raise KeyboardInterrupt, and ignore further signals while the image is saved."""
    handle_signals(signal.SIG_IGN)
    raise KeyboardInterrupt(number)                                     # Theano would wrap a subclass


class Signals:
    """A block that defers `SIGNALS` to its next part in `heard`, so that no write is cut short.

    They are deferred by the handler: if this thread blocked them, OpenMP's threads would receive them.
    """

    def __enter__(self):
        self.waiting = None
        handle_signals(self.wait)
        return self

    def __exit__(self, *_):
        handle_signals(signal.SIG_IGN)                                  # the result is being saved

    def wait(self, number, frame):
        """Signal handler: remember the signal."""
        self.waiting = number

    @contextlib.contextmanager
    def heard(self):
        """A block in which a signal, new or deferred, raises KeyboardInterrupt."""
        try:
            handle_signals(interrupt)
            if self.waiting:
                interrupt(self.waiting, None)
            yield
        finally:
            handle_signals(self.wait)


# ---- engine in C++ ---------------------------------------------------------------------------------------------------

# Theano Ops in C++, an order of magnitude faster on the CPU than the formulas above, with the same results but for near
# matches. Images are stored as (H, W, C): the channels of a pixel are contiguous, and all inner loops run over them.

# Shared by them. `product` is faster than a BLAS on these narrow matrices, and needs no library or threads for it.
COMMON = r'''
#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>
#include <omp.h>

#if defined(__AVX512F__)                                  /* floats in a register; registers in a row of a block */
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
typedef int ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias)), word __attribute__((may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline long padded(long n) { return (n + 15) / 16 * 16; }

/* Adds to each lane of sum the four products of its bytes of v and those of u, which are below 128. Assembly, since
   for the intrinsic GCC 12 copies registers. */
#if defined(__AVX512VNNI__)
enum { HAS_DOT = 1 };
static inline void dot(ints &sum, ints v, ints u) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(v), "v"(u)); }
#elif defined(__ARM_FEATURE_DOTPROD)
enum { HAS_DOT = 1 };
static inline void dot(ints &sum, ints v, ints u) { asm("udot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(v), "w"(u)); }
#else
enum { HAS_DOT = 0 };
static inline void dot(ints &, ints, ints) {}
#endif

/* a block of R rows and C registers of the product, summed over the depth in registers, where arrays stay only in
   unrolled loops */
#define EACH _Pragma("GCC unroll 6") for (int r = 0; r < R; r++) \
             _Pragma("GCC unroll 4") for (int c = 0; c < C; c++)
template <int R, int C>
static inline void sums(long quads, long depth, const float *A, long lda, const float *B, long ldb, float *out,
                        long ldo) {
    vec sum[R][C] = {};
    auto a = [=](int r, long d) { return A + r * lda + d; };
    auto b = [=](int c, long d) { return B + d * ldb + c * LANES; };
    long d = 0;
    if (HAS_DOT && quads) {
        ints whole[R][C] = {};
        for (; d < quads; d++) EACH dot(whole[r][c], *(const ints *)b(c, d), ints{} + *(const word *)a(r, d));
        EACH sum[r][c] = __builtin_convertvector(whole[r][c], vec) * *a(r, d) * load(b(c, d));
        d++;
    }
    for (; d < depth; d++) EACH sum[r][c] += *a(r, d) * load(b(c, d));
    EACH store(out + r * ldo + c * LANES, sum[r][c]);
}

template <int C>
static void strip(long rows, long quads, long depth, const float *A, long lda, const float *B, long ldb, float *out,
                  long ldo) {
    long r = 0;
    for (; r + 6 <= rows; r += 6) sums<6, C>(quads, depth, A + r * lda, lda, B, ldb, out + r * ldo, ldo);
    for (; r < rows; r++) sums<1, C>(quads, depth, A + r * lda, lda, B, ldb, out + r * ldo, ldo);
}

/* out (rows, columns) = A (rows, depth) B (depth, columns), on one thread. The columns are a multiple of 16, and B lies
   in panels of 64 of them, each (depth, 64), the last narrower. The first `quads` of the depth are four bytes each,
   and the next is a factor for the sum of their products. */
static void product(long rows, long columns, long depth, const float *A, long lda, const float *B, float *out,
                    long ldo, long quads = 0) {
    for (long p = 0; p < columns; p += PANEL) {
        long width = std::min<long>(PANEL, columns - p);
        for (long c = 0, left; (left = (width - c) / LANES) > 0; c += LANES * std::min<long>(left, ABREAST)) {
            auto f = left >= ABREAST ? strip<ABREAST> : left == 3 ? strip<3> : left == 2 ? strip<2> : strip<1>;
            f(rows, quads, depth, A, lda, B + p * depth + c, width, out + p + c, ldo);
        }
    }
}

/* Working memory, kept between calls, since fresh pages cost more than the work in them. By its visibility all Ops
   share it, though each is a library of its own. */
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

/* Whether a signal handler raised an exception, so that the work is to be left. Asked before each piece of work; only
   the first thread of a team, which is Python's, may run the handlers. */
static std::atomic<bool> interrupted;
static bool leave() {
    if (!interrupted && omp_get_thread_num() == 0 && PyErr_CheckSignals()) interrupted = true;
    return interrupted;
}

/* calls f; false, with a Python exception set, if f threw or a signal handler raised */
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
struct Picture { const float *data, *mask; long H, W, C, width; };    /* width: W before pooling */

/* B^T d and A^T m of [LG15], on one column or row with a stride of s */
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

/* V (36, C) of the tile whose first pixel is (y, x): B^T d B of 6x6 pixels, which are averages of 2x2 if POOL, and zero
   outside the picture and where the mask is not positive */
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

/* The tile's 4x4 pixels of out from M (36, K): A^T m A, with bias and rectifier if there is a bias. Where unpooled is a
   width, and not 0, a quarter of each goes to 2x2 pixels of an output so wide: the gradient of average pooling. */
static void tile_out(const float *M, long ldM, const float *bias, long y, long x, long H, long W, long K, long unpooled,
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
            for (int j = 0; j < (unpooled ? 4 : 1); j++) {
                float *p = out + (unpooled ? (2 * v + j / 2) * unpooled + 2 * u + j % 2 : v * W + u) * K + k;
                vec part = unpooled ? .25f * value : value;
                if (n == LANES) store(p, part);
                else for (int l = 0; l < n; l++) p[l] = part[l];
            }
        }
    }
}

/* out (H, W, K) = the picture's convolution, by blocks of tiles: small ones stay in cache, large ones need fewer reads
   of filters that do not */
template <bool MASK, bool POOL>
static void convolve(const Picture &in, const float *U, const float *bias, float *out, long K, long unpooled) {
    long across = (in.W + 3) / 4, tiles = across * ((in.H + 3) / 4), threads = omp_get_max_threads();
    if (!tiles) return;
    long C = padded(in.C), N = padded(K), zeros = padded((POOL ? in.width + 2 : 1) * in.C + LANES);
    long most = (C * N > 1 << 16 ? 96 : 24) * threads, blocks = (tiles + most - 1) / most * threads;
    long block = (tiles + blocks - 1) / blocks;
    long ldV = block * C + 16, ldM = block * N + 16;                  /* 16 more: else all fall into one cache set */
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
            tile_out(M + (t - first) * N, ldM, bias ? b : NULL, t / across * 4, t % across * 4, in.H, in.W, K, unpooled,
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
    for (long r = 0; POOL && r < H; r++)                              /* an odd row and column, which pooling drops */
        if (H % 2 && r == H - 1) std::fill(dx + r * W * C, dx + (r + 1) * W * C, 0.f);
        else if (W % 2) std::fill(dx + ((r + 1) * W - 1) * C, dx + (r + 1) * W * C, 0.f);
    convolve<true, false>({dy, y, y.size(0), y.size(1), y.size(2), 0}, U, NULL, dx, C, POOL ? W : 0);
}
'''

MATCHING = r'''
enum { RING = 1 << 18 };                 /* most floats of products kept by a thread, or three rows' if they are more */

/* B for product() from a row of w pixels of v, each a column */
static void pack(const float *v, long w, long D, float *B) {
    for (long q = 0; q < padded(w); q++) {
        long p = q / PANEL * PANEL, width = std::min<long>(PANEL, padded(w) - p);
        for (long d = 0; d < D; d++) B[p * D + d * width + q - p] = q < w ? v[q * D + d] : 0;
    }
}

/* Codes n keys k of D channels such that product() of two codes is an upper bound of the keys' product: bytes c for all
   channels but the last D % 64, the maps'; the step s of the bytes; those last channels; and two numbers more, for in
   the channels of the bytes, with k' of the other picture,

       k . k' <= (s c) . (s' c') + |k - s c| |k'| + |s c| |k' - s' c'|.

   Returns the length of the longest key, or infinity if one cannot be coded. */
static double quantise(const float *keys, long n, long D, bool style, float *words) {
    long bytes = D / 64 * 64, depth = bytes / 4 + D % 64 + 3;
    double longest = 0;
    #pragma omp parallel for reduction(max: longest)
    for (long p = 0; p < n; p++) {
        const float *k = keys + p * D, levels = style ? 255 : 127;
        float *to = words + p * depth, most = 0;
        unsigned char *c = (unsigned char *)to;
        double coded = 0, lost = 0, whole = 0, rest = 0;              /* squares of s c, k - s c, k */
        int positive = 1;
        #pragma omp simd reduction(max: most) reduction(&: positive)
        for (long d = 0; d < bytes; d++) {
            most = k[d] > most ? k[d] : most;
            positive &= k[d] >= 0;                                    /* NaN is not */
        }
        float step = most / levels, inverse = step > 1e-30f && most < INFINITY ? 1 / step : 0;
        #pragma omp simd reduction(+: coded, lost, whole)
        for (long d = 0; d < bytes; d++) {
            double near = (double)step * (c[d] = (int)std::min(levels, std::max(0.f, k[d] * inverse + .5f)));
            coded += near * near;
            lost += (k[d] - near) * (k[d] - near);
            whole += (double)k[d] * k[d];
        }
        for (long d = bytes; d < D; d++) rest += (double)k[d] * k[d];
        to[bytes / 4] = step;
        std::copy(k + bytes, k + D, to + bytes / 4 + 1);
        auto up = [](double square) { return std::nextafter((float)std::sqrt(square), INFINITY); };
        to[depth - 2] = up(style ? whole : lost);
        to[depth - 1] = up(style ? lost : coded);
        double length = std::sqrt(whole + rest);
        longest = std::max(longest, positive && length < 1e30 ? length : INFINITY);
    }
    return longest;
}

/* The score of a patch of u (., W, D) and one of v (., w, D): by the very additions of product() and score(), or in an
   order that is fast. */
static float exact(const float *u, long W, const float *v, long w, long D) {
    float s[9] = {};
    for (long d = 0; d < D; d++)
        #pragma GCC unroll 9
        for (int k = 0; k < 9; k++) s[k] += u[(k / 3 * W + k % 3) * D + d] * v[(k / 3 * w + k % 3) * D + d];
    return (s[0] + s[3] + s[6]) + (s[1] + s[4] + s[7]) + (s[2] + s[5] + s[8]);
}
static float rounded(const float *u, long W, const float *v, long w, long D) {
    float s = 0;
    for (int k = 0; k < 9; k++) {
        const float *p = u + (k / 3 * W + k % 3) * D, *q = v + (k / 3 * w + k % 3) * D;
        float part = 0;
        #pragma omp simd reduction(+: part)
        for (long d = 0; d < D; d++) part += p[d] * q[d];
        s += part;
    }
    return s;
}

/* The scores of a row of patches i with a row of patches j, from the products P[y] (W, ld) of their rows of pixels.
   best, match and a are by i; history, penalty and scale (b) by j, from `first` on; penalty is padded with infinity.
   If u is not NULL the scores are bounds, and what reaches the best is scored anew from the keys u and v of the rows.
   Returns how many reached it. */
template <bool SCALED>
static long score(const float *const *P, long W, long w, long ld, float *space, const float *penalty, long first,
                  float *best, npy_int64 *match, float *history, const float *a, const float *scale, const float *u,
                  const float *v, long D) {
    long reached = 0;
    float *column[3], *S = space + 3 * (ld + LANES);                  /* sums over y; over y and x */
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
        float most = -INFINITY;
        #pragma omp simd reduction(max: most)
        for (int l = 0; l < LANES; l++) most = std::max(most, top[l]);
        for (long b = 0; most >= best[x - 2] && b < w - 2; b++) {     /* rarely */
            if (!(S[b] >= best[x - 2]) || (u && first + b == match[x - 2])) continue;
            reached++;
            const float *p = u + (x - 2) * D, *q = v + b * D;
            if (u && rounded(p, W, q, w, D) - penalty[b] < best[x - 2]) continue;
            float s = u ? exact(p, W, q, w, D) : S[b];
            if (s > best[x - 2] || (s == best[x - 2] && first + b < match[x - 2])) match[x - 2] = first + b;
            best[x - 2] = std::max(best[x - 2], s);
        }
    }
    return reached;
}

/* A diagonal is all pairs of pixel rows, y of u and a of v, with one y - a. The scores of two rows of patches need the
   products of three consecutive pairs of a diagonal: along it each is computed once, and the last three are kept in a
   ring. A thread takes G diagonals at a time.

   With matches to start from, the scores of all pairs are bounded by bytes, and only those whose bound reaches the best
   score so far are computed. Returns false where keys cannot be coded, or too many pairs reach it.

   How far rounding brings a score above its bound: n additions and multiplications are off by at most n 2^-24 (1 + n
   2^-24) of the sum of the terms' sizes. Let L be the product of the longest keys' lengths. In the product of two keys
   the terms' sizes sum to L at most, in its bound to 4 L, since |k - s c| is at most |k| where c is 0 and else, with at
   most 8192 channels, under half of it. There are D operations in the one, D % 64 + 5 in the other, and 5 more for the
   sum of nine less the penalty; rounded() takes D + 10. So for nine pixels the score that is known, by exact(), and the
   worse of rounded() and the bound are apart by at most 9 L ((D + 5) + max(D + 10, 4 (D % 64 + 10))) 2^-24. */
template <bool SCALED>
static bool match(const float *u, long H, long W, const float *v, long h, long w, long D, const float *penalty,
                  const float *a_of, const float *b_of, const npy_int64 *start, npy_int64 *matches, float *history) {
    long quads = start ? D / 64 * 16 : 0, depth = start ? quads + D % 64 + 3 : D, words = start ? H * W * depth : 0;
    long ld = padded(w), patches = (H - 2) * (W - 2), style = history ? (h - 2) * ld : 0;
    long G = std::max<long>(1, std::min<long>(8, RING / (3 * W * ld))), bands = (H + h - 2 + G) / G;
    long threads = omp_get_max_threads(), row = 4 * (ld + LANES), each = 3 * G * W * ld + row + patches + style;
    long few = patches * (4 + (h - 2) * (w - 2) / 512) / threads;     /* more pairs cost more than floats for all */
    float *B = workspace(h * ld * depth + (h - 2) * ld * (1 + SCALED) + words + (start ? h * w * depth : 0) + patches +
                         threads * each);
    float *limits = B + h * ld * depth, *scale = limits + (h - 2) * ld * SCALED, *known = scale + (h - 2) * ld;
    float *A = known + patches, *rows = A + words, *space = rows + (start ? h * w * depth : 0), margin = 0;
    std::vector<npy_int64> found(threads * patches);
    std::atomic<bool> many(false);
    if (start) {
        double L = quantise(u, H * W, D, false, A) * quantise(v, h * w, D, true, rows);
        if (!(L < 1e30)) return false;                                /* NaN is not */
        margin = 9 * L * ((D + 5) + std::max(D + 10, 4 * (D % 64 + 10))) * 1.01 / (1 << 24) + 1e-30;    /* underflow */
    }
    const float *left = start ? A : u, *right = start ? rows : v;
    #pragma omp parallel num_threads(threads)
    {
        long team = omp_get_num_threads(), self = omp_get_thread_num(), reached = 0;
        float *ring = space + self * each, *sums = ring + 3 * G * W * ld, *best = sums + row, *most = best + patches;
        npy_int64 *match = found.data() + self * patches;
        std::fill(sums, sums + row, 0.f);
        std::fill(best, ring + each, -INFINITY);
        #pragma omp for
        for (long i = 0; i < (start ? patches : 0); i++) {
            long j = start[i], p = i / (W - 2) * W + i % (W - 2), q = j / (w - 2) * w + j % (w - 2);
            known[i] = exact(u + p * D, W, v + q * D, w, D);
        }
        if (start) {
            std::copy(known, known + patches, best);
            std::copy(start, start + patches, match);
        }
        #pragma omp for
        for (long a = 0; a < h; a++) {
            pack(right + a * w * depth, w, depth, B + a * ld * depth);
            for (long b = 0; a < h - 2 && b < ld; b++) {
                long j = a * (w - 2) + b;
                if (SCALED) scale[a * ld + b] = b < w - 2 ? b_of[j] : 0;
                limits[a * ld + b] = b >= w - 2 || (b_of && b_of[j] == 0) ? INFINITY : penalty ? penalty[j] : -margin;
            }
        }
        #pragma omp for schedule(dynamic)
        for (long band = 0; band < bands; band++) {
            if (leave() || many) continue;
            long shift = band * G - h + 1;                            /* y - a of the band's first diagonal */
            for (long a = std::max(0L, 1 - G - shift); a < std::min(h, H - shift); a++) {
                long y = std::max(0L, a + shift), end = std::min(H, a + shift + G);
                auto at = [=](long a, long y) { return ring + (a % 3 * G + y - a - shift) * W * ld; };
                product((end - y) * W, ld, depth, left + y * W * depth, depth, B + a * ld * depth, at(a, y), ld, quads);
                for (y = std::max(2L, y); a >= 2 && y < end; y++) {
                    const float *P[] = {at(a - 2, y - 2), at(a - 1, y - 1), at(a, y)};
                    long i = (y - 2) * (W - 2);
                    reached += score<SCALED>(P, W, w, ld, sums, limits + (a - 2) * ld, (a - 2) * (w - 2), best + i,
                                             match + i, history ? most + (a - 2) * ld : NULL,
                                             SCALED ? a_of + i : NULL, scale + (a - 2) * ld,
                                             start ? u + (y - 2) * W * D : NULL, v + (a - 2) * w * D, D);
                }
            }
            if (start && reached > few) many = true;
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
    return !many;
}

static void matching(PyArrayObject *image, PyArrayObject *style, PyArrayObject *of_image, PyArrayObject *of_style,
                     PyArrayObject *started, PyArrayObject *penalties, PyArrayObject **matches,
                     PyArrayObject **history) {
    Array u(image), v(style), a(of_image), b(of_style), before(started), penalty(penalties);
    npy_intp H = u.size(0), W = u.size(1), h = v.size(0), w = v.size(1), M = (H - 2) * (W - 2), N = (h - 2) * (w - 2);
    bool scaled = a.size(0) || b.size(0);
    if (std::min(std::min(H, W), std::min(h, w)) < 3 || u.size(2) != v.size(2) || (penalty && penalty.size(0) != N) ||
        (scaled && (a.size(0) != M || b.size(0) != N)))
        throw std::invalid_argument("Matching: the pictures have no 3x3 patch, or do not fit each other");
    npy_int64 *numbers = (npy_int64 *)allocate(matches, 1, &M, NPY_INT64);
    float *scores = history ? (float *)allocate(history, 1, &N, NPY_FLOAT32) : NULL;
    const npy_int64 *start = (const npy_int64 *)PyArray_DATA(before.array);
    const float *of_i = a, *of_j = b;
    bool plain = std::all_of(of_i, of_i + a.size(0), [](float x) { return x == 1; }) &&
                 std::all_of(of_j, of_j + b.size(0), [](float x) { return x == 1 || x == 0; });
    if (!HAS_DOT || !plain || penalty || before.size(0) != M || u.size(2) < 64 || u.size(2) > 8192 ||
        !std::all_of(start, start + M, [=](npy_int64 j) { return 0 <= j && j < N && !(scaled && of_j[j] == 0); }) ||
        !match<false>(u, H, W, v, h, w, u.size(2), NULL, NULL, scaled ? of_j : NULL, start, numbers, NULL))
        (scaled ? match<true> : match<false>)(u, H, W, v, h, w, u.size(2), penalty, a, scaled ? of_j : NULL, NULL,
                                              numbers, scores);
}
'''

NEAR_MATCHING = r'''
/* a random number by its place in a sequence: splitmix64 */
static inline npy_uint64 drawn(npy_uint64 n) {
    n += 0x9e3779b97f4a7c15u;
    n = (n ^ n >> 30) * 0xbf58476d1ce4e5b9u;
    n = (n ^ n >> 27) * 0x94d049bb133111ebu;
    return n ^ n >> 31;
}

/* two numbers from -most to most by n, one from either half of its bits */
static inline long down(npy_uint64 n, long most) { return long((n >> 32) % (2 * most + 1)) - most; }
static inline long right(npy_uint64 n, long most) { return long((n & 0xffffffffu) % (2 * most + 1)) - most; }

/* b(j) times the sum of products of patch i at (y, x) of u with j at (a, c) of v; -infinity where b(j) is 0 */
struct Patches {
    const float *u, *v, *b;
    long H, W, h, w, D;
    float score(long y, long x, long a, long c) const {
        enum { SUMS = 4 };
        vec sums[SUMS] = {};
        float total = 0, scale = b ? b[a * (w - 2) + c] : 1;
        if (scale == 0) return -INFINITY;
        for (long k = 0; k < 3; k++) {                                /* three pixels of a row are contiguous */
            const float *f = u + ((y + k) * W + x) * D, *g = v + ((a + k) * w + c) * D;
            long d = 0;
            for (; d + SUMS * LANES <= 3 * D; d += SUMS * LANES)
                for (int l = 0; l < SUMS; l++) sums[l] += load(f + d + l * LANES) * load(g + d + l * LANES);
            for (; d + LANES <= 3 * D; d += LANES) sums[0] += load(f + d) * load(g + d);
            for (; d < 3 * D; d++) total += f[d] * g[d];
        }
        sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        for (int l = 0; l < LANES; l++) total += sums[0][l];
        return scale * total;
    }
};

/* the best j found for one patch of the image, and its score */
struct Best {
    const Patches &p;
    long y, x;
    npy_int64 j;
    float score;
    void attempt(long a, long c) {
        long other = a * (p.w - 2) + c;
        if (a < 0 || c < 0 || a >= p.h - 2 || c >= p.w - 2 || other == j) return;
        float s = p.score(y, x, a, c);
        if (s > score || (s == score && other < j)) score = s, j = other;
    }
    void follow(const npy_int64 *matches, long dy, long dx) {
        if (y + dy < 0 || x + dx < 0 || y + dy >= p.H - 2 || x + dx >= p.W - 2) return;
        long other = matches[(y + dy) * (p.W - 2) + x + dx];
        attempt(other / (p.w - 2) - dy, other % (p.w - 2) - dx);
    }
};

/* one sweep over a row of patches, from the matches of the sweep before */
static void sweep_row(const Patches &p, long y, npy_uint64 key, const npy_int64 *before, npy_int64 *matches,
                      float *scores) {
    for (long x = 0; x < p.W - 2; x++) {
        long i = y * (p.W - 2) + x;
        npy_uint64 n = drawn(key + i);
        Best best = {p, y, x, before[i], scores[i]};
        for (long d = -1; d <= 1; d += 2) best.follow(before, d, 0), best.follow(before, 0, d);
        for (int k = 0; k < 4; k++) n = drawn(n), best.follow(before, down(n, 8), right(n, 8));
        long a = best.j / (p.w - 2), c = best.j % (p.w - 2);
        for (long d = 0; d < 9; d++) best.attempt(a + d / 3 - 1, c + d % 3 - 1);
        a = best.j / (p.w - 2), c = best.j % (p.w - 2);
        for (long most = std::max(p.h, p.w); most; most /= 2)
            n = drawn(n), best.attempt(a + down(n, std::min(most, p.h)), c + right(n, std::min(most, p.w)));
        matches[i] = best.j, scores[i] = best.score;
    }
}

static void near_matching(PyArrayObject *image, PyArrayObject *style, PyArrayObject *of_image, PyArrayObject *of_style,
                          PyArrayObject *guess, PyArrayObject *draws, PyArrayObject **matches) {
    npy_int64 sweeps = *(npy_int64 *)PyArray_GETPTR1(draws, 0), made = *(npy_int64 *)PyArray_GETPTR1(draws, 1);
    if (!sweeps) return matching(image, style, of_image, of_style, guess, NULL, matches, NULL);
    Array u(image), v(style), b(of_style);
    Patches p = {u, v, b.size(0) ? (float *)b : NULL, u.size(0), u.size(1), v.size(0), v.size(1), u.size(2)};
    npy_intp M = (p.H - 2) * (p.W - 2), N = (p.h - 2) * (p.w - 2);
    if (std::min(std::min(p.H, p.W), std::min(p.h, p.w)) < 3 || v.size(2) != p.D || (p.b && b.size(0) != N) ||
        PyArray_DIM(guess, 0) != M)
        throw std::invalid_argument("NearMatching: the pictures have no 3x3 patch, or do not fit each other");
    npy_int64 whole = 0;                                              /* the first patch that may be matched */
    while (p.b && whole < N - 1 && p.b[whole] == 0) whole++;
    std::vector<npy_int64> before(M);
    std::vector<float> scores(M);
    for (long i = 0; i < M; i++) {
        before[i] = *(npy_int64 *)PyArray_GETPTR1(guess, i);
        if (before[i] < 0 || before[i] >= N) throw std::invalid_argument("NearMatching: a guess is no patch");
        if (p.b && p.b[before[i]] == 0) before[i] = whole;
    }
    npy_int64 *found = (npy_int64 *)allocate(matches, 1, &M, NPY_INT64);
    #pragma omp parallel for schedule(dynamic, 64)
    for (long i = 0; i < M; i++)
        scores[i] = p.score(i / (p.W - 2), i % (p.W - 2), before[i] / (p.w - 2), before[i] % (p.w - 2));
    for (npy_int64 t = 0; t < sweeps; t++) {
        if (t) std::copy(found, found + M, before.begin());
        npy_uint64 key = drawn(made + t);
        #pragma omp parallel for schedule(dynamic)
        for (long y = 0; y < p.H - 2; y++)
            if (!leave()) sweep_row(p, y, key, before.data(), found, scores.data());
    }
}
'''

DIFFERENCES = r'''
/* the sum over all patches i of f, offsets and channels of (f - g)^2, with g their matches; and for each pixel and
   channel of f the sum over the patches that cover it of f - g */
static void differences(PyArrayObject *image, PyArrayObject *style, PyArrayObject *matched, PyArrayObject **squares,
                        PyArrayObject **slopes) {
    Array f(image), g(style), match(matched);
    long H = f.size(0), W = f.size(1), C = f.size(2), w = g.size(1), patches = (g.size(0) - 2) * (w - 2);
    const npy_int64 *j = (const npy_int64 *)PyArray_DATA(match.array);
    if (std::min(std::min(H, W), std::min(g.size(0), w)) < 3 || g.size(2) != C || match.size(0) != (H - 2) * (W - 2) ||
        !std::all_of(j, j + match.size(0), [=](npy_int64 j) { return 0 <= j && j < patches; }))
        throw std::invalid_argument("Differences: the pictures or the matches do not fit each other");
    float *slope = (float *)allocate(slopes, 3, PyArray_DIMS(image), NPY_FLOAT32);
    std::vector<double> sums(H);                                      /* of rows: the same with any number of threads */
    #pragma omp parallel for
    for (long y = 0; y < H; y++)
        if (!leave()) for (long x = 0; x < W; x++) {
            const float *pixels[9], *p = f + (y * W + x) * C;         /* of g, by offset of the patch */
            int count = 0;
            for (long k = 0; k < 9; k++) {
                long v = y - k / 3, u = x - k % 3;
                if (v < 0 || u < 0 || v >= H - 2 || u >= W - 2) continue;
                long j_i = j[v * (W - 2) + u];
                pixels[count++] = g + ((j_i / (w - 2) + k / 3) * w + j_i % (w - 2) + k % 3) * C;
            }
            vec squared = {};
            float *to = slope + (y * W + x) * C, rest = 0;
            long c = 0;
            for (; c + LANES <= C; c += LANES) {
                vec sum = {};
                for (int k = 0; k < count; k++) {
                    vec d = load(p + c) - load(pixels[k] + c);
                    sum += d;
                    squared += d * d;
                }
                store(to + c, sum);
            }
            for (; c < C; c++) {
                to[c] = 0;
                for (int k = 0; k < count; k++) {
                    float d = p[c] - pixels[k][c];
                    to[c] += d, rest += d * d;
                }
            }
            for (int l = 0; l < LANES; l++) sums[y] += squared[l];
            sums[y] += rest;
        }
    *(float *)allocate(squares, 0, NULL, NPY_FLOAT32) = std::accumulate(sums.begin(), sums.end(), 0.);
}
'''


# The kernels of the Ops on a GPU, in what is common to the C of CUDA and of OpenCL.
KERNELS = r'''#include "cluda.h"

// From the line `top` on, the image x (., width, C), or means of 2x2 of its pixels, as H lines of W pixels in a border
// of zeros; where y (H, W, C) was not positive, zero too.
KERNEL void pad(GLOBAL_MEM const float *x, GLOBAL_MEM const float *y, GLOBAL_MEM float *padded,
                ga_uint top, ga_uint H, ga_uint W, ga_uint C, ga_uint width, ga_uint pool, ga_uint masked) {
    ga_uint row = top + GID_0 / (W + 2) - 1, column = GID_0 % (W + 2) - 1;
    for (ga_uint c = LID_0; c < C; c += LDIM_0) {
        float value = 0;
        if (row < H && column < W && !(masked && y[((ga_size)row * W + column) * C + c] <= 0)) {
            GLOBAL_MEM const float *from = x + ((ga_size)(row << pool) * width + (column << pool)) * C + c;
            value = *from;
            if (pool) value = (value + from[C] + from[(ga_size)width * C] + from[(ga_size)width * C + C]) / 4;
        }
        padded[(ga_size)GID_0 * C + c] = value;
    }
}

// The inverse, from `sums` (H, W + 2, C) to y (., width, C): of 2x2 pixels each has a quarter of the mean's.
KERNEL void crop(GLOBAL_MEM const float *sums, GLOBAL_MEM const float *bias, GLOBAL_MEM float *y,
                 ga_uint top, ga_uint H, ga_uint W, ga_uint C, ga_uint width, ga_uint pool, ga_uint rectified) {
    ga_uint row = top + (GID_0 / width >> pool), column = GID_0 % width >> pool;
    y += (ga_size)(top << pool) * width * C;
    for (ga_uint c = LID_0; c < C; c += LDIM_0) {
        float value = row < H && column < W ? sums[((ga_size)(row - top) * (W + 2) + column) * C + c] : 0;
        if (rectified) value = value + bias[c] < 0 ? 0 : value + bias[c];
        y[(ga_size)GID_0 * C + c] = pool ? value / 4 : value;
    }
}

// The sum of nine products of pixels, of `products` of the pixels of the image and of some rows of the style's.
WITHIN_KERNEL float score(GLOBAL_MEM const float *products, ga_uint W, ga_uint w, ga_uint columns) {
    float sum = 0;
    for (ga_uint y = 0; y < 3; y++)
        for (ga_uint x = 0; x < 3; x++) sum += products[(ga_size)(y * W + x) * columns + y * w + x];
    return sum;
}

#define NOTHING (-3.4e38f)

// The best patch j of `rows` rows from the row `first` on, or of those before, for each i; a block for each i.
KERNEL void best_patch(GLOBAL_MEM const float *products, GLOBAL_MEM const float *a, GLOBAL_MEM const float *b,
                       GLOBAL_MEM const float *penalty, GLOBAL_MEM float *best, GLOBAL_MEM ga_long *matches,
                       ga_uint H, ga_uint W, ga_uint w, ga_uint rows, ga_uint first, ga_uint scaled, ga_uint varied) {
    LOCAL_MEM float scores[256];
    LOCAL_MEM ga_uint patches[256];
    ga_uint i = GID_0, t = LID_0, columns = (rows + 2) * w, patch = 0;
    float most = NOTHING;
    products += (ga_size)(i / (W - 2) * W + i % (W - 2)) * columns;
    for (ga_uint q = t; q < rows * w; q += LDIM_0) {
        ga_uint j = first * (w - 2) + q - q / w * 2;
        if (q % w >= w - 2 || (scaled && !(b[j] > 0))) continue;
        float S = score(products + q, W, w, columns);
        if (scaled) S *= a[i] * b[j];
        if (varied) S -= penalty[j];
        if (S > most) most = S, patch = j;
    }
    scores[t] = most, patches[t] = patch;
    for (ga_uint rest = LDIM_0 / 2; rest; rest /= 2) {
        local_barrier();
        ga_uint o = t + rest;
        if (t < rest && (scores[o] > scores[t] || (scores[o] == scores[t] && patches[o] < patches[t])))
            scores[t] = scores[o], patches[t] = patches[o];
    }
    if (t == 0 && (first == 0 || scores[0] > best[i])) best[i] = scores[0], matches[i] = patches[0];
}

// The best score of any i for each j of these rows, without penalty; a thread for each j.
KERNEL void best_score(GLOBAL_MEM const float *products, GLOBAL_MEM const float *a, GLOBAL_MEM const float *b,
                       GLOBAL_MEM float *best, ga_uint H, ga_uint W, ga_uint w, ga_uint rows, ga_uint first,
                       ga_uint scaled) {
    ga_uint q = GID_0 * LDIM_0 + LID_0, columns = (rows + 2) * w, j = first * (w - 2) + q - q / w * 2;
    float most = NOTHING;
    if (q >= rows * w || q % w >= w - 2) return;
    for (ga_uint i = 0; i < (H - 2) * (W - 2); i++) {
        float S = score(products + (ga_size)(i / (W - 2) * W + i % (W - 2)) * columns + q, W, w, columns);
        if (scaled) S *= a[i] * b[j];
        if (S > most) most = S;
    }
    best[j] = most;
}
'''


# ---- main ------------------------------------------------------------------------------------------------------------

def main(arguments):
    """Run the program; errors become one clear line and an exit code."""
    return guarded(run, arguments)


def guarded(program, arguments):
    """What `program` returns for its `arguments`, an exit code; errors become one clear line and exit code 2."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))  # None: closed
    handle_signals(interrupt)
    warnings.filterwarnings('ignore', module='(?!__main__$|doodle$)')   # libraries warn of themselves
    try:
        if sys.flags.optimize > 1:
            raise UserError('Theano does not work without docstrings, which -OO and PYTHONOPTIMIZE=2 take away.',
                            'run it without them')
        allow_files()
        return program(arguments)
    except UserError as error:
        problem, fix = error.problem, error.fix
    except ImportError as error:
        problem, fix = f'{one_line(error)}.', 'install the packages: pip install -r requirements.txt'
    except OSError as error:
        problem = f'{error.filename or "A file"}: {error.strerror or one_line(error)}.'
        fix = {errno.ENOSPC: 'make room, or set TMPDIR to a folder on another disk',
               errno.EMFILE: 'raise it: ulimit -n 1024'}.get(error.errno, 'check the disk and its permissions')
    except Exception as error:  # Theano and libgpuarray have their own errors for a lack of memory
        if not isinstance(error, MemoryError) and not re.search('out of memory|failed to alloc', str(error), re.I):
            raise
        problem, fix = 'There is not enough memory.', 'a smaller --max-size; on a GPU also more --slices'
    except KeyboardInterrupt as interruption:
        say(f'\n{bold("Interrupted")} before the first evaluation: there is nothing to save.')
        return 128 + interruption.args[0]
    print(f'ERROR: {problem}\n  FIX: {fix}.', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
