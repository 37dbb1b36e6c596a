// The cards beside the figure: the risk, what moved it, and what it rests on.

import { $, counted, drawn, element, number, percent, range, replace } from "./dom.js";
import { palette } from "./colours.js";

const NOT_ENOUGH = "Not enough data";

// after: hours that a prediction of a stream has used so far; undefined: the prediction is whole.
export function drawRisk(reply, patient, after) {
  const { outcome, interval, base_rate: base } = reply, words = outcome?.words ?? "the outcome";
  if (patient.status !== "ok") return drawNotEnough(`Risk of ${words}`, patient.reasons, coverageWords(patient));
  if (patient.buckets) return drawBuckets(words, patient);
  const band = patient.low !== null && patient.low !== undefined;
  const said = band ? `${Math.round((interval?.level ?? 0.95) * 100)} % interval ${range(patient.low, patient.high)}` : "no interval";
  replace(
    $("risk"),
    element("h3", {}, `Risk of ${words}`),
    element("p", { class: "number" }, percent(patient.probability)),
    element("p", { class: "soft", title: interval?.words ?? reply.interval_reason }, said),
    gauge(patient, base?.probability ?? null),
    element("p", { class: "soft small" }, base ? `Base rate: ${base.words}.` : "The base rate of the training stays is not known."),
    after === undefined ? coverage(patient) : element("p", { class: "soft" }, `after ${counted(after, "hour")} …`),
    element("details", { class: "small" }, element("summary", {}, band ? "What the interval says" : "Why there is no interval"), element("p", {}, interval?.words ?? reply.interval_reason ?? "The server does not say.")),
  );
}

// In the place of a number. known: what is said of the data that there are.
export function drawNotEnough(title, reasons, known) {
  replace(
    $("risk"),
    element("h3", {}, title),
    element("p", { class: "none" }, NOT_ENOUGH),
    element("ul", { class: "plain" }, ...reasons.map((each) => element("li", {}, each))),
    known && element("p", { class: "soft small" }, known),
  );
}

function gauge({ probability, low, high }, base) {
  const made = drawn("svg", { viewBox: "0 0 200 26", class: "gauge", role: "img", "aria-label": `risk ${percent(probability)}${base === null ? "" : `, base rate ${percent(base)}`}` });
  made.append(drawn("rect", { class: "track", x: 0, y: 9, width: 200, height: 8, rx: 4 }));
  if (low !== null && low !== undefined) made.append(drawn("rect", { class: "span", x: low * 200, y: 9, width: Math.max(1, (high - low) * 200), height: 8 }));
  if (base !== null) made.append(drawn("line", { class: "base", x1: base * 200, x2: base * 200, y1: 3, y2: 23 }));
  made.append(drawn("circle", { class: "point", cx: probability * 200, cy: 13, r: 6 }));
  return made;
}

function coverageWords({ coverage: found }) {
  if (!found) return null;
  const least = found.least === null || found.least === undefined ? "" : `, at least ${percent(found.least)} needed`;
  return `${percent(found.measured)} of the cells are measured${least}.`;
}

function coverage(patient) {
  const words = coverageWords(patient);
  return words && element("p", { class: "soft small" }, words);
}

