// What the colours mean, and how much of the answer each has.

import { byId, make } from "./dom.js";
import { PROBABILITIES, SOURCES, percent } from "./answer.js";

const NAMES = { target: "target: the model itself", draft: "draft model, accepted", ngram: "n-gram from the text, accepted" };

const classes = PROBABILITIES.map((least, i) =>
  i === 0 ? `${percent(least)} or more` : least === 0 ? `under ${percent(PROBABILITIES[i - 1])}` : `${percent(least)} on`);

function entries(list, items) {
  return items.map(([key, value, text]) => {
    const sample = make("span", { className: "swatch", ariaHidden: "true" }, "abc");
    sample.dataset[key] = value;
    const share = make("b", {});
    list.append(make("li", {}, sample, ` ${text} `, share));
    return share;
  });
}

const sources = entries(byId("legend-source"), SOURCES.map((source) => ["source", source, NAMES[source]]));
const probabilities = entries(byId("legend-probability"), classes.map((text, i) => ["p", i, text]));

/** The shares of `answer`, none without one. */
export function showShares(answer) {
  const total = answer?.tokens.length;
  const share = (count) => (total ? percent(count / total) : "");
  SOURCES.forEach((source, i) => (sources[i].textContent = share(answer?.bySource.get(source))));
  probabilities.forEach((node, i) => (node.textContent = share(answer?.byProbability[i])));
}
