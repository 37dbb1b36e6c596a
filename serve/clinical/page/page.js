// The page of /v1/predict: takes a request, asks the server, and shows its reply. Nothing of a patient is kept: when the page
// is closed it is gone.

import { $, counted, element, percent, replace } from "./dom.js";
import { example, examples } from "./example.js";
import { Figure } from "./figure.js";
import { NoteFigure, readsTexts } from "./notes.js";
import { drawFacts, drawFindings, drawRisk } from "./panels.js";
import { addMaps, patientOf } from "./reply.js";
import { Refused, models, predict, read } from "./request.js";

const state = { cards: [], before: null, keys: [], reply: null, sent: null, patient: null, index: 0, running: null };
const figure = new Figure(ask, (map, patient) => drawFindings(map, patient.explanation_reason, (name) => figure.find(name)));
const note = new NoteFigure(ask);

// --- the request -------------------------------------------------------------------------------------------------

function look() {
  const found = read($("request").value);
  $("kind").textContent = found.says;
  return found;
}

// What stood there before is kept until the next change of this kind.
function put(text) {
  if ($("request").value.trim()) state.before = $("request").value;
  $("request").value = text;
  $("back").hidden = state.before === null || state.before === text;
  look();
}

async function load(file) {
  if (file) put(await file.text());
}

// The model that a request is for: the one that it names, else the chosen one or the first that takes what it gives.
function card(found) {
  const named = state.cards.find((each) => each.id === found.model), given = Boolean(found.texts?.some((each) => each !== null));
  const chosen = state.cards.find((each) => each.id === $("model").value) ?? state.cards[0];
  return named ?? [chosen, ...state.cards].find((each) => readsTexts(each) === given) ?? chosen;
}

async function meet() {
  try {
    state.cards = await models($("key").value);
    const names = state.cards.map((each) => `${each.id}: ${takes(each)}`);
    $("server").textContent = names.join("; ") || "This server has no clinical model.";
  } catch (error) {
    $("server").textContent = `The server does not say what models it has: ${error.message}`;
  }
  replace($("model"), ...state.cards.map(({ id }) => element("option", { value: id }, id)));
  $("models").hidden = state.cards.length < 2;
  offer();
}

function takes(each) {
  if (readsTexts(each)) return `${counted(each.outcome.labels.length, "label")} from the first ${counted(each.max_tokens, "token")} of a text`;
  return `${each.outcome.words} from ${counted(each.variables.length, "variable")} over ${counted(each.window_hours, "hour")}`;
}

// Examples are for the chosen model.
function offer() {
  const possible = examples(card({ model: $("model").value }));
  for (const id of ["example", "examples"]) {
    $(id).disabled = !possible;
    $(id).title = possible ? "made up for this page" : "the example has no variable of this model";
  }
}

// --- asking ------------------------------------------------------------------------------------------------------

async function run(options, hour = () => {}) {
  const stop = new AbortController();
  state.running?.abort();
  state.running = stop;
  $("stop").hidden = false;
  $("send").disabled = true;
  $("problem").hidden = true;
  const asked = (more) =>
    predict(state.sent, { ...options, ...more, key: $("key").value, signal: stop.signal, hour: (each) => !stop.signal.aborted && hour(each) });
  try {
    return await asked().catch((error) => {
      // An explanation that the page wants and not the request: without it, and with the server's reason in its place.
      if (error.code !== "too_many_patients" || error.param !== "explain" || state.keys.includes("explain")) throw error;
      state.unexplained = error.message;
      return asked({ explain: "none" });
    });
  } catch (error) {
    if (!stop.signal.aborted) refuse(error);
    else if (state.running === stop) {
      $("progress").textContent = "Stopped. The request stands as it was.";
      $("ask").open = true;
    }
    return null;
  } finally {
    if (state.running === stop) {
      state.running = null;
      $("stop").hidden = true;
      $("send").disabled = false;
    }
  }
}

function refuse(error) {
  $("progress").textContent = "";
  const known = error instanceof Refused, title = known ? `The server refused the request (${error.status})` : "The server did not answer";
  replace(
    $("problem"),
    element("strong", {}, title),
    element("p", {}, error.message),
    known && error.param && element("p", {}, "Field: ", element("code", {}, error.param)),
    element("p", { class: "soft" }, "The request stands as it was."),
  );
  $("problem").hidden = false;
  $("ask").open = true;
  if (error.status === 401) $("key").focus();
}

