"""The engine's C++ as if it stood in a file: compiled with all warnings, and run under the sanitizers on odd sizes.

The code becomes a library beside `LIBRARY`'s few functions, and a Python of its own, started with the sanitizers'
runtime, calls them: this file as a script. There each array is a block of memory whose ends are watched, and so is the
working memory of each call; what was not written is NaN.
"""
import ctypes
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
PyObject *matched(Argument u, Argument v, Argument a, Argument b) {
    return called([&](Argument *j, Argument *) { matching(u, v, a, b, NULL, j, NULL); });
}
PyObject *varied(Argument u, Argument v, Argument a, Argument b, Argument penalty) {
    return called([&](Argument *j, Argument *history) { matching(u, v, a, b, penalty, j, history); });
}
PyObject *nearly(Argument u, Argument v, Argument b, Argument guess, Argument draws) {
    return called([&](Argument *j, Argument *) { near_matching(u, v, b, b, guess, draws, j); });
}
}
'''
FLAGS = '-std=c++11 -O1 -g -shared -fPIC -fopenmp -Wall -Wextra -Werror -fsanitize=address,undefined ' \
        '-fno-sanitize-recover=all -DNPY_NO_DEPRECATED_API=NPY_1_7_API_VERSION'.split()
# The engine keeps its working memory, at its largest and with what is in it. Here each call begins with none.
FRESH = {'static std::vector<float> kept;': 'static std::vector<float> kept; kept.clear();',
         'kept.resize(floats + 16);': 'kept.resize(floats + 16, NAN);'}
PROCESSORS = ['native', 'x86-64'] if platform.machine() == 'x86_64' else ['native']     # vectors of 8 or 16, and of 4


def shared_object(name):
    """The path of one of the compiler's own libraries."""
    return subprocess.check_output(['g++', f'-print-file-name={name}'], text=True).strip()


@pytest.mark.parametrize('processor', mostly_slow(PROCESSORS))
def test_the_code_has_no_warnings_stays_within_its_memory_and_is_right(doodle, tmp_path, processor):
    source, library = tmp_path / 'engine.cpp', tmp_path / 'engine.so'
    code = doodle.COMMON + doodle.CONVOLUTION + doodle.MATCHING + doodle.NEAR_MATCHING
    for line, fresh in FRESH.items():
        assert code.count(line) == 1
        code = code.replace(line, fresh)
    source.write_text(LIBRARY % code)
    folders = sysconfig.get_paths()['include'], np.get_include()
    built = subprocess.run(['g++', *FLAGS, f'-march={processor}', *(f'-isystem{folder}' for folder in folders), source,
                            '-o', library], capture_output=True, text=True)
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


def check_matching(library, rng, image, style, D, scaled, history):
    """One search against the products of all patches."""
    u, v = (rng.normal(size=(*size, D)).astype(np.float32) for size in (image, style))
    p, q = (sliding_window_view(np.float64(k), (3, 3), (0, 1)).reshape(-1, 9 * D) for k in (u, v))
    a, b, penalty = (rng.random(count, np.float32) for count in (len(p), len(q), len(q)))
    b[::3] *= len(b) == 1                                               # no patches; at least one is left
    S = q @ p.T                                                         # (j, i)
    S = S * np.outer(b, a) if scaled else S
    none = np.zeros(0, np.float32)
    a, b = (a, b) if scaled else (none, none)
    j, *new = library.varied(u, v, a, b, penalty) if history else library.matched(u, v, a, b)
    scores = S - penalty[:, None] if history else S
    if scaled:
        scores[b == 0] = -np.inf
    assert j.dtype == np.int64 and j.shape == (len(p),) and 0 <= j.min() and j.max() < len(q)
    assert (scores.max(axis=0) - scores[j, np.arange(len(p))]).max() < 1e-4
    if history:
        np.testing.assert_allclose(new[0], S.max(axis=1), atol=1e-4)


def check_near_matching(library, rng, image, style, D, scaled):
    """A near search, which makes no match worse, and with enough sweeps finds the best."""
    u, v = (rng.normal(size=(*size, D)).astype(np.float32) for size in (image, style))
    p, q = (sliding_window_view(np.float64(k), (3, 3), (0, 1)).reshape(-1, 9 * D) for k in (u, v))
    b = rng.random(len(q) * scaled, np.float32)
    b[::3] *= len(b) == 1
    S, i, guess = q @ p.T * (b[:, None] if scaled else 1), np.arange(len(p)), rng.integers(0, len(q), len(p))
    if scaled:
        S[b == 0] = -np.inf
    found = {sweeps: library.nearly(u, v, b, guess, np.array([sweeps, 5]))[0] for sweeps in (1, 60)}
    assert (S[found[1], i] - S[guess, i]).min() > -1e-4 and (S.max(axis=0) - S[found[60], i]).max() < 1e-4


def check_refusals(library):
    """What does not fit raises ValueError, and nothing of it is read."""
    def ones(*shape):
        return np.ones(shape, np.float32)
    for function, arguments in (
            (library.convolved, (ones(6, 6, 5), ones(36, 48), ones(4), 0)),
            (library.gradient, (ones(5, 6, 3), ones(6, 6, 3), ones(36, 48), ones(6, 6, 3), 0)),
            (library.matched, (ones(2, 5, 3), ones(5, 5, 3), ones(0), ones(0))),
            (library.matched, (ones(5, 5, 3), ones(5, 5, 4), ones(0), ones(0))),
            (library.matched, (ones(5, 5, 3), ones(5, 5, 3), ones(8), ones(9))),
            (library.varied, (ones(5, 5, 3), ones(5, 5, 3), ones(0), ones(0), ones(8))),
            (library.nearly, (ones(5, 5, 3), ones(5, 5, 4), ones(0), np.zeros(9, int), np.array([1, 0]))),
            (library.nearly, (ones(5, 5, 3), ones(5, 5, 3), ones(0), np.zeros(8, int), np.array([1, 0]))),
            (library.nearly, (ones(5, 5, 3), ones(5, 5, 3), ones(0), np.full(9, 9), np.array([1, 0])))):
        try:
            function(*arguments)
        except ValueError:
            continue
        raise AssertionError(f'{function.__name__} took what does not fit')


def main(path):
    import doodle
    doodle.import_pillow()
    library = ctypes.PyDLL(path)
    for name, arguments in dict(begin=0, convolved=3, gradient=4, matched=4, varied=5, nearly=5).items():
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
    print('right')


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1])
