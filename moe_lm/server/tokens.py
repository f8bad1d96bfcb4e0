"""What a token stands for: its bytes, and a text for people."""

import codecs
import json
import re

from tokenizers import Tokenizer, pre_tokenizers

SPACE = "▁"
"""What tokenizers of the SentencePiece kind write for a space."""


class TokenTexts:
    """Bytes of every token of a tokenizer, byte-level or SentencePiece-like. An id without a token has none."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(index for index, token in added.items() if token.special)
        """Tokens that are not in an output's text."""
        byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"])
        read = byte_level_reader() if byte_level else sentencepiece_bytes
        self.bytes: dict[int, bytes] = {
            index: token.encode() if index in added else read(token)
            for token, index in tokenizer.get_vocab(with_added_tokens=True).items()
        }
        self.longest = max(map(len, self.bytes.values()))
        """Bytes of the longest one: so many bytes of text need at least a token."""

    def of(self, token: int) -> bytes:
        return self.bytes.get(token, b"")

    def shown(self, token: int) -> str:
        """The token's text, with replacement characters for what is not whole."""
        return self.of(token).decode(errors="replace")

    def named(self, token: int) -> str:
        """The token's text, different for different bytes, as OpenAI writes those that are not whole characters."""
        own = self.of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


class Offsets:
    """Where tokens begin in the text that they spell, in characters."""

    def __init__(self, texts: TokenTexts):
        self.texts, self.place = texts, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, tokens: list[int]) -> list[int]:
        """Where each token of a prompt begins: behind the last whole character of those before it."""
        places = [self.push(self.texts.of(token)) for token in tokens]
        # What follows does not complete a character of the prompt: its text is decoded apart.
        self.place += len(self.decoder.decode(b"", final=True))
        return places

    def of_output(self, tokens: list[int]) -> list[int]:
        """The same of an output's next tokens."""
        return [self.push(b"" if token in self.texts.special else self.texts.of(token)) for token in tokens]

    def push(self, spelled: bytes) -> int:
        place = self.place
        self.place += len(self.decoder.decode(spelled))
        return place


def byte_level_reader():
    """A function from a token as GPT-2's alphabet writes it (Radford et al. 2019, its encoder.py) to bytes."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = {byte for byte in range(256) if chr(byte) in alphabet}
    rest = iter(range(256, 512))
    table = {chr(byte) if byte in plain else chr(next(rest)): byte for byte in range(256)}

    def read(token: str) -> bytes:
        if not all(char in table for char in token):
            return token.encode()
        return bytes(table[char] for char in token)

    return read


def sentencepiece_bytes(token: str) -> bytes:
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(found[1], 16)])
    return token.replace(SPACE, " ").encode()
