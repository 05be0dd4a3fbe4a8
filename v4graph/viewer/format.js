// Numbers and text as the page shows them, and elements without markup in strings.
const scaled = (value, units, step) => {
  let i = 0;
  while (value >= step && i < units.length - 1) { value /= step; i += 1; }
  return `${value.toFixed(i === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2)} ${units[i]}`;
};
const bytesText = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB"], 1000);
const flopsText = (value) => scaled(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], 1000);
const countText = (value) => value.toLocaleString("en-US");
const launchText = (value) => (value === null ? "?" : countText(value));
const tokensText = (value) => {
  if (value >= 1048576 && value % 1048576 === 0) return `${value / 1048576}M`;
  return value >= 1024 && value % 1024 === 0 ? `${value / 1024}K` : countText(value);
};
// A figure is one value, or one for each context.
const at = (value, i) => (Array.isArray(value) ? value[i] : value);
const sum = (list, of) => list.reduce((total, item) => total + of(item), 0);

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, properties = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(properties)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

const byId = (id) => document.getElementById(id);
const pair = (name, ...value) => el("div", {}, el("dt", {}, name), el("dd", {}, ...value));

// `columns`: [title, text of a row, is a number].
function tableOf(columns, rows) {
  const head = el("tr", {}, ...columns.map(([title, , number]) => el("th", { className: number ? "n" : "" }, title)));
  const body = rows.map((row) =>
    el("tr", {}, ...columns.map(([, text, number]) => el("td", { className: number ? "n" : "" }, text(row)))));
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body));
}
