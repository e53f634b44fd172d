/** What the ranks have computed in the last minute, and how a stretch of it lies on a picture. Times in microseconds. */

export const KEPT_US = 75e6; // a minute that can be scrolled back, and what is left of it in view
export const BUSY_US = 10e6;

export class Timeline {
  /** Slices by rank, in the order of their beginnings. */
  ranks = [];
  /** What each rank computes now: {rank, item, video, since_us}. */
  states = [];
  #known = new Set();
  #newest = 0;
  #ahead = -Infinity;

  /** @param {() => number} clock milliseconds. */
  constructor(clock = () => performance.timeOrigin + performance.now()) {
    this.clock = clock;
  }

  /** What is told again after a break is known already. */
  add({ now_us, of }) {
    this.#ahead = Math.max(this.#ahead, now_us - this.clock() * 1000);
    for (const { video, slices } of of) {
      for (const [rank, kind, number, branch, start, took, waited] of slices) {
        const name = `${rank} ${start} ${kind} ${number} ${branch}`;
        if (this.#known.has(name)) continue;
        this.#known.add(name);
        const row = this.row(rank);
        row.push({ rank, kind, number, branch, start, end: start + took, took, waited, video, name });
        for (let at = row.length - 1; at > 0 && row[at - 1].start > row[at].start; at--) {
          [row[at - 1], row[at]] = [row[at], row[at - 1]];
        }
        this.#newest = Math.max(this.#newest, start + took);
      }
    }
    this.#forget(Math.max(this.now, this.#newest) - KEPT_US);
  }

  row(rank) {
    while (this.ranks.length <= rank) this.ranks.push([]);
    return this.ranks[rank];
  }

  tell(states) {
    this.states = states;
    for (const { rank } of states) this.row(rank);
  }

  /** The service's clock. */
  get now() {
    return this.clock() * 1000 + (this.#ahead === -Infinity ? 0 : this.#ahead);
  }

  get newest() {
    return this.#newest;
  }

  #forget(before) {
    for (const row of this.ranks) {
      let gone = 0;
      while (gone < row.length && row[gone].end < before) this.#known.delete(row[gone++].name);
      if (gone) row.splice(0, gone);
    }
  }

  /** The share of the last ten seconds before `until` in which a rank computed; null where there was nothing yet. */
  busy(rank, until) {
    const begins = this.ranks.filter((row) => row.length).map((row) => row[0].start);
    const from = Math.max(until - BUSY_US, Math.min(...begins));
    if (!(until > from)) return null;
    let sum = 0;
    for (const slice of visible(this.ranks[rank] ?? [], from, until)) {
      sum += Math.min(slice.end, until) - Math.max(slice.start, from);
    }
    return Math.min(1, sum / (until - from));
  }

  /** All of a video's slices, by rank. */
  of(video) {
    return this.ranks.map((row) => row.filter((slice) => slice.video === video));
  }
}

/** Of slices in order, those that are to be seen. */
export function visible(row, from, to) {
  let low = 0;
  let high = row.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (row[middle].end <= from) low = middle + 1;
    else high = middle;
  }
  const first = low;
  while (low < row.length && row[low].start < to) low++;
  return row.slice(first, low);
}

/** Where they lie on a picture that is so wide: {slice, x, width}, both in its pixels. */
export function laidOut(row, from, to, width) {
  const scale = width / (to - from);
  return visible(row, from, to).map((slice) => ({
    slice,
    x: (slice.start - from) * scale,
    width: slice.took * scale,
  }));
}
