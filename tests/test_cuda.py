"""The CUDA path, executed on the CPU by cuda_on_cpu.cpp."""
import signal
import subprocess
import sys

import pytest

KERNEL = '''
import numpy as np, pygpu, sys
kernel, blocks, threads = sys.argv[1], *map(int, sys.argv[2:])
context = pygpu.init('cuda0', max_cache_size=0)
x = pygpu.empty((4,), dtype='float32', context=context)
f = pygpu.gpuarray.GpuKernel('#include "cluda.h"\\nKERNEL void f(float *x) {' + kernel + '}', 'f',
                             [pygpu.gpuarray.GpuArray], context=context)
f(x, gs=blocks, ls=threads)
print(*np.asarray(x))
'''


def run_kernel(card, kernel, blocks=1, threads=4, **switches):
    """A process that lets a kernel work on four fresh float32s, `x`, and prints them."""
    return subprocess.run([sys.executable, '-c', KERNEL, kernel, str(blocks), str(threads)], env=card | switches,
                          capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize('kernel, reverse, said', [
    ('x[0] = x[4];', '0', 'byte 16 of a buffer of 16'), ('x[0] = x[-1];', '1', 'byte -4 of a buffer of 16'),
    ('x[-5000] = 1;', '0', 'belongs to no buffer')])
def test_a_kernel_that_leaves_its_buffer_is_stopped(card, kernel, reverse, said):
    done = run_kernel(card, kernel, EMU_REVERSE=reverse)
    assert done.returncode == -signal.SIGSEGV and said in done.stderr, done.stderr
