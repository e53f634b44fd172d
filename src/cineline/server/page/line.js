/** The picture of the line: a row a rank, a slice an item, coloured by video. It moves as the line does, a second behind. */

import { colourOf } from "/page/colours.js";
import { laidOut } from "/page/timeline.js";
import { capital, milliseconds, sliceWords } from "/page/words.js";

const LAG_US = 1e6; // ranks say twice a second what they have done
const ROW = 34;
const GAP = 6;
const AXIS = 22;
const STILL_EVERY_MS = 1000;
const FAR_US = 60e6;
const NARROW = 400;
const TABLE_EVERY_MS = 1000;

const still = matchMedia("(prefers-reduced-motion: reduce)");

/**
 * Rows of slices on a canvas whose context is scaled to CSS pixels; those of other videos than `chosen` are faint.
 * What has one colour is painted at once: reading a colour takes longer than painting with it.
 */
export function paint(context, rows, view, { width, height, gap, chosen = null, words = true }) {
  const boxes = new Map();
  const later = [];
  rows.forEach((row, rank) => {
    const top = rank * (height + gap);
    let painted = -1;
    for (const { slice, x, width: wide } of laidOut(row, view.from, view.to, width)) {
      const left = Math.max(0, x);
      const right = Math.min(width, x + wide);
      if (right <= painted) continue; // thinner than a pixel, behind another
      const shown = Math.max(0.75, right - left - (wide > 3 ? 1 : 0));
      painted = left + shown;
      const faint = chosen !== null && slice.video !== chosen;
      const colour = boxColour(slice, faint);
      if (!boxes.has(colour)) boxes.set(colour, []);
      boxes.get(colour).push([left, top, shown]);
      if (slice.kind === "decode" && !faint) later.push(() => foot(context, left, top + height, shown));
      if (words && wide > 16 && !faint) later.push(() => write(context, slice, left, top, right - left, height));
    }
  });
  for (const [colour, places] of boxes) {
    context.fillStyle = colour;
    for (const [left, top, shown] of places) context.fillRect(left, top, shown, height);
  }
  for (const paintIt of later) paintIt();
}

function boxColour(slice, faint) {
  if (slice.open || faint) return colourOf(slice.video, slice.kind, faint ? 0.18 : 0.6);
  return (slice.colour ??= colourOf(slice.video, slice.kind));
}

function foot(context, left, bottom, wide) {
  context.fillStyle = "rgb(0 0 0 / 0.35)";
  context.fillRect(left, bottom - 4, wide, 4);
}

function write(context, slice, left, top, wide, height) {
  const texts = [capital(sliceWords(slice)), slice.kind === "denoise" ? String(slice.number) : ""];
  const text = texts.find((each) => each && context.measureText(each).width < wide - 8);
  if (text === undefined) return;
  context.fillStyle = "#111";
  context.fillText(text, left + 4, top + height / 2 + 0.5);
}

/** What a rank computes now, as a slice that has no end yet. */
function openSlice(state, row, now) {
  if (state.item === null || state.since_us === null) return null;
  const start = Math.max(state.since_us, row.length ? row[row.length - 1].end : 0);
  if (start >= now) return null;
  const [kind, number] = state.item.split(" ");
  const own = { rank: state.rank, kind, number: Number(number), branch: "cond", video: state.video, waited: 0 };
  return { ...own, start, end: now, took: now - start, open: true };
}

