#!/usr/bin/env python3
"""What an evaluation costs: the engine, the plain formulas and PyTorch (where it is installed), side by side.

    python tests/benchmark.py                         559x384, the bundled network, the sample faces
    python tests/benchmark.py --weights FILE --size 1024x1024 --rounds 3 --skip plain

Everything is timed in turn within one process, round after round, since machines drift: read the ratios. Memory and
growth are measured in a process of their own each. Takes some minutes.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import doodle  # noqa: E402

doodle.return_freed_memory()
doodle.import_pillow()
with mock.patch.dict(os.environ):
    doodle.import_theano('cpu')
import numpy as np  # noqa: E402


def faces(width, height):
    """The sample pair at a size: content, style (3, H, W) and their maps."""
    samples = ROOT / 'samples'
    size, style_size = (width, height), (width * 456 // 384, height)
    pictures = [doodle.resized(doodle.read_picture(str(samples / name)).pixels, to, method) for name, to, method in (
        ('hopper.png', size, doodle.Image.LANCZOS), ('astronaut.png', style_size, doodle.Image.LANCZOS),
        ('hopper_sem.png', size, doodle.Image.NEAREST), ('astronaut_sem.png', style_size, doodle.Image.NEAREST))]
    return *map(doodle.to_planes, pictures[:2]), *pictures[2:]


class Ours:
    """The program, with its engine or by its plain formulas."""

    def __init__(self, fast, weights, options, content, style, content_map, style_map):
        self.fast, self.weights, self.options = fast, weights, options
        self.objective = doodle.Objective(weights, options, True, True, fast)
        self.objective.set_phase(content, style, content_map, style_map, content.shape[:0:-1])

    def alone(self):
        """Compile what is timed alone, the network and the search."""
        x, find = doodle.T.tensor3(), doodle.fast_match if self.fast else doodle.match
        f = doodle.features(doodle.build_network(self.weights, ['4_2'], self.fast), x, ['4_2'])['4_2']
        self.network = doodle.theano.function([x], doodle.theano.grad(doodle.T.sum(f ** 2), x))
        u = {layer: doodle.T.tensor3() for layer in self.objective.style}
        self.search = doodle.theano.function(list(u.values()), [find(u[layer], term.keys)[0]
                                                                for layer, term in self.objective.style.items()])

    def evaluate(self, x):
        return self.objective(x).total

    def queries(self, x):
        """The keys of an image, for `search`."""
        f = dict(zip(self.objective.layers, self.objective.features(np.float32(x))))
        return [self.objective.prepare(f[layer], term.maps.get_value()) for layer, term in self.objective.style.items()]


class Torch:
    """The same in PyTorch: convolutions by oneDNN in its faster layout, patches unfolded and multiplied in batches."""

    def __init__(self, weights, options, content, style, content_map, style_map):
        import torch
        self.torch, self.options, self.balance = torch, options, doodle.balance(weights.kind)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.layers = {name: [torch.from_numpy(np.ascontiguousarray(a)) for a in pair]
                       for name, pair in weights.layers.items()}
        for pair in self.layers.values():
            pair[0] = pair[0].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            f, g = self.features(self.picture(content)), self.features(self.picture(style))
            self.target = f['4_2']
            maps = [self.picture(doodle.to_planes(m)) for m in (content_map, style_map)]
            self.maps = {layer: self.pooled(maps[0], layer) for layer in options.style_layers}
            self.keys = {layer: self.key(g[layer], self.pooled(maps[1], layer)) for layer in options.style_layers}
            self.patches = {layer: self.unfold(g[layer]) for layer in options.style_layers}

    def picture(self, x):
        return self.torch.from_numpy(np.float32(x))[None]                       # (1, 3, H, W)

    def pooled(self, m, layer):
        return self.torch.nn.functional.avg_pool2d(m, doodle.stride(layer))

    def unfold(self, f):
        return self.torch.nn.functional.unfold(f, 3)[0].T.contiguous()          # (N, 9 C)

    def features(self, x):
        F, result = self.torch.nn.functional, {}
        x = (x - self.torch.tensor(doodle.MEAN).view(1, 3, 1, 1)).contiguous(memory_format=self.torch.channels_last)
        for name, (W, b) in self.layers.items():
            x = F.avg_pool2d(x, 2) if name.endswith('_1') and name != '1_1' else x
            x = result[name] = F.relu(F.conv2d(x, W, b, padding=1))
            if name == '4_2':
                return result

    def key(self, f, m):
        def unit(a):
            return a / a.norm(dim=1, keepdim=True).clamp(min=1e-8)
        return self.unfold(self.torch.cat([unit(f), self.options.semantic_weight ** .5 * unit(m)], 1) / 3)

    def match(self, layer, query, batch=2048):
        best, index = None, None
        for start in range(0, len(self.keys[layer]), batch):
            score, j = (self.keys[layer][start:start + batch] @ query.T).max(0)
            better = score > best if best is not None else self.torch.ones_like(score, dtype=bool)
            best = self.torch.where(better, score, best) if best is not None else score
            index = self.torch.where(better, j + start, index) if index is not None else j
        return index

    def network(self, x):
        x = self.picture(x).requires_grad_(True)
        self.features(x)['4_2'].pow(2).sum().backward()

    def queries(self, x):
        with self.torch.no_grad():
            f = self.features(self.picture(x))
            return [self.key(f[layer], m) for layer, m in self.maps.items()]

    def search(self, *queries):
        with self.torch.no_grad():
            return [self.match(layer, query) for layer, query in zip(self.keys, queries)]

    def evaluate(self, x):
        o, x = self.options, self.picture(x).requires_grad_(True)
        f = self.features(x)
        loss = o.content_weight * self.balance['4_2'] ** 2 * (f['4_2'] - self.target).pow(2).mean()
        for layer, patches in self.patches.items():
            with self.torch.no_grad():
                index = self.match(layer, self.key(f[layer], self.maps[layer]))
            weight = o.style_weight * self.balance[layer] ** 2
            loss = loss + weight * (self.unfold(f[layer]) - patches[index]).pow(2).mean()
        dy, dx = x[:, :, 1:, :-1] - x[:, :, :-1, :-1], x[:, :, :-1, 1:] - x[:, :, :-1, :-1]
        loss = loss + o.smoothness * (dx ** 2 + dy ** 2 + 1e-12).pow(1.25).mean()
        loss.backward()
        return loss.item()


def made(form, weights, options, pair):
    """One of the forms 'engine', 'plain', 'torch', ready for a pair of faces."""
    return Torch(weights, options, *pair) if form == 'torch' else Ours(form == 'engine', weights, options, *pair)


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
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=doodle.parse_size, default=(559, 384))
    parser.add_argument('--weights', type=doodle.parse_path, default=str(ROOT / 'vgg16.npz'))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--skip', default='', help='forms to leave out: plain,torch')
    parser.add_argument('--alone', help=argparse.SUPPRESS)
    a = parser.parse_args()
    weights, _ = doodle.read_weights(a.weights)
    options = doodle.parse_options(['--style=-', '--content-weight=10', '--style-weight=10'])
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
    queries = {name: form.queries(x) for name, form in forms.items()}
    times = {name: {'network': [], 'search': [], 'evaluation': []} for name in forms}
    for form in forms.values():
        form.evaluate(x)
    losses = {name: form.evaluate(x) for name, form in forms.items()}
    for _ in range(a.rounds):
        for name, form in forms.items():
            times[name]['network'].append(seconds(form.network, np.float32(x)))
            times[name]['search'].append(seconds(form.search, *queries[name]))
            times[name]['evaluation'].append(seconds(form.evaluate, x))
    median = {name: {part: float(np.median(t)) for part, t in parts.items()} for name, parts in times.items()}
    counts = doodle.operations(*(picture.shape[:0:-1] for picture in pair[:2]), ['4_2'], options.style_layers)
    operations = {part: count / 1e9 for part, count in zip(('network', 'search'), counts)}
    again = ['--weights', a.weights]

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
    print('\nGrowth of the engine:\n\n| size | an evaluation | peak memory |\n|---|---|---|')
    for factor in (0.5, 0.71, 1, 1.41):
        size = [int(side * factor) for side in a.size]
        one = alone('engine', size, again)
        print(f"| {size[0]}x{size[1]} | {one['seconds']:.2f} s | {one['memory']:.2f} GB |")


if __name__ == '__main__':
    main()
