"""Words that exclude each other, in five languages: a closed list of those that answers of models mix up."""

from __future__ import annotations

_PAIRS = """
    east/west eastern/western north/south northern/southern left/right before/after first/last more/less
    increase/decrease
    increased/decreased rose/fell rise/fall minimum/maximum open/closed opens/closes above/below higher/lower
    highest/lowest largest/smallest longest/shortest oldest/youngest allowed/forbidden permitted/prohibited
    accepted/rejected won/lost inside/outside earlier/later majority/minority most/least always/never men/women
    östlich/westlich östliche/westliche nördlich/südlich nördliche/südliche links/rechts linken/rechten vor/nach
    erste/letzte ersten/letzten mehr/weniger stieg/sank steigt/sinkt mindestens/höchstens offen/geschlossen
    geöffnet/geschlossen über/unter höher/niedriger höchste/niedrigste größte/kleinste längste/kürzeste älteste/jüngste
    erlaubt/verboten gewann/verlor früher/später immer/nie
    est/ouest nord/sud gauche/droite avant/après premier/dernier première/dernière augmenté/diminué
    augmentation/diminution
    ouvert/fermé ouverte/fermée supérieur/inférieur plus/moins autorisé/interdit autorisés/interdits gagné/perdu
    orientale/occidentale settentrionale/meridionale sinistra/destra prima/dopo primo/ultimo prima/ultima
    aumentato/diminuito aperto/chiuso aperta/chiusa superiore/inferiore maggiore/minore permesso/vietato vinto/perso
    este/oeste norte/sur oriental/occidental izquierda/derecha antes/después primero/último primera/última
    aumentó/disminuyó abierto/cerrado abierta/cerrada superior/inferior mayor/menor permitido/prohibido ganó/perdió
"""


def _both_ways() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for pair in _PAIRS.split():
        one, other = pair.split("/")
        found.setdefault(one, set()).add(other)
        found.setdefault(other, set()).add(one)
    return {word: frozenset(others) for word, others in found.items()}


_OPPOSITES = _both_ways()


def opposites_of(word: str) -> frozenset[str]:
    """Lower-case words that say the contrary of a lower-case word."""
    return _OPPOSITES.get(word, frozenset())
