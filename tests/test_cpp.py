"""The engine's C++ as if it stood in a file: compiled with all warnings, and run under the sanitizers on odd sizes.

The code becomes a library beside `LIBRARY`'s few functions, and a Python of its own, started with the sanitizers'
runtime, calls them: this file as a script. There each array is a block of memory whose ends are watched, and so is the
working memory of each call; what was not written is NaN.
"""
import ctypes
import itertools
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

import twin
from conftest import mostly_slow

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = r'''
#include <Python.h>
#include <numpy/arrayobject.h>
%s
typedef PyArrayObject *Argument;

/* a tuple of the outputs that there are, once `f` has written them twice, the second time into the same arrays */
template <typename F>
static PyObject *called(F f) {
    Argument first = NULL, second = NULL;
    bool done = guarded([&] { f(&first, &second); }) && guarded([&] { f(&first, &second); });
    PyObject *result = !done ? NULL : second ? PyTuple_Pack(2, first, second) : PyTuple_Pack(1, first);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return result;
}

extern "C" {
PyObject *begin() { import_array(); Py_RETURN_NONE; }
PyObject *convolved(Argument x, Argument U, Argument b, int pool) {
    return called([&](Argument *y, Argument *) { (pool ? forward<true> : forward<false>)(x, U, b, y); });
}
PyObject *gradient(Argument dy, Argument y, Argument U, Argument x, int pool) {
    return called([&](Argument *dx, Argument *) { (pool ? backward<true> : backward<false>)(dy, y, U, x, dx); });
}
PyObject *matched(Argument u, Argument v, Argument a, Argument b, Argument start) {
    return called([&](Argument *j, Argument *) { matching(u, v, a, b, start, NULL, j, NULL); });
}
PyObject *varied(Argument u, Argument v, Argument a, Argument b, Argument start, Argument penalty) {
    return called([&](Argument *j, Argument *history) { matching(u, v, a, b, start, penalty, j, history); });
}

/* whether bytes alone find the matches j from j */
PyObject *narrowed(Argument u, Argument v, Argument j) {
    Array p(u), q(v);
    npy_int64 *start = (npy_int64 *)PyArray_DATA(j);
    return PyBool_FromLong(match<false>(p, p.size(0), p.size(1), q, q.size(0), q.size(1), p.size(2), NULL, NULL, NULL,
                                        start, start, NULL));
}

PyObject *exactly(Argument u, Argument v) {
    Array p(u), q(v);
    return PyFloat_FromDouble(exact(p, p.size(1), q, q.size(1), p.size(2)));
}

/* what product() makes of n keys of the image and a row of w of the style, turned into bytes */
PyObject *bounds(Argument u, Argument v) {
    Array p(u), q(v);
    long n = p.size(0), w = q.size(0), D = p.size(1), depth = D / 64 * 16 + D %% 64 + 3;
    npy_intp shape[] = {n, padded(w)};
    std::vector<float> A(n * depth), rows(w * depth), B(padded(w) * depth);
    quantise(p, n, D, false, A.data());
    quantise(q, w, D, true, rows.data());
    pack(rows.data(), w, depth, B.data());
    Argument out = NULL;
    float *P = (float *)allocate(&out, 2, shape, NPY_FLOAT32);
    product(n, shape[1], depth, A.data(), depth, B.data(), P, shape[1], D / 64 * 16);
    return (PyObject *)out;
}
PyObject *nearly(Argument u, Argument v, Argument b, Argument guess, Argument draws) {
    return called([&](Argument *j, Argument *) { near_matching(u, v, b, b, guess, draws, j); });
}
PyObject *differing(Argument f, Argument g, Argument j) {
    return called([&](Argument *squares, Argument *slope) { differences(f, g, j, squares, slope); });
}
}
'''
FLAGS = '-std=c++11 -O1 -g -shared -fPIC -fopenmp -Wall -Wextra -Werror -fsanitize=address,undefined ' \
        '-fno-sanitize-recover=all -DNPY_NO_DEPRECATED_API=NPY_1_7_API_VERSION'.split()
# The engine keeps its working memory, at its largest and with what is in it. Here each call begins with none.
FRESH = {'static std::vector<float> kept;': 'static std::vector<float> kept; kept.clear();',
         'kept.resize(floats + 16);': 'kept.resize(floats + 16, NAN);'}
