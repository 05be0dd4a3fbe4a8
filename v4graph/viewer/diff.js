// Two graphs: totals before and after, and the aligned ops of each group of layers that changed alike.
const SIGNS = { same: " ", changed: "~", added: "+", removed: "−" };

function changeOf(before, after, text) {
  if (before === after) return el("span", { className: "dim" }, "same");
  const sign = after < before ? "−" : "+";
  const percent = before ? ` (${sign}${Math.abs(((after - before) / before) * 100).toFixed(1)} %)` : "";
  return el("span", { className: after < before ? "down" : "up" }, `${sign}${text(Math.abs(after - before))}${percent}`);
}

function diffTotals(left, right) {
  const rows = [
    ["Nodes", "nodes", countText], ["Custom ops", "custom", countText], ["Launches", "launches", countText],
    ["Bytes", "bytes", bytesText], ["FLOPs", "flops", flopsText],
  ];
  const figure = (graph, key) => graph.totals[view.context][key];
  const table = tableOf([
    ["One step", ([title]) => title], ["Before", ([, key, text]) => text(figure(left, key)), true],
    ["After", ([, key, text]) => text(figure(right, key)), true],
    ["Change", ([, key, text]) => changeOf(figure(left, key), figure(right, key), text), true],
  ], rows);
  table.className = "totals";
  return table;
}

function diffRow(left, right, [tag, i, j, changes]) {
  const node = j === null ? left[i] : right[j];
  const figure = (key, text) => {
    const [a, b] = [i === null ? null : at(left[i][key], view.context), j === null ? null : at(right[j][key], view.context)];
    if (a === null || b === null) return text(a ?? b ?? (key === "launches" ? null : 0));
    return a === b ? text(a) : `${text(a)} → ${text(b)}`;
  };
  const row = el("tr", { className: tag }, el("td", { title: tag }, SIGNS[tag]),
    el("td", { className: `mono ${node.custom ? "" : "native"}` }, node.op), el("td", { className: "mono" }, node.role || "–"),
    el("td", { className: "n" }, figure("launches", launchText)), el("td", { className: "n" }, figure("bytes", bytesText)),
    el("td", { className: "n" }, figure("flops", flopsText)), el("td", { className: "dim" }, changes.join("; ")));
  row.dataset.op = node.op;
  return row;
}

function diffRows(left, right, group) {
  const heads = ["", "Op", "Weights of", "Launches", "Bytes", "FLOPs", "What changed"];
  const head = el("tr", {}, ...heads.map((text, i) => el("th", { className: i > 2 && i < 6 ? "n" : "" }, text)));
  const body = group.rows.map((row) => diffRow(left, right, row));
  return el("table", { className: "rows" }, el("thead", {}, head), el("tbody", {}, ...body));
}

function diffGroup(group, index) {
  const nodes = (graph, block) => (block === null ? [] : graph.blocks[block].nodes);
  const [left, right] = [nodes(report.graphs[0], group.before), nodes(report.graphs[1], group.after)];
  const counts = Object.keys(SIGNS).slice(1).map((tag) => [tag, group.rows.filter((row) => row[0] === tag).length]);
  const said = counts.filter(([, n]) => n).map(([tag, n]) => `${n} ${tag}`).join(", ") || "equal";
  const [a, b] = [figuresOf(left, view.context), figuresOf(right, view.context)];
  const graph = report.graphs[group.kind === null ? 0 : 1];
  const kind = group.kind ?? group.before_kind;
  const from = group.before_kind !== kind && group.before_kind !== null ? `${group.before_kind} → ` : "";
  const arrow = (x, y, text) => (x === y ? text(x) : `${text(x)} → ${text(y)}`);
  const named = kind.replace(/^V4/, "").toLowerCase() === group.label;
  const label = el("span", {}, el("span", { className: `kind ${kindClass(graph, kind)}` }, named ? group.label : from + kind),
    `${named ? "" : ` ${group.label}`} `, el("small", {}, said));
  const summary = el("summary", {}, label, cell(group.count > 1 ? `×${group.count}` : ""),
    cell(arrow(a.nodes, b.nodes, countText), "ops"), cell(arrow(a.launches, b.launches, countText), "runs"),
    cell(arrow(a.bytes, b.bytes, bytesText)), cell(arrow(a.flops, b.flops, flopsText)));
  const details = el("details", { className: "group diff", id: `diff-${index}` }, summary);
  details.open = view.diffOpen.has(index);
  const fill = () => { if (details.childElementCount === 1) details.append(el("div", { className: "ops" }, diffRows(left, right, group))); };
  if (details.open) fill();
  details.addEventListener("toggle", () => {
    if (details.open) { view.diffOpen.add(index); fill(); } else view.diffOpen.delete(index);
  });
  return details;
}

function drawDiff() {
  if (!report.diff) return;
  byId("diff").hidden = false;
  const legend = el("p", { className: "hint" }, "+ added, − removed, ~ changed; a change counts where shapes, types, attributes or figures differ.");
  const from = el("p", {}, "From ", el("code", {}, report.graphs[0].path), " to ", el("code", {}, report.graphs[1].path), ".");
  byId("diff").lastElementChild.replaceChildren(from, diffTotals(...report.graphs), legend, ...report.diff.map(diffGroup));
}
