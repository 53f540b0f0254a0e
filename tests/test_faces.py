"""samples/faces.py: operations of its networks by hand, outputs by the reference, and what is taken as a face."""
import hashlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import golden_faces
from conftest import ROOT, mostly_slow

sys.path.insert(0, str(ROOT / 'samples'))
import faces  # noqa: E402

GOLDEN = np.load(golden_faces.GOLDEN)
PORTRAITS = golden_faces.SAMPLES
OTHERS = 'gravel.png', 'cat.jpg', 'raccoon.jpg', 'church.jpg', 'auvers.png', 'portraits/coffee.jpg'
RINGS = {name: getattr(faces, name)
         for name in ('OVAL', 'LEFT_EYE', 'RIGHT_EYE', 'LEFT_EYEBROW', 'RIGHT_EYEBROW', 'LIPS', 'NOSE')}


def image(*rows):
    """Rows of numbers as an image of one channel, (1, rows, columns, 1)."""
    return np.array(rows, np.float32)[None, :, :, None]


def apply(kind, *x, **options):
    """An operation's result; rows of numbers where it is an image of one channel."""
    result = faces.OPERATIONS[kind](*x, **options)
    return result[0, :, :, 0].tolist() if result.ndim == 4 and result.shape[3] == 1 else result


def enlarged(name, side=1024):
    """A sample, (H, W, 3) uint8, its longer side so many pixels."""
    picture = Image.open(ROOT / 'samples' / name).convert('RGB')
    return np.asarray(picture.resize([round(length * side / max(picture.size)) for length in picture.size]))


# ---- operations ------------------------------------------------------------------------------------------------------

SIXTEEN = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)


@pytest.mark.parametrize('x, size, stride, padding, sums', [
    (image([1, 2], [3, 4]), 2, 1, 'same', [[10, 6], [7, 4]]),                       # padded below and at the right
    (image([1, 2], [3, 4]), 3, 1, 'same', [[10, 10], [10, 10]]),                    # and here at all sides
    (SIXTEEN, 3, 1, 'valid', [[45, 54], [81, 90]]),
    (SIXTEEN, 3, 2, 'same', [[45, 39], [66, 50]]),
    (SIXTEEN, 2, 2, 'valid', [[10, 18], [42, 50]]),
    (SIXTEEN, 1, 2, 'same', [[0, 2], [8, 10]]),
])
def test_convolutions_sum_windows(x, size, stride, padding, sums):
    W = np.ones((1, size, size, 1), np.float32)
    for kind in ('conv', 'depthwise'):
        assert apply(kind, x, W, stride=stride, padding=padding) == sums
        assert apply(kind, x, W, np.float32([100]), stride=stride, padding=padding) == (np.array(sums) + 100).tolist()


@pytest.mark.parametrize('kind', ['conv', 'depthwise'])
@pytest.mark.parametrize('stride, padding', [(1, 'same'), (2, 'same'), (1, 'valid'), (3, 'valid')])
def test_convolutions_know_channels_rows_and_columns(kind, stride, padding):
    rng = np.random.default_rng(0)
    x, W = rng.random((2, 7, 9, 3)), rng.random((5 if kind == 'conv' else 1, 3, 2, 3))
    result = apply(kind, x, W, stride=stride, padding=padding)
    top, left = {1: (1, 0), 2: (1, 0)}[stride] if padding == 'same' else (0, 0)
    padded = np.pad(x, ((0, 0), (top, 3), (left, 3), (0, 0)))
    for n, i, j in np.ndindex(result.shape[:3]):
        window = padded[n, stride * i:stride * i + 3, stride * j:stride * j + 2]
        expected = [(window * w).sum() for w in W] if kind == 'conv' else (window * W[0]).sum(axis=(0, 1))
        np.testing.assert_allclose(result[n, i, j], expected)
    assert result.shape[1:3] == {(1, 'same'): (7, 9), (2, 'same'): (4, 5), (1, 'valid'): (5, 8),
                                 (3, 'valid'): (2, 3)}[stride, padding]


