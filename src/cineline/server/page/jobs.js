/** The jobs that the page knows, and their cards. */

import { askJson, ask, dropFiles, fileUrl } from "/page/api.js";
import { colourOf } from "/page/colours.js";
import { paint } from "/page/line.js";
import { capital, named, phase, seed, size } from "/page/words.js";

const PAGE = 100;
const SURE_MS = 4000;
const TRACK_ROW = 12;
const TRACK_GAP = 3;

const ended = (job) => job.status === "completed" || job.status === "failed";

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function button(text, label, deed, className = "quiet") {
  const made = element("button", className, text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => deed(made));
  return made;
}

export class Jobs {
  /**
   * @param parts.timeline of the line. parts.picture of it.
   * @param parts.again called with a job that is wanted with another seed.
   * @param parts.say tells whoever listens to the page.
   */
  constructor(list, parts) {
    this.list = list;
    this.parts = parts;
    this.known = new Map();
    this.cards = new Map();
    this.loaded = PAGE;
    this.told = new Set();
    this.more = false;
    this.changed = () => {};
    this.seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) if (isIntersecting) this.cards.get(target.id)?.comeInView();
    }, { rootMargin: "200px" });
  }

  titled(id) {
    const job = this.known.get(id);
    return job ? `“${job.prompt.slice(0, 60) || "a picture"}”` : "a video that is gone";
  }

  /** The newest jobs, as many as were loaded before. What is not among them is gone; of what events tell meanwhile they
   *  are right. */
  async sync() {
    const told = (this.told = new Set());
    const found = [];
    let page = { has_more: true, last_id: null };
    while (page.has_more && found.length < this.loaded) {
      page = await this.#page(page.last_id);
      found.push(...page.data);
    }
    this.more = page.has_more;
    const there = new Set(found.map((job) => job.id));
    const oldest = page.has_more ? found.at(-1).created_at : 0;
    for (const { id, created_at } of [...this.known.values()]) {
      if (!there.has(id) && !told.has(id) && created_at >= oldest) this.remove(id, false);
    }
    for (const job of found.reverse()) if (!told.has(job.id)) this.put(job);
    this.changed();
  }

  async older() {
    const oldest = this.list.lastElementChild?.id;
    const page = await this.#page(oldest ?? null);
    this.loaded += PAGE;
    this.more = page.has_more;
    for (const job of page.data) this.put(job);
    this.changed();
  }

  #page(after) {
    return askJson(`/v1/videos?limit=${PAGE}${after === null ? "" : `&after=${after}`}`);
  }

  /** A job as it is now; what is told late of one that has ended is not so any more. */
  put(job) {
    const before = this.known.get(job.id);
    this.told.add(job.id);
    if (before && ended(before) && !ended(job)) return;
    this.known.set(job.id, job);
    if (before) {
      this.cards.get(job.id).show(job);
      if (before.status !== job.status) this.#tell(job);
    } else {
      this.#insert(job);
    }
    this.changed();
  }

  #insert(job) {
    const card = new Card(job, this.parts, this);
    this.cards.set(job.id, card);
    let at = this.list.firstElementChild;
    while (at && this.known.get(at.id).created_at > job.created_at) at = at.nextElementSibling;
    this.list.insertBefore(card.root, at);
    this.seen.observe(card.root);
  }

  #tell(job) {
    if (job.status === "completed") this.parts.say(`${capital(this.titled(job.id))} is done.`);
    if (job.status === "failed") this.parts.say(`${capital(this.titled(job.id))} failed: ${job.error?.message ?? ""}`);
  }

  preview({ id, step, image }) {
    this.cards.get(id)?.preview(step, image);
  }

  remove(id, tell = true) {
    const card = this.cards.get(id);
    if (!card) return;
    const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
    const focused = card.root.contains(document.activeElement);
    if (tell) this.parts.say(`${capital(this.titled(id))} is gone.`);
    this.seen.unobserve(card.root);
    card.root.remove();
    this.cards.delete(id);
    this.told.add(id);
    this.known.delete(id);
    dropFiles(id);
    if (focused) (next?.querySelector("button") ?? document.getElementById("jobs-title")).focus();
    this.changed();
  }

  /** Slices have come: open tracks are drawn anew. */
  track() {
    for (const card of this.cards.values()) card.track();
  }

  choose(id) {
    for (const card of this.cards.values()) card.root.classList.toggle("chosen", card.id === id);
    this.cards.get(id)?.root.scrollIntoView({ block: "nearest" });
  }
}