export class Picture {
  /** @param {(video: string) => void} follow called with the video whose slice is pressed. */
  constructor(root, timeline, titles, follow) {
    this.timeline = timeline;
    this.titles = titles;
    this.follow = follow;
    this.chosen = null;
    this.heldAt = null; // where the right edge stands still; null where it moves along
    const part = (name) => root.querySelector(`#${name}`);
    this.canvas = part("canvas");
    this.context = this.canvas.getContext("2d");
    this.labels = part("ranks");
    this.back = part("back");
    this.backWords = part("back-words");
    this.live = part("live");
    this.span = part("span");
    if (this.canvas.clientWidth < NARROW) this.span.value = "5";
    this.pointed = part("pointed");
    this.table = part("table");
    this.details = part("table-details");
    this.words = part("line-words");
    this.drawn = this.tabled = 0;
    this.dirty = true;
    this.inView = true;
    this.#listen();
    requestAnimationFrame((at) => this.#frame(at));
  }

  /** Something is to be drawn anew. */
  touch() {
    this.dirty = true;
  }

  /** The ends of what is to be seen. */
  get view() {
    const span = Number(this.span.value) * 1e6;
    const latest = this.timeline.now - LAG_US;
    if (this.heldAt !== null) this.heldAt = Math.max(this.heldAt, latest - FAR_US);
    const to = this.heldAt ?? latest;
    return { from: to - span, to };
  }

  #listen() {
    const { canvas } = this;
    new ResizeObserver(() => this.#resize()).observe(canvas);
    new IntersectionObserver(([entry]) => (this.inView = entry.isIntersecting)).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.touch());
    this.back.addEventListener("input", () => this.#hold(Number(this.back.value)));
    this.live.addEventListener("click", () => {
      this.#hold(0);
      this.back.focus();
    });
    this.span.addEventListener("change", () => this.touch());
    canvas.addEventListener("wheel", (event) => {
      if (Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
      event.preventDefault();
      this.#shift(event.deltaX);
    }, { passive: false });
    let dragged = null;
    canvas.addEventListener("pointerdown", (event) => {
      dragged = { x: event.clientX, far: false };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (dragged !== null && event.buttons) {
        dragged.far ||= Math.abs(event.clientX - dragged.x) > 4;
        if (dragged.far) {
          this.#shift(dragged.x - event.clientX);
          dragged.x = event.clientX;
        }
      } else {
        this.#point(event);
      }
    });
    canvas.addEventListener("pointerup", (event) => {
      const slice = dragged?.far ? null : this.#at(event);
      dragged = null;
      if (slice?.video) this.follow(slice.video);
    });
    for (const name of ["pointercancel", "pointerleave"]) canvas.addEventListener(name, () => (dragged = null));
  }

  /** Stand still so many seconds back; move along at 0. */
  #hold(back) {
    this.heldAt = back === 0 ? null : this.timeline.now - LAG_US - back * 1e6;
    this.touch();
  }

  #shift(pixels) {
    const { from, to } = this.view;
    const back = (this.timeline.now - LAG_US - to - (pixels * (to - from)) / this.width) / 1e6;
    this.#hold(Math.min(60, Math.max(0, back)));
  }

  #at(event) {
    const rank = Math.floor(event.offsetY / (ROW + GAP));
    const { from, to } = this.view;
    const rows = [this.timeline.ranks[rank] ?? [], this.#open(to)[rank] ?? []];
    const found = rows.flatMap((row) => laidOut(row, from, to, this.width));
    return found.find(({ x, width }) => x - 1 <= event.offsetX && event.offsetX <= x + Math.max(2, width))?.slice ?? null;
  }