def test_a_transposed_convolution_makes_four_pixels_of_one():
    W = np.float32([[1, 2], [3, 4]])[None, :, :, None]
    assert apply('transposed', image([2, 3]), W, np.float32([10])) == [[12, 14, 13, 16], [16, 18, 19, 22]]
    W = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)                         # (out, 2, 2, in)
    result = apply('transposed', np.float32([1, 10])[None, None, None], W, np.zeros(3, np.float32))
    assert result[0, 1, 0].tolist() == [4 + 50, 12 + 130, 20 + 210]                 # W[:, 1, 0] = 4 5, 12 13, 20 21


def test_pools_and_means():
    x = -np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
    assert apply('max_pool', x, size=[2, 2], stride=2, padding='same') == [[0, -2], [-6, -8]]   # the border is not zero
    assert apply('max_pool', x, size=[2, 2], stride=2, padding='valid') == [[0]]
    assert apply('mean', x) == [[-4]]


def test_resizing_keeps_the_corners_of_the_image_not_the_middles_of_its_pixels():
    assert apply('resize', image([0, 4], [8, 12]), size=[4, 4]) == [[0, 1, 3, 4], [2, 3, 5, 6], [6, 7, 9, 10],
                                                                    [8, 9, 11, 12]]
    assert apply('resize', image([0, 4], [8, 12]), size=[1, 2]) == [[4, 8]]


@pytest.mark.parametrize('kind, x, expected', [
    ('relu', [-2, 0, 3], [0, 0, 3]), ('hard_swish', [-4, -3, -1, 0, 1, 3, 5], [0, 0, -1 / 3, 0, 2 / 3, 3, 5]),
    ('sigmoid', [0, np.log(3), -np.log(3), 1000, -1000], [.5, .75, .25, 1, 0])])
def test_activations(kind, x, expected):
    np.testing.assert_allclose(apply(kind, np.array(x)), expected)


def test_prelu_has_a_slope_for_each_channel():
    assert apply('prelu', np.array([[-2., -2.], [3., 3.]]), np.array([.5, .25])).tolist() == [[-1, -.5], [3, 3]]


def test_the_other_operations():
    x = np.arange(4.).reshape(1, 1, 2, 2)
    assert apply('add', x, x).ravel().tolist() == [0, 2, 4, 6]
    assert apply('multiply', x, np.array([10., 100])).ravel().tolist() == [0, 100, 20, 300]
    assert apply('pad', x, widths=[[0, 0], [0, 0], [0, 0], [0, 1]]).ravel().tolist() == [0, 1, 0, 2, 3, 0]
    assert apply('concatenate', x, x + 4, axis=2).ravel().tolist() == list(range(8))
    assert apply('reshape', x, shape=[-1, 4]).tolist() == [[0, 1, 2, 3]]


