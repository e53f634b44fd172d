/** The page: what comes from the service goes to its parts. */

import { Refusal, askJson, key, keysFrom } from "/page/api.js";
import { Form } from "/page/form.js";
import { Jobs } from "/page/jobs.js";
import { Picture } from "/page/line.js";
import { follow } from "/page/stream.js";
import { Timeline } from "/page/timeline.js";
import { examples } from "/page/words.js";

const by = (id) => document.getElementById(id);
const LOOK_EVERY_MS = 30_000;
const STATES = { live: "live", joining: "joining again" };

export const timeline = new Timeline();

/** For whoever listens to the page; the same words twice are said twice. */
function say(text) {
  by("heard").textContent = by("heard").textContent === text ? `${text} ` : text;
}

const sent = new Map(); // the pictures of jobs that this page has made

export const form = new Form((job, images) => {
  if (Object.keys(images).length) sent.set(job.id, images);
  jobs.put(job);
  jobs.cards.get(job.id)?.root.scrollIntoView({ block: "nearest" });
}, say);

/** Nothing of the job but its seed is another. */
async function again(job) {
  const { fields, images } = await askJson(`/v1/videos/${job.id}/settings`);
  const wanted = { ...fields, seed: "random" };
  if (images.length && !sent.has(job.id)) {
    form.fill(fields);
    throw new Refusal(0, { message: "Its picture is needed again: choose it in the form, where all else is filled in." });
  }
  await form.send(wanted, sent.get(job.id) ?? {});
}

/** Show a video alone; all of them with null. */
function choose(id) {
  picture.chosen = picture.chosen === id ? null : id;
  jobs.choose(picture.chosen);
  for (const card of jobs.cards.values()) card.alone.setAttribute("aria-pressed", String(card.id === picture.chosen));
  picture.touch();
}

export const jobs = new Jobs(by("cards"), { timeline, again, say, follow: choose });
export const picture = new Picture(document, timeline, (id) => jobs.titled(id), choose);

jobs.changed = () => {
  const all = [...jobs.known.values()];
  const running = all.filter((job) => job.status === "in_progress").length;
  const waiting = all.filter((job) => job.status === "queued").length;
  by("jobs-words").textContent = all.length ? `${running} in the line, ${waiting} waiting, ${all.length - running - waiting} done` : "";
  by("empty").hidden = all.length > 0;
  by("older").hidden = !jobs.more;
};

by("older").addEventListener("click", () => jobs.older().catch((error) => say(error.message)));

/** What a newcomer is told, with something to press. */
function tellNewcomer(mini) {
  const words = document.createElement("p");
  words.textContent = "No videos yet. Type what one should show and press “Make the video”, or begin with this:";
  const begin = document.createElement("button");
  begin.type = "button";
  begin.className = "example";
  [begin.textContent] = examples(mini);
  begin.addEventListener("click", () => form.prompt(begin.textContent));
  by("empty").replaceChildren(words, begin);
}

keysFrom(
  (wrong) =>
    new Promise((resolve) => {
      by("key-problem").textContent = wrong;
      by("key-problem").hidden = wrong === "";
      by("key").value = "";
      const dialog = by("key-dialog");
      by("key-form").onsubmit = () => {
        by("forget-key").hidden = false;
        resolve(by("key").value.trim());
      };
      dialog.oncancel = (event) => event.preventDefault(); // nothing can be seen without one
      dialog.showModal();
    }),
);
by("forget-key").hidden = key.get() === null;
by("forget-key").addEventListener("click", () => {
  key.forget();
  location.reload();
});

const takers = {
  video: (job) => jobs.put(job),
  preview: (shown) => jobs.preview(shown),
  deleted: ({ id }) => jobs.remove(id),
  line: (states) => timeline.tell(states),
  slices: (slices) => {
    timeline.add(slices);
    jobs.track();
  },
};

function connection(word) {
  if (by("connection").dataset.state === word) return;
  by("connection").dataset.state = word;
  by("connection").textContent = STATES[word];
  if (word === "joining") say("The service does not answer; it is joined again as soon as it does.");
}

async function meet() {
  for (;;) {
    try {
      const { data } = await askJson("/v1/models");
      by("model").textContent = data[0].id;
      form.fit(data[0].takes);
      tellNewcomer(data[0].takes.mini);
      return;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

/** Others may delete what has ended, and it expires; no event tells of that. */
function lookAgain() {
  if (!document.hidden && by("connection").dataset.state === "live") jobs.sync().catch(() => {});
}
setInterval(lookAgain, LOOK_EVERY_MS);

await meet();
follow({
  sync: () => jobs.sync(),
  take: (name, data) => takers[name]?.(data),
  state: connection,
});
