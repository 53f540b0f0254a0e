"""The GPU path: Theano's gpuarray back end on an OpenCL device, and what is said of CUDA where it cannot be used.

Where CUDA is missing or too old, Nvidia's libraries are small fakes here; newer cards are those of cuda_on_cpu.cpp.
OpenCL is real: with Debian's pocl the CPU is such a device.
"""
import ctypes
import io
import json
import os
import re
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ROOT

DEVICE = 'opencl0:0'
QUICK = os.environ.get('THEANO_FLAGS', '') + ',gcc.cxxflags=-O0'        # what surrounds a kernel need not be fast
OPTIONS = '--style=- --variety=0.3 --slices=2 --content-layers=2_1 --style-layers=2_1'.split()


# ---- the same numbers ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def path(tmp_path_factory):
    """A PYTHONPATH by which this Python finds Debian's pygpu, but none of Debian's other packages."""
    folder = tmp_path_factory.mktemp('pygpu')
    for package in ('pygpu', 'mako', 'markupsafe'):
        if not find_spec(package) and (debian := Path('/usr/lib/python3/dist-packages', package)).exists():
            (folder / package).symlink_to(debian)
    tried = subprocess.run([sys.executable, '-c', f'import pygpu; pygpu.init("{DEVICE}")'], capture_output=True,
                           text=True, env=os.environ | {'PYTHONPATH': str(folder)})
    if tried.returncode:
        pytest.skip(f'pygpu with an OpenCL device: {tried.stderr.splitlines()[-1]}')
    return str(folder)


def evaluations(doodle, fast):
    """Loss terms and gradient at two images, one after the other."""
    weights, _ = doodle.read_weights(str(ROOT / 'vgg16.npz'))
    rng = np.random.default_rng(0)
    image, style, *xs = (rng.uniform(0, 255, (3, *side)) for side in ((22, 26), (30, 18), (22, 26), (22, 26)))
    m, n = (rng.integers(0, 2, (*side, 2)) * 255. for side in ((22, 26), (30, 18)))
    options = doodle.parse_options(OPTIONS)
    objective = doodle.Objective(weights, options, True, True, fast, slices=options.slices)
    objective.set_phase(image, style, m, n, (26, 22))
    for found in map(objective, xs):
        yield from ([*found.content.values(), *found.style.values(), found.smooth], found.gradient)


@pytest.mark.slow
def test_losses_and_gradient_are_those_of_the_cpu(doodle, path, tmp_path):
    subprocess.run([sys.executable, __file__, tmp_path / 'gpu.npz'], check=True,
                   env=os.environ | {'PYTHONPATH': f'{path}:{ROOT}', 'THEANO_FLAGS': QUICK})
    with np.load(tmp_path / 'gpu.npz') as file:
        theirs = list(file.values())
    ours = list(evaluations(doodle, fast=True))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * np.max(a))


@pytest.mark.slow
def test_a_run_names_the_gpu_and_takes_slices_by_its_memory(run, path, tmp_path):
    done = run(tmp_path, f'--style={ROOT / "samples/gravel.png"}', f'--device={DEVICE}', '--network=vgg16', '--log=log',
               '--max-size=32', '--style-layers=2_1', '--cache=1', '--phases=1', '--iterations=2', '--save-every=0',
               PYTHONPATH=path, THEANO_FLAGS=QUICK)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.search(rf'Using device `{DEVICE}` \(.+, \d+\.\d GB', done.stdout)
    header, *log = map(json.loads, (tmp_path / 'log').read_text().splitlines())
    assert header['device'] == DEVICE and header['slices'] == 1
    assert [entry['matching_seconds'] for entry in log] == [None, None] and (tmp_path / 'output.png').is_file()


# ---- CUDA that cannot be used ----------------------------------------------------------------------------------------

