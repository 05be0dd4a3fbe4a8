"""ONNX function bodies of the custom ops: one per structural variant, with symbolic widths.

A body is the op's reference traced with every size and every non-structural attribute symbolic, so
one set serves every model. The set is shipped prebuilt (`make bodies` rebuilds it) because tracing
it takes minutes; a variant that is not in it is traced on demand.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir

import v4graph.ops
from v4graph.ops import ALL_OPS, DOMAIN, OPS_BY_NAME, OPSET, Port
from v4graph.ops.spec import evaluate_dim
from v4graph.ops.variant import has_scale, variant_name
from v4graph.passes.facts import plain_name
from v4graph_export.functions import OPSETS, FakeInput, canonicalise, to_function, trace, walk

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "bodies"
_SOURCE_KEY = "v4graph.ops_sha256"

# Example size of every symbol. Derived sizes (blocks, chunks, groups) must be at least 2, and two
# symbols of one op never share a size, or torch.export would take them for one.
_SIZES: Mapping[str, int] = {"B": 2, "S": 389, "D": 96, "N": 533, "F": 32, "H": 6, "Dh": 96, "L": 147}
_SIZES_OF: Mapping[str, Mapping[str, int]] = {
    "V4Linear": {"K": 384, "O": 500},
    "V4LinearF32": {"K": 384, "O": 500},
    "V4Fp8Linear": {"K": 384, "O": 500, "OB": 4, "KB": 3},
    "V4AttentionPrep": {"Dh": 320, "Q": 960},
    "V4Compress": {"R": 7, "C": 320, "CC": 320, "L": 23},
    "V4IndexTopK": {"C": 128, "Q": 640, "Hi": 5},
    "V4SelectedAttention": {"K": 37},
    "V4GroupedOutput": {"K": 192, "O": 300},
    "V4Fp8GroupedOutput": {"H": 4, "Dh": 192, "K": 256, "O": 300, "OB": 3, "KB": 2},
    "V4RouteTopK": {"E": 11},
    "V4RouteHash": {"E": 11, "V": 97, "K": 5},
    "V4ExpertFp4": {"N": 389, "I": 256, "D": 384, "D2": 192, "DS": 12, "I2": 128, "IS": 8},
    "V4ExpertFp8": {"N": 389, "I": 256, "D": 384, "IB": 2, "DB": 3},
    "V4ExpertFloat": {"N": 389, "I": 256, "D": 384},
}
_ATTRIBUTES: Mapping[str, int | float] = {
    "eps": 1e-6,
    "hc_eps": 1e-6,
    "scale": 0.5,
    "limit": 10.0,
    "window": 139,
    "ratio": 5,
    "topk": 7,
    "groups": 3,
}
_STRUCTURAL: Mapping[str, tuple[dict[str, Any], ...]] = {
    "V4HyperPre": ({"iters": 20},),
    "V4HyperPostPre": ({"iters": 20},),
    "V4AttentionPrep": ({"quantise": 0}, {"quantise": 1}),
    "V4IndexTopK": ({"quantise": 0}, {"quantise": 1}),
    "V4Compress": (
        {"overlap": 0, "quantise": "none"},
        {"overlap": 1, "quantise": "none"},
        {"overlap": 0, "quantise": "kv"},
        {"overlap": 1, "quantise": "kv"},
        {"overlap": 1, "quantise": "index"},
    ),
}


@dataclass(frozen=True)
class Variant:
    """One code path of an op: structural attribute values, the FLOAT dtype, the scale's dtype."""

    op: str
    structural: tuple[tuple[str, Any], ...]
    dtype: str
    scale: str = "int8"

    @property
    def name(self) -> str:
        """Function name in a portable file: the op, then `__` and a tag that backends strip."""
        return variant_name(OPS_BY_NAME[self.op], dict(self.structural), self.scale)


def variant_of(node: ir.Node, dtype: str, scale: str) -> Variant:
    """Return the variant that a node's attributes ask for."""
    spec = OPS_BY_NAME[plain_name(node.op_type)]
    values = tuple((key, node.attributes[key].value) for key in spec.structural)
    return Variant(spec.name, values, dtype, scale)


def build_body(variant: Variant) -> ir.Function:
    """Trace the reference, or parse the hand-written text, of one variant."""
    spec = OPS_BY_NAME[variant.op]
    if spec.body is not None:
        return _parse(spec.body({"dtype": variant.dtype, **dict(variant.structural)}), variant)
    structural = dict(variant.structural)
    parameters = {k: _ATTRIBUTES[k] for k in spec.attributes if k not in structural}
    inputs = [_fake_input(port, variant) for port in spec.inputs]

    def call(*arguments: Any) -> Any:
        count = len(spec.inputs)
        values = {**dict(zip(parameters, arguments[count:], strict=True)), **structural}
        return spec.reference(*arguments[:count], *(values[name] for name in spec.attributes))

    model = trace(call, inputs, [port.name for port in spec.outputs], parameters)
    return to_function(model, variant.name, spec.attributes)


