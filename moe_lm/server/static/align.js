// The server tells an answer twice: as text, and as tokens with their bytes. Which token gave which part of the text?

/** Whether UTF-8 `bytes` end inside a character. */
function endsInside(bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte < 0x80) return false;
    if (byte >= 0xc0) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
  }
  return false;
}

/**
 * Turns the two accounts into pieces, in order: `emit({text, beyond, tokens})`. The `text` of all pieces together is
 * the server's text, whatever the tokens say. A piece has several tokens where they share a character, and none for
 * text that no token explains. `beyond` is what its tokens spell outside of the text: a stop string, an end token.
 */
export class Aligner {
  #emit;
  #text = "";
  #shown = 0;
  #open = { tokens: [], bytes: [] };
  #closed = [];
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  constructor(emit) {
    this.#emit = emit;
  }

  /** More text, and more tokens: text comes with its last token or later, never before. */
  push(text, tokens) {
    this.#text += text;
    for (const token of tokens) {
      this.#open.tokens.push(token);
      this.#open.bytes.push(...token.bytes);
      if (!endsInside(this.#open.bytes)) this.#close();
    }
    this.#drain(false);
  }

  /** No more will come: what waited for its text has none. */
  finish() {
    if (this.#open.tokens.length) this.#close();
    this.#drain(true);
  }

  #close() {
    const text = this.#decoder.decode(Uint8Array.from(this.#open.bytes));
    this.#closed.push({ text, tokens: this.#open.tokens });
    this.#open = { tokens: [], bytes: [] };
  }

  #drain(last) {
    while (this.#closed.length) {
      let { text, tokens } = this.#closed[0];
      // SentencePiece writes a space before the first word, which is not in the text.
      if (this.#shown === 0 && text[0] === " " && this.#text && this.#text[0] !== " ") text = text.slice(1);
      let beyond = "";
      if (!this.#text.startsWith(text, this.#shown)) {
        const rest = this.#text.slice(this.#shown);
        const partly = text.startsWith(rest);
        if (partly && !last) return;
        beyond = partly ? text.slice(rest.length) : text;
        text = partly ? rest : "";
      }
      this.#closed.shift();
      this.#shown += text.length;
      this.#emit({ text, beyond, tokens });
    }
    if (this.#shown < this.#text.length && (last || !this.#open.tokens.length)) {
      this.#emit({ text: this.#text.slice(this.#shown), beyond: "", tokens: [] });
      this.#shown = this.#text.length;
    }
  }
}
