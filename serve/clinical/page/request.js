// What is sent to the server and how its answer is read. What the user pasted is sent as it stands, character by character.

import { Refused, address, answer, cards, events, headers } from "./server.js";

export { Refused };

// The clinical models of the server.
export const models = (key) => cards(key, "clinical");

// What a text is: {kind: "fhir" | "request" | "text", patients, keys, says, texts}. texts: of each patient, null without one.
export function read(text) {
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    return { kind: "text", keys: [], patients: 0, says: text.trim() ? "no JSON so far" : "" };
  }
  if (value === null || typeof value !== "object" || Array.isArray(value))
    return { kind: "text", keys: [], patients: 0, says: "JSON, but no object" };
  const keys = Object.keys(value);
  if (typeof value.resourceType === "string") {
    const entries = Array.isArray(value.entry) ? `, ${value.entry.length} entries` : "";
    return { kind: "fhir", keys, patients: 0, model: null, says: `FHIR ${value.resourceType}${entries}` };
  }
  const patients = Array.isArray(value.patients) ? value.patients.length : 0;
  const texts = patients ? value.patients.map((each) => (typeof each?.text === "string" ? each.text : null)) : [];
  const cutoff = value.patients?.[0]?.cutoff_hour ?? value.cutoff_hour;
  return { kind: "request", keys, patients, model: value.model, cutoff, texts, says: `request for ${patients} patient${patients === 1 ? "" : "s"}` };
}

// options that the request does not have are put before what it says; nothing of it is written anew.
function spliced(text, found, options) {
  const missing = Object.entries(options).filter(([name, value]) => value !== undefined && !found.keys.includes(name));
  if (!missing.length) return text;
  const begun = missing.map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`).join(", ");
  return text.replace("{", () => `{${begun}${found.keys.length ? ", " : ""}`);
}

// Asks for predictions. hour: called with each event of a stream but the last. Returns the whole reply.
export async function predict(text, { model, explain, hourly, stream, key, signal, hour }) {
  const found = read(text);
  let url = address("v1/predict"), body = text, type = "application/json";
  if (found.kind === "fhir") {
    url = address("v1/predict", { model, explain, hourly });
    type = "application/fhir+json";
  } else if (found.kind === "request") body = spliced(text, found, { model, explain, hourly, stream: stream || undefined });
  const sent = { method: "POST", body, signal, cache: "no-store", headers: headers(key, { "content-type": type }) };
  const response = await answer(await fetch(url, sent));
  if (!(response.headers.get("content-type") ?? "").startsWith("text/event-stream")) return response.json();
  return streamed(response, hour);
}

async function streamed(response, hour) {
  let whole = null;
  for await (const message of events(response)) {
    if (message.object === "prediction.hour") hour(message);
    else whole = message;
  }
  if (!whole) throw new Error("the stream ended before the prediction was complete");
  return whole;
}
