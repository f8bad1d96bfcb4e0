// Which experts an answer used: per layer a strip of cells, the darker the more of its tokens the expert served.

import { byId, make, rove } from "./dom.js";
import { ROW } from "./inspector.js";

export class Load {
  #answer = null;
  #cells = [];
  #kept = null;
  #lit = [];
  #stop;

  constructor() {
    const strips = byId("load-strips");
    const cellAt = (event) => event.target.closest("button");
    this.#stop = rove(strips, "button", { enter: () => {}, leave: () => {} });
    strips.addEventListener("pointerover", (event) => this.#light(cellAt(event) ?? this.#kept));
    strips.addEventListener("pointerleave", () => this.#light(this.#kept));
    strips.addEventListener("focusin", (event) => this.#light(cellAt(event)));
    strips.addEventListener("focusout", () => this.#light(this.#kept));
    strips.addEventListener("click", (event) => {
      const cell = cellAt(event);
      if (!cell) return;
      this.#kept?.setAttribute("aria-pressed", "false");
      this.#kept = this.#kept === cell ? null : cell;
      this.#kept?.setAttribute("aria-pressed", "true");
      this.#light(this.#kept);
    });
  }

  /** `status` tells the shape of the model; a dense one has nothing to show. */
  show(answer, status) {
    if (answer !== this.#answer) this.release();
    this.#answer = answer;
    const { num_experts: experts = 0, num_experts_per_tok: used = 0 } = status ?? {};
    const layers = experts && answer ? answer.load.length : 0;
    byId("load").hidden = !layers;
    if (!layers) return;
    if (this.#cells.length !== layers || this.#cells[0].length !== experts) this.#build(layers, experts);
    const total = answer.tokens.length;
    const even = (total * used) / experts;
    byId("load-note").textContent = `How many of the ${total} tokens each expert served. Served evenly, it would be `
      + `${even.toFixed(even < 10 ? 1 : 0)} each. Point at a cell to see its tokens.`;
    this.#cells.forEach((cells, layer) => {
      const most = Math.max(...cells.map((_, expert) => answer.load[layer][expert] ?? 0));
      cells.forEach((cell, expert) => {
        const count = answer.load[layer][expert] ?? 0;
        cell.style.setProperty("--heat", count / most);
        cell.title = `layer ${layer}, expert ${expert}: ${count} of ${total} tokens`;
        cell.setAttribute("aria-label", cell.title);
      });
    });
  }

  /** Ends a highlight that a click kept; says whether there was one. */
  release() {
    const kept = this.#kept;
    kept?.setAttribute("aria-pressed", "false");
    this.#kept = null;
    this.#light(null);
    return kept !== null;
  }

  #build(layers, experts) {
    this.#cells = [];
    const strips = Array.from({ length: layers }, (_, layer) => {
      const cells = Array.from({ length: experts }, (_, expert) => {
        const cell = make("button", { type: "button", tabIndex: -1 });
        cell.setAttribute("aria-pressed", "false");
        Object.assign(cell.dataset, { layer, expert });
        return cell;
      });
      this.#cells.push(cells);
      const strip = make("span", { className: "strip" }, ...cells);
      strip.style.setProperty("--row", Math.min(ROW, experts));
      return make("div", { className: "layer" }, make("span", {}, `layer ${layer}`), strip);
    });
    byId("load-strips").replaceChildren(...strips);
    this.#stop.begin(this.#cells[0][0]);
  }

  #light(cell) {
    for (const node of this.#lit) node.classList.remove("lit");
    this.#lit = [];
    document.body.classList.toggle("lighting", Boolean(cell));
    if (!cell) return;
    const { layer, expert } = cell.dataset;
    const worked = (token) => token.experts[layer]?.includes(Number(expert));
    this.#lit = this.#answer.pieces.filter((piece) => piece.tokens.some(worked)).map((piece) => piece.node);
    for (const node of this.#lit) node.classList.add("lit");
  }
}
