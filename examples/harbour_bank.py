"""Harbour Bank: a customer's message -> the bank's own name for what the customer wants."""

from __future__ import annotations

from examples.example_set import ExampleSet, Row

PHRASINGS = {
    "card stolen": (
        "somebody took my card at {place}",
        "my wallet with the card in it was snatched near {place}",
        "the card has been gone since I left {place}, block it",
        "a thief at {place} has my card now",
    ),
    "card broken": (
        "the chip on my card cracked at {place}",
        "my card is bent and {place} cannot read it",
        "the stripe no longer works, not even at {place}",
        "my card snapped in two at {place}, I want a fresh one",
    ),
    "payment refused": (
        "{place} turned my payment down although there is money",
        "I could not pay at {place}, it said declined",
        "why was the purchase at {place} rejected",
        "the till at {place} refused to take my payment",
    ),
    "charged twice": (
        "{place} took the same amount two times",
        "I see a double booking from {place}",
        "one coffee at {place}, two charges on the statement",
        "the bill of {place} was debited twice",
    ),
    "transfer missing": (
        "the money I sent to {person} never arrived",
        "{person} is still waiting for my transfer",
        "I wired funds to {person} and they have vanished",
        "where is the transfer for {person}",
    ),
    "cancel transfer": (
        "please stop the transfer to {person}",
        "I sent money to {person} by mistake, pull it back",
        "call off what I just wired to {person}",
        "{person} must not get that transfer, undo it",
    ),
    "add joint owner": (
        "I want {person} to share my account",
        "put {person} on the account together with me",
        "how do I make {person} a second holder",
        "{person} and I would like one account for both of us",
    ),
    "move house": (
        "I am moving to {city}, note the new address",
        "from next week my letters should go to {city}",
        "we have relocated to {city}, update my details",
        "my home is in {city} now, please correct the records",
    ),
    "travel notice": (
        "I will be using the card in {city} next month",
        "we fly to {city} soon, keep the card open there",
        "tell your fraud team that I am on holiday in {city}",
        "expect payments from {city}, I am travelling",
    ),
    "find cash machine": (
        "where can I draw money in {city}",
        "which machine in {city} gives cash without a fee",
        "I need notes, is there an ATM in {city}",
        "point me to the closest cash point in {city}",
    ),
}

SLOTS = {
    "place": ("the bakery", "the station", "the market", "the pharmacy", "the cinema", "the garage"),
    "person": ("my sister", "my landlord", "Amina", "Pedro", "the plumber", "our neighbour"),
    "city": ("Lisbon", "Bergen", "Leeds", "Osaka", "Quito", "Dakar"),
}
OPENERS = ("", "Hello, ", "Good morning, ", "Quick question: ")
CLOSERS = ("", " Thanks.")


def harbour_bank() -> ExampleSet:
    """The bank's rows: phrasing x place, person or city x courtesies."""
    rows = []
    for intent, phrasings in PHRASINGS.items():
        for phrasing in phrasings:
            kind = phrasing.split("{")[1].split("}")[0]
            for value in SLOTS[kind]:
                sentence = phrasing.format(**{kind: value})
                rows += [
                    Row(f"{phrasing}/{value}", f"{opener}{sentence}.{closer}", intent)
                    for opener in OPENERS
                    for closer in CLOSERS
                ]
    return ExampleSet("harbour-bank", "Name what the customer wants.", tuple(rows))
