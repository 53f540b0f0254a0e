"""Slow, obvious NumPy versions of what doodle.py computes: the truth in its tests.

The order is the program's: images and maps, network, matching, losses, optimisation. Names:

    C, H, W   channels, rows, columns of an image or a feature map;  K  channels of a semantic map
    O         output channels of a convolution
    N, M      3x3 patches of the style and of the current image, row by row: y * (W - 2) + x
    layer     '4_2' is the second layer of the fourth block, after its rectifier
    x         the image that is optimised, (3, H, W), planes B, G, R in 0..255

With `original=True` `Twin` does as the program of the blog post did: float16 style patches, norms
and history, and the style patches that do not fill a slice are dropped.
"""
import bz2
import pickle
from types import SimpleNamespace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.optimize import fmin_l_bfgs_b

MEANS = np.array([103.939, 116.779, 123.680])[:, None, None]    # B, G, R of ImageNet
BLOCKS = {1: (2, 64), 2: (2, 128), 3: (4, 256), 4: (4, 512), 5: (4, 512)}    # VGG19: block -> (layers, O)
LAYERS = [f'{block}_{i + 1}' for block, (count, _) in BLOCKS.items() for i in range(count)]
OFFSETS = [(dy, dx) for dy in range(3) for dx in range(3)]


# ---- images and maps ---------------------------------------------------------------------------

def planes(image, dtype=float):
    """(H, W, C) -> (C, H, W)."""
    return np.asarray(image, dtype).transpose(2, 0, 1)


def pool_map(semantic_map, layer):
    """(K, H, W) averaged over 1, 2, 4, 8 or 16 pixels a side to the size of the layer's features."""
    for _ in range(int(layer[0]) - 1):
        semantic_map = average_pool(semantic_map)
    return semantic_map


# ---- network -----------------------------------------------------------------------------------

def fake_weights():
    """Random weights for which golden numbers exist: He-normal filters, biases of 0.01."""
    rng, arrays, c = np.random.RandomState(1234), [], 3
    for count, o in BLOCKS.values():
        for _ in range(count):
            w = rng.standard_normal((o, c, 3, 3)) * np.sqrt(2 / (9 * c))
            arrays += [w.astype(np.float32), np.full(o, 0.01, np.float32)]
            c = o
    return by_name(arrays)


def load_pickle_weights(path):
    """The weights of a vgg19_conv.pkl.bz2, from a reader that can build arrays and nothing else."""
    class ArraysOnly(pickle.Unpickler):
        def find_class(self, module, name):
            if (module.split('.')[0], name) in {('numpy', '_reconstruct'), ('numpy', 'ndarray'),
                                                ('numpy', 'dtype'), ('_codecs', 'encode')}:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f'{path} asks for {module}.{name}')
    with bz2.open(path) as file:
        return by_name(ArraysOnly(file, encoding='latin1').load())


def by_name(arrays):
    """[W, b, W, b, ...] for true convolution -> {'conv1_1': (W, b), ...} for cross-correlation."""
    return {f'conv{layer}': (w[:, :, ::-1, ::-1], b)
            for layer, w, b in zip(LAYERS, arrays[::2], arrays[1::2])}


def conv2d(x, w, b):
    """Cross-correlate x (C, H, W), zeros around it, with w (O, C, 3, 3): (O, H, W)."""
    _, height, width = x.shape
    x = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    return b[:, None, None] + sum(np.tensordot(w[:, :, dy, dx], x[:, dy:dy + height, dx:dx + width], 1)
                                  for dy, dx in OFFSETS)


def conv2d_backward(gradient, w):
    """The gradient (C, H, W) of the input, from that of the output (O, H, W)."""
    return conv2d(gradient, w.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1], np.zeros(w.shape[1], w.dtype))


def average_pool(x):
    """Means of 2x2 squares, (C, H, W) -> (C, H // 2, W // 2); an odd last row or column is dropped."""
    c, h, w = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
    return x[:, :2 * h, :2 * w].reshape(c, h, 2, w, 2).mean(axis=(2, 4))


