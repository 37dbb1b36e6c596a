// The figure: risk by hour, the table of cells and the values of one variable, one below the other with the same columns.

import { $, choices, element, logit, number, replace } from "./dom.js";
import { largest, palette } from "./colours.js";
import { curveWords, drawCurve, drawValues } from "./charts.js";
import { Heat, lines } from "./heat.js";
import { TITLES } from "./reply.js";

const CELL = { least: 14, most: 34 };

export class Figure {
  // ask(name): fetches a map that the patient does not have yet. shown(map, patient): after another map is shown.
  constructor(ask, shown) {
    Object.assign(this, { ask, shown, patient: null, map: null, chosen: null });
    this.heat = new Heat((variable, hour, cell) => this.point(variable, hour, cell));
    $("order").addEventListener("change", () => this.draw());
    $("never").addEventListener("change", () => this.draw());
    $("curve").addEventListener("mousemove", (event) => this.along(event));
    $("curve").addEventListener("mouseleave", () => this.point(null));
    $("curve").addEventListener("keydown", (event) => this.step(event));
    $("curve").addEventListener("blur", () => this.point(null));
    document.addEventListener("keydown", (event) => event.key === "Escape" && ($("tip").hidden = true));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.patient && this.draw());
    new ResizeObserver(() => this.patient && this.fit() && this.draw()).observe($("figure"));
  }

  // names: maps that there are, or that the server would make.
  show(patient, names) {
    Object.assign(this, { patient, names, chosen: null, width: 0 });
    const name = patient.maps.has(this.name) ? this.name : (patient.maps.keys().next().value ?? null);
    choices($("maps"), "map", names.map((value) => ({ value, text: TITLES[value] ?? value })), name, (value) => this.choose(value));
    $("maps").hidden = names.length === 0;
    this.pick(name);
    this.fit();
    this.draw();
    this.shown(this.map, this.patient);
  }

  pick(name) {
    this.name = name ?? this.name;
    this.map = this.patient.maps.get(name) ?? null;
  }

  async choose(name) {
    const patient = this.patient;
    if (!patient.maps.has(name)) await this.ask(name);
    if (this.patient !== patient) return;
    if (!patient.maps.has(name)) return this.show(patient, this.names); // refused: what was shown stays
    this.pick(name);
    this.draw();
    this.shown(this.map, this.patient);
  }

  // The width of a column; whether it has changed.
  fit() {
    const style = getComputedStyle($("figure")), free = $("scroll").clientWidth - parseFloat(style.getPropertyValue("--gutter")) - parseFloat(style.getPropertyValue("--sum"));
    const width = Math.max(CELL.least, Math.min(CELL.most, Math.floor(free / this.patient.hours)));
    const changed = width !== this.width;
    this.width = width;
    $("figure").style.setProperty("--cell", `${width}px`);
    return changed;
  }

  rows() {
    const { patient, map } = this, all = patient.variables.map((_, at) => at);
    const known = all.filter((at) => $("never").checked || patient.cells[at].some((cell) => cell));
    if ($("order").value === "table" || !map) return known;
    const size = all.map((at) => Math.abs(map.values[at].reduce((sum, value) => sum + value, 0)));
    return known.sort((a, b) => size[b] - size[a]);
  }

  draw() {
    const { patient, map } = this, hasCells = Boolean(map) && patient.variables.length > 0;
    const curved = patient.curve.length > 0 && !patient.buckets;
    $("figure").hidden = !curved && !hasCells;
    $("curve").hidden = !curved;
    $("early").textContent = curved ? (patient.early ?? "") : "";
    for (const id of ["heat", "values", "legend", "meaning", "rows"]) $(id).hidden = !hasCells;
    this.point(null);
    if (curved) {
      drawCurve(patient, this.width);
      const last = patient.curve.at(-1).hour;
      for (const [name, value] of Object.entries({ role: "slider", tabindex: 0, "aria-label": "risk by hour", "aria-valuemin": patient.curve[0].hour, "aria-valuemax": last, "aria-valuenow": last, "aria-valuetext": curveWords(patient, last) }))
        $("curve").setAttribute(name, value);
    }
    if (!hasCells) return;
    const rows = this.rows();
    this.heat.draw(patient, map, rows);
    this.values(this.chosen ?? rows[0]);
    this.explain();
  }

  explain() {
    const { map } = this, colour = palette(), most = largest(map);
    const sentence = [map.explains && `It explains ${map.explains}.`, map.faithfulness].filter(Boolean).join(" ");
    const title = map.signed ? `${map.title}.` : `${map.title}. Attention is where the model looked, not a cause.`;
    $("meaning").classList.toggle("doubt", map.faithful === false);
    replace($("meaning"), element("strong", {}, title), ` ${sentence}`);
    const ramp = element("span", { class: "ramp", "aria-hidden": true });
    const stops = Array.from({ length: 17 }, (_, n) => colour(map.signed ? n / 8 - 1 : n / 16, map.signed));
    ramp.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
    const ends = map.signed ? [`lowers −${logit(most)}`, `+${logit(most)} raises`] : ["0", `${number(most * 100)} %`];
    const key = (kind, text) => element("span", { class: "key" }, element("i", { class: kind, "aria-hidden": true }), text);
    replace($("legend"), element("span", {}, ends[0]), ramp, element("span", {}, ends[1]), key("hatch", "not measured"), key("flag", "implausible value"));
  }

  values(variable) {
    if (variable === undefined || !this.map) return;
    this.chosen = variable;
    for (const row of $("heat").tBodies[0].rows) row.classList.toggle("chosen", Number(row.dataset.variable) === variable);
    drawValues(this.patient, this.map, variable, this.width);
  }

  // Shows a variable by name, as if it had been pointed at.
  find(name) {
    const at = this.patient.places.get(name), row = $("heat").querySelector(`tr[data-variable="${at}"]`);
    if (!row) return;
    this.values(at);
    (row.querySelector("td.measured") ?? row.querySelector("td[data-hour]"))?.focus();
    row.scrollIntoView({ block: "center" });
  }

  // --- pointing ---------------------------------------------------------------------------------------------------

  point(variable, hour, cell) {
    $("tip").hidden = true;
    $("column").hidden = variable === null;
    this.mark(variable === null ? null : hour);
    if (variable === null) return;
    const found = lines(this.patient, this.map, variable, hour), risk = curveWords(this.patient, hour + 1);
    replace($("readout"), found.join(" · "), risk && ` · risk ${risk}`);
    if (variable !== this.chosen) this.values(variable);
    tip(cell.getBoundingClientRect(), [...found, risk && `risk ${risk}`]);
  }

  mark(hour) {
    for (const each of document.querySelectorAll("#curve .here, #heat thead .here")) each.classList.remove("here");
    if (hour === null) return;
    $("column").style.left = `calc(var(--gutter) + ${hour * this.width}px)`;
    document.querySelector(`#curve circle[data-hour="${hour + 1}"]`)?.classList.add("here");
    document.querySelector(`#heat thead th[data-hour="${hour}"]`)?.classList.add("here");
  }

  along(event) {
    const plot = $("curve").querySelector("svg"), box = plot.getBoundingClientRect();
    this.at(Math.max(1, Math.min(this.patient.curve.at(-1).hour, Math.round((event.clientX - box.left) / this.width))));
  }

  step(event) {
    const ways = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }, { curve } = this.patient;
    const now = Number($("curve").getAttribute("aria-valuenow"));
    const to = event.key === "Home" ? curve[0].hour : event.key === "End" ? curve.at(-1).hour : ways[event.key] ? now + ways[event.key] : null;
    if (to === null) return;
    event.preventDefault();
    if (to >= curve[0].hour && to <= curve.at(-1).hour) this.at(to);
  }

  at(hour) {
    const words = curveWords(this.patient, hour), found = document.querySelector(`#curve circle[data-hour="${hour}"]`);
    $("column").hidden = false;
    this.mark(hour - 1);
    $("curve").setAttribute("aria-valuenow", hour);
    $("curve").setAttribute("aria-valuetext", words);
    replace($("readout"), `risk ${words}`);
    if (found) tip(found.getBoundingClientRect(), [`risk ${words}`]);
    else $("tip").hidden = true;
  }
}

// Beside a box, inside the window.
function tip(box, texts) {
  const made = $("tip");
  replace(made, ...texts.filter(Boolean).map((text) => element("div", {}, text)));
  made.hidden = false;
  const { width, height } = made.getBoundingClientRect();
  made.style.left = `${Math.max(4, Math.min(innerWidth - width - 4, box.right + 10))}px`;
  made.style.top = `${box.bottom + 10 + height < innerHeight ? box.bottom + 10 : Math.max(4, box.top - height - 10)}px`;
}

