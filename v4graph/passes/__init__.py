"""Graph passes: one file per pass, on `onnx_ir` models; the order of each pipeline is a literal tuple."""
