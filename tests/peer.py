"""The program's evaluation once more, in PyTorch; needs Python, NumPy and PyTorch alone.

    python3 tests/peer.py PROBLEM.npz                 seconds of an evaluation and peak memory on a CUDA device, as JSON
"""
import json
import os
import sys
import time

import numpy as np

MEAN = 103.939, 116.779, 123.680                                        # B, G, R of ImageNet


class Torch:
    """Convolutions by oneDNN or cuDNN in their faster layout, patches unfolded and multiplied in batches.

    The scores of a batch go to the same memory each time: fresh pages would cost a tenth of the search.

    Parameters
    ----------
    layers : dict
        {'1_1': (W, b), ...} for cross-correlation on BGR.
    balance : dict
        Factors on the features of each layer.
    options : dict
        Weights of the losses and of the maps, and style layers.
    content, style : (3, H, W) and (3, h, w) arrays
    content_map, style_map : arrays (H, W, K) and (h, w, K)
    device : ``'cpu'`` or ``'cuda'``
    """

    def __init__(self, layers, balance, options, content, style, content_map, style_map, device='cpu'):
        import torch
        self.torch, self.options, self.balance, self.device = torch, options, balance, device
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.backends.cudnn.allow_tf32 = False                         # float32 with all its bits, as the program has
        self.mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
        self.layers = {name: [self.tensor(a) for a in pair] for name, pair in layers.items()}
        for pair in self.layers.values():
            pair[0] = pair[0].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            f, g = self.features(self.tensor(content)[None]), self.features(self.tensor(style)[None])
            self.target = f['4_2']
            maps = [self.tensor(np.moveaxis(m, 2, 0))[None] for m in (content_map, style_map)]
            style_layers = options['style_layers']
            self.maps = {layer: self.pooled(maps[0], layer) for layer in style_layers}
            self.keys = {layer: self.key(g[layer], self.pooled(maps[1], layer)).T.contiguous()
                         for layer in style_layers}
            self.patches = {layer: self.unfold(g[layer]).T.contiguous() for layer in style_layers}

    def tensor(self, array):
        return self.torch.from_numpy(np.require(array, np.float32, 'CW')).to(self.device)

    def pooled(self, m, layer):
        return self.torch.nn.functional.avg_pool2d(m, 2 ** (int(layer[0]) - 1))

    def unfold(self, f):
        return self.torch.nn.functional.unfold(f, 3)[0]                         # (9 C, N)

    def features(self, x):
        F, result = self.torch.nn.functional, {}
        x = (x - self.mean).contiguous(memory_format=self.torch.channels_last)
        for name, (W, b) in self.layers.items():
            x = F.avg_pool2d(x, 2) if name.endswith('_1') and name != '1_1' else x
            x = result[name] = F.relu(F.conv2d(x, W, b, padding=1))
            if name == '4_2':
                return result

    def key(self, f, m):
        def unit(a):
            return a / a.norm(dim=1, keepdim=True).clamp(min=1e-8)
        return self.unfold(self.torch.cat([unit(f), self.options['semantic_weight'] ** .5 * unit(m)], 1) / 3)

    def match(self, layer, query, batch=2048):
        keys, count = self.keys[layer], query.shape[1]
        scores = self.torch.empty(min(batch, len(keys)), count, device=self.device)
        best = self.torch.full((count,), -np.inf, device=self.device)
        index = self.torch.zeros(count, dtype=int, device=self.device)
        for start in range(0, len(keys), batch):
            part = keys[start:start + batch]
            score, j = self.torch.mm(part, query, out=scores[:len(part)]).max(0)
            better = score > best
            best, index = self.torch.where(better, score, best), self.torch.where(better, j + start, index)
        return index

    def network(self, x):
        x = self.tensor(x)[None].requires_grad_(True)
        self.features(x)['4_2'].pow(2).sum().backward()

    def queries(self, x):
        with self.torch.no_grad():
            f = self.features(self.tensor(x)[None])
            return [self.key(f[layer], m) for layer, m in self.maps.items()]

    def search(self, *queries):
        with self.torch.no_grad():
            return [self.match(layer, query) for layer, query in zip(self.keys, queries)]

    def evaluate(self, x):
        o, x = self.options, self.tensor(x)[None].requires_grad_(True)
        f = self.features(x)
        loss = o['content_weight'] * self.balance['4_2'] ** 2 * (f['4_2'] - self.target).pow(2).mean()
        for layer, patches in self.patches.items():
            with self.torch.no_grad():
                index = self.match(layer, self.key(f[layer], self.maps[layer]))
            weight = o['style_weight'] * self.balance[layer] ** 2
            loss = loss + weight * (self.unfold(f[layer]).T.contiguous() - patches[index]).pow(2).mean()
        dy, dx = x[:, :, 1:, :-1] - x[:, :, :-1, :-1], x[:, :, :-1, 1:] - x[:, :, :-1, :-1]
        loss = loss + o['smoothness'] * (dx ** 2 + dy ** 2 + 1e-12).pow(1.25).mean()
        loss.backward()
        x.grad.cpu()                                                    # as an optimiser needs it
        return loss.item()


def main():
    with np.load(sys.argv[1]) as file:
        arrays = dict(file)
    settings = json.loads(str(arrays['settings']))
    layers = {name: (arrays[f'{name} W'], arrays[f'{name} b']) for name in settings['layers']}
    pair = [arrays[name] for name in ('content', 'style', 'content_map', 'style_map')]
    form = Torch(layers, settings['balance'], settings, *pair, device='cuda')
    x, took = arrays['content'], []
    for _ in range(20):
        start = time.perf_counter()
        loss = form.evaluate(x)
        took.append(time.perf_counter() - start)
    print(json.dumps({'seconds': float(np.median(took[3:])), 'loss': loss, 'torch': form.torch.__version__,
                      'memory': form.torch.cuda.max_memory_allocated()}))


if __name__ == '__main__':
    main()
