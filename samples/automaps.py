#!/usr/bin/env python3
"""Automatic maps: paint the semantic maps of two pictures, in which a colour means the same thing.

    python3 samples/automaps.py ME.jpg YOU.jpg [--parts=6]

paints ``ME_sem.png`` and ``YOU_sem.png``, each with a preview over its picture, ``ME_sem_preview.jpg``, and shows the
previews. Existing files are not overwritten: if one of the maps is there, the other gets its parts and colours.
``doodle.py --auto-maps`` does the same before it reads the maps.

Where both pictures show a face, the parts are those of a portrait, each with its name. The points of the face [K19]
give eyes, brows, nose and mouth; a network tells the person from the background; and skin, hair, neck and clothes are
told by their places around the face and by their colours, which are learnt from the picture itself as by GrabCut [R04],
with a guided filter [H13] for the cut. `faces.py` has the networks. A part that only one picture has goes to its
neighbour.

Elsewhere, or with a number of parts, the parts are found by clustering. Each picture is cut into superpixels (SLIC
[A12]), which are described by features of VGG at conv4_1 and conv5_1, by colours, by their height in the picture, and
by geodesic distances to its four borders, which separate foreground from background (geodesic saliency [W12]). Features
and colours are centred in each picture, since pictures differ in light and style. The superpixels of both pictures
together are cut in two repeatedly, at the first fork of Ward's tree [W63] whose branches both occur in both pictures,
so that every part is in both maps. When no part can be cut any more, parts are cut by features alone, down to details.

If one map is painted, its colours stand for the parts of the portrait that they cover most; colours that share a part,
and all colours where there is no face, go to the superpixels of the other picture that are nearest to theirs.

    [W63]   Ward: Hierarchical Grouping to Optimize an Objective Function. JASA 58
    [R04]   Rother, Kolmogorov, Blake: GrabCut: Interactive Foreground Extraction using Iterated Graph Cuts. TOG 23
    [A12]   Achanta, Shaji, Smith, Lucchi, Fua, Suesstrunk: SLIC Superpixels. PAMI 34
    [W12]   Wei, Wen, Zhu, Sun: Geodesic Saliency Using Background Priors. ECCV 2012
    [H13]   He, Sun, Tang: Guided Image Filtering. PAMI 35
    [K19]   Kartynnik, Ablavatski, Grishchenko, Grundmann: Real-time Facial Surface Geometry from Monocular Video on
            Mobile GPUs. arXiv 1907.06724
"""
import functools
import os
import sys
from collections import namedtuple

if __name__ == '__main__':                                              # the command: --help needs no imports
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
else:                                                                   # the module: loaded by doodle.import_automaps
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from scipy import ndimage, sparse, special
    from scipy.cluster import hierarchy
    from scipy.sparse import csgraph
    from scipy.spatial import distance
    from skimage import color, draw, filters, morphology, segmentation
import doodle

if __name__ != '__main__':
    faces = doodle.import_beside('samples/faces.py')

NAMES = [name for name in doodle.PARTS if name != 'collar']             # a label is the number of its name
BACKGROUND, SKIN, EYES, BROWS, NOSE, MOUTH, HAIR, EARS, NECK, CLOTHES = range(len(NAMES))
MODELLED = BACKGROUND, SKIN, HAIR, NECK, CLOTHES                        # by their colours and places
FACE_SIDE, PICTURE_SIDE, LONGEST = 130, 560, 1600   # most pixels: of a face and a picture for the model, of a map
COUNT = 6                                                             # parts by clustering, if no number is given
BINS, ROUNDS = 24, 4                                                  # of the colour model: bins of a channel of Lab
LEAST_AREA = 0.005                                                    # share of a picture that a large part must have
SPECK = 0.0002                                                        # share of a picture that is too small for a piece

# Where each part of a portrait goes if a picture lacks it, in this order; skin, the last, is always there.
UNTO = *((part, SKIN) for part in (EARS, BROWS, EYES, NOSE, MOUTH, NECK, HAIR)), (CLOTHES, BACKGROUND), (
    BACKGROUND, CLOTHES), (CLOTHES, SKIN)


# ---- maps of two pictures --------------------------------------------------------------------------------------------

# The maps of two pictures, (H, W, 3) uint8; the names of their colours, {0xrrggbb: name}; and lines on how it went.
AutomaticMaps = namedtuple('AutomaticMaps', 'maps names remarks')


def automatic_maps(paths, pictures, maps, parts, network):
    """Maps of two pictures in which a colour means the same thing.

    Parameters
    ----------
    paths : list of two str
        What the pictures are called.
    pictures : list of two (H, W, 3) uint8 arrays
    maps : list of two (H, W, 3) uint8 arrays or None
        A painted map gives its parts and colours to the other picture.
    parts : int or str
        A number of parts to find by clustering; ``'faces'``, the parts of portraits; or ``'auto'``: these where both
        pictures show a face, else clustering.
    network : function
        Returns what clustering needs: the `Weights`, and whether the engine, which is for the CPU, is to be used.

    Returns
    -------
    AutomaticMaps

    Raises
    ------
    UserError
        Faces were asked for, and a picture shows none.
    """
    painted = next((k for k in (0, 1) if maps[k] is not None), None)
    labels, remarks = portraits(paths, pictures, parts) if parts in ('auto', 'faces') else (None, [])
    if labels is None:
        count = COUNT if parts == 'auto' else parts
        maps = clustered_maps(pictures, maps, count, *network())
        codes = np.unique([code for colours in maps for code in np.unique(doodle.colour_codes(colours))])
        names = {int(code): f'part {number}' for number, code in enumerate(codes, 1)}
        return AutomaticMaps(maps, names, remarks + [f'{counted(names)} by clustering.'] * (painted is None))
    if painted is None:
        labels, lines = paired(paths, labels)
        colours = np.uint8([doodle.PARTS[name] for name in NAMES])
        names = {int(doodle.colour_codes(colours[k])): name for k, name in enumerate(NAMES)}
        return AutomaticMaps([colours[label] for label in labels], names, remarks + lines)
    return fitted_maps(paths, pictures, maps, painted, labels, network, remarks)


