// Fills the page from the report, and again where the context or the graph changes.
const report = JSON.parse(byId("data").textContent);
const view = { graph: report.graphs.length - 1, context: report.chosen, hidden: new Set(), diffOpen: new Set() };
const current = () => report.graphs[view.graph];

function drawHeader(graph) {
  byId("title").textContent = graph.model;
  byId("subtitle").textContent = [graph.path, ...graph.facts].join(" · ");
  const kind = graph.backend ? `${graph.backend} ${graph.kind}` : graph.kind;
  const facts = [
    ["Kind", kind], ["Numerics", graph.numerics], ["Type", graph.dtype], ["Capacity", `${countText(graph.max_seq_len)} tokens`],
    ["Step", `${report.batch} × ${report.tokens} ${report.tokens === 1 ? "token" : "tokens"}`],
  ];
  byId("facts").replaceChildren(...facts.map(([name, value]) => pair(name, value)));
  byId("notes").replaceChildren(...graph.notes.map((note) => el("p", { className: "note" }, note)));
}

function drawCards(graph) {
  const context = report.contexts[view.context];
  byId("context-text").textContent = `${tokensText(context)} tokens`;
  byId("context").setAttribute("aria-valuetext", `${tokensText(context)} tokens`);
  const total = graph.totals?.[view.context];
  const state = sum(graph.states, (row) => at(row.bytes_at, view.context));
  const cards = total
    ? [["Launches", launchesOf(total)], ["Bytes moved", bytesText(total.bytes)], ["FLOPs", flopsText(total.flops)]]
    : [];
  cards.push(["State per slot", bytesText(state)]);
  byId("cards").replaceChildren(...cards.map(([name, value]) => pair(name, value)));
}

function drawStates(graph) {
  const rows = graph.states;
  const own = `At ${tokensText(graph.max_seq_len)} tokens`;
  const capacity = graph.capacities[view.context];
  const columns = [
    ["Name", (row) => el("code", {}, row.name)], ["Layers", (row) => row.layers], ["", (row) => `×${row.count}`, true],
    ["Rule", (row) => (row.ratio ? `${row.rule}, ratio ${row.ratio}` : row.rule)], ["Type", (row) => row.dtype],
    ["Rows × width", (row) => `${countText(row.rows)} × ${row.width}`, true], [own, (row) => bytesText(row.bytes), true],
  ];
  if (capacity !== graph.max_seq_len) columns.push([`At ${tokensText(report.contexts[view.context])} + ${report.tokens}`, (row) => bytesText(at(row.bytes_at, view.context)), true]);
  const table = tableOf(columns, rows);
  const totals = [bytesText(sum(rows, (row) => row.bytes))];
  if (columns.length > 7) totals.push(bytesText(sum(rows, (row) => at(row.bytes_at, view.context))));
  const foot = el("tr", {}, el("td", { colSpan: 6 }, "All states of one slot"), ...totals.map((text) => el("td", { className: "n" }, el("b", {}, text))));
  table.append(el("tfoot", {}, foot));
  byId("states").lastElementChild.replaceChildren(table);
}

function drawAbout(graph) {
  const tools = Object.entries(graph.tools).map(([name, version]) => `${name} ${version}`).join(", ");
  const build = graph.tensorrt;
  const plan = build && `${build.package} ${build.version} for ${build.targets.join(", ")}, ${countText(build.layers)} network layers`;
  const rows = [["Tools", tools], ["Passes", graph.passes.join(", ") || "none"], ["Plan", plan], ["Custom ops", Object.keys(graph.ops).join(", ")]];
  const shown = rows.filter(([, text]) => text).flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]);
  byId("about").lastElementChild.replaceChildren(...shown);
}

function drawFigures() {
  const graph = current();
  drawCards(graph);
  byId("chart").hidden = !graph.opened;
  if (graph.opened) { drawCharts(graph); drawLegend(graph); }
  drawStates(graph);
  drawDiff();
}

function drawGraph() {
  drawHeader(current());
  drawLayers(current());
  drawAbout(current());
  drawFigures();
}

function drawGraphButtons() {
  if (report.graphs.length < 2) return;
  const box = byId("graphs");
  box.hidden = false;
  const buttons = ["Before", "After"].map((text, i) => {
    const button = el("button", { type: "button", title: report.graphs[i].path }, text);
    button.addEventListener("click", () => {
      view.graph = i;
      buttons.forEach((other, k) => other.setAttribute("aria-pressed", String(k === i)));
      drawGraph();
    });
    button.setAttribute("aria-pressed", String(i === view.graph));
    return button;
  });
  box.append(...buttons);
}

function start() {
  const slider = byId("context");
  slider.max = report.contexts.length - 1;
  slider.value = report.chosen;
  byId("stops").append(...report.contexts.map((context, i) => el("option", { value: String(i), label: tokensText(context) })));
  slider.addEventListener("input", () => {
    view.context = Number(slider.value);
    drawFigures();
    refreshLayers(current());
  });
  drawGraphButtons();
  drawGraph();
}

start();
