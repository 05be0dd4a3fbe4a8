"""Compare implementations of a model with each other, and graphs before and after a pass.

A driver: it uses the exporter's torch reference, the runtime's sessions and onnxruntime, each only when
needed.
"""
