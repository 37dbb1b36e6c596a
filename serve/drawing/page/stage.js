// The background with the object in its region, which is drawn, dragged, moved by arrow keys, or typed.

import { $ } from "./dom.js";
import { blank } from "./pictures.js";

const SCALE = 16; // pixels of the stage for each of the picture
const FIELDS = ["left", "top", "width", "height"];
const clamped = (value, least, most) => Math.min(most, Math.max(least, value));

export class Stage {
  constructor(changed) {
    Object.assign(this, { changed, side: 32, background: blank(32), object: null, from: null });
    this.region = { left: 8, top: 8, width: 16, height: 16 };
    const stage = $("stage");
    stage.addEventListener("pointerdown", (event) => this.begin(event));
    stage.addEventListener("pointermove", (event) => this.from && this.follow(event));
    for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, () => (this.from = null));
    stage.addEventListener("keydown", (event) => this.key(event));
    for (const name of FIELDS) $(name).addEventListener("change", () => this.put({ [name]: Math.round(Number($(name).value)) || 0 }));
    this.carry($("object"));
  }

  setSide(side) {
    this.side = side;
    this.background = blank(side);
    this.background.getContext("2d").fillStyle = "#8e8e8e";
    this.background.getContext("2d").fillRect(0, 0, side, side);
    this.put({ left: Math.round(side / 4), top: Math.round(side / 4), width: Math.round(side / 2), height: Math.round(side / 2) });
  }

  // An object in its own proportions, in the place of the one before.
  setObject(object) {
    this.object = object;
    const { width, height } = this.region, most = Math.max(width, height), share = most / Math.max(object.width, object.height);
    this.put({ width: Math.max(1, Math.round(object.width * share)), height: Math.max(1, Math.round(object.height * share)) });
  }

  setBackground(background) {
    this.background = background;
    this.draw();
  }

  centre(x = this.side / 2, y = this.side / 2) {
    this.put({ left: Math.round(x - this.region.width / 2), top: Math.round(y - this.region.height / 2) });
  }

  // At least a pixel of the region stays in the picture.
  put(change) {
    const next = { ...this.region, ...change }, side = this.side;
    const width = clamped(next.width, 1, 2 * side), height = clamped(next.height, 1, 2 * side);
    this.region = { left: clamped(next.left, 1 - width, side - 1), top: clamped(next.top, 1 - height, side - 1), width, height };
    for (const name of FIELDS) $(name).value = this.region[name];
    this.draw();
    this.changed(this.region);
  }

  place(event) {
    const box = $("stage").getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.side, ((event.clientY - box.top) / box.height) * this.side];
  }

  begin(event) {
    const [x, y] = this.place(event), { left, top, width, height } = this.region;
    const inside = x >= left && x < left + width && y >= top && y < top + height;
    this.from = { x, y, move: inside ? { left, top } : null };
    $("stage").setPointerCapture(event.pointerId);
  }

  follow(event) {
    const [x, y] = this.place(event), { from } = this;
    if (from.move) return this.put({ left: Math.round(from.move.left + x - from.x), top: Math.round(from.move.top + y - from.y) });
    const [left, right] = [from.x, x].sort((a, b) => a - b), [top, bottom] = [from.y, y].sort((a, b) => a - b);
    if (Math.max(right - left, bottom - top) < 1) return undefined;
    const corner = [Math.floor(left), Math.floor(top)];
    return this.put({ left: corner[0], top: corner[1], width: Math.ceil(right) - corner[0], height: Math.ceil(bottom) - corner[1] });
  }

  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const { left, top, width, height } = this.region, [x, y] = step;
    this.put(event.shiftKey ? { width: width + x, height: height + y } : { left: left + x, top: top + y });
  }

  // The object is taken from its own canvas and let go over the background.
  carry(source) {
    source.addEventListener("pointerdown", (event) => {
      if (!this.object) return;
      source.setPointerCapture(event.pointerId);
      source.classList.add("carried");
    });
    source.addEventListener("pointermove", (event) => {
      if (!source.classList.contains("carried")) return;
      const [x, y] = this.place(event);
      if (x >= 0 && y >= 0 && x < this.side && y < this.side) this.centre(x, y);
    });
    for (const name of ["pointerup", "pointercancel"]) source.addEventListener(name, () => source.classList.remove("carried"));
  }

  draw() {
    const stage = $("stage"), { left, top, width, height } = this.region;
    stage.width = stage.height = this.side * SCALE;
    const context = stage.getContext("2d"), box = [left, top, width, height].map((each) => each * SCALE);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.background, 0, 0, stage.width, stage.height);
    if (this.object) {
      const scaled = blank(width, height); // as coarse as it will be
      scaled.getContext("2d").drawImage(this.object, 0, 0, width, height);
      context.drawImage(scaled, ...box);
    }
    for (const [colour, dash] of [["#000", []], ["#fff", [8, 8]]]) {
      context.strokeStyle = colour;
      context.lineWidth = 3;
      context.setLineDash(dash);
      context.strokeRect(...box);
    }
  }
}
