"""FuseOps: text in, ops out; what must not match does not; a fused op brings its body."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from v4graph.ops import fused
from v4graph.passes.facts import plain_name
from v4graph.passes.fuse_ops import FuseOps

HEAD = '<ir_version: 10, opset_import: ["" : 24, "v4graph" : 1]>\n'
POST_PRE = (
    HEAD
    + """g (float[B,S,8] y, float[B,S,4,8] x, float[B,S,4] post, float[B,S,4,4] comb, float[24,32] fn,
   float[24] base, float[3] scale, float[8] norm) => (float[B,S,8] h, float[B,S,4] p, float[B,S,4,4] c) {
  z = v4graph.V4HyperPost (y, x, post, comb)
  h, p, c = v4graph.V4HyperPre <iters = 20, eps = 1e-6, hc_eps = 1e-6> (z, fn, base, scale, norm)
}
"""
)


def types(graph: ir.Graph | ir.Function) -> list[str]:
    return [plain_name(node.op_type) for node in graph]


def test_post_and_pre_become_one_and_the_streams_stay_an_output() -> None:
    model = ir.from_onnx_text(POST_PRE)
    one = FuseOps(fused.HYPER_POST_PRE)
    assert repr(one) == "FuseHyperPostPre"
    assert one(model).modified
    (node,) = model.graph
    assert node.op_type == "V4HyperPostPre"
    assert [value.name for value in node.inputs] == ["y", "x", "post", "comb", "fn", "base", "scale", "norm"]
    assert [value.name for value in node.outputs] == ["h", "z", "p", "c"]
    assert {name: value.value for name, value in node.attributes.items()} == {
        "iters": 20,
        "eps": pytest.approx(1e-6),
        "hc_eps": pytest.approx(1e-6),
    }
    assert not one(model).modified


LATENT = (
    HEAD
    + """g (float[B,S,128] x, float[128] norm, int8[256,128] w, int8[2,1] s) => ({outputs}) {{
  n = v4graph.V4RmsNorm <eps = 1e-6> (x, norm)
  q = v4graph.V4Fp8Linear (n, w, s)
}}
"""
)


def test_a_value_that_others_see_keeps_its_producer() -> None:
    hidden = ir.from_onnx_text(LATENT.format(outputs="float[B,S,256] q"))
    seen = ir.from_onnx_text(LATENT.format(outputs="float[B,S,256] q, float[B,S,128] n"))
    one = FuseOps(fused.QUERY_PROJECTION)
    assert one(hidden).modified
    assert types(hidden.graph) == ["V4QueryProjection"]
    assert not one(seen).modified


PAIR = (
    HEAD
    + """g (float[B,S,128] x, int8[256,128] w, int8[2,1] s, int8[128,128] v, int8[1,1] t)
   => (float[B,S,256] a, float[B,S,128] b) {{
  a = v4graph.V4Fp8Linear (x, w, s)
  {between}
  b = v4graph.V4Fp8Linear ({second}, v, t)
}}
"""
)


@pytest.mark.parametrize(
    ("between", "second", "fuses"),
    [
        ("", "x", True),
        ("c = Neg (b)", "x", True),  # a reader of a result, which moves behind the fused op
        ("y = Neg (x)", "y", False),  # not the same rows
    ],
)
def test_two_projections_fuse_where_they_read_the_same_rows(between: str, second: str, fuses: bool) -> None:
    text = PAIR.format(between="" if "(b)" in between else between, second=second)
    if "(b)" in between:
        text = text.replace("\n}", f"\n  {between}\n}}").replace(
            "[B,S,128] b)", "[B,S,128] b, float[B,S,128] c)"
        )
    model = ir.from_onnx_text(text)
    assert FuseOps(fused.WINDOW_PROJECTIONS)(model).modified == fuses
    assert ("V4WindowProjections" in types(model.graph)) == fuses
    if fuses:
        assert [value.name for value in model.graph.node(0).outputs] == ["a", "b"]


def test_calls_with_a_node_between_them_do_not_fuse() -> None:
    text = (
        PAIR.format(between="y = Slice (a, i, j, k)", second="y")
        .replace("=> (", "=> (")
        .replace("int8[1,1] t)", "int8[1,1] t, int64[1] i, int64[1] j, int64[1] k)")
    )
    assert not FuseOps(fused.WINDOW_PROJECTIONS)(ir.from_onnx_text(text)).modified


def test_attributes_must_agree() -> None:
    prep = "\n  q2, kv2 = v4graph.V4AttentionPrep <quantise = {q}, eps = {eps}> (q, kv, n, freqs, start)"
    compress = (
        '\n  c2, t2, g2 = v4graph.V4Compress <overlap = 0, quantise = "kv", eps = 1e-6> '
        "(rows, gate, ape, cn, freqs, start, num, t, g, c)\n}"
    )
    ports = (
        "float[B,S,512] q, float[B,S,512] kv, float[512] n, float[32] freqs, int32[B] start, int32[B] num, "
        "float[B,S,512] rows, float[B,S,512] gate, float[128,512] ape, float[512] cn, float[B,136,512] t, "
        "float[B,136,512] g, float[B,N,512] c"
    )
    outputs = (
        "float[B,S,1,512] q2, float[B,S,512] kv2, float[B,N,512] c2, float[B,136,512] t2, float[B,136,512] g2"
    )
    for q, eps, fuses in ((1, "1e-6", True), (0, "1e-6", False), (1, "1e-5", False)):
        model = ir.from_onnx_text(f"{HEAD}g ({ports}) => ({outputs}) {{{prep.format(q=q, eps=eps)}{compress}")
        assert FuseOps(fused.HCA_PREP)(model).modified == fuses


def test_a_portable_graph_gets_the_body_of_the_variants_that_were_there(
    nano_model: Callable[[], ir.Model],
) -> None:
    model = nano_model()
    assert FuseOps(fused.CSA_PREP)(model).modified
    (body,) = [f for f in model.functions.values() if f.name == "V4CsaPrep"]
    assert [node.op_type for node in body] == [
        "V4AttentionPrep__quantise_1",
        "V4Compress__overlap_1_quantise_kv",
        "V4Compress__overlap_1_quantise_index",
    ]
    assert list(body.attributes) == ["eps"]