def portraits(paths, pictures, parts):
    """The parts of two portraits, (H, W) numbers of `NAMES` each, or None where there is none; and lines on this."""
    try:
        faces.networks()
    except (OSError, ValueError) as error:
        raise doodle.UserError(f'The networks for faces cannot be read: {doodle.one_line(error)}.',
                               'copy samples/faces.npz from where the script is from, or say --auto-maps=6') from None
    found = [faces.find_faces(picture) for picture in pictures]
    missing = [f'`{path}`' for path, those in zip(paths, found) if not those]
    if missing and parts == 'faces':
        raise doodle.UserError(f'No face was found in {" and ".join(missing)}.',
                               'paint its map, or let parts be found by clustering: --auto-maps=6')
    if missing:
        return None, [f'No face was found in {" and ".join(missing)}.']
    remarks = [f'{len(those)} faces were found in `{path}`: the largest is taken.'
               for path, those in zip(paths, found) if len(those) > 1]
    return [portrait_parts(picture, those[0].points) for picture, those in zip(pictures, found)], remarks


def counted(parts):
    """How many parts there are, in words."""
    return '1 part' if len(parts) == 1 else f'{len(parts)} parts'


def lacking(label, part):
    """Whether a picture has too little of a part to paint with: of large parts, or of a feature of the face."""
    return (label == part).mean() < (LEAST_AREA if part in MODELLED else doodle.LEAST)


def paired(paths, labels):
    """The same parts in both pictures: what only one has goes to its neighbour. Returns labels, and lines on this."""
    labels, remarks = [label.copy() for label in labels], []
    for part, neighbour in UNTO:
        without = [path for path, label in zip(paths, labels) if lacking(label, part)]
        if without:
            remarks += [f'`{path}` has no {NAMES[part]}: in both pictures that counts as {NAMES[neighbour]}.'
                        for path in without] if len(without) == 1 else []
            for label in labels:
                label[label == part] = neighbour
    return labels, remarks


def fitted_maps(paths, pictures, maps, painted, labels, network, remarks):
    """`automatic_maps` of portraits where the map of number `painted` is there: the other gets its colours.

    A colour means the part with which it has most in common, intersection over union. Colours that share a part are
    told apart by clustering; a part without a colour of its own has the one that covers it most.
    """
    other = 1 - painted
    codes, colours, classes = classes_of(maps[painted])
    table = np.zeros((len(codes), len(NAMES)))                          # pixels of a colour and a part
    np.add.at(table, (classes, labels[painted]), 1)
    areas, sums = table.sum(axis=0), table.sum(axis=1, keepdims=True)
    meanings = (table / np.maximum(areas + sums - table, 1)).argmax(axis=1)
    label = labels[other].copy()
    for part, neighbour in UNTO:
        if not areas[part]:
            label[label == part] = neighbour
    result, nearest = np.zeros(label.shape, int), None
    for part in np.unique(label):
        own = np.flatnonzero(meanings == part)
        if len(own) > 1:
            shared = ', '.join(f'#{codes[k]:06x}' for k in own)
            remarks = remarks + [f'{shared} are all {NAMES[part]}: they are told apart by clustering.']
            if nearest is None:
                segments, X, _ = describe(pictures, *network())
                nearest = class_distances(segments, X, classes, painted)                    # (n, K)
            choice = own[nearest[:, own].argmin(axis=1)][segments[other]]
            result[label == part] = doodle.resized(np.int32(choice)[..., None], label.shape[::-1], Image.NEAREST
                                                   )[..., 0][label == part]
        else:
            result[label == part] = own[0] if len(own) else table[:, part].argmax()
    unused = [f'#{codes[k]:06x}' for k in np.setdiff1d(np.unique(classes), np.unique(result))]
    if unused:
        remarks = remarks + [f'`{paths[other]}` has no counterpart of {", ".join(unused)}.']
    done = list(maps)
    done[other] = colours[result]
    return AutomaticMaps(done, {int(code): NAMES[k] for code, k in zip(codes, meanings)}, remarks)


# ---- the parts of a portrait -----------------------------------------------------------------------------------------
# Pictures are (H, W, 3) uint8; places are (x, y) in pixels from the outer corner; lengths are in heights of the face.

# A face in a picture of some size: its points (478, 2), its height in pixels, the directions of its chin and of its
# left; and for each pixel u across the face from its middle, v down from its top (0) to its chin (1), and the distance
# d from its oval, negative inside.
Head = namedtuple('Head', 'points height down left u v d')


