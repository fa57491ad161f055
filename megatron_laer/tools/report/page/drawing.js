"use strict";
// Elements, numbers, colours and canvases: what all figures share. Text from the data only ever
// becomes text nodes.

/** Makes an element with attributes and children, which are elements or texts. */
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Writes a number with as many digits as one reads; a dash for what is not there. */
function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

/** Writes milliseconds. */
function shownMs(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10000 ? `${shown(value / 1000)} s` : `${shown(value)} ms`;
}

/** Returns lists of bytes in a unit that fits the largest, and what writes them. */
function inBytes(lists) {
  const high = largest(lists, 0);
  const units = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["bytes", 1]];
  const [unit, size] = units.find(([, least]) => high >= least) || ["bytes", 1];
  return {
    lines: lists.map((values) => values.map((v) => (v === null ? null : v / size))),
    format: (value) => `${shown(value)} ${unit}`,
  };
}

function isDark() {
  return document.documentElement.dataset.theme === "dark";
}

/** Returns a colour of the page's style. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Told apart also by those who see few colours; the same in both themes.
const KIND_COLOURS = ["#8c96a0", "#3b82c4", "#2a9d74", "#7fb8de", "#d55e00", "#e69f00", "#b05fa0"];

function mixed(stops, at) {
  const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const rest = place - below;
  const part = (index) =>
    Math.round(stops[below][index] * (1 - rest) + stops[below + 1][index] * rest);
  return `rgb(${part(0)},${part(1)},${part(2)})`;
}

const RISING = {
  light: [[240, 244, 248], [253, 208, 162], [230, 110, 40], [127, 25, 20]],
  dark: [[32, 39, 46], [110, 60, 30], [225, 110, 45], [255, 225, 170]],
};
const AROUND = {
  light: [[33, 102, 172], [146, 197, 222], [246, 246, 246], [244, 165, 130], [178, 24, 43]],
  dark: [[110, 180, 250], [50, 90, 140], [34, 40, 46], [160, 70, 50], [255, 140, 110]],
};

/** Returns a scale for values from `low` on: calm there, and loud at `high`. */
function risingScale(low, high) {
  const span = high > low ? high - low : 1;
  return { low, high, of: (v) => mixed(RISING[isDark() ? "dark" : "light"], (v - low) / span) };
}

/** Returns a scale for values around 1: one colour below, another above. */
function aroundOne(reach) {
  const low = Math.max(0, 1 - reach), high = 1 + reach;
  return {
    low, high,
    of: (v) => mixed(AROUND[isDark() ? "dark" : "light"],
      v < 1 ? 0.5 - (0.5 * (1 - v)) / (1 - low) : 0.5 + (0.5 * (v - 1)) / (high - 1)),
  };
}

/** Returns the largest number of nested lists, or `least`. */
function largest(values, least) {
  let found = least;
  for (const value of values.flat(Infinity)) if (value !== null && value > found) found = value;
  return found;
}

/** Returns the number that a share of the others does not exceed. */
function quantile(values, share) {
  const there = values.flat(Infinity).filter((v) => v !== null).sort((a, b) => a - b);
  return there.length ? there[Math.min(there.length - 1, Math.floor(share * there.length))] : 0;
}

/** Makes a canvas as sharp as the screen; returns its context and its size in CSS pixels. */
function prepared(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth || 600;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = colour("page");
  context.fillRect(0, 0, width, height);
  context.font = "12px system-ui, sans-serif";
  return { context, width, height };
}

/** Lets the browser save a file. */
function save(name, type, parts) {
  const link = element("a", { href: URL.createObjectURL(new Blob(parts, { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Returns numbers with even steps between them for an axis from 0 or `low` to `high`. */
function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw) || raw;
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return found;
}
