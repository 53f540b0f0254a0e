"""Make the test images from three photographs that scikit-image carries.

    python tests/golden/make_fixtures.py      (needs numpy, Pillow and scikit-image)

astronaut   portrait of Eileen Collins, NASA; public domain
chelsea     the cat Chelsea, Stefan van der Walt; CC0
coffee      espresso, Rachel Michetti, courtesy of Pikolo Espresso Bar; CC0

The photographs are cropped and averaged, the maps (`*_sem.png`) are painted here. All of it is
integer arithmetic, so the pixels are the same everywhere and `SHA256` can check them; the bytes
of a PNG file may differ with the version of zlib.
"""
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

# file: (photograph, left, top, width, height, box), left and top in pixels of the photograph
CROPS = {
    'face_content.png': ('astronaut', 128, 0, 96, 112, 2),
    'face_style.png': ('chelsea', 100, 40, 124, 108, 2),
    'tiny_seed.png': ('chelsea', 110, 22, 56, 64, 4),
    'tiny_style.png': ('coffee', 60, 0, 72, 56, 7),
    'texture_seed.png': ('chelsea', 60, 30, 60, 52, 5),
    'texture_style.png': ('coffee', 400, 240, 60, 52, 3),
}


def shrink(photograph, left, top, width, height, box):
    """The (height, width, 3) means of box x box squares, rounded half up."""
    crop = photograph[top:top + height * box, left:left + width * box].astype(int)
    sums = crop.reshape(height, box, width, box, 3).sum(axis=(1, 3))
    return ((sums + box ** 2 // 2) // box ** 2).astype(np.uint8)


def ellipse(canvas, colour, cx, cy, rx, ry):
    """Fill the pixels whose centre is within the radii rx, ry of (cx, cy)."""
    y, x = np.ogrid[:canvas.shape[0], :canvas.shape[1]]
    canvas[((x - cx) * ry) ** 2 + ((y - cy) * rx) ** 2 <= (rx * ry) ** 2] = colour


def rectangle(canvas, colour, left, top, right, bottom):
    """Fill columns left .. right - 1 of rows top .. bottom - 1."""
    canvas[top:bottom, left:right] = colour


WALL, SHIRT, HAIR, SKIN, MOUTH = (200, 205, 210), (50, 60, 170), (230, 170, 40), (240, 130, 120), (205, 25, 60)
TABLE, SAUCER, CUP, COFFEE = (120, 200, 80), (60, 90, 220), (240, 235, 60), (225, 50, 30)

# file: (width, height, background, strokes of the brush in order)
MAPS = {
    'face_content_sem.png': (96, 112, WALL, [
        (rectangle, SHIRT, 0, 90, 96, 112), (ellipse, HAIR, 49, 35, 37, 28),
        (ellipse, SKIN, 47, 60, 22, 33), (ellipse, MOUTH, 47, 73, 11, 5)]),
    'face_style_sem.png': (124, 108, WALL, [
        (rectangle, SHIRT, 0, 70, 44, 108), (ellipse, HAIR, 64, 30, 58, 44),
        (ellipse, SKIN, 74, 62, 48, 44), (ellipse, MOUTH, 82, 96, 18, 12)]),
    'tiny_style_sem.png': (72, 56, TABLE, [
        (ellipse, SAUCER, 31, 33, 28, 22), (ellipse, CUP, 34, 18, 17, 15), (ellipse, COFFEE, 32, 20, 11, 7)]),
    'tiny_target_sem.png': (56, 64, TABLE, [
        (ellipse, SAUCER, 28, 40, 25, 18), (rectangle, CUP, 12, 14, 44, 40), (ellipse, COFFEE, 28, 18, 12, 8)]),
}

# of the pixels: height x width x RGB bytes
SHA256 = {
    'face_content.png': 'de29194830f6b91753939994cab9097d730c65ea1f842d895fcb36a17aa8554d',
    'face_content_sem.png': 'a849b75fcdb73585778cddc51fbf263cca49183b4f5dc9e914420db2c8b1f5a4',
    'face_style.png': '4001b5ee16a41e0f2baaf40684e1d5744c14e277a8170a4a22b278a304d22b83',
    'face_style_sem.png': '88c9e06c62186c4a992d714bedfffd98e5891bddb866799ad2555cad058f2e05',
    'texture_seed.png': '5c89dd5f87983ddf3ac2279520d26b986b6fd43714e7e781bd39dff2a9b137e1',
    'texture_style.png': '78475aa7f54ed2b97c1fc313c11504b90cafaf767469c45dc4cd10370fc28162',
    'tiny_seed.png': '86c2baad31982a178c34e24656933bc44310aada0ac0b06c795e0a9b585c68eb',
    'tiny_style.png': '71912ab224222814d1142c6cc7d50756540a1616d0aa662472c41fab6b49510f',
    'tiny_style_sem.png': 'e474c7819ef6307424ef95eb08e24f77bd7e2f8b24340a839f6103bba2920d13',
    'tiny_target_sem.png': 'dab26d36ef0bfcb80e89e8ea9eeb5b41cf8af4c3557176e55f170f756fdbea8f',
}


def fixtures():
    """Yield (file name, (height, width, 3) uint8 RGB) of every test image."""
    from skimage import data
    for name, (photograph, *crop) in CROPS.items():
        yield name, shrink(getattr(data, photograph)(), *crop)
    for name, (width, height, background, strokes) in MAPS.items():
        canvas = np.full((height, width, 3), background, np.uint8)
        for fill, colour, *place in strokes:
            fill(canvas, colour, *place)
        yield name, canvas


if __name__ == '__main__':
    for name, image in fixtures():
        if hashlib.sha256(image.tobytes()).hexdigest() != SHA256[name]:
            raise SystemExit(f'{name}: not the pixels that the numbers were measured on')
        Image.fromarray(image).save(Path(__file__).with_name(name), optimize=True)
