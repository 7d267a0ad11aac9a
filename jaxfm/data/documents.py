"""A document: what a source gives, one text or one chat."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, or one chat when it has messages."""

    # Stable and unique within a source: 'chats.jsonl:17', 'json/decoder.py'.
    name: str
    text: str = ''
    # Turns, as chat templates expect them: {'role', 'content' (str)} and what a turn may have
    # beside these ('tool_calls', 'tool_call_id', 'name').
    messages: tuple[dict, ...] = ()
    # Descriptions of the tools that the assistant may call.
    tools: tuple[dict, ...] = ()
    # A label; scores of evaluations are also given by group.
    group: str = ''

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text; of a chat, those of its contents."""
        texts = [turn['content'] for turn in self.messages] if self.messages else [self.text]
        return sum(len(text.encode('utf-8', 'surrogatepass')) for text in texts)
