// The page of /v1/predict: takes a request, asks the server, and shows its reply. Nothing of a patient is kept: when the page
// is closed it is gone.

import { $, counted, element, percent, replace } from "./dom.js";
import { example, examples } from "./example.js";
import { Figure } from "./figure.js";
import { drawFacts, drawFindings, drawRisk, drawWords } from "./panels.js";
import { addMaps, patientOf } from "./reply.js";
import { Refused, models, predict, read } from "./request.js";

const state = { cards: [], before: null, keys: [], reply: null, sent: null, patient: null, index: 0, running: null };
const figure = new Figure(ask, (map, patient) => drawFindings(map, patient.explanation_reason, (name) => figure.find(name)));

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

function card(found) {
  return state.cards.find((each) => each.id === found.model) ?? state.cards[0];
}

async function meet() {
  try {
    state.cards = await models($("key").value);
    const names = state.cards.map((each) => `${each.id}: ${each.outcome?.words ?? "predictions"} from ${counted(each.variables.length, "variable")} over ${counted(each.window_hours, "hour")}`);
    $("server").textContent = names.join("; ") || "This server has no clinical model.";
  } catch (error) {
    $("server").textContent = `The server does not say what models it has: ${error.message}`;
  }
  const possible = examples(state.cards[0]);
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
  Object.assign(state, { sent: $("request").value, keys: found.kind === "request" ? found.keys : [] });
  const model = card(found), explains = (model?.explains ?? ["gradients"]).filter((each) => each !== "none");
  const explain = explains.includes("gradients") ? "gradients" : (explains[0] ?? "none");
  state.unexplained = null;
  const stream = $("by-hour").checked && found.patients === 1;
  $("progress").textContent = "The model is at work …";
  const begun = { hours: [], cutoff: found.cutoff ?? model?.window_hours ?? 0 };
  const reply = await run({ model: model?.id, explain, hourly: true, stream }, (each) => during(begun, each, model));
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
  const { reply, patient, index } = state;
  $("progress").textContent = "The map is made …";
  const more = await run({ model: reply.model.id, explain: name, hourly: false });
  if (!more) return;
  $("progress").textContent = "";
  const same = more.patients[index];
  if (same?.input_digest !== patient.input_digest) return refuse(new Error("The server's second reply is about another input."));
  addMaps(patient, same.explanations);
}

// --- the reply ---------------------------------------------------------------------------------------------------

function list() {
  const { patients } = state.reply;
  $("patients").hidden = patients.length < 2;
  const buttons = patients.map((each, index) => {
    const risk = each.status === "ok" ? (each.probability === null ? "" : percent(each.probability)) : "not enough data";
    const button = element("button", { type: "button" }, element("span", {}, each.id), element("small", {}, risk));
    button.addEventListener("click", () => show(index));
    return button;
  });
  replace($("patients"), ...buttons);
}

function show(index) {
  const patient = patientOf(state.reply, index), model = card({ model: state.reply.model.id });
  Object.assign(state, { patient, index });
  patient.explanation_reason ??= state.unexplained;
  [...$("patients").children].forEach((each, at) => each.setAttribute("aria-current", String(at === index)));
  $("who").textContent = `Patient ${patient.id}`;
  $("warning").querySelector("span").textContent = state.reply.research_use_only;
  $("result").hidden = false;
  $("result").dataset.whole = "true";
  $("facts").hidden = false;
  drawRisk(state.reply, patient);
  drawFacts(state.reply, patient);
  drawWords(patient.words);
  const asked = state.keys.includes("explain"); // the request itself says which map it wants
  const offered = patient.maps.size && !asked ? (model?.explains ?? []).filter((each) => each !== "none") : [];
  figure.show(patient, [...new Set([...patient.maps.keys(), ...offered])]);
  $("reasons").hidden = patient.status !== "ok";
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
  $(id).addEventListener("click", () => put(JSON.stringify(example(state.cards[0], id === "examples"), null, 1)));
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
