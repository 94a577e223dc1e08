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

_EXCLUSIVE = """
    allowed/forbidden allowed/prohibited allowed/banned permitted/forbidden permitted/prohibited permitted/banned
    open/closed optional/mandatory optional/compulsory optional/obligatory voluntary/mandatory voluntary/compulsory
    accepted/rejected accepted/refused approved/rejected increased/decreased rose/fell higher/lower public/confidential
    valid/invalid possible/impossible included/excluded mandatory/forbidden
    erlaubt/verboten erlaubt/untersagt gestattet/verboten gestattet/untersagt offen/geschlossen geöffnet/geschlossen
    freiwillig/verpflichtend freiwillig/vorgeschrieben stieg/sank stiegen/sanken höher/niedriger öffentlich/vertraulich
    gültig/ungültig möglich/unmöglich angenommen/abgelehnt genehmigt/abgelehnt kostenlos/kostenpflichtig
    autorisé/interdit autorisée/interdite autorisés/interdits autorisées/interdites permis/interdit ouvert/fermé
    ouverte/fermée ouverts/fermés ouvertes/fermées facultatif/obligatoire facultative/obligatoire
    facultatifs/obligatoires accepté/refusé acceptée/refusée acceptés/refusés augmenté/diminué possible/impossible
    inclus/exclu incluse/exclue gratuit/payant gratuite/payante public/confidentiel
    permesso/vietato permessa/vietata permessi/vietati permesse/vietate consentito/vietato consentita/vietata
    ammessi/vietati aperto/chiuso aperta/chiusa aperti/chiusi aperte/chiuse facoltativo/obbligatorio
    facoltativa/obbligatoria aumentato/diminuito aumentati/diminuiti possibile/impossibile incluso/escluso
    inclusa/esclusa accettato/rifiutato accettati/rifiutati
    permitido/prohibido permitida/prohibida permitidos/prohibidos permitidas/prohibidas abierto/cerrado abierta/cerrada
    abiertos/cerrados abiertas/cerradas opcional/obligatorio opcional/obligatoria voluntario/obligatorio
    voluntaria/obligatoria aceptado/rechazado aceptada/rechazada aumentó/disminuyó aumentaron/disminuyeron
    posible/imposible incluido/excluido incluida/excluida público/confidencial
"""
"""What is said of one thing, and only one of both can be. Not what tells two things apart, such as their left and right
gates, and nothing that may be both, such as what opens at one hour and closes at another."""


def _both_ways(pairs: str) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for pair in pairs.split():
        one, other = pair.split("/")
        found.setdefault(one, set()).add(other)
        found.setdefault(other, set()).add(one)
    return {word: frozenset(others) for word, others in found.items()}


_OPPOSITES = _both_ways(_PAIRS)
_EXCLUDED = _both_ways(_EXCLUSIVE)


def opposites_of(word: str) -> frozenset[str]:
    """Lower-case words that say the contrary of a lower-case word."""
    return _OPPOSITES.get(word, frozenset())


def excluded_by(word: str) -> frozenset[str]:
    """Lower-case words that cannot be true of what a lower-case word is said of."""
    return _EXCLUDED.get(word, frozenset())
