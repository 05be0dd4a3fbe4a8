"""TensorRT side of v4graph: plugins, CUDA kernels and the engine builder. Nothing is here yet."""
