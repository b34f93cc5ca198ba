"""Numbers with units, read exactly: decimals and fractions as ratios of whole numbers, never as Python."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 120  # characters of a quantity
LARGEST_POWER = 300  # of ten; more is not written by people

# Each unit's dimension and its size in the dimension's base.
UNITS: dict[str, tuple[str, Fraction]] = {}
PREFIXES = {
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "d": Fraction(1, 10),
    "c": Fraction(1, 100),
    "m": Fraction(1, 10**3),
    "u": Fraction(1, 10**6),
    "n": Fraction(1, 10**9),
}
WORDS = {"kilo": "k", "mega": "M", "milli": "m", "centi": "c", "micro": "u", "nano": "n"}
for short, full, dimension, scale in (
    ("m", "meter", "length", 1), ("m", "metre", "length", 1), ("g", "gram", "mass", 1), ("s", "second", "time", 1),
    ("L", "liter", "volume", 1), ("l", "litre", "volume", 1), ("J", "joule", "energy", 1), ("N", "newton", "force", 1),
    ("W", "watt", "power", 1), ("V", "volt", "voltage", 1), ("A", "ampere", "current", 1), ("Hz", "hertz", "rate", 1),
    ("Pa", "pascal", "pressure", 1), ("mol", "mole", "amount", 1),
):  # fmt: skip
    for prefix, factor in {"": Fraction(1), **PREFIXES}.items():
        UNITS[prefix + short] = (dimension, Fraction(scale) * factor)
    for word in ("", *WORDS):
        size = Fraction(scale) * (PREFIXES[WORDS[word]] if word else 1)
        UNITS[word + full] = UNITS[word + full + "s"] = (dimension, size)
for names, dimension, amount in (
    ("min minute minutes", "time", 60), ("h hr hrs hour hours", "time", 3600), ("day days", "time", 86400),
    ("week weeks", "time", 604800), ("sec secs", "time", 1), ("year years", "years", 1),
    ("in inch inches", "length", Fraction(254, 10**4)), ("ft foot feet", "length", Fraction(3048, 10**4)),
    ("yd yard yards", "length", Fraction(9144, 10**4)), ("mi mile miles", "length", Fraction(1609344, 1000)),
    ("lb lbs pound pounds", "mass", Fraction(45359237, 10**5)), ("t ton tons tonne tonnes", "mass", 10**6),
    ("deg degree degrees °", "angle", 1), ("% percent \\%", "percent", 1), ("$ dollar dollars usd", "dollar", 1),
    ("€ euro euros", "euro", 1), ("cent cents", "dollar", Fraction(1, 100)), ("£", "pound sterling", 1),
):  # fmt: skip
    UNITS.update({name: (dimension, Fraction(amount)) for name in names.split()})

NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s?(?:"
    r"(?P<whole>\d{1,15})\s+(?P<top>\d{1,15})\s?/\s?(?P<bottom>\d{1,15})"
    r"|(?P<over>\d{1,15})\s?/\s?(?P<under>\d{1,15})"
    r"|(?P<decimal>\d{1,3}(?:,\d{3}){1,8}(?:\.\d{1,40})?(?!\d)|\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})"
    r"(?:\s?(?:[eE]|(?:\*|×|x)\s?10\s?\^)\s?\(?(?P<power>[-+]?\d{1,4})\)?)?"
    r")"
)
UNIT = re.compile(r"[A-Za-z°%$€£/ .'-]{0,60}")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


class Quantity(NamedTuple):
    """A number and its unit's text, "" without one."""

    value: Fraction
    unit: str


def plain(text: str) -> str:
    """LaTeX of simple numbers as plain text: \\frac{1}{2} as 1/2, \\text{cm} as cm, 5^\\circ as 5 °."""
    text = text.strip().strip("$") if text.count("$") > 1 else text.strip()
    text = re.sub(r"(?<=\d)\\[,!;](?=\d{3})", "", text)  # 1\,000
    for old, new in (("−", "-"), ("–", "-"), ("\\,", " "), ("\\!", ""), ("\\;", " "), ("\\ ", " "), ("~", " "),
                     ("\\left", ""), ("\\right", ""), ("{,}", ","), ("\\times", "×"), ("\\cdot", "×"), ("·", "×"),
                     ("^{\\circ}", " °"), ("^\\circ", " °"), ("\\circ", " °"), ("\\degree", " °"), ("\\$", "$"),
                     ("\\%", "%"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("µ", "u"), ("μ", "u")):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"(\d)\s*\\frac\{(\d{1,15})\}\{(\d{1,15})\}", r"\1 \2/\3", text)
    text = re.sub(r"\\frac\{(-?\d{1,15})\}\{(\d{1,15})\}", r"\1/\2", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|operatorname|textbf|mathbf|mbox|textrm|rm)\s*\{([^{}]{0,80})\}", r" \1 ", text)
    text = re.sub(r"10\^\{([-+]?\d{1,4})\}", r"10^\1", text)
    text = re.sub(r"10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,5})", lambda m: "10^" + m[1].translate(SUPERSCRIPTS), text)
    text = re.sub(r"\^\{([23])\}", r"^\1", text).replace("²", "^2").replace("³", "^3")
    return " ".join(text.split())


