// The model as groups of equal layers; a group opens to its ops, an op to its tensors and attributes.
const kindsOf = (graph) => [...new Set((graph.layers || graph.kinds).map((layer) => layer.kind))].filter((kind) => !/^V4|^embed|^head/.test(kind));
const kindClass = (graph, kind) => {
  const i = kindsOf(graph).indexOf(kind);
  return i < 0 ? "" : `k${i % 6}`;
};

function figuresOf(nodes, context) {
  return {
    nodes: nodes.length,
    bytes: sum(nodes, (node) => at(node.bytes, context)),
    flops: sum(nodes, (node) => at(node.flops, context)),
    launches: sum(nodes, (node) => at(node.launches, context) || 0),
    unknown: nodes.filter((node) => at(node.launches, context) === null).length,
  };
}

const launchesOf = (figures) => (figures.unknown ? `${countText(figures.launches)} + ?` : countText(figures.launches));
const cell = (value, unit) => el("span", { className: "n" }, value, unit ? el("small", {}, ` ${unit}`) : null);

function partStack(nodes) {
  const sums = partSums(nodes, "bytes", view.context);
  const all = sum(sums, (value) => value) || 1;
  const bars = sums.map((value, i) => (value ? el("i", { className: `part part${i}`, style: `width:${(100 * value) / all}%` }) : null));
  return el("span", { className: "stack", title: "bytes by part" }, ...bars);
}

function groupHead(graph, group) {
  const nodes = graph.blocks[group.block].nodes;
  const figures = figuresOf(nodes, view.context);
  const named = group.kind.replace(/^V4/, "").toLowerCase() === group.label;
  const kind = el("span", { className: `kind ${kindClass(graph, group.kind)}` }, named ? group.label : group.kind);
  return [
    el("span", {}, kind, named ? "" : ` ${group.label}`), cell(group.count > 1 ? `×${group.count}` : ""),
    cell(figures.nodes, "ops"), cell(launchesOf(figures), "launches"), cell(bytesText(figures.bytes)),
    cell(flopsText(figures.flops)), partStack(nodes),
  ];
}

function groupOf(graph, group, index) {
  const summary = el("summary", {}, ...groupHead(graph, group));
  const details = el("details", { className: "group", id: `group-${index}` }, summary);
  details.dataset.block = group.block;
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(opsOf(graph, group));
  });
  return details;
}

function opsOf(graph, group) {
  const heads = ["", "#", "Op", "Weights of", "Output", "Bytes", "FLOPs", "Runs"];
  const head = el("div", { className: "heads" }, ...heads.map((text, i) => el("span", { className: i > 4 ? "n" : "" }, text)));
  return el("div", { className: "ops" }, head, ...graph.blocks[group.block].nodes.map((node, i) => opOf(node, i)));
}

function opOf(node, i) {
  const first = node.outputs[0];
  const part = report.parts.indexOf(node.part);
  const summary = el("summary", {},
    el("span", { className: "dim" }, i + 1),
    el("span", { className: `chip mono ${node.custom ? "" : "native"}`, title: `${node.op} (${node.part})` }, el("i", { className: `part part${part}` }), node.op),
    el("span", { className: "mono", title: node.role }, node.role || "–"),
    el("span", { className: "mono dim" }, first ? `${first.dtype} ${at(first.shape, view.context)}` : ""),
    cell(bytesText(at(node.bytes, view.context))), cell(flopsText(at(node.flops, view.context))),
    cell(launchText(at(node.launches, view.context))));
  const details = el("details", { className: "op" }, summary);
  details.dataset.op = node.op;
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(tensorsOf(node));
  });
  return details;
}

function tensorsOf(node) {
  const columns = [
    ["Name", (tensor) => el("code", {}, tensor.name)],
    ["Is", (tensor) => el("span", { className: `tag ${tensor.kind}` }, tensor.kind)],
    ["Type", (tensor) => tensor.dtype], ["Shape", (tensor) => at(tensor.shape, view.context)],
  ];
  const box = el("div", { className: "io" });
  const add = (title, table) => box.append(el("div", {}, el("h3", {}, title), table));
  if (node.inputs.length) add("Inputs", tableOf(columns, node.inputs));
  add("Outputs", tableOf(columns, node.outputs));
  const attributes = Object.entries(node.attributes);
  if (attributes.length) {
    const columns2 = [["Name", ([name]) => el("code", {}, name)], ["Value", ([, value]) => String(value)]];
    add("Attributes", tableOf(columns2, attributes));
  }
  return box;
}

function drawStrip(graph) {
  const cells = graph.layers.map((layer) => {
    const index = graph.groups.findIndex((group) => group.layers.includes(layer.name));
    const text = layer.name.replace("layers.", "");
    const span = el("span", { className: kindClass(graph, layer.kind), title: `${layer.name}: ${layer.kind}` }, text);
    span.addEventListener("click", () => {
      const group = byId(`group-${index}`);
      group.open = true;
      group.scrollIntoView({ block: "nearest" });
      group.querySelector("summary").focus();
    });
    return span;
  });
  byId("strip").replaceChildren(...cells);
}

function drawLayers(graph) {
  if (!graph.opened) { drawKinds(graph); return; }
  drawStrip(graph);
  byId("groups").replaceChildren(...graph.groups.map((group, i) => groupOf(graph, group, i)));
}

// Another context changes the figures of what is there; what is open stays open.
function refreshLayers(graph) {
  if (!graph.opened) return;
  graph.groups.forEach((group, i) => {
    const details = byId(`group-${i}`);
    details.querySelector("summary").replaceChildren(...groupHead(graph, group));
    const ops = details.querySelector(".ops");
    if (!ops) return;
    const open = [...ops.querySelectorAll(".op")].map((op) => op.open);
    ops.replaceWith(opsOf(graph, group));
    details.querySelectorAll(".op").forEach((op, k) => { op.open = open[k]; });
  });
}

function drawKinds(graph) {
  const kinds = tableOf([
    ["Kind", (row) => el("span", { className: `kind ${kindClass(graph, row.kind)}` }, row.kind)],
    ["Layers", (row) => row.label], ["", (row) => `×${row.count}`, true],
  ], graph.kinds);
  const build = graph.tensorrt;
  const plugins = tableOf([
    ["Plugin", (row) => el("code", {}, row.op)], ["Version", (row) => row.version, true],
    ["Used", (row) => countText(row.layers), true], ["Hash", (row) => el("code", {}, row.sha256.slice(0, 12))],
  ], build.plugins);
  const range = (triple) => `${triple.map(tokensText).join(" / ")}`;
  const profiles = tableOf([
    ["Profile", (row) => row.name], ["Batch (least / usual / most)", (row) => range(row.batch)],
    ["New tokens", (row) => range(row.tokens)], ["Capacity", (row) => range(row.capacity)],
  ], build.profiles);
  const bodies = build.bodies.length ? el("p", {}, `Without plugin, as native layers: ${build.bodies.join(", ")}`) : null;
  byId("strip").replaceChildren();
  const parts = [kinds, el("h3", {}, "Plugins"), plugins, bodies, el("h3", {}, "Profiles"), profiles];
  byId("groups").replaceChildren(...parts.filter(Boolean));
}
