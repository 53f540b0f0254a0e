#!/usr/bin/env python3
"""Automatic maps: paint the semantic maps of two pictures, in which a colour means the same thing.

    python3 samples/automaps.py ME.jpg YOU.jpg [--parts=6]

paints ``ME_sem.png`` and ``YOU_sem.png``, each with a preview over its picture, ``ME_sem_preview.jpg``, and shows the
previews. Existing files are not overwritten: if one of the maps is there, the other gets its parts and colours.
``doodle.py --auto-maps=6`` does the same before it reads the maps.

Each picture is cut into superpixels (SLIC [A12]), which are described by features of VGG at conv4_1 and conv5_1, by
colours, by their height in the picture, and by geodesic distances to its four borders, which separate foreground from
background (geodesic saliency [W12]). Features and colours are centred in each picture, since pictures differ in light
and style. The superpixels of both pictures together are cut in two repeatedly, at the first fork of Ward's tree [W63]
whose branches both occur in both pictures, so that every part is in both maps. When no part can be cut any more, parts
are cut by features alone, down to details: eyes from skin. If one map is painted, a superpixel of the other picture
takes the class with the least mean distance to its three nearest superpixels.

    [W63]   Ward: Hierarchical Grouping to Optimize an Objective Function. JASA 58
    [A12]   Achanta, Shaji, Smith, Lucchi, Fua, Suesstrunk: SLIC Superpixels. PAMI 34
    [W12]   Wei, Wen, Zhu, Sun: Geodesic Saliency Using Background Priors. ECCV 2012
"""
import os
import sys

if __name__ == '__main__':                                              # the command: --help needs no imports
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
else:                                                                   # the module: loaded by doodle.import_automaps
    import numpy as np
    from PIL import Image
    from scipy import sparse
    from scipy.cluster import hierarchy
    from scipy.sparse import csgraph
    from scipy.spatial import distance
    from skimage import color, segmentation
import doodle

# Weights in the descriptors of superpixels: features, colours, distances to the four borders, height in the picture.
MAP_WEIGHTS = {'4_1': 0.5, '5_1': 0.7, 'colour': 0.3, 'borders': 1.0, 'height': 0.5}
MAP_SIDE, MAP_SEGMENTS = 384, 600                                     # longest side, superpixels
MAP_LEAST = 0.03, 0.002                                               # share of both pictures: a main part, a detail


def preview_path(path):
    """``dir/name_sem.png`` -> ``dir/name_sem_preview.jpg``."""
    return os.path.splitext(path)[0] + '_preview.jpg'


def missing_maps(options):
    """The paths of the maps to paint; UserError if they cannot be painted."""
    if not options.content or not options.semantic_weight or not options.semantic_ext.lower().endswith('.png'):
        raise doodle.UserError('--auto-maps needs a content picture, maps that are read, and maps that end in .png.',
                        'add --content, leave out --semantic-weight=0 or --method, or let --semantic-ext end in .png')
    paths = doodle.map_paths(options)
    if paths[0] == paths[1]:
        raise doodle.UserError(f'{options.content!r} and {options.style!r} would have one map.', 'rename one of them')
    missing = [path for path in paths if not doodle.is_there(path)]
    for path in missing:
        doodle.check_folder(os.path.dirname(path) or '.', '--auto-maps', 'copy the picture into a folder of your own')
    return missing


def map_colours(count):
    """Colours (count, 3) uint8, each with the direction farthest from those before; channels are 0, 128 or 255."""
    colours = np.array([colour for colour in np.ndindex(3, 3, 3) if max(colour) == 2]) * 127.5
    directions = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    chosen = [1]                                                        # (0, 0, 255)
    while len(chosen) < count:
        chosen.append((directions @ directions[chosen].T).max(axis=1).argmin())
    return np.uint8(colours[chosen] + .5)


def scaled(X):
    """`X` (n, d), centred, and scaled to vectors of length one (root mean square)."""
    X = X - X.mean(axis=0)
    return X / max(np.sqrt((X ** 2).sum(axis=1).mean()), 1e-12)


