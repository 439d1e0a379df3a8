"""Refuse every connection that would leave this machine.

Python imports this file by itself when its folder is on PYTHONPATH. A refusal raises OSError, as
a dead network would, and appends one line to the file named by NETWORK_GUARD_LOG, so that a
refusal which a library swallows is seen all the same. Only Python's own sockets are watched.
"""

import ipaddress
import os
import socket
import sys


def is_local(host) -> bool:
    """Whether `host` (str, bytes or None) is this machine."""
    if host is None:
        return True
    name = host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else str(host)
    if name.lower() in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        return False


def refuse(event: str, host) -> None:
    log = os.environ.get("NETWORK_GUARD_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{event} {host!r} by {' '.join(sys.argv)}\n")
    raise OSError(f"network guard: {event} to {host!r} refused, it is not this machine")


def watch(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = arguments[:2]
        internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        if internet and isinstance(address, tuple) and not is_local(address[0]):
            refuse(event, address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not is_local(arguments[0]):
        refuse(event, arguments[0])


sys.addaudithook(watch)