class Card {
  constructor(job, parts, jobs) {
    this.id = job.id;
    this.parts = parts;
    this.jobs = jobs;
    this.shown = "";
    this.posterLoaded = false;
    this.root = element("li", "card");
    this.root.id = job.id;
    this.root.style.setProperty("--own", colourOf(job.id));
    this.media = element("div", "media");
    const body = element("div", "body");
    const title = element("h3", "", job.prompt || "From a picture");
    title.id = `${job.id}-title`;
    this.root.setAttribute("aria-labelledby", title.id);
    this.words = element("p", "phase");
    this.bar = element("progress");
    this.bar.max = 100;
    this.bar.setAttribute("aria-label", `Progress of ${job.prompt || "it"}`);
    const facts = element("p", "facts light", `${size(job)}, ${job.num_inference_steps} steps, seed ${seed(job.seed)}`);
    this.actions = element("div", "actions");
    body.append(title, this.words, this.bar, facts, this.actions, this.#details(job));
    this.root.append(this.media, body);
    this.show(job);
  }

  show(job) {
    this.job = job;
    const state = job.status === "in_progress" || job.status === "queued" ? job.phase : job.status;
    this.root.dataset.state = state;
    const words = capital(phase(job));
    if (this.words.textContent !== words) this.words.textContent = words;
    this.bar.value = job.progress;
    this.bar.hidden = ended(job);
    if (this.shown !== job.status) {
      this.shown = job.status;
      if (ended(job)) this.#end(job);
      this.#offer(job);
    }
  }

  #end(job) {
    this.media.replaceChildren();
    if (job.status === "failed") {
      this.words.after(element("p", "problem", job.error?.message ?? "It failed."));
      return;
    }
    const play = button("", `Play ${job.prompt}`, () => this.play(), "poster");
    play.append(element("img"));
    play.firstChild.alt = "";
    this.media.append(play);
    if (this.wasInView) this.comeInView();
  }

  /** The poster is loaded once somebody may see it. */
  async comeInView() {
    this.wasInView = true;
    const image = this.media.querySelector(".poster img");
    if (!image || this.posterLoaded) return;
    this.posterLoaded = true;
    try {
      image.src = await fileUrl(`/v1/videos/${this.id}/content?variant=thumbnail`);
    } catch {
      image.remove();
    }
  }

  async play() {
    const video = element("video");
    Object.assign(video, { controls: true, loop: true, muted: true, playsInline: true });
    video.setAttribute("aria-label", this.job.prompt || "The video");
    try {
      video.src = await fileUrl(this.path);
    } catch (error) {
      this.#say(error);
      return;
    }
    this.media.replaceChildren(video);
    video.focus();
    video.play().catch(() => {}); // then its own button does
  }

  get path() {
    return `/v1/videos/${this.id}/content`;
  }

  preview(step, image) {
    if (ended(this.job)) return;
    let shown = this.media.querySelector("img.preview");
    if (!shown) {
      shown = element("img", "preview");
      this.media.replaceChildren(shown);
    }
    shown.src = image;
    shown.alt = `A preview at step ${step}`;
  }

