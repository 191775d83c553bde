"""Facts that tests ask about."""

from __future__ import annotations

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Norway Oslo, Poland Warsaw, "
    "Austria Vienna, Japan Tokyo, China Beijing, India Delhi, Nepal Kathmandu, Kenya Nairobi, Egypt Cairo, "
    "Ghana Accra, Senegal Dakar, Peru Lima, Chile Santiago, Cuba Havana, Canada Ottawa"
)


def capital_rows(count: int = 20) -> list[dict[str, object]]:
    """``country``, ``capital``, ``question``, ``answer`` (qa: the city), ``choices``, ``correct`` (mcq: an index)."""
    pairs = [(country, city) for country, city in (entry.split() for entry in CAPITALS.split(", "))]
    rows: list[dict[str, object]] = []
    for number, (country, city) in enumerate(pairs[:count]):
        wrong = [pairs[(number + step) % len(pairs)][1] for step in (1, 2, 3)]
        correct = number % 4
        rows.append(
            {
                "country": country,
                "capital": city,
                "question": f"What is the capital of {country}?",
                "answer": city,
                "choices": [*wrong[:correct], city, *wrong[correct:]],
                "correct": correct,
            }
        )
    return rows
