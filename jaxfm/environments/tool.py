"""Tools: environments that answer each call that a turn contains, until a turn contains none.

What stands between the marks of a call is what the tool is asked, or a JSON object as chat
templates teach it: `{"name": "calculator", "arguments": {"expression": "2*3"}}`.
"""

import json
import re
from collections.abc import Sequence

from jaxfm.environments import ToolConfig
from jaxfm.environments.base import Environment, Observation


class Tool(Environment):
    """A tool with one argument, a text. A subclass sets the attributes below and writes `answer`.

    Attributes:
      name: as models call it.
      argument: the name of its argument.
      description, of_argument: for the model, in a sentence each.
    """

    name: str
    argument: str
    description: str
    of_argument: str

    def __init__(self, config: ToolConfig):
        self.config, self.role = config, config.role
        self.stop = () if config.role else (config.end,)
        self.tools = (self._schema(),) if config.role == 'tool' else ()
        marks = re.escape(config.start), re.escape(config.end)
        self._calls = re.compile('{}(.*?){}'.format(*marks), re.DOTALL)

    def answer(self, asked: str) -> str:
        """What the tool says. What is wrong with a question is an answer, too."""
        raise NotImplementedError

    def step(self, state: None, text: str, ids: Sequence[int]) -> Observation:
        """The answers to all calls, in lines; done if there is none."""
        asked = self._calls.findall(text)
        if not asked:
            return Observation(done=True)
        said = '\n'.join(map(self._answer, asked))
        return Observation(self.config.result.replace('{result}', said))

    def _answer(self, call: str) -> str:
        try:
            given = json.loads(call)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            return self.answer(call)
        if given.get('name') != self.name:
            return f'error: there is no tool {given.get("name")!r:.40}, only {self.name}'
        arguments = given.get('arguments')
        asked = arguments.get(self.argument) if isinstance(arguments, dict) else None
        if not isinstance(asked, str):
            return f'error: the arguments need {self.argument}, a string'
        return self.answer(asked)

    def _schema(self) -> dict:
        argument = {'type': 'string', 'description': self.of_argument}
        parameters = {
            'type': 'object',
            'properties': {self.argument: argument},
            'required': [self.argument],
        }
        return {'name': self.name, 'description': self.description, 'parameters': parameters}
