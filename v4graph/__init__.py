"""v4graph: DeepSeek-V4 checkpoints to ONNX graphs and TensorRT engines.

This package is the core that the exporter, the plugins and the runtime share; importing it loads
neither torch nor onnx nor any inference runtime.
"""

__version__ = "0.1.0"