def test_a_region_is_the_box_around_points_along_two_of_them():
    points = np.float32([[2, 3, 9], [6, 3, 9], [5, 5, 9], [50, 50, 9]])[None]
    M = apply('region', points, subset=[0, 1, 2], left=0, right=1, scale=[1.5, 2], size=[8, 16])
    assert M.tolist() == [[[.375, 0, 0, 1], [0, .5, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1]]]     # (0, 0) -> (1, 2)
    points = np.float32([[0, 0, 9], [0, 4, 9], [2, 0, 9]])[None]                            # along the y axis
    M = apply('region', points, subset=[0, 1, 2], left=0, right=1, scale=[1, 1], size=[8, 8])
    assert M.tolist() == [[[0, -.25, 0, 2], [.5, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]


def moved(a=1, b=0, x=0, c=0, d=1, y=0):
    """The transform (x, y) -> (a x + b y + x, c x + d y + y), (1, 4, 4)."""
    return np.array([[[a, b, 0, x], [c, d, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.]]])


@pytest.mark.parametrize('M, rows', [
    (moved(), [[1, 3], [5, 7]]), (moved(x=.5), [[2, 0], [6, 0]]), (moved(y=-.5), [[0, 0], [3, 5]]),
    (moved(a=0, b=1, c=1, d=0), [[1, 5], [3, 7]]),                                  # rows and columns exchanged
    (moved(a=.5, d=.5, x=.5, y=.5), [[2.5, 3.5], [4.5, 5.5]])])                     # the middle, twice as large
def test_warping_interpolates_and_is_zero_outside(M, rows):
    assert apply('warp', image([1, 3], [5, 7]), M, size=[2, 2]) == rows


def test_points_move():
    assert apply('move', np.array([[[1., 2], [0, 0]]]), moved(0, -1, 3, 1, 0, 4)).tolist() == [[[1, 5], [3, 4]]]


# ---- the file --------------------------------------------------------------------------------------------------------

def test_the_checksum_is_the_same_wherever_it_stands():
    digest = hashlib.sha256((ROOT / 'samples/faces.npz').read_bytes()).hexdigest()
    assert faces.SHA256 == digest
    for name in ('bundle_faces.py', 'README.md'):
        assert digest in (ROOT / 'samples' / name).read_text()
    known = re.findall('[0-9a-f]{64}', (ROOT / 'samples/bundle_faces.py').read_text())
    assert len(known) == 5 and all(f'`{digest}`' in (ROOT / 'samples/README.md').read_text() for digest in known)


@pytest.mark.parametrize('content, error', [(None, OSError), (b'', ValueError), (b'PK\3\4', ValueError)])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, monkeypatch, content, error):
    path = tmp_path / 'faces.npz'
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(faces, 'BUNDLE', str(path))
    with pytest.raises(error, match=re.escape(repr(str(path)))):
        faces.networks.__wrapped__()


@pytest.mark.slow
def test_the_file_is_made_again_byte_for_byte(tmp_path):
    wheel = os.environ.get('DOODLE_MEDIAPIPE') or pytest.skip('DOODLE_MEDIAPIPE does not name the wheel of mediapipe')
    pytest.importorskip('tflite')
    for name in ('bundle_faces.py', 'bundle_vgg16.py'):                             # the one calls the other
        shutil.copy(ROOT / 'samples' / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / 'bundle_faces.py', wheel], check=True)
    assert (tmp_path / 'faces.npz').read_bytes() == (ROOT / 'samples/faces.npz').read_bytes()
    assert not (tmp_path / 'faces.part').exists()


# ---- by the reference ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', PORTRAITS)
@pytest.mark.parametrize('network', golden_faces.MODELS)
def test_networks_compute_what_the_reference_does(name, network):
    """Boxes and points within 1e-3 of a pixel of their input, scores and flags of a logit, persons of a probability."""
    result = faces.networks()[network](golden_faces.scaled(golden_faces.square(name, network), network))
    if network == 'person':
        result['person'] = result['person'][:, ::golden_faces.PERSON_STEP, ::golden_faces.PERSON_STEP]
    expected = {key.rpartition('/')[2]: GOLDEN[key] for key in GOLDEN if key.startswith(f'{name}/{network}/')}
    assert set(expected) == {'detector': {'boxes', 'scores'}, 'mesh': {'points', 'flag'}, 'person': {'person'}}[network]
    for key, array in expected.items():
        np.testing.assert_allclose(result[key], array, rtol=0, atol=1e-3)


@pytest.mark.parametrize('name', PORTRAITS)
def test_refined_points_are_those_of_mediapipe(name):
    points, flag = faces.mesh(golden_faces.square(name, 'mesh'), (96, 96), 192, 0)
    np.testing.assert_allclose(points, GOLDEN[f'{name}/refined'], rtol=0, atol=1e-3)        # pixels of 192
    assert flag > .999


@pytest.fixture(scope='module')
def found():
    """The faces in the portraits, by name."""
    return {name: faces.find_faces(golden_faces.sample(name)) for name in PORTRAITS}


@pytest.mark.parametrize('name', PORTRAITS)
def test_the_whole_way_comes_to_the_points_of_mediapipe(name, found):
    """Of the face's height 1 % on average; MediaPipe's own points change by 0.2 % from round to round."""
    face, = found[name]
    apart = np.linalg.norm(face.points - GOLDEN[f'{name}/tracked'], axis=1) / face.size
    assert apart.mean() < .01 and apart.max() < .02


# ---- faces -----------------------------------------------------------------------------------------------------------

