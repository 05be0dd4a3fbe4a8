// Bytes and FLOPs of each layer as stacked bars, by part of the model.
const CHART = { width: 760, height: 250, left: 84, right: 8, top: 26, bottom: 30 };

function partSums(nodes, field, context) {
  const sums = report.parts.map(() => 0);
  for (const node of nodes) sums[report.parts.indexOf(node.part)] += at(node[field], context);
  return sums;
}

function niceStep(most, ticks) {
  const raw = most / ticks || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) || 10);
}

function drawChart(graph, field, title, text) {
  const { width, height, left, right, top, bottom } = CHART;
  const stacks = graph.blocks.map((block) =>
    partSums(block.nodes, field, view.context).map((value, i) => (view.hidden.has(i) ? 0 : value)));
  const totals = stacks.map((stack) => sum(stack, (value) => value));
  const step = niceStep(Math.max(...totals), 4);
  const most = Math.max(step, Math.ceil(Math.max(...totals) / step) * step);
  const y = (value) => top + (height - top - bottom) * (1 - value / most);
  const band = (width - left - right) / graph.layers.length;
  const label = `${title} by layer at ${tokensText(report.contexts[view.context])} tokens of context`;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": label });
  root.append(svg("text", { x: left, y: 14, class: "title" }, title));
  for (let value = 0; value <= most * 1.001; value += step) {
    root.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
    root.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value ? text(value) : "0"));
  }
  graph.layers.forEach((layer, i) => drawBar(root, layer, i, { band, y, stack: stacks[layer.block], graph }));
  watchChart(root, graph, band, (i) => tipOf(graph, i, title, text, stacks[graph.layers[i].block]));
  return root;
}

function drawBar(root, layer, i, { band, y, stack, graph }) {
  const { left, top, height, bottom } = CHART;
  const x = left + i * band;
  root.append(svg("rect", { x, y: top, width: band, height: height - top - bottom, class: "band" }));
  let base = 0;
  stack.forEach((value, part) => {
    if (!value) return;
    const box = { x: x + band * 0.12, width: band * 0.76, y: y(base + value), height: y(base) - y(base + value) };
    root.append(svg("rect", { ...box, class: `part part${part}`, "pointer-events": "none" }));
    base += value;
  });
  const number = Number(layer.name.replace("layers.", ""));
  const every = Math.ceil(graph.layers.length / 24);
  const named = Number.isNaN(number);
  if (!named && number % every) return;
  const wide = band > 34;
  const shift = { x: x + band / 2, y: height - bottom + (named && !wide ? 26 : 14) };
  root.append(svg("text", { ...shift, "text-anchor": named && !wide ? (i ? "end" : "start") : "middle" }, named ? layer.name : number));
}

function watchChart(root, graph, band, tip) {
  const bands = [...root.querySelectorAll(".band")];
  let chosen = -1;
  const choose = (i, x, y) => {
    bands.forEach((node, j) => node.classList.toggle("on", i === j));
    chosen = i;
    if (i < 0) { byId("tip").hidden = true; return; }
    const box = bands[i].getBoundingClientRect();
    showTip(tip(i), x ?? box.right, y ?? box.top + 20);
  };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * CHART.width - CHART.left;
    const i = Math.floor(x / band);
    choose(i >= 0 && i < bands.length ? i : -1, event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", () => choose(-1));
  root.addEventListener("blur", () => choose(-1));
  root.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = { Home: 0, End: bands.length - 1 }[event.key] ?? (move && Math.max(0, Math.min(bands.length - 1, chosen + move)));
    if (event.key === "Escape") choose(-1);
    if (to === undefined) return;
    event.preventDefault();
    choose(to);
  });
}

function tipOf(graph, i, title, text, stack) {
  const layer = graph.layers[i];
  const rows = report.parts.map((part, k) => [part, stack[k], k]).filter(([, value]) => value);
  const head = layer.name === layer.kind || !layer.name.startsWith("layers.") ? layer.name : `${layer.name.replace("layers.", "layer ")}, ${layer.kind}`;
  return [
    el("b", {}, head), el("div", { className: "dim" }, `${title}: ${text(sum(stack, (value) => value))}`),
    tableOf([["part", ([part, , k]) => chip(part, k)], [title, ([, value]) => text(value), true]], rows),
  ];
}

const chip = (part, index) => el("span", { className: "chip" }, el("i", { className: `part part${index}` }), part);

function showTip(content, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
}

function drawCharts(graph) {
  byId("charts").replaceChildren(
    drawChart(graph, "bytes", "Bytes moved", bytesText), drawChart(graph, "flops", "FLOPs", flopsText));
}

function drawLegend(graph) {
  const nodes = graph.layers.flatMap((layer) => graph.blocks[layer.block].nodes);
  const all = { bytes: partSums(nodes, "bytes", view.context), flops: partSums(nodes, "flops", view.context) };
  const launches = report.parts.map((part) => sum(nodes.filter((node) => node.part === part), (node) => at(node.launches, view.context) || 0));
  const share = (list, i) => `${((100 * list[i]) / (sum(list, (value) => value) || 1)).toFixed(1)} %`;
  const rows = report.parts.map((_, i) => i).filter((i) => all.bytes[i] || all.flops[i]);
  const tick = (i) => {
    const box = el("input", { type: "checkbox", checked: !view.hidden.has(i) });
    box.addEventListener("change", () => {
      if (box.checked) view.hidden.delete(i); else view.hidden.add(i);
      drawCharts(graph);
    });
    return el("label", {}, box, ...chip(report.parts[i], i).childNodes);
  };
  const table = tableOf([
    ["Part", tick], ["Bytes", (i) => bytesText(all.bytes[i]), true], ["", (i) => share(all.bytes, i), true],
    ["FLOPs", (i) => flopsText(all.flops[i]), true], ["", (i) => share(all.flops, i), true],
    ["Launches", (i) => countText(launches[i]), true],
  ], rows);
  byId("legend").replaceChildren(...table.childNodes);
}
