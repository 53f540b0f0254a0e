"""Damage files of weights at random, and see that each is read or refused: no crash, no other error, no bomb.

`python tests/fuzz_weights.py --count=5000` reads so many; where a library crashes, the last number is the file's.
"""
import argparse
import bz2
import importlib
import io
import os
import pickle
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def tiny(doodle):
    """A whole VGG19 with two filters a layer, {'1_1': (W, b), ...}."""
    rng, layers, before = np.random.default_rng(0), {}, 3
    for name in doodle.layer_names('vgg19'):
        layers[name] = rng.random((2, before, 3, 3), np.float32), rng.random(2, np.float32)
        before = 2
    layers['1_1'][0][0, 0, 0] = doodle.FIRST['vgg19']
    return layers


def pickles(layers):
    """{name: bytes} in all protocols, types and orders."""
    arrays = [array for W, b in layers.values() for array in (W[:, :, ::-1, ::-1], b)]
    for protocol in range(6):
        yield f'{protocol}.pkl', pickle.dumps(arrays, protocol)
        for kind, order in (('<f8', 'F'), ('>f4', 'C')):
            yield f'{protocol}{kind[1:]}.pkl', pickle.dumps([array.astype(kind, order) for array in arrays], protocol)
    yield '2.pkl.bz2', bz2.compress(pickle.dumps(arrays, 2))


def keras(layers, **how):
    """The bytes of a file of Keras."""
    content = io.BytesIO()
    with h5py.File(content, 'w') as file:
        for name, (W, b) in layers.items():
            group = file.create_group('block{}_conv{}'.format(*name.split('_')))
            group.create_dataset('W', data=W.transpose(2, 3, 1, 0), **how)
            group.create_dataset('b', data=b)
    return content.getvalue()


def npz(layers, save):
    """The bytes of an .npz."""
    content = io.BytesIO()
    save(content, **{f'conv{name}.{kind}': array for name, pair in layers.items() for kind, array in zip('Wb', pair)})
    return content.getvalue()


def originals(layers):
    """{name: bytes} of good files in every format."""
    return {**dict(pickles(layers)), 'plain.h5': keras(layers),
            'packed.h5': keras(layers, compression='gzip', shuffle=True, fletcher32=True),
            'new.h5': keras(layers, chunks=True), 'stored.npz': npz(layers, np.savez),
            'packed.npz': npz(layers, np.savez_compressed)}


def damaged(content, rng):
    """`content` with one to four damages: bytes changed, set to a number, blocks cut, zeroed, swapped, or put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        a, b = np.sort(rng.integers(0, len(content) + 1, 2))
        size = int(rng.integers(1, 65))
        kind = rng.integers(8)
        if kind < 3:
            content[a:a + 1] = bytes([rng.integers(256)])
        elif kind == 3:
            number = int(rng.choice([0, 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 63 - 1, 2 ** 64 - 1]))
            width = int(rng.choice([4, 8]))
            content[a:a + width] = (number % 256 ** width).to_bytes(width, 'little')
        elif kind == 4:
            content = content[:b] if rng.integers(2) else content[:a] + content[a + size:]
        elif kind == 5:
            content[a:a + size] = bytes(len(content[a:a + size]))
        elif kind == 6:
            content[a:a + size], content[b:b + size] = content[b:b + size], content[a:a + size]
        else:
            content[a:a] = content[b:b + size]
    return bytes(content)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--count', type=int, default=1000)
    parser.add_argument('--first', type=int, default=0, help='number of the first file')
    options = parser.parse_args()
    doodle = importlib.import_module('doodle')
    doodle.import_pillow()
    doodle.WIDTHS = (2,) * 5
    good = originals(tiny(doodle))
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    read = refused = longest = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, content in good.items():
            Path(name).write_bytes(content)
            assert doodle.read_weights(name)[1] is None, name
        for number in range(options.first, options.first + options.count):
            name = list(good)[number % len(good)]
            Path(name).write_bytes(damaged(good[name], np.random.default_rng(number)))
            print(f'\r{number} {name} ', end='', flush=True)
            start = time.monotonic()
            try:
                weights, _ = doodle.read_weights(name)
            except doodle.UserError as error:
                refused += 1
                assert all(line.isprintable() and len(line) < 400 for line in error.args), error.args
            else:
                read += 1
                assert all(array.shape[0] == 2 and array.dtype == np.float32
                           for pair in weights.layers.values() for array in pair)
            longest = max(longest, time.monotonic() - start)
    peak = int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) >> 10
    print(f'\n{options.count} files: {read} read, {refused} refused, the slowest in {longest:.1f} s, peak {peak} MB')
    sys.exit(longest > 10)


if __name__ == '__main__':
    main()
