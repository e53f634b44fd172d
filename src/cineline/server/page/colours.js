/** A colour for each video, the same in the list and in the line. All are as light, so that dark words can be read on them. */

const ORDER = new Map();
const GOLDEN_ANGLE = 137.508;

export function hueOf(video) {
  if (!ORDER.has(video)) ORDER.set(video, ORDER.size);
  return (255 + ORDER.get(video) * GOLDEN_ANGLE) % 360;
}

/** @param {string | null} video null for somebody else's. */
export function colourOf(video, kind = "denoise", alpha = 1) {
  const light = { denoise: 0.76, decode: 0.86, text: 0.68, encode: 0.68 }[kind] ?? 0.76;
  if (video === null) return `oklch(${light} 0 0 / ${alpha})`;
  return `oklch(${light} 0.13 ${hueOf(video).toFixed(1)} / ${alpha})`;
}