def ramp(x, low, high):
    """0 below `low`, 1 above `high`, a straight line between them."""
    return np.clip((x - low) / (high - low), 0, 1)


def inside(points, shape):
    """Mask (H, W) of the polygon with corners `points` (n, 2)."""
    return draw.polygon2mask(shape, points[:, ::-1] - .5)


def stretched(points, width, height, head):
    """Points (n, 2), moved away from their middle: by the factor `width` across the face, `height` along it."""
    axes, middle = np.stack([head.left, head.down]), points.mean(axis=0)
    return (points - middle) @ axes.T * (width, height) @ axes + middle


def head_of(points, shape):
    """The `Head` with these points (478, 2) in a picture of `shape` (H, W)."""
    top, chin = points[[faces.FOREHEAD, faces.CHIN]]
    height = np.linalg.norm(chin - top)
    down = (chin - top) / height
    left = np.array([down[1], -down[0]])
    places = np.stack(np.meshgrid(*(np.arange(side) + .5 for side in shape[::-1])), axis=-1)       # (H, W, 2)
    oval = inside(points[list(faces.OVAL)], shape)
    d = ndimage.distance_transform_edt(~oval) - ndimage.distance_transform_edt(oval)
    return Head(points, height, down, left, (places - (top + chin) / 2) @ left / height, (places - top) @ down / height,
                d / height)


def details(head, shape):
    """Mask (H, W) of eyes, brows and lips with their surroundings, whose colours are nobody's skin or hair."""
    rings = (faces.LEFT_EYE, faces.RIGHT_EYE, faces.LEFT_EYEBROW, faces.RIGHT_EYEBROW, faces.LIPS)
    return np.any([inside(stretched(head.points[list(ring)], 1.2, 1.4, head), shape) for ring in rings], axis=0)


def person_near(picture, head):
    """How probably, 0 .. 1, each pixel (H, W) is the person's.

    The network sees the whole picture coarsely, and what is near the face well: its logits for three upright squares
    are averaged. Where it sees nobody in the face, as in some paintings, there is a bust of the usual shape.
    """
    h, w = picture.shape[:2]
    angle = np.arctan2(head.left[1], head.left[0])
    total, weights = np.zeros((h, w)), np.zeros((h, w))
    near = head.points[faces.FOREHEAD] + .9 * head.height * head.down
    for centre, size, weight in ((np.array([w, h]) / 2, max(w, h), 2), (near, 4 * head.height, 1),
                                 (near, 2.5 * head.height, 1)):
        seen = np.clip(faces.person(np.uint8(faces.crop(picture, centre, size, angle, 256))), .01, .99)
        places = np.stack(np.meshgrid(np.arange(w) + .5, np.arange(h) + .5), axis=-1) - centre
        places = places @ faces.rotation(angle) * (256 / size) + 127.5                          # (h, w, 2)
        found = ndimage.map_coordinates(special.logit(seen), places[..., ::-1].transpose(2, 0, 1), order=1,
                                        mode='nearest')
        known = weight * ((places >= 0) & (places <= 255)).all(axis=-1)
        total, weights = total + known * found, weights + known
    person = special.expit(total / np.maximum(weights, 1))
    return np.maximum(person, bust(head)) if person[head.d < 0].mean() < .6 else person


def bust(head):
    """Head and shoulders of the usual shape, 0 .. 1, (H, W)."""
    u, v = np.abs(head.u), head.v
    skull = (u / .53) ** 2 + ((v - .42) / .72) ** 2
    shoulders = .32 + 1.1 * np.sqrt(np.maximum(v - 1.05, 0))            # half their width
    return np.maximum(.9 * np.clip(1.6 - skull, 0, 1),
                      .85 * np.clip(.5 + (shoulders - u) / .3, 0, 1) * (v > 1))


def priors(head, person, bald):
    """How probable each of the `MODELLED` parts is at each pixel by its place alone, (H, W, 5).

    The `person` (H, W) is divided among four parts, whose weights were found by trial.
    """
    u, v, d = np.abs(head.u), head.v, np.maximum(head.d, 0)
    oval, low, below = head.d < 0, ramp(v, .75, 1), np.maximum(v - 1, 0)                        # low: 1 below the chin
    fringe = ramp(.25 - v, 0, .35) * ramp(head.d, -.25, 0)              # 1 at the top of the oval
    crown = bald * (1 - ramp(u, .3, .5)) * (1 - ramp(v, 0, .25))
    skin = np.where(oval, 1 - .35 * fringe, .6 * np.exp(-(d / .25) ** 2) * (1 - .95 * low) + .12 * low)         # hands
    hair = np.where(oval, .02 + 1.5 * fringe,                           # long hair falls beside the neck
                    .75 * (1 - low) * (1 - ramp(u, .7, 1) * ramp(v, .1, .3)) +
                    .65 * low * np.exp(-below / .9) * ramp(u, .15, .35) * (1 - ramp(u, .7, 1.2)))
    neck = ~oval * low * (1.2 * np.exp(-(below / .28) ** 2 - (u / .42) ** 4) +                  # and a bosom
                          np.exp(-(below / .7) ** 2 - (u / .5) ** 4))
    clothes = ~oval * (.9 * ramp(v, .95, 1.6) + low * (.25 + .1 * ramp(u, .45, .7)))
    body = np.stack([np.maximum(skin, .6 * crown), hair * (1 - .95 * crown), neck, clothes], axis=-1) + 1e-4
    far = (1 - low) * (np.maximum(d - .25, 0) / .28) ** 2               # from the head: hair that big must be sure
    others = np.maximum(ramp(u, 1.8, 2.6), ramp(u, .9, 1.25) * (1 - ramp(v, .6, .9)))           # people beside
    person = special.expit(special.logit(np.clip(person, .02, .98)) - far) * (1 - others)
    person = np.where(head.d < -.03, .99, np.clip(person, .02, .98))[..., None]
    return np.concatenate([1 - person, person * body / body.sum(axis=-1, keepdims=True)], axis=-1)


