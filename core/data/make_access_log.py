"""Make access.log: one invented day of a small shop's web server. The same seed gives the same file.

python core/data/make_access_log.py > core/data/access.log
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator

SEED, LINES = 20250114, 10_000
DAY = "14/Jan/2025"

# path, weight, typical seconds, typical bytes, the statuses it gives
PAGES = (
    ("/", 18, 0.040, 14_000, "200 200 200 304"),
    ("/products", 14, 0.120, 22_000, "200"),
    ("/products/{id}", 22, 0.075, 18_000, "200 200 200 200 404"),
    ("/search?q={word}", 9, 0.420, 12_000, "200"),
    ("/cart", 8, 0.060, 6_000, "200"),
    ("/cart/add", 6, 0.090, 300, "302"),
    ("/checkout", 3, 0.650, 9_000, "200 200 200 302 500"),
    ("/login", 4, 0.300, 4_000, "200 302 302 401"),
    ("/api/stock/{id}", 10, 0.030, 450, "200 200 200 200 200 429"),
    ("/reports/monthly", 1, 2.600, 180_000, "200 200 200 504"),
    ("/images/{id}.jpg", 16, 0.008, 64_000, "200 304 304"),
    ("/style.css", 8, 0.003, 9_500, "200 304 304 304"),
    ("/wp-login.php", 2, 0.004, 162, "404"),
    ("/export.csv", 1, 1.450, 950_000, "200 403"),
)
NETWORKS = ("192.0.2.", "198.51.100.", "203.0.113.")
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:134.0) Gecko/20100101 Firefox/134.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_2 like Mac OS X) AppleWebKit/605.1.15 Version/18.2 Safari/604.1",
    "examplebot/2.1 (+https://example.com/bot)",
    "curl/8.11.1",
)
WORDS = ("lamp", "chair", "blue+mug", "desk", "kettle", "rug", "shelf")


def main() -> None:
    """Write the log to standard output."""
    dice = random.Random(SEED)
    sys.stdout.writelines(line + "\n" for line in lines(dice))


def lines(dice: random.Random) -> Iterator[str]:
    """All lines in the order of their time; a few are damaged, as in every real log."""
    for number, second in enumerate(sorted(moment(dice) for _ in range(LINES))):
        line = request(dice, second)
        yield line[: dice.randrange(20, 60)] if number % 3000 == 2500 else line


def moment(dice: random.Random) -> int:
    """A second of the day: few at night, most in the evening."""
    while True:
        second = dice.randrange(86_400)
        busy = 0.55 - 0.45 * math.cos((second / 86_400 - 0.12) * 2 * math.pi)
        if dice.random() < busy:
            return second


def request(dice: random.Random, second: int) -> str:
    path, _, seconds, size, statuses = dice.choices(PAGES, weights=[page[1] for page in PAGES])[0]
    path = path.format(id=dice.randrange(1, 120), word=dice.choice(WORDS))
    status = dice.choice(statuses.split())
    method = "POST" if path in ("/cart/add", "/login", "/checkout") and status != "200" else "GET"
    took = 30.0 if status == "504" else dice.lognormvariate(math.log(seconds), 0.5)
    sent = "-" if status == "304" else str(int(size * dice.uniform(0.7, 1.3)) if status == "200" else 512)
    address = dice.choice(NETWORKS) + str(dice.randrange(1, 255))
    clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    referer = "https://shop.example.com/" if dice.random() < 0.6 else "-"
    agent = dice.choices(AGENTS, weights=(60, 30, 8, 2))[0]
    return (
        f'{address} - - [{DAY}:{clock} +0000] "{method} {path} HTTP/1.1" {status} {sent} '
        f'"{referer}" "{agent}" {took:.3f}'
    )


if __name__ == "__main__":
    main()
