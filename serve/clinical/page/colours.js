// Colours of numbers. Signed maps run from blue (lowers) to orange (raises), which people who see red and green alike tell
// apart; maps without a sign run in violet, so that nobody reads a sign into them. Ends come from the style sheet.

const COLOURS = ["zero", "lower", "lowest", "raise", "highest", "some", "much"];

export function palette() {
  const style = getComputedStyle(document.documentElement);
  const ends = Object.fromEntries(
    COLOURS.map((name) => {
      const text = style.getPropertyValue(`--${name}`).trim();
      return [name, [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16))];
    }),
  );
  const between = (a, b, share) => `rgb(${a.map((x, n) => Math.round(x + (b[n] - x) * share)).join(" ")})`;
  const ramp = (share, middle, end) => {
    const at = Math.min(1, share);
    return at < 0.5 ? between(ends.zero, ends[middle], at * 2) : between(ends[middle], ends[end], at * 2 - 1);
  };
  return (share, signed) => {
    if (!signed) return ramp(Math.abs(share), "some", "much");
    return share < 0 ? ramp(-share, "lower", "lowest") : ramp(share, "raise", "highest");
  };
}

// The place of a number on the scale, -1 to 1: by square roots, so that small numbers are seen beside large ones.
export const place = (value, most) => Math.sign(value) * Math.sqrt(Math.min(1, Math.abs(value) / (most || 1)));

export function largest(map) {
  let most = 0;
  for (const row of map.values) for (const value of row) if (Math.abs(value) > most) most = Math.abs(value);
  return most;
}
