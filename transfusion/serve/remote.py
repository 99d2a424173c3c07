"""Files of other hosts: fetched from public addresses alone, within a size and a time.

The address that was checked is the one that is connected to, so that a name cannot point elsewhere in between; each
redirect is checked like the first URL.
"""
import http.client
import ipaddress
import socket
import ssl
from urllib.parse import urljoin, urlsplit

SECONDS, REDIRECTS = 10, 3


def fetch(url: str, max_bytes: int) -> bytes:
    """Return the bytes of an http(s) URL.

    Raises:
        ValueError: another scheme, an address that is not public, no answer, an error, too many redirects or bytes.
    """
    for _ in range(REDIRECTS + 1):
        try:
            target, data = _get(url, max_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"image_url: {url[:80]} cannot be fetched ({error}); a data: URL fits") from None
        if target is None:
            return data
        url = urljoin(url, target)
    raise ValueError(f"image_url: more than {REDIRECTS} redirects; a URL without them fits")


def _get(url: str, max_bytes: int) -> tuple[str | None, bytes]:
    """One request: where it redirects to, or None, and the bytes."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"image_url: url is {url[:80]!r}; data:, http: and https: fit")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=SECONDS)
    connection.sock = _connected(parts.hostname, port)
    try:
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=parts.hostname)
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.headers["Location"]:
            return answer.headers["Location"], b""
        if answer.status != 200:
            raise ValueError(f"image_url: {url[:80]} answers {answer.status}; a picture that is there fits")
        data = answer.read(max_bytes + 1)
    finally:
        connection.close()
    if len(data) > max_bytes:
        raise ValueError(f"image_url: {url[:80]} has more than {max_bytes} bytes; a smaller picture fits")
    return None, data


def _connected(host: str, port: int) -> socket.socket:
    """A connection to a host, all of whose addresses are public."""
    found = [address for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address, *_ in found:
        if not is_public(address):
            raise ValueError(f"image_url: {host} is at {address}, which is not public; a public address fits")
    return socket.create_connection(found[0][:2], timeout=SECONDS)


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, also where an IPv6 address wraps one of IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_global and not (mapped or found).is_multicast
