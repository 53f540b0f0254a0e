#!/usr/bin/env python3
"""All that the program needs on a machine with a card, in one file, and what is measured there.

Here, on Debian 12 with pygpu:

    python tests/gpu_kit.py pack KIT.tar.xz

There, on any x86-64 Linux with glibc 2.36 or newer, g++, Nvidia's driver, nvrtc and cuBLAS, without the net:

    mkdir /tmp/kit && tar xJf KIT.tar.xz -C /tmp/kit && sh /tmp/kit/run RESULTS

That compares all methods with the CPU by small pictures; times the program at 559 and 1024 pixels, with its memory and
the share of each Op; times PyTorch on the same card, where python3 has it; and ends with SAME or NOT THE SAME. With
--emulate the card is cuda_on_cpu.cpp, and all pictures are small.
"""
import argparse
import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
DEBIAN = ('python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev libexpat1 libffi8 zlib1g '
          'libbz2-1.0 liblzma5 libssl3 libgpuarray3 libgpuarray-dev python3-pygpu python3-mako python3-markupsafe'
          ).split()
PACKAGES = 'Theano Lasagne numpy scipy Pillow tqdm scipy-openblas32 six setuptools'.split()
LEFT_OUT = ('etc/*', 'usr/share/*', 'usr/src/*', 'usr/*/tests/*', '*/test/*', '*/__pycache__/*', '*/idlelib/*',
            '*/lib2to3/*', '*/pydoc_data/*', '*/ensurepip/*', '*/numpy/f2py/*', '*/PIL/_avif*', '*libavif*', '*.a',
            '*.pyi', '*.pyx')
PROGRAM = ['doodle.py', 'vgg16.npz', 'tests/card.py', 'tests/cuda_on_cpu.cpp', 'tests/gpu_kit.py', 'tests/peer.py',
           'tests/twin.py', *(f'samples/{name}{end}.png' for name in ('astronaut', 'hopper') for end in ('', '_sem'))]
START = '''#!/bin/sh
kit=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH="$kit/usr/lib:$kit/usr/lib/x86_64-linux-gnu" PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
exec "$kit/usr/bin/python3.11" "$kit/program/tests/gpu_kit.py" run "$@"
'''


# ---- pack ------------------------------------------------------------------------------------------------------------

def files():
    """(path in the kit, path here) of all that a run on a card needs, but for CUDA and g++."""
    for path in subprocess.run(['dpkg', '-L', *DEBIAN], capture_output=True, text=True, check=True).stdout.splitlines():
        if os.path.islink(path) or os.path.isfile(path):
            yield re.sub('^/lib/', '/usr/lib/', path)[1:], path
    for name in PACKAGES:
        for file in metadata.distribution(name).files:
            path = Path(file.locate())
            if '..' not in file.parts and path.is_file():
                yield f'usr/lib/python3.11/dist-packages/{file}', str(path)
    for name in PROGRAM:
        yield f'program/{name}', str(ROOT / name)


def pack(out):
    """Write the kit."""
    with tarfile.open(out, 'w:xz', preset=6) as kit, tempfile.TemporaryDirectory() as folder:
        start = Path(folder, 'run')
        start.write_text(START)
        kit.add(start, 'run')
        for name, path in files():
            if not any(fnmatch(name, pattern) for pattern in LEFT_OUT) or '/theano/tests/' in name:     # it needs them
                kit.add(path, name)
    print(f'{out}: {os.path.getsize(out) / 2**20:.0f} MiB')


# ---- run -------------------------------------------------------------------------------------------------------------

def cuda_library(name):
    """The path of a library of CUDA, from the loader's list, CUDA's folders, or any other; None: it is not there."""
    listed = subprocess.run(['/sbin/ldconfig', '-p'], capture_output=True, text=True).stdout
    found = re.findall(rf'=> (\S*/{name}\.so\.\d+)$', listed, re.MULTILINE)
    for pattern in '/usr/local/cuda*/lib64', '/usr/local/cuda*/targets/*/lib', '/usr/local/nvidia/lib*':
        found += glob.glob(f'{pattern}/{name}.so.*')
    if not found:
        search = ['find', '/', '-xdev', '-name', f'{name}.so.[0-9]*', '-not', '-path', '*/stubs/*']
        found = subprocess.run(search, capture_output=True, text=True).stdout.splitlines()
    return next(iter(found), None)