def make_nvidia(folder, driver, compiler, cards):
    """Libraries of a driver and a compiler for these versions of CUDA, and cards of these compute capabilities."""
    sources = {'libnvrtc.so': 'int nvrtcVersion(int *a, int *b) {{ *a = {}; *b = {}; return 0; }}'.format(*compiler),
               'libcuda.so.1': f'''
        static int cards[][2] = {{{', '.join('{{{}, {}}}'.format(*card) for card in cards)}}};
        int cuDriverGetVersion(int *version) {{ *version = {1000 * driver[0] + 10 * driver[1]}; return 0; }}
        int cuInit(unsigned flags) {{ return {0 if cards else 100}; }}
        int cuDeviceGet(int *device, int n) {{ *device = n; return n < {len(cards)} ? 0 : 101; }}
        int cuDeviceComputeCapability(int *a, int *b, int n) {{ *a = cards[n][0]; *b = cards[n][1]; return 0; }}'''}
    for name, source in sources.items():
        subprocess.run(['g++', '-shared', '-fPIC', '-xc++', '-', '-o', folder / name], text=True, check=True,
                       input=f'extern "C" {{ {source} }}')


@pytest.fixture
def nvidia(doodle, tmp_path, monkeypatch):
    """Makes the libraries, the only ones that there are."""
    load = ctypes.CDLL
    monkeypatch.setattr(doodle.ctypes, 'CDLL', lambda name: load(str(tmp_path / name)))
    return lambda *what: make_nvidia(tmp_path, *what)


def test_a_driver_that_cannot_work_is_refused(doodle, nvidia):
    nvidia((12, 2), (12, 4), [(8, 6)])
    with pytest.raises(doodle.UserError, match='too old: it is for CUDA 12.2, .* 12.4') as error:
        doodle.check_cuda()
    assert 'newer driver' in error.value.fix


@pytest.mark.parametrize('device, driver, cards, capability', [
    ('cuda0', (12, 4), [(6, 1)], (6, 1)), ('cuda', (13, 0), [(9, 0)], (9, 0)), ('cuda', (13, 0), [(10, 0)], (10, 0)),
    ('cuda0', (12, 8), [(8, 9), (12, 0)], (8, 9)), ('cuda1', (12, 8), [(8, 9), (12, 0)], (12, 0)),
    ('cuda0', (12, 4), [], None), ('cuda7', (12, 4), [(6, 1)], None)])  # the last two pygpu itself refuses well
def test_what_may_work_is_let_through(doodle, nvidia, device, driver, cards, capability):
    nvidia(driver, (12, 4), cards)
    doodle.check_cuda()
    assert doodle.capability_of(device) == capability


@pytest.mark.parametrize('container', [False, True])
def test_no_driver_is_said_to_be_missing(doodle, nvidia, monkeypatch, container):
    if container:
        monkeypatch.setenv('DOODLE_CONTAINER', '1')
    with pytest.raises(doodle.UserError, match='libcuda') as error:
        doodle.check_cuda()
    assert ('--gpus all' in error.value.args[1]) == container


