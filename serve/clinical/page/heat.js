// The table of hours and variables. A cell that was not measured has no colour: the hatching of its row is seen through it.

import { $, element, logit, number, replace } from "./dom.js";
import { largest, palette, place } from "./colours.js";

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

// rows: indices of variables from top to bottom. pointed(row, hour, cell): what was hovered or focused; (null) when left.
export class Heat {
  constructor(pointed) {
    this.pointed = pointed;
    const table = $("heat");
    table.addEventListener("mouseover", (event) => this.enter(event.target));
    table.addEventListener("focusin", (event) => {
      if (event.target.matches("td[data-hour]")) this.rove(event.target);
      this.enter(event.target);
    });
    table.addEventListener("mouseleave", () => pointed(null));
    table.addEventListener("focusout", () => pointed(null));
    table.addEventListener("keydown", (event) => this.walk(event));
  }

  enter(target) {
    const cell = target.closest("td[data-hour]");
    if (!cell) return this.pointed(null);
    this.pointed(Number(cell.dataset.variable), Number(cell.dataset.hour), cell);
  }

  rove(cell) {
    $("heat").querySelector("td[tabindex='0']")?.setAttribute("tabindex", "-1");
    cell.tabIndex = 0;
  }

  walk(event) {
    const cell = event.target.closest("td[data-hour]");
    if (!cell) return;
    const rows = [...$("heat").tBodies[0].rows], row = rows.indexOf(cell.parentElement);
    const cells = (at) => [...rows[at].querySelectorAll("td[data-hour]")];
    const column = cells(row).indexOf(cell), last = cells(row).length - 1;
    let [down, across] = [row, column];
    if (STEPS[event.key]) [down, across] = [row + STEPS[event.key][0], column + STEPS[event.key][1]];
    else if (event.key === "Home") across = 0;
    else if (event.key === "End") across = last;
    else if (event.key === "PageUp") down = 0;
    else if (event.key === "PageDown") down = rows.length - 1;
    else return;
    event.preventDefault();
    if (down < 0 || down >= rows.length || across < 0 || across > last) return;
    const next = cells(down)[across];
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  draw(patient, map, rows) {
    const hours = [...Array(patient.hours).keys()];
    const step = patient.hours > 72 ? 12 : 6;
    const head = element(
      "tr",
      {},
      element("th", { scope: "col", class: "gutter" }, "hour"),
      ...hours.map((hour) => element("th", { scope: "col", "data-hour": hour }, hour % step ? "" : String(hour))),
      element("th", { scope: "col", class: "sum" }, map.signed ? "sum" : "share"),
    );
    const body = rows.map((variable) => this.row(patient, variable, hours));
    replace($("heat"), element("thead", {}, head), element("tbody", {}, ...body));
    $("heat").querySelector("td[data-hour]")?.setAttribute("tabindex", "0");
    this.colour(patient, map);
  }

  row(patient, variable, hours) {
    const { name, meaning } = patient.variables[variable];
    const cells = hours.map((hour) => {
      const found = patient.cells[variable][hour];
      const kind = [found?.measured ? "measured" : "unmeasured", found?.flag ? "flagged" : ""].join(" ").trim();
      return element("td", { class: kind, tabindex: -1, "data-variable": variable, "data-hour": hour });
    });
    const sum = element("td", { class: "sum" }, element("span", { class: "room" }, element("span", { class: "bar" })), element("span", { class: "amount" }));
    const title = element("th", { scope: "row", class: "gutter", title: meaning }, name);
    return element("tr", { "data-variable": variable }, title, ...cells, sum);
  }

  // Colours, names and sums of what the map says.
  colour(patient, map) {
    const colour = palette(), most = largest(map);
    const sums = map.values.map((row) => row.reduce((sum, value) => sum + value, 0));
    const widest = Math.max(...sums.map(Math.abs)) || 1;
    for (const row of $("heat").tBodies[0].rows) {
      const variable = Number(row.dataset.variable);
      for (const cell of row.querySelectorAll("td[data-hour]")) {
        const hour = Number(cell.dataset.hour), value = map.values[variable][hour];
        cell.setAttribute("aria-label", describe(patient, map, variable, hour));
        if (patient.cells[variable][hour]?.measured) cell.style.backgroundColor = colour(place(value, most), map.signed);
      }
      const [bar, amount] = row.querySelectorAll(".bar, .amount"), share = sums[variable] / widest;
      const half = map.signed ? 50 : 100;
      bar.parentElement.classList.toggle("signed", map.signed);
      bar.style.width = `${Math.abs(share) * half}%`;
      bar.style.left = map.signed ? `${50 - (share < 0 ? -share * 50 : 0)}%` : "0";
      bar.style.backgroundColor = colour(share < 0 ? -0.6 : 0.6, map.signed);
      amount.textContent = sums[variable] ? signed(sums[variable], map) : "";
    }
  }
}

const signed = (value, map) =>
  map.signed ? `${value < 0 ? "−" : "+"}${logit(Math.abs(value))}` : `${number(value * 100)} %`;

// What is said of a cell, in one line.
export function describe(patient, map, variable, hour) {
  return lines(patient, map, variable, hour).join("; ");
}

export function lines(patient, map, variable, hour) {
  const { name, meaning, words } = patient.variables[variable], cell = patient.cells[variable][hour];
  const title = `${name}${meaning && meaning.toLowerCase() !== name.toLowerCase() ? ` (${meaning})` : ""}, hour ${hour}`;
  if (!cell?.measured) return [title, "not measured", cell?.note].filter(Boolean);
  const count = cell.count > 1 ? `, the last of ${cell.count}` : "", value = map.values[variable][hour];
  const what = map.signed
    ? value === 0 ? "no contribution" : `${value > 0 ? "raises" : "lowers"} the logit by ${logit(Math.abs(value))}`
    : `${number(value * 100)} % of the ${map.name}`;
  return [title, `${words(cell.value)}${count}`, cell.note, what].filter(Boolean);
}