def environment(folder, emulate):
    """The environment of the program's processes, with CUDA's libraries under the names that libgpuarray opens."""
    from card import LIBRARIES, build
    path = [str(folder)]
    if emulate:
        build(folder)
    else:
        for name in map('lib{}'.format, LIBRARIES):
            library = cuda_library(name)
            print(f'{name}: {library or "not found"}')
            if library:
                for link in f'{name}.so', os.path.basename(library):
                    os.symlink(library, folder / link)
                path.append(os.path.dirname(os.path.realpath(library)))
        subprocess.run('nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv', shell=True)
    path, usr = [*path, os.environ.get('LD_LIBRARY_PATH', '')], ROOT.parent / 'usr'
    return os.environ | {
        'LD_LIBRARY_PATH': os.pathsep.join(path), 'LIBRARY_PATH': f'{usr}/lib', 'PYTHONPATH': f'{ROOT}:{HERE}',
        'CPATH': f'{usr}/include:{usr}/include/python3.11', 'THEANO_FLAGS': 'gcc.cxxflags=-O1',
        'HOME': str(folder), 'EMU_DIR': f'{folder}/kernels'}


def compare_numbers(results, env):
    """Compute all methods on the CPU and on the card, print how they differ; returns whether they are the same."""
    import numpy as np

    from card import CASES, IMAGES, compare
    paths = {device: results / f'{device}.npz' for device in ('cpu', 'cuda0')}
    flags = env['THEANO_FLAGS'] + f',base_compiledir={env["HOME"]}/'                # or they wait for each other's lock
    started = [subprocess.Popen([sys.executable, HERE / 'card.py', device, path],
                                env=env | {'THEANO_FLAGS': flags + device}) for device, path in paths.items()]
    if sum(process.wait() for process in started):
        return False
    numbers, same = [dict(np.load(path)) for path in paths.values()], True
    print('\n| method | losses | gradient | matches below the best | evaluations without ties |\n|---|---|---|---|---|')
    for name in CASES:
        losses, gradient, lack, compared = compare(*numbers, name)
        same = same and losses < 1e-4 and gradient < 1e-4 and lack < 1e-4 and compared > 0
        print(f'| {name} | {losses:.1e} | {gradient:.1e} | {lack:.1e} | {compared} of {IMAGES} |')
    return same


def measured(results, env, size, iterations, profile=False):
    """What `measure` finds in a process of its own, whose output goes to a file."""
    path = results / f'{size}{"-profile" if profile else ""}.json'
    blocking = {'CUDA_LAUNCH_BLOCKING': '1'} if profile else {}         # else an Op pays for those before it
    env = env | {'THEANO_FLAGS': env['THEANO_FLAGS'] + f',base_compiledir={env["HOME"]}/cuda0'}
    command = [sys.executable, __file__, 'measure', path, str(size), str(iterations), *['--profile'] * profile]
    with open(path.with_suffix('.txt'), 'w') as file:
        subprocess.run(command, env=env | blocking, check=True, stdout=file, stderr=file)
    return json.loads(path.read_text())


def measure(path, size, iterations, profile):
    """Paint a face on the card; write seconds and memory, and with `profile` seconds by kind of Op, as JSON."""
    import doodle
    seconds, memory, profiles = [], [], []
    import_theano, record = doodle.import_theano, doodle.Journal.record

    def imported(device):
        opened, function = import_theano(device), doodle.theano.function

        def profiled(*arguments, **how):
            profiles.append(doodle.theano.compile.ProfileStats(atexit_print=False, flag_time_thunks=True))
            return function(*arguments, **how | {'profile': profiles[-1]})
        if profile:
            doodle.theano.function = profiled
        return opened

    def recorded(journal, at, x, evaluation, largest):
        record(journal, at, x, evaluation, largest)
        card = doodle.theano.gpuarray.get_context(None)
        seconds.append(evaluation.seconds)
        memory.append(card.total_gmem - card.free_gmem)
    doodle.import_theano, doodle.Journal.record = imported, recorded
    samples = ROOT / 'samples'
    code = doodle.main([f'--style={samples}/astronaut.png', f'--content={samples}/hopper.png', '--device=gpu0',
                        '--network=vgg16', '--random-seed=1', '--phases=1', '--save-every=0', '--print-every=0',
                        f'--max-size={size}', f'--iterations={iterations}', f'--output={path}.png'])
    most, ops = max((found.apply_time for found in profiles), key=lambda found: sum(found.values()), default={}), {}
    for node, time in most.items():
        kind = type(node.op).__name__
        ops[kind] = ops.get(kind, 0) + time / iterations
    Path(path).write_text(json.dumps({'seconds': seconds, 'memory': max(memory), 'ops': ops}))
    return code