def average_pool_backward(gradient, shape):
    """The gradient of the input, of that shape, from that of the output."""
    result = np.zeros(shape, gradient.dtype)    # a dropped row or column had no effect
    _, h, w = gradient.shape
    for dy, dx in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        result[:, dy:2 * h:2, dx:2 * w:2] = gradient / 4
    return result


def features(weights, x, last):
    """{layer: (C, H, W) after the rectifier} of the image x up to the layer `last`."""
    result, a = {}, x - MEANS.astype(x.dtype)
    for layer in LAYERS[:LAYERS.index(last) + 1]:
        if layer.endswith('_1') and layer != '1_1':
            a = average_pool(a)
        a = result[layer] = np.maximum(conv2d(a, *weights[f'conv{layer}']), 0)
    return result


def features_backward(weights, activations, gradients):
    """The gradient of x from what `features` gave and the gradients {layer: (C, H, W)} there."""
    g, layers = 0, list(activations)
    for i, layer in reversed(list(enumerate(layers))):
        g = g + gradients.get(layer, 0)
        g = conv2d_backward(g * (activations[layer] > 0), weights[f'conv{layer}'][0])
        if layer.endswith('_1') and layer != '1_1':
            g = average_pool_backward(g, activations[layers[i - 1]].shape)
    return g


# ---- matching ----------------------------------------------------------------------------------

def half(a):
    """`a` with float16's 11 significant bits, in its own type."""
    return a.astype(np.float16).astype(a.dtype)


def patches(a):
    """All 3x3 windows of a (C, H, W), row by row: (N, C, 3, 3) with N = (H - 2)(W - 2)."""
    windows = sliding_window_view(a, (3, 3), axis=(1, 2))    # (C, H - 2, W - 2, 3, 3)
    return windows.transpose(1, 2, 0, 3, 4).reshape(-1, len(a), 3, 3)


def unit(a, factor=1., original=False):
    """Each pixel's vector of a (C, H, W) divided by factor x its norm; a zero vector stays zero."""
    norm = np.sqrt((a ** 2).sum(axis=0))
    divisor = factor * norm
    if original:    # stored in float16, and the product is one, too
        a, divisor = half(a), (np.float16(factor) * norm.astype(np.float16)).astype(a.dtype)
    return np.divide(a, divisor, out=np.zeros_like(a), where=norm > 0)


def semantic_features(f, m, semantic_weight, original=False):
    """(C + K, H, W) from features (C, H, W) and map (K, H, W): a score is a dot product of its patches."""
    parts = [unit(f, 3., original)]    # 3 on either side: 1/9, the mean of nine cosines
    if m is not None:
        parts.append(unit(m, np.sqrt(9. / semantic_weight), original))
    return np.concatenate(parts)


def scores(style, current):
    """S (N, M) of each style patch with each current one, from two `semantic_features`."""
    p, q = patches(style), patches(current)    # (N, C + K, 3, 3), (M, C + K, 3, 3)
    return p.reshape(len(p), -1) @ q.reshape(len(q), -1).T


