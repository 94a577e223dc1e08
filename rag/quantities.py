"""Numbers of a text with what they count: `1,200`, `1 200` and `1.2 thousand` are one number, `12 %` and `12 km` two.

Units and number words are closed lists in five languages: made for telling a copied number from an altered one, not
for converting anything.
"""

from __future__ import annotations

import re

from rag.language import Language

NUMBER_PATTERN = r"\d{1,3}(?:[ \u00a0\u202f'’]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,]\d+)*"

_NUMBER_WORD_LISTS: dict[Language, str] = {
    "en": "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
    "de": "zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn zwanzig",
    "fr": "deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
    "it": "due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici sedici "
    "diciassette diciotto diciannove venti",
    "es": "dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte",
}
_TENS: dict[Language, str] = {
    # Not the words for a hundred: `pour cent` and `per cento` are no numbers.
    "en": "thirty forty fifty sixty seventy eighty ninety",
    "de": "dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "fr": "trente quarante cinquante soixante",
    "it": "trenta quaranta cinquanta sessanta settanta ottanta novanta",
    "es": "treinta cuarenta cincuenta sesenta setenta ochenta noventa",
}
NUMBER_WORDS: dict[Language, dict[str, int]] = {
    language: {word: value for value, word in enumerate(listed.split(), start=2)}
    | {word: 10 * value for value, word in enumerate(_TENS[language].split(), start=3)}
    for language, listed in _NUMBER_WORD_LISTS.items()
}

_MAGNITUDE_LISTS = {
    3: "thousand thousands tausend mille mila mil miles",
    6: "million millions mio mln mn millionen millione milione milioni millón millon millones",
    9: "milliard milliards milliarde milliarden mrd miliardo miliardi bn",
    12: "billon billones billón trillion trillions",
}
_MAGNITUDES = {word: power for power, listed in _MAGNITUDE_LISTS.items() for word in listed.split()}
_BILLION = {"en": 9, "de": 12, "fr": 12, "it": 12, "es": 12}
"""`billion` is a thousand million in English alone."""

_UNIT_LISTS = {
    "percent": "% percent percentage prozent pourcent cento ciento pct",
    "dollar": "$ dollar dollars dollari dólar dólares dolares usd",
    "euro": "€ euro euros eur",
    "pound": "£ pound pounds pfund libra libras sterlina sterline livre livres gbp",
    "second": "second seconds sekunde sekunden seconde secondes secondo secondi segundo segundos",
    "minute": "minute minutes minuten minuto minuti minutos",
    "hour": "hour hours stunde stunden heure heures ora ore hora horas",
    "day": "day days tag tage tagen jour jours giorno giorni día dia días dias",
    "week": "week weeks woche wochen semaine semaines settimana settimane semana semanas",
    "month": "month months monat monate monaten mois mese mesi mes meses",
    "year": "year years jahr jahre jahren an ans année années anno anni año años",
    "decade": "decade decades jahrzehnt jahrzehnte jahrzehnten décennie décennies decennio decenni década décadas",
    "century": "century centuries jahrhundert jahrhunderte jahrhunderten siècle siècles secolo secoli siglo siglos",
    "millimetre": "mm millimeter millimeters millimetre millimetres millimetern millimètre millimètres millimetri",
    "centimetre": "cm centimeter centimeters centimetre centimetres zentimeter centimètre centimètres centimetri",
    "metre": "metre metres meter meters metern mètre mètres metro metri metros",
    "kilometre": "km kilometer kilometers kilometre kilometres kilometern kilomètre kilomètres chilometro chilometri "
    "kilómetro kilómetros",
    "mile": "mile miles mi meile meilen mille-marin miglio miglia milla millas",
    "foot": "foot feet ft fuß pied pieds piede piedi pie pies",
    "gram": "g gram grams gramm gramme grammes grammo grammi gramo gramos",
    "kilogram": "kg kilo kilos kilogram kilograms kilogramm kilogramme kilogrammes chilogrammi chili kilogramos",
    "tonne": "ton tons tonne tonnes tonnen tonnellata tonnellate tonelada toneladas",
    "litre": "litre litres liter liters litern litro litri litros",
    "hectare": "ha hectare hectares hektar ettaro ettari hectárea hectáreas",
    "acre": "acre acres",
    "celsius": "celsius",
    "fahrenheit": "fahrenheit",
    "kelvin": "kelvin",
    "watt": "watt watts vatios",
    "kilowatt": "kw kilowatt kilowatts kilovatios",
    "megawatt": "mw megawatt megawatts megavatios",
    "volt": "volt volts voltios",
}
UNITS = {word: unit for unit, listed in _UNIT_LISTS.items() for word in listed.split()}
RATES = {
    "day": "daily täglich tägliche täglichen quotidien quotidienne giornaliero quotidiano diario diaria",
    "week": "weekly wöchentlich hebdomadaire settimanale semanal",
    "month": "monthly monatlich mensuel mensuelle mensile mensual",
    "year": "yearly annual annually jährlich jährliche jährlichen annuel annuelle annuale annuo anual",
    "hour": "hourly stündlich horaire orario",
}
RATE_WORDS = {word: unit for unit, listed in RATES.items() for word in listed.split()}
_DIMENSION_LISTS = {
    "time": "second minute hour day week month year decade century",
    "money": "dollar euro pound",
    "length": "millimetre centimetre metre kilometre mile foot",
    "mass": "gram kilogram tonne",
    "area": "hectare acre",
    "temperature": "celsius fahrenheit kelvin",
    "power": "watt kilowatt megawatt",
}
DIMENSIONS = {unit: dimension for dimension, listed in _DIMENSION_LISTS.items() for unit in listed.split()}
CURRENCY_SIGNS = frozenset("$€£")


def readings(written: str) -> frozenset[str]:
    """What digits may mean: `1.200` is 1200 or 1.2, `3,50` is 3.5."""
    plain = re.sub(r"[ \u00a0\u202f'’]", "", written)
    groups = re.split(r"[.,]", plain)
    if len(groups) == 1:
        return frozenset([_trimmed(plain)])
    found = set()
    if all(len(group) == 3 for group in groups[1:]) and len(groups[0]) <= 3:
        found.add(_trimmed("".join(groups)))
    if len(groups) == 2 or all(len(group) == 3 for group in groups[1:-1]):
        decimals = groups[-1].rstrip("0")
        whole = _trimmed("".join(groups[:-1]))
        found.add(f"{whole}.{decimals}" if decimals else whole)
    return frozenset(found or [plain])


def magnitude_of(word: str, language: Language | None) -> int | None:
    """The power of ten that a word after a number stands for."""
    if word in ("billion", "billions"):
        return _BILLION[language or "en"]
    return 12 if word == "billionen" else _MAGNITUDES.get(word)


def times_power(numbers: frozenset[str], power: int) -> frozenset[str]:
    """The readings times 10 to the power: `1.2` times 10^3 is `1200`."""
    return frozenset(_shifted(number, power) for number in numbers)


def number_word(word: str, language: Language | None) -> str | None:
    """The digits of a number that is written as a word."""
    value = NUMBER_WORDS[language or "en"].get(word)
    return None if value is None else str(value)


def _shifted(number: str, power: int) -> str:
    whole, _, decimals = number.partition(".")
    moved = decimals[:power].ljust(power, "0")
    rest = decimals[power:]
    return _trimmed(whole + moved) + (f".{rest}" if rest else "")


def _trimmed(digits: str) -> str:
    return digits.lstrip("0") or "0"