# Where the processor does not multiply bytes the engine leaves them alone. Here it multiplies them one by one.
BYTES = {'enum { HAS_DOT = 0 };': 'enum { HAS_DOT = 1 };',
         'static inline void dot(ints &, ints, ints) {}': r'''
static inline void dot(ints &sum, ints v, ints u) {
    const unsigned char *p = (const unsigned char *)&v, *q = (const unsigned char *)&u;
    for (int n = 0; n < 4 * LANES; n++) sum[n / 4] += p[n] * q[n];
}'''}
NONE, NO_START = np.zeros(0, np.float32), np.zeros(0, np.int64)
PROCESSORS = ['native', 'x86-64'] if platform.machine() == 'x86_64' else ['native']     # vectors of 8 or 16, and of 4


def shared_object(name):
    """The path of one of the compiler's own libraries."""
    return subprocess.check_output(['g++', f'-print-file-name={name}'], text=True).strip()


@pytest.mark.parametrize('processor', mostly_slow(PROCESSORS))
def test_the_code_has_no_warnings_stays_within_its_memory_and_is_right(doodle, tmp_path, processor):
    source, library = tmp_path / 'engine.cpp', tmp_path / 'engine.so'
    code = doodle.COMMON + doodle.CONVOLUTION + doodle.MATCHING + doodle.NEAR_MATCHING + doodle.DIFFERENCES
    folders = sysconfig.get_paths()['include'], np.get_include()
    command = ['g++', *FLAGS, f'-march={processor}', *(f'-isystem{folder}' for folder in folders), source]
    for changes, how in ((FRESH, ['-fsyntax-only']), (BYTES, ['-o', library])):             # first without `BYTES`
        for line, other in changes.items():
            assert code.count(line) == 1
            code = code.replace(line, other)
        source.write_text(LIBRARY % code)
        built = subprocess.run([*command, *how], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
    # GCC 14 looks for uses after return by default, on a stack that is not aligned for vectors of 64 bytes.
    watched = {'LD_PRELOAD': f'{shared_object("libasan.so")}:{shared_object("libstdc++.so")}', 'PYTHONMALLOC': 'malloc',
               'ASAN_OPTIONS': 'detect_leaks=0:detect_stack_use_after_return=0:'
                               f'malloc_fill_byte=255:max_malloc_fill_size={1 << 30}', 'OMP_NUM_THREADS': '2'}
    done = subprocess.run([sys.executable, __file__, library], capture_output=True, text=True, env=os.environ | watched)
    assert (done.returncode, done.stdout) == (0, 'right\n'), done.stderr


# ---- what runs under the sanitizers ----------------------------------------------------------------------------------

def check_convolution(doodle, library, rng, size, C, K, pool):
    """One convolution and its gradient against the twin's."""
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)
    x, W, b, dy = normal(*size, C), normal(K, C, 3, 3), normal(K), normal(size[0] >> pool, size[1] >> pool, K)
    y, = library.convolved(x, doodle.winograd(W), b, pool)
    dx, = library.gradient(dy, y, doodle.winograd(W[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)), x, pool)
    image = np.moveaxis(np.float64(x), 2, 0)
    expected, back = np.zeros((K, *dy.shape[:2])), np.zeros_like(image)
    if dy.size:
        expected = np.maximum(twin.conv2d(twin.average_pool(image) if pool else image, np.float64(W), b), 0)
        back = twin.conv2d_backward(np.moveaxis(np.float64(dy) * (y > 0), 2, 0), np.float64(W))
        back = twin.average_pool_backward(back, image.shape) if pool else back
    np.testing.assert_allclose(np.moveaxis(y, 2, 0), expected, atol=1e-4 * expected.max(initial=1))
    np.testing.assert_allclose(np.moveaxis(dx, 2, 0), back, atol=1e-4 * max(1, np.abs(back).max()))


def noise(rng, image, style, D):
    """Keys u (H, W, D) and v (h, w, D) of noise, their patches' products (j, i), and b(j), every third of them 0."""
    u, v = (rng.normal(size=(*size, D)).astype(np.float32) for size in (image, style))
    p, q = (sliding_window_view(np.float64(k), (3, 3), (0, 1)).reshape(-1, 9 * D) for k in (u, v))  # (i or j, 9 D)
    b = rng.random(len(q), np.float32)                                  # (j,)
    b[::3] *= len(b) == 1                                               # no patches; at least one is left
    return u, v, q @ p.T, b


def check_matching(library, rng, image, style, D, scaled, history):
    """One search against the products of all patches."""
    u, v, S, b = noise(rng, image, style, D)
    penalty, a = (rng.random(count, np.float32) for count in S.shape)   # (j,) and (i,)
    S = S * np.outer(b, a) if scaled else S
    a, b = (a, b) if scaled else (NONE, NONE)
    j, *new = library.varied(u, v, a, b, NO_START, penalty) if history else library.matched(u, v, a, b, NO_START)
    scores = S - penalty[:, None] if history else S
    if scaled:
        scores[b == 0] = -np.inf
    assert j.dtype == np.int64 and j.shape == S.shape[1:] and 0 <= j.min() and j.max() < len(S)
    assert (scores.max(axis=0) - scores[j, np.arange(len(j))]).max() < 1e-4
    if history:
        np.testing.assert_allclose(new[0], S.max(axis=1), atol=1e-4)