def patch_scores(style, current):
    """S (N, M): the cosine of whole patches, of features (C, H, W) [Li & Wand, eq. 3]; 0 where a patch is zero."""
    p, q = (patches(f).reshape(-1, 9 * len(f)) for f in (style, current))    # (N, 9 C), (M, 9 C)
    lengths = np.outer(np.linalg.norm(p, axis=1), np.linalg.norm(q, axis=1))
    return np.divide(p @ q.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def match(s, history, variety):
    """The best style patch (M,) of each current one: the first with the largest S - variety x history."""
    return np.argmax(s - variety * history[:, None], axis=0)


# ---- losses: each gives its value and its gradient -----------------------------------------------

def content_loss(f, target, weight):
    """weight x mean((f - target)^2) of features (C, H, W)."""
    d = f - target
    return weight * (d ** 2).mean(), 2 * weight / d.size * d


def style_loss(f, matched, weight):
    """weight x mean((patch - match)^2), features (C, H, W) and the matched patches (M, C, 3, 3)."""
    _, height, width = f.shape
    d = patches(f) - matched
    by_place = d.reshape(height - 2, width - 2, -1, 3, 3).transpose(2, 3, 4, 0, 1)    # (C, 3, 3, H - 2, W - 2)
    gradient = np.zeros_like(f)
    for dy, dx in OFFSETS:    # a pixel is part of up to nine patches
        gradient[:, dy:height - 2 + dy, dx:width - 2 + dx] += 2 * weight / d.size * by_place[:, dy, dx]
    return weight * (d ** 2).mean(), gradient


def gram(f):
    """(C, C) products of the channels of features (C, H, W), averaged over the pixels."""
    return np.einsum('ayx, byx -> ab', f, f) / f[0].size


def gram_loss(f, of_style, weight):
    """weight / (4 C^2) x sum((G - A)^2), of features (C, H, W) and the style's `gram` [Gatys et al., eq. 4 to 6]."""
    d, c = gram(f) - of_style, len(f)
    return weight / (4 * c ** 2) * (d ** 2).sum(), weight / c ** 2 / f[0].size * np.tensordot(d, f, 1)


def smoothness_loss(x, weight, power=1.25):
    """weight x mean((dx^2 + dy^2)^power) of an image (3, H, W), on its (H - 1) x (W - 1) grid."""
    dx = x[:, :-1, 1:] - x[:, :-1, :-1]
    dy = x[:, 1:, :-1] - x[:, :-1, :-1]
    squares = dx ** 2 + dy ** 2    # (3, H - 1, W - 1)
    slope = weight / squares.size * 2 * power * squares ** (power - 1)
    gradient = np.zeros_like(x)
    gradient[:, :-1, 1:] += slope * dx
    gradient[:, 1:, :-1] += slope * dy
    gradient[:, :-1, :-1] -= slope * (dx + dy)
    return weight * (squares ** power).mean(), gradient


class Twin:
    """One phase of the program: its images, its history of matches and its total loss.

    Parameters
    ----------
    weights : dict, {'conv1_1': (W (O, C, 3, 3), b (O,)), ...}, for cross-correlation and B, G, R
    content, style : (H, W, 3) RGB in 0..255; content may be None
    content_map, style_map : (H, W, K), any unit; None, either of them, for matching without maps
    slices : without effect but for the patches that the original drops
    cache : keep the matches of the first evaluation
    balance : {layer: factor of its features in the losses}; 1 where there is none
    original : the original's rounding and dropped patches
    """

    def __init__(self, weights, content, content_map, style, style_map, *, style_layers=('3_1', '4_1'),
                 content_layers=('4_2',), content_weight=10., style_weight=25., semantic_weight=10.,
                 smoothness=1., variety=0., slices=2, cache=False, balance={}, original=False, dtype=np.float64):
        self.weights = {name: (w.astype(dtype), b.astype(dtype)) for name, (w, b) in weights.items()}
        self.content_weight, self.style_weight, self.smoothness = content_weight, style_weight, smoothness
        self.semantic_weight, self.variety, self.slices, self.cache = semantic_weight, variety, slices, cache
        self.balance = {layer: dtype(balance.get(layer, 1)) for layer in LAYERS}
        self.original, self.dtype = original, dtype
        self.content_layers = content_layers if content is not None and content_weight else ()
        self.style_layers = style_layers if style_weight else ()
        self.last = max([*self.content_layers, *self.style_layers], key=LAYERS.index, default=LAYERS[0])

        if self.content_layers:
            self.content = features(self.weights, planes(content, dtype)[::-1], self.last)    # to B, G, R
        of_style = features(self.weights, planes(style, dtype)[::-1], self.last)
        with_maps = semantic_weight and content_map is not None and style_map is not None
        self.maps, self.style, self.style_patches, self.used, self.history = {}, {}, {}, {}, {}
        for layer in self.style_layers:
            g, n = of_style[layer], None    # (C, H, W), (K, H, W)
            if with_maps:
                n = pool_map(planes(style_map, dtype), layer)
                self.maps[layer] = pool_map(planes(content_map, dtype), layer)
            self.style[layer] = semantic_features(g, n, semantic_weight, original)
            self.style_patches[layer] = patches(half(g) if original else g)    # (N, C, 3, 3)
            count = len(self.style_patches[layer])
            self.used[layer] = count - count % slices if original else count
            self.history[layer] = np.zeros(count, dtype)
        self.matches = {}

    def match(self, layer, f):
        """The matches (M,) of features f (C, H, W), with the history of the pass before, then its update."""
        current = semantic_features(f, self.maps.get(layer), self.semantic_weight)
        used = slice(self.used[layer])
        s = scores(self.style[layer], current)[used]
        best = match(s, self.history[layer][used], self.variety)
        self.history[layer][used] = half(s.max(axis=1)) if self.original else s.max(axis=1)
        return best

    def evaluate(self, x):
        """The total loss at x and its parts.

        Parameters
        ----------
        x : (3, H, W), planes B, G, R in 0..255

        Returns
        -------
        total : float
        losses : dict, {'content_4_2': float, 'smooth_img': float, 'style_3_1': float, ...}
        gradient : (3, H, W), of the total by x with the matches held fixed
        matches : dict, {layer: (M,) numbers of style patches}
        """
        x = np.asarray(x, self.dtype)
        f, losses, gradients = features(self.weights, x, self.last), {}, {}
        for layer in self.content_layers:
            s = self.balance[layer]
            losses[f'content_{layer}'], g = content_loss(s * f[layer], s * self.content[layer], self.content_weight)
            gradients[layer] = s * g
        losses['smooth_img'], gradient = smoothness_loss(x, self.smoothness)
        for layer in self.style_layers:
            if self.variety and layer not in self.matches and not self.cache:
                self.match(layer, f[layer])    # warms the history up; with a cache that one pass is the only one
            if not (self.cache and layer in self.matches):
                self.matches[layer] = self.match(layer, f[layer])
            matched = self.style_patches[layer][self.matches[layer]]    # (M, C, 3, 3)
            s = self.balance[layer]
            losses[f'style_{layer}'], g = style_loss(s * f[layer], s * matched, self.style_weight)
            gradients[layer] = gradients.get(layer, 0) + s * g
        gradient = gradient + features_backward(self.weights, f, gradients)
        return float(sum(losses.values())), losses, gradient, dict(self.matches)


# ---- optimisation ------------------------------------------------------------------------------

def minimise(twin, x, iterations):
    """L-BFGS-B over the pixels from x (3, H, W): a list of its evaluations.

    Each has x, total, losses, gradient and matches. There are `iterations` of them; the original left the
    count to scipy, which lets a line search come to its end.
    """
    evaluations, shape = [], np.shape(x)

    def evaluate(flat):
        if len(evaluations) == iterations and not twin.original:
            raise StopIteration
        image = flat.reshape(shape).copy()
        total, losses, gradient, matches = twin.evaluate(image)
        evaluations.append(SimpleNamespace(x=image, total=total, losses=losses, gradient=gradient,
                                           matches=matches))
        return total, gradient.ravel().astype(float)

    try:
        fmin_l_bfgs_b(evaluate, np.ravel(x).astype(float), bounds=[(0, 255)] * np.size(x), m=5, factr=0,
                      pgtol=0, maxfun=iterations - 1 if twin.original else iterations)
    except StopIteration:
        pass
    return evaluations


def quality(gradient_maxima):
    """The figures of the log line from each evaluation's largest |gradient| so far in the phase."""
    e, result = 255., []
    for largest in gradient_maxima:
        e = 0.9 * e + 0.1 * min(largest, 255.)
        result.append(100 - 100 * np.sqrt(e / 255))
    return result
