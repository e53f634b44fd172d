/** The service's API. The key, where one is needed, is in this session's storage and nowhere else. */

const KEY = "cineline-key";

/** What the service answers that cannot do what it is asked: a sentence, and the field that it is about. */
export class Refusal extends Error {
  constructor(status, problem) {
    super(problem.message);
    this.status = status;
    this.param = problem.param ?? null;
    this.code = problem.code ?? null;
  }
}

let askForKey = () => Promise.reject(new Error("Nobody asks for a key."));
let asking = null;

/** Who asks the user for a key; called with what is wrong with the one that there is, if there is one. */
export function keysFrom(ask) {
  askForKey = ask;
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  forget: () => sessionStorage.removeItem(KEY),
};

async function newKey(refused) {
  if (key.get() !== refused) return; // another has been given since
  asking ??= askForKey(refused === null ? "" : "The service does not know this key.").finally(() => (asking = null));
  sessionStorage.setItem(KEY, await asking);
}

/** An answer of 2xx. A key is asked for until one is known. Throws a Refusal. */
export async function ask(path, options = {}) {
  for (;;) {
    const used = key.get();
    const headers = new Headers(options.headers);
    if (used !== null) headers.set("Authorization", `Bearer ${used}`);
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new Refusal(0, { message: "The service does not answer. It is tried again as soon as it does." });
    }
    if (answer.ok) return answer;
    if (answer.status !== 401) throw await refusal(answer);
    await newKey(used);
  }
}

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

async function refusal(answer) {
  try {
    return new Refusal(answer.status, (await answer.json()).error);
  } catch {
    return new Refusal(answer.status, { message: `The service answers with ${answer.status}. See its log.` });
  }
}

const blobs = new Map();

/** Where an element finds a file of the API: at its address, or in memory where a key has to be sent for it. */
export async function fileUrl(path) {
  if (key.get() === null) return path;
  if (!blobs.has(path)) {
    const loading = ask(path)
      .then((answer) => answer.blob())
      .then((blob) => URL.createObjectURL(blob));
    blobs.set(path, loading);
    loading.catch(() => blobs.delete(path));
  }
  return blobs.get(path);
}

/** The job is gone: what was loaded of it goes. */
export function dropFiles(id) {
  for (const [path, loading] of blobs) {
    if (!path.includes(`/${id}/`)) continue;
    blobs.delete(path);
    loading.then(URL.revokeObjectURL, () => {});
  }
}

/** A key of one request that may be sent twice (randomUUID is for https alone). */
export function onceKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
