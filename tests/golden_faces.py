# /// script
# requires-python = "==3.11.*"
# dependencies = ["ai-edge-litert==2.3.0", "mediapipe==0.10.21", "numpy==1.26.4", "pillow==13.0.0"]
# ///
"""What the reference runtimes compute with the networks of faces.npz, for test_faces.py: writes golden/faces.npz.

    python tests/golden_faces.py

LiteRT runs the three networks on squares of two samples, the mesh without the operations that only MediaPipe has;
MediaPipe itself gives the points that these refine, of the same squares, and those of its whole face mesh, which looks
for the face in the sample.
"""
import importlib
import pathlib

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / 'tests/golden/faces.npz'
SAMPLES = 'astronaut', 'hopper'
MODELS = {'detector': 'face_detection/face_detection_short_range.tflite',
          'mesh':     'face_landmark/face_landmark_with_attention.tflite',
          'person':   'selfie_segmentation/selfie_segmentation.tflite'}
OUTPUTS = {'regressors': 'boxes', 'classificators': 'scores', 'output_mesh_identity': 'points', 'conv_faceflag': 'flag',
           'activation_10': 'person'}                     # as they are called in faces.npz
SQUARES = {'detector': (0, 0, 128, 3), 'mesh': (0, 0, 192, 2), 'person': (64, 64, 256, 1)}  # left, top, side, box
PERSON_STEP = 3                                           # every third pixel is kept, so odd and even ones are
FACE_LANDMARK = '''
    input_stream: "image"
    input_stream: "roi"
    input_side_packet: "with_attention"
    output_stream: "landmarks"
    node {
      calculator: "FaceLandmarkCpu"
      input_stream: "IMAGE:image"
      input_stream: "ROI:roi"
      input_side_packet: "WITH_ATTENTION:with_attention"
      output_stream: "LANDMARKS:landmarks"
    }'''


def sample(name):
    """A sample, (H, W, 3) uint8."""
    return np.asarray(Image.open(ROOT / f'samples/{name}.png').convert('RGB'))


def square(name, network):
    """What a network is given of a sample, (side, side, 3) uint8: means of boxes in integers, the same everywhere."""
    left, top, side, box = SQUARES[network]
    picture = sample(name)[top:top + side * box, left:left + side * box].astype(int)
    return ((picture.reshape(side, box, side, box, 3).sum(axis=(1, 3)) + box ** 2 // 2) // box ** 2).astype(np.uint8)


def scaled(picture, network):
    """A (side, side, 3) uint8 picture as its network takes it, (1, side, side, 3) float32."""
    return picture[None].astype(np.float32) / 255 * (2 if network == 'detector' else 1) - (network == 'detector')


def without_custom(content):
    """A model, bytes, without MediaPipe's own operations and all that needs them."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph, kept, lost = model.subgraphs[0], [], set()
    for operator in graph.operators:
        if model.operatorCodes[operator.opcodeIndex].customCode or lost & set(operator.inputs):
            lost |= set(operator.outputs)
        else:
            kept.append(operator)
    graph.operators, graph.outputs = kept, [number for number in graph.outputs if number not in lost]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b'TFL3')
    return bytes(builder.Output())


def litert(content, x):
    """The outputs of a model, bytes, by name."""
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]['index'], x)
    interpreter.invoke()
    return {output['name']: interpreter.get_tensor(output['index']) for output in interpreter.get_output_details()}


def refined(picture):
    """The 478 points (x, y) that MediaPipe finds in a face's square, in pixels of it."""
    import mediapipe
    from mediapipe.framework.formats import rect_pb2
    from mediapipe.python import _framework_bindings as bindings
    from mediapipe.python import packet_creator, packet_getter
    importlib.import_module('mediapipe.python.solutions.face_mesh')                 # registers FaceLandmarkCpu
    bindings.resource_util.set_resource_dir(str(pathlib.Path(mediapipe.__file__).parents[1]))
    graph, found = bindings.calculator_graph.CalculatorGraph(graph_config=FACE_LANDMARK), []
    graph.observe_output_stream('landmarks', lambda _, packet: found.append(packet_getter.get_proto(packet)))
    graph.start_run({'with_attention': packet_creator.create_bool(True)})
    frame = mediapipe.ImageFrame(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(picture))
    whole = rect_pb2.NormalizedRect(x_center=.5, y_center=.5, width=1, height=1, rotation=0)
    graph.add_packet_to_input_stream('image', packet_creator.create_image_frame(frame).at(1))
    graph.add_packet_to_input_stream('roi', packet_creator.create_proto(whole).at(1))
    graph.close_all_packet_sources()
    graph.wait_until_done()
    return np.array([(point.x, point.y) for point in found[0].landmark]) * picture.shape[0]


def tracked(picture, rounds=3):
    """The 478 points (x, y) of MediaPipe's whole face mesh, when it has seen the picture so often, in pixels."""
    from mediapipe.python.solutions.face_mesh import FaceMesh
    with FaceMesh(static_image_mode=False, refine_landmarks=True) as face_mesh:
        for _ in range(rounds):
            result = face_mesh.process(picture)
    return np.array([(point.x, point.y) for point in result.multi_face_landmarks[0].landmark]) * picture.shape[1::-1]


def main():
    """Both samples through all -> `GOLDEN`."""
    import mediapipe
    modules = pathlib.Path(mediapipe.__file__).parent / 'modules'
    golden = {}
    for name in SAMPLES:
        for network, path in MODELS.items():
            content = (modules / path).read_bytes()
            if network == 'mesh':
                content = without_custom(content)
            for output, array in litert(content, scaled(square(name, network), network)).items():
                golden[f'{name}/{network}/{OUTPUTS[output]}'] = array
        golden[f'{name}/person/person'] = golden[f'{name}/person/person'][:, ::PERSON_STEP, ::PERSON_STEP]
        golden[f'{name}/refined'] = np.float32(refined(square(name, 'mesh')))
        golden[f'{name}/tracked'] = np.float32(tracked(sample(name)))
    np.savez_compressed(GOLDEN, **golden)
    print(f'{GOLDEN.name}, {GOLDEN.stat().st_size:,} bytes:', {key: array.shape for key, array in golden.items()})


if __name__ == '__main__':
    main()
