// Elements, made and walked through.

export const byId = (id) => document.getElementById(id);

/** An element; children that are strings become text, never markup. */
export function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Calls `update` at most once per frame, however often it is asked for. */
export function oncePerFrame(update) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      update();
    });
  };
}

/** Puts `text` on the clipboard; also where the page is not served over TLS, and the clipboard's API is missing. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, className: "sr" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/**
 * One tab stop for all nodes of `container` that match `selector`; arrow keys, Home and End move between them. Only
 * the current one has a role, so that a screen reader reads the others as the text that they are: `enter(node)` gives
 * it that, `leave(node)` takes it away.
 */
export function rove(container, selector, { enter, leave }) {
  let current = null;
  const choose = (node) => {
    if (current && current !== node) {
      current.tabIndex = -1;
      leave(current);
    }
    current = node;
    node.tabIndex = 0;
    enter(node);
  };
  container.addEventListener("focusin", (event) => {
    const node = event.target.closest(selector);
    if (node) choose(node);
  });
  container.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.matches(selector)) return;
    const nodes = [...container.querySelectorAll(selector)];
    const place = nodes.indexOf(event.target);
    const moves = {
      ArrowRight: () => nodes[place + 1], ArrowLeft: () => nodes[place - 1],
      ArrowDown: () => inNextLine(nodes, place, 1), ArrowUp: () => inNextLine(nodes, place, -1),
      Home: () => nodes[0], End: () => nodes.at(-1),
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    const next = moves[event.key]();
    if (!next) return;
    next.tabIndex = -1;
    next.focus();
  });
  return {
    /** The tab stop before anything was focused. */
    begin(node) {
      if (current?.isConnected) return;
      current = node;
      node.tabIndex = 0;
      enter(node);
    },
  };
}

function inNextLine(nodes, place, direction) {
  const box = (node) => node.getClientRects()[0] ?? node.getBoundingClientRect();
  const from = box(nodes[place]);
  const middle = from.left + from.width / 2;
  let best = null;
  let line = null;
  for (let i = place + direction; nodes[i]; i += direction) {
    const to = box(nodes[i]);
    if (Math.abs(to.top - from.top) < from.height / 2) continue;
    line ??= to.top;
    if (Math.abs(to.top - line) > from.height / 2) break;
    const distance = Math.abs(to.left + to.width / 2 - middle);
    if (best && distance > best.distance) continue;
    best = { node: nodes[i], distance };
  }
  return best?.node;
}