def outer(x):
    """Outer products (H, W, 3, 3) of `x` (H, W, 3) with itself."""
    return x[..., :, None] * x[..., None, :]


class GuidedFilter:
    """Smooth maps within the edges of a picture [H13]: near each pixel the result is linear in the picture's colour.

    Parameters
    ----------
    guide : (H, W, 3) float32 array
        The picture, 0 .. 1.
    side : int
        Of the square around each pixel.
    eps : float
        Colours whose variance is less count as one.
    """

    def __init__(self, guide, side, eps):
        self.guide, self.side = guide, side
        self.mean = self.box(guide)
        covariance = self.box(outer(guide)) - outer(self.mean)
        self.inverse = np.linalg.inv(covariance + eps * np.eye(3, dtype=np.float32))

    def box(self, x):
        """The mean of `x` (H, W, ...) over the square around each pixel."""
        return ndimage.uniform_filter(x, (self.side, self.side) + (0,) * (x.ndim - 2), mode='nearest')

    def lines(self, p):
        """`a` (H, W, 3, K) and `b` (H, W, K) for maps `p` (H, W, K): smooth, they are guide a + b."""
        mean = self.box(p)
        covariance = self.box(self.guide[..., None] * p[..., None, :]) - self.mean[..., None] * mean[..., None, :]
        a = self.inverse @ covariance
        return self.box(a), self.box(mean - (self.mean[..., None] * a).sum(axis=-2))


def colours_of(bins, weights):
    """How often each colour occurs, (BINS ** 3,), where pixels `bins` (H, W) have `weights` (H, W)."""
    counts = np.bincount(bins.ravel(), weights.ravel(), BINS ** 3).reshape(BINS, BINS, BINS)
    counts = ndimage.gaussian_filter(counts, (1, .8, .8), mode='constant')
    return counts.ravel() / max(counts.sum(), 1e-12)


def is_bald(bins, head):
    """Whether the top of the head has the colours of the forehead."""
    middle, v, d = np.abs(head.u) < .25, head.v, head.d
    crown, forehead = (colours_of(bins, np.float64(mask)) for mask in (middle & (v < 0) & (d > .18) & (d < .28),
                                                                       middle & (d < -.03) & (v > .02) & (v < .22)))
    return np.minimum(crown, forehead).sum() > .5


def shaded(colours):
    """How often each colour (BINS ** 3,) occurs in the shade: up to three bins darker, or as it is."""
    return ndimage.uniform_filter1d(colours.reshape(BINS, -1), 5, axis=0, mode='constant', origin=-1).ravel()


def colour_model(picture, head, person):
    """The `MODELLED` parts by their places and their colours, which are learnt from the picture itself.

    In each of a few rounds the colours of each part are counted where the part is known, all pixels are judged by place
    and colour, and the judgements are smoothed within edges; so in GrabCut [R04], with a guided filter for the cut.

    Returns
    -------
    a : (H, W, 3, 5) array
    b : (H, W, 5) array
        The parts' shares are lab / 100 a + b, also at a finer resolution than the picture's.
    """
    v, d = head.v, head.d
    lab = np.float32(color.rgb2lab(picture))
    even = ndimage.gaussian_filter(lab, (head.height / 150, head.height / 150, 0))
    bins = np.int64(np.clip((even / (100, 60, 60) + (0, .5, .5)) * BINS, 0, BINS - 1)) @ (BINS * BINS, BINS, 1)
    smooth = GuidedFilter(ndimage.gaussian_filter(lab, (.5, .5, 0)) / 100, max(round(.09 * head.height) | 1, 3), 2e-4)
    prior, plain = priors(head, person, is_bald(bins, head)), ~details(head, v.shape)
    middle = .1 + .9 * ramp(v, .12, .3) * (d < -.03)                    # skin is sure here: no fringe, no temples
    above = ramp(d, .03, .16) * (1 - ramp(v, .5, .9))                   # and hair here
    hanging = ramp(prior[..., 2] / (prior[..., 2] + prior[..., 4] + 1e-6), .1, .4)          # hair rather than clothes
    share, hairy = prior, np.zeros(v.shape)
    for _ in range(ROUNDS):
        known = np.stack([np.ones(v.shape), middle, above, np.ones(v.shape), 1 - hairy])        # (5, H, W)
        colours = np.stack([colours_of(bins, plain * where * part ** 2)
                            for where, part in zip(known, np.moveaxis(share, -1, 0))])          # (5, BINS ** 3)
        colours[3] = shaded(colours[1])                                 # a neck has the face's colours
        likely = (colours / (colours.mean(axis=0) + 1e-5)).T[bins]      # (H, W, 5)
        hairy = hanging * ramp(likely[..., 2] / (likely[..., :4].sum(axis=-1) + 1e-3), .4, .8)  # that is no clothes
        share = prior * (likely + .02) ** .7
        a, b = smooth.lines(np.float32(share / share.sum(axis=-1, keepdims=True)))
        share = np.clip((smooth.guide[..., None] * a).sum(axis=-2) + b, 1e-4, 1)
        share /= share.sum(axis=-1, keepdims=True)
    return a, b


