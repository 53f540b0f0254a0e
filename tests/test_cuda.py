"""The CUDA path, executed on the CPU by cuda_on_cpu.cpp: its numbers, whole runs, and how strict that card is."""
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from card import CASES, IMAGES, compare
from conftest import ROOT

pytestmark = pytest.mark.slow


# ---- the same numbers as on the CPU ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def numbers(card, tmp_path_factory):
    """What card.py computes on the CPU, by the plain formulas, and on the card; both at once."""
    folder = tmp_path_factory.mktemp('numbers')
    devices = {'cpu': os.environ | {'PYTHONPATH': str(ROOT)}, 'cuda0': card}
    started = [subprocess.Popen([sys.executable, ROOT / 'tests/card.py', device, folder / f'{device}.npz'], env=env)
               for device, env in devices.items()]
    assert [process.wait() for process in started] == [0, 0]
    return [dict(np.load(folder / f'{device}.npz')) for device in devices]


@pytest.mark.parametrize('name', CASES)
def test_losses_gradient_and_matches_are_those_of_the_plain_formulas(numbers, name):
    losses, gradient, lack, compared = compare(*numbers, name)
    assert losses < 1e-5 and gradient < 1e-5 and lack < 1e-5 and compared > IMAGES / 2, compare(*numbers, name)


@pytest.mark.parametrize('name', CASES)
def test_the_order_of_threads_changes_nothing(numbers, name):
    card = numbers[1]
    reverse = [key for key in card if key.startswith(f'{name} 1')]
    assert len(reverse) >= 3 * IMAGES
    for key in reverse:
        np.testing.assert_array_equal(card[key], card[key.replace(f'{name} 1', f'{name} 0')], key)


# ---- whole runs ------------------------------------------------------------------------------------------------------

OPTIONS = ['--network=vgg16', '--device=gpu0', '--random-seed=1', '--save-every=0']
SMALL = [f'--style={ROOT / "samples/astronaut.png"}', f'--content={ROOT / "samples/hopper.png"}', '--max-size=48',
         '--style-layers=3_1', '--content-layers=3_1', '--variety=0.1', '--phases=2', '--iterations=3']
# Runs the program, and does something after an evaluation.
AFTER = '''
import ctypes, os, signal, sys
import doodle
number, action, *arguments = sys.argv[1:]
record = doodle.Journal.record
def recorded(journal, at, *rest):
    record(journal, at, *rest)
    if at.number == int(number):
        exec(action)
doodle.Journal.record = recorded
sys.exit(doodle.main(arguments))
'''
STOP = 'os.kill(os.getpid(), signal.SIGTERM)'
# Another process takes all memory that is left.
TAKE = '''
card, address, size = ctypes.CDLL('libcuda.so.1'), ctypes.c_uint64(), 1 << 33
while size > 1024:
    if card.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)):
        size //= 2
'''


def begin(card, folder, *arguments, after=0, action='', **switches):
    """The program as a process in `folder`, which exec()s `action` after so many evaluations."""
    return subprocess.Popen([sys.executable, '-c', AFTER, str(after), action, *OPTIONS, *arguments], cwd=folder,
                            env=card | switches, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    """Exit code, stdout and stderr of a process that has been started."""
    out, error = process.communicate(timeout=600)
    return process.returncode, out, error


def test_a_run_that_is_interrupted_and_lacks_memory_goes_on_to_the_same_picture(card, tmp_path):
    whole = begin(card, tmp_path, *SMALL, '--output=whole.png')
    code, out, _ = ended(begin(card, tmp_path, *SMALL, '--output=cut.png', after=2, action=STOP))
    assert code == 128 + signal.SIGTERM and 'Interrupted' in out
    code, out, error = ended(begin(card, tmp_path, *SMALL, '--output=cut.png', '--resume', after=5, action=TAKE))
    assert code == 2 and re.fullmatch('ERROR: .*memory.*\n  FIX: .*\n', error), error
    assert 'Going on from' in out and 'After 5 evaluations the image so far is in' in out
    code, out, error = ended(begin(card, tmp_path, *SMALL, '--output=cut.png', '--resume'))
    assert code == 0 and 'Using device `cuda0` (CUDA on the CPU, 8.0 GB' in out and not error, error
    assert ended(whole)[0] == 0
    assert (tmp_path / 'cut.png').read_bytes() == (tmp_path / 'whole.png').read_bytes()


def test_a_picture_too_large_for_the_card_is_refused_in_one_line(card, tmp_path):
    (tmp_path / 'output.png').write_bytes(b'before')
    Image.new('RGB', (1600, 1200)).save(tmp_path / 'large.png')
    process = begin(card, tmp_path, '--style=large.png', '--content=large.png', EMU_MEMORY='1e9', EMU_RUN='0')
    code, out, error = ended(process)
    assert code == 2 and re.fullmatch('ERROR: .*memory.*\n  FIX: .*\n', error), error
    assert (tmp_path / 'output.png').read_bytes() == b'before'


def test_the_kit_measures_a_run(card, tmp_path):
    command = [sys.executable, ROOT / 'tests/gpu_kit.py', 'measure', tmp_path / 'found', '32', '4', '--profile']
    subprocess.run(command, env=card, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / 'found').read_text())
    assert len(found['seconds']) == 4 and found['memory'] > 1e6 and found['ops']['GpuElemwise'] > 0