  #point(event) {
    const slice = this.#at(event);
    if (slice === null) return;
    const whose = slice.video === null ? "somebody else's video" : this.titles(slice.video);
    const waited = slice.waited >= 100 ? `, after waiting ${milliseconds(slice.waited)}` : "";
    const took = slice.open ? "now" : milliseconds(slice.took);
    this.pointed.textContent = `Rank ${slice.rank}: ${sliceWords(slice)} of ${whose}, ${took}${waited}.`;
  }

  /** What is computed now, by rank; nothing where an earlier moment is looked at. */
  #open(to) {
    return this.timeline.ranks.map((row, rank) => {
      const state = this.timeline.states[rank];
      const open = state && this.heldAt === null ? openSlice(state, row, to) : null;
      return open ? [open] : [];
    });
  }

  #resize() {
    const scale = window.devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    const height = this.timeline.ranks.length * (ROW + GAP) + AXIS;
    this.height = height;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(this.width * scale);
    this.canvas.height = Math.round(height * scale);
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.context.font = "12px system-ui, sans-serif";
    this.context.textBaseline = "middle";
    this.touch();
  }

  #frame(at) {
    requestAnimationFrame((next) => this.#frame(next));
    if (document.hidden) return;
    if (this.labels.children.length !== this.timeline.ranks.length) this.#label();
    const moves = this.heldAt === null && this.timeline.newest > this.view.from;
    const due = still.matches ? at - this.drawn > STILL_EVERY_MS : moves || at - this.drawn > STILL_EVERY_MS;
    if (this.inView && (this.dirty || due)) this.#draw(at);
    if (at - this.tabled > TABLE_EVERY_MS) this.#tell(at);
  }

  #draw(at) {
    this.dirty = false;
    this.drawn = at;
    const { context, width, view } = this;
    const colours = getComputedStyle(this.canvas);
    context.clearRect(0, 0, width, this.height);
    context.fillStyle = colours.getPropertyValue("--track");
    this.timeline.ranks.forEach((_, rank) => context.fillRect(0, rank * (ROW + GAP), width, ROW));
    this.#ticks(view, colours);
    const place = { width, height: ROW, gap: GAP, chosen: this.chosen };
    paint(context, this.timeline.ranks, view, place);
    paint(context, this.#open(view.to), view, place);
    const back = Math.max(0, (this.timeline.now - LAG_US - view.to) / 1e6);
    if (document.activeElement !== this.back || this.heldAt === null) this.back.value = String(back);
    const words = this.heldAt === null ? "now" : `${back.toFixed(0)} s ago`;
    if (this.backWords.value !== words) {
      this.backWords.value = words;
      this.back.setAttribute("aria-valuetext", words);
    }
    this.live.disabled = this.heldAt === null;
  }

  #ticks(view, colours) {
    const { context, width } = this;
    const span = (view.to - view.from) / 1e6;
    const every = [0.5, 1, 2, 5, 10].find((step) => (step / span) * width > 56) ?? 20;
    const top = this.timeline.ranks.length * (ROW + GAP);
    const now = this.timeline.now - LAG_US;
    context.textAlign = "center";
    for (let back = Math.ceil((now - view.to) / 1e6 / every) * every; back * 1e6 <= now - view.from; back += every) {
      const x = ((now - back * 1e6 - view.from) / (view.to - view.from)) * width;
      context.fillStyle = colours.getPropertyValue("--grid");
      context.fillRect(Math.round(x), 0, 1, top);
      if (x < 14 || x > width - 14) continue;
      context.fillStyle = colours.getPropertyValue("--soft");
      context.fillText(`−${back} s`, x, top + AXIS / 2);
    }
    context.textAlign = "left";
  }

  #label() {
    const row = (_, rank) => {
      const item = document.createElement("li");
      const name = document.createElement("span");
      name.textContent = `Rank ${rank}`;
      const share = document.createElement("span");
      share.className = "share";
      const bar = document.createElement("span");
      bar.className = "bar-of";
      item.append(name, share, bar);
      return item;
    };
    this.labels.replaceChildren(...this.timeline.ranks.map(row));
    this.table.replaceChildren(...this.timeline.ranks.map(() => document.createElement("tr")));
    this.#resize();
    this.tabled = 0;
  }

  /** Once a second, in words: shares, and the table. */
  #tell(at) {
    this.tabled = at;
    const { to } = this.view;
    const { timeline } = this;
    this.words.textContent = timeline.states.length ? "" : "Loading the model.";
    timeline.ranks.forEach((_, rank) => {
      const share = timeline.busy(rank, to);
      const words = share === null ? "–" : `${Math.round(100 * share)} %`;
      const [, text, bar] = this.labels.children[rank].children;
      text.textContent = words;
      bar.style.setProperty("--share", share ?? 0);
      if (this.details.open) this.#fill(rank, words);
    });
  }

  #fill(rank, share) {
    const state = this.timeline.states[rank] ?? { item: null, video: null };
    const whose = state.item === null ? "" : state.video === null ? "somebody else's" : this.titles(state.video);
    const cells = [`${rank}`, share, state.item ?? "waits", whose];
    const row = this.table.children[rank];
    if (row.children.length === 0) {
      row.append(...cells.map((_, at) => document.createElement(at ? "td" : "th")));
      row.children[0].scope = "row";
    }
    cells.forEach((text, at) => {
      if (row.children[at].textContent !== text) row.children[at].textContent = text;
    });
  }
}
