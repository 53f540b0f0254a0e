"""The GPU path: Theano's gpuarray back end on an OpenCL device, and what is said of CUDA where it cannot be used.

Nvidia's libraries are small fakes here. OpenCL is real: with Debian's pocl the CPU is such a device.
"""
import ctypes
import io
import json
import os
import re
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
OPTIONS = '--style=- --variety=0.3 --content-layers=2_1 --style-layers=2_1'.split()


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


def evaluations(doodle, fast, slices=0):
    """Loss terms and gradient at two images, one after the other."""
    weights, _ = doodle.read_weights(str(ROOT / 'vgg16.npz'))
    rng = np.random.default_rng(0)
    image, style, *xs = (rng.uniform(0, 255, (3, *side)) for side in ((22, 26), (30, 18), (22, 26), (22, 26)))
    m, n = (rng.integers(0, 2, (*side, 2)) * 255. for side in ((22, 26), (30, 18)))
    options = doodle.parse_options(OPTIONS)
    objective = doodle.Objective(weights, options, True, True, fast, slices=slices)
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


@pytest.mark.parametrize('device, driver, compiler, cards, problem, fix', [
    ('cuda0', (12, 2), (12, 4), [(8, 6)], 'too old: it is for CUDA 12.2, .* 12.4', 'newer driver'),
    ('cuda1', (12, 8), (12, 4), [(6, 1), (12, 0)], 'too new: .* is 12.0', 'older card'),
    ('cuda', (13, 0), (12, 4), [(10, 0)], 'too new: .* is 10.0', 'older card')])
def test_a_card_or_driver_that_cannot_work_is_refused(doodle, nvidia, device, driver, compiler, cards, problem, fix):
    nvidia(driver, compiler, cards)
    with pytest.raises(doodle.UserError, match=problem) as error:
        doodle.check_cuda(device)
    assert fix in error.value.args[1]


@pytest.mark.parametrize('device, driver, cards', [
    ('cuda0', (12, 4), [(6, 1)]), ('cuda', (13, 0), [(9, 0)]), ('cuda0', (12, 4), [(8, 9), (12, 0)]),
    ('cuda0', (12, 4), []), ('cuda7', (12, 4), [(6, 1)])])              # the last two pygpu itself refuses well
def test_what_may_work_is_let_through(doodle, nvidia, device, driver, cards):
    nvidia(driver, (12, 4), cards)
    doodle.check_cuda(device)


@pytest.mark.parametrize('container', [False, True])
def test_no_driver_is_said_to_be_missing(doodle, nvidia, monkeypatch, container):
    if container:
        monkeypatch.setenv('DOODLE_CONTAINER', '1')
    with pytest.raises(doodle.UserError, match='libcuda') as error:
        doodle.check_cuda('cuda0')
    assert ('--gpus all' in error.value.args[1]) == container


def test_the_run_goes_on_on_the_cpu(tmp_path):
    make_nvidia(tmp_path, (12, 8), (12, 4), [(12, 0)])
    (tmp_path / 'pygpu.py').touch()
    code = ('import doodle, sys; doodle.Objective = lambda *_: sys.exit("stop"); '
            'doodle.main(["--style=samples/gravel.png", "--device=gpu0", "--network=vgg16", "--save-every=0", '
            f'"--output={tmp_path}/output.png"])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {'LD_LIBRARY_PATH': str(tmp_path), 'PYTHONPATH': str(tmp_path)})
    warning, = re.findall('^WARNING.*$', done.stdout, re.MULTILINE)
    assert 'cuda0 cannot be used: the card is too new' in warning and 'on the CPU instead. FIX: ' in warning
    assert 'Using device `cpu`' in done.stdout and done.stderr == 'stop\n'


def test_a_gpu_is_named_with_memory_and_driver(doodle, monkeypatch):
    card = SimpleNamespace(devname='NVIDIA GeForce GTX 1080', total_gmem=8_513_978_368)
    monkeypatch.setattr(doodle.theano, 'gpuarray', SimpleNamespace(get_context=lambda name: card), raising=False)
    monkeypatch.setattr(doodle, 'open', lambda path, **_: io.StringIO(version), raising=False)
    version = 'NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC: 12.2'
    assert doodle.described('cpu') == '`cpu`'
    assert doodle.described('cuda0') == '`cuda0` (NVIDIA GeForce GTX 1080, 8.5 GB, driver 535.104.05)'


if __name__ == '__main__':                                              # in a process of its own, which has the GPU
    import doodle as program
    program.import_pillow()
    assert program.import_theano(DEVICE) == (DEVICE, None)
    np.savez(sys.argv[1], *evaluations(program, fast=False, slices=2))
