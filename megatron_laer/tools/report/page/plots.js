// Charts with axes, and bars: what `addFigure` is given beside rasters.

const PLOT = { left: 58, right: 12, top: 8, bottom: 34 };

function plotFrame(context, width, height, axes) {
  const { left, right, top, bottom } = PLOT;
  const x = (v) => left + ((v - axes.x[0]) / (axes.x[1] - axes.x[0] || 1)) * (width - left - right);
  const y = (v) => height - bottom - ((v - axes.y[0]) / (axes.y[1] - axes.y[0] || 1)) * (height - top - bottom);
  context.strokeStyle = colour("line");
  context.fillStyle = colour("soft");
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const tick of ticks(axes.y[0], axes.y[1], 4)) {
    context.beginPath();
    context.moveTo(left, y(tick));
    context.lineTo(width - right, y(tick));
    context.stroke();
    context.fillText(axes.format ? axes.format(tick) : shown(tick), left - 6, y(tick), left - 8);
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  if (axes.names) {
    context.textAlign = "left";
    context.fillText(axes.names[0], left, height - bottom + 4);
    context.textAlign = "right";
    if (axes.names.length > 1) context.fillText(axes.names.at(-1), width - right, height - bottom + 4);
  } else {
    for (const tick of ticks(axes.x[0], axes.x[1], 6)) context.fillText(shown(tick), x(tick), height - bottom + 4);
  }
  context.textAlign = "center";
  context.fillText(axes.label || "", (left + width - right) / 2, height - bottom + 18);
  return { x, y };
}

/** Returns the height that stacked bars need; a step that warms up may stick out of it. */
function stackHeight(parts) {
  const sums = parts[0].map((_, c) => parts.reduce((sum, part) => sum + (part[c] || 0), 0));
  return Math.min(largest(sums, 0), 1.6 * quantile(sums, 0.95)) || 1;
}

/** Stacked bars: `parts` of numbers for each column, in colours. */
function stack(options) {
  const columns = options.columnNames.length;
  const sums = options.columnNames.map((_, c) =>
    options.parts.reduce((sum, part) => sum + (part[c] || 0), 0));
  const high = options.high || stackHeight(options.parts);
  const place = (x, width) => Math.floor(((x - PLOT.left) / (width - PLOT.left - PLOT.right)) * columns);
  return {
    ...options,
    rows: () => 1,
    columns: () => columns,
    height: () => 240,
    say: (row, column) => `${options.columnNames[column]}: ${shownMs(sums[column])}; `
      + options.names.map((name, k) => `${name} ${shownMs(options.parts[k][column])}`).join(", "),
    find: (x, y, width) => {
      const column = place(x, width);
      return column >= 0 && column < columns ? { row: 0, column } : null;
    },
    draw(context, width, height, at) {
      const { x, y } = plotFrame(context, width, height, {
        x: [0, columns], y: [0, high], names: options.columnNames, format: shownMs,
      });
      for (let c = 0; c < columns; c++) {
        let below = 0;
        options.parts.forEach((part, k) => {
          const value = Math.min(part[c] || 0, high - below);
          context.fillStyle = options.colours[k];
          context.fillRect(x(c), y(below + value), x(c + 1) - x(c) + (columns > 120 ? 0.5 : -1), y(below) - y(below + value));
          below += value;
        });
      }
      if (at) {
        context.strokeStyle = colour("focus");
        context.lineWidth = 2;
        context.strokeRect(x(at.column), y(high), x(at.column + 1) - x(at.column), y(0) - y(high));
        context.lineWidth = 1;
      }
    },
    table: () => [
      ["steps", ...options.names, "sum"],
      ...options.columnNames.map((name, c) =>
        [name, ...options.parts.map((part) => shownMs(part[c])), shownMs(sums[c])]),
    ],
  };
}

/** Lines over the same columns, by name. */
function lines(options) {
  const columns = options.columnNames.length;
  const high = options.high || largest(options.lines, 0) * 1.05 || 1;
  const there = options.lines.flat().filter((v) => v !== null);
  const low = options.fromZero || !there.length ? 0 : Math.min(...there);
  const format = options.format || shown;
  return {
    ...options,
    rows: () => options.lines.length,
    columns: () => columns,
    height: () => 200,
    say: (row, column) => `${options.columnNames[column]}: `
      + options.names.map((name, k) => `${name} ${format(options.lines[k][column])}`).join(", "),
    find: (x, y, width) => {
      const column = Math.round(((x - PLOT.left) / (width - PLOT.left - PLOT.right)) * (columns - 1));
      return column >= 0 && column < columns ? { row: 0, column } : null;
    },
    draw(context, width, height, at) {
      const { x, y } = plotFrame(context, width, height, {
        x: [0, Math.max(1, columns - 1)], y: [low, high], names: options.columnNames, format,
      });
      options.lines.forEach((line, k) => {
        context.strokeStyle = context.fillStyle = options.colours[k];
        context.lineWidth = 1.8;
        context.setLineDash(k % 2 ? [6, 3] : []);
        context.beginPath();
        let isDown = false;
        line.forEach((value, c) => {
          if (value === null) { isDown = false; return; }
          if (isDown) context.lineTo(x(c), y(value));
          else context.moveTo(x(c), y(value));
          isDown = true;
        });
        context.stroke();
        if (columns === 1 && line[0] !== null) context.fillRect(x(0) - 2, y(line[0]) - 2, 5, 5);
      });
      context.setLineDash([]);
      context.lineWidth = 1;
      if (at) {
        context.strokeStyle = colour("focus");
        context.beginPath();
        context.moveTo(x(at.column), y(low));
        context.lineTo(x(at.column), y(high));
        context.stroke();
      }
    },
    table: () => [
      ["steps", ...options.names],
      ...options.columnNames.map((name, c) => [name, ...options.lines.map((line) => format(line[c]))]),
    ],
  };
}

