"""KeepLayers: layers leave with their states and weights, and the streams join."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest

from v4graph.errors import PassError
from v4graph.passes.defer_hyper_post import DeferHyperPost
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.keep_layers import KeepLayers


@pytest.mark.parametrize("deferred", [False, True])
def test_a_layer_in_the_middle_leaves(nano_model: Callable[[], ir.Model], deferred: bool) -> None:
    model = nano_model()
    if deferred:
        DeferHyperPost()(model)
    assert KeepLayers([0, 2])(model).modified
    assert [node.name for node in model.graph] == ["embed", "layers.0", "layers.2", "head"]
    left = {
        str(value.name).split(".")[1] for value in model.graph.inputs if str(value.name).startswith("state.")
    }
    assert left == {"0", "2"}
    assert not any(str(value.name).startswith(("layers.1.", "layers.3.")) for value in model.graph.inputs)
    assert "V4Layer_hca_topk" not in {f.name for f in model.functions.values()}
    onnx.checker.check_model(ir.to_proto(model))
    assert not KeepLayers([0, 2])(model).modified


def test_a_layer_that_is_not_there_and_inlined_layers_are_refused(nano_model: Callable[[], ir.Model]) -> None:
    with pytest.raises(
        Exception, match=r"the graph has no call of layers\.9; give it a graph as exported"
    ) as found:
        KeepLayers([0, 9])(nano_model())
    assert isinstance(found.value, PassError) or isinstance(found.value.__cause__, PassError)
    inlined = nano_model()
    InlineLayers()(inlined)
    with pytest.raises(Exception, match="the graph has no call of"):
        KeepLayers([0])(inlined)