def segment_means(segments, values):
    """Means of `values` (h, w, C), brought to the size of `segments` (H, W), over each of the segments, (n, C)."""
    count, segments = segments.max() + 1, segments[::2, ::2]            # every other pixel is enough
    values = doodle.resized(np.float32(values), segments.shape[::-1], Image.BILINEAR).reshape(segments.size, -1)
    cover = sparse.csr_matrix((np.ones(segments.size), (segments.ravel(), np.arange(segments.size))),
                              (count, segments.size))
    return cover @ values / np.maximum(cover.sum(axis=1).A, 1)


def border_ways(segments, X):
    """Geodesic distances (n, 4) of each segment from the four borders [W12].

    A step between neighbours costs its length less 0.7 of the median, so that paths within a part cost almost nothing.

    Parameters
    ----------
    segments : (H, W) int array
    X : (n, d) array
    """
    pairs = [np.stack([a.ravel(), b.ravel()]) for a, b in ((segments[1:], segments[:-1]),
                                                           (segments[:, 1:], segments[:, :-1]))]
    a, b = np.unique(np.sort(np.concatenate(pairs, axis=1), axis=0), axis=1)
    a, b = a[a != b], b[a != b]
    steps = np.linalg.norm(X[a] - X[b], axis=1)
    steps = np.maximum(steps / max(np.median(steps), 1e-12) - 0.7, 1e-3)
    graph = sparse.csr_matrix((steps, (a, b)), shape=(len(X), len(X)))
    borders = segments[0], segments[-1], segments[:, 0], segments[:, -1]
    ways = np.stack([csgraph.dijkstra(graph, directed=False, indices=np.unique(border), min_only=True)
                     for border in borders], axis=1)
    return ways / ways.mean()


def describe(pictures, weights, fast):
    """Cut both pictures into superpixels, and compute the descriptor of each.
    Parameters
    ----------
    pictures : list of two (H, W, 3) uint8 arrays
    weights : Weights
    fast : bool
        With the engine.

    Returns
    -------
    segments : list of two (h, w) int arrays
        Superpixels by SLIC [A12]; the numbers of the second picture follow those of the first.
    X : (n, d) array
        Descriptors, of all that `MAP_WEIGHTS` names.
    f : (n, e) array
        Their part from the network: 32 principal components of each layer.
    """
    names = [name for name in weights.layers if name in MAP_WEIGHTS] or list(weights.layers)[-1:]
    x = doodle.T.tensor3('x')
    f = doodle.features(doodle.build_network(weights, names, fast), x, names)
    network = doodle.theano.function([x], list(f.values()))
    segments, known = [], []
    for picture in pictures:
        scale = MAP_SIDE / max(picture.shape)
        small = doodle.resized(picture, [max(16, round(side * scale)) for side in picture.shape[1::-1]], Image.LANCZOS)
        cut = segmentation.slic(small, n_segments=MAP_SEGMENTS, compactness=10, sigma=0.5, start_label=0)
        height = np.linspace(-1, 1, len(cut))[:, None, None].repeat(cut.shape[1], axis=1)
        lab = segment_means(cut, color.rgb2lab(small))
        layers = [segment_means(cut, f / np.maximum(np.linalg.norm(f, axis=2, keepdims=True), 1e-6))
                  for f in network(np.float32(doodle.to_planes(small)))]
        known.append([X - X.mean(axis=0) for X in (lab / np.maximum(lab.std(axis=0), 1e-6), *layers)] +
                     [segment_means(cut, height)])
        segments.append(cut)
    split = segments[0].max() + 1
    colours, *layers, height = map(np.concatenate, zip(*known))
    layers = [scaled(f @ np.linalg.eigh(f.T @ f)[1][:, -32:]) for f in layers]
    f = np.hstack([MAP_WEIGHTS.get(name, 1) * layer for name, layer in zip(names, layers)])
    ways = map(border_ways, segments, np.split(np.hstack([f, scaled(colours)]), [split]))
    X = np.hstack([f, MAP_WEIGHTS['colour'] * scaled(colours), MAP_WEIGHTS['height'] * height * np.sqrt(3),
                   MAP_WEIGHTS['borders'] * scaled(np.concatenate(list(ways)))])
    return [segments[0], segments[1] + split], X, f