def portrait_parts(picture, points):
    """The parts of a portrait.

    Parameters
    ----------
    picture : (H, W, 3) uint8 array
    points : (478, 2) array
        Of its face, as in `faces.Face`.

    Returns
    -------
    (H, W) uint8 array
        Numbers of `NAMES`.
    """
    shape = picture.shape[:2]
    picture = doodle.limited(picture, LONGEST, Image.LANCZOS)
    points = points * (np.array(picture.shape[1::-1]) / shape[::-1])
    height = np.linalg.norm(points[faces.FOREHEAD] - points[faces.CHIN])
    scale = min(1, FACE_SIDE / height, PICTURE_SIDE / max(picture.shape))
    small = doodle.resized(picture, [max(8, round(side * scale)) for side in picture.shape[1::-1]], Image.LANCZOS)
    head = head_of(points * (np.array(small.shape[1::-1]) / picture.shape[1::-1]), small.shape[:2])
    a, b = colour_model(small, head, person_near(small, head))
    head = head_of(points, picture.shape[:2])
    labels = tidied(smoothed(labels_of(picture, a, b, head), .02 * head.height), .006 * head.height ** 2)
    for rule in (loose_hair, other_people, neck_and_hands, ears, features):
        labels = rule(labels, head, picture)
    labels = np.uint8(tidied(labels, SPECK * labels.size))
    return doodle.resized(labels[..., None], shape[::-1], Image.NEAREST)[..., 0]


def labels_of(picture, a, b, head):
    """The likeliest part of each pixel, (H, W) uint8, from what `colour_model` returns; borders follow the picture."""
    shape, blur = picture.shape[:2], max(.012 * head.height, .5)
    guide = ndimage.gaussian_filter(np.float32(color.rgb2lab(picture)), (.5, .5, 0)) / 100
    best, labels = np.full(shape, -np.inf, np.float32), np.zeros(shape, np.uint8)
    for k, part in enumerate(MODELLED):
        line = doodle.resized(np.dstack([a[..., k], b[..., k]]), shape[::-1], Image.BILINEAR)   # (H, W, 4)
        share = (guide * line[..., :3]).sum(axis=-1) + line[..., 3]
        share = ndimage.gaussian_filter(share, blur)                    # no ragged borders
        labels[share > best] = part
        best = np.maximum(best, share)
    return labels


def pieces(mask):
    """The connected pieces of a mask: their numbers (H, W), 0 outside, and their areas, [0] that of the outside."""
    numbers, _ = ndimage.label(mask)
    return numbers, np.bincount(numbers.ravel())


def smoothed(labels, radius):
    """Without what is thinner than a disk: that goes to what is nearest."""
    disk, thin = morphology.disk(max(1, round(radius))), np.ones(labels.shape, bool)
    for part in MODELLED:
        mask = np.pad(labels == part, len(disk), mode='edge')
        thin &= ~ndimage.binary_opening(mask, disk)[len(disk):-len(disk), len(disk):-len(disk)]
    return nearest_labels(labels, thin)


def nearest_labels(labels, where):
    """Labels in which the pixels `where` (H, W) have those of the nearest others."""
    if where.all():
        return labels
    return labels[tuple(ndimage.distance_transform_edt(where, return_distances=False, return_indices=True))]


def tidied(labels, least):
    """Pieces of the `MODELLED` parts with fewer than `least` pixels go to what is nearest."""
    small = np.zeros(labels.shape, bool)
    for part in MODELLED:
        numbers, areas = pieces(labels == part)
        areas[0] = labels.size
        small |= (areas < least)[numbers]
    return nearest_labels(labels, small)


def loose_hair(labels, head, picture):
    """Hair that hangs on no head is clothes, or of somebody behind."""
    numbers, areas = pieces(labels == HAIR)
    highest, nearest = (ndimage.minimum(values, numbers, range(len(areas))) for values in (head.v, head.d))
    parts = np.where(highest > .6, CLOTHES, np.where(nearest > .12, BACKGROUND, HAIR))
    return np.where(labels == HAIR, parts[numbers], labels)


def other_people(labels, head, picture):
    """What is not connected with the face is background."""
    numbers, _ = pieces(labels != BACKGROUND)
    return np.where(np.isin(numbers, numbers[head.d < 0]), labels, BACKGROUND)


def neck_and_hands(labels, head, picture):
    """Skin below the chin is the neck; farther off, a hand. A neck that does not reach the face is a shirt."""
    near = (head.d > .015) & (head.v > .85) & (head.v < 1.7) & (np.abs(head.u) < .5)
    labels = np.where((labels == SKIN) & near, NECK, labels)
    numbers, areas = pieces(labels == NECK)
    reaches = ndimage.minimum(head.d, numbers, range(len(areas))) < .1
    return np.where((labels == NECK) & ~reaches[numbers], CLOTHES, labels)