def write_problem(path, size):
    """Write what peer.py needs for the same evaluation."""
    import doodle
    doodle.import_pillow()
    np, Image, weights = doodle.np, doodle.Image, doodle.read_weights(str(ROOT / 'vgg16.npz'))[0]

    def shrunk(name, method):
        pixels = doodle.read_picture(f'{ROOT}/samples/{name}.png').pixels
        return doodle.resized(pixels, [side * size // max(pixels.shape) for side in pixels.shape[1::-1]], method)
    content, style = (doodle.to_planes(shrunk(name, Image.LANCZOS)) for name in ('hopper', 'astronaut'))
    maps = [np.float32(shrunk(f'{name}_sem', Image.NEAREST)) for name in ('hopper', 'astronaut')]
    settings = vars(doodle.parse_options(['--style=-'])) | {
        'layers': list(weights.layers), 'balance': doodle.balance(weights.kind)}
    arrays = {f'{layer} {kind}': array for layer, pair in weights.layers.items() for kind, array in zip('Wb', pair)}
    np.savez(path, settings=json.dumps(settings), content=content, style=style, content_map=maps[0], style_map=maps[1],
             **arrays)


def print_speed(results, env, size, iterations):
    """Time the program, and PyTorch."""
    found, by_op = (measured(results, env, size, count, profile) for count, profile in ((iterations, 0), (6, 1)))
    first, rest = found['seconds'][0], found['seconds'][3:]
    print(f'\n{size} pixels: {statistics.median(rest):.4f} s an evaluation (from {min(rest):.4f} to {max(rest):.4f}, '
          f'the first {first:.2f}), {found["memory"] / 1e9:.2f} GB')
    problem = results / f'{size}.npz'
    write_problem(problem, size)
    peer = subprocess.run(['python3', HERE / 'peer.py', problem], text=True, capture_output=True,
                          env={name: value for name, value in os.environ.items() if not re.match('LD_|PYTHON', name)})
    print('PyTorch there:', (peer.stdout or peer.stderr or 'no').strip().splitlines()[-1])
    print('\n| Op | share |\n|---|---|')
    total = sum(by_op['ops'].values())
    for kind, seconds in sorted(by_op['ops'].items(), key=lambda item: -item[1])[:12]:
        print(f'| {kind} | {seconds / total:.1%} |')


def run(results, emulate):
    """Compare and measure; returns the exit code."""
    results = Path(results).resolve()
    results.mkdir(parents=True, exist_ok=True)
    if not shutil.which('g++'):
        sys.exit('There is no g++.')
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder), emulate)
        same = compare_numbers(results, env)
        for size, iterations in ((32, 5), (48, 5)) if emulate else ((559, 20), (1024, 20)):
            print_speed(results, env, size, iterations)
    print('\nSAME' if same else '\nNOT THE SAME')
    return 0 if same else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('pack', help='write the kit')
    command.add_argument('out')
    command.set_defaults(function=pack)
    command = commands.add_parser('run', help='compare and measure, in the unpacked kit')
    command.add_argument('results')
    command.add_argument('--emulate', action='store_true')
    command.set_defaults(function=run)
    command = commands.add_parser('measure')                            # what `run` starts
    for name, kind in (('path', str), ('size', int), ('iterations', int)):
        command.add_argument(name, type=kind)
    command.add_argument('--profile', action='store_true')
    command.set_defaults(function=measure)
    given = vars(parser.parse_args())
    return given.pop('function')(**given)


if __name__ == '__main__':
    sys.exit(main())
