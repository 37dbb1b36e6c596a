"use strict";
// Reads the data of the page (attnzoo/attention_page/encoding.py says its form) and draws it. Text of the model reaches the page
// by textContent alone.

const data = JSON.parse(document.getElementById("data").textContent);
const T = data.tokens.length;
const TRIANGLE = (T * (T + 1)) / 2;
const $ = (id) => document.getElementById(id);

// --- numbers -----------------------------------------------------------------------------------------------------

const HALF = new Float32Array(65536); // every number of 16 bits
for (let bits = 0; bits < 65536; bits++) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  let size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  if (exponent === 31) size = fraction ? NaN : Infinity;
  HALF[bits] = bits & 32768 ? -size : size;
}

function decoded(text) {
  const bytes = atob(text), out = new Uint16Array(bytes.length / 2);
  for (let n = 0; n < out.length; n++) out[n] = bytes.charCodeAt(2 * n) | (bytes.charCodeAt(2 * n + 1) << 8);
  return out;
}

const layers = data.layers.map((each) => {
  const bits = decoded(each.weights);
  let most = 0, negative = false;
  for (const each of bits) {
    const value = HALF[each];
    if (value < 0) negative = true;
    if (Math.abs(value) > most) most = Math.abs(value);
  }
  return { ...each, bits, most: most || 1, negative };
});

// The weight that query gives to key in the n-th head of a layer; undefined where the key comes after the query.
function weight(layer, n, query, key) {
  return key > query ? undefined : HALF[layer.bits[n * TRIANGLE + (query * (query + 1)) / 2 + key]];
}

function number(value) {
  if (value === undefined) return "hidden (the key comes after the query)";
  if (value === 0) return "0";
  return Math.abs(value) < 1e-3 ? value.toExponential(2) : value.toPrecision(3);
}

const visible = (index) => data.tokens[index].text.replace(/ /g, "\u00b7");
const named = (index) => `${index} \u201c${visible(index)}\u201d`;

// --- colours -----------------------------------------------------------------------------------------------------

let palette; // 511 colours: -1 at 0, 0 at 255, 1 at 510

function makePalette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => {
    const text = style.getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  };
  const [zero, more, most, less, least] = ["zero", "more", "most", "less", "least"].map(colour);
  const between = (a, b, share) => a.map((x, n) => Math.round(x + (b[n] - x) * share));
  palette = Array.from({ length: 511 }, (_, n) => {
    const share = Math.abs(n - 255) / 255, [middle, end] = n < 255 ? [less, least] : [more, most];
    return share < 0.5 ? between(zero, middle, share * 2) : between(middle, end, share * 2 - 1);
  });
}

function colourOf(value, layer) {
  const share = Math.min(1, Math.abs(value) / layer.most), kind = state.scale;
  const seen = kind === "linear" ? share : kind === "root" ? Math.sqrt(share) : Math.max(0, 1 + Math.log10(share) / 4);
  return palette[255 + Math.round((value < 0 ? -255 : 255) * (seen || 0))];
}

function paint(canvas, size, valueAt, layer) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  for (let row = 0; row < size; row++)
    for (let column = 0; column < size; column++) {
      const value = valueAt(row, column);
      if (value === undefined) continue;
      const rgb = colourOf(value, layer), at = 4 * (row * size + column);
      for (let n = 0; n < 3; n++) image.data[at + n] = rgb[n];
      image.data[at + 3] = 255;
    }
  context.putImageData(image, 0, 0);
}

// A smaller map: each of its cells shows the largest weight of those that it stands for, so that none is lost.
function small(layer, n) {
  const size = Math.min(T, 56), cells = new Array(size * size);
  for (let query = 0, at = n * TRIANGLE; query < T; query++) {
    const row = Math.floor((query * size) / T) * size;
    for (let key = 0; key <= query; key++, at++) {
      const value = HALF[layer.bits[at]], cell = row + Math.floor((key * size) / T);
      if (cells[cell] === undefined || Math.abs(value) > Math.abs(cells[cell])) cells[cell] = value;
    }
  }
  return { size, valueAt: (row, column) => cells[row * size + column] };
}

// --- the overview ------------------------------------------------------------------------------------------------

const state = { layer: 0, head: 0, query: T - 1, key: T - 1, held: null, direction: "to", cell: 8, scale: "root", pressed: null };
const columns = [...new Set(layers.flatMap((each) => each.heads))].sort((a, b) => a - b);
const buttons = []; // {layer, head (its place among those of the layer), row, column, button, canvas, picture}