def ears(labels, head, picture):
    """Skin outside the oval, at the height of eyes and nose, is an ear; the far side of a turned head shows none."""
    ear = (labels == SKIN) & (head.d > .02) & (head.v > .2) & (head.v < .85)
    right, left, bridge, tip = head.points[[234, 454, 168, 1]] @ head.left          # the oval's sides, the nose
    if min(tip - right, left - tip) < .45 * max(tip - right, left - tip):
        across = head.u * head.height + (head.points[[faces.FOREHEAD, faces.CHIN]] @ head.left).mean()
        ear &= (across < bridge) == (tip - right > left - tip)
    numbers, areas = pieces(ndimage.binary_opening(ear, iterations=max(1, round(.012 * head.height))))
    areas[0] = 0
    return np.where((areas >= .006 * head.height ** 2)[numbers], EARS, labels)


def features(labels, head, picture):
    """Nose, mouth, brows and eyes, where the face's points say."""
    shape, h = labels.shape, head.height

    def ring(numbers, width, height):
        return inside(stretched(head.points[list(numbers)], width, height, head), shape)

    eyes = np.zeros(shape, bool)
    for numbers in (faces.LEFT_EYE, faces.RIGHT_EYE):                   # the whole opening, with the lids
        opening = np.ptp(head.points[list(numbers)] @ head.down)
        eyes |= ring(numbers, 1.2, max(1.5, .06 * h / max(opening, 1e-3)))
    brows = np.any([dark_brow(ring(numbers, 1, 1), eyes, head, picture)
                    for numbers in (faces.LEFT_EYEBROW, faces.RIGHT_EYEBROW)], axis=0)
    for mask, part in ((ring(faces.NOSE, 1, 1.06), NOSE), (ring(faces.LIPS, 1, 1.02), MOUTH), (brows, BROWS),
                       (eyes, EYES)):
        labels = np.where(mask, part, labels)
    return labels


def dark_brow(brow, eyes, head, picture):
    """The brow (H, W): what is darker than all around it near where the points say; if nothing is, just there.

    Brows differ from the mesh's: thin ones, arched ones, and those behind the rim of glasses. What is thin and dark
    stands out from its closing; a shadow or a fringe does not.
    """
    h, area = head.height, brow.sum()
    if not area:                                                        # outside the picture
        return brow
    rows, columns = (slice(max(0, side.min() - int(.1 * h)), side.max() + int(.1 * h))
                     for side in (np.flatnonzero(brow.any(axis=k)) for k in (1, 0)))
    cut = brow[rows, columns]
    light = ndimage.gaussian_filter(color.rgb2lab(picture[rows, columns])[..., 0], .006 * h)
    near = (ndimage.distance_transform_edt(~cut) < .03 * h) & (
        ndimage.distance_transform_edt(~eyes[rows, columns]) > .02 * h)
    darker = ndimage.grey_closing(light, footprint=morphology.disk(max(1, round(.055 * h)))) - light
    limit = max(filters.threshold_otsu(darker[near]), 3)
    dark = near & (darker > limit)
    if not .25 * area < dark.sum() < 1.8 * area or darker[dark].mean() < 6:
        return brow
    numbers, areas = pieces(dark)
    areas[0] = 0
    brow = np.zeros_like(brow)
    brow[rows, columns] = (areas > .5 * areas.max())[numbers]
    return brow


# ---- parts by clustering ---------------------------------------------------------------------------------------------

# Weights in the descriptors of superpixels: features, colours, distances to the four borders, height in the picture.
MAP_WEIGHTS = {'4_1': 0.5, '5_1': 0.7, 'colour': 0.3, 'borders': 1.0, 'height': 0.5}
MAP_SIDE, MAP_SEGMENTS = 384, 600                                     # longest side, superpixels
MAP_LEAST = 0.03, 0.002                                               # share of both pictures: a main part, a detail


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


def superpixels(picture):
    """About `MAP_SEGMENTS` superpixels of a picture (H, W, 3) uint8, by SLIC [A12]: their numbers (H, W), from 0.

    Noise tears superpixels to specks, which SLIC merges to a few huge ones: a noisy picture is smoothed more.
    """
    for sigma in 0.5, 1, 2:
        cut = segmentation.slic(picture, n_segments=MAP_SEGMENTS, compactness=10, sigma=sigma, start_label=0)
        if cut.max() >= MAP_SEGMENTS / 2:
            break
    return cut


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
    steps = np.maximum(steps / max(np.median(steps) if steps.size else 0, 1e-12) - 0.7, 1e-3)
    graph = sparse.csr_matrix((steps, (a, b)), shape=(len(X), len(X)))
    borders = segments[0], segments[-1], segments[:, 0], segments[:, -1]
    ways = np.stack([csgraph.dijkstra(graph, directed=False, indices=np.unique(border), min_only=True)
                     for border in borders], axis=1)
    return ways / max(ways.mean(), 1e-12)                               # 0 where each superpixel is at each border


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
        As from `superpixels`; the numbers of the second picture follow those of the first.
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
        cut = superpixels(small)
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


def classes_of(painted):
    """The classes of a painted map (H, W, 3): their codes (K,) and colours (K, 3) uint8, and each pixel's, (H, W)."""
    codes, classes = np.unique(doodle.colour_codes(painted), return_inverse=True)
    return codes, np.uint8(doodle.code_colours(codes)), classes.reshape(painted.shape[:2])


