"""Fused ops: several ops of the catalogue as one, so that a GPU needs fewer launches.

A fused op is written as the calls that it stands for. They are its reference and its ONNX body, they give its
bytes and FLOPs, and they are the pattern that the pass replaces (`v4graph.passes.fuse_ops`). What it adds is
a launch plan. Source: the calls' own ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from v4graph.ops import attention_prep, compress, fp8_linear, hyper_post, hyper_pre, linear, rms_norm
from v4graph.ops.spec import F32, FLOAT, I8, I32, SCALE, WEIGHT, OpSpec, Part, Port

_KINDS = {int: "int", float: "float", str: "string"}


def _reference(
    parts: tuple[Part, ...],
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    attributes: Mapping[str, type],
) -> Callable[..., Any]:
    def reference(*arguments: Any) -> Any:
        values = dict(zip([*(port.name for port in inputs), *attributes], arguments, strict=True))
        for part in parts:
            given = [values[name] for name in part.inputs]
            results = part.spec.reference(*given, *part.attribute_values(values).values())
            values |= zip(part.outputs, results if isinstance(results, tuple) else (results,), strict=True)
        found = tuple(values[port.name] for port in outputs)
        return found if len(found) > 1 else found[0]

    return reference


def _body(
    name: str, parts: tuple[Part, ...], inputs: tuple[Port, ...], outputs: tuple[Port, ...]
) -> Callable[[Mapping[str, Any]], str]:
    """Return a builder of the body: the calls, which are bodies themselves."""

    def call(part: Part, variant: Mapping[str, Any]) -> str:
        shown = []
        for key, kind in part.spec.attributes.items():
            value = part.attributes[key]
            if isinstance(value, str) and value.startswith("@") and value[1:] in variant:
                value = variant[value[1:]]
            text = f'"{value}"' if kind is str else value
            shown.append(f"{key}: {_KINDS[kind]} = {text}")
        attributes = f"<{', '.join(shown)}>" if shown else ""
        return f"{', '.join(part.outputs)} = v4graph.{part.spec.name} {attributes} ({', '.join(part.inputs)})"

    def build(variant: Mapping[str, Any]) -> str:
        used = [value for part in parts for value in part.attributes.values() if isinstance(value, str)]
        declared = list(dict.fromkeys(value[1:] for value in used if value.startswith("@")))
        lines = "\n  ".join(call(part, variant) for part in parts)
        takes = ", ".join(port.name for port in inputs)
        gives = ", ".join(port.name for port in outputs)
        head = f"{name} <{', '.join(declared)}>" if declared else name
        opsets = '<domain: "v4graph", opset_import: ["" : 24, "v4graph" : 1]>'
        return f"{opsets}\n{head} ({takes}) => ({gives})\n{{\n  {lines}\n}}"

    return build


def _fused(
    name: str,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
    attributes: Mapping[str, type],
    parts: tuple[Part, ...],
    structural: tuple[str, ...] = (),
) -> OpSpec:
    """Tolerance: the loosest of the parts; a rounding flips where the part before it was an ulp off."""
    tolerances = [part.spec.tolerance for part in parts]
    return OpSpec(
        name=name,
        version=1,
        inputs=inputs,
        outputs=outputs,
        attributes=attributes,
        reference=_reference(parts, inputs, outputs, attributes),
        tolerance={
            dtype: (max(t[dtype][0] for t in tolerances), max(t[dtype][1] for t in tolerances))
            for dtype in ("float32", "bfloat16")
        },
        flips=max(part.spec.flips for part in parts),
        structural=structural,
        body=_body(name, parts, inputs, outputs),
        parts=parts,
    )


def _fp8(name: str, rows: str) -> tuple[Port, Port]:
    """Ports of an FP8 weight with `rows` rows: codes and scales."""
    return Port(name, I8, f"{rows} K"), Port(f"{name}_scale", SCALE, f"{rows}B KB")


def _product(x: str, weight: str, y: str) -> Part:
    return Part(fp8_linear.OP, (x, weight, f"{weight}_scale"), (y,), {})


# One sublayer's end and the next one's beginning.
HYPER_POST_PRE = _fused(
    "V4HyperPostPre",
    (*hyper_post.OP.inputs, *(port for port in hyper_pre.OP.inputs if port.name != "x")),
    (
        Port("h", FLOAT, "B S D"),
        Port("z", FLOAT, "B S 4 D"),
        Port("next_post", F32, "B S 4"),
        Port("next_comb", F32, "B S 4 4"),
    ),
    hyper_pre.OP.attributes,
    (
        Part(hyper_post.OP, ("y", "x", "post", "comb"), ("z",), {}),
        Part(
            hyper_pre.OP,
            ("z", "fn", "base", "scale", "norm"),
            ("h", "next_post", "next_comb"),
            {"iters": "@iters", "eps": "@eps", "hc_eps": "@hc_eps"},
        ),
    ),
    structural=("iters",),
)

# The projections that read a sublayer's input: queries' latent and key/value; in compressing layers also the
# compressor's; with an indexer, its compressor's and its head weights.
_X = Port("x", FLOAT, "B S K")
_WINDOW = (_X, *_fp8("wq_a", "Oq"), *_fp8("wkv", "Okv"))
_WINDOW_OUT = (Port("latent", FLOAT, "B S Oq"), Port("kv", FLOAT, "B S Okv"))
_WINDOW_PARTS = (_product("x", "wq_a", "latent"), _product("x", "wkv", "kv"))


def _compressor(prefix: str, rows: str) -> tuple[tuple[Port, ...], tuple[Port, ...], tuple[Part, ...]]:
    """Ports and calls of a compressor's two projections."""
    names = (f"{prefix}wkv", f"{prefix}wgate")
    outputs = (f"{prefix}rows", f"{prefix}gate")
    return (
        tuple(Port(name, WEIGHT, f"{rows} K") for name in names),
        tuple(Port(name, F32, f"B S {rows}") for name in outputs),
        tuple(Part(linear.F32_OP, ("x", w), (y,), {}) for w, y in zip(names, outputs, strict=True)),
    )


