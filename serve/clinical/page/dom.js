// Elements. Text of the server and of requests becomes a text node and never HTML: nothing here or elsewhere parses HTML.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((each) => each !== undefined && each !== null));
  return made;
}

export const element = (kind, attributes = {}, ...children) => fill(document.createElement(kind), attributes, children);

export const drawn = (kind, attributes = {}, ...children) => fill(document.createElementNS(SVG, kind), attributes, children);

export function replace(parent, ...children) {
  parent.replaceChildren(...children.filter((each) => each !== undefined && each !== null));
}

// Radio buttons in a fieldset that keeps its legend. options: [{value, text, title}].
export function choices(fieldset, name, options, chosen, choose) {
  const labels = options.map(({ value, text, title }) => {
    const input = element("input", { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => choose(value));
    return element("label", { title }, input, element("span", {}, text));
  });
  replace(fieldset, fieldset.querySelector("legend"), ...labels);
}

// --- numbers in words --------------------------------------------------------------------------------------------

export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value < 100 && value > 99.9) return "> 99.9 %";
  return `${value < 10 || (value > 99 && value < 100) ? value.toFixed(1) : value.toFixed(0)} %`;
}

export function range(low, high) {
  const [from, to] = [percent(low), percent(high)];
  return /[<>]/.test(from + to) ? `${from} to ${to}` : `${from.replace(" %", "")} to ${to}`;
}

export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(size >= 1000 ? Math.ceil(Math.log10(size)) : 3)));
}

export const logit = (size) => (size < 0.0005 ? "< 0.001" : size.toFixed(size < 1 ? 3 : 2));

const UNITS = { "1": "", "mm[Hg]": "mmHg", Cel: "°C", a: "years", "10*3/uL": "10³/µL", "/min": "per min" };

export const unit = (ucum) => UNITS[ucum] ?? String(ucum ?? "").replace(/^u(?=[A-Za-z])/, "µ");

export const measured = (value, ucum) => [number(value), unit(ucum)].filter(Boolean).join(" ");

export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
