// Pictures as canvases: files, emoji and base64 become pixels, and pixels become data URLs. Nothing is loaded from an address.

const MAX_OBJECT = 128; // pixels of a side that are sent of an object; the server scales it to its region

export function blank(width, height = width) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

// A file's picture as canvas: a square of `side` from its middle, or, without side, whole and at most MAX_OBJECT a side.
export async function ofFile(file, side) {
  const image = await createImageBitmap(file);
  const share = side ? 1 : Math.min(1, MAX_OBJECT / Math.max(image.width, image.height));
  const size = side ? [side, side] : [image.width, image.height].map((each) => Math.max(1, Math.round(each * share)));
  const found = blank(...size), least = Math.min(image.width, image.height);
  const part = side ? [(image.width - least) / 2, (image.height - least) / 2, least, least] : [0, 0, image.width, image.height];
  const context = found.getContext("2d");
  Object.assign(context, { imageSmoothingEnabled: true, imageSmoothingQuality: "high" });
  context.drawImage(image, ...part, 0, 0, ...size);
  return found;
}

// A character in the visitor's own font, cut to its ink; null where nothing is drawn.
export function ofCharacter(character) {
  const whole = blank(MAX_OBJECT), context = whole.getContext("2d", { willReadFrequently: true });
  Object.assign(context, { font: `${MAX_OBJECT * 0.7}px sans-serif`, textAlign: "center", textBaseline: "middle" });
  context.fillText(character, MAX_OBJECT / 2, MAX_OBJECT / 2);
  const { data } = context.getImageData(0, 0, MAX_OBJECT, MAX_OBJECT);
  let [left, top, right, bottom] = [MAX_OBJECT, MAX_OBJECT, -1, -1];
  for (let at = 3, n = 0; at < data.length; at += 4, n += 1)
    if (data[at]) {
      const x = n % MAX_OBJECT, y = Math.floor(n / MAX_OBJECT);
      [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x), Math.max(bottom, y)];
    }
  if (right < left) return null;
  const found = blank(right - left + 1, bottom - top + 1);
  found.getContext("2d").drawImage(whole, -left, -top);
  return found;
}

export async function ofBase64(text) {
  const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const found = blank(image.width, image.height);
  found.getContext("2d").drawImage(image, 0, 0);
  return found;
}

export const dataUrl = (canvas) => canvas.toDataURL("image/png");

// Draws a picture into a canvas on the page, in as many pixels as it has.
export function show(canvas, picture) {
  Object.assign(canvas, { width: picture.width, height: picture.height, hidden: false });
  canvas.getContext("2d").drawImage(picture, 0, 0);
}
