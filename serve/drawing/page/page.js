// The page of /v1/images: a background, an object and its region, words, and the steps of their composition. Nothing is kept: when
// the page is closed it is gone.

import { $, counted, element, replace } from "./dom.js";
import { dataUrl, ofBase64, ofCharacter, ofFile, show } from "./pictures.js";
import { Refused, address, answer, cards, events, headers } from "./server.js";
import { Stage } from "./stage.js";

// Kinds of objects in the captions that models of this project learn from.
const EMOJI = { apple: "🍎", car: "🚗", cat: "🐱", tree: "🌳", house: "🏠", ball: "⚽", dog: "🐶", key: "🔑", clock: "⏰", guitar: "🎸", banana: "🍌", fish: "🐠", flower: "🌻", boat: "⛵" };
const NUMBERS = ["steps", "guidance_scale", "infused", "pasted", "kept"];
const PREVIEWS = 12; // at most, of one picture

const state = { card: null, running: null, made: null, written: false };
const stage = new Stage(({ left, top, width, height }) => {
  $("place-words").textContent = `${width} × ${height} pixels, ${left} from the left and ${top} from the top, of ${stage?.side ?? 32} × ${stage?.side ?? 32}`;
});

// --- the server --------------------------------------------------------------------------------------------------

async function meet() {
  try {
    [state.card] = await cards($("key").value, "diffusion");
    $("server").textContent = state.card ? `${state.card.id} draws ${state.card.size.replace("x", " × ")} pixels and knows ${counted(state.card.words.length, "word")}` : "This server has no diffusion model.";
  } catch (error) {
    $("server").textContent = `The server does not say what models it has: ${error.message}`;
  }
  const { card } = state;
  $("draw").disabled = !card;
  $("compose").disabled = !card?.composes;
  if (!card) return;
  stage.setSide(Number(card.size.split("x")[0]));
  $("steps").max = card.max_steps;
  $("known").textContent = card.words.join(" ");
  const known = Object.keys(EMOJI).filter((name) => card.words.includes(name));
  replace($("emoji"), ...known.map((name) => {
    const button = element("button", { type: "button", title: name, "aria-label": name, "aria-pressed": "false" }, EMOJI[name]);
    button.addEventListener("click", () => take(ofCharacter(EMOJI[name]), name));
    return button;
  }));
  if (known.includes("dog")) take(ofCharacter(EMOJI.dog), "dog");
}

// Asks, and tells every step. Returns the whole reply, or null when it was stopped or refused.
async function ask(path, body) {
  const stop = new AbortController();
  state.running?.abort();
  state.running = stop;
  $("stop").hidden = false;
  $("problem").hidden = true;
  Object.assign($("bar"), { hidden: false, value: 0 });
  $("progress").textContent = "Waiting for the model …";
  try {
    const sent = JSON.stringify({ model: state.card.id, ...body, stream: true, preview_every: every(body.steps, path) });
    const options = { method: "POST", body: sent, signal: stop.signal, cache: "no-store", headers: headers($("key").value, { "content-type": "application/json" }) };
    let whole = null;
    for await (const each of events(await answer(await fetch(address(path), options))))
      if (each.object === "image.step") await stepped(each);
      else whole = each;
    if (!whole) throw new Error("the stream ended before the picture was complete");
    $("progress").textContent = "";
    return whole;
  } catch (error) {
    if (!stop.signal.aborted) refuse(error);
    else if (state.running === stop) $("progress").textContent = "Stopped. Everything stands as it was.";
    return null;
  } finally {
    if (state.running === stop) {
      state.running = null;
      $("stop").hidden = $("bar").hidden = true;
    }
  }
}

const every = (steps, path) => Math.max(1, Math.round(((path.endsWith("compose") ? 3 : 1) * (steps ?? 20)) / PREVIEWS));

async function stepped({ step, of, part, b64_json }) {
  $("bar").value = step / of;
  $("progress").textContent = `${part === "inversion" ? "Background and object are inverted" : "The picture is made"}: step ${step} of ${of}`;
  if (b64_json) show($("result"), await ofBase64(b64_json));
}

function refuse(error) {
  $("progress").textContent = "";
  const known = error instanceof Refused;
  replace(
    $("problem"),
    element("strong", {}, known ? `The server refused the request (${error.status})` : "The server did not answer"),
    element("p", {}, error.message),
    known && error.param ? element("p", {}, "Field: ", element("code", {}, error.param)) : null,
  );
  $("problem").hidden = false;
  if (error.status === 401) $("key").focus();
}

