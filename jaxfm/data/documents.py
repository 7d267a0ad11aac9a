"""A document, as a source yields it: one text, one chat, or chats of which one is better."""

import dataclasses
from typing import Literal

# pair: two chats of which the first is better. labelled: a chat that is wanted, or not wanted.
Kind = Literal['text', 'chat', 'pair', 'labelled']
KIND_NAMES: dict[Kind, str] = {
    'text': 'a text',
    'chat': 'a chat',
    'pair': 'a pair of chosen and rejected',
    'labelled': 'a chat with a label',
}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text; or one chat if it has messages; or a pair of chats if it has `rejected`, too."""

    # Stable and unique within a source: 'chats.jsonl:17', 'json/decoder.py'.
    name: str
    text: str = ''
    # Turns, as chat templates expect them: {'role', 'content' (str)} and optional keys
    # ('tool_calls', 'tool_call_id', 'name').
    messages: tuple[dict, ...] = ()
    # Descriptions of the tools that the assistant may call.
    tools: tuple[dict, ...] = ()
    # A label; evaluations also report scores per group.
    group: str = ''
    # The turns of another chat that begins with the same turns as `messages`, but goes on worse.
    rejected: tuple[dict, ...] = ()
    # Whether the chat goes on as wanted; None: nobody has said.
    is_wanted: bool | None = None
    # Of a pair, or of a chat with a label: how many of its first turns are given.
    num_given: int = 0

    @property
    def kind(self) -> Kind:
        """What it is; all documents of a source are the same."""
        if self.rejected:
            return 'pair'
        if self.is_wanted is not None:
            return 'labelled'
        return 'chat' if self.messages else 'text'

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of the contents of all turns."""
        turns = (*self.messages, *self.rejected)
        texts = [turn['content'] for turn in turns] if turns else [self.text]
        return sum(len(text.encode('utf-8', 'surrogatepass')) for text in texts)
