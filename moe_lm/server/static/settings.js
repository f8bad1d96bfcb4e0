// The sampling controls: their fields, what of them goes into a request, and that they are remembered.

import { byId, make } from "./dom.js";

const STORE = "moe-lm settings";

// `server` is what the server does where a field is not sent; `initial`, where it differs, is what this page begins with.
const GROUPS = [
  ["Which tokens may come", [
    { name: "temperature", server: 1, initial: 0.7, step: 0.1, min: 0, max: 2, hint: "0 takes the likeliest token" },
    { name: "top_p", server: 1, step: 0.05, min: 0, max: 1, hint: "the likeliest that reach this share together" },
    { name: "top_k", server: 0, step: 1, min: 0, hint: "the k likeliest; 0: all" },
    { name: "min_p", server: 0, step: 0.05, min: 0, max: 1, hint: "at least this share of the likeliest" },
  ]],
  ["Against repetition", [
    { name: "repetition_penalty", server: 1, step: 0.05, min: 0, hint: "divides the logits of tokens so far" },
    { name: "presence_penalty", server: 0, step: 0.1, min: -2, max: 2, hint: "off the logits of tokens so far" },
    { name: "frequency_penalty", server: 0, step: 0.1, min: -2, max: 2, hint: "the same, once per occurrence" },
  ]],
  ["Speculation", [
    { name: "speculation", options: [["", "as the server likes"]], hint: "who guesses tokens ahead: changes the speed alone" },
    { name: "draft_tokens", step: 1, min: 1, max: 16, hint: "most guesses per step; empty: as many as pay" },
  ]],
  ["Length and form", [
    { name: "max_tokens", initial: 200, step: 1, min: 1, hint: "most new tokens" },
    { name: "seed", step: 1, hint: "the same seed, the same text; empty: any" },
    { name: "response_format", options: [["", "text"], ["json_object", "a JSON object"]], hint: "what the text must be" },
    { name: "stop", lines: true, hint: "texts that end it, one per line; \\n is a line break" },
  ]],
];
const FIELDS = GROUPS.flatMap(([, fields]) => fields);

const initial = (field) => String(field.initial ?? field.server ?? "");
const input = (field) => byId(`field-${field.name}`);

const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\" };
const unescape = (line) => line.replace(/\\([ntr\\])/g, (_, letter) => ESCAPES[letter]);

/** Builds the fields with the values of last time, and remembers what is changed. */
export function buildSettings() {
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    localStorage.removeItem(STORE);
  }
  byId("fields").append(...GROUPS.map(([title, fields]) =>
    make("fieldset", {}, make("legend", {}, title), ...fields.map(build))));
  for (const field of FIELDS) setValue(field, saved[field.name] ?? initial(field));
  const update = () => {
    const values = FIELDS.filter((field) => input(field).value !== initial(field));
    localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(values.map((field) => [field.name, input(field).value]))));
    for (const field of FIELDS) input(field).closest("p").classList.toggle("changed", values.includes(field));
    summarise();
  };
  byId("fields").addEventListener("input", update);
  byId("fields").addEventListener("submit", (event) => event.preventDefault());
  byId("defaults").addEventListener("click", () => {
    for (const field of FIELDS) setValue(field, initial(field));
    update();
  });
  update();
}

function build(field) {
  const id = `field-${field.name}`;
  let control;
  if (field.options) {
    control = make("select", {}, ...field.options.map(([value, text]) => make("option", { value }, text)));
  } else if (field.lines) {
    control = make("textarea", { rows: 2, spellcheck: false });
  } else {
    control = make("input", { type: "number", step: field.step, min: field.min ?? "", max: field.max ?? "" });
  }
  Object.assign(control, { id, name: field.name });
  control.setAttribute("aria-describedby", `${id}-hint`);
  return make("p", {}, make("label", { htmlFor: id }, field.name.replaceAll("_", " ")), control,
    make("small", { id: `${id}-hint` }, field.hint));
}

function setValue(field, value) {
  const control = input(field);
  if (field.options && ![...control.options].some((option) => option.value === value)) {
    control.append(make("option", { value }, value)); // of another server, or before this one said what it has
  }
  control.value = value;
}

/** What the server can do, as /status says it. */
export function offerSpeculations({ speculations, speculation }) {
  const control = byId("field-speculation");
  const chosen = speculations.includes(control.value) ? control.value : "";
  const fallback = make("option", { value: "" }, `as the server likes (${speculation})`);
  control.replaceChildren(fallback, ...speculations.map((value) => make("option", { value }, value)));
  control.value = chosen;
  control.dispatchEvent(new Event("input", { bubbles: true }));
}

/** The fields of a request that differ from what the server does by itself. */
export function chosenSettings() {
  const chosen = {};
  for (const field of FIELDS) {
    const { value } = input(field);
    if (value.trim() === "" && field.name !== "stop") continue;
    if (field.name === "stop") {
      const texts = value.split("\n").filter(Boolean).map(unescape);
      if (texts.length) chosen.stop = texts;
    } else if (field.name === "response_format") chosen.response_format = { type: value };
    else if (field.options) chosen[field.name] = value;
    else if (Number(value) !== field.server) chosen[field.name] = Number(value);
  }
  return chosen;
}

function summarise() {
  const parts = Object.entries(chosenSettings()).map(([name, value]) =>
    `${name.replaceAll("_", " ")} ${value.type ?? (Array.isArray(value) ? JSON.stringify(value).slice(1, -1) : value)}`);
  byId("settings-summary").textContent = parts.join(" · ") || "as the server does by itself";
}
