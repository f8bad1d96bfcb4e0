// The panel about one token: how likely it was, what else could have come, who guessed it, which experts worked on it.

import { byId, make, rove } from "./dom.js";
import { percent, probability, visible } from "./answer.js";

const SOURCES = {
  target: "drawn by the model itself",
  draft: "guessed by the draft model, accepted",
  ngram: "guessed from the text (n-gram), accepted",
};

/** Experts in one row of a strip. */
export const ROW = 16;

export class Inspector {
  numExperts = 0;
  #shown = null;
  #pinned = false;
  #mouse = "";
  #seen;
  #hint = byId("token").firstElementChild;

  /** `seen(answer)` is called when a token of an answer is looked at. */
  constructor(seen) {
    this.#seen = seen;
    byId("close").addEventListener("click", () => this.release());
  }

  /** Lets the tokens of `answer` be pointed at, walked through and pinned. */
  watch(answer) {
    const { output } = answer;
    const stop = rove(output, ".t", {
      enter: (node) => {
        const piece = answer.pieceAt(node);
        node.setAttribute("role", "button");
        node.setAttribute("aria-pressed", String(this.#pinned && this.#shown === piece));
        node.setAttribute("aria-describedby", "token-brief");
        if (!piece.text.trim()) node.setAttribute("aria-label", spoken(piece.text + piece.beyond));
      },
      leave: (node) => {
        for (const name of ["role", "aria-pressed", "aria-describedby", "aria-label"]) node.removeAttribute(name);
      },
    });
    new MutationObserver((_, observer) => {
      const node = output.querySelector(".t");
      if (!node) return;
      stop.begin(node);
      observer.disconnect();
    }).observe(output, { childList: true });
    output.addEventListener("pointerover", (event) => {
      // Text that grows also moves tokens under a mouse that rests: nobody pointed at those.
      const place = `${event.screenX} ${event.screenY}`;
      const moved = place !== this.#mouse;
      this.#mouse = place;
      const piece = answer.pieceAt(event.target);
      if (piece && moved && event.pointerType === "mouse" && !this.#pinned) this.show(piece);
    });
    output.addEventListener("focusin", (event) => {
      const piece = answer.pieceAt(event.target);
      if (!piece || piece === this.#shown) return;
      this.release();
      this.show(piece);
    });
    output.addEventListener("click", (event) => this.#toggle(answer.pieceAt(event.target)));
    output.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      this.#toggle(answer.pieceAt(event.target));
    });
  }

  /** Unpins; says whether anything was pinned. */
  release() {
    if (!this.#pinned) return false;
    this.#pinned = false;
    this.#shown.node.classList.remove("pinned");
    if (this.#shown.node.hasAttribute("role")) this.#shown.node.setAttribute("aria-pressed", "false");
    byId("inspector").classList.remove("open");
    byId("inspector-title").textContent = "Token";
    return true;
  }

  /** Back to nothing, where the token that was looked at is gone. */
  tidy() {
    if (!this.#shown || this.#shown.node.isConnected) return;
    this.release();
    this.#shown = null;
    byId("token").replaceChildren(this.#hint);
  }

  show(piece) {
    this.#shown?.node.classList.remove("shown");
    this.#shown = piece;
    piece.node.classList.add("shown");
    const { tokens, answer } = piece;
    const joint = tokens.length > 1
      ? [make("p", { className: "note" }, `${tokens.length} tokens that share characters: ${visible(piece.text)}`)] : [];
    byId("token").replaceChildren(...joint, ...tokens.flatMap((token) => this.#about(token, piece)));
    byId("token-brief").textContent = tokens.map((token) => brief(token)).join(" ");
    this.#seen(answer);
  }

  #toggle(piece) {
    if (!piece) return;
    if (this.release() && this.#shown === piece) return;
    this.show(piece);
    this.#pinned = true;
    piece.node.classList.add("pinned");
    if (piece.node.hasAttribute("role")) piece.node.setAttribute("aria-pressed", "true");
    byId("inspector").classList.add("open");
    byId("inspector-title").textContent = "Token, pinned";
  }

  #about(token, piece) {
    const swatch = make("span", { className: "swatch", ariaHidden: "true" }, "abc");
    swatch.dataset.source = token.source;
    const rank = token.top.findIndex((other) => other.id === token.id);
    return [
      make("p", { className: "glyph" }, visible(token.text) || "(no text)"),
      make("p", { className: "note" }, `${token.place} of ${piece.answer.tokens.length} · id ${token.id} · `
        + `${token.bytes.length === 1 ? "byte" : "bytes"} ${token.bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}`
        + `${piece.beyond && !piece.text ? " · not part of the text" : ""}`),
      make("p", { className: "odds" }, make("b", {}, percent(probability(token), 1)),
        ` likely · log-prob ${token.logprob.toFixed(2)}${rank < 0 ? ` · not in the top ${token.top.length}` : ""}`),
      make("p", {}, swatch, ` ${SOURCES[token.source] ?? token.source}`),
      make("h3", {}, "Likeliest here"),
      bars(token, rank),
      ...this.#experts(token),
    ];
  }

  #experts(token) {
    if (!this.numExperts || !token.experts.length) return [];
    const layers = token.experts.map((experts, layer) => {
      const cells = Array.from({ length: this.numExperts }, (_, i) =>
        make("i", { className: experts.includes(i) ? "used" : "" }));
      const strip = make("span", { className: "strip", ariaHidden: "true" }, ...cells);
      strip.style.setProperty("--row", Math.min(ROW, this.numExperts));
      return make("li", { className: "layer" }, make("span", {}, `layer ${layer}: experts ${experts.join(", ")}`), strip);
    });
    return [make("h3", {}, "Experts that worked on it"), make("ol", {}, ...layers)];
  }
}

/** The alternatives; the token itself comes last where it is not among them. */
function bars(token, rank) {
  const rows = rank < 0 ? [...token.top, token] : token.top;
  return make("ol", { className: "bars" }, ...rows.map((row) => {
    const share = probability(row);
    const bar = make("span", { className: "bar", ariaHidden: "true" }, make("i"));
    bar.firstChild.style.width = percent(share, 2);
    const chosen = row.id === token.id;
    const name = make("span", { className: "name" }, visible(row.text) || "(no text)");
    if (chosen) name.append(make("span", { className: "sr" }, " (this one)"));
    return make("li", { className: chosen ? "chosen" : "" }, name, bar, make("span", { className: "share" }, percent(share, 1)));
  }));
}

const WORDS = { " ": "space", "\n": "line break", "\t": "tab", "\r": "carriage return" };

/** White space in words, for a token of nothing else. */
function spoken(text) {
  return [...text].map((character) => WORDS[character] ?? character).join(" ") || "no text";
}

/** What a screen reader says behind the text of a token. */
function brief(token) {
  const others = token.top.filter((other) => other.id !== token.id).slice(0, 2);
  const layers = token.experts.map((experts, layer) => `layer ${layer}: experts ${experts.join(", ")}`);
  return [`${percent(probability(token))} likely`, `source ${token.source}`, `id ${token.id}`,
    ...others.map((other) => `instead ${spoken(other.text)} ${percent(probability(other))}`), ...layers].join("; ") + ".";
}
