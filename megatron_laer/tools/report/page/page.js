"use strict";
// Unpacks plotly.js, draws the figures with it in the page's theme, and fills their tables. Text
// from the data only ever becomes text nodes.

const text = document.getElementById("data").textContent;
const { figures: all, layers } = JSON.parse(text);
const figures = [...document.querySelectorAll("figure")].map((node, at) =>
  ({ ...all[at], node, plot: node.querySelector(".plot") }));

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Returns plotly's template with the colours of the page's style. */
function template() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), automargin: true };
  return { layout: {
    font: { color: colour("ink"), family: "system-ui, sans-serif", size: 12 },
    paper_bgcolor: colour("page"), plot_bgcolor: colour("page"), xaxis: axis, yaxis: axis,
    margin: { l: 48, r: 12, t: 30, b: 44 },
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal" },
  } };
}

/** Runs the packed plotly.js. */
async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

function draw(figure) {
  const layout = { ...figure.layout, template: template() };
  Plotly.react(figure.plot, figure.data, layout, { responsive: true, displayModeBar: false });
}

/** Shows the same steps in all figures, after one was zoomed or reset. */
function zoomAll(change) {
  const [first, last] = [0, 1].map((end) => change[`xaxis.range[${end}]`]);
  if (first === undefined && !change["xaxis.autorange"]) return;
  for (const figure of figures.filter(({ by_steps }) => by_steps)) {
    figure.whole ??= figure.layout.xaxis.range;
    figure.layout.xaxis = { ...figure.layout.xaxis, range: first === undefined ? figure.whole : [first, last] };
    draw(figure);
  }
}

/** Returns a label of plotly's as text. */
function plain(value) {
  return String(value ?? "").replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

/** Returns a figure's shown numbers as lines of cells; the first line has the heads. */
function linesOf({ data, layout }) {
  const [first] = data;
  const title = (axis) => layout[axis].title.text;
  let lines;
  if (first.type === "heatmap") {
    const { x, y, z } = data.find((trace) => trace.visible);
    lines = [[title("yaxis"), ...x], ...z.map((row, r) => [y[r], ...row])];
  } else {
    lines = [[title("xaxis"), ...data.map(({ name }) => name)],
      ...first.x.map((step, n) => [step, ...data.map(({ y }) => y[n])])];
  }
  return lines.map((line) => line.map(plain));
}

/** Makes the table of an opened figure: some have thousands of cells. */
function fill(figure) {
  const details = figure.node.querySelector("details");
  details.querySelector(".scroll")?.remove();
  if (!details.open) return;
  const [heads, ...lines] = linesOf(figure);
  const row = (line) => element("tr", {}, ...line.map((cell, place) =>
    element(place ? "td" : "th", place ? {} : { scope: "row" }, cell)));
  const head = element("tr", {}, ...heads.map((cell) => element("th", { scope: "col" }, cell)));
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines.map(row)));
  details.append(element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": figure.title }, table));
}

/** Writes lines as CSV. A text that a spreadsheet could take for a formula gets a quote before it. */
function csvOf(lines) {
  const cell = (value) => {
    const safe = /^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return lines.map((line) => line.map(cell).join(",")).join("\n") + "\n";
}

function save(name, type, content) {
  const link = element("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  document.getElementById("theme").setAttribute("aria-pressed", String(isDark));
  if (window.Plotly) figures.forEach(draw);
}

function setTables(areOpen) {
  for (const details of document.querySelectorAll("details")) details.open = areOpen;
  document.getElementById("tables").setAttribute("aria-pressed", String(areOpen));
}

/** Returns the name of a figure's file, with the chosen layer. */
function fileOf({ title, choices }, ending) {
  const layer = choices.length ? ` ${plain(layers[Number(menu.value)])}` : "";
  return `${(title + layer).toLowerCase().replaceAll(/[^a-z0-9]+/g, "-").replaceAll(/^-|-$/g, "")}${ending}`;
}

/** Shows one layer in all figures of one. */
function chooseLayer(chosen) {
  for (const figure of figures.filter(({ choices }) => choices.length)) {
    figure.data.forEach((trace, at) => { trace.visible = at === chosen; });
    figure.node.querySelector(".layer").textContent = plain(layers[chosen]);
    draw(figure);
    fill(figure);
  }
}

function listen(figure) {
  figure.node.querySelector("details").addEventListener("toggle", () => fill(figure));
  figure.node.querySelector(".csv").addEventListener("click", () => save(fileOf(figure, ".csv"), "text/csv", csvOf(linesOf(figure))));
  figure.node.querySelector(".png").addEventListener("click", () => Plotly.downloadImage(figure.plot, { format: "png", filename: fileOf(figure, "") }));
  if (figure.by_steps) figure.plot.on("plotly_relayout", zoomAll);
}

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  });
}
const menu = document.getElementById("layer");
layers.forEach((name, at) => menu.append(element("option", { value: at }, plain(name))));
menu?.addEventListener("change", () => chooseLayer(Number(menu.value)));
const tables = document.getElementById("tables");
tables.addEventListener("click", () => setTables(tables.getAttribute("aria-pressed") !== "true"));
const theme = document.getElementById("theme");
theme.addEventListener("click", () => setTheme(theme.getAttribute("aria-pressed") !== "true"));
document.getElementById("save-json").addEventListener("click", () => save("report.json", "application/json", text));
setTheme(location.hash === "#dark" || window.matchMedia("(prefers-color-scheme: dark)").matches);
const drawn = unpack().then(() => {
  figures.forEach(draw);
  figures.forEach(listen);
  if (menu) chooseLayer(0);
  if (location.hash === "#tables") setTables(true);
  document.body.dataset.drawn = String(document.querySelectorAll(".plot .main-svg:first-child").length);
});
