#!/usr/bin/env python3
"""What an evaluation costs: the engine, the plain formulas and PyTorch (where it is installed), side by side.

    python tests/benchmark.py                         559x384, the bundled network, the sample faces
    python tests/benchmark.py --weights FILE --size 1024x1024 --rounds 3 --skip plain
    python tests/benchmark.py --after 300             of a run's evaluations from the 300th on
    python tests/benchmark.py --growth 1024x1024,2048x2048 --options=--matching=near
    python tests/benchmark.py --whole --options='--phases=4 --iterations=100'

Everything is timed in turn within one process, round after round, since machines drift: read the ratios. Memory and
growth are measured in a process of their own each. Takes some minutes. A whole run is the program's own, beside what
--check says of it. --options are the program's; without --growth or --whole only those weights of the loss and of the
maps that all forms know: --content-weight, --style-weight, --semantic-weight and --smoothness.
"""
import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402

import doodle  # noqa: E402
from peer import Torch  # noqa: E402

ALIKE = '--content-weight', '--style-weight', '--semantic-weight', '--smoothness'      # what all forms know


def faces(width, height):
    """The sample pair at a size: content, style (3, H, W) and their maps."""
    samples = ROOT / 'samples'
    size, style_size = (width, height), (width * 456 // 384, height)
    pictures = [doodle.resized(doodle.read_picture(str(samples / name)).pixels, to, method) for name, to, method in (
        ('hopper.png', size, doodle.Image.LANCZOS), ('astronaut.png', style_size, doodle.Image.LANCZOS),
        ('hopper_sem.png', size, doodle.Image.NEAREST), ('astronaut_sem.png', style_size, doodle.Image.NEAREST))]
    return *map(doodle.to_planes, pictures[:2]), *pictures[2:]


def halved(picture):
    """A picture (3, H, W) at half its size."""
    size = [side // 2 for side in picture.shape[:0:-1]]
    return np.moveaxis(doodle.resized(np.moveaxis(np.float32(picture), 0, 2), size, doodle.Image.BOX), 2, 0)


class Ours:
    """The program, with its engine or by its plain formulas."""

    def __init__(self, fast, weights, options, content, style, content_map, style_map):
        self.fast, self.weights, self.options = fast, weights, options
        self.objective = doodle.Objective(weights, options, True, True, fast, slices=options.slices)
        if options.matching == 'near':                                  # from the matches of the phase before
            small = [halved(picture) for picture in (content, style)]
            self.objective.set_phase(*small, content_map, style_map, small[0].shape[:0:-1])
            self.objective(small[0])
        self.objective.set_phase(content, style, content_map, style_map, content.shape[:0:-1], None,
                                 options.matching == 'near')
        doodle.return_freed_memory(content[0].size)                     # as in a phase of a run

    def alone(self):
        """Compile what is timed alone, the network and the search."""
        x = doodle.T.tensor3()
        f = doodle.features(doodle.build_network(self.weights, ['4_2'], self.fast), x, ['4_2'])['4_2']
        self.network = doodle.theano.function([x], doodle.theano.grad(doodle.T.sum(f ** 2), x))
        u = {layer: doodle.T.tensor3() for layer in self.objective.style}
        self.search = doodle.theano.function(list(u.values()), [term.match_patches(u[layer], term.keys)[0]
                                                                for layer, term in self.objective.style.items()])

    def evaluate(self, x):
        return self.objective(x).total

    def queries(self, x):
        """The keys of an image, for `search`."""
        f = dict(zip(self.objective.layers, self.objective.features(np.float32(x))))
        return [self.objective.prepare(f[layer], term.maps.get_value()) for layer, term in self.objective.style.items()]


def made(form, weights, options, pair):
    """One of the forms 'engine', 'plain', 'torch', ready for a pair of faces."""
    if form == 'torch':
        return Torch(weights.layers, doodle.balance(weights.kind), vars(options), *pair)
    return Ours(form == 'engine', weights, options, *pair)


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def sgemm():
    """GFLOPS of NumPy's BLAS on a product of 2048 by 2048 matrices."""
    a = np.ones((2048, 2048), np.float32)
    return 2 * 2048 ** 3 / min(seconds(np.matmul, a, a) for _ in range(5)) / 1e9


def alone(form, size, arguments):
    """{'memory': GB, 'seconds': of one evaluation} of a form in a process of its own."""
    command = [sys.executable, __file__, '--alone', form, '--size', 'x'.join(map(str, size)), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def grow(sizes, a):
    """Print what an evaluation by the engine takes at these sizes."""
    print('\nGrowth of the engine:\n\n| size | an evaluation | peak memory |\n|---|---|---|')
    for size in sizes:
        one = alone('engine', size, ['--weights', a.weights, f'--options={a.options}'])
        print(f"| {size[0]}x{size[1]} | {one['seconds']:.2f} s | {one['memory']:.2f} GB |", flush=True)


def late(form, x, evaluations):
    """The next images (3, H, W) of a run from `x`, after so many evaluations by a form, one after the other."""
    minimiser = doodle.Minimiser(x)
    for number in itertools.count():
        image = minimiser.ask().copy()
        if number >= evaluations:
            yield image
        evaluation = form.objective(image)
        minimiser.tell(evaluation.total, evaluation.gradient)


def whole(size, arguments):
    """Run the program on the sample faces; print the seconds of its phases and of all, and what --check said."""
    with tempfile.TemporaryDirectory() as folder:
        content, style, *maps = faces(*size)
        pictures = dict(content=doodle.to_pixels(content, size), style=doodle.to_pixels(style, style.shape[:0:-1]),
                        content_sem=maps[0], style_sem=maps[1])
        for name, pixels in pictures.items():
            doodle.Image.fromarray(pixels).save(f'{folder}/{name}.png')
        command = [sys.executable, ROOT / 'doodle.py', '--style=style.png', '--content=content.png', '--random-seed=1',
                   '--print-every=0', '--save-every=0', '--log=log', *arguments]
        print(*re.findall('  - (Phase.+|On this CPU.+|With exact.+)',
                          subprocess.check_output([*command, '--check'], cwd=folder, text=True)), sep='\n')
        took = seconds(lambda: subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL))
        entries = [json.loads(line) for line in Path(folder, 'log').read_text().splitlines()[1:]]
    phases = {}
    for entry in entries:
        if 'total' in entry:                                            # else evaluations that were skipped
            phases.setdefault(entry['phase'], []).append(entry['seconds'])
    for phase, times in phases.items():
        print(f'Phase #{phase}: {len(times)} evaluations of {np.mean(times):.2f} s, remembered ones included')
    print(f'{took / 60:.1f} minutes in all')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=doodle.parse_size, default=(559, 384))
    parser.add_argument('--weights', type=doodle.parse_path, default=str(ROOT / 'vgg16.npz'))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--skip', default='', help='forms to leave out: plain,torch')
    parser.add_argument('--after', type=int, default=0, help='evaluations of a run before those that are timed')
    parser.add_argument('--growth', help='sizes, with commas between: time and memory of the engine, nothing else')
    parser.add_argument('--whole', action='store_true', help='the time of a whole run, nothing else')
    parser.add_argument('--options', default='', help="the program's, as one text: see above which")
    parser.add_argument('--alone', help=argparse.SUPPRESS)
    a = parser.parse_args()
    given = shlex.split(a.options)
    doodle.return_freed_memory()
    doodle.import_pillow()
    if a.whole:
        return whole(a.size, [f'--weights={os.path.abspath(a.weights)}', *given])           # it has another folder
    if a.growth:
        return grow(map(doodle.parse_size, a.growth.split(',')), a)
    options, plain = (doodle.parse_options(['--style=-', '--content-weight=10', '--style-weight=10', '--slices=2',
                                            *more]) for more in (given, []))
    differ = {name for name, value in vars(options).items() if value != getattr(plain, name)}
    if differ - {*map(doodle.attribute, ALIKE)} and not a.alone:
        parser.error(f'without --growth or --whole, --options can only be {", ".join(ALIKE)}')
    with mock.patch.dict(os.environ):
        doodle.import_theano('cpu')
    weights, _ = doodle.read_weights(a.weights)
    pair = faces(*a.size)
    x = np.random.default_rng(0).uniform(16, 240, pair[0].shape)
    if a.alone:
        form = made(a.alone, weights, options, pair)
        took = [seconds(form.evaluate, x) for _ in range(3)]
        peak = re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())   # ru_maxrss is the parent's, too
        return print(json.dumps({'memory': int(peak.group(1)) * 1024 / 1e9, 'seconds': min(took)}))

    names = [name for name in ('engine', 'plain', 'torch') if name not in a.skip.split(',')]
    forms = {}
    for name in names:
        try:
            forms[name] = made(name, weights, options, pair)
        except ImportError:
            print('PyTorch is not installed: left out.')
    for form in forms.values():
        if isinstance(form, Ours):
            form.alone()
    times = {name: {'network': [], 'search': [], 'evaluation': []} for name in forms}
    for form in forms.values():
        form.evaluate(x)
    losses = {name: form.evaluate(x) for name, form in forms.items()}
    path = late(forms['engine'], x, a.after)                            # the engine starts from its matches of before
    for _, x in zip(range(a.rounds), path):
        for name, form in forms.items():
            queries = form.queries(x)
            times[name]['network'].append(seconds(form.network, np.float32(x)))
            times[name]['search'].append(seconds(form.search, *queries))
            times[name]['evaluation'].append(seconds(form.evaluate, x))
    median = {name: {part: float(np.median(t)) for part, t in parts.items()} for name, parts in times.items()}
    counted = doodle.parse_options(['--style=-', '--content=-'])
    amounts = doodle.work(*(picture.shape[:0:-1] for picture in pair[:2]), counted)
    operations = {'network': 2 * amounts['products'] / 1e9,
                  'search': 2 * (amounts['scores'] + amounts['byte scores']) / 1e9}
    again = ['--weights', a.weights, f'--options={a.options}']

    print(f'{a.size[0]}x{a.size[1]}, {weights.kind}, {len(os.sched_getaffinity(0))} cores, '
          f'sgemm {sgemm():.0f} GFLOPS, medians of {a.rounds} rounds in turn\n')
    print('| | network | matching | the rest | an evaluation | peak memory | loss |\n|---|---|---|---|---|---|---|')
    for name, m in median.items():
        rest = m['evaluation'] - m['network'] - m['search']
        print(f"| {name} | {m['network']:.2f} s | {m['search']:.2f} s | {rest:.2f} s | {m['evaluation']:.2f} s "
              f"| {alone(name, a.size, again)['memory']:.2f} GB | {losses[name]:.6g} |")
        for other in forms:
            if name == 'engine' and other != name:
                ratios = {part: np.median(np.divide(times[name][part], times[other][part])) for part in times[name]}
                print(f"| engine / {other} | {ratios['network']:.2f} | {ratios['search']:.2f} | "
                      f"| {ratios['evaluation']:.2f} | | {losses[name] / losses[other] - 1:+.0e} |")
    print('\nGFLOPS by the count of the direct forms: ' + '; '.join(
        f'{name} ' + ', '.join(f'{part} {operations[part] / m[part]:.0f}' for part in operations)
        for name, m in median.items()))
    grow([[int(side * factor) for side in a.size] for factor in (0.5, 0.71, 1, 1.41)], a)


if __name__ == '__main__':
    main()