def quantity(text: str) -> Quantity | None:
    """The number and unit that a text consists of; None where it is anything else.

    >>> quantity("1{,}200\\\\text{ cm}")
    Quantity(value=Fraction(1200, 1), unit='cm')
    """
    if len(text) > LONGEST:
        return None
    text = re.sub(r"^[a-zA-Z]\w{0,3}\s?(?:=|≈)\s?", "", plain(text))  # x = 5
    money = re.match(r"([-+]?)\s?([$€£])\s?", text)
    text = money[1] + text[money.end() :] if money else text
    found = NUMBER.match(text)
    if found is None:
        return None
    rest = text[found.end() :].strip().rstrip(".").strip()
    unit = f"{money[2]}{rest}" if money else rest
    if not UNIT.fullmatch(re.sub(r"\^-?[1-9]\b", "", unit)):
        return None
    value = fraction(found)
    return None if value is None else Quantity(value, unit)


def fraction(found: re.Match[str]) -> Fraction | None:
    """The exact number of a match."""
    part = found.groupdict()
    try:
        if part["whole"]:
            value = int(part["whole"]) + Fraction(int(part["top"]), int(part["bottom"]))
        elif part["over"]:
            value = Fraction(int(part["over"]), int(part["under"]))
        else:
            value = Fraction(part["decimal"].replace(",", "").rstrip(".") or "0")
            power = int(part["power"] or 0)
            if abs(power) > LARGEST_POWER:
                return None
            value *= Fraction(10) ** power
    except ZeroDivisionError:
        return None
    return -value if part["sign"] == "-" else value


def measure(unit: str) -> tuple[str, Fraction] | None:
    """Dimension and size of a unit such as "km/h" or "cm^2"; None for one that is not known."""
    per = re.split(r"\s?/\s?|\s+per\s+", unit)
    if len(per) > 2 or not unit:
        return None
    name, size = "", Fraction(1)
    for i, part in enumerate(per):
        words = {"square": 2, "sq": 2, "cubic": 3}
        first, _, rest = part.strip().partition(" ")
        power = words.get(first.rstrip(".").lower(), 1)
        base = rest if power > 1 else part.strip()
        raised = re.fullmatch(r"(.+?)\s?\^\s?([23])", base)
        base, power = (raised[1], int(raised[2])) if raised else (base, power)
        known = UNITS.get(base) or UNITS.get(base.lower().rstrip("."))
        if known is None:
            return None
        dimension, each = known[0] + (f"^{power}" if power > 1 else ""), known[1] ** power
        if dimension == "length^3":
            dimension, each = "volume", each * 1000  # in litres
        name, size = (f"{name}/{dimension}", size / each) if i else (dimension, each)
    return name, size


def plausible(unit: str) -> bool:
    """Whether this is a unit or a thing that is counted, and no variable of a formula: known, or a word."""
    return not unit or measure(unit) is not None or re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]+){0,3}", unit) is not None


def same_unit(a: str, b: str) -> bool:
    """Whether units that are not known are one word, but for its plural."""
    a, b = (re.sub(r"[^a-z°%$€£]", "", unit.lower()).removesuffix("s") for unit in (a, b))
    return a == b


def agree(truth: Quantity, said: Quantity, tolerance: float) -> bool:
    """Whether two quantities are equal: units converted, and not asked for where only one has any."""
    wanted, found = truth.value, said.value
    if truth.unit and said.unit:
        mine, theirs = measure(truth.unit), measure(said.unit)
        if mine is not None and theirs is not None:
            if mine[0] != theirs[0]:
                return False
            wanted, found = wanted * mine[1], found * theirs[1]
        elif not same_unit(truth.unit, said.unit):
            return False
    elif "percent" in {(measure(truth.unit) or ("",))[0], (measure(said.unit) or ("",))[0]}:
        # 0.5 is 50 %, and so is 50 where percent were asked for.
        whole = Fraction(1, 100)
        if truth.unit:
            return close(wanted, found, tolerance) or close(wanted * whole, found, tolerance)
        return close(wanted, found * whole, tolerance) or close(wanted, found, tolerance)
    return close(wanted, found, tolerance)


def close(wanted: Fraction, found: Fraction, tolerance: float) -> bool:
    """Whether a number is within a share of the wanted one."""
    return abs(wanted - found) <= Fraction(tolerance) * abs(wanted)
