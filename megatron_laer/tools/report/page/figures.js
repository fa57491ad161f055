// The page's sections: each takes its part of the data, and leaves itself out where there is none.

function section(title, id) {
  const made = element("section", { id }, element("h2", {}, title));
  document.getElementById("figures").append(made);
  return made;
}

function pair(parent) {
  const made = element("div", { class: "pair" });
  parent.append(made);
  return made;
}

function binNames(bins) {
  return bins.map(([first, last]) => (first === last ? `step ${first}` : `steps ${first}–${last}`));
}

function stepRaster(data, values, scale, title, text) {
  return raster({
    title, text, scale: () => scale(),
    values: () => values, columnNames: () => binNames(data.bins), rowHead: "layer",
    rowName: (r) => data.layers[r], format: shown,
  });
}

function showBalance(data) {
  const parent = section("Balance by layer and step", "balance");
  const high = largest([data.heat.fsep, data.heat.stock], 1.01);
  const scale = () => risingScale(1, high);
  const both = pair(parent);
  const by = data.is_measured ? "as it was" : "as FSEP would have it";
  addFigure(both, stepRaster(data, data.heat.fsep, scale, `FSEP: max/mean tokens per rank, ${by}`,
    "1 is perfect balance. Both figures have one scale."));
  addFigure(both, stepRaster(data, data.heat.stock, scale, "Stock's placement, same routing",
    "What the busiest rank of stock expert parallelism would have had of the same tokens."));
  const worst = data.worst.map((cell) => [`step ${cell.step}, ${cell.layer}`, shown(cell.fsep), shown(cell.stock)]);
  parent.append(element("details", {}, element("summary", {}, "The steps and layers with the worst balance"),
    tableOf([["", "FSEP", "stock"], ...worst], "worst balance")));
}

function showTimes(data) {
  const parent = section("Where time went", "time");
  if (data.times) {
    addFigure(parent, stack({
      title: "A step's time by kind",
      text: "Of the planner rank. Combine waits for the busiest rank, so imbalance shows there. Columns that are far longer than the others are cut off.",
      legend: legendOf(data.times.kinds, KIND_COLOURS),
      names: data.times.kinds, parts: data.times.ms, colours: KIND_COLOURS,
      columnNames: binNames(data.bins),
    }));
  }
  addFigure(parent, bars({
    title: "Lost to imbalance by layer, all steps",
    text: data.is_measured
      ? "Of the measured time between a dispatch and the end of its combine, by max/mean: see the docs of the report."
      : "Of predicted layer times, by max/mean.",
    legend: legendOf(["FSEP", "stock's placement"], [KIND_COLOURS[2], KIND_COLOURS[4]]),
    names: data.layers, kinds: ["FSEP", "stock's placement"],
    values: [data.lost.fsep, data.lost.stock], colours: [KIND_COLOURS[2], KIND_COLOURS[4]],
  }));
  if (data.loss) {
    addFigure(parent, lines({
      title: "Loss", text: "From Megatron's log.", names: ["lm loss"], lines: [data.loss.loss],
      colours: [KIND_COLOURS[1]], columnNames: data.loss.steps.map((step) => `step ${step}`),
    }));
  }
}

function showRanks(data) {
  const parent = section("Ranks", "ranks");
  const nodes = "Lines are borders of nodes.";
  const kinds = [["fsep", "FSEP"], ["stock", "Stock's placement"]].filter(([kind]) => data.ranks[kind]);
  const reach = (part) => largest(kinds.map(([kind]) => data.ranks[kind][part].map((row) =>
    row.map((v) => (v === null ? 0 : Math.abs(v - 1))))), 0.01);
  const both = pair(parent);
  for (const [kind, name] of kinds) {
    addFigure(both, raster({
      title: `${name}: tokens of each rank over the mean, all layers together`,
      text: nodes, rowHead: "rank", rowName: (r) => `rank ${r}`, format: shown,
      values: () => data.ranks[kind].steps, columnNames: () => binNames(data.bins),
      scale: () => aroundOne(reach("steps")), border: () => data.node_size,
    }));
  }
  const layers = pair(parent);
  for (const [kind, name] of kinds) {
    addFigure(layers, raster({
      title: `${name}: the same by layer, all steps together`,
      text: nodes, rowHead: "rank", rowName: (r) => `rank ${r}`, format: shown,
      values: () => data.ranks[kind].layers, columnNames: () => data.layers,
      scale: () => aroundOne(reach("layers")), border: () => data.node_size,
    }));
  }
}

