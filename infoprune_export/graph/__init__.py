"""From the PyTorch network to ONNX graphs.

`components` cuts a model into three networks, `export` traces and writes them, `rewrite` applies a plan to graphs
already written, `count` counts their FLOPs, `reference` records what PyTorch answers. Each is imported from its own
module: `count` and `rewrite` work without PyTorch.
"""
