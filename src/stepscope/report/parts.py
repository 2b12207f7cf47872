"""What the page is made of: panels of sections, and what a section holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepscope.report.style import Figure
from stepscope.report.tables import Board, Table

_TOKENS_ON_PAGE = 9000
"""Tokens shown on one page in all; each costs about a hundred bytes."""

_EXCERPTS_ON_PAGE = 24000
"""Tokens in the excerpts of one page in all."""

_EXPLORED_ON_PAGE = 200_000
"""Tokens in the linked views of one page in all; each costs about fifteen bytes."""

_LEVELS_ON_PAGE = 200_000
"""Levels of criteria in them in all; each costs about half a byte."""

_POINTS_ON_PAGE = 2400
"""Tokens in the scatter plots of one page in all."""

_HEAT_MAP_SIDE = 128
"""Sequences in a heat map where a page shows one measurement; n take n^2 numbers of six bytes."""


@dataclass(frozen=True)
class TokenSpan:
    """One token of a response.

    Attributes:
        shown: its text.
        level: of its colour, -5 to 5.
        detail: the line shown on hover.
        context: whether a tool or an environment wrote it, not the policy.
    """

    shown: str
    level: int
    detail: str
    context: bool = False


@dataclass(frozen=True)
class Response:
    """One response as shown: heading, prompt and tokens (``text`` alone where there are no tokens)."""

    heading: str
    facts: str
    correct: bool | None
    prompt: str
    text: str
    tokens: Sequence[TokenSpan]


@dataclass(frozen=True)
class Excerpts:
    """Tokens in their responses that the script of the page shows, by step and class.

    Attributes:
        key: part of its element id.
        caption: below it.
        spec: ``steps`` and ``classes`` to choose from, ``most`` shown at once, and ``rows``: step, class,
            influence, facts, prompt, place of the token, and tokens with the level of their colour. A click
            in a figure of the same panel whose point has step and class as ``customdata`` chooses, too.
    """

    key: str
    caption: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Explorer:
    """All tokens of a batch for the linked view that the scripts draw.

    Attributes:
        caption: below it.
        spec: ``quantity`` and ``unit`` in words; ``vocabulary`` (texts) and per token ``text`` (its place
            there), sequence after sequence; ``columns`` of numbers per token (influence, stderr, logprob,
            entropy); ``levels`` of criteria, a letter per token (``f`` is 0, ``a`` to ``k`` are -5 to 5);
            ``classes`` by way: ``title``, ``labels`` and ``codes`` per token; ``sequences``: id, prompt (its
            place in ``prompts``), length, verdict, reward, advantage, influence.
    """

    caption: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One section of the page as the template shows it.

    Attributes:
        key: part of its element id.
        title: heading.
        sentences: what it adds to the headline of its panel.
        intro: a sentence below the heading.
        facts: names and values.
        figures: figures, after the facts.
        legend: whether the colour scale of tokens is explained.
        responses: responses with their tokens.
        excerpts: tokens in their responses that the reader chooses.
        explorer: the linked view of all tokens.
        tables: tables.
        board: a table that the reader filters.
        brief: what it says in a line; a section that has one is folded under it.
        more_title: what unfolds; empty where nothing does.
        more_facts: facts that unfold.
        more_figures: figures that unfold.
        more_tables: tables that unfold.
    """

    key: str
    title: str
    sentences: Sequence[str] = ()
    intro: str = ""
    facts: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    legend: bool = False
    responses: Sequence[Response] = ()
    excerpts: Excerpts | None = None
    explorer: Explorer | None = None
    tables: Sequence[Table] = ()
    board: Board | None = None
    brief: str = ""
    more_title: str = ""
    more_facts: Sequence[tuple[str, str]] = ()
    more_figures: Sequence[Figure] = ()
    more_tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Mark:
    """A verdict in a few words: whether it is a good one, and why where that is not plain."""

    words: str
    good: bool
    why: str = ""


@dataclass(frozen=True)
class Culprit:
    """A token that lowered or raised the quantity, as the first screen shows it.

    Attributes:
        before: what stands before it.
        token: itself.
        after: what stands after it.
        times: how often it stands after the same prompt and prefix.
        value: what it changes, with its error.
        share: of the summed size of all tokens' changes, in per cent.
        resolved: whether its interval leaves out 0.
        place: sequence and position where it stands first, for the link to its response.
    """

    before: str
    token: str
    after: str
    times: int
    value: str
    share: str
    resolved: bool
    place: str


@dataclass(frozen=True)
class Answer:
    """The first screen of a measurement.

    Attributes:
        sentence: what the step does, with its error and in per cent.
        marks: diagnostics, and whether the change is resolved from zero.
        figure: the parts of the change, or None.
        unit: of the tokens' values.
        lowered: the tokens that lowered the quantity most.
        raised: those that raised it most.
        caption: what the lists are.
    """

    sentence: str
    marks: Sequence[Mark]
    figure: Figure | None = None
    unit: str = ""
    lowered: Sequence[Culprit] = ()
    raised: Sequence[Culprit] = ()
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """One measurement or setting on the page.

    Attributes:
        key: of its element.
        title: its heading.
        sentences: headlines, those after the answer's.
        sections: what there is to show, in order.
        answer: its first screen, or None.
    """

    key: str
    title: str
    sentences: Sequence[str]
    sections: Sequence[Section]
    answer: Answer | None = None


@dataclass(frozen=True)
class Room:
    """What one of ``count`` measurements may take of a page, so that the page stays small."""

    count: int

    def tokens(self, responses: int) -> int:
        """Tokens shown of each of so many responses, with half of the page's tokens for all of them."""
        return _TOKENS_ON_PAGE // (2 * responses * self.count)

    @property
    def excerpts(self) -> int:
        """Tokens in excerpts; each costs about ten bytes."""
        return _EXCERPTS_ON_PAGE // self.count

    @property
    def explored(self) -> int:
        """Tokens in a linked view."""
        return _EXPLORED_ON_PAGE // self.count

    def criteria(self, tokens: int) -> int:
        """Criteria whose levels a linked view of so many tokens has."""
        return _LEVELS_ON_PAGE // (self.count * max(1, tokens))

    @property
    def points(self) -> int:
        """Tokens in a scatter plot."""
        return max(200, _POINTS_ON_PAGE // self.count)

    @property
    def side(self) -> int:
        """Sequences in a heat map."""
        return round(_HEAT_MAP_SIDE / math.sqrt(self.count))