function chosenLayer() {
  return Number(document.getElementById("layer").value) || 0;
}

function showExperts(data) {
  if (!data.experts) return;
  const parent = section("Experts", "experts");
  // By load, so that the eye finds the hot ones; of the layer that is chosen.
  function order() {
    const share = data.experts.share[chosenLayer()];
    const load = share.map((row) => row.reduce((sum, v) => sum + (v || 0), 0));
    return load.map((_, e) => e).sort((a, b) => load[b] - load[a] || a - b);
  }
  addFigure(parent, raster({
    title: "How wanted each expert is, over an even share",
    text: "Of the chosen layer; most wanted first.",
    rowHead: "expert", rowName: (r) => `expert ${order()[r]}`, format: shown,
    values: () => order().map((e) => data.experts.share[chosenLayer()][e]),
    columnNames: () => binNames(data.experts.bins),
    scale: () => risingScale(0, largest(data.experts.share, 1)),
  }));
  const table = data.layers.map((name, l) =>
    [name, data.experts.dead[l], shown(data.experts.gini[l]), shown(data.experts.drift[l])]);
  parent.append(element("details", {}, element("summary", {}, "Experts without tokens, Gini and drift by layer"),
    tableOf([["layer", "experts without a token", "Gini coefficient", "cosine of neighbouring columns"], ...table], "experts by layer")));
}

function showReplicas(data) {
  if (!data.replicas) return;
  const parent = section("Replicas", "replicas");
  const names = binNames(data.replicas.bins);
  addFigure(parent, raster({
    title: "Slots of each expert in the planned layouts",
    text: "Of the chosen layer.", rowHead: "expert", rowName: (r) => `expert ${r}`, format: shown,
    values: () => data.replicas.number[chosenLayer()], columnNames: () => names,
    scale: () => risingScale(1, largest(data.replicas.number, 2)),
  }));
  const bytes = data.replicas.slot_bytes;
  const slots = [data.replicas.planned_slots, data.replicas.fetched_slots];
  const drawn = bytes
    ? inBytes(slots.map((numbers) => numbers.map((n) => (n === null ? null : n * bytes))))
    : { lines: slots, format: shown };
  addFigure(parent, lines({
    title: bytes ? "Weights of slots that changed, all layers" : "Slots that changed, all layers",
    text: "Planned ones change between steps, and restores bring them at no cost of their own; fetched ones changed after the gate.",
    legend: legendOf(["planned", "fetched after the gate"], [KIND_COLOURS[1], KIND_COLOURS[4]]),
    names: ["planned", "fetched after the gate"],
    ...drawn,
    colours: [KIND_COLOURS[1], KIND_COLOURS[4]], columnNames: names, fromZero: true,
  }));
}