def within(points, box):
    """Whether points lie in a box, its two corners."""
    return ((points >= box[0]) & (points <= box[1])).all()


@pytest.mark.parametrize('name', mostly_slow([*PORTRAITS, 'portraits/biden', 'portraits/mona_lisa', 'portraits/obama'],
                                             *PORTRAITS))
def test_points_lie_on_what_is_painted(name, found):
    painted = np.asarray(Image.open(ROOT / f'samples/{name}_sem.png').convert('RGB'))
    face, = found[name] if name in found else faces.find_faces(enlarged(f'{name}.jpg', max(painted.shape)))
    points = face.points
    for numbers, colour in ((faces.LEFT_EYE, (255, 255, 255)), (faces.RIGHT_EYE, (255, 255, 255)),
                            (faces.LIPS, (255, 0, 0)), ([faces.NOSE_TIP], (147, 255, 0)),
                            (faces.IRISES[:1], (255, 255, 255)), (faces.IRISES[1:], (255, 255, 255))):
        x, y = points[list(numbers)].mean(axis=0).astype(int)
        assert tuple(painted[y, x]) == colour
    assert points[list(faces.LEFT_EYE), 0].min() > points[list(faces.RIGHT_EYE), 0].max()   # the person's own left


def test_rings_run_around_what_they_enclose(found):
    def cross(a, b):
        return a[0] * b[1] - a[1] * b[0]
    points = found['astronaut'][0].points
    for name, numbers in RINGS.items():
        assert len(set(numbers)) == len(numbers)
        ring = points[list(numbers)]
        sides = list(zip(ring, np.roll(ring, -1, axis=0)))
        for k, (a, b) in enumerate(sides):
            for c, d in sides[k + 2:len(sides) - (k == 0)]:
                meet = cross(b - a, c - a) * cross(b - a, d - a) < 0 and cross(d - c, a - c) * cross(d - c, b - c) < 0
                assert not meet, name
        assert within(ring, [points[list(faces.OVAL)].min(axis=0), points[list(faces.OVAL)].max(axis=0)])


@pytest.mark.parametrize('name, side', mostly_slow([(name, side) for name in OTHERS for side in (400, 1024)],
                                                   ('portraits/coffee.jpg', 400)))
def test_what_has_no_face_has_none(name, side):
    assert faces.find_faces(enlarged(name, side)) == []


ANGLES = -150, -90, -60, -30, 30, 45, 75, 90, 120, 180


@pytest.mark.slow
@pytest.mark.parametrize('name', ['andersson.jpg', 'blue_room.jpg', 'boy.jpg', 'camera.jpg', 'cut.jpg', 'dahlgren.jpg',
                                  'grandpa.jpg', 'handel.png', 'manga.png', 'mauve.jpg', 'mehmed.jpg', 'nikola.jpg',
                                  'reading.jpg', 'statue.jpg', 'tanguy.jpg', 'tesla.jpg'])
def test_portraits_of_all_kinds_have_one_face(name):
    assert len(faces.find_faces(enlarged(f'portraits/{name}', 512))) == 1


@pytest.mark.parametrize('name, angle', mostly_slow([(name, angle) for name in PORTRAITS for angle in ANGLES],
                                                    ('hopper', 180)))
def test_a_face_that_leans_or_lies_or_hangs_is_found_where_it_is(name, angle, found):
    picture = Image.fromarray(golden_faces.sample(name))
    turned = picture.rotate(angle, Image.BICUBIC, expand=True)                      # counterclockwise, in degrees
    expected = (found[name][0].points - np.array(picture.size) / 2) @ faces.rotation(np.radians(angle))
    face = faces.find_faces(np.asarray(turned))[0]
    assert np.linalg.norm(face.points - expected - np.array(turned.size) / 2, axis=1).mean() < .03 * face.size


