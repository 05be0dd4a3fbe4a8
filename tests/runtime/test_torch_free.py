import subprocess
import sys
from pathlib import Path

import pytest
from engines import Built

FOREIGN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "v4graph_export", "v4graph_plugins")
REPORT = f"import sys; print([name for name in {FOREIGN} if name in sys.modules])"
ROOT = Path(__file__).parents[2]


def loaded(code: str) -> str:
    prelude = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'runtime')!r}]\n"
    command = [sys.executable, "-c", prelude + code + "\n" + REPORT]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_real_engine_and_checkpoint_load_no_torch(official: Built) -> None:
    code = f"""
from v4graph_runtime import Session
session = Session({str(official.engine)!r}, {str(official.checkpoint)!r})
session.prefill([[1, 2, 3]])
session.decode([4])
"""
    assert loaded(code) == "[]"


def test_prefill_and_decode_load_no_torch_and_no_exporter(engine: Path) -> None:
    code = f"""
import numpy as np
from v4graph_runtime import Session
class Weights:
    def bound(self, manifest):
        return [(b.input, np.ones(b.shape, np.float32)) for b in manifest.bindings]
session = Session({str(engine)!r}, Weights())
session.prefill([[1, 2, 3]])
session.decode([4])
assert session.position.tolist() == [4]
"""
    assert loaded(code) == "[]"


@pytest.mark.parametrize("module", ["onnxruntime", "tokenizers"])
def test_import_loads_no_backend(module: str) -> None:
    assert loaded(f"import v4graph_runtime; assert {module!r} not in sys.modules") == "[]"
