// One answer: its text as a row of tokens that can be pointed at, what is counted over them, and its figures.

import { Aligner } from "./align.js";
import { curl } from "./api.js";
import { copy, make } from "./dom.js";

export const SOURCES = ["target", "draft", "ngram"];

// Lower bounds of the classes of probability, likeliest first.
export const PROBABILITIES = [0.9, 0.5, 0.2, 0.05, 0];

// Counts are shown so often while tokens come; in every frame they would cost more than the text.
const TELL_MS = 200;

const REASONS = { stop: "stop", length: "length", stopped: "you", error: "an error" };

export const probability = (token) => Math.exp(token.logprob);
const classOf = (logprob) => PROBABILITIES.findIndex((least) => Math.exp(logprob) >= least);

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;

export class Answer {
  text = "";
  tokens = [];
  pieces = [];
  bySource = new Map(SOURCES.map((source) => [source, 0]));
  byProbability = PROBABILITIES.map(() => 0);
  /** Per layer, how many of the tokens each expert served, by its number. */
  load = [];
  reason = null;
  #usage = null;
  #began = performance.now();
  #first = null;
  #ended = null;
  #pieceOf = new WeakMap();
  #aligner = new Aligner((piece) => this.#append(piece));
  #changed;
  #told = 0;

  /**
   * `output` is the element that the tokens go into, `notes` the one for the figures; `changed(answer)` is called
   * while tokens come, five times a second, and at the end.
   */
  constructor({ path, body, output, notes, changed }) {
    Object.assign(this, { path, body, output, notes });
    this.#changed = changed;
    output.classList.add("answer", "writing");
  }

  /** One chunk of the stream. */
  add(chunk) {
    this.#usage = chunk.usage ?? this.#usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const text = choice.text ?? choice.delta?.content ?? "";
    const tokens = choice.token_details ?? [];
    if (tokens.length || text) this.#first ??= performance.now();
    this.reason = choice.finish_reason ?? this.reason;
    this.text += text;
    for (const token of tokens) this.#count(token);
    this.#aligner.push(text, tokens);
    if (performance.now() - this.#told < TELL_MS) return;
    this.#told = performance.now();
    this.#changed(this);
  }

  /** No more will come; `reason` where the server did not give one. */
  finish(reason) {
    this.#ended = performance.now();
    this.reason ??= reason;
    this.#aligner.finish();
    this.output.classList.remove("writing");
    this.#changed(this);
    this.#showFigures();
  }

  pieceAt(node) {
    return this.#pieceOf.get(node.closest?.(".t"));
  }

  get count() {
    return this.#usage?.completion_tokens ?? this.tokens.length;
  }

  get speed() {
    return this.count / Math.max(1e-3, (this.#ended - this.#began) / 1000);
  }

  get summary() {
    if (this.reason === "error") return this.count ? `failed after ${this.count} tokens` : "failed";
    const verb = this.reason === "stopped" ? "stopped" : "done";
    return `${verb}: ${this.count} tokens, ${rounded(this.speed)} tokens/s`;
  }

  #count(token) {
    token.place = this.tokens.push(token);
    this.bySource.set(token.source, (this.bySource.get(token.source) ?? 0) + 1);
    this.byProbability[classOf(token.logprob)]++;
    token.experts.forEach((experts, layer) => {
      const served = (this.load[layer] ??= []);
      for (const expert of experts) served[expert] = (served[expert] ?? 0) + 1;
    });
  }

  #append({ text, beyond, tokens }) {
    const node = make("span", { textContent: text });
    if (tokens.length) {
      const piece = { node, text, beyond, tokens, answer: this };
      node.className = "t";
      node.tabIndex = -1;
      node.dataset.source = tokens.at(-1).source;
      node.dataset.p = classOf(Math.min(...tokens.map((token) => token.logprob)));
      if (beyond) node.dataset.beyond = visible(beyond);
      if (text[0] === "\n") node.dataset.break = "";
      this.#pieceOf.set(node, piece);
      this.pieces.push(piece);
    }
    this.output.append(node);
  }

  #showFigures() {
    const guessed = this.tokens.filter((token) => token.source !== "target").length;
    const cached = this.#usage?.prompt_tokens_details?.cached_tokens ?? 0;
    const items = [
      ["", this.count, this.count === 1 ? " token" : " tokens"],
      ["", rounded(this.speed), " tokens/s"],
      this.#first && ["", `${((this.#first - this.#began) / 1000).toFixed(2)} s`, " to the first"],
      this.tokens.length && ["", percent(guessed / this.tokens.length), ` were accepted guesses (${guessed})`],
      this.#usage && ["", this.#usage.prompt_tokens, ` in the prompt, ${cached} of them cached`],
      ["ended by: ", REASONS[this.reason] ?? this.reason, ""],
    ].filter(Boolean);
    this.notes.replaceChildren(
      make("ul", { className: "figures" }, ...items.map(([before, value, after]) =>
        make("li", {}, before, make("b", {}, String(value)), after))),
      copyButton("Copy text", () => this.text),
      copyButton("Copy as curl", () => curl(this.path, this.body)),
    );
  }
}

/** A button that copies what `text()` gives, and says so for a moment. */
export function copyButton(label, text) {
  const button = make("button", { type: "button", className: "quiet" }, label);
  return withCopying(button, text);
}

export function withCopying(button, text) {
  const label = button.textContent;
  button.addEventListener("click", async () => {
    button.textContent = await copy(text()).then(() => "Copied", () => "Not copied: the browser refused");
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

const rounded = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

/** A text with its white space to be seen. */
export function visible(text) {
  return text.replace(/[ \n\t\r\u00a0]/g, (space) => ({ " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽" })[space]);
}