# ---- Nvidia's own compiler -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('capability', ['75', '86', '89', '90'])
def test_nvidias_compiler_takes_every_kernel(numbers, card, capability):
    if not (package := find_spec('nvidia') and find_spec('nvidia.cuda_nvrtc')):
        pytest.skip('nvrtc: the package nvidia-cuda-nvrtc-cu12')
    nvrtc = ctypes.CDLL(str(Path(package.submodule_search_locations[0], 'lib/libnvrtc.so.12')))
    sources = list(Path(card['EMU_DIR']).glob('*.cu'))
    assert len(sources) > 200

    def compiled(path):
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), None, 0, None, None)
        error = nvrtc.nvrtcCompileProgram(program, 1, (ctypes.c_char_p * 1)(f'-arch=compute_{capability}'.encode()))
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        return error and (path, log.value.decode())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        assert list(filter(None, threads.map(compiled, sources))) == []


# ---- the card is a strict one ----------------------------------------------------------------------------------------

KERNEL = '''
import ctypes, sys
import numpy as np, pygpu
kernel, blocks, threads = sys.argv[1], *map(int, sys.argv[2:])
context = pygpu.init('cuda0', max_cache_size=0)
f = pygpu.gpuarray.GpuKernel('#include "cluda.h"\\nKERNEL void f(float *x) {' + kernel + '}', 'f',
                             [pygpu.gpuarray.GpuArray], context=context)
for reverse in (0, 1):
    ctypes.CDLL('libcuda.so.1').emu_reverse(reverse)
    x = pygpu.empty((4,), dtype='float32', context=context)
    f(x, gs=blocks, ls=threads)
    print(*(f'{number:g}' for number in np.asarray(x)))
'''
SHARED = '__shared__ float s[4]; int i = threadIdx.x; s[i] = i; {} x[i] = s[3 - i];'        # needs a barrier


def run_kernel(card, kernel, blocks=1, threads=4, **switches):
    """A process in which a kernel works on four fresh numbers x and prints them, in both orders of threads."""
    return subprocess.run([sys.executable, '-c', KERNEL, kernel, str(blocks), str(threads)], env=card | switches,
                          capture_output=True, text=True)


@pytest.mark.parametrize('kernel, forward, reverse', [
    ('x[threadIdx.x] = blockIdx.x;', '1 1 1 1', '0 0 0 0'),            # a race: the last block wins
    (SHARED.format(''), 'nan nan 1 0', '3 2 nan nan'),
    (SHARED.format('__syncthreads();'), '3 2 1 0', '3 2 1 0'),
    ('if (threadIdx.x) x[threadIdx.x] = 1;', 'nan 1 1 1', 'nan 1 1 1')])
def test_the_order_of_threads_shows_a_race_and_fresh_memory_is_nan(card, kernel, forward, reverse):
    assert run_kernel(card, kernel, blocks=2).stdout.split('\n')[:2] == [forward, reverse]


@pytest.mark.parametrize('kernel, said', [
    ('x[0] = x[4];', 'f touches byte 16 of a buffer of 16'), ('x[0] = x[-1];', 'f touches byte -4 of a buffer of 16'),
    ('x[-5000] = 1;', 'f touches what belongs to no buffer')])
def test_a_kernel_that_leaves_its_buffer_is_stopped(card, kernel, said):
    done = run_kernel(card, kernel)
    assert done.returncode == -signal.SIGSEGV and said in done.stderr, done.stderr


def test_the_host_cannot_read_the_card(card):
    code = '''
import ctypes
card, address = ctypes.CDLL('libcuda.so.1'), ctypes.c_uint64()
assert not card.cuInit(0) and not card.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(16))
ctypes.string_at(address.value, 1)'''
    done = subprocess.run([sys.executable, '-c', code], env=card, capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV and 'the host touches byte 0 of a buffer of 16' in done.stderr


@pytest.mark.parametrize('kernel, blocks, threads, switches, said', [
    ('', 1, 1025, {}, '1x1x1 blocks of 1025x1x1 threads'),
    ('if (threadIdx.x) __syncthreads();', 1, 4, {}, 'some threads end before a barrier'),
    ('', 1, 1, {'EMU_CARDS': '12.0'}, 'invalid value for --gpu-architecture')])     # libgpuarray: compute_12
def test_what_a_card_refuses_is_refused(card, kernel, blocks, threads, switches, said):
    done = run_kernel(card, kernel, blocks, threads, **switches)
    assert done.returncode == 1 and said in done.stderr, done.stderr
