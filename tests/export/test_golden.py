"""The layer functions of nano as text: a refactor that leaves the golden file alone changed no graph.

`UPDATE_GOLDEN=1 pytest tests/export/test_golden.py` writes it again.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from v4graph.config import ModelConfig
from v4graph_export.compose import Recipe, layer_functions
from v4graph_export.flavour import Flavour

GOLDEN = Path(__file__).parents[1] / "golden" / "nano_v4_layers.txt"


def listing(function: ir.Function) -> str:
    """One line per node, in order."""
    lines = [f"{function.name}({', '.join(str(value.name) for value in function.inputs)})"]
    for node in function:
        outputs = ", ".join(str(value.name) for value in node.outputs)
        inputs = ", ".join("" if value is None else str(value.name) for value in node.inputs)
        attributes = {
            name: attribute.value
            for name, attribute in node.attributes.items()
            if not attribute.is_ref() and attribute.type != ir.AttributeType.TENSOR
        }
        shown = dict(sorted(attributes.items())) or ""
        lines.append(f"  {outputs} = {node.op_type}({inputs}) {shown}".rstrip())
    lines.append(f"  return {', '.join(str(value.name) for value in function.outputs)}")
    return "\n".join(lines)


def test_layer_functions_match_the_golden_text() -> None:
    config = ModelConfig.load("nano")
    recipe = Recipe(config, Flavour("v4", "float32", config.weight_format), slack=8, all_logits=False)
    functions = layer_functions(recipe, lambda _stage, _done, _total: None)
    text = "\n\n".join(listing(function) for function in functions.values()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
