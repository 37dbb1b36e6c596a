// A reply of /v1/predict in the form that the page draws: for every patient an array by variable and hour.

import { measured } from "./dom.js";

export const TITLES = { gradients: "gradients, signed", attention: "attention" };
export const NAMES = { "integrated gradients": "gradients", attention: "attention" };

const grid = (patient, empty) => patient.variables.map(() => Array(patient.hours).fill(empty));

export function patientOf(reply, index) {
  const given = reply.patients[index];
  const patient = {
    ...given,
    curve: given.by_hour ?? [],
    early: reply.early_hours,
    hours: given.cutoff_hour,
    base: reply.base_rate?.probability ?? null,
    variables: (reply.variables ?? []).map((each) => ({
      ...each,
      low: each.plausible?.[0],
      high: each.plausible?.[1],
      words: (value) => measured(value, each.unit),
    })),
    maps: new Map(),
  };
  patient.places = new Map(patient.variables.map((each, at) => [each.name, at]));
  patient.cells = grid(patient, null);
  for (const cell of given.cells ?? []) {
    const at = patient.places.get(cell.variable);
    if (at !== undefined && cell.hour < patient.hours) patient.cells[at][cell.hour] = { ...cell, note: note(cell) };
  }
  addMaps(patient, given.explanations);
  return patient;
}

export function addMaps(patient, explanations) {
  for (const each of explanations ?? []) {
    const values = grid(patient, 0);
    for (const cell of each.cells) {
      const at = patient.places.get(cell.variable);
      if (at !== undefined && cell.hour < patient.hours) values[at][cell.hour] = cell.contribution;
    }
    patient.maps.set(NAMES[each.name] ?? each.name, { ...each, values });
  }
}

// What is said of a flagged cell.
function note(cell) {
  if (!cell.flag) return "";
  const known = cell.given && cell.given.value !== null && cell.given.value !== undefined; // FHIR values are named by their resource
  const given = known ? measured(cell.given.value, cell.given.unit) : (cell.given?.reference ?? "a value");
  if (!cell.measured) return `${given} was refused: ${cell.flag}`;
  return cell.flag === "clipped" ? `implausible: ${given} was clipped to the range` : `${cell.flag}: ${given} was given`;
}