def shared_split(X, shares, least):
    """Cut a part into two halves that both occur in both pictures.

    Descends Ward's tree to the first such fork; branches of one picture only, on the way, join the nearer half.

    Parameters
    ----------
    X : (n, d) array
    shares : (n, 2) array
        Each superpixel's share of the first and of the second picture.
    least : float
        Share of each picture that a half must have.

    Returns
    -------
    gain : float
        Decrease of the sum of squares; 0 if there is no cut.
    side : (n,) bool array
    """
    n, left, side = len(X), [], np.zeros(len(X), dtype=bool)
    if n < 4:
        return 0, side
    tree, nodes = hierarchy.to_tree(hierarchy.ward(X), rd=True)
    both = [shares[node.pre_order()].sum(axis=0).min() >= least for node in nodes]
    while not tree.is_leaf():
        children = sorted((tree.left, tree.right), key=lambda node: both[node.id])
        if both[children[0].id]:
            halves = [child.pre_order() for child in children]
            centres = [X[half].mean(axis=0) for half in halves]
            side[halves[1]] = True
            for branch in left:
                a, b = (np.linalg.norm(X[branch].mean(axis=0) - centre) for centre in centres)
                side[branch] = b < a
            return tree.dist ** 2 / 2, side
        left.append(children[0].pre_order())
        tree = children[1]
    return 0, side


def joint_parts(X, f, shares, count):
    """Part of each superpixel, 0 .. count - 1, by repeated `shared_split`.

    First, by whole descriptors, the part whose cut lowers the sum of squares the most; when no part can be cut any
    more, by features centred in each picture, the one with the largest decrease per superpixel: eyes from skin.

    Parameters
    ----------
    X, f, shares : arrays
        As from `describe` and for `shared_split`.
    count : int

    Returns
    -------
    (n,) int array
        With fewer parts where there is nothing left to cut.
    """
    parts, cuts = np.zeros(len(X), dtype=int), [None]
    for detailed in (False, True):
        def split(k):
            part = np.flatnonzero(parts == k)
            Y, images = (f if detailed else X)[part].copy(), shares[part] > 0
            for image in images.T if detailed else ():
                Y[image] -= Y[image].mean(axis=0)
            gain, side = shared_split(Y, shares[part], MAP_LEAST[detailed])
            return gain / (len(part) if detailed else 1), part[side]
        cuts = [split(k) for k in range(len(cuts))]
        while len(cuts) < count and max(gain for gain, _ in cuts):
            k = max(range(len(cuts)), key=lambda k: cuts[k][0])
            parts[cuts[k][1]] = len(cuts)
            cuts[k] = split(k)
            cuts.append(split(len(cuts)))
    return parts


def painted_parts(segments, X, painted, k):
    """Parts of the superpixels as in a painted map (H, W, 3) of picture `k`, and the colours of these parts."""
    colours, nearest = np.unique(doodle.colour_codes(doodle.resized(painted, segments[k].shape[::-1], Image.NEAREST)),
                                 return_inverse=True)
    colours, nearest = doodle.code_colours(colours), nearest.reshape(segments[k].shape)     # (K, 3), (h, w)
    own = np.unique(segments[k])
    cover = segment_means(segments[k] - own[0], np.eye(len(colours))[nearest])              # (n, K)
    classes = cover.argmax(axis=1)
    best, seen = cover.argmax(axis=0), cover.any(axis=0)                # a class that is largest in no superpixel has
    classes[best[seen]] = np.flatnonzero(seen)                          # that in which its own share is largest
    used = np.unique(classes)
    distances = [np.sort(distance.cdist(X, X[own][classes == c]), axis=1)[:, :3].mean(axis=1) for c in used]
    return used[np.argmin(distances, axis=0)], np.uint8(colours)