def class_distances(segments, X, classes, k):
    """How far each superpixel is from each of the `classes` (H, W), 0 .. K - 1, painted over picture `k`.

    Returns
    -------
    (n, K) array
        The mean distance to the three nearest superpixels of the class; infinite if it has none.
    """
    count = classes.max() + 1
    classes = doodle.resized(np.int32(classes)[..., None], segments[k].shape[::-1], Image.NEAREST)[..., 0]
    own = np.unique(segments[k])
    cover = segment_means(segments[k] - own[0], np.eye(count)[classes])                     # (n, K)
    largest = cover.argmax(axis=1)
    best, seen = cover.argmax(axis=0), cover.any(axis=0)                # a class that is largest in no superpixel has
    largest[best[seen]] = np.flatnonzero(seen)                          # that in which its own share is largest
    distances = np.full((len(X), count), np.inf)
    for c in np.unique(largest):
        distances[:, c] = np.sort(distance.cdist(X, X[own][largest == c]), axis=1)[:, :3].mean(axis=1)
    return distances


def clustered_maps(pictures, maps, count, weights, fast):
    """Maps of two pictures by clustering, list of two (H, W, 3) uint8 arrays.

    Parameters
    ----------
    pictures, maps : lists of two
        As of `automatic_maps`.
    count : int
        The number of parts where no map is painted; fewer where there is nothing left to cut.
    weights : Weights
    fast : bool
        With the engine.
    """
    segments, X, f = describe(pictures, weights, fast)
    if maps[0] is None and maps[1] is None:
        shares = np.stack([np.bincount(cut.ravel(), minlength=len(X)) / cut.size for cut in segments], axis=1)
        parts, colours = joint_parts(X, f, shares, count), map_colours(count)
    else:
        k = int(maps[0] is None)
        _, colours, classes = classes_of(maps[k])
        parts = class_distances(segments, X, classes, k).argmin(axis=1)
    return [doodle.resized(colours[parts[cut]], picture.shape[1::-1], Image.NEAREST)
            for cut, picture in zip(segments, pictures)]


# ---- previews --------------------------------------------------------------------------------------------------------

