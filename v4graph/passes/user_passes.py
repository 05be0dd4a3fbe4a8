"""A user's own passes: one Python file with a tuple PASSES, or with classes of passes.

```python
import onnx_ir as ir

class DropNoise(ir.passes.InPlacePass):
    \"\"\"Removes ...\"\"\"
    def call(self, model): ...
```
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import onnx_ir as ir

from v4graph.errors import PassError
from v4graph.passes.run import Pass


def load_passes(path: Path) -> tuple[Pass, ...]:
    """Return the passes of a file: its PASSES, or one of each class of passes that it defines, in order.

    Raises:
        PassError: no such file, it cannot be imported, or it defines no pass.
    """
    if not path.is_file():
        raise PassError(f"--pass-file {path}: no such file.")
    name = f"v4graph_user_passes_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PassError(f"--pass-file {path}: not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        found = getattr(module, "PASSES", None)
        if found is None:
            found = tuple(
                value()
                for value in vars(module).values()
                if isinstance(value, type)
                and issubclass(value, ir.passes.PassBase)
                and value.__module__ == name
            )
    except Exception as error:  # a user's code may raise anything
        raise PassError(f"--pass-file {path}: {type(error).__name__}: {error}") from error
    if not found or not all(isinstance(one, ir.passes.PassBase) for one in found):
        raise PassError(
            f"--pass-file {path}: defines no passes; write a class derived from onnx_ir.passes.InPlacePass, "
            "or a "
            "tuple PASSES of such objects (docs/writing-a-pass.md)."
        )
    return tuple(found)
