// Patients that were made up for this page (example.json). Their measurements follow straight lines with noise, by what a
// variable means, so that they fit models whose data sets use other names. Nothing of them was taken from a data set.

const { courses, talks } = await (await fetch(new URL("./example.json", import.meta.url))).json(); // courses: by what a variable means
const AGAIN = 4; // a variable that means what an earlier one means is measured more rarely

// Numbers between -1 and 1, the same each time.
function noise(seed) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
}

export const examples = (card) => Boolean(card?.reads?.includes("text") || card?.variables.some(({ meaning }) => courses[meaning]));

function measurements(card, end, seed, share) {
  const draw = noise(seed), seen = new Set(), found = [], hours = Math.min(48, card.window_hours);
  for (const { name, meaning, unit } of card.variables) {
    if (!courses[meaning]) continue;
    const course = courses[meaning], [first, , , spread, between, decimals] = course, last = course[end];
    const every = between * (seen.has(meaning) ? AGAIN : 1), begin = (Math.abs(draw()) * Math.min(every, 3)) / 2;
    seen.add(meaning);
    for (let hour = begin; hour < hours * share; hour += every) {
      const value = first + ((last - first) * hour) / 48 + draw() * spread;
      found.push({ variable: name, hour: Number(hour.toFixed(2)), value: Number(value.toFixed(decimals)), unit });
    }
  }
  return found;
}

// What goes wrong in records: a value that is clipped, one that cannot be, a unit that nobody knows.
function mistakes(card) {
  const named = (meaning) => card.variables.find((each) => each.meaning === meaning);
  const [rate, acid, sugar] = ["heart rate", "pH of blood", "glucose"].map(named);
  return [
    rate && { variable: rate.name, hour: 9.6, value: 262, unit: rate.unit },
    acid && { variable: acid.name, hour: 15.5, value: 73.1, unit: acid.unit },
    sugar && { variable: sugar.name, hour: 20.5, value: 9.4, unit: "spoons" },
  ].filter(Boolean);
}

const person = (id, age, sex, more) => ({ id, age_years: age, sex, ...more });

// A request for one made-up patient, or for three of whom the last was hardly measured.
export function example(card, many = false) {
  if (card.reads.includes("text")) return texts(card, many);
  const window = card.window_hours, statics = { height_cm: 168, weight_kg: 81.5, icu_type: "medical" };
  const worse = person("made-up 1", 71, "female", { ...statics, admitted: "2026-03-01T08:00:00+01:00", cutoff_hour: window });
  worse.measurements = [...measurements(card, 1, 7, 1), ...mistakes(card)].filter(({ hour }) => hour < window).sort((a, b) => a.hour - b.hour);
  if (!many) return { patients: [worse] };
  const better = person("made-up 2", 58, "male", { ...statics, height_cm: 181, cutoff_hour: window, measurements: measurements(card, 2, 11, 1) });
  const hardly = person("made-up 3", 40, "unknown", { cutoff_hour: window, measurements: measurements(card, 2, 13, 1).slice(0, 2) });
  return { patients: [worse, better, hardly] };
}

// The same for a model of texts: made-up talks, the last of which says hardly anything.
function texts(card, many) {
  const also = card.reads.includes("measurements") ? { measurements: measurements(card, 1, 7, 1), cutoff_hour: card.window_hours } : {};
  const found = talks.map((text, at) => ({ id: `made-up ${at + 1}`, text, ...also }));
  return { patients: many ? found : found.slice(0, 1) };
}