def preview(picture, colours, names):
    """A picture with the outline and the name of each part over it.

    Parameters
    ----------
    picture, colours : (H, W, 3) uint8 arrays
        The picture and its map.
    names : dict
        {0xrrggbb: name}

    Returns
    -------
    (h, w, 3) uint8 array
    """
    size = np.array(picture.shape[1::-1])
    size = tuple(np.maximum(1, np.round(size * np.clip(size.max(), 900, LONGEST) / size.max())).astype(int))
    picture, colours = doodle.resized(picture, size, Image.LANCZOS), doodle.resized(colours, size, Image.NEAREST)
    codes, width = doodle.colour_codes(colours), max(size) // 400
    edges = segmentation.find_boundaries(codes, mode='thick')
    edges = ndimage.binary_dilation(edges, iterations=max(0, width - 1))
    seen = np.where(edges[..., None], colours, np.uint8(.75 * picture + .25 * colours))
    image = Image.fromarray(seen)
    pen, font, taken = ImageDraw.Draw(image), ImageFont.load_default(max(size) // 40), []
    parts = sorted(np.unique(codes), key=lambda code: (codes == code).sum())
    small = np.isin(codes, [code for code in parts if (codes == code).mean() < .02])            # not to be covered
    for code in parts:
        numbers, areas = pieces(codes == code)
        areas[0] = 0
        depth = ndimage.distance_transform_edt(np.pad(numbers == areas.argmax(), 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)            # the place farthest from its borders
        name = names.get(int(code), f'#{code:06x}')
        box = name_box(pen.textbbox((0, 0), name, font, anchor='mm'), (x, y), size, small, taken)
        taken.append(box)
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if not (box[0] <= x <= box[2] and box[1] <= y <= box[3]):
            pen.line([(x, y), middle], fill=tuple(int(value) for value in colours[y, x]), width=width)
        pen.text(middle, name, 'white', font, anchor='mm', stroke_width=width, stroke_fill='black')
    return np.asarray(image)


def name_box(box, place, size, small, taken):
    """Where a name stands: at its place, or the nearest one where it covers neither small parts nor other names.

    Parameters
    ----------
    box : (left, top, right, bottom)
        Of the name, around (0, 0).
    place : (x, y)
    size : (width, height) of the picture
    small : (H, W) bool array
        The small parts.
    taken : list of boxes

    Returns
    -------
    (left, top, right, bottom)
    """
    left, top, right, bottom = box
    for radius in range(0, max(size), max(bottom - top, 1)):
        for angle in np.arange(0, 2 * np.pi, np.pi / 8) if radius else (0,):
            x = np.clip(place[0] + radius * np.cos(angle), -left + 4, size[0] - right - 4)
            y = np.clip(place[1] + radius * np.sin(angle), -top + 4, size[1] - bottom - 4)
            box = [int(side) for side in (x + left, y + top, x + right, y + bottom)]
            free = all(box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1]
                       for other in taken)
            if free and not small[max(0, box[1]):box[3] + 1, max(0, box[0]):box[2] + 1].any():
                return box
    return box


# ---- files -----------------------------------------------------------------------------------------------------------

def missing_maps(options):
    """The paths of the maps to paint; UserError if they cannot be painted."""
    for wrong, needed, fix in (
            (not options.content, 'a content picture', 'add --content, or leave --auto-maps out'),
            (not options.semantic_weight, 'maps that are read', 'leave out --semantic-weight=0 or --method'),
            (not options.semantic_ext.lower().endswith('.png'), 'maps that end in .png', '--semantic-ext=_sem.png')):
        if wrong:
            raise doodle.UserError(f'--auto-maps needs {needed}.', fix)
    paths = doodle.map_paths(options)
    missing = [path for path in paths if not doodle.is_there(path)]
    if paths[0] == paths[1] or len(set(map(os.path.realpath, missing))) < len(missing):
        raise doodle.UserError(f'{options.content!r} and {options.style!r} would have one map.',
                               'rename one of them, or a copy of it')
    for path in missing:
        if os.path.islink(path):
            raise doodle.not_there(path)
        doodle.check_folder(os.path.dirname(path) or '.', '--auto-maps',
                            'start it in a folder of your own, or give an --output there')
    return missing


def read_known(options):
    """Both pictures, (H, W, 3) uint8, and their maps in the colours of the classes, or None for one that is missing."""
    targets, paths = doodle.map_paths(options), (options.content, options.style)
    pictures, maps = [doodle.read_picture(path).pixels for path in paths], []
    for target, path, picture in zip(targets, paths, pictures):
        painted = doodle.classify_maps([target], [(path, picture)]) if doodle.is_there(target) else None
        maps.append(painted and np.uint8(painted.classes)[painted.labels[0]])
    return pictures, maps


def paint_maps(options, pictures, maps, network):
    """Paint and write those of the `maps` that are None, each with a preview, and say so; see `automatic_maps`."""
    paths, upright = (options.content, options.style), Image.Exif()
    upright[0x0112] = 1                                                 # whatever the orientation of its picture
    done = automatic_maps(paths, pictures, maps, options.auto_maps, network)
    for line in done.remarks:
        doodle.say(f'  - {line}')
    for path, target, picture, known, colours in zip(paths, doodle.map_paths(options), pictures, maps, done.maps):
        if known is not None:
            continue
        if os.path.dirname(path) != os.path.dirname(target):
            doodle.say(f'  - The folder of `{path}` cannot be written: its map goes to `{target}`.')
        written = {target: colours, doodle.preview_path(target): preview(picture, colours, done.names)}
        written = {place: pixels for place, pixels in written.items() if not os.path.lexists(place)}
        for place, pixels in written.items():
            doodle.write_picture(pixels, place, exif=upright)
        found = np.unique(doodle.colour_codes(colours))
        doodle.say(f'  - Painted {counted(found)}: ' + ', '.join(f'`{path}`' for path in written))
        doodle.say('    ' + ', '.join(done.names[int(code)] for code in found))
    doodle.say('  - Maps can be mended by hand, with samples/painter.html or a paint program: run again, and they are '
               'kept.')


# ---- command ---------------------------------------------------------------------------------------------------------

def parse_options(arguments):
    """The command line as options of doodle.py, with its names, defaults and meanings."""
    parser = doodle.Parser(prog='automaps.py', description='Paint the maps of two pictures that are missing.')
    parser.add_argument('content', type=doodle.parse_path, metavar='ME', help='a picture')
    parser.add_argument('style', type=doodle.parse_path, metavar='YOU', help='another, with the same parts')
    parser.add_argument('--parts', '--auto-maps', type=doodle.parse_parts, default='auto', metavar='N',
                        dest='auto_maps', help='number of parts; faces: those of portraits; auto: these if both have a '
                        'face (default)')
    for flag, _, kind, default, meaning in sum(doodle.OPTIONS.values(), ()):
        if flag in ('--semantic-ext', '--device', '--network', '--weights'):
            parser.add_argument(flag, type=kind, default=default, metavar=doodle.VALUES[kind],
                                help=meaning + (f' (default: {default})' if default else ''))
    chosen = parser.parse_args(arguments)
    if not chosen.auto_maps:
        raise doodle.UserError('--parts=0 leaves nothing to paint.', 'give a number from 2 to 16, or faces')
    options = doodle.parse_options([f'--content={chosen.content}', f'--style={chosen.style}'])
    vars(options).update(vars(chosen))
    return options


def load_network(options):
    """What `automatic_maps` needs for clustering: the weights, and whether the engine is to be used."""
    weights, remarks = doodle.find_weights(options)
    for line in remarks:
        doodle.say(f'  - {line}')
    return weights, doodle.open_device(options) == 'cpu'


def run(arguments):
    """The command: paint the maps that are missing, and show both."""
    options = parse_options(arguments)
    doodle.import_pillow()
    automaps = doodle.import_automaps()                                 # this file as a module
    if automaps.missing_maps(options):
        known = automaps.read_known(options)                            # input errors come before the download
        automaps.paint_maps(options, *known, functools.partial(load_network, options))
    else:
        doodle.say('  - Both maps are there: nothing to paint.')
    for path in filter(os.path.isfile, map(doodle.preview_path, doodle.map_paths(options))):
        doodle.say(f'  - Preview: `{path}`.')
        if os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY'):
            doodle.decoded(path).show()
    return 0


if __name__ == '__main__':
    sys.exit(doodle.guarded(run, sys.argv[1:]))