function drawBuckets(words, patient) {
  const most = Math.max(...patient.buckets.map((each) => each.probability));
  const rows = patient.buckets.map(({ from, to, probability }) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${(probability / most) * 100}%`;
    const title = to === null ? `${number(from)} and more` : `${number(from)} to ${number(to)}`;
    return element("li", {}, element("span", {}, title), element("span", { class: "track" }, bar), element("span", {}, percent(probability)));
  });
  replace($("risk"), element("h3", {}, words), element("ul", { class: "buckets" }, ...rows), coverage(patient));
}

// choose(variable): called when a finding is clicked.
export function drawFindings(map, reason, choose) {
  const findings = map?.findings ?? [], most = Math.max(...findings.map((each) => Math.abs(each.amount)), 1e-9), colour = palette();
  const rows = findings.map((each) => {
    const way = !map.signed ? "▪" : each.amount > 0 ? "▲" : "▼";
    const bar = element("span", { class: "bar" });
    bar.style.width = `${(Math.abs(each.amount) / most) * 100}%`;
    bar.style.backgroundColor = colour(each.amount < 0 ? -0.6 : 0.6, map.signed);
    const mark = element("span", { class: "way", "aria-hidden": true }, way);
    mark.style.color = `var(--${!map.signed ? "share" : each.amount > 0 ? "up" : "down"})`;
    const button = element("button", { type: "button", class: "finding" }, mark, element("span", {}, each.words), element("span", { class: "track", "aria-hidden": true }, bar));
    button.addEventListener("click", () => choose(each.variable));
    return element("li", {}, button);
  });
  replace($("findings"), ...(rows.length ? rows : [element("li", { class: "soft" }, map ? "No cell has a part in it." : (reason ?? "No explanation was asked for."))]));
}

export function drawFacts(reply, patient) {
  const { model } = reply, trained = [model.training_stays && `${model.training_stays.toLocaleString("en")} stays`, model.trained_on && `of ${model.trained_on}`];
  const hash = (text) => text && element("code", { title: text, tabindex: 0 }, text.length > 16 ? `${text.slice(0, 12)}…` : text);
  const { text } = patient;
  const facts = [
    ["Text", text && `${text.tokens_read} of ${counted(text.tokens, "token")} read, ${counted(text.characters, "character")}`],
    ["Measured", text && coverageWords(patient)],
    ["Cut-off", patient.cutoff_hour !== null && `${counted(patient.cutoff_hour, "hour")} of the stay${patient.cutoff_time ? `, ${patient.cutoff_time.replace("T", " ").replace(/:00(?=[+Z-])/, " ")}` : ""}`],
    ["Model", `${model.id}`],
    ["Version", hash(model.version)],
    ["Training", trained.filter(Boolean).join(" ") || null],
    ["Data digest", hash(model.data_digest)],
    ["Input digest", hash(patient.input_digest)],
  ];
  replace($("fact-list"), ...facts.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  drawRejected(patient.measurements, reply.bundle);
}

// bundle: what was left out of a FHIR bundle before its values came to a patient.
function drawRejected(found, bundle) {
  $("rejected").hidden = !found;
  if (!found) return;
  const refused = Object.entries(found.rejected ?? {}), total = refused.reduce((sum, [, count]) => sum + count, 0);
  const clipped = found.clipped ? `, ${found.clipped} clipped` : "";
  replace($("rejected").querySelector("summary"), `${counted(found.given, "measurement")}: ${found.used} used${clipped}, ${total} left out`);
  const whose = (reason) =>
    Object.entries(found.by_variable ?? {}).filter(([, counts]) => counts[reason]).map(([name, counts]) => `${name} ${counts[reason]}`).join(", ");
  const rows = [...refused, ...(found.clipped ? [["clipped", found.clipped]] : [])].map(([reason, count]) => {
    const names = whose(reason);
    return element("li", {}, element("strong", {}, `${count} ${reason}`), names && `: ${names}`);
  });
  const examples = (found.examples ?? []).map((each) => element("li", { class: "soft" }, element("code", {}, each.field), ` ${each.words}`));
  const listed = (title, counts) => {
    const rows = Object.entries(counts ?? {}).map(([what, count]) => `${what} ${count}`);
    return rows.length ? [element("li", {}, element("strong", {}, title), `: ${rows.join(", ")}`)] : [];
  };
  const more = [...listed("left out of the bundle", bundle?.left_out), ...listed("unknown units in the bundle", bundle?.unknown_units)];
  replace($("rejected").querySelector("ul"), ...rows, ...examples, ...more);
}
