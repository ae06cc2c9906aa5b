"""Who may talk to the page: requests that name this machine and come from this page."""

import asyncio

import pytest

from vlmdpo.web.guard import Hosts, OnlyThisPage, is_local


def _status(hosts, kind="http", **headers):
    """The status of a request with these headers; 200 where it reaches the app."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": kind, "headers": pairs}
    asyncio.run(OnlyThisPage(app, hosts)(scope, None, send))
    return sent[0].get("status", sent[0].get("code"))


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [
        ("127.0.0.1", "127.0.0.1:7860", 200),
        ("127.0.0.1", "localhost:9000", 200),
        ("127.0.0.1", "[::1]:7860", 200),
        ("127.0.0.1", "evil.example:7860", 403),
        ("127.0.0.1", "192.168.1.5:7860", 403),
        ("127.0.0.1", "", 403),
        ("127.0.0.1", "[::1", 403),
        ("0.0.0.0", "192.168.1.5:7860", 200),
        ("0.0.0.0", "evil.example", 403),
        ("gpu-box", "gpu-box:7860", 200),
    ],
)
def test_the_host_must_be_this_machine(host, asked, status):
    assert _status(Hosts(host), host=asked) == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:7860", 200),
        ("http://localhost:7860", 403),
        ("http://127.0.0.1:9999", 403),
        ("http://127.0.0.1:9999.evil.example", 403),
        ("http://evil.example", 403),
        ("null", 403),
    ],
)
def test_the_origin_must_be_this_page(origin, status):
    assert _status(Hosts("127.0.0.1"), host="127.0.0.1:7860", origin=origin) == status


def test_proxies_and_relays_are_named():
    hosts = Hosts("127.0.0.1", ["Proxy.example"])
    assert _status(hosts, host="proxy.example", origin="https://proxy.example") == 200
    assert _status(hosts, host="127.0.0.1:7860", origin="https://proxy.example") == 200
    assert _status(hosts, host="a.gradio.live", origin="https://a.gradio.live") == 403
    hosts.add("https://a.gradio.live")
    assert _status(hosts, host="a.gradio.live", origin="https://a.gradio.live") == 200


def test_websockets_are_refused_and_startup_is_not():
    assert _status(Hosts("127.0.0.1"), "websocket", host="evil.example") == 1008
    assert _status(Hosts("127.0.0.1"), "lifespan") == 200


def test_local_addresses():
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert not is_local("0.0.0.0")
    assert not is_local("gpu-box")