// --- background, object and words --------------------------------------------------------------------------------

function take(object, name) {
  if (!object) return;
  stage.setObject(object);
  show($("object"), object);
  for (const each of $("emoji").children) each.setAttribute("aria-pressed", String(each.title === name));
  if (!name) return;
  const article = /^([aeio]|umbrella)/.test(name) ? "an" : "a";
  $("object-words").value = `${article} ${name}`;
  caption();
}

// The caption of the composed picture is that of the background with the object in it, until somebody has written another.
function caption() {
  if (state.written) return;
  const before = $("background-prompt").value.trim(), words = $("object-words").value.trim(), at = before.lastIndexOf(" on ");
  if (before && words) $("prompt").value = at < 0 ? `${before} and ${words}` : `${before.slice(0, at)} and ${words}${before.slice(at)}`;
}

async function opened(file, use) {
  if (!file) return;
  try {
    await use(file);
    $("problem").hidden = true;
  } catch {
    replace($("problem"), element("strong", {}, "This file is no picture that the browser can read"), element("p", {}, file.name));
    $("problem").hidden = false;
  }
}

const openBackground = (file) => opened(file, async () => stage.setBackground(await ofFile(file, stage.side)));
const openObject = (file) => opened(file, async () => take(await ofFile(file), ""));

async function draw() {
  const prompt = $("draw-prompt").value.trim(), steps = Math.min(20, state.card.max_steps), seed = Number($("seed").value);
  const reply = await ask("v1/images/generations", { prompt, steps, seed });
  if (!reply) return;
  const picture = await ofBase64(reply.data[0].b64_json);
  stage.setBackground(picture);
  done(reply, picture, `drawn with seed ${reply.data[0].seed}`);
  $("background-prompt").value = prompt;
  caption();
}

async function compose() {
  if (!stage.object) return refuse(new Error("Choose an object first, or open a file."));
  const options = Object.fromEntries(NUMBERS.filter((name) => $(name).value !== "").map((name) => [name, Number($(name).value)]));
  const words = { prompt: $("prompt").value.trim(), object_words: $("object-words").value.trim(), background_prompt: $("background-prompt").value.trim() };
  const pictures = { background: dataUrl(stage.background), object: dataUrl(stage.object), region: stage.region };
  const reply = await ask("v1/images/compose", { ...pictures, ...words, ...options, confined: $("confined").checked });
  if (reply) done(reply, await ofBase64(reply.data[0].b64_json), "composed");
}

function done(reply, picture, what) {
  state.made = picture;
  show($("result"), picture);
  $("result").setAttribute("aria-label", `the picture, ${what}`);
  $("facts").textContent = `${what} in ${reply.seconds.toFixed(1)} s with ${counted(reply.forwards, "call")} of the model`;
  $("keep").hidden = $("save").hidden = false;
  $("save").href = dataUrl(picture);
}

// --- what people do ----------------------------------------------------------------------------------------------

$("draw").addEventListener("click", draw);
$("compose").addEventListener("click", compose);
$("stop").addEventListener("click", () => state.running?.abort());
$("place").addEventListener("click", () => stage.centre());
$("keep").addEventListener("click", () => stage.setBackground(state.made));
$("key").addEventListener("change", meet);
$("prompt").addEventListener("input", () => (state.written = $("prompt").value.trim() !== ""));
for (const id of ["background-prompt", "object-words"]) $(id).addEventListener("change", caption);
for (const [name, use] of [["background", openBackground], ["object", openObject]]) {
  $(`open-${name}`).addEventListener("click", () => $(`${name}-file`).click());
  $(`${name}-file`).addEventListener("change", async () => {
    await use($(`${name}-file`).files[0]);
    $(`${name}-file`).value = "";
  });
}
// A file that misses its canvas would replace the page.
for (const name of ["dragover", "dragleave", "drop"])
  addEventListener(name, (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    const target = event.target.closest?.("#stage, #object");
    for (const id of ["stage", "object"]) $(id).classList.toggle("dropping", name === "dragover" && target === $(id));
    if (name === "drop" && target) (target.id === "stage" ? openBackground : openObject)(event.dataTransfer.files[0]);
  });
meet();
