"""A document, as a source yields it: one text or one chat."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, or one chat if it has messages."""

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

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of the contents of a chat's turns."""
        texts = [turn['content'] for turn in self.messages] if self.messages else [self.text]
        return sum(len(text.encode('utf-8', 'surrogatepass')) for text in texts)