/** Points with a line where both numbers are equal; `loud` chooses a colour from 0 to 1. */
function points(options) {
  const number = options.x.length;
  const high = [quantile(options.x, 0.99) * 1.15 || 1, quantile(options.y, 0.99) * 1.15 || 1];
  const low = Math.min(0, quantile(options.y, 0.01));
  const order = options.x.map((_, at) => at).sort((a, b) => options.x[a] - options.x[b]);
  let frame = null;
  return {
    ...options,
    rows: () => 1,
    columns: () => number,
    height: () => 260,
    say: (row, column) => options.sayPoint(order[column]),
    find: (px, py) => {
      if (frame === null) return null;
      let best = null, nearest = 144;
      order.forEach((at, column) => {
        const distance = (frame.x(options.x[at]) - px) ** 2 + (frame.y(options.y[at]) - py) ** 2;
        if (distance < nearest) { nearest = distance; best = { row: 0, column }; }
      });
      return best;
    },
    draw(context, width, height, at) {
      frame = plotFrame(context, width, height, {
        x: [0, high[0]], y: [low, high[1]], label: `${options.xName} → (upwards: ${options.yName})`,
      });
      const { x, y } = frame;
      context.strokeStyle = colour("soft");
      context.setLineDash([4, 4]);
      context.beginPath();
      context.moveTo(x(0), y(0));
      const end = Math.min(...high);
      context.lineTo(x(end), y(end));
      context.stroke();
      context.setLineDash([]);
      for (let n = 0; n < number; n++) {
        if (options.x[n] > high[0] || options.y[n] > high[1] || options.y[n] < low) continue;
        context.fillStyle = KIND_COLOURS[options.loud && options.loud[n] > 0 ? 4 : 1];
        context.globalAlpha = 0.55;
        context.beginPath();
        context.arc(x(options.x[n]), y(options.y[n]), 2.6, 0, 7);
        context.fill();
      }
      context.globalAlpha = 1;
      if (at) {
        context.strokeStyle = colour("focus");
        context.beginPath();
        context.arc(x(options.x[order[at.column]]), y(options.y[order[at.column]]), 6, 0, 7);
        context.stroke();
      }
    },
    table: () => [
      ["", options.xName, options.yName],
      ...order.slice(0, 500).map((at, n) => [n + 1, shown(options.x[at]), shown(options.y[at])]),
    ],
  };
}

/** Horizontal bars, in pairs, by name. */
function bars(options) {
  const left = 78, row = 20, top = 4, bottom = 18;
  const rows = options.names.length;
  const high = largest(options.values, 0) || 1;
  return {
    ...options,
    rows: () => rows,
    columns: () => 1,
    height: () => top + bottom + row * rows,
    say: (at) => `${options.names[at]}: `
      + options.kinds.map((kind, k) => `${kind} ${shownMs(options.values[k][at])}`).join(", "),
    find: (x, y) => {
      const at = Math.floor((y - top) / row);
      return at >= 0 && at < rows ? { row: at, column: 0 } : null;
    },
    draw(context, width, height, at) {
      const x = (v) => left + (v / high) * (width - left - 70);
      context.textBaseline = "middle";
      options.names.forEach((name, r) => {
        const y = top + r * row;
        context.fillStyle = colour("soft");
        context.textAlign = "right";
        context.fillText(name, left - 6, y + row / 2, left - 8);
        options.values.forEach((values, k) => {
          const thick = (row - 5) / options.values.length;
          context.fillStyle = options.colours[k];
          context.fillRect(left, y + 2 + k * thick, Math.max(1, x(values[r]) - left), thick - 0.5);
        });
        context.fillStyle = colour("ink");
        context.textAlign = "left";
        const longest = Math.max(...options.values.map((values) => values[r]));
        context.fillText(shownMs(longest), x(longest) + 5, y + row / 2);
        if (at && at.row === r) {
          context.strokeStyle = colour("focus");
          context.strokeRect(1, y, width - 2, row);
        }
      });
    },
    table: () => [["", ...options.kinds], ...options.names.map((name, r) => [name, ...options.values.map((v) => shownMs(v[r]))])],
  };
}