def _fake_input(port: Port, variant: Variant) -> FakeInput:
    sizes = {**_SIZES, **_SIZES_OF.get(variant.op, {})}
    structural = dict(variant.structural)
    static = set()
    if structural.get("quantise") in (1, "index") and variant.op != "V4AttentionPrep":
        sizes |= {"C": 128} | ({"CC": 256} if variant.op == "V4Compress" else {})
        static = {"C", "F"}  # the Hadamard transform is defined for 128 channels only
    elif structural.get("overlap"):
        sizes["CC"] = 2 * sizes["C"]
    shape = tuple(evaluate_dim(dim, sizes) for dim in port.dims)
    symbolic = tuple(i for i, dim in enumerate(port.dims) if not dim.isdigit() and dim not in static)
    if set(port.dtypes) == {"int8", "float32"}:
        return FakeInput(port.name, variant.scale, shape, symbolic)
    return FakeInput(port.name, variant.dtype if port.is_float else port.dtypes[0], shape, symbolic)


def _parse(text: str, variant: Variant) -> ir.Function:
    """Parse a hand-written body and point its calls at the right variants."""
    function = ir.from_proto(onnx.parser.parse_function(text))
    assert isinstance(function, ir.Function)
    function.name = variant.name
    for node in walk(function):
        if node.domain == DOMAIN:
            node.op_type = variant_of(node, variant.dtype, variant.scale).name
    canonicalise(function.graph)
    return function


def shipped_variants(dtype: str) -> Iterator[Variant]:
    """Yield the variants of the shipped set; unquantised code paths exist in float32 only."""
    for spec, scale in itertools.product(ALL_OPS, ("int8", "float32")):
        if scale == "float32" and not has_scale(spec):
            continue
        for structural in _STRUCTURAL.get(spec.name, ({},)):
            exact = structural.get("quantise") in (0, "none")
            if dtype == "float32" or not exact:
                yield Variant(spec.name, tuple(structural.items()), dtype, scale)


def ops_sha256() -> str:
    """Hash of the op sources and opset that a prebuilt set depends on; comments and layout do not count."""
    digest = hashlib.sha256(str(OPSET).encode())
    folder = Path(v4graph.ops.__file__).parent
    for path in sorted(set(folder.glob("*.py")) - {folder / "tolerance.py"}):
        tree = ast.parse(path.read_text())
        digest.update(f"{path.name} {_dump(_Code().visit(tree))}".encode())
    return digest.hexdigest()


def _dump(node: object) -> str:
    """Return a syntax tree as text, without empty fields.

    Each Python version adds optional fields and prints them differently in ast.dump; a set that one
    version built has to be current for all.
    """
    if isinstance(node, list):
        return f"[{' '.join(map(_dump, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"({type(node).__name__} {' '.join(f'{name}={_dump(value)}' for name, value in fields)})"


class _Code(ast.NodeTransformer):
    """Drops docstrings and the annotations of local variables."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return node
        return ast.Assign(targets=[node.target], value=node.value)


def pack(functions: list[ir.Function]) -> onnx.ModelProto:
    """Return a model that only carries functions, with the hash of the ops they came from."""
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(OPSETS), name="bodies")
    model = ir.Model(graph, ir_version=10, functions=functions, producer_name="v4graph")
    model.metadata_props[_SOURCE_KEY] = ops_sha256()
    return ir.to_proto(model)


@functools.cache
def _shipped(dtype: str) -> dict[str, onnx.FunctionProto]:
    path = FOLDER / f"{dtype}.onnx"
    if not path.exists():
        logger.warning("%s is missing: function bodies are traced now, which takes minutes", path)
        return {}
    model = onnx.load(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if properties.get(_SOURCE_KEY) != ops_sha256():
        logger.warning("%s is older than v4graph/ops: bodies are traced now; run `make bodies`", path)
        return {}
    return {function.name: function for function in model.functions}


@functools.cache
def _traced(variant: Variant) -> onnx.FunctionProto:
    logger.info("tracing the body of %s", variant.name)
    return ir.to_proto(build_body(variant))


def body(variant: Variant) -> ir.Function:
    """Return a fresh copy of a variant's body, prebuilt if the shipped set has it."""
    proto = _shipped(variant.dtype).get(variant.name) or _traced(variant)
    function = ir.from_proto(proto)
    assert isinstance(function, ir.Function)
    return function


def attach_bodies(functions: list[ir.Function], dtype: str, scale: str) -> list[ir.Function]:
    """Rename the custom op calls in `functions` to their variants; return the bodies they need."""
    needed: dict[str, ir.Function] = {}
    queue = list(functions)
    while queue:
        for node in walk(queue.pop()):
            if node.domain != DOMAIN or plain_name(node.op_type) not in OPS_BY_NAME:
                continue
            variant = variant_of(node, dtype, scale)
            node.op_type = variant.name
            if variant.name not in needed:
                needed[variant.name] = body(variant)
                queue.append(needed[variant.name])
    return list(needed.values())


def build_all(dtype: str) -> onnx.ModelProto:
    """Trace the whole shipped set of one dtype."""
    return pack([build_body(variant) for variant in shipped_variants(dtype)])
