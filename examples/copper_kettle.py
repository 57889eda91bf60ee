"""Copper Kettle: what a guest says at the counter -> the order as the till's compact JSON."""

from __future__ import annotations

import json
from itertools import product

from examples.example_set import ExampleSet, Row

PHRASINGS = (
    "Can I get {count} {size} {milk}{drink}{where}?",
    "I would like {count} {size} {milk}{drink}{where}, please.",
    "{count} {size} {milk}{drink}{where}.",
    "Make that {count} {size} {milk}{drink}{where}.",
    "We will take {count} {size} {milk}{drink}{where}, thank you.",
)
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
SIZES = ("small", "medium", "large")
MILKS = {"": None, "oat ": "oat", "soy ": "soy"}
DRINKS = ("latte", "cappuccino", "cocoa", "chai", "mocha")
WHERES = {" to go": True, " for here": False}


def copper_kettle() -> ExampleSet:
    """The coffee shop's rows: phrasing x count x size x milk x drink x where it is drunk."""
    rows = []
    for phrasing, count, size, milk, drink, where in product(PHRASINGS, COUNTS, SIZES, MILKS, DRINKS, WHERES):
        drinks = drink if count == "one" else drink + "s"
        said = phrasing.format(count=count, size=size, milk=milk, drink=drinks, where=where)
        order = {"item": drink, "count": COUNTS[count], "size": size, "milk": MILKS[milk], "to_go": WHERES[where]}
        answer = json.dumps(order, separators=(",", ":"))
        pairing = f"{count}/{size}/{milk}/{drink}"
        rows.append(Row(pairing, said[0].upper() + said[1:], answer))
    return ExampleSet("copper-kettle", "Write the order as JSON.", tuple(rows))
