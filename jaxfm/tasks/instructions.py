"""The 25 kinds of instructions of IFEval (Zhou et al. 2023, table 1), each a check of a response.

`KINDS` maps the published id to a function `check(response, **arguments)`, whose arguments have the
published names. Words and sentences are found by regular expressions, not by NLTK's models, so
counts near a bound may differ from the original by one.
"""

import json
import re
from collections.abc import Callable

from jaxfm.storage.find import extra

SENTENCE_END = re.compile(r'[.!?]+["\')\]]*(?:\s+|\Z)')
CAPITAL_WORD = re.compile(r'\w+(?:-\w+)*')
CONSTRAINED = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')


def _compare(count: int, relation: str, bound: int) -> bool:
    """The two published relations."""
    return count < bound if relation == 'less than' else count >= bound


def _is_language(text: str, language: str) -> bool:
    langdetect = extra('langdetect', 'ifeval')
    langdetect.DetectorFactory.seed = 0  # it draws at random
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:  # no letters: counts as followed, as published
        return True


def _keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(word), text, re.I) for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(re.escape(keyword), text, re.I)), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf'\b{re.escape(word)}\b', text, re.I) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    parts = SENTENCE_END.split(text)
    return _compare(sum(bool(part.strip()) for part in parts), relation, num_sentences)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by ***; an empty one is allowed only at the ends."""
    parts = [part.strip() for part in re.split(r'\s?\*\*\*\s?', text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r'\w+', text)), relation, num_words)


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line here."""
    parts = [part.strip() for part in text.split('\n\n')]
    count = sum(map(bool, parts))
    if nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip('\'"')
    word = re.split(r'[.,?!\'"]', word)[0].lower()
    return count == num_paragraphs and word == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r'\[.*?\]', text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    known = {'P.P.S': r'p\.\s?p\.\s?s', 'P.S.': r'p\.\s?s\.'}
    pattern = known.get(postscript_marker) or re.escape(postscript_marker.lower())
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r'^\s*\*[^*].*$', text, re.M)
    return len(stars + re.findall(r'^\s*-.*$', text, re.M)) == num_bullets


def _constrained(text: str) -> bool:
    return any(answer in text for answer in CONSTRAINED)


def _highlights(text: str, num_highlights: int) -> bool:
    """*One star* or **two**; the stars around nothing do not count."""
    found = re.findall(r'\*[^\n*]*\*', text) + re.findall(r'\*\*[^\n*]*\*\*', text)
    return sum(bool(part.strip('*').strip()) for part in found) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    heads = re.findall(rf'{re.escape(section_spliter)}\s?\d+', text)
    return len(heads) >= num_sections


def _json(text: str) -> bool:
    text = re.sub(r'^```(?:json)?|```$', '', text.strip(), flags=re.I)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    found = re.findall(r'<<[^\n]+>>', text)
    return any(title.lstrip('<').rstrip('>').strip() for title in found)


def _two_responses(text: str) -> bool:
    """Separated by six stars; an empty part is allowed only at the ends."""
    parts = [part.strip() for part in text.split('******')]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in CAPITAL_WORD.findall(text))
    return _compare(count, capital_relation, capital_frequency)


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


KINDS: dict[str, Callable[..., bool]] = {
    'keywords:existence': _keywords,
    'keywords:frequency': _frequency,
    'keywords:forbidden_words': _forbidden,
    'keywords:letter_frequency': _letters,
    'language:response_language': _is_language,
    'length_constraints:number_sentences': _sentences,
    'length_constraints:number_paragraphs': _paragraphs,
    'length_constraints:number_words': _words,
    'length_constraints:nth_paragraph_first_word': _first_word,
    'detectable_content:number_placeholders': _placeholders,
    'detectable_content:postscript': _postscript,
    'detectable_format:number_bullet_lists': _bullets,
    'detectable_format:constrained_response': _constrained,
    'detectable_format:number_highlighted_sections': _highlights,
    'detectable_format:multiple_sections': _sections,
    'detectable_format:json_format': _json,
    'detectable_format:title': _title,
    'combination:two_responses': _two_responses,
    'combination:repeat_prompt': _repeat,
    'startend:end_checker': _end,
    'startend:quotation': _quotation,
    'change_case:capital_word_frequency': _capital_words,
    'change_case:english_capital': lambda text: text.isupper() and _is_language(text, 'en'),
    'change_case:english_lowercase': lambda text: text.islower() and _is_language(text, 'en'),
    'punctuation:no_comma': lambda text: ',' not in text,
}
# Kinds that need langdetect.
BY_LANGUAGE = {name for name in KINDS if 'language' in name or 'english' in name}


def variants(response: str) -> list[str]:
    """What the loose score also accepts: without the first line, the last line, and all stars."""
    lines = response.split('\n')
    texts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    cut = ['\n'.join(text).strip() for text in texts]
    return [response, *cut[1:], *(text.replace('*', '') for text in [response, *cut[1:]])]