@pytest.mark.parametrize('name, corner', mostly_slow([(name, corner) for name in PORTRAITS for corner in range(4)]))
def test_a_face_of_a_twelfth_of_the_picture_is_found(name, corner, found):
    picture, ground = golden_faces.sample(name), enlarged('church.jpg').copy()
    scale = 1024 / 12 / found[name][0].size
    small = np.asarray(Image.fromarray(picture).resize([round(side * scale) for side in picture.shape[1::-1]]))
    top = (ground.shape[0] - small.shape[0]) * (corner // 2)
    left = (ground.shape[1] - small.shape[1]) * (corner % 2)
    ground[top:top + small.shape[0], left:left + small.shape[1]] = small
    face, = faces.find_faces(ground)
    expected = found[name][0].points * scale + (left, top)
    assert np.linalg.norm(face.points - expected, axis=1).mean() < .03 * face.size


def test_of_several_faces_the_largest_is_the_first(found):
    large, small = (Image.fromarray(golden_faces.sample(name)) for name in PORTRAITS)
    both = Image.new('RGB', (640, 480), (90, 120, 150))
    both.paste(small.resize((256, 320)), (0, 100))
    both.paste(large, (256, 0))
    first, second = faces.find_faces(np.asarray(both))
    assert first.size > 1.3 * second.size
    assert np.linalg.norm(first.points - found[PORTRAITS[0]][0].points - (256, 0), axis=1).mean() < .02 * first.size


@pytest.mark.parametrize('name, change', mostly_slow(
    [(name, change) for name in PORTRAITS for change in ('grey', 'left', 'right', 'top')]))
def test_a_grey_face_and_one_cut_by_the_border_are_found(name, change, found):
    picture, points = golden_faces.sample(name), found[name][0].points
    quarter = int(found[name][0].size / 4)
    left, top = points.min(axis=0).astype(int) + quarter
    right = int(points[:, 0].max()) - quarter
    changed = {'grey': picture.mean(axis=2, keepdims=True).repeat(3, axis=2).astype(np.uint8),
               'left': picture[:, left:], 'right': picture[:, :right], 'top': picture[top:]}[change]
    face = faces.find_faces(np.ascontiguousarray(changed))[0]
    shift = {'left': (left, 0), 'top': (0, top)}.get(change, (0, 0))
    assert np.median(np.linalg.norm(face.points + shift - points, axis=1)) < .05 * face.size


def test_persons_are_where_they_are_painted():
    for name in PORTRAITS:
        painted = np.asarray(Image.open(ROOT / f'samples/{name}_sem.png').convert('RGB'))
        probable = faces.person(golden_faces.sample(name))
        assert probable.shape == painted.shape[:2] and probable.min() >= 0 and probable.max() <= 1
        assert ((probable > .5) == (painted != (0, 0, 255)).any(axis=2)).mean() > .95


# ---- crops -----------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)


@pytest.mark.parametrize('centre, size, angle, side, expected', [
    ((6, 6), 12, 0, 12, NOISE), ((6, 6), 12, np.pi / 2, 12, np.rot90(NOISE)),
    ((4, 5), 6, 0, 6, NOISE[2:8, 1:7]), ((6, 6), 12, 0, 4, NOISE.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))),
    ((0, 6), 12, 0, 12, np.concatenate([NOISE[:, :1].repeat(6, axis=1), NOISE[:, :6]], axis=1))])
def test_crops(centre, size, angle, side, expected):
    np.testing.assert_allclose(faces.crop(NOISE, centre, size, angle, side), expected, atol=.6 if side == 4 else 1e-3)


def test_windows_cover_the_picture_and_a_margin():
    picture = np.full((300, 1000, 3), 200, np.uint8)
    for level, (batch, corners, size) in zip(faces.LEVELS, faces.pyramid(picture, faces.LEVELS)):
        margin = faces.MARGIN * 1000 / level
        assert batch.shape == (len(corners), 128, 128, 3) and size == pytest.approx(128 * 1000 / level)
        assert (corners.min(axis=0) <= -margin + .01).all()
        assert (corners.max(axis=0) + size >= np.array([1000, 300]) + margin - .01).all()
        assert set(np.unique(batch)) == {0, 200}


@pytest.mark.parametrize('height, width', mostly_slow([(1, 1), (1, 2000), (500, 3)]))
def test_tiny_and_long_pictures_are_searched(height, width):
    assert faces.find_faces(np.full((height, width, 3), 128, np.uint8)) == []
