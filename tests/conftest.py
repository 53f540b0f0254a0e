"""What the tests share: the program as a module, as a process, and as it answers mistakes."""
import ctypes
import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

from card import build

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ['https_proxy'] = 'http://127.0.0.1:9'    # no test reaches the net
# The same examples each time. What fails is told as it was drawn: to look for a smaller one takes minutes.
settings.register_profile('doodle', derandomize=True, deadline=20_000, phases=(Phase.explicit, Phase.generate),
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile('doodle')


def mostly_slow(values, *quick):
    """Parameters of a test, all slow but the `quick` ones."""
    return [value if value in quick else
            pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow) for value in values]


def first_quick(values, count):
    """Parameters of a test, all slow but the first `count`."""
    return [*values[:count], *mostly_slow(values[count:])]


class NoNetwork:
    """What is the same in all objectives without a network; a test adds `__call__`."""
    style, target, history, pure = {}, {}, np.zeros(0), True

    def __init__(self, *_, **__):
        pass

    def set_phase(self, *_):
        self.fresh = True

    def state(self):
        return {'history': self.history, 'fresh': np.array(self.fresh)}

    def restore(self, state):
        self.history, self.fresh = state['history'], bool(state['fresh'])

    def put(self, state):
        self.restore(state)


def minimised(minimiser, evaluate, evaluations):
    """Minimise `evaluate`, x -> (loss, gradient), for so many evaluations; returns the minimiser."""
    for _ in range(evaluations):
        minimiser.tell(*evaluate(minimiser.ask()))
    return minimiser


def module(name):
    """A program of .docker, which has no ending."""
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / '.docker' / name))
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(found)
    return found


@pytest.fixture(scope='session')
def doodle():
    """The program's functions, with NumPy, Pillow and Theano imported."""
    module = importlib.import_module('doodle')
    module.import_pillow()
    with mock.patch.dict(os.environ):    # THEANO_FLAGS of this process are no wish of the user's in those of `run`
        module.import_theano('cpu')
    return module


@pytest.fixture(scope='session')
def run():
    """The program as a process: run(folder, '--style=a.png', ..., NAME='value of the environment')."""
    def run(folder, *arguments, **environment):
        return subprocess.run([sys.executable, ROOT / 'doodle.py', *arguments], cwd=folder, timeout=600, text=True,
                              env=os.environ | environment, capture_output=True)
    return run


@pytest.fixture(scope='session')
def card(tmp_path_factory, pytestconfig):
    """The environment of a process in which CUDA has a card: cuda_on_cpu.cpp, whose head tells its switches."""
    folder = tmp_path_factory.mktemp('card')
    (folder / 'packages').mkdir()
    for package in ('pygpu', 'mako', 'markupsafe'):                     # Debian's, and none of its other packages
        debian = Path('/usr/lib/python3/dist-packages', package)
        if debian.exists() and not importlib.util.find_spec(package):
            (folder / 'packages' / package).symlink_to(debian)
    path = os.pathsep.join(map(str, (folder / 'packages', ROOT, ROOT / 'tests')))
    tried = subprocess.run([sys.executable, '-c', 'import pygpu'], env=os.environ | {'PYTHONPATH': path},
                           capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f'pygpu: {tried.stderr.splitlines()[-1]}')
    build(folder)
    cache = getattr(pytestconfig, 'cache', None)
    kept = cache.mkdir('cuda-on-cpu') if cache else folder
    # Compiled code lies by itself: nobody waits for another's lock. Without preallocation each buffer has guards.
    flags = {'gcc.cxxflags': '-O0', 'gpuarray.preallocate': '-1', 'gpuarray.cache_path': folder / 'cache',
             'base_compiledir': kept / 'theano'}
    flags = [os.environ.get('THEANO_FLAGS', ''), *(f'{name}={value}' for name, value in flags.items())]
    return os.environ | {'LD_LIBRARY_PATH': str(folder), 'EMU_DIR': str(kept / 'kernels'), 'PYTHONPATH': path,
                         'THEANO_FLAGS': ','.join(filter(None, flags))}


@pytest.fixture
def black(doodle):
    """The inputs of a run with a black content and style picture of `side` x `side` pixels."""
    def black(side):
        picture = np.zeros((side, side, 3), np.uint8)
        return doodle.Inputs(picture, None, picture, None, None, (side, side), None, None)
    return black


@pytest.fixture
def threads():
    """Sets the number of the engine's threads, which after the test is what it was before."""
    library = ctypes.CDLL('libgomp.so.1')
    before = library.omp_get_max_threads()
    yield library.omp_set_num_threads
    library.omp_set_num_threads(before)


@pytest.fixture
def handlers():
    """Handlers of signals are after the test what they were before."""
    before = {number: signal.getsignal(number) for number in importlib.import_module('doodle').SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch, handlers):
    """The problem and the fix that the program answers to a mistake, before any work: refused('--style=a.png', ...)."""
    program = importlib.import_module('doodle')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, 'import_theano', lambda device: pytest.fail('not refused'))

    def refused(*arguments):
        assert program.main(list(map(str, arguments))) == 2
        problem, fix = re.fullmatch(r'ERROR: (.+)\n  FIX: (.+)\n', capsys.readouterr().err).groups()    # no third line
        return problem, fix
    return refused


@pytest.fixture(scope='module')
def browser():
    """A tab of Chromium."""
    if not (shutil.which('chromium') and shutil.which('chromedriver')):
        pytest.skip('no chromium or chromedriver')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    for switch in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'window-size=1280,800'):
        options.add_argument(f'--{switch}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    options.binary_location = shutil.which('chromium')
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which('chromedriver')))
    driver.execute_cdp_cmd('Page.addScriptToEvaluateOnNewDocument', {'source': 'delete window.showSaveFilePicker'})
    yield driver
    driver.quit()


@pytest.fixture
def start(monkeypatch, tmp_path, doodle):
    """The start, with its cache in tmp_path, and the environment put back at the end."""
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    start = module('start')
    monkeypatch.setattr(start, 'CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(doodle, 'SAMPLE', doodle.SAMPLE)
    monkeypatch.setattr(sys, 'argv', ['start'])
    for name in ('DOODLE_CONTAINER', 'DOODLE_OFFLINE', 'DOODLE_DEVICE', 'HOME', 'TMPDIR', 'XDG_CACHE_HOME',
                 'THEANO_FLAGS'):
        monkeypatch.setenv(name, '')                                    # so that it is put back
        monkeypatch.delenv(name)
    return start