_MAIN, _MAIN_OUT, _MAIN_PARTS = _compressor("compressor_", "Oc")
_INDEX, _INDEX_OUT, _INDEX_PARTS = _compressor("index_", "Oi")

WINDOW_PROJECTIONS = _fused("V4WindowProjections", _WINDOW, _WINDOW_OUT, {}, _WINDOW_PARTS)

HCA_PROJECTIONS = _fused(
    "V4HcaProjections", (*_WINDOW, *_MAIN), (*_WINDOW_OUT, *_MAIN_OUT), {}, (*_WINDOW_PARTS, *_MAIN_PARTS)
)

CSA_PROJECTIONS = _fused(
    "V4CsaProjections",
    (*_WINDOW, *_MAIN, *_INDEX, Port("weights_proj", WEIGHT, "Ow K")),
    (*_WINDOW_OUT, *_MAIN_OUT, *_INDEX_OUT, Port("weights", FLOAT, "B S Ow")),
    {},
    (
        *_WINDOW_PARTS,
        *_MAIN_PARTS,
        *_INDEX_PARTS,
        Part(linear.OP, ("x", "weights_proj"), ("weights",), {}),
    ),
)

# The queries' latent: its norm, and the projections that read it.
_LATENT = (_X, Port("norm", FLOAT, "K"), *_fp8("wq_b", "Oq"))
_NORM = Part(rms_norm.OP, ("x", "norm"), ("normed",), {"eps": "@eps"})

QUERY_PROJECTION = _fused(
    "V4QueryProjection",
    _LATENT,
    (Port("q", FLOAT, "B S Oq"),),
    {"eps": float},
    (_NORM, _product("normed", "wq_b", "q")),
)

CSA_QUERY_PROJECTIONS = _fused(
    "V4CsaQueryProjections",
    (*_LATENT, *_fp8("index_wq_b", "Oi")),
    (Port("q", FLOAT, "B S Oq"), Port("index_q", FLOAT, "B S Oi")),
    {"eps": float},
    (_NORM, _product("normed", "wq_b", "q"), _product("normed", "index_wq_b", "index_q")),
)


def _compressed(
    prefix: str, symbols: Mapping[str, str], quantise: str, overlap: int
) -> tuple[Any, Any, Part]:
    """Ports that a compressor brings, and its call; `symbols` renames dimensions of V4Compress."""
    shared = ("freqs", "start", "num")

    def port(one: Port) -> Port:
        shape = " ".join(symbols.get(dim, dim) for dim in one.dims)
        return Port(f"{prefix}{one.name}", one.dtypes, shape, f"{prefix}{one.alias}" if one.alias else "")

    def named(one: Port) -> str:
        return one.name if one.name in shared else f"{prefix}{one.name}"

    part = Part(
        compress.OP,
        tuple(named(one) for one in compress.OP.inputs),
        tuple(f"{prefix}{one.name}" for one in compress.OP.outputs),
        {"overlap": overlap, "quantise": quantise, "eps": "@eps"},
    )
    inputs = tuple(port(one) for one in compress.OP.inputs if one.name not in shared)
    return inputs, tuple(port(one) for one in compress.OP.outputs), part


_PREP = (*attention_prep.OP.inputs, Port("num", I32, "B"))
_PREP_PART = Part(
    attention_prep.OP,
    tuple(port.name for port in attention_prep.OP.inputs),
    tuple(port.name for port in attention_prep.OP.outputs),
    {"quantise": 1, "eps": "@eps"},
)


def _prep(name: str, compressors: tuple[tuple[Any, Any, Part], ...]) -> OpSpec:
    return _fused(
        name,
        (*_PREP, *(port for inputs, _, _ in compressors for port in inputs)),
        (*attention_prep.OP.outputs, *(port for _, outputs, _ in compressors for port in outputs)),
        {"eps": float},
        (_PREP_PART, *(part for _, _, part in compressors)),
    )


# What lies between the projections and the attention: queries, key/value and the compressors.
HCA_PREP = _prep("V4HcaPrep", (_compressed("c_", {}, "kv", 0),))
CSA_PREP = _prep(
    "V4CsaPrep",
    (
        _compressed("c_", {}, "kv", 1),
        # An indexer's entries have a width of their own; blocks, tails and rows are those of the main
        # compressor.
        _compressed("i_", {"CC": "IC", "C": "I"}, "index", 1),
    ),
)

FUSED_OPS = (
    HYPER_POST_PRE,
    WINDOW_PROJECTIONS,
    HCA_PROJECTIONS,
    CSA_PROJECTIONS,
    QUERY_PROJECTION,
    CSA_QUERY_PROJECTIONS,
    HCA_PREP,
    CSA_PREP,
)