function element(kind, text, parent) {
  const made = document.createElement(kind);
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function buildGrid() {
  const room = Math.max(240, $("overview").clientWidth - 85);
  const side = Math.max(28, Math.min(72, Math.floor(room / columns.length) - 4));
  const top = element("tr", "", element("thead", "", $("grid")));
  element("th", "head", top);
  for (const head of columns) element("th", String(head), top).scope = "col";
  const body = element("tbody", "", $("grid"));
  layers.forEach((layer, number) => {
    const row = element("tr", "", body);
    const title = element("th", `layer ${layer.layer}`, row);
    title.scope = "row";
    title.title = layer.variant;
    columns.forEach((name, column) => {
      const cell = element("td", "", row), head = layer.heads.indexOf(name);
      if (head < 0) return;
      const button = element("button", "", cell), canvas = element("canvas", "", button);
      button.type = "button";
      button.style.width = button.style.height = `${side}px`;
      press(button, false);
      button.setAttribute("aria-label", `layer ${layer.layer}, head ${name}`);
      const made = { layer: number, head, row: number, column, button, canvas, picture: small(layer, head) };
      button.addEventListener("click", () => {
        choose(number, head);
        if ($("overview").offsetTop + $("overview").offsetHeight <= $("head").offsetTop) $("head").scrollIntoView(); // one column
      });
      button.addEventListener("keydown", (event) => walkGrid(event, made));
      button.addEventListener("mousemove", (event) => tip(event, `layer ${layer.layer}, head ${name}\n${layer.variant}`));
      button.addEventListener("mouseleave", hideTip);
      buttons.push(made);
    });
  });
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function walkGrid(event, from) {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  const found = buttons.find((each) => each.row === from.row + step[0] && each.column === from.column + step[1]);
  if (found) {
    found.button.focus();
    choose(found.layer, found.head);
  }
}

function press(button, here) {
  button.setAttribute("aria-pressed", String(here));
  button.tabIndex = here ? 0 : -1; // one stop of the tab key for the whole grid
}

function choose(layer, head) {
  Object.assign(state, { layer, head });
  if (state.pressed) press(state.pressed, false);
  state.pressed = buttons.find((each) => each.layer === layer && each.head === head).button;
  press(state.pressed, true);
  const chosen = layers[layer], name = chosen.heads[head];
  $("head-title").textContent = `Layer ${chosen.layer}, head ${name} (${chosen.variant})`;
  history.replaceState(null, "", `#layer=${chosen.layer}&head=${name}`);
  drawLegend();
  drawMap();
  point(state.query, state.key);
  colourText(state.held ?? state.query);
}

function drawLegend() {
  const layer = layers[state.layer], context = $("ramp").getContext("2d"), from = layer.negative ? -layer.most : 0;
  for (let x = 0; x < 128; x++) {
    context.fillStyle = `rgb(${colourOf(from + ((layer.most - from) * x) / 127, layer)})`;
    context.fillRect(x, 0, 1, 1);
  }
  $("least").textContent = from ? number(from) : "0";
  $("most").textContent = number(layer.most);
}

// --- one head: the map -------------------------------------------------------------------------------------------

function drawMap() {
  const layer = layers[state.layer];
  paint($("map"), T, (query, key) => weight(layer, state.head, query, key), layer);
}

function layOut() {
  const side = T * state.cell, pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui, sans-serif";
  const band = 10 + Math.min(120, Math.max(...data.tokens.map((_, index) => Math.ceil(pen.measureText(visible(index)).width))));
  const step = Math.ceil(13 / state.cell); // labels that do not touch
  for (const id of ["map", "cells"]) $(id).style.width = $(id).style.height = `${side}px`;
  for (const [id, width, height] of [["corner", band, band], ["keys", side, band], ["queries", band, side]]) {
    $(id).style.width = `${width}px`;
    $(id).style.height = `${height}px`;
  }
  for (const id of ["keys", "queries"]) {
    $(id).replaceChildren();
    for (let index = 0; index < T; index += step) label(id, index);
  }
  point(state.query, state.key);
}

function label(id, index) {
  const made = element("div", visible(index), $(id)), at = `${index * state.cell + (state.cell - 12) / 2}px`;
  made.style[id === "keys" ? "left" : "top"] = at;
  return made;
}

// Puts the cursor on a pair, and says its weight.
function point(query, key) {
  Object.assign(state, { query, key });
  const cursor = $("cursor").style, side = `${state.cell}px`;
  Object.assign(cursor, { display: "block", width: side, height: side });
  Object.assign(cursor, { left: `${key * state.cell}px`, top: `${query * state.cell}px` });
  for (const [id, index] of [["keys", key], ["queries", query]]) {
    for (const old of $(id).querySelectorAll(".here")) old.remove();
    label(id, index).className = "here";
  }
  $("readout").textContent = says(query, key);
}

function says(query, key) {
  return `query ${named(query)} \u2192 key ${named(key)}: ${number(weight(layers[state.layer], state.head, query, key))}`;
}

function cellUnder(event) {
  const box = $("map").getBoundingClientRect();
  const at = (distance) => Math.max(0, Math.min(T - 1, Math.floor(distance / state.cell)));
  return [at(event.clientY - box.top), at(event.clientX - box.left)];
}

function hoverMap(event) {
  const [query, key] = cellUnder(event);
  if (state.held === null) colourText(state.direction === "to" ? query : key);
  point(query, key); // what is said last stands in the line above
  tip(event, says(query, key));
}

function walkMap(event) {
  const step = STEPS[event.key] ?? { Home: [0, -state.key], End: [0, state.query - state.key] }[event.key];
  if (!step) return;
  event.preventDefault();
  const query = Math.max(0, Math.min(T - 1, state.query + step[0])), key = Math.max(0, Math.min(T - 1, state.key + step[1]));
  if (state.held === null) colourText(state.direction === "to" ? query : key);
  point(query, key); // what is said last stands in the line above
  $("cursor").scrollIntoView({ block: "nearest", inline: "nearest" });
}

function tip(event, text) {
  const box = $("tip");
  box.textContent = text;
  box.hidden = false;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 4)}px`;
  box.style.top = `${event.clientY + 18 + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 8 : event.clientY + 18}px`;
}

const hideTip = () => ($("tip").hidden = true);

// --- one head: the text ------------------------------------------------------------------------------------------

const words = [];

function buildText() {
  data.tokens.forEach((token, index) => {
    const span = element("span", token.text || " ", $("text"));
    if (token.control) span.className = "control";
    if (token.text.includes("\u23ce")) element("br", "", $("text"));
    span.tabIndex = index ? -1 : 0;
    span.setAttribute("role", "button");
    span.addEventListener("mousemove", (event) => meet(index, event));
    span.addEventListener("mouseleave", hideTip);
    span.addEventListener("focus", () => meet(index));
    span.addEventListener("click", () => hold(index));
    span.addEventListener("keydown", (event) => walkText(event, index));
    words.push(span);
  });
}

// A token is hovered or focused: it becomes the one whose weights are shown, or, if one is held, says its own.
function meet(index, event) {
  if (state.held === null) colourText(index);
  else saysPair(state.held, index);
  if (event) tip(event, $("readout").textContent);
}

function hold(index) {
  state.held = state.held === index ? null : index;
  colourText(index);
}

function saysPair(own, other) {
  if (state.direction === "to") point(own, other);
  else point(other, own);
}

function walkText(event, index) {
  const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: T - 1 }[event.key];
  if (event.key === "Enter" || event.key === " ") hold(index);
  else if (event.key === "Escape") {
    state.held = null;
    colourText(index);
  } else if (to === undefined) return;
  else if (words[to]) {
    words[index].tabIndex = -1;
    words[to].tabIndex = 0;
    words[to].focus();
  }
  event.preventDefault();
}

function colourText(own) {
  const layer = layers[state.layer], forward = state.direction === "to", found = [];
  words.forEach((span, other) => {
    const value = forward ? weight(layer, state.head, own, other) : weight(layer, state.head, other, own);
    const rgb = value === undefined ? null : colourOf(value, layer);
    span.style.background = rgb ? `rgb(${rgb})` : "none";
    span.style.color = !rgb ? "" : rgb[0] * 0.3 + rgb[1] * 0.59 + rgb[2] * 0.11 > 140 ? "#000" : "#fff";
    span.classList.toggle("here", other === own);
    span.classList.toggle("held", other === state.held);
    if (value) found.push([value, other]);
  });
  found.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
  const most = found.slice(0, 5).map(([value, other]) => `${named(other)} ${number(value)}`).join(", ");
  $("readout").textContent = `${forward ? "query" : "key"} ${named(own)} ${forward ? "attends most to" : "gets most from"}: ${most || "nothing"}`;
}

// --- start -------------------------------------------------------------------------------------------------------

function redraw() {
  makePalette();
  for (const { layer, canvas, picture } of buttons) paint(canvas, picture.size, picture.valueAt, layers[layer]);
  choose(state.layer, state.head);
}

function start() {
  const heads = layers.reduce((sum, each) => sum + each.heads.length, 0);
  $("summary").textContent = `${layers.length} of ${data.num_layers} layers, ${heads} heads, ${T} tokens`;
  for (const note of data.notes) element("li", note, $("notes"));
  const wanted = new URLSearchParams(location.hash.slice(1));
  const layer = layers.findIndex((each) => String(each.layer) === wanted.get("layer"));
  if (layer >= 0) state.layer = layer;
  state.head = Math.max(0, layers[state.layer].heads.indexOf(Number(wanted.get("head") ?? -1)));
  buildGrid();
  buildText();
  const room = Math.min($("scroll").clientWidth - 150, innerHeight * 0.7 - 110);
  state.cell = Math.max(3, Math.min(36, Math.floor(room / T)));
  $("size").value = state.cell;
  $("scale").value = state.scale; // browsers keep what was chosen before a page was loaded again
  redraw();
  layOut();
  colourText(state.query);
  $("scale").addEventListener("change", () => {
    state.scale = $("scale").value;
    redraw();
  });
  $("size").addEventListener("input", () => {
    state.cell = Number($("size").value);
    layOut();
  });
  $("cells").addEventListener("mousemove", hoverMap);
  $("cells").addEventListener("mouseleave", hideTip);
  $("cells").addEventListener("keydown", walkMap);
  for (const radio of document.getElementsByName("direction")) {
    radio.checked = radio.value === state.direction;
    radio.addEventListener("change", () => {
      state.direction = radio.value;
      colourText(state.held ?? state.query);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

start();
