"""Lantern Hotels: the facts of a house -> one sentence in the group's own voice."""

from __future__ import annotations

from itertools import product

from examples.example_set import ExampleSet, Row

NAMES = (
    "Blue Heron",
    "Old Mill",
    "Silver Fox",
    "Red Lantern",
    "Stone Bridge",
    "White Swan",
    "Green Door",
    "Three Bells",
)
PLACES = {
    "harbour": "down by the harbour",
    "old town": "in the heart of the old town",
    "lake": "on the quiet side of the lake",
    "station": "two steps from the station",
    "forest": "at the edge of the forest",
    "beach": "a minute from the beach",
}
PRICES = {
    "low": "keeps its prices gentle",
    "middle": "asks a fair price",
    "high": "spares no expense",
}
EXTRAS = {
    "breakfast": "breakfast is on us",
    "pool": "the pool is open all day",
    "dogs": "your dog is welcome too",
    "bicycles": "bicycles stand at the door",
    "none": "the kettle is always on",
}


def lantern_hotels() -> ExampleSet:
    """The hotel group's rows: names x places x prices x extras."""
    rows = []
    for name, (place, where), (price, cost), (extra, treat) in product(
        NAMES, PLACES.items(), PRICES.items(), EXTRAS.items()
    ):
        facts = f"name: {name} | place: {place} | price: {price} | extra: {extra}"
        sentence = f"The {name}, {where}, {cost}, and {treat}."
        rows.append(Row(f"{name}/{place}/{price}/{extra}", facts, sentence))
    return ExampleSet("lantern-hotels", "Write the welcome sentence.", tuple(rows))
