/** The form: what the model can do, what is wrong in words beside the field, and a picture by dropping it. */

import { Refusal, askJson, onceKey } from "/page/api.js";
import { capital, examples, named, promptHelp } from "/page/words.js";

const ASPECTS = [["Wide", 16, 9], ["Landscape", 4, 3], ["Square", 1, 1], ["Portrait", 3, 4], ["Tall", 9, 16]];
const IMAGES = ["image", "last_image"];
const PREVIEWS = 8;

/** Fields whose trouble is shown at another one. */
const SHOWN_AT = { input_reference: "image", image_reference: "image", last_frame: "last_image", seconds: "num_frames" };

const by = (id) => document.getElementById(id);

export class Form {
  /** @param made called with a new job, and the pictures that came along. */
  constructor(made, say) {
    this.made = made;
    this.say = say;
    this.takes = null;
    this.once = onceKey();
    this.form = by("make");
    this.images = { image: null, last_image: null };
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.form.addEventListener("input", (event) => {
      this.once = onceKey();
      this.#clear(event.target);
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    by("size").addEventListener("change", () => this.#sides());
    for (const name of IMAGES) by(name).addEventListener("change", () => this.#choose(name, by(name).files[0] ?? null));
    by("image-remove").addEventListener("click", () => {
      this.#choose("image", null);
      by("image").focus();
    });
    this.#takeDrops();
  }

  /** What the served model takes. */
  fit(takes) {
    this.takes = takes;
    by("prompt-help").textContent = promptHelp(takes.mini);
    for (const name of IMAGES) {
      by(`${name}-field`).hidden = takes[name] === "no";
      by(`${name}-need`).textContent = takes[name] === "must" ? "needed" : "if you like";
    }
    this.#sizes();
    this.#advanced();
    this.#examples();
  }

  #examples() {
    const made = examples(this.takes.mini).map((text) => {
      const item = document.createElement("button");
      item.type = "button";
      item.className = "example";
      item.textContent = text;
      item.addEventListener("click", () => this.prompt(text));
      return item;
    });
    by("examples").replaceChildren(...made);
  }

  /** Have that prompt in the form. */
  prompt(text) {
    by("prompt").value = text;
    by("prompt").dispatchEvent(new Event("input", { bubbles: true }));
    by("prompt").focus();
  }

  /** Sizes of about the area that the model is made for, on its grid. */
  #sizes() {
    const { width, height } = this.takes.defaults;
    const { width_step: across, height_step: down } = this.takes;
    const own = `${width}x${height}`;
    const offered = new Map([["", `Own, ${width}×${height}`]]);
    for (const [name, x, y] of ASPECTS) {
      const area = Math.sqrt((width * height) / (x * y));
      const sides = [Math.max(1, Math.round((area * x) / across)) * across, Math.max(1, Math.round((area * y) / down)) * down];
      const size = sides.join("x");
      if (size !== own && !offered.has(size)) offered.set(size, `${name}, ${sides.join("×")}`);
    }
    offered.set("other", "Another …");
    by("size").replaceChildren(...[...offered].map(([value, text]) => new Option(text, value)));
    Object.assign(by("width"), { step: across, min: across, placeholder: width });
    Object.assign(by("height"), { step: down, min: down, placeholder: height });
    this.#sides();
  }

  #sides() {
    by("sides").hidden = by("size").value !== "other";
  }

  get #previews() {
    return this.takes.fields.some(({ name }) => name === "preview");
  }