def check_near_matching(library, rng, image, style, D, scaled):
    """A near search makes no match worse, and with many sweeps finds the best of a good part, on noise."""
    u, v, S, b = noise(rng, image, style, D)
    if scaled:
        S = np.where(b[:, None] > 0, S * b[:, None], -np.inf)
    i, guess = np.arange(S.shape[1]), rng.integers(0, len(S), S.shape[1])
    scores = [S[guess, i]] + [S[library.nearly(u, v, b if scaled else NONE, guess, np.array([sweeps, 5]))[0], i]
                              for sweeps in (1, 60)]
    assert np.isfinite(scores[1:]).all()                                # also where the guess is no patch
    assert min((later - before).min() for before, later in zip(scores, scores[1:])) > -1e-4
    assert np.mean(scores[2] > S.max(axis=0) - 1e-4) > .3


def check_differences(library, rng, image, style, C):
    """The sum of the squared differences between patches and their matches, and their sum for each pixel."""
    f, g = (rng.normal(size=(*size, C)).astype(np.float32) for size in (image, style))
    j = rng.integers(0, (style[0] - 2) * (style[1] - 2), (image[0] - 2) * (image[1] - 2))
    squares, slope = library.differing(f, g, j)
    p, q = (sliding_window_view(np.float64(k), (3, 3), (0, 1)).reshape(-1, C, 3, 3) for k in (f, g))
    difference, total = (p - q[j]).reshape(image[0] - 2, image[1] - 2, C, 3, 3), np.zeros(f.shape)
    for y, x in itertools.product(range(3), repeat=2):
        total[y:image[0] - 2 + y, x:image[1] - 2 + x] += difference[..., y, x]
    np.testing.assert_allclose(squares, (difference ** 2).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, total, atol=1e-5)


def normalised(k):
    return np.float32(k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-30))


# Keys of any shape (..., D) by a generator: the common ones, such with many ties, and such that bytes cannot hold.
KEYS = {'rectified': lambda rng, shape: normalised(np.maximum(rng.normal(size=shape), 0)),
        'some zero': lambda rng, shape: normalised(rng.random(shape) * (rng.random((*shape[:-1], 1)) > 0.5)),
        'one channel': lambda rng, shape: np.eye(shape[-1], dtype=np.float32)[rng.integers(0, shape[-1], shape[:-1])],
        'small': lambda rng, shape: normalised(10 ** rng.uniform(-30, 0, shape)),
        'level': lambda rng, shape: np.full(shape, rng.random(), np.float32),
        'zeros and ones': lambda rng, shape: np.float32(rng.integers(0, 2, shape)),
        'equal': lambda rng, shape: np.ones(shape, np.float32),
        'zero': lambda rng, shape: np.zeros(shape, np.float32),
        'tiny': lambda rng, shape: np.float32(rng.random(shape) * 1e-41),
        'huge': lambda rng, shape: np.float32(10 ** rng.uniform(-30, 30, shape)),
        'infinite': lambda rng, shape: np.where(rng.random(shape) > 0.999, np.inf, np.float32(1)).astype(np.float32),
        'NaN': lambda rng, shape: np.where(rng.random(shape) > 0.999, np.nan, rng.random(shape)).astype(np.float32),
        'any sign': lambda rng, shape: normalised(rng.normal(size=shape))}


def with_maps(rng, k, K, weight=10.):
    """Keys and the channels of maps with K classes."""
    m = np.eye(max(1, K), K)[rng.integers(0, max(1, K), k.shape[:-1])]
    return np.concatenate([k, np.float32(weight ** 0.5 * m)], axis=-1)


def check_starts(library, rng, kind, image, style, D, K):
    """From any start the matches are those without one, to the last tie."""
    u, v = (with_maps(rng, KEYS[kind](rng, (*size, D)), K) for size in (image, style))
    M, N = ((size[0] - 2) * (size[1] - 2) for size in (image, style))
    free, = library.matched(u, v, NONE, NONE, NO_START)
    if kind == 'rectified':                                             # the style's own corner, far from all else
        assert library.narrowed(v[:3, :4].copy(), v, np.arange(2))
    for a, b in ((NONE, NONE), (np.ones(M, np.float32), np.float32(np.arange(N) % 3 > 0))):
        j, = library.matched(u, v, a, b, NO_START)
        for start in (j, free, rng.integers(0, N, M), 0 * j - 1, 0 * j + N, j[1:]):
            assert (library.matched(u, v, a, b, start)[0] == j).all(), kind
    if not K:
        p, q = u[:3, :3].copy(), v[:3, :3].copy()
        score, = library.varied(p, q, NONE, NONE, NO_START, np.zeros(1, np.float32))[1]
        assert score == library.exactly(p, q) or np.isnan(library.exactly(p, q)), kind


