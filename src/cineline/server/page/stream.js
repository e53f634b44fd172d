/** The service's events, joined again whenever they break. EventSource cannot send a key. */

import { ask } from "/page/api.js";

const FIRST_WAIT_MS = 300;
const MOST_WAIT_MS = 10_000;
const SILENCE_MS = 40_000; // the service says something every 15 s at least

/** The events of a stream of bytes: {event, data}. */
async function* read(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    heard();
    text = (text + value).replace(/\r\n/g, "\n");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = { event: "message", data: "" };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 2);
      }
      if (event.data) yield event;
    }
  }
}

/**
 * Follow the events for ever.
 *
 * The state that they begin with is whole only with the list of jobs, which is asked for once the first event is here:
 * what ends from then on is told. Events wait for the list.
 *
 * @param {{sync: () => Promise, take: (name, data) => void, state: (word) => void}} told
 */
export async function follow(told) {
  let wait = FIRST_WAIT_MS;
  for (;;) {
    const control = new AbortController();
    let silence = setTimeout(() => control.abort(), SILENCE_MS);
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => control.abort(), SILENCE_MS);
    };
    try {
      const answer = await ask("/v1/events", { signal: control.signal });
      let waiting = null; // until the list is here
      let synced = false;
      const begin = () => {
        told.sync().then(
          () => {
            synced = true;
            for (const take of waiting) take();
            told.state("live");
            wait = FIRST_WAIT_MS;
          },
          () => control.abort(),
        );
        return [];
      };
      for await (const { event, data } of read(answer.body, heard)) {
        const take = () => told.take(event, JSON.parse(data));
        if (synced) take();
        else (waiting ??= begin()).push(take);
      }
    } catch {
      // joined again below, whatever it was
    } finally {
      clearTimeout(silence);
      control.abort();
    }
    told.state("joining");
    await pause(wait * (0.75 + Math.random() / 2));
    wait = Math.min(2 * wait, MOST_WAIT_MS);
  }
}

/** So long, or until the network or the tab is back. */
function pause(ms) {
  return new Promise((resolve) => {
    const over = () => {
      clearTimeout(timer);
      window.removeEventListener("online", over);
      document.removeEventListener("visibilitychange", over);
      resolve();
    };
    const timer = setTimeout(over, ms);
    window.addEventListener("online", over);
    document.addEventListener("visibilitychange", over);
  });
}
