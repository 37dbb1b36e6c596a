// A reply about texts: the probability of each label, and the text with its words coloured by what they are to one label.

import { $, choices, counted, drawn, element, logit, percent, range, replace } from "./dom.js";
import { palette, place } from "./colours.js";
import { drawFindings, drawNotEnough } from "./panels.js";
import { NAMES, TITLES } from "./reply.js";

const MOST = 8; // words that are listed
const PALE = 0.4; // of the scale of colours: text stays legible on it

export const readsTexts = (card) => Boolean(card?.reads?.includes("text"));

export class NoteFigure {
  // ask(name): fetches a map that the patient does not have yet.
  constructor(ask) {
    Object.assign(this, { ask, patient: null, name: null, label: null });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.patient && this.draw());
  }

  // text: of the patient, as it was pasted; names: maps that there are, or that the server would make.
  show(reply, index, text, names) {
    const given = reply.patients[index];
    this.reply = reply;
    this.patient = { ...given, characters: [...(text ?? "")], maps: new Map() }; // offsets count characters, not UTF-16 units
    this.names = names;
    this.add(given.explanations);
    this.name = this.patient.maps.keys().next().value ?? null;
    const ordered = [...given.labels].sort((a, b) => b.probability - a.probability).map((each) => each.label);
    const told = this.map ? this.map.labels.map((each) => each.label) : [];
    this.ordered = ordered;
    this.label = ordered.find((label) => told.includes(label)) ?? ordered[0] ?? null;
    this.draw();
    return this.patient;
  }

  get map() {
    return this.patient.maps.get(this.name) ?? null;
  }

  add(explanations) {
    for (const each of explanations ?? []) this.patient.maps.set(NAMES[each.name] ?? each.name, each);
  }

  async choose(name) {
    const { patient } = this;
    if (!patient.maps.has(name)) await this.ask(name);
    if (this.patient !== patient) return;
    if (patient.maps.has(name)) this.name = name; // else it was refused, and what was shown stays
    this.draw();
  }

  draw() {
    const { map, names, patient } = this;
    const own = map?.labels.find((each) => each.label === this.label) ?? null;
    this.drawLabels();
    choices($("word-maps"), "word-map", names.map((value) => ({ value, text: TITLES[value] ?? value })), this.name, (value) => this.choose(value));
    $("word-maps").hidden = names.length === 0;
    $("text").hidden = patient.characters.length === 0;
    this.drawWords(own);
    this.explain(own);
    const reason = own ? null : (patient.explanation_reason ?? (map && this.label ? `No explanation of ${this.label} was asked for.` : null));
    drawFindings(own && { signed: map.signed, findings: this.largest(own) }, reason, (at) => this.find(at));
  }

  drawLabels() {
    const { patient, reply, label } = this;
    if (patient.status !== "ok") return drawNotEnough("Labels of the text", patient.reasons, wordsKnown(patient));
    const facts = new Map(reply.outcome.labels.map((each) => [each.label, each]));
    const told = new Map(patient.labels.map((each) => [each.label, each]));
    const rows = this.ordered.map((name) => {
      const { probability, low, high } = told.get(name), { definition, base_rate: base } = facts.get(name);
      const said = [low === null ? null : `${Math.round(reply.interval.level * 100)} % interval ${range(low, high)}`, base === null ? null : `base rate ${percent(base)}`].filter(Boolean).join(", ");
      const button = element("button", { type: "button", class: "finding label", "aria-pressed": String(name === label), "data-label": name, title: definition }, element("span", {}, name), gauge(probability, low, high, base), element("span", {}, percent(probability)), element("small", { class: "soft" }, said));
      button.addEventListener("click", () => {
        this.label = name;
        this.draw();
        $("risk").querySelector(`[aria-pressed="true"]`).focus();
      });
      return element("li", {}, button);
    });
    const why = reply.interval?.words ?? reply.interval_reason;
    replace(
      $("risk"),
      element("h3", {}, reply.outcome.exclusive ? "Label of the text" : "Labels of the text"),
      element("ol", { class: "labels" }, ...rows),
      element("p", { class: "soft small" }, wordsKnown(patient)),
      element("details", { class: "small" }, element("summary", {}, reply.interval ? "What the interval says" : "Why there is no interval"), element("p", {}, why)),
    );
  }

  // The whole text; a word that is no number of the map is left as it is.
  drawWords(own) {
    const { characters, words, text } = this.patient, colour = palette(), signed = this.map?.signed;
    const most = Math.max(0, ...(own?.weights ?? []).map((each) => Math.abs(each ?? 0))), made = [];
    const part = (from, to) => characters.slice(from, to).join("");
    let at = 0;
    words.forEach(({ start, end, known }, number) => {
      made.push(part(at, start));
      at = end;
      const weight = own?.weights[number] ?? null;
      if (!known) return made.push(element("span", { class: "unknown", title: "a word that the model does not know" }, part(start, end)));
      if (weight === null) return made.push(part(start, end));
      const mark = element("mark", { tabindex: -1, "data-weight": weight, "data-word": number, title: this.said(weight) }, part(start, end));
      mark.style.backgroundColor = colour(place(weight, most) * PALE, signed);
      made.push(mark);
    });
    made.push(part(at, text.read_until));
    const rest = part(Math.max(at, text.read_until));
    if (rest && text.cut) made.push(element("span", { class: "unread", title: text.cut_reason }, rest));
    else made.push(rest);
    replace($("words"), ...made);
    this.legend(own, most);
  }

  said(weight) {
    if (!this.map.signed) return `${percent(weight)} of the attention for ${this.label}`;
    return `${weight < 0 ? "lowers" : "raises"} the log odds of ${this.label} by ${logit(Math.abs(weight))}`;
  }

  legend(own, most) {
    if (!own) return replace($("word-legend"));
    const { signed } = this.map, colour = palette();
    const stops = Array.from({ length: 17 }, (_, n) => colour((signed ? n / 8 - 1 : n / 16) * PALE, signed));
    const ramp = element("span", { class: "ramp", "aria-hidden": true });
    ramp.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
    const ends = signed ? [`lowers −${logit(most)}`, `+${logit(most)} raises`] : ["0", percent(most)];
    replace($("word-legend"), element("span", {}, ends[0]), ramp, element("span", {}, ends[1]), element("span", { class: "unknown" }, "unknown word"));
  }

  explain(own) {
    const { map, patient } = this, facts = this.reply.outcome.labels.find((each) => each.label === this.label);
    $("word-meaning").classList.toggle("doubt", map?.faithful === false);
    const title = map && (map.signed ? `${map.title}.` : `${map.title}. Attention is where the model looked, not a cause.`);
    const sentence = map && [own && `It explains ${own.explains}.`, map.faithfulness].filter(Boolean).join(" ");
    replace($("word-meaning"), map && element("strong", {}, title), map && ` ${sentence}`);
    replace($("definition"), facts && element("strong", {}, `${facts.label}: `), facts && facts.definition);
    $("cut").hidden = !patient.text.cut;
    $("cut").textContent = patient.text.cut_reason ?? "";
  }

  largest({ weights }) {
    const known = weights.map((amount, at) => ({ amount, variable: at })).filter(({ amount }) => amount);
    const word = ({ start, end }) => this.patient.characters.slice(start, end).join("");
    return known
      .sort((a, b) => Math.abs(b.amount) - Math.abs(a.amount))
      .slice(0, MOST)
      .map((each) => ({ ...each, words: `${word(this.patient.words[each.variable])} ${this.map.signed ? "" : "has "}${this.said(each.amount)}` }));
  }

  find(at) {
    const mark = $("words").querySelector(`[data-word="${at}"]`);
    mark.focus();
    mark.scrollIntoView({ block: "center" });
  }
}

const wordsKnown = ({ text }) => `${text.known_words} of ${counted(text.words, "word")} known to the model.`;

function gauge(probability, low, high, base) {
  const made = drawn("svg", { viewBox: "0 0 200 14", preserveAspectRatio: "none", class: "gauge", "aria-hidden": true });
  made.append(drawn("rect", { class: "track", x: 0, y: 3, width: 200, height: 8, rx: 4 }));
  made.append(drawn("rect", { class: "part", x: 0, y: 3, width: probability * 200, height: 8, rx: 4 }));
  if (low !== null) made.append(drawn("rect", { class: "span", x: low * 200, y: 5, width: Math.max(1, (high - low) * 200), height: 4 }));
  if (base !== null) made.append(drawn("line", { class: "base", x1: base * 200, x2: base * 200, y1: 0, y2: 14 }));
  return made;
}
