"""A toy engine that keeps the graph contract: a ring, an append-only cache, weights as inputs.

Its logits depend on every token seen, with a weight per distance inside the window, so that a wrong
row, a stale row or a wrong position shows. `logits_of` is the same model in numpy over whole sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from v4graph.manifest import Binding, Manifest, State, TensorContract
from v4graph_runtime.engine import sha256

VOCAB, WIDTH, WINDOW, SLACK, CAPACITY = 23, 8, 6, 3, 64
RING = WINDOW + SLACK

# The parser takes no dots in names: `__` stands for one.
_GRAPH = """
<ir_version: 10, opset_import: ["" : 24]>
toy (int64[B,S] input_ids, int32[B] start_pos, int32[B] num_tokens,
     float[V,D] embed__weight, float[V,D] head__weight,
     float[B,R,D] state__0__window, float[B,C,D] state__0__compressed)
 => (float[LOGITS] logits, float[B,R,D] next__0__window, float[B,C,D] next__0__compressed)
{
  i0 = Constant<value_int = 0>()
  i1 = Constant<value_int = 1>()
  axis0 = Constant<value_ints = [0]>()
  axis1 = Constant<value_ints = [1]>()
  axis2 = Constant<value_ints = [2]>()
  f0 = Constant<value_float = 0.0>()
  w = Constant<value_int = 6>()
  batch_axis = Constant<value_ints = [0]>()
  seq_axis = Constant<value_ints = [1]>()

  ids_shape = Shape(input_ids)
  batch1 = Gather(ids_shape, batch_axis)
  length1 = Gather(ids_shape, seq_axis)
  length = Squeeze(length1)
  ring_shape = Shape(state__0__window)
  rows1 = Gather(ring_shape, seq_axis)
  rows = Squeeze(rows1)
  cache_shape = Shape(state__0__compressed)
  slots1 = Gather(cache_shape, seq_axis)
  slots = Squeeze(slots1)

  start = Cast<to = 7>(start_pos)
  p0 = Unsqueeze(start, axis1)
  num = Cast<to = 7>(num_tokens)
  n = Unsqueeze(num, axis1)
  end = Add(p0, n)
  last = Sub(end, i1)
  step = Range(i0, length, i1)
  t = Add(p0, step)
  emb = Gather(embed__weight, input_ids)

  row = Range(i0, rows, i1)
  before = Sub(p0, i1)
  before_row = Sub(before, row)
  before_mod = Mod(before_row, rows)
  u_old = Sub(before, before_mod)
  u = Concat<axis = 1>(u_old, t)
  joined = Concat<axis = 1>(state__0__window, emb)
  uu = Unsqueeze(u, axis1)
  tt = Unsqueeze(t, axis2)
  distance = Sub(tt, uu)
  seen = GreaterOrEqual(uu, i0)
  past = GreaterOrEqual(distance, i0)
  near = Less(distance, w)
  seen_past = And(seen, past)
  visible = And(seen_past, near)
  one_more = Add(distance, i1)
  safe = Where(visible, one_more, i1)
  safe_f = Cast<to = 1>(safe)
  weight = Reciprocal(safe_f)
  masked = Where(visible, weight, f0)
  mixed = MatMul(masked, joined)

  last_row = Sub(last, row)
  last_mod = Mod(last_row, rows)
  newest = Sub(last, last_mod)
  fresh = GreaterOrEqual(newest, p0)
  offset = Sub(newest, p0)
  new_index = Add(offset, rows)
  source = Where(fresh, new_index, row)
  source_3d = Unsqueeze(source, axis2)
  next__0__window = GatherND<batch_dims = 1>(joined, source_3d)

  room = Sub(slots, length)
  base = Min(p0, room)
  place = Add(base, step)
  place_3d = Unsqueeze(place, axis2)
  held = GatherND<batch_dims = 1>(state__0__compressed, place_3d)
  behind = Sub(place, p0)
  behind_0 = Max(behind, i0)
  behind_3d = Unsqueeze(behind_0, axis2)
  entry = GatherND<batch_dims = 1>(emb, behind_3d)
  begun = GreaterOrEqual(place, p0)
  ended = Less(place, end)
  live = And(begun, ended)
  live_3d = Unsqueeze(live, axis2)
  value = Where(live_3d, entry, held)
  batch = Squeeze(batch1)
  slot = Range(i0, batch, i1)
  slot_2d = Unsqueeze(slot, axis1)
  place_shape = Concat<axis = 0>(batch1, length1)
  slot_full = Expand(slot_2d, place_shape)
  slot_3d = Unsqueeze(slot_full, axis2)
  index = Concat<axis = 2>(slot_3d, place_3d)
  next__0__compressed = ScatterND(state__0__compressed, index, value)

  block = Range(i0, slots, i1)
  block_past = LessOrEqual(block, tt)
  block_f = Cast<to = 1>(block_past)
  history = MatMul(block_f, next__0__compressed)
  sum = Add(mixed, history)
  x = Sin(sum)
  head_t = Transpose<perm = [1, 0]>(head__weight)
  all_logits = MatMul(x, head_t)
  TAIL
}
"""
_LAST = """num_less = Sub(num, i1)
  at = Max(num_less, i0)
  at_2d = Unsqueeze(at, axis1)
  logits = GatherND<batch_dims = 1>(all_logits, at_2d)"""


@dataclass(frozen=True)
class ToyWeights:
    """What `Session` needs of a checkpoint."""

    arrays: dict[str, Any]

    @classmethod
    def random(cls, seed: int = 0) -> ToyWeights:
        random = np.random.default_rng(seed)
        names = ("embed.weight", "head.weight")
        return cls({name: random.standard_normal((VOCAB, WIDTH)).astype(np.float32) for name in names})

    def bound(self, manifest: Manifest) -> Iterator[tuple[str, Any]]:
        for binding in manifest.bindings:
            yield binding.input, self.arrays[binding.input]


def toy_manifest(*, all_logits: bool = False) -> Manifest:
    logits = ("B", "S", VOCAB) if all_logits else ("B", VOCAB)
    ring = State("state.{i}.window", "next.{i}.window", (0,), "float32", ("B", RING, WIDTH), "ring", 0)
    cache = State(
        "state.{i}.compressed", "next.{i}.compressed", (0,), "float32", ("B", "C1", WIDTH), "append", 1
    )
    return Manifest(
        kind="graph",
        backend="",
        numerics="exact",
        dtype="float32",
        all_logits=all_logits,
        max_seq_len=CAPACITY,
        rollback_slack=SLACK,
        opset=24,
        config={"vocab_size": VOCAB, "eos_token_id": 1},
        config_sha256="",
        layer_functions={},
        inputs=(),
        outputs=(TensorContract("logits", "float32", logits),),
        states=(ring, cache),
        bindings=tuple(
            Binding(name, name, (), 0, "float32", (VOCAB, WIDTH), ("as-is",), "F32")
            for name in ("embed.weight", "head.weight")
        ),
        unbound=(),
        ops={},
        embedded_weights=False,
        notes=(),
        tools={},
        files={},
    )


def write_graph(folder: Path, *, all_logits: bool = False, **changes: Any) -> Path:
    """Write a toy graph directory; `changes` replace manifest fields."""
    folder.mkdir(parents=True)
    tail = "logits = Identity(all_logits)" if all_logits else _LAST
    shape = "B,S,V" if all_logits else "B,V"
    model = onnx.parser.parse_model(_GRAPH.replace("LOGITS", shape).replace("TAIL", tail))
    _restore_dots(model.graph)
    onnx.save(model, folder / "model.onnx")
    (folder / "config.json").write_text("{}\n")
    files = {name: sha256(folder / name) for name in ("model.onnx", "config.json")}
    dataclasses.replace(toy_manifest(all_logits=all_logits), **{"files": files, **changes}).save(folder)
    return folder


def _restore_dots(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        value.name = value.name.replace("__", ".")
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]


def logits_of(ids: Any, weights: ToyWeights) -> Any:
    """Return float64 logits [T, V] of one whole sequence."""
    embedded = weights.arrays["embed.weight"][np.asarray(ids)].astype(np.float64)
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))[None, :]
    visible = (distance >= 0) & (distance < WINDOW)
    mix = np.where(visible, 1 / np.where(visible, distance + 1, 1), 0) + (distance >= 0)
    return np.sin(mix @ embedded) @ weights.arrays["head.weight"].T.astype(np.float64)
