// Starts the page: theme, layer and exports.

function csvOf(data) {
  const lines = [["first_step", "last_step", "layer", "fsep_max_over_mean", "stock_max_over_mean"]];
  data.bins.forEach(([first, last], c) => data.layers.forEach((layer, r) =>
    lines.push([first, last, layer, data.heat.fsep[r][c], data.heat.stock[r][c]])));
  // A text that a spreadsheet could take for a formula gets a quote before it.
  const cell = (value) => {
    const text = value === null ? "" : String(value);
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return lines.map((line) => line.map(cell).join(",")).join("\n") + "\n";
}

function redrawAll() {
  for (const redraw of redraws) redraw();
}

function setTheme(isNowDark) {
  document.documentElement.dataset.theme = isNowDark ? "dark" : "light";
  document.getElementById("theme").setAttribute("aria-pressed", String(isNowDark));
  redrawAll();
}

function setTables(areOpen) {
  for (const details of document.querySelectorAll("details")) details.open = areOpen;
  document.getElementById("tables").setAttribute("aria-pressed", String(areOpen));
}

function start() {
  const text = document.getElementById("data").textContent;
  const data = JSON.parse(text);
  const choice = document.getElementById("layer");
  data.layers.forEach((name, at) => choice.append(element("option", { value: at }, name)));
  if (!data.experts && !data.replicas) document.getElementById("layer-choice").hidden = true;
  for (const show of [showBalance, showTimes, showRanks, showExperts, showReplicas, showGuard, showMemory, showComparison]) show(data);
  const tables = document.getElementById("tables");
  tables.addEventListener("click", () => setTables(tables.getAttribute("aria-pressed") !== "true"));
  if (location.hash === "#tables") setTables(true);
  setTheme(location.hash === "#dark" || window.matchMedia("(prefers-color-scheme: dark)").matches);
  choice.addEventListener("change", redrawAll);
  document.getElementById("theme").addEventListener("click", () => setTheme(!isDark()));
  document.getElementById("save-json").addEventListener("click", () => save("report.json", "application/json", [text]));
  document.getElementById("save-csv").addEventListener("click", () => save("balance.csv", "text/csv", [csvOf(data)]));
  let width = window.innerWidth;
  window.addEventListener("beforeprint", redrawAll);
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; redrawAll(); }
  });
  document.body.dataset.drawn = String(redraws.length);
}

start();