function showGuard(data) {
  const guard = data.guard;
  const parent = section("The guard, and the cost model", "guard");
  const share = guard.fresh_share === null ? "–" : `${(100 * guard.fresh_share).toFixed(1)} %`;
  parent.append(element("p", {}, `${share} of microbatches got a layout of their own.`));
  const both = pair(parent);
  if (guard.gain_ms.length) {
    addFigure(both, points({
      title: "Decisions: predicted gain against predicted cost",
      text: "A point is a layer in a step, mean of its microbatches. Above the line a fresh layout pays.",
      legend: legendOf(["kept the forecast", "took a fresh layout"], [KIND_COLOURS[1], KIND_COLOURS[4]]),
      x: guard.cost_ms, y: guard.gain_ms, loud: guard.fresh, xName: "cost, ms", yName: "gain, ms",
      sayPoint: (n) => `gain ${shownMs(guard.gain_ms[n])}, cost ${shownMs(guard.cost_ms[n])}, fresh ${shown(100 * guard.fresh[n])} %`,
    }));
  }
  if (guard.taken_cost_ms && guard.taken_cost_ms.length) {
    addFigure(both, points({
      title: "Fresh layouts: predicted against measured cost",
      text: "Measured: the host's decision, and what compute waited for changed slots. On the line both are equal.",
      x: guard.taken_cost_ms, y: guard.change_ms, xName: "predicted, ms", yName: "measured, ms",
      sayPoint: (n) => `predicted ${shownMs(guard.taken_cost_ms[n])}, measured ${shownMs(guard.change_ms[n])}`,
    }));
  }
  if (data.calibration && data.calibration.predicted_ms.length) {
    const of = data.calibration;
    addFigure(both, points({
      title: "Layer times: predicted against measured",
      text: `A point is a layer in a step. Measured times are ${shown(of.factor)} times the predicted ones (median); far from 1, the cluster's constants are not this machine's.`,
      x: of.predicted_ms, y: of.layer_ms, xName: "predicted, ms", yName: "measured, ms",
      sayPoint: (n) => `predicted ${shownMs(of.predicted_ms[n])}, measured ${shownMs(of.layer_ms[n])}`,
    }));
  }
}

function showMemory(data) {
  const parent = section("Memory", "memory");
  const both = pair(parent);
  const names = binNames(data.bins);
  addFigure(both, lines({
    title: "Tokens of the busiest rank, and the bound",
    text: "Of a step's worst layer and microbatch. What a rank's activations need grows with them.",
    legend: legendOf(["busiest rank", "perfect balance"], [KIND_COLOURS[4], KIND_COLOURS[2]]),
    names: ["busiest rank", "perfect balance"], fromZero: true,
    lines: [data.memory.largest_tokens, data.memory.least_tokens],
    colours: [KIND_COLOURS[4], KIND_COLOURS[2]], columnNames: names,
  }));
  if (data.memory.used_bytes) {
    addFigure(both, lines({
      title: "Memory of the planner rank", text: "Peak of what was reserved, and what is beyond; on the CPU what is resident, and what is free.",
      legend: legendOf(["used", "headroom"], [KIND_COLOURS[1], KIND_COLOURS[2]]),
      names: ["used", "headroom"],
      ...inBytes([data.memory.used_bytes, data.memory.headroom_bytes]),
      colours: [KIND_COLOURS[1], KIND_COLOURS[2]], columnNames: names, fromZero: true,
    }));
  }
}

/** Means over layers of a raster of layers and columns, by column. */
function columnMeans(rows) {
  return rows[0].map((_, c) => {
    const there = rows.map((row) => row[c]).filter((v) => v !== null);
    return there.length ? there.reduce((a, b) => a + b) / there.length : null;
  });
}

function showComparison(data) {
  const other = data.other;
  if (!other) return;
  const parent = section(`Beside ${other.name}`, "comparison");
  const runs = [data, other];
  const means = runs.map((run) => [columnMeans(run.heat.fsep), columnMeans(run.heat.stock)]);
  const balance = pair(parent);
  runs.forEach((run, at) => addFigure(balance, lines({
    title: `${run.name}: max/mean, mean of layers`, text: "Both figures have one scale.",
    legend: legendOf(["FSEP", "stock's placement"], [KIND_COLOURS[2], KIND_COLOURS[4]]),
    names: ["FSEP", "stock's placement"], colours: [KIND_COLOURS[2], KIND_COLOURS[4]],
    lines: means[at], columnNames: binNames(run.bins), high: largest(means, 1) * 1.02,
  })));
  if (!data.times || !other.times) return;
  const high = Math.max(...runs.map((run) => stackHeight(run.times.ms)));
  const times = pair(parent);
  for (const run of runs) {
    addFigure(times, stack({
      title: `${run.name}: a step's time by kind`, text: "Both figures have one scale.",
      legend: legendOf(run.times.kinds, KIND_COLOURS), names: run.times.kinds,
      parts: run.times.ms, colours: KIND_COLOURS, columnNames: binNames(run.bins), high,
    }));
  }
}
