"""The torch side: the model as torch functions, traced into an ONNX graph with custom ops."""

from v4graph_export.export import ExportOptions, export_graph

__all__ = ["ExportOptions", "export_graph"]
