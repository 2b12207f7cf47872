"""Units: names and symbols, what they measure and how large they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_TABLE = """
units 1 unit units
length 1 m metre metres meter meters
length 1/100 cm centimetre centimetres centimeter centimeters
length 1/1000 mm millimetre millimetres millimeter millimeters
length 1000 km kilometre kilometres kilometer kilometers
length 0.0254 in inch inches
length 0.3048 ft foot feet
length 0.9144 yd yds yard yards
length 1609.344 mi mile miles
mass 1 g gram grams
mass 1000 kg kilo kilos kilogram kilograms
mass 1/1000 mg milligram milligrams
mass 453.59237 lb lbs pound-mass
mass 28.349523125 oz ounce ounces
time 1 s sec secs second seconds
time 60 min mins minute minutes
time 3600 h hr hrs hour hours
time 86400 day days
time 604800 week weeks
months 1 month months
months 12 yr yrs year years
volume 1 l L litre litres liter liters
volume 1/1000 ml mL millilitre millilitres milliliter milliliters
angle 1 ° deg degree degrees
celsius 1 °C
fahrenheit 1 °F
kelvin 1 kelvin kelvins
dollar 1 $ USD US$ dollar dollars bucks
dollar 1/100 ¢ cent cents
euro 1 € EUR euro euros
pound 1 £ GBP pound pounds
yen 1 ¥ yen JPY
rupee 1 ₹ INR rupee rupees Rs
rouble 1 ₽ RUB rubles roubles
force 1 N newton newtons
energy 1 J joule joules
energy 1000 kJ kilojoule kilojoules
power 1 W watt watts
power 1000 kW kilowatt kilowatts
voltage 1 V volt volts
current 1 A amp amps ampere amperes
frequency 1 Hz hertz
pressure 1 Pa pascal pascals
pressure 1000 kPa kilopascal kilopascals
amount 1 mol mole moles
"""
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(size))
    for kind, size, *names in (line.split() for line in _TABLE.split("\n") if line)
    for name in names
}
CURRENCY = "$€£¥₹₽"
_FIRST = re.compile(r"(square|sq\.?|cubic|cu\.?)\s+", re.IGNORECASE)
_SQUARED = re.compile(r"([A-Za-z]+) (squared|cubed)(?![A-Za-z])", re.IGNORECASE)
_ALIASES = (
    (re.compile(r"(?:°|degrees?)\s*(?:C|celsius|centigrade)(?![A-Za-z])", re.IGNORECASE), "°C"),
    (re.compile(r"(?:°|degrees?)\s*(?:F|fahrenheit)(?![A-Za-z])", re.IGNORECASE), "°F"),
    (re.compile(r"(?<![A-Za-z])mph(?![A-Za-z])"), "mi/h"),
    (re.compile(r"(?<![A-Za-z])(?:kph|kmh)(?![A-Za-z])"), "km/h"),
)
_NAME = re.compile(
    r"(°[CF](?![A-Za-z])|[°$€£¥₹₽¢]|US\$|[A-Za-z]+)(?:\s*(?:\^|\*\*)\s*\{?\s*(-?[0-9])\s*\}?|([23])(?![0-9]))?\s*"
)
_JOIN = re.compile(r"(/|per\b|[*.])?\s*")
_PLURALS = (
    ("ies", "y"),
    ("ves", "f"),
    ("xes", "x"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("sses", "ss"),
    ("s", ""),
)


@dataclass(frozen=True)
class Unit:
    """What a number counts.

    Attributes:
        powers: what is measured, with exponents; empty for things that are no unit.
        size: in the base unit of its kind.
        things: the words themselves, in the singular, where they are no known unit.
        single: one letter, which could be a variable.
    """

    powers: tuple[tuple[str, int], ...]
    size: Fraction = Fraction(1)
    things: tuple[str, ...] = ()
    single: bool = False


def read_unit(text: str) -> Unit | None:
    """A known unit or a product of them: ``cm^2``, ``km/h``, ``square meters``, ``m s^{-1}``."""
    text = text.strip()
    if not text or len(text) > 60:
        return None
    for pattern, by in _ALIASES:
        text = pattern.sub(by, text)
    text = _SQUARED.sub(lambda m: m.group(1) + ("^2" if m.group(2)[0] in "sS" else "^3"), text)
    powers: dict[str, int] = {}
    size, sign, names, at = Fraction(1), 1, 0, 0
    while at < len(text):
        join = _JOIN.match(text, at)
        if join is not None:
            sign = -1 if join.group(1) in ("/", "per") else sign
            at = join.end()
        power = sign
        if first := _FIRST.match(text, at):
            power = sign * (2 if first.group(1)[0] in "sS" else 3)
            at = first.end()
        match = _NAME.match(text, at)
        name = match.group(1) if match else ""
        known = UNITS.get(name) or UNITS.get(name.lower() if len(name) > 2 else name)
        if match is None or known is None:
            return None
        power *= int(match.group(2) or match.group(3) or 1)
        powers[known[0]] = powers.get(known[0], 0) + power
        size *= known[1] ** power
        names, at = names + 1, match.end()
    single = names == 1 and len(text) == 1 and text.isalpha()
    return Unit(tuple(sorted((k, p) for k, p in powers.items() if p)), size, single=single)


def things(text: str) -> Unit | None:
    """Words that are counted, in the singular and without regard to case; None for anything but words."""
    words = re.split(r"\s+", text.strip())
    if len(words) > 1 and words[0].lower() in ("more", "extra", "additional") and "than" not in words:
        words = words[1:]
    if not words or len(words) > 6 or not all(w.replace("-", "").replace("'", "").isalpha() for w in words):
        return None
    return Unit((), things=tuple(singular(w.casefold()) for w in words))


def singular(word: str) -> str:
    """A word without the ending of its plural, roughly; the same for both forms is all that matters."""
    if word.isascii() and len(word) > 3 and not word.endswith("ss"):
        for ending, by in _PLURALS:
            if word.endswith(ending):
                return word.removesuffix(ending) + by
    return word
