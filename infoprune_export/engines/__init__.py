"""Loadable artefacts for a target: ONNX Runtime sessions and TensorRT engines."""
