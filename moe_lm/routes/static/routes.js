import { byId, make, rove } from "../../server/static/dom.js";

// The text by expert: colours of one layer, one expert alone, and what every layer did with one token.

const data = JSON.parse(byId("data").textContent);
const text = byId("text");
const nodes = [...text.querySelectorAll("span")];
const place = new Map(nodes.map((node, i) => [node, i]));
const positions = data.rows.flatMap((length) => Array.from({ length }, (_, i) => i));
let layer = Number(byId("layer").value);
let alone = null;
let focused = null;

const choices = (number, i) => data.experts[number].slice(i * data.topK, (i + 1) * data.topK);
const weights = (number, i) => data.weights[number].slice(i * data.topK, (i + 1) * data.topK);

function paint() {
  let taken = 0;
  nodes.forEach((node, i) => {
    const experts = choices(layer, i);
    const rank = alone === null ? 0 : experts.indexOf(alone);
    taken += alone !== null && rank >= 0 ? 1 : 0;
    const shown = node.classList.contains("shown") ? " shown" : "";
    node.className = (rank < 0 ? "off" : `e${experts[rank]}${rank > 0 ? " second" : ""}`) + shown;
  });
  byId("chips").classList.toggle("one", alone !== null);
  for (const chip of byId("chips").children) {
    const expert = Number(chip.dataset.expert);
    chip.setAttribute("aria-pressed", String(expert === alone));
    chip.title = `expert ${expert}: ${data.load[layer][expert]} times the mean load of layer ${layer}`;
  }
  byId("told").textContent = alone === null ? ""
    : `Expert ${alone} took ${taken} of these ${nodes.length} tokens, ${data.load[layer][alone]} times the mean over the`
      + " whole text. Striped: not the first choice.";
}

/** Shows the tokens of one expert, of all if it is alone already. */
function isolate(expert) {
  alone = alone === expert ? null : expert;
  paint();
}

const NAMES = { "\n": "⏎", "\t": "⇥", " ": "␣" };
const visible = (string) => [...string].map((character) => NAMES[character] ?? character).join("") || "(no text)";

function show(node) {
  text.querySelector(".shown")?.classList.remove("shown");
  node.classList.add("shown");
  const i = place.get(node);
  const layers = data.experts.map((_, number) => {
    const percent = weights(number, i);
    const parts = choices(number, i).map((expert, k) => make("b", { className: `e${expert}` }, `${expert}: ${percent[k]}%`));
    return make("li", {}, make("span", {}, `layer ${number}`), ...parts);
  });
  byId("detail").replaceChildren(
    make("p", {}, make("code", {}, visible(node.textContent)), ` ${data.classes[data.kinds[i]]}, position ${positions[i]}; `
      + "experts and their weights:"),
    make("ol", {}, ...layers),
  );
}

rove(text, "span", {
  enter(node) {
    focused = node;
    node.setAttribute("role", "button");
    node.setAttribute("aria-describedby", "detail");
  },
  leave(node) {
    node.removeAttribute("role");
    node.removeAttribute("aria-describedby");
  },
}).begin(nodes[0]);
text.removeAttribute("tabindex");  // its tokens are reached by keys, and scroll it
nodes.slice(1).forEach((node) => { node.tabIndex = -1; });
text.addEventListener("focusin", (event) => show(event.target.closest("span")));
text.addEventListener("pointerover", (event) => {
  const node = event.target.closest("#text span");
  if (node) show(node);
});
text.addEventListener("pointerleave", () => {
  if (focused && document.activeElement === focused) show(focused);
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  isolate(choices(layer, place.get(event.target))[0]);
});
byId("chips").addEventListener("click", (event) => {
  const chip = event.target.closest("button");
  if (chip) isolate(Number(chip.dataset.expert));
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && alone !== null) isolate(alone);
});
byId("layer").addEventListener("change", () => {
  layer = Number(byId("layer").value);
  paint();
});
paint();
