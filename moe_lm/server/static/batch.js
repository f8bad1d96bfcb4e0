// The strip about the server: what its batch holds now. Asks /status twice a second while the page is seen.

import { getJson } from "./api.js";
import { percent } from "./answer.js";
import { byId, make } from "./dom.js";

const INTERVAL_MS = 500;
const TIMEOUT_S = 5;
const SPARKS = 60;

const STATES = {
  ok: "",
  draining: "The server is ending: it finishes what runs and takes nothing new.",
  dead: "The engine of this server has died; it answers no more requests.",
};

export class Batch {
  /** Ids of the requests of this page. */
  mine = new Set();
  #speeds = [];
  #slots = new Map();
  #asking = false;
  #status;
  #refused;

  /** `status(object)` is called with every answer, `refused(error)` when a key is wanted: then asking rests. */
  constructor({ status, refused }) {
    this.#status = status;
    this.#refused = refused;
    document.addEventListener("visibilitychange", () => this.ask());
  }

  /** Asks, and goes on asking. */
  async ask() {
    if (this.#asking) return;
    this.#asking = true;
    while (document.visibilityState === "visible") {
      try {
        const status = await getJson("/status", TIMEOUT_S);
        this.#show(status);
        await this.#status(status);
      } catch (error) {
        if (error.status === 401) {
          this.#say("silent", "waiting for the API key");
          this.#refused(error);
          break;
        }
        this.#say("silent", error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
    }
    this.#asking = false;
  }

  #say(state, text) {
    byId("server").dataset.state = state;
    if (byId("server-state").textContent !== text) byId("server-state").textContent = text;
  }

  #show(status) {
    this.#say(status.state, STATES[status.state] ?? status.state);
    const { running, max_sequences: most, waiting, waiting_tokens: tokens, kv } = status;
    set("running", running);
    set("waiting", `of at most ${most}; ${waiting ? `${waiting} waiting, ${tokens} tokens` : "none waiting"}`);
    set("speed", Math.round(status.tokens_per_s).toLocaleString("en"));
    this.#spark(status.tokens_per_s);
    set("acceptance", status.acceptance == null ? "–" : percent(status.acceptance));
    set("per-step", status.tokens_per_step == null ? "nothing guessed lately"
      : `${status.tokens_per_step.toFixed(1)} tokens per step of a sample`);
    set("kv", percent(kv.used / kv.blocks));
    const free = kv.blocks - kv.used - kv.cached;
    set("kv-note", `${kv.used} used, ${kv.cached} cached, ${free} free`);
    set("hits", status.prefix_hits == null ? "" : `, ${percent(status.prefix_hits)} prefix hits`);
    byId("kv-bar").setAttribute("aria-label",
      `of ${kv.blocks} blocks of ${kv.block_size} tokens ${kv.used} are used, ${kv.cached} cached, ${free} free`);
    byId("kv-bar").children[0].style.width = percent(kv.used / kv.blocks, 2);
    byId("kv-bar").children[1].style.width = percent(kv.cached / kv.blocks, 2);
    this.#showSlots(status.slots);
  }

  #spark(speed) {
    this.#speeds = [...this.#speeds, speed].slice(-SPARKS);
    const most = Math.max(1, ...this.#speeds);
    const start = SPARKS - this.#speeds.length;
    const points = this.#speeds.map((value, i) => `${start + i},${(19 - (18 * value) / most).toFixed(1)}`);
    byId("spark").firstElementChild.setAttribute("points", points.join(" "));
  }

  #showSlots(slots) {
    const gone = new Set(this.#slots.keys());
    for (const slot of slots) {
      const name = `${slot.id}/${slot.index}`;
      gone.delete(name);
      let node = this.#slots.get(name);
      if (!node) {
        node = make("li", {}, make("span", { className: "sr" }), make("b"), make("span"),
          make("i", { className: "progress" }, make("i", { className: "prompt" }), make("i", { className: "new" })));
        this.#slots.set(name, node);
        byId("slots").append(node);
      }
      const mine = this.mine.has(slot.id);
      const [whose, phase, count, progress] = node.children;
      node.classList.toggle("mine", mine);
      node.title = `${slot.id}, ${slot.phase}: ${slot.tokens} of at most ${slot.of} tokens, ${slot.prompt} of them prompt`;
      whose.textContent = mine ? "yours: " : "";
      phase.textContent = slot.phase;
      count.textContent = ` ${slot.tokens}/${slot.of}`;
      const known = Math.min(slot.prompt, slot.tokens);
      progress.children[0].style.width = percent(known / slot.of, 2);
      progress.children[1].style.width = percent((slot.tokens - known) / slot.of, 2);
    }
    for (const name of gone) {
      this.#slots.get(name).remove();
      this.#slots.delete(name);
    }
    byId("slots").dataset.idle = slots.length ? "" : "no sample runs";
  }
}

function set(id, value) {
  byId(id).textContent = value;
}