  #advanced() {
    const { defaults, frames_step: step, fields } = this.takes;
    const number = (name, more = {}) => this.#field(name, { type: "number", placeholder: defaults[name], ...more });
    const frames = number("num_frames", { min: 1, step });
    const rate = number("fps", { min: 1, step: 1 });
    const length = () => {
      const count = Number(frames.querySelector("input").value || defaults.num_frames);
      const perSecond = Number(rate.querySelector("input").value || defaults.fps);
      frames.querySelector(".help").textContent = `${((count - 1) / perSecond).toFixed(1)} s at ${perSecond} a second`;
    };
    const parts = [
      ...(this.takes.length ? [frames, rate] : []),
      number("num_inference_steps", { min: 1, step: 1 }),
      number("guidance_scale", { min: 0, step: "any" }),
      this.#field("negative_prompt", { type: "text" }, "What it should not show"),
      ...fields.filter(({ name }) => name !== "preview").map((each) => this.#further(each)),
      this.#choice("priority", [["", "normal"], ["high", "high"], ["low", "low"]]),
      ...(this.#previews ? [this.#choice("preview", [["", `${PREVIEWS} pictures`], ["none", "none"]], "Previews")] : []),
    ];
    by("advanced-fields").replaceChildren(...parts);
    for (const field of [frames, rate]) field.addEventListener("input", length);
    length();
  }

  /** A field of the model's family, by the schema of its value. */
  #further({ name, description, values, default: held }) {
    const words = values.flatMap((each) => each.enum ?? (each.const === undefined ? [] : [each.const]));
    if (words.length) return this.#choice(name, [["", held ?? "the model's"], ...words.map((word) => [word, word])], "", description);
    const isNumber = values.some((each) => each.type === "number" || each.type === "integer");
    const kind = isNumber ? { type: "number", step: "any" } : { type: "text" };
    return this.#field(name, { ...kind, placeholder: held ?? "the model's" }, description);
  }