  #offer(job) {
    const what = job.prompt || "it";
    const focused = this.actions.contains(document.activeElement);
    const again = button("Again, another seed", `Make ${what} again with another seed`, (it) => this.#again(it));
    if (!ended(job)) {
      this.actions.replaceChildren(button("Cancel", `Cancel ${what}`, (it) => this.#delete(it)), again);
    } else {
      const first = job.status === "completed" ? [button("Play", `Play ${what}`, () => this.play()), this.#download(what)] : [];
      this.actions.replaceChildren(...first, again, button("Delete", `Delete ${what}`, (it) => this.#sure(it)));
    }
    if (focused) this.actions.firstChild.focus();
  }

  #download(what) {
    const save = async () => {
      try {
        const link = element("a");
        link.href = await fileUrl(this.path);
        link.download = `${this.id}.mp4`;
        link.click();
      } catch (error) {
        this.#say(error);
      }
    };
    return button("Download", `Download ${what}`, save);
  }

  /** A video is deleted by the second press. */
  #sure(it) {
    if (it.dataset.sure) {
      this.#delete(it);
      return;
    }
    it.dataset.sure = "yes";
    it.textContent = "Really delete";
    it.setAttribute("aria-label", `Really delete ${this.job.prompt || "it"}`);
    setTimeout(() => {
      delete it.dataset.sure;
      it.textContent = "Delete";
      it.setAttribute("aria-label", `Delete ${this.job.prompt || "it"}`);
    }, SURE_MS);
  }

  #delete(it) {
    const gone = async () => {
      try {
        await ask(`/v1/videos/${this.id}`, { method: "DELETE" });
      } catch (error) {
        if (error.status !== 404) throw error;
      }
      this.jobs.remove(this.id);
    };
    return this.#once(it, gone);
  }

  #again(it) {
    return this.#once(it, () => this.parts.again(this.job));
  }

  /** Not again before it is done. (A button that is disabled would lose the focus.) */
  async #once(it, deed) {
    if (it.ariaDisabled === "true") return;
    it.ariaDisabled = "true";
    try {
      await deed();
    } catch (error) {
      this.#say(error);
    } finally {
      it.ariaDisabled = null;
    }
  }

  #say(error) {
    let words = this.root.querySelector(".body > .problem");
    if (!words) {
      words = element("p", "problem");
      this.actions.before(words);
    }
    words.textContent = error.message;
    this.parts.say(error.message);
  }

  // What is folded away.

  #details(job) {
    const details = element("details");
    details.append(element("summary", "", "Its way and settings"));
    this.way = element("p", "help");
    this.canvas = element("canvas", "track");
    this.canvas.setAttribute("role", "img");
    const show = button("Show it alone in the line", `Show ${job.prompt || "it"} alone in the line`, (it) => {
      this.parts.follow(it.getAttribute("aria-pressed") === "true" ? null : this.id);
    });
    show.setAttribute("aria-pressed", "false");
    this.alone = show;
    this.settings = element("dl", "settings");
    details.append(this.way, this.canvas, show, this.settings);
    details.addEventListener("toggle", () => details.open && this.#open());
    this.details = details;
    return details;
  }

  #open() {
    this.track();
    if (this.settings.children.length === 0) this.#load();
  }

  async #load() {
    try {
      const { fields, images } = await askJson(`/v1/videos/${this.id}/settings`);
      const rows = { size: this.job.size, num_frames: this.job.num_frames, fps: this.job.fps, ...fields };
      rows.num_inference_steps = this.job.num_inference_steps;
      rows.guidance_scale = this.job.guidance_scale;
      rows.priority = this.job.priority;
      if (images.length) rows.images = images.map(named).join(", ");
      rows.seed = seed(this.job.seed);
      for (const name of ["prompt", "width", "height"]) delete rows[name];
      for (const [name, value] of Object.entries(rows)) {
        if (value === "" || value === null) continue;
        this.settings.append(element("dt", "", named(name)), element("dd", "", String(value)));
      }
    } catch (error) {
      this.#say(error);
    }
  }

  /** Its own slices, from the first to the last that are known. */
  track() {
    if (!this.details.open) return;
    const rows = this.parts.timeline.of(this.id);
    const slices = rows.flat();
    this.canvas.hidden = slices.length === 0;
    if (slices.length === 0) {
      this.way.textContent = ended(this.job) ? "It went through the line more than a minute ago." : "Not yet in the line.";
      return;
    }
    const view = { from: Math.min(...slices.map((each) => each.start)), to: Math.max(...slices.map((each) => each.end)) };
    const took = ((view.to - view.from) / 1e6).toFixed(1);
    this.way.textContent = `${slices.length} slices on ${rows.filter((row) => row.length).length} ranks in ${took} s.`;
    this.canvas.setAttribute("aria-label", this.way.textContent);
    const width = this.canvas.clientWidth;
    const height = rows.length * (TRACK_ROW + TRACK_GAP);
    const scale = window.devicePixelRatio || 1;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    paint(context, rows, view, { width, height: TRACK_ROW, gap: TRACK_GAP, words: false });
  }
}
