"""Where a request comes from, as far as that can be believed."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from aiohttp import web

from core4.api.keys import SETTINGS

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_address(request: web.Request) -> str:
    """The address of the connection; if that is a trusted proxy's, the one that it was asked by, and so on.

    What stands in `X-Forwarded-For` in front of an address that is not trusted is anybody's word.
    """
    trusted = request.app[SETTINGS].trusted_proxies
    address = request.remote or ""
    hops = ",".join(request.headers.getall("X-Forwarded-For", ())).split(",") if trusted else []
    while hops and _is_trusted(address, trusted):
        hop = hops.pop().strip()
        if _parsed(hop) is None:
            break
        address = hop
    return address


@lru_cache(maxsize=10_000)
def neighbourhood(address: str) -> str:
    """What one customer of a network has: the address, of version 6 the first half."""
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed or address)


def _parsed(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_trusted(text: str, trusted: tuple[str, ...]) -> bool:
    address = _parsed(text)
    return address is not None and any(
        network.version == address.version and address in network for network in _networks(trusted)
    )


@lru_cache(maxsize=8)
def _networks(trusted: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text, strict=False) for text in trusted)