def automatic_maps(pictures, maps, count, weights, fast):
    """Maps of two pictures in which a colour means the same thing.

    Parameters
    ----------
    pictures : list of two (H, W, 3) uint8 arrays
    maps : list of two (H, W, 3) uint8 arrays or None
        A painted map gives its parts and colours to the other picture; without any, `count` parts are found.
    count : int
    weights : Weights
    fast : bool
        With the engine, which is for the CPU.

    Returns
    -------
    list of two (H, W, 3) uint8 arrays
    """
    segments, X, f = describe(pictures, weights, fast)
    if maps[0] is None and maps[1] is None:
        shares = np.stack([np.bincount(cut.ravel(), minlength=len(X)) / cut.size for cut in segments], axis=1)
        parts, colours = joint_parts(X, f, shares, count), map_colours(count)
    else:
        k = int(maps[0] is None)
        parts, colours = painted_parts(segments, X, maps[k], k)
    return [doodle.resized(colours[parts[cut]], picture.shape[1::-1], Image.NEAREST)
            for cut, picture in zip(segments, pictures)]


def read_known(options):
    """Both pictures, (H, W, 3) uint8, and their maps in the colours of the classes, or None for one that is missing."""
    targets, paths = doodle.map_paths(options), (options.content, options.style)
    pictures, maps = [doodle.read_picture(path).pixels for path in paths], []
    for target, path, picture in zip(targets, paths, pictures):
        painted = doodle.classify_maps([target], [(path, picture)]) if doodle.is_there(target) else None
        maps.append(painted and np.uint8(painted.classes)[painted.labels[0]])
    return pictures, maps


def paint_maps(options, pictures, maps, weights, fast):
    """Paint and write those of the `maps` that are None, each with a preview, and say so; see `automatic_maps`."""
    painted = automatic_maps(pictures, maps, options.auto_maps, weights, fast)
    for target, picture, known, colours in zip(doodle.map_paths(options), pictures, maps, painted):
        if known is None:
            written = {target: colours, preview_path(target): np.uint8((picture.astype(int) + colours) // 2)}
            written = {path: pixels for path, pixels in written.items() if not os.path.exists(path)}
            for path, pixels in written.items():
                doodle.write_picture(pixels, path)
            parts = len(np.unique(doodle.colour_codes(colours)))
            doodle.say(f'  - Painted {parts} parts: ' + ', '.join(f'`{path}`' for path in written))
    doodle.say('  - Maps can be mended by hand in a paint program: run again, and they are kept.')


# ---- command ---------------------------------------------------------------------------------------------------------

def parse_options(arguments):
    """The command line as options of doodle.py, with its names, defaults and meanings."""
    parser = doodle.Parser(prog='automaps.py', description='Paint the maps of two pictures that are missing.')
    parser.add_argument('content', type=doodle.parse_path, metavar='ME', help='a picture')
    parser.add_argument('style', type=doodle.parse_path, metavar='YOU', help='another, with the same parts')
    parser.add_argument('--parts', type=doodle.one_of(*range(2, 17)), default='6', metavar='N', dest='auto_maps',
                        help='number of parts (default: 6)')
    for flag, _, kind, default, meaning in sum(doodle.OPTIONS.values(), ()):
        if flag in ('--semantic-ext', '--device', '--network', '--weights'):
            parser.add_argument(flag, type=kind, default=default, metavar=doodle.VALUES[kind],
                                help=meaning + (f' (default: {default})' if default else ''))
    chosen = parser.parse_args(arguments)
    options = doodle.parse_options([f'--content={chosen.content}', f'--style={chosen.style}'])
    vars(options).update(vars(chosen))
    return options


def run(arguments):
    """The command: paint the maps that are missing, and show both."""
    options = parse_options(arguments)
    doodle.import_pillow()
    automaps = doodle.import_automaps()                                 # this file as a module
    if automaps.missing_maps(options):
        known = automaps.read_known(options)                            # input errors come before the download
        weights, remarks = doodle.find_weights(options)
        for line in remarks:
            doodle.say(f'  - {line}')
        automaps.paint_maps(options, *known, weights, doodle.open_device(options) == 'cpu')
    else:
        doodle.say('  - Both maps are there: nothing to paint.')
    for path in filter(os.path.exists, map(automaps.preview_path, doodle.map_paths(options))):
        doodle.say(f'  - Preview: `{path}`.')
        if os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'):
            doodle.decoded(path).show()
    return 0


if __name__ == '__main__':
    sys.exit(doodle.guarded(run, sys.argv[1:]))