def check_bounds(library, rng, kinds, D, K):
    """No product of two keys exceeds its bound, by float64, and bounds of common keys are tight."""
    u, v = (with_maps(rng, KEYS[kind](rng, (count, D)), K) for kind, count in zip(kinds, (14, 37)))
    bounds, products = library.bounds(u, v)[:, :len(v)], np.float64(u) @ np.float64(v).T
    longest = np.linalg.norm(np.float64(u), axis=1).max() * np.linalg.norm(np.float64(v), axis=1).max()
    assert (products - bounds).max() <= 4 * longest * (K + 10) * 2 ** -24 + 1e-30, kinds
    if kinds == ('rectified', 'rectified'):
        assert (bounds - products).max() < 0.1


def check_refusals(library):
    """What does not fit raises ValueError, and nothing of it is read."""
    def ones(*shape):
        return np.ones(shape, np.float32)
    for function, arguments in (
            (library.convolved, (ones(6, 6, 5), ones(36, 48), ones(4), 0)),
            (library.gradient, (ones(5, 6, 3), ones(6, 6, 3), ones(36, 48), ones(6, 6, 3), 0)),
            (library.matched, (ones(2, 5, 3), ones(5, 5, 3), ones(0), ones(0), NO_START)),
            (library.matched, (ones(5, 5, 3), ones(5, 5, 4), ones(0), ones(0), NO_START)),
            (library.matched, (ones(5, 5, 3), ones(5, 5, 3), ones(8), ones(9), NO_START)),
            (library.varied, (ones(5, 5, 3), ones(5, 5, 3), ones(0), ones(0), NO_START, ones(8))),
            (library.nearly, (ones(5, 5, 3), ones(5, 5, 4), ones(0), np.zeros(9, int), np.array([1, 0]))),
            (library.nearly, (ones(5, 5, 3), ones(5, 5, 3), ones(0), np.zeros(8, int), np.array([1, 0]))),
            (library.nearly, (ones(5, 5, 3), ones(5, 5, 3), ones(0), np.full(9, 9), np.array([1, 0]))),
            (library.differing, (ones(5, 5, 3), ones(5, 5, 4), np.zeros(9, int))),
            (library.differing, (ones(5, 5, 3), ones(5, 5, 3), np.zeros(8, int))),
            (library.differing, (ones(5, 5, 3), ones(5, 5, 3), np.full(9, 9)))):
        try:
            function(*arguments)
        except ValueError:
            continue
        raise AssertionError(f'{function.__name__} took what does not fit')


def main(path):
    import doodle
    doodle.import_pillow()
    library = ctypes.PyDLL(path)
    for name, arguments in dict(begin=0, convolved=3, gradient=4, matched=5, varied=6, narrowed=3, exactly=2,
                                bounds=2, nearly=5, differing=3).items():
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.py_object, [ctypes.py_object] * arguments
        if name in ('convolved', 'gradient'):
            function.argtypes += [ctypes.c_int]
    library.begin()
    check_refusals(library)
    rng = np.random.default_rng(0)
    for C, K in ((3, 5), (5, 17), (17, 19), (19, 3), (33, 100)):
        for size in ((1, 1), (1, 6), (3, 3), (2, 9), (5, 7), (13, 11)):
            for pool in (0, 1):
                check_convolution(doodle, library, rng, size, C, K, pool)
    for image, style in (((3, 3), (3, 3)), ((3, 4), (5, 3)), ((5, 7), (3, 7)), ((7, 5), (6, 19)), ((4, 21), (9, 18))):
        for D in (1, 3, 5, 17, 19):
            for scaled in (False, True):
                for history in (False, True):
                    check_matching(library, rng, image, style, D, scaled, history)
                check_near_matching(library, rng, image, style, D, scaled)
            check_differences(library, rng, image, style, D)
    for kind in KEYS:
        for image, style, D, K in (((3, 3), (4, 20), 64, 0), ((6, 9), (8, 7), 64, 3), ((9, 4), (5, 19), 130, 10)):
            check_starts(library, rng, kind, image, style, D, K)
    for kinds in itertools.product(list(KEYS)[:9], repeat=2):           # without the huge ones
        for D, K in ((64, 0), (128, 3), (512, 10)):
            check_bounds(library, rng, kinds, D, K)
    print('right')


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1])
