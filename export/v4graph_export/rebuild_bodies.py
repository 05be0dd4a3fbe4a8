"""Rebuild the shipped function bodies after a change in v4graph/ops: `make bodies`."""

from __future__ import annotations

from v4graph_export.bodies import FOLDER, build_all

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for dtype in ("float32", "bfloat16"):
        path = FOLDER / f"{dtype}.onnx"
        partial = path.with_suffix(".partial")
        partial.write_bytes(build_all(dtype).SerializeToString(deterministic=True))
        partial.replace(path)
