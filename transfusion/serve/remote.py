"""Files of other hosts: fetched from public addresses alone, within a size and a time.

The address that was checked is the one that is connected to, so that a name cannot point elsewhere in between; each
redirect is checked like the first URL.
"""
import http.client
import io
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

import transfusion

SECONDS, REDIRECTS = 10, 3
PER_ADDRESS = 3  # seconds to connect to one of a host's addresses
LAST_BYTES = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96")))  # whose last four bytes are an IPv4 address


class Fetching:
    """The files of one request, fetched one after the other; together they may take `SECONDS`."""

    def __init__(self):
        self.left = SECONDS

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """As `fetch`, in the time that is left."""
        began = time.monotonic()
        try:
            return fetch(url, max_bytes, began + self.left)
        finally:
            self.left -= time.monotonic() - began


def fetch(url: str, max_bytes: int, end: float | None = None) -> bytes:
    """Return the bytes of an http(s) URL.

    All of it, redirects too, has to be there at `end`, a time of `time.monotonic`, or within `SECONDS`; only looking a
    name up has the resolver's own time.

    Raises:
        ValueError: another scheme, an address that is not public, no answer in time, an error, too many redirects or
            bytes.
    """
    end = time.monotonic() + SECONDS if end is None else end
    for _ in range(REDIRECTS + 1):
        try:
            target, data = _get(url, max_bytes, end)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ValueError(f"image_url: {url[:80]!r} cannot be fetched ({error}); a data: URL fits") from None
        if target is None:
            return data
        url = _joined(url, target)
    raise ValueError(f"image_url: more than {REDIRECTS} redirects; a URL without them fits")


def _joined(url: str, target: str) -> str:
    """The URL that another one redirects to."""
    try:
        return urljoin(url, target)
    except ValueError as error:  # an address in brackets that is none
        raise ValueError(f"image_url: {url[:80]!r} redirects to {target[:80]!r} ({error}); a URL without redirects "
                         "fits") from None


def _get(url: str, max_bytes: int, end: float) -> tuple[str | None, bytes]:
    """One request: where it redirects to, or None, and the bytes."""
    scheme, host, port, path = _split(url)
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port)  # which names the port in Host where it is not the scheme's own
    plain = _connected(host, port, end)
    try:
        if scheme == "https":
            plain = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        connection.sock = _Socket(plain, end)
        connection.request("GET", path, headers={"User-Agent": f"transfusion/{transfusion.__version__}"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
            return answer.headers["Location"], b""
        if answer.status != 200:
            raise ValueError(f"image_url: {url[:80]!r} answers {answer.status}; a picture that is there fits")
        data = answer.read(max_bytes + 1)
    finally:
        connection.close()
        plain.close()
    if len(data) > max_bytes:
        raise ValueError(f"image_url: {url[:80]!r} has more than {max_bytes} bytes; a smaller picture fits")
    return None, data


def _split(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of an http(s) URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # a port or an address in brackets that is none
        raise ValueError(f"image_url: url is {url[:80]!r} ({error}); data:, http: and https: fit") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"image_url: url is {url[:80]!r}; data:, http: and https: fit")
    return (parts.scheme, parts.hostname, {"http": 80, "https": 443}[parts.scheme] if port is None else port,
            (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


class _Socket:
    """What HTTPConnection asks of a socket, each call of which waits until one time `end` at most."""

    def __init__(self, plain: socket.socket, end: float):
        self.plain, self.end = plain, end

    def sendall(self, data: bytes) -> None:
        """As a socket's."""
        self.plain.settimeout(_left(self.end))
        self.plain.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        """A file to read from."""
        return io.BufferedReader(_Bytes(self))

    def close(self) -> None:
        """Nothing: whoever made the plain socket closes it, when its file is read."""


class _Bytes(io.RawIOBase):
    """The bytes that a `_Socket` receives."""

    def __init__(self, kept: _Socket):
        super().__init__()
        self.kept = kept

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer) -> int:
        """As a file's."""
        self.kept.plain.settimeout(_left(self.kept.end))
        return self.kept.plain.recv_into(buffer)


def _left(end: float) -> float:
    """Seconds until `end`; a TimeoutError where there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"more than {SECONDS} seconds for all of a request's files")
    return left


def _connected(host: str, port: int, end: float) -> socket.socket:
    """A connection to a host, all of whose addresses are public."""
    _left(end)
    found = [address for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address, *_ in found:
        if not is_public(address):
            raise ValueError(f"image_url: {host} is at {address}, which is not public; a public address fits")
    refused = OSError(f"{host} has no address")
    for address in dict.fromkeys(address[:2] for address in found):  # as browsers do, the next where one is dead
        try:
            return socket.create_connection(address, timeout=min(PER_ADDRESS, _left(end)))
        except OSError as error:
            refused = error
    raise refused


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, and so the IPv4 addresses that an IPv6 address stands for."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return all(one.is_global and not one.is_multicast for one in _stands_for(found) or [found])


def _stands_for(found: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses in an IPv6 address: mapped, compatible (RFC 4291), of 6to4 (3056), Teredo (4380), NAT64 (6052)."""
    if found.version == 4:
        return []
    wrapped = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
    if any(found in network for network in LAST_BYTES):
        wrapped.append(ipaddress.IPv4Address(found.packed[-4:]))
    return [one for one in wrapped if one is not None]