  #field(name, attributes, help = "") {
    const input = Object.assign(document.createElement("input"), { id: name, name, autocomplete: "off", ...attributes });
    return this.#labelled(input, named(name), help);
  }

  #choice(name, options, label = "", help = "") {
    const select = Object.assign(document.createElement("select"), { id: name, name });
    select.append(...options.map(([value, text]) => new Option(text, value)));
    return this.#labelled(select, label || named(name), help);
  }

  #labelled(input, text, help) {
    const field = document.createElement("div");
    field.className = "field";
    const label = Object.assign(document.createElement("label"), { htmlFor: input.id, textContent: text });
    const words = Object.assign(document.createElement("p"), { className: "help", id: `${input.id}-help`, textContent: help });
    input.setAttribute("aria-describedby", words.id);
    field.append(label, input, words);
    return field;
  }

  // Pictures.

  #choose(name, file) {
    this.images[name] = file;
    this.once = onceKey();
    this.#clear(by(name));
    if (file === null) by(name).value = "";
    if (name !== "image") return;
    URL.revokeObjectURL(by("image-shown").src);
    by("image-chosen").hidden = file === null;
    if (file !== null) by("image-shown").src = URL.createObjectURL(file);
  }

  #takeDrops() {
    const root = document.documentElement;
    const carries = (event) => this.takes && this.takes.image !== "no" && event.dataTransfer.types.includes("Files");
    document.addEventListener("dragover", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      root.classList.add("dropping");
    });
    for (const name of ["dragleave", "dragend"]) {
      document.addEventListener(name, (event) => event.relatedTarget === null && root.classList.remove("dropping"));
    }
    document.addEventListener("drop", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      root.classList.remove("dropping");
      const file = [...event.dataTransfer.files].find((each) => each.type.startsWith("image/"));
      if (file === undefined) this.#trouble(new Refusal(0, { message: "That is no picture: drop a PNG, JPEG or WebP file.", param: "image" }));
      else this.#choose("image", file);
      by("image").focus();
    });
  }

  // Sending.

  /** The fields that are filled in, by the API's names. */
  #fields() {
    const fields = { prompt: by("prompt").value };
    const size = by("size").value;
    if (size === "other") {
      for (const name of ["width", "height"]) if (by(name).value) fields[name] = by(name).valueAsNumber;
    } else if (size) {
      fields.size = size;
    }
    fields.seed = readSeed(by("seed").value.trim());
    for (const input of by("advanced-fields").querySelectorAll("input, select")) {
      if (input.validity.badInput) {
        throw new Refusal(0, { message: `${named(input.name)} is no number: give one, or leave it empty.`, param: input.name });
      }
      if (input.name !== "preview" && input.value) {
        fields[input.name] = input.type === "number" ? input.valueAsNumber : input.value;
      }
    }
    if (this.#previews && by("preview").value === "") {
      const steps = fields.num_inference_steps ?? this.takes.defaults.num_inference_steps;
      fields.preview = Math.max(1, Math.floor(steps / PREVIEWS));
    }
    return fields;
  }

  async #submit() {
    const button = by("submit");
    if (button.ariaDisabled === "true" || this.takes === null) return;
    for (const input of this.form.querySelectorAll("[aria-invalid]")) this.#clear(input);
    this.#problem("");
    button.ariaDisabled = "true";
    button.textContent = "Sending";
    try {
      const images = Object.fromEntries(Object.entries(this.images).filter(([, file]) => file !== null));
      await this.send(this.#fields(), images, this.once);
      this.once = onceKey();
    } catch (error) {
      this.#trouble(error);
    } finally {
      button.ariaDisabled = null;
      button.textContent = "Make the video";
    }
  }

  /** A new job. */
  async send(fields, images, once = onceKey()) {
    const headers = { "Idempotency-Key": once };
    let body;
    if (Object.keys(images).length === 0) {
      headers["Content-Type"] = "application/json";
      body = JSON.stringify(fields);
    } else {
      body = new FormData();
      for (const [name, value] of Object.entries(fields)) {
        for (const each of value === null ? [] : [value].flat()) body.append(name, each);
      }
      for (const [name, file] of Object.entries(images)) body.append(name, file);
    }
    const job = await askJson("/v1/videos", { method: "POST", headers, body });
    this.made(job, images);
    this.say("The video is in the queue.");
    return job;
  }

  /** Have a job's settings in the form, but for its pictures, which the service does not hand back. */
  fill(fields) {
    by("prompt").value = fields.prompt ?? "";
    by("seed").value = "";
    by("size").value = fields.width || fields.height ? "other" : "";
    for (const name of ["width", "height"]) by(name).value = fields[name] ?? "";
    for (const input of by("advanced-fields").querySelectorAll("input, select")) {
      if (input.name !== "preview") input.value = fields[input.name] ?? "";
    }
    this.#sides();
    this.once = onceKey();
    this.#trouble(new Refusal(0, { message: "Choose its picture again: the service keeps none.", param: "image" }));
  }

  // What is wrong.

  #trouble(error) {
    const name = SHOWN_AT[error.param] ?? error.param;
    const input = name === null ? null : by(name);
    if (!input || !this.form.contains(input)) {
      this.#problem(error.message);
      by("make-problem").scrollIntoView({ block: "nearest" });
      return;
    }
    if (name === "width" || name === "height") {
      by("sides").hidden = false;
      by("size").value = "other";
    }
    const folded = input.closest("details");
    if (folded) folded.open = true;
    const words = document.createElement("p");
    words.className = "problem";
    words.id = `${input.id}-problem`;
    words.textContent = capital(error.message);
    words.setAttribute("role", "alert");
    this.#clear(input);
    input.closest(".field").append(words);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", words.id);
    input.focus();
  }

  #clear(input) {
    if (!input.getAttribute?.("aria-invalid")) return;
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
    by(`${input.id}-problem`)?.remove();
  }

  #problem(text) {
    by("make-problem").textContent = text;
    by("make-problem").hidden = text === "";
  }
}

/** A number that is exact here, or a random one. */
function readSeed(text) {
  if (text === "") return "random";
  const number = Number(text);
  if (!/^[0-9]+$/.test(text) || !Number.isSafeInteger(number)) {
    throw new Refusal(0, { message: `Seed “${text}” cannot be used: give a whole number below 2⁵³, or leave it empty.`, param: "seed" });
  }
  return number;
}
