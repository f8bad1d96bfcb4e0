// The two modes: what each sends, and where its answers go.
//
// `next()` is the request for what is written now; `start(again)` makes it, or the last one once more, the current one
// and gives `{path, body, output, notes}`, null where nothing is there to send; `end(answer)` comes after the answer.

import { byId, make } from "./dom.js";

function places(tag, label) {
  const output = make(tag);
  output.setAttribute("role", "group");
  output.setAttribute("aria-label", label);
  return { output, notes: make("div", { className: "notes" }) };
}

export class Completion {
  answer = null;

  constructor() {
    byId("prompt").addEventListener("input", () => this.#mirror());
    this.#mirror();
  }

  get empty() {
    return !this.answer && !byId("prompt").value;
  }

  next() {
    return { path: "/v1/completions", body: { prompt: byId("prompt").value } };
  }

  /** Again or not, it continues the prompt as it stands: an empty one starts a document. */
  start() {
    const { output, notes } = places("span", "Continuation");
    byId("continuation").replaceChildren(output);
    byId("completion-notes").replaceChildren(notes);
    return { ...this.next(), output, notes };
  }

  end() {
    this.#mirror();
  }

  /** The continuation becomes part of the prompt. */
  take() {
    const prompt = byId("prompt");
    prompt.value += this.answer.text;
    this.#drop();
    prompt.setSelectionRange(prompt.value.length, prompt.value.length);
  }

  clear() {
    byId("prompt").value = "";
    this.#drop();
  }

  /** The prompt's text stands a second time, unseen, before the continuation, which so follows its last line. */
  #mirror() {
    const { value, placeholder } = byId("prompt");
    const answered = byId("continuation").hasChildNodes();
    byId("mirror").textContent = value || (answered ? "" : placeholder);
    byId("sheet").classList.toggle("answered", answered);
    byId("sheet").classList.toggle("stale", Boolean(this.answer) && value !== this.answer.body.prompt);
  }

  #drop() {
    this.answer = null;
    byId("continuation").replaceChildren();
    byId("completion-notes").replaceChildren();
    this.#mirror();
    byId("prompt").focus();
  }
}

export class Chat {
  #turns = [];

  get empty() {
    return !this.#turns.length;
  }

  get answer() {
    return this.#turns.findLast((turn) => turn.answer)?.answer ?? null;
  }

  set answer(answer) {
    this.#turns.at(-1).answer = answer;
  }

  next() {
    const message = byId("message").value;
    return this.#request(message ? [...this.#turns, { role: "user", text: message }] : this.#turns);
  }

  start(again) {
    if (again) {
      if (this.#turns.at(-1)?.role === "assistant") this.#remove();
    } else {
      const text = byId("message").value;
      if (!text.trim()) return null;
      byId("message").value = "";
      this.#add({ role: "user", text }, "You", make("p", { className: "text said" }, text));
    }
    const request = this.#request(this.#turns);
    const { output, notes } = places("div", "Answer");
    output.className = "text";
    this.#add({ role: "assistant" }, "Model", output, notes);
    return { ...request, output, notes };
  }

  /** An answer of nothing leaves no turn: what it was to answer can be sent again. */
  end(answer) {
    if (!answer.tokens.length && !answer.text) this.#remove();
  }

  clear() {
    while (!this.empty) this.#remove();
    byId("message").focus();
  }

  #request(turns) {
    const system = byId("system").value;
    const messages = turns.map(({ role, text, answer }) => ({ role, content: text ?? answer.text }));
    if (system.trim()) messages.unshift({ role: "system", content: system });
    return { path: "/v1/chat/completions", body: { messages } };
  }

  #add(turn, who, ...content) {
    turn.node = make("li", { className: turn.role }, make("h2", {}, who), ...content);
    byId("turns").append(turn.node);
    this.#turns.push(turn);
  }

  #remove() {
    this.#turns.pop().node.remove();
  }
}
