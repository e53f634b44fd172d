/** What the page says, where it has to be made of parts. */

export const COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"];
export const SHAPES = ["circle", "square", "triangle"];
export const MOTIONS = ["moving left", "moving right", "moving up", "moving down", "growing", "shrinking"];

const EXAMPLES = [
  "a cat surfing at sunset, the camera close to the water",
  "steam rises from a cup of coffee on a rainy window sill",
  "a paper boat drifts down a brook in a mossy forest",
];

const any = (words) => words[Math.floor(Math.random() * words.length)];

/** A sentence that the models that ship can draw. */
export function miniPrompt() {
  const colour = any(COLOURS);
  return `a ${colour} ${any(SHAPES)} ${any(MOTIONS)} on a ${any(COLOURS.filter((each) => each !== colour))} background`;
}

export function examples(mini) {
  return mini ? [miniPrompt(), miniPrompt(), miniPrompt()] : EXAMPLES;
}

export function promptHelp(mini) {
  if (!mini) return "Say what is seen, how it moves and how it is filmed.";
  return (
    "This small model draws one thing: a coloured circle, square or triangle, moving left, right, up or down, " +
    `growing or shrinking, on a background of another colour. Colours: ${COLOURS.join(", ")}.`
  );
}

export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** A field's name, for people. */
export function named(field) {
  const names = { num_frames: "Frames", fps: "Frames a second", num_inference_steps: "Steps", timeout_s: "Time limit, s" };
  const second = field.endsWith("_2") ? " 2" : "";
  return names[field] ?? capital(field.replace(/_2$/, "").replaceAll("_", " ")) + second;
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  return `${Math.round(value / 60)} min`;
}

/** What a job is at. */
export function phase(job) {
  if (job.status === "failed") return "failed";
  if (job.status === "completed") {
    return job.inference_time_s === null ? "done" : `done in ${seconds(job.inference_time_s)}`;
  }
  const again = job.restarts ? `, begun again ${job.restarts === 1 ? "once" : `${job.restarts} times`}` : "";
  if (job.phase === "denoising") return `denoising, step ${job.step} of ${job.num_inference_steps}${again}`;
  if (job.phase === "decoding") return `decoding, part ${job.decoded} of ${job.chunks ?? "?"}${again}`;
  if (job.phase === "encoding") return `reading the prompt${again}`;
  return `waiting${again}`;
}

/** What a slice is. */
export function sliceWords(slice) {
  const branch = slice.branch === "uncond" ? ", without the prompt" : "";
  const what = {
    text: `reads the prompt${branch}`,
    encode: "prepares",
    denoise: `step ${slice.number}${branch}`,
    decode: `decodes part ${slice.number}`,
  };
  return what[slice.kind] ?? slice.kind;
}

export function milliseconds(us) {
  return us < 10_000 ? `${(us / 1000).toFixed(1)} ms` : us < 1e6 ? `${Math.round(us / 1000)} ms` : `${(us / 1e6).toFixed(1)} s`;
}

export function size(job) {
  return `${job.size.replace("x", "×")}, ${job.seconds} s`;
}

/** A number too large to be exact here is not shown as if it were. */
export function seed(value) {
  return Number.isSafeInteger(value) ? String(value) : "too large to be shown exactly";
}
