"""Who may talk to the page of `vlmdpo compare`.

A page from elsewhere can make a visitor's browser send requests to 127.0.0.1, under a name of its
own that points there (DNS rebinding); a vote of that kind would become training data. So a request
must name this machine as its host, and come from this very page.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class Hosts:
    """The names under which the page may be asked.

    Args:
        host: the address that is served on.
        more: other names, such as a proxy's.
    """

    def __init__(self, host: str, more: Iterable[str] = ()) -> None:
        self.given = {name.lower() for name in more}
        self.names = {"localhost", host.lower(), *self.given}
        # An address as a host is never another site's name, so any will do where all may come.
        self.is_open = not is_local(host)
        if self.is_open:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def add(self, url: str) -> None:
        """Accept the host of an address, such as that of gradio's relay."""
        name = (urlsplit(url).hostname or "").lower()
        self.given.add(name)
        self.names.add(name)

    def is_given(self, authority: str) -> bool:
        """Whether pages of this host may send requests that reach us under another name: proxies
        and relays show one name to the browser, and another to us.
        """
        return _host_of(authority) in self.given

    def accepts(self, authority: str) -> bool:
        """Whether a host, with or without a port, is one of ours."""
        name = _host_of(authority)
        try:
            return ipaddress.ip_address(name).is_loopback or self.is_open or name in self.names
        except ValueError:
            return name in self.names


def _host_of(authority: str) -> str:
    try:
        found = urlsplit(f"//{authority}")
        _ = found.port  # raises ValueError if it is not a number
        return (found.hostname or "").lower()
    except ValueError:  # nor is a bracket closed
        return ""


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class OnlyThisPage:
    """ASGI middleware that refuses requests of other hosts and other pages."""

    def __init__(self, app: _App, hosts: Hosts) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if not refusal:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": refusal})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": refusal.encode()})

    def _refusal(self, scope: _Scope) -> str:
        """Why a request is refused; "" if it is not."""
        values: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name.lower(), []).append(value.decode("latin-1"))
        hosts, origins = values.get(b"host", []), values.get(b"origin", [])
        if len(hosts) != 1 or not self.hosts.accepts(hosts[0]):
            return (
                "This page is not served under this name; open it by the address that vlmdpo "
                "compare printed, or start it with --allow-host NAME."
            )
        for origin in origins:
            authority = origin.partition("://")[2]
            is_same = authority.lower() == hosts[0].lower()
            if not is_same and not self.hosts.is_given(authority):
                return "Requests to this page may come from itself alone."
        return ""