def test_the_run_goes_on_on_the_cpu(tmp_path):
    make_nvidia(tmp_path, (12, 2), (12, 4), [(8, 6)])
    (tmp_path / 'pygpu.py').touch()
    code = ('import doodle, sys; doodle.Objective = lambda *_: sys.exit("stop"); '
            'doodle.main(["--style=samples/gravel.png", "--device=gpu0", "--network=vgg16", "--save-every=0", '
            f'"--output={tmp_path}/output.png"])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {'LD_LIBRARY_PATH': str(tmp_path), 'PYTHONPATH': str(tmp_path)})
    warning, = re.findall('^WARNING.*$', done.stdout, re.MULTILINE)
    assert "cuda0 cannot be used: Nvidia's driver is too old" in warning and 'on the CPU instead. FIX: ' in warning
    assert 'Using device `cpu`' in done.stdout and done.stderr == 'stop\n'


def test_a_gpu_is_named_with_memory_and_driver(doodle, monkeypatch):
    card = SimpleNamespace(devname='NVIDIA GeForce GTX 1080', total_gmem=8_513_978_368)
    monkeypatch.setattr(doodle.theano, 'gpuarray', SimpleNamespace(get_context=lambda name: card), raising=False)
    monkeypatch.setattr(doodle, 'open', lambda path, **_: io.StringIO(version), raising=False)
    monkeypatch.setattr(doodle, 'capability_of', lambda device: (6, 1))
    version = 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC: 12.2'
    facts = 'NVIDIA GeForce GTX 1080, 8.5 GB, driver 535.104.05'
    assert doodle.described('cpu') == '`cpu`' and doodle.described('opencl0:0') == f'`opencl0:0` ({facts})'
    assert doodle.described('cuda0') == f'`cuda0` ({facts}, compute capability 6.1)'


# ---- newer cards -----------------------------------------------------------------------------------------------------

OPENED = '''
import numpy as np, os, sys, doodle
doodle.import_pillow()
used, trouble = doodle.import_theano(sys.argv[1])
print(*trouble.args if trouble else [doodle.described(used)], sep='\\n')
if not trouble:
    import pygpu
    context = doodle.theano.gpuarray.get_context(None)
    x = pygpu.zeros((2,), dtype='float32', context=context)
    source = '#include "cluda.h"\\nKERNEL void fill(float *x) { x[threadIdx.x] = 1; }'
    pygpu.gpuarray.GpuKernel(source, 'fill', [pygpu.gpuarray.GpuArray], context=context)(x, gs=1, ls=2)
    assert np.all(np.asarray(x) == 1)
    kernels = doodle.theano.config.gpuarray.cache_path
    assert os.listdir(kernels)
    print(os.path.basename(kernels), context.bin_id.decode())
'''


def opened(card, device, cards, **switches):
    """What a process says that opens a device and runs a kernel on it."""
    done = subprocess.run([sys.executable, '-c', OPENED, device], env=card | switches | {'EMU_CARDS': cards}, text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize('device, cards, capability, code', [
    ('cuda', '10.0', '10.0', 'compute_90'), ('cuda0', '12.0,8.6,9.0', '12.0', 'compute_90'),
    ('cuda1', '12.0,8.6,9.0', '8.6', 'compute_86'), ('cuda2', '12.0,8.6,9.0', '9.0', 'compute_90')])
def test_each_card_gets_code_that_fits_it_and_that_is_kept_apart(card, device, cards, capability, code):
    *remarks, used, kept = opened(card, device, cards)
    newer = f'  - The card has compute capability {capability}: libgpuarray makes code for 9.0, and the driver '
    assert sum(remark.startswith(newer) for remark in remarks) == (float(capability) > 9)
    assert re.fullmatch(rf'`{device}` \(.+, \d+\.\d GB, (driver \S+, )?compute capability {capability}\)', used)
    assert kept == f'{capability} {code}' and "b'" not in used


@pytest.mark.slow
def test_the_second_start_on_a_newer_card_compiles_nothing(run, card, tmp_path):
    """What is left is its own time, in seconds of the processor; a driver's comes on top."""
    environment = card | {'EMU_CARDS': '12.0', 'EMU_HOLLOW': '1', 'EMU_COUNTS': str(tmp_path / 'counts'),
                          'THEANO_FLAGS': f'{card["THEANO_FLAGS"]},gpuarray.cache_path={tmp_path / "kernels"}'}
    for second in False, True:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = run(tmp_path, f'--style={ROOT / "samples/gravel.png"}', '--device=gpu0', '--network=vgg16',
                   '--max-size=48', '--phases=1', '--iterations=1', '--save-every=0', **environment)
        assert done.returncode == 0 and 'compute capability 12.0)' in done.stdout, done.stderr
        assert ('compile' in json.loads((tmp_path / 'counts').read_text())) != second
    assert 'Some of it is new' not in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 15


@pytest.mark.slow
def test_why_there_is_no_card_is_said_in_words(card):
    problem, fix = opened(card, 'cuda0', '')
    assert problem.startswith('cuda0 cannot be used: cuInit: ') and "b'" not in problem


def test_that_a_newer_card_cannot_be_used_is_one_line(doodle, monkeypatch, capsys):
    cache = type(doodle.theano.config.gpuarray).cache_path
    monkeypatch.setattr(cache, 'val', 'kernels', raising=False)
    monkeypatch.setattr(doodle, 'text_of', lambda path: '7f00-7f01 r-xp 0 00:00 0  /no/libcuda.so.580.1\n')
    with pytest.raises(doodle.UserError, match='the card has compute capability 12.0, .*/no/libcuda.so.580.1') as error:
        doodle.adapt_to((12, 0))
    assert '\n' not in error.value.problem and not capsys.readouterr().out


if __name__ == '__main__':                                              # in a process of its own, which has the GPU
    import doodle as program
    program.import_pillow()
    assert program.import_theano(DEVICE) == (DEVICE, None)
    np.savez(sys.argv[1], *evaluations(program, fast=False))
