// Two charts that share the columns of the table: risk by hour above it, raw values of one variable below it.

import { $, counted, drawn, element, number, percent, range, replace, unit } from "./dom.js";
import { largest, palette, place } from "./colours.js";

const HEIGHT = { curve: 190, values: 110 }, PAD = 14;

const frame = (id, gutter, plot, after) =>
  replace($(id), element("div", { class: "gutter axis" }, ...gutter), plot, element("div", { class: "sum" }, ...after));

const label = (text, y, kind = "") => {
  const made = element("span", { class: `tick ${kind}` }, text);
  made.style.top = `${y}px`;
  return made;
};

// Stripes for hours that have no prediction, as for cells that were not measured.
function hatching() {
  const stripe = drawn("path", { class: "stripe", d: "M-1,6 L6,-1 M4,6 L6,4" });
  return drawn("defs", {}, drawn("pattern", { id: "hatching", width: 5, height: 5, patternUnits: "userSpaceOnUse" }, stripe));
}

function ticks(low, high, count = 5) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(10)));
  return found;
}

// A prediction of the first n hours stands where hour n begins, at the right of the last column that it used. The curve may
// have begun only.
export function drawCurve(patient, width) {
  const { curve: points, base } = patient, height = HEIGHT.curve;
  const most = Math.max(...points.map((each) => each.high ?? each.probability ?? 0), base ?? 0, 0.02);
  const top = Math.min(1, most * 1.12), y = (p) => height - PAD - (p / top) * (height - 2 * PAD);
  const x = (hour) => hour * width, across = width * patient.hours;
  const known = points.filter((each) => each.probability !== null && each.probability !== undefined);
  const line = (part, key) => part.map((each) => `${x(each.hour).toFixed(1)},${y(each[key]).toFixed(1)}`);
  const banded = known.filter((each) => each.low !== null && each.low !== undefined);
  const plot = drawn("svg", { width: across, height, class: "plot", viewBox: `0 0 ${across} ${height}`, "aria-hidden": true });
  const missing = points.filter((each) => !known.includes(each));
  if (missing.length) plot.append(hatching());
  for (const { hour } of missing)
    plot.append(drawn("rect", { class: "gap", x: x(hour - 1), y: y(top), width, height: y(0) - y(top) }));
  for (const at of ticks(0, top)) plot.append(drawn("line", { class: "rule", x1: 0, x2: across, y1: y(at), y2: y(at) }));
  if (banded.length > 1)
    plot.append(drawn("polygon", { class: "band", points: [...line(banded, "high"), ...line(banded, "low").reverse()].join(" ") }));
  if (base !== null) plot.append(drawn("line", { class: "base", x1: 0, x2: across, y1: y(base), y2: y(base) }));
  if (known.length) plot.append(drawn("polyline", { class: "line", points: line(known, "probability").join(" ") }));
  for (const each of known)
    plot.append(drawn("circle", { class: "point", "data-hour": each.hour, cx: x(each.hour), cy: y(each.probability), r: 3 }));
  const axis = ticks(0, top).map((at) => label(percent(at).replace(".0 ", " "), y(at)));
  frame("curve", [element("span", { class: "name" }, "Risk by hour"), ...axis], plot, base === null ? [] : [label(`base rate\n${percent(base)}`, y(base), "base")]);
}

export function curveWords(patient, hour) {
  const point = patient.curve.find((each) => each.hour === hour);
  if (!point) return "";
  if (point.probability === null || point.probability === undefined) return `after ${counted(hour, "hour")}: not enough data`;
  const band = point.low === null || point.low === undefined ? "" : ` (${range(point.low, point.high)})`;
  return `after ${counted(hour, "hour")}: ${percent(point.probability)}${band}`;
}

// The measurements of one variable, coloured as in the table.
export function drawValues(patient, map, variable, width) {
  const { name, unit: ucum, low, high } = patient.variables[variable], height = HEIGHT.values;
  const found = patient.cells[variable].map((cell, hour) => ({ hour, cell })).filter((each) => each.cell?.measured);
  const values = found.map((each) => each.cell.value);
  let [from, to] = [Math.min(...values), Math.max(...values)];
  if (!found.length) [from, to] = [low ?? 0, high ?? 1];
  const room = (to - from || Math.abs(to) || 1) * 0.15;
  [from, to] = [from - room, to + room];
  const y = (value) => height - PAD - ((value - from) / (to - from)) * (height - 2 * PAD), x = (hour) => (hour + 0.5) * width;
  const across = width * patient.hours, colour = palette(), most = largest(map);
  const plot = drawn("svg", { width: across, height, class: "plot", viewBox: `0 0 ${across} ${height}`, "aria-hidden": true });
  const marks = ticks(from, to, 3);
  for (const at of marks) plot.append(drawn("line", { class: "rule", x1: 0, x2: across, y1: y(at), y2: y(at) }));
  plot.append(drawn("polyline", { class: "values", points: found.map((each) => `${x(each.hour)},${y(each.cell.value)}`).join(" ") }));
  for (const { hour, cell } of found) {
    const dot = drawn("circle", { class: cell.flag ? "dot flagged" : "dot", cx: x(hour), cy: y(cell.value), r: 4.5 });
    dot.style.fill = colour(place(map.values[variable][hour], most), map.signed);
    plot.append(dot);
  }
  const title = element("span", { class: "name" }, name, element("small", {}, unit(ucum)));
  frame("values", [title, ...marks.map((at) => label(number(at), y(at)))], plot, []);
}