async function send() {
  const found = look();
  if (!$("request").value.trim()) {
    $("kind").textContent = "Paste a request first, or take the synthetic example.";
    return $("request").focus();
  }
  Object.assign(state, { sent: $("request").value, texts: found.texts ?? [], keys: found.kind === "request" ? found.keys : [] });
  const model = card(found), explains = (model?.explains ?? ["gradients"]).filter((each) => each !== "none");
  const explain = explains.includes("gradients") ? "gradients" : (explains[0] ?? "none");
  state.unexplained = null;
  const ofHours = !readsTexts(model), stream = ofHours && $("by-hour").checked && found.patients === 1;
  $("progress").textContent = "The model is at work …";
  const begun = { hours: [], cutoff: found.cutoff ?? model?.window_hours ?? 0 };
  const reply = await run({ model: model?.id, explain, hourly: ofHours || undefined, stream }, (each) => during(begun, each, model));
  if (!reply) return;
  state.reply = reply;
  $("progress").textContent = "";
  $("asked").textContent = `${found.says}, ${state.sent.length.toLocaleString("en")} characters`;
  $("ask").open = false;
  list();
  show(0);
  $("who").focus();
}

// A stream: the curve as it comes, before there is anything else.
function during(begun, hour, model) {
  begun.hours.push(hour);
  const reply = { outcome: model?.outcome, base_rate: model?.base_rate, interval: null, interval_reason: "It comes with the whole prediction.", variables: [] };
  reply.patients = [{ reasons: [], ...hour, id: "", cutoff_hour: Math.max(begun.cutoff, hour.hour), by_hour: begun.hours, coverage: null }];
  const patient = patientOf(reply, 0);
  $("who").textContent = "The prediction so far";
  $("result").hidden = false;
  $("result").dataset.whole = "false";
  $("ask").open = false;
  for (const id of ["patients", "reasons", "facts", "text"]) $(id).hidden = true;
  drawRisk(reply, patient, hour.hour);
  figure.show(patient, []);
}

// A map that the reply does not have: the same request again, for that map alone.
async function ask(name) {
  const { reply, patient, index } = state, ofTexts = reply.outcome.kind === "labels";
  $("progress").textContent = "The map is made …";
  const more = await run({ model: reply.model.id, explain: name, hourly: ofTexts ? undefined : false });
  if (!more) return;
  $("progress").textContent = "";
  const same = more.patients[index];
  if (same?.input_digest !== patient.input_digest) return refuse(new Error("The server's second reply is about another input."));
  if (ofTexts) note.add(same.explanations);
  else addMaps(patient, same.explanations);
}

// --- the reply ---------------------------------------------------------------------------------------------------

function list() {
  const { patients } = state.reply;
  $("patients").hidden = patients.length < 2;
  const buttons = patients.map((each, index) => {
    const best = each.labels ? each.labels.reduce((a, b) => (b.probability > a.probability ? b : a), { probability: -1 }) : each;
    const told = typeof best.probability === "number" ? [best.label, percent(best.probability)].filter(Boolean).join(" ") : "";
    const risk = each.status === "ok" ? told : "not enough data";
    const button = element("button", { type: "button" }, element("span", {}, each.id), element("small", {}, risk));
    button.addEventListener("click", () => show(index));
    return button;
  });
  replace($("patients"), ...buttons);
}

function show(index) {
  const { reply } = state, model = card({ model: reply.model.id }), ofTexts = reply.outcome.kind === "labels";
  const offered = (any) => (any && !state.keys.includes("explain") ? (model?.explains ?? []).filter((each) => each !== "none") : []);
  state.index = index;
  [...$("patients").children].forEach((each, at) => each.setAttribute("aria-current", String(at === index)));
  $("warning").querySelector("span").textContent = reply.research_use_only;
  $("result").hidden = false;
  $("result").dataset.whole = "true";
  $("facts").hidden = false;
  if (ofTexts) {
    Object.assign(figure, { patient: null });
    $("figure").hidden = true;
    const given = reply.patients[index];
    given.explanation_reason ??= state.unexplained;
    state.patient = note.show(reply, index, state.texts[index], offered(given.explanations.length));
  } else {
    const patient = patientOf(reply, index);
    Object.assign(note, { patient: null });
    $("text").hidden = true;
    patient.explanation_reason ??= state.unexplained;
    state.patient = patient;
    drawRisk(reply, patient);
    figure.show(patient, [...new Set([...patient.maps.keys(), ...offered(patient.maps.size)])]);
  }
  $("who").textContent = `Patient ${state.patient.id}`;
  drawFacts(reply, state.patient);
  $("reasons").hidden = state.patient.status !== "ok";
}

// --- what people do ----------------------------------------------------------------------------------------------

$("request").addEventListener("input", look);
$("send").addEventListener("click", send);
$("stop").addEventListener("click", () => state.running?.abort());
$("request").addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && send());
$("key").addEventListener("change", meet);
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  await load($("file").files[0]);
  $("file").value = "";
});
for (const id of ["example", "examples"])
  $(id).addEventListener("click", () => put(JSON.stringify(example(card({ model: $("model").value }), id === "examples"), null, 1)));
$("model").addEventListener("change", offer);
$("back").addEventListener("click", () => put(state.before));
// A file that misses the field would replace the page, and with it what was pasted.
for (const name of ["dragover", "drop"])
  addEventListener(name, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", name === "dragover");
    if (name === "drop") load(event.dataTransfer.files[0]);
  });
addEventListener("dragleave", (event) => event.relatedTarget === null && document.body.classList.remove("dropping"));
meet();
look();
