"""Layout of an answer: what changes how it looks and not what it says is taken away. Linear in its length."""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = {
    "\N{MINUS SIGN}": "-", "\N{HYPHEN}": "-", "\N{NON-BREAKING HYPHEN}": "-",
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "√": r"\sqrt ",
    "≤": "<=", "⩽": "<=", "≥": ">=", "⩾": ">=", "≠": "!=", "∞": r" \infty ", "π": r" \pi ", "∪": r" \cup ",
    "∈": r" \in ", "ℝ": r"\mathbb{R}", "∅": r"\emptyset ", "→": r"\to ", "⇒": r"\to ", "⟹": r"\to ", "∴": "",
    "’": "'", "‘": "'", "“": '"', "”": '"', "；": ";", "、": ", ", "，": ", ", "：": ": ", "。": ".",
    "．": ".", "٫": ".", "٬": ",", "º": "°", "˚": "°", "℃": "°C", "℉": "°F", "％": "%", "٪": "%",
    "\u2009": " ", "\u202f": " ", "\u200b": "", "\u2061": "", "\u2062": "", "\ufeff": "",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("([¼-¾⅐-⅞])")
_RANGE = re.compile(r"(?<=\d)\s*[–—‒]\s*(?=\d)")
_DASH = re.compile("[–—‒]")

_COMMANDS = (
    (re.compile(r"\\[!]|\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?)(?![A-Za-z])"), ""),
    (
        re.compile(
            r"\\[,;: ]|(?<=[\w}])~|(?<=[\w}] )~|(?<=[\w}]  )~"
            r"|\\(?:quad|qquad|thinspace|enspace|space)(?![A-Za-z])"
        ),
        " ",
    ),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:leq|leqslant|le)(?![A-Za-z])|=<"), "<="),
    (re.compile(r"\\(?:geq|geqslant|ge)(?![A-Za-z])"), ">="),
    (re.compile(r"\\(?:neq|ne)(?![A-Za-z])"), "!="),
    (re.compile(r"\bis (?:greater|more|larger) than or equal to\b|\bis at least\b", re.IGNORECASE), ">="),
    (re.compile(r"\bis (?:less|smaller) than or equal to\b|\bis at most\b", re.IGNORECASE), "<="),
    (re.compile(r"\bis (?:greater|more|larger) than\b", re.IGNORECASE), ">"),
    (re.compile(r"\bis (?:less|smaller) than\b", re.IGNORECASE), "<"),
    (re.compile(r"\bplus or minus\b", re.IGNORECASE), r"\\pm "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:rightarrow|Rightarrow|implies|longrightarrow)(?![A-Za-z])|[-=]>"), r"\\to "),
    (re.compile(r"\\therefore(?![A-Za-z])"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\(?:degree|deg)(?![A-Za-z])"), "°"),
    (re.compile(r"\\(?:lbrace|\{)"), "{"),
    (re.compile(r"\\(?:rbrace|\})"), "}"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:dots|ldots|cdots)(?![A-Za-z])|…"), "..."),
    (re.compile(r"\\(?:euro)(?![A-Za-z])"), "€"),
    (re.compile(r"\\pounds(?![A-Za-z])"), "£"),
    (re.compile(r"\\#"), "#"),
    (re.compile(r"\+/?-"), r"\\pm "),
    (re.compile(r"(?<![A-Za-z\\])(?:infinity|infty|inf)(?![A-Za-z])", re.IGNORECASE), r" \\infty "),
)
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mbox|hbox|emph|operatorname"
    r"|underline|boldsymbol|bm)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_BRACE = re.compile(r"(?<!\\)[{}]")
BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?=\{)")
_MATH = re.compile(
    r"\$\$(?=\S)([^$]+?)(?<=\S)\$\$|\$(?=[^\s$])([^$]*?)(?<=[^\s\\])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)([^*]+?)\*\*(?!\w)")
_FENCED = re.compile(r"```(?:[a-z]*\n)?([^`]+)```|<(b|i|em|strong|p|u)>(.+)</\2>", re.DOTALL)
_HEADING = re.compile(r"^#{1,6}\s+(?=\S)")
_METRIC = {"m": "metres", "g": "grams", "s": "seconds", "h": "hours", "L": "litres", "N": "newtons"}
_WRAPS = (("__", "__"), ("_", "_"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("«", "»"))

_ANSWER_WORDS = (
    r"answers?|ans|options?|choices?|solutions?|results?|final|respuestas?|r[ée]ponses?|r[ée]sultat|antworten|antwort|l[öo]sung|ergebnis"
    r"|resultado|risposta|resposta|soluci[óo]n|ответ|результат|відповідь|odpowied[źz]|svar|antwoord|cevap|答案|答|答え|정답|답|결과|正解"
    r"|الجواب|الإجابة|उत्तर"
)
_LINKS = r"is|are|was|be|es|est|ist|lautet|[èé]|equals|equal to|это|равен|являются|هو"
_EASTERN_LINKS = "是|为|為|は|は、|은|는"
_CORRECT = (
    r"final|correct|right|correcta|correta|correcte|corretta|bonne|richtige"
    r"|правильный|верный|正确|最终|最終的な|정확한"
)
PHRASE = re.compile(
    rf"^(?:(?:so|thus|hence|therefore|then|and)\b,?\s*)*(?:(?:the|my|our|la|le|el|die|das|a|o|il|l')\s*)?"
    rf"(?:(?:{_CORRECT})\s*)?(?:{_ANSWER_WORDS})\s*(?:(?:{_CORRECT})\s*)?(?:(?:(?:{_LINKS})(?![A-Za-z])|{_EASTERN_LINKS})\s*[:=]?|[:=])\s*",
    re.IGNORECASE,
)
_IT_IS = re.compile(
    r"^(?:so|thus|hence|therefore|il y a|it is|it's|it was|that is|there are|there is|this is)\b\s*[,:]?\s*",
    re.IGNORECASE,
)


def braces(text: str) -> dict[int, int]:
    """Where each opening brace is closed, escaped ones aside; those that stay open are missing."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    return closing


def unbox(text: str) -> str | None:
    r"""The text with its ``\boxed{...}`` opened; None where several stand side by side or one stays open."""
    for _ in range(8):
        boxes = list(BOX.finditer(text))
        if not boxes:
            return text
        start = boxes[0].end()
        stop = braces(text).get(start, -1)
        if stop < 0 or any(box.start() > stop for box in boxes):
            return None
        text = text[: boxes[0].start()] + " " + text[start + 1 : stop] + " " + text[stop + 1 :]
    return None


def _characters(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda m: " " + unicodedata.normalize("NFKC", m.group()).replace("⁄", "/"), text)
    text = _DASH.sub("-", _RANGE.sub(" to ", text))
    out = []
    for character in text:
        if character in _CHARACTERS:
            out.append(_CHARACTERS[character])
        elif unicodedata.category(character) == "Nd":
            out.append(str(unicodedata.digit(character)))
        else:
            out.append(character)
    folded = unicodedata.normalize("NFKC", "".join(out))
    return "".join(_CHARACTERS.get(c, c) for c in folded)


def _unwrap_math(text: str) -> str:
    """Math delimiters taken away; two formulas with nothing but space between them are two parts."""
    spans = list(_MATH.finditer(text))
    out, last = [], 0
    for number, span in enumerate(spans):
        between = text[last : span.start()]
        out.append(", " if number and not between.strip() else between)
        out.append(next(g for g in span.groups() if g is not None))
        last = span.end()
    return "".join(out) + text[last:]


def _peel(text: str) -> str:
    """Surrounding marks, phrases such as ``the answer is`` and the full stop taken away, until nothing is."""
    for _ in range(8):
        before = text
        text = _HEADING.sub("", _BOLD.sub(r"\1", text.strip()))
        if fenced := _FENCED.fullmatch(text):
            text = (fenced.group(1) or fenced.group(3)).strip()
        for left, right in _WRAPS:
            inner = text[len(left) : len(text) - len(right)]
            if (
                len(text) > len(left + right)
                and text.startswith(left)
                and text.endswith(right)
                and left not in inner
            ):
                text = inner.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        text = PHRASE.sub("", text)
        if len(text.split()) > 1:
            text = _IT_IS.sub("", text)
        text = re.sub(r"^(?:[-=]>|[=•]|\\to(?![A-Za-z]))\s*", "", text)
        if text == before:
            break
    return text


def tidy(text: str) -> str | None:
    r"""The text without layout; None where it offers several boxes.

    Compatibility characters, digits of all scripts, dashes and mathematical signs get one form; LaTeX spacing
    and sizing commands, ``\text{}`` and math delimiters go; so do ``\boxed{}``, markdown marks, quotes, a
    phrase such as ``The answer is`` and a full stop at the end.
    """
    unboxed = unbox(_peel(text.replace("\\\\", "\n")))
    if unboxed is None:
        return None
    text = _characters(_unwrap_math(unboxed.replace("\x00", "").replace(r"\$", "\x00"))).replace("\x00", "$")
    for _ in range(4):
        text = _TEXT.sub(_spaced, text)
    for pattern, by in _COMMANDS:
        text = pattern.sub(by, text)
    return re.sub(r"[^\S\n]+", " ", _peel(text)).strip()


def _spaced(match: re.Match[str]) -> str:
    """Content of a text command, apart from what stands before it; one letter behind a value is a unit."""
    before = match.string[match.start() - 1 : match.start()]
    content = match.group(1)
    value = match.string[: match.start()].rstrip(" \\,;:~")[-1:]
    if value.isalnum() or value in ("}", ")"):
        content = _METRIC.get(content.strip(" \\,~"), content)
    return (" " if before.isalnum() or before == "}" else "") + content
