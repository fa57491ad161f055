// Charts: each is a figure with a canvas that is read with a pointer or with arrow keys, a line
// that says what is pointed at, and a table of the same numbers.

const redraws = [];

/**
 * Adds a figure. `chart` has a title, a text, a height, `draw(context, width, height, at)`, and
 * what can be pointed at: `rows`, `columns`, `find(x, y, width, height)` and `say(row, column)`;
 * `table()` gives a line of heads and lines of cells.
 */
function addFigure(parent, chart) {
  const canvas = element("canvas", { tabindex: "0", role: "img" });
  const read = element("p", { class: "read", "aria-live": "polite" });
  const details = element("details", {}, element("summary", {}, "Table"));
  const png = element("button", { type: "button", "aria-label": `${chart.title} as PNG` }, "PNG");
  const figure = element(
    "figure", {}, element("h3", {}, chart.title), canvas, read,
    element("figcaption", {}, chart.text || ""), element("div", { class: "below" }, png, details),
  );
  if (chart.legend) figure.insertBefore(chart.legend, canvas);
  parent.append(figure);
  let at = null;

  function draw() {
    canvas.setAttribute("aria-label", `${chart.title}. ${chart.text || ""} Arrow keys read values.`);
    const { context, width, height } = prepared(canvas, chart.height());
    chart.draw(context, width, height, at);
  }
  function point(next) {
    at = next;
    read.textContent = at === null ? "" : chart.say(at.row, at.column);
    draw();
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    point(chart.find(event.clientX - box.left, event.clientY - box.top, box.width, box.height));
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const from = at || { row: 0, column: 0 };
    const rows = chart.rows(), columns = chart.columns();
    let next = null;
    if (moves[event.key] && at) {
      const [down, right] = moves[event.key];
      next = {
        row: Math.min(Math.max(from.row + down, 0), rows - 1),
        column: Math.min(Math.max(from.column + right, 0), columns - 1),
      };
    } else if (moves[event.key] || event.key === "Home") next = { row: from.row, column: 0 };
    else if (event.key === "End") next = { row: from.row, column: columns - 1 };
    else if (event.key === "Escape") { point(null); return; }
    if (next === null) return;
    event.preventDefault();
    point(next);
  });
  // Made when it is opened: some have thousands of cells.
  function fill() {
    details.querySelector(".scroll")?.remove();
    if (details.open) details.append(tableOf(chart.table(), chart.title));
  }
  details.addEventListener("toggle", fill);
  png.addEventListener("click", () => canvas.toBlob((blob) => save("figure.png", "image/png", [blob])));
  // Not at once: a figure that is added beside it makes its place narrower.
  redraws.push(() => { fill(); point(null); });
}

/** Makes a table; the first line has the heads, and the first cells name their lines. */
function tableOf(lines, title) {
  const body = element("tbody");
  for (const line of lines.slice(1)) {
    const cells = line.map((cell, place) =>
      element(place ? "td" : "th", place ? {} : { scope: "row" }, String(cell)));
    body.append(element("tr", {}, ...cells));
  }
  const heads = lines[0].map((cell) => element("th", { scope: "col" }, String(cell)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, table);
}

/** Makes a legend of names and colours. */
function legendOf(names, colours) {
  return element("ul", { class: "legend" }, ...names.map((name, at) =>
    element("li", {}, element("span", { style: `background:${colours[at]}` }), name)));
}

/**
 * A raster of rows × columns. `values()` gives rows of numbers, `scale()` their colours; every
 * `border()` rows there is a line, as between nodes.
 */
function raster(options) {
  const left = 78, right = 58, top = 4, bottom = 20;
  const size = (width, height, rows, columns) => ({
    cell: (width - left - right) / columns, row: (height - top - bottom) / rows,
  });
  return {
    title: options.title,
    text: options.text,
    rows: () => options.values().length,
    columns: () => options.columnNames().length,
    height: () => top + bottom + Math.min(380, Math.max(88, options.values().length * 14)),
    say: (row, column) => `${options.rowName(row)}, ${options.columnNames()[column]}: `
      + options.format(options.values()[row][column]),
    find(x, y, width, height) {
      const rows = this.rows(), columns = this.columns();
      const { cell, row } = size(width, height, rows, columns);
      const found = { row: Math.floor((y - top) / row), column: Math.floor((x - left) / cell) };
      const inside = found.row >= 0 && found.row < rows && found.column >= 0 && found.column < columns;
      return inside ? found : null;
    },
    draw(context, width, height, at) {
      const values = options.values(), names = options.columnNames();
      const rows = values.length, columns = names.length, scale = options.scale();
      const { cell, row } = size(width, height, rows, columns);
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          const value = values[r][c];
          if (value === null) continue;
          context.fillStyle = scale.of(value);
          context.fillRect(left + c * cell, top + r * row, cell + 0.6, row + (row > 4 ? -0.5 : 0.6));
        }
      }
      context.fillStyle = context.strokeStyle = colour("soft");
      context.textAlign = "right";
      context.textBaseline = "middle";
      const stride = Math.ceil(14 / row);
      for (let r = 0; r < rows; r += stride) {
        context.fillText(options.rowName(r), left - 6, top + (r + 0.5) * row, left - 8);
      }
      const border = options.border ? options.border() : 0;
      if (border && border < rows) {
        context.strokeStyle = colour("ink");
        context.beginPath();
        for (let r = border; r < rows; r += border) {
          context.moveTo(left - 8, top + r * row);
          context.lineTo(width - right, top + r * row);
        }
        context.stroke();
      }
      context.textBaseline = "top";
      context.textAlign = "left";
      context.fillText(names[0], left, height - bottom + 5);
      if (columns > 1) {
        context.textAlign = "right";
        context.fillText(names[columns - 1], width - right, height - bottom + 5);
      }
      scaleBar(context, scale, width - right + 12, top, Math.max(50, height - top - bottom));
      if (at) {
        context.strokeStyle = colour("focus");
        context.lineWidth = 2;
        context.strokeRect(left + at.column * cell - 1, top + at.row * row - 1, cell + 2, row + 2);
        context.lineWidth = 1;
      }
    },
    table: () => [
      [options.rowHead, ...options.columnNames()],
      ...options.values().map((line, r) => [options.rowName(r), ...line.map(options.format)]),
    ],
  };
}

function scaleBar(context, scale, x, y, height) {
  for (let at = 0; at < height; at++) {
    context.fillStyle = scale.of(scale.high - (at / height) * (scale.high - scale.low));
    context.fillRect(x, y + at, 10, 1.5);
  }
  context.fillStyle = colour("soft");
  context.textAlign = "left";
  context.textBaseline = "top";
  context.fillText(shown(scale.high), x + 13, y);
  context.textBaseline = "bottom";
  context.fillText(shown(scale.low), x + 13, y + height);
}
