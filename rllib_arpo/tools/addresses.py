"""Which addresses a page may be fetched from: public ones, and those that are allowed.

The rule is about numbers, not names, and so cannot be fooled by a name that resolves
to 127.0.0.1 or by an odd way to write it (2130706433, 0x7f.1, ::ffff:127.0.0.1).
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

from rllib_arpo.errors import ConfigError, ToolError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
# From a host name and a port to the addresses to try, best first.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_PUBLIC_IPV6 = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
# Counted as global by some or all versions of Python, yet no place on the web.
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",  # protocol assignments, a cloud's metadata among them
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # host services of a cloud
        "2001::/23",  # Teredo and other protocol assignments
        "2002::/16",  # 6to4: a private IPv4 address may be inside
        "3fff::/20",  # documentation
    )
)


def parse_networks(networks: Sequence[str], *, setting: str) -> tuple[Network, ...]:
    """Networks such as "10.0.0.0/8" or "::1/128".

    Raises:
        ConfigError: one of them is not a network; names `setting`.
    """
    try:
        return tuple(ip_network(network) for network in networks)
    except ValueError as error:
        raise ConfigError(
            f'`{setting}` {list(networks)}: {error}; write networks as "10.0.0.0/8"'
        ) from error


def may_reach(address: str, allowed: Sequence[Network]) -> bool:
    """Whether an address is public, or inside one of the allowed networks."""
    reached = _carried(ip_address(address))
    return _is_public(reached) or any(reached in network for network in allowed)


def literal_address(host: str) -> str | None:
    """The host of a URL if it is an address itself, else None."""
    try:
        return str(ip_address(host))
    except ValueError:
        return None


async def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host by the system's resolver, in the order to try them.

    Raises:
        ToolError: there is no such host, or the resolver cannot be asked (retryable).
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise ToolError(
                "the name of its server cannot be looked up at present", retryable=True
            ) from error
        raise ToolError("there is no server of that name") from error
    except UnicodeError as error:  # a label of more than 63 characters
        raise ToolError("there is no server of that name") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _carried(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _PUBLIC_IPV6:
        return False
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in _NOT_PUBLIC)
    )
